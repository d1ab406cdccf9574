"""Vertical-slash selection: which columns and diagonals of the attention matrix a chunk of queries visits.

The last rows of a chunk are attended to in full. Sums of their probabilities along columns (a key that all queries see)
and along diagonals ("slashes", keys at one distance) rank the columns and slashes of each head.

In a tile of queries the slash at distance o needs, counted back from the last row of the tile, the keys o to
o + rows - 1, whichever tile it is. So slashes become one list of pieces for each head, relative to the tile. Columns
are gathered once for each head; where a piece of a tile contains a column, the column is switched off for the tile.

Source: Jiang et al. 2024 (MInference, arXiv:2407.02490); Qwen2.5-1M report (arXiv:2501.15383) section 5.2.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import kernels, platform
from qwen_jax.attention import sparse_selection as selection
from qwen_jax.attention.sparse_parts import Bounds
from qwen_jax.kernels.attention.lists import NOWHERE
from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.kernels.without_gradient import without_gradient

FIRST_COLUMNS, NEAR_SLASHES = 30, 100
"""The first columns and the nearest slashes, which are chosen before all others."""

# Float32 logits that exist at once, in bytes: they stay in the second-level cache of a GPU.
_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of `kernels.KeyLists`.

    Attributes:
      rows: queries of a tile.
      size: keys of a piece.
      step: pieces start at multiples of this, which divides `rows` and `size`.
    """

    rows: int = 128
    size: int = 128
    step: int = 128


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a chunk visits.

    Attributes:
      lists: pieces that contain the chosen slashes.
      places_BHNC: int32, for each tile the places of the columns that it visits outside the pieces; others NOWHERE.
      columns_BHC: int32, the chosen columns, ascending, then S.
      visited_BH: float32, pairs of queries and keys in pieces and columns that the mask lets be seen.
      pieces_cut_BH, columns_cut_BH: int32, what the budgets ask for beyond the capacities.
    """

    lists: kernels.KeyLists
    places_BHNC: jax.Array
    columns_BHC: jax.Array
    visited_BH: jax.Array
    pieces_cut_BH: jax.Array
    columns_cut_BH: jax.Array


def line_scores(
    queries: Sequence[jax.Array],
    masks: Sequence[kernels.Mask],
    lse_BHR: jax.Array,
    k_BKSd: jax.Array,
    *,
    scale: float,
    implementation: kernels.Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Sums of the probe rows' probabilities along columns and diagonals.

    Args:
      queries: the R probe rows, [B, R, H, d] for each part of the keys; consecutive queries.
      masks: of the probe rows, for each part.
      lse_BHR: log-sum-exp of these queries over all parts.
      k_BKSd: the cache.
      scale: multiplies the logits.
      implementation: "auto", "gpu" or "reference". The kernel has no gradient.

    Returns:
      float32 [B, H, S], sums over columns; and float32 [B, H, S + R - 1], where element j sums the diagonal on which
      the last probe row sees key j.

    Raises:
      InputError: the implementation does not support the call.
    """
    (B, R, H, d), (K, S) = queries[0].shape, k_BKSd.shape[1:3]
    if _select_lines(implementation, queries[0], k_BKSd) == "gpu":
        from qwen_jax.kernels.attention import probe_gpu

        parts = [
            without_gradient(
                lambda *args: probe_gpu.line_sums(*args, scale),
                (q, k_BKSd, mask.k_start_BT, mask.k_end_BT, lse_BHR),
                "Sums of probe rows by a kernel have no gradient. Use implementation='reference'.",
            )
            for q, mask in zip(queries, masks, strict=True)
        ]
        columns, diagonals = (sum(sums[1:], sums[0]) for sums in zip(*parts, strict=True))
        return columns, diagonals
    # Blocks of keys, so that the probabilities of all rows and heads never exist at once. Only blocks that a part sees
    # are computed, once for each such part.
    W = min(S, max(_BYTES // (4 * B * H * R) // 1024 * 1024, 1024))
    blocks = -(-S // W)
    q_PBRKGd = jnp.stack([q.reshape(B, R, K, H // K, d) for q in queries])
    start_PBR, end_PBR = jnp.stack([m.k_start_BT for m in masks]), jnp.stack([m.k_end_BT for m in masks])
    sees = start_PBR < end_PBR
    low_P1 = jnp.where(sees, start_PBR, S).min(axis=(1, 2))[:, None]
    high_P1 = jnp.where(sees, end_PBR, 0).max(axis=(1, 2))[:, None]
    first_W = jnp.arange(blocks, dtype=jnp.int32) * W
    pairs, count = selection.places(
        ((low_P1 < first_W + W) & (first_W < high_P1)).reshape(1, -1), len(queries) * blocks
    )

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        p, block = pairs[0, i] // blocks, pairs[0, i] % blocks
        # The last block begins earlier where S is no multiple of W, and counts only its new keys.
        first = jnp.minimum(block * W, S - W)
        k_BKWd = lax.dynamic_slice_in_dim(k_BKSd, first, W, axis=2)
        logits = einsum_f32("BRKGd,BKWd->BKGRW", q_PBRKGd[p], k_BKWd).reshape(B, H, R, W) * scale
        j = first + jnp.arange(W, dtype=jnp.int32)
        seen = (start_PBR[p][:, :, None] <= j) & (j < end_PBR[p][:, :, None]) & (j >= block * W)
        weights = jnp.where(seen[:, None], jnp.exp(logits - lse_BHR[..., None]), 0.0)
        # Row r is shifted by R - 1 - r, which makes columns of diagonals. Slices add up without an array between.
        padded = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (R - 1, R - 1)))
        diagonals = sum((padded[:, :, r, r : r + W + R - 1] for r in range(1, R)), padded[:, :, 0, : W + R - 1])
        return _added(sums[0], weights.sum(axis=2), first), _added(sums[1], diagonals, first)

    zeros = jnp.zeros((B, H, S), jnp.float32), jnp.zeros((B, H, S + R - 1), jnp.float32)
    like = q_PBRKGd, k_BKSd, lse_BHR, start_PBR, end_PBR
    return lax.fori_loop(0, count[0], add, tuple(selection.varying(x, *like) for x in zeros))


def choose(
    vertical_BHS: jax.Array,
    slash_BHS: jax.Array,
    budgets_H2: jax.Array,
    bounds: Bounds,
    slot: jax.Array,
    length: jax.Array,
    *,
    tiling: Tiling,
    max_pieces: int,
    max_columns: int,
) -> Selection:
    """The pieces and columns that a chunk visits.

    Args:
      vertical_BHS, slash_BHS: of `line_scores`.
      budgets_H2: int32, columns and slashes of each query head. 30 columns count as 130, as in the published code.
      bounds: of the rows, and of tiles of `tiling.rows`.
      slot: int32 scalar, the cache slot of the first query of the chunk.
      length: int32 scalar, queries of the chunk that are not padding.
      tiling: sizes of tiles and pieces.
      max_pieces, max_columns: capacities. Where the budgets ask for more, those with the greatest scores are kept.
    """
    (B, H, S), (rows, size, step), N = vertical_BHS.shape, dataclasses.astuple(tiling), bounds.start_PBN.shape[2]
    R = B * H
    # What the last query sees may be chosen.
    end = slot + length
    low_B = take_last(bounds.start_BT, length)
    low_R = jnp.repeat(low_B, H)[:, None]
    visible_R = jnp.maximum(end - low_R[:, 0], 0)
    budgets_R2 = jnp.maximum(jnp.tile(budgets_H2.astype(jnp.int32), (B, 1)), 0)
    # Columns.
    j = jnp.arange(S, dtype=jnp.int32)
    score_RS = jnp.where(j < low_R + FIRST_COLUMNS, jnp.inf, vertical_BHS.reshape(R, S))
    keys_RS = selection.order_keys(score_RS, (low_R <= j) & (j < end))
    columns_R = jnp.where(budgets_R2[:, 0] == 30, 130, budgets_R2[:, 0])
    columns_R = jnp.minimum(columns_R, visible_R)
    kept_R = jnp.minimum(columns_R, max_columns)
    # Slashes. Pieces start at multiples of `step` in every tile, if distances are counted from a multiple of it.
    shift = -slot % step
    keys_RU = _slash_keys(slash_BHS.reshape(R, -1), low_R, end, shift, S, step)
    slashes_R = jnp.minimum(budgets_R2[:, 1], visible_R)
    # Both at once, with half as many steps.
    keys = jnp.concatenate([jnp.pad(keys_RS, ((0, 0), (0, keys_RU.shape[1] - S))), keys_RU])
    # Otherwise XLA keeps a second copy of the keys of slashes, for `_cut`.
    keys = lax.optimization_barrier(keys)
    chosen = selection.top_mask(keys, jnp.concatenate([kept_R, slashes_R]), by_groups=platform.on_hopper())
    chosen_RS, slashes_RU = chosen[:R, :S], chosen[R:]
    begins_RG = _piece_groups(slashes_RU, tiling)
    begins_RG, pieces_cut_R = _cut(begins_RG, lambda: jnp.where(chosen[R:], keys[R:], 0), tiling, max_pieces)
    # The distance from the end of a tile to the end of each piece of the head, ascending.
    group_RL, pieces_R = selection.places(begins_RG, max_pieces)
    back_RL = group_RL * step
    # A tile ends at `last`, which includes the shift. The piece that would begin before key 0 is left out; the keys
    # in it are columns instead.
    last_N = slot + shift + rows * (1 + jnp.arange(N, dtype=jnp.int32))
    low_BN, high_BN = bounds.union()
    begin_N, reach_RN = last_N - size + 1, last_N - jnp.repeat(low_BN, H, axis=0)
    below = selection.count_below(back_RL, jnp.concatenate([jnp.broadcast_to(begin_N, (R, N)), reach_RN], axis=1))
    until_RN, reach_RN = below[:, :N], below[:, N:]
    negative_RN = last_N - jnp.take_along_axis(back_RL, jnp.minimum(until_RN, max_pieces - 1), axis=1)
    first_key_RN = jnp.where(until_RN < pieces_R[:, None], jnp.maximum(negative_RN, 0), 0)
    if size > step:
        chosen_RS |= (j < size - step) & (low_R <= j) & (j < end) & (pieces_R > 0)[:, None]
    lists = _lists(back_RL, jnp.minimum(until_RN, reach_RN), last_N, (B, H, N), tiling)
    # Columns of each tile.
    # Whole tiles of 128 columns, so that kernels need not pad.
    columns_RC, found_R = selection.places(chosen_RS, -(-(max_columns + size - step) // 128) * 128)
    inside_RG = selection.window_any(begins_RG, size // step)
    places_RNC = _column_places(columns_RC, found_R, inside_RG, first_key_RN, slot + shift + rows - 1, tiling)
    # Pairs in pieces, and pairs in columns. The last row of a tile sees all columns, each row before it one key less.
    start_RNr, end_RNr = (jnp.repeat(x.reshape(B, N, rows), H, axis=0) for x in (bounds.start_BT, bounds.end_BT))
    last, first = last_N[None, :, None], jnp.maximum(start_RNr, first_key_RN[:, :, None])
    ends = jnp.stack([last - first, last - jnp.maximum(end_RNr, first)], axis=1).reshape(R, -1)
    inside = _covered(back_RL, ends, size).reshape(R, 2, -1)
    low, high, seeing = (
        jnp.repeat(x, H, axis=0)[:, :, None]
        for x in (low_BN, high_BN, (bounds.start_BT < bounds.end_BT).reshape(B, N, rows).sum(axis=2))
    )
    rows_RNC = jnp.where(low <= places_RNC, jnp.clip(high - places_RNC, 0, seeing), 0)
    visited_R = (inside[:, 0] - inside[:, 1]).sum(axis=1, dtype=jnp.float32) + rows_RNC.sum(
        axis=(1, 2), dtype=jnp.float32
    )
    by_head = (B, H)
    return Selection(
        lists, places_RNC.reshape(B, H, N, -1), columns_RC.reshape(B, H, -1), visited_R.reshape(by_head),
        pieces_cut_R.reshape(by_head), (columns_R - jnp.minimum(columns_R, max_columns)).reshape(by_head),
    )  # fmt: skip


def gather_columns(x_BKSd: jax.Array, columns_BHC: jax.Array) -> jax.Array:
    """The keys or values of the columns of each query head, [B, H, C, d]. Places beyond the end give the last key."""
    (B, K, S, _), (H, C) = x_BKSd.shape, columns_BHC.shape[1:]
    place_BKN1 = jnp.minimum(columns_BHC, S - 1).reshape(B, K, -1, 1)
    return jnp.take_along_axis(x_BKSd, place_BKN1, axis=2).reshape(B, H, C, -1)


def take_last(x_BT: jax.Array, length: jax.Array) -> jax.Array:
    """The value of the last of `length` rows, [B]."""
    return lax.dynamic_index_in_dim(x_BT, length - 1, axis=1, keepdims=False)


def _select_lines(asked: str, q_BRHd: jax.Array, k_BKSd: jax.Array) -> str:
    """The implementation of `line_scores` that runs."""
    (_, R, H, d), (K, S), dtype = q_BRHd.shape, k_BKSd.shape[1:3], q_BRHd.dtype.name
    needs = {
        "a Hopper GPU": platform.on_hopper(),
        "bfloat16 or float16": dtype in ("bfloat16", "float16") and q_BRHd.dtype == k_BKSd.dtype,
        "64 probe rows": R == 64,
        "head_dim 64 or 128": d in (64, 128),
        "a cache of a multiple of 8 slots": S % 8 == 0,
    }
    candidates = [Candidate("gpu", unmet(needs)), Candidate("reference")]
    return select(candidates, asked, "scores of columns and slashes", f"{dtype}, {R} rows of {H}/{K} heads of {d}")


def _added(total: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    """`total` with `part` added to its last dimension from `first` on."""
    now = lax.dynamic_slice_in_dim(total, first, part.shape[-1], axis=2)
    return lax.dynamic_update_slice_in_dim(total, now + part, first, axis=2)


def _slash_keys(
    slash_RS: jax.Array, low_R: jax.Array, end: jax.Array, shift: jax.Array, slots: int, step: int
) -> jax.Array:
    """Keys for `top_mask` by distance, where element u stands for the distance u - shift. U is a multiple of step."""
    U = -(-(slots + step) // step) * step
    # The last row sees key j at distance end - 1 - j.
    reverse = jnp.pad(slash_RS[:, ::-1], ((0, 0), (step, U)))
    first = step + slash_RS.shape[1] - end - shift
    score_RU = lax.dynamic_slice_in_dim(reverse, first, U, axis=1)
    distance = jnp.arange(U, dtype=jnp.int32) - shift
    score_RU = jnp.where(distance < NEAR_SLASHES, jnp.inf, score_RU)
    return selection.order_keys(score_RU, (distance >= 0) & (distance < end - low_R))


def _piece_groups(slashes_RU: jax.Array, tiling: Tiling) -> jax.Array:
    """The groups of `step` distances with which a piece begins, bool [R, G]; pieces are disjoint and cover every slash.

    The slash at distance o needs the distances o to o + rows - 1 from the last row of a tile. So a group is needed if
    there is a slash in it or in the rows / step - 1 groups before, or in the next one back behind its first distance.
    """
    (rows, size, step), R = dataclasses.astuple(tiling), len(slashes_RU)
    across, per_piece = rows // step, size // step
    grouped = jnp.pad(slashes_RU.reshape(R, -1, step), ((0, 0), (0, across + per_piece), (0, 0)))
    behind = jnp.pad(grouped[:, :-across, 1:].any(axis=2), ((0, 0), (across, 0)))
    needed = selection.window_any(grouped.any(axis=2), across) | behind
    if per_piece == 1:
        return needed
    # Gaps that are shorter than a piece are closed, so that pieces of two runs cannot overlap.
    spread = selection.window_any(needed, per_piece)
    needed = ~selection.window_any(~spread[:, ::-1], per_piece)[:, ::-1] | needed
    # A piece begins at every `per_piece`-th group of a run.
    group = jnp.arange(needed.shape[1], dtype=jnp.int32)
    opens = needed & ~jnp.pad(needed, ((0, 0), (1, 0)))[:, :-1]
    run = lax.cummax(jnp.where(opens, group, -1), axis=1)
    return needed & ((group - run) % per_piece == 0)


def _cut(
    begins_RG: jax.Array, slash_keys: Callable[[], jax.Array], tiling: Tiling, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """The pieces with the greatest slashes where there are more than the capacity, and how many were cut, int32 [R].

    `slash_keys` gives the keys of the chosen slashes, [R, U], and is traced where pieces are cut.
    """
    rows, size, step = dataclasses.astuple(tiling)
    count_R = begins_RG.sum(axis=1, dtype=jnp.int32)
    kept_R = jnp.minimum(count_R, capacity)

    def greatest() -> jax.Array:
        # A piece serves slashes in its own groups and in the rows / step groups before them.
        behind, ahead = rows // step, size // step - 1
        best_RG = slash_keys().reshape(len(begins_RG), -1, step).max(axis=2)
        best_RG = jnp.pad(best_RG, ((0, 0), (0, begins_RG.shape[1] - best_RG.shape[1] + ahead)))
        best_RG = selection.window_max(best_RG, behind + ahead + 1)[:, ahead:]
        return selection.top_mask(jnp.where(begins_RG, jnp.maximum(best_RG, 1), 0), kept_R)

    kept_RG = lax.cond((count_R > capacity).any(), greatest, lambda: begins_RG)
    return kept_RG, count_R - kept_R


def _lists(
    back_RL: jax.Array, count_RN: jax.Array, last_N: jax.Array, shape: tuple[int, int, int], tiling: Tiling
) -> kernels.KeyLists:
    """The lists of tiles that visit the pieces 0 to count - 1 of their head, from the last to the first."""
    L, size = back_RL.shape[1], tiling.size
    reverse_RL = jnp.pad(back_RL[:, ::-1], ((0, 0), (0, L)))
    slices = jax.vmap(jax.vmap(lambda row, first: lax.dynamic_slice_in_dim(row, first, L), (None, 0)))
    starts_RNL = last_N[:, None] - size - slices(reverse_RL, L - count_RN)
    return kernels.KeyLists(starts_RNL.reshape(*shape, L), count_RN.reshape(shape), tiling.rows, size)


def _column_places(
    columns_RC: jax.Array, found_R: jax.Array, inside_RG: jax.Array, first_key_RN: jax.Array, last_row: jax.Array,
    tiling: Tiling,
) -> jax.Array:  # fmt: skip
    """For each tile the places of the columns that no piece contains, int32 [R, N, C].

    From one tile to the next the distance to a column grows by `rows`. So the groups that a column meets in all tiles
    are every (rows / step)-th one from some group on. Packed in this order, they are a few words of bits.

    Args:
      columns_RC, found_R: places of columns, and how many there are.
      inside_RG: whether a group of distances is inside a piece.
      first_key_RN: pieces contain no key before this one.
      last_row: the last row of the first tile, with the shift.
      tiling: sizes of tiles and pieces.
    """
    (R, C), N, across = columns_RC.shape, first_key_RN.shape[1], tiling.rows // tiling.step
    words = -(-N // 32)
    # Row a of [across, M] holds the groups a, a + across, ... behind N groups that no piece contains: a column may be
    # ahead of a tile.
    padded = jnp.pad(inside_RG, ((0, 0), (N * across, -inside_RG.shape[1] % across)))
    packed = selection.pack_bits(padded.reshape(R, -1, across).swapaxes(1, 2).reshape(R * across, -1))
    packed = jnp.pad(packed, ((0, 0), (0, words + 1))).reshape(R, across, -1)
    M = packed.shape[2]
    group_RC = (last_row - columns_RC) // tiling.step + N * across
    # Columns that were not found have a place beyond the cache.
    bit_RC = jnp.clip(group_RC // across, 0, (M - words - 1) * 32)
    index_RC = group_RC % across * M + bit_RC // 32
    index_RCW = index_RC[..., None] + jnp.arange(words + 1, dtype=jnp.int32)
    word_RCW = jnp.take_along_axis(packed.reshape(R, -1), index_RCW.reshape(R, -1), axis=1).reshape(R, C, -1)
    # Bits from the first tile on.
    by = (bit_RC % 32).astype(jnp.uint32)[..., None]
    high = jnp.where(by > 0, word_RCW[..., 1:] << (32 - jnp.maximum(by, 1)), 0)
    word_RWC = (word_RCW[..., :-1] >> by | high).swapaxes(1, 2)
    bits = word_RWC[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[:, None] & 1
    inside_RNC = bits.reshape(R, words * 32, C)[:, :N] == 1
    place = columns_RC[:, None]
    off = inside_RNC & (place >= first_key_RN[:, :, None])
    return jnp.where(off | (jnp.arange(C) >= found_R[:, None, None]), NOWHERE, place)


def _covered(back_RL: jax.Array, distance_RX: jax.Array, size: int) -> jax.Array:
    """How many of the distances below each given one are inside a piece, int32 [R, X]."""
    below = selection.count_below(back_RL, distance_RX)
    last = jnp.take_along_axis(back_RL, jnp.maximum(below - 1, 0), axis=1)
    return jnp.where(below > 0, (below - 1) * size + jnp.minimum(distance_RX - last, size), 0)
