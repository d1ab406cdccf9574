"""Writing the architecture of a model as metadata of a GGUF file; `qwen_jax.gguf.metadata` reads them."""

import math
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.gguf.metadata import BOS_KEY, END_KEYS


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Writes the metadata of an architecture, which `ModelConfig.from_gguf` reads.

    Args:
      config: of a language model; its `eos_token_ids` are all ids that end a text.

    Returns:
      Metadata by key: integers, floats, booleans and strings.

    Raises:
      InputError: a setting that llama.cpp does not have, so that it would compute something else.
    """
    _check_writable(config)
    moe, head_dims = config.moe, config.head_dim * config.num_heads
    arch = "qwen2" if moe is None else "qwen2moe"
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if head_dims != config.hidden_size:
        values |= {f"{key}": config.head_dim for key in ("attention.key_length", "attention.value_length")}
        values["rope.dimension_count"] = config.head_dim
    if config.yarn is not None:
        yarn = config.yarn
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(yarn.factor),
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
        }
        if yarn.attention_factor is not None:
            values["rope.scaling.attn_factor"] = yarn.attention_factor / (0.1 * math.log(yarn.factor) + 1.0)
        if (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0):
            values |= {
                "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
                "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
            }
    if moe is not None:
        values |= {
            "expert_count": moe.num_experts,
            "expert_used_count": moe.num_experts_per_tok,
            "expert_feed_forward_length": moe.intermediate_size,
            "expert_shared_feed_forward_length": moe.shared_intermediate_size,
        }
    metadata = {f"{arch}.{key}": value for key, value in values.items()}
    # One end is written twice, so that a reader does not take another one for granted.
    ends = config.eos_token_ids * 2 if len(config.eos_token_ids) == 1 else config.eos_token_ids
    metadata |= dict(zip(END_KEYS, ends, strict=False))
    if config.bos_token_id is not None:
        metadata[BOS_KEY] = config.bos_token_id
    return metadata


def _check_writable(config: ModelConfig) -> None:
    """Raises InputError for what llama.cpp computes in another way."""
    moe, problem = config.moe, None
    if config.score is not None:
        problem = "This is a reward model, and GGUF files have no score head. Convert a language model"
    elif config.dual_chunk is not None:
        problem = (
            "This model has dual-chunk attention, which llama.cpp has not. Remove dual_chunk_attention_config from "
            "config.json for a model that is right up to the length of a chunk"
        )
    elif moe is not None and moe.norm_topk_prob:
        problem = (
            "This model has norm_topk_prob=true, and llama.cpp does not normalise the weights of a token's experts in "
            "qwen2moe models. Keep the model in another format"
        )
    elif moe is not None and len(config.sparse_layers) != config.num_layers:
        problem = (
            f"Only {len(config.sparse_layers)} of the {config.num_layers} layers of this model have experts, and "
            "llama.cpp expects them in all layers of a qwen2moe model. Keep the model in another format"
        )
    elif len(config.eos_token_ids) > len(END_KEYS):
        problem = f"GGUF files name at most {len(END_KEYS)} ids that end a text; this model has {config.eos_token_ids}"
    if problem is not None:
        raise InputError(f"{problem}.")
