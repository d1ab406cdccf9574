"""What the scheduler's engine gives back: tokens as they come, finished texts, and its counts."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, overload


class TokenInfo(NamedTuple):
    """One token.

    Attributes:
      id: its id.
      logprob: its log-probability under the model, without filters, at `Request.logprob_temperature`: by default 1.
      top: the most likely tokens and their log-probabilities, as many as the request asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenInfos(Sequence[TokenInfo]):
    """Some tokens of a text that may still grow. A `TokenInfo` is made when it is looked at: few readers want any.

    Args:
      ids: of all tokens of the text.
      logprobs: log-probabilities of all of them.
      tops: the most likely tokens at each place; None if nobody asked for them.
      start, stop: which of them are meant.
    """

    __slots__ = ("_ids", "_logprobs", "_start", "_stop", "_tops")

    def __init__(
        self,
        ids: list[int],
        logprobs: list[float],
        tops: list[tuple[tuple[int, float], ...]] | None,
        start: int,
        stop: int,
    ) -> None:
        self._ids, self._logprobs, self._tops, self._start, self._stop = ids, logprobs, tops, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> TokenInfo: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[TokenInfo, ...]: ...

    def __getitem__(self, index: int | slice) -> TokenInfo | tuple[TokenInfo, ...]:
        at = range(self._start, self._stop)[index]
        return tuple(map(self._info, at)) if isinstance(at, range) else self._info(at)

    def _info(self, i: int) -> TokenInfo:
        return TokenInfo(self._ids[i], self._logprobs[i], () if self._tops is None else self._tops[i])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def until(self, later: "TokenInfos") -> "TokenInfos":
        """These tokens and those after them of the same text, up to the end of some later ones."""
        return TokenInfos(self._ids, self._logprobs, self._tops, self._start, later._stop)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A text that has ended.

    Attributes:
      token_ids: the new tokens, with the end id if one ended the text.
      text: without special tokens and without the stop string; None if the engine has no tokenizer.
      finish_reason: "stop", "length", "error", or "abort" for a request that was cancelled.
      stop: the stop string or the end id that ended it.
      error: why there are no further tokens, if `finish_reason` is "error".
      tokens: log-probabilities of the new tokens.
      prompt_logprobs: of the prompt's tokens, if asked for; None for the first one.
      cached_tokens: of the prompt, that were found in the prefix cache.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: str
    stop: str | int | None
    error: str | None
    tokens: Sequence[TokenInfo]
    prompt_logprobs: list[TokenInfo | None] | None
    cached_tokens: int


class Step(NamedTuple):
    """What has come of a text since the step before. `text` has whole characters and joins to that of `finished`."""

    text: str
    tokens: Sequence[TokenInfo]
    finished: Finished | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of an engine. Tokens and steps are totals since its start.

    Attributes:
      running, waiting: requests.
      free: further requests that would start at once: places in the batch, or 0 while requests wait for pages.
      pages_used, pages: of the cache.
      prompt_tokens, output_tokens: read and generated.
      prefix_hits, prefix_queries: prompt tokens that were found in the prefix cache, and that were looked up.
      preemptions: requests that gave up their pages and were read again.
      steps: programs of the model that ran.
      page_size: tokens in a page of the cache.
      kv_dtype: of keys and values, such as bfloat16 or int8.
    """

    running: int
    waiting: int
    free: int
    pages_used: int
    pages: int
    prompt_tokens: int
    output_tokens: int
    prefix_hits: int
    prefix_queries: int
    preemptions: int
    steps: int
    page_size: int
    kv_dtype: str
