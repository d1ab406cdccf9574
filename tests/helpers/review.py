"""What tests of labelled pairs share: files of pairs, labels, and requests to the server with any headers."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from train.synthesize.review import CRITERIA, Labels, Review
from train.synthesize.review_pairs import ReviewPair, read_pairs
from train.synthesize.review_server import ReviewServer


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(count: int) -> list[dict[str, Any]]:
    """Preference pairs of texts, with a further column."""
    return [
        {"prompt": f"What is {i} + {i}?", "chosen": f" {2 * i}", "rejected": f" {2 * i + 1}", "source": f"row {i}"}
        for i in range(count)
    ]


def open_review(path: Path, seed: int = 0) -> Review:
    """The review of a file, with its labels in labels.jsonl beside it."""
    return Review(read_pairs(path).pairs, Labels(path.with_name("labels.jsonl")), seed)


def values(shown: Mapping[str, Any], labeller: str, overall: str | None, **changes: Any) -> dict[str, Any]:
    """What the page sends of a pair that it got; all criteria are as the overall choice."""
    return {
        "labeller": labeller,
        "key": shown["key"],
        "left": shown["left"]["id"],
        "right": shown["right"]["id"],
        "overall": overall,
        "criteria": dict.fromkeys(CRITERIA, overall) if overall else {},
        "comment": "",
        "seconds": 1.5,
        **changes,
    }


def prefer(review: Review, labeller: str, pair: ReviewPair, answer: str | None, **changes: Any) -> None:
    """Labels a pair as a labeller who prefers the answer with this id sees it; None is a tie."""
    shown = review.show(labeller, review.pairs.index(pair))
    sides = {shown["left"]["id"]: "left", shown["right"]["id"]: "right", None: "tie"}
    review.add(values(shown, labeller, sides[answer], **changes))


@contextlib.contextmanager
def serve(review: Review, labeller: str | None = None) -> Iterator[ReviewServer]:
    """A running server, which is closed at the end."""
    with ReviewServer(review, "pairs.jsonl", labeller) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(
    url: str, method: str, path: str, body: Any = None, **headers: str | None
) -> tuple[int, Any, Mapping[str, str]]:
    """Sends a request with the token of an address, as the page does.

    Args:
      url: as `ReviewServer.url`.
      method: of HTTP.
      path: with its query.
      body: bytes, or a JSON value.
      headers: by name with _ for -; None leaves one out.

    Returns:
      Status, body (parsed where it is JSON) and headers.
    """
    parts = urlsplit(url)
    own = {"Authorization": f"Bearer {parse_qs(parts.query)['token'][0]}", "Content-Type": "application/json"}
    given = own | {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection(str(parts.netloc), timeout=20)
    try:
        connection.request(method, path, content, {name: value for name, value in given.items() if value is not None})
        reply = connection.getresponse()
        read = reply.read()
        kind = reply.headers.get("Content-Type", "")
        return reply.status, json.loads(read) if kind == "application/json" else read, reply.headers
    finally:
        connection.close()
