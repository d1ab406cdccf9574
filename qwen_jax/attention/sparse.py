"""Sparse prefill: attention of a chunk of queries over the keys of a cache that matter most.

Two patterns say which keys these are: `VerticalSlash` and `PooledBlocks`. All of it runs on the device, with static
shapes: one compiled program serves every offset and, for `VerticalSlash`, all budgets. The interval masks stay the
truth; a pattern only leaves out keys that a mask permits. `Diagnostics` says how many, and what they were worth.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import kernels
from qwen_jax.attention import pooled_blocks, sparse_parts, vertical_slash
from qwen_jax.attention.pooled_blocks import BLOCK, block_means
from qwen_jax.attention.sparse_parts import AUDIT_ROWS, PROBE_ROWS, Bounds, Part, probe_rows
from qwen_jax.attention.sparse_patterns import FILE_NAME, PooledBlocks, VerticalSlash, refine
from qwen_jax.attention.vertical_slash import Tiling
from qwen_jax.errors import InputError
from qwen_jax.parallel.placing import read

__all__ = [
    "AUDIT_ROWS",
    "FILE_NAME",
    "PROBE_ROWS",
    "Diagnostics",
    "Part",
    "PooledBlocks",
    "SparsePrefill",
    "Tiling",
    "VerticalSlash",
    "attend",
    "block_means",
    "probe_rows",
    "refine",
    "summarise",
]

# Pieces of a list, unless the caller says otherwise: 64-key pieces for a quarter of half a million keys.
_MAX_PIECES = 2048


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("density_BH", "audit_recall_BH", "pieces_cut_BH", "columns_cut_BH"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What sparse attention of a chunk left out, for each row and query head.

    Attributes:
      density_BH: float32, visited pairs of queries and keys over pairs that the masks permit. A mean that stands for
        a block counts as one key. Blocks of `PooledBlocks` that were cut count as visited where no mean replaces them.
      audit_recall_BH: float32, the share of the softmax that was visited, exp(lse_sparse - lse_full), averaged over
        rows at pseudo-random places of the chunk. None if it was not measured.
      pieces_cut_BH, columns_cut_BH: int32, pieces (of the list of a head, or of pooled blocks over all tiles) and
        columns that the pattern asks for and that were left out because the capacity is too small.

    Source: recall is eq. 2 to 4 of the Qwen2.5-1M report (arXiv:2501.15383).
    """

    density_BH: jax.Array
    audit_recall_BH: jax.Array | None
    pieces_cut_BH: jax.Array
    columns_cut_BH: jax.Array


