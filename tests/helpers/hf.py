"""Checkpoints as transformers writes them, with random weights: the oracle of the parity tests."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

TINY: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}

TINY_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter random values, biases and norms too: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                scale = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, scale, generator=generator)


def make_hf_checkpoint(
    folder: str | Path,
    *,
    tie: bool = True,
    dtype: str = "float32",
    dialect: str = "5",
    max_shard_size: str | int = "5GB",
    seed: int = 0,
    moe: bool = False,
    **config_overrides: Any,
) -> Any:
    """Writes a tiny Qwen2 or Qwen2Moe checkpoint with transformers, and gives the model back: float32, eager, eval.

    Args:
      folder: where to; made if need be.
      tie: whether the head is the embedding.
      dtype: on disk; the returned model holds the values after that rounding.
      dialect: of config.json, that of transformers "4" or "5".
      max_shard_size: as for `save_pretrained`.
      seed: of the weights.
      moe: with experts, `TINY_MOE`.
      **config_overrides: on `TINY`, in the names of transformers' Qwen2Config; `rope_theta` and `rope_scaling` too.
    """
    config_class, model_class = (Qwen2MoeConfig, Qwen2MoeForCausalLM) if moe else (Qwen2Config, Qwen2ForCausalLM)
    settings = {**TINY, **(TINY_MOE if moe else {}), **config_overrides, "tie_word_embeddings": tie}
    theta, scaling = settings.pop("rope_theta", 1e6), settings.pop("rope_scaling", None)
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    config = config_class(**settings, rope_parameters=rope)
    model = model_class(config)
    randomise(model, seed)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if dialect == "4":
        to_dialect_4(Path(folder) / "config.json", scaling)
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def to_dialect_4(path: Path, scaling: dict[str, Any] | None = None) -> None:
    """Rewrites a config.json of transformers 5 the way transformers 4 writes it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    config["transformers_version"] = "4.43.1"
    path.write_text(json.dumps(config, indent=2))


def hf_logits(model: Qwen2ForCausalLM, tokens_BT: Any) -> Any:
    """Float32 logits [B, T, V] as a NumPy array."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


def hf_loss_gradients(model: Qwen2ForCausalLM, tokens_BT: Any) -> dict[str, Any]:
    """Gradients of the mean next-token cross-entropy by tensor name, as NumPy arrays."""
    model.zero_grad()
    tokens = torch.as_tensor(tokens_BT, dtype=torch.long)
    logits = model(input_ids=tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
