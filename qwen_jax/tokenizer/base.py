"""The interface of every tokenizer, and decoding of streams."""

import codecs
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.chat import ChatTemplate
from qwen_jax.tokenizer.control import END_OF_TEXT, TURN_START
from qwen_jax.tokenizer.files import TEMPLATE_FILE, Settings, default_chat_template
from qwen_jax.tokenizer.text import unused_characters, valid_text


class Tokenizer(ABC):
    """Text to token ids and back. Byte-level BPE and SentencePiece implement this interface.

    Attributes:
        eos_id: id of the token that ends a text.
        pad_id: id used to fill rows. What is padding is carried in a mask, never read from this id.
    """

    eos_id: int
    pad_id: int
    _settings: Settings
    _vocab_size: int
    _special_ids: frozenset[int]
    # Ids that `encode` adds before and after a text; empty for Qwen2.5.
    _prefix: tuple[int, ...] = ()
    _suffix: tuple[int, ...] = ()

    def _find_end_and_padding(self) -> None:
        """Set `eos_id` and `pad_id` from the settings. Raises InputError where a token is not in the vocabulary."""
        named = self._settings.named_tokens
        self.eos_id = self._require(named.get("eos_token") or END_OF_TEXT, "eos")
        pad = named.get("pad_token")
        if pad is None and self.token_to_id(END_OF_TEXT) is None:
            self.pad_id = self.eos_id
        else:
            self.pad_id = self._require(pad or END_OF_TEXT, "pad")

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included: 0 to vocab_size - 1. A model's embedding may have more rows."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` removes: special control tokens, and a model's own (such as `<s>`)."""
        return self._special_ids

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that `encode` puts before a text, such as a BOS token; none for Qwen2.5."""
        return self._prefix

    @property
    def adds_space(self) -> bool:
        """Whether a leading space is added to a text, and removed in decoding; some SentencePiece models do so."""
        return False

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The template of `encode_chat`; by default that of the Qwen2.5 instruct checkpoints.

        Raises:
            InputError: the folder's template is malformed, or there is none and the vocabulary lacks `<|im_start|>`,
                so that the default template would be read as plain text.
        """
        templates = self._settings.chat_templates()
        if not templates:
            if self.token_to_id(TURN_START) is None:
                raise InputError(
                    f"the tokenizer has no chat template, and no {TURN_START} for that of Qwen2.5. Set chat_template "
                    f"in tokenizer_config.json, or write it into {TEMPLATE_FILE} beside it."
                )
            templates = {"default": default_chat_template()}
        source = templates["default"] if list(templates) == ["default"] else templates
        return ChatTemplate(source, self._settings.special_tokens)

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
        """Return a function from an id to the bytes that it adds, to be called with the ids of one text in order.

        `decode` and `StreamDecoder` share it. The ids must lie in the vocabulary.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a sha256 (hex) of everything that determines the ids: vocabulary, merges, control tokens, rules.

        It does not depend on the form of the files, nor on eos, pad and the chat template.
        """

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder that `load_tokenizer` reads; each file appears whole or not at all."""

    @property
    @abstractmethod
    def control_ids(self) -> Mapping[str, int]:
        """Text to id of every control token that `encode` recognises in a text, `<tool_call>` included."""

    @abstractmethod
    def _encode_text(self, text: str, parse_special: bool) -> list[int]: ...

    @abstractmethod
    def _find_control(self, text: str) -> Iterable[tuple[int, int, int]]:
        """Yield (start, end, id) of each control token that `encode` recognises in a text, in order."""

    def encode(
        self,
        text: str | bytes,
        *,
        parse_special: bool = True,
        add_special_tokens: bool = True,
        literal: Collection[int] = (),
    ) -> list[int]:
        """Turn text into token ids.

        Args:
            text: a string, or UTF-8 bytes.
            parse_special: True reads control tokens in the text as such, as Hugging Face does. False treats them as
                plain text, which is right for text from others.
            add_special_tokens: add the tokens that this tokenizer puts before and after each text, such as a BOS token.
                Qwen2.5's puts none. A rendered chat already has them.
            literal: indices of characters that are plain text: no control token that has one of them is recognised.

        Raises:
            InputError: the bytes are not UTF-8, or the string holds a lone surrogate.
        """
        text = valid_text(text)
        ids = (
            self._encode_around(text, literal) if literal and parse_special else self._encode_text(text, parse_special)
        )
        return self._surround(ids) if add_special_tokens else ids

    def _encode_around(self, text: str, literal: Collection[int]) -> list[int]:
        """Encode text in which some characters belong to no control token."""
        (filler,) = unused_characters(1, text + "".join(self.control_ids))
        characters = list(text)
        for i in literal:
            characters[i] = filler
        ids: list[int] = []
        end_before = 0
        for start, end, token_id in self._find_control("".join(characters)):
            ids += [*self._encode_text(text[end_before:start], False), token_id]
            end_before = end
        return ids + self._encode_text(text[end_before:], False)

    def encode_batch(
        self, texts: Sequence[str | bytes], *, parse_special: bool = True, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Encode many texts; the same as `encode` on each."""
        return [self.encode(text, parse_special=parse_special, add_special_tokens=add_special_tokens) for text in texts]

    def encode_documents(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """Encode whole documents for pre-training: control tokens are plain text, and each ends with `eos_id`, once."""
        documents = self.encode_batch(texts, parse_special=False)
        # A tokenizer that puts the end-of-text token after each text has added it already.
        ended = self._suffix[-1:] == (self.eos_id,)
        return documents if ended else [[*document, self.eos_id] for document in documents]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Turn a conversation into the ids of a prompt, with `chat_template`.

        Args:
            messages, tools, add_generation_prompt, variables: as for `ChatTemplate.render`.
            continue_final_message: end with the content of the final message, in place of a generation prompt; see
                `ChatTemplate.render_open`.

        Raises:
            InputError: see `ChatTemplate.render` and `chat_template`.
        """
        template = self.chat_template
        if continue_final_message:
            text = template.render_open(messages, tools, **variables)
        else:
            text = template.render(messages, tools, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def _surround(self, ids: list[int]) -> list[int]:
        return [*self._prefix, *ids, *self._suffix] if self._prefix or self._suffix else ids

    def _add_by_flags(self) -> None:
        """Set `_prefix` and `_suffix` from `add_bos_token` and `add_eos_token`, where no tokenizer.json has rules."""
        for role in ("bos", "eos"):
            if not self._settings.flag(f"add_{role}_token"):
                continue
            token = self._settings.special_tokens.get(f"{role}_token")
            if token is None:
                raise InputError(
                    f"{self._settings.source}: add_{role}_token is true and {role}_token is not given. Give it, or set "
                    f"add_{role}_token to false."
                )
            added = (self._require(token, role),)
            if role == "bos":
                self._prefix = added
            else:
                self._suffix = added

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
    """Incremental detokenisation: turns ids into text as they arrive and never emits part of a character.

    The pushed strings followed by the flushed one equal `tokenizer.decode(all ids)`, however the ids are split. The
    cost of a token does not depend on the number of tokens before it.

    Args:
        tokenizer: the tokenizer of the ids.
        skip_special_tokens: as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip, self._size = skip_special_tokens, tokenizer.vocab_size
        self._start()

    def _start(self) -> None:
        self._step = self._tokenizer.byte_decoder(skip_special_tokens=self._skip)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Whether the bytes so far end within a character.
        self._partial = False

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Decode the next ids and return the text that no later id can change. Raises InputError as `decode` does."""
        checked = [i if type(i) is int and 0 <= i < self._size else self._tokenizer.check_id(i) for i in ids]
        data = b"".join([self._step(i) for i in checked])
        # Most tokens are ASCII, which needs no state.
        if not self._partial and data.isascii():
            return data.decode("ascii")
        text = self._utf8.decode(data)
        self._partial = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """End the text: return U+FFFD for an unfinished character, else an empty string. A new text may follow."""
        rest = self._utf8.decode(b"", final=True)
        self._start()
        return rest
