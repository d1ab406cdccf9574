"""The yardstick: the shortest plain-JAX greedy decode loop that is right, with one weight buffer for each layer.

Weights are [in, out], `x @ w`; the cache is one buffer for each layer; the loop is a `lax.scan` on the device. No
sampling, no sharding, no ragged batches. Anything we offer on top must not cost speed against this.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.attention.rope import inverse_frequencies
from qwen_jax.config import ModelConfig

Params = dict[str, Any]


def random_params(config: ModelConfig, key: jax.Array) -> Params:
    """bfloat16 weights, normal with deviation 0.02."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, K = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    count = iter(range(10**6))
    make = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)

    def normal(*shape: int) -> jax.Array:
        return make(jax.random.fold_in(key, next(count)), shape)

    def layer() -> Params:
        return {
            "norm1": jnp.ones(D, jnp.bfloat16),
            "q": normal(D, H),
            "k": normal(D, K),
            "v": normal(D, K),
            "bq": normal(H),
            "bk": normal(K),
            "bv": normal(K),
            "o": normal(H, D),
            "norm2": jnp.ones(D, jnp.bfloat16),
            "gate": normal(D, F),
            "up": normal(D, F),
            "down": normal(F, D),
        }

    embed = normal(V, D)
    head = embed if config.tie_word_embeddings else normal(V, D)
    layers = [layer() for _ in range(config.num_layers)]
    return {"embed": embed, "layers": layers, "norm": jnp.ones(D, jnp.bfloat16), "head": head}


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype) * weight


def rope(x_BHd: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x_BHd, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def decode_loop(
    config: ModelConfig, params: Params, cache: Any, token_B: jax.Array, start: jax.Array, steps: int
) -> tuple[Any, jax.Array]:
    """`steps` greedy tokens from a cache [(k, v), ...], each [B, K, S, d], filled up to `start`."""
    H, K, d, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps
    B, slots = token_B.shape[0], cache[0][0].shape[2]

    def step(carry: Any, _: None) -> Any:
        cache, token_B, at = carry
        x = params["embed"][token_B]
        angles = at.astype(jnp.float32) * jnp.asarray(inverse_frequencies(config))
        cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        seen = jnp.arange(slots) <= at
        new = []
        for w, (k_cache, v_cache) in zip(params["layers"], cache, strict=True):
            h = norm(x, w["norm1"], eps)
            q = rope((h @ w["q"] + w["bq"]).reshape(B, H, d), cos, sin)
            k = rope((h @ w["k"] + w["bk"]).reshape(B, K, d), cos, sin)
            v = (h @ w["v"] + w["bv"]).reshape(B, K, d)
            k_cache = jax.lax.dynamic_update_slice_in_dim(k_cache, k[:, :, None], at, axis=2)
            v_cache = jax.lax.dynamic_update_slice_in_dim(v_cache, v[:, :, None], at, axis=2)
            new.append((k_cache, v_cache))
            q = q.reshape(B, K, H // K, d)
            s = jnp.einsum("BKGd,BKSd->BKGS", q, k_cache, preferred_element_type=jnp.float32) * d**-0.5
            p = jax.nn.softmax(jnp.where(seen, s, -1e30), -1).astype(x.dtype)
            x = x + jnp.einsum("BKGS,BKSd->BKGd", p, v_cache).reshape(B, H * d) @ w["o"]
            h = norm(x, w["norm2"], eps)
            x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        x = norm(x, params["norm"], eps)
        logits = jnp.einsum("BD,VD->BV", x, params["head"], preferred_element_type=jnp.float32)
        token_B = jnp.argmax(logits, -1).astype(jnp.int32)
        return (new, token_B, at + 1), token_B

    carry: Any = (cache, token_B, start)
    (cache, *_), tokens = jax.lax.scan(step, carry, length=steps)
    return cache, tokens
