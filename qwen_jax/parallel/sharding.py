"""The device mesh, and the sharding of every array of a model on it."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError

AXES = ("data", "fsdp", "expert", "context", "tensor")


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of `AXES`, in explicit-sharding mode.

    The data axis connects TPU slices or GPU nodes; all other axes stay within one slice or node. Where there are more
    nodes than the data axis has parts, fsdp spans the rest of them; it never spans TPU slices.

    Args:
      axes: sizes of the axes that are not 1, such as {"tensor": 2}.
      devices: by default the first of `jax.devices()`, as many as the sizes need.

    Raises:
      InputError: an unknown axis, more devices than there are, or sizes that do not fit the slices or nodes.
    """
    axes = dict(axes or {})
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise InputError(f"Unknown mesh axes {', '.join(unknown)}; the axes are {', '.join(AXES)}.")
    sizes = tuple(axes.get(name, 1) for name in AXES)
    if min(sizes) < 1:
        raise InputError(f"Mesh axes must be at least 1, got {axes}.")
    available = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes)
    if needed > len(available):
        raise InputError(f"The mesh {axes} needs {needed} devices, there are {len(available)}.")
    return Mesh(_arrange(sizes, available[:needed]), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _arrange(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the shape of a mesh, with the parts that span slices or nodes outermost."""
    # GPUs have slice_index too, for those that share fast links; CPUs do not.
    sliced, gpus = hasattr(devices[0], "slice_index"), devices[0].platform == "gpu"
    groups = collections.Counter(d.slice_index if sliced else d.process_index if gpus else 0 for d in devices)
    count, name = len(groups), "nodes" if gpus else "slices"
    if count == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    axes = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1}
    if len(set(groups.values())) > 1:
        raise InputError(
            f"The mesh {axes} uses {sorted(groups.values())} devices of the {count} {name}. "
            f"Choose sizes that use the same number of devices of each."
        )
    data, fsdp = sizes[:2]
    across = math.gcd(data, count)
    rest = count // across
    if rest > 1 and (not gpus or fsdp % rest):
        what = "data axis, or data x fsdp," if gpus else "data axis"
        raise InputError(f"The {what} must be a multiple of the {count} {name}; the mesh is {axes}.")
    between = (across, rest, *(1 for _ in sizes[2:]))
    within = [size // parts for size, parts in zip(sizes, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, process_is_granule=not sliced, allow_split_physical_axes=True
    )


def without_context(mesh: Mesh) -> Mesh:
    """The same devices with the context axis joined to the data axis.

    No weight is sharded over either axis, so each device holds the same shard of every weight on both meshes.

    Args:
      mesh: from `make_mesh`.
    """
    if mesh.shape["context"] == 1:
        return mesh
    beside_data = np.moveaxis(mesh.devices, AXES.index("context"), 1)
    sizes = {**mesh.shape, "data": mesh.shape["data"] * mesh.shape["context"], "context": 1}
    return Mesh(beside_data.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=mesh.axis_types)


def on_mesh(arrays: Any, mesh: Mesh) -> Any:
    """The same buffers as arrays on another mesh of the same devices.

    Args:
      arrays: a tree of arrays. On `mesh`, the PartitionSpec of each must give every device the shard that it has.
      mesh: of the result.
    """

    def one(x: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, x.sharding.spec)  # type: ignore[attr-defined]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [s.data for s in x.addressable_shards])

    return jax.tree.map(one, arrays)


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "tensor=2,data=4" into {"tensor": 2, "data": 4}.

    Raises:
      InputError: not of that form.
    """
    axes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in axes:
            raise InputError(f"Expected a mesh such as tensor=2,data=4 with axes of {', '.join(AXES)}; got {text!r}.")
        axes[name] = int(size)
    return axes


# The axes that shard the rows of a batch.
_ROWS = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class Sharding:
    """One PartitionSpec for each role. Weights are named as in `model.py`, without the stacked layer axis.

    `fsdp` shards weights along the hidden size, `tensor` along heads, feed-forward width or vocabulary, `expert` along
    experts. A weight is gathered over `fsdp` where it is used. In training the expert axis also shards the rows of a
    batch; in inference all devices of that axis have the same rows.
    """

    kv_heads: int
    """Key/value heads in attention: those of the model, or one for each tensor shard where the model has fewer."""
    tensor: int = 1
    """Size of the tensor axis."""
    batch_shards: int = 1
    """Number of shards of the rows of a batch."""
    context: int = 1
    """Number of shards of the tokens of a row; see `qwen_jax.attention.sequence`."""
    expert: int = 1
    """Size of the expert axis."""
    vocab: P = P("tensor", "fsdp")
    q: P = P("tensor", None, "fsdp")
    q_bias: P = P("tensor", None)
    kv: P = P("tensor", None, "fsdp")
    kv_bias: P = P("tensor", None)
    o: P = P("fsdp", "tensor", None)
    gate_up: P = P("tensor", "fsdp")
    down: P = P("fsdp", "tensor")
    norm: P = P(None)
    router: P = P(None, "fsdp")
    experts_gate_up: P = P("expert", None, "tensor", "fsdp")
    experts_down: P = P("expert", "fsdp", "tensor")
    # Fused projections of the inference layout: the leading axis counts the tensor shards.
    fused_qkv: P = P("tensor", None, None, "fsdp")
    fused_qkv_bias: P = P("tensor", None, None)
    fused_gate_up: P = P("tensor", None, None, "fsdp")
    # Activations.
    tokens: P = P(_ROWS, None)
    hidden: P = P(_ROWS, None, None)
    heads: P = P(_ROWS, None, "tensor", None)
    all_kv_heads: P = P(_ROWS, None, None, None)
    feed_forward: P = P(_ROWS, None, "tensor")
    logits: P = P(_ROWS, None, "tensor")
    cache: P = P(_ROWS, "tensor", None, None)
    rows: P = P(_ROWS)

    @property
    def vocab_rows(self) -> P:
        """Of arrays [B, V] with a number for each row and token: rows, and the vocabulary over tensor shards."""
        return P(*self.rows, self.logits[2])

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes that shard tokens."""
        rows: tuple[str, ...] = self.rows[0]
        return (*rows, "context")

    @property
    def exchanges(self) -> bool:
        """Whether tokens are sent to the devices of their experts."""
        return self.expert > 1 and "expert" in self.row_axes

    @classmethod
    def for_training(cls, config: ModelConfig, mesh: Mesh) -> "Sharding":
        """The shardings of a model in training.

        The expert axis shards rows, and a context axis shards tokens, which the caller orders by
        `qwen_jax.attention.sequence.zigzag_shard`.

        Args:
          config: the architecture.
          mesh: from `make_mesh`.

        Raises:
          InputError: a dimension that the mesh does not divide, or an unused axis.
        """
        return cls._for_model(config, mesh, training=True)

    @classmethod
    def for_inference(cls, config: ModelConfig, mesh: Mesh) -> "Sharding":
        """The shardings of a model in inference: all devices of an expert axis have the same rows.

        Args:
          config: the architecture.
          mesh: from `make_mesh`.

        Raises:
          InputError: a dimension that the mesh does not divide, or an unused axis.
        """
        return cls._for_model(config, mesh, training=False)

    @classmethod
    def _for_model(cls, config: ModelConfig, mesh: Mesh, training: bool) -> "Sharding":
        expert, moe = mesh.shape["expert"], config.moe
        if moe is None and expert != 1:
            raise InputError(f"A dense model does not use the expert axis; it is {expert}, make it 1.")
        context = mesh.shape["context"]
        if context > 1 and not training:
            raise InputError(f"Only training uses the context axis; it is {context}, make it 1.")
        tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
        rows = mesh.shape["data"] * fsdp * (expert if training else 1)
        experts: tuple[tuple[str, int, str, int], ...] = ()
        if moe is not None:
            experts = (
                ("num_experts", moe.num_experts, "expert", expert),
                ("moe_intermediate_size", moe.intermediate_size, "tensor", tensor),
                ("shared_expert_intermediate_size", moe.shared_intermediate_size, "tensor", tensor),
            )
        head = (("hidden_size", config.hidden_size, "tensor", tensor),) if config.score == "mlp" else ()
        for name, size, axis, parts in (
            ("num_heads", config.num_heads, "tensor", tensor),
            ("intermediate_size", config.intermediate_size, "tensor", tensor),
            ("vocab_size", config.vocab_size, "tensor", tensor),
            ("hidden_size", config.hidden_size, "fsdp", fsdp),
            *experts,
            *head,
        ):
            if size % parts:
                raise InputError(
                    f"{name} ({size}) is not divisible by the {axis} axis ({parts}). "
                    f"Choose an axis size that divides it."
                )
        split: dict[str, Any] = {"expert": expert}
        for role in ("tokens", "hidden", "heads", "all_kv_heads", "feed_forward", "logits", "cache", "rows"):
            first, *rest = getattr(cls, role)
            if not training:
                split[role] = P(tuple(axis for axis in first if axis != "expert"), *rest)
            elif context > 1 and role not in ("cache", "rows"):
                split[role] = P(first, "context", *rest[1:])
        if config.num_kv_heads % tensor == 0:
            return cls(config.num_kv_heads, tensor, rows, context, **split)
        if tensor % config.num_kv_heads == 0:
            # Fewer key/value heads than shards: their small weights are replicated, and heads are repeated so that
            # every shard has one.
            return cls(tensor, tensor, rows, context, kv=P(None, None, "fsdp"), kv_bias=P(None, None), **split)
        raise InputError(
            f"The tensor axis ({tensor}) must divide num_kv_heads ({config.num_kv_heads}) or be a multiple of it."
        )


TILE = 128
"""Columns that the kernels for few rows read of a weight at a time, on GPUs and TPUs."""


def padded_width(width: int, shards: int, quantized: bool) -> int:
    """The width of a feed-forward layer in the inference layout (`Options.fused`), on a tensor axis.

    Each shard's part is filled up with zeros to a multiple of `TILE`, so that kernels for few rows support it; zeros
    change no result. 72B on four devices gets 7,424 columns on each for 7,392. Parts below 1,024 columns are left as
    they are, because they would grow by more than an eighth; and so are quantised ones, whose groups would be cut.

    Args:
      width: of the layer, divisible by the shards.
      shards: size of the tensor axis.
      quantized: whether its weights are quantised.
    """
    part = width // shards
    if shards == 1 or quantized or part < 8 * TILE:
        return width
    return shards * -(-part // TILE) * TILE


def mesh_axes(spec: P) -> tuple[str, ...]:
    """The mesh axes that shard an array, in the order of its dimensions."""
    return tuple(
        axis for entry in spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)
    )


def gathered(spec: P) -> P:
    """The PartitionSpec of a weight where it is used: gathered over `fsdp`, still sharded over `tensor`."""
    return P(*(None if axis == "fsdp" else axis for axis in spec))
