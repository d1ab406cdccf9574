"""What the backward pass recomputes."""

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
        inputs, by = _fenced((inputs, by))
        _, pull = jax.vjp(lambda params, inputs: f(params, *inputs, *constants), params, inputs)
        return *pull(by), None

    run.defvjp(forward, backward)
    return run(params, inputs, constants)


def _fenced(tree: Any) -> Any:
    """The same values, of which the compiler does not know where they come from."""
    leaves, treedef = jax.tree.flatten(tree)
    real = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]  # Integers have such gradients.
    for i, leaf in zip(real, lax.optimization_barrier([leaves[i] for i in real]), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)
