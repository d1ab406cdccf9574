"""Several processes that must do the same: each says how it fared, and all hear all."""

import contextlib
from collections.abc import Iterator

import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.errors import InputError


def gather(values: int | list[int]) -> np.ndarray:
    """What each process says. It is a meeting: it waits until every process has come.

    Args:
      values: a number, or as many numbers as the other processes give.

    Returns:
      int32 [processes] or [processes, numbers], by process index.
    """
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))


@contextlib.contextmanager
def in_step(what: str) -> Iterator[None]:
    """A block that ends well in every process or in none. Each process must come to its end.

    Args:
      what: is done, for the message, such as "Writing x".

    Raises:
      InputError: another process failed. Where this one did, its own exception.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    fine = gather(int(problem is None))
    if problem is not None:
        raise problem
    if not fine.all():
        raise InputError(f"{what} failed in process {int(np.argmin(fine))}; its message says why.")
