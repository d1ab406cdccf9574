"""Attention of one or a few new rows over a long cache of 8-bit keys and values on Hopper GPUs.

As `flash_decode_gpu`: a thread block takes one key/value head of one sequence and a share of its used key tiles, and a
second kernel merges the shares. The cache is one array, or pages in any order with a table. It is read as int8 or
float8_e4m3fn, half the bytes of bfloat16, so that a block has half the time for a tile. Therefore the tensor cores work
on transposed tiles: the keys are the 64 rows of a product and the few query rows its columns, of which there are 16, 32
or 64. The softmax then handles as many numbers as there are logits, and not 64 query rows of which most are unused.

Rows that see different keys, such as the three parts of dual-chunk attention, need not be columns of one product: each
tile would be computed for the columns of all rows, though one row sees it. The tiles of such rows form one list, row
after row, of which each thread block takes a share. It computes a tile for the columns of its row only, and writes one
result for each row.

8 bits to bfloat16 is exact. Keys are converted in registers, from where the tensor cores take them; values go back to
shared memory, because their product needs them transposed. A thread holds four neighbouring components of a key, where
the tensor cores expect two pairs that are eight apart. The order of the components does not matter for a product, so
that the queries come in that order (`permuted`) and no thread exchanges anything. The scales of the keys multiply the
logits, those of the values the probabilities.

Sources: Flash-Decoding (Dao et al. 2023) for the split keys, PagedAttention (Kwon et al. 2023, arXiv:2309.06180) for
the pages, FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the running softmax.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_gpu_tiles import mask_logits
from qwen_jax.kernels.decode.flash_decode_gpu import Tiling, merge_shares, splits_for
from qwen_jax.kernels.decode.tiles_gpu import Pages, tiles_of_share
from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, tiled, wait_for_previous_kernel
from qwen_jax.kernels.gpu.tiles import PER_COLUMN, PER_ROW, ROWS, WGMMA, across, rem, zeros
from qwen_jax.kernels.matmul.quantized_gpu_tiles import as_bfloat16
from qwen_jax.kernels.softmax import LOG2E, LOW, LOWEST
from qwen_jax.kernels.types import Ref

TILINGS = {64: Tiling(64, 6, 2, needed=2), 128: Tiling(64, 3, 2, needed=2)}
"""By head_dim. While one block of a multiprocessor converts or waits for a maximum, the other one works."""
_BYTES = plgpu.Layout.WGMMA_UPCAST_2X
"""Registers of a tile of 8 bits: each thread holds four neighbouring components of a row."""
PAGE = 32
"""The number of slots of a page must be a multiple of it: the scales of a head's slots are copied to shared memory, to
places that are multiples of 128 bytes."""
DTYPES = tuple(map(jnp.dtype, (jnp.int8, jnp.float8_e4m3fn)))
"""Dtypes of a cache."""
_MAX_PARTS = 8
"""The most rows that are computed one after the other: all their queries are in shared memory, and the ranges of their
tiles in registers."""


def supports(
    dtype: jax.typing.DTypeLike,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    slots: int,
    page: int = 0,
) -> bool:
    """Whether the kernel supports these arguments.

    Args:
      dtype: of the queries.
      length: new rows of a sequence.
      num_heads, num_kv_heads, head_dim: of the attention, on one device.
      slots: length of the cache of a sequence.
      page: slots of a page; 0 for a cache that is one array.
    """
    return (
        jnp.dtype(dtype) == jnp.bfloat16
        and head_dim in TILINGS
        and num_heads % num_kv_heads == 0
        and 0 < length * (num_heads // num_kv_heads) <= ROWS
        and slots > 0
        and (page % PAGE == 0 if page else slots % 8 == 0)
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
      k_BKSd, v_BKSd: the cache, both int8 or both float8_e4m3fn; S is a multiple of 8.
      k_scales_BKS, v_scales_BKS: float32, one scale for each key and each value. NaN of float8_e4m3fn count as 480:
        the scale of such a vector must be NaN. Slots that no row of the sequence sees have no effect, even then.
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
    cache = k_BKSd, k_scales_BKS, v_BKSd, v_scales_BKS
    _check(q_BTHd, cache, start_BT, end_BT, None)
    return _run(q_BTHd, *cache, start_BT, end_BT, scale=scale, disjoint=disjoint)


def paged_attention(
    q_BTHd: jax.Array,
    k_NKPd: jax.Array,
    k_scales_NKP: jax.Array,
    v_NKPd: jax.Array,
    v_scales_NKP: jax.Array,
    pages_BM: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    *,
    uneven: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """`attention` over pages: slot j of row b is slot j % P of page pages[b, j // P]. Runs on local arrays.

    Args:
      q_BTHd: bfloat16 queries; T H / K is at most 64.
      k_NKPd, v_NKPd: the pages, both int8 or both float8_e4m3fn; P is a multiple of 32.
      k_scales_NKP, v_scales_NKP: float32 scales, as for `attention`.
      pages_BM: int32 page table. Entries outside the range of slots that the rows of a sequence see are not read; the
        others must be valid page indices.
      start_BT, end_BT: int32 intervals over the M P slots; rows that see nothing have start >= end.
      scale: multiplies the logits; positive.
      uneven: sequences differ much in length; see `flash_decode_gpu.splits_for`. It affects only the speed.

    Returns:
      As `attention`.

    Raises:
      InputError: arguments that `supports` rejects, or shapes that do not match.
    """
    cache = k_NKPd, k_scales_NKP, v_NKPd, v_scales_NKP
    _check(q_BTHd, cache, start_BT, end_BT, pages_BM)
    return _run(q_BTHd, *cache, start_BT, end_BT, pages_BM, scale=scale, uneven=uneven)


def _check(
    q: jax.Array, cache: tuple[jax.Array, ...], start: jax.Array, end: jax.Array, pages: jax.Array | None
) -> None:
    k, k_scales, v, v_scales = cache
    ranks = q.ndim == k.ndim == 4 and (pages is None or pages.ndim == 2)
    arrays = [q, *cache, start, end, *([] if pages is None else [pages])]
    fits = False
    if ranks:
        (B, T, H, d), (_, K, S, _) = q.shape, k.shape
        slots, page = (S, 0) if pages is None else (S * pages.shape[1], S)
        outer = B if pages is None else k.shape[0]
        fits = k.shape == v.shape == (outer, K, S, d) and k_scales.shape == v_scales.shape == (outer, K, S)
        fits = fits and start.shape == end.shape == (B, T) and (pages is None or pages.shape[0] == B)
        fits = fits and k.dtype == v.dtype and k.dtype in DTYPES and k_scales.dtype == v_scales.dtype == jnp.float32
        fits = fits and all(x.dtype == jnp.int32 for x in arrays[5:])
        fits = fits and supports(q.dtype, T, H, K, d, slots, page)
    if not fits:
        got = ", ".join(f"{x.dtype} {x.shape}" for x in arrays)
        raise InputError(
            f"The kernel for 8-bit caches needs bfloat16 q [B, T, H, d] with head_dim 64 or 128 and T H / K up to "
            f"{ROWS}, keys and values of int8 or float8_e4m3fn, [B, K, S, d] with S a multiple of 8 or pages "
            f"[N, K, P, d] with P a multiple of {PAGE} and a table int32 [B, M], float32 scales of their slots and "
            f"int32 intervals [B, T]; got {got}. Use implementation='reference'."
        )


def permuted(x: jax.Array) -> jax.Array:
    """Vectors [..., d] with their components in the order of `_as_operand`."""
    *outer, d = x.shape
    return x.reshape(*outer, d // 16, 2, 2, 2, 2).swapaxes(-4, -2).reshape(x.shape)


def _as_operand(tile: jax.Array) -> jax.Array:
    """A tile of 8 bits [rows, d] as the left operand of a product in bfloat16, with its components permuted.

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

    result: jax.Array = relabel(as_bfloat16(tile))
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
@functools.partial(jax.jit, static_argnames=("scale", "disjoint", "uneven", "splits", "tiling"))
def _run(
    q: jax.Array, k: jax.Array, k_scales: jax.Array, v: jax.Array, v_scales: jax.Array, start: jax.Array,
    end: jax.Array, pages: jax.Array | None = None, *, scale: float, disjoint: bool = False, uneven: bool = False,
    splits: int | None = None, tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Runs the kernel and the merge."""
    (B, T, H, d), (K, S), tiling = q.shape, k.shape[1:3], tiling or TILINGS[q.shape[3]]
    G, slots = H // K, S * (1 if pages is None else pages.shape[1])
    splits = splits or splits_for(B * K, slots, tiling, uneven)
    # All rows are one part, or each row is one, if that makes the products narrower.
    parts = T if disjoint and T <= _MAX_PARTS and _columns(G) < _columns(T * G) else 1
    rows = T // parts
    eights, columns = -(-splits // 8) * 8, _columns(rows * G)
    # The rows of a part and a group, as the columns of a product: [B, parts K, columns, d].
    grouped = q.reshape(B, parts, rows, K, G, d).swapaxes(2, 3).reshape(B, parts * K, rows * G, d)
    grouped = jnp.pad(permuted(grouped), [(0, 0), (0, 0), (0, columns - rows * G), (0, 0)])
    attend = pl.kernel(
        functools.partial(_attend, group=G, slots=slots, splits=splits, scale=scale, tiling=tiling),
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
    tables = [] if pages is None else [pages]
    outs, lse = attend(grouped, k, k_scales, v, v_scales, start, end, *tables)
    # To the merge, the parts are further heads. Parts or rows are 1, so that reshaping moves nothing.
    out, lse = merge_shares(outs, lse, q.reshape(B, rows, parts * H, d), splits)
    return out.reshape(q.shape), lse.reshape(B, parts, H, rows).swapaxes(1, 2).reshape(B, H, T)


class _Copies(NamedTuple):
    """How the rings are refilled. The table of pages is read one tile before the copy starts.

    Attributes:
      first: pages of the tile that takes the place of the first one.
      after: (i) to the pages of the tile that takes the place of the one after tile i.
      refill: (i, pages) starts the copy that takes the place of tile i.
    """

    first: Pages
    after: Callable[[jax.Array], Pages]
    refill: Callable[[jax.Array, Pages], None]


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block.

    Attributes:
      queries: of each part, [parts, columns, d].
      k_tiles, v_tiles: rings of tiles of 8 bits.
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
    *refs: Ref, group: int, slots: int, splits: int, scale: float, tiling: Tiling,
) -> None:  # fmt: skip
    """The program of a thread block: its share of the tiles of one key/value head of one sequence.

    A part is one row of the sequence, or all its rows. The block attends to one part after the other, and the ring of
    copies runs on from part to part.
    """
    *tables, out_ref, lse_ref = refs
    (columns, d), (K, size), T = q_ref.shape[2:], k_ref.shape[1:3], start_ref.shape[1]
    keys, stages, f32 = tiling.keys, tiling.stages, jnp.float32
    parts = q_ref.shape[1] // K
    rows = T // parts
    # A tile takes one copy, or one for each page that it meets. Over pages all rows are one part.
    piece = math.gcd(size, keys) if tables else keys
    row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
    wait_for_previous_kernel()
    allow_next_kernel()

    def seen_by(part: int | jax.Array) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array, jax.Array]:
        """The intervals of the rows of a part, and the range that holds them."""
        numbers = [part * rows + n for n in range(rows)]
        bounds = [(jnp.maximum(start_ref[row, t], 0), jnp.minimum(end_ref[row, t], slots)) for t in numbers]
        # Every slot that any row sees is in low to high.
        low, high = jnp.int32(2**30), jnp.int32(0)
        for a, b in bounds:
            low, high = jnp.where(a < b, jnp.minimum(low, a), low), jnp.where(a < b, jnp.maximum(high, b), high)
        return bounds, jnp.minimum(low, high), high

    def tiles_of(part: int | jax.Array) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array, jax.Array]:
        """The intervals of the rows of a part, and the first and the number of the tiles that hold them."""
        bounds, low, high = seen_by(part)
        first = lax.div(low, jnp.int32(keys))
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
        begin, count = tiles_of_share(jnp.int32(0), total, split, splits)

        _, seen_low, seen_high = seen_by(0)

        def pages_of(i: jax.Array) -> Pages:
            """The pages of the pieces of a tile. A piece that no row sees may come from any page."""
            slot = [(begin + i + shifts[0]) * keys + n * piece for n in range(keys // piece)] if tables else []
            seen = [jnp.clip(s, seen_low, jnp.maximum(seen_high - 1, 0)) for s in slot]
            return tuple(tables[0][row, lax.div(s, jnp.int32(size))] for s in seen)

        def fetch(i: jax.Array, pages: Pages) -> None:
            """Copies a tile of keys, one of values, and their scales. Beyond the end of the cache it fills in zeros."""
            shift = shifts[0]
            for place, later in zip(places[1:], shifts[1:], strict=True):
                shift = jnp.where(begin + i >= place, later, shift)
            stage, slot = rem(i, stages), pl.multiple_of((begin + i + shift) * keys, keys)
            for n in range(keys // piece):
                if tables:
                    at = pages[n], head, pl.ds(pl.multiple_of(rem(slot + n * piece, size), piece), piece)
                else:
                    at = row, head, pl.ds(slot, piece)
                for gmem, smem in (
                    (k_ref, memory.k_tiles),
                    (k_scales_ref, memory.k_scales),
                    (v_ref, memory.v_tiles),
                    (v_scales_ref, memory.v_scales),
                ):
                    to = smem.at[stage, pl.ds(n * piece, piece)]
                    plgpu.copy_gmem_to_smem(gmem.at[at], to, memory.ready.at[stage])

        # Start as many copies as the rings hold.
        ahead = [pages_of(jnp.int32(i)) for i in range(stages + 1)]
        for i in range(stages):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i), ahead[i]))
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

                def refill(i: jax.Array, pages: Pages) -> None:
                    pl.when(i + stages < count)(lambda: fetch(i + stages, pages))

                copies = _Copies(ahead[stages], lambda i: pages_of(i + (stages + 1)), refill)
                acc, top, sums = _running_softmax(memory, part, (low, high), masked, copies, scale)
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
        k_tiles=tiled((stages, keys, d), k_ref.dtype, d),
        v_tiles=tiled((stages, keys, d), v_ref.dtype, d),
        k_scales=plgpu.SMEM((stages, keys), f32),
        v_scales=plgpu.SMEM((stages, keys), f32),
        # Both operands of a product must be swizzled alike.
        values=tiled((keys, d), jnp.bfloat16, columns),
        weights=tiled((keys, columns), jnp.bfloat16, columns),
        q_ready=plgpu.Barrier(num_arrivals=parts),
        ready=plgpu.Barrier(num_arrivals=4 * (keys // piece), num_barriers=stages),
    )


def _running_softmax(
    memory: _Memory, part: jax.Array, tiles: tuple[jax.Array, jax.Array],
    masked: Callable[[jax.Array, jax.Array], jax.Array], copies: _Copies, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The running softmax over tiles in the rings, for the columns of one part.

    Args:
      memory: of the thread block.
      part: index of its queries.
      tiles: the first one and the end, counted from the first tile of the share.
      masked: (logits, i) to the logits of tile i, where those that a column does not see are the lowest one.
      copies: that refill the rings.
      scale: multiplies the logits.

    Returns:
      Sum of weighted values [d, columns], maximum of the logits in base 2 and sum of the probabilities [columns].
    """
    (stages, keys, d), columns, f32 = memory.k_tiles.shape, memory.weights.shape[1], jnp.float32

    # Each thread sums the probabilities that it holds.
    def step(i: jax.Array, carry: tuple[Any, Pages]) -> tuple[Any, Pages]:
        (acc, top, total), pages = carry
        stage, later = rem(i, stages), copies.after(i)
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
        memory.values[...] = as_bfloat16(load(memory.v_tiles.at[stage], _BYTES, optimized=True))
        v_scale = load(memory.v_scales.at[stage], PER_ROW)
        # The scale of a slot that no row sees may be NaN, and zero times NaN is not zero.
        weights = jnp.where(p == 0, 0.0, p * across(v_scale, s.shape))
        memory.weights[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        copies.refill(i, pages)
        acc = pl.run_state(lambda acc: plgpu.wgmma(acc, memory.values.T, memory.weights))(plgpu.ACC.init(acc))
        return (acc, new_top, total), later

    top = plgpu.layout_cast(jnp.full((columns,), LOW, f32), PER_COLUMN)
    softmax = zeros((d, columns), WGMMA), top, zeros((keys, columns), WGMMA)
    (acc, top, total), _ = lax.fori_loop(*tiles, step, (softmax, copies.first))
    return acc, top, total.sum(axis=0)
