"""Processes of one job: they share numbers, and share success or failure."""

import contextlib
from collections.abc import Iterator

import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.errors import InputError


def gather_from_processes(values: int | list[int]) -> np.ndarray:
    """Gathers numbers from all processes. It is a barrier: every process must call it.

    Args:
      values: one number, or a list of the same length in every process.

    Returns:
      int32 [processes] or [processes, numbers], by process index.
    """
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))


@contextlib.contextmanager
def in_step(what: str) -> Iterator[None]:
    """A block that succeeds in every process or fails in every process. Every process must reach its end.

    Args:
      what: describes the block in the message, such as "Writing x".

    Raises:
      InputError: another process failed. A process that failed raises its own exception.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    fine = gather_from_processes(int(problem is None))
    if problem is not None:
        raise problem
    if not fine.all():
        raise InputError(f"{what} failed in process {int(np.argmin(fine))}; its message says why.")
