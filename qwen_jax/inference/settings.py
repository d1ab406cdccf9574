"""Generation defaults of a checkpoint, from `generation_config.json`."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.inference.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 512
"""How many tokens to generate where neither the caller nor the checkpoint gives a number."""


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's authors recommend.

    Attributes:
      sampling: how tokens are sampled.
      eos_token_ids: ids that end a text: those of config.json, then those of generation_config.json.
      max_new_tokens: how many tokens to generate, or None.
      max_length: how many tokens prompt and completion have together, or None. `max_new_tokens` wins over it.
    """

    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    max_length: int | None = None

    def new_tokens(self, prompt_length: int, context_length: int) -> int:
        """How many tokens to generate where the caller gives no number; at most what the context leaves.

        Args:
          prompt_length: tokens of the longest prompt.
          context_length: of the model.

        Raises:
          InputError: the prompt alone has `max_length` tokens or more.
        """
        wanted = self.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.max_new_tokens is None and self.max_length is not None:
            wanted = self.max_length - prompt_length
            if wanted < 1:
                raise InputError(
                    f"A prompt has {prompt_length} tokens, and max_length={self.max_length} of generation_config.json "
                    "is for prompt and new tokens together. Give max_new_tokens (--max-new-tokens)."
                )
        return max(1, min(wanted, context_length - prompt_length))


# Options that change the text and are not supported, with the values that mean "off".
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "forced_eos_token_id": (None,),
    "frequency_penalty": (None, 0.0),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "presence_penalty": (None, 0.0),
    "sequence_bias": (None, [], {}),
    "stop_strings": (None, [], ""),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}
# Those that transformers reads only with `do_sample`.
_UNSUPPORTED_SAMPLING: dict[str, tuple[object, ...]] = {
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}
_READ = frozenset(
    "do_sample eos_token_id max_length max_new_tokens min_p repetition_penalty temperature top_k top_p".split()
)
# Options that do not change the text: of the cache and compilation, speculative decoding, beam search that is off,
# outputs other than the text, other tokens, and records of where the file comes from.
_WITHOUT_EFFECT = frozenset(
    """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bos_token_id
    cache_config cache_implementation chat_format compile_config continuous_batching_config decoder_start_token_id
    disable_compile diversity_penalty early_stopping is_assistant length_penalty low_memory max_cache_len
    max_matching_ngram_size max_window_size num_assistant_tokens num_assistant_tokens_schedule output_attentions
    output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits return_dict_in_generate return_legacy_cache speculation_type
    target_lookbehind transformers_version use_cache use_mtp _commit_hash _from_model_config
    """.split()
)


def load_generation_defaults(folder: Path, config: ModelConfig) -> GenerationDefaults:
    """Reads `generation_config.json`. Without the file: greedy, and the end ids of config.json.

    Args:
      folder: the checkpoint folder.
      config: of the checkpoint.

    Raises:
      InputError: broken JSON, values out of range, or an option that is not supported.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults(SamplingParams(), config.eos_token_ids)
    values = read_json(path)
    do_sample = values.get("do_sample") or False
    if not isinstance(do_sample, bool):
        raise InputError(f"{path}: do_sample must be true or false, got {do_sample!r}.")
    for key, off in {**_UNSUPPORTED, **(_UNSUPPORTED_SAMPLING if do_sample else {})}.items():
        if values.get(key) not in off:
            raise InputError(f"{path} has {key}={values[key]!r}, which is not supported. Remove it to go on without.")
    known = _READ | _WITHOUT_EFFECT | _UNSUPPORTED.keys() | _UNSUPPORTED_SAMPLING.keys()
    if unknown := sorted(values.keys() - known):
        _warn_once(f"{path}: unknown options are ignored: {', '.join(unknown)}.")
    try:
        sampling = _sampling(values, do_sample)
        limits = {key: _limit(values, key) for key in ("max_new_tokens", "max_length")}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return GenerationDefaults(sampling, add_end_ids(config, folder).eos_token_ids, **limits)


def end_ids_of(config: Mapping[str, Any], path: Path) -> list[int]:
    """The ids that end a text by a generation_config.json or a config.json, which is at `path`.

    Raises:
      InputError: `eos_token_id` is not an id or a list of ids.
    """
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{path}: eos_token_id must be an id or a list of ids, got {value!r}.")
    return ids


def add_end_ids(config: ModelConfig, folder: Path) -> ModelConfig:
    """Returns the config with the end ids of a folder's generation_config.json after its own.

    An id outside the vocabulary cannot be generated; it is left out with a warning.

    Args:
      config: of the checkpoint.
      folder: the checkpoint folder.

    Raises:
      InputError: broken JSON, or `eos_token_id` is not an id or a list of ids.
    """
    path = folder / "generation_config.json"
    ids = end_ids_of(read_json(path), path) if path.is_file() else []
    if outside := [i for i in ids if not 0 <= i < config.vocab_size]:
        _warn_once(
            f"{path}: eos_token_id {outside} is outside the vocabulary of {config.vocab_size} and never ends a text."
        )
    within = [i for i in ids if i not in outside]
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *within])))


@functools.cache
def _warn_once(text: str) -> None:
    logging.getLogger("qwen_jax").warning(text)


def _number(values: Mapping[str, object], key: str, default: float) -> float:
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{key} must be a number, got {value!r}.")
    return value


def _whole(values: Mapping[str, object], key: str, default: int) -> int:
    value = _number(values, key, default)
    if value != int(value):
        raise InputError(f"{key} must be a whole number, got {value!r}.")
    return int(value)


def _limit(values: Mapping[str, object], key: str) -> int | None:
    if values.get(key) is None:
        return None
    limit = _whole(values, key, 1)
    if limit < 1:
        raise InputError(f"{key} must be at least 1, got {limit}.")
    return limit


def _sampling(values: Mapping[str, object], do_sample: bool) -> SamplingParams:
    sampling = SamplingParams(repetition_penalty=_number(values, "repetition_penalty", 1.0))
    if do_sample:
        # Where the file says nothing, the defaults of transformers: temperature 1, top-k 50.
        sampling = dataclasses.replace(
            sampling,
            temperature=_number(values, "temperature", 1.0),
            top_k=_whole(values, "top_k", 50),
            top_p=_number(values, "top_p", 1.0),
            min_p=_number(values, "min_p", 0.0),
        )
    return sampling
