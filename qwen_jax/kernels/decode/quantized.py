"""Keys or values of a cache in 8 bits: one float32 scale for each vector, symmetric around zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""For each dtype of 8 bits, the magnitude that the largest component of a vector has after division by the scale. That
of float8_e4m3fn is its largest number; int8's -128 is not used."""
_SMALLEST_SCALE = 1e-30
"""The scale of a vector of zeros: that of everything that was written is positive."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values_BKSd", "scales_BKS", "channels_Kd"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Vectors of a head-major cache: numbers of 8 bits times a scale for each slot and head.

    A scale for each vector needs nothing of its neighbours: a token is quantised once, when it is written, and its bits
    do not depend on how a text was cut into chunks. A scale for a page of tokens would have to grow as the page fills,
    and every growth would round the tokens before once more. The price is 4 bytes beside 128.

    The same holds pages of a paged cache: B is then the number of the page, and S the place in it.

    Attributes:
      values_BKSd: int8 or float8_e4m3fn.
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
        """That of the numbers, int8 or float8_e4m3fn."""
        return self.values_BKSd.dtype

    def quantized(self, x_BKTd: jax.Array) -> "QuantizedRows":
        """New vectors in this form. With s a vector's scale, a component x is rounded by at most

        - int8: s / 2,
        - float8_e4m3fn, with 3 bits after the leading one and steps of 2^-9 near zero: max(|x| / 16, s / 1024),

        both times the channel's factor for the part that is in units of s. A vector that is not finite is read back as
        NaN in all components.

        Args:
          x_BKTd: of any floating dtype.
        """
        x, largest = x_BKTd.astype(jnp.float32), LARGEST[self.dtype.name]
        if self.channels_Kd is not None:
            x = x / self.channels_Kd[:, None]
        scales = jnp.maximum(jnp.abs(x).max(axis=-1) / largest, _SMALLEST_SCALE)
        x = x / scales[..., None]
        # Both casts are of numbers within the range; that to float8 rounds to the nearest, ties to even.
        rounded = jnp.clip(jnp.round(x) if self.dtype == jnp.int8 else x, -largest, largest)
        return QuantizedRows(rounded.astype(self.dtype), scales, self.channels_Kd)

    def dequantized(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The vectors in another dtype, [B, K, S, d]. The products are computed in float32."""
        x = self.values_BKSd.astype(jnp.float32) * self.scales_BKS[..., None]
        return (x if self.channels_Kd is None else x * self.channels_Kd[:, None]).astype(dtype)
