"""The `qwen-jax` command.

There is one file for each group of subcommands, imported when one of them is called. A subcommand is a dataclass of its
options with a `run` method, or, where `train` defines the options, a function of its arguments. No other package in
qwen_jax imports train or convert, and this one only does so when a subcommand needs them.
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
from types import FrameType

import qwen_jax
from qwen_jax.cli.failures import complain, explain, several_processes

# Name of one or two words -> module in this package, class or function in it, summary.
_COMMANDS: dict[str, tuple[str, str, str]] = {
    "info": ("checkpoints", "Info", "show a model's shape, parameters, memory and cache size"),
    "convert": ("checkpoints", "Convert", "convert between Hugging Face safetensors and Orbax"),
    "upcycle": ("checkpoints", "Upcycle", "turn a dense checkpoint into a mixture of experts"),
    "quantize": ("quantize", "Quantize", "round weights to 4 or 8 bits: GPTQ, AWQ, fp8, int8"),
    "verify": ("checkpoints", "Verify", "compare two checkpoints, or one with transformers, by logits"),
    "generate": ("generate", "Generate", "complete prompts"),
    "chat": ("generate", "Chat", "talk to a model"),
    "serve": ("serve", "Serve", "serve a model over HTTP: OpenAI's API, metrics and a chat page"),
    "score": ("score", "score", "score conversations with a reward model, or a model's answers to prompts"),
    "tokenize": ("tokenize", "Tokenize", "turn text into token ids, and back"),
    "eval": ("evaluate", "Evaluate", "run benchmarks on a checkpoint or a server"),
    "eval list": ("evaluate", "List", "show the benchmarks, and whether their data is there"),
    "eval compare": ("evaluate", "Compare", "compare two evaluations item by item, with a paired test"),
    "eval passkey": ("eval", "Passkey", "find a number in a long context, by length and depth"),
    "eval needle": ("eval", "Needle", "find the values of keys in a long context, by length and depth"),
    "eval ruler": ("eval", "Ruler", "RULER's thirteen tasks: needles, variables, words, questions; by length"),
    "eval rewards": ("eval_rewards", "Rewards", "benchmarks of reward models: RewardBench, RMB, PPE"),
    "eval perplexity": ("eval", "Perplexity", "loss by position over a long text"),
    "eval system-prompts": ("eval_prompts", "SystemPrompts", "how much answers depend on the system prompt"),
    "sparsity tune": ("sparsity", "Tune", "find budgets of sparse attention that keep the recall of each head"),
    "data build": ("data", "build", "turn documents into packed rows of tokens"),
    "data curate": ("curate", "curate", "pre-training data: extract, filter, deduplicate, mix; on one machine or Ray"),
    "data decontaminate": ("data", "decontaminate", "remove documents and examples that contain test items"),
    "data mixture": ("mixture", "mixture", "plan shares, repetition and quality of domains; shares by small runs"),
    "data show": ("data", "Show", "print examples for fine-tuning, with what of them is trained in colour"),
    "data score": ("data_score", "ScoreDocuments", "score documents with a model: rubrics, topics, rewards"),
    "data distil": ("data_score", "Distil", "train a small student on such scores, to score all documents with it"),
    "data synthesize": ("synthesize", "synthesize", "make data for post-training: generate, verify, filter, pair"),
    "data review": (
        "data",
        "Review",
        "label preference pairs on a local page, show the agreement, export the result",
    ),
    "data rollouts": ("data", "Rollouts", "show what a GRPO run has sampled, or write a page to browse it"),
    "scaling fit": ("scaling", "Fit", "fit a scaling law to a table of runs: loss, learning rate and batch size, MoE"),
    "scaling predict": ("scaling", "Predict", "predict a run by a fitted law, with intervals"),
    "scaling compute-optimal": ("scaling", "ComputeOptimal", "size and tokens of the best run with a budget of FLOPs"),
    "scaling sweep": ("scaling_sweep", "Sweep", "train small runs over size, tokens, learning rate and batch"),
    "train pretrain": ("train", "pretrain", "pre-train a model in stages, or resume such a run"),
    "train sft": ("train", "sft", "fine-tune a model on conversations"),
    "train reward": ("train", "reward", "train a reward model on pairs of answers"),
    "train dpo": ("train", "dpo", "train a model to prefer the better answers of pairs"),
    "train grpo": ("train", "grpo", "train a model by reinforcement learning on rewarded answers"),
    "sandbox run": ("sandbox", "Run", "run an untrusted program in isolation, or its tests"),
    "sandbox check": ("sandbox", "Check", "show what isolates programs on this machine, and the languages installed"),
    "plan": ("plan", "Plan", "compile a run for given chips without them: does it fit, how fast could it be"),
    "quickstart": ("train", "quickstart", "train a small model on real text, export it, generate text"),
}

# May stand anywhere among the arguments of any command.
_VERBOSE = "--verbose"
_TERMINATED = 143  # Exit status after SIGTERM.
_SOON = 0.05  # Seconds, in which a callback of the garbage collector ends.


def _name(argv: Sequence[str]) -> str | None:
    """The subcommand at the beginning of the arguments.

    Where a command has subcommands, as `eval`, a word after it names one of them.
    """
    one, two = argv[0], " ".join(argv[:2])
    if two in _COMMANDS:
        return two
    has_subcommands = any(name.startswith(f"{one} ") for name in _COMMANDS)
    if has_subcommands and len(argv) > 1 and not argv[1].startswith("-"):
        return None
    return one if one in _COMMANDS else None


def _run(name: str, argv: Sequence[str]) -> int:
    from qwen_jax.cli.common import parse

    module, attribute, _ = _COMMANDS[name]
    command = getattr(importlib.import_module(f"qwen_jax.cli.{module}"), attribute)
    return int(parse(command, name, argv).run() if isinstance(command, type) else command(argv))


def _usage(group: str = "") -> str:
    """The list of commands, or of those of a group such as data."""
    shown = {name: summary for name, (_, _, summary) in _COMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown)) + 2
    lines = [f"  {name:{width}s} {summary}" for name, summary in shown.items()]
    return "\n".join(
        [
            "usage: qwen-jax COMMAND [options]",
            "",
            "Qwen2.5 in JAX: run, convert, verify and train. Commands:",
            "",
            *lines,
            "",
            "qwen-jax COMMAND --help explains a command and shows its options. With --verbose any command also says on",
            "standard error which kernels it uses. qwen-jax --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; by default those of the process.

    Returns:
      The exit status: 0, 1 for bad input or too little memory (or a failed comparison), 2 for an invalid command line
      (or a comparison that could not be made), 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    verbose = _VERBOSE in argv
    argv = [argument for argument in argv if argument != _VERBOSE]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(qwen_jax.__version__)
        return 0
    name = _name(argv)
    if name is None and argv[1:] in ([], ["-h"], ["--help"]) and any(c.startswith(f"{argv[0]} ") for c in _COMMANDS):
        print(_usage(f"{argv[0]} "))
        return 0 if argv[1:] else 2
    if name is None:
        complain(f"unknown command {' '.join(argv[:2])!r}; the commands are {', '.join(_COMMANDS)}.")
        return 2
    _print_anything()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for package in ("qwen_jax", "convert", "train"):
        logging.getLogger(package).setLevel(logging.INFO if verbose else logging.WARNING)
    _watch_ignored_exceptions()
    # A job scheduler's SIGTERM raises SystemExit, so that unfinished files are removed like after any other failure.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        status = _run(name, argv[len(name.split()) :])
        # Flush here, where a closed pipe can still be handled.
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _leave(130)
        return 130
    except BrokenPipeError:
        # The reader of our output has closed the pipe. Nothing more can be written, not even at interpreter shutdown.
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
    """Ends one of several processes at once: an ordinary exit would wait for the others, and they for this one."""
    if several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch_ignored_exceptions() -> None:
    """Raises a signal again whose exception Python ignored, and silences Orbax's tracebacks of a failed save.

    Python ignores exceptions in callbacks of the garbage collector, of which JAX has one: Ctrl-C and SIGTERM would be
    lost there. Orbax prints a traceback for each array of a failed save; the code that saves reports the failure.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def again(error: BaseException, seconds: float) -> None:
        def raise_error(number: int, frame: FrameType | None) -> None:
            while frame is not None and frame.f_code is not hook.__code__:
                frame = frame.f_back
            if frame is None:
                raise error
            # Python would ignore an exception in the hook too.
            again(error, 2 * seconds)

        # By a clock and not by a thread, which could end before this function does.
        signal.signal(signal.SIGALRM, raise_error)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def hook(what: "sys.UnraisableHookArgs") -> None:
        error = what.exc_value
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == _TERMINATED):
            again(error, _SOON)
        # Writes that finish after the save has been abandoned.
        elif not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(what)

    if before is sys.__unraisablehook__:
        sys.unraisablehook = hook


def _print_anything() -> None:
    """Lets standard output print "?" for characters that it cannot encode. JSON is ASCII and stays exact."""
    out = sys.stdout
    # In a C.UTF-8 locale Python's own surrogateescape never fails, and prints file names that are not UTF-8 exactly.
    failing = ("strict",) if "utf" in (out.encoding or "").lower() else ("strict", "surrogateescape")
    if isinstance(out, io.TextIOWrapper) and out.errors in failing:
        out.reconfigure(errors="replace")
