"""Time to read long prompts, dense and sparse, on one GPU or on a tensor axis. Results are in README.md.

    python -m experiments.long_context.prefill --lengths 131072 1000000 --patterns dense pooled vertical-slash
    python -m experiments.long_context.prefill --lengths 1000000 --patterns dense pooled --once --devices 2

Qwen2.5 at true shapes with random weights, whose attention has structure all the same: the biases of queries and keys
give every head a band of near keys, and weaker bands far away, of different strength. Logits of noise have no keys that
matter. The prompt of a length is random ids, the same for all patterns and devices. Times are of the second prompt,
from the host to the first token; the first one compiles. Each line is a JSON object, with the tokens that follow the
prompt and the log-probability of the first. What has been read so far is shown on standard error.
"""

import argparse
import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode.benchmark import random_params
from qwen_jax.attention.sparse import PooledBlocks, VerticalSlash, summarise
from qwen_jax.config import ModelConfig
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import Params
from qwen_jax.published import published


def with_structure(params: Params, config: ModelConfig, strength: float) -> Params:
    """Biases of queries and keys that make logits fall with the distance; heads differ by a factor of two."""
    H, K, d = config.num_heads, config.num_kv_heads, config.head_dim
    # A logit is a sum over pairs of |q||k| cos(frequency x distance) / sqrt(d): at most `strength` at distance 0.
    size = (strength * d**0.5 / (d / 2)) ** 0.5
    heads = jnp.geomspace(0.7, 1.4, H // K)[None, :, None] ** 2
    q = jnp.broadcast_to(size * heads, (K, H // K, d)).reshape(H, d)
    k = jnp.full((K, d), size)
    half = jnp.where(jnp.arange(d) < d // 2, 1.0, 0.0)
    for layer in params["layers"]:
        attention = layer["attention"]
        attention["q"]["bias"] = (q * half).astype(jnp.bfloat16)
        attention["k"]["bias"] = (k * half).astype(jnp.bfloat16)
    return params


def pattern_of(name: str, config: ModelConfig, columns: int, slashes: int) -> VerticalSlash | PooledBlocks | None:
    if name == "vertical-slash":
        shape = config.num_layers, config.num_heads
        budgets = (((n,) * shape[1],) * shape[0] for n in (columns, slashes))
        return VerticalSlash(*budgets)
    return PooledBlocks() if name == "pooled" else None


def floor(config: ModelConfig, length: int) -> dict[str, float]:
    """PFLOP of attention and of all matrix products of a causal prefill."""
    pairs = length * (length + 1) / 2
    attention = 4 * config.head_dim * config.num_heads * config.num_layers * pairs
    linear = 2 * config.num_params()["layers"] * length
    return {"attention_pflop": attention / 1e15, "linear_pflop": linear / 1e15}


def left_out(engine: Engine) -> dict[str, float]:
    """Density over all pairs, and recall, of the last prompt."""
    if not engine.skipped:
        return {}
    recall_LH, density, cut = summarise(engine.skipped)
    return {
        "density": density,
        "recall": float(recall_LH.mean()),
        "recall_lowest_head": float(recall_LH.min()),
        "cut": cut,
    }


def note(marks: list[float], name: str, read: int, total: int) -> None:
    """Keeps the time of a chunk, and shows how far the prompt has been read."""
    marks.append(time.perf_counter())
    print(f"{name}: {read:,} of {total:,} tokens, {marks[-1] - marks[0]:.1f} s", file=sys.stderr, flush=True)


def say(**record: Any) -> None:
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}), flush=True)


def main() -> None:
    """Prints a line for each length and pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b-instruct-1m")
    parser.add_argument("--lengths", nargs="+", type=int, default=[131_072])
    parser.add_argument("--patterns", nargs="+", default=["dense", "pooled", "vertical-slash"])
    parser.add_argument("--chunk", type=int, default=32_768)
    parser.add_argument("--cache-dtype", default="auto", choices=["auto", "int8"])
    parser.add_argument("--columns", type=int, default=3920, help="budget of each head (the mean of the 7B-1M file)")
    parser.add_argument("--slashes", type=int, default=7650)
    parser.add_argument("--strength", type=float, default=12.0, help="logit of a key at distance 0")
    parser.add_argument("--devices", type=int, default=1, help="on a tensor axis")
    parser.add_argument("--once", action="store_true", help="time the first prompt, after compiling on a short one")
    parser.add_argument("--decode", type=int, default=17, help="tokens to decode after the prompt")
    args = parser.parse_args()
    config, mesh = published(args.model), make_mesh({"tensor": args.devices}, jax.devices()[: args.devices])
    params = with_structure(random_params(config, mesh), config, args.strength)
    engine = Engine(config, params, mesh, prefill_chunk=args.chunk, kv_dtype=args.cache_dtype, sparse_from=args.chunk)
    device = jax.devices()[0]
    say(jax=jax.__version__, device=device.device_kind, date=time.strftime("%Y-%m-%d"), **vars(args))
    for length in args.lengths:
        for name in args.patterns:
            pattern = pattern_of(name, config, args.columns, args.slashes)
            engine.sparsity = None
            if pattern is not None:
                engine.use_sparse(pattern)
            prompt = np.random.default_rng(length).integers(0, engine.vocab_limit, length).tolist()
            result: dict[str, Any] = {}
            for attempt in ("compile_and_first", "seconds")[: 1 if args.once else 2]:
                start = time.perf_counter()
                marks = [start]
                engine.on_chunk = functools.partial(note, marks, name)
                chunks = engine.token_chunks([prompt], SamplingParams(temperature=0, logprobs=True), args.decode)
                first, logprobs = next(chunks)
                assert logprobs is not None
                result[attempt] = time.perf_counter() - start
                # Decoding: the chunk after the first one compiles the loop.
                tokens = np.concatenate([first, *(more for more, _ in chunks)], axis=1)[0, : args.decode]
                chunks.close()
                result |= {"tokens": tokens.tolist(), "first_logprob": float(logprobs[0, 0])}
            per_chunk = np.diff(marks)
            stats = device.memory_stats() or {}
            say(
                length=length,
                pattern=name,
                **result,
                chunks=[round(float(x), 3) for x in per_chunk[1:]],
                chunks_after_the_first=float(per_chunk[2:].sum()),
                **floor(config, length),
                **left_out(engine),
                peak_gib=stats.get("peak_bytes_in_use", 0) / 2**30,
            )


if __name__ == "__main__":
    main()
