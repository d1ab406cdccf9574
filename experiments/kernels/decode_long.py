"""Measures attention of one new token over very long caches, in bfloat16 and in 8 bits, on one Hopper GPU.

    python -m experiments.kernels.decode_long                       # the table
    python -m experiments.kernels.decode_long --splits 33 66 132    # and these numbers of splits
    python -m experiments.kernels.decode_long --tiling 128 2 2      # 8 bits with these keys, stages and blocks

7B on one device: 28 query heads, 4 key/value heads of 128. "3 parts" are the three rows of a token in dual-chunk
attention, whose intervals are disjoint. In 8 bits they are computed one after the other, as in the model. The error is
that of the output against float32 over the same cache.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels.decode import kernels_of, read_rate
from qwen_jax.kernels.decode import flash_decode_gpu, flash_decode_int8_gpu
from qwen_jax.kernels.decode.quantized import QuantizedRows
from qwen_jax.kernels.decode.step_gpu import decode_step, shares
from qwen_jax.kernels.reference import attention as reference

H, K, D = 28, 4, 128
SLOTS = 131_072, 1_000_064
CHUNK = 253_952
"""Tokens of a chunk of the Qwen2.5-1M models."""

Call = Callable[[jax.Array, Any], jax.Array]


def copy_rate() -> float:
    """Bytes read and written per second by XLA's sum of a large array and a number."""
    x = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    f = jax.jit(lambda x: x + 1)
    jax.block_until_ready(f(x))
    kernels = kernels_of(lambda: [f(x) for _ in range(5)])
    longest = max(sorted(d for _, d in events)[len(events) // 2] for events in kernels.values())
    return 4 * x.size / longest * 1e6


def intervals(slots: int, parts: int) -> tuple[jax.Array, jax.Array]:
    """Of the rows of one token that sees every slot: one row, or the intra, successive and inter parts."""
    first = (slots - 1) // CHUNK * CHUNK
    bounds = [slots, first, max(first - CHUNK, 0), 0] if parts == 3 else [slots, 0]
    return jnp.array([bounds[1:]], jnp.int32), jnp.array([bounds[:-1]], jnp.int32)


@functools.partial(jax.jit, static_argnames="shape")
def normal(i: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape, jnp.bfloat16)


@jax.jit
def to_8_bits(x: jax.Array) -> QuantizedRows:
    empty = QuantizedRows(jnp.zeros(x.shape, jnp.int8), jnp.zeros(x.shape[:-1]))
    return empty.quantized(x)


def measure(call: Call, q: jax.Array, caches: Any) -> float:
    """Microseconds of a call, all its kernels and the gaps between them. Calls depend on the one before."""

    def run(q: jax.Array, caches: Any) -> jax.Array:
        for cache in caches:
            q = call(q, cache).astype(q.dtype)
        return q

    def loop(q: jax.Array, caches: Any) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda _, q: run(q, caches), q)

    # Outside command buffers, so that the profiler sees single kernels.
    compiled = jax.jit(loop).lower(q, caches).compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
    jax.block_until_ready(compiled(q, caches))
    events = kernels_of(lambda: compiled(q, caches))
    spans = [(t, t + d) for several in events.values() for t, d in several if len(several) >= 4 * len(caches)]
    return (max(e for _, e in spans) - min(b for b, _ in spans)) / (4 * len(caches))


def error(call: Call, q: jax.Array, cache: Any, parts: int) -> float:
    """Relative error of the output against float32 attention over the same cache."""
    k, v = (x.dequantized(jnp.float32) if isinstance(x, QuantizedRows) else x.astype(jnp.float32) for x in cache)
    start, end = intervals(k.shape[2], parts)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(functools.partial(reference, scale=D**-0.5))(q.astype(jnp.float32), k, v, start, end)[0]
    got = jax.jit(call)(q, cache).astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def fused_step(caches: Any) -> tuple[float, Any]:
    """Microseconds of the fused step, from the projection to the heads' outputs, and the caches, which it updates.

    It writes the last slot, so that every slot is in use.
    """
    qkv, bias = normal(-1, (1, H + 2 * K, D)), normal(-2, (H + 2 * K, D))
    cos, sin, start = normal(-3, (1, D // 2)), normal(-4, (1, D // 2)), jnp.zeros(1, jnp.int32)
    slot = jnp.int32(caches[0][0].shape[2] - 1)

    def body(_: Any, carry: Any) -> Any:
        qkv, caches = carry
        new = []
        for k, v in caches:
            out, k, v = decode_step(qkv, bias, cos, sin, k, v, start, slot, scale=D**-0.5)
            qkv = jax.lax.dynamic_update_slice(qkv, out, (0, 0, 0))
            new.append((k, v))
        return qkv, new

    steps = jax.jit(lambda qkv, caches: jax.lax.fori_loop(0, 4, body, (qkv, caches)), donate_argnums=1)
    compiled = steps.lower(qkv, caches).compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
    held = [jax.block_until_ready(compiled(qkv, caches))[1]]

    def again() -> Any:
        held[0] = compiled(qkv, held[0])[1]
        return held[0]

    events = kernels_of(again)
    spans = [(t, t + d) for name, several in events.items() if "decode_step" in name for t, d in several]
    return (max(e for _, e in spans) - min(b for b, _ in spans)) / len(spans), held[0]


def attend(q: jax.Array, cache: Any, *, splits: int, parts: int, tiling: flash_decode_gpu.Tiling | None) -> jax.Array:
    """The kernels with a given number of splits, and for 8 bits a tiling."""
    k, v = cache
    how: Any = {"scale": D**-0.5, "splits": splits}
    ends = intervals(k.shape[2], parts)
    if isinstance(k, QuantizedRows):
        arrays = k.values_BKSd, k.scales_BKS, v.values_BKSd, v.scales_BKS
        return flash_decode_int8_gpu._run(q, *arrays, *ends, tiling=tiling, disjoint=parts > 1, **how)[0]
    return flash_decode_gpu._run(q, k, v, *ends, None, **how)[0]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, nargs="*", default=[], help="numbers of splits to measure besides")
    parser.add_argument("--slots", type=int, nargs="*", default=SLOTS, help="lengths of the cache, multiples of 64")
    parser.add_argument("--tiling", type=int, nargs=3, help="for 8 bits: keys, stages and blocks on a multiprocessor")
    args = parser.parse_args()
    tiling = flash_decode_gpu.Tiling(*args.tiling) if args.tiling else None
    copy, read = copy_rate(), read_rate()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}")
    print(f"copy {copy / 1e12:.2f} TB/s read and written, row maxima {read / 1e12:.2f} TB/s read")
    print("| slots | cache | | splits | us | GB/s | of the copy rate | ms of 28 layers | error |")
    print("|---" * 9 + "|")

    def line(slots: int, held: str, kind: str, splits: Any, us: float, bytes_: float, off: str) -> None:
        rate = bytes_ / us * 1e6
        print(
            f"| {slots} | {held} | {kind} | {splits} | {us:.1f} | {rate / 1e9:.0f} | {rate / copy:.0%} "
            f"| {28 * us / 1e3:.2f} | {off} |",
            flush=True,
        )

    for slots in args.slots:
        bytes_ = 4 * K * slots * D
        layers = max(1, int(2e9 // bytes_))
        wide: Any = [tuple(normal(2 * i + n, (1, K, slots, D)) for n in range(2)) for i in range(layers)]
        us, wide = fused_step(wide)
        line(slots, "bfloat16", "fused step", "{} x {}".format(*shares(K, slots)), us, bytes_, "")
        narrow: Any = [tuple(to_8_bits(x) for x in pair) for pair in wide]
        for held, caches, tilings, size in (
            ("bfloat16", wide, flash_decode_gpu.TILINGS, bytes_),
            ("int8", narrow, {D: tiling or flash_decode_int8_gpu.TILINGS[D]}, bytes_ // 2 + 2 * 4 * K * slots),
        ):
            for parts in (1, 3):
                for splits in [flash_decode_gpu.splits_for(K, slots, tilings[D]), *args.splits]:
                    call = functools.partial(attend, splits=splits, parts=parts, tiling=tiling)
                    q, kind = normal(-5, (1, parts, H, D)), "3 parts" if parts == 3 else ""
                    us = measure(call, q, caches)
                    line(slots, held, kind, splits, us, size, f"{error(call, q, caches[0], parts):.1e}")
        del wide, narrow, caches


if __name__ == "__main__":
    main()
