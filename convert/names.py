"""The one table between Hugging Face tensor names and parameter paths.

Weights keep PyTorch's orientation on both sides, so the two shapes differ only in how axes are grouped: a conversion is
a reshape of the same bytes.
"""

import dataclasses
import math
import re

from qwen_jax.config import ModelConfig

# Hugging Face name -> (path in the parameter tree, axes). Axes in parentheses are one axis there and two here.
# Letters: V vocabulary, D hidden, H query heads, K key/value heads, d head_dim, F feed-forward.
_OUTSIDE = {
    "model.embed_tokens.weight": ("embed.weight", "V D"),
    "model.norm.weight": ("norm.weight", "D"),
    "lm_head.weight": ("lm_head.weight", "V D"),
}
_LAYER = {
    "input_layernorm.weight": ("input_norm.weight", "D"),
    "self_attn.q_proj.weight": ("attention.q.weight", "(H d) D"),
    "self_attn.q_proj.bias": ("attention.q.bias", "(H d)"),
    "self_attn.k_proj.weight": ("attention.k.weight", "(K d) D"),
    "self_attn.k_proj.bias": ("attention.k.bias", "(K d)"),
    "self_attn.v_proj.weight": ("attention.v.weight", "(K d) D"),
    "self_attn.v_proj.bias": ("attention.v.bias", "(K d)"),
    "self_attn.o_proj.weight": ("attention.o.weight", "D (H d)"),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", "D"),
    "mlp.gate_proj.weight": ("mlp.gate.weight", "F D"),
    "mlp.up_proj.weight": ("mlp.up.weight", "F D"),
    "mlp.down_proj.weight": ("mlp.down.weight", "D F"),
}
LM_HEAD = "lm_head.weight"

# Buffers that old versions of transformers saved; the model computes them.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the stacked parameter tree, and the tensors that it holds.

    Attributes:
      path: keys from the root of the parameter tree.
      names: Hugging Face names: one for each layer, or a single one.
      stacked: whether the leaf has a leading layer axis.
      shape: of one layer, here.
      hf_shape: of one tensor, on disk in Hugging Face's format.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]

    @property
    def layers(self) -> int:
        """How many tensors it holds."""
        return len(self.names)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the leaf in the stacked tree."""
        return (self.layers, *self.shape) if self.stacked else self.shape

    @property
    def size(self) -> int:
        """Elements in all layers together."""
        return self.layers * math.prod(self.shape)


def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """Every leaf of a model's parameter tree, in the order of the model.

    Args:
      config: the architecture.
    """
    size = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "d": config.head_dim,
        "F": config.intermediate_size,
    }

    def leaf(path: str, axes: str, names: tuple[str, ...], stacked: bool) -> Leaf:
        shape = tuple(size[letter] for letter in re.findall(r"\w", axes))
        groups = re.findall(r"\(.*?\)|\w", axes)
        hf_shape = tuple(math.prod(size[letter] for letter in re.findall(r"\w", group)) for group in groups)
        return Leaf(tuple(path.split(".")), names, stacked, shape, hf_shape)

    outside = {name: leaf(path, axes, (name,), False) for name, (path, axes) in _OUTSIDE.items()}
    if config.tie_word_embeddings:
        del outside[LM_HEAD]
    embed, *rest = outside.values()
    layers = [
        leaf(f"layers.{path}", axes, tuple(f"model.layers.{i}.{name}" for i in range(config.num_layers)), True)
        for name, (path, axes) in _LAYER.items()
    ]
    return (embed, *layers, *rest)


def is_ignored(name: str) -> bool:
    """Whether a tensor on disk may be passed over: a buffer that the model computes by itself."""
    return _IGNORED.fullmatch(name) is not None
