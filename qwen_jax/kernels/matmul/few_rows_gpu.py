"""Products of a few rows with a large matrix on Hopper GPUs, y = x W^T, bound by the bandwidth at which W is read.

Decoding multiplies 1 to 128 rows by every weight matrix once per token, so the only cost that matters is reading W.
experiments/kernels/skinny_matmul.md has what these products reach, and where XLA's are as fast.

The rows of x, padded to 64, are the M side of wgmma, and a tile of rows of W is the N side, which may be any multiple
of 8. The tile size can therefore be chosen so that every multiprocessor gets the same number of equal tiles. One
warpgroup per multiprocessor keeps all of its shared memory in flight, as a ring of TMA copies that continues across
tiles. Padding rows of x are whatever is in shared memory: a row of the result depends only on its own row of x, and
their results are not written.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import tiled
from qwen_jax.kernels.types import Ref

MAX_ROWS = 128
_MAX_BARRIERS = 32
_MAX_ACCUMULATORS = 64 * 192  # 96 registers of a thread.
_SPLIT_BYTES = 200_000  # The cost of another partial result beyond its own bytes.


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is divided; a static function of its shape.

    Attributes:
      tile: rows of W (of each gate, if there are two) in one accumulator, a multiple of 8.
      splits: parts of K, each with its own partial result.
      blocks: thread blocks, each with its own tiles.
      chunk: columns of W in one step of the pipeline.
      stages: steps in flight.
    """

    tile: int
    splits: int
    blocks: int
    chunk: int
    stages: int


