"""What a puzzle is, the forms that it is asked in, and exact comparison with its answer."""

import dataclasses
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeVar

Format = Literal["choice", "true_false", "open"]
Reasoning = Literal["deductive", "inductive", "analogical", "causal", "statistical"]
Compare = Literal["letter", "truth", "word", "set", "number"]
World = TypeVar("World")

NAMES = ("Ava", "Ben", "Cleo", "Dan", "Emma", "Finn", "Gia", "Hugo", "Iris", "Jack", "Kira", "Leo", "Mona", "Nils")
_LETTERS = "ABCD"
_AROUND = dict(zip("\"'\u201c\u2018\u00ab*`([{$", "\"'\u201d\u2019\u00bb*`)]}$", strict=True))


@dataclasses.dataclass(frozen=True)
class Core:
    """A puzzle before it is asked in a form.

    Attributes:
      statement: the facts.
      question: that has the answer.
      answer: the only right one, which follows from the facts.
      wrong: other answers, all different and all wrong.
      claim: a sentence with {} in it that is true exactly if the answer stands there.
      how: how the answer to the open question is written.
      compare: how it is compared.
    """

    statement: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    claim: str
    how: str
    compare: Compare


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of puzzles.

    Attributes:
      name: of the family.
      reasoning: that it needs.
      make: makes one of a difficulty from 1 to 3.
      formats: that it can be asked in.
    """

    name: str
    reasoning: Reasoning
    make: Callable[[random.Random, int], Core]
    formats: tuple[Format, ...] = ("choice", "true_false", "open")


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """A question with one right answer, which code has found.

    Attributes:
      family: its name.
      reasoning: deductive, inductive, analogical, causal or statistical.
      format: multiple choice, true or false, or open.
      difficulty: from 1 to 3.
      statement: the facts.
      question: with the options, if there are any.
      answer: a letter, True or False, or what `how` says.
      how: how the answer is written.
      compare: how it is compared; see `is_right`.
      wrong: an answer of the same form that is wrong.
    """

    family: str
    reasoning: Reasoning
    format: Format
    difficulty: int
    statement: str
    question: str
    answer: str
    how: str
    compare: Compare
    wrong: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def ask(family: Family, form: Format, difficulty: int, rng: random.Random) -> Puzzle:
    """Makes a puzzle of a family.

    Args:
      family: of the puzzle.
      form: one of the family's formats.
      difficulty: from 1 to 3.
      rng: decides everything else.
    """
    core = family.make(rng, difficulty)
    given = (family.name, family.reasoning, form, difficulty, core.statement)
    if form == "open":
        return Puzzle(*given, core.question, core.answer, core.how, core.compare, rng.choice(core.wrong))
    if form == "true_false":
        truth = rng.random() < 0.5
        claim = core.claim.format(core.answer if truth else rng.choice(core.wrong))
        question = f"Is the following true or false? {claim}"
        return Puzzle(*given, question, str(truth), "True or False", "truth", str(not truth))
    options = [core.answer, *rng.sample(core.wrong, min(3, len(core.wrong)))]
    rng.shuffle(options)
    letters = _LETTERS[: len(options)]
    lines = [f"{letter}) {option}" for letter, option in zip(letters, options, strict=True)]
    right = letters[options.index(core.answer)]
    wrong = rng.choice([letter for letter in letters if letter != right])
    how = f"one of the letters {', '.join(letters)}"
    return Puzzle(*given, "\n".join([core.question, *lines]), right, how, "letter", wrong)


def is_right(answer: str, given: str, compare: Compare) -> bool:
    """Whether a given answer equals the right one.

    Args:
      answer: the right one.
      given: another, as a model writes it.
      compare: "letter", such as C, (C) or C.; "truth"; "word", in any case, without quotes, brackets or emphasis around
        it and punctuation behind it, so that C++ is not C; "set", names in any order; "number", an exact integer,
        fraction, decimal or percentage.
    """
    if compare == "number":
        value = _number(given)
        return value is not None and value == _number(answer)
    if compare == "set":
        return _set(given) == _set(answer)
    if compare == "word":
        return _bare(given) == _bare(answer)
    return _plain(given) == _plain(answer)


def narrow(
    worlds: Iterable[World], clues: Iterator[tuple[str, Callable[[World], bool]]], rng: random.Random
) -> list[str] | None:
    """Takes clues until one world is left, and drops those that are not needed.

    Args:
      worlds: all of them.
      clues: that hold in the world that is meant: texts, and whether they hold in a world.
      rng: of the order in which clues are tried.

    Returns:
      The texts; None if the clues end before.
    """
    everything = list(worlds)
    left, taken = everything, list[tuple[str, Callable[[World], bool]]]()
    for clue in clues:
        narrower = [world for world in left if clue[1](world)]
        if len(narrower) < len(left):
            taken.append(clue)
            left = narrower
        if len(left) == 1:
            break
    else:
        return None
    rng.shuffle(taken)
    for clue in list(taken):
        others = [holds for one, holds in taken if one != clue[0]]
        if _count(everything, others) == 1:
            taken.remove(clue)
    return [text for text, _ in taken]


def listed(words: Sequence[str]) -> str:
    """Words as an English list."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _count(worlds: Sequence[World], holding: Sequence[Callable[[World], bool]]) -> int:
    left = worlds
    for holds in holding:
        left = [world for world in left if holds(world)]
    return len(left)


def _bare(text: str) -> str:
    """A text without what is written around an answer."""
    text = text.strip()
    while True:
        inner = text.rstrip(" .,;:!?") or text
        if len(inner) > 2 and _AROUND.get(inner[0]) == inner[-1]:
            inner = inner[1:-1].strip() or inner
        if inner == text:
            return text.casefold()
        text = inner


def _plain(text: str) -> str:
    """A letter or a name, without any signs around it."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", text).casefold()


def _set(text: str) -> frozenset[str]:
    return frozenset(_plain(part) for part in re.split(r",|;|&|\band\b", text) if _plain(part))


def _number(text: str) -> Fraction | None:
    """The exact value of a number; None if it is none."""
    plain = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text.strip().strip("$*.").replace(" ", ""))
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    match = re.fullmatch(r"([-\u2212]?)(\d{1,30}(?:\.\d{1,30})?(?:/0*[1-9]\d{0,29})?)(\\?%)?", plain)
    if match is None or ("." in match[2] and "/" in match[2]):
        return None
    value = Fraction(match[2]) / (100 if match[3] else 1)
    return -value if match[1] else value
