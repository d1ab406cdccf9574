"""The yardstick: the shortest plain-JAX training step that is right and fast. What we offer on top must not cost speed.

A dict of stacked arrays, a `lax.scan` over layers under a `jax.checkpoint` policy, attention by cuDNN, cross-entropy a
chunk at a time, AdamW by optax. Master weights, moments, norms, softmax, loss and sums of gradients are float32;
products are bfloat16, the logits among them. No sharding, no documents within a row, no weights of tokens. Weights are
[in, out].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax.config import ModelConfig

Params = dict[str, Any]
# Within a scan nothing can be merged with the pass before, so nothing has to be kept from it.
checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
POLICIES: dict[str, Callable[..., Any]] = {
    "none": lambda body: body,
    "full": checkpoint,
    "dots": functools.partial(checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Float32 weights, normal with deviation 0.02; biases are zero and norms one."""
    L, D, F, V = config.num_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    H, K = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"q": (D, H), "k": (D, K), "v": (D, K), "o": (H, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
    keys = iter(jax.random.split(key, len(shapes) + 2))
    layers = {name: 0.02 * jax.random.normal(next(keys), (L, *shape)) for name, shape in shapes.items()}
    layers |= {"q_bias": jnp.zeros((L, H)), "k_bias": jnp.zeros((L, K)), "v_bias": jnp.zeros((L, K))}
    layers |= {"norm1": jnp.ones((L, D)), "norm2": jnp.ones((L, D))}
    params = {"embed": 0.02 * jax.random.normal(next(keys), (V, D)), "layers": layers, "norm": jnp.ones(D)}
    return params if config.tie_word_embeddings else params | {"head": 0.02 * jax.random.normal(next(keys), (V, D))}


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype) * weight


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def loss(
    config: ModelConfig, policy: str, chunk: int, unroll: int, dtype: Any, params: Params, tokens: jax.Array
) -> jax.Array:
    """Mean cross-entropy in nats of tokens [B, T + 1], the first of a row left out; `chunk` has logits at a time."""
    (B, T), d, eps = (tokens.shape[0], tokens.shape[1] - 1), config.head_dim, config.rms_norm_eps
    angles = jnp.arange(T)[:, None, None] * config.rope_theta ** (-jnp.arange(0, d, 2) / d)
    cos, sin = jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)
    attend: Any = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def body(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        h = norm(x, w["norm1"], eps)
        q, k, v = ((h @ w[n] + w[f"{n}_bias"]).reshape(B, T, -1, d) for n in "qkv")
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attend)
        x = x + out.reshape(B, T, -1) @ w["o"]
        h = norm(x, w["norm2"], eps)
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    # Cast once, ahead of the scan, which then reads half the bytes.
    layers = jax.tree.map(lambda w: w.astype(dtype), params["layers"])
    x = params["embed"][tokens[:, :-1]].astype(dtype)
    x, _ = jax.lax.scan(POLICIES[policy](body), x, layers, unroll=unroll)
    x = norm(x, params["norm"].astype(dtype), eps).reshape(-1, min(chunk, B * T), config.hidden_size)

    @checkpoint
    def part(total: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, targets = inputs
        head = (params["head"] if "head" in params else params["embed"]).astype(
            dtype
        )  # Here, so that chunks' gradients add up in float32.
        logits = (x @ head.T).astype(jnp.float32)
        is_target = jnp.arange(config.vocab_size) == targets[:, None]
        return total + (jax.nn.logsumexp(logits, -1) - jnp.where(is_target, logits, 0.0).sum(-1)).sum(), None

    return jax.lax.scan(part, jnp.float32(0), (x, tokens[:, 1:].reshape(x.shape[:2])))[0] / (B * T)


def make(
    config: ModelConfig,
    rate: float,
    policy: str,
    chunk: int = 4096,
    unroll: int = 1,
    dtype: Any = jnp.bfloat16,
    eps: float = 1e-8,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`start(key)` gives a state; `step(state, tokens)` gives the next one, in its place, and the numbers."""

    def decays(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" not in str(path) and "bias" not in str(path), params
        )

    adamw = optax.adamw(rate, b1=0.9, b2=0.95, eps=eps, weight_decay=0.1, mask=decays)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def start(key: jax.Array) -> Any:
        params = init(config, key)
        return params, optimizer.init(params)

    def step(state: Any, tokens: jax.Array) -> Any:
        params, moments = state
        value, gradient = jax.value_and_grad(functools.partial(loss, config, policy, chunk, unroll, dtype))(
            params, tokens
        )
        updates, moments = optimizer.update(gradient, moments, params)
        numbers = {"loss": value, "grad_norm": optax.tree.norm(gradient)}
        return (optax.apply_updates(params, updates), moments), numbers

    return jax.jit(start), jax.jit(step, donate_argnums=0)
