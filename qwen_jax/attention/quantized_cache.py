"""Buffers of a `ContiguousCache` in 8 bits: how they are made, written and sharded, and what they take.

`ContiguousCache.for_prompts` with dtype int8 makes them. Keys are quantised after the rotation, in float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.kernels import Int8Rows
from qwen_jax.parallel.sharding import Sharding

Buffer = jax.Array | Int8Rows
"""Keys or values of a layer, [B, K, S, d], in the compute dtype or in 8 bits."""
_TYPICAL = 8.0
"""The magnitude up to which the bias of a key's component is no outlier: about the largest component that a key has
without its bias. Too large a value costs little: the outliers then remain somewhat above the other components."""


def empty(shape: tuple[int, ...], sharding: Sharding, dtype: jnp.dtype, channels_Kd: jax.Array | None = None) -> Buffer:
    """The buffer of one layer for keys or for values: an array, or `Int8Rows` for int8.

    Args:
      shape: [B, K, S, d].
      sharding: of the current mesh.
      dtype: of the buffer.
      channels_Kd: for int8, see `key_channels`.
    """
    if dtype != jnp.int8:
        return jnp.zeros(shape, dtype, out_sharding=sharding.cache)
    values, scales, _ = _specs(sharding)
    return Int8Rows(
        jnp.zeros(shape, dtype, out_sharding=values),
        jnp.zeros(shape[:-1], jnp.float32, out_sharding=scales),
        channels_Kd,
    )


def specs(buffer: Buffer, sharding: Sharding) -> Any:
    """The buffer with a PartitionSpec in place of each array."""
    if not isinstance(buffer, Int8Rows):
        return sharding.cache
    values, scales, channels = _specs(sharding)
    return Int8Rows(values, scales, None if buffer.channels_Kd is None else channels)


def _specs(sharding: Sharding) -> tuple[Any, Any, Any]:
    """Of the numbers, the scales and the factors of channels."""
    return sharding.cache, P(*sharding.cache[:3]), P(sharding.cache[1], None)


def stored(buffer: Int8Rows, new_BKTd: jax.Array, slot: jax.Array) -> Int8Rows:
    """The buffer with new vectors from a slot on. Runs on local arrays."""
    new = buffer.quantized(new_BKTd)

    def updated(old: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)

    return dataclasses.replace(
        buffer,
        values_BKSd=updated(buffer.values_BKSd, new.values_BKSd),
        scales_BKS=updated(buffer.scales_BKS, new.scales_BKS),
    )


def kv_bytes_per_token(config: ModelConfig, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of a cache for one token, with the scales that int8 has.

    Args:
      config: the architecture.
      dtype: of the cache.
    """
    plain = config.kv_bytes_per_token(jnp.dtype(dtype).itemsize)
    scales = 2 * config.num_layers * config.num_kv_heads * jnp.dtype(jnp.float32).itemsize
    return plain + (scales if jnp.dtype(dtype) == jnp.int8 else 0)


def key_channels(bias_Kd: jax.Array) -> jax.Array:
    """Factors that keep the key bias from using up the 8 bits: float32 powers of two, at least 1, [K, d].

    The bias of some components of Qwen2.5's keys is many times as large as everything else in a key. With one scale for
    a vector they would set the scale, and the other components would be rounded to few bits. Divided by these factors,
    no component is above the others because of its bias. RoPE mixes the components i and i + d / 2, so that such a pair
    has one factor, and the factors of a rotated key are those of a key. Queries are multiplied by them, which is exact.

    The rounding error of a logit is proportional to the largest component after division times the norm of the factors
    (for queries without outliers), which is smallest for factors in proportion to the components.

    Args:
      bias_Kd: bias of the key projection.

    Source: SmoothAttention in QServe (Lin et al. 2024, arXiv:2405.04532), section 4.2, here from the bias alone.
    """
    left, right = jnp.split(bias_Kd.astype(jnp.float32), 2, axis=-1)
    pair = jnp.sqrt(left * left + right * right) / _TYPICAL
    factor = jnp.exp2(jnp.round(jnp.log2(jnp.maximum(pair, 1.0))))
    return jnp.concatenate([factor, factor], axis=-1)


def key_biases(params: Any, config: ModelConfig, sharding: Sharding) -> tuple[jax.Array, ...]:
    """The bias [K, d] of the key projection of each layer; K counts the heads of the cache.

    Args:
      params: unstacked, in either layout of the projections.
      config: the architecture.
      sharding: of the current mesh.
    """
    spec, K, n = P(sharding.cache[1], None), sharding.kv_heads, sharding.tensor

    def of_layer(attention: Any) -> jax.Array:
        if "qkv" in attention:
            first = config.num_heads // n
            bias = attention["qkv"]["bias"][:, first : first + K // n]
            return bias.reshape(K, config.head_dim, out_sharding=spec)
        every_head = jax.reshard(attention["k"]["bias"], P(None, None))
        return jax.reshard(jnp.repeat(every_head, K // config.num_kv_heads, axis=0), spec)

    return tuple(of_layer(layer["attention"]) for layer in params["layers"])
