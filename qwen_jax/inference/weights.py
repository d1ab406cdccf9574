"""The inference layout of the weights: one buffer for each layer, projections fused."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import Sharding, padded_width
from qwen_jax.params import Params
from qwen_jax.quantization import Quantization, unified
from qwen_jax.quantized import in_scheme


def fuse(params: Params, config: ModelConfig, sharding: Sharding) -> Params:
    """Brings every layer into the inference layout: q, k and v joined, gate and up joined.

    At batch 1 a decode step is bound by reading the weights and by the number of kernels. On a tensor axis the width of
    feed-forward layers may be padded; see `padded_width`. The argument is consumed:
    its buffers are freed layer by layer, so there is never a second copy of the weights.

    Args:
      params: unstacked (`Options(stacked=False)`) on the current mesh. Its list of layers is emptied.
      config: the architecture.
      sharding: of the current mesh.

    Returns:
      The tree for `Options(stacked=False, fused=True)`.
    """
    layers = params["layers"]
    if not isinstance(layers, list):
        raise ValueError("fuse needs unstacked layers, as from Options(stacked=False).")
    fused: list[Params] = []
    while layers:
        parts, rest = _taken_apart(layers.pop(0))
        quantization = _of_layer(config, len(fused))
        _check_orders(parts, len(fused))
        feed_forward = "moe.shared" if "moe" in rest else "mlp"
        qkv, gate_up = _join_jitted(
            parts, config=config, sharding=sharding, quantization=quantization, feed_forward=feed_forward
        )
        fused.append(_with_joined(rest, qkv, gate_up, _padded_consumed))
        for leaf in jax.tree.leaves(parts):
            leaf.delete()
    return {**params, "layers": fused}


def fused_layer(layer: Params, config: ModelConfig, sharding: Sharding) -> Params:
    """One layer in the inference layout, for programs that are jitted as a whole.

    Args:
      layer: with separate projections.
      config: the architecture.
      sharding: of the mesh that the layout is for. The current mesh may be another one if its axes are automatic.
    """
    if config.quantization is not None:
        raise ValueError("Quantised layers are joined by fuse.")
    parts, rest = _taken_apart(layer)
    qkv, gate_up = _join(parts, config=config, sharding=sharding)
    return _with_joined(rest, qkv, gate_up, _padded)


def is_fused(params: Params) -> bool:
    """Whether parameters are in the inference layout already."""
    layers = params["layers"]
    return isinstance(layers, list) and bool(layers) and "qkv" in layers[0]["attention"]


def _taken_apart(layer: Params) -> tuple[Params, Params]:
    """The projections of a layer that are joined, and the layer without them."""
    attention, moe = dict(layer["attention"]), layer.get("moe")
    mlp = dict(layer["mlp"] if moe is None else moe["shared"])
    parts = {name: attention.pop(name) for name in "qkv"} | {name: mlp.pop(name) for name in ("gate", "up")}
    rest = {"mlp": mlp} if moe is None else {"moe": {**moe, "shared": mlp}}
    return parts, {**layer, "attention": attention, **rest}


def _with_joined(layer: Params, qkv: Params, gate_up: Params, pad: Callable[..., jax.Array]) -> Params:
    """The layer with the joined projections. `pad`, as `_padded`, gives down their width."""
    moe = layer.get("moe")
    mlp = {**(layer["mlp"] if moe is None else moe["shared"]), "gate_up": gate_up}
    (n, _, f, _), down = gate_up["weight"].shape, mlp["down"]["weight"]
    if n * f != down.shape[1]:
        mlp["down"] = {**mlp["down"], "weight": pad(down, shards=n, part=f)}
    rest = {"mlp": mlp} if moe is None else {"moe": {**moe, "shared": mlp}}
    return {**layer, "attention": {**layer["attention"], "qkv": qkv}, **rest}


def _padded(w_DF: jax.Array, *, shards: int, part: int) -> jax.Array:
    """The matrix down with zeros behind the columns of each shard, so that a shard has `part` of them."""
    D, F = w_DF.shape
    explicit = jax.sharding.get_abstract_mesh().are_all_axes_explicit
    first = jax.typeof(w_DF).sharding.spec[0] if explicit else None

    def reshaped(w: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        spec = jax.P(first, "tensor", *(None,) * (len(shape) - 2))
        return w.reshape(shape, out_sharding=spec) if explicit else w.reshape(shape)

    w_Dnf = reshaped(w_DF, (D, shards, F // shards))
    return reshaped(jnp.pad(w_Dnf, ((0, 0), (0, 0), (0, part - F // shards))), (D, shards * part))


_padded_jitted = functools.partial(jax.jit, static_argnames=("shards", "part"))(_padded)


def _padded_consumed(w_DF: jax.Array, **sizes: int) -> jax.Array:
    """`_padded`, which frees its argument."""
    result: jax.Array = _padded_jitted(w_DF, **sizes)
    w_DF.delete()
    return result


def _of_layer(config: ModelConfig, layer: int) -> Quantization | None:
    return config.quantization and config.quantization.of_layer(layer, config.num_layers)


def _check_orders(parts: Params, layer: int) -> None:
    """Refuses projections that are joined and have different orders of their inputs."""
    for names in ("q", "k", "v"), ("gate", "up"):
        first, *others = (parts[name].get("order") for name in names)
        for name, other in zip(names[1:], others, strict=True):
            if first is not None and other is not None and not bool(jnp.array_equal(first, other)):
                raise InputError(
                    f"Layer {layer}: {names[0]} and {name} have different orders of their inputs (g_idx), so that they "
                    "cannot be one matrix. Convert the checkpoint to bfloat16, or quantise it without desc_act."
                )


def _join(
    parts: Params,
    *,
    config: ModelConfig,
    sharding: Sharding,
    quantization: Quantization | None = None,
    feed_forward: str = "mlp",
) -> tuple[Params, Params]:
    """q, k, v, gate, up -> qkv, gate_up.

    Args:
      parts: the projections.
      config, sharding: as for `fuse`.
      quantization: of the layer.
      feed_forward: path of the module that has gate and up.
    """
    n, repeat = sharding.tensor, sharding.kv_heads // config.num_kv_heads
    explicit = jax.sharding.get_abstract_mesh().are_all_axes_explicit
    parts = _alike(parts, quantization, feed_forward)

    def split(x: jax.Array, times: int = 1) -> jax.Array:
        """[heads or width, ...] -> [shards, heads or width of one shard, ...]."""
        x = jnp.repeat(x, times, axis=0) if times > 1 else x
        if not explicit:
            return x.reshape(n, -1, *x.shape[1:])
        rest = jax.typeof(x).sharding.spec[1:]
        x = jax.reshard(x, jax.P("tensor", *rest))
        return x.reshape(n, -1, *x.shape[1:], out_sharding=jax.P("tensor", None, *rest))

    def qkv(name: str) -> jax.Array:
        if name == "order":
            return parts["q"][name]
        heads = [split(parts[x][name], times) for x, times in (("q", 1), ("k", repeat), ("v", repeat))]
        return _joined(heads)

    def gate_up(name: str) -> jax.Array:
        if name == "order":
            return parts["gate"][name]
        two = [split(parts[x][name]) for x in ("gate", "up")]
        both = _joined([x[:, None] for x in two])
        f = both.shape[2]
        more = padded_width(n * f, n, quantization is not None) // n - f
        return jnp.pad(both, ((0, 0), (0, 0), (0, more), *((0, 0),) * (both.ndim - 3))) if more else both

    return {name: qkv(name) for name in parts["q"]}, {name: gate_up(name) for name in parts["gate"]}


def _joined(parts: list[jax.Array]) -> jax.Array:
    """Arrays joined along axis 1, by choosing between padded ones.

    In a program that joins the arrays of many layers, XLA's compiler for GPUs makes one kernel of such choices, at the
    bandwidth of a copy. Each concatenation would be a kernel of its own, at half of it.
    """
    ends = [0, *itertools.accumulate(x.shape[1] for x in parts)]
    others = parts[0].ndim - 2
    places = jnp.arange(ends[-1]).reshape(1, -1, *(1,) * others)
    padded = [
        jnp.pad(x, ((0, 0), (begin, ends[-1] - end), *((0, 0),) * others))
        for x, (begin, end) in zip(parts, itertools.pairwise(ends), strict=True)
    ]
    result = padded[0]
    for begin, x in zip(ends[1:], padded[1:], strict=False):
        result = jnp.where(places < begin, result, x)
    return result


def _alike(parts: Params, quantization: Quantization | None, feed_forward: str) -> Params:
    """The projections of a layer in the schemes of the joined ones."""
    if quantization is None:
        return parts
    result: Params = {}
    for module, names in ("attention", ("q", "k", "v")), (feed_forward, ("gate", "up")):
        schemes = [quantization.of(f"{module}.{name}") for name in names]
        target = functools.reduce(unified, schemes)
        for name, scheme in zip(names, schemes, strict=True):
            result[name] = in_scheme(parts[name], scheme, target)
    return result


_join_jitted = functools.partial(jax.jit, static_argnames=("config", "sharding", "quantization", "feed_forward"))(_join)
