"""Products with quantised weights on one Hopper GPU, beside bfloat16 products and XLA's product of dequantised weights.

    python -m experiments.kernels.quantized_matmul > quantized_matmul.jsonl
    python -m experiments.kernels.quantized_matmul --models 7B --rows 1 64 --formats int4 bf16

Each line is a JSON object: a product of a model's layer, the number of rows, and the format of the weight:

| format    | weight                                                | product                                        |
|-----------|-------------------------------------------------------|------------------------------------------------|
| int4      | int4, float16 scales for groups of 128                | `quantized_gpu.matmul`                         |
| int4_zero | the same with zero points                             | "                                              |
| int4_min  | int4, float32 scales and minima for groups of 32      | "                                              |
| int8      | int8, float16 scales for groups of 128                | "                                              |
| fp8       | float8_e4m3fn, a float32 scale for each output        | "                                              |
| *_digits  | as int4, int4_zero, int8; one row only                | that of a decode step: x as four 8-bit digits  |
| plain     | as int4                                               | XLA: dequantised to bfloat16, then einsum      |
| w8a8      | as fp8                                                | XLA: rows rounded to float8, float8 einsum     |
| bf16      | bfloat16                                              | `few_rows_gpu` up to 64 rows, einsum beyond    |
| einsum    | bfloat16                                              | XLA's einsum                                   |

Times are device times of all kernels of a product (profiler, median over different matrices, together larger than L2).
`floor_us` is the time to read weight and x and write the result once at 4.8 TB/s, and `of_floor` its share of the time;
`gbs` counts the same bytes. `tflops` is the rate of the product, `of_bf16` the speed relative to the faster of bf16 and
einsum. `error` is relative to the product with weights that are not rounded, over 8 rows; weights rounded to bfloat16
are 1.6e-3 off, so that few rows of the kernels must be below 2e-5 and the rest below 3e-3.
"""

import argparse
import concurrent.futures
import glob
import gzip
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.kernels.decode import layer_gpu_quantized
from qwen_jax.kernels.matmul import quantized_gpu
from qwen_jax.kernels.matmul.few_rows_gpu import skinny_matmul

# Outputs and inputs of the products of a layer: queries, keys and values; output; gate and up; down. Of A2.7B these are
# the shared expert's, and there are those of one expert.
MODELS = {
    "7B": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "0.5B": {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864)},
    "72B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (59392, 8192), "down": (8192, 29696)},
    "A2.7B": {
        "qkv": (6144, 2048), "o": (2048, 2048), "gate_up": (11264, 2048), "down": (2048, 5632),
        "expert_gate_up": (2816, 2048), "expert_down": (2048, 1408),
    },
}  # fmt: skip
FORMATS = (
    "bf16", "einsum", "int4", "int4_digits", "int4_zero", "int4_zero_digits", "int4_min", "int8", "int8_digits", "fp8",
    "plain", "w8a8",
)  # fmt: skip
_PEAK = 4.8e12
_L2_TWICE = 1.2e8
Weight = tuple[jax.Array, ...]


def parameters(name: str, n: int, k: int) -> tuple[int, Any, Any]:
    """Inputs of a group, and the dtypes of codes and scales."""
    if name in ("fp8", "w8a8"):
        return k, jnp.float8_e4m3fn, jnp.float32
    if name == "int4_min":
        return 32, jnp.int4, jnp.float32
    return 128, jnp.int8 if name.startswith("int8") else jnp.int4, jnp.float16


