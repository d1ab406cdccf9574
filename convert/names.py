"""The one table of Hugging Face tensor names and parameter paths.

Weights keep PyTorch's orientation on both sides, so the two shapes differ only in how axes are grouped: a conversion is
a reshape of the same bytes.
"""

import dataclasses
import math
import re
from collections.abc import Collection
from pathlib import Path

from qwen_jax.config import ModelConfig, Score
from qwen_jax.errors import InputError
from qwen_jax.quantization import Scheme

# Hugging Face name -> (path in the parameter tree, axes). Axes in parentheses are one axis in Hugging Face's tensor and
# two in the parameter. Letters: V vocabulary, D hidden, H query heads, K key/value heads, d head_dim, F feed-forward,
# E experts, f width of an expert, s width of the shared expert.
_OUTSIDE = {
    "model.embed_tokens.weight": ("embed.weight", "V D"),
    "model.norm.weight": ("norm.weight", "D"),
    "lm_head.weight": ("lm_head.weight", "V D"),
}
# The heads of reward models, by `ModelConfig.score`.
_SCORE = {
    "linear": {"score.weight": ("score.weight", "1 D")},
    "mlp": {
        "score.0.weight": ("score.hidden.weight", "D D"),
        "score.0.bias": ("score.hidden.bias", "D"),
        "score.2.weight": ("score.output.weight", "1 D"),
        "score.2.bias": ("score.output.bias", "1"),
    },
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
}
_DENSE = {
    "mlp.gate_proj.weight": ("mlp.gate.weight", "F D"),
    "mlp.up_proj.weight": ("mlp.up.weight", "F D"),
    "mlp.down_proj.weight": ("mlp.down.weight", "D F"),
}
# One tensor for each expert: {e} and {gate_or_up} in a name are leading axes of the parameter.
_SPARSE = {
    "mlp.gate.weight": ("moe.router.weight", "E D"),
    "mlp.experts.{e}.{gate_or_up}_proj.weight": ("moe.experts.gate_up", "f D"),
    "mlp.experts.{e}.down_proj.weight": ("moe.experts.down", "D f"),
    "mlp.shared_expert.gate_proj.weight": ("moe.shared.gate.weight", "s D"),
    "mlp.shared_expert.up_proj.weight": ("moe.shared.up.weight", "s D"),
    "mlp.shared_expert.down_proj.weight": ("moe.shared.down.weight", "D s"),
    "mlp.shared_expert_gate.weight": ("moe.shared_gate.weight", "1 D"),
}
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# How the names of tensors begin that are no part of transformers' `Qwen2Model`.
HEADS = ("lm_head.", "score.")

# Buffers that old versions of transformers saved; the model computes them.
_IGNORED = re.compile(
    r"model\.((layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)"
    r"|layers\.\d+\.self_attn\.(bias|masked_bias|causal_mask)|causal_mask)"
)
# What training tools put in front of every tensor name.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.": "PEFT",
}
_LORA = re.compile(r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save)\.")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the stacked parameter tree, and the Hugging Face tensors that it holds.

    Attributes:
      path: keys from the root of the parameter tree.
      names: Hugging Face names of its tensors, in the order in which they are stacked.
      stack: leading axes of the leaf: none, layers, or layers and experts (and gate and up).
      layers: numbers of the layers that have this parameter; empty without a layer axis.
      shape: of one tensor, as a parameter.
      hf_shape: of one tensor, as Hugging Face stores it.
      stored: the dtype that it always has, as codes and scales of quantised weights; None if any can be asked for.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    stack: tuple[int, ...]
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    stored: str | None = None

    def __hash__(self) -> int:
        return hash(self.path)  # Hashing the names, which may be thousands, would be slow.

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the leaf in the stacked tree."""
        return (*self.stack, *self.shape)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of the leaf in one layer, or of the whole leaf if it has no layer axis."""
        return (*self.stack[1:], *self.shape)

    @property
    def per_layer(self) -> int:
        """Tensors in one layer."""
        return math.prod(self.stack[1:])

    @property
    def size(self) -> int:
        """Elements in all of its tensors together."""
        return math.prod(self.full_shape)

    def region(self, tensors: slice) -> tuple[slice, ...]:
        """The index along the axes of `stack` of a range of tensors: of one tensor, or of whole runs of the last axes.

        Raises:
          ValueError: the tensors are not a contiguous block.
        """
        count, index = tensors.stop - tensors.start, []
        for i, size in enumerate(self.stack):
            each = math.prod(self.stack[i + 1 :])
            first, number = tensors.start // each % size, max(count // each, 1)
            index.append(slice(first, first + number))
            if count >= each:
                if tensors.start % each or count % each or first + number > size:
                    break
                return (*index, *(slice(0, n) for n in self.stack[i + 1 :]))
        if self.stack:
            raise ValueError(
                f"Tensors {tensors.start} to {tensors.stop} of {self.stack} do not form a contiguous block."
            )
        return ()


