"""Names of tensors in GGUF files. Rows of q and k keep their order: Qwen2's RoPE rotates halves in llama.cpp, too."""

import dataclasses
import re

from convert.names import Leaf, leaves
from qwen_jax.config import ModelConfig

# Name in Hugging Face's layout, without "model." and the number of the layer -> name in GGUF. {e} is an expert: GGUF
# has one tensor [experts, rows, columns] for all of a layer.
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{e}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{e}.up_proj": "ffn_up_exps",
    "mlp.experts.{e}.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of Hugging Face's layout is in a GGUF file.

    Attributes:
      name: of the tensor.
      expert: index into its first axis; None if it is the whole tensor.
    """

    name: str
    expert: int | None = None


def place(name: str) -> Place:
    """The place of a tensor by its name in Hugging Face's layout."""
    if name in _OUTSIDE:
        return Place(_OUTSIDE[name])
    _, _, layer, rest = name.split(".", 3)
    match = _EXPERT.search(rest)
    module, _, kind = _EXPERT.sub(".experts.{e}.", rest).rpartition(".")
    return Place(f"blk.{layer}.{_LAYER[module]}.{kind}", int(match[1]) if match else None)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file, and the tensors of a model that it holds.

    Attributes:
      name: in GGUF.
      shape: in PyTorch's order; a matrix of one row is a vector, as llama.cpp writes it.
      layer: number of its layer, or None.
      parts: leaf and index of each tensor in it: one, or all experts in order.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    parts: tuple[tuple[Leaf, int], ...]


def has_head(config: ModelConfig) -> bool:
    """Whether a file that is written has an output head. llama.cpp needs one beside experts, even if it is tied."""
    return config.has_lm_head or config.moe is not None


def tensors(config: ModelConfig, with_head: bool = False) -> list[Tensor]:
    """Lists the tensors of a model's GGUF file, in the order of the model.

    Args:
      config: the architecture.
      with_head: whether the embedding of a tied model is written as the output head, too.
    """
    parts: dict[str, dict[int | None, tuple[Leaf, int]]] = {}
    for leaf in leaves(config):
        for i, name in enumerate(leaf.names):
            where = place(name)
            parts.setdefault(where.name, {})[where.expert] = leaf, i
    found = []
    for name, by_expert in parts.items():
        (leaf, _), experts = next(iter(by_expert.values())), None not in by_expert
        shape = leaf.hf_shape[1:] if leaf.hf_shape[0] == 1 and len(leaf.hf_shape) == 2 else leaf.hf_shape
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        ordered = tuple(by_expert[e] for e in sorted(by_expert, key=lambda e: e or 0))
        found.append(Tensor(name, (len(by_expert), *shape) if experts else shape, layer, ordered))
    if with_head and not config.has_lm_head:
        found.append(dataclasses.replace(found[0], name="output.weight"))
    last = config.num_layers
    return sorted(found, key=lambda x: (-1 if x.name.startswith("token") else last) if x.layer is None else x.layer)
