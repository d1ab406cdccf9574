"""Attention of one or a few new rows over a long cache of 8-bit keys and values on Hopper GPUs.

As `flash_decode_gpu`: a thread block takes one key/value head of one sequence and a share of its used key tiles, and a
second kernel merges the shares. The cache is read as int8, half the bytes of bfloat16, so that a block has half the
time for a tile. Therefore the tensor cores work on transposed tiles: the keys are the 64 rows of a product and the few
query rows its columns, of which there are 16, 32 or 64. The softmax then handles as many numbers as there are logits,
and not 64 query rows of which most are unused.

Rows that see different keys, such as the three parts of dual-chunk attention, need not be columns of one product: each
tile would be computed for the columns of all rows, though one row sees it. The tiles of such rows form one list, row
after row, of which each thread block takes a share. It computes a tile for the columns of its row only, and writes one
result for each row.

int8 to bfloat16 is exact. Keys are converted in registers, from where the tensor cores take them; values go back to
shared memory, because their product needs them transposed. A thread holds four neighbouring components of a key, where
the tensor cores expect two pairs that are eight apart. The order of the components does not matter for a product, so
that the queries come in that order (`permuted`) and no thread exchanges anything. The scales of the keys multiply the
logits, those of the values the probabilities.

Sources: Flash-Decoding (Dao et al. 2023) for the split keys, FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the
running softmax.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_gpu_tiles import mask_logits
from qwen_jax.kernels.decode.flash_decode_gpu import Tiling, merge_shares, share, splits_for
from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, tiled, wait_for_previous_kernel
from qwen_jax.kernels.gpu.tiles import PER_COLUMN, PER_ROW, ROWS, WGMMA, across, rem, zeros
from qwen_jax.kernels.softmax import LOG2E, LOW, LOWEST
from qwen_jax.kernels.types import Ref

TILINGS = {64: Tiling(64, 6, 2, needed=2), 128: Tiling(64, 3, 2, needed=2)}
"""By head_dim. While one block of a multiprocessor converts or waits for a maximum, the other one works."""
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X
"""Registers of an int8 tile: each thread holds four neighbouring components of a row."""
_MAX_PARTS = 8
"""The most rows that are computed one after the other: all their queries are in shared memory, and the ranges of their
tiles in registers."""


def supports(
    dtype: jax.typing.DTypeLike, length: int, num_heads: int, num_kv_heads: int, head_dim: int, slots: int
) -> bool:
    """Whether the kernel supports these arguments.

    Args:
      dtype: of the queries.
      length: new rows of a sequence.
      num_heads, num_kv_heads, head_dim: of the attention, on one device.
      slots: length of the cache of a sequence.
    """
    return (
        jnp.dtype(dtype) == jnp.bfloat16
        and head_dim in TILINGS
        and num_heads % num_kv_heads == 0
        and 0 < length * (num_heads // num_kv_heads) <= ROWS
        and slots > 0
        and slots % 8 == 0
    )


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    k_scales_BKS: jax.Array,
    v_BKSd: jax.Array,
    v_scales_BKS: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    *,
    disjoint: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention of a few rows, where row i sees slots start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: bfloat16 queries; T H / K is at most 64.
      k_BKSd, v_BKSd: int8 cache; S is a multiple of 8.
      k_scales_BKS, v_scales_BKS: float32, one scale for each key and each value; finite.
      start_BT, end_BT: int32 intervals; rows that see nothing have start >= end.
      scale: multiplies the logits; positive.
      disjoint: the intervals of a sequence's rows have no key in common. It affects only the speed: where they do have
        common keys, these are read once for each row and not once for all.

    Returns:
      bfloat16 [B, T, H, d], zero where a row sees nothing, and the log-sum-exp of the logits, float32 [B, H, T], minus
      infinity there.

    Raises:
      InputError: arguments that `supports` rejects, or shapes that do not match.
    """
    (B, T, H, d), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    arrays = (
        (k_BKSd, (B, K, S, d), jnp.int8),
        (v_BKSd, (B, K, S, d), jnp.int8),
        (k_scales_BKS, (B, K, S), jnp.float32),
        (v_scales_BKS, (B, K, S), jnp.float32),
        (start_BT, (B, T), jnp.int32),
        (end_BT, (B, T), jnp.int32),
    )
    fits = all(x.shape == shape and x.dtype == dtype for x, shape, dtype in arrays)
    if not fits or not supports(q_BTHd.dtype, T, H, K, d, S):
        got = ", ".join(f"{x.dtype} {x.shape}" for x in (q_BTHd, *(x for x, *_ in arrays)))
        raise InputError(
            f"The kernel for 8-bit caches needs bfloat16 q [B, T, H, d] with head_dim 64 or 128 and T H / K up to "
            f"{ROWS}, int8 keys and values [B, K, S, d] with S a multiple of 8, float32 scales [B, K, S] and int32 "
            f"intervals [B, T]; got {got}. Use implementation='reference'."
        )
    return _run(q_BTHd, k_BKSd, k_scales_BKS, v_BKSd, v_scales_BKS, start_BT, end_BT, scale=scale, disjoint=disjoint)


