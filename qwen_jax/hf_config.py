"""Hugging Face `config.json`, in the dialects of transformers 4.x and 5.x: to the fields of `ModelConfig` and back.

A key is either read here, known to leave the forward pass unchanged, or refused: an unknown key may change what the
model computes, and guessing would give wrong logits. Everywhere null means the default, as in transformers.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import InputError

_SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Experts: key of config.json -> field of `MoE`.
_MOE_KEYS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "intermediate_size",
    "shared_expert_intermediate_size": "shared_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "decoder_sparse_step": "decoder_sparse_step",
    "mlp_only_layers": "mlp_only_layers",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
# model_type -> architecture that we write, and that of the same weights without an output head.
_ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
}

# The same with the head of a reward model, by `ModelConfig.score`: transformers' own class, and that of Qwen's reward
# models (https://huggingface.co/Qwen/Qwen2.5-Math-RM-72B, modeling_qwen2_rm.py).
_REWARD_ARCHITECTURES = {
    "qwen2": {"linear": "Qwen2ForSequenceClassification", "mlp": "Qwen2ForRewardModel"},
    "qwen2_moe": {"linear": "Qwen2MoeForSequenceClassification", "mlp": "Qwen2MoeForRewardModel"},
}

# Keys that change the computation, with the values that are supported; the first one is the default.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_mrope": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "qkv_bias": (True,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "per_layer_config": (None, {}),
}

# Keys of config.json that are read here.
_READ_KEYS = {*_SHAPE_KEYS, *_REQUIRED_VALUES} | set(
    """
    architectures model_type num_key_value_heads head_dim tie_word_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters max_position_embeddings dual_chunk_attention_config bos_token_id eos_token_id
    pad_token_id initializer_range torch_dtype dtype use_sliding_window sliding_window max_window_layers layer_types
    """.split()
)
# Keys that neither Qwen2's forward pass nor `generate` of transformers reads: kernels and memory, what else is
# returned, encoders and classifiers, the tokenizer's affairs, settings of pipelines, the origin of the file.
# `convert.quantized` reads how weights are quantised, together with the weights.
_INERT_KEYS = set(
    """
    use_cache transformers_version _name_or_path name_or_path _commit_hash auto_map torchscript use_bfloat16
    tf_legacy_loss gradient_checkpointing chunk_size_feed_forward pretraining_tp attention_bias mlp_bias
    _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation experts_implementation
    return_dict output_attentions output_hidden_states output_router_logits tie_last_hidden_states
    is_decoder cross_attention_hidden_size tie_encoder_decoder decoder_start_token_id
    id2label label2id num_labels problem_type finetuning_task loss_type
    tokenizer_class sep_token_id prefix task_specific_params
    model_max_length tokenizer_model_max_length max_sequence_length seq_length
    unsloth_version unsloth_fixed
    quantization_config compression_config
    """.split()
)
# Dropout is off at inference, whatever it is called.
_DROPOUT = re.compile(r"\w*(dropout|pdrop)\w*")
# Settings of `generate` that transformers 4 kept in config.json, with their defaults. transformers reads them there
# only if there is no generation_config.json.
GENERATION_DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def read(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the content of a `config.json`.

    Args:
      hf: the parsed JSON object.

    Returns:
      The fields of a `ModelConfig`; `yarn`, `dual_chunk` and `moe` as the fields of their classes, or None.

    Raises:
      InputError: another architecture, a setting that changes the computation and is not supported, or an unknown key.
    """
    # Two of transformers' defaults are not those of null: a window that is switched on has this size from this layer.
    window = hf.get("sliding_window", 4096 if hf.get("use_sliding_window") else None)
    hf = {key: value for key, value in hf.items() if value is not None}
    max_window_layers = hf.get("max_window_layers", 28 if hf.get("use_sliding_window") else None)
    _check_kinds(hf)

    # Which model it is.
    kind = hf.get("model_type")
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"Expected a config.json with model_type 'qwen2' (or 'qwen2_moe'), got {kind!r}. Only the Qwen2 and "
            "Qwen2.5 architecture can be loaded, dense or with experts."
        )
    score = _read_score(hf, kind)
    moe = _read_moe(hf) if kind == "qwen2_moe" else None
    if moe is not None:
        hf = {key: value for key, value in hf.items() if key not in _MOE_KEYS}

    # Nothing that would change the computation may pass unread.
    for key, supported in _REQUIRED_VALUES.items():
        if hf.get(key, supported[0]) not in supported:
            raise InputError(f"config.json has {key}={hf[key]!r}; only {supported[0]!r} is supported, as in Qwen2.5.")
    for key, default in GENERATION_DEFAULTS.items():
        if hf.get(key, default) != default:
            raise InputError(
                f"config.json has {key}={hf[key]!r}, a setting of text generation, and there is no "
                "generation_config.json. Move it there, where every tool reads it, or remove it."
            )
    unknown = [key for key in hf if key not in _READ_KEYS | _INERT_KEYS | GENERATION_DEFAULTS.keys()]
    unknown = sorted(key for key in unknown if not _DROPOUT.fullmatch(key))
    if unknown:
        raise InputError(
            f"config.json has keys that are not known here: {', '.join(unknown)}. They may change what the model "
            "computes. Remove them from config.json if you are sure that they do not."
        )

    # Shapes and layers.
    missing = [key for key in _SHAPE_KEYS if key not in hf]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}.")
    num_layers, num_heads = int(hf["num_hidden_layers"]), int(hf["num_attention_heads"])
    if "head_dim" not in hf and int(hf["hidden_size"]) % num_heads:
        raise InputError(
            f"config.json has no head_dim, and hidden_size ({hf['hidden_size']}) is not a multiple of "
            f"num_attention_heads ({num_heads})."
        )
    use_sliding_window = hf.get("use_sliding_window", False)
    layer_types = hf.get("layer_types")
    if layer_types is not None:
        if set(map(str, layer_types)) != {"full_attention"}:
            found = sorted(set(map(str, layer_types)))
            raise InputError(f"config.json has layer_types {found}; only full_attention is supported.")
        if len(layer_types) != num_layers:
            raise InputError(f"config.json has {len(layer_types)} layer_types for {num_layers} layers.")
        # A list of layer types overrides the window settings: none of the layers has a window.
        use_sliding_window = bool(use_sliding_window and max_window_layers and max_window_layers >= num_layers)

    # Positions and ids.
    rope_theta, yarn = _read_rope(hf)
    eos = hf.get("eos_token_id")
    dual_chunk = hf.get("dual_chunk_attention_config")
    if dual_chunk is not None:
        # Settings of sparse attention, which other tools keep here, change no result of dense attention.
        dual_chunk = {key: value for key, value in dual_chunk.items() if not key.startswith("sparse_attention_")}
        if set(dual_chunk) != _DUAL_CHUNK_KEYS:
            raise InputError(
                f"dual_chunk_attention_config of config.json needs {', '.join(sorted(_DUAL_CHUNK_KEYS))}; it has "
                f"{sorted(dual_chunk)}."
            )
        dual_chunk = {key: _number(dual_chunk, key, "dual_chunk_attention_config", integer=True) for key in dual_chunk}
    return dict(
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        intermediate_size=int(hf["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(hf.get("num_key_value_heads", num_heads)),
        head_dim=int(hf.get("head_dim", int(hf["hidden_size"]) // num_heads)),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        max_position_embeddings=int(hf.get("max_position_embeddings", 32768)),
        yarn=yarn,
        dual_chunk=dual_chunk,
        moe=moe,
        score=score,
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        dtype=str(hf.get("dtype", hf.get("torch_dtype", "float32"))),
        use_sliding_window=use_sliding_window,
        sliding_window=window,
        max_window_layers=max_window_layers,
    )


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the content of a `config.json` that transformers 4 and 5 both read.

    Args:
      fields: those of a `ModelConfig`, as `dataclasses.asdict` gives them.

    Returns:
      A JSON object that `read` turns into the same fields.
    """
    eos: Any = list(fields["eos_token_ids"])
    kind = "qwen2" if fields["moe"] is None else "qwen2_moe"
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind][0]],
        "attention_dropout": 0.0,
        "bos_token_id": fields["bos_token_id"],
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "hidden_act": "silu",
        "hidden_size": fields["hidden_size"],
        "initializer_range": fields["initializer_range"],
        "intermediate_size": fields["intermediate_size"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "model_type": kind,
        "num_attention_heads": fields["num_heads"],
        "num_hidden_layers": fields["num_layers"],
        "num_key_value_heads": fields["num_kv_heads"],
        "rms_norm_eps": fields["rms_norm_eps"],
        "rope_theta": fields["rope_theta"],
        "sliding_window": fields["sliding_window"],
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "torch_dtype": fields["dtype"],
        "use_cache": True,
        "use_sliding_window": fields["use_sliding_window"],
        "vocab_size": fields["vocab_size"],
    }
    if fields["moe"] is not None:
        hf |= {key: fields["moe"][field] for key, field in _MOE_KEYS.items()}
        hf["mlp_only_layers"] = list(fields["moe"]["mlp_only_layers"])
    if fields["score"] is not None:
        # transformers counts the labels here, and takes two for none.
        hf |= {
            "architectures": [_REWARD_ARCHITECTURES[kind][fields["score"]]],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }
    if fields["max_window_layers"] is not None:
        hf["max_window_layers"] = fields["max_window_layers"]
    if fields["head_dim"] * fields["num_heads"] != fields["hidden_size"]:
        hf["head_dim"] = fields["head_dim"]
    if fields["yarn"]:
        yarn = {key: value for key, value in fields["yarn"].items() if value is not None}
        # `type` is what tools older than transformers 4.43 read.
        hf["rope_scaling"] = {"rope_type": "yarn", "type": "yarn", **yarn}
    if fields["dual_chunk"]:
        hf["dual_chunk_attention_config"] = fields["dual_chunk"]
    return hf


def _read_score(hf: Mapping[str, Any], kind: str) -> str | None:
    """The head of a reward model, by its architecture; None for a language model."""
    rewards = {name: score for score, name in _REWARD_ARCHITECTURES[kind].items()}
    architectures = hf.get("architectures") or [_ARCHITECTURES[kind][0]]
    names = list(map(str, architectures)) if isinstance(architectures, list) else []
    found = {rewards.get(name) for name in names}
    if len(found) != 1 or not set(names) <= {*_ARCHITECTURES[kind], *rewards}:
        raise InputError(
            f"Expected architecture {_ARCHITECTURES[kind][0]}, or {' or '.join(rewards)} of a reward model, got "
            f"{architectures}."
        )
    labels = [hf["num_labels"]] if "num_labels" in hf else []
    labels += [len(hf["id2label"])] if isinstance(hf.get("id2label"), Mapping) else []
    score = found.pop()
    if score is not None and set(labels) - {1}:
        raise InputError(
            f"config.json has {names[0]} with {max(labels)} labels (num_labels, id2label). Expected one label: a "
            "reward model gives one score. Classifiers and process reward models cannot be loaded."
        )
    return score


def _read_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The experts of a config.json of model_type qwen2_moe, as the fields of `MoE`."""
    missing = [key for key in list(_MOE_KEYS)[:4] if hf.get(key) is None]
    if missing:
        raise InputError(f"config.json has model_type 'qwen2_moe' and lacks {', '.join(missing)}.")
    given = {field: hf[key] for key, field in _MOE_KEYS.items() if hf.get(key) is not None}
    layers = given.get("mlp_only_layers", [])
    if not isinstance(layers, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise InputError(f"config.json has mlp_only_layers={layers!r}; expected a list of layer numbers.")
    if not isinstance(given.get("norm_topk_prob", False), bool):
        raise InputError(f"config.json has norm_topk_prob={given['norm_topk_prob']!r}; expected true or false.")
    coefficient = given.get("router_aux_loss_coef", 0.0)
    if not isinstance(coefficient, (int, float)) or isinstance(coefficient, bool) or not math.isfinite(coefficient):
        raise InputError(f"config.json has router_aux_loss_coef={coefficient!r}; expected a number.")
    return {**given, "mlp_only_layers": tuple(layers)}


def _number(values: Mapping[str, Any], key: str, where: str = "", integer: bool = False) -> float:
    """A positive, finite number of an object."""
    value = values[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not number or (integer and value != int(value)):
        kind = "integer" if integer else "number"
        raise InputError(f"config.json has {key}={value!r}{where and f' in {where}'}; expected a positive {kind}.")
    return int(value) if integer else float(value)


def _check_kinds(hf: Mapping[str, Any]) -> None:
    """Refuses values that do not have the type that their key needs. Keys with null are gone already."""
    for key in (*_SHAPE_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if key in hf:
            _number(hf, key, integer=True)
    for key in ("rms_norm_eps", "rope_theta", "initializer_range"):
        if key in hf:
            _number(hf, key)
    for key in ("tie_word_embeddings", "use_sliding_window"):
        if not isinstance(hf.get(key, False), bool):
            raise InputError(f"config.json has {key}={hf[key]!r}; expected true or false.")
    for key in ("bos_token_id", "sliding_window", "max_window_layers"):
        value = hf.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"config.json has {key}={value!r}; expected an integer that is not negative, or null.")
    for key in ("rope_scaling", "rope_parameters", "dual_chunk_attention_config"):
        if not isinstance(hf.get(key, {}), Mapping):
            raise InputError(f"config.json has {key}={hf[key]!r}; expected an object.")
    eos = hf.get("eos_token_id", [])
    ids = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InputError(f"config.json has eos_token_id={eos!r}; expected an id or a list of ids.")
    if "vocab_size" in hf and any(i >= hf["vocab_size"] for i in ids):
        raise InputError(
            f"config.json has eos_token_id={eos!r} with a vocabulary of {hf['vocab_size']}: the model can never "
            "produce such an id, so no text would end. Give an id of the tokenizer, or null if texts end by their "
            "length only."
        )
    if not isinstance(hf.get("layer_types", []), list):
        raise InputError(f"config.json has layer_types={hf['layer_types']!r}; expected a list.")


_YARN_KEYS = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
_DUAL_CHUNK_KEYS = {"chunk_size", "local_size", "original_max_position_embeddings"}
# RoPE settings at the only value that is supported.
_ROPE_REQUIRED_VALUES = {
    "truncate": True,
    "partial_rotary_factor": 1.0,
    "extrapolation_factor": 1.0,
    "attn_factor": 1.0,
}


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """RoPE base and YaRN settings from either dialect: `rope_theta` with `rope_scaling`, or `rope_parameters`."""
    parameters = hf.get("rope_parameters", {})
    if isinstance(parameters.get("full_attention"), Mapping):  # One set for each type of layer; all have this type.
        parameters = parameters["full_attention"]
    scaling = {**hf.get("rope_scaling", {}), **parameters}
    scaling = {key: value for key, value in scaling.items() if value is not None}

    # The base.
    theta = _number(scaling, "rope_theta", "the RoPE parameters") if "rope_theta" in scaling else None
    scaling.pop("rope_theta", None)
    if theta is not None and hf.get("rope_theta", theta) != theta:
        raise InputError(
            f"config.json gives two RoPE bases: rope_theta={hf['rope_theta']} and {theta} inside the RoPE parameters. "
            "Remove the wrong one."
        )
    theta = theta if theta is not None else hf.get("rope_theta")
    if theta is None:
        raise InputError(
            "config.json has no rope_theta, neither at the top level nor in rope_parameters. Add it: 1000000.0 for "
            "most Qwen2.5 models (transformers would silently take 10000)."
        )

    # The type. Linear interpolation by 1 is no interpolation.
    names = {str(scaling.pop(key)) for key in ("rope_type", "type") if key in scaling}
    if len(names) > 1:
        raise InputError(f"config.json names two RoPE types, {sorted(names)}. Keep one.")
    rope_type = names.pop() if names else "default"
    for key, supported in _ROPE_REQUIRED_VALUES.items():
        value = scaling.pop(key, supported)
        if value != supported:
            raise InputError(
                f"The RoPE parameters of config.json have {key}={value!r}; only {supported!r} is supported, as in "
                "Qwen2.5."
            )
    if rope_type == "default" or (rope_type == "linear" and scaling.get("factor") == 1):
        return float(theta), None
    if rope_type != "yarn":
        raise InputError(
            f"RoPE type {rope_type!r} is not supported; Qwen2.5 uses 'default' or 'yarn'. Set it to "
            "'default' in config.json to run the model at the length it was trained for."
        )

    # YaRN. `finetuned` is a note of its authors; transformers reads the two mscale only together.
    scaling.pop("finetuned", None)
    mscales = [_number(scaling, key, "YaRN") for key in ("mscale", "mscale_all_dim") if scaling.get(key)]
    scaling = {key: value for key, value in scaling.items() if key not in ("mscale", "mscale_all_dim")}
    unknown = sorted(set(scaling) - _YARN_KEYS)
    if unknown:
        raise InputError(
            f"YaRN settings of config.json have keys that are not known here: {', '.join(unknown)}. Known are "
            f"{', '.join(sorted(_YARN_KEYS))}."
        )
    yarn = {key: _number(scaling, key, "YaRN", integer=key.startswith("original")) for key in scaling}
    # Older files leave the original length to max_position_embeddings, and some leave the factor to the two lengths.
    longest = int(hf.get("max_position_embeddings", 32768))
    if "factor" not in yarn and "original_max_position_embeddings" not in yarn:
        raise InputError("YaRN needs `factor` or `original_max_position_embeddings`; config.json has neither.")
    yarn.setdefault("original_max_position_embeddings", longest)
    yarn.setdefault("factor", longest / yarn["original_max_position_embeddings"])
    if len(mscales) == 2:
        log = 0.1 * math.log(max(yarn["factor"], 1.0))
        yarn.setdefault("attention_factor", (log * mscales[0] + 1.0) / (log * mscales[1] + 1.0))
    return float(theta), yarn
