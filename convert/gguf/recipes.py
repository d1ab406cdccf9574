"""Which type each tensor of a GGUF file gets: the rules of llama.cpp's `llama-quantize`, without importance matrix."""

import dataclasses
import re

from convert.gguf.names import Tensor, has_head
from qwen_jax.config import ModelConfig
from qwen_jax.gguf.header import TYPES, TensorType
from qwen_jax.gguf.metadata import EMBED, HEAD


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is written.

    Attributes:
      name: for the command line.
      type: of most matrices.
      file_type: the number that llama.cpp gives to such files (`llama_ftype`).
      better_head: whether the output head, or the embedding that is the head, is written in Q6_K; and keys and values
        of models with 8 experts in Q8_0.
      better: whether v and down of some layers are written in Q6_K, as in the "M" mixes.
    """

    name: str
    type: TensorType
    file_type: int
    better_head: bool = False
    better: bool = False


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", TYPES["F32"], 0),
        Recipe("f16", TYPES["F16"], 1),
        Recipe("bf16", TYPES["BF16"], 32),
        Recipe("q8_0", TYPES["Q8_0"], 7),
        Recipe("q4_0", TYPES["Q4_0"], 2, better_head=True),
        Recipe("q4_1", TYPES["Q4_1"], 3, better_head=True),
        Recipe("q5_0", TYPES["Q5_0"], 8, better_head=True),
        Recipe("q5_1", TYPES["Q5_1"], 9, better_head=True),
        Recipe("q4_k_m", TYPES["Q4_K"], 15, better_head=True, better=True),
        Recipe("q5_k_m", TYPES["Q5_K"], 17, better_head=True, better=True),
        Recipe("q6_k", TYPES["Q6_K"], 18, better_head=True),
    )
}
"""By name."""
# Where rows are no multiple of 256.
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_BETTER = re.compile(r"blk\.\d+\.(attn_v|ffn_down|ffn_down_exps|ffn_down_shexp)\.weight")


def type_of(recipe: Recipe, tensor: Tensor, config: ModelConfig) -> TensorType:
    """The type of a tensor.

    Vectors and routers are float32, as llama.cpp expects them. Rows that are no multiple of a type's block get the next
    type with smaller blocks, and float16 if there is none.

    Args:
      recipe: how the model is written.
      tensor: which one.
      config: of the model.
    """
    if len(tensor.shape) == 1 or ".ffn_gate_inp" in tensor.name:
        return TYPES["F32"]
    name = recipe.type.name
    if recipe.better_head and tensor.name == (HEAD if has_head(config) else EMBED):
        name = "Q6_K"
    if recipe.better and _BETTER.fullmatch(tensor.name):
        if _use_more_bits(tensor.layer or 0, config.num_layers):
            name = "Q6_K"
        elif config.num_layers == 80 and ".attn_v." in tensor.name and name == "Q4_K":
            name = "Q5_K"  # In models of 70 billion parameters, v is small beside q.
    if recipe.better_head and config.moe is not None and config.moe.num_experts == 8:
        name = "Q8_0" if re.search(r"\.attn_[kv]\.", tensor.name) else name
    columns = tensor.shape[-1]
    if columns % TYPES[name].block:
        name = _SMALLER_BLOCKS.get(name, name)
    return TYPES[name if columns % TYPES[name].block == 0 else "F16"]


def _use_more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer is among the first or the last eighth, or every third of the others."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