def permuted(x: jax.Array) -> jax.Array:
    """Vectors [..., d] with their components in the order of `_as_operand`."""
    *outer, d = x.shape
    return x.reshape(*outer, d // 16, 2, 2, 2, 2).swapaxes(-4, -2).reshape(x.shape)


def _as_operand(tile: jax.Array) -> jax.Array:
    """An int8 tile [rows, d] as the left operand of a product in bfloat16, with its components permuted.

    Of every 16 components, lane t of four holds b to b + 3 with b = 8 (t % 2) + 4 (t // 2). As an operand they count as
    2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
    """

    @plgpu.inline_mgpu(arg_types=(_BYTES,), return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.bfloat16, layout=WGMMA))
    def relabel(_: Any, x: Any) -> Any:
        import numpy as np
        from jax.experimental.mosaic.gpu import fragmented_array, utils

        wanted = fragmented_array.WGMMA_LAYOUT
        registers = np.empty(wanted.registers_shape(x.shape), dtype=object)
        for at, four in np.ndenumerate(x.registers):
            for pair in range(2):
                to = at[0], at[1] * 2 + pair, *at[2:-1]
                registers[to] = utils.vector_slice(four, slice(2 * pair, 2 * pair + 2))
        return fragmented_array.FragmentedArray(_registers=registers, _layout=wanted, _is_signed=None)

    result: jax.Array = relabel(tile.astype(jnp.bfloat16))
    return result


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))
def _store_transposed(_: Any, ref: Any, x: Any) -> None:
    """Writes a tile to global memory, transposed. Each thread writes its own numbers."""
    from jax._src.lib.mlir.dialects import memref

    x.foreach(lambda number, at: memref.store(number, ref, [at[1], at[0]]))


def _columns(rows: int) -> int:
    """Columns of a product for this many query rows."""
    return next(n for n in (16, 32, 64) if n >= rows)


