"""Measures `qwen_jax.kernels.decode.flash_decode_gpu` on one Hopper GPU. Results are in decode.md.

    python -m experiments.kernels.decode                    # ours, and cuDNN through JAX
    python -m experiments.kernels.decode --torch            # and PyTorch's

Every call of a loop has a cache of its own and depends on the call before. The caches together are larger than the L2.
"""

import argparse
import collections
import functools
import glob
import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Two frameworks share the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from qwen_jax.kernels.decode import flash_decode_gpu

COPY_RATE = 4.27e12
"""Bytes read and written a second by a large copy on the card of decode.md; measured again with --torch."""
# Model: (query heads, key/value heads, head_dim).
MODELS = {"7B": (28, 4, 128), "0.5B": (14, 2, 64)}
# Model, batch, slots of the cache, slots in use by the shortest and the longest row (the others lie evenly between).
Setting = tuple[str, int, int, int, int]
SETTINGS: tuple[Setting, ...] = (
    ("7B", 1, 4096, 4000, 4000), ("7B", 1, 32768, 32768, 32768), ("7B", 1, 131072, 131072, 131072),
    ("7B", 8, 32768, 32768, 32768), ("7B", 64, 32768, 32768, 32768), ("7B", 16, 32768, 2048, 32768),
    ("7B", 64, 32768, 2048, 32768), ("0.5B", 1, 32768, 32768, 32768), ("0.5B", 64, 32768, 32768, 32768),
)  # fmt: skip

Attention = Callable[..., jax.Array]


def array(q: jax.Array, k: jax.Array, v: jax.Array, live: jax.Array, uneven: bool = False) -> jax.Array:
    end = live[:, None]
    return flash_decode_gpu.attention(q, k, v, jnp.zeros_like(end), end, q.shape[-1] ** -0.5, uneven=uneven)[0]


def paged(size: int, q: jax.Array, k: jax.Array, v: jax.Array, live: jax.Array) -> jax.Array:
    """The same cache taken for pages that lie in no order."""
    (B, K, S, d), end = k.shape, live[:, None]
    # As many pages, row by row; the order is a fixed permutation of all of them.
    n = B * S // size
    order = jnp.arange(n, dtype=jnp.int32) * 7919 % n
    k, v = (x.reshape(n, K, size, d) for x in (k, v))
    return flash_decode_gpu.paged_attention(
        q, k, v, order.reshape(B, S // size), jnp.zeros_like(end), end, q.shape[-1] ** -0.5
    )[0]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, live: jax.Array) -> jax.Array:
    """Its own layout: slots before heads."""
    B, K, S, d = k.shape
    k, v = (x.reshape(B, S, K, d) for x in (k, v))
    ones = jnp.ones_like(live)
    return jax.nn.dot_product_attention(
        q, k, v, scale=d**-0.5, query_seq_lengths=ones, key_value_seq_lengths=live, implementation="cudnn"
    )


