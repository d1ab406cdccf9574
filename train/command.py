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
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps for xprof, into OUTPUT/profile; 10:13 are four steps",
    )
    add_job_arguments(parser, what_to_set)


def add_job_arguments(parser: argparse.ArgumentParser, what_to_set: str) -> None:
    """Adds the options that change a configuration, and that join the other processes of a job.

    Args:
      parser: of the command.
      what_to_set: help of --set.
    """
    add_list(parser, "--set", "PATH=VALUE", what_to_set, default=[])
    parser.add_argument(
        "--print-config", action="store_true", help="print the resulting configuration as JSON, and stop"
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


def add_list(
    parser: argparse.ArgumentParser, name: str, metavar: str, shown: str, default: list[str] | None = None
) -> None:
    """Adds an option with one value or several. Where it is given again, its values are added to the earlier ones.

    Args:
      parser: of the command.
      name: such as "--data".
      metavar: of a value.
      shown: the help.
      default: without the option.
    """
    parser.add_argument(name, nargs="+", action="extend", default=default, metavar=metavar, help=shown)


def add_tuning_arguments(parser: argparse.ArgumentParser, examples: str, config: str) -> None:
    """Adds the options that every command has that tunes a model, beside its own data.

    Args:
      parser: of the command.
      examples: what is evaluated on, such as "prompts".
      config: the class that a function of --config returns.
    """
    parser.add_argument("--model", metavar="DIR", help="checkpoint to begin with, or a Hub id; with its tokenizer")
    parser.add_argument("--output", metavar="DIR", help="folder of the run")
    add_list(parser, "--held-out", "FILE", f"{examples} to evaluate on")
    parser.add_argument(
        "--lora", action="store_true", help="train an adapter, which is written in PEFT's format; see step.lora"
    )
    parser.add_argument("--config", metavar="FILE.py[:FUNCTION]", help=f"a function that returns a {config}, instead")


def check_given(options: argparse.Namespace, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Checks that a run is described by plain arguments or by --config, but not by both.

    Args:
      options: of `add_tuning_arguments` and the command's own.
      required: options that a run without --config must have, such as "data".
      optional: others of which a configuration file has the values.

    Raises:
      InputError: --config with some of them, or neither it nor all that are required.
    """
    given = [name for name in (*required, *optional) if getattr(options, name)]
    if options.config is not None and given:
        shown = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(f"--config has the whole run. Leave out {shown}, or use --set.")
    missing = [f"--{name}" for name in required if name not in given]
    if options.config is None and missing:
        *first, last = (f"--{name}" for name in required)
        raise InputError(f"{' and '.join(missing)} is missing. Give {', '.join(first)} and {last}, or --config.")


def join_if_asked(options: argparse.Namespace) -> None:
    """Joins the other processes of the job if the options say that there are any.

    Args:
      options: of `add_job_arguments`.

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
