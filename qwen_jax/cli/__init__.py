"""The `qwen-jax` command.

There is one file for each group of subcommands, imported when one of them is called. A subcommand is a dataclass of its
options with a `run` method, or, where `train` has the options, a function of its arguments. This package alone in
qwen_jax imports train or convert, and only when a subcommand needs them.
"""

import importlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from qwen_jax.cli.failures import complain, explain, several_processes

# A name of one word or two: its module here, what is called in it, its summary.
_COMMANDS: dict[str, tuple[str, str, str]] = {
    "info": ("checkpoints", "Info", "a model's shape, parameters, memory and cache size"),
    "convert": ("checkpoints", "Convert", "between Hugging Face safetensors and Orbax"),
    "upcycle": ("checkpoints", "Upcycle", "a dense checkpoint to a mixture of experts"),
    "verify": ("checkpoints", "Verify", "compare two checkpoints, or one with transformers, by logits"),
    "generate": ("generate", "Generate", "complete prompts"),
    "chat": ("generate", "Chat", "talk to a model"),
    "tokenize": ("tokenize", "Tokenize", "text to token ids and back"),
    "data build": ("data", "build", "documents to packed rows of tokens"),
    "train pretrain": ("train", "pretrain", "pre-train a model in stages, or go on with it"),
    "plan": ("plan", "Plan", "does a run fit given chips, and how fast could it be: compiled without them"),
    "quickstart": ("train", "quickstart", "train a small model on real text, export it, let it speak"),
}


def _name(argv: Sequence[str]) -> str | None:
    """The subcommand that the arguments begin with."""
    return next((name for name in (" ".join(argv[:2]), argv[0]) if name in _COMMANDS), None)


def _run(name: str, argv: Sequence[str]) -> int:
    from qwen_jax.cli.common import parse

    module, attribute, _ = _COMMANDS[name]
    command = getattr(importlib.import_module(f"qwen_jax.cli.{module}"), attribute)
    return int(parse(command, name, argv).run() if isinstance(command, type) else command(argv))


def _usage() -> str:
    width = max(map(len, _COMMANDS)) + 2
    lines = [f"  {name:{width}s} {summary}" for name, (_, _, summary) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: qwen-jax COMMAND [options]",
            "",
            "Qwen2.5 in JAX: run, convert, verify and train. Commands:",
            "",
            *lines,
            "",
            "qwen-jax COMMAND --help explains a command and shows its options.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; by default those of the process.

    Returns:
      The exit status: 0, 1 for bad input or too little memory (or a failed comparison), 2 for a command line that
      makes no sense (or a comparison that could not be made), 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        import importlib.metadata

        print(importlib.metadata.version("qwen-jax"))
        return 0
    name = _name(argv)
    if name is None:
        complain(f"unknown command {argv[0]!r}; the commands are {', '.join(_COMMANDS)}.")
        return 2
    _print_anything()
    # What the kernels, converters and loops have to say goes to standard error, plainly.
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for package in ("qwen_jax", "convert", "train"):
        logging.getLogger(package).setLevel(logging.INFO)
    _hush_orbax()
    # A job scheduler's SIGTERM unwinds like any other failure, so that nothing half-written stays behind.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = _run(name, argv[len(name.split()) :])
        # Here, where a reader that has left can still be caught.
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _leave(130)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left. Nothing more can be written, not even at interpreter shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        problem = explain(error)
        if problem is None:
            if several_processes():
                traceback.print_exc()
                _leave(1)
            raise
        complain(problem)
        _leave(1)
        return 1


def _leave(status: int) -> None:
    """One of several processes ends at once: an ordinary exit would wait for the others, and they for this one."""
    if several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _hush_orbax() -> None:
    """A save that fails is told once, by what catches it, and not by a traceback for each of its arrays as well."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(what: "sys.UnraisableHookArgs") -> None:
        # Writes that end after the save has been given up.
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    if before is sys.__unraisablehook__:
        sys.unraisablehook = hook


def _print_anything() -> None:
    """A character that standard output cannot encode becomes a question mark. JSON is ASCII and stays exact."""
    out = sys.stdout
    # In a C.UTF-8 locale Python's own surrogateescape never fails, and gives odd file names back byte for byte.
    failing = ("strict",) if "utf" in (out.encoding or "").lower() else ("strict", "surrogateescape")
    if isinstance(out, io.TextIOWrapper) and out.errors in failing:
        out.reconfigure(errors="replace")