def lengths(setting: Setting) -> list[int]:
    _, B, _, low, high = setting
    return [low + (high - low) * b // max(B - 1, 1) for b in range(B)]


def loop(f: Attention, setting: Setting) -> tuple[Callable[..., Any], list[Any], int]:
    """A function of many calls of `f`, its arguments, and how many calls."""
    model, B, S, _, _ = setting
    H, K, d = MODELS[model]
    bytes_ = 4 * B * K * S * d
    layers = max(2, min(16, -(-int(1e9) // bytes_)))
    steps = max(1, min(16, int(2e-2 / (layers * bytes_ / 3e12))))

    @functools.partial(jax.jit, static_argnames="shape")
    def normal(i: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape, jnp.bfloat16)

    caches = tuple((normal(2 * i, (B, K, S, d)), normal(2 * i + 1, (B, K, S, d))) for i in range(layers))
    args = [normal(-1, (B, 1, H, d)), caches, jnp.array(lengths(setting), jnp.int32)]

    def step(q: jax.Array, caches: Any, live: jax.Array) -> jax.Array:
        for k, v in caches:
            q = f(q, k, v, live).astype(q.dtype)
        return q

    def run(q: jax.Array, caches: Any, live: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda _, q: step(q, caches, live), q)

    return run, args, steps * layers


def kernels_of(run: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    """Begin and duration of every kernel by the profiler, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [trace] = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(trace) as file:
            events = json.load(file)["traceEvents"]
    devices = {
        e["pid"] for e in events if e.get("name") == "process_name" and "/device:GPU" in e["args"].get("name", "")
    }
    kernels = collections.defaultdict(list)
    for e in events:
        if e.get("pid") in devices and "dur" in e and "correlation_id" in e.get("args", {}):
            kernels[e["name"]].append((e["ts"], e["dur"]))
    return kernels


def measure(f: Attention, setting: Setting) -> tuple[float, float, dict[str, float]]:
    """Microseconds of one call, by the device's clock from begin to begin and by the host's; of each of its kernels."""
    run, args, calls = loop(f, setting)
    lowered = jax.jit(run).lower(*args)
    # Outside command buffers, so that the profiler sees single kernels.
    single = lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
    jax.block_until_ready(single(*args))
    kernels = kernels_of(lambda: single(*args))
    spans = [(t, t + d) for events in kernels.values() for t, d in events if len(events) >= calls]
    device = (max(e for _, e in spans) - min(b for b, _ in spans)) / calls if spans else float("nan")
    compiled = lowered.compile()
    jax.block_until_ready(compiled(*args))
    jax.block_until_ready(compiled(*args))
    walls = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        walls.append((time.perf_counter() - begin) / calls * 1e6)
    each = {n: statistics.median(d for _, d in events) for n, events in kernels.items() if len(events) >= calls}
    return device, statistics.median(walls), each


def measure_torch(setting: Setting, backend: str) -> float:
    """Microseconds of one call of PyTorch's scaled_dot_product_attention in a CUDA graph of many."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, B, S, low, live = setting
    if low != live:
        raise ValueError("rows of one length only")
    H, K, d = MODELS[model]
    bytes_ = 4 * B * K * S * d
    layers = max(2, min(16, -(-int(1e9) // bytes_)))
    shape = (B, K, S, d)
    caches = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(layers)]
    q = torch.randn(B, H, 1, d, device="cuda", dtype=torch.bfloat16)

    def run() -> Any:
        x = q
        with sdpa_kernel(getattr(SDPBackend, backend)), torch.no_grad():
            for k, v in caches:
                x = torch.nn.functional.scaled_dot_product_attention(x, k[:, :, :live], v[:, :, :live], enable_gqa=True)
        return x

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times)


def read_rate() -> float:
    """Bytes a second that XLA reads to find the maxima of the rows of a large array."""
    x = jax.random.normal(jax.random.key(0), (1 << 18, 4096), jnp.bfloat16)
    f = jax.jit(lambda x: x.max(axis=1))
    jax.block_until_ready(f(x))
    kernels = kernels_of(lambda: [f(x) for _ in range(5)])
    return 2 * x.size / max(statistics.median(d for _, d in events) for events in kernels.values()) * 1e6


def torch_copy_rate() -> float:
    """Bytes read and written a second by PyTorch's copy of a large array."""
    import torch

    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    y, times = torch.empty_like(x), []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        y.copy_(x)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 4 * x.numel() / statistics.median(times)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="also PyTorch's backends")
    parser.add_argument("--pages", type=int, nargs="*", default=[16], help="sizes of pages")
    args = parser.parse_args()
    copy, read = torch_copy_rate() if args.torch else COPY_RATE, read_rate()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}")
    print(f"copy {copy / 1e12:.2f} TB/s read and written, row maxima {read / 1e12:.2f} TB/s read")
    print("| model | batch | slots | live | | splits | device us | host us | GB/s | of the copy rate | kernels, us |")
    print("|---" * 11 + "|")
    kinds: dict[str, Attention] = {"ours": array, "ours, uneven": functools.partial(array, uneven=True)}
    kinds |= {f"ours, pages of {size}": functools.partial(paged, size) for size in args.pages}
    kinds["cudnn"] = cudnn
    for setting in SETTINGS:
        model, B, S, low, high = setting
        _, K, d = MODELS[model]
        live = f"{high}" if low == high else f"{low} to {high}"
        shape = flash_decode_gpu.TILINGS[d]
        splits = {n: flash_decode_gpu.splits_for(B * K, S, shape, n != "ours") for n in kinds if "ours" in n}

        def line(kind: str, device: float, host: float, each: dict[str, float]) -> None:
            rate = 4 * K * sum(lengths(setting)) * d / device * 1e6  # noqa: B023
            short = ", ".join(f"{n.removesuffix('_mosaic_gpu_kernel')[:24]} {us:.1f}" for n, us in each.items())
            where = f"| {model} | {B} | {S} | {live} | {kind} | {splits.get(kind, '')} |"  # noqa: B023
            print(f"{where} {device:.1f} | {host:.1f} | {rate / 1e9:.0f} | {rate / copy:.0%} | {short} |", flush=True)

        for kind, f in kinds.items():
            try:
                line(kind, *measure(f, setting))
            except Exception as error:  # One that cannot do a setting must not end the table.
                print(f"| {model} | {B} | {S} | {live} | {kind} | {type(error).__name__}: {str(error)[:100]!r} |")
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION") if args.torch else ():
            try:
                us = measure_torch(setting, backend)
                line(f"torch {backend}", us, us, {})
            except Exception as error:
                print(
                    f"| {model} | {B} | {S} | {live} | torch {backend} | {type(error).__name__}: {str(error)[:100]!r} |"
                )


if __name__ == "__main__":
    main()
