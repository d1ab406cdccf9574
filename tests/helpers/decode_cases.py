"""The attention step of decoding in float32 and float64, and the shapes that it is checked with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import kernels
from qwen_jax.attention.paged_cache import PagedLayer
from qwen_jax.attention.rope import rotate
from qwen_jax.kernels import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, the slot of the new token, and the first slot of each row (random where None)."""

    B: int
    H: int
    K: int
    d: int
    S: int
    slot: int
    start: int | None = None


CASES = (
    Case(1, 28, 4, 128, 640, 600, 0),  # 7B
    Case(1, 28, 4, 128, 640, 0, 0),  # nothing in the cache
    Case(1, 28, 4, 128, 640, 512, 0),  # the new token opens a tile
    Case(1, 28, 4, 128, 640, 639, 37),  # the last slot
    Case(5, 28, 4, 128, 640, 577),
    Case(8, 28, 4, 128, 640, 577),
    Case(64, 28, 4, 128, 640, 600),
    Case(1, 14, 2, 64, 640, 600, 0),  # 0.5B
    Case(1, 14, 2, 64, 640, 1, 1),  # a row that sees only its new token
    Case(64, 14, 2, 64, 640, 600),
    Case(256, 14, 2, 64, 128, 100),
    Case(3, 12, 2, 128, 256, 200),  # 1.5B
    Case(2, 16, 2, 128, 256, 255),  # 3B
    Case(9, 40, 8, 128, 192, 130),  # 14B and 32B
    Case(2, 64, 8, 128, 128, 100),  # 72B
    Case(1, 5, 1, 128, 640, 300),  # 14B, one shard of eight
    Case(2, 7, 1, 64, 640, 300),
    Case(4, 2, 2, 64, 128, 77),  # no grouping
    Case(1, 28, 4, 128, 32768, 32000, 100),  # clusters that XLA merges
    Case(1, 28, 4, 128, 32768, 100, 0),
    Case(2, 14, 2, 64, 32768, 32767),
    Case(1, 12, 2, 128, 8192, 8191, 3),
)


def inputs(case: Case, seed: int = 0) -> tuple[jax.Array, ...]:
    """Arguments of `decode_step`. Slots that no row may read, including that of the new token, are NaN."""
    c, rng = case, np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    R = c.H + 2 * c.K
    angle = rng.uniform(0, 2 * np.pi, (c.B, c.d // 2))
    start = rng.integers(0, c.slot + 1, c.B) if c.start is None else np.full(c.B, c.start)
    j = np.arange(c.S)
    dead = ((j < start[:, None]) | (j >= c.slot))[:, None, :, None]
    keys, values = (jnp.where(dead, jnp.bfloat16(jnp.nan), normal(c.B, c.K, c.S, c.d)) for _ in range(2))
    cos, sin = (jnp.asarray(f(angle), jnp.bfloat16) for f in (np.cos, np.sin))
    return normal(c.B, R, c.d), normal(R, c.d), cos, sin, keys, values, jnp.asarray(start, jnp.int32), jnp.int32(c.slot)


def expected(args: tuple[jax.Array, ...], scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output, and the new token's key and value, in float64 from the same bfloat16 numbers."""
    qkv, bias, cos, sin, keys, values = (np.asarray(x, np.float64) for x in args[:6])
    start, slot = np.asarray(args[6]), int(args[7])
    (B, R, d), K = qkv.shape, keys.shape[1]
    H = R - 2 * K

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)

    x = rounded(qkv + bias)
    left, right = np.split(x[:, : H + K], 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    turned = rounded(np.concatenate([left * c - right * s, right * c + left * s], axis=-1))
    q, k, v = turned[:, :H].reshape(B, K, H // K, d), turned[:, H:], x[:, H + K :]
    out = np.zeros((B, H, d))
    for b in range(B):
        seen = slice(int(start[b]), slot)
        all_k, all_v = (np.concatenate([y[b, :, seen], new[b][:, None]], axis=1) for y, new in ((keys, k), (values, v)))
        logits = np.einsum("kgd,ksd->kgs", q[b], all_k) * scale
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out[b] = np.einsum("kgs,ksd->kgd", weights / weights.sum(axis=-1, keepdims=True), all_v).reshape(H, d)
    return out, k, v


def _rotated(qkv: jax.Array, bias: jax.Array, cos: jax.Array, sin: jax.Array, K: int) -> tuple[jax.Array, ...]:
    """q, k and v of the new token, [B, 1, heads, d]."""
    H = qkv.shape[1] - 2 * K
    q, k, v = jnp.split((qkv + bias)[:, None], [H, H + K], axis=2)
    tables = cos[:, None, None], sin[:, None, None]
    return rotate(q, tables), rotate(k, tables), v


def plain(
    qkv: jax.Array, bias: jax.Array, cos: jax.Array, sin: jax.Array, keys: jax.Array, values: jax.Array,
    start: jax.Array, slot: jax.Array, *, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`decode_step` from the functions that the model uses without it."""
    q, k, v = _rotated(qkv, bias, cos, sin, keys.shape[1])
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(cache, new.swapaxes(1, 2), slot, axis=2)
        for cache, new in ((keys, k), (values, v))
    )
    end = jnp.full_like(start, slot + 1)
    # A product with a weight of zero must be zero even where the cache holds NaN.
    j = jnp.arange(keys.shape[2])
    seen = ((j >= start[:, None]) & (j < end[:, None]))[:, None, :, None]
    clean = (jnp.where(seen, cache, 0) for cache in (keys, values))
    return reference.attention(q, *clean, start[:, None], end[:, None], scale=scale)[0][:, 0], keys, values


def paged_plain(
    qkv: jax.Array, bias: jax.Array, cos: jax.Array, sin: jax.Array, k_pages: jax.Array, v_pages: jax.Array,
    start: jax.Array, length: jax.Array, new: jax.Array, table: jax.Array, *, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`paged_decode_step` from the functions that the model uses without it; pages must be finite."""
    q, k, v = _rotated(qkv, bias, cos, sin, k_pages.shape[1])
    layer = PagedLayer(k_pages, v_pages, table, length, new, fresh=False).write(k, v)
    mask = kernels.cache_mask(start, length, 1)
    out, _ = layer.attend(q, mask, scale=scale, implementation="reference")
    return out[:, 0], layer.k_NKPd, layer.v_NKPd
