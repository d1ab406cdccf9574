"""Speed of sparse attention beside dense attention on one Hopper GPU, for a chunk of a long prompt. Results are in
sparse_attention.md.

    python -m experiments.kernels.sparse_attention             # ours
    python -m experiments.kernels.sparse_attention --torch     # and FlexAttention of PyTorch with the same blocks

The chunk is the last 32,768 queries of a prompt, with the heads of Qwen2.5-7B. TFLOP/s count 4 d for each pair of query
and key that is both listed and below the diagonal, so masked pairs and the choice of lists earn nothing. Density is the
share of such pairs among those below the diagonal. Every time is the median of five timings, each of several calls in a
row, and has all that a call does, also the tables that XLA computes for the kernel. Each line is a JSON object.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

# Two frameworks share the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.attention import seconds
from qwen_jax.kernels import KeyLists, Mask, cache_mask, column_attention, sparse_attention
from qwen_jax.kernels.attention import flash_gpu

T, H, K, D = 32768, 28, 4, 128
SCALE = D**-0.5
LENGTHS = 131072, 524288, 1000064
DENSITIES = 0.05, 0.1, 0.25
COLUMNS = 4096
_NONE = 2**30


def blocks(key: jax.Array, S: int, density: float) -> KeyLists:
    """Aligned pieces of 128 keys, as from pooled blocks.

    Each head has clusters of a few blocks that most of its query tiles visit, the first block, and a window. Heads
    differ in density.
    """
    N, J, run, kept = T // 128, S // 128, 8, 0.8
    noise, drop = jax.random.split(key)
    smooth = jnp.cumsum(jax.random.normal(noise, (H, J + run)), axis=1)
    rank = jnp.argsort(jnp.argsort(smooth[:, run:] - smooth[:, :-run], axis=1), axis=1)
    often = rank < J * _of_heads(density / kept)[:, None]
    taken = often[:, None] & (jax.random.uniform(drop, (H, N, J)) < kept)
    j, last = jnp.arange(J), (S - T) // 128 + jnp.arange(N)[:, None]
    taken = (taken | (j == 0) | (j > last - 8)) & (j <= last)
    return _compact(jnp.where(taken, 128 * j, _NONE), 128)


def slashes(key: jax.Array, S: int, density: float) -> KeyLists:
    """Pieces of 64 keys at multiples of 8, as from clusters of slashes: each has the same distance from every tile."""
    wide, run = 264, 256
    slots = S // wide
    rank = jnp.argsort(jax.random.uniform(key, (H, slots)), axis=1)
    taken = (rank < slots * _of_heads(density * wide / run)[:, None]) | (jnp.arange(slots) < 4)
    end = S - T + 128 * (1 + jnp.arange(T // 128))
    distance = wide * jnp.arange(slots)[:, None] + 64 * (1 + jnp.arange(run // 64))
    starts = end[:, None, None] - distance
    starts = jnp.where(taken[:, None, :, None] & (starts >= 0), starts, _NONE)
    return _compact(starts.reshape(H, T // 128, -1), 64)


def _of_heads(density: float) -> jax.Array:
    """Densities of the heads: from a third of the mean to twice it."""
    factors = np.geomspace(1, 6, H)
    return jnp.asarray(np.minimum(density * factors / factors.mean(), 1.0))


def _compact(starts_HNL: jax.Array, size: int) -> KeyLists:
    """Lists of the starts that are not `_NONE`."""
    counts = (starts_HNL < _NONE).sum(axis=2, dtype=jnp.int32)
    starts = jnp.sort(starts_HNL.astype(jnp.int32), axis=2)[:, :, : int(counts.max())]
    return KeyLists(starts[None], counts[None], 128, size)


def _widened(several: list[KeyLists]) -> list[KeyLists]:
    """Lists of one capacity, so that one program serves all."""
    capacity = max(x.starts_BHNL.shape[3] for x in several)
    more = [((0, 0), (0, 0), (0, 0), (0, capacity - x.starts_BHNL.shape[3])) for x in several]
    return [
        dataclasses.replace(x, starts_BHNL=jnp.pad(x.starts_BHNL, wide, constant_values=_NONE))
        for x, wide in zip(several, more, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="S")
def visible_pairs(lists: KeyLists, S: int) -> jax.Array:
    """How many keys each query head and row of a tile sees, summed over all but the row: float32 [128]."""
    first = S - T + 128 * jnp.arange(T // 128, dtype=jnp.int32)[:, None]
    counted = jnp.arange(lists.starts_BHNL.shape[3]) < lists.counts_BHN[..., None]

    def of_row(r: jax.Array) -> jax.Array:
        keys = jnp.clip(first + r + 1 - lists.starts_BHNL, 0, lists.size)
        return jnp.where(counted, keys, 0).sum(axis=3).astype(jnp.float32).sum()

    return jax.lax.map(of_row, jnp.arange(128, dtype=jnp.int32))


reference = jax.jit(functools.partial(sparse_attention, scale=SCALE, implementation="reference"))


def errors(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, lists: KeyLists, out: Any, lse: Any
) -> dict[str, float]:
    """The largest errors of 16 rows against the reference, of the output relative to its norm."""
    rows = np.sort(np.random.default_rng(0).choice(T, 16, replace=False))
    tiles = rows // 128
    some = KeyLists(lists.starts_BHNL[:, :, tiles], lists.counts_BHN[:, :, tiles], 1, lists.size)
    of_rows = Mask(mask.k_start_BT[:, rows], mask.k_end_BT[:, rows])
    want, want_lse = reference(q[:, rows], k, v, of_rows, some)
    want, got = (np.asarray(x, np.float32) for x in (want, out[:, rows]))
    worst = (np.linalg.norm(got - want, axis=3) / np.linalg.norm(want, axis=3)).max()
    return {"error": float(worst), "lse_error": float(jnp.abs(lse[:, :, rows] - want_lse).max())}


def flex(lists: KeyLists, S: int) -> float:
    """Seconds of PyTorch's FlexAttention with the same blocks."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    N, J = T // 128, S // 128
    counts = torch.tensor(np.asarray(lists.counts_BHN), device="cuda")
    places = torch.tensor(np.asarray(lists.starts_BHNL // 128), device="cuda")
    indices = torch.zeros(1, H, N, J, dtype=torch.int32, device="cuda")
    indices[..., : places.shape[3]] = torch.where(places < J, places, 0)
    # The last listed block of each tile is the one on the diagonal; the others need no mask.
    on_diagonal = (S - T) // 128 + torch.arange(N, dtype=torch.int32, device="cuda")
    masked = torch.zeros_like(indices)
    masked[..., 0] = on_diagonal
    offset = S - T

    def below_diagonal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i + offset >= j

    mask = BlockMask.from_kv_blocks(
        torch.ones_like(counts),
        masked,
        counts - 1,
        indices,
        BLOCK_SIZE=128,
        mask_mod=below_diagonal,
        seq_lengths=(T, S),
    )
    q, k, v = (torch.randn(1, n, m, D, device="cuda", dtype=torch.bfloat16) for n, m in ((H, T), (K, S), (K, S)))
    compiled = torch.compile(flex_attention, dynamic=False)
    with torch.no_grad():
        run = functools.partial(compiled, q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True)
        return seconds(run, lambda _: torch.cuda.synchronize())


def report(**values: object) -> None:
    rounded = {n: round(x, 5) if isinstance(x, float) else x for n, x in values.items()}
    print(json.dumps(rounded), flush=True)


def rate(flops: float, s: float) -> dict[str, float]:
    return {"ms": s * 1e3, "tflops": flops / s / 1e12}


def measure(S: int, densities: list[float], torch_too: bool) -> None:
    """Prints the lines for a prompt of S tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, T, H, D), (1, K, S, D), (1, K, S, D)
    q, k, v = (jax.random.normal(x, shape, jnp.bfloat16) for x, shape in zip(keys, shapes, strict=True))
    mask, wait = cache_mask(jnp.zeros(1, jnp.int32), jnp.int32(S - T), T), jax.block_until_ready
    pairs = H * (T * (S - T) + T * (T + 1) / 2)
    dense = jax.jit(lambda q, k, v, mask: flash_gpu.attention(q, k, v, mask.k_start_BT, mask.k_end_BT, SCALE, True))
    dense_s = seconds(lambda: dense(q, k, v, mask), wait)
    dense_rate = 4 * D * pairs / dense_s
    report(S=S, kind="dense", **rate(4 * D * pairs, dense_s))
    run = jax.jit(functools.partial(sparse_attention, scale=SCALE, implementation="gpu"))
    makers: tuple[Callable[[jax.Array, int, float], KeyLists], ...] = blocks, slashes
    for make in makers:
        for lists in _widened([make(jax.random.key(1), S, density) for density in densities]):
            visited = float(np.asarray(visible_pairs(lists, S), np.float64).sum())
            s = seconds(functools.partial(run, q, k, v, mask, lists), wait)
            found = errors(q, k, v, mask, lists, *run(q, k, v, mask, lists))
            line = rate(4 * D * visited, s) | {"of_dense_rate": 4 * D * visited / s / dense_rate}
            line |= {"speedup": dense_s / s, "pieces": int(lists.counts_BHN.sum())} | found
            report(S=S, kind=f"{make.__name__} of {lists.size}", density=visited / pairs, **line)
            if torch_too and make is blocks:
                try:
                    report(
                        S=S,
                        kind="torch FlexAttention",
                        density=visited / pairs,
                        **rate(4 * D * visited, flex(lists, S)),
                    )
                except Exception as error:  # Another framework that cannot do it must not end the table.
                    report(S=S, kind="torch FlexAttention", failed=f"{type(error).__name__}: {str(error)[:200]}")
    at = jnp.linspace(0, S - T, COLUMNS, dtype=jnp.int32)
    places = jnp.broadcast_to(at, (1, H, T // 128, COLUMNS))
    own_k, own_v = (jnp.repeat(x[:, :, at], H // K, axis=1) for x in (k, v))
    columns = jax.jit(functools.partial(column_attention, scale=SCALE, implementation="gpu"))
    s = seconds(lambda: columns(q, own_k, own_v, mask, places), wait)
    report(S=S, kind=f"{COLUMNS} columns", **rate(4 * D * H * T * COLUMNS, s))


def main() -> None:
    """Prints a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="multiples of 128, from 32768")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--torch", action="store_true", help="also FlexAttention, which compiles for a while")
    args = parser.parse_args()
    report(jax=jax.__version__, device=jax.devices()[0].device_kind, date=time.strftime("%Y-%m-%d"))
    for S in args.lengths:
        measure(S, args.densities, args.torch)


if __name__ == "__main__":
    main()
