"""Caches in 8 bits, contiguous and paged: how buffers and pages are made, written and sharded, and what they take.

A cache with dtype int8 or float8_e4m3fn has them. Keys are quantised after the rotation, in float32. Every query reads
the rounded keys and values, a prompt's own ones too: a text does not depend on how it is cut into chunks, or on which
part of it was in the cache before.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels import QuantizedRows
from qwen_jax.kernels.decode.quantized import LARGEST
from qwen_jax.parallel.sharding import Sharding

Buffer = jax.Array | QuantizedRows
"""Keys or values of a layer, in the compute dtype or in 8 bits: a buffer [B, K, S, d], or pages [N, K, P, d]."""
KVDtype = Literal["auto", "int8", "fp8"]
"""What holds keys and values: the compute dtype, or 8 bits."""
_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}
_TYPICAL = 8.0
"""The magnitude up to which the bias of a key's component is no outlier: about the largest component that a key has
without its bias. Too large a value costs little: the outliers then remain somewhat above the other components."""


def check_kv_dtype(kv_dtype: str) -> None:
    """Raises InputError for something else than a `KVDtype`."""
    if kv_dtype != "auto" and kv_dtype not in _DTYPES:
        raise InputError(f"Expected kv_dtype auto (the compute dtype), {' or '.join(_DTYPES)}; got {kv_dtype!r}.")


def cache_dtype(kv_dtype: str, compute: str) -> jnp.dtype:
    """The dtype of a cache's keys and values.

    Args:
      kv_dtype: a `KVDtype`.
      compute: the compute dtype.
    """
    return jnp.dtype(_DTYPES.get(kv_dtype, compute))


def in_8_bits(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a cache of this dtype has scales."""
    return jnp.dtype(dtype).name in LARGEST


def empty(shape: tuple[int, ...], sharding: Sharding, dtype: jnp.dtype, channels_Kd: jax.Array | None = None) -> Buffer:
    """The buffer or the pages of one layer for keys or for values: an array, or `QuantizedRows` for 8 bits.

    Args:
      shape: [B, K, S, d] or [N, K, P, d].
      sharding: of the current mesh.
      dtype: of the cache.
      channels_Kd: for 8 bits, see `key_channels`.

    Raises:
      InputError: a dtype that holds no keys and values.
    """
    if not in_8_bits(dtype):
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
            raise InputError(f"Expected a cache of bfloat16, float16, float32, {' or '.join(LARGEST)}; got {dtype}.")
        return jnp.zeros(shape, dtype, out_sharding=sharding.cache)
    values, scales, _ = _specs(sharding)
    return QuantizedRows(
        jnp.zeros(shape, dtype, out_sharding=values),
        jnp.zeros(shape[:-1], jnp.float32, out_sharding=scales),
        channels_Kd,
    )


def specs(buffer: Buffer, sharding: Sharding) -> Any:
    """The buffer with a PartitionSpec in place of each array."""
    if not isinstance(buffer, QuantizedRows):
        return sharding.cache
    values, scales, channels = _specs(sharding)
    return QuantizedRows(values, scales, None if buffer.channels_Kd is None else channels)


def _specs(sharding: Sharding) -> tuple[Any, Any, Any]:
    """Of the numbers, the scales and the factors of channels."""
    return sharding.cache, P(*sharding.cache[:3]), P(sharding.cache[1], None)


def as_read(buffer: Buffer, new_BTKd: jax.Array) -> jax.Array:
    """New keys or values as they will be read: rounded where the buffer is in 8 bits. Runs on local arrays."""
    if not isinstance(buffer, QuantizedRows):
        return new_BTKd
    return buffer.quantized(new_BTKd.swapaxes(1, 2)).dequantized(new_BTKd.dtype).swapaxes(1, 2)


def stored(buffer: QuantizedRows, new_BKTd: jax.Array, slot: jax.Array) -> QuantizedRows:
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
    """Bytes of a cache for one token, with the scales that 8 bits have.

    Args:
      config: the architecture.
      dtype: of the cache.
    """
    plain = config.kv_bytes_per_token(jnp.dtype(dtype).itemsize)
    scales = 2 * config.num_layers * config.num_kv_heads * jnp.dtype(jnp.float32).itemsize
    return plain + (scales if in_8_bits(dtype) else 0)


def key_channels(bias_Kd: jax.Array) -> jax.Array:
    """Factors that keep the key bias from using up the 8 bits: float32 powers of two, at least 1, [K, d].

    The bias of some components of Qwen2.5's keys is many times as large as everything else in a key. With one scale for
    a vector they would set the scale, and the other components would be rounded to few bits. Divided by these factors,
    no component is above the others because of its bias. RoPE mixes the components i and i + d / 2, so that such a pair
    has one factor, and the factors of a rotated key are those of a key. Queries are multiplied by them, which is exact.

    int8 needs them. Numbers of float8_e4m3fn have exponents of their own: there the factors only keep small components
    away from zero, and a large one is rounded by up to a sixteenth of itself with or without them.

    The rounding error of a logit in int8 is proportional to the largest component after division times the norm of the
    factors (for queries without outliers), which is smallest for factors in proportion to the components.

    Args:
      bias_Kd: bias of the key projection.

    Source: SmoothAttention in QServe (Lin et al. 2024, arXiv:2405.04532), section 4.2, here from the bias alone.
    """
    left, right = jnp.split(bias_Kd.astype(jnp.float32), 2, axis=-1)
    pair = jnp.sqrt(left * left + right * right) / _TYPICAL
    factor = jnp.exp2(jnp.round(jnp.log2(jnp.maximum(pair, 1.0))))
    return jnp.concatenate([factor, factor], axis=-1)


def channels_of_keys(params: Any, config: ModelConfig, sharding: Sharding) -> tuple[jax.Array, ...]:
    """`key_channels` of each layer; as for `key_biases`."""
    return tuple(map(key_channels, key_biases(params, config, sharding)))


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
