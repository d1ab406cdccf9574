"""Grouped products on one Hopper GPU, compared with dense products of as many FLOPs and other kernels.

    python -m experiments.kernels.grouped
    python -m experiments.kernels.grouped --shapes 64x5120x3584 --rows 65536 --routing exact zipf --others
    python -m experiments.kernels.grouped --codes int8 float8_e4m3fn

FLOPs are those of the rows that have a group: 2 rows N K. A number is the median of five timings, each of as many calls
as take a tenth of a second, with normal random inputs. "of dense" is the ratio to `jnp.einsum` of [rows, K] with one
[N, K] (or of [rows, N] with it, or of [rows, N] with [rows, K]), measured just before. Routing: `exact`, the same
number of rows for each group; `even`, random with equal probabilities; `zipf`, the n-th most popular group is 1/n as
likely as the first. `--codes` measures products of codes of 8 bits with scales (W8A8), without the rounding of the
rows, beside those of bfloat16; "of dense" is the ratio to the dense product of bfloat16. `--others` adds
`jax.lax.ragged_dot` where that does not take too long, and tokamax's kernel if it is installed.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.attention import seconds
from qwen_jax.kernels.matmul.grouped_gpu import product, weights_gradient

# 57B-A14B's, A2.7B's, and 256 narrow experts: gate and up, and down. [groups, N, K].
SHAPES = ["64x5120x3584", "64x3584x2560", "60x2816x2048", "60x2048x1408", "256x1536x2048", "256x2048x768"]
_RAGGED_DOT_FLOPS = 2e14
"""The most FLOPs of `jax.lax.ragged_dot`, which multiplies every row with every matrix on GPUs."""


def sizes(routing: str, groups: int, rows: int) -> np.ndarray:
    """Rows of each group, int32 [groups]; the routings are described above."""
    if routing == "exact":
        return np.full(groups, rows // groups, np.int32)
    numbers = np.random.default_rng(0)
    share = np.ones(groups) if routing == "even" else 1 / np.arange(1, groups + 1)
    return numbers.multinomial(rows, numbers.permutation(share / share.sum())).astype(np.int32)


def others(
    x: jax.Array, dy: jax.Array, w: jax.Array, sizes_G: jax.Array
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, kind of product, and call of each other kernel; they need matrices [K, N]."""
    transposed = jnp.swapaxes(w, 1, 2).copy()
    if 2.0 * x.size * w.shape[0] * w.shape[1] < _RAGGED_DOT_FLOPS:
        ragged = jax.jit(jax.lax.ragged_dot)
        yield "jax.lax.ragged_dot", "product", lambda: ragged(x, transposed, sizes_G)
    try:
        import tokamax  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"no tokamax: {error}")
        return
    forward = jax.jit(lambda x, w, s: tokamax.ragged_dot(x, w, s, implementation="mosaic"))
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    gradient = jax.jit(lambda dy, x, s: tokamax.ragged_dot_general(dy, x, s, dims, implementation="mosaic"))
    yield "tokamax", "product", lambda: forward(x, transposed, sizes_G)
    yield "tokamax", "transposed", lambda: forward(dy, w, sizes_G)
    yield "tokamax", "gradient", lambda: gradient(dy, x, sizes_G)


def of_codes(dtype: str, rows: int, G: int, N: int, K: int) -> tuple[jax.Array, ...]:
    """Random codes of rows and of matrices, and the scales of both."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = (jax.random.normal(key, s, jnp.bfloat16) * 32 for key, s in zip(keys, ((rows, K), (G, N, K)), strict=False))
    scales = (jax.random.uniform(key, s) for key, s in zip(keys[2:], ((rows, 1), (G, N)), strict=True))
    return x.astype(dtype), w.astype(dtype), *scales


def measure(group_shape: str, rows: int, routings: list[str], with_others: bool, codes: list[str]) -> None:
    """Prints the rows of one shape."""
    G, N, K = map(int, group_shape.split("x"))
    x, dy, w = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(((rows, K), (rows, N), (G, N, K)))
    )
    dense: dict[str, float] = {}

    def report(routing: str, name: str, what: str, run: Callable[[], Any], there: int = rows) -> float:
        took = seconds(run, jax.block_until_ready)
        rate = 2.0 * there * N * K / took
        of_dense = rate / dense.get(what.split()[0], rate)
        print(
            f"| {group_shape} | {there:,} | {routing} | {name} | {what} | {took * 1e3:.3f} | {rate / 1e12:.0f} | "
            f"{of_dense:.2f} |",
            flush=True,
        )
        return rate

    for what, subscripts, operands in (
        ("product", "mk,nk->mn", (x, w[0])),
        ("transposed", "mn,nk->mk", (dy, w[0])),
        ("gradient", "mn,mk->nk", (dy, x)),
    ):
        einsum = jax.jit(functools.partial(jnp.einsum, subscripts))
        dense[what] = report("", "dense", what, functools.partial(einsum, *operands))
    for routing in routings:
        s = jnp.asarray(sizes(routing, G, rows))
        there = int(s.sum())
        report(routing, "ours", "product", functools.partial(product, x, w, s), there)
        for dtype in codes:
            x8, w8, *scales = of_codes(dtype, rows, G, N, K)
            report(routing, "ours", f"product of {dtype}", lambda: product(x8, w8, s, scales=tuple(scales)), there)  # noqa: B023
        if codes:
            continue
        report(routing, "ours", "transposed", functools.partial(product, dy, w, s, transposed=True), there)
        for what, dtype in (("gradient", jnp.bfloat16), ("gradient in float32", jnp.float32)):
            report(routing, "ours", what, functools.partial(weights_gradient, dy, x, s, dtype=dtype), there)
        for name, what, run in others(x, dy, w, s) if with_others else ():
            try:
                report(routing, name, what, run, there)
            except Exception as error:  # A failure of another kernel must not end the table.
                print(f"| {group_shape} | {there:,} | {routing} | {name} | {what} | {type(error).__name__} | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="GxNxK", help="groups, and size of a matrix")
    parser.add_argument("--rows", nargs="+", type=int, default=[65536, 8192], help="rows of all groups together")
    parser.add_argument("--routing", nargs="+", default=["exact", "even", "zipf"], choices=["exact", "even", "zipf"])
    parser.add_argument("--codes", nargs="+", default=[], choices=["int8", "float8_e4m3fn"], help="products of codes")
    parser.add_argument("--others", action="store_true", help="also measure other kernels")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}\n")
    print("| G x N x K | rows | routing | | | ms | TFLOP/s | of dense |\n" + "|---" * 8 + "|")
    for shape in args.shapes:
        for rows in args.rows:
            measure(shape, rows, args.routing, args.others, args.codes)


if __name__ == "__main__":
    main()
