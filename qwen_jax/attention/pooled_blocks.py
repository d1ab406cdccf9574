"""Pooled-block selection: which blocks of 128 keys each tile of 128 queries visits.

A block is scored for a tile by the products of all queries of the tile with the mean of its keys. A block that is not
visited may count as 128 keys that equal its mean, so that its share of the softmax is not lost.

Source: FlashPrefill V2 (arXiv:2608.19758).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import kernels, platform
from qwen_jax.attention import sparse_selection as selection
from qwen_jax.attention.sparse_parts import Bounds
from qwen_jax.attention.sparse_patterns import PooledBlocks
from qwen_jax.kernels.attention.lists import NOWHERE
from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.kernels.softmax import LOG2E, LOW, LOWEST
from qwen_jax.kernels.without_gradient import without_gradient

BLOCK = 128
"""Keys of a block, and queries of a tile."""

# Float32 logits that exist at once, in bytes, and blocks of one product.
_BYTES, _SECTION = 2**29, 1024


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a chunk visits.

    Attributes:
      lists: blocks for each tile.
      places_BHNJ: int32, the first key of each block that is not visited though all queries of the tile see all of
        it; others NOWHERE. Places for `kernels.column_attention` over means.
      skipped_BH: float32, the number of blocks in `places_BHNJ` that are not NOWHERE.
      blocks_cut_BH: int32, blocks above the threshold that exceed the capacity, over all tiles.
    """

    lists: kernels.KeyLists
    places_BHNJ: jax.Array
    skipped_BH: jax.Array
    blocks_cut_BH: jax.Array


@dataclasses.dataclass(frozen=True)
class DenseTiles:
    """The tiles of a chunk that attend to all keys.

    Attributes:
      is_dense_N: bool, for each tile.
      first: int32 scalar, a row; dense tiles are among the `rows` rows from it on.
      rows: how many.
    """

    is_dense_N: jax.Array
    first: jax.Array
    rows: int


