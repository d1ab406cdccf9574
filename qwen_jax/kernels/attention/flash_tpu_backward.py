"""The backward pass of `flash_tpu`: five products, all three gradients in one walk."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.attention.flash_tpu_forward import own_tiles, product, seen, walk
from qwen_jax.kernels.attention.visits import visits
from qwen_jax.kernels.tpu.tiles import Blocks, backward_bytes, cost


@functools.partial(jax.jit, static_argnames=("factor", "scale", "tiles", "dtype"))
def run_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, by: jax.Array, start: jax.Array, end: jax.Array, log2: jax.Array,
    delta: jax.Array, *, factor: float, scale: float, tiles: Blocks, dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of queries (in `dtype`), keys and values of one segment of keys.

    Args:
      q, by: queries and the gradient by the output, [B, H, T, d].
      k, v: [B, K, segment, d].
      start, end: intervals within the segment.
      log2, delta: float32 [B, H, T], log-sum-exp in base 2 and what is taken off the logits' gradient.
      factor, scale: of the logits in base 2, and of the logits.
      tiles: sizes.
      dtype: of the first result.
    """
    (B, H, T, d), (K, segment) = q.shape, k.shape[1:3]
    group, f32, lanes = H // K, jnp.float32, tiles.lanes

    def head(h: Any, g: Any) -> Any:
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
        by_across=pltpu.VMEM((d, tiles.queries), q.dtype),
        k_across=pltpu.VMEM((2, d, tiles.keys), q.dtype),
        probs=pltpu.VMEM((2, tiles.keys, lanes), q.dtype),
        slopes=pltpu.VMEM((2, tiles.keys, lanes), q.dtype),
    )
    names = list(scratch)

    def kernel(*refs: Any) -> None:
        own = dict(zip(names, refs[-len(names) :], strict=True))
        _program(*refs[: -len(names)], **own, factor=factor, scale=scale, tiles=tiles)

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
    )(visits(start, end, tiles.queries, tiles.keys), q, by, k, v, start[:, None], end[:, None], log2[:, :, None],
      delta[:, :, None])  # fmt: skip
    return out


def _program(
    visits_ref: Any, q_ref: Any, by_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, log2_ref: Any,
    delta_ref: Any, dq_ref: Any, dk_ref: Any, dv_ref: Any, *, dq: Any, dk: Any, dv: Any, q_across: Any, by_across: Any,
    k_across: Any, probs: Any, slopes: Any, factor: float, scale: float, tiles: Blocks,
) -> None:  # fmt: skip
    """One tile of queries of one head; gradients of keys and values add up over the heads of a group and their tiles.

    The queries are in n columns. A step takes the probabilities of a column, and their gradient, beside the three
    gradients' products of the column before, which for the first one is the last of the step before.
    """
    (_, keys, lanes), group, tile = probs.shape, pl.program_id(2), pl.program_id(3)
    n = tiles.queries // lanes
    columns = [slice(r * lanes, (r + 1) * lanes) for r in range(n)]

    @pl.when((group == 0) & (tile == 0))
    def zero() -> None:
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    dq[...] = jnp.zeros_like(dq)
    q_across[...], by_across[...] = q_ref[...].T, by_ref[...].T
    probs[1], slopes[1] = jnp.zeros_like(probs[1]), jnp.zeros_like(slopes[1])

    def tile_of_keys(i: Any) -> Any:
        return pl.ds(pl.multiple_of(i * keys, keys), keys)

    def weigh(r: int, i: Any, masked: bool) -> None:
        at = tile_of_keys(i)
        s = product(k_ref[at, :], q_ref[columns[r], :], transposed=True) * factor
        by_p = product(v_ref[at, :], by_ref[columns[r], :], transposed=True)
        p = jnp.exp2(s - log2_ref[:, columns[r]])
        if masked:
            p = jnp.where(seen(start_ref[:, columns[r]], end_ref[:, columns[r]], i * keys, s.shape), p, 0.0)
        probs[r % 2] = p.astype(probs.dtype)
        slopes[r % 2] = (p * (by_p - delta_ref[:, columns[r]])).astype(slopes.dtype)

    def collect(r: int, i: Any) -> None:
        at = tile_of_keys(i)
        dv[:, at] += product(by_across[:, columns[r]], probs[r % 2], transposed=True)
        dq[:, columns[r]] += product(k_across[lax.rem(i, 2)], slopes[r % 2])
        dk[:, at] += product(q_across[:, columns[r]], slopes[r % 2], transposed=True)

    first, last, full_first, full_last = own_tiles(visits_ref, pl.program_id(0), tile, 0, dk.shape[1] // keys)

    def step(i: Any, masked: bool) -> None:
        k_across[lax.rem(i, 2)] = k_ref[tile_of_keys(i), :].T
        for r in range(n):
            weigh(r, i, masked)
            collect((r - 1) % n, jnp.maximum(i - 1, first) if r == 0 else i)

    @pl.when(first < last)
    def go() -> None:
        walk(first, last, full_first, full_last, step)
        collect(n - 1, last - 1)

    dq_ref[...] = (dq[...] * scale).T.astype(dq_ref.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (tile == pl.num_programs(3) - 1))
    def finish() -> None:
        dk_ref[...] = (dk[...] * scale).T.astype(dk_ref.dtype)
        dv_ref[...] = dv[...].T.astype(dv_ref.dtype)
