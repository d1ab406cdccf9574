"""Measures `qwen_jax.kernels.decode.step_gpu` on one Hopper GPU. Results are in decode_attention.md.

python -m experiments.kernels.decode_attention
"""

import functools
import glob
import gzip
import json
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels.decode.step_gpu import decode_step, shares

COPY_RATE = 4.27e12
"""Bytes read and written per second by a large copy on the card of decode_attention.md."""
# Model: (query heads, key/value heads, head_dim).
MODELS = {"7B": (28, 4, 128), "0.5B": (14, 2, 64)}
STEPS = 16


def measure(model: str, batch: int, slots: int, live: int) -> tuple[float, int]:
    """Microseconds of one kernel in the profiler, and the number of cache copies in the compiled loop, which must be 0.

    Args:
      model: of `MODELS`.
      batch: rows.
      slots: length of the cache.
      live: slots in use at the first of the steps.
    """
    H, K, d = MODELS[model]
    key, shape = jax.random.key(0), (batch, K, slots, d)
    # Caches of several layers, so that none is still in L2 when it is used again.
    layers = max(2, min(16, int(20e9 // (4 * batch * K * slots * d))))

    @functools.partial(jax.jit, static_argnames="shape")
    def normal(i: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)

    qkv, bias = normal(0, (batch, H + 2 * K, d)), normal(1, (H + 2 * K, d))
    cos, sin, start = normal(2, (batch, d // 2)), normal(3, (batch, d // 2)), jnp.zeros(batch, jnp.int32)
    caches = tuple((normal(4 + 2 * i, shape), normal(5 + 2 * i, shape)) for i in range(layers))

    def step(carry: Any, _: None) -> Any:
        qkv, caches, slot = carry
        new = []
        for keys, values in caches:
            out, keys, values = decode_step(qkv, bias, cos, sin, keys, values, start, slot, scale=d**-0.5)
            new.append((keys, values))
            # The next layer depends on this one, as in a model.
            qkv = jax.lax.dynamic_update_slice(qkv, out, (0, 0, 0))
        return (qkv, tuple(new), slot + 1), None

    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=STEPS)[0], donate_argnums=1)
    # Outside command buffers, so that the profiler sees single kernels.
    options: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""}
    compiled = run.lower(qkv, caches, jnp.int32(live)).compile(compiler_options=options)
    cache_type = f"bf16[{','.join(map(str, shape))}]"
    copies = sum(" copy(" in line and cache_type in line for line in (compiled.as_text() or "").splitlines())
    _, caches, _ = jax.block_until_ready(compiled(qkv, caches, jnp.int32(live)))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(qkv, caches, jnp.int32(live)))
        [trace] = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(trace) as file:
            events = json.load(file)["traceEvents"]
    return statistics.median(e["dur"] for e in events if "decode_step" in e.get("name", "") and "dur" in e), copies


def main() -> None:
    """Prints the table."""
    print("| model | batch | slots | live | clusters x blocks | us | GB/s | of the copy rate | cache copies |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, (_, K, d) in MODELS.items():
        for slots, live in ((640, 576), (32768, 32000)):
            for batch in (1, 8, 64):
                us, copies = measure(model, batch, slots, live)
                rate = 4 * batch * K * (live + STEPS / 2) * d / us * 1e6
                clusters, blocks = shares(batch * K, slots)
                print(
                    f"| {model} | {batch} | {slots} | {live} | {clusters} x {blocks} | {us:.2f} | {rate / 1e9:.0f} "
                    f"| {rate / COPY_RATE:.0%} | {copies} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
