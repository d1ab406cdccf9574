"""What the runner takes and gives for each step."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class PrefillInput:
    """The next chunk of one prompt.

    Attributes:
      slot: of the sequence.
      tokens: ids of the chunk, at least one.
      start: tokens of the prompt that are in the cache.
      pages: of the sequence, with room for the chunk.
      length: tokens of the whole prompt; dual-chunk attention scales its queries by it. 0: the chunk ends the prompt.
      adapter: number of the sequence's adapter; 0 is none.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    length: int = 0
    adapter: int = 0


@dataclasses.dataclass(frozen=True)
class RowInput:
    """A sequence whose newest token is read next.

    Attributes:
      slot: of the sequence.
      length: tokens that are in the cache.
      pages: of the sequence, with room for the new tokens.
      adapter: number of the sequence's adapter; 0 is none.
    """

    slot: int
    length: int
    pages: Sequence[int]
    adapter: int = 0


class Masks(NamedTuple):
    """Which tokens some rows of a step may have next. All others may have any.

    Attributes:
      rows: places of the masked rows among those of the step, each once.
      allowed: int32 [M, ceil(V / 32)], or [M, 1 + k, ceil(V / 32)] for each of 1 + k positions: in the order of `rows`,
        and perhaps more, which have no effect. Bit i of word j is set if token 32 j + i is allowed. It is sent as it is
        if there are enough: it must not change before the step has been read.
    """

    rows: Sequence[int]
    allowed: np.ndarray


class SampledTokens(NamedTuple):
    """What `Sampled.read` returns; B counts the rows that were given.

    Attributes:
      token_ids: int32 [B], or `NOT_FINITE`; meaningless in rows that were not sampled.
      logprobs: float32 [B], under the model: temperature 1, no rules.
      top_ids, top_logprobs: int32 and float32 [B, N], the most likely tokens, most likely first; None if no row asked
        for them.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None


class SampledRuns(NamedTuple):
    """What `SampledMany.read` returns: `SampledTokens` with an axis of 1 + k positions after that of rows.

    Attributes:
      token_ids, logprobs, top_ids, top_logprobs: as in `SampledTokens`; meaningless from `counts` on.
      counts: int32 [B], tokens that were emitted: accepted proposals, and one of the model's own.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pending:
    """Results that are on their way to the host: packed int32 [T, padded rows, fields], and the number of rows."""

    packed: jax.Array
    rows: int

    def _fields(self) -> tuple[np.ndarray, ...]:
        """Arrays [B, T, ...] of tokens, counts, log-probabilities, and perhaps most likely tokens."""
        packed = np.asarray(self.packed)[:, : self.rows].swapaxes(0, 1)
        head, top = packed[..., :3], packed[..., 3:]
        fields = head[..., 0], head[..., 1], head[..., 2].view(np.float32)
        if not top.shape[-1]:
            return fields
        ids, logprobs = np.split(top, 2, axis=-1)
        return *fields, ids, np.ascontiguousarray(logprobs).view(np.float32)


class Sampled(Pending):
    """One token for each row of a step."""

    def read(self) -> SampledTokens:
        """Waits for the tokens."""
        tokens, _, logprobs, *top = (x[:, 0] for x in self._fields())
        ids, top_logprobs = top or (None, None)
        return SampledTokens(tokens, logprobs, ids, top_logprobs)


class SampledMany(Pending):
    """The tokens of a step that checks proposals."""

    def read(self) -> SampledRuns:
        """Waits for the tokens."""
        tokens, counts, logprobs, *top = self._fields()
        ids, top_logprobs = top or (None, None)
        return SampledRuns(tokens, logprobs, ids, top_logprobs, counts[:, 0])


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a text of n tokens under the model.

    Attributes:
      logprobs: float32 [n - 1], of each token but the first.
      top_ids, top_logprobs: int32 and float32 [n - 1, N], the most likely tokens at the same places.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
