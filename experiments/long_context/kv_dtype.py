"""The loss on held-out text with keys and values in 8 bits, beside that with a cache in bfloat16.

    python -m experiments.long_context.kv_dtype --model DIR --text FILE [--tokens 8192 --length 512]

Every token attends to what the cache holds, as in generation. The text is cut into rows of one length; they are read
in chunks, which changes nothing but the memory. Each line is a JSON object; losses are in nats per token.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import convert
from qwen_jax.attention import quantized_cache
from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.quantized_cache import KVDtype
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind
from qwen_jax.tokenizer import load_tokenizer

KV_DTYPES: tuple[KVDtype, ...] = ("auto", "int8", "fp8")


def token_losses(
    config: ModelConfig, params: Params, mesh: Mesh, tokens_BT: np.ndarray, kv_dtype: KVDtype, chunk: int = 128
) -> np.ndarray:
    """Minus the log-probability of every token but the first of each row, float64 [B, T - 1].

    Args:
      config: the architecture.
      params: unstacked, bfloat16 or float32; computing is in bfloat16.
      mesh: of the parameters.
      tokens_BT: int32, rows of text.
      kv_dtype: of the cache.
      chunk: tokens that are read at a time.
    """
    (B, T), sharding = tokens_BT.shape, Sharding.for_inference(config, mesh)
    options = Options(stacked=False, dtype="bfloat16")

    @jax.jit
    def read(params: Params, cache: ContiguousCache, tokens_BC: jax.Array) -> tuple[jax.Array, ContiguousCache]:
        model, C = bind(config, params, sharding, options), tokens_BC.shape[1]
        output = model(tokens_BC, cache.positions(C), cache.mask(C), cache=cache)
        logprobs_BCV = jax.nn.log_softmax(model.logits(output.hidden).astype(jnp.float32), axis=-1)
        return logprobs_BCV, output.cache.advanced(C)

    with jax.set_mesh(mesh):
        starts = jax.device_put(np.zeros(B, np.int32), NamedSharding(mesh, sharding.rows))
        dtype = quantized_cache.cache_dtype(kv_dtype, options.dtype)
        channels: Any = None
        if quantized_cache.in_8_bits(dtype):
            channels = jax.jit(lambda p: quantized_cache.channels_of_keys(p, config, sharding))(params)
        cache = ContiguousCache.for_prompts(config, sharding, starts, T, dtype, channels)
        cache, losses = dataclasses.replace(cache, fresh=False), np.zeros((B, T - 1))
        for start in range(0, T, chunk):
            part = jax.device_put(tokens_BT[:, start : start + chunk], NamedSharding(mesh, sharding.tokens))
            logprobs_BCV, cache = read(params, cache, part)
            following = tokens_BT[:, start + 1 : start + chunk + 1]
            of_next = np.take_along_axis(
                np.asarray(logprobs_BCV)[:, : following.shape[1]], following[..., None], axis=2
            )
            losses[:, start : start + following.shape[1]] = -of_next[..., 0]
    return losses


def compare(
    config: ModelConfig, params: Params, mesh: Mesh, tokens_BT: np.ndarray, chunk: int = 128
) -> list[dict[str, Any]]:
    """The mean loss with each dtype of keys and values, and its change with the standard error of that mean.

    Args:
      config, params, mesh, tokens_BT, chunk: as for `token_losses`.
    """
    records, plain = list[dict[str, Any]](), np.zeros(0)
    for kv_dtype in KV_DTYPES:
        losses = token_losses(config, params, mesh, tokens_BT, kv_dtype, chunk)
        plain = losses if kv_dtype == "auto" else plain
        change = losses - plain
        error = change.std() / math.sqrt(change.size)
        dtype = quantized_cache.cache_dtype(kv_dtype, "bfloat16")
        records.append({
            "kv_dtype": dtype.name,
            "tokens": tokens_BT.size,
            "loss": round(float(losses.mean()), 5),
            "change": round(float(change.mean()), 6),
            "standard_error": round(float(error), 6),
            "cache_bytes_per_token": quantized_cache.kv_bytes_per_token(config, dtype),
        })  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--text", type=Path, required=True, help="held-out text in UTF-8")
    parser.add_argument("--bytes", action="store_true", help="of a model whose ids are bytes")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=8192, help="of a row")
    parser.add_argument("--chunk", type=int, default=128)
    args = parser.parse_args()
    mesh = make_mesh({}, jax.devices()[:1])
    config, params = convert.load(args.model, mesh, "bfloat16")
    data = args.text.read_bytes()
    ids = list(data[: args.tokens]) if args.bytes else load_tokenizer(args.model).encode(data.decode())[: args.tokens]
    if len(ids) < args.tokens or args.tokens % args.length:
        raise InputError(
            f"Expected {args.tokens} tokens in rows of {args.length}; the text has {len(ids)}. Give a longer text, or "
            "--tokens that is a multiple of --length."
        )
    for record in compare(config, params, mesh, np.asarray(ids, np.int32).reshape(-1, args.length), args.chunk):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
