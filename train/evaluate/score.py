"""Scores of answers, between 0 and 1."""

import re
from collections.abc import Callable, Sequence
from typing import Literal

Metric = Literal["contained", "any", "number", "ids"]
"""`contained`: share of the references that the answer contains; `any`: whether it contains one of them; `number`: all
digits right; `ids`: all ids right."""


def score(metric: Metric, answer: str, references: Sequence[str]) -> float:
    """The score of an answer.

    Args:
      metric: how it is compared.
      answer: the generated text; of tasks on token ids, the ids with spaces between them.
      references: what it should be, or should contain.
    """
    return _METRICS[metric](answer, references)


def contained(answer: str, references: Sequence[str]) -> float:
    """The share of references that the answer contains, in upper or lower case.

    Source: RULER (Hsieh et al. 2024, arXiv:2404.06654), which scores its synthetic tasks so.
    """
    text = answer.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def any_contained(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains one of the references, in upper or lower case; otherwise 0.

    Source: RULER, which scores its questions so.
    """
    text = answer.lower()
    return float(any(reference.lower() in text for reference in references))


def number(answer: str, references: Sequence[str]) -> float:
    """1 if the first number in the answer is the reference, in all digits; otherwise 0."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == references[0])


def same_ids(answer: str, references: Sequence[str]) -> float:
    """1 if the answer begins with the ids of the reference; otherwise 0."""
    expected = references[0].split()
    return float(answer.split()[: len(expected)] == expected)


_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "contained": contained,
    "any": any_contained,
    "number": number,
    "ids": same_ids,
}
