"""Does it work where it was not trained? A small model, trained at 1,024 tokens, is read at 4 and 8 times that length.

    python -m experiments.long_context.train_and_extend --folder extend-run --seeds 0 1 2
    python -m experiments.long_context.train_and_extend --folder extend-run --table     # of what has been run

It learns the next byte of real text (half of each batch), copying (an eighth) and finding needles (the rest).
Then, without further training, it is read by each scheme:

- `rope`: plain positions, beyond those that it has seen.
- `yarn`: YaRN's frequencies and temperature, with the ratio of the lengths as factor.
- `dca`: dual-chunk attention (chunk: the trained length, local: 1/32 of it).
- `dca+scale`: the same, logits scaled by the length.

At each length: `passkey` is one needle in real text, `needle` one of four in random ids, both answered by the engine
with all ids right; the losses are of long held-out documents, by position. Each seed has its own weights, data order
and tests; the schemes have the same tests. One GPU, some minutes a seed. Leaves in the folder: `model-SEED/` (a Hugging
Face folder), a log of the training, a folder of answers for each reading, and `results.jsonl` with a line for each
reading. What has been done is not done again.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

import convert
from convert.huggingface import export
from experiments.learning.data import find_text
from qwen_jax.config import DualChunk, ModelConfig, Yarn
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.inference import Engine
from qwen_jax.parallel.sharding import make_mesh
from train.data.batch import Batch
from train.data.text import split_documents
from train.evaluate import perplexity, runner, synthetic_ids
from train.evaluate.tasks import Sample
from train.files import append_record, read_records
from train.loop import ByStep, Monitor, fit
from train.observe.display import Display
from train.observe.metrics import MetricsLog
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import init_state
from train.step import StepConfig, make_train_step

BYTES, VOCAB_SIZE = 256, 512
LAYOUT = synthetic_ids.IdLayout(BYTES, VOCAB_SIZE)
SCHEMES = ("rope", "yarn", "dca", "dca+scale")
# No length is beyond it: dual-chunk attention does not scale its logits.
_NEVER = 2**30
RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained, and how it is tested.

    Attributes:
      length: tokens of a row in training.
      layers, hidden: of the model; heads have 64 dimensions.
      steps, batch: of the training.
      learning_rate: the peak.
      megabytes: of text to train on, at most.
      ratios: test lengths, over the trained length.
      samples: of each task, length and depth.
      depths: of the needles, in percent.
      windows: of held-out text.
    """

    length: int = 1024
    layers: int = 8
    hidden: int = 512
    steps: int = 2000
    batch: int = 64
    learning_rate: float = 1e-3
    megabytes: float = 60.0
    ratios: tuple[int, ...] = (1, 4, 8)
    samples: int = 20
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    windows: int = 32

    def model(self) -> ModelConfig:
        """The architecture as it is trained."""
        heads = self.hidden // 64
        return ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden,
            intermediate_size=11 * self.hidden // 4,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=max(heads // 4, 1),
            head_dim=64,
            tie_word_embeddings=True,
            rope_theta=1e4,
            max_position_embeddings=self.length,
            bos_token_id=None,
            eos_token_ids=(),
            dtype="float32",
        )


