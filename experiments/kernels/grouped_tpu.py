"""Estimates of grouped products on TPUs without a TPU: ours, megablox and ragged_dot. Results: tpu_grouped.md.

    python -m experiments.kernels.grouped_tpu ours       # our kernels
    python -m experiments.kernels.grouped_tpu ours --passes forward int8 --chips v5e v5p v6e    # W8A8
    python -m experiments.kernels.grouped_tpu ours --passes forward float8_e4m3fn --chips 7x
    python -m experiments.kernels.grouped_tpu megablox   # jax.experimental.pallas.ops.tpu.megablox
    python -m experiments.kernels.grouped_tpu ragged     # jax.lax.ragged_dot_general, and what XLA does around it

Times are estimates of `tpu_schedule`: compiled, not run.
"""

import argparse
import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.kernels.tpu_attention import print_rows
from experiments.kernels.tpu_schedule import CORES, TOPOLOGIES, Estimate, Kernel, MiB, compile_kernels, estimate
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import grouped_tpu
from qwen_jax.kernels.tpu.device import Core
from train.plan.topology import CHIPS

_MODULE = "experiments.kernels.grouped_tpu"
OPERATIONS = ("forward", "input gradient", "weights gradient")
CODES = ("int8", "float8_e4m3fn")
"""Further passes of our kernels: the forward pass of codes with scales."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The weights [N, K] of a layer, and the numbers of groups that a device may have."""

    name: str
    groups: tuple[int, ...]
    N: int
    K: int


CASES = (
    Case("57B-A14B gate and up", (64, 8), 5120, 3584),
    Case("57B-A14B down", (64, 8), 3584, 2560),
    Case("A2.7B gate and up", (60,), 2816, 2048),
    Case("A2.7B down", (60,), 2048, 1408),
    Case("256 experts gate and up", (256,), 1536, 2048),
    Case("256 experts down", (256,), 2048, 768),
)
ROWS = (65536, 8192)


def _arguments(operation: str, M: int, G: int, N: int, K: int) -> list[Any]:
    import jax
    import jax.numpy as jnp

    x, dy, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((M, K), (M, N), (G, N, K)))
    sizes = jax.ShapeDtypeStruct((G,), jnp.int32)
    return {"forward": [x, w, sizes], "input gradient": [dy, w, sizes], "weights gradient": [dy, x, sizes]}[operation]


def ours(
    operation: str, M: int, G: int, N: int, K: int, dtype: str = "bfloat16"
) -> tuple[Callable[..., Any], list[Any]]:
    """`qwen_jax.kernels.matmul.grouped_tpu`; `dtype` is that of the gradient of the weights."""
    import jax
    import jax.numpy as jnp

    if operation in CODES:
        shapes: tuple[tuple[tuple[int, ...], str], ...] = (
            ((M, K), operation), ((G, N, K), operation), ((G,), "int32"), ((M, 1), "float32"), ((G, N), "float32")
        )  # fmt: skip
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return lambda x, w, sizes, *scales: grouped_tpu.product(x, w, sizes, scales=scales), arguments
    function: Callable[..., Any] = functools.partial(grouped_tpu.product, transposed=operation == "input gradient")
    if operation == "weights gradient":
        function = functools.partial(grouped_tpu.weights_gradient, dtype=jnp.dtype(dtype))
    return function, _arguments(operation, M, G, N, K)


def megablox(
    operation: str, M: int, G: int, N: int, K: int, tiling: Sequence[int]
) -> tuple[Callable[..., Any], list[Any]]:
    """JAX's megablox; `tiling` is for the rows and the two dimensions of its own product."""
    import jax.numpy as jnp

    # The package has a function of the same name as this module.
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    options: dict[str, Any] = {"preferred_element_type": jnp.bfloat16, "tiling": tuple(tiling)}
    arguments = _arguments(operation, M, G, N, K)
    if operation == "weights gradient":
        return lambda dy, x, sizes: kernels.tgmm(dy.T, x, sizes, **options), arguments
    return functools.partial(kernels.gmm, transpose_rhs=operation == "forward", **options), arguments


