"""The backward pass of `flash_tpu`: all three gradients in one kernel, with five matrix products."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.attention.flash_tpu_forward import over_key_tiles, seen, segment_key_tiles
from qwen_jax.kernels.attention.flash_tpu_tiles import Tiling, backward_bytes, cost
from qwen_jax.kernels.attention.tile_ranges import key_tiles
from qwen_jax.kernels.tpu.tiles import product
from qwen_jax.kernels.types import Ref


@functools.partial(jax.jit, static_argnames=("factor", "scale", "tiles", "dtype"))
def run_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, start: jax.Array, end: jax.Array, log2: jax.Array,
    delta: jax.Array, *, factor: float, scale: float, tiles: Tiling, dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradients with respect to queries, keys and values, for one segment of keys.

    Args:
      q, dout: queries and the gradient with respect to the output, [B, H, T, d].
      k, v: [B, K, segment, d].
      start, end: mask intervals within the segment.
      log2, delta: float32 [B, H, T], from `gradient_terms`.
      factor, scale: scale of the logits in base 2, and of the logits.
      tiles: sizes.
      dtype: of the gradient with respect to the queries.
    """
    (B, H, T, d), (K, segment) = q.shape, k.shape[1:3]
    group, f32, lanes = H // K, jnp.float32, tiles.lanes

    def head(h: jax.Array, g: jax.Array) -> jax.Array:
        return h * group + g

    queries = pl.BlockSpec((None, None, tiles.queries, d), lambda b, h, g, i, _: (b, head(h, g), i, 0))
    keys = pl.BlockSpec((None, None, segment, d), lambda b, h, g, i, _: (b, h, 0, 0))
    ends = pl.BlockSpec((None, 1, tiles.queries), lambda b, h, g, i, _: (b, 0, i))
    rows = pl.BlockSpec((None, None, 1, tiles.queries), lambda b, h, g, i, _: (b, head(h, g), 0, i))
    scratch = dict(
        dq=pltpu.VMEM((d, tiles.queries), f32),
        dk=pltpu.VMEM((d, segment), f32),
        dv=pltpu.VMEM((d, segment), f32),
        q_across=pltpu.VMEM((d, tiles.queries), q.dtype),
        dout_across=pltpu.VMEM((d, tiles.queries), q.dtype),
        k_across=pltpu.VMEM((2, d, tiles.keys), q.dtype),
        probs=pltpu.VMEM((2, tiles.keys, lanes), q.dtype),
        slopes=pltpu.VMEM((2, tiles.keys, lanes), q.dtype),
    )

    def kernel(*refs: Ref) -> None:
        memory = _Memory(**dict(zip(scratch, refs[12:], strict=True)))
        _program(_Refs(*refs[:12]), memory, factor=factor, scale=scale, tiles=tiles)

    like_k = jax.ShapeDtypeStruct(k.shape, k.dtype)
    out: tuple[jax.Array, jax.Array, jax.Array] = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, group, T // tiles.queries),
            in_specs=[queries, queries, keys, keys, ends, ends, rows, rows],
            out_specs=[queries, keys, keys],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), like_k, like_k],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=backward_bytes(tiles, d, q.dtype.itemsize),
        ),
        cost_estimate=cost(5, q, k),
        name="flash_backward",
    )(key_tiles(start, end, tiles.queries, tiles.keys), q, dout, k, v, start[:, None], end[:, None], log2[:, :, None],
      delta[:, :, None])  # fmt: skip
    return out


class _Refs(NamedTuple):
    """References to the operands and results of a program."""

    tiles: Ref
    q: Ref
    dout: Ref
    k: Ref
    v: Ref
    start: Ref
    end: Ref
    log2: Ref
    delta: Ref
    dq: Ref
    dk: Ref
    dv: Ref


class _Memory(NamedTuple):
    """Scratch in VMEM.

    Attributes:
      dq, dk, dv: transposed gradients in float32.
      q_across, dout_across, k_across: transposed inputs; keys of two tiles.
      probs, slopes: probabilities and the gradient with respect to the logits of a column; two buffers.
    """

    dq: Ref
    dk: Ref
    dv: Ref
    q_across: Ref
    dout_across: Ref
    k_across: Ref
    probs: Ref
    slopes: Ref


def _program(refs: _Refs, memory: _Memory, *, factor: float, scale: float, tiles: Tiling) -> None:
    """One query tile of one head. The gradients dk and dv are summed over the query tiles and heads of a group.

    The queries form n columns of `lanes`. A step computes the probabilities of a column and the gradient with respect
    to its logits, beside the products of all three gradients for the previous column; for the first column that is the
    last column of the previous step.
    """
    q_ref, dout_ref, k_ref, v_ref, start_ref, end_ref = refs.q, refs.dout, refs.k, refs.v, refs.start, refs.end
    dq, dk, dv, q_across, dout_across, k_across, probs, slopes = memory
    (_, keys, lanes), group, tile = probs.shape, pl.program_id(2), pl.program_id(3)
    n = tiles.queries // lanes
    columns = [slice(r * lanes, (r + 1) * lanes) for r in range(n)]

    @pl.when((group == 0) & (tile == 0))
    def zero() -> None:
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    # Transpose the queries, and clear what the first step adds.
    dq[...] = jnp.zeros_like(dq)
    q_across[...], dout_across[...] = q_ref[...].T, dout_ref[...].T
    probs[1], slopes[1] = jnp.zeros_like(probs[1]), jnp.zeros_like(slopes[1])

    def tile_of_keys(i: jax.Array) -> slice | pl.Slice:
        return pl.ds(pl.multiple_of(i * keys, keys), keys)

    def compute_slopes(r: int, i: jax.Array, masked: bool) -> None:
        at = tile_of_keys(i)
        s = product(k_ref[at, :], q_ref[columns[r], :], transposed=True) * factor
        dp = product(v_ref[at, :], dout_ref[columns[r], :], transposed=True)
        p = jnp.exp2(s - refs.log2[:, columns[r]])
        if masked:
            p = jnp.where(seen(start_ref[:, columns[r]], end_ref[:, columns[r]], i * keys, s.shape), p, 0.0)
        probs[r % 2] = p.astype(probs.dtype)
        slopes[r % 2] = (p * (dp - refs.delta[:, columns[r]])).astype(slopes.dtype)

    def accumulate(r: int, i: jax.Array) -> None:
        at = tile_of_keys(i)
        dv[:, at] += product(dout_across[:, columns[r]], probs[r % 2], transposed=True)
        dq[:, columns[r]] += product(k_across[lax.rem(i, 2)], slopes[r % 2])
        dk[:, at] += product(q_across[:, columns[r]], slopes[r % 2], transposed=True)

    visited = segment_key_tiles(refs.tiles, pl.program_id(0), tile, 0, dk.shape[1] // keys)
    first, last = visited.first, visited.last

    def step(i: jax.Array, masked: bool) -> None:
        k_across[lax.rem(i, 2)] = k_ref[tile_of_keys(i), :].T
        for r in range(n):
            compute_slopes(r, i, masked)
            accumulate((r - 1) % n, jnp.maximum(i - 1, first) if r == 0 else i)

    @pl.when(first < last)
    def run() -> None:
        over_key_tiles(visited, step)
        accumulate(n - 1, last - 1)

    refs.dq[...] = (dq[...] * scale).T.astype(refs.dq.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (tile == pl.num_programs(3) - 1))
    def finish() -> None:
        refs.dk[...] = (dk[...] * scale).T.astype(refs.dk.dtype)
        refs.dv[...] = dv[...].T.astype(refs.dv.dtype)
