"""Rows of tokens from a text, on which the error of quantised layers is measured."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import why_unusable
from qwen_jax.tokenizer import Tokenizer

_PART_BYTES = 2**20  # A text file is read in parts of about this size.


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate on.

    Attributes:
      file: UTF-8 text; or JSON lines (.jsonl), each an object with "text".
      rows: how many rows of tokens are used.
      length: tokens of a row.
    """

    file: Path
    rows: int = 128
    length: int = 2048

    def __post_init__(self) -> None:
        if self.rows < 1 or self.length < 2:
            raise InputError(
                f"Calibration needs at least 1 row of at least 2 tokens, got {self.rows} rows of {self.length}."
            )

    def check(self, config: ModelConfig) -> None:
        """Raises InputError if the file cannot be read, or rows are longer than the model's context."""
        problem = why_unusable(self.file)
        if problem is not None:
            raise InputError(f"The calibration text {problem} Give a text file, or JSON lines with a field text.")
        if self.length > config.context_length:
            raise InputError(
                f"Calibration rows of {self.length} tokens are longer than the model's context of "
                f"{config.context_length}. Give a shorter --calibration-length."
            )

    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def tokens(self, tokenizer: Tokenizer, config: ModelConfig) -> np.ndarray:
        """The first tokens of the text as rows.

        Documents of JSON lines follow each other with the end-of-text token between them.

        Args:
          tokenizer: of the model.
          config: of the model.

        Returns:
          int32 [rows, length].

        Raises:
          InputError: the text is too short, not UTF-8, or has tokens that the model does not have.
        """
        needed, count, parts = self.rows * self.length, 0, []
        for part in self._documents(tokenizer):
            parts.append(np.asarray(part, np.int32))
            count += len(part)
            if count >= needed:
                break
        if count < needed:
            rows, length = count // self.length, count // self.rows
            advice = f", or --calibration-rows {rows}" if rows else ""
            advice += f", or --calibration-length {length}" if length > 1 else ""
            raise InputError(
                f"The calibration text {self.file} has {count:,} tokens; {self.rows} rows of {self.length} need "
                f"{needed:,}. Give a longer text{advice}."
            )
        ids = np.concatenate(parts)[:needed]
        if ids.max() >= config.vocab_size:
            raise InputError(
                f"The tokenizer gives ids up to {ids.max()}, the model has {config.vocab_size}: they do not belong "
                "together. Put the tokenizer of this model into its folder."
            )
        return ids.reshape(self.rows, self.length)

    def _documents(self, tokenizer: Tokenizer) -> Iterator[list[int]]:
        if self.file.suffix in (".jsonl", ".json"):
            for text in self._texts():
                yield tokenizer.encode_documents([text])[0]
            return
        # One text, in parts that end with a line.
        with self.file.open("rb") as file:
            while lines := file.readlines(_PART_BYTES):
                yield tokenizer.encode(_utf8(b"".join(lines), self.file), parse_special=False, add_special_tokens=False)

    def _texts(self) -> Iterator[str]:
        """The texts of JSON lines."""
        with self.file.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where, text = f"{self.file}, line {number}", _utf8(line, self.file)
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where} is not valid JSON: {error}.") from None
                if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                    raise InputError(f'{where}: expected an object with a string "text".')
                yield value["text"]


def _utf8(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"The calibration text {file} is not UTF-8: {error.reason}. Convert it first.") from None
