"""Speed of attention, forward and with gradient, ours and others on one GPU. Results are in attention.md.

    python -m experiments.kernels.attention                      # ours and cuDNN through JAX
    python -m experiments.kernels.attention --tokamax --torch CUDNN_ATTENTION FLASH_ATTENTION    # and these

TFLOP/s count what a causal mask leaves: 4 B H T^2 d / 2 for the forward pass, 2.5 times that for the gradient. Every
number is the median of five timings, each of several calls in a row, with normal random inputs.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Two frameworks share the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from qwen_jax.kernels.attention import flash_gpu

# B, T, H, K, d.
SHAPES = {
    "4x4096 16/2 d128": (4, 4096, 16, 2, 128),
    "1x32768 28/4 d128": (1, 32768, 28, 4, 128),
    "1x131072 28/4 d128": (1, 131072, 28, 4, 128),
    "8x4096 14/2 d64": (8, 4096, 14, 2, 64),
}
DOCUMENT = 1024

Attention = Callable[..., jax.Array]


def ours(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    return flash_gpu.attention(q, k, v, start, end, q.shape[-1] ** -0.5)[0]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def tokamax(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    import tokamax  # type: ignore[import-not-found]

    result: jax.Array = tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="mosaic")
    return result


def seconds(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Seconds of one call: the median of five timings."""
    wait(run())
    begin = time.perf_counter()
    wait(run())
    calls = max(1, min(20, int(0.1 / (time.perf_counter() - begin))))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def inputs(shape: tuple[int, ...], document: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """q, k, v and a gradient with respect to the output; and mask intervals for documents of equal length."""
    B, T, H, K, d = shape
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(x, (B, T, n, d), jnp.bfloat16) for x, n in zip(keys, (H, K, K, H), strict=True)]
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return arrays, [place // document * document, place + 1]


def measure(f: Attention, shape: tuple[int, ...], document: int) -> tuple[float, float]:
    """Seconds of the forward pass, and of forward pass and gradient."""
    (q, k, v, dout), mask = inputs(shape, document)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *x: f(*x, *mask), q, k, v)
        return out, pull(dout)

    forward, whole = jax.jit(lambda q, k, v: f(q, k, v, *mask)), jax.jit(both)
    wait = jax.block_until_ready
    return seconds(lambda: forward(q, k, v), wait), seconds(lambda: whole(q, k, v, dout), wait)


def measure_torch(shape: tuple[int, ...], backend: str) -> tuple[float, float]:
    """`measure` for PyTorch's scaled_dot_product_attention, whose layout is [B, H, T, d]."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, T, H, K, d = shape
    q, k, v, dout = (torch.randn(B, n, T, d, device="cuda", dtype=torch.bfloat16) for n in (H, K, K, H))
    for x in (q, k, v):
        x.requires_grad_()

    def forward() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def both() -> Any:
        return torch.autograd.grad(forward(), (q, k, v), dout)

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    with torch.no_grad():
        alone = seconds(forward, wait)
    return alone, seconds(both, wait)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--torch", nargs="*", default=[], help="also these backends of torch.nn.attention.SDPBackend")
    parser.add_argument("--tokamax", action="store_true", help="also tokamax's kernel for Hopper")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}")
    kinds: dict[str, Callable[[tuple[int, ...]], tuple[float, float]]] = {
        f.__name__: functools.partial(lambda f, shape: measure(f, shape, shape[1]), f)
        for f in (ours, cudnn, *((tokamax,) if args.tokamax else ()))
    }
    for backend in args.torch:
        kinds[f"torch {backend}"] = functools.partial(lambda b, shape: measure_torch(shape, b), backend)
    print("| shape | | forward, TFLOP/s | forward and gradient, TFLOP/s | ms | ms |")
    print("|---" * 6 + "|")
    for name in args.shapes:
        B, T, H, _, d = SHAPES[name]
        flops = 2.0 * B * H * T * T * d
        for kind, run in kinds.items():
            try:
                forward, both = run(SHAPES[name])
            except Exception as error:  # An implementation that does not support a shape must not end the table.
                print(f"| {name} | {kind} | {type(error).__name__}: {str(error)[:100]!r} | | | |", flush=True)
                continue
            print(
                f"| {name} | {kind} | {flops / forward / 1e12:.0f} | {3.5 * flops / both / 1e12:.0f} | "
                f"{forward * 1e3:.3f} | {both * 1e3:.3f} |",
                flush=True,
            )
    shape = SHAPES["1x32768 28/4 d128"]
    whole, packed = measure(ours, shape, shape[1]), measure(ours, shape, DOCUMENT)
    share = DOCUMENT / shape[1]
    for what, a, b in zip(("forward", "forward and gradient"), whole, packed, strict=True):
        ms = f"{b * 1e3:.3f} ms; their share of whole rows is {share * a * 1e3:.3f} ms"
        print(f"documents of {DOCUMENT} in rows of {shape[1]}, {what}: {ms}")


if __name__ == "__main__":
    main()
