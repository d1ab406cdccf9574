"""The loopback server behind the page on which people label pairs. It uses the standard library only.

Every request needs the token that is printed at the start, so other users of the machine and other pages in the browser
can neither read nor write. A `Host` that is not loopback is refused (DNS rebinding), and so is a request that another
page makes (cross-site request forgery). The page runs its own script only, and shows texts as text.
"""

import base64
import functools
import hashlib
import hmac
import json
import re
import secrets
import socketserver
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.synthesize.kappa import report
from train.synthesize.review import COMMENT_CHARACTERS, CRITERIA, OVERALL, Review, labeller_name

_PAGE = Path(__file__).with_name("review.html")
_HOSTS = ("127.0.0.1", "localhost")
# A label with the longest comment, each character escaped as two halves of six bytes, fits.
MAX_BODY_BYTES = 16 * COMMENT_CHARACTERS
# A client that sends too much is listened to so far: most read the answer only after their last byte.
_LISTEN_BYTES = 8 * 2**20


class _RefusedError(Exception):
    """A request that is answered with an error.

    Args:
      status: of HTTP.
      message: what was expected, what came, and what to do.
    """

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class ReviewServer(ThreadingHTTPServer):
    """Serves a review to browsers on this machine. `serve_forever` runs it, `server_close` ends it.

    Attributes:
      review: what is labelled.
      name: of the file, to be shown.
      labeller: the only one who may label, or None for all.
      token: that requests need.
    """

    daemon_threads = True

    def __init__(self, review: Review, name: str, labeller: str | None = None, port: int = 0):
        """
        Args:
          review: what is labelled.
          name: of the file, to be shown.
          labeller: the only one who may label; None lets the page ask.
          port: on 127.0.0.1; 0 takes a free one.

        Raises:
          InputError: the port cannot be used, or the name of the labeller is malformed.
        """
        self.review, self.name = review, name
        self.labeller = None if labeller is None else labeller_name(labeller)
        self.token = secrets.token_urlsafe(24)
        if not 0 <= port < 65536:
            raise InputError(f"expected a port from 0 to 65535, got {port}.")
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(f"Cannot listen on port {port}: {error.strerror}. Give another one as --port.") from None

    def server_bind(self) -> None:
        """Binds without asking a name server for the name of this machine, which can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address to open, with the token."""
        return f"http://{self.server_name}:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of a connection."""

    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qwen-jax", ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: addresses have the token."""

    def _answer(self) -> None:
        try:
            # The body is read first, so that the connection can go on after a refusal.
            body = self._body()
            content, kind, headers = self._route(body)
            self._send(HTTPStatus.OK, content, kind, headers)
        except _RefusedError as error:
            self._send(error.status, to_json({"error": str(error)}).encode(), "application/json", {})
        except InputError as error:
            self._send(HTTPStatus.BAD_REQUEST, to_json({"error": str(error)}).encode(), "application/json", {})
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _send(self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            **headers,
        }.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        """Reads the body. Raises _RefusedError if it is too large or its length is not given."""
        given = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"\d{1,15}", given):
            self.close_connection = True
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected a body with a Content-Length, in one piece.")
        length = int(given)
        if length <= MAX_BODY_BYTES:
            return self.rfile.read(length)
        self.close_connection = True
        left = min(length, _LISTEN_BYTES)
        while left > 0 and (part := self.rfile.read(min(left, 2**16))):
            left -= len(part)
        raise _RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a body of at most {MAX_BODY_BYTES:,} bytes, got {length:,}."
        )

    def _route(self, body: bytes) -> tuple[bytes, str, dict[str, str]]:
        """The content, its type and further headers that answer a request."""
        self._check_origin()
        try:
            url = urlsplit(self.path)
        except ValueError:
            raise _RefusedError(HTTPStatus.NOT_FOUND, f"there is no {self.path!r:.100} here.") from None
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if (self.command, url.path) == ("GET", "/"):
            self._check_token(query.get("token", ""))
            content, policy = _page()
            return content, "text/html; charset=utf-8", {"Content-Security-Policy": policy}
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        self._check_token(token.strip() if scheme == "Bearer" else "")
        answers = {
            ("GET", "/api/info"): lambda: self._info(),
            ("GET", "/api/pair"): lambda: self._pair(query),
            ("GET", "/api/report"): lambda: self._report(),
            ("POST", "/api/label"): lambda: self._label(body),
        }
        if (self.command, url.path) not in answers:
            raise _RefusedError(HTTPStatus.NOT_FOUND, f"there is no {self.command} {url.path:.100} here.")
        return to_json(answers[self.command, url.path]()).encode(), "application/json", {}

    def _check_origin(self) -> None:
        """Refuses hosts that are not loopback, and requests that another page makes.

        The port may be any, so that the server can be reached through a tunnel.
        """
        host = self.headers.get("Host", "")
        if not re.fullmatch(rf"({'|'.join(map(re.escape, _HOSTS))})(:\d{{1,5}})?", host):
            raise _RefusedError(HTTPStatus.FORBIDDEN, f"expected a Host of {' or '.join(_HOSTS)}, got {host!r:.100}.")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if origin not in (None, f"http://{host}"):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, f"expected requests of this page, got the Origin {origin!r:.100}."
            )
        if self.command != "GET" and site not in ("none", "same-origin"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, f"expected requests of this page, got a {site:.30} one.")

    def _check_token(self, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise _RefusedError(
                HTTPStatus.UNAUTHORIZED,
                "the token is missing, or is that of another start. Open the address that `qwen-jax data review` "
                "printed.",
            )

    def _labeller(self, value: object) -> str:
        name = labeller_name(value)
        if self.server.labeller not in (None, name):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN,
                f"this review is by {self.server.labeller}; start it without --labeller for others.",
            )
        return name

    def _info(self) -> dict[str, Any]:
        return {
            "name": self.server.name,
            "pairs": len(self.server.review.pairs),
            "labeller": self.server.labeller,
            "criteria": CRITERIA,
            "comment": COMMENT_CHARACTERS,
        }

    def _pair(self, query: dict[str, str]) -> dict[str, Any]:
        """The pair `at`, or without a number the next open one; null if there is none."""
        labeller = self._labeller(query.get("labeller"))
        review = self.server.review
        at: int | None
        if "at" in query:
            if not re.fullmatch(r"\d{1,9}", query["at"]):
                raise InputError(f"expected 'at' as a number, got {query['at']!r:.60}.")
            at = int(query["at"])
        else:
            at = review.next_open(labeller)
        shown = None if at is None else review.show(labeller, at)
        return {"pair": shown, "progress": review.progress(labeller)}

    def _label(self, body: bytes) -> dict[str, Any]:
        """Keeps a label, and shows the next open pair."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected the Content-Type application/json, got {kind!r:.60}."
            )
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the body is not JSON: {error}.") from None
        if not isinstance(values, dict):
            raise InputError(f"expected a JSON object, got a {type(values).__name__}.")
        labeller = self._labeller(values.get("labeller"))
        review = self.server.review
        label = review.add(values)
        at = next(number for number, pair in enumerate(review.pairs) if pair.key == label.key)
        following = review.next_open(labeller, at)
        shown = None if following is None else review.show(labeller, following)
        return {"pair": shown, "progress": review.progress(labeller)}

    def _report(self) -> dict[str, Any]:
        """Agreement, without what would tell a labeller which answers the file prefers."""
        found = report(self.server.review.pairs, self.server.review.labels.newest())
        for one in found["labellers"]:
            del one["agrees_with_file"]
        return {**found, "overall": OVERALL}


@functools.cache
def _page() -> tuple[bytes, str]:
    """The page, and the policy that lets it use its own script and style only."""
    page = _PAGE.read_bytes()

    def hashes(tag: bytes) -> str:
        found = re.findall(b"<" + tag + b">(.*?)</" + tag + b">", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return page, policy
