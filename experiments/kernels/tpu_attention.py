"""Estimates of attention kernels on TPUs without a TPU: ours and splash attention. Results: tpu_attention.md.

    python -m experiments.kernels.tpu_attention ours        # forward, gradient and decoding by qwen_jax.kernels
    python -m experiments.kernels.tpu_attention splash      # JAX's splash attention, forward and gradient
    python -m experiments.kernels.tpu_attention published   # tokamax's and its published times; needs tokamax

Times are estimates of `tpu_schedule`: compiled, not run.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments.kernels.tpu_schedule import CORES, TOPOLOGIES, Estimate, Kernel, MiB, compile_kernels, estimate
from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_tpu_tiles import Tiling, choose_tiling
from qwen_jax.kernels.tpu.device import Core, cache_tile_bytes
from train.plan.topology import CHIPS

_MODULE = "experiments.kernels.tpu_attention"


def ours(T: int, H: int, d: int, gradient: bool = False) -> tuple[Callable[..., Any], list[Any]]:
    """`flash_tpu` with as many key/value heads as query heads; with `gradient` its gradient too."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.kernels.attention import flash_tpu

    def attention(q: Any, k: Any, v: Any, start: Any, end: Any) -> Any:
        return flash_tpu.attention(q, k, v, start, end, d**-0.5)

    def both(q: Any, k: Any, v: Any, start: Any, end: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, start, end), q, k, v)
        return pull(out)

    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, T, H, d), (1, H, T, d)))
    ends = jax.ShapeDtypeStruct((1, T), jnp.int32)
    return both if gradient else attention, [q, k, k, ends, ends]


def ours_decoding(
    B: int, S: int, H: int, K: int, d: int, page: int = 0, held: str = "bfloat16"
) -> tuple[Callable[..., Any], list[Any]]:
    """`flash_decode_tpu`, one token a row, over a cache of the dtype `held`; with `page` over a paged cache."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.kernels.decode import flash_decode_tpu

    q, ends = jax.ShapeDtypeStruct((B, 1, H, d), jnp.bfloat16), jax.ShapeDtypeStruct((B, 1), jnp.int32)
    scales = [] if held == "bfloat16" else [jax.ShapeDtypeStruct((B, K, S), jnp.float32)]
    if page:
        cache = jax.ShapeDtypeStruct((B * S // page, K, page, d), held)
        table = jax.ShapeDtypeStruct((B, S // page), jnp.int32)

        def paged(q: Any, k: Any, v: Any, table: Any, start: Any, end: Any, *scales: Any) -> Any:
            return flash_decode_tpu.paged_attention(q, k, v, table, start, end, d**-0.5, scales)

        return paged, [q, cache, cache, table, ends, ends, *scales * 2]
    kernel = flash_decode_tpu.quantized_attention if scales else flash_decode_tpu.attention
    cache = jax.ShapeDtypeStruct((B, K, S, d), held)
    return functools.partial(kernel, scale=d**-0.5), [q, *[cache, *scales] * 2, ends, ends]


def splash(
    T: int, H: int, d: int, block_q: int, block_kv: int, block_compute: int, gradient: str = ""
) -> tuple[Callable[..., Any], list[Any]]:
    """JAX's splash attention, causal; with `gradient` "fused" (one more kernel) or "split" (two) its gradient too."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    fused = gradient == "fused"
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * H)
    attention = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return _with_gradient(attention, jax.ShapeDtypeStruct((H, T, d), jnp.bfloat16), bool(gradient))


