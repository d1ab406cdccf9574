"""What is checked before a request is parsed: API keys and the size of its body."""

import asyncio
import hashlib
import hmac
import json
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_jax.serving.context import Context
from qwen_jax.serving.errors import ApiError

# Anyone may see that the server is there, and load the page, which then asks for a key.
_OPEN = ("/", "/health", "/ping")
# A client that sends too much is listened to for a while, without keeping what it sends: most read the answer only
# after the last byte, and a connection that is closed under their hands loses it.
_LINGER_SECONDS = 2.0


class _TooLargeError(Exception):
    """The body of a request exceeds the limit."""


class Guard:
    """ASGI middleware around the application. It also counts answers.

    Args:
      app: the application.
      context: the server.
    """

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context
        self._keys = [_digest(key.encode()) for key in context.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        limit, read, started = self._context.settings.max_body_bytes, 0, False

        async def counted_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _TooLargeError
            return message

        async def counted_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD") else "other"
                self._context.metrics.http[method, route, str(message["status"])] += 1
            await send(message)

        try:
            self._check_key(scope, headers)
            if _content_length(headers) > limit:
                raise _TooLargeError
            await self._app(scope, counted_receive, counted_send)
        except ApiError as error:
            await error.response()(scope, receive, counted_send)
        except _TooLargeError:
            if not started:
                await _refuse(limit, receive, counted_send, linger=b"expect" not in headers)
        except Exception:
            logging.getLogger("qwen_jax").exception(f"{scope['method']} {scope['path']} failed.")
            if started:
                raise
            failure = ApiError("The server failed; its log says why.", 500, code="internal_error")
            await failure.response()(scope, receive, counted_send)

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError unless the request has one of the keys. The time does not tell how much of it is right."""
        if not self._keys or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        # Every key is compared, so that time does not tell which of them it was either.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                "A valid API key is needed: send it as 'Authorization: Bearer KEY'.",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: bytes) -> bytes:
    """Keys of all lengths become equally long."""
    return hashlib.sha256(key).digest()


def _content_length(headers: dict[bytes, bytes]) -> int:
    value = headers.get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0


async def _refuse(limit: int, receive: Receive, send: Send, *, linger: bool) -> None:
    error = ApiError(f"The body is larger than {limit:,} bytes, this server's limit.", 413, code="request_too_large")
    body = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    end = time.monotonic() + _LINGER_SECONDS
    try:
        while linger:
            async with asyncio.timeout(max(end - time.monotonic(), 0)):
                message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
