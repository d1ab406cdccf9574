"""The host's checks of prompts, ids and lengths, before anything runs."""

from collections.abc import Sequence
from typing import SupportsIndex, cast

import jax
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.sampling import as_int
from qwen_jax.tokenizer import Tokenizer

# Rows of the published embeddings; ids from 151,665 on were never trained.
_PUBLISHED_VOCABS, _PUBLISHED_TOKENS = (151936, 152064), 151665

Prompt = str | bytes | Sequence[SupportsIndex] | np.ndarray | jax.Array
"""Text, or token ids."""
Ids = Sequence[SupportsIndex] | np.ndarray | SupportsIndex
"""Token ids, or a single one."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Returns a list of prompts; a single text or a single list of ids becomes a list of one."""
    if isinstance(prompts, (str, bytes)) or getattr(prompts, "ndim", 2) == 1:
        return [cast(Prompt, prompts)]
    if not hasattr(prompts, "__iter__"):
        raise InputError(f"Expected prompts as texts or lists of token ids, got {prompts!r}.")
    items = list(cast(Sequence[Prompt], prompts))
    if items and all(hasattr(item, "__index__") and not getattr(item, "ndim", 0) for item in items):
        return [cast(Sequence[SupportsIndex], items)]
    return items


def default_eos(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids that end a text: those of the config, and the tokenizer's end-of-text token."""
    own = () if tokenizer is None else (tokenizer.eos_id,)
    return tuple(dict.fromkeys([*config.eos_token_ids, *own]))


def check_ids(ids: Ids, name: str, limit: int) -> tuple[int, ...]:
    """Returns ids as integers; a single id becomes a tuple of one.

    Args:
      ids: of Python, NumPy or JAX.
      name: of the argument, for errors.
      limit: ids must be below it.

    Raises:
      InputError: something else than integers in [0, limit).
    """
    single = not hasattr(ids, "__iter__") or getattr(ids, "ndim", 1) == 0
    values = tuple(as_int(i, name) for i in ([ids] if single else cast(Sequence[SupportsIndex], ids)))
    wrong = [i for i in values if not 0 <= i < limit]
    if wrong:
        raise InputError(f"{name} has {wrong[0]}; ids must be in [0, {limit}).")
    return values


def check_generates(config: ModelConfig) -> None:
    """Raises InputError for a reward model, which has no output head to generate with."""
    if config.score is not None:
        raise InputError(
            "This is a reward model (its config.json names a score head): it gives scores and generates no text. "
            "Score conversations with `qwen-jax score`, or give a language model."
        )


def vocab_limit(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """The number of ids that are tokens. Ids from there to the end of the embedding are padding.

    Raises:
      InputError: a tokenizer with more tokens than the model.
    """
    if tokenizer is None:
        return _PUBLISHED_TOKENS if config.vocab_size in _PUBLISHED_VOCABS else config.vocab_size
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model an embedding of {config.vocab_size}: "
            "they do not belong together."
        )
    return tokenizer.vocab_size


def encode(prompt: Prompt, i: int, tokenizer: Tokenizer | None, limit: int) -> list[int]:
    """Returns the token ids of prompt number i.

    Args:
      prompt: text, to which the tokenizer adds its own BOS token if it has one; or ids.
      i: its number, for errors.
      tokenizer: for text.
      limit: ids must be below it.

    Raises:
      InputError: empty, text without a tokenizer, or ids that are not integers below the limit.
    """
    if isinstance(prompt, (str, bytes)):
        if tokenizer is None:
            raise InputError(f"Prompt {i} is text, but there is no tokenizer. Give token ids.")
        ids = tokenizer.encode(prompt)
    elif hasattr(prompt, "__iter__"):
        ids = [as_int(token, f"A token id of prompt {i}") for token in prompt]
    else:
        raise InputError(f"Prompt {i} must be text or a list of token ids, got {prompt!r}.")
    if not ids:
        raise InputError(f"Prompt {i} is empty. Give at least one token.")
    wrong = [token for token in ids if not 0 <= token < limit]
    if wrong:
        raise InputError(f"Prompt {i} has token id {wrong[0]}; ids must be in [0, {limit}).")
    return ids


def check_lengths(config: ModelConfig, longest_prompt: int, max_new_tokens: int) -> None:
    """Raises InputError if prompt and new tokens do not fit the model's context."""
    max_new_tokens = as_int(max_new_tokens, "max_new_tokens")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if longest_prompt + max_new_tokens > config.context_length:
        raise InputError(
            f"A prompt of {longest_prompt} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{config.context_length} tokens. Shorten the prompt, lower max_new_tokens"
            + ("." if config.yarn or config.dual_chunk else ", or extend the context (dual chunks or YaRN).")
        )


def check_stop(stop: str | Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Returns the stop strings; a single one becomes a tuple of one.

    Raises:
      InputError: no tokenizer, an empty stop string, or something else than strings.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if texts and tokenizer is None:
        raise InputError("Stop strings need a tokenizer.")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"A stop string must be a string, got {text!r}. Ids belong to eos_token_ids.")
        if not text:
            raise InputError("A stop string must not be empty.")
    return texts
