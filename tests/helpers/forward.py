"""The model's logits and gradients on plain arrays, for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_jax import kernels
from qwen_jax.config import ModelConfig
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, abstract_params, bind, param_specs


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _logits(
    config: ModelConfig, sharding: Sharding, params: Params, tokens_BT: jax.Array, options: Options
) -> jax.Array:
    model = bind(config, params, sharding, options)
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    positions, mask = jax.tree.map(
        lambda x: jax.reshard(x, sharding.tokens), (positions, kernels.causal_mask(*tokens_BT.shape))
    )
    return model.logits(model(tokens_BT, positions, mask).hidden)


def logits(
    config: ModelConfig, params: Params, mesh: Mesh, tokens_BT: np.ndarray, options: Options = Options()
) -> np.ndarray:
    """Float32 logits [B, T, V] of a causal forward pass."""
    sharding = Sharding.for_inference(config, mesh)
    with jax.set_mesh(mesh):
        tokens = jax.device_put(np.asarray(tokens_BT, np.int32), NamedSharding(mesh, sharding.tokens))
        return np.asarray(_logits(config, sharding, params, tokens, options))


def loss_gradients(config: ModelConfig, params: Params, mesh: Mesh, tokens_BT: np.ndarray) -> Params:
    """Gradients of the mean next-token cross-entropy, in the tree of the (stacked) parameters, as NumPy arrays."""
    sharding = Sharding.for_inference(config, mesh)

    def loss(params: Params, tokens_BT: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(_logits(config, sharding, params, tokens_BT, Options())[:, :-1])
        return -jnp.mean(jnp.sum(log_p * jax.nn.one_hot(tokens_BT[:, 1:], config.vocab_size), axis=-1))

    with jax.set_mesh(mesh):
        tokens = jax.device_put(np.asarray(tokens_BT, np.int32), NamedSharding(mesh, sharding.tokens))
        result: Params = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params, tokens))
        return result


def random_unstacked(config: ModelConfig, mesh: Mesh, rng: np.random.Generator, scale: float = 0.2) -> Params:
    """Random float32 weights in the unstacked layout, large enough for attention to matter."""
    sharding, options = Sharding.for_inference(config, mesh), Options(stacked=False)

    def draw(shape: jax.ShapeDtypeStruct, spec: jax.P) -> jax.Array:
        return jax.device_put(rng.normal(0, scale, shape.shape).astype(np.float32), NamedSharding(mesh, spec))

    shapes = abstract_params(config, sharding, options, "float32")
    params: Params = jax.tree.map(draw, shapes, param_specs(config, sharding, options))
    return params
