"""Reference implementation of sparse attention, which every kernel must equal. Its masks are dense."""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.attention.lists import KeyLists
from qwen_jax.kernels.reference import dense_mask, masked_attention


def sparse_attention(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, start_BT: jax.Array, end_BT: jax.Array, lists: KeyLists,
    *, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attention over the listed pieces of the keys; see `kernels.sparse_attention`."""
    T, S = q_BTHd.shape[1], k_BKSd.shape[2]
    seen_BHTS = jnp.repeat(listed(lists, S), lists.rows, axis=2)[:, :, :T]
    return masked_attention(q_BTHd, k_BKSd, v_BKSd, seen_BHTS & dense_mask(start_BT, end_BT, S)[:, None], scale=scale)


def column_attention(
    q_BTHd: jax.Array, k_BJCd: jax.Array, v_BJCd: jax.Array, start_BT: jax.Array, end_BT: jax.Array,
    places_BHNC: jax.Array, *, scale: float, bias: float, rows: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attention over gathered columns; see `kernels.column_attention`."""
    places_BHTC = jnp.repeat(places_BHNC, rows, axis=2)[:, :, : q_BTHd.shape[1]]
    start, end = start_BT[:, None, :, None], end_BT[:, None, :, None]
    seen_BHTC = (start <= places_BHTC) & (places_BHTC < end)
    return masked_attention(q_BTHd, k_BJCd, v_BJCd, seen_BHTC, scale=scale, bias=bias)


def listed(lists: KeyLists, S: int) -> jax.Array:
    """The keys that the pieces of each list cover, as a bool array [B, H, N, S]."""
    starts, counts = lists.starts_BHNL, lists.counts_BHN
    counted = (jnp.arange(starts.shape[3]) < counts[..., None]).astype(jnp.int32)
    # One more where a piece begins and one less where it ends: the running sum is the number of pieces at a key. What
    # reaches beyond the keys begins or ends at S, which is cut off.
    b, h, n = (x[..., None] for x in jnp.indices(counts.shape, sparse=True))
    edges = jnp.zeros((*counts.shape, S + 1), jnp.int32)
    edges = edges.at[b, h, n, jnp.clip(starts, 0, S)].add(counted)
    edges = edges.at[b, h, n, jnp.clip(starts + lists.size, 0, S)].add(-counted)
    return jnp.cumsum(edges, axis=3)[..., :S] > 0
