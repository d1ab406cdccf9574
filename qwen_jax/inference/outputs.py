"""What the scheduler's engine gives back: tokens as they come, finished texts, and its counts."""

import dataclasses
from typing import NamedTuple


class TokenInfo(NamedTuple):
    """One token.

    Attributes:
      id: its id.
      logprob: its log-probability under the model (temperature 1, no filters).
      top: the most likely tokens and their log-probabilities, as many as the request asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
    tokens: list[TokenInfo]
    prompt_logprobs: list[TokenInfo | None] | None
    cached_tokens: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What has come of a text since the step before. `text` has whole characters and joins to that of `finished`."""

    text: str
    tokens: tuple[TokenInfo, ...]
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