def ragged(operation: str, M: int, G: int, N: int, K: int) -> tuple[Callable[..., Any], list[Any]]:
    """`jax.lax.ragged_dot_general`, as XLA compiles it."""
    import jax.numpy as jnp
    from jax import lax

    sums = {"forward": (1, 2), "input gradient": (1, 1), "weights gradient": (0, 0)}[operation]
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((sums[0],), (sums[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if operation == "weights gradient" else [0],
    )
    return (
        lambda a, b, sizes: lax.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=jnp.bfloat16),
        _arguments(operation, M, G, N, K),
    )


def routed(M: int, G: int, even: bool) -> list[int]:
    """Rows of each group: as even as possible, or random with equal probabilities."""
    if even:
        return [M * (g + 1) // G - M * g // G for g in range(G)]
    return [int(n) for n in np.random.default_rng(0).multinomial(M, [1 / G] * G)]


def ranges(sizes: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """The range of rows of a group in a tile, for each visit of a tile by a group."""
    begin = 0
    for size in sizes:
        end = begin + size
        for tile in range(begin // rows, -(-end // rows) if size else 0):
            yield max(begin - tile * rows, 0), min(end - tile * rows, rows)
        begin = end


def _blocks(low: int, high: int, block: int) -> int:
    return -(-(high - low // 16 * 16) // block)


def _zeroing(kernel: Kernel) -> list[str]:
    """The branch that writes zeros, the longest one in a step without products, and the regions inside it."""

    def within(name: str) -> list[str]:
        return [r.name for r in kernel.regions if r.name == name or r.name.startswith(f"{name}.")]

    branches = [within(r.name) for r in kernel.regions if r.parent == "step"]
    free = [names for names in branches if not set(names) & set(kernel.products)]
    return max(free, key=lambda names: sum(kernel[name].bundles for name in names))


def ours_estimate(
    kernel: Kernel, tiles: grouped_tpu.Tiling, operation: str, case: Case, sizes: Sequence[int], itemsize: int
) -> Estimate:
    """The estimate of one kernel of `ours`. Branches that only copy weights are counted at every visit."""
    M, G, N, K = sum(sizes), len(sizes), case.N, case.K
    visits, every = list(ranges(sizes, tiles.rows)), -(-M // tiles.rows) + G
    if operation == "weights gradient":
        n_parts, k_parts = -(-N // tiles.columns), -(-K // tiles.inner)
        parts = n_parts * k_parts
        whole = [high - low == tiles.rows for low, high in visits]
        cut = sum(_blocks(*v, tiles.block) for v, all_ in zip(visits, whole, strict=True) if not all_)
        full, block = kernel.products
        runs = {full: sum(whole), block: cut}
        numbers = 2 * M * (k_parts * N + n_parts * K) + itemsize * G * N * K
    else:
        inner, out = (N, K) if operation == "input gradient" else (K, N)
        parts = -(-out // tiles.columns)
        [block] = kernel.products
        runs = {block: sum(_blocks(*v, tiles.block) for v in visits)}
        # The scale of a row of codes takes a row of a register.
        size, scale = (1, 4 * 128) if operation in CODES else (2, 0)
        numbers = size * (parts * M * inner + sum(n > 0 for n in sizes) * N * K) + parts * M * scale + 2 * M * out
    runs |= {"step": every} | dict.fromkeys(_zeroing(kernel), 0)
    # Loops around blocks are counted once per visit, whatever the number of their blocks.
    runs |= {r.name: every for r in kernel.regions if r.kind == "loop" and r.parent and r.name not in (*runs, "grid")}
    return estimate(kernel, {name: parts * n for name, n in runs.items()}, numbers)


def ours_tiles(chip: str, operation: str, case: Case) -> grouped_tpu.Tiling:
    """The sizes that `ours` uses on a chip."""
    core = CORES[chip]
    kind = Core(core.vmem, core.mxu_width), core.cores
    if operation == "weights gradient":
        return grouped_tpu.gradient_tiling(case.N, case.K, *kind)
    inner, out = (case.N, case.K) if operation == "input gradient" else (case.K, case.N)
    return grouped_tpu.product_tiling(inner, out, *kind, itemsize=1 if operation in CODES else 2)


def _peak(chip: str) -> float:
    """FLOP/s of a device at the clock that the estimates use."""
    core = CORES[chip]
    units = 4 * 128**2 if core.mxu_width == 128 else 4 * 256**2
    return 2 * units * core.clock * core.cores


@functools.cache
def _compiled(chip: str, operation: str, case: Case, dtype: str) -> Kernel:
    # The cost of a visit depends neither on the number of rows nor on the number of groups.
    kwargs = {"operation": operation, "M": 4096, "G": 4, "N": case.N, "K": case.K, "dtype": dtype}
    kernels = compile_kernels(f"{_MODULE}:ours", TOPOLOGIES[chip], kwargs)
    [kernel] = [k for k in kernels if k.name.startswith("grouped")]
    return kernel


def kernel_row(chip: str, case: Case, operation: str, dtype: str) -> dict[str, Any]:
    """What `ours` is compiled to: for each body with products the use of the matrix units and the spilled registers."""
    tiles, kernel = ours_tiles(chip, operation, case), _compiled(chip, operation, case, dtype)
    sizes = f"{tiles.rows}/{tiles.block}/{tiles.columns}" + f"/{tiles.inner}" * (operation == "weights gradient")
    bodies = [kernel[name] for name in kernel.products]
    row: dict[str, Any] = {"chip": chip, "weights": f"{case.name}, {case.N} x {case.K}", "pass": operation}
    row |= {"tiles": sizes, "cores": kernel.cores, "VMEM MiB": round(kernel.vmem / MiB, 1)}
    row["MXU"] = " + ".join(f"{x.share('MXU'):.2f}" for x in bodies)
    return row | {"spills": " + ".join(str(x.spills) for x in bodies)}


def times_row(chip: str, case: Case, M: int, G: int, passes: Sequence[str], dtype: str) -> dict[str, Any]:
    """Estimates of `ours`: ms with even groups, and the ratio of the bound to the time with even / random groups."""
    row: dict[str, Any] = {"chip": chip, "weights": case.name, "rows": M, "groups": G}
    for operation in passes:
        kernel, tiles = _compiled(chip, operation, case, dtype), ours_tiles(chip, operation, case)
        itemsize = 4 if operation == "weights gradient" and dtype == "float32" else 2
        even, random = (ours_estimate(kernel, tiles, operation, case, routed(M, G, x), itemsize) for x in (True, False))
        times = _times(chip, case, M, G, even, random, itemsize, operation in CODES)
        by_bytes = " HBM" if even.hbm > even.schedule else ""
        row[operation] = f"{times['ms']}{by_bytes}, {times['of the bound']:.2f} / {times['random: of the bound']:.2f}"
    return row | {"bound ms": times["bound ms"]}


def _times(
    chip: str, case: Case, M: int, G: int, even: Estimate, random: Estimate, itemsize: int = 2, codes: bool = False
) -> dict[str, Any]:
    work = 2 * M * case.N * case.K / _peak(chip)
    moved = 2 * M * (case.N + case.K) + itemsize * G * case.N * case.K
    if codes:
        # They are multiplied twice as fast.
        work, moved = work / 2, M * (2 * case.N + case.K) + G * case.N * case.K
    # The lower bound of any kernel: full matrix units, or each array read or written once.
    bound = max(work, moved * CORES[chip].devices / CHIPS[chip].hbm_bandwidth)
    times = {"ms": even.seconds, "schedule ms": even.schedule, "HBM ms": even.hbm}
    times |= {"random: schedule ms": random.schedule, "random: HBM ms": random.hbm, "bound ms": bound}
    row: dict[str, Any] = {name: round(x * 1e3, 3) for name, x in times.items()}
    row |= {"TFLOP/s": round(2 * M * case.N * case.K / even.seconds / 1e12)}
    row |= {"of the peak": round(work / even.seconds, 2), "of the bound": round(bound / even.seconds, 2)}
    return row | {"random: of the bound": round(bound / random.seconds, 2)}


def _divisors(size: int, most: int) -> list[int]:
    return [n for n in range(128, min(size, most) + 1, 128) if size % n == 0]


def megablox_tilings(operation: str, case: Case) -> list[tuple[int, int, int]]:
    """Tilings to try: rows, and divisors of both dimensions, which need no masks for remainders."""
    if operation == "weights gradient":
        first, second = case.N, case.K
    else:
        first, second = (case.N, case.K) if operation == "input gradient" else (case.K, case.N)
    most = 1536 if operation == "weights gradient" else 4096
    return [(rows, x, _divisors(second, 1536)[-1]) for rows in (256, 512) for x in _divisors(first, most)[-2:]]


def megablox_row(chip: str, operation: str, case: Case) -> dict[str, Any]:
    """The best of `megablox_tilings` for random groups, with `ROWS[0]` rows and all groups."""
    M, G, best = ROWS[0], case.groups[0], None
    for tiling in megablox_tilings(operation, case):
        kwargs = {"operation": operation, "M": 4096, "G": 4, "N": case.N, "K": case.K, "tiling": tiling}
        try:
            kernels = compile_kernels(f"{_MODULE}:megablox", TOPOLOGIES[chip], kwargs)
        except InputError:  # It does not fit in the VMEM that megablox asks for.
            continue
        kernel = kernels[-1]
        one = functools.partial(_megablox_estimate, kernel, tiling, operation, case)
        even, random = (one(routed(M, G, kind)) for kind in (True, False))
        if best is None or random.seconds < best[0]:
            best = random.seconds, tiling, kernel, even, random
    if best is None:
        raise InputError(f"Expected a tiling of megablox that compiles for {chip}; none of those tried does.")
    _, tiling, kernel, even, random = best
    body = max((kernel[n] for n in kernel.products), key=lambda r: r.bundles)
    row = {"chip": chip, "weights": case.name, "pass": operation, "rows": M, "groups": G}
    row |= {"tiling": "/".join(map(str, tiling)), "cores": kernel.cores, "MXU": round(body.share("MXU"), 2)}
    return row | {"spills": body.spills} | _times(chip, case, M, G, even, random)


def _megablox_estimate(
    kernel: Kernel, tiling: tuple[int, int, int], operation: str, case: Case, sizes: Sequence[int]
) -> Estimate:
    """The estimate of one kernel of `megablox`. It multiplies whole tiles and does not skip any part."""
    M, G, N, K, rows = sum(sizes), len(sizes), case.N, case.K, tiling[0]
    visits = len(list(ranges(sizes, rows)))
    if operation == "weights gradient":
        n_parts, k_parts = N // tiling[1], K // tiling[2]
        parts, [body] = n_parts * k_parts, kernel.products
        ends = [r.name for r in kernel.regions if r.parent == "step" and not body.startswith(r.name)]
        runs = {"step": visits, body: visits} | dict.fromkeys(ends, G)
        numbers = 2 * M * (k_parts * N + n_parts * K) + 2 * G * N * K
        return estimate(kernel, {name: parts * n for name, n in runs.items()}, numbers)
    inner, out = (N, K) if operation == "input gradient" else (K, N)
    sums, parts = -(-inner // tiling[1]), -(-out // tiling[2])
    # Of its two branches with products, the one for the end of the sum also stores, with a mask.
    bodies = sorted(kernel.products, key=lambda name: kernel[name].bundles)
    runs = {"step": visits * sums, bodies[-1]: visits} | dict.fromkeys(bodies[:-1], visits * (sums - 1))
    other = [r.name for r in kernel.regions if r.parent == "step" and not any(b.startswith(r.name) for b in bodies)]
    runs |= dict.fromkeys(other, visits)
    numbers = 2 * M * out + (2 * (parts * M * inner + G * N * K))
    if sums > 1:
        numbers = 2 * M * out + 2 * visits * (parts * rows * inner + N * K)
    return estimate(kernel, {name: parts * n for name, n in runs.items()}, numbers)


def ragged_row(chip: str, operation: str, case: Case) -> dict[str, Any]:
    """What XLA compiles `ragged` to, with `ROWS[0]` rows and all groups."""
    import jax

    from train.plan.topology import target

    M, G = ROWS[0], case.groups[0]
    kwargs: dict[str, Any] = {"operation": operation, "M": M, "G": G, "N": case.N, "K": case.K}
    here = jax.sharding.SingleDeviceSharding(target(TOPOLOGIES[chip]).devices[0])
    function, arguments = ragged(**kwargs)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in arguments]
    compiled = jax.jit(function).lower(*placed).compile()
    row: dict[str, Any] = {"chip": chip, "weights": case.name, "pass": operation, "rows": M, "groups": G}
    found = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    temporary = memory.temp_size_in_bytes
    row |= {"kernel": found is not None, "temporary MiB": round(temporary / MiB)}
    row["FLOP / needed"] = round(costs["flops"] / (2 * M * case.N * case.K), 1)
    if found is None:
        return row
    tiling = int(found[1]), int(found[2]), int(found[3])
    kernels = compile_kernels(f"{_MODULE}:ragged", TOPOLOGIES[chip], kwargs)
    [kernel] = [k for k in kernels if "metadata" not in k.name]
    [body] = [kernel[name] for name in kernel.products]
    row |= {"tiling": "/".join(map(str, tiling)), "cores": kernel.cores, "MXU": round(body.share("MXU"), 2)}
    even, random = (_megablox_estimate(kernel, tiling, operation, case, routed(M, G, kind)) for kind in (True, False))
    # Weights that are transposed first are read and written once in addition to the bytes of the kernel.
    copied = 2 * temporary * CORES[chip].devices / CHIPS[chip].hbm_bandwidth if temporary > MiB else 0.0
    return row | {"spills": body.spills, "copy ms": round(copied * 1e3, 3)} | _times(chip, case, M, G, even, random)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="ours", choices=("ours", "megablox", "ragged"))
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e", "7x"], choices=list(CORES))
    parser.add_argument("--passes", nargs="+", default=list(OPERATIONS), choices=OPERATIONS + CODES)
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="indices of CASES")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of our weights gradient")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each row")
    args = parser.parse_args()
    chosen = [(chip, x, CASES[i]) for chip in args.chips for x in args.passes for i in args.cases]
    if args.what == "ours":
        print_rows([functools.partial(kernel_row, chip, case, x, args.dtype) for chip, x, case in chosen], args.json)
        layers = [
            (chip, CASES[i], M, G) for chip in args.chips for i in args.cases for M in ROWS for G in CASES[i].groups
        ]
        print_rows([functools.partial(times_row, *x, args.passes, args.dtype) for x in layers], args.json)
    elif args.what == "megablox":
        print_rows([functools.partial(megablox_row, *x) for x in chosen], args.json)
    else:
        for x in chosen:
            print_rows([functools.partial(ragged_row, *x)], args.json)


if __name__ == "__main__":
    main()
