"""Measures `qwen_jax.kernels.matmul.few_rows_gpu` on one Hopper GPU. Results are in skinny_matmul.md.

python -m experiments.kernels.skinny_matmul check    # numbers against float64, every output element written
python -m experiments.kernels.skinny_matmul table    # each product alone, against XLA's
python -m experiments.kernels.skinny_matmul step     # the products of a decode step with what lies between them
"""

import argparse
import concurrent.futures
import functools
import glob
import gzip
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.kernels.matmul.few_rows_gpu import choose_tiling, skinny_matmul, skinny_swiglu

Weights = dict[str, jax.Array]

# Model: (hidden, feed-forward, qkv rows, vocabulary rows, layers).
MODELS = {"0.5B": (896, 4864, 1152, 151936, 24), "7B": (3584, 18944, 4608, 152064, 28)}


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes of a layer, and of the head."""
    D, F, N, V, _ = MODELS[model]
    return {"qkv": (N, D), "o": (D, D), "gate_up": (2, F, D), "down": (D, F), "head": (V, D)}


@functools.partial(jax.jit, static_argnames="shape")
def random_matrix(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Normal, of a size that keeps activations near one."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * shape[-1] ** -0.5


def xla(x_BK: jax.Array, w: jax.Array) -> jax.Array:
    """What the model does without the kernels."""
    if w.ndim == 2:
        return jnp.einsum("BK,NK->BN", x_BK, w)
    both = jnp.einsum("BK,GNK->GBN", x_BK, w)
    return jax.nn.silu(both[0]) * both[1]


def ours(x_BK: jax.Array, w: jax.Array) -> jax.Array:
    """The kernel for this weight, before partial results are added."""
    return skinny_matmul(x_BK, w) if w.ndim == 2 else skinny_swiglu(x_BK, w)


def float64(x_BK: jax.Array, w: jax.Array) -> np.ndarray[Any, Any]:
    """The product in float64, on the device (so that the large ones take no minutes)."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("BK,NK->BN", x.astype(jnp.float64), w.astype(jnp.float64))

    with jax.enable_x64(True):
        if w.ndim == 2:
            return np.asarray(jax.jit(product)(x_BK, w))
        gate, up = (np.asarray(jax.jit(product)(x_BK, w[g])) for g in (0, 1))
    return gate / (1 + np.exp(-gate)) * up


def on_poison(run: Callable[..., jax.Array], like: jax.ShapeDtypeStruct, *args: jax.Array) -> jax.Array:
    """Runs where the result gets memory that holds NaN, and checks that it did."""
    for tries in range(1, 6):
        # Of small buffers the allocator has many to choose from.
        poison = [jax.block_until_ready(jnp.full(like.shape, jnp.nan, like.dtype)) for _ in range(4**tries)]
        places = {x.unsafe_buffer_pointer() for x in poison}
        del poison
        out = jax.block_until_ready(run(*args))
        if out.unsafe_buffer_pointer() in places:
            return out
    raise RuntimeError("The allocator never gave a poisoned buffer back.")


def check() -> None:
    """Prints the relative error of every shape; fails where it is too large or an element was not written."""
    cases = [s for model in MODELS for s in shapes(model).values()]
    # Shards of tensor parallelism, other sizes, and odd ends in N and K.
    cases += [(1152, 3584), (3584, 896), (2, 4736, 3584), (3584, 2368), (896, 448), (2, 8960, 1536), (5120, 13824)]
    cases += [(8192, 29568), (1000, 192), (8, 128), (2, 200, 320)]
    jobs = []
    for shape in cases:
        small = np.prod(shape) < 5e6
        for B in (1, 3, 8, 33, 64, 65, 128) if small else (1, 64):
            args = (jax.ShapeDtypeStruct((B, shape[-1]), jnp.bfloat16), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
            jobs.append((shape, B, jax.eval_shape(ours, *args), jax.jit(ours).lower(*args)))
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        compiled = list(pool.map(lambda job: job[-1].compile(), jobs))
    numbers = np.random.default_rng()
    last: tuple[int, ...] = ()
    for (shape, B, like, _), run in zip(jobs, compiled, strict=True):
        if shape != last:
            last, w = shape, random_matrix(len(last), shape)
            x = jnp.asarray(numbers.standard_normal((128, shape[-1])), jnp.bfloat16)
            want = float64(x, w)
        out = np.asarray(on_poison(run, like, x[:B], w), np.float64)
        got = out.sum(0) if len(shape) == 2 else out
        error = np.linalg.norm(got - want[:B]) / np.linalg.norm(want[:B])
        print(f"{shape!s:>18} {B:3d} rows: relative error {error:.1e}", flush=True)
        if not error < (5e-5 if len(shape) == 2 else 3e-3):
            raise SystemExit("Too large.")


def table(batches: tuple[int, ...] = (1, 8, 64), buffer_bytes: float = 4e8) -> None:
    """Prints time on the device (CUPTI) and bandwidth of W for each product, ours and XLA's."""
    jobs: list[tuple[str, str, int, str, Any]] = []
    for model in MODELS:
        for name, shape in shapes(model).items():
            for B in batches:
                for kind, f in (("xla", xla), ("ours", ours)):

                    def run(x: jax.Array, w: jax.Array, f: Callable[..., jax.Array] = f) -> jax.Array:
                        return f(x, w)

                    run.__name__ = f"case{len(jobs):03d}"
                    args = (
                        jax.ShapeDtypeStruct((B, shape[-1]), jnp.bfloat16),
                        jax.ShapeDtypeStruct(shape, jnp.bfloat16),
                    )
                    jobs.append((model, name, B, kind, jax.jit(run).lower(*args)))
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        compiled = list(pool.map(lambda job: job[-1].compile({"xla_gpu_enable_command_buffer": ""}), jobs))
    weights: dict[tuple[str, str], list[jax.Array]] = {}
    for model in MODELS:
        for name, shape in shapes(model).items():
            count = max(3, int(buffer_bytes / (2 * np.prod(shape))))
            weights[model, name] = [random_matrix(i, shape) for i in range(min(count, 60))]

    def sweep() -> None:
        for (model, name, B, _, _), run in zip(jobs, compiled, strict=True):
            x_BK = random_matrix(B, (B, shapes(model)[name][-1]))
            for w in weights[model, name]:
                out = run(x_BK, w)
            jax.block_until_ready(out)

    sweep()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            sweep()
        with gzip.open(glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)[0]) as file:
            events = json.load(file)["traceEvents"]
    times: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        args = event.get("args", {})
        if event.get("ph") == "X" and "hlo_op" in args and args.get("hlo_module", "").startswith("jit_case"):
            times[int(args["hlo_module"][8:11])][event["name"]].append(event["dur"])
    print("| model, product | rows | XLA us | GB/s | ours us | GB/s | ours, kernel alone us |")
    print("|---|---|---|---|---|---|---|")
    for i in range(0, len(jobs), 2):
        model, name, B, _, _ = jobs[i]
        count = len(weights[model, name])
        size = 2e-3 * np.prod(shapes(model)[name])
        each = [[float(np.median(v)) * len(v) / count for v in times[j].values()] for j in (i, i + 1)]
        a, b = (sum(e) for e in each)
        print(f"| {model} {name} | {B} | {a:.2f} | {size / a:.0f} | {b:.2f} | {size / b:.0f} | {max(each[1]):.2f} |")


