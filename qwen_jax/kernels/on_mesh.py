"""The kernels of a decode step on a mesh: each in one `jax.shard_map`, over each shard's own rows, heads and width.

The products of a few rows with a weight matrix are by our kernel where `takes` says that it is the faster one;
everywhere else (prefill, other devices, shapes outside the rule) the model has einsums, with the same sharding.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.kernels.matmul.few_rows import few_rows_einsum as few_rows
from qwen_jax.kernels.matmul.few_rows import supports
from qwen_jax.parallel.sharding import Sharding

__all__ = ["attend_step", "few_rows", "swiglu", "takes"]


def takes(x_BTI: jax.Array, shards: int, outputs: int, inputs: int) -> bool:
    """Whether the kernel does a product: one token a row, bfloat16, a Hopper GPU, a matrix that is worth it.

    Args:
      x_BTI: the rows, on the mesh.
      shards: how many parts the batch axis is in.
      outputs, inputs: size of one device's part of the matrix.
    """
    return supports(x_BTI.shape[0] // shards, x_BTI.shape[1], x_BTI.dtype, outputs, inputs)


def swiglu(x_B1D: jax.Array, w_n2fD: jax.Array, sharding: Sharding) -> jax.Array:
    """silu(gate) * up, each shard its own width.

    Args:
      x_B1D: the rows, whole on each shard.
      w_n2fD: gate and up of each shard.
      sharding: of the current mesh.

    Returns:
      [B, 1, n f].
    """
    from qwen_jax.kernels.matmul.few_rows_gpu import skinny_swiglu

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        w = jax.lax.all_gather(w, "fsdp", axis=3, tiled=True)
        return skinny_swiglu(x[:, 0], w[0])[:, None]

    s = sharding
    run = jax.shard_map(local, in_specs=(s.hidden, s.fused_gate_up), out_specs=s.feed_forward, check_vma=False)
    out: jax.Array = run(x_B1D, w_n2fD.astype(x_B1D.dtype))
    return out


def attend_step(
    qkv_B1nRd: jax.Array,
    bias_nRd: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    start_B1: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    slot: jax.Array,
    *,
    scale: float,
    sharding: Sharding,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Bias, RoPE, cache update and attention of one new token a row, by `kernels.decode_step`.

    Args:
      qkv_B1nRd: the raw projection.
      bias_nRd: its bias.
      rope: tables of `rope_tables`, [B, 1, 1, head_dim / 2].
      start_B1: int32, first cache slot that each row sees.
      cache: keys and values [B, K, S, d].
      slot: int32 scalar, slot of the new token, the last one seen.
      scale: multiplies the logits.
      sharding: of the current mesh.

    Returns:
      The heads' outputs [B, 1, H, d], and the cache with the new token in it.
    """

    def local(qkv: jax.Array, bias: jax.Array, rope: Any, start: jax.Array, cache: Any, slot: jax.Array) -> Any:
        cos, sin = (table[:, 0, 0] for table in rope)
        out, *new = kernels.decode_step(qkv[:, 0, 0], bias[0], cos, sin, *cache, start[:, 0], slot, scale=scale)
        return out[:, None], tuple(new)

    s = sharding
    tables = P(*s.tokens, None, None)
    in_specs = P(*s.heads, None), s.fused_qkv_bias, tables, s.tokens, s.cache, P()
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(s.heads, s.cache), check_vma=False)
    result: tuple[jax.Array, Any] = run(qkv_B1nRd, bias_nRd, rope, start_B1, cache, slot)
    return result