def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """Lists every leaf of a model's parameter tree, in the order of the model.

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
        "1": 1,
    }
    if config.moe is not None:
        moe = config.moe
        size |= {"E": moe.num_experts, "f": moe.intermediate_size, "s": moe.shared_intermediate_size}

    def leaf(name: str, path: str, axes: str, layers: tuple[int, ...]) -> Leaf:
        shape = tuple(size[letter] for letter in re.findall(r"\w", axes))
        groups = re.findall(r"\(.*?\)|\w", axes)
        hf_shape = tuple(math.prod(size[letter] for letter in re.findall(r"\w", group)) for group in groups)
        names: tuple[str, ...] = (name,)
        stack: tuple[int, ...] = ()
        if layers:
            names, stack = tuple(f"model.layers.{i}.{name}" for i in layers), (len(layers),)
        axis: tuple[tuple[str, tuple[int | str, ...]], ...]
        axis = ("{e}", tuple(range(size.get("E", 0)))), ("{gate_or_up}", ("gate", "up"))
        for part, values in axis:
            if part in name:
                names = tuple(text.replace(part, str(value)) for text in names for value in values)
                stack = (*stack, len(values))
        return Leaf(tuple(path.split(".")), names, stack, layers, shape, hf_shape)

    tables = _OUTSIDE if config.score is None else {**_OUTSIDE, **_SCORE[config.score]}
    outside = {name: leaf(name, *where, ()) for name, where in tables.items()}
    if not config.has_lm_head:
        del outside[LM_HEAD]
    embed, *rest = outside.values()
    every = tuple(range(config.num_layers))
    dense = tuple(i for i in every if i not in config.sparse_layers)
    layers = [
        leaf(name, f"layers.{path}", axes, where)
        for table, where in ((_LAYER, every), (_DENSE, dense), (_SPARSE, config.sparse_layers))
        for name, (path, axes) in table.items()
        if where
    ]
    if config.quantization is not None:
        layers = [part for leaf in layers for part in _quantized(leaf, config)]
    return (embed, *layers, *rest)


# Parameters that may be quantised: their paths within a layer, without "weight" at the end.
_PROJECTIONS = {
    path.removesuffix(".weight"): axes
    for table in (_LAYER, _DENSE, _SPARSE)
    for path, axes in table.values()
    if not path.endswith((".bias", "norm.weight", "router.weight", "shared_gate.weight"))
}


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every projection that may be quantised, by the name of its Hugging Face module."""
    return {
        name.removesuffix(".weight"): (leaf.hf_shape[0], leaf.hf_shape[1])
        for leaf in leaves(dataclasses.replace(config, quantization=None))
        if ".".join(leaf.path[1:]).removesuffix(".weight") in _PROJECTIONS
        for name in leaf.names
    }


def _quantized(leaf: Leaf, config: ModelConfig) -> list[Leaf]:
    """The leaves of the arrays that take the place of a leaf: one set for the layers of each scheme.

    Their names are those of the weight's tensors, with "scales", "zeros", "mins" and "order" in the place of "weight".
    """
    module = ".".join(leaf.path[1:]).removesuffix(".weight")
    if module not in _PROJECTIONS:
        return [leaf]
    assert config.quantization is not None
    by_scheme: dict[Scheme | None, list[int]] = {}
    for place, layer in enumerate(leaf.layers):
        by_scheme.setdefault(config.quantization.of(f"layers.{layer}.{module}"), []).append(place)
    outputs = len(re.findall(r"\w", re.findall(r"\(.*?\)|\w", _PROJECTIONS[module])[0]))
    inputs = math.prod(leaf.shape[outputs:])
    found = []
    for scheme, places in by_scheme.items():
        names = [name for place in places for name in leaf.names[place * leaf.per_layer : (place + 1) * leaf.per_layer]]
        some = dataclasses.replace(
            leaf,
            names=tuple(names),
            stack=(len(places), *leaf.stack[1:]),
            layers=tuple(leaf.layers[place] for place in places),
        )
        if scheme is None:
            found.append(some)
            continue
        for array, dtype in scheme.arrays().items():
            shape, hf_shape = leaf.shape, leaf.hf_shape
            if array == "order":
                shape = hf_shape = (inputs,)
            elif array != "weight":
                groups = scheme.groups(inputs)
                shape, hf_shape = (*leaf.shape[:outputs], groups), (leaf.hf_shape[0], groups)
            *before, last = leaf.path
            path = (*before, array) if last == "weight" else (*before, last if array == "weight" else f"{last}_{array}")
            own = tuple(name.removesuffix("weight") + array for name in names)
            found.append(dataclasses.replace(some, path=path, names=own, shape=shape, hf_shape=hf_shape, stored=dtype))
    return found