# Jitted so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames=("scale", "disjoint", "splits", "tiling"))
def _run(
    q: jax.Array, k: jax.Array, k_scales: jax.Array, v: jax.Array, v_scales: jax.Array, start: jax.Array,
    end: jax.Array, *, scale: float, disjoint: bool = False, splits: int | None = None, tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Runs the kernel and the merge."""
    (B, T, H, d), (K, S), tiling = q.shape, k.shape[1:3], tiling or TILINGS[q.shape[3]]
    G = H // K
    splits = splits or splits_for(B * K, S, tiling)
    # All rows are one part, or each row is one, if that makes the products narrower.
    parts = T if disjoint and T <= _MAX_PARTS and _columns(G) < _columns(T * G) else 1
    rows = T // parts
    eights, columns = -(-splits // 8) * 8, _columns(rows * G)
    # The rows of a part and a group, as the columns of a product: [B, parts K, columns, d].
    grouped = q.reshape(B, parts, rows, K, G, d).swapaxes(2, 3).reshape(B, parts * K, rows * G, d)
    grouped = jnp.pad(permuted(grouped), [(0, 0), (0, 0), (0, columns - rows * G), (0, 0)])
    attend = pl.kernel(
        functools.partial(_attend, group=G, splits=splits, scale=scale, tiling=tiling),
        out_type=(
            jax.ShapeDtypeStruct((B, parts * K, columns, eights, d), jnp.float32),
            jax.ShapeDtypeStruct((B, parts * K, eights, columns), jnp.float32),
        ),
        mesh=plgpu.Mesh(grid=(B, K, splits), grid_names=("row", "head", "split")),
        # The maximum of a column goes over all warps: room for one exchange of all columns.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=columns // 8 * 1024,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        name="flash_decode_int8",
    )
    outs, lse = attend(grouped, k, k_scales, v, v_scales, start, end)
    # To the merge, the parts are further heads. Parts or rows are 1, so that reshaping moves nothing.
    out, lse = merge_shares(outs, lse, q.reshape(B, rows, parts * H, d), splits)
    return out.reshape(q.shape), lse.reshape(B, parts, H, rows).swapaxes(1, 2).reshape(B, H, T)


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block.

    Attributes:
      queries: of each part, [parts, columns, d].
      k_tiles, v_tiles: rings of int8 tiles.
      k_scales, v_scales: rings of their scales.
      values: a tile of values as bfloat16.
      weights: probabilities times the scales of the values, [keys, columns].
      q_ready, ready: copies have arrived: the queries; keys, values and their scales for a place of the rings.
    """

    queries: Ref
    k_tiles: Ref
    v_tiles: Ref
    k_scales: Ref
    v_scales: Ref
    values: Ref
    weights: Ref
    q_ready: Ref
    ready: Ref


def _attend(
    q_ref: Ref, k_ref: Ref, k_scales_ref: Ref, v_ref: Ref, v_scales_ref: Ref, start_ref: Ref, end_ref: Ref,
    out_ref: Ref, lse_ref: Ref, *, group: int, splits: int, scale: float, tiling: Tiling,
) -> None:  # fmt: skip
    """The program of a thread block: its share of the tiles of one key/value head of one sequence.

    A part is one row of the sequence, or all its rows. The block attends to one part after the other, and the ring of
    copies runs on from part to part.
    """
    (columns, d), (K, slots), T = q_ref.shape[2:], k_ref.shape[1:3], start_ref.shape[1]
    keys, stages, f32 = tiling.keys, tiling.stages, jnp.float32
    parts = q_ref.shape[1] // K
    rows = T // parts
    row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
    wait_for_previous_kernel()
    allow_next_kernel()

    def tiles_of(part: int | jax.Array) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array, jax.Array]:
        """The intervals of the rows of a part, and the first and the number of the tiles that hold them."""
        numbers = [part * rows + n for n in range(rows)]
        bounds = [(jnp.maximum(start_ref[row, t], 0), jnp.minimum(end_ref[row, t], slots)) for t in numbers]
        # Every slot that any row sees is in low to high.
        low, high = jnp.int32(2**30), jnp.int32(0)
        for a, b in bounds:
            low, high = jnp.where(a < b, jnp.minimum(low, a), low), jnp.where(a < b, jnp.maximum(high, b), high)
        first = lax.div(jnp.minimum(low, high), jnp.int32(keys))
        return bounds, first, lax.div(high + (keys - 1), jnp.int32(keys)) - first

    def loop(**scratch: Ref) -> None:
        memory = _Memory(**scratch)
        for part in range(parts):
            plgpu.copy_gmem_to_smem(q_ref.at[row, part * K + head], memory.queries.at[part], memory.q_ready)

        # The list of the tiles of all parts, of which this block has a share. A part's tiles are neighbours: a place in
        # the list plus the part's shift is a tile of the cache.
        places: list[jax.Array] = []
        shifts: list[jax.Array] = []
        total = jnp.int32(0)
        for part in range(parts):
            _, first, tiles = tiles_of(part)
            places.append(total)
            shifts.append(first - total)
            total = total + tiles
        begin, count = share(jnp.int32(0), total, split, splits)

        def fetch(i: jax.Array) -> None:
            """Copies a tile of keys, one of values, and their scales. Beyond the end of the cache it fills in zeros."""
            shift = shifts[0]
            for place, later in zip(places[1:], shifts[1:], strict=True):
                shift = jnp.where(begin + i >= place, later, shift)
            stage, at = rem(i, stages), (row, head, pl.ds(pl.multiple_of((begin + i + shift) * keys, keys), keys))
            for gmem, smem in (
                (k_ref, memory.k_tiles),
                (k_scales_ref, memory.k_scales),
                (v_ref, memory.v_tiles),
                (v_scales_ref, memory.v_scales),
            ):
                plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[stage], memory.ready.at[stage])

        # Start as many copies as the rings hold.
        for i in range(stages):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
        plgpu.barrier_wait(memory.q_ready)

        def attend_part(part: jax.Array, place: jax.Array) -> jax.Array:
            """Attends to the tiles of a part that are in the share. The part begins at a place in the list."""
            bounds, first, tiles = tiles_of(part)
            low, high = (jnp.clip(n - begin, 0, count) for n in (place, place + tiles))
            part_head, shift = part * K + head, begin + first - place

            @pl.when(low < high)
            def attend_tiles() -> None:
                # The interval of each column. Columns beyond the queries see nothing.
                n = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=PER_COLUMN)
                starts, ends = (plgpu.layout_cast(jnp.zeros((columns,), jnp.int32), PER_COLUMN) for _ in range(2))
                for t, (a, b) in enumerate(bounds):
                    own = (n >= t * group) & (n < (t + 1) * group)
                    starts, ends = jnp.where(own, a, starts), jnp.where(own, b, ends)

                def masked(s: jax.Array, i: jax.Array) -> jax.Array:
                    offset = (i + shift) * keys
                    return mask_logits(s, starts - offset, ends - offset, axis=0)

                def refill(i: jax.Array) -> None:
                    pl.when(i + stages < count)(lambda: fetch(i + stages))

                acc, top, sums = _running_softmax(memory, part, (low, high), masked, refill, scale)
                # Normalise and write, a line for each query row.
                sees = sums > 0
                acc = acc * across(jnp.where(sees, 1 / sums, 0.0), acc.shape, 1)
                _store_transposed(out_ref.at[row, part_head, :, split], acc)
                lse_ref[row, part_head, split] = jnp.where(sees, top + jnp.log2(sums), LOWEST)

            @pl.when(low >= high)
            def write_nothing() -> None:
                lse_ref[row, part_head, split] = plgpu.layout_cast(jnp.full((columns,), LOWEST, f32), PER_COLUMN)

            return place + tiles

        lax.fori_loop(0, parts, attend_part, jnp.int32(0))

    pl.run_scoped(
        loop,
        queries=tiled((parts, columns, d), jnp.bfloat16),
        k_tiles=tiled((stages, keys, d), jnp.int8, d),
        v_tiles=tiled((stages, keys, d), jnp.int8, d),
        k_scales=plgpu.SMEM((stages, keys), f32),
        v_scales=plgpu.SMEM((stages, keys), f32),
        # Both operands of a product must be swizzled alike.
        values=tiled((keys, d), jnp.bfloat16, columns),
        weights=tiled((keys, columns), jnp.bfloat16, columns),
        q_ready=plgpu.Barrier(num_arrivals=parts),
        ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
    )


