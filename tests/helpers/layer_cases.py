"""The layer kernels as plain functions, and short runs of the decode loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.quantized_cache import KVDtype, cache_dtype
from qwen_jax.config import ModelConfig, MoE
from qwen_jax.inference import one_row
from qwen_jax.inference.programs import StaticArgs, decoder, prefill
from qwen_jax.inference.sampling import SamplingParams, SamplingValues
from qwen_jax.kernels.decode import layer_gpu, layer_gpu_moe, layer_gpu_quantized
from qwen_jax.kernels.matmul.quantized import dequantize
from qwen_jax.kernels.matmul.quantized_gpu_tiles import CODES
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import abstract_params, bind, param_specs
from tests.helpers import decode_cases

ON_HOPPER = jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability.startswith("9.")
EPS = 1e-6


def norm(x_D: jax.Array, w_D: jax.Array) -> jax.Array:
    x = x_D.astype(jnp.float32)
    x = (x * jax.lax.rsqrt(jnp.mean(x * x) + EPS)).astype(x_D.dtype)
    return x * w_D


def times(w: jax.Array, x_I: jax.Array) -> jax.Array:
    return jnp.matmul(w.astype(jnp.float32), x_I.astype(jnp.float32), precision="highest")


def plain_product(
    stream_D: jax.Array, norm_D: jax.Array, w_ND: jax.Array, *, out_dtype: Any = jnp.bfloat16, **_: Any
) -> Any:
    """`norm_product` in plain functions."""
    return times(w_ND, norm(stream_D, norm_D)).astype(out_dtype)


def plain_next(
    stream_D: jax.Array, norm_D: jax.Array, w_ND: jax.Array, added_D: jax.Array | None = None, **how: Any
) -> Any:
    """`norm_product` in plain functions, with a product that is added to the stream."""
    if added_D is None:
        return plain_product(stream_D, norm_D, w_ND, **how)
    stream_D = stream_D + added_D.astype(stream_D.dtype)
    return stream_D, plain_product(stream_D, norm_D, w_ND, **how)


def plain_feed_forward(
    stream: jax.Array, added: jax.Array, norm_D: jax.Array, w_gate_up: jax.Array, w_down: jax.Array,
    counter: jax.Array, **_: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`feed_forward` in plain functions."""
    stream = stream + added.astype(stream.dtype)
    gate, up = times(w_gate_up, norm(stream, norm_D))
    return stream, times(w_down, (jax.nn.silu(gate) * up).astype(stream.dtype)), counter


