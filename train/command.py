"""What the command lines of all runs share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.errors import InputError
from train.distributed import HEARTBEAT_SECONDS, join


def add_run_arguments(parser: argparse.ArgumentParser, what_to_set: str) -> None:
    """Adds the options that every kind of run has.

    Args:
      parser: of the command.
      what_to_set: help of --set.
    """
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH=VALUE",
        help=what_to_set,
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resulting configuration as JSON, and stop"
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps for xprof, into OUTPUT/profile; 10:13 are four steps",
    )
    parser.add_argument(
        "--distributed", action="store_true", help="first join the other processes of a SLURM, GKE, MPI or TPU job"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, if no scheduler says it")
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many, if no scheduler says it")
    parser.add_argument("--process-id", type=int, metavar="I", help="of this process, if no scheduler says it")
    parser.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=HEARTBEAT_SECONDS,
        metavar="SECONDS",
        help="a process that was silent for this long counts as dead, and all others end (%(default)s)",
    )


def join_if_asked(options: argparse.Namespace) -> None:
    """Joins the other processes of the job if the options say that there are any.

    Args:
      options: of `add_run_arguments`.

    Raises:
      InputError: the other processes did not join.
    """
    if options.distributed or options.coordinator:
        join(options.coordinator, options.num_processes, options.process_id, options.heartbeat_timeout)


def steps_to_trace(text: str) -> tuple[int, int]:
    """The first and the last step of "10:13".

    Raises:
      InputError: another text.
    """
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal():
        raise InputError(f"--profile expects the first and the last step to trace, such as 10:13; got {text!r}.")
    return int(first), int(last)


def named(files: Sequence[str] | None) -> dict[str, str]:
    """Files by the beginnings of their names: several files on a command line are sources of their own.

    Args:
      files: paths or patterns; None for none.
    """
    return {Path(file).name.partition(".")[0] or file: file for file in files or ()}