def norm(x_BD: jax.Array) -> jax.Array:
    """RMSNorm without a weight."""
    x = x_BD.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)).astype(x_BD.dtype)


def between(qkv_BN: jax.Array, D: int) -> jax.Array:
    """Stands for RoPE, cache and attention: five small operations that XLA may not join."""
    x_BD = qkv_BN[:, :D]
    for i in range(5):
        x_BD = jax.lax.optimization_barrier(jnp.tanh(jnp.roll(x_BD, i + 1, axis=1)) + 0.5 * x_BD)
    return x_BD


def layer(x_BD: jax.Array, w: Weights, kind: str) -> jax.Array:
    """A decoder layer without attention; its products by XLA or by the kernels."""

    def product(x_BK: jax.Array, name: str) -> jax.Array:
        if kind == "xla":
            return xla(x_BK, w[name])
        out = ours(x_BK, w[name])
        return (out if w[name].ndim == 3 else out.sum(0)).astype(x_BK.dtype)

    x_BD = x_BD + product(between(product(norm(x_BD), "qkv"), x_BD.shape[1]), "o")
    return x_BD + product(product(norm(x_BD), "gate_up"), "down")


def step(batches: tuple[int, ...] = (1, 8, 64), steps: int = 8) -> None:
    """Prints the wall time of a layer inside a device loop over steps, with CUDA graphs and without."""
    for model in MODELS:
        depth = min(12, MODELS[model][-1]) if model == "7B" else MODELS[model][-1]
        names = ("qkv", "o", "gate_up", "down")
        layers = [
            {name: random_matrix(10 * i + j, shapes(model)[name]) for j, name in enumerate(names)} for i in range(depth)
        ]

        def run(x_BD: jax.Array, layers: list[Weights], kind: str) -> jax.Array:
            def one(x_BD: jax.Array, _: None) -> tuple[jax.Array, None]:
                for w in layers:
                    x_BD = layer(x_BD, w, kind)
                return norm(x_BD), None

            return jax.lax.scan(one, x_BD, length=steps)[0]

        cases = [(B, kind, graphs) for B in batches for kind in ("xla", "ours") for graphs in (True, False)]
        inputs = {B: random_matrix(B, (B, MODELS[model][0])) for B in batches}
        lowered = {
            (B, kind): jax.jit(run, static_argnames="kind").lower(inputs[B], layers, kind) for B, kind, _ in cases
        }

        def build(case: tuple[int, str, bool], lowered: Any = lowered) -> Any:
            B, kind, graphs = case
            return lowered[B, kind].compile(None if graphs else {"xla_gpu_enable_command_buffer": ""})

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            compiled = list(pool.map(build, cases))
        reference: dict[int, Any] = {}
        for (B, kind, graphs), f in zip(cases, compiled, strict=True):
            out = np.asarray(f(inputs[B], layers), np.float32)
            reference.setdefault(B, out)
            differs = np.linalg.norm(out - reference[B]) / np.linalg.norm(reference[B])
            times = []
            for _ in range(7):
                start = time.perf_counter()
                jax.block_until_ready(f(inputs[B], layers))
                times.append(time.perf_counter() - start)
            weight_copies = len(re.findall(r"= bf16\[\d{3,},\d{3,}\]\S* copy\(", f.as_text()))
            print(
                f"{model} {B:3d} rows, {kind:4s} {'graphs' if graphs else 'stream'} "
                f"{float(np.median(times)) / steps / depth * 1e6:7.2f} us a layer; copies of weights {weight_copies}, "
                f"differs from XLA by {differs:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("check", "table", "step"))
    part = parser.parse_args().part
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; e.g. {choose_tiling(64, 4608, 3584)}")
    {"check": check, "table": table, "step": step}[part]()