_EXPERT = re.compile(r"(.*mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


def in_fused(name: str) -> tuple[str, tuple[int, int, int]] | None:
    """Finds an expert's tensor in a checkpoint that stores all experts of a layer as one tensor.

    Args:
      name: of the expert's own tensor.

    Returns:
      The name of the fused tensor [experts, rows, columns], and (expert, part, parts): gate and up are the two parts
      of the rows of one fused tensor. None if the name is not that of an expert's tensor.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    if match[3] == "down":
        return f"{match[1]}down_proj", (int(match[2]), 0, 1)
    return f"{match[1]}gate_up_proj", (int(match[2]), int(match[3] == "up"), 2)


def score_head(names: Collection[str]) -> Score | None:
    """Tells which head of a reward model a checkpoint has, by its tensor names; None if it has none."""
    kinds: tuple[Score, ...] = ("linear", "mlp")
    return next((kind for kind in kinds if _SCORE[kind].keys() & set(names)), None)


def is_ignored(name: str) -> bool:
    """Whether a tensor of a checkpoint may be skipped: a buffer that the model computes by itself."""
    return _IGNORED.fullmatch(name) is not None


def standard_names(where: Path, names: Collection[str]) -> dict[str, str]:
    """Maps the tensor names of a checkpoint to the names in this table.

    A base model saved without its head (`AutoModel` of transformers) has names without the leading "model.".

    Args:
      where: the folder, for messages.
      names: all tensor names of the checkpoint.

    Returns:
      For each name its standard name; unknown names stay as they are.

    Raises:
      InputError: unmerged LoRA matrices, or names that a training tool has put a prefix in front of.
    """
    lora = next((name for name in sorted(names) if _LORA.search(name)), None)
    if lora is not None:
        raise InputError(
            f"{where} holds tensors of a LoRA adapter that is not merged into the weights, such as {lora}. Merge it "
            "with PEFT: merge_and_unload(), then save_pretrained(...)."
        )
    known = "layers.0.input_layernorm.weight"
    found = next((name for name in sorted(names) if ("." + name).endswith("." + known)), f"model.{known}")
    prefix = found.removesuffix(known)
    if prefix == "":
        return {name: name if name.startswith(HEADS) else f"model.{name}" for name in names}
    if prefix != "model.":
        extra = prefix[: -len("model.")] if prefix.endswith(".model.") else prefix
        tool = next((f", which {tool} adds" for part, tool in _WRAPPERS.items() if part in prefix), "")
        raise InputError(
            f"{where}: the tensor names begin with {extra!r}{tool}: found {found}, expected model.{known}. Save the "
            "wrapped model itself, or remove that prefix from the names in the safetensors files."
        )
    return {name: name for name in names}


def check_names(where: Path, missing: Collection[str], unknown: Collection[str], config: ModelConfig) -> None:
    """Refuses a checkpoint that has other tensors than a model; the first of them are named.

    Args:
      where: the folder.
      missing: names of tensors that the checkpoint lacks.
      unknown: names of tensors that the model does not have.
      config: of the model.

    Raises:
      InputError: there are any.
    """
    moe = config.moe
    experts = "" if moe is None else f" and {moe.num_experts} experts in {len(config.sparse_layers)} of them"
    for names, what in ((missing, "lacks"), (unknown, "has unknown")):
        if names:
            raise InputError(
                f"{where} {what} {len(names)} of the tensors of a Qwen2 model with {config.num_layers} "
                f"layers{experts}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}. "
                "Check that config.json belongs to these weights."
            )
