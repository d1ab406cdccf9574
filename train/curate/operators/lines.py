"""Lines: repeated ones within a document are removed, and short ones counted."""

import dataclasses
from collections.abc import Sequence

import pyarrow as pa

from qwen_jax.errors import InputError
from train.curate.operator import Compute, Operator


@dataclasses.dataclass(frozen=True)
class RemoveRepeatedLines(Operator):
    """Removes lines that an earlier line of the same document repeats; the first one stays.

    A line of at least `min_characters` is removed wherever it comes again. Shorter lines, such as "}" or a heading, are
    removed only in blocks, such as a menu that comes again: at least `block` lines, empty ones left aside, that came
    earlier in the same order and have `min_characters` together. Lines are compared without the spaces around them.

    lines_removed: how many. short_lines_left: of the lines that are left and are not empty, the fraction with fewer
    than `short` characters; 0 if there are none.

    Attributes:
      min_characters: of a line that is removed by itself, and of a block.
      block: number of lines.
      short: number of characters.
    """

    min_characters: int = 40
    block: int = 3
    short: int = 30

    makes = pa.schema(
        [
            pa.field("text", pa.large_string()),
            pa.field("lines_removed", pa.int32()),
            pa.field("short_lines_left", pa.float32()),
        ]
    )

    def __post_init__(self) -> None:
        if self.min_characters < 1 or self.block < 2:
            raise InputError(
                f"min_characters must be at least 1 and block at least 2, got {self.min_characters} and {self.block}."
            )

    def start(self) -> Compute:
        def compute(table: pa.Table) -> pa.Table:
            rows = [self._row(text) for text in table["text"].to_pylist()]
            arrays = list(map(list, zip(*rows, strict=True))) if rows else [[], [], []]
            return pa.table(arrays, schema=self.makes)

        return compute

    def _row(self, text: str) -> tuple[str, int, float]:
        lines = text.split("\n")
        removed = 0
        # What goes may bring together lines that came earlier in this order.
        while repeated := self._repeated([line.strip() for line in lines]):
            removed += len(repeated)
            lines = [line for number, line in enumerate(lines) if number not in repeated]
        sizes = [len(line) for line in map(str.strip, lines) if line]
        short = sum(size < self.short for size in sizes) / max(len(sizes), 1)
        return "\n".join(lines) if removed else text, removed, short

    def _repeated(self, lines: Sequence[str]) -> set[int]:
        """The numbers of lines to remove."""
        filled = [number for number, line in enumerate(lines) if line]
        if len(set(lines)) >= len(filled):  # One of the different lines may be empty.
            return set()
        result: set[int] = set()
        seen: set[str] = set()
        blocks: dict[tuple[str, ...], int] = {}
        for place, number in enumerate(filled):
            line = lines[number]
            if len(line) >= self.min_characters and line in seen:
                result.add(number)
            seen.add(line)
            part = filled[place + 1 - self.block : place + 1]
            if len(part) < self.block:
                continue
            block = tuple(lines[at] for at in part)
            # The earlier block must not overlap this one: three equal lines are no block that comes again.
            first = blocks.setdefault(block, place)
            if place - first >= self.block and sum(map(len, block)) >= self.min_characters:
                result.update(part)
        return result
