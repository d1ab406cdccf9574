"""Instructions that functions verify: what models are asked, how answers are read, and which functions are trusted."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from train.rewards.verification import FAULTS
from train.synthesize.checks import json_of
from train.synthesize.programs import static_fault

SEEDS = (
    "Answer in exactly three sentences.",
    "Begin every sentence with a different letter.",
    "Use no word that is longer than ten letters.",
    "Write each step on a line of its own that begins with its number.",
    "Mention at least two numbers written in digits.",
    "Do not use the letter z.",
    "End your answer with a question.",
    "Write at most eighty words.",
    "Use exactly one pair of parentheses.",
    "Put the most important word in capital letters.",
    "Give your answer as a numbered list of five points.",
    "Begin your answer with the word Actually.",
    "Do not use the word very.",
    "Write two paragraphs of about the same length.",
    "Use at least three exclamation marks.",
    "Write all numbers in words, not in digits.",
    "Let every line have fewer than sixty characters.",
    "Use the same word at the beginning and at the end of your answer.",
    "Include a quotation in double quotation marks.",
    "Separate the parts of your answer with lines of three dashes.",
)
"""Instructions to begin with; ours, not AutoIF's."""

AUGMENT = (
    "Below are instructions about the form of an answer. A short program that sees nothing but the answer can check "
    "each of them. Write {count} new ones of other kinds, which fit any question. Reply with a JSON array of texts and "
    "nothing else.\n\n{seeds}"
)
WRITE_FUNCTION = (
    "An answer to some question must follow this instruction:\n{instruction}\n\nWrite a Python function "
    "evaluate(response) that takes the text of an answer and returns True if it follows the instruction and False if "
    "not. Use the standard library only. Also write three test cases, with answers that follow the instruction and "
    "answers that do not. Reply with a JSON object and nothing else: "
    '{{"function": the source, "cases": [{{"response": a text, "follows": true or false}}, ...]}}.'
)
DESCRIBE = (
    "Here is a Python function that checks an answer:\n\n{function}\n\nWhich instruction must an answer follow so "
    'that it returns True? Reply with a JSON object and nothing else: {{"instruction": one sentence}}.'
)
COMPARE = (
    "Here are two instructions for an answer.\n\nFirst: {first}\nSecond: {second}\n\nDo they contradict each other, so "
    'that an answer that follows one cannot follow the other? Reply with a JSON object and nothing else: {{"relation": '
    '"same", "different" or "contradiction"}}.'
)
SCORE = (
    "A user asked:\n{question}\n\nThis is an answer:\n{response}\n\nJudge how well it answers what the user asked: "
    "whether it is right, complete, clear, and keeps to the instruction. In the last line write Score: and a number "
    "from 1 to 10."
)
# What no judge may find good, or the same.
BAD_ANSWER = "asdf"
OPPOSITE = "Write an answer that breaks this instruction: {instruction}"

_LONGEST_CASE, _LONGEST_FUNCTION, _CASES = 8000, 8000, 3


@dataclasses.dataclass(frozen=True)
class Written:
    """A function and its test cases, as a model wrote them.

    Attributes:
      source: defines `evaluate`.
      cases: answers, with whether they follow the instruction.
    """

    source: str
    cases: tuple[tuple[str, bool], ...]


def read_instructions(text: str) -> list[str] | None:
    """The instructions of an answer, or None if it is no list of texts."""
    value = json_of(text)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return None
    return [" ".join(one.split()) for one in value if 10 <= len(one) <= 300] or None


def read_function(text: str) -> Written | str:
    """The function and the three test cases of an answer, or what is wrong with it."""
    value = json_of(text)
    if not isinstance(value, dict):
        return "the function cannot be read"
    source, cases = value.get("function"), value.get("cases")
    if not isinstance(source, str) or len(source) > _LONGEST_FUNCTION or not isinstance(cases, list):
        return "the function cannot be read"
    if why := static_fault("python", source, "evaluate"):
        return why
    found = []
    for case in cases:
        response, follows = (case.get("response"), case.get("follows")) if isinstance(case, Mapping) else (None, None)
        if not isinstance(response, str) or not isinstance(follows, bool) or len(response) > _LONGEST_CASE:
            return "its test cases cannot be read"
        found.append((response, follows))
    return Written(source, tuple(found[:_CASES])) if len(found) >= _CASES else "fewer than three test cases"


def cases_of(written: Sequence[Written]) -> dict[str, bool]:
    """All test cases, each once. A text that authors judge differently is left out."""
    said: dict[str, set[bool]] = {}
    for one in written:
        for text, follows in one.cases:
            said.setdefault(text, set()).add(follows)
    return {text: next(iter(verdicts)) for text, verdicts in said.items() if len(verdicts) == 1}


@dataclasses.dataclass(frozen=True)
class Validated:
    """What functions and test cases say about one another.

    Attributes:
      cases: places of the test cases that some function gets right.
      functions: places of the functions that are trusted.
      certain: places of the test cases that all of these functions get right.
      faults: by kind: functions that do not answer for all test cases.
    """

    cases: list[int]
    functions: list[int]
    certain: list[int]
    faults: dict[str, int]


def cross_validate(answers: Sequence[str], follows: Sequence[bool], accuracy: float) -> Validated:
    """AutoIF's cross-validation: a case stays if some function gets it right, a function if it gets enough of these.

    Beyond AutoIF, a function must answer for all cases, and must get right what most of those that are left get right:
    a function that is wrong in one rare way only would pass otherwise.

    Args:
      answers: of each function for all test cases, as of `ask_function`.
      follows: the right answers, as the authors of the test cases say.
      accuracy: share of the test cases that a function must get right.
    """
    expected = "".join("1" if one else "0" for one in follows)
    faults = Counter(FAULTS[next(c for c in line if c in FAULTS)] for line in answers if set(line) & set(FAULTS))
    sound = [i for i, line in enumerate(answers) if not set(line) & set(FAULTS)]
    cases = [c for c, right in enumerate(expected) if any(answers[i][c] == right for i in sound)]
    functions = [i for i in sound if cases and share(answers[i], expected, cases) >= accuracy]
    certain = [c for c in cases if sum(answers[i][c] == expected[c] for i in functions) > len(functions) / 2]
    functions = [i for i in functions if all(answers[i][c] == expected[c] for c in certain)]
    certain = [c for c in cases if functions and all(answers[i][c] == expected[c] for i in functions)]
    return Validated(cases, functions, certain, dict(sorted(faults.items())))


def share(line: str, expected: str, cases: Sequence[int]) -> float:
    """The share of test cases for which a function gives the expected answer."""
    return sum(line[c] == expected[c] for c in cases) / len(cases)


def one_sided(follows: Sequence[bool], accuracy: float) -> bool:
    """Whether a function that always gives the same answer would be trusted."""
    most = max(sum(follows), len(follows) - sum(follows))
    return not follows or most >= accuracy * len(follows)


def table_function(cases: Mapping[str, bool], wrong: bool = False) -> str:
    """A function that knows the right answers for test cases, or that gives the wrong one for each."""
    return f"CASES = {dict(cases)!r}\ndef evaluate(response):\n    return CASES[response] is {not wrong}\n"


def field_of(text: str, name: str) -> Any:
    """A field of an answer that is a JSON object, or None."""
    value = json_of(text)
    return value.get(name) if isinstance(value, dict) else None
