"""What the scheduler plans with: sequences that wait or run, the steps that read and extend them, and their orders."""

import dataclasses
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_jax.inference.request import Request


@dataclasses.dataclass(eq=False)
class Sequence:
    """One request that is waiting or running.

    Attributes:
      request: what was asked for.
      id: the caller's name for it.
      tokens: the prompt and the output tokens that the host knows.
      prompt_length: tokens of the prompt.
      pending: output tokens that dispatched steps give and that the host has not read. With speculation, the most that
        the step can give.
      written: slots whose keys and values are written, or will be by dispatched steps.
      pages: of the cache, in the order of the text. Slot j is in pages[j // page_size].
      keys: of its first pages, those that are full and registered; see `PagePool.register`.
      slot: its place in the device's arrays of one entry a sequence, while it is running.
      finished: ended or cancelled.
      arrival: seconds, from time.monotonic().
      limit: tokens of the prompt and the most new ones.
      order: counts the sequences that a scheduler was given; -1 before that.
      decoding: its prompt is read, so that the next step extends it by a token.
      speculated: tokens beyond the first that a dispatched step has proposed for it; 0 if none is in flight.
      cached_tokens: of the prompt, that were found in the prefix cache.
      preemptions: how often it was preempted.
      version: of the weights that its pages were written with; see `PagePool.version`.
      chain: keys of its first pages, as far as they were looked up.
    """

    request: "Request"
    id: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    prompt_length: int = 0
    pending: int = 0
    written: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    slot: int | None = None
    finished: bool = False
    arrival: float = dataclasses.field(default_factory=time.monotonic)
    limit: int = dataclasses.field(init=False)
    order: int = dataclasses.field(init=False, default=-1)
    decoding: bool = dataclasses.field(init=False, default=False)
    speculated: int = dataclasses.field(init=False, default=0)
    cached_tokens: int = dataclasses.field(init=False, default=0)
    preemptions: int = dataclasses.field(init=False, default=0)
    version: int = dataclasses.field(init=False, default=-1, repr=False)
    chain: list[bytes] = dataclasses.field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt)
        self.prompt_length = self.prompt_length or len(self.request.prompt)
        self.limit = self.prompt_length + self.request.ending.max_new_tokens

    @property
    def exhausted(self) -> bool:
        """Whether its known and pending tokens are all that were asked for."""
        return len(self.tokens) + self.pending >= self.limit


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """Reads tokens[start : start + count] of a sequence; after the `last` ones, its next token is sampled."""

    sequence: Sequence
    start: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A step that reads prompts, or parts of them."""

    rows: tuple[PrefillRow, ...]


@dataclasses.dataclass(frozen=True)
class Decode:
    """A step that extends sequences by a token, and by up to `extra` more that are speculated.

    `plan` has raised `written` already: the step writes the slots written - 1 - extra to written - 1 of each row.
    """

    rows: tuple[Sequence, ...]
    extra: int = 0


def by_arrival(sequence: Sequence) -> tuple[int, ...]:
    """Sorts running sequences: the oldest first."""
    return (sequence.order,)


def by_start(sequence: Sequence) -> tuple[int, ...]:
    """Sorts the queue: first what was preempted, then what continues a text, then all others; each by arrival."""
    group = 0 if sequence.preemptions else 1 if sequence.request.continues else 2
    return group, sequence.order
