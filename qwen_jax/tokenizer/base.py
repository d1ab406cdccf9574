"""What every tokenizer offers, and the control tokens of Qwen2.5."""

import codecs
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

from qwen_jax.errors import InputError


@dataclass(frozen=True)
class ControlToken:
    """A token that stands for itself, outside the learned vocabulary.

    Args:
        content: the text of the token.
        special: whether `skip_special_tokens` removes it from decoded text. Tool-call and fill-in-the-middle tokens
            are not special, because programs read them in the text.
    """

    content: str
    special: bool


# In the order of their ids, which follow the last regular id. Source: tokenizer_config.json of the Qwen2.5 checkpoints.
CONTROL_TOKENS = tuple(
    ControlToken(content, special)
    for special, contents in (
        (
            True,
            "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
            "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>",
        ),
        (
            False,
            "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
            "<|file_sep|>",
        ),
    )
    for content in contents.split()
)
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to token ids and back; byte-level BPE and SentencePiece both keep this interface.

    Attributes:
        eos_id: id that ends a generation.
        pad_id: id used to fill rows; a mask says what is padding, never this id.
        chat_template: Jinja source for `ChatTemplate`.
    """

    eos_id: int
    pad_id: int
    chat_template: str
    _vocab_size: int
    _special_ids: frozenset[int]

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included: 0 to vocab_size - 1. A model's embedding may have more rows."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` removes: special control tokens, and a model's own (such as `<s>`)."""
        return self._special_ids

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary file, or None."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str:
        """Return the name of a token in the vocabulary file. Raises InputError for an id outside the vocabulary."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes, possibly part of a character, that a token adds inside a text.

        Raises InputError for an id outside the vocabulary.
        """

    @abstractmethod
    def byte_decoder(self, *, skip_special_tokens: bool = False) -> Callable[[int], bytes]:
        """Return a function that is called with each id of one text in order and returns the bytes the id adds.

        It is what `decode` and `StreamDecoder` share. Its ids must lie in the vocabulary.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a sha256 (hex) of what decides the ids: vocabulary, merges, control tokens and splitting rules.

        It does not depend on the form of the files it was loaded from, nor on eos, pad and the chat template.
        """

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder that `load_tokenizer` reads; each file appears whole or not at all."""

    @abstractmethod
    def _encode_text(self, text: str, parse_special: bool) -> list[int]: ...

    def encode(self, text: str | bytes, *, parse_special: bool = True) -> list[int]:
        """Turn text into token ids; nothing is added before or after.

        Args:
            text: a string, or UTF-8 bytes.
            parse_special: True reads control tokens in the text as such, as Hugging Face does; False takes them for
                plain text, which is right for text that others wrote.

        Raises:
            InputError: the bytes are not UTF-8, or the string holds a lone surrogate.
        """
        return self._encode_text(valid_text(text), parse_special)

    def encode_batch(self, texts: Sequence[str | bytes], *, parse_special: bool = True) -> list[list[int]]:
        """Encode many texts; the same as `encode` on each."""
        return [self.encode(text, parse_special=parse_special) for text in texts]

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids, each in [0, vocab_size).
            skip_special_tokens: leave out the tokens in `special_ids`; `<tool_call>` is not among them.

        Raises:
            InputError: an id lies outside the vocabulary.
        """
        step = self.byte_decoder(skip_special_tokens=skip_special_tokens)
        return b"".join([step(self.check_id(i)) for i in ids]).decode("utf-8", errors="replace")

    def check_id(self, token_id: SupportsIndex) -> int:
        """Return the id as an int. Raises InputError when it lies outside the vocabulary."""
        value = operator.index(token_id)
        if not 0 <= value < self.vocab_size:
            raise InputError(
                f"token id {value} is outside the vocabulary: expected 0 to {self.vocab_size - 1}. "
                "Rows of the embedding beyond the vocabulary are padding and stand for no text."
            )
        return value

    def _require(self, token: str, role: str) -> int:
        token_id = self.token_to_id(token)
        if token_id is None:
            raise InputError(
                f"the {role} token {token!r} is not in the vocabulary. Correct {role}_token in tokenizer_config.json."
            )
        return token_id


class StreamDecoder:
    """Turn ids into text as they come, never emitting part of a character.

    The pushed strings followed by the flushed one equal `tokenizer.decode(all ids)`, however the ids are split. The
    cost of a token does not depend on how many came before.

    Args:
        tokenizer: the tokenizer of the ids.
        skip_special_tokens: as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._start()

    def _start(self) -> None:
        self._step = self._tokenizer.byte_decoder(skip_special_tokens=self._skip)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Take the next ids and return the text that is now certain. Raises InputError as `decode` does."""
        checked = [self._tokenizer.check_id(i) for i in ids]
        return self._utf8.decode(b"".join([self._step(i) for i in checked]))

    def flush(self) -> str:
        """End the text: return U+FFFD for an unfinished character, else an empty string. Then a new text may begin."""
        rest = self._utf8.decode(b"", final=True)
        self._start()
        return rest


def valid_text(text: str | bytes) -> str:
    """Return the text as a string that has a UTF-8 form, or raise InputError saying where it has none."""
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


def documents(texts: Iterable[str | bytes | Path]) -> Iterable[str]:
    """Yield the training texts one by one: strings and UTF-8 bytes as they are, `Path` objects as the file's text.

    Raises:
        InputError: a single string came instead of several, a file cannot be read, or a text is not valid Unicode.
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
