"""The inference layout of the weights: one buffer for each layer, projections fused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params
from qwen_jax.sharding import Sharding


def fuse(params: Params, config: ModelConfig, sharding: Sharding) -> Params:
    """Brings every layer into the inference layout: q, k and v joined, gate and up joined, input axis first.

    At batch 1 a decode step is bound by reading the weights and by the number of kernels. The argument is consumed:
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
    fused = []
    while layers:
        layer = layers.pop(0)
        matrices = {name: layer.pop(name) for name in ("attention", "mlp")}
        fused.append({**layer, **_fuse_layer(matrices, config=config, sharding=sharding)})
        for leaf in jax.tree.leaves(matrices):
            leaf.delete()
    return {**params, "layers": fused}


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def _fuse_layer(layer: Params, *, config: ModelConfig, sharding: Sharding) -> Params:
    s, n, repeat = sharding, sharding.tensor, sharding.kv_heads // config.num_kv_heads
    attention, mlp = layer["attention"], layer["mlp"]

    def split(x: jax.Array, times: int = 1) -> jax.Array:
        """[heads or width, ...] -> [shards, heads or width of one shard, ...]."""
        x = jnp.repeat(x, times, axis=0) if times > 1 else x
        x = jax.reshard(x, jax.P("tensor"))
        return x.reshape(n, -1, *x.shape[1:], out_sharding=jax.P("tensor"))

    def join(name: str) -> jax.Array:
        parts = [split(attention["q"][name]), split(attention["k"][name], repeat), split(attention["v"][name], repeat)]
        return jnp.concatenate(parts, axis=1)

    def place(x: jax.Array, order: str, spec: Any) -> jax.Array:
        return jax.reshard(jnp.einsum(order, x), spec)

    gate_up_n2fD = jnp.stack([split(mlp["gate"]["weight"]), split(mlp["up"]["weight"])], axis=1)
    return {
        "attention": {
            "qkv": {
                "weight": place(join("weight"), "nRdD->nDRd", s.fused_qkv),
                "bias": jax.reshard(join("bias"), s.fused_qkv_bias),
            },
            "o": {"weight": place(attention["o"]["weight"], "DHd->HdD", s.fused_o)},
        },
        "mlp": {
            "gate_up": {"weight": place(gate_up_n2fD, "nxfD->nDxf", s.fused_gate_up)},
            "down": {"weight": place(mlp["down"]["weight"], "DF->FD", s.fused_down)},
        },
    }
