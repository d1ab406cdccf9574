"""Rematerialisation: what the backward pass keeps and what it recomputes.

"full" keeps the inputs of blocks and recomputes everything else. "dots" keeps the results of matrix products and of
attention: a block is run in pieces, each of which is one product with elementwise work around it, and the backward pass
recomputes the elementwise work from the piece's inputs.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax import lax

Remat = Literal["none", "full", "dots"]
Result = TypeVar("Result")


def recompute(f: Callable[..., Result], params: Any, *inputs: Any, constants: tuple[Any, ...] = ()) -> Result:
    """`f(params, *inputs, *constants)`; the backward pass keeps the inputs and recomputes everything else.

    Recomputing costs little where f is one matrix product with elementwise work before or after it: the gradient of a
    product does not need its result, so the compiler drops the recomputed product.

    Args:
      f: a function of pytrees of arrays.
      params: get gradients, and exist in the backward pass anyway.
      inputs: get gradients; they are kept.
      constants: get no gradients.
    """

    @jax.custom_vjp
    def run(params: Any, inputs: Any, constants: Any) -> Result:
        return f(params, *inputs, *constants)

    def forward(*args: Any) -> tuple[Result, Any]:
        return run(*args), args

    def backward(kept: Any, d_result: Result) -> tuple[Any, ...]:
        params, inputs, constants = kept
        # Without the barrier the compiler would recognise the forward pass's values and keep them.
        inputs, d_result = _barrier((inputs, d_result))
        _, pull = jax.vjp(lambda params, inputs: f(params, *inputs, *constants), params, inputs)
        return *pull(d_result), None

    run.defvjp(forward, backward)
    result: Result = run(params, inputs, constants)
    return result


def recompute_piece(
    f: Callable[..., Result], modules: tuple[nnx.Module, ...], *inputs: Any, constants: tuple[Any, ...] = ()
) -> Result:
    """`recompute` for a function of modules: `f(*modules, *inputs, *constants)`."""
    graphdef, params = nnx.split(modules)

    def call(params: Any, *args: Any) -> Result:
        return f(*nnx.merge(graphdef, params), *args)

    return recompute(call, params, *inputs, constants=constants)


def run_piece(
    f: Callable[..., Result], modules: tuple[Any, ...], *inputs: Any, constants: tuple[Any, ...] = ()
) -> Result:
    """The same call, with nothing recomputed."""
    return f(*modules, *inputs, *constants)


def _barrier(tree: Any) -> Any:
    """The same values behind an optimisation barrier: the compiler does not know where they come from."""
    leaves, treedef = jax.tree.flatten(tree)
    # Gradients with respect to integers are float0, which a barrier does not take.
    real = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]
    for i, leaf in zip(real, lax.optimization_barrier([leaves[i] for i in real]), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)
