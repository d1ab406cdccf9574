"""The form of reasoning in an answer: its steps, and what can be seen to be wrong with them without knowing more."""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from train.rewards.text import last_box

# 1. or 2) or Step 3: at the beginning of a line, with or without marks of Markdown.
_NUMBERED = re.compile(
    r"^[ \t]*(?:#+[ \t]*)?(?:\*\*)?(?:(?:step|\u6b65\u9aa4)[ \t]*)?(\d{1,3})(?:\*\*)?[.):\uff1a\u3001](?!\d)",
    re.IGNORECASE | re.MULTILINE,
)
_WORD = re.compile(r"\d+(?:\.\d+)?|\w+|[=+*/<>^\u00d7\u00f7\u2212-]")
_RUN, _MOST_KNOWN = 3, 0.9
# Characters that may follow the box of the final answer: the end of its formula and sentence.
_MOST_AFTER_BOX = 60

_NOUN = r"(?:final )?(?:answer|solution)"
_LEAK = re.compile(
    r"\bhint(?:s|ed)?\b|\banswer key\b"
    rf"|\b(?:given|provided|known|stated|expected|reference|target|supplied|official) {_NOUN}"
    rf"|\b{_NOUN} (?:(?:that )?(?:is|was|has been|we (?:are|were|have been)) )?(?:already )?"
    r"(?:given|provided|known|supplied|told)"
    rf"|\b(?:told|given|know|knowing) (?:that )?the {_NOUN}"
    rf"|\b(?:match|agree|consistent|in line)\w* (?:with )?the {_NOUN}"
    r"|\u63d0\u793a|(?:\u7ed9\u5b9a|\u5df2\u77e5|\u53c2\u8003|\u6807\u51c6)(?:\u7684)?\u7b54\u6848",
    re.IGNORECASE,
)
_ANNOUNCES = re.compile(rf"\b{_NOUN} (?:is|must be|should be|will be|has to be)\b|\b{_NOUN}[:=]", re.IGNORECASE)

_ANSWER = re.compile(r"[\s*_#>-]*(?:final )?answer[*_ ]*:[*_]*\s*(\S.*?)\s*", re.IGNORECASE)
_REVISION = re.compile(
    r"\b(?:previous|earlier|first|original|last|revised|corrected|improved) "
    r"(?:attempt|solution|answer|version|reasoning)\b|\b(?:critique|critic|reviewer|feedback|revision)\b"
    r"|\b(?:you|it) (?:was |were |are |is )?(?:pointed out|right that)"
    r"|\b(?:my|the) mistake\b|\bi (?:made|was) (?:a mistake|an error|wrong)\b|\bapologi[sz]e\b|\bsorry\b",
    re.IGNORECASE,
)

_EQUALS = re.compile(r"(?:=|\\approx|\u2248)[ \t$]*$")
# An answer is derived where it is the right side of an equation with an operation on the left one.
_DERIVED = re.compile(
    r"(?:(?:\d|[)}]|\b[a-z])[ \t]*(?:[-+*/^\u00d7\u00f7\u2212]|\\times|\\cdot|\\div)[ \t]*(?:\d|[({\\]|[a-z]\b)"
    rf"|\\[dt]?frac|\\sqrt)[^=\n]*{_EQUALS.pattern}",
    re.IGNORECASE,
)

# Numbers joined by signs, on both sides of signs of equality. Letters beside them make it another formula.
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_EXPRESSION = rf"[-(]*{_NUMBER}\)*(?:[ \t]*[-+*/][ \t]*[-(]*{_NUMBER}\)*)*"
# Words that belong to the formula, or number something.
_OPERATORS = (
    "of|by|times|plus|minus|over|mod|modulo|to|from|percent|squared|cubed|per|and|or|than|base|sin|cos|tan|log|ln|sqrt"
    "|twice|double|triple|half|square|root|step|case|part|equation"
)
_EQUATION = re.compile(
    # What comes before is the beginning, the end of a clause, or a word that is no part of the formula.
    r"(?:^[ \t]*(?:[-*\u2022][ \t]+)?|[:;,.!?][ \t]+|\$[ \t]*|\\[(\[][ \t]*|(?<![\\\w])"
    rf"(?!(?:{_OPERATORS})\b)[a-z]{{2,}}[ \t]+)"
    rf"({_EXPRESSION}(?:[ \t]*=[ \t]*{_EXPRESSION})+)"
    # What comes after is no more of the formula.
    r"(?=[ \t]*(?:\$|\\[)\]]|[.,;:!?)](?!\d)|\*\*|$)"
    r"|[ \t](?!(?:with|and|remainder|rem|mod|r|base|in base|percent)\b)[a-z\u4e00-\u9fff])",
    re.IGNORECASE | re.MULTILINE,
)
_SIGNS = {"\u00d7": "*", "\u00f7": "/", "\u2212": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}


def steps_of(text: str) -> list[str]:
    """The steps of an answer: those numbered 1, 2, 3 and so on at the beginning of lines, or else its paragraphs.

    Numbers that do not go on from the last one, such as those of a list within a step, begin no step.
    """
    places: list[tuple[int, int]] = []
    for match in _NUMBERED.finditer(text):
        if int(match[1]) == len(places) + 1:
            places.append((match.start(), match.end()))
    if len(places) > 1:
        ends = [start for start, _ in places[1:]] + [len(text)]
        parts = [text[begin:end] for (_, begin), end in zip(places, ends, strict=True)]
    else:
        parts = re.split(r"\n[ \t]*\n", text)
    return [part.strip() for part in parts if part.strip()]