def _up(n: int, multiple: int) -> int:
    """Rounds up to a multiple."""
    return -(-n // multiple) * multiple


@functools.cache
def choose_tiling(rows: int, n: int, k: int, gates: int = 1) -> Tiling:
    """Divides a product of `rows` rows with `gates` matrices [n, k].

    The estimated cost, in bytes read from memory, is the larger of two: W, including the time of idle multiprocessors,
    and everything that goes from L2 to the multiprocessors at about 2.5 times the speed. Writing and reading partial
    results is added.

    Raises:
      InputError: a shape that is not supported.
    """
    if not 1 <= rows <= MAX_ROWS or n % 8 or k % 64 or n < 8 or k < 128:
        raise InputError(
            f"The kernel for few rows needs 1 to {MAX_ROWS} rows and a matrix [N, K] with N a multiple of 8, and K a "
            f"multiple of 64 and at least 128; got {rows} rows and [{n}, {k}]. Use einsum."
        )
    m, x_rows = _up(rows, 64), _up(rows, 8)
    weights = gates * n * k * 2
    best: tuple[float, Tiling] | None = None
    for splits in (1, 2, 4, 8) if gates == 1 else (1,):
        for waves in range(1, 33) if splits == 1 else (1,):
            tile = _up(-(-n * splits // (MULTIPROCESSORS * waves)), 8)
            if m * tile * gates > _MAX_ACCUMULATORS:
                continue
            tiles = -(-n // tile)
            blocks = min(tiles * splits, MULTIPROCESSORS)
            for chunk in (128, 64):
                out_bytes = m * tile * (4 if gates == 1 else 2)
                room = TILE_SHARED_BYTES - out_bytes - (m - x_rows) * chunk * 2
                steps = -(-k // chunk) // splits
                stages = min(_MAX_BARRIERS, steps, room // ((gates * tile + x_rows) * chunk * 2))
                if stages >= min(4, steps) and stages >= 2:
                    break
            else:
                continue
            x_bytes = tiles * x_rows * k * 2
            # The multiprocessor with the most tiles determines the time.
            longest = weights / n * tile * -(-tiles * splits // blocks) / splits * MULTIPROCESSORS
            cost = max(longest, 0.4 * (weights + x_bytes)) + _SPLIT_BYTES * (splits - 1)
            cost += 0 if gates == 2 else splits * rows * n * 4
            if best is None or cost < best[0]:
                best = cost, Tiling(tile, splits, blocks, chunk, stages)
    if best is None:
        raise InputError(
            f"The kernel for few rows has no tiling for {rows} rows and {gates} matrices [{n}, {k}]: its shared memory "
            "and registers do not suffice. Use einsum."
        )
    return best[1]


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block: rings of x and W, the result, and "a step has arrived"."""

    x_smem: Ref
    w_smem: Ref
    out_smem: Ref
    full: Ref


def _product(x_BK: jax.Array, w_GNK: jax.Array) -> jax.Array:
    """Runs the kernel: partial products [splits, B, N], or with two gates the SwiGLU [1, B, N]."""
    (B, K), (gates, N, _) = x_BK.shape, w_GNK.shape
    p = choose_tiling(B, N, K, gates)
    m, x_rows = _up(B, 64), _up(B, 8)
    tiles, steps = -(-N // p.tile), -(-K // p.chunk)
    base, extra = divmod(steps, p.splits)
    out_dtype = jnp.dtype(jnp.float32 if gates == 1 else jnp.bfloat16)
    if B > 8:  # TMA pads fewer rows with zeros by itself, but needs a longer axis to be a multiple of 8.
        x_BK = jnp.pad(x_BK, ((0, x_rows - B), (0, 0)))

    def skinny_product(x_ref: Ref, w_ref: Ref, out_ref: Ref, **scratch: Ref) -> None:
        x_smem, w_smem, out_smem, full = _Memory(**scratch)
        block = lax.axis_index("block")
        # With splits a block has one tile; without, it takes every `blocks`-th tile.
        split = block % p.splits
        first = block // p.splits
        zero = block * 0
        start = split * base + lax.min(split, extra)
        steps = base + (split < extra).astype(jnp.int32)
        own_tiles = (tiles - first + p.blocks - 1) // p.blocks if p.splits == 1 else jnp.int32(1)
        total = own_tiles * steps

        def load(step: jax.Array | int, slot: jax.Array | int) -> None:
            tile = first + (step // steps) * p.blocks
            columns = pl.ds((start + step % steps) * p.chunk, p.chunk)
            x_rows_ref = x_smem.at[pl.ds(slot * x_rows, x_rows)]
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(zero, x_rows), columns], x_rows_ref, full.at[slot])
            for g in range(gates):
                rows = pl.ds(g * N + tile * p.tile, p.tile)
                plgpu.copy_gmem_to_smem(w_ref.at[rows, columns], w_smem.at[slot, g], full.at[slot])

        # Fill the ring.
        for i in range(p.stages):
            load(jnp.int32(i), i)

        def one_tile(t: jax.Array, _: None) -> None:
            def accumulate(*accs: Ref) -> tuple[jax.Array, ...]:
                def step(i: jax.Array, _: None) -> None:
                    slot = i % p.stages
                    plgpu.barrier_wait(full.at[slot])
                    x_tile = x_smem.at[pl.ds(pl.multiple_of(slot * x_rows, 8), m)]
                    for g in range(gates):
                        plgpu.wgmma(accs[g], x_tile, w_smem.at[slot, g].T)
                    # All products but those of this step are done, so the slot of the previous step is free.
                    plgpu.wgmma_wait(gates)
                    ahead = i - 1 + p.stages
                    pl.when((i > 0) & (ahead < total))(lambda: load(ahead, ahead % p.stages))

                lax.fori_loop(t * steps, (t + 1) * steps, step, None)
                plgpu.wgmma_wait(0)
                return tuple(acc[...] for acc in accs)

            accs = pl.run_scoped(accumulate, *[plgpu.ACC((m, p.tile), jnp.float32)] * gates)
            out = accs[0] if gates == 1 else accs[0] / (1 + jnp.exp(-accs[0])) * accs[1]
            # Write the tile, once the previous one has left its buffer.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = out.astype(out_dtype)
            plgpu.commit_smem()
            columns = pl.ds((first + t * p.blocks) * p.tile, p.tile)
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, B)], out_ref.at[split, :, columns])

        lax.fori_loop(0, own_tiles, one_tile, None)
        plgpu.wait_smem_to_gmem(0)

    # The slots of x overlap: each holds x_rows rows, and wgmma reads into the next slot to fill its 64.
    x_smem = tiled(((p.stages - 1) * x_rows + m, p.chunk), jnp.bfloat16)
    kernel = plgpu.kernel(
        skinny_product,
        out_type=jax.ShapeDtypeStruct((p.splits, B, N), out_dtype),
        grid=(p.blocks,),
        grid_names=("block",),
        scratch_types={
            "x_smem": x_smem,
            "w_smem": tiled((p.stages, gates, p.tile, p.chunk), jnp.bfloat16),
            "out_smem": plgpu.SMEM((m, p.tile), out_dtype),
            "full": plgpu.Barrier(num_arrivals=1 + gates, num_barriers=p.stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    out: jax.Array = kernel(x_BK, w_GNK.reshape(gates * N, K))
    return out


def _check(x_BK: jax.Array, w: jax.Array, gates: tuple[int, ...]) -> None:
    fits = x_BK.ndim == 2 and w.ndim == 2 + len(gates) and w.shape[:-2] == gates and x_BK.shape[1] == w.shape[-1]
    if not fits or x_BK.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        raise InputError(
            f"The kernel for few rows needs bfloat16 x [B, K] and w [{'2, ' if gates else ''}N, K]; "
            f"got {x_BK.dtype} {x_BK.shape} and {w.dtype} {w.shape}."
        )


# Jitted so that a model of many layers lowers each shape once.
@jax.jit
def skinny_matmul(x_BK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Multiplies a few rows by a large matrix. Runs on local arrays: call it inside `jax.shard_map` on a mesh.

    Args:
      x_BK: bfloat16, 1 to 128 rows.
      w_NK: bfloat16; N a multiple of 8, K of 64.

    Returns:
      float32 [splits, B, N], partial sums over parts of K. The product is the sum over the first axis, which XLA fuses
      into what follows. `choose_tiling(B, N, K)` has the number of splits.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    _check(x_BK, w_NK, ())
    return _product(x_BK, w_NK[None])


@jax.jit
def skinny_swiglu(x_BK: jax.Array, w_2FK: jax.Array) -> jax.Array:
    """silu(x W_0^T) * (x W_1^T) for a few rows (Shazeer 2020, arXiv:2002.05202), in float32 until the result.

    Args:
      x_BK: bfloat16, 1 to 128 rows.
      w_2FK: bfloat16, gate and up.

    Returns:
      bfloat16 [B, F].

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    _check(x_BK, w_2FK, (2,))
    return _product(x_BK, w_2FK)[0]
