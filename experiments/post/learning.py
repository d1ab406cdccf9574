"""Does post-training teach? A small model from text to SFT, DPO and a reward model, on tasks with checkable answers.

    python -m experiments.post.learning --folder post-run --seeds 0 1 2
    python -m experiments.post.learning --folder post-run --table       # of what has been read
    python -m experiments.post.learning --folder post-toy --toy --seeds 0   # the whole path on a CPU, about a minute

For each seed:

1. `pretrained`: a model of 23M parameters on bytes is pre-trained on Python sources and documentation. Short copies are
   half of the first fifth of the steps, and an eighth of the others.
2. `sft`: supervised fine-tuning on conversations: six tasks with one right answer, and a question that the data answers
   tersely or padded with courtesies, as often the one as the other. Shorter instances of the tasks come first.
3. `dpo-VARIANT`: DPO from that model. The pairs prefer terse to padded answers, and right to corrupted ones in two of
   the six tasks. AdamW alone is beside AdamW with online merging.
4. `reward`: a reward model from `sft` on the same pairs.

Read of the language models: held-out accuracy of each task (exact match of greedy answers), and the fraction of sampled
answers to the question that are terse. Of DPO: held-out margin and accuracy of the implicit rewards. Of the reward
model: held-out pairs that `Scorer` ranks correctly. A seed has its own weights, data, orders and tests.

Leaves in the folder: `text/` and, for each seed, `SEED/` with the examples and a folder of each run; `results.jsonl`
has a line for each reading. What has been done is not done again; a run that a signal stops goes on from there.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from experiments.command import add_setup_arguments, chosen, save_after
from experiments.learning.data import find_text
from experiments.post.results import Results, table
from experiments.post.tasks import (
    KINDS,
    PAIRED,
    STYLE,
    TASKS,
    Item,
    corrupted,
    padded,
    prompt_of,
    random_words,
    said,
    style_item,
)
from qwen_jax.cli.train import _Formats
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.scorer import Scorer
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import CONTROL_TOKENS, load_tokenizer, render_example, train_bpe
from train.config import RunConfig, Stage
from train.data.build import BuildConfig, build
from train.data.text import split_documents
from train.dpo import DpoConfig
from train.files import write_file
from train.loop import CheckpointConfig, LoopConfig
from train.merging import Merging
from train.observe.metrics import read_log
from train.optimizer import AdamW, Schedule
from train.pretrain import PretrainConfig
from train.reward import RewardConfig
from train.run import pretrain
from train.step import StepConfig
from train.tune import tune
from train.tune_config import ObjectiveConfig, TuneConfig, TuneStage

# The bytes and the control tokens; the other rows of the embedding are unused.
IDS, VOCAB_SIZE = 256 + len(CONTROL_TOKENS), 384
RESULTS = "results.jsonl"
# Held-out prompts that are answered together.
_ROWS = 256
_MAX_NEW_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of everything.

    Attributes:
      layers, hidden: of the model; heads have 64 dimensions.
      dtype: compute dtype of training and reading.
      length: tokens of a row, in all runs.
      megabytes: of text to read, at most.
      copies: short documents whose second half repeats the first.
      pretrain_steps, pretrain_batch, pretrain_rate: of pre-training.
      short, examples: conversations of each task, of the first and of the second stage of SFT.
      sft_batch, sft_epochs, sft_rate: of SFT; the first stage has one epoch.
      pairs: of each kind.
      pair_batch, pair_epochs: of DPO and of the reward model.
      dpo_rate, reward_rate: learning rates.
      beta: of DPO.
      samples: held-out prompts of each task, and held-out pairs of each kind.
    """

    layers: int = 8
    hidden: int = 512
    dtype: Any = "bfloat16"
    length: int = 512
    megabytes: float = 60.0
    copies: int = 100_000
    pretrain_steps: int = 1000
    pretrain_batch: int = 128
    pretrain_rate: float = 1e-3
    short: int = 5_000
    examples: int = 20_000
    sft_batch: int = 64
    sft_epochs: float = 3.0
    sft_rate: float = 5e-4
    pairs: int = 8_000
    pair_batch: int = 16
    pair_epochs: float = 1.0
    dpo_rate: float = 2e-5
    reward_rate: float = 5e-5
    beta: float = 0.1
    samples: int = 200

    def model(self) -> ModelConfig:
        """The architecture. Tied embeddings would mix tokens that are never targets into the output head."""
        return ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4 // 64 * 64,
            num_layers=self.layers,
            num_heads=self.hidden // 64,
            num_kv_heads=max(1, self.hidden // 256),
            head_dim=64,
            tie_word_embeddings=False,
            rope_theta=1e4,
            max_position_embeddings=self.length,
            bos_token_id=None,
            eos_token_ids=(256,),
            dtype="float32",
        )

    def step(self) -> StepConfig:
        """How all steps are computed."""
        return StepConfig(dtype=self.dtype, remat="none")


