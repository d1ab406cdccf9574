"""The quickstart: trains a tokenizer and a small model on text, exports the model, and lets it complete prompts."""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer, train_bpe
from train.checkpoint import write_json
from train.data.batch import Batch
from train.data.loader import batches, fingerprint, whole_batches
from train.data.packing import pack
from train.data.text import Documents, find_files, read_documents, split_documents, standard_library
from train.fields import at_least
from train.launch import Job, Phase, launch
from train.loop import ByStep, CheckpointConfig, Indexed, LoopConfig, Monitor, held_out_sums
from train.observe.display import Display
from train.observe.metrics import MetricsLog, bits_per_byte, read_log, scored_bytes
from train.observe.plots import plot_run, try_to
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import TrainState
from train.step import EvalStep, StepConfig

Export = Callable[[Params, ModelConfig, Tokenizer, Path], None]
"""Writes a Hugging Face folder."""
VerifyExport = Callable[[Params, ModelConfig, Path], int]
"""Compares a Hugging Face folder with parameters bit for bit; returns the number of tensors, raises if one differs."""
Complete = Callable[[Path, Sequence[str], int], Iterable[Iterable[str]]]
"""From a Hugging Face folder, prompts and a number of new tokens: the pieces of each prompt's completion."""

_SUMMARY, _MADE_BY = "summary.json", "qwen-jax quickstart"
_HELD_OUT_BYTES = 100_000


@dataclasses.dataclass(frozen=True)
class QuickstartOptions:
    """Train a tokenizer and a small Qwen2.5 model on real text, export it, and complete prompts with it.

    Attributes:
      text: files, folders or patterns to learn from; by default the sources of Python's own standard library.
      output: folder for all results. The folder of an earlier quickstart is replaced, any other is not.
      prompts: the trained model completes them.
      steps: training steps.
      batch: rows in a step.
      length: tokens in a row.
      layers: transformer blocks.
      hidden: width of the model, a multiple of 64.
      vocab_size: of the tokenizer that is trained.
      learning_rate: the peak.
      max_new_tokens: the longest completion.
      max_megabytes: read at most this much text.
      seed: of the weights, the order of the data and the choice of held-out documents.
    """

    text: tuple[str, ...] = ()
    output: Path = Path("quickstart-run")
    prompts: tuple[str, ...] = ("import", "class", "def __init__(self", "    for i in")
    steps: int = 1200
    batch: int = 8
    length: int = 128
    layers: int = 4
    hidden: int = 128
    vocab_size: int = 2048
    learning_rate: float = 4e-3
    max_new_tokens: int = 64
    max_megabytes: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, steps=2, batch=1, length=8, layers=1, max_new_tokens=1, vocab_size=1)
        if self.hidden < 64 or self.hidden % 64:
            raise InputError(f"hidden must be a multiple of 64, the width of a head; got {self.hidden}.")
        if not self.max_megabytes > 0 or not self.learning_rate > 0:
            raise InputError(
                f"max_megabytes and learning_rate must be positive, got {self.max_megabytes} and {self.learning_rate}."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be in [0, 2**32), got {self.seed}.")
        if not math.isfinite(self.max_megabytes):
            raise InputError(f"max_megabytes must be a finite number, got {self.max_megabytes}.")
        if any(not prompt for prompt in self.prompts):
            raise InputError("A prompt is empty. Give at least one character to complete.")


def run(
    options: QuickstartOptions,
    *,
    export: Export,
    verify_export: VerifyExport,
    complete: Complete,
    console: Console | None = None,
    progress: Console | None = None,
) -> dict[str, Any]:
    """Runs the quickstart. Conversion and generation are passed in, because training does not import them.

    The output folder is complete when it appears, at the end; after a failure there is none.

    Args:
      options: what to learn from, and the sizes.
      export: writes a Hugging Face folder.
      verify_export: checks that it reads back bit for bit.
      complete: streams completions.
      console: for results; standard output by default.
      progress: for progress; standard error by default.

    Returns:
      The content of `summary.json`.

    Raises:
      InputError: no such text, no or too little text, or an output folder that is not a quickstart's.
    """
    console, progress = console or Console(), progress or Console(stderr=True)
    output = options.output.absolute()
    _check_output(output)
    clock = _Clock(progress)

    # Text, tokenizer, rows.
    with clock("reading text"):
        documents = _read(options)
    training, held_out = split_documents(documents.texts, _held_out_fraction(documents), options.seed)
    num_bytes = sum(len(text.encode()) for text in documents.texts)
    origin = ", ".join(options.text) or f"the standard library of Python {platform.python_version()}"
    clock.say(
        f"{len(documents.texts)} documents, {num_bytes / 1e6:.1f} MB, from {origin}; {len(held_out)} of them held out"
        + (f"; {len(documents.skipped)} files skipped that are not UTF-8 text" if documents.skipped else "")
    )
    with clock("training the tokenizer"):
        tokenizer = train_bpe(training, options.vocab_size)
    with clock("encoding"):
        rows, held_out_rows = (_rows(tokenizer, texts, options.length) for texts in (training, held_out))
        data = batches(rows, options.batch, options.seed)
        evaluation = _Evaluation(tokenizer, held_out_rows, options.batch)
    tokens = int(rows.loss_weights.sum())
    clock.say(f"{tokenizer.vocab_size} token ids, {num_bytes / _num_tokens(rows, held_out_rows):.2f} bytes a token")

    # The model. All that follows is written into a temporary folder beside the output.
    model = _model(options, tokenizer)
    clock.say(
        f"a Qwen2.5 model of {model.num_params()['total'] / 1e6:.1f}M parameters: {model.num_layers} layers, width "
        f"{model.hidden_size}, {model.num_heads} query and {model.num_kv_heads} key/value heads, tied embeddings"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".quickstart-", dir=output.parent))
    try:
        with clock("training", say=False):
            identity = {"seed": options.seed, "batch": options.batch, "data": fingerprint(rows)}
            params = launch(_job(options, model, tokenizer, folder, data, evaluation, identity, progress)).state.params
        with clock("saving"):
            records = read_log(folder / "metrics.jsonl")
            title = f"{model.num_params()['total'] / 1e6:.1f}M-parameter Qwen2.5 on {origin}"
            try_to("draw loss.png", lambda: plot_run(records, folder / "loss.png", title), clock.say)
            export(params, model, tokenizer, folder / "model")
        with clock("comparing the export with the trained weights"):
            num_tensors = verify_export(params, model, folder / "model")
        clock.say(f"all {num_tensors} tensors read back bit for bit")
        with clock("completing prompts", say=False):
            completions = _complete(options, complete, folder / "model", console)
        # The summary; then the folder is complete.
        curve = {int(r["step"]): r["held_out_bits_per_byte"] for r in records if "held_out_bits_per_byte" in r}
        losses = [r["loss"] for r in records if "loss" in r]
        summary = {
            "made_by": _MADE_BY,
            "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
            "versions": {"python": platform.python_version()}
            | {
                name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")
            },
            "text": {
                "from": origin,
                "documents": len(documents.texts),
                "held_out_documents": len(held_out),
                "bytes": num_bytes,
                "skipped_files": [str(path) for path in documents.skipped],
            },
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()},
            "parameters": model.num_params()["total"],
            "tokens_in_text": tokens,
            "tokens_trained": options.steps * options.batch * options.length,
            "first_loss": losses[0],
            "last_loss": sum(losses[-20:]) / len(losses[-20:]),
            "held_out_bits_per_byte": curve,
            "tensors_bit_for_bit": num_tensors,
            "completions": completions,
            "seconds": clock.seconds,
        }
        write_json(folder / _SUMMARY, summary)
        _replace(folder, output)
    except BaseException:
        shutil.rmtree(folder)
        raise
    _say_results(console, options.output, summary)
    return summary


