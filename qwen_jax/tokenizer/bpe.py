"""Byte-level BPE, the kind of tokenizer that Qwen2.5 has, built on the `tokenizers` library."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen_jax.errors import InputError
from qwen_jax.files import write_atomic
from qwen_jax.tokenizer.base import Tokenizer
from qwen_jax.tokenizer.control import CONTROL_TOKENS
from qwen_jax.tokenizer.files import (
    ADDED_TOKEN_FLAGS,
    CONFIG_FILE,
    AddedToken,
    Settings,
    control_tokens_from,
    make_folder,
    parse_json_object,
    read_text,
    save_settings,
)
from qwen_jax.tokenizer.text import documents, valid_text
from qwen_jax.tokenizer.vocabulary import (
    BYTE_CHARACTERS,
    Merges,
    Vocab,
    check_vocab,
    merges_txt,
    to_bytes,
    vocab_json,
)

# Qwen2's pre-tokeniser (its tokenizer.json): contractions, letters, digits one by one, punctuation, line ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ByteLevelBPE(Tokenizer):
    """Byte-level BPE tokenizer.

    Args:
        engine: the `tokenizers` pipeline, added tokens included.
        settings: named tokens and chat template.
        surround: ids that are added before and after each text; by default those of `add_bos_token` and
            `add_eos_token` in the settings.

    Raises:
        InputError: eos or pad is not in the vocabulary.
    """

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        settings: Settings,
        surround: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        self._engine = engine
        # The same model without the added tokens, so that control tokens in a text stay text. The model is shared.
        self._plain_engine = tokenizers.Tokenizer(engine.model)
        self._plain_engine.normalizer = engine.normalizer
        self._plain_engine.pre_tokenizer = engine.pre_tokenizer
        self._settings = settings
        self._vocab_size = engine.get_vocab_size(with_added_tokens=True)
        self._added = {
            i: AddedToken(token.content, **{flag: getattr(token, flag) for flag in ADDED_TOKEN_FLAGS})
            for i, token in sorted(engine.get_added_tokens_decoder().items())
        }
        self._special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._find_end_and_padding()
        if surround is None:
            self._add_by_flags()
        else:
            self._prefix, self._suffix = map(tuple, surround)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token in the byte-level alphabet, or None."""
        return self._engine.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """Return the token in the byte-level alphabet. Raises InputError for an id outside the vocabulary."""
        token = self._engine.id_to_token(self.check_id(token_id))
        assert token is not None, "ids are dense: checked at construction"
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token. Raises InputError for an id outside the vocabulary."""
        return self._bytes[self.check_id(token_id)]

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self._vocab_size
        for token, i in self._engine.get_vocab(with_added_tokens=True).items():
            # An added token is matched by its text, and its letters may also be in the byte-level alphabet.
            table[i] = token.encode("utf-8") if i in self._added else to_bytes(token)
        return table

    @cached_property
    def _bytes_without_special(self) -> list[bytes]:
        return [b"" if i in self._special_ids else token for i, token in enumerate(self._bytes)]

    def byte_decoder(self, *, skip_special_tokens: bool = False) -> Callable[[int], bytes]:
        """Return a look-up in the table of each id's bytes, which do not depend on the neighbouring tokens."""
        return (self._bytes_without_special if skip_special_tokens else self._bytes).__getitem__

    @cached_property
    def control_ids(self) -> Mapping[str, int]:
        """Text to id of every control token that `encode` recognises in a text."""
        return {token.content: i for i, token in self._added.items()}

    def _encode_text(self, text: str, parse_special: bool) -> list[int]:
        engine = self._engine if parse_special else self._plain_engine
        # `encode` keeps all other threads waiting, for seconds where a text is long. A batch of one does not.
        (encoding,) = engine.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def _find_control(self, text: str) -> Iterable[tuple[int, int, int]]:
        encoding = self._engine.encode(text, add_special_tokens=False)
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in self._added:
                yield start, end, i

    def encode_batch(
        self, texts: Sequence[str | bytes], *, parse_special: bool = True, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Encode many texts on all cores; the same ids as `encode` on each."""
        engine = self._engine if parse_special else self._plain_engine
        checked = [valid_text(text) for text in texts]
        ids = [encoding.ids for encoding in engine.encode_batch_fast(checked, add_special_tokens=False)]
        return [self._surround(one) for one in ids] if add_special_tokens else ids

    def _document(self) -> dict[str, Any]:
        """Return the pipeline in the form of tokenizer.json."""
        return json.loads(self._engine.to_str())

    def tables(self) -> tuple[Vocab, Merges, dict[int, AddedToken], Settings]:
        """Return the learned vocabulary, its merges (best first), the added tokens by id, and the settings."""
        model = self._document()["model"]
        return model["vocab"], [tuple(pair) for pair in model["merges"]], dict(self._added), self._settings

    @property
    def suffix(self) -> tuple[int, ...]:
        """Ids that `encode` puts after a text; none for Qwen2.5."""
        return self._suffix

    @cached_property
    def splits_as_qwen2(self) -> bool:
        """Whether texts are normalised and split by the rules of Qwen2's tokenizer."""
        return _splitting_rules(self._document()) == _splitting_rules(json.loads(_pipeline(models.BPE()).to_str()))

    def fingerprint(self) -> str:
        """Return a sha256 (hex) of vocabulary, merges, control tokens and splitting rules."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        document = self._document()
        digest = hashlib.sha256()
        for part in (
            vocab_json(document["model"]["vocab"]),
            merges_txt(document["model"]["merges"]),
            json.dumps({i: vars(token) for i, token in self._added.items()}, sort_keys=True),
            json.dumps(_splitting_rules(document)),
        ):
            digest.update(hashlib.sha256(part.encode("utf-8")).digest())
        if self._prefix or self._suffix:
            digest.update(repr((self._prefix, self._suffix)).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json.

        `transformers.AutoTokenizer.from_pretrained` loads the folder, in versions 4 and 5, with identical ids.
        Raises InputError where the folder cannot be written.
        """
        path = make_folder(folder)
        document = self._document()
        write_atomic(path / "vocab.json", vocab_json(document["model"]["vocab"]))
        write_atomic(path / "merges.txt", merges_txt(document["model"]["merges"]))
        write_atomic(path / "tokenizer.json", self._engine.to_str(pretty=True))
        # Qwen2Tokenizer builds its own pipeline, so only a tokenizer with the same one may name that class.
        fixed = {"tokenizer_class": "Qwen2Tokenizer" if self.splits_as_qwen2 else "PreTrainedTokenizerFast"}
        save_settings(path, self._settings, self._added, fixed)


def _splitting_rules(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the normaliser's and pre-tokeniser's settings, without `trim_offsets`, which does not change ids."""
    rules: list[dict[str, Any]] = []
    for stage, nested in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        component = document[stage] or {"type": None}
        rules += [{k: v for k, v in step.items() if k != "trim_offsets"} for step in component.get(nested, [component])]
    return rules


def _pipeline(model: models.BPE) -> tokenizers.Tokenizer:
    """Return Qwen2.5's pipeline around a model, without added tokens."""
    engine = tokenizers.Tokenizer(model)
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    engine.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    return engine


def from_vocab_and_merges(vocab: Vocab, merges: Merges, settings: Settings, source: Path) -> ByteLevelBPE:
    """Build a tokenizer with Qwen2.5's pipeline.

    Args:
        vocab: byte-level token to id, ids dense.
        merges: pairs, best first.
        settings: its `added_tokens` are used where given; otherwise the 22 control tokens follow the vocabulary.
        source: named in errors.

    Raises:
        InputError: an added token clashes with the vocabulary, or eos or pad is missing.
    """
    engine = _pipeline(models.BPE(vocab=vocab, merges=merges))
    declared = settings.added_tokens
    _add_tokens(engine, control_tokens_from(len(vocab)) if declared is None else declared, source)
    return ByteLevelBPE(engine, settings)


def from_tokenizer_json(path: Path, settings: Settings) -> ByteLevelBPE:
    """Load a Hugging Face tokenizer.json that describes a byte-level BPE.

    Raises InputError where the file is damaged, describes another kind of tokenizer, or disagrees with `settings`.
    """
    text = read_text(path)
    document = parse_json_object(text, path)
    model, decoder = document.get("model") or {}, document.get("decoder") or {}
    # Older files leave the model's type out.
    is_bpe = model.get("type", "BPE") == "BPE" and isinstance(model.get("vocab"), dict)
    if not is_bpe or decoder.get("type") != "ByteLevel":
        raise InputError(
            f"{path}: expected a byte-level BPE (model BPE, decoder ByteLevel), got model {model.get('type')!r} with "
            f"decoder {decoder.get('type')!r}. SentencePiece tokenizers load from their tokenizer.model."
        )
    if not isinstance(model.get("merges"), list):
        raise InputError(
            f"{path}: the BPE model has no list of merges, so texts cannot be split into its tokens. The file is "
            "incomplete; fetch it again, or remove it where vocab.json and merges.txt are beside it."
        )
    if model.get("dropout"):
        raise InputError(f"{path}: the model has dropout {model['dropout']}, so its ids are random. Set it to null.")
    check_vocab(model["vocab"], path)
    try:
        engine = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exception for every fault in a file.
        raise InputError(f"{path}: the tokenizers library cannot read it: {error}") from None
    engine.no_truncation()
    engine.no_padding()
    present = engine.get_added_tokens_decoder()
    # added_tokens.json gives ids without flags, and tokenizer.json has the flags.
    declared = {
        i: token for i, token in (settings.added_tokens or {}).items() if settings.declares_flags or i not in present
    }
    _add_tokens(engine, declared, path)
    return ByteLevelBPE(engine, settings, _surrounding_ids(engine, path))


def _surrounding_ids(engine: tokenizers.Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor adds before and after each text.

    Raises InputError where it does something else.
    """
    if not engine.num_special_tokens_to_add(is_pair=False):
        return [], []
    plain = engine.encode("a", add_special_tokens=False).ids
    whole = engine.encode("a", add_special_tokens=True).ids
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    if len(starts) != 1:
        raise InputError(
            f"{path}: expected a post-processor that adds tokens before or after a text; this one makes {whole} of the "
            f"ids {plain}. Correct it or remove it."
        )
    return whole[: starts[0]], whole[starts[0] + len(plain) :]


def _add_tokens(engine: tokenizers.Tokenizer, declared: dict[int, AddedToken], source: Path) -> None:
    """Add declared tokens or check that they are there already, and check that all ids are dense."""
    present = engine.get_added_tokens_decoder()
    for i, token in declared.items():
        other = present.get(i)
        if other is not None and (other.content, other.special) != (token.content, token.special):
            raise InputError(
                f"{source}: special tokens clash: id {i} is {other.content!r} (special={other.special}) there, but "
                f"{token.content!r} (special={token.special}) in {CONFIG_FILE}. Correct one of the files."
            )
        existing = engine.token_to_id(token.content)
        expected = engine.get_vocab_size(with_added_tokens=True) if existing is None else existing
        if i != expected:
            raise InputError(
                f"{source}: special tokens clash: {token.content!r} should have id {i}, but the vocabulary "
                f"{'has it at' if existing is not None else 'continues with'} {expected}. "
                f"Control tokens follow the regular ones without a gap; correct {CONFIG_FILE} or the vocabulary."
            )
        if other is None:
            engine.add_tokens([tokenizers.AddedToken(**vars(token))])
    ids = sorted(engine.get_vocab(with_added_tokens=True).values())
    if ids != list(range(len(ids))):
        raise InputError(f"{source}: the ids must be 0 to {len(ids) - 1}, each once; the highest is {ids[-1]}.")


def train_bpe(
    texts: Iterable[str | bytes | Path], vocab_size: int, *, min_frequency: int = 2, progress: bool = False
) -> ByteLevelBPE:
    """Train a byte-level BPE with Qwen2.5's pre-tokeniser on texts; the same texts give the same tokenizer.

    Args:
        texts: strings, UTF-8 bytes, or `Path` objects of text files.
        vocab_size: ids in all, the 256 bytes and 22 control tokens included; a small corpus may give fewer.
        min_frequency: a pair that occurs less often is not merged.
        progress: show a progress bar on standard error.

    Returns:
        A tokenizer whose 22 control tokens follow the learned ones.

    Raises:
        InputError: vocab_size is too small, or a text is not valid UTF-8 or cannot be read.
    """
    smallest = len(BYTE_CHARACTERS) + len(CONTROL_TOKENS)
    if vocab_size < smallest:
        raise InputError(f"vocab_size must be at least {smallest} (256 bytes and 22 control tokens), got {vocab_size}")
    engine = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        min_frequency=min_frequency,
        show_progress=progress,
        initial_alphabet=BYTE_CHARACTERS,
        special_tokens=[],
    )
    engine.train_from_iterator(documents(texts), trainer)
    _add_tokens(engine, control_tokens_from(engine.get_vocab_size()), Path("the trained vocabulary"))
    return ByteLevelBPE(engine, Settings())
