"""What code sees of a text that was written from a seed document: whether it stands on the document, or copies it."""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from train.rewards.languages import language_of
from train.synthesize.grounding import numbers_of, ungrounded_number
from train.synthesize.overlap import words

TO_THE_DOCUMENT = re.compile(
    r"\b(?:the|this|that|following|given|provided|above|below|original) "
    r"(?:text|passage|excerpt|document|article|snippet)\b"
    r"|\baccording to (?:the|this) (?:author|text|passage|document|article)\b"
    r"|\bas (?:mentioned|described|stated|shown) (?:above|below)\b",
    re.IGNORECASE,
)
"""How a text speaks of a document that its reader does not have."""

# Integers up to this count something, such as "3 reasons".
_COUNTS = 3
# Words in a row that are a copy, where most of a text consists of such.
_COPIED_RUN = 8
# Words of at least so many letters carry the subject; so many letters of them are compared, for other endings.
_LONG, _STEM = 6, 5
_LEAST_LONG_WORDS = 12
_LABEL = re.compile(r"^[ \t]*(?:[#*>-]+[ \t]*)?(?:\d{1,3}[.)][ \t]+)?", re.MULTILINE)
_CAPITALISED = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_ENDS = re.compile(r"[.!?:;\u2026][\"')\]\u2019\u201d*_]*\s*$")


def number_fault(text: str, document: str, derived: bool, known: Iterable[Decimal] = ()) -> str | None:
    """The first number in a text that the document does not have, as it is written; None if there is none.

    Integers up to 3, which may count something, and numbers of items at the beginning of lines are left out. Numbers in
    words are not read.

    Args:
      text: that was written.
      document: the seed.
      derived: whether a number may also follow from others by one operation; see `ungrounded_number`.
      known: other numbers that may stand in the text.
    """
    have = {*numbers_of(document), *known}
    plain = _LABEL.sub("", text)
    if derived:
        found = ungrounded_number(plain, have, _COUNTS)
        return None if found is None else str(found)
    for number in numbers_of(plain):
        if number not in have and not (number == int(number) and number <= _COUNTS):
            return str(number)
    return None


def name_fault(text: str, document: str) -> str | None:
    """The first word with a capital letter within a sentence that the document does not have; None if there is none.

    Headings, and words that are all capital letters or one letter long, are left out; so are German texts, where all
    nouns have capital letters. Scripts without them have no names.
    """
    if language_of(text) == "de":
        return None
    have = {word.casefold() for word in _CAPITALISED.findall(document)}
    lines = ["", *text.split("\n"), ""]
    for at, line in enumerate(lines[1:-1], 1):
        body = _LABEL.sub("", line, count=1)
        # A heading: marked as such, or a paragraph of one line without the end of a sentence.
        alone = not lines[at - 1].strip() and not lines[at + 1].strip()
        if line.lstrip().startswith("#") or (alone and not _ENDS.search(body)):
            continue
        for match in _CAPITALISED.finditer(body):
            word, before = match[0], body[: match.start()].rstrip("\"'( [*_`\u2018\u201c")
            begins = not before or _ENDS.search(before) is not None
            if word[0].isupper() and not begins and len(word) > 1 and not word.isupper():
                plain = re.sub(r"['\u2019]s$", "", word).casefold()
                if plain not in have and word.casefold() not in have:
                    return word
    return None


def shared_subject(text: str, document: str) -> float | None:
    """The share of the long words of a text that the document has, whatever their endings; None if there are few."""
    mine = {word[:_STEM] for word in words(text) if len(word) >= _LONG}
    if len(mine) < _LEAST_LONG_WORDS:
        return None
    theirs = {word[:_STEM] for word in words(document)}
    return len(mine & theirs) / len(mine)


def copied_share(text: str, document: str) -> float:
    """The share of the runs of 8 words of a text that stand in the document; 0 for a shorter text."""
    mine = _runs(words(text))
    theirs = set(_runs(words(document)))
    return sum(run in theirs for run in mine) / len(mine) if mine else 0.0


def _runs(text: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + _COPIED_RUN]) for i in range(len(text) - _COPIED_RUN + 1)]
