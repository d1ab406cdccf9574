"""Time of choosing the keys of sparse prefill, step by step, for one chunk and one layer of a long prompt.

    python -m experiments.kernels.sparse_lists                       # 7B, 1,000,064 tokens, chunks of 32,768
    python -m experiments.kernels.sparse_lists --length 131072 --parts 1

Keys and queries are noise with sinks (keys that attract all queries) and bands (rotations by position, as of RoPE), so
that columns and slashes cluster. Every time is the median of five calls, in milliseconds. Each line is a JSON object;
the last ones have the density and the recall of the two patterns and the time of the whole call.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import kernels
from qwen_jax.attention import pooled_blocks, sparse, sparse_parts, vertical_slash
from qwen_jax.attention.sparse import Part, PooledBlocks, Tiling, VerticalSlash


def milliseconds(run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """The median time of five calls after a first one, and the result."""
    result = jax.block_until_ready(run(*args))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3, result


@functools.partial(jax.jit, static_argnames=("shape", "heads"))
def structured(key: jax.Array, shape: tuple[int, ...], first: int, heads: int) -> jax.Array:
    """Rotated vectors [1, heads, tokens, d] that share a direction, bfloat16."""
    d = shape[-1]
    noise = jax.random.normal(key, (1, heads, *shape), jnp.float32)
    common = jax.random.normal(jax.random.key(1), (d,)) * 1.5
    angle = (first + jnp.arange(shape[0]))[:, None] * 1e7 ** (-jnp.arange(0, d, 2) / d)
    one, two = jnp.split(0.7 * noise + common, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(jnp.bfloat16)


def masks(slot: int, T: int, parts: int) -> list[kernels.Mask]:
    """One causal mask, or the three of dual-chunk attention with the chunk length of the 1M checkpoints."""
    end = slot + 1 + jnp.arange(T, dtype=jnp.int32)[None]
    if parts == 1:
        return [kernels.Mask(jnp.zeros_like(end), end)]
    start = (end - 1) // 253952 * 253952
    edges = [jnp.zeros_like(end), jnp.maximum(start - 253952, 0), start, end]
    return [kernels.Mask(edges[i], edges[i + 1]) for i in (2, 1, 0)]


def main() -> None:
    """Prints one line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=1000064, help="tokens of the prompt, a multiple of 128")
    parser.add_argument("--chunk", type=int, default=32768)
    parser.add_argument("--heads", type=int, nargs=3, default=(28, 4, 128), help="query heads, kv heads, head_dim")
    parser.add_argument("--parts", type=int, default=3, choices=(1, 3))
    parser.add_argument("--budgets", type=int, nargs=2, default=(3920, 7650), help="columns, slashes of each head")
    parser.add_argument("--stride", type=int, default=8, help="of pooled blocks")
    args = parser.parse_args()
    S, T, (H, K, d), n = args.length, args.chunk, args.heads, min(sparse.PROBE_ROWS, args.chunk)
    slot, scale = S - T, d**-0.5
    q = structured(jax.random.key(2), (T, d), slot, H).swapaxes(1, 2)
    k = structured(jax.random.key(3), (S, d), 0, K)
    v = jax.random.normal(jax.random.key(4), k.shape, jnp.bfloat16)
    k = k.at[:, :, :4].mul(2)
    parts = [Part(q, mask) for mask in masks(slot, T, args.parts)]
    budgets = jnp.tile(jnp.asarray([args.budgets], jnp.int32), (H, 1))
    lines, blocks = VerticalSlash(((args.budgets[0],),), ((args.budgets[1],),)), PooledBlocks(stride=args.stride)
    tiling = Tiling(128, 64, 8) if kernels.select_attention("auto", q, parts[0].mask, cache=True) == "gpu" else Tiling()

    def show(step: str, ms: float, **more: Any) -> None:
        print(json.dumps({"step": step, "ms": round(ms, 3), **more}), flush=True)

    # The steps of vertical-slash.
    rows = slice(T - n, T)
    probes = [part.q_BTHd[:, rows] for part in parts]
    seen = [kernels.Mask(part.mask.k_start_BT[:, rows], part.mask.k_end_BT[:, rows]) for part in parts]
    lse_of = jax.jit(functools.partial(sparse_parts.rows_lse, scale=scale, implementation="auto"))
    ms, lse = milliseconds(lse_of, probes, seen, k, v)
    show("log-sum-exp of the probe rows", ms)
    ms, scores = milliseconds(
        jax.jit(functools.partial(vertical_slash.line_scores, scale=scale)), probes, seen, lse, k
    )  # fmt: skip
    show("sums over columns and diagonals", ms)
    by_xla = functools.partial(vertical_slash.line_scores, scale=scale, implementation="reference")
    ms, expected = milliseconds(jax.jit(by_xla), probes, seen, lse, k)
    errors = [float(jnp.abs(x - y).max()) for x, y in zip(scores, expected, strict=True)]
    show("sums over columns and diagonals by XLA", ms, greatest_difference=errors)

    @jax.jit
    def choose(vertical: jax.Array, slash: jax.Array, budgets: jax.Array, slot: jax.Array) -> tuple[jax.Array, ...]:
        bounds = sparse_parts.bounds([part.mask for part in parts], tiling.rows)
        made = vertical_slash.choose(
            vertical, slash, budgets, bounds, slot, jnp.int32(T), tiling=tiling, max_pieces=2048,
            max_columns=lines.most_columns,
        )  # fmt: skip
        return made.lists.starts_BHNL, made.lists.counts_BHN, made.places_BHNC, made.columns_BHC

    ms, (*_, columns) = milliseconds(choose, *scores, budgets, jnp.int32(slot))
    show("top-k, pieces and columns", ms)
    gather = jax.jit(lambda k, v, c: (vertical_slash.gather_columns(k, c), vertical_slash.gather_columns(v, c)))
    show("gathering columns", milliseconds(gather, k, v, columns)[0])
    # The steps of pooled blocks.
    ms, means = milliseconds(jax.jit(lambda k, v: (sparse.block_means(k), sparse.block_means(v))), k, v)
    show("means of all blocks", ms)

    def score_blocks(q: jax.Array, k_mean: jax.Array, implementation: str) -> jax.Array:
        bounds = sparse_parts.bounds([part.mask for part in parts], pooled_blocks.BLOCK)
        first, end = -(-bounds.whole_start_PBN // pooled_blocks.BLOCK), bounds.whole_end_PBN // pooled_blocks.BLOCK
        return pooled_blocks.block_scores(
            [q[:, :: blocks.stride]] * len(parts), k_mean, first, end, scale=scale, implementation=implementation
        )

    expected = None
    for implementation in ("xla", "auto"):
        step = jax.jit(functools.partial(score_blocks, implementation=implementation))
        ms, scores_of_blocks = milliseconds(step, q, means[0])
        expected = scores_of_blocks if expected is None else expected
        error = float(jnp.abs(scores_of_blocks - expected).max())
        show(f"scores of blocks, {implementation}", ms, most=float(expected.max()), error=error)
    del expected, scores_of_blocks

    @jax.jit
    def choose_blocks(q: jax.Array, k_mean: jax.Array) -> tuple[jax.Array, ...]:
        bounds = sparse_parts.bounds([part.mask for part in parts], pooled_blocks.BLOCK)
        made = pooled_blocks.choose(
            [q] * len(parts), k_mean, bounds, blocks, scale=scale, max_blocks=min(2048, S // 128)
        )
        return made.lists.starts_BHNL, made.lists.counts_BHN, made.places_BHNJ

    show("scores and lists of blocks", milliseconds(choose_blocks, q, means[0])[0])
    # Whole calls.
    patterns: list[Any] = [lines, blocks]
    for pattern in patterns:
        attend = jax.jit(functools.partial(sparse.attend, pattern=pattern, scale=scale, measure=False))
        ms, _ = milliseconds(
            lambda attend=attend: attend(parts, k, v, slot=slot, budgets_H2=budgets, means=means)
        )  # fmt: skip
        measured = jax.jit(functools.partial(sparse.attend, pattern=pattern, scale=scale))
        found = measured(parts, k, v, slot=slot, budgets_H2=budgets, means=means)[2]
        values = {f: round(float(getattr(found, f).mean()), 4) for f in found.__dataclass_fields__}
        show(type(pattern).__name__, ms, **values)


if __name__ == "__main__":
    main()
