"""Keys or values of a cache in 8 bits: one float32 scale for each vector, symmetric around zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

LARGEST = 127
"""The magnitude that the largest component of a vector is rounded to. -128 is not used."""
_SMALLEST_SCALE = 1e-30
"""The scale of a vector of zeros: that of everything that was written is positive."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values_BKSd", "scales_BKS", "channels_Kd"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Vectors of a head-major cache: int8 numbers times a scale for each slot and head.

    A scale for each vector needs nothing of its neighbours: a token is quantised once, when it is written, and its bits
    do not depend on how a text was cut into chunks. A scale for a page of tokens would have to grow as the page fills,
    and every growth would round the tokens before once more. The price is 4 bytes beside 128.

    Attributes:
      values_BKSd: int8.
      scales_BKS: float32. A vector that was never written has scale 0.
      channels_Kd: float32 powers of two that the components of all vectors of a head are multiplied by, or None for 1;
        see `qwen_jax.attention.quantized_cache.key_channels`.
    """

    values_BKSd: jax.Array
    scales_BKS: jax.Array
    channels_Kd: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors, [B, K, S, d]."""
        return self.values_BKSd.shape

    @property
    def dtype(self) -> jnp.dtype:
        """That of the numbers, int8."""
        return self.values_BKSd.dtype

    def quantized(self, x_BKTd: jax.Array) -> "Int8Rows":
        """New vectors in this form: each component is rounded by at most half its vector's scale times its channel.

        Args:
          x_BKTd: of any floating dtype; all finite.
        """
        x = x_BKTd.astype(jnp.float32)
        if self.channels_Kd is not None:
            x = x / self.channels_Kd[:, None]
        scales = jnp.maximum(jnp.abs(x).max(axis=-1) / LARGEST, _SMALLEST_SCALE)
        rounded = jnp.clip(jnp.round(x / scales[..., None]), -LARGEST, LARGEST)
        return Int8Rows(rounded.astype(jnp.int8), scales, self.channels_Kd)

    def dequantized(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The vectors in another dtype, [B, K, S, d]. The products are computed in float32."""
        x = self.values_BKSd.astype(jnp.float32) * self.scales_BKS[..., None]
        return (x if self.channels_Kd is None else x * self.channels_Kd[:, None]).astype(dtype)
