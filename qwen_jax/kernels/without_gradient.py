"""Kernels that have no gradient."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax

from qwen_jax.errors import InputError

Result = TypeVar("Result")


def without_gradient(run: Callable[..., Result], arguments: tuple[Any, ...], message: str) -> Result:
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
    result: Result = kernel(*arguments)
    return result