def summarise(skipped: Sequence[Diagnostics]) -> tuple[np.ndarray, float, int]:
    """Recall, density and what was cut, of a prompt that was read in chunks. Waits for the device.

    With several processes, all of the mesh call this together.

    Args:
      skipped: of each chunk, with a leading axis over layers.

    Returns:
      Recall float [L, H] over audit rows; density, averaged over heads and weighted by the keys that a chunk sees; and
      the number of pieces and columns that were cut.
    """
    recalls = [chunk.audit_recall_BH for chunk in skipped]
    recall_LH = np.mean([read(recall).mean(axis=1) for recall in recalls if recall is not None], axis=0)
    # Chunk i sees about 2 i + 1 halves of a chunk.
    weights = np.arange(1, 2 * len(skipped), 2, dtype=np.float64)
    density = np.average([float(np.mean(read(chunk.density_BH))) for chunk in skipped], weights=weights)
    cut = sum(int(np.sum(read(n))) for chunk in skipped for n in (chunk.pieces_cut_BH, chunk.columns_cut_BH))
    return recall_LH, float(density), cut


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("budgets_LH2",), meta_fields=("pattern", "max_columns")
)
@dataclasses.dataclass(frozen=True)
class SparsePrefill:
    """Sparse attention for a model's prefill: the pattern, and the budgets of all layers as an argument of programs.

    Attributes:
      budgets_LH2: int32, columns and slashes of each layer and query head; None without budgets.
      pattern: what is compiled in. Budgets are not.
      max_columns: capacity for the columns of a head.
    """

    budgets_LH2: jax.Array | None
    pattern: VerticalSlash | PooledBlocks
    max_columns: int

    @classmethod
    def of(cls, pattern: VerticalSlash | PooledBlocks, max_columns: int | None = None) -> "SparsePrefill":
        """For a pattern.

        Args:
          pattern: with its budgets.
          max_columns: capacity for columns, so that one program serves larger budgets, too; by default what the
            pattern needs.
        """
        if isinstance(pattern, PooledBlocks):
            return cls(None, pattern, 0)
        most = max(pattern.most_columns, max_columns or 0)
        budgets = np.stack([pattern.budgets(layer) for layer in range(len(pattern.columns))])
        return cls(jnp.asarray(budgets), VerticalSlash((), ()), -(-most // BLOCK) * BLOCK)

    def layer(self, i: int | jax.Array) -> "SparsePrefill":
        """With the budgets [H, 2] of one layer."""
        budgets = self.budgets_LH2
        return self if budgets is None else dataclasses.replace(self, budgets_LH2=budgets[i])


def attend(
    parts: Sequence[Part],
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    pattern: VerticalSlash | PooledBlocks,
    *,
    slot: jax.Array | int,
    scale: float,
    budgets_H2: jax.Array | None = None,
    length: jax.Array | int | None = None,
    end: jax.Array | int | None = None,
    means: tuple[jax.Array, jax.Array] | None = None,
    implementation: kernels.Implementation = "auto",
    tiling: Tiling | None = None,
    max_pieces: int | None = None,
    max_columns: int | None = None,
    measure: bool = True,
) -> tuple[jax.Array, jax.Array, Diagnostics]:
    """Sparse attention of a chunk of queries over a head-major cache that already holds the keys of the chunk.

    Runs on local arrays, jitted with `pattern`, the capacities and the options static. There is no gradient.

    Args:
      parts: the queries for each part of the keys, and the masks. The rows of a chunk are consecutive.
      k_BKSd, v_BKSd: the cache. All its slots must be finite.
      pattern: which keys to visit.
      slot: int32 scalar, the cache slot of the first query.
      scale: multiplies the logits; positive.
      budgets_H2: int32, columns and slashes of each query head, for `VerticalSlash`; see `VerticalSlash.budgets`.
      length: int32 scalar, queries that are not padding at the end of the chunk; by default all.
      end: int32 scalar, the cache slot at which the prompts end, for `PooledBlocks.last`; None if no query is the last.
      means: `block_means` of the keys and values, for `PooledBlocks`; by default they are computed.
      implementation: of `kernels.sparse_attention` and `kernels.column_attention`.
      tiling: sizes of tiles and pieces, for `VerticalSlash`; by default those of the implementation.
      max_pieces: capacity of the list of a tile; by default all keys, at most 2048 pieces.
      max_columns: capacity for the columns of a head; by default the greatest budget of the pattern.
      measure: whether recall is measured, which costs attention of 64 rows over all their keys.

    Returns:
      Output [B, T, H, d] in the dtype of the queries, its log-sum-exp float32 [B, H, T], and diagnostics.

    Raises:
      InputError: sizes that the pattern does not support, or missing budgets.
    """
    if not parts:
        raise InputError("Sparse attention needs at least one part of the keys; got none.")
    if tiling is None or isinstance(pattern, PooledBlocks):
        tiling = _tiling(pattern, implementation, parts[0])
    _check(parts, k_BKSd, tiling, slot)
    if isinstance(pattern, VerticalSlash):
        budgets_H2 = _checked_budgets(budgets_H2, parts[0].q_BTHd.shape[2])
    T, S = parts[0].q_BTHd.shape[1], k_BKSd.shape[2]
    columns = 0 if isinstance(pattern, PooledBlocks) else min(max_columns or pattern.most_columns, S)
    return _attend(
        tuple(parts),
        k_BKSd,
        v_BKSd,
        jnp.asarray(slot, jnp.int32),
        jnp.asarray(T if length is None else length, jnp.int32),
        None if end is None else jnp.asarray(end, jnp.int32),
        budgets_H2,
        means,
        # Budgets are arguments; the pattern says only which one it is.
        pattern=pattern if isinstance(pattern, PooledBlocks) else None,
        scale=scale,
        implementation=implementation,
        tiling=tiling,
        capacity=max_pieces or min(-(-(S + tiling.rows) // 128) * (128 // tiling.size), _MAX_PIECES),
        columns=columns,
        measure=measure,
    )


# Jitted, so that a model of many layers traces it once.
@functools.partial(
    jax.jit,
    static_argnames=("pattern", "scale", "implementation", "tiling", "capacity", "columns", "measure"),
)
def _attend(
    parts: tuple[Part, ...],
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    slot: jax.Array,
    length: jax.Array,
    end: jax.Array | None,
    budgets_H2: jax.Array | None,
    means: tuple[jax.Array, jax.Array] | None,
    *,
    pattern: PooledBlocks | None,
    scale: float,
    implementation: kernels.Implementation,
    tiling: Tiling,
    capacity: int,
    columns: int,
    measure: bool,
) -> tuple[jax.Array, jax.Array, Diagnostics]:
    """`attend`, with all sizes chosen. A pattern of None is vertical-slash.

    `capacity` is that of a list in pieces, `columns` that of the columns of a head.
    """
    how: dict[str, Any] = {"scale": scale, "implementation": implementation}
    S = k_BKSd.shape[2]
    bounds = sparse_parts.bounds([part.mask for part in parts], tiling.rows)
    # What to visit.
    dense: pooled_blocks.DenseTiles | None = None
    if pattern is not None:
        if end is not None and pattern.last:
            dense = pooled_blocks.dense_tiles(parts[0].q_BTHd.shape[1], pattern.last, end - slot)
        with jax.named_scope("sparse_lists"):
            visits = _visit_blocks(parts, k_BKSd, v_BKSd, pattern, bounds, means, how, min(capacity, S // BLOCK), dense)
    else:
        with jax.named_scope("sparse_lines"):
            scores = _line_scores(parts, length, k_BKSd, v_BKSd, how)
        with jax.named_scope("sparse_lists"):
            where = slot, length
            assert budgets_H2 is not None
            visits = _visit_lines(scores, k_BKSd, v_BKSd, budgets_H2, bounds, where, tiling, capacity, columns)
    # Attention over the pieces and the gathered keys of each part.
    merged = []
    for p, part in enumerate(parts):
        with jax.named_scope("sparse_attend"):
            lists = visits.lists
            if len(parts) > 1:
                lists = _between(lists, bounds.start_PBN[p], bounds.end_PBN[p])
            merged.append(kernels.sparse_attention(part.q_BTHd, k_BKSd, v_BKSd, part.mask, lists, **how))
            if visits.gathered is not None:
                k, v, places = visits.gathered
                merged.append(
                    kernels.column_attention(
                        part.q_BTHd, k, v, part.mask, places, bias=visits.bias, rows=tiling.rows, **how
                    )
                )
    out_BTHd, lse_BHT = kernels.merge(merged)
    if dense is not None:
        with jax.named_scope("sparse_last"):
            out_BTHd, lse_BHT = _attend_densely(parts, k_BKSd, v_BKSd, dense, out_BTHd, lse_BHT, how)
    density_BH = visits.visited_BH / jnp.maximum(_visible(parts), 1.0)[:, None]
    recall_BH: jax.Array | None = None
    if measure:
        with jax.named_scope("sparse_recall"):
            recall_BH = _recall(parts, lse_BHT, sparse_parts.audit_rows(slot, length), k_BKSd, v_BKSd, how)
    skipped = Diagnostics(density_BH, recall_BH, visits.pieces_cut_BH, visits.columns_cut_BH)
    return out_BTHd, lse_BHT, skipped


@dataclasses.dataclass(frozen=True)
class _Visits:
    """Pieces, and gathered keys, values and their places, that a chunk attends to; counts as in `Diagnostics`."""

    lists: kernels.KeyLists
    gathered: tuple[jax.Array, jax.Array, jax.Array] | None
    bias: float
    visited_BH: jax.Array
    pieces_cut_BH: jax.Array
    columns_cut_BH: jax.Array


def _visit_blocks(
    parts: Sequence[Part], k_BKSd: jax.Array, v_BKSd: jax.Array, pattern: PooledBlocks, bounds: Bounds,
    means: tuple[jax.Array, jax.Array] | None, how: dict[str, Any], max_blocks: int,
    dense: pooled_blocks.DenseTiles | None,
) -> _Visits:  # fmt: skip
    """Blocks, and means of those that are not visited. All that dense tiles see counts as visited."""
    k, v = (block_means(k_BKSd), block_means(v_BKSd)) if means is None else means
    queries = [part.q_BTHd for part in parts]
    # On anything but a GPU, scores have no implementation of their own.
    scoring = "auto" if how["implementation"] in ("auto", "gpu") else "xla"
    blocks = pooled_blocks.choose(
        queries, k, bounds, pattern, scale=how["scale"], max_blocks=max_blocks, implementation=scoring,
        dense_N=None if dense is None else dense.is_dense_N,
    )  # fmt: skip
    # A block that is not visited costs each query of the tile 128 keys less, or one in place of 128.
    saved = BLOCK * (BLOCK - 1 if pattern.correct_means else BLOCK)
    visited_BH = _visible(parts)[:, None] - saved * blocks.skipped_BH
    gathered = (k, v, blocks.places_BHNJ) if pattern.correct_means else None
    cut = blocks.blocks_cut_BH
    return _Visits(blocks.lists, gathered, math.log(BLOCK), visited_BH, cut, jnp.zeros_like(cut))


def _attend_densely(
    parts: Sequence[Part], k_BKSd: jax.Array, v_BKSd: jax.Array, dense: pooled_blocks.DenseTiles,
    out_BTHd: jax.Array, lse_BHT: jax.Array, how: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output and log-sum-exp where the rows of dense tiles attend to all their keys."""

    def rows(x: jax.Array, axis: int = 1) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, dense.first, dense.rows, axis)

    is_dense_R = rows(jnp.repeat(dense.is_dense_N, BLOCK), 0)

    def attended() -> tuple[jax.Array, jax.Array]:
        found = []
        for part in parts:
            ends = jnp.where(is_dense_R, rows(part.mask.k_end_BT), 0)
            mask = kernels.Mask(jnp.minimum(rows(part.mask.k_start_BT), ends), ends)
            found.append(kernels.decode_attention(rows(part.q_BTHd), k_BKSd, v_BKSd, mask, **how))
        out, lse = kernels.merge(found)
        return jnp.where(is_dense_R[:, None, None], out, before[0]), jnp.where(is_dense_R, lse, before[1])

    before = rows(out_BTHd), rows(lse_BHT, 2)
    out, lse = jax.lax.cond(dense.is_dense_N.any(), attended, lambda: before)
    return (
        jax.lax.dynamic_update_slice_in_dim(out_BTHd, out, dense.first, 1),
        jax.lax.dynamic_update_slice_in_dim(lse_BHT, lse, dense.first, 2),
    )


def _visit_lines(
    scores: tuple[jax.Array, jax.Array], k_BKSd: jax.Array, v_BKSd: jax.Array, budgets_H2: jax.Array,
    bounds: Bounds, where: tuple[jax.Array, jax.Array], tiling: Tiling, max_pieces: int, max_columns: int,
) -> _Visits:  # fmt: skip
    """Pieces of slashes, and columns."""
    lines = vertical_slash.choose(
        *scores, budgets_H2, bounds, *where, tiling=tiling, max_pieces=max_pieces, max_columns=max_columns
    )
    k, v = (vertical_slash.gather_columns(x, lines.columns_BHC) for x in (k_BKSd, v_BKSd))
    gathered = k, v, lines.places_BHNC
    return _Visits(lines.lists, gathered, 0.0, lines.visited_BH, lines.pieces_cut_BH, lines.columns_cut_BH)


def _visible(parts: Sequence[Part]) -> jax.Array:
    """Pairs of queries and keys that the masks permit, float32 [B]."""
    lengths = [jnp.maximum(part.mask.k_end_BT - part.mask.k_start_BT, 0) for part in parts]
    return jnp.stack(lengths).sum(axis=(0, 2), dtype=jnp.float32)


def _line_scores(
    parts: Sequence[Part], length: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, how: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """`vertical_slash.line_scores` of the probe rows, rotated for choosing keys."""
    rows_R = sparse_parts.probe_rows(length)
    masks = [sparse_parts.mask_rows(part.mask, rows_R) for part in parts]
    queries = [
        sparse_parts.take_rows(part.q_BTHd, rows_R) if part.critical_BRHd is None else part.critical_BRHd
        for part in parts
    ]
    lse_BHR = sparse_parts.rows_lse(queries, masks, k_BKSd, v_BKSd, **how)
    asked: kernels.Implementation = how["implementation"] if how["implementation"] in ("auto", "gpu") else "reference"
    return vertical_slash.line_scores(queries, masks, lse_BHR, k_BKSd, scale=how["scale"], implementation=asked)


def _between(lists: kernels.KeyLists, low_BN: jax.Array, high_BN: jax.Array) -> kernels.KeyLists:
    """The pieces of each list that contain a key low <= j < high."""
    starts, L = lists.starts_BHNL, lists.starts_BHNL.shape[3]
    low, high = low_BN[:, None, :, None], high_BN[:, None, :, None]
    listed = jnp.arange(L) < lists.counts_BHN[..., None]
    before = jnp.sum(listed & (starts + lists.size <= low), axis=3, dtype=jnp.int32)
    until = jnp.sum(listed & (starts < high), axis=3, dtype=jnp.int32)
    flat = jnp.pad(starts, ((0, 0), (0, 0), (0, 0), (0, L))).reshape(-1, 2 * L)
    slices = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, L))
    counts = jnp.where(low_BN < high_BN, 1, 0)[:, None] * jnp.maximum(until - before, 0)
    return kernels.KeyLists(slices(flat, before.reshape(-1)).reshape(starts.shape), counts, lists.rows, lists.size)


def _recall(
    parts: Sequence[Part], lse_BHT: jax.Array, rows_R: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array,
    how: dict[str, Any],
) -> jax.Array:  # fmt: skip
    """Mean recall of some rows, float32 [B, H]; 1 where no row sees a key."""
    queries = [sparse_parts.take_rows(part.q_BTHd, rows_R) for part in parts]
    masks = [sparse_parts.mask_rows(part.mask, rows_R) for part in parts]
    full_BHR = sparse_parts.rows_lse(queries, masks, k_BKSd, v_BKSd, **how)
    sparse_BHR = jnp.take(lse_BHT, rows_R, axis=2)
    sees = jnp.isfinite(full_BHR)
    # Rounding may put the sum over a part of the keys above the sum over all of them.
    share = jnp.where(sees, jnp.exp(jnp.minimum(sparse_BHR - jnp.where(sees, full_BHR, 0.0), 0.0)), 0.0)
    return jnp.where(sees.any(axis=2), share.sum(axis=2) / sees.sum(axis=2).clip(1), 1.0)


def _tiling(pattern: VerticalSlash | PooledBlocks, implementation: kernels.Implementation, part: Part) -> Tiling:
    """Sizes that the kernel is fastest with."""
    q = part.q_BTHd
    chosen = kernels.select_attention(implementation, q, part.mask, return_lse=True, cache=True)
    if chosen == "gpu" and isinstance(pattern, VerticalSlash):
        # Pieces may begin at multiples of 8 keys.
        return Tiling(128, 64, 8)
    if chosen == "tpu" and isinstance(pattern, VerticalSlash):
        from qwen_jax.kernels.attention import sparse_tpu

        rows = sparse_tpu.tiling(q.shape[3], q.dtype).rows
        return Tiling(rows if q.shape[1] % rows == 0 else 128)
    return Tiling()


def _check(parts: Sequence[Part], k_BKSd: jax.Array, tiling: Tiling, slot: jax.Array | int) -> None:
    (B, T, H, d), S = parts[0].q_BTHd.shape, k_BKSd.shape[2]
    if T % tiling.rows or tiling.rows % tiling.step or tiling.size % tiling.step:
        raise InputError(
            f"Sparse attention needs chunks of whole tiles; got {T} queries, {tiling}. Pad the chunk to a multiple of "
            f"{tiling.rows}, and choose a step that divides the rows and the size."
        )
    if S % BLOCK:
        raise InputError(f"Sparse attention needs a cache of a multiple of {BLOCK} slots; got {S}.")
    if isinstance(slot, int) and not 0 <= slot <= S - T:
        raise InputError(f"Expected a chunk within the {S} slots of the cache; got {T} queries from slot {slot} on.")
    for part in parts:
        critical = part.critical_BRHd
        if part.q_BTHd.shape != (B, T, H, d) or (critical is not None and critical.shape != (B, PROBE_ROWS, H, d)):
            raise InputError(
                f"Expected the same queries {(B, T, H, d)} in every part, and {(B, PROBE_ROWS, H, d)} to choose keys; "
                f"got {part.q_BTHd.shape} and {None if critical is None else critical.shape}."
            )


def _checked_budgets(budgets_H2: jax.Array | None, num_heads: int) -> jax.Array:
    if budgets_H2 is None or budgets_H2.shape != (num_heads, 2):
        raise InputError(
            f"Vertical-slash attention needs budgets [{num_heads}, 2], columns and slashes of each query head; got "
            f"{None if budgets_H2 is None else budgets_H2.shape}. Use VerticalSlash.budgets(layer)."
        )
    return jnp.asarray(budgets_H2, jnp.int32)
