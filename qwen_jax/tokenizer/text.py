"""Checks of input text: it must have a UTF-8 form."""

import itertools
from collections.abc import Iterable
from pathlib import Path

from qwen_jax.errors import InputError


def valid_text(text: str | bytes) -> str:
    """Return the text as a string, decoded from UTF-8 where it is bytes.

    Raises:
        InputError: the bytes are not UTF-8, or the string holds a lone surrogate; the error gives the position.
    """
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"text is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start} ({error.reason}). "
                "Convert the text to UTF-8 first."
            ) from None
    if not isinstance(text, str):
        raise InputError(f"expected text as str or UTF-8 bytes, got {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which UTF-8 "
                "cannot express. Decode the source with errors='replace', or remove the character."
            ) from None
    return text


def unused_characters(count: int, text: str) -> list[str]:
    """Return private-use characters that do not occur in a text.

    Raises:
        InputError: the text has nearly all of them.
    """
    used = set(text)
    found = list(itertools.islice((c for c in map(chr, range(0xE000, 0xF900)) if c not in used), count))
    if len(found) < count:
        raise InputError("text holds nearly all 6,400 private-use characters (U+E000 to U+F8FF). Remove some of them.")
    return found


def documents(texts: Iterable[str | bytes | Path]) -> Iterable[str]:
    """Yield training texts one by one: strings, UTF-8 bytes, and the contents of `Path` objects.

    Raises:
        InputError: a single text instead of several, a file that cannot be read, or a text that is not valid Unicode.
    """
    if isinstance(texts, (str, bytes, Path)):
        raise InputError("expected an iterable of texts or of Path objects, got a single one. Put it in a list.")
    for number, item in enumerate(texts):
        where = f"file {item}" if isinstance(item, Path) else f"text {number}"
        try:
            yield valid_text(item.read_bytes() if isinstance(item, Path) else item)
        except OSError as error:
            raise InputError(f"cannot read training {where}: {error.strerror}") from None
        except InputError as error:
            raise InputError(f"training {where}: {error}") from None
