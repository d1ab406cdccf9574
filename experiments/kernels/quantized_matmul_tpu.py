"""Estimates of quantised products on TPUs without a TPU. Results: quantized_matmul_tpu.md.

    python -m experiments.kernels.quantized_matmul_tpu --chips v5p v6e --rows 1 64

Times are estimates of `tpu_schedule`: compiled, not run.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from experiments.kernels.tpu_attention import print_rows
from experiments.kernels.tpu_schedule import CORES, TOPOLOGIES, MiB, compile_kernels, estimate
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import quantized_tpu
from qwen_jax.kernels.tpu.device import Core, cache_tile_bytes
from train.plan.topology import CHIPS

_MODULE = "experiments.kernels.quantized_matmul_tpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix [N, K] and how it is quantised; a group of 0 inputs is the whole row."""

    name: str
    N: int
    K: int
    codes: str
    group: int
    offset: str = "none"


CASES = (
    Case("0.5B gate", 4864, 896, "int4", 128, "zero"),
    Case("7B gate", 18944, 3584, "int4", 128),
    Case("7B gate", 18944, 3584, "int4", 128, "zero"),
    Case("7B gate", 18944, 3584, "int4", 32, "min"),
    Case("7B gate", 18944, 3584, "int8", 0),
    Case("7B gate", 18944, 3584, "float8_e4m3fn", 0),
    Case("7B down", 3584, 18944, "int4", 128, "zero"),
    Case("72B down", 8192, 29568, "int4", 128, "zero"),
    Case("72B gate, one of 8 shards", 3696, 8192, "int4", 128, "zero"),
    Case("72B padded down, one of 8 shards", 8192, 3712, "int4", 128, "zero"),
)


def product(M: int, N: int, K: int, codes: str, group: int, offset: str) -> tuple[Callable[..., Any], list[Any]]:
    """The product and its arguments."""
    import jax
    import jax.numpy as jnp

    G, dtype = K // (group or K), jnp.dtype(codes)
    shapes: list[tuple[tuple[int, int], Any]] = [((M, K), jnp.bfloat16), ((N, K), dtype), ((N, G), jnp.bfloat16)]
    if offset != "none":
        shapes.append(((N, G), dtype if offset == "zero" else jnp.float32))
    arguments = [jax.ShapeDtypeStruct(*x) for x in shapes]
    if offset == "min":
        return lambda x, w, scales, mins: quantized_tpu.matmul(x, w, scales, None, mins), arguments
    return quantized_tpu.matmul, arguments


def row(chip: str, case: Case, M: int) -> dict[str, Any]:
    """The estimate of one product: its time, and the ratio of the floor to it.

    The floor is that of the codes, rows, results, scales (2 bytes) and offsets (those of zero points and minima as they
    are in memory), each moved once, or that of full matrix units.
    """
    core, bandwidth = CORES[chip], CHIPS[chip].hbm_bandwidth / CORES[chip].devices
    G, bits = case.K // (case.group or case.K), 4 if case.codes == "int4" else 8
    kwargs = {"M": M, "N": case.N, "K": case.K, "codes": case.codes, "group": case.group, "offset": case.offset}
    first: dict[str, Any] = {"chip": chip, "matrix": f"{case.name}, {case.N} x {case.K}"}
    first |= {"codes": f"{case.codes}, {case.group or 'row'}, {case.offset}", "rows": M}
    tile_bytes = cache_tile_bytes(bandwidth / core.cores)
    tiles = quantized_tpu.choose_tiling(M, case.N, case.K, G, bits, Core(core.vmem, core.mxu_width), tile_bytes)
    try:
        [kernel] = [k for k in compile_kernels(f"{_MODULE}:product", TOPOLOGIES[chip], kwargs) if "quantized" in k.name]
    except InputError as e:
        return first | {"tiles": f"does not compile: {str(e)[-200:]}"}
    parts, turns = -(-case.N // tiles.outputs), -(-M // tiles.rows)
    small = 2 * M * case.K + 4 * M * case.N
    offsets = {"none": 0.0, "zero": bits / 8, "min": 4.0}[case.offset]
    floor_bytes = case.N * case.K * bits / 8 + case.N * G * (2 + offsets) + small
    # The kernel reads scales and offsets in float32, and all rows for each tile of outputs if they are several tiles.
    arrays = 1 + (case.offset != "none")
    read = case.N * case.K * bits / 8 + 4 * arrays * case.N * G + 4 * M * case.N
    read += 2 * M * case.K * (parts if turns > 1 else 1)
    runs: dict[str, float] = {"step": parts * turns}
    if not tiles.few:
        # The branch that dequantises is the longest one without the final product.
        branches = [r.name for r in kernel.regions if r.parent == "step" and r.kind == "when"]
        inside = {
            b: sum(r.bundles for r in kernel.regions if r.name == b or r.name.startswith(f"{b}.")) for b in branches
        }
        runs[max(inside, key=lambda b: inside[b])] = parts
    # Loops without known trips copy the last tile where it is not whole; that is less than a tile.
    loops = [r.name for r in kernel.regions if r.kind == "loop" and r.parent and r.name != "grid" and r.trips is None]
    runs |= dict.fromkeys(loops, 0)
    found = estimate(kernel, runs, read)
    units = 4 * 128**2 if core.mxu_width == 128 else 4 * 256**2
    floor = max(floor_bytes / bandwidth, 2 * M * case.N * case.K / (2 * units * core.clock * core.cores))
    first |= {"tiles": f"{tiles.rows}/{tiles.outputs}/{tiles.chunk}", "VMEM MiB": round(kernel.vmem / MiB, 1)}
    busiest = max((r for r in kernel.regions), key=found.part)
    first |= {"busiest": f"{busiest.busiest} {busiest.share(busiest.busiest):.2f}", "cores": kernel.cores}
    first |= {"schedule us": round(found.schedule * 1e6, 1), "HBM us": round(found.hbm * 1e6, 1)}
    return first | {"floor us": round(floor * 1e6, 1), "of the floor": round(floor / found.seconds, 2)}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e", "7x"], choices=list(CORES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64, 2048])
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="indices of CASES")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each row")
    args = parser.parse_args()
    chosen = [(chip, CASES[i], M) for chip in args.chips for i in args.cases for M in args.rows]
    for x in chosen:
        print_rows([functools.partial(row, *x)], args.json)


if __name__ == "__main__":
    main()
