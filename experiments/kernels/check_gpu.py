"""Checks of the kernels on one Hopper GPU: their tests, of which some run only there, and sanitizers.

    python -m experiments.kernels.check_gpu tests       # in several processes (pytest-xdist) on the card
    python -m experiments.kernels.check_gpu sanitizers  # CUDA's compute-sanitizer: races, barriers, memory

The sanitizers run small cases of every attention kernel, forward, gradient, decoding and sparse prefill, because they
slow a kernel down a hundredfold. The exit status is 1 if a test fails or a sanitizer reports anything.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = ("racecheck", "synccheck", "memcheck")


def small_cases() -> None:
    """Runs each kernel once, on a few tiles."""
    import jax
    import jax.numpy as jnp

    from qwen_jax import kernels

    def normal(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)

    T, H, K = 320, 4, 2
    documents = jnp.repeat(jnp.array([[1, 2, 3, 0]], jnp.int32), T // 4, axis=1)
    mask = kernels.packed_mask(documents)
    for d in (64, 128):
        q, k, v = normal(0, 1, T, H, d), normal(1, 1, T, K, d), normal(2, 1, T, K, d)

        def run(q: jax.Array, k: jax.Array, v: jax.Array, scale: float = d**-0.5) -> tuple[jax.Array, jax.Array]:
            return kernels.attention(q, k, v, mask, scale=scale, implementation="gpu", return_lse=True)

        out, pull = jax.vjp(run, q, k, v)
        jax.block_until_ready(pull(out))
        cache = normal(3, 2, K, 512, d), normal(4, 2, K, 512, d)
        pages = normal(5, 24, K, 64, d), normal(6, 24, K, 64, d)
        table = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
        for tokens in (1, 3, 128):
            rows = kernels.cache_mask(jnp.array([0, 70], jnp.int32), jnp.int32(300), tokens)
            q = normal(7, 2, tokens, H, d)
            jax.block_until_ready(kernels.decode_attention(q, *cache, rows, scale=0.1, implementation="gpu"))
            jax.block_until_ready(kernels.paged_attention(q, *pages, table, rows, scale=0.1, implementation="gpu"))
        qkv, bias, turn = normal(8, 2, H + 2 * K, d), normal(9, H + 2 * K, d), normal(10, 2, d // 2)
        start = jnp.zeros(2, jnp.int32)
        jax.block_until_ready(kernels.decode_step(qkv, bias, turn, turn, *cache, start, jnp.int32(300), scale=0.1))
        lengths = jnp.array([300, 64], jnp.int32), jnp.ones(2, jnp.int32)
        step = kernels.paged_decode_step(qkv, bias, turn, turn, *pages, start, *lengths, table, scale=0.1)
        jax.block_until_ready(step)
        sparse_cases(normal(11, 1, 256, H, d), normal(12, 1, K, 1024, d), normal(13, 1, K, 1024, d))


def sparse_cases(q_BTHd: Any, k_BKSd: Any, v_BKSd: Any) -> None:
    """Runs sparse prefill once by each pattern, whose kernels choose keys and visit lists and columns.

    Args:
      q_BTHd: a chunk of queries, of one row.
      k_BKSd, v_BKSd: the cache, in which the chunk is the last.
    """
    import jax
    import jax.numpy as jnp

    from qwen_jax import kernels
    from qwen_jax.attention.sparse import Part, PooledBlocks, VerticalSlash, attend

    (_, T, H, _), S = q_BTHd.shape, k_BKSd.shape[2]
    part = Part(q_BTHd, kernels.cache_mask(jnp.zeros(1, jnp.int32), jnp.int32(S - T), T))
    lines = VerticalSlash(((100,) * H,), ((150,) * H,))
    for pattern in (lines, PooledBlocks(threshold=0.5, sink=128, window=128, last=100)):
        budgets = jnp.asarray(lines.budgets(0))
        found = attend([part], k_BKSd, v_BKSd, pattern, slot=S - T, end=S, scale=0.1, budgets_H2=budgets)
        jax.block_until_ready(found)


def main() -> int:
    """Runs the tests or the sanitizers, and prints what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tests", "sanitizers", "cases"), metavar="{tests,sanitizers}")
    parser.add_argument("--jobs", type=int, default=8, help="processes that share the card")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    args = parser.parse_args()
    environment = os.environ | {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # Otherwise the plain functions that kernels are compared with would round float32 operands to TensorFloat-32.
    environment["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    if args.what == "cases":
        small_cases()
        return 0
    if args.what == "tests":
        files = sorted(str(x) for x in Path("tests/qwen_jax/kernels").glob("test_*_gpu.py"))
        files.append("tests/qwen_jax/kernels/test_coverage.py")
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(args.jobs), *files]
        return min(subprocess.run(command, env=environment, check=False).returncode, 1)
    if shutil.which("compute-sanitizer") is None:
        print("Expected compute-sanitizer on the PATH. Install the CUDA toolkit, which contains it.", file=sys.stderr)
        return 1
    failed = False
    for tool in args.tools:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += [sys.executable, "-m", "experiments.kernels.check_gpu", "cases"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        said = [line for line in result.stdout.splitlines() if line.startswith("=========")]
        # A tool that could not run prints no summary.
        found = result.returncode != 0 or not any("SUMMARY" in line for line in said)
        print(f"{tool}: {'something' if found else 'nothing'} found", *said[-20:], sep="\n", flush=True)
        if found:
            print(result.stderr[-2000:], file=sys.stderr)
        failed |= found
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
