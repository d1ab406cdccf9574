"""What the command lines of learning experiments share: sizes as options, and a limit of time."""

import argparse
import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import Any, TypeVar

Setup = TypeVar("Setup")


def add_setup_arguments(parser: argparse.ArgumentParser, folder: str, setup: type[Any]) -> None:
    """Adds the folder of the runs, tiny sizes, a limit of time, the table alone, and each size by itself.

    Args:
      parser: of the command.
      folder: by default.
      setup: a dataclass of sizes, all with defaults; `dtype` is a text.
    """
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--limit", type=float, help="seconds after which the run in progress saves and ends")
    parser.add_argument("--table", action="store_true", help="run nothing; show what has been run")
    for field in dataclasses.fields(setup):
        kind = str if field.name == "dtype" else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"by default {field.default}")


def chosen(args: argparse.Namespace, setup: Setup) -> Setup:
    """A setup with the sizes that were given.

    Args:
      args: of `add_setup_arguments`.
      setup: what is taken otherwise.
    """
    assert dataclasses.is_dataclass(setup)
    assert not isinstance(setup, type)
    names = [field.name for field in dataclasses.fields(setup)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(setup, **given)


def save_after(seconds: float) -> threading.Timer:
    """Sends SIGTERM to this process after some seconds; training answers by saving. `cancel()` calls it off."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    return timer
