"""What a translation must leave as it is: code, links, placeholders and numbers."""

import re
import unicodedata
from collections import Counter

_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_BACKTICKS = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"(?:https?://|www\.)[\w\-./?%&=+#~:@!,;*$]*[\w/#=]|[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)
_PLACEHOLDER = re.compile(
    r"\{\{[^{}\n]*\}\}|\$?\{[^{}\n]*\}|%\(\w+\)[sd]|%[sd]\b|<[A-Z][A-Z0-9_]*>|\[[A-Z][A-Z0-9_ ]*\]"
    r"|\$[A-Z_][A-Z0-9_]+\b",
    re.ASCII,
)
# Digits with the separators of any country.
_NUMBER = re.compile(r"\d+(?:[.,'\u2019\u066b\u066c\u00a0\u202f]\d+)*")
_KINDS = (("code block", _BLOCK), ("code", _BACKTICKS), ("link", _LINK), ("placeholder", _PLACEHOLDER))


def marks_of(text: str) -> Counter[tuple[str, str]]:
    """The code blocks, names in backticks, links, placeholders and numbers of a text, with how often each is there.

    The separators of a number are left out, since languages differ in them (1,234.5 and 1.234,5), and digits of all
    scripts are the same digits. Numbers in words are not seen.
    """
    found = Counter[tuple[str, str]]()
    for kind, pattern in _KINDS:
        found.update((kind, one) for one in pattern.findall(text))
        text = pattern.sub(" ", text)
    digits = text if text.isascii() else re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)
    found.update(("number", re.sub(r"\D", "", one)) for one in _NUMBER.findall(digits))
    return found


def without_marks(text: str) -> str:
    """The words of a text: what is written in a language."""
    for _, pattern in _KINDS:
        text = pattern.sub(" ", text)
    return text


def changed_mark(original: str, translation: str) -> str | None:
    """The kind of the first mark that one of two texts has and the other has not; None if they have the same ones."""
    before, after = marks_of(original), marks_of(translation)
    differ = sorted({kind for kind, _ in (before - after) + (after - before)})
    return differ[0] if differ else None