TOY = Setup(
    layers=2, hidden=64, dtype="float32", megabytes=1.0, copies=2000, pretrain_steps=40, pretrain_batch=8,
    pretrain_rate=3e-3, short=60, examples=60, sft_batch=8, sft_epochs=1.0, sft_rate=3e-3, pairs=60, pair_batch=4,
    dpo_rate=1e-3, reward_rate=1e-3, samples=8,
)  # fmt: skip


# Examples


def held_out_items(setup: Setup, seed: int) -> dict[str, list[Item]]:
    """Held-out prompts of each task and of the question, all distinct."""
    rng = np.random.default_rng([seed, 0])
    return {name: _distinct(rng, make, setup.samples, set()) for name, make in {**TASKS, STYLE: style_item}.items()}


def _distinct(
    rng: np.random.Generator, make: Callable[[np.random.Generator, bool], Item], count: int, seen: set[str]
) -> list[Item]:
    items: list[Item] = []
    while len(items) < count:
        item = make(rng, False)
        if item.prompt not in seen:
            seen.add(item.prompt)
            items.append(item)
    return items


def write_examples(setup: Setup, seed: int, folder: Path) -> None:
    """Conversations and pairs of a seed as JSON lines; no prompt of the tests is among those to train on."""
    rng = np.random.default_rng([seed, 1])
    held_out = {item.prompt for items in held_out_items(setup, seed).values() for item in items}

    def drawn(name: str, count: int, short: bool = False, without: Iterable[str] = ()) -> list[Item]:
        make = TASKS.get(name, style_item)
        forbidden = held_out | set(without)
        items: list[Item] = []
        while len(items) < count:
            item = make(rng, short)
            if item.prompt not in forbidden:
                items.append(item)
        return items

    def pair(item: Item, kind: str) -> dict[str, Any]:
        rejected = padded(item.answer) if kind == "terse" else corrupted(rng, item.answer)
        return {"prompt": prompt_of(item), "chosen": said(item.answer), "rejected": said(rejected)}

    # Conversations.
    for file, count in (("short", setup.short), ("tasks", setup.examples)):
        talks = [(item, item.answer) for name in TASKS for item in drawn(name, count, file == "short")]
        if file == "tasks":
            both = drawn(STYLE, count)
            talks += [(x, padded(x.answer) if rng.integers(2) else x.answer) for x in both]
        write_lines(folder / f"{file}.jsonl", [{"messages": prompt_of(item) + said(text)} for item, text in talks])
    # Pairs: first the held-out ones, whose prompts no other pair has.
    for kind in KINDS:
        names = (STYLE,) if kind == "terse" else PAIRED
        tests = [item for name in names for item in drawn(name, -(-setup.samples // len(names)))]
        seen = {item.prompt for item in tests}
        training = [item for name in names for item in drawn(name, setup.pairs // len(names), without=seen)]
        write_lines(folder / f"{kind}-held-out.jsonl", [pair(item, kind) for item in tests])
        write_lines(folder / f"{kind}.jsonl", [pair(item, kind) for item in training])


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records as JSON lines, with their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


# Text


def make_text(setup: Setup, folder: Path, texts: list[str] | None) -> None:
    """Tokenizer and packed rows: text, held-out text and short copies; the same for all seeds."""
    if (folder / "done").exists():
        return
    documents = find_text(int(setup.megabytes * 1e6), 0, texts)
    training, held_out = split_documents(documents, 0.02, 0)
    rng = np.random.default_rng(0)
    repeated = (" ".join(random_words(rng, 1, 6)) for _ in range(setup.copies))
    train_bpe(["of bytes alone"], IDS).save(folder / "tokenizer")
    copies = [f"{text}\n{text}" for text in repeated]
    for name, found in (("text", training), ("held-out", held_out), ("copies", copies)):
        source = folder / f"{name}.jsonl"
        if not (folder / name / "manifest.json").exists():
            write_lines(source, [{"text": text} for text in found])
            build(BuildConfig((str(source),), folder / "tokenizer", setup.length, folder / name, unit_megabytes=8))
    write_file(folder / "done", b"")


# Runs


def pretrain_config(setup: Setup, folder: Path, seed: int) -> RunConfig:
    """Pre-training: short copies first."""
    text, output = folder / "text", folder / str(seed) / "pretrained"
    first = max(2, setup.pretrain_steps // 5)
    rising = Schedule(first, setup.pretrain_rate, warmup_steps=max(1, first // 4), schedule="wsd")
    falling = Schedule(max(1, setup.pretrain_steps - first), setup.pretrain_rate)
    return RunConfig(
        output=str(output),
        model=setup.model(),
        tokenizer=str(text / "tokenizer"),
        data={"text": str(text / "text"), "copies": str(text / "copies")},
        held_out={"text": str(text / "held-out")},
        stages=(
            Stage(rising, setup.length, setup.pretrain_batch, {"text": 1, "copies": 1}),
            Stage(falling, setup.length, setup.pretrain_batch, {"text": 7, "copies": 1}),
        ),
        seed=seed,
        objective=PretrainConfig(loss_chunk=16_384),
        step=setup.step(),
        loop=LoopConfig(evaluate_every=setup.pretrain_steps),
        checkpoints=CheckpointConfig(every=0),
        export=str(output / "model"),
    )


# Merging by the published settings: p 0.01, alpha 1e-7. `paper` keeps 1% of each update and does not rescale it;
# `paper-rate` makes up for that by the learning rate. `released-5e-6` has the alpha that was best on the benchmarks of
# the paper's ablation.
VARIANTS: dict[str, tuple[Merging | None, float]] = {
    "adamw": (None, 1.0),
    "released": (Merging.released(), 1.0),
    "released-5e-6": (Merging.released(alpha=5e-6), 1.0),
    "paper": (Merging.paper(), 1.0),
    "paper-rate": (Merging.paper(), 1 / Merging.paper().p),
}


def tune_config(setup: Setup, folder: Path, seed: int, run: str) -> TuneConfig:
    """The tuning run of a name: `sft`, `reward` or `dpo-VARIANT`."""
    place = folder / str(seed)
    examples, model = place / "examples", place / ("pretrained" if run == "sft" else "sft") / "model"

    def stage(rate: float, batch: int, epochs: float, *data: str, final: float = 0.1) -> TuneStage:
        return TuneStage(setup.length, batch, epochs, data, rate, final_fraction=final)

    def config(objective: ObjectiveConfig, stages: tuple[TuneStage, ...], **changes: Any) -> TuneConfig:
        pairs = run != "sft"
        return TuneConfig(
            output=str(place / run),
            model=str(model),
            data={name: str(examples / f"{name}.jsonl") for name in (KINDS if pairs else ("short", "tasks"))},
            held_out={kind: str(examples / f"{kind}-held-out.jsonl") for kind in KINDS} if pairs else {},
            objective=objective,
            stages=stages,
            seed=seed,
            step=setup.step(),
            # Before the first step and after the last.
            loop=LoopConfig(evaluate_every=1_000_000),
            checkpoints=CheckpointConfig(every=0),
            samples=0,
            **changes,
        )

    if run == "sft":
        short = stage(setup.sft_rate, setup.sft_batch, 1.0, "short", final=1.0)
        return config(
            PretrainConfig(loss_chunk=16_384),
            (short, stage(setup.sft_rate, setup.sft_batch, setup.sft_epochs, "tasks")),
        )
    if run == "reward":
        return config(RewardConfig(centering=0.01), (stage(setup.reward_rate, setup.pair_batch, setup.pair_epochs),))
    merging, times = VARIANTS[run.removeprefix("dpo-")]
    return config(
        DpoConfig(beta=setup.beta),
        (stage(setup.dpo_rate * times, setup.pair_batch, setup.pair_epochs),),
        optimizer=AdamW(weight_decay=0.0),
        merging=merging,
        base=None if merging is None else str(place / "pretrained" / "model"),
    )


def _train(setup: Setup, folder: Path, seed: int, run: str, formats: _Formats) -> Path:
    """Trains unless that was done; returns the folder of the model."""
    model = folder / str(seed) / run / "model"
    if not (model / "config.json").exists():
        if run == "pretrained":
            stopped = pretrain(pretrain_config(setup, folder, seed), export=formats.write)
        else:
            stopped = tune(tune_config(setup, folder, seed, run), formats)
        if stopped:
            raise SystemExit(f"{run} of seed {seed} was stopped; the same command goes on with it.")
    return model


# Readings


def read_answers(setup: Setup, folder: Path, seed: int) -> dict[str, float]:
    """Accuracy of each task, and how the question is answered."""
    mesh, tokenizer = make_mesh({}, jax.devices()[:1]), load_tokenizer(folder)
    config, params = convert.load(folder, mesh, setup.dtype)
    ends = [tokenizer.control_ids["<|im_end|>"], tokenizer.control_ids["<|endoftext|>"]]
    engine = Engine(config, params, mesh, tokenizer=tokenizer, dtype=setup.dtype, eos_token_ids=ends)

    def answers(items: Sequence[Item], sampling: SamplingParams) -> list[str]:
        prompts = [tokenizer.encode_chat(prompt_of(item)) for item in items]
        found = []
        for first in range(0, len(prompts), _ROWS):
            part = prompts[first : first + _ROWS]
            found += engine.generate(part, sampling, max_new_tokens=_MAX_NEW_TOKENS)
        # A text that does not end is no right answer.
        return [(done.text or "") if done.finish_reason == "stop" else "" for done in found]

    items = held_out_items(setup, seed)
    style = items.pop(STYLE)
    greedy = iter(answers([item for task in items.values() for item in task], SamplingParams()))
    readings = {name: float(np.mean([next(greedy) == x.answer for x in task])) for name, task in items.items()}
    readings = {f"accuracy/{name}": value for name, value in readings.items()}
    readings["accuracy/mean"] = float(np.mean(list(readings.values())))
    rest = [name for name in TASKS if name not in PAIRED]
    readings["accuracy/unpaired"] = float(np.mean([readings[f"accuracy/{name}"] for name in rest]))
    sampled = list(zip(style, answers(style, SamplingParams(temperature=1.0, seed=seed)), strict=True))
    readings["style/terse"] = float(np.mean([text == item.answer for item, text in sampled]))
    readings["style/padded"] = float(np.mean([text == padded(item.answer) for item, text in sampled]))
    return readings


def read_held_out(log: Path) -> dict[str, float]:
    """The last evaluation of the held-out pairs in a log, without units and times."""
    last = [record for record in read_log(log) if "held_out_loss" in record][-1]
    names = ("rewards/margins", "rewards/accuracies", "loss", "accuracy", "margin")
    wanted = {f"held_out_{kind}_{name}": f"pairs/{kind}/{name}" for kind in KINDS for name in names}
    return {wanted[key]: float(value) for key, value in last.items() if key in wanted}


def read_ranking(setup: Setup, folder: Path, examples: Path) -> dict[str, float]:
    """Fraction of held-out pairs whose chosen answer scores higher, and the mean difference."""
    mesh, tokenizer = make_mesh({}, jax.devices()[:1]), load_tokenizer(folder)
    config, params = convert.load(folder, mesh, setup.dtype)
    scorer = Scorer(config, params, mesh, dtype=setup.dtype)
    readings = {}
    for kind in KINDS:
        pairs = [json.loads(line) for line in (examples / f"{kind}-held-out.jsonl").read_text().splitlines()]
        chosen, rejected = (
            # Whole conversations, as in training.
            scorer.score([render_example(tokenizer, pair["prompt"] + pair[side]).ids for pair in pairs])
            for side in ("chosen", "rejected")
        )
        readings[f"ranking/{kind}"] = float((chosen > rejected).mean())
        readings[f"ranking/{kind}/difference"] = float((chosen - rejected).mean())
    return readings


def run(setup: Setup, seeds: Sequence[int], variants: Sequence[str], folder: Path, texts: list[str] | None) -> None:
    """Everything that is not done yet.

    Args:
      setup: sizes; those of an earlier call in the same folder.
      seeds: of weights, data and tests.
      variants: of `VARIANTS`.
      folder: takes everything.
      texts: where to look for text, by default in the Python installation.

    Raises:
      InputError: the folder has runs of other sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "setup.json", dataclasses.asdict(setup)
    if path.exists() and read_json(path) != settings:
        raise InputError(f"{folder} has runs of other settings ({path}). Give the same ones, or another folder.")
    write_file(path, (to_json(settings, indent=2) + "\n").encode())
    make_text(setup, folder / "text", texts)
    results, formats = Results(folder / RESULTS), _Formats()
    for seed in seeds:
        place = folder / str(seed)
        examples = place / "examples"
        if not (examples / "done").exists():
            write_examples(setup, seed, examples)
            write_file(examples / "done", b"")
        for name in ("pretrained", "sft", *(f"dpo-{variant}" for variant in variants), "reward"):
            if results.has(seed, name):
                continue
            model = _train(setup, folder, seed, name, formats)
            log = place / name / "metrics.jsonl"
            readings = read_held_out(log) if name.startswith(("dpo", "reward")) else {}
            if name == "reward":
                readings |= read_ranking(setup, model, examples)
            elif name == "pretrained":
                held_out = [r["held_out_text_loss"] for r in read_log(log) if "held_out_text_loss" in r]
                readings["held_out_loss"] = held_out[-1]
            if name != "reward":
                readings |= read_answers(setup, model, seed)
            results.add(seed, name, readings, device=jax.devices()[0].device_kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only the text is made")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="optimizers of DPO; by default all, of the toy two"
    )
    parser.add_argument("--text", nargs="+", help="folders to take the text from instead")
    add_setup_arguments(parser, "post-run", Setup)
    args = parser.parse_args()
    if not args.table:
        if args.limit:
            save_after(args.limit)
        if args.toy:
            # Compilation takes most of the time.
            jax.config.update("jax_disable_most_optimizations", True)
        variants = args.variants or (["adamw", "released"] if args.toy else list(VARIANTS))
        run(chosen(args, TOY if args.toy else Setup()), args.seeds, variants, args.folder, args.text)
    print(table(Results(args.folder / RESULTS).records))


if __name__ == "__main__":
    main()
