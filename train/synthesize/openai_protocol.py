"""OpenAI's chat completions: what is sent, and what comes back as an answer, a reason or a fault that passes."""

import email.utils
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from train.synthesize.generator import Answer, Request

# What is shown of a message is shorter, but a key must be found in it whole before it is cut.
_LONGEST_BODY, _LONGEST_MESSAGE = 30_000, 300
_REFUSING = {
    "content_filter": "the server's filter withheld the answer",
    "tool_calls": "the model called a tool",
    "function_call": "the model called a function",
}


class FaultError(Exception):
    """A fault that may pass: the request is sent again.

    Attributes:
      reason: a word to count it by: the status, "connection", "timeout" or "reply".
      retry_after: seconds for which the server wants no further request.
    """

    def __init__(self, reason: str, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


def chat_body(request: Request) -> dict[str, Any]:
    """The body of a chat completion that asks for a text, without the model."""
    fields: dict[str, Any] = {
        "messages": list(request.messages),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    if request.stop:
        fields["stop"] = list(request.stop)
    if request.schema is not None:
        schema = {"name": "answer", "schema": request.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def answer_of(data: bytes) -> Answer:
    """The answer in the body of a chat completion.

    Args:
      data: the body, JSON.

    Raises:
      FaultError: the body is not JSON, or is not a chat completion.
    """
    reply = _json(data)
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise FaultError("reply", f"it sent no answer but {message_of(data)}")
    finish, text = choice.get("finish_reason"), message.get("content")
    used = reply.get("usage")
    counts: dict[str, Any] = {
        "prompt_tokens": _count(used, "prompt_tokens"),
        "tokens": _count(used, "completion_tokens"),
    }
    # An answer that was withheld has no text.
    refusal = message.get("refusal")
    if isinstance(finish, str) and finish in _REFUSING:
        return Answer("", refused=_REFUSING[finish], **counts)
    if isinstance(refusal, str) and refusal and not text:
        return Answer("", refused=shortened(refusal), **counts)
    # A model that was cut while it was still reasoning has no text, either.
    if text is None and finish == "length":
        text = ""
    if not isinstance(text, str):
        raise FaultError("reply", f"it sent an answer whose content is of type {type(text).__name__}, expected a text")
    if finish not in ("stop", "length"):
        raise FaultError("reply", f"it sent an answer with the finish_reason {finish!r:.40}, expected stop or length")
    # Half of a surrogate pair is no character, and no file could hold it.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return Answer(text, "stop" if finish == "stop" else "length", **counts)


def vector_of(data: bytes) -> list[float]:
    """The vector in the body of an answer of /v1/embeddings. Raises FaultError for another body."""
    reply = _json(data)
    found = reply.get("data") if isinstance(reply, dict) else None
    first = found[0] if isinstance(found, list) and len(found) == 1 else None
    vector = first.get("embedding") if isinstance(first, dict) else None
    if not isinstance(vector, list) or not vector or not all(type(x) in (int, float) for x in vector):
        raise FaultError("reply", f"it sent no vector but {message_of(data)}")
    if not all(map(math.isfinite, vector)):
        raise FaultError("reply", "it sent a vector that is not finite")
    return [float(x) for x in vector]


def models_of(data: bytes) -> list[str]:
    """The names in the body of an answer of /v1/models. Raises FaultError for another body."""
    reply = _json(data)
    cards = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(cards, list):
        raise FaultError("reply", f"it sent no list of models but {message_of(data)}")
    return [card["id"] for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


def message_of(data: bytes) -> str:
    """The message in the body of an error, or else the body; it may be long."""
    text = data[:_LONGEST_BODY].decode("utf-8", "replace")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    # {"error": {"message": ...}}, {"error": ...}, {"message": ...} and {"detail": ...} are all in use.
    for _ in range(2):
        if isinstance(found, dict):
            found = next((found[name] for name in ("error", "message", "detail") if name in found), None)
    return (found if isinstance(found, str) and found else text) or "nothing"


def shortened(text: str) -> str:
    """A text as one line of limited length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}..."


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the header Retry-After asks to wait: a number or a date; 0 without one that can be read."""
    text = headers.get("retry-after", "").strip()
    if text.replace(".", "", 1).isdecimal() and text.isascii():
        # More is no longer than for ever.
        return float(text[:9])
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError, TypeError):
        return 0.0


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise FaultError("reply", f"it sent {len(data)} bytes that are not JSON: {message_of(data)}") from None


def _count(used: object, name: str) -> int:
    value = used.get(name) if isinstance(used, dict) else None
    return value if type(value) is int and value >= 0 else 0
