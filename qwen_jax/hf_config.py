"""Hugging Face `config.json`, in the dialects of transformers 4.x and 5.x: to fields of `ModelConfig` and back."""

import math
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import InputError

_SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# The mixture of experts: key there -> field of `MoE`.
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
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}

# Settings that change the computation and that Qwen2.5 has at one value only.
_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_mrope": False,
    "quantization_config": None,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "qkv_bias": True,
}

# Everything else that may stand in a config.json without changing the forward pass.
_KNOWN_KEYS = {*_SHAPE_KEYS, *_REQUIRED_VALUES} | set(
    """
    architectures model_type num_key_value_heads head_dim tie_word_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters max_position_embeddings dual_chunk_attention_config bos_token_id eos_token_id
    pad_token_id initializer_range torch_dtype dtype use_sliding_window sliding_window max_window_layers
    layer_types use_cache transformers_version _name_or_path _commit_hash _attn_implementation_autoset
    attn_implementation seq_length return_dict output_attentions output_hidden_states chunk_size_feed_forward
    id2label label2id problem_type unsloth_version unsloth_fixed output_router_logits
    """.split()
)


def read(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelConfig`; `yarn`, `dual_chunk` and `moe` as the fields of their classes, or None.

    Args:
      hf: the parsed JSON object.

    Raises:
      InputError: another architecture, a setting that changes the computation and is not supported, or an unknown key.
    """
    hf = dict(hf)
    _check_kinds(hf)
    kind = hf.get("model_type")
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"Expected a config.json with model_type 'qwen2' (or 'qwen2_moe'), got {kind!r}. Only the Qwen2 and "
            "Qwen2.5 architecture can be loaded, dense or with experts."
        )
    architectures = hf.get("architectures") or [_ARCHITECTURES[kind]]
    if architectures != [_ARCHITECTURES[kind]]:
        raise InputError(f"Expected architecture {_ARCHITECTURES[kind]}, got {architectures}.")
    moe = _read_moe(hf) if kind == "qwen2_moe" else None
    hf = {key: value for key, value in hf.items() if kind == "qwen2" or key not in _MOE_KEYS}
    unknown = sorted(set(hf) - _KNOWN_KEYS)
    if unknown:
        raise InputError(
            f"config.json has keys that are not known here: {', '.join(unknown)}. They may change what the model "
            "computes. Remove them from config.json if you are sure that they do not."
        )
    for key, expected in _REQUIRED_VALUES.items():
        if hf.get(key, expected) != expected:
            raise InputError(f"config.json has {key}={hf[key]!r}; only {expected!r} is supported, as in Qwen2.5.")
    missing = [key for key in _SHAPE_KEYS if hf.get(key) is None]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}.")
    num_layers, num_heads = int(hf["num_hidden_layers"]), int(hf["num_attention_heads"])
    if not hf.get("head_dim") and int(hf["hidden_size"]) % num_heads:
        raise InputError(
            f"config.json has no head_dim, and hidden_size ({hf['hidden_size']}) is not a multiple of "
            f"num_attention_heads ({num_heads})."
        )
    layer_types = hf.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        raise InputError(f"config.json has layer_types {sorted(set(layer_types))}; only full_attention is supported.")
    if layer_types is not None and len(layer_types) != num_layers:
        raise InputError(f"config.json has {len(layer_types)} layer_types for {num_layers} layers.")
    rope_theta, yarn = _read_rope(hf)
    eos = hf.get("eos_token_id")
    dual_chunk = hf.get("dual_chunk_attention_config")
    if dual_chunk is not None:
        if set(dual_chunk) != _DUAL_CHUNK_KEYS:
            raise InputError(
                f"dual_chunk_attention_config of config.json needs {', '.join(sorted(_DUAL_CHUNK_KEYS))}; it has "
                f"{sorted(dual_chunk)}."
            )
        dual_chunk = dict(dual_chunk)
    return dict(
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        intermediate_size=int(hf["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or num_heads),
        head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // num_heads),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        rms_norm_eps=float(hf.get("rms_norm_eps") or 1e-6),
        rope_theta=rope_theta,
        max_position_embeddings=int(hf.get("max_position_embeddings") or 32768),
        yarn=yarn,
        dual_chunk=dual_chunk,
        moe=moe,
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        initializer_range=float(hf.get("initializer_range") or 0.02),
        dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
        use_sliding_window=bool(hf.get("use_sliding_window", False)),
        sliding_window=hf.get("sliding_window"),
        max_window_layers=hf.get("max_window_layers"),
    )


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `config.json`.

    Args:
      fields: of a `ModelConfig`, as `dataclasses.asdict` gives them.

    Returns:
      A JSON object that `read` turns into the same fields.
    """
    eos: Any = list(fields["eos_token_ids"])
    kind = "qwen2" if fields["moe"] is None else "qwen2_moe"
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
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


def _read_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The experts of a config.json of model_type qwen2_moe."""
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


def _check_kinds(hf: Mapping[str, Any]) -> None:
    """Refuses values that are not of the kind their key needs; null stands for an absent key."""
    integers = (*_SHAPE_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings")
    for key in (*integers, "rms_norm_eps", "rope_theta", "initializer_range"):
        value = hf.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not number or (key in integers and value != int(value)):
            kind = "integer" if key in integers else "number"
            raise InputError(f"config.json has {key}={value!r}; expected a positive {kind}.")
    for key in ("rope_scaling", "rope_parameters", "dual_chunk_attention_config"):
        if not isinstance(hf.get(key) or {}, Mapping):
            raise InputError(f"config.json has {key}={hf[key]!r}; expected an object.")
    eos = hf.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InputError(f"config.json has eos_token_id={eos!r}; expected an id or a list of ids.")
    if hf.get("vocab_size") is not None and any(i >= hf["vocab_size"] for i in ids):
        raise InputError(
            f"config.json has eos_token_id={eos!r} with a vocabulary of {hf['vocab_size']}: such an id never comes, so "
            "no text would end. Give an id of the tokenizer, or null if texts end by their length only."
        )
    if not isinstance(hf.get("layer_types") or [], list):
        raise InputError(f"config.json has layer_types={hf['layer_types']!r}; expected a list.")


_YARN_KEYS = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
_DUAL_CHUNK_KEYS = {"chunk_size", "local_size", "original_max_position_embeddings"}


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """RoPE base and scaling from either dialect: `rope_theta` + `rope_scaling`, or `rope_parameters`."""
    scaling: dict[str, Any] = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = scaling.pop("rope_theta", None)
    if theta is not None and hf.get("rope_theta") not in (None, theta):
        raise InputError(
            f"config.json gives two RoPE bases: rope_theta={hf['rope_theta']} and {theta} inside the RoPE parameters. "
            "Remove the wrong one."
        )
    theta = theta if theta is not None else hf.get("rope_theta")
    if theta is None:
        raise InputError("config.json has no rope_theta, neither at the top level nor in rope_parameters.")
    names = {scaling.pop(key) for key in ("rope_type", "type") if key in scaling}
    if len(names) > 1:
        raise InputError(f"config.json names two RoPE types, {sorted(names)}. Keep one.")
    rope_type = names.pop() if names else "default"
    if rope_type == "default":
        return float(theta), None
    if rope_type != "yarn":
        raise InputError(f"RoPE type {rope_type!r} is not supported; Qwen2.5 uses 'default' or 'yarn'.")
    if scaling.pop("truncate", True) is not True:
        raise InputError("YaRN with truncate=false is not supported.")
    unknown = sorted(set(scaling) - _YARN_KEYS)
    if unknown or "factor" not in scaling:
        raise InputError(
            f"YaRN needs `factor` and knows {', '.join(sorted(_YARN_KEYS))}; config.json has {sorted(scaling)}."
        )
    # Older files leave the original length to max_position_embeddings.
    original = int(scaling.pop("original_max_position_embeddings", None) or hf.get("max_position_embeddings", 32768))
    return float(theta), {"original_max_position_embeddings": original, **scaling}
