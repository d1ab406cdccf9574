"""Numbers of reasoning that come from nowhere: neither from the data, nor from one operation on numbers beside them."""

import re
from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal

_NUMBER = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![A-Za-z_.])\d{1,18}(?:\.\d{1,12})?")
_LABEL = re.compile(r"^[ \t]*(?:[#*]+[ \t]*)?(?:step[ \t]*)?\d{1,3}(?:\*\*)?[.):](?!\d)[ \t]*", re.IGNORECASE)
# Operands are looked for among so many numbers before and in the line.
_WINDOW = 48


def numbers_of(text: str) -> list[Decimal]:
    """The numbers in a text, without signs: those of dates and codes are the numbers of their parts."""
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)]


def ungrounded_number(text: str, known: Iterable[Decimal], counts: int) -> Decimal | None:
    """The first number in reasoning that neither the data has nor one operation gives; None if there is none.

    A number is accepted if it is in the data or the question, counts rows (an integer up to `counts`), was accepted in
    an earlier line, or is the sum, difference, product or quotient (rounded as it is written) of two numbers of its
    line or the one before, or the sum or mean of neighbouring numbers before it in its line.

    It sees numbers that are made up or miscalculated. It does not see a number of the data that is said of the wrong
    row, a wrong small count, or a wrong number that is another one of the data by accident.

    Args:
      text: the reasoning. Numbers of steps at the beginning of lines are left out, and so are signs.
      known: numbers of the data and the question, and the right answer.
      counts: the largest integer that may count something.
    """
    accepted = {abs(number) for number in known}
    before: list[Decimal] = []
    for line in text.split("\n"):
        numbers = numbers_of(_LABEL.sub("", line, count=1))
        # Those that are known may be operands of numbers before them.
        fixed = [number for number in numbers if number in accepted or _is_count(number, counts)]
        for place, number in enumerate(numbers):
            if number in accepted or _is_count(number, counts):
                continue
            earlier = numbers[:place]
            operands = list(dict.fromkeys([*before, *earlier, *fixed]))[-_WINDOW:]
            if not _is_derived(number, operands) and not _is_of_run(number, earlier[-_WINDOW:]):
                return number
            fixed.append(number)
        accepted.update(numbers)
        if numbers:
            before = numbers
    return None


def _is_count(number: Decimal, counts: int) -> bool:
    return number <= counts and number == int(number)


def _is_derived(number: Decimal, operands: Sequence[Decimal]) -> bool:
    """Whether a number is one operation of two operands."""
    have = set(operands)
    for a in operands:
        if number - a in have or number + a in have:
            return True
        if any(a * b == number or (b and _rounded_as(a / b, number) == number) for b in operands):
            return True
    return False


def _is_of_run(number: Decimal, earlier: Sequence[Decimal]) -> bool:
    """Whether a number is the sum or the mean of the numbers just before it."""
    total = Decimal(0)
    for count, one in enumerate(reversed(earlier), 1):
        total += one
        if count > 1 and (total == number or _rounded_as(total / count, number) == number):
            return True
    return False


def _rounded_as(value: Decimal, like: Decimal) -> Decimal:
    """A value with the decimals of another one."""
    exponent = like.as_tuple().exponent
    assert isinstance(exponent, int)
    return value.quantize(Decimal(1).scaleb(min(exponent, 0)), ROUND_HALF_UP) if value < Decimal("1e18") else value
