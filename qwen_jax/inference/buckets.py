"""The sizes that programs are compiled for: few, and every step is padded to the next one."""

import dataclasses
import itertools
from collections.abc import Sequence

from qwen_jax.attention.quantized_cache import KVDtype, check_kv_dtype
from qwen_jax.errors import InputError
from qwen_jax.inference.row_sampling import WITH_TOP, Variant

_FIRST_SLOTS, _FIRST_TOKENS, _STEP = 1024, 128, 4
# Below so many prompt tokens a step takes as long as reading the weights.
_FIRST_CHUNKS = 256
# A prefill program takes a chunk for each 16 of its tokens, up to 64 chunks.
_TOKENS_OF_A_CHUNK, _MOST_CHUNKS = 16, 64
# The pages of a prefill step hold at least 8 times its new tokens, so that several long texts can go on together.
_SLOTS_OF_A_TOKEN = 8


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """Sizes of the device's state, and of the programs that run on it.

    Attributes:
      max_seqs: sequences that run at a time.
      max_length: tokens that a sequence may have, prompt and text together.
      page_size: slots in a page.
      num_pages: pages in all.
      max_batched_tokens: tokens of prompts that one prefill program reads, padding included.
      max_top_logprobs: how many of the most likely tokens are returned.
      speculate: proposed tokens that a decode step checks; 0 for none.
      rules: whether penalties and biases are supported. Their state takes 7 bytes for each sequence and token of the
        vocabulary.
      texts: whether whole texts are read, for log-probabilities of prompts and for embeddings.
      buckets: the sizes of programs; None for `Buckets.of`.
      kv_dtype: of the pages.

    Raises:
      InputError: a size that is not positive, more proposals than a step can check, or an unknown dtype of pages.
    """

    max_seqs: int
    max_length: int
    page_size: int
    num_pages: int
    max_batched_tokens: int
    max_top_logprobs: int = 20
    speculate: int = 0
    rules: bool = True
    texts: bool = True
    buckets: "Buckets | None" = None
    kv_dtype: KVDtype = "auto"

    def __post_init__(self) -> None:
        names = "max_seqs", "max_length", "page_size", "num_pages", "max_batched_tokens", "max_top_logprobs"
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_kv_dtype(self.kv_dtype)
        if not 0 <= self.speculate < self.max_length:
            raise InputError(f"speculate must be in [0, {self.max_length}), got {self.speculate}.")


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for, each in ascending order.

    Attributes:
      rows: of decode steps and of sampling.
      slots: that the page tables of the rows of a decode step cover.
      prefill: the most chunks of prompts, and the tokens of all of them together. Neither falls from one to the next.
      prefill_slots: that the pages of all chunks of a prefill step cover together.
      texts: tokens of a row that holds whole texts.
    """

    rows: tuple[int, ...]
    slots: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]
    prefill_slots: tuple[int, ...]
    texts: tuple[int, ...]

    @classmethod
    def of(cls, settings: RunnerConfig, fewest_rows: int = 1) -> "Buckets":
        """Sizes are four times one another at most; rows of decode steps from 16 on, and prefill steps, are closer.

        Args:
          settings: the largest sizes.
          fewest_rows: of decode steps. On TPUs 4: the compiler's estimate of a step with one row, whose products are
            not those of matrices, is three times that of a step with four rows.
        """
        page = settings.page_size
        rows = _row_sizes(fewest_rows, max(settings.max_seqs, fewest_rows))
        # A step may write proposals beyond the end of the longest sequence.
        slots = [-(-n // page) * page for n in _powers(_FIRST_SLOTS, settings.max_length + settings.speculate)]
        # Logits are sampled by programs of decode steps where possible.
        prefill = [
            (smallest(rows, min(max(t // _TOKENS_OF_A_CHUNK, 1), _MOST_CHUNKS, rows[-1]), "chunks"), t)
            for t in _finer(_powers(_FIRST_CHUNKS, settings.max_batched_tokens, 2))
        ]
        first = max(_FIRST_SLOTS, settings.max_batched_tokens // 2)
        prefill_slots = [-(-n // page) * page for n in _powers(first, prefill_capacity(settings))]
        texts = _powers(_FIRST_TOKENS, settings.max_length) if settings.texts else []
        # Rounding to whole pages may make two sizes equal.
        tables = tuple(dict.fromkeys(slots)), tuple(dict.fromkeys(prefill_slots))
        return cls(tuple(rows), tables[0], tuple(prefill), tables[1], tuple(texts))

    def prefill_size(self, chunks: int, tokens: int) -> tuple[int, int]:
        """The smallest prefill program, as its most chunks and tokens.

        Args:
          chunks: number of chunks.
          tokens: of all of them.

        Raises:
          ValueError: there is none.
        """
        for size in self.prefill:
            if size[0] >= chunks and size[1] >= tokens:
                return size
        raise ValueError(f"No prefill program takes {chunks} chunks of {tokens} tokens; there are {self.prefill}.")

    def masks_of(self, rows: int, variant: Variant) -> tuple[int, ...]:
        """How many masks the sampling programs of so many rows take: one for each row, or one for a quarter of them.

        Those that also return the most likely tokens are rarely used with masks: they take one for each row only.

        Args:
          rows: of the programs.
          variant: of the programs, one with masks.
        """
        few = [size for size in self.rows if 4 * size <= rows and variant not in WITH_TOP]
        return (*few[-1:], rows)

    def prefill_slots_of(self, tokens: int) -> tuple[int, ...]:
        """The slots of the prefill programs that take so many tokens. Small tables are of no use to many tokens."""
        return tuple(s for s in self.prefill_slots if s >= 2 * tokens or s == self.prefill_slots[-1])


def prefill_capacity(settings: RunnerConfig) -> int:
    """The most slots of pages that a prefill step reads: those of the longest text, or of several."""
    return max(settings.max_length + settings.speculate, _SLOTS_OF_A_TOKEN * settings.max_batched_tokens)


def smallest(sizes: Sequence[int], needed: int, what: str) -> int:
    """The smallest of some ascending sizes that is large enough.

    Args:
      sizes: in ascending order.
      needed: the size that is needed.
      what: for the error, such as "rows".

    Raises:
      ValueError: there is none.
    """
    for size in sizes:
        if size >= needed:
            return size
    raise ValueError(f"No program takes {needed} {what}; the largest takes {sizes[-1] if sizes else 0}.")


def _powers(first: int, last: int, step: int = _STEP) -> list[int]:
    """first, step first, step^2 first, ... below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= step
    return [*sizes, last]


def _row_sizes(first: int, last: int) -> list[int]:
    """Numbers of rows: up to 16 four times one another, then 32, 64, 96, 128, 192, 256, 384, ... below last, and last.

    A step with few rows takes as long as reading the weights, and padding costs little there.
    """
    sizes = _powers(first, last)
    for power in (1 << i for i in range(5, last.bit_length())):
        sizes += [power, power * 3 // 2] if power > 32 else [power]
    return sorted({size for size in sizes if size <= last})


def _finer(sizes: Sequence[int]) -> list[int]:
    """Ascending sizes with the mean of each pair of neighbours between them."""
    return sorted({*sizes, *((a + b) // 2 for a, b in itertools.pairwise(sizes))})
