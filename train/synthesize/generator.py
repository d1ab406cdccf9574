"""What writes the texts of synthetic data: one request, one answer, and whatever answers requests."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

Message = Mapping[str, Any]
Finish = Literal["stop", "length"]
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to write. Several samples of a prompt are requests with different seeds.

    Attributes:
      messages: the conversation, of role and content; JSON values only.
      max_tokens: of the answer.
      temperature: of sampling; 0 is greedy.
      top_p: tokens are drawn from the most likely ones that have this probability together.
      seed: of the random numbers; it is a part of what identifies the request.
      stop: texts that end the answer.
      schema: a JSON schema that the answer must have, or None.
    """

    messages: Sequence[Message]
    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    schema: Mapping[str, Any] | None = None

    def key(self, model: str) -> str:
        """The name under which the answer of a model is kept: a hash of everything that decides it, in hexadecimal."""
        text = _ENCODER.encode([model, vars(self)])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
      text: of the answer; "" if it was refused.
      finish: "stop" if the text ended by itself, "length" if it was cut.
      prompt_tokens: of the conversation, as the model counts them.
      tokens: of the answer.
      refused: why the request can never be answered, such as a prompt that is too long; None if it was answered.
    """

    text: str
    finish: Finish = "stop"
    prompt_tokens: int = 0
    tokens: int = 0
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; `Answer(**object)` is the answer again."""
        return dict(vars(self))


class GeneratorDownError(Exception):
    """The generator has not answered for longer than it may. What is known is saved; a later run goes on from there."""


class Generator(Protocol):
    """What answers requests. All methods are called from one event loop.

    Attributes:
      model: names the weights: the model's name or folder. Answers of one model are never taken for another's.
      concurrency: requests that it answers well at the same time.
    """

    model: str
    concurrency: int

    async def ask(self, request: Request) -> Answer:
        """The answer to a request.

        Faults that pass (no connection, 408, 409, 425, 429, 5xx, a time-out, a reply that is no reply) are retried
        inside. A request that can never be answered gives an `Answer` with `refused`.

        Raises:
          GeneratorDownError: the generator has not answered for longer than it may.
        """
        ...

    async def close(self) -> None:
        """Frees connections and devices."""
        ...
