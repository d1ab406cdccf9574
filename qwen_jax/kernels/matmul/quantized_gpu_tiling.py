"""How products of a few rows with a quantised matrix are divided among thread blocks and warpgroups."""

import dataclasses
import functools
import itertools

from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.tiles import ROWS
from qwen_jax.kernels.matmul.quantized_gpu_tiles import TILE

MAX_ROWS = 64
WARPGROUPS = 4
_MAX_STAGES = 16
_PARTS_BYTES = 200_000  # The cost of partial results beyond their own bytes.
_SHORT_STEPS = 1.05  # The time of steps of 128 inputs, relative to 256: there is more to do besides converting codes.


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is divided; a static function of its shape.

    Attributes:
      high: warpgroups with different outputs.
      wide: warpgroups with the same outputs and different inputs.
      chunk: inputs of a step for one warpgroup.
      share: steps of a thread block; of a grouped product, the least.
      blocks: thread blocks.
      parts: partial results, the most blocks that share a tile.
      stages: steps in flight.
    """

    high: int
    wide: int
    chunk: int
    share: int
    blocks: int
    parts: int
    stages: int


def width(rows: int) -> int:
    """Columns of the product for this many rows."""
    return -(-rows // 8) * 8


def _parts(tiles: int, steps: int, share: int) -> int:
    """The most blocks that share a tile."""
    return max((t * steps + steps - 1) // share - t * steps // share + 1 for t in range(min(tiles, share)))


@functools.cache
def choose_tiling(
    rows: int,
    n: int,
    k: int,
    code_bits: int,
    at_once: int = TILE,
    bundles: int = 0,
    whole: bool = False,
    in_digits: bool = False,
) -> Tiling:
    """Divides a product of `rows` rows with a matrix [n, k], or a grouped product of bundles of so many rows.

    The estimated cost, in bytes read from memory, is the larger of two: W, including the time of idle multiprocessors,
    and everything that goes from L2 to the multiprocessors at about 2.5 times the speed. Writing and reading partial
    results is added.

    Args:
      rows: 1 to `MAX_ROWS`.
      n, k: outputs, a multiple of 64, and inputs, a multiple of 32.
      code_bits: of a code, 4 or 8.
      at_once: inputs that share a scale; see `inputs_at_once`.
      bundles: of a grouped product the fewest that there may be; 0 for one matrix. If there are more, shares are
        longer. Then they are whole tiles if the least share is, and otherwise no tile has more parts than `parts`.
      whole: that there are no partial results.
      in_digits: that x comes as digits.
    """
    columns, matrices = width(rows), max(bundles, 1)
    weights = matrices * n * k * code_bits // 8
    best: tuple[float, Tiling] | None = None
    for high, chunk in itertools.product((1, 2, 4), (128, 256)):
        wide = WARPGROUPS // high
        tiles, steps = -(-n // (ROWS * high)) * matrices, -(-k // (chunk * wide))
        stage = ROWS * high * chunk * wide * code_bits // 8 + columns * chunk * wide * (1 if in_digits else 2)
        stages = min(_MAX_STAGES, (TILE_SHARED_BYTES - (wide - 1) * high * ROWS * columns * 4) // stage)
        # Longer steps, and sums of more warpgroups, need more registers.
        if stages < 2 or (chunk == 256 and (columns > 16 or at_once < TILE)) or (wide == 4 and columns > 32):
            continue
        total = tiles * steps
        least = -(-total // MULTIPROCESSORS)
        # More than the least share makes fewer partial results, and leaves multiprocessors idle.
        for share in range(least, min(total, max(2 * least, steps)) + 1):
            if whole and share % steps:
                continue
            if bundles:
                parts = 1 if share % steps == 0 else -(-(steps - 1) // share) + 1
            else:
                parts = _parts(tiles, steps, share)
            # Inputs beyond the end of a row are not read, but multiplied, which takes int8 codes as long.
            padded = in_digits and code_bits == 8
            step = ROWS * high * chunk * wide * code_bits / 8 if padded else weights / total
            longest = step * share * MULTIPROCESSORS * (_SHORT_STEPS if chunk == 128 else 1)
            x_bytes = tiles * rows * k * 2
            cost = max(longest, 0.4 * (weights + x_bytes)) + _PARTS_BYTES * (parts > 1)
            cost += parts * matrices * rows * n * 4
            if best is None or cost < best[0]:
                blocks = MULTIPROCESSORS if bundles else -(-total // share)
                best = cost, Tiling(high, wide, chunk, share, blocks, parts, stages)
    assert best is not None
    return best[1]
