"""Joining the other processes of a job, and checking that all were started with the same configuration and data."""

import jax
import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.parallel.multihost import gather_from_processes

# A process that was silent for this long counts as dead, and all others end.
HEARTBEAT_SECONDS = 60


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Joins this process to a job. Call it before anything else touches a device.

    Args:
      coordinator: "host:port" of process 0; by default from SLURM, Open MPI, Kubernetes or the Cloud TPU.
      processes: how many there are; by default as above.
      index: of this one, from 0; by default as above.
      heartbeat_seconds: a process that was silent for this long counts as dead, and all others end.

    Raises:
      InputError: no scheduler describes the job, or the other processes did not join.
    """
    if heartbeat_seconds < 2:
        raise InputError(f"The heartbeat timeout must be at least 2 seconds, got {heartbeat_seconds}.")
    try:
        jax.distributed.initialize(coordinator, processes, index, heartbeat_timeout_seconds=heartbeat_seconds)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"Cannot join the other processes: {reason} Start one process for each host by SLURM, Open MPI, Kubernetes "
            "or on every worker of a Cloud TPU; or give --coordinator HOST:PORT, --num-processes N and --process-id I."
        ) from None


def check_same(what: str, digest: str) -> None:
    """Checks that something is the same in all processes.

    Args:
      what: its name for the message, such as "configuration".
      digest: a hash of it (hex).

    Raises:
      InputError: in every process, if it differs in any process from that of process 0.
    """
    of_all = gather_from_processes([int(digest[i : i + 7], 16) for i in (0, 7, 14)])
    different = np.flatnonzero((of_all != of_all[0]).any(axis=1)).tolist()
    if different:
        raise InputError(
            f"The {what} of {'process' if len(different) == 1 else 'processes'} {', '.join(map(str, different))} "
            "is not that of process 0. Start all processes with the same command, on the same files."
        )


def from_process_0(digest: str) -> str:
    """The hash (SHA-256, in hex) that process 0 has computed. Every process must call it.

    Args:
      digest: in process 0; the others' are not used, so that only one of them reads large files.
    """
    parts = [int((digest or "0" * 64)[i : i + 7], 16) for i in range(0, 64, 7)]
    first = gather_from_processes(parts).reshape(-1, len(parts))[0]
    return "".join(f"{int(part):07x}" for part in first[:-1]) + f"{int(first[-1]):x}"
