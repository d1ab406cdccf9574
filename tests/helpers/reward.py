"""Reward models as transformers and Qwen write them, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForSequenceClassification, Qwen2Model
from transformers.utils import logging

from tests.helpers.hf import TINY, randomise

logging.disable_progress_bar()


class TorchReward(torch.nn.Module):
    """Qwen's `Qwen2ForRewardModel`, written after its definition: a two-layer head on the final hidden states."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        D = config.hidden_size
        self.model = Qwen2Model(config)
        self.score = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, 1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The score [B] after the last token."""
        return self.score(self.model(input_ids=input_ids).last_hidden_state[:, -1])[:, 0]


def make_reward_checkpoint(
    folder: Path, kind: str, *, dtype: str = "float32", seed: int = 0, lm_head: bool = True, **overrides: Any
) -> Any:
    """Writes a tiny reward model, and gives a float32 torch module back.

    Args:
      folder: where to.
      kind: "linear", written by transformers; or "mlp", written as Qwen's own.
      dtype: on disk; the returned model holds the values after that rounding.
      seed: of the weights.
      lm_head: "mlp" has an unused output head too, as the published one has.
      **overrides: of the config.
    """
    settings = {**TINY, "pad_token_id": 1, "tie_word_embeddings": False, "num_labels": 1, **overrides}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(**settings, rope_parameters=rope, attn_implementation="eager")
    model: Any = Qwen2ForSequenceClassification(config) if kind == "linear" else TorchReward(config)
    randomise(model, seed)
    model.to(getattr(torch, dtype))
    if kind == "linear":
        model.save_pretrained(folder)
        # transformers 4 needs the base of RoPE here, and without it the file would be rewritten.
        edit_config(folder, rope_theta=1e6)
    else:
        base = Qwen2ForSequenceClassification(config)
        base.to(getattr(torch, dtype)).save_pretrained(folder)
        tensors = dict(model.state_dict())
        if lm_head:
            tensors["lm_head.weight"] = torch.randn(config.vocab_size, config.hidden_size).to(getattr(torch, dtype))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        edit_config(folder, rope_theta=1e6, architectures=["Qwen2ForRewardModel"], id2label=None, label2id=None)
    return model.float().eval()


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; None removes a key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}, indent=2))


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a Hugging Face folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in load_file(file).items():
            found[name] = str(x.dtype), tuple(x.shape), x.contiguous().view(torch.uint8).numpy().tobytes()
    return found