def dense_tiles(rows: int, last: int, end: jax.Array) -> DenseTiles:
    """The tiles that hold some of the last queries of a prompt.

    Args:
      rows: of a chunk.
      last: how many queries.
      end: int32 scalar, the row at which the prompt ends; it may lie beyond the chunk.
    """
    N = rows // BLOCK
    window = min(-(-last // BLOCK) + 1, N)
    tile, begin = jnp.arange(N, dtype=jnp.int32), jnp.maximum(end - last, 0) // BLOCK
    first = jnp.minimum(begin, N - window)
    return DenseTiles((begin <= tile) & (tile * BLOCK < end), first * BLOCK, window * BLOCK)


def block_means(x_BKSd: jax.Array) -> jax.Array:
    """Means of keys or values over blocks of 128, [B, K, S / 128, d] in the dtype of the argument.

    They can be kept beside a cache: those of a chunk are the means of its new keys.
    """
    B, K, S, d = x_BKSd.shape
    return x_BKSd.reshape(B, K, S // BLOCK, BLOCK, d).mean(axis=3, dtype=jnp.float32).astype(x_BKSd.dtype)


def block_scores(
    queries: Sequence[jax.Array],
    k_mean_BKJd: jax.Array,
    first_PBN: jax.Array,
    end_PBN: jax.Array,
    *,
    scale: float,
    implementation: str = "auto",
) -> jax.Array:
    """Scores of blocks for tiles: the sum over the queries of exp(logit - the largest logit of the query).

    Args:
      queries: [B, N r, H, d] for each part of the keys: r queries of each of N tiles.
      k_mean_BKJd: means of the keys of each block.
      first_PBN, end_PBN: int32, the blocks first <= J < end are scored by the queries of that part. The ranges of the
        parts are disjoint.
      scale: multiplies the logits; positive.
      implementation: "auto", "gpu" or "xla". The kernel for GPUs has no gradient.

    Returns:
      float32 [B, H, N, J], 0 for blocks in no range.

    Raises:
      InputError: the implementation does not support the call.
    """
    rows, d, dtype = queries[0].shape[1] // first_PBN.shape[2], queries[0].shape[3], queries[0].dtype
    candidates = [
        Candidate(
            "gpu",
            unmet({
                "a Hopper GPU": platform.on_hopper(),
                "bfloat16 or float16": dtype.name in ("bfloat16", "float16"),
                "means of the dtype of the queries": k_mean_BKJd.dtype == dtype,
                "head_dim 64 or 128": d in (64, 128),
                "8, 16, 32, 64 or 128 queries of a tile": rows in (8, 16, 32, 64, 128),
            }),
        ),
        Candidate("xla"),
    ]  # fmt: skip
    arguments = f"{dtype}, head_dim {d}, {rows} queries of a tile"
    if select(candidates, implementation, "block scores", arguments) == "xla":
        return _scores_by_xla(queries, k_mean_BKJd, first_PBN, end_PBN, scale=scale)
    # Pallas is imported where it is used, because that takes seconds.
    from qwen_jax.kernels.attention import block_scores_gpu

    args = tuple(queries), k_mean_BKJd, first_PBN, end_PBN
    message = "Block scores by a kernel have no gradient. Use implementation='xla'."
    return without_gradient(lambda *args: block_scores_gpu.scores(*args, scale), args, message)


def _scores_by_xla(
    queries: Sequence[jax.Array], k_mean_BKJd: jax.Array, first_PBN: jax.Array, end_PBN: jax.Array, *, scale: float
) -> jax.Array:
    """`block_scores` by operations of XLA."""
    (B, T, H, d), (K, J) = queries[0].shape, k_mean_BKJd.shape[1:3]
    N, P, W = first_PBN.shape[2], len(queries), min(J, _SECTION)
    rows = T // N
    # A few tiles at a time, because the logits of all queries with all blocks would be as large as the cache.
    most = max(_BYTES // (4 * B * H * rows * J), 1)
    tiles = max(n for n in range(1, min(most, N) + 1) if N % n == 0)
    sections = -(-J // W)
    q_PBTKGd = jnp.stack([q.reshape(B, T, K, H // K, d) for q in queries])

    def group(first_tile: jax.Array) -> jax.Array:
        q = lax.dynamic_slice_in_dim(q_PBTKGd, first_tile * rows, tiles * rows, axis=2)
        first, end = (lax.dynamic_slice_in_dim(x, first_tile, tiles, axis=2) for x in (first_PBN, end_PBN))
        # Only the sections that some tile sees wholly in a part are multiplied, with the queries of this part.
        low = jnp.where(first < end, first, J).min(axis=(1, 2))[:, None]
        high = jnp.where(first < end, end, 0).max(axis=(1, 2))[:, None]
        begins = jnp.arange(sections, dtype=jnp.int32) * W
        pairs, count = selection.places(((low < begins + W) & (begins < high)).reshape(1, -1), P * sections)

        def product(i: jax.Array, logits: jax.Array) -> jax.Array:
            p, begin = pairs[0, i] // sections, jnp.minimum(pairs[0, i] % sections * W, J - W)
            k_BKWd = lax.dynamic_slice_in_dim(k_mean_BKJd, begin, W, axis=2)
            new = einsum_f32("BTKGd,BKWd->BKGTW", q[p], k_BKWd) * (scale * LOG2E)
            block = begin + jnp.arange(W, dtype=jnp.int32)
            scored = (first[p][..., None] <= block) & (block < end[p][..., None])
            scored = jnp.repeat(scored, rows, axis=1)[:, None, None]
            now = lax.dynamic_slice_in_dim(logits, begin, W, axis=4)
            return lax.dynamic_update_slice_in_dim(logits, jnp.where(scored, new, now), begin, axis=4)

        logits = jnp.full((B, K, H // K, tiles * rows, J), LOWEST, jnp.float32)
        logits = selection.varying(logits, q, k_mean_BKJd, first, end)
        logits = lax.fori_loop(0, count[0], product, logits)
        powers = jnp.where(logits > LOW, jnp.exp2(logits - logits.max(axis=4, keepdims=True)), 0.0)
        return powers.reshape(B, H, tiles, rows, J).sum(axis=3)

    scores = lax.map(group, jnp.arange(0, N, tiles, dtype=jnp.int32))
    return jnp.moveaxis(scores, 0, 2).reshape(B, H, N, J)


def choose(
    queries: Sequence[jax.Array],
    k_mean_BKJd: jax.Array,
    bounds: Bounds,
    pattern: PooledBlocks,
    *,
    scale: float,
    max_blocks: int,
    implementation: str = "auto",
    dense_N: jax.Array | None = None,
) -> Selection:
    """The blocks that each tile visits.

    Blocks that all queries of a tile see, in one part of the keys, are chosen by their score, or because they belong
    to the sink or the window. Blocks that are seen by some of the queries only, or in two parts, are always visited.

    Args:
      queries: [B, T, H, d] for each part of the keys.
      k_mean_BKJd: means of the keys of each block.
      bounds: of the rows, and of tiles of 128.
      pattern: threshold, sink and window.
      scale: multiplies the logits.
      max_blocks: capacity of a list. Where more blocks are to be visited, those with the greatest scores are kept.
      implementation: of `block_scores`.
      dense_N: bool, tiles that the caller attends with to all keys. Their lists are empty.
    """
    B, _, H, _ = queries[0].shape
    N, J = bounds.start_PBN.shape[2], k_mean_BKJd.shape[2]
    first_PBN, end_PBN = -(-bounds.whole_start_PBN // BLOCK), bounds.whole_end_PBN // BLOCK
    scoring = [q[:, :: pattern.stride] for q in queries]
    scores_BHNJ = block_scores(scoring, k_mean_BKJd, first_PBN, end_PBN, scale=scale, implementation=implementation)
    begin = jnp.arange(J, dtype=jnp.int32) * BLOCK
    low_BN1, high_BN1 = (x[..., None] for x in bounds.union())
    whole_BNJ = ((first_PBN[..., None] * BLOCK <= begin) & (begin < end_PBN[..., None] * BLOCK)).any(axis=0)
    visible_BNJ = (low_BN1 < begin + BLOCK) & (begin < high_BN1)
    if dense_N is not None:
        visible_BNJ &= ~dense_N[:, None]
    # The first query of a tile has the earliest window.
    first_end_BN1 = bounds.end_BT[:, ::BLOCK, None]
    forced_BNJ = (begin < low_BN1 + pattern.sink) | (first_end_BN1 - pattern.window < begin + BLOCK) | ~whole_BNJ
    enough_BHNJ = scores_BHNJ >= pattern.threshold * scores_BHNJ.max(axis=3, keepdims=True)
    keep = (visible_BNJ[:, None] & (forced_BNJ[:, None] | enough_BHNJ)).reshape(B * H * N, J)
    # More blocks than the lists can hold.
    count_R = keep.sum(axis=1, dtype=jnp.int32)
    kept_R = jnp.minimum(count_R, max_blocks)

    def greatest() -> jax.Array:
        forced = jnp.where(forced_BNJ[:, None], jnp.inf, scores_BHNJ).reshape(keep.shape)
        return selection.top_mask(selection.order_keys(forced, keep), kept_R)

    if max_blocks < J:
        keep = lax.cond((count_R > max_blocks).any(), greatest, lambda: keep)
    block_RL, _ = selection.places(keep, max_blocks)
    lists = kernels.KeyLists(
        (block_RL * BLOCK).reshape(B, H, N, max_blocks), kept_R.reshape(B, H, N), rows=BLOCK, size=BLOCK
    )
    skipped = (visible_BNJ & whole_BNJ)[:, None] & ~keep.reshape(B, H, N, J)
    return Selection(
        lists,
        jnp.where(skipped, begin, NOWHERE),
        skipped.sum(axis=(2, 3), dtype=jnp.float32),
        (count_R - kept_R).reshape(B, H, N).sum(axis=2),
    )
