"""The host's checks of prompts, ids, lengths and requests, before anything runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import SupportsIndex, cast

import jax
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import as_int
from qwen_jax.inference.structured import Grammar
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


def check_sizes(sizes: Mapping[str, int | None], memory_fraction: float) -> None:
    """Checks the sizes of an engine.

    Args:
      sizes: numbers of at least 1 by the names of arguments, or None for a default; with `page_size`.
      memory_fraction: of the device's memory.

    Raises:
      InputError: one is out of range.
    """
    for name, value in sizes.items():
        if value is not None and as_int(value, name) < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    if (sizes["page_size"] or 0) % 16:
        raise InputError(f"page_size must be a multiple of 16, got {sizes['page_size']}.")
    if not 0 < memory_fraction <= 1:
        raise InputError(f"memory_fraction must be in (0, 1], got {memory_fraction}.")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine's requests must fit.

    Attributes:
      config, tokenizer: of the model.
      vocab_limit: ids of prompts must be below it.
      max_length: tokens that a prompt and its text may have together.
      num_pages, page_size: of the cache.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    vocab_limit: int
    max_length: int
    num_pages: int
    page_size: int


def check_request(request: Request, limits: Limits) -> None:
    """Raises InputError for a request that can never run."""
    config, tokenizer = limits.config, limits.tokenizer
    for ids in (request.prompt, tuple(request.logit_bias)):
        if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_limit):
            wrong = next(i for i in ids if not 0 <= i < limits.vocab_limit)
            raise InputError(f"Token id {wrong} is out of range; ids must be in [0, {limits.vocab_limit}).")
    length, new = len(request.prompt), request.ending.max_new_tokens
    check_lengths(config, length, new)
    if length + new > limits.max_length:
        raise InputError(
            f"A prompt of {length} tokens and {new} new ones exceed the {limits.max_length} tokens that a text may "
            "have here. Shorten the prompt or ask for fewer tokens."
        )
    pages = -(-(length + new) // limits.page_size)
    if pages > limits.num_pages:
        raise InputError(
            f"A prompt of {length} tokens and {new} new ones need {pages} pages of the cache, which has "
            f"{limits.num_pages}. Shorten the prompt or ask for fewer tokens, or give the cache more memory."
        )
    if tokenizer is None and (request.ending.stop or request.grammar is not None):
        raise InputError("Stop strings and grammars need a tokenizer.")
    if isinstance(request.ending.stop, str):
        raise InputError(f"Ending.stop must be a tuple of strings, got {request.ending.stop!r}.")
    check_stop(request.ending.stop, tokenizer)
    check_ids(tuple(request.ending.eos_token_ids), "eos_token_ids", config.vocab_size)
    if request.grammar is not None and not isinstance(request.grammar, Grammar):
        raise InputError(f"A grammar comes from engine.grammars; got {type(request.grammar).__name__}.")
