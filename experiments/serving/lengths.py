"""Lengths of prompts and answers like those of ShareGPT's conversations, in a fixed file.

    python -m experiments.serving.lengths

writes `lengths.json` again, byte for byte. Both lengths are log-normal, rounded and cut to [4, 1024]. Their medians are
such that the means of the 512 pairs are 220 and 200, after rounding and cutting.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path(__file__).parent / "lengths.json"
COUNT, SEED = 512, 17
SHORTEST, LONGEST = 4, 1024
MEANS = {"input": 220.0, "output": 200.0}
DEVIATIONS = {"input": 1.1, "output": 0.9}
"""Standard deviations of the logarithms."""


class Lengths(NamedTuple):
    """Tokens of prompts and of answers, one of each for a request."""

    input: list[int]
    output: list[int]


def draw(mean: float, deviation: float, rng: np.random.Generator) -> list[int]:
    """`COUNT` lengths whose mean is as near to the given one as whole numbers come.

    Args:
      mean: of the lengths, in tokens.
      deviation: standard deviation of their logarithms.
      rng: of the random numbers.
    """
    spread = np.exp(deviation * rng.standard_normal(COUNT))

    def with_median(median: float) -> np.ndarray:
        return np.clip(np.rint(median * spread), SHORTEST, LONGEST).astype(int)

    low, high = 1.0, float(LONGEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if with_median(middle).mean() < mean else (low, middle)
    lengths: list[int] = with_median(high).tolist()
    return lengths


def make() -> Lengths:
    """The lengths that the file holds."""
    rng = np.random.default_rng(SEED)
    return Lengths(*(draw(MEANS[name], DEVIATIONS[name], rng) for name in Lengths._fields))


def read(path: Path = FILE) -> Lengths:
    """The lengths of a file."""
    return Lengths(**json.loads(path.read_text()))


def text(lengths: Lengths) -> str:
    """The file of some lengths."""
    return json.dumps(lengths._asdict()) + "\n"


def main() -> None:
    FILE.write_text(text(make()))


if __name__ == "__main__":
    main()
