"""The language of a document, by CLD3 or by a function of the user."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwen_jax.errors import InputError
from train.curate.operator import Compute, Operator
from train.data.documents import optional_library
from train.python_file import function_of_file

Identify = Callable[[str], tuple[str, float, bool] | None]
"""Maps a text to its language, the probability of it, and whether that can be relied on; None if it has none."""

# Addresses and mark-up say nothing about a language, and words in capitals confuse models of characters.
_NOISE = re.compile(r"https?://\S+|www\.\S+|\S+@\S+|<[^<>]{1,200}>|[\d_/\\|{}()\[\]=+*#<>~^$%&@`\"]+")
# Parts of a long text that are looked at.
_PARTS = 4


@dataclasses.dataclass(frozen=True)
class Language(Operator):
    """The language of a text: its BCP 47 code, the probability that the model gives it, and whether it is reliable.

    All three are null for a text with too few letters, and where the model finds no language. CLD3 knows 107 languages
    and calls a probability of at least 0.7 reliable. A long text is judged by evenly spaced parts of it.

    Attributes:
      function: FILE.py:function, in place of CLD3. It maps a text to (language, probability) or None; what it finds
        with a probability of at least 0.7 is reliable. Its file is run: give only files that you trust.
      min_bytes: a text whose letters take fewer bytes in UTF-8 gets no language; a letter takes 1 byte in English, 2 in
        Russian and 3 in Chinese.
      max_characters: the model reads at most this many characters of a text.
    """

    function: str | None = None
    min_bytes: int = 30
    max_characters: int = 4000

    makes = pa.schema(
        [
            pa.field("language", pa.string()),
            pa.field("language_probability", pa.float32()),
            pa.field("language_reliable", pa.bool_()),
        ]
    )

    def __post_init__(self) -> None:
        if self.min_bytes < 1 or self.max_characters < 100:
            raise InputError(
                f"min_bytes must be at least 1 and max_characters at least 100, got {self.min_bytes} and "
                f"{self.max_characters}."
            )
        self._file()

    def start(self) -> Compute:
        identify = self._own() if self.function else _cld3()

        def language_of(text: str) -> tuple[str, float, bool] | tuple[None, None, None]:
            sample = _NOISE.sub(" ", _sample(text, self.max_characters))
            letters = "".join(filter(str.isalpha, sample))
            if len(letters.encode()) < self.min_bytes:
                return None, None, None
            return identify(" ".join(sample.split())) or (None, None, None)

        def compute(table: pa.Table) -> pa.Table:
            found = [language_of(text) for text in table["text"].to_pylist()]
            columns = list(map(list, zip(*found, strict=True))) if found else [[], [], []]
            return pa.table(columns, schema=self.makes)

        return compute

    def settings(self) -> Mapping[str, Any]:
        """Includes the content of the function's file, so that earlier results do not outlive a change of it."""
        file = self._file()
        content = {} if file is None else {"sha256": hashlib.sha256(file[0].read_bytes()).hexdigest()}
        return {**super().settings(), **content}

    def _file(self) -> tuple[Path, str] | None:
        if self.function is None:
            return None
        file, colon, name = self.function.rpartition(":")
        if not (colon and file and name):
            raise InputError(f"Expected the identifier of languages as FILE.py:function, got {self.function!r}.")
        return Path(file), name

    def _own(self) -> Identify:
        given = self._file()
        assert given is not None
        function = function_of_file(*given, "language identifier")

        def identify(text: str) -> tuple[str, float, bool] | None:
            found = function(text)
            if found is None:
                return None
            try:
                language, probability = found
                if not isinstance(language, str) or not 0 <= float(probability) <= 1:
                    raise ValueError
            except (TypeError, ValueError):
                raise InputError(
                    f"{self.function} must return (language, probability from 0 to 1) or None, got {found!r}."
                ) from None
            return language, float(probability), float(probability) >= 0.7

        return identify


def _cld3() -> Identify:
    library = optional_library("gcld3", "identification of languages")
    model = library.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1 << 16)

    def identify(text: str) -> tuple[str, float, bool] | None:
        found = model.FindLanguage(text=text)
        if found.language == library.NNetLanguageIdentifier.kUnknown:
            return None
        return found.language, found.probability, found.is_reliable

    return identify


def _sample(text: str, size: int) -> str:
    if len(text) <= size:
        return text
    part = size // _PARTS
    begins = (i * (len(text) - part) // (_PARTS - 1) for i in range(_PARTS))
    return " ".join(text[begin : begin + part] for begin in begins)
