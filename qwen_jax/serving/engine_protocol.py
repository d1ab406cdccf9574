"""What the server needs of an engine, of its grammars, and of a reward model."""

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.inference.active import Times
from qwen_jax.inference.outputs import Stats, Step
from qwen_jax.inference.request import Request
from qwen_jax.inference.structured import Grammar
from qwen_jax.tokenizer import Tokenizer

Pooling = Literal["mean", "last"]


class Stream(Protocol):
    """The steps of one request. The last one has `finished`; after `cancel`, its reason is "abort"."""

    def __aiter__(self) -> AsyncIterator[Step]: ...

    def cancel(self) -> None:
        """Ends the request and frees its pages. May be called at any time, any number of times."""


class Grammars(Protocol):
    """Makes grammars. Each method raises InputError with the reason for what it cannot compile."""

    def json_schema(self, schema: Mapping[str, Any] | str) -> Grammar: ...

    def json_object(self) -> Grammar: ...

    def regex(self, pattern: str) -> Grammar: ...

    def ebnf(self, text: str) -> Grammar: ...

    def choice(self, choices: list[str]) -> Grammar: ...

    def tool_calls(self, tools: Sequence[tuple[str, Mapping[str, Any]]], named: str | None, parallel: bool) -> Grammar:
        """One or more calls in Hermes format.

        Args:
          tools: name and JSON schema of the parameters of each.
          named: the tool that must be called, or None for any of them.
          parallel: whether there may be several calls.
        """


class EngineLike(Protocol):
    """A language model that takes requests at any time. `ContinuousEngine` is one.

    Attributes:
      tokenizer: of the model, or None.
      config: of the model.
      vocab_limit: ids of prompts must be below it.
      max_length: tokens that prompt and completion may have together.
      eos_token_ids: ids that end a text.
      grammars: for structured output, or None where llguidance or the tokenizer is missing.
      adapters: names of the LoRA adapters.
      on_finished: called with each request's times when it ends, perhaps from another thread.
    """

    on_finished: Callable[[Times], None] | None

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def vocab_limit(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    @property
    def grammars(self) -> Grammars | None: ...

    @property
    def adapters(self) -> Collection[str]: ...

    def submit(self, request: Request, *, incremental: bool = True) -> Stream:
        """Queues a request and returns at once. Called on the event loop that iterates over the stream.

        Args:
          request: what is asked for.
          incremental: whether steps come as tokens come; otherwise there may be one step, the last.

        Raises:
          InputError: the request can never run.
        """

    def embed(self, prompts: list[list[int]], pooling: Pooling, *, stopped: Callable[[], bool]) -> np.ndarray:
        """Float32 [prompts, width]; blocks, so the server calls it in a thread.

        Raises:
          CancelledError: of `concurrent.futures`, soon after `stopped` became true.
        """

    def stats(self) -> Stats:
        """Counts of now. Raises RuntimeError if the engine has failed."""

    def close(self, drain: float = 0) -> None: ...


class ScorerLike(Protocol):
    """A reward model. `qwen_jax.inference.Scorer` is one."""

    @property
    def config(self) -> ModelConfig: ...

    def score(self, texts: Sequence[Sequence[int]], *, stopped: Callable[[], bool]) -> np.ndarray:
        """Float32 [texts]; as `EngineLike.embed`."""
