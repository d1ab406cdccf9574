"""Lengths of texts, and what a request may say about them: words, pages, sections and tokens, checked by code."""

import dataclasses
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from qwen_jax.errors import InputError

WORDS_OF_A_PAGE = 500
"""Words of a page, as a request states them."""

_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+\S|^\S.*\n(?:={3,}|-{3,})[ \t]*$", re.MULTILINE)
_FENCED = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
# Chinese and Japanese characters count as words, and as tokens, of their own.
_SINGLE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_NUMBER = r"(\d{1,3}(?:[,\u202f ]\d{3})+|\d+)"
_UNITS = {"words": r"words?", "pages": r"pages?", "sections": r"(?:sections?|chapters?)", "tokens": r"tokens?"}
_STATED = re.compile(
    rf"\b{_NUMBER}(?:\s*(?:to|and|or|-|\u2013)\s*{_NUMBER})?[\s-]+(?:[a-z]+[\s-]+)?({'|'.join(_UNITS.values())})\b",
    re.IGNORECASE,
)
# The share by which a length that is asked for roughly may differ.
_ROUGHLY = 0.1


@dataclasses.dataclass(frozen=True)
class Length:
    """What a request says about the length of its answer.

    Attributes:
      unit: words, pages, sections or tokens.
      least, most: that the answer must have, in this unit; None is no limit. Pages are counted in words.
      stated: the units and numbers of `says`.
      says: it in words.
    """

    unit: str
    least: float | None
    most: float | None
    stated: tuple[tuple[str, int], ...]
    says: str

    def holds(self, text: str, count_tokens: Callable[[str], int]) -> bool:
        """Whether a text has this length."""
        count = measure(text, self.unit, count_tokens)
        return (self.least is None or count >= self.least) and (self.most is None or count <= self.most)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Length":
        """A length from the object of `to_json`."""
        return cls(**{**value, "stated": tuple((unit, number) for unit, number in value["stated"])})


def measure(text: str, unit: str, count_tokens: Callable[[str], int] | None = None) -> float:
    """The length of a text: words, sections (headings of Markdown outside of code), pages of 500 words, or tokens."""
    if unit == "tokens":
        if count_tokens is None:
            raise InputError("Tokens are counted by a tokenizer. Give one.")
        return count_tokens(text)
    if unit == "sections":
        return len(_HEADING.findall(_FENCED.sub("", text)))
    words = len(_SINGLE.sub(" ", text).split()) + len(_SINGLE.findall(text))
    return words / WORDS_OF_A_PAGE if unit == "pages" else words


def estimated_tokens(text: str) -> int:
    """Tokens that a text has roughly, without a tokenizer: one for 4 characters, or for a Chinese or Japanese one."""
    single = len(_SINGLE.findall(text))
    return single + math.ceil((len(text) - single) / 4)


def draw_length(text: str, rng: random.Random, count_tokens: Callable[[str], int] | None) -> Length:
    """A statement about length that holds for a text, in a unit and form that are drawn.

    Args:
      text: that must have the length.
      rng: random numbers.
      count_tokens: exact; None leaves tokens out.
    """
    words = int(measure(text, "words"))
    units = ["words", "words"]
    if words >= 0.9 * WORDS_OF_A_PAGE:
        units.append("pages")
    if (sections := int(measure(text, "sections"))) >= 2:
        units.append("sections")
    if count_tokens is not None:
        units.append("tokens")
    unit = rng.choice(units)
    if unit == "sections":
        return Length(
            unit, sections, sections, ((unit, sections),), f"It has exactly {sections} sections, each with a heading."
        )
    if unit == "pages":
        pages = max(1, round(words / WORDS_OF_A_PAGE))
        plural = "page" if pages == 1 else "pages"
        # Half a page more or less is the same number of pages.
        return Length(
            unit,
            pages - 0.5,
            pages + 0.5,
            ((unit, pages), ("words", WORDS_OF_A_PAGE)),
            f"It fills about {pages} {plural} of {WORDS_OF_A_PAGE} words each.",
        )
    count = words if unit == "words" or count_tokens is None else count_tokens(text)
    form = rng.choice(["about", "least", "most", "between"])
    if form == "about":
        number = _round(count)
        return Length(
            unit,
            number * (1 - _ROUGHLY),
            number * (1 + _ROUGHLY),
            ((unit, number),),
            f"It has about {number} {unit}, at most a tenth more or less.",
        )
    if form == "least":
        number = _below(count)
        return Length(unit, number, None, ((unit, number),), f"It has at least {number} {unit}.")
    if form == "most":
        number = _above(count)
        return Length(unit, None, number, ((unit, number),), f"It has at most {number} {unit}.")
    least, most = _below(count), _above(count)
    return Length(unit, least, most, ((unit, least), (unit, most)), f"It has between {least} and {most} {unit}.")


def stated(text: str) -> list[tuple[str, int]]:
    """The lengths that a request states in digits: units and numbers, in order."""
    found = []
    for match in _STATED.finditer(text):
        unit = next(name for name, pattern in _UNITS.items() if re.fullmatch(pattern, match[3], re.IGNORECASE))
        found += [(unit, int(re.sub(r"\D", "", number))) for number in (match[1], match[2]) if number]
    return found


def _unit(count: float) -> int:
    """What a length is rounded to: at most a fiftieth of it."""
    return max(int(10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)) // 2, 1)


def _round(count: float) -> int:
    return max(1, round(count / _unit(count)) * _unit(count))


def _below(count: float) -> int:
    """A round number some way below."""
    return max(1, math.floor(0.9 * count / _unit(count)) * _unit(count))


def _above(count: float) -> int:
    return math.ceil(1.1 * count / _unit(count)) * _unit(count)
