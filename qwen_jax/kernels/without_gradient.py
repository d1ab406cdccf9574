"""Kernels that have no gradient."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax

from qwen_jax.errors import InputError


def without_gradient(
    run: Callable[..., tuple[jax.Array, jax.Array]], arguments: tuple[Any, ...], message: str
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel that has no gradient, and raises `InputError` with this message if someone differentiates it.

    Args:
      run: the kernel.
      arguments: of the kernel: arrays and trees of arrays.
      message: says which kernel has no gradient and what to use instead.
    """

    def refuse(*_: object) -> NoReturn:
        raise InputError(message)

    kernel = jax.custom_vjp(run)
    kernel.defvjp(refuse, refuse)
    result: tuple[jax.Array, jax.Array] = kernel(*arguments)
    return result
