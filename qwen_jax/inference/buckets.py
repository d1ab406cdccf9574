"""The sizes that programs are compiled for: few, and every step is padded to the next one."""

import dataclasses
from collections.abc import Sequence

from qwen_jax.errors import InputError

_FIRST_SLOTS, _FIRST_TOKENS, _STEP = 1024, 128, 4


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """Sizes of the device's state, and of the programs that run on it.

    Attributes:
      max_seqs: sequences that run at a time.
      max_length: tokens that a sequence may have, prompt and text together.
      page_size: slots in a page.
      num_pages: pages in all.
      max_batched_tokens: tokens that one prefill program reads, padding included.
      max_top_logprobs: how many of the most likely tokens are returned.
      speculate: proposed tokens that a decode step checks; 0 for none.
      rules: whether penalties and biases are supported. Their state takes 7 bytes for each sequence and token of the
        vocabulary.
      texts: whether whole texts are read, for log-probabilities of prompts and for embeddings.
      buckets: the sizes of programs; None for `Buckets.of`.

    Raises:
      InputError: a size that is not positive, or more proposals than a step can check.
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

    def __post_init__(self) -> None:
        names = "max_seqs", "max_length", "page_size", "num_pages", "max_batched_tokens", "max_top_logprobs"
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.speculate < self.max_length:
            raise InputError(f"speculate must be in [0, {self.max_length}), got {self.speculate}.")


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for, each in ascending order.

    Attributes:
      rows: of decode steps and of sampling.
      slots: that the page tables of the rows of a step cover.
      prefill: rows and tokens of chunks of prompts.
      texts: tokens of a row that holds whole texts.
    """

    rows: tuple[int, ...]
    slots: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]
    texts: tuple[int, ...]

    @classmethod
    def of(cls, settings: RunnerConfig, fewest_rows: int = 1) -> "Buckets":
        """Sizes four times one another: a step is padded to at most four times its size.

        Args:
          settings: the largest sizes.
          fewest_rows: of decode steps. On TPUs 4: the compiler's estimate of a step with one row, whose products are
            not those of matrices, is three times that of a step with four rows.
        """
        page = settings.page_size
        rows = _powers(fewest_rows, max(settings.max_seqs, fewest_rows))
        # A step may write proposals beyond the end of the longest sequence.
        slots = [-(-n // page) * page for n in _powers(_FIRST_SLOTS, settings.max_length + settings.speculate)]
        tokens = _powers(_FIRST_TOKENS, min(settings.max_batched_tokens, settings.max_length))
        chunks = _powers(1, settings.max_seqs)
        prefill = [(r, t) for t in tokens for r in chunks if r == 1 or r * t <= settings.max_batched_tokens]
        texts = _powers(_FIRST_TOKENS, settings.max_length) if settings.texts else []
        return cls(tuple(rows), tuple(dict.fromkeys(slots)), tuple(prefill), tuple(texts))

    def prefill_rows(self, count: int) -> int:
        """How many rows one prefill program takes for chunks of up to this many tokens.

        Args:
          count: tokens of the longest chunk.

        Raises:
          ValueError: longer than the longest chunk of a program.
        """
        tokens = smallest(sorted({t for _, t in self.prefill}), count, "tokens of a chunk")
        return max(r for r, t in self.prefill if t == tokens)

    def prefill_size(self, rows: int, count: int) -> tuple[int, int]:
        """The smallest prefill program, as its rows and tokens of a row.

        Args:
          rows: number of chunks.
          count: tokens of the longest one.

        Raises:
          ValueError: there is none.
        """
        enough = [(r, t) for r, t in self.prefill if r >= rows and t >= count]
        if not enough:
            raise ValueError(f"No prefill program takes {rows} chunks of {count} tokens; there are {self.prefill}.")
        return min(enough, key=lambda size: (size[0] * size[1], size))


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


def _powers(first: int, last: int) -> list[int]:
    """first, 4 first, 16 first, ... below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= _STEP
    return [*sizes, last]
