"""Estimates of sparse attention on TPUs without a TPU, beside the dense kernel. Results: tpu_attention.md.

    python -m experiments.kernels.tpu_sparse                      # the default sizes and their neighbours
    python -m experiments.kernels.tpu_sparse --chips v6e --rows 256 --per 4 8

Cycles are bundles of `tpu_schedule`: compiled, not run. Those of a step include starting and awaiting its copies.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.kernels.tpu_attention import print_rows
from experiments.kernels.tpu_schedule import CORES, TOPOLOGIES, Kernel, MiB, Region, compile_kernels
from qwen_jax.kernels.attention.sparse_tpu import PIECE, Tiling, tiling
from qwen_jax.kernels.tpu.device import Core
from train.plan.topology import CHIPS

_MODULE = "experiments.kernels.tpu_sparse"
# Pairs of 1024 x 1024 of one causal row of a million tokens: 28 layers and 28 heads of 7B.
_UNITS_7B = 28 * 28 * (1_000_000 / 1024) ** 2 / 2
_DENSITY = 0.08


def lists(d: int, tiles: dict[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """`sparse_tpu.attention` over lists, with these sizes."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.kernels.attention import sparse_tpu
    from qwen_jax.kernels.attention.lists import KeyLists

    T, S, H, sizes = 2048, 131072, 2, Tiling(**tiles)

    def attention(q: Any, k: Any, v: Any, start: Any, end: Any, starts: Any, counts: Any) -> Any:
        pieces = KeyLists(starts, counts, sizes.rows, PIECE)
        return sparse_tpu.attention(q, k, v, start, end, pieces, d**-0.5, tiles=sizes)

    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, T, H, d), (1, H, S, d)))
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    N = T // sizes.rows
    return attention, [q, k, k, *[integers((1, T))] * 2, integers((1, H, N, S // PIECE)), integers((1, H, N))]


def columns(d: int, tiles: dict[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """`sparse_tpu.columns` over 4,096 columns, with these sizes."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.kernels.attention import sparse_tpu

    T, C, H, sizes = 2048, 4096, 2, Tiling(**tiles)

    def attention(q: Any, k: Any, v: Any, start: Any, end: Any, places: Any) -> Any:
        return sparse_tpu.columns(q, k, v, start, end, places, d**-0.5, 0.0, sizes.rows, tiles=sizes)

    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, T, H, d), (1, H, C, d)))
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return attention, [q, k, k, *[integers((1, T))] * 2, integers((1, H, T // sizes.rows, C))]


def step_cycles(kernel: Kernel) -> tuple[Region, int, int, int]:
    """The body without masks, the cycles of a step around it, those of a masked step, and those outside the loop."""
    inside = {r.name: [x for x in kernel.regions if x.parent == r.name] for r in kernel.regions if r.kind == "loop"}
    loop, full, masked = next(
        (kernel[name], *bodies)
        for name, regions in inside.items()
        if len(bodies := [x for x in regions if x.share("MXU")]) == 2
    )
    around = loop.bundles + sum(r.bundles for r in kernel.regions if r.parent == loop.name and r not in (full, masked))
    within = [r for r in kernel.regions if r.name == loop.name or r.name.startswith(f"{loop.name}.")]
    outside = sum(r.bundles for r in kernel.regions if r not in within and r.name.startswith("step"))
    return full, full.bundles + around, masked.bundles + around, outside


def row(chip: str, d: int, tiles: Tiling, what: str = "lists") -> dict[str, Any]:
    """An estimate of one kernel."""
    core = CORES[chip]
    kwargs = {"d": d, "tiles": dataclasses.asdict(tiles)}
    [kernel] = compile_kernels(f"{_MODULE}:{what}", TOPOLOGIES[chip], kwargs)
    full, step, masked, outside = step_cycles(kernel)
    area = tiles.rows * tiles.keys / 2**20
    found: dict[str, Any] = {
        "chip": chip,
        "kernel": what,
        "d": d,
        "rows x pieces": f"{tiles.rows} x {tiles.per}",
        "parts": tiles.parts,
    }
    found |= {"body": f"keys {'down' if tiles.transposed else 'across'}, {tiles.lanes}"}
    found |= {"default": "yes" if tiles == _default(chip, d, tiles.rows) else ""}
    found |= {"vmem_MiB": round(kernel.vmem / MiB, 1), "cycles of a step": step}
    found |= {"of 1024^2": round(step / area), "masked": round(masked / area), "of a program": outside}
    found |= {unit: f"{full.share(unit):.2f}" for unit in ("MXU", "VALU", "XLU", "VSTORE")}
    found |= {"spills of 1024^2": round(full.spills / area)}
    # What a core reads while it computes.
    seconds = step / core.clock
    bandwidth = CHIPS[chip].hbm_bandwidth / core.devices / core.cores
    found["HBM share"] = round(2 * tiles.keys * max(d, 128) * 2 / seconds / bandwidth, 2)
    chip_cores = core.cores * core.devices
    found["7B, 1M, density .08: s"] = round(_UNITS_7B * _DENSITY * step / area / core.clock / chip_cores, 1)
    return found


def _default(chip: str, d: int, rows: int | None = None) -> Tiling:
    return tiling(d, "bfloat16", rows, Core(CORES[chip].vmem, CORES[chip].mxu_width))


def _candidates(chip: str, d: int, rows: Sequence[int], per: Sequence[int]) -> list[Tiling]:
    """Both bodies where both are possible, with parts of 4 pieces."""
    width, found = CORES[chip].mxu_width, []
    for r, p in itertools.product(rows, per):
        found.append(Tiling(r, p, p // 4, 128, False))
        # The transposed body needs an even number of units, and is slower where head_dim is the width of the unit.
        lanes = [n for n in (256, 128) if n <= min(r, width) and p // 4 * r // n % 2 == 0]
        if d < width and lanes:
            found.append(Tiling(r, p, p // 4, lanes[0], True))
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e", "7x"], choices=list(CORES))
    parser.add_argument("--kernel", default="lists", choices=("lists", "columns"))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--rows", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--per", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--defaults", action="store_true", help="only the default body and pieces for each of --rows")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each row")
    args = parser.parse_args()
    jobs = []
    for chip in args.chips:
        for d in args.head_dims:
            every = _candidates(chip, d, args.rows, args.per)
            tilings = [_default(chip, d, rows) for rows in args.rows] if args.defaults else every
            jobs += [functools.partial(row, chip, d, tiles, args.kernel) for tiles in tilings]
    print_rows(jobs, args.json)


if __name__ == "__main__":
    main()
