"""Generation defaults of a checkpoint, from `generation_config.json`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's authors recommend.

    Attributes:
      sampling: how tokens are chosen.
      eos_token_ids: ids that end a text.
      max_new_tokens: how many tokens to generate when the caller does not say; None if the checkpoint does not either.
    """

    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int | None = None


# Keys that change what is generated and are not supported. A value in the set means "off".
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0),
    "stop_strings": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "top_h": (None,),
}


def load_generation_defaults(folder: Path, config: ModelConfig) -> GenerationDefaults:
    """Reads `generation_config.json`; without one, greedy decoding to the config's end-of-text ids.

    Args:
      folder: the checkpoint folder.
      config: gives the end-of-text ids where the file does not.

    Raises:
      InputError: broken JSON, values out of range, or a recommended method that is not supported.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults(SamplingParams(), config.eos_token_ids)
    values = read_json(path)
    for key, off in _OFF.items():
        if values.get(key) not in off:
            raise InputError(f"{path} has {key}={values[key]!r}, which is not supported. Remove it to go on without.")
    eos = values.get("eos_token_id")
    eos_ids = config.eos_token_ids if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    # An empty list is "none": a text ends by its length only.
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < config.vocab_size for i in eos_ids):
        raise InputError(f"{path}: eos_token_id must hold ids below {config.vocab_size}, got {eos!r}.")

    def number(key: str, default: Any, kind: type) -> Any:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"{path}: {key} must be a number, got {value!r}.")
        if kind is int and value != int(value):
            raise InputError(f"{path}: {key} must be a whole number, got {value!r}.")
        return kind(value)

    try:
        sampling = _sampling(values, number)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    max_new = None if values.get("max_new_tokens") is None else number("max_new_tokens", None, int)
    if max_new is not None and max_new < 1:
        raise InputError(f"{path}: max_new_tokens must be at least 1, got {max_new}.")
    return GenerationDefaults(sampling, eos_ids, max_new)


def _sampling(values: Mapping[str, Any], number: Callable[[str, Any, type], Any]) -> SamplingParams:
    sampling = SamplingParams(repetition_penalty=number("repetition_penalty", 1.0, float))
    if values.get("do_sample", False):
        # transformers' own defaults where the file is silent: temperature 1, top-k 50.
        sampling = dataclasses.replace(
            sampling,
            temperature=number("temperature", 1.0, float),
            top_k=number("top_k", 50, int),
            top_p=number("top_p", 1.0, float),
            min_p=number("min_p", 0.0, float),
        )
    return sampling