def extended(model: ModelConfig, scheme: str, trained: int, length: int) -> ModelConfig:
    """The model as a scheme reads a length.

    Args:
      model: as it was trained.
      scheme: of `SCHEMES`.
      trained: tokens of a row in training.
      length: in tokens.
    """
    wide = dataclasses.replace(model, max_position_embeddings=max(length, trained))
    if scheme == "yarn" and length > trained:
        return dataclasses.replace(wide, yarn=Yarn(length / trained, trained))
    if scheme in ("dca", "dca+scale"):
        original = trained if scheme == "dca+scale" else _NEVER
        return dataclasses.replace(wide, dual_chunk=DualChunk(trained, trained // 32, original))
    return wide


class Mixture:
    """Batches by step: half of the rows are real text, an eighth copies, the rest needles.

    The answers of a row of needles, and a row's copy, weigh half as much as a row of text.

    Args:
      setup: lengths and sizes.
      text: bytes of all training documents.
      seed: of the data.
    """

    def __init__(self, setup: Setup, text: np.ndarray, seed: int):
        self._setup, self._text, self._seed = setup, text, seed

    def __getitem__(self, step: int) -> Batch:
        rng, T, B = np.random.default_rng([self._seed, step]), self._setup.length, self._setup.batch
        copies, needles = B // 8, 3 * B // 8
        # Copies of any size, so that no distance between the two is the rule.
        size = int(rng.integers(T // 8, (T - 1) // 2 + 1))
        copied, copy_weights = synthetic_ids.copy_rows(rng, copies, T, LAYOUT, size)
        # Needles in text and in random ids, many of them asked for.
        most = min(T // 15, 32)
        asked = max(most // 2, 1)
        noise = rng.choice(LAYOUT.noise, (needles, T)).astype(np.int32)
        noise[::2] = self._rows(rng, len(noise[::2]))
        hidden, answers = synthetic_ids.needle_rows(
            rng, needles, T, LAYOUT, int(rng.integers(asked, most + 1)), asked, noise=noise
        )
        # Real text.
        rows = self._rows(rng, B - copies - needles)
        tokens = np.concatenate([copied, hidden, rows])
        weights = [w * (T / 2 / np.maximum(w.sum(1, keepdims=True), 1)) for w in (copy_weights, answers)]
        loss_weights = np.concatenate([*weights, np.ones(rows.shape)]).astype(np.float32)
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
        return Batch(tokens, positions, np.ones(tokens.shape, np.int32), loss_weights)

    def _rows(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Stretches of the text, int32 [count, length]."""
        begins = rng.integers(0, len(self._text) - self._setup.length, count)
        return self._text[begins[:, None] + np.arange(self._setup.length)].astype(np.int32)


def read_text(setup: Setup, folders: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a Python installation's sources and documentation.

    Args:
      setup: how much, and how long a window is.
      folders: where to look; by default in the standard library and the installed packages.

    Returns:
      uint8 [n], all training documents; and uint8 [windows, longest test length], beginnings of held-out documents.

    Raises:
      InputError: too little text.
    """
    documents = find_text(int(setup.megabytes * 1e6), 0, folders)
    training, held_out = split_documents(documents, 0.1, 0)
    longest = setup.length * max(setup.ratios)
    found = [np.frombuffer(text.encode(), np.uint8)[:longest] for text in held_out]
    windows = [text for text in found if len(text) == longest][: setup.windows]
    text = np.frombuffer("\n".join(training).encode(), np.uint8)
    if not windows or len(text) <= setup.length:
        raise InputError(
            f"The text has {len(text):,} bytes to train on and {len(windows)} held-out documents of {longest:,} bytes. "
            "Give more (--megabytes), or test smaller lengths."
        )
    return text, np.stack(windows)


def train(setup: Setup, text: np.ndarray, seed: int, folder: Path) -> None:
    """Trains the model of a seed and exports it to `model-SEED`, unless it is there.

    Args:
      setup: sizes.
      text: bytes to train on.
      seed: of weights and data.
      folder: of the experiment.
    """
    if (folder / f"model-{seed}").exists():
        return
    mesh = make_mesh({}, jax.devices()[:1])
    optimizer = OptimizerConfig(Schedule(setup.steps, setup.learning_rate, warmup_steps=setup.steps // 20))
    objective = NextToken(setup.model(), PretrainConfig(loss_chunk=16_384))
    step = StepConfig(dtype=_dtype(), remat="none" if jax.default_backend() == "cpu" else "dots")
    log = MetricsLog(folder / f"train-{seed}.jsonl")
    try:
        with jax.set_mesh(mesh), Display(Console(stderr=True), setup.steps) as display:
            state = fit(
                setup.steps,
                init_state(setup.model(), optimizer, seed, mesh),
                make_train_step(objective, optimizer, step, mesh),
                ByStep(Mixture(setup, text, seed)),
                mesh=mesh,
                monitor=Monitor(log=log, display=display),
            )
    finally:
        log.close()
    export(state.params, setup.model(), folder / f"model-{seed}")


def read(
    setup: Setup, seed: int, scheme: str, ratio: int, attention: str, held_out: np.ndarray, folder: Path
) -> dict[str, Any]:
    """Reads one length by one scheme.

    Args:
      setup: sizes.
      seed: of the model and of the tests.
      scheme: of `SCHEMES`.
      ratio: test length over trained length.
      attention: "dense".
      held_out: uint8 [windows, longest].
      folder: of the experiment.

    Returns:
      The record: accuracies, losses, and losses by position; or why the model refuses.
    """
    length = setup.length * ratio
    record = {"seed": seed, "scheme": scheme, "attention": attention, "ratio": ratio, "length": length}
    mesh = make_mesh({}, jax.devices()[:1])
    try:
        config, params = convert.load(folder / f"model-{seed}", mesh, _dtype())
        config = extended(config, scheme, setup.length, length)
        engine = Engine(config, params, mesh, dtype=_dtype(), eos_token_ids=[])

        def make(case: runner.Case) -> Sample:
            rng, depth = case.rng(seed), case.depth or 0.0
            if case.task == "needle":
                return synthetic_ids.needle_sample(rng, length, depth, LAYOUT, 4)
            text = held_out[case.sample % len(held_out), :length].astype(np.int32)
            return synthetic_ids.needle_sample(rng, length, depth, LAYOUT, 1, text)

        cases = runner.cases({"passkey": True, "needle": True}, [length], setup.depths, setup.samples)
        answers = folder / f"answers-{seed}" / f"{scheme}-{attention}-x{ratio}"
        settings = {**record, "setup": json.loads(json.dumps(dataclasses.asdict(setup)))}
        scores = runner.run(engine, make, cases, answers, settings)
        # The same last tokens for all lengths.
        windows = held_out[:, -length:].astype(np.int32)
        losses = perplexity.position_losses(engine, windows, max(1, 32_768 // length))
    except InputError as error:
        return {**record, "refused": str(error)}
    (summary,) = perplexity.summarise([losses], setup.length // 4)
    found = {"loss": summary["loss"], "last_loss": summary["last"]["loss"], "buckets": summary["buckets"]}
    return {**record, **scores["tasks"], "cells": scores["cells"], **found}


def _dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16, but float32 on a CPU, where it is faster."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def run(
    setup: Setup,
    seeds: Sequence[int],
    schemes: Sequence[str],
    attention: str,
    folder: Path,
    text_folders: list[str] | None,
) -> None:
    """Trains all seeds, and reads them by all schemes at all ratios; leaves out what is done.

    Args:
      setup: sizes. A folder has one.
      seeds: of weights, data and tests.
      schemes: of `SCHEMES`.
      attention: "dense".
      folder: of the experiment.
      text_folders: see `read_text`.

    Raises:
      InputError: another setup in the folder, or too little text.
    """
    runner.open_folder(folder, json.loads(json.dumps(dataclasses.asdict(setup))))
    text, held_out = read_text(setup, text_folders)
    path = folder / RESULTS
    keys = ("seed", "scheme", "attention", "ratio")
    for seed in seeds:
        train(setup, text, seed, folder)
        for scheme, ratio in itertools.product(schemes, setup.ratios):
            done = read_records(path, "seed") if path.exists() else []
            wanted = seed, scheme, attention, ratio
            if any(tuple(r[key] for key in keys) == wanted and "refused" not in r for r in done):
                continue
            record = read(setup, seed, scheme, ratio, attention, held_out, folder)
            append_record(path, record)
            shown = {name: value for name, value in record.items() if name not in ("cells", "buckets")}
            print(to_json(shown), flush=True)
    print(table(read_records(path, "seed")))


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds, and their standard deviations, as Markdown.

    Args:
      records: of `read`. Of several for one reading the last counts.
    """
    last = {(r["scheme"], r["attention"], r["ratio"], r["seed"]): r for r in records}
    ratios = sorted({r["ratio"] for r in records})
    names = {"passkey": ".2f", "needle": ".2f", "loss": ".3f", "last_loss": ".3f"}
    lines = ["| | " + " | ".join(f"{name}, {ratio}x" for name in names for ratio in ratios) + " |"]
    lines.append("|---" * (1 + len(names) * len(ratios)) + "|")
    for scheme, attention in dict.fromkeys((s, a) for s, a, _, _ in last):
        cells = []
        for name, ratio in itertools.product(names, ratios):
            of = [r for (s, a, n, _), r in last.items() if (s, a, n) == (scheme, attention, ratio)]
            values = [r[name] for r in of if r.get(name) is not None]
            if not values:
                cells.append("refused" if any("refused" in r for r in of) else "-")
                continue
            spread = f" ± {np.std(values, ddof=1):{names[name]}}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):{names[name]}}{spread}")
        lines.append(f"| {scheme}, {attention} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("extend-run"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--attention", choices=["dense"], default="dense")
    parser.add_argument("--text-folders", nargs="+", help="where text is looked for")
    parser.add_argument("--table", action="store_true", help="run nothing; print what there is")
    for field in dataclasses.fields(Setup):
        name, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, tuple):
            parser.add_argument(name, type=type(default[0]), nargs="+", default=default)
        else:
            parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    if args.table:
        print(table(read_records(args.folder / RESULTS, "seed")))
        return
    values: dict[str, Any] = {field.name: getattr(args, field.name) for field in dataclasses.fields(Setup)}
    setup = Setup(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    try:
        run(setup, args.seeds, args.schemes, args.attention, args.folder, args.text_folders)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