def plain_tail(
    heads: jax.Array, stream: jax.Array, w_o: jax.Array, mid_norm: jax.Array, w_gate_up: jax.Array, w_down: jax.Array,
    next_norm: jax.Array, w_next: jax.Array, counter: jax.Array, *, out_dtype: Any = jnp.bfloat16,
    axis: str | None = None, **_: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`layer_tail` in plain functions."""

    def of_all_shards(x: jax.Array) -> jax.Array:
        return (x if axis is None else jax.lax.psum(x, axis)).astype(stream.dtype)

    stream = stream + of_all_shards(times(w_o, heads))
    gate, up = times(w_gate_up, norm(stream, mid_norm))
    stream = stream + of_all_shards(times(w_down, (jax.nn.silu(gate) * up).astype(stream.dtype)))
    return stream, plain_product(stream, next_norm, w_next, out_dtype=out_dtype), counter


def plain_quantized_product(stream_D: jax.Array, norm_D: jax.Array, w: layer_gpu_quantized.Matrix, **_: Any) -> Any:
    """`layer_gpu_quantized.norm_product` in plain functions."""
    return plain_product(stream_D, norm_D, dequantize(*w))


def plain_quantized_tail(
    heads: jax.Array, stream: jax.Array, o: Any, mid_norm: jax.Array, gate_up: Any, down: Any, next_norm: jax.Array,
    next_qkv: Any, *, axis: str | None = None, **_: Any,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """`layer_gpu_quantized.layer_tail` in plain functions."""
    w_o, w_gate_up, w_down = (dequantize(*w) for w in (o, gate_up, down))
    w_next = jnp.zeros((0, stream.size)) if next_qkv is None else dequantize(*next_qkv)
    both = w_gate_up.reshape(2, -1, stream.size)
    args = heads, stream, w_o, mid_norm, both, w_down, next_norm, w_next, jnp.zeros(1)
    stream, out, _ = plain_tail(*args, axis=axis)
    return stream, None if next_qkv is None else out


def plain_experts_tail(
    heads: jax.Array, stream: jax.Array, w_o: jax.Array, mid_norm: jax.Array, w_router: jax.Array,
    w_shared_gate_up: jax.Array, w_gate_up: jax.Array, w_shared_down: jax.Array, w_down: jax.Array,
    next_norm: jax.Array, w_next: jax.Array, counter: jax.Array, *, moe: MoE, out_dtype: Any = jnp.bfloat16, **_: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`layer_gpu_moe.layer_tail` in plain functions."""
    dtype = stream.dtype
    stream = stream + times(w_o, heads).astype(dtype)
    x = norm(stream, mid_norm)
    logits = times(w_router, x).astype(dtype).astype(jnp.float32)
    top, ids = jax.lax.top_k(jax.nn.softmax(logits[: moe.num_experts]), moe.num_experts_per_tok)
    if moe.norm_topk_prob:
        top = top / top.sum()

    def inner(w: jax.Array, weight: Any = 1.0) -> jax.Array:
        gate, up = times(w, x)
        return (jax.nn.silu(gate) * up * weight).astype(dtype)

    top = top.astype(dtype).astype(jnp.float32)
    routed = sum(times(w_down[id], inner(w_gate_up[id], weight)) for id, weight in zip(ids, top, strict=True))
    shared = times(w_shared_down, inner(w_shared_gate_up)).astype(dtype)
    gate = jax.nn.sigmoid(logits[moe.num_experts]).astype(dtype)
    stream = stream + (jnp.asarray(routed).astype(dtype) + gate * shared)
    return stream, plain_product(stream, next_norm, w_next, out_dtype=out_dtype), counter


def error(x: jax.typing.ArrayLike, truth: jax.typing.ArrayLike) -> float:
    """Relative error of an array."""
    a, b = (np.asarray(v, np.float64) for v in (x, truth))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def one_layer_cache(config: ModelConfig) -> ContiguousCache:
    """Shapes of a cache of one layer."""
    buffer = jax.ShapeDtypeStruct((1, config.num_kv_heads, 128, config.head_dim), jnp.bfloat16)
    number, rows = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return ContiguousCache((buffer,), (buffer,), number, rows)  # type: ignore[arg-type]


def drawn(config: ModelConfig, mesh: Any, rng: np.random.Generator) -> tuple[Options, Sharding, Any]:
    """The inference layout, and random weights in it."""
    options = Options(stacked=False, fused=True, dtype="bfloat16")
    sharding = Sharding.for_inference(config, mesh)
    shapes, specs = (f(config, sharding, options) for f in (abstract_params, param_specs))

    def draw(path: Any, shape: jax.ShapeDtypeStruct, spec: jax.P) -> jax.Array:
        values, name = rng.standard_normal(shape.shape, np.float32), str(getattr(path[-1], "key", path[-1]))
        if (config.quantization and name in ("scales", "zeros")) or shape.dtype in CODES:
            # Weights of a magnitude of 0.05.
            small = 2 if name == "zeros" else 3
            values = 0.01 + 0.005 * np.abs(values) if name == "scales" else np.round(small * values).clip(-8, 7)
            return jax.device_put(jnp.asarray(values, shape.dtype), jax.NamedSharding(mesh, spec))
        values = 1 + 0.1 * values if "norm" in jax.tree_util.keystr(path) else 0.05 * values
        return jax.device_put(jnp.asarray(values, jnp.bfloat16), jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return options, sharding, jax.tree_util.tree_map_with_path(draw, shapes, specs)


def generate(config: ModelConfig, kv_dtype: KVDtype = "auto") -> tuple[np.ndarray, np.ndarray]:
    """16 greedy tokens after a prompt, and their log-probabilities.

    Args:
      config: the architecture; weights are random, the same every time.
      kv_dtype: of the cache.
    """
    mesh, sampling, rng = make_mesh({}, jax.devices()[:1]), SamplingParams(logprobs=True), np.random.default_rng(0)
    options, sharding, params = drawn(config, mesh, rng)
    with jax.set_mesh(mesh):
        sizes: dict[str, Any] = {"slots": 64, "vocab_limit": config.vocab_size, "kv_dtype": kv_dtype}
        static = StaticArgs(config, sharding, options, sampling.mode, **sizes)
        tokens = jax.device_put(
            rng.integers(0, config.vocab_size, (1, 16), np.int32), jax.NamedSharding(mesh, sharding.tokens)
        )
        rows = jax.NamedSharding(mesh, sharding.rows)
        lengths, seeds = jax.device_put((np.array([11], np.int32), np.zeros(1, np.uint32)), rows)
        state, *_ = prefill(params, tokens, lengths, seeds, SamplingValues.of(sampling), static=static)
        run = decoder(static, state)
        _, chosen, logprobs = run(params, state, SamplingValues.of(sampling), static=static, steps=16)
        return np.asarray(chosen)[0], np.asarray(logprobs)[0]


def check_texts(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], count: int = 8) -> None:
    """Two results of `generate` are the same text, up to rounding.

    Where two tokens are about equally likely, two roundings may choose different ones. The log-probabilities of both
    choices agree even so, since each is the largest. What follows such a token cannot be compared.

    Args:
      got, expected: tokens and their log-probabilities.
      count: tokens that are compared at most.
    """
    apart = np.flatnonzero(got[0][:count] != expected[0][:count])
    until = apart[0] + 1 if len(apart) else count
    np.testing.assert_allclose(got[1][:until], expected[1][:until], atol=0.05)


def in_dtype(x: jax.Array, kv_dtype: KVDtype, key: bool, rng: np.random.Generator) -> Any:
    """Random keys or values [B, K, S, d] as a cache holds them; keys in 8 bits have factors of channels.

    Args:
      x: bfloat16, where the cache is.
      kv_dtype: of the cache.
      key: whether they are keys.
      rng: of the factors.
    """
    if kv_dtype == "auto":
        return x
    (_, K, _, d), where = x.shape, jax.NamedSharding(x.sharding.mesh, jax.P(x.sharding.spec[1], None))
    factors = jax.device_put(np.float32(2) ** rng.integers(0, 3, (K, d)), where) if key else None
    codes = jnp.zeros_like(x, cache_dtype(kv_dtype, "bfloat16"))
    return kernels.QuantizedRows(codes, jnp.zeros_like(x[..., 0], jnp.float32), factors).quantized(x)


def logits_of_both(config: ModelConfig, count: int = 12, kv_dtype: KVDtype = "auto") -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits [count, V] after the same tokens and caches, from the kernels of a decode step and from the model.

    Args:
      config: the architecture; weights and caches are random, the same every time.
      count: tokens, each decoded by itself.
      kv_dtype: of the caches.
    """
    mesh, slots, rng = make_mesh({}, jax.devices()[:1]), 128, np.random.default_rng(0)
    options, sharding, params = drawn(config, mesh, rng)

    def by_kernels(params: Any, token: jax.Array, cache: ContiguousCache) -> jax.Array:
        params, token = one_row.prepare(params, token)
        return one_row.step(params, config, sharding, token, cache, jnp.zeros((1,), jnp.int32))[0][0]

    def by_model(params: Any, token: jax.Array, cache: ContiguousCache) -> jax.Array:
        model = bind(config, params, sharding, options)
        x = model(token[:, None], cache.positions(1), cache.mask(1), cache=cache).hidden
        return model.logits(x)[0, 0]

    with jax.set_mesh(mesh):
        shape = (1, sharding.kv_heads, slots, config.head_dim)
        where = jax.NamedSharding(mesh, sharding.cache)
        keys_values = [
            tuple(
                in_dtype(jax.device_put(jnp.bfloat16(rng.standard_normal(shape)), where), kv_dtype, key, rng)
                for _ in range(config.num_layers)
            )
            for key in (True, False)
        ]
        rows = jax.NamedSharding(mesh, sharding.rows)
        start = jax.device_put(np.array([3], np.int32), rows)
        results = []
        for step, how in ((by_kernels, one_row.COMPILER_OPTIONS if ON_HOPPER else None), (by_model, None)):
            run = jax.jit(step, compiler_options=how)
            results.append(
                np.stack([
                    np.asarray(
                        run(
                            params,
                            jax.device_put(np.array([97 * i % config.vocab_size], np.int32), rows),
                            ContiguousCache(*keys_values, jnp.int32(60 + i), start),
                        )
                    )
                    for i in range(count)
                ])
            )  # fmt: skip
        return results[0], results[1]


def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the kernels of a decode step by plain functions; the list records their calls."""
    calls: list[str] = []

    def recorded(what: str, f: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(what)
            return f(*args, **kwargs)

        return run

    jax.clear_caches()  # otherwise the loop compiled before would be used
    monkeypatch.setattr(one_row, "supports", lambda *_: True)
    monkeypatch.setattr(kernels, "decode_step", recorded("attention", decode_cases.plain))
    monkeypatch.setattr(kernels, "paged_decode_step", recorded("attention", decode_cases.paged_plain))
    monkeypatch.setattr(layer_gpu, "layer_tail", recorded("tail", plain_tail))
    monkeypatch.setattr(layer_gpu_moe, "layer_tail", recorded("experts", plain_experts_tail))
    monkeypatch.setattr(layer_gpu_quantized, "layer_tail", recorded("quantised", plain_quantized_tail))
    monkeypatch.setattr(layer_gpu_quantized, "norm_product", recorded("quantised first", plain_quantized_product))
    monkeypatch.setattr(layer_gpu, "norm_product", recorded("first", plain_next))
    monkeypatch.setattr(layer_gpu, "output_product", recorded("output", lambda x, w, **_: times(w, x)))
    monkeypatch.setattr(layer_gpu, "feed_forward", recorded("feed forward", plain_feed_forward))
    return calls