def random_weight(name: str, n: int, k: int, seed: int) -> Weight:
    """Weight, scales, and zero points or minima if the format has them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    if name in ("bf16", "einsum"):
        return (jax.random.normal(keys[0], (n, k), jnp.bfloat16) * k**-0.5,)
    group, codes, scales = parameters(name, n, k)

    def random_codes(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if codes == jnp.float8_e4m3fn:
            return jax.random.normal(key, shape, jnp.bfloat16).astype(codes)
        low, high = (-8, 8) if codes == jnp.int4 else (-128, 128)
        return jax.random.randint(key, shape, low, high, jnp.int8).astype(codes)

    weight = random_codes(keys[0], (n, k))
    spread = 1.0 if codes == jnp.float8_e4m3fn else 4.6 if codes == jnp.int4 else 74.0
    scale = jax.random.uniform(keys[1], (n, k // group), jnp.float32, 0.5, 1.5) * k**-0.5 / spread
    more: Weight = ()
    if name.startswith("int4_zero"):
        more = (random_codes(keys[2], (n, k // group)),)
    if name == "int4_min":
        more = (jax.random.normal(keys[2], (n, k // group), jnp.float32) * k**-0.5,)
    return weight, scale.astype(scales), *more


def dequantized(name: str, weight: jax.Array, *numbers: jax.Array) -> jax.Array:
    """The weight in float32."""
    w = weight.astype(jnp.float32)
    if not numbers:
        return w
    w = w.reshape(*numbers[0].shape, -1)
    if name.startswith("int4_zero"):
        w -= numbers[1].astype(jnp.float32)[..., None]
    w *= numbers[0].astype(jnp.float32)[..., None]
    if name == "int4_min":
        w -= numbers[1][..., None]
    return w.reshape(weight.shape)


def product(name: str, rows: int) -> Callable[..., jax.Array]:
    """The product of a format, from x and the arrays of the weight to float32."""

    def einsum(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("MK,NK->MN", x, w, preferred_element_type=jnp.float32)

    def row_scaled(x: jax.Array, w: jax.Array, scales: jax.Array) -> jax.Array:
        top = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True) / 448
        codes = jnp.clip(x.astype(jnp.float32) / top, -448, 448).astype(w.dtype)
        return einsum(codes, w) * top * scales[:, 0]

    def in_digits(x: jax.Array, *w: jax.Array) -> jax.Array:
        matrix = layer_gpu_quantized.Matrix(*w)
        parts = layer_gpu_quantized.product(layer_gpu_quantized.in_order(x[0], matrix), matrix)
        return parts.sum(axis=0, keepdims=True)

    if name == "einsum" or (name == "bf16" and rows > 64):
        return einsum
    if name == "bf16":
        return lambda x, w: skinny_matmul(x, w).sum(axis=0)
    if name.endswith("_digits"):
        return in_digits
    if name == "plain":
        return lambda x, *w: einsum(x, dequantized("plain", *w).astype(x.dtype))
    if name == "w8a8":
        return row_scaled
    if name == "int4_min":
        return lambda x, w, scales, mins: quantized_gpu.matmul(x, w, scales, None, mins)
    return quantized_gpu.matmul


def size(x: jax.Array | jax.ShapeDtypeStruct) -> float:
    """Bytes of an array in memory."""
    return x.size * (0.5 if x.dtype == jnp.int4 else x.dtype.itemsize)


def device_times(run: Callable[[], None]) -> dict[int, float]:
    """Microseconds of device time of each `jit_case` that runs, the median over its calls for each of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        with gzip.open(glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)[0]) as file:
            events = json.load(file)["traceEvents"]
    times: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        args = event.get("args", {})
        if event.get("ph") == "X" and "hlo_op" in args and args.get("hlo_module", "").startswith("jit_case"):
            times[int(args["hlo_module"][8:11])][event["name"]].append(event["dur"])
    # A kernel that a product launches twice has twice as many events.
    least = {case: min(map(len, kernels.values())) for case, kernels in times.items()}
    return {
        case: sum(float(np.median(v)) * round(len(v) / least[case]) for v in kernels.values())
        for case, kernels in times.items()
    }


def measure(model: str, which: str, rows: list[int], formats: list[str]) -> None:
    """Prints the lines of one product of a model."""
    n, k = MODELS[model][which]
    cases = [(m, name) for m in rows for name in formats if m == 1 or not name.endswith("_digits")]
    like = {name: jax.eval_shape(lambda name=name: random_weight(name, n, k, 0)) for name in formats}

    def lowered(number: int, m: int, name: str) -> Any:
        def run(*args: jax.Array) -> jax.Array:
            return product(name, m)(*args)

        run.__name__ = f"case{number:03d}"
        return jax.jit(run).lower(jax.ShapeDtypeStruct((m, k), jnp.bfloat16), *like[name])

    # Lowered in this thread, compiled in several.
    programs = [lowered(i, *case) for i, case in enumerate(cases)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        compiled = list(pool.map(lambda p: p.compile({"xla_gpu_enable_command_buffer": ""}), programs))

    counts = {name: min(40, max(3, int(_L2_TWICE / sum(map(size, like[name]))) + 1)) for name in formats}
    make = jax.jit(random_weight, static_argnums=(0, 1, 2))
    weights = {name: [make(name, n, k, i) for i in range(counts[name])] for name in formats}
    inputs = {m: jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16) for m in rows}

    def sweep() -> None:
        for (m, name), run in zip(cases, compiled, strict=True):
            for w in weights[name]:
                out = run(inputs[m], *w)
            jax.block_until_ready(out)

    @jax.jit
    def relative(got: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        want = jnp.einsum("MK,NK->MN", x.astype(jnp.float32), w, precision="highest")
        return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)

    sweep()
    times = device_times(sweep)
    for i, (m, name) in enumerate(cases):
        weight = weights[name][0]
        error = float(relative(compiled[i](inputs[m], *weight)[:8], inputs[m][:8], dequantized(name, *weight)))
        took = times[i]
        moved = sum(map(size, weight)) + 2 * m * k + 4 * m * n
        best = min((times[j] for j, c in enumerate(cases) if c in ((m, "bf16"), (m, "einsum"))), default=float("nan"))
        line = {
            "model": model, "product": which, "outputs": n, "inputs": k, "rows": m, "format": name,
            "us": round(took, 3), "floor_us": round(moved / _PEAK * 1e6, 3),
            "of_floor": round(moved / _PEAK * 1e6 / took, 4), "gbs": round(moved / took / 1e3, 1),
            "tflops": round(2e-6 * m * n * k / took, 1), "of_bf16": round(best / took, 3), "error": error,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def main() -> int:
    """Measures every product that is asked for; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 8192])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(json.dumps({"jax": jax.__version__, "device": device.device_kind}), flush=True)
    failed = 0
    for model in args.models:
        for which in MODELS[model]:
            try:
                measure(model, which, args.rows, args.formats)
            except Exception as error:  # One product must not cost the others their time on the card.
                failed += 1
                message = f"{type(error).__name__}: {error}"[:2000]
                print(json.dumps({"model": model, "product": which, "failed": message}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