def tokamax(
    T: int, H: int, d: int, causal: bool, blocks: tuple[int, int, int], layouts: str, scheduler: bool, gradient: bool
) -> tuple[Callable[..., Any], list[Any]]:
    """The splash attention of tokamax, whose times are published."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # type: ignore[import-not-found]
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    sizes: dict[str, Any] = dict(zip(("block_q", "block_kv", "block_kv_compute"), blocks, strict=True))
    if gradient:
        sizes |= dict(zip(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), blocks, strict=True))
    for name, layout in zip(("q_layout", "k_layout", "v_layout"), layouts, strict=True):
        sizes[name] = kernel.QKVLayout(int(layout))
    config = dataclasses.replace(
        kernel.SplashConfig.get_default(), use_experimental_scheduler=scheduler, use_base2_exp=True, **sizes
    )
    mask = (masks.CausalMask if causal else masks.FullMask)((T, T))
    attention = kernel.make_splash_mha_single_device(mask, config=config)
    return _with_gradient(attention, jax.ShapeDtypeStruct((H, T, d), jnp.bfloat16), gradient)


def _with_gradient(attention: Callable[..., Any], x: Any, gradient: bool) -> tuple[Callable[..., Any], list[Any]]:
    import jax

    if not gradient:
        return attention, [x] * 3
    return lambda q, k, v, dout: jax.vjp(attention, q, k, v)[1](dout), [x] * 4


def causal_tiles(T: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """The number of tiles that a causal mask leaves whole, and of those that it masks partly."""
    starts = range(0, T, block_q)
    whole = sum((i + 1) // block_kv for i in starts)
    return whole, sum(math.ceil((i + block_q) / block_kv) for i in starts) - whole


def _splash_estimate(kernel: Kernel, T: int, H: int, d: int, block_q: int, block_kv: int, fused: bool) -> Estimate:
    """The estimate of one kernel of `splash`. Its grid has tiles above the diagonal, which it skips."""
    q_tiles, kv_tiles, visits = T // block_q, T // block_kv, sum(causal_tiles(T, block_q, block_kv))
    by_keys = "dkv" in kernel.name
    # Positions of a head read and written: once, and at each visit. Fused, each key tile writes its part of dq.
    once = 4 * T if by_keys else (3 if "dq" in kernel.name else 2) * T
    often = 2 * visits * (block_q if by_keys else block_kv) + (T * kv_tiles if fused and by_keys else 0)
    ends = kv_tiles if by_keys else q_tiles
    runs = {"step": q_tiles * kv_tiles, "step.0": ends, "step.1": visits, "step.2": ends}
    # A row of head_dim 64 takes the space of one of 128 in HBM.
    return estimate(kernel, {name: H * n for name, n in runs.items()}, H * max(d, 128) * 2 * (once + often))


SPLASH_BLOCKS = {
    "": ((1024, 1024, 512), (2048, 2048, 256), (2048, 2048, 512)),
    "fused": ((1024, 1024, 512),),
    "split": ((1024, 1024, 512),),
}
LENGTHS = (4096, 16384, 131072)


def splash_rows(chip: str, d: int, blocks: tuple[int, int, int], gradient: str) -> dict[str, Any]:
    """Estimates of `splash` at `LENGTHS`, heads x head_dim = 2048; gradients without the forward pass."""
    H, names = 2048 // d, ("block_q", "block_kv", "block_compute")
    # The cost of a step depends neither on the length nor on the number of heads.
    kwargs = {"T": 2 * max(blocks), "H": 2, "d": d, "gradient": gradient} | dict(zip(names, blocks, strict=True))
    kernels = compile_kernels(f"{_MODULE}:splash", TOPOLOGIES[chip], kwargs)
    kernels = sorted((k for k in kernels if ("fwd" in k.name) != bool(gradient)), key=lambda kernel: kernel.name)
    tiles = [kernel["step.1"] for kernel in kernels]
    row = {"chip": chip, "d": d, "pass": gradient or "forward", "blocks": "/".join(map(str, blocks))}
    row |= {"cores": kernels[0].cores, "vmem_MiB": round(max(kernel.vmem for kernel in kernels) / MiB, 1)}
    row["bundles"] = "+".join(str(tile.bundles) for tile in tiles)
    for unit in ("MXU", "VALU", "XLU", "EUP", "VLOAD", "VSTORE"):
        row[unit] = "+".join(f"{tile.share(unit):.2f}" for tile in tiles)
    row["spills"] = "+".join(str(tile.spills) for tile in tiles)
    for T in LENGTHS:
        seconds = sum(_splash_estimate(k, T, H, d, *blocks[:2], gradient == "fused").seconds for k in kernels)
        row[f"{T // 1024}K ms"] = round(seconds * 1e3, 3)
        row[f"{T // 1024}K TFLOP/s"] = round(2 * T * T * 2048 * (2.5 if gradient else 1) / seconds / 1e12)
    return row


# From openxla/tokamax, data/autotuning/{tpu_v5,tpu_v6_lite,tpu7x}/pallas_mosaic_tpu_flash_attention*.json: medians of
# five, with the blocks found fastest. 16,384 tokens in rows of T, heads x head_dim = 2048, bfloat16. Chip, T, head_dim,
# causal, blocks, layouts of q, k, v (1 head_dim minor, 2 sequence minor), scheduler, gradient, ms.
PUBLISHED: tuple[tuple[str, int, int, bool, tuple[int, int, int], str, bool, bool, float], ...] = (
    ("v5p", 16384, 64, False, (2048, 2048, 256), "122", False, False, 10.464),
    ("v5p", 16384, 128, False, (2048, 2048, 256), "121", False, False, 5.368),
    ("v5p", 16384, 128, True, (2048, 2048, 256), "112", False, False, 3.202),
    ("v5p", 16384, 256, True, (1024, 1024, 256), "121", False, False, 3.087),
    ("v5p", 4096, 128, True, (1024, 1024, 256), "121", False, False, 1.237),
    ("v6e", 16384, 64, False, (2048, 2048, 512), "222", True, False, 12.667),
    ("v6e", 16384, 64, True, (2048, 2048, 512), "222", True, False, 7.415),
    ("v6e", 16384, 128, False, (2048, 2048, 512), "211", True, False, 6.658),
    ("v6e", 16384, 128, True, (2048, 2048, 512), "211", True, False, 3.981),
    ("v6e", 16384, 256, False, (2048, 2048, 512), "211", True, False, 3.754),
    ("v6e", 16384, 256, True, (2048, 2048, 512), "211", True, False, 2.334),
    ("7x", 16384, 64, True, (2048, 2048, 512), "222", True, False, 7.087),
    ("7x", 16384, 128, True, (2048, 2048, 512), "121", True, False, 3.658),
    ("7x", 16384, 256, True, (2048, 2048, 512), "121", True, False, 2.171),
    ("7x", 4096, 64, True, (1024, 1024, 512), "222", True, False, 2.515),
    ("7x", 4096, 128, True, (2048, 2048, 256), "111", True, False, 1.473),
    ("7x", 16384, 128, True, (2048, 2048, 512), "111", False, True, 8.276),
)


def published_row(row: tuple[Any, ...]) -> dict[str, Any]:
    """One published time and its estimate."""
    chip, T, d, causal, (block_q, block_kv, _), layouts, scheduler, gradient, measured = row
    kwargs = {"d": d, "causal": causal, "layouts": layouts, "scheduler": scheduler, "gradient": gradient}
    kwargs |= {"T": 2 * max(block_q, block_kv), "H": 2, "blocks": row[4]}
    kernel = compile_kernels(f"{_MODULE}:tokamax", TOPOLOGIES[chip], kwargs)[-1]
    q_tiles, kv_tiles, heads = T // block_q, T // block_kv, 16384 // T * 2048 // d
    whole, cut = causal_tiles(T, block_q, block_kv) if causal else (q_tiles * kv_tiles, 0)
    # The grid of the forward pass has only the tiles that the mask leaves; that of the gradient has all tiles.
    runs = {"step": q_tiles * kv_tiles if gradient else whole + cut}
    runs |= dict(zip(kernel.products, (whole, cut), strict=False))
    before_and_behind = [r.name for r in kernel.regions if r.parent == "step" and r.name not in kernel.products]
    runs |= dict.fromkeys(before_and_behind, kv_tiles if gradient else q_tiles)
    result = estimate(kernel, {name: heads * n for name, n in runs.items()})
    # XLA transposes q, k, v and the output; for the gradient also their gradients, and it sums dq over the key tiles.
    arrays = 8 + kv_tiles if gradient else 4
    outside = 2 * arrays * 16384 * 2048 * 2 * max(1, 128 // d) * CORES[chip].devices / CHIPS[chip].hbm_bandwidth
    facts = {"chip": chip, "T": T, "d": d, "causal": causal, "gradient": gradient, "blocks": row[4]}
    times = {"kernel ms": result.seconds * 1e3, "transposes ms": outside * 1e3, "published ms": measured}
    ratio = {"predicted/published": (result.seconds + outside) * 1e3 / measured}
    return facts | {name: round(x, 3) for name, x in (times | ratio).items()}


def _sizes(chip: str, T: int, d: int) -> Tiling:
    """The sizes that `choose_tiling` gives for a chip."""
    core = CORES[chip]
    return choose_tiling(T, T, d, "bfloat16", Core(core.vmem, core.mxu_width))


def _ours_estimate(kernel: Kernel, tiles: Tiling, T: int, H: int, d: int) -> Estimate:
    """The estimate of one kernel of `ours`.

    Its loop runs over the visited tiles, and has one body for whole tiles and one for partly masked tiles.
    """
    backward = "backward" in kernel.name
    segment = tiles.backward_segment if backward else tiles.segment
    segments, q_tiles = -(-T // segment), T // tiles.queries
    whole, cut = causal_tiles(T, tiles.queries, tiles.keys)
    loop = next(r.name for r in kernel.regions if r.kind == "loop" and r.name.startswith("step"))
    full, masked = (r.name for r in kernel.regions if r.parent == loop)
    # Segments that are visited, over all query tiles.
    met = sum(math.ceil((i + tiles.queries) / segment) for i in range(0, T, tiles.queries))
    runs = {"step": q_tiles * segments, loop: whole + cut, full: whole, masked: cut}
    branches = [r for r in kernel.regions if r.parent == "step" and r.name != loop]
    for r in branches:
        around_the_loop = loop.startswith(f"{r.name}.")
        # Forward, the first and last segment of a query tile do more; backward, the first and last tile of a segment.
        runs[r.name] = (met if around_the_loop else segments) if backward else q_tiles
    wide = max(d, 128)
    if backward:
        # For each segment: queries, dout and a part of dq; XLA adds up the parts.
        numbers = segments * T * wide * (2 + 2 + (4 if segments > 1 else 2)) + T * wide * 2 * 4
        numbers += 3 * segments * T * wide * 4 * (segments > 1)
    else:
        numbers = T * wide * 2 * 2 + (met * segment if segments > 1 else T) * wide * 2 * 2
        # Both ends of the intervals: one number, or one in every lane.
        numbers += 2 * 4 * T * (1 if d < tiles.lanes else 128)
    return estimate(kernel, {name: H * n for name, n in runs.items()}, H * numbers)


def ours_rows(chip: str, d: int, T: int, gradient: bool) -> dict[str, Any]:
    """An estimate of `ours`, heads x head_dim = 2048; gradients without the forward pass."""
    H, tiles = 2048 // d, _sizes(chip, T, d)
    kernels = compile_kernels(f"{_MODULE}:ours", TOPOLOGIES[chip], {"T": T, "H": 2, "d": d, "gradient": gradient})
    [kernel] = (k for k in kernels if ("backward" in k.name) == gradient)
    loop = next(r.name for r in kernel.regions if r.kind == "loop" and r.name.startswith("step"))
    full, masked = (r for r in kernel.regions if r.parent == loop)
    result = _ours_estimate(kernel, tiles, T, H, d)
    area = tiles.queries * tiles.keys / 2**20
    row: dict[str, Any] = {"chip": chip, "d": d, "pass": "gradient" if gradient else "forward", "T": T}
    row |= {"queries/keys/lanes": f"{tiles.queries}/{tiles.keys}/{tiles.lanes}", "cores": kernel.cores}
    row |= {"vmem_MiB": round(kernel.vmem / MiB, 1), "cycles of 1024^2": round(full.bundles / area)}
    row |= {"masked": round(masked.bundles / area)}
    row |= {unit: f"{full.share(unit):.2f}" for unit in ("MXU", "VALU", "XLU", "EUP", "VLOAD", "VSTORE")}
    row |= {"spills of 1024^2": round(full.spills / area), "ms": round(result.seconds * 1e3, 3)}
    row["TFLOP/s"] = round(2 * T * T * 2048 * (2.5 if gradient else 1) / result.seconds / 1e12)
    return row


def decoding_row(chip: str, B: int, S: int, page: int, held: str) -> dict[str, Any]:
    """An estimate of decoding with the shapes of 7B, all S slots in use, from a cache of the dtype `held`."""
    H, K, d = 28, 4, 128
    kwargs = {"B": B, "S": S, "H": H, "K": K, "d": d, "page": page, "held": held}
    [kernel] = compile_kernels(f"{_MODULE}:ours_decoding", TOPOLOGIES[chip], kwargs)
    core = CORES[chip]
    # A tile belongs to one head, or it has some pages of all heads. It has as many slots in 8 bits as in bfloat16.
    tiles = B * K * S * d * 4 // cache_tile_bytes(CHIPS[chip].hbm_bandwidth / core.devices / core.cores)
    if page:
        # The loop with the products runs over tiles; the loops inside and before it start and await copies of pages.
        main = next(r.name for r in kernel.regions if r.kind == "loop" and r.share("MXU"))
        loops = [r for r in kernel.regions if r.kind == "loop" and r.name != main and r.trips is None]
        pages = B * S // page
        runs = {main: float(tiles)} | {r.name: float(pages) for r in loops if r.name.startswith((f"{main}.", "step."))}
        runs |= {r.name: float(pages * B // tiles) for r in loops if r.name not in runs and r.name != "grid"}
        runs |= {"step": float(B)} if main not in ("grid", "step") else {}
    else:
        runs = {"step": float(tiles)}
    result = estimate(kernel, runs, 2.0 * B * K * S * (2 * d if held == "bfloat16" else d + 4))
    row: dict[str, Any] = {"chip": chip, "cache": f"pages of {page}" if page else "one array", "dtype": held}
    row |= {"batch": B, "slots": S}
    row |= {"vmem_MiB": round(kernel.vmem / MiB, 1), "schedule us": round(result.schedule * 1e6, 1)}
    return row | {"HBM us": round(result.hbm * 1e6, 1), "schedule/HBM": round(result.schedule / result.hbm, 2)}


def print_rows(jobs: Sequence["functools.partial[dict[str, Any]]"], as_lines: bool) -> None:
    """Prints a table of the rows that the jobs compute, or with `as_lines` one line of JSON for each."""
    headed = False
    for job in jobs:
        try:
            row = job()
        except InputError as error:  # A kernel that the compiler refuses must not end the table.
            print(f"{job.args}: {str(error)[-300:]}", file=sys.stderr, flush=True)
            continue
        if not as_lines and not headed:
            print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
            headed = True
        print(json.dumps(row) if as_lines else f"| {' | '.join(map(str, row.values()))} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ours", "splash", "published"))
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e", "7x"], choices=list(CORES))
    parser.add_argument("--json", action="store_true", help="one line of JSON for each row")
    args = parser.parse_args()
    jobs: list[list[functools.partial[dict[str, Any]]]] = []
    if args.what == "published":
        jobs = [[functools.partial(published_row, row) for row in PUBLISHED if row[0] in args.chips]]
    elif args.what == "splash":
        jobs = [
            [
                functools.partial(splash_rows, chip, d, blocks, gradient)
                for chip in args.chips
                for gradient, sizes in SPLASH_BLOCKS.items()
                for d in (64, 128)
                for blocks in sizes
            ]
        ]
    else:
        every = [(chip, d, T, g) for chip in args.chips for g in (False, True) for d in (64, 128) for T in LENGTHS]
        decoding = [
            (chip, B, 32768, page, held)
            for chip in args.chips
            for page in (0, 128)
            for B in (1, 64)
            for held in ("bfloat16", "int8", "float8_e4m3fn")
        ]
        jobs = [
            [functools.partial(ours_rows, *x) for x in every],
            [functools.partial(decoding_row, *x) for x in decoding],
        ]
    for table in jobs:
        print_rows(table, args.json)


if __name__ == "__main__":
    main()
