"""A request that waits or runs: what it has so far, and what its reader has of it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference.completion import Row
from qwen_jax.inference.matching import Matcher
from qwen_jax.inference.outputs import Finished, Step, TokenInfo, TokenInfos
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import NOT_FINITE
from qwen_jax.inference.scheduler import Sequence
from qwen_jax.inference.stream import Stream


@dataclasses.dataclass(frozen=True)
class Times:
    """When things happened to a request that has ended, in seconds of `time.monotonic`, and its sizes.

    Attributes:
      submitted, started, first_token, finished: `started` is when its prompt was first read; None if it was not.
        `first_token` is None if there was none.
      prompt_tokens, output_tokens: counts.
      reason: why it ended; see `Finished`.
    """

    submitted: float
    started: float | None
    first_token: float | None
    finished: float
    prompt_tokens: int
    output_tokens: int
    reason: str


@dataclasses.dataclass
class Active:
    """A request and its state.

    Attributes:
      scheduled: its place in the scheduler.
      row: its text.
      stream: where its steps go; `incremental` tells whether it wants those before the last.
      adapter: number of its adapter in the runner; 0 is none.
      submitted, started, first_token: seconds of `time.monotonic`, as in `Times`.
      logprobs: of the text's tokens; `prompt_logprobs` of the prompt's, if asked for.
      tops: the most likely tokens at each place of the text and their log-probabilities, if asked for.
      matcher: what its grammar allows next.
      cached_tokens: of the prompt, that were found in the prefix cache; None until it begins.
      given: tokens that the reader has.
    """

    scheduled: Sequence
    row: Row
    stream: Stream
    incremental: bool
    adapter: int = 0
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] | None = dataclasses.field(init=False)
    prompt_logprobs: list[TokenInfo | None] | None = None
    matcher: Matcher | None = None
    cached_tokens: int | None = None
    given: int = 0

    def __post_init__(self) -> None:
        self.tops = [] if self.request.top_logprobs else None

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self.scheduled.request

    @property
    def slot(self) -> int:
        """Its place in the device's arrays, while it runs."""
        if self.scheduled.slot is None:
            raise ValueError(f"sequence {self.scheduled.id} is planned, but has no slot")
        return self.scheduled.slot

    @property
    def has_rules(self) -> bool:
        """Whether its logits depend on the tokens so far, or on biases."""
        return self.request.has_penalties or bool(self.request.logit_bias)

    @property
    def is_constrained(self) -> bool:
        """Whether it may have masks."""
        return self.matcher is not None or self.request.min_tokens > 0

    def take(self, token: int, logprob: float, top_K: tuple[np.ndarray, np.ndarray] | None = None) -> bool:
        """Appends a new token, which may end the text; returns False for `NOT_FINITE`, which is not appended.

        The grammar does not go on yet: see `accept`.

        Args:
          token: its id, or `NOT_FINITE`.
          logprob: its log-probability.
          top_K: the most likely tokens and their log-probabilities, at least as many as asked for; None if none were
            asked for.
        """
        if self.first_token is None:
            self.first_token = time.monotonic()
        row = self.row
        row.push(token)
        if token == NOT_FINITE:
            return False
        self.logprobs.append(logprob)
        if self.tops is not None:
            top = self.request.top_logprobs
            self.tops.append(() if top_K is None else tuple(zip(*(x[:top].tolist() for x in top_K), strict=True)))
        return True

    def accept(self, token: int) -> None:
        """Has the grammar go on with the token that the text took last, which may end the text."""
        if self.matcher is not None and not self.row.finish_reason:
            with self.failing():
                self.matcher.accept(token)
            self.end_with_grammar()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """A grammar that goes beyond its limits in the middle of a text ends this request alone."""
        try:
            yield
        except InputError as error:
            self.fail(error)

    def fail(self, error: InputError) -> None:
        """Ends the text because its grammar went beyond its limits."""
        self.row.finish_reason, self.row.error = "error", str(error)

    def end_with_grammar(self) -> None:
        """Ends the text if its grammar lets nothing follow: the end id is not waited for."""
        if self.matcher is not None and not self.row.finish_reason and self.matcher.ended:
            self.row.finish_reason = "stop"

    def give(self) -> None:
        """Gives the reader what is new, if it wants steps as they come."""
        if self.incremental:
            self.stream.put(Step(self.row.new_text(), self._new_tokens()))

    def _new_tokens(self) -> TokenInfos:
        """The tokens that the reader does not have; it has them now."""
        first, self.given = self.given, len(self.logprobs)
        return TokenInfos(self.row.tokens, self.logprobs, self.tops, first, self.given)

    def end(self) -> Times:
        """Gives the reader the last step of a text that has ended."""
        row, completion = self.row, self.row.completion()
        finished = Finished(
            token_ids=row.tokens,
            text=completion.text,
            finish_reason=row.finish_reason,
            stop=row.stopped_by,
            error=row.error,
            tokens=TokenInfos(row.tokens, self.logprobs, self.tops, 0, len(self.logprobs)),
            prompt_logprobs=self.prompt_logprobs,
            cached_tokens=self.cached_tokens or 0,
        )
        self.stream.put(Step(row.rest(completion.text), self._new_tokens(), finished))
        sizes = len(row.prompt), len(row.tokens)
        return Times(self.submitted, self.started, self.first_token, time.monotonic(), *sizes, row.finish_reason)