class _Clock:
    """Shows the current phase and how long each took."""

    def __init__(self, console: Console):
        self._console = console
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def __call__(self, what: str, say: bool = True) -> Iterator[None]:
        begin = time.perf_counter()
        if say and self._console.is_terminal:
            with self._console.status(what):
                yield
        else:
            yield
        self.seconds[what] = round(time.perf_counter() - begin, 1)
        if say:
            self.say(f"{what}: {self.seconds[what]:.1f} s")


class _Evaluation:
    """Held-out loss and bits per byte."""

    def __init__(self, tokenizer: Tokenizer, rows: Batch, batch: int):
        special = tokenizer.special_ids
        bytes_of_id = np.array(
            [0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
        )
        self._batches, self._bytes = whole_batches(rows, batch), scored_bytes(rows, bytes_of_id)
        if not self._bytes:
            raise InputError("The held-out text is too short to measure anything. Give more text.")

    def __call__(self, state: TrainState, eval_step: EvalStep[Batch], mesh: jax.sharding.Mesh) -> dict[str, float]:
        sums, _ = held_out_sums(state.params, eval_step, self._batches, mesh)
        return {"loss": sums.mean_loss(), "bits_per_byte": bits_per_byte(float(sums.loss), self._bytes)}


def _check_output(output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        ours = json.loads((output / _SUMMARY).read_text(encoding="utf-8"))["made_by"] == _MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InputError(
            f"{output} exists and was not made by a quickstart. Give another folder with --output, or remove it."
        )


def _replace(folder: Path, output: Path) -> None:
    """Puts the new folder in place of an earlier one."""
    folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private.
    if output.exists():
        old = folder.with_name(folder.name + "-old")
        os.replace(output, old)
        os.replace(folder, output)
        shutil.rmtree(old)
    else:
        os.replace(folder, output)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(options: QuickstartOptions) -> Documents:
    files = find_files(options.text) if options.text else standard_library()
    # Shuffled, because reading may stop before the last file.
    order = np.random.default_rng(options.seed).permutation(len(files))
    return read_documents([files[i] for i in order], int(options.max_megabytes * 1e6))


def _held_out_fraction(documents: Documents) -> float:
    return min(0.1, _HELD_OUT_BYTES / sum(map(len, documents.texts)))


def _rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Batch:
    return pack(tokenizer.encode_documents(texts), length)


def _num_tokens(*rows: Batch) -> int:
    return int(sum(part.loss_weights.sum() for part in rows))


def _model(options: QuickstartOptions, tokenizer: Tokenizer) -> ModelConfig:
    heads = options.hidden // 64
    return ModelConfig(
        vocab_size=-(-tokenizer.vocab_size // 128) * 128,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_layers=options.layers,
        num_heads=heads,
        num_kv_heads=heads // 2 if heads % 2 == 0 else 1,
        head_dim=64,
        tie_word_embeddings=True,
        # The base of short-context pre-training.
        rope_theta=10_000.0,
        # Room for the rows in training and for the prompts; a character has at most four tokens.
        max_position_embeddings=max(
            512, options.length, *(4 * len(prompt) + options.max_new_tokens for prompt in options.prompts)
        ),
        bos_token_id=None,
        eos_token_ids=(tokenizer.eos_id,),
        dtype="float32",
    )


def _job(
    options: QuickstartOptions,
    model: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    data: Indexed[Batch],
    evaluation: _Evaluation,
    identity: Mapping[str, Any],
    console: Console,
) -> Job[Batch]:
    """The job of a quickstart, in its temporary folder."""
    mesh = make_mesh({}, jax.devices()[:1])
    # bfloat16 is slower than float32 on most CPUs, and recomputing activations is cheaper than moving them.
    dtype: Literal["float32", "bfloat16"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    schedule = Schedule(options.steps, options.learning_rate, warmup_steps=options.steps // 20, final_fraction=0.02)
    phase = Phase(
        end=options.steps,
        objective=NextToken(model, PretrainConfig(loss_chunk=4096)),
        step=StepConfig(dtype=dtype, remat="full"),
        mesh=mesh,
        data=lambda step: ByStep(data),
        evaluate=lambda state, eval_step: evaluation(state, eval_step, mesh),
    )
    return Job(
        folder=folder / "checkpoints",
        model=model,
        tokenizer=tokenizer,
        optimizer=OptimizerConfig(schedule),
        phases=(phase,),
        report=lambda step: _Report(folder, options.steps, console),
        seed=options.seed,
        identity=identity,
        loop=LoopConfig(evaluate_every=max(options.steps // 5, 1)),
        checkpoints=CheckpointConfig(every=max(options.steps // 2, 1)),
        # An interrupted quickstart leaves nothing.
        save_on_signals=False,
    )


class _Report:
    """The log and the progress of a quickstart."""

    def __init__(self, folder: Path, steps: int, console: Console):
        self._log, self._display = MetricsLog(folder / "metrics.jsonl"), Display(console, steps)

    def __enter__(self) -> "_Report":
        self._display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        self._log.close()

    def monitor(self, index: int) -> Monitor:
        return Monitor(log=self._log, display=self._display)

    def end(self, step: int, stopped_by: int, saved: int | None) -> None:
        self._display.close()


def _complete(options: QuickstartOptions, complete: Complete, folder: Path, console: Console) -> dict[str, str]:
    completions = {}
    streams = complete(folder, options.prompts, options.max_new_tokens)
    for prompt, stream in zip(options.prompts, streams, strict=True):
        # The first piece may need a compilation, which may print messages; the prompt is printed after them.
        remaining = iter(stream)
        first = list(itertools.islice(remaining, 1))
        console.rule(style="dim", characters="·")
        console.print(prompt, style="bold", end="", markup=False, highlight=False, soft_wrap=True)
        pieces = []
        for piece in itertools.chain(first, remaining):
            pieces.append(piece)
            console.print(piece, end="", markup=False, emoji=False, highlight=False, soft_wrap=True)
        console.print()
        completions[prompt] = "".join(pieces)
    return completions


def _say_results(console: Console, output: Path, summary: dict[str, Any]) -> None:
    curve = list(summary["held_out_bits_per_byte"].values())
    console.rule(style="dim", characters="·")
    lines = (
        f"training loss         {summary['first_loss']:.2f} -> {summary['last_loss']:.2f} nats a token",
        f"held-out text         {' -> '.join(f'{value:.2f}' for value in curve)} bits a byte",
        f"export                {summary['tensors_bit_for_bit']} tensors, bit for bit",
        f"loss curve            {output / 'loss.png'}",
        f"Hugging Face folder   {output / 'model'}",
        f"Orbax checkpoint      {output / 'checkpoints' / str(summary['options']['steps'])}",
        f"all numbers           {output / _SUMMARY}, {output / 'metrics.jsonl'}",
        "",
        "next:",
        f"  qwen-jax generate --model {output / 'model'} --prompt 'def __init__(self'",
        f"  qwen-jax info {output / 'model'}",
        "  qwen-jax quickstart --text your/files --output my-run",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
