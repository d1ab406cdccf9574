"""SentencePiece tokenizers, for pre-training with a vocabulary of one's own."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from qwen_jax.errors import InputError
from qwen_jax.files import write_atomic
from qwen_jax.tokenizer.base import Tokenizer
from qwen_jax.tokenizer.control import CONTROL_TOKENS
from qwen_jax.tokenizer.files import (
    CONFIG_FILE,
    AddedToken,
    Settings,
    make_folder,
    read_bytes,
    save_settings,
)
from qwen_jax.tokenizer.text import documents

MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # SentencePiece writes a space as this character, so a text's own U+2581 decodes as a space.


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece tokenizer with Qwen2.5's control tokens.

    Control tokens that the model does not hold follow its pieces. Text between two control tokens is one SentencePiece
    text: where the model adds a leading space, it is added and removed in each.

    Args:
        model: a serialised SentencePiece model.
        settings: named tokens and chat template; its `added_tokens` are used where given.
        source: named in errors.

    Raises:
        InputError: the model is damaged, an added token clashes with it, or eos or pad is missing.
    """

    def __init__(self, model: bytes, settings: Settings, source: Path) -> None:
        try:
            self._engine = SentencePieceProcessor()
            self._engine.load_from_serialized_proto(model)
        except RuntimeError:
            raise InputError(f"{source}: not a SentencePiece model, or a damaged one; fetch it again") from None
        self._model = model
        self._settings = settings
        self._added = self._place_added_tokens(source)
        pieces = self._engine.get_piece_size()
        own = (AddedToken(self._engine.id_to_piece(i), special=True) for i in range(pieces))
        control = {i: token for i, token in enumerate(own) if self._engine.is_control(i)} | self._added
        self._control = {i: token.content.encode("utf-8") for i, token in control.items()}
        self._special_ids = frozenset(i for i, token in control.items() if token.special)
        self._id_of = {token.content: i for i, token in control.items()}
        longest_first = sorted(self._id_of, key=len, reverse=True)
        self._control_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._pieces = [self._piece_bytes(i) for i in range(pieces)]
        self._vocab_size = pieces + sum(i >= pieces for i in self._added)
        self._strips_one, self._strips_all = self._leading_space_rule()
        self._find_end_and_padding()
        self._add_by_flags()

    def _place_added_tokens(self, source: Path) -> dict[int, AddedToken]:
        following = self._engine.get_piece_size()
        declared = self._settings.added_tokens
        if declared is None:
            declared = {}
            for control in CONTROL_TOKENS:
                i = self.piece_id(control.content)
                declared[following if i is None else i] = AddedToken(control.content, special=control.special)
                following += i is None
            return dict(sorted(declared.items()))
        for i, token in declared.items():
            existing = self.piece_id(token.content)
            if i != (following if existing is None else existing):
                raise InputError(
                    f"{source}: special tokens clash: {CONFIG_FILE} gives {token.content!r} the id {i}, but the model "
                    f"{'continues with' if existing is None else 'has it at'} "
                    f"{following if existing is None else existing}. Correct {CONFIG_FILE}."
                )
            following += existing is None
        return declared

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece of the SentencePiece model itself, or None."""
        i = self._engine.piece_to_id(piece)
        return i if self._engine.id_to_piece(i) == piece else None

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._engine.id_to_piece(i)
        if self._engine.is_byte(i):
            return bytes([int(piece[1:-1], 16)])  # "<0x41>"
        if self._engine.is_unknown(i):
            return self._engine.decode([i]).encode("utf-8")
        return piece.replace(_SPACE, " ").encode("utf-8")

    def _leading_space_rule(self) -> tuple[bool, bool]:
        """Return whether decoding removes one space at the start of a text, and whether it removes all of them.

        The Python interface does not give the model's settings, so this decodes short texts to find out.
        """
        first = next((i for i in range(len(self._pieces)) if self._starts_with_space(i)), None)
        if first is None:
            return False, False
        strips = self._engine.decode([first]) != self._pieces[first].decode("utf-8")
        space = self.piece_id(_SPACE)
        return strips, strips and space is not None and self._engine.decode([space, space]) == ""

    def _starts_with_space(self, i: int) -> bool:
        # SentencePiece keeps a leading space of byte pieces and of the unknown piece.
        return i not in self._control and self._engine.id_to_piece(i).startswith(_SPACE)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece or control token, or None."""
        return self._id_of.get(token, self.piece_id(token))

    def id_to_token(self, token_id: int) -> str:
        """Return the piece or control token. Raises InputError for an id outside the vocabulary."""
        i = self.check_id(token_id)
        return self._control[i].decode("utf-8") if i in self._control else self._engine.id_to_piece(i)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token inside a text. Raises InputError for an id outside the vocabulary."""
        i = self.check_id(token_id)
        return self._control[i] if i in self._control else self._pieces[i]

    def byte_decoder(self, *, skip_special_tokens: bool = False) -> Callable[[int], bytes]:
        """Return a function from an id to its bytes that removes the space which the model adds at a text's start."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        at_start = True

        def step(i: int) -> bytes:
            nonlocal at_start
            if i in self._control:
                at_start = True
                return b"" if i in hidden else self._control[i]
            piece = self._pieces[i]
            if not at_start:
                return piece
            at_start = False
            if self._strips_one and self._starts_with_space(i):
                piece = piece[1:]
                at_start = self._strips_all and not piece
            return piece

        return step

    @property
    def adds_space(self) -> bool:
        """Whether the model adds a leading space to a text."""
        return self._strips_one

    @property
    def control_ids(self) -> Mapping[str, int]:
        """Text to id of every control token that `encode` recognises in a text."""
        return self._id_of

    def _find_control(self, text: str) -> Iterable[tuple[int, int, int]]:
        return ((m.start(), m.end(), self._id_of[m.group()]) for m in self._control_pattern.finditer(text))

    def _encode_text(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return self._engine.encode(text)
        ids: list[int] = []
        for number, part in enumerate(self._control_pattern.split(text)):
            if number % 2:  # The pattern's group: a control token.
                ids.append(self._id_of[part])
            elif part:
                ids += self._engine.encode(part)
        return ids

    def fingerprint(self) -> str:
        """Return a sha256 (hex) of the model and the control tokens."""
        added = json.dumps({i: vars(token) for i, token in self._added.items()}, sort_keys=True)
        digest = hashlib.sha256(hashlib.sha256(self._model).digest() + added.encode("utf-8"))
        if self._prefix or self._suffix:
            digest.update(repr((self._prefix, self._suffix)).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.model and tokenizer_config.json.

        A BPE model trained here loads in `transformers.AutoTokenizer`, in versions 4 and 5, with identical ids.
        Raises InputError where the folder cannot be written.
        """
        path = make_folder(folder)
        write_atomic(path / MODEL_FILE, self._model)
        save_settings(path, self._settings, self._added, {})


def from_model_file(path: Path, settings: Settings) -> SentencePieceTokenizer:
    """Load a SentencePiece model. Raises InputError as `SentencePieceTokenizer` does."""
    return SentencePieceTokenizer(read_bytes(path), settings, path)


def train_sentencepiece(
    texts: Iterable[str | bytes | Path], vocab_size: int, *, model_type: Literal["bpe", "unigram"] = "bpe"
) -> SentencePieceTokenizer:
    """Train a lossless SentencePiece model: no normalisation, and unknown characters are encoded as bytes.

    Args:
        texts: strings, UTF-8 bytes, or `Path` objects of text files.
        vocab_size: ids in all, the unknown piece, 256 bytes and 22 control tokens included.
        model_type: "bpe" or "unigram".

    Returns:
        A tokenizer whose 22 control tokens follow the learned pieces.

    Raises:
        InputError: the texts are too few for vocab_size, or vocab_size too small for their characters.
    """
    model = io.BytesIO()
    lines = (line for text in documents(texts) for line in text.split("\n") if line)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size - len(CONTROL_TOKENS),
            model_type=model_type,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,  # In bytes. SentencePiece skips longer lines without a message.
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            unk_id=0,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"SentencePiece cannot train {vocab_size} ids on these texts: {error}. Change vocab_size or give more text."
        ) from None
    # transformers' class for SentencePiece BPE gives the same ids in versions 4 and 5; for this unigram it has none.
    other = {"tokenizer_class": "LlamaTokenizer", "legacy": False} if model_type == "bpe" else {}
    return SentencePieceTokenizer(model.getvalue(), Settings(other=other), Path("the trained model"))
