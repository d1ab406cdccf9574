"""Products with quantised weights on TPUs: codes of int4, int8 or float8 are all that is read of a matrix.

A program holds a tile of outputs with all its inputs in VMEM. With few rows, codes go into the matrix unit as bfloat16,
which is exact, and the sums over each group are scaled in float32. Groups that are narrower than a chunk of the inputs
share a product: the rows are there once for each group of the chunk, with zeros for the inputs of the other groups.
Zero points and minima multiply the sums of the rows over each group. With many rows, a tile is dequantised in float32
and rounded once to bfloat16, into a buffer that all tiles of rows use.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.tpu import device
from qwen_jax.kernels.tpu.device import LANES, PACKED_ROWS, Core, cache_tile_bytes
from qwen_jax.kernels.tpu.tiles import NT, product, unit, widened
from qwen_jax.kernels.types import Ref

CODES = tuple(map(jnp.dtype, (jnp.int4, jnp.int8, jnp.float8_e4m3fn)))
SCALES = tuple(map(jnp.dtype, (jnp.float16, jnp.bfloat16, jnp.float32)))
"""Dtypes of scales; the kernels read float32."""
FEW_ROWS = 64
"""The maximal number of rows whose products are scaled after the sum; more are multiplied by dequantised weights."""
EXPANDED = 256
"""Rows of a product, those for each group of a chunk together. With more, it takes longer than dequantising."""
_MULTIPLE = 16
# Fewer outputs take as long: one product waits for the one before.
_OUTPUTS = 512
# Chunks of a tile that are in the code one after the other.
_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles.

    Attributes:
      rows: rows of x that are multiplied at once.
      outputs: of a tile.
      chunk: inputs of one product; with many rows, inputs that are dequantised at once.
      few: whether sums are scaled, instead of weights.
      vmem_bytes: what the kernel may use.
    """

    rows: int
    outputs: int
    chunk: int
    few: bool
    vmem_bytes: int


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def choose_tiling(M: int, N: int, K: int, G: int, bits: int, core: Core, tile_bytes: int) -> Tiling:
    """Sizes for M rows and a matrix [N, K] with G groups of inputs.

    Args:
      M, N, K, G: sizes.
      bits: of a code.
      core: that runs the kernel.
      tile_bytes: of codes that are worth a step of the grid.

    Raises:
      InputError: a row of the matrix is too long for VMEM.
    """
    vmem, width = core
    group, most = K // G, vmem * 3 // 4
    # Groups of a multiple of 128 fill a product; a chunk holds whole groups.
    chunk = min(LANES if G > 1 else width, K)
    rows = _padded(M, 8)
    several = 1 if G == 1 else max(1, chunk // group)
    if M <= FEW_ROWS and rows * several <= EXPANDED:
        columns = min(max(tile_bytes * 8 // (bits * K) // LANES * LANES, _OUTPUTS), 1024)
        for outputs in range(columns, 0, -LANES):
            need = _few_bytes(rows, several, outputs, K, G, bits)
            if need <= most:
                return Tiling(rows, min(outputs, N), chunk, True, need)
    for rows, outputs in (
        (512, 1024),
        (512, 512),
        (256, 512),
        (256, 256),
        (128, 256),
        (128, 128),
        (64, 128),
        (16, 128),
    ):
        rows, outputs = min(rows, _padded(M, PACKED_ROWS)), min(outputs, N)
        need = outputs * K * (2 + 2 * bits // 8) + 4 * rows * K + 8 * rows * outputs + 12 * G * _padded(outputs, LANES)
        need += 4 * outputs * _padded(G, LANES) + max(vmem * 5 // 32, 6 << 20)
        if need <= most:
            return Tiling(rows, outputs, chunk, False, need)
    raise InputError(
        f"Expected matrices of which {LANES} outputs fit in the {vmem >> 20} MiB of VMEM; got {K} inputs. Use "
        "implementation='plain', or shard the inputs over devices."
    )


def _few_bytes(rows: int, several: int, outputs: int, K: int, G: int, bits: int) -> int:
    """Two buffers of codes, scales and results; rows; offsets; and what the compiler spills."""
    codes = 2 * outputs * K * bits // 8
    return (
        codes + 4 * rows * several * _padded(K, LANES) + 40 * _padded(G, 8) * outputs + 16 * rows * outputs + (6 << 20)
    )


def needs(
    x: jax.Array | jax.ShapeDtypeStruct,
    weight: jax.Array | jax.ShapeDtypeStruct,
    scales: jax.Array | jax.ShapeDtypeStruct,
) -> dict[str, bool]:
    """What the kernels need, each a noun phrase and whether it is met; for `qwen_jax.kernels.select.unmet`.

    Args:
      x: [M, K].
      weight: codes [N, K].
      scales: [N, G].
    """
    (N, K), G = weight.shape, scales.shape[1]
    group = K // G if G and K % G == 0 else 0
    return {
        "bfloat16 rows": x.shape[0] > 0 and jnp.dtype(x.dtype) == jnp.bfloat16,
        "codes of int4, int8 or float8_e4m3fn": jnp.dtype(weight.dtype) in CODES,
        "scales of float16, bfloat16 or float32": jnp.dtype(scales.dtype) in SCALES,
        "outputs that are a multiple of 16": N > 0 and N % 16 == 0,
        "inputs that are a multiple of 16, at least 128": K >= LANES and K % _MULTIPLE == 0,
        "one group, or groups of 16, 32, 64 or a multiple of 128 inputs": G == 1
        or group in (16, 32, 64)
        or (group > 0 and group % LANES == 0),
    }


# Jitted so that a model of many layers lowers each shape once.
@jax.jit
def matmul(
    x_MK: jax.Array,
    weight_NK: jax.Array,
    scales_NG: jax.Array,
    zeros_NG: jax.Array | None = None,
    mins_NG: jax.Array | None = None,
) -> jax.Array:
    """Multiplies rows by a quantised matrix, x W^T. Runs on local arrays.

    Up to `FEW_ROWS` rows the weight is not rounded, which is more exact than "plain"; beyond, it is, to bfloat16.

    Args:
      x_MK: bfloat16.
      weight_NK: codes; NaN of float8_e4m3fn count as 480 on v5 and v6.
      scales_NG: of the groups of inputs.
      zeros_NG: zero points in the dtype of the codes.
      mins_NG: float32, subtracted after scaling.

    Returns:
      float32 [M, N].

    Raises:
      InputError: arguments that `needs` rejects, or a row of the matrix too long for VMEM.
    """
    if missing := [need for need, met in needs(x_MK, weight_NK, scales_NG).items() if not met]:
        raise InputError(
            f"Expected {' and '.join(missing)}; got rows {x_MK.dtype} {x_MK.shape}, codes {weight_NK.dtype} "
            f"{weight_NK.shape}, scales {scales_NG.dtype} {scales_NG.shape}. Use implementation='plain'."
        )
    (M, K), (N, G) = x_MK.shape, scales_NG.shape
    bits = 4 if weight_NK.dtype == jnp.int4 else 8
    tiles = choose_tiling(M, N, K, G, bits, device.core(), cache_tile_bytes())
    scales_GN = scales_NG.astype(jnp.float32).T
    offsets_GN = None
    if zeros_NG is not None:
        offsets_GN = scales_GN * zeros_NG.astype(jnp.float32).T
    if mins_NG is not None:
        offsets_GN = mins_NG.T if offsets_GN is None else offsets_GN + mins_NG.T
    if tiles.few:
        with jax.named_scope("quantized_few"):
            return _few(x_MK, weight_NK, scales_GN, offsets_GN, tiles)
    with jax.named_scope("quantized_many"):
        zeros_GN = None if zeros_NG is None else zeros_NG.astype(jnp.float32).T
        return _many(x_MK, weight_NK, scales_GN, zeros_GN, None if mins_NG is None else mins_NG.T, tiles)


def groups_of_chunk(K: int, G: int, chunk: int) -> int:
    """Groups that share a chunk of the inputs: one, or as many as fill it."""
    return 1 if G == 1 else max(1, chunk * G // K)


def expanded(x_MK: jax.Array, G: int, chunk: int) -> jax.Array:
    """Rows for products of chunks that hold several groups.

    Args:
      x_MK: rows.
      G: groups.
      chunk: inputs of a chunk.

    Returns:
      [chunks, R * M, chunk] for the R groups of a chunk: row r M + m is row m with zeros outside group r.
    """
    M, K = x_MK.shape
    several = groups_of_chunk(K, G, chunk)
    x = pad_to_multiple(x_MK, 1, chunk).reshape(M, -1, chunk).swapaxes(0, 1)
    if several == 1:
        return x
    own = jnp.arange(chunk) // (K // G) == jnp.arange(several)[:, None]
    wide = jnp.where(own[None, :, None], x[:, None], 0)
    return wide.reshape(x.shape[0], several * M, chunk)


def _few(
    x_MK: jax.Array, w_NK: jax.Array, scales_GN: jax.Array, offsets_GN: jax.Array | None, tiles: Tiling
) -> jax.Array:
    (M, K), (G, N) = x_MK.shape, scales_GN.shape
    x = pad_to_multiple(x_MK, 0, tiles.rows)
    wide = expanded(x, G, tiles.chunk)
    arrays = [wide, w_NK, scales_GN]
    specs = [
        pl.BlockSpec(wide.shape, lambda n: (0, 0, 0)),
        pl.BlockSpec((tiles.outputs, K), lambda n: (n, 0)),
        pl.BlockSpec((G, tiles.outputs), lambda n: (0, n)),
    ]
    if offsets_GN is not None:
        sums_MG = x.astype(jnp.float32).reshape(tiles.rows, G, -1).sum(-1)
        arrays += [sums_MG, offsets_GN]
        specs += [pl.BlockSpec((tiles.rows, G), lambda n: (0, 0)), pl.BlockSpec((G, tiles.outputs), lambda n: (0, n))]
    bits = 4 if w_NK.dtype == jnp.int4 else 8
    out: jax.Array = pl.pallas_call(
        functools.partial(few_program, K=K, G=G, tiles=tiles),
        grid=(-(-N // tiles.outputs),),
        in_specs=specs,
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda n: (0, n)),
        out_shape=jax.ShapeDtypeStruct((tiles.rows, N), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem_bytes),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K, bytes_accessed=N * K * bits // 8 + 4 * N * G + 2 * M * K + 4 * M * N, transcendentals=0
        ),
        name="quantized_few",
    )(*arrays)
    return out[:M]


def few_program(*refs: Ref, K: int, G: int, tiles: Tiling) -> None:
    """One tile of outputs, for few rows.

    Args:
      *refs: rows [chunks, R * rows, chunk] from `expanded`, codes [outputs, K], scales [G, outputs]; with offsets the
        sums of the rows over each group [rows, G] and offsets times scales [G, outputs]; the result [rows, outputs].
      K, G: inputs and their groups.
      tiles: sizes.
    """
    x_ref, w_ref, scales_ref, *offset_refs, out_ref = refs
    rows, chunk, several = tiles.rows, tiles.chunk, groups_of_chunk(K, G, tiles.chunk)
    # Chunks of one group: their sums share a scale.
    per_group = max(1, K // G // chunk)
    whole = K // chunk

    def dot(c: jax.Array | int, size: int = chunk) -> jax.Array:
        start = c * chunk if isinstance(c, int) else pl.multiple_of(c * chunk, LANES)
        codes = widened(w_ref[:, pl.ds(start, size)], jnp.bfloat16)
        return lax.dot_general(x_ref[c][:, :size], codes, NT, preferred_element_type=jnp.float32)

    def scaled(sums: jax.Array, g: jax.Array | int, count: int = several) -> jax.Array:
        parts = [sums[r * rows : (r + 1) * rows] * scales_ref[pl.ds(g + r, 1), :] for r in range(count)]
        return functools.reduce(jnp.add, parts)

    def step(c: jax.Array | int, total: jax.Array) -> jax.Array:
        if G == 1:
            return total + dot(c)
        if per_group == 1:
            return total + scaled(dot(c), c * several)
        sums = functools.reduce(jnp.add, [dot(c * per_group + i) for i in range(per_group)])
        return total + scaled(sums, c)

    steps = whole if G == 1 else whole // per_group
    unrolled = max(1, _UNROLLED // (1 if G == 1 else per_group))
    total = jnp.zeros(out_ref.shape, jnp.float32)
    turns = steps // unrolled

    def turn(i: jax.Array, total: jax.Array) -> jax.Array:
        for j in range(unrolled):
            total = step(i * unrolled + j, total)
        return total

    if turns > 1:
        total = lax.fori_loop(0, turns, turn, total)
    for c in range(turns * unrolled if turns > 1 else 0, steps):
        total = step(c, total)
    # The end of a dimension that is not a multiple of a chunk.
    if rest := K - whole * chunk:
        sums = dot(whole, rest)
        total = total + (sums if G == 1 else scaled(sums, whole * several, rest * G // K))
    if G == 1:
        total = total * scales_ref[...]
    total = total * unit(w_ref.dtype)
    if offset_refs:
        sums_ref, offsets_ref = offset_refs
        total = total - product(sums_ref[...], offsets_ref[...])
    out_ref[...] = total


class _Many(NamedTuple):
    x: Ref
    w: Ref
    scales: Ref
    zeros: Ref | None
    mins: Ref | None
    out: Ref
    wide: Ref


def _many(
    x_MK: jax.Array,
    w_NK: jax.Array,
    scales_GN: jax.Array,
    zeros_GN: jax.Array | None,
    mins_GN: jax.Array | None,
    tiles: Tiling,
) -> jax.Array:
    (M, K), (G, N) = x_MK.shape, scales_GN.shape
    x = pad_to_multiple(x_MK, 0, tiles.rows) if tiles.rows > M else x_MK
    arrays = [x, w_NK, scales_GN, *(a for a in (zeros_GN, mins_GN) if a is not None)]
    of_groups = pl.BlockSpec((G, tiles.outputs), lambda n, m: (0, n))

    def program(*refs: Ref) -> None:
        x_ref, w_ref, scales_ref, *offset_refs, out_ref, wide_ref = refs
        given = iter(offset_refs)
        zeros_ref = None if zeros_GN is None else next(given)
        mins_ref = None if mins_GN is None else next(given)
        _many_program(
            _Many(x_ref, w_ref, scales_ref, zeros_ref, mins_ref, out_ref, wide_ref), K=K, G=G, chunk=tiles.chunk
        )

    bits = 4 if w_NK.dtype == jnp.int4 else 8
    parts = -(-N // tiles.outputs)
    out: jax.Array = pl.pallas_call(
        program,
        grid=(parts, -(-x.shape[0] // tiles.rows)),
        in_specs=[
            pl.BlockSpec((tiles.rows, K), lambda n, m: (m, 0)),
            pl.BlockSpec((tiles.outputs, K), lambda n, m: (n, 0)),
            *[of_groups] * (len(arrays) - 2),
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda n, m: (m, n)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], N), jnp.float32),
        scratch_shapes=[pltpu.VMEM((tiles.outputs, K), jnp.bfloat16)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K, bytes_accessed=N * K * bits // 8 + 2 * parts * M * K + 4 * M * N, transcendentals=0
        ),
        name="quantized_many",
    )(*arrays)
    return out[:M]


def _many_program(refs: _Many, *, K: int, G: int, chunk: int) -> None:
    """One tile of rows and outputs; the first tile of rows dequantises the outputs."""

    group = K // G
    several = 1 if G == 1 else max(1, chunk // group)

    def dequantize(start: jax.Array | int, first: jax.Array | int, size: int, count: int) -> None:
        """Writes `size` inputs, those of `count` groups or a part of one."""
        at = pl.ds(start, size)

        def spread(ref: Ref) -> jax.Array:
            """The number of its group for each input, [outputs, inputs]."""
            # Rows at a dynamic place that is not a multiple of 8 are read one by one.
            of_groups = [ref[pl.ds(first + r, 1), :] for r in range(count)]
            wide = [jnp.broadcast_to(x, (size // count, x.shape[1])) for x in of_groups]
            return (wide[0] if count == 1 else jnp.concatenate(wide)).T

        values = unit(refs.w.dtype) * widened(refs.w[:, at], jnp.float32)
        if refs.zeros is not None:
            values = values - spread(refs.zeros)
        values = values * spread(refs.scales)
        if refs.mins is not None:
            values = values - spread(refs.mins)
        refs.wide[:, at] = values.astype(jnp.bfloat16)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        def step(c: jax.Array, _: None) -> None:
            first = c * several if several > 1 else lax.div(c * chunk, group)
            dequantize(pl.multiple_of(c * chunk, LANES), first, chunk, several)

        whole = K // chunk
        lax.fori_loop(0, whole, step, None)
        # The end of a dimension that is not a multiple of a chunk.
        if rest := K - whole * chunk:
            count = 1 if G == 1 else rest // group
            dequantize(whole * chunk, whole * several if several > 1 else G - 1, rest, count)

    refs.out[...] = lax.dot_general(refs.x[...], refs.wide[...], NT, preferred_element_type=jnp.float32)
