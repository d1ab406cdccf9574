"""The inference layout of the weights: one buffer for each layer, projections fused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params
from qwen_jax.sharding import Sharding


def fuse(params: Params, config: ModelConfig, sharding: Sharding) -> Params:
    """Joins q, k and v, and gate and up, of every layer. Consumes its argument: old buffers are freed layer by layer.

    One matrix product instead of three (or two) a layer: at batch 1 a decode step is bound by reading the weights and
    by the number of kernels.

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
    fused = []
    while layers:
        layer = layers.pop(0)
        fused.append(_fuse_layer(layer, config, sharding))
        for leaf in jax.tree.leaves([layer["attention"][x] for x in "qkv"] + [layer["mlp"][x] for x in ("gate", "up")]):
            leaf.delete()
    return {**params, "layers": fused}


def _fuse_layer(layer: Params, config: ModelConfig, sharding: Sharding) -> Params:
    attention, mlp = layer["attention"], layer["mlp"]
    qkv = _fuse_qkv(*(attention[x] for x in "qkv"), config=config, sharding=sharding)
    gate_up = _fuse_gate_up(mlp["gate"]["weight"], mlp["up"]["weight"], sharding=sharding)
    return {
        **layer,
        "attention": {"qkv": qkv, "o": attention["o"]},
        "mlp": {"gate_up": {"weight": gate_up}, "down": mlp["down"]},
    }


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def _fuse_qkv(q: Any, k: Any, v: Any, *, config: ModelConfig, sharding: Sharding) -> Any:
    n, repeat = sharding.tensor, sharding.kv_heads // config.num_kv_heads

    def join(name: str, spec: Any) -> jax.Array:
        parts = []
        for x, times in ((q[name], 1), (k[name], repeat), (v[name], repeat)):
            # Heads lead: [heads, ...] -> [shards, heads of one shard, ...].
            x = jnp.repeat(x, times, axis=0) if times > 1 else x
            split = jax.reshard(x, jax.P("tensor", *spec[2:]))
            parts.append(split.reshape(n, -1, *x.shape[1:], out_sharding=spec))
        return jnp.concatenate(parts, axis=1)

    return {"weight": join("weight", sharding.fused_qkv), "bias": join("bias", sharding.fused_qkv_bias)}


@functools.partial(jax.jit, static_argnames=("sharding",))
def _fuse_gate_up(gate_FD: jax.Array, up_FD: jax.Array, *, sharding: Sharding) -> jax.Array:
    n, spec = sharding.tensor, sharding.fused_gate_up
    halves = [x.reshape(n, 1, -1, x.shape[1], out_sharding=spec) for x in (gate_FD, up_FD)]
    return jnp.concatenate(halves, axis=1)
