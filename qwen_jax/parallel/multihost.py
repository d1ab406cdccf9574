"""Processes of one job: they share numbers, and share success or failure."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qwen_jax.errors import InputError


def gather_from_processes(values: int | list[int]) -> np.ndarray:
    """Gathers numbers from all processes. It is a barrier: every process must call it.

    Args:
      values: one number, or a list of the same length in every process.

    Returns:
      int32 [processes] or [processes, numbers], by process index.
    """
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))


def check_uses_all(mesh: Mesh, axis: str) -> None:
    """Raises InputError for a mesh without devices of some process.

    Args:
      mesh: that a command was given.
      axis: to propose.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    if len(processes) < jax.process_count():
        given = ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "of one device"
        raise InputError(
            f"The mesh {given} does not use the devices of all {jax.process_count()} processes. Give one of all "
            f"{jax.device_count()} devices, such as --mesh {axis}={jax.device_count()}."
        )


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
