"""The tokenizer in the metadata of a GGUF file, read and written."""

from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.gguf.header import Header
from qwen_jax.tokenizer import bpe
from qwen_jax.tokenizer.bpe import ByteLevelBPE
from qwen_jax.tokenizer.control import CONTROL_TOKENS
from qwen_jax.tokenizer.files import AddedToken, Settings
from qwen_jax.tokenizer.vocabulary import Merges, Vocab, check_vocab

# Types of tokens: in the learned vocabulary; control tokens, which llama.cpp does not print; other added tokens, which
# it does; and rows of the embedding without a token.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# What splits texts before the merges: that of Qwen2, under the names that llama.cpp gives it.
_SPLITTERS = ("qwen2", "deepseek-r1-qwen")
_TOKENS, _TYPES, _MERGES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges"))
_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
_NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
# llama.cpp's converter takes every token of this form for a control token; these are text for programs.
_NOT_SPECIAL = frozenset(token.content for token in CONTROL_TOKENS if not token.special)


def has_tokenizer(header: Header) -> bool:
    """Whether a GGUF file has a tokenizer, of whatever kind."""
    return header.metadata.get(_MODEL, "none") not in ("none", "no_vocab")


def from_gguf(header: Header) -> ByteLevelBPE:
    """Builds the tokenizer of a GGUF file; its texts have the ids of the original tokenizer.

    Args:
      header: of the file.

    Raises:
      InputError: no tokenizer, one of another kind, or damaged metadata.
    """
    path, values = header.path, header.metadata
    if not has_tokenizer(header):
        raise InputError(f"{path} holds no tokenizer. Give another file, or the tokenizer of the original model.")
    if values.get(_MODEL) != "gpt2" or values.get(_PRE) not in _SPLITTERS:
        raise InputError(
            f"{path} has a tokenizer of kind {values.get(_MODEL)!r:.80} that splits texts as {values.get(_PRE)!r:.80}; "
            "expected 'gpt2' (byte-level BPE) and 'qwen2'. Give the tokenizer of the original model."
        )
    tokens: Any = values.get(_TOKENS)
    kinds: Any = values.get(_TYPES)
    merges: Any = values.get(_MERGES, [])  # The library writes no empty list.
    lists = isinstance(tokens, list) and isinstance(merges, list) and isinstance(kinds, np.ndarray)
    if not lists or len(tokens) != len(kinds):
        raise InputError(f"{path}: expected {_TOKENS} with a {_TYPES} for each, and {_MERGES}. The file is damaged.")

    # Rows of the embedding without a token are at the end. Old converters give them another type.
    kinds, size = kinds.tolist(), len(tokens)
    while size and (kinds[size - 1] == _UNUSED or tokens[size - 1] == f"[PAD{size - 1}]"):
        size -= 1
    tokens, kinds = tokens[:size], kinds[:size]
    unknown = set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED}
    if unknown:
        raise InputError(f"{path} has tokens of the types {sorted(unknown)}, which Qwen's tokenizers have not.")
    vocab: Vocab = {token: i for i, token in enumerate(tokens) if kinds[i] == _NORMAL}
    added = {
        i: AddedToken(token, special=kinds[i] == _CONTROL and token not in _NOT_SPECIAL)
        for i, token in enumerate(tokens)
        if kinds[i] != _NORMAL
    }
    check_vocab(vocab, path)
    pairs: Merges = []
    for line in merges:
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(f"{path}: {_MERGES} has {line!r:.80}; expected two tokens whose join is a token, too.")
        pairs.append((left, right))
    settings = Settings(
        named_tokens=_read_named(header, tokens),
        chat_template=_read_templates(header),
        added_tokens=added,
        other={"add_bos_token": values.get("tokenizer.ggml.add_bos_token", False)},
        source=path,
    )
    return bpe.from_vocab_and_merges(vocab, pairs, settings, path)


def _read_named(header: Header, tokens: list[str]) -> dict[str, str | None]:
    named: dict[str, str | None] = {"bos_token": None}
    for name, key in _NAMED.items():
        i = header.metadata.get(f"tokenizer.ggml.{key}")
        if i is None:
            continue
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            raise InputError(f"{header.path}: tokenizer.ggml.{key} is {i!r:.80}; expected an id below {len(tokens)}.")
        named[name] = tokens[i]
    return named


def _read_templates(header: Header) -> Any:
    """One template, several by name, or None, as tokenizer_config.json has them."""
    values = header.metadata
    names = values.get(_TEMPLATES, [])
    if not isinstance(names, list):
        raise InputError(f"{header.path}: {_TEMPLATES} must be a list of names. The file is damaged.")
    templates = {name: values.get(f"{_TEMPLATE}.{name}") for name in names}
    if not templates:
        return values.get(_TEMPLATE)
    return {"default": values[_TEMPLATE], **templates} if _TEMPLATE in values else templates


def to_gguf(tokenizer: ByteLevelBPE, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer, which `from_gguf` and llama.cpp read; without the ids that end a text.

    Args:
      tokenizer: that of the model.
      vocab_size: rows of the model's embedding; those without a token get one that is never used.

    Raises:
      InputError: the tokenizer splits texts in another way than Qwen2's, or adds ids that llama.cpp does not add.
    """
    if not tokenizer.splits_as_qwen2 or tokenizer.prefix or tokenizer.suffix:
        raise InputError(
            "The tokenizer splits texts or surrounds them in another way than Qwen2's; llama.cpp would compute other "
            "ids. Only byte-level tokenizers with Qwen2's rules can be written as GGUF."
        )
    vocab, merges, added, settings = tokenizer.tables()
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} ids, and the embedding {vocab_size} rows. Give the model its "
            "own tokenizer."
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for token, i in vocab.items():
        tokens[i], kinds[i] = token, _NORMAL
    for i, one in added.items():
        is_control = one.special or (one.content.startswith("<|") and one.content.endswith("|>"))
        tokens[i], kinds[i] = one.content, _CONTROL if is_control else _USER_DEFINED
    metadata: dict[str, Any] = {
        _MODEL: "gpt2",
        _PRE: _SPLITTERS[0],
        _TOKENS: tokens,
        _TYPES: kinds,
        **({_MERGES: [f"{left} {right}" for left, right in merges]} if merges else {}),
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    templates = settings.chat_templates()
    if "default" in templates:
        metadata[_TEMPLATE] = templates["default"]
    named = {name: source for name, source in templates.items() if name != "default"}
    if named:
        metadata |= {_TEMPLATES: list(named), **{f"{_TEMPLATE}.{name}": source for name, source in named.items()}}
    return metadata
