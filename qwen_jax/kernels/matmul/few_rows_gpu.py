"""Products of a few rows with a large matrix on Hopper GPUs: y = x W^T at the speed at which W can be read.

Decoding multiplies 1 to 128 rows by every weight matrix once a token, so the only cost that matters is streaming W from
memory. experiments/kernels/skinny_matmul.md says what these products reach, and where XLA's are as good.

How: the rows of x, padded to 64, are the M side of wgmma and a tile of rows of W the N side, which may be any multiple
of 8. The tile can therefore be sized so that every SM gets the same number of equal tiles. One warpgroup per SM keeps
all of its shared memory in flight as a ring of TMA copies which runs on across tiles. Rows of x that do not exist are
whatever lies in shared memory: a row of the result depends on its own row of x alone, and theirs are never written.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu.hopper import tiled
from qwen_jax.kernels.types import Ref

MAX_ROWS = 128
_SMS = 132  # of an H100 or H200 SXM; on another part the results are the same and the tiles less even.
_SMEM_BYTES = 227 * 1024 - 2048  # what a block may have, less barriers and alignment.
_MAX_BARRIERS = 32
_MAX_ACCUMULATORS = 64 * 192  # 96 registers a thread.
_SPLIT_BYTES = 200_000  # what another partial result costs beyond its own bytes.


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is divided; a static function of its shape.

    Attributes:
      tile: rows of W (of each gate, if there are two) to one accumulator, a multiple of 8.
      splits: parts of K, each with its own partial result.
      blocks: thread blocks, each with tiles of its own.
      chunk: columns of W to one step of the pipeline.
      stages: steps in flight.
    """

    tile: int
    splits: int
    blocks: int
    chunk: int
    stages: int


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@functools.cache
def plan(rows: int, n: int, k: int, gates: int = 1) -> Plan:
    """Divides a product of `rows` rows with `gates` matrices [n, k].

    The estimated cost, in bytes read from memory, is that of W with some SMs idle, or that of everything which passes
    from L2 to the SMs at about 2.5 times the speed, plus what partial results cost to write and read again.

    Raises:
      InputError: a shape that cannot be run.
    """
    if not 1 <= rows <= MAX_ROWS or n % 8 or k % 64 or n < 8 or k < 128:
        raise InputError(
            f"A skinny product takes 1 to {MAX_ROWS} rows and a matrix [N, K] with N a multiple of 8, and K of 64 "
            f"and at least 128; got {rows} rows and [{n}, {k}]. Use einsum."
        )
    m, x_rows = _up(rows, 64), _up(rows, 8)
    weights = gates * n * k * 2
    best: tuple[float, Plan] | None = None
    for splits in (1, 2, 4, 8) if gates == 1 else (1,):
        for waves in range(1, 33) if splits == 1 else (1,):
            tile = _up(-(-n * splits // (_SMS * waves)), 8)
            if m * tile * gates > _MAX_ACCUMULATORS:
                continue
            tiles = -(-n // tile)
            blocks = min(tiles * splits, _SMS)
            for chunk in (128, 64):
                out_bytes = m * tile * (4 if gates == 1 else 2)
                room = _SMEM_BYTES - out_bytes - (m - x_rows) * chunk * 2
                steps = -(-k // chunk) // splits
                stages = min(_MAX_BARRIERS, steps, room // ((gates * tile + x_rows) * chunk * 2))
                if stages >= min(4, steps) and stages >= 2:
                    break
            else:
                continue
            x_bytes = tiles * x_rows * k * 2
            # An SM has two tiles where its neighbour has one: the longest queue sets the pace.
            longest = weights / n * tile * -(-tiles * splits // blocks) / splits * _SMS
            cost = max(longest, 0.4 * (weights + x_bytes)) + _SPLIT_BYTES * (splits - 1)
            cost += 0 if gates == 2 else splits * rows * n * 4
            if best is None or cost < best[0]:
                best = cost, Plan(tile, splits, blocks, chunk, stages)
    if best is None:
        raise InputError(f"No plan for {rows} rows and {gates} matrices [{n}, {k}]: too large. Use einsum.")
    return best[1]


def _product(x_BK: jax.Array, w_GNK: jax.Array) -> jax.Array:
    (B, K), (gates, N, _) = x_BK.shape, w_GNK.shape
    p = plan(B, N, K, gates)
    m, x_rows = _up(B, 64), _up(B, 8)
    tiles, steps = -(-N // p.tile), -(-K // p.chunk)
    base, extra = divmod(steps, p.splits)
    out_dtype = jnp.dtype(jnp.float32 if gates == 1 else jnp.bfloat16)
    if B > 8:  # Fewer are filled up by TMA, with zeros; a longer axis it wants in whole eights.
        x_BK = jnp.pad(x_BK, ((0, x_rows - B), (0, 0)))

    def skinny_product(
        x_ref: Ref,
        w_ref: Ref,
        out_ref: Ref,
        *,
        x_smem: Ref,
        w_smem: Ref,
        out_smem: Ref,
        full: Ref,
    ) -> None:
        block = lax.axis_index("block")
        # With splits there is one tile to a block; without, a block takes every `blocks`-th tile.
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

        for i in range(p.stages):
            load(jnp.int32(i), i)

        def one_tile(t: jax.Array, _: None) -> None:
            def accumulate(*accs: Any) -> tuple[jax.Array, ...]:
                def step(i: jax.Array, _: None) -> None:
                    slot = i % p.stages
                    plgpu.barrier_wait(full.at[slot])
                    x_tile = x_smem.at[pl.ds(pl.multiple_of(slot * x_rows, 8), m)]
                    for g in range(gates):
                        plgpu.wgmma(accs[g], x_tile, w_smem.at[slot, g].T)
                    # All but this step's are done, so the slot of the step before is free.
                    plgpu.wgmma_wait(gates)
                    ahead = i - 1 + p.stages
                    pl.when((i > 0) & (ahead < total))(lambda: load(ahead, ahead % p.stages))

                lax.fori_loop(t * steps, (t + 1) * steps, step, None)
                plgpu.wgmma_wait(0)
                return tuple(acc[...] for acc in accs)

            accs = pl.run_scoped(accumulate, *[plgpu.ACC((m, p.tile), jnp.float32)] * gates)
            out = accs[0] if gates == 1 else accs[0] / (1 + jnp.exp(-accs[0])) * accs[1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = out.astype(out_dtype)
            plgpu.commit_smem()
            columns = pl.ds((first + t * p.blocks) * p.tile, p.tile)
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, B)], out_ref.at[split, :, columns])

        lax.fori_loop(0, own_tiles, one_tile, None)
        plgpu.wait_smem_to_gmem(0)

    # Slots of x overlap: each holds x_rows rows, and wgmma reads on into the next to fill its 64.
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
            f"A skinny product takes bfloat16 x [B, K] and w [{'2, ' if gates else ''}N, K]; "
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
      float32 [splits, B, N], partial sums over parts of K: the product is the sum over the first axis, which XLA fuses
      into whatever follows. `plan(B, N, K).splits` says how many.

    Raises:
      InputError: shapes or dtypes that cannot be run.
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
      InputError: shapes or dtypes that cannot be run.
    """
    _check(x_BK, w_2FK, (2,))
    return _product(x_BK, w_2FK)[0]