def _running_softmax(
    memory: _Memory, part: jax.Array, tiles: tuple[jax.Array, jax.Array],
    masked: Callable[[jax.Array, jax.Array], jax.Array], refill: Callable[[jax.Array], None], scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The running softmax over tiles in the rings, for the columns of one part.

    Args:
      memory: of the thread block.
      part: index of its queries.
      tiles: the first one and the end, counted from the first tile of the share.
      masked: (logits, i) to the logits of tile i, where those that a column does not see are the lowest one.
      refill: (i) starts the copy that takes the place of tile i.
      scale: multiplies the logits.

    Returns:
      Sum of weighted values [d, columns], maximum of the logits in base 2 and sum of the probabilities [columns].
    """
    (stages, keys, d), columns, f32 = memory.k_tiles.shape, memory.weights.shape[1], jnp.float32

    # Each thread sums the probabilities that it holds.
    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, top, total = carry
        stage = rem(i, stages)
        plgpu.barrier_wait(memory.ready.at[stage])
        k_tile = _as_operand(load(memory.k_tiles.at[stage], _BYTES, optimized=True))
        k_scale = load(memory.k_scales.at[stage], PER_ROW) * (scale * LOG2E)

        def logits(s_acc: Ref) -> jax.Array:
            plgpu.wgmma(s_acc, k_tile, memory.queries.at[part].T)
            return s_acc[...]

        s = pl.run_scoped(logits, plgpu.ACC((keys, columns), f32)) * across(k_scale, (keys, columns))
        s = masked(s, i)
        new_top = jnp.maximum(top, s.max(axis=0))
        alpha = jnp.exp2(top - new_top)
        p = jnp.exp2(s - across(new_top, s.shape, 1))
        total = total * across(alpha, s.shape, 1) + p
        acc = acc * across(alpha, acc.shape, 1)
        # All warps are done with the last tile's values and weights: the maximum above waited for them.
        memory.values[...] = load(memory.v_tiles.at[stage], _BYTES, optimized=True).astype(jnp.bfloat16)
        v_scale = load(memory.v_scales.at[stage], PER_ROW)
        memory.weights[...] = (p * across(v_scale, s.shape)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        refill(i)
        acc = pl.run_state(lambda acc: plgpu.wgmma(acc, memory.values.T, memory.weights))(plgpu.ACC.init(acc))
        return acc, new_top, total

    top = plgpu.layout_cast(jnp.full((columns,), LOW, f32), PER_COLUMN)
    acc, top, total = lax.fori_loop(*tiles, step, (zeros((d, columns), WGMMA), top, zeros((keys, columns), WGMMA)))
    return acc, top, total.sum(axis=0)
