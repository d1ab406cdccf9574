"""Running the layers, in one loop or one after the other, and what the backward pass keeps of them.

A loop is one compiled body for any depth. On a GPU it has a price: what the body keeps for the backward pass is copied
into one array over all layers and out of it again, for the library that multiplies matrices writes no slices. One
layer after the other has no such copies, and takes longer to compile.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax

Remat = Literal["none", "full", "dots"]


def recompute(f: Callable[..., Any], params: Any, *inputs: Any, constants: tuple[Any, ...] = ()) -> Any:
    """`f(params, *inputs, *constants)`, of which the backward pass keeps the inputs and makes all else again.

    What is made again costs little where f is one product of a matrix with something elementwise before or after it:
    the product itself has no part in its own gradient, and the compiler drops it.

    Args:
      f: a function of arrays.
      params: get gradients, and are there for the backward pass anyhow.
      inputs: get gradients; what is kept.
      constants: get none.
    """

    @jax.custom_vjp
    def run(params: Any, inputs: Any, constants: Any) -> Any:
        return f(params, *inputs, *constants)

    def forward(*args: Any) -> Any:
        return run(*args), args

    def backward(kept: Any, by: Any) -> Any:
        params, inputs, constants = kept
        # Without this the compiler would find that it has made these values before, and keep them.
        inputs, by = lax.optimization_barrier((inputs, by))
        _, pull = jax.vjp(lambda params, inputs: f(params, *inputs, *constants), params, inputs)
        return *pull(by), None

    run.defvjp(forward, backward)
    return run(params, inputs, constants)


def run_layers(
    layer: Callable[[Any, jax.Array], jax.Array], stacked: Any, x: jax.Array, remat: Remat, scan: bool, dtype: Any
) -> jax.Array:
    """Applies all layers to x.

    Args:
      layer: of one layer's parameters and its input.
      stacked: the parameters of all, with a leading axis.
      x: input of the first.
      remat: "full" keeps only the input of each layer; what else there is to choose, `layer` does itself.
      scan: as one loop; otherwise one after the other.
      dtype: of compute, for parameters that are not in a loop.
    """
    if scan:
        one = jax.checkpoint(layer) if remat == "full" else layer
        return lax.scan(lambda x, params: (one(params, x), None), x, stacked)[0]
    one = functools.partial(recompute, layer) if remat == "full" else layer
    for params in unstacked(stacked, dtype):
        x = one(params, x)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstacked(stacked: Any, dtype: Any) -> tuple[Any, ...]:
    """Each layer's parameters in the compute dtype.

    Args:
      stacked: parameters of all layers, with a leading axis.
      dtype: of the result, and so of the gradients until all are there.
    """
    count = jax.tree.leaves(stacked)[0].shape[0]
    layer = lambda i: jax.tree.map(lambda w: w[i].astype(dtype), stacked)  # noqa: E731
    return tuple(map(layer, range(count)))


def _unstacked_forward(stacked: Any, dtype: Any) -> Any:
    return unstacked(stacked, dtype), jax.tree.map(lambda w: w[:0], stacked)


def _unstacked_backward(dtype: Any, like: Any, by: tuple[Any, ...]) -> tuple[Any]:
    def stack(like: jax.Array, *gradients: jax.Array) -> jax.Array:
        # Into one buffer as they come, the last layer's first, so that there is never a second copy of them all.
        out = lax.empty((len(gradients), *like.shape[1:]), gradients[0].dtype, out_sharding=jax.typeof(like).sharding)
        for i in reversed(range(len(gradients))):
            out = out.at[i].set(gradients[i])
        return out.astype(like.dtype)

    return (jax.tree.map(stack, like, *by),)


unstacked.defvjp(_unstacked_forward, _unstacked_backward)