def step_fault(text: str, question: str, least: int = 2) -> str | None:
    """Why an answer does not reason in steps, in a few words that can be counted; None if it does.

    Each step must say something that neither the question nor an earlier step says, and no sum of plain numbers may be
    false.

    Args:
      text: of the answer.
      question: that it answers.
      least: steps that there must be, the conclusion among them.
    """
    steps = steps_of(text)
    if len(steps) < least:
        return "too few steps"
    known = [_words(question)]
    for step in steps:
        # The line of the conclusion may say again what was found.
        lines = [line for line in step.split("\n") if r"\boxed{" not in line and not _ANNOUNCES.search(line)]
        words = _words("\n".join(lines))
        if words and any(_restates(words, earlier) for earlier in known):
            return "a step only restates"
        known.append(words)
    return "a false equation" if false_equation(text) else None


def box_fault(text: str) -> str | None:
    """Why an answer does not end with its final answer in one box, in a few words; None if it does."""
    if text.count(r"\boxed{") > 1:
        return "more than one box"
    box = last_box(text)
    if box is None or not box[1].strip():
        return "no final answer in a box"
    if len(text) - box[0] - len(r"\boxed{}") - len(box[1]) > _MOST_AFTER_BOX:
        return "text after the final answer"
    return None


def answer_line(text: str) -> str | None:
    """What follows "Answer:" in the last line of an answer; None if that line is another one, or nothing follows."""
    match = _ANSWER.fullmatch(text.rstrip().rpartition("\n")[2])
    return match[1].strip("*_` \t") or None if match else None


def revision_fault(text: str) -> str | None:
    """Whether an answer that replaces an earlier one mentions that; None if it does not."""
    return "it mentions its revision" if _REVISION.search(text) else None


def guided_fault(text: str, question: str, answer: str) -> str | None:
    """Why an answer that was written with the right one at hand does not derive it; None if it seems to.

    Args:
      text: of the answer, with its conclusion in a box.
      question: that it answers.
      answer: that was given.
    """
    if _LEAK.search(text):
        return "the hint leaks"
    box = last_box(text)
    before = text if box is None else text[: box[0]]
    # Only the line of the box may announce it.
    if _ANNOUNCES.search(before[: before.rfind("\n") + 1]) or not before_answer(text, question, answer):
        return "the answer comes before the steps"
    is_number = re.fullmatch(r"-?\d+(?:\.\d+)?", answer) is not None
    if is_number and not _place(before, answer) and not _EQUALS.search(before):
        return "the steps do not reach the answer"
    return None


def before_answer(text: str, question: str, answer: str) -> str:
    """What an answer says before its final answer first appears; "" if that is nothing.

    These are whole lines, and the left side of the equation that derives it if there is one.

    Where the question has the same value, it may appear anywhere, and all lines before that of the box are returned.
    """
    box = last_box(text)
    end = len(text) if box is None else box[0]
    if not _place(question, answer) and (place := _place(text[:end], answer)):
        end = place.start()
        if _DERIVED.search(text, text.rfind("\n", 0, end) + 1, end):
            return text[:end].strip()
    return text[: text.rfind("\n", 0, end) + 1].strip()


def false_equation(text: str) -> str | None:
    """An equation of plain numbers, in sums, differences, products and quotients, that does not hold; or None.

    Formulas with anything but numbers, signs and brackets are not read. A decimal result may be rounded.
    """
    plain = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", re.sub(r"\\[,;! ]|\{,\}", "", text))
    for sign, ascii_sign in _SIGNS.items():
        plain = re.sub(rf"{re.escape(sign)}(?![a-z])", f" {ascii_sign} ", plain)
    for match in _EQUATION.finditer(plain):
        sides = [re.sub(r"[ \t,]", "", side) for side in match[1].split("=")]
        values = [_value(side) for side in sides]
        for (side, other), (left, right) in zip(pairwise(sides), pairwise(values), strict=True):
            if left is None or right is None or not re.search(r"\d\)*[-+*/]", side + other):
                continue
            decimals = [len(found[1]) for one in (side, other) if (found := re.fullmatch(r"-?\d+\.(\d+)", one))]
            slack = Fraction(6, 10 ** (1 + min(decimals))) if decimals else Fraction(0)
            if abs(left - right) > slack:
                return match[1].strip()
    return None


def _value(text: str) -> Fraction | None:
    """The value of an expression of numbers, signs and brackets; None if it is none."""
    tokens = [*re.findall(r"\d+(?:\.\d+)?|[-+*/()]", text), ""]

    def factor() -> Fraction:
        token = tokens.pop(0)
        if token == "-":
            return -factor()
        if token == "(":
            inner = total()
            if tokens.pop(0) != ")":
                raise ValueError
            return inner
        return Fraction(token)

    def product() -> Fraction:
        value = factor()
        while tokens[0] in ("*", "/"):
            value = value * factor() if tokens.pop(0) == "*" else value / factor()
        return value

    def total() -> Fraction:
        value = product()
        while tokens[0] in ("+", "-"):
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    try:
        found = total()
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return found if tokens == [""] else None


def _place(text: str, answer: str) -> re.Match[str] | None:
    """Where a text first has an answer that is no part of a longer number or word."""
    # Digits in groups are the same number.
    pattern = re.escape(answer)
    if answer.isdecimal() and len(answer) > 3:
        grouped = f"{int(answer):,}"
        pattern = f"(?:{pattern}|{grouped})"
    return re.search(rf"(?<![\w.]){pattern}(?!\w|[.,]\d)", text)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _restates(words: Sequence[str], known: Sequence[str]) -> bool:
    """Whether nearly all runs of three words stand in another text."""
    if len(words) < _RUN:
        return list(words) == list(known)
    runs = {tuple(known[i : i + _RUN]) for i in range(len(known) - _RUN + 1)}
    mine = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return sum(run in runs for run in mine) >= _MOST_KNOWN * len(mine)
