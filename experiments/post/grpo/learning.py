"""Does GRPO teach, and only from the truth? A small model, tuned until it is right at times, and three ways to go on.

    python -m experiments.post.grpo.learning --folder grpo-run --seeds 0 1 2
    python -m experiments.post.grpo.learning --folder grpo-run --table      # of what has been run; draws the curves
    python -m experiments.post.grpo.learning --folder grpo-toy --toy        # the whole path on a CPU, some minutes

Two tasks: sums and differences, judged by comparison, and small Python functions, judged by tests in the sandbox. Where
the sandbox does not hold, the second is left out, and a line says so. For each seed and task:

1. `start`: a model on bytes learns from right answers to fresh problems, from random weights and at a constant learning
   rate, until a reading is at least `start_accuracy`. Readings are taken every `read_every` steps: the mean reward of
   responses sampled at temperature 1 to problems that nothing else uses. So the accuracy is steered by when to stop. A
   reading beyond 0.6 is an error: then readings must be more frequent.
2. `true`: GRPO from `start` on fresh prompts with the true reward.
3. `random`: the same, with the true rewards of each group in a random order.
4. `frozen`: the true reward at learning rate 1e-30, which changes no float32 weight. A learning rate of 0 is no
   schedule.

Read before, during and after GRPO: mean true reward of one response to each held-out prompt, at temperature 1, with the
same seeds of sampling each time. Held-out prompts are none of those that anything was trained on.

Leaves in the folder for each seed and task: prompts, `start/` and a folder of each run; and `learning.png`. What has
been done is not done again; a run that a signal stops goes on from there.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convert.huggingface import export
from experiments.command import add_setup_arguments, chosen, save_after
from experiments.post.grpo.tasks import TASKS, Problem, Task
from experiments.post.learning import IDS, write_lines
from experiments.post.learning import Setup as PostSetup
from experiments.post.tasks import prompt_of, said
from qwen_jax.cli.train import _Formats
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.inference import ContinuousEngine
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import Tokenizer, render_example, train_bpe
from train.data.batch import Batch, place
from train.data.examples import Example
from train.data.packing import pack_segments
from train.data.prompts import read_prompts
from train.files import write_file
from train.grpo_config import EngineConfig, GrpoRunConfig
from train.grpo_run import train_grpo
from train.handover import InferenceLayout, make_handover
from train.loop import CheckpointConfig, LoopConfig
from train.observe.metrics import read_log
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.policy import GrpoConfig
from train.pretrain import NextToken, PretrainConfig
from train.rewards import close_rewards, load_reward, score
from train.sampler import Sampler, SamplingConfig
from train.sandbox import Sandbox
from train.state import init_state
from train.step import StepConfig, make_train_step

VARIANTS = ("true", "random", "frozen")
# Fixed before anything was measured: gains in held-out accuracy, as means over seeds.
LEAST_GAIN, MOST_RANDOM_GAIN, MOST_FROZEN_CHANGE = 0.20, 0.05, 0.001
START_RANGE = (0.10, 0.60)
_FROZEN_RATE = 1e-30
_COLORS = {"true": "#3b6fb6", "random": "#d1662b", "frozen": "#777777"}
_LABELS = {"true": "true reward", "random": "random reward", "frozen": "learning rate 0"}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of everything.

    Attributes:
      layers, hidden: of the model; heads have 64 dimensions.
      dtype: compute dtype of training and sampling.
      length: tokens of a row, in all runs.
      largest: number in an arithmetic problem.
      operations, constants: operations of a function, and the largest constant in one.
      examples: problems that `start` learns from; they are used again after that many.
      start_rows, start_rate, start_steps: rows of a step of `start`, its learning rate, and its most steps.
      start_accuracy: the reading at which it ends.
      read_every: steps between two readings.
      code_read_every: instead, where rewards run code, once a reading is at least a fifth of `start_accuracy`: the
        accuracy of writing code then rises steeply.
      readings, held_out: problems of a reading, and held-out ones.
      queries, group_size: prompts of an episode and responses to each.
      code_queries, code_episodes, code_rate: instead, where rewards run code.
      episodes: of GRPO, each one step.
      rate, warmup: learning rate of GRPO, and the share of its steps in which it rises.
      max_new_tokens: of a response.
      evaluate_every: episodes between two readings of held-out problems.
    """

    layers: int = 6
    hidden: int = 384
    dtype: Any = "bfloat16"
    length: int = 512
    largest: int = 999
    operations: int = 3
    constants: int = 9
    examples: int = 60_000
    start_rows: int = 64
    start_rate: float = 5e-4
    start_steps: int = 4000
    start_accuracy: float = 0.25
    read_every: int = 25
    code_read_every: int = 5
    readings: int = 128
    held_out: int = 512
    queries: int = 64
    group_size: int = 8
    code_queries: int = 32
    episodes: int = 200
    code_episodes: int = 80
    rate: float = 1e-5
    code_rate: float = 2e-5
    warmup: float = 0.1
    max_new_tokens: int = 112
    evaluate_every: int = 20

    def step(self) -> StepConfig:
        """How all steps are computed."""
        return StepConfig(dtype=self.dtype, remat="none")

    def size(self, task: Task) -> tuple[int, int]:
        """Prompts of an episode, and episodes."""
        return (self.code_queries, self.code_episodes) if task.sandbox else (self.queries, self.episodes)


TOY = Setup(
    layers=2, hidden=64, dtype="float32", length=160, largest=9, operations=1, constants=30, examples=400,
    start_rows=16, start_rate=3e-3, start_steps=1500, start_accuracy=0.1, read_every=30, readings=32, held_out=16,
    queries=4, code_queries=4, episodes=4, code_episodes=3, rate=1e-3, code_rate=1e-3,
    max_new_tokens=64, evaluate_every=4,
)  # fmt: skip


# Problems


def draw(
    task: Task, setup: Setup, rng: np.random.Generator, count: int, without: set[str], distinct: bool = True
) -> list[Problem]:
    """Problems whose prompts are not among others.

    Args:
      task: that makes them.
      setup: sizes.
      rng: of the draws.
      count: how many.
      without: prompts that must not come; with `distinct`, those that are drawn are added.
      distinct: whether no prompt may come twice.

    Raises:
      InputError: there are too few problems of these sizes.
    """
    found: list[Problem] = []
    for _ in range(100 * count + 1000):
        if len(found) == count:
            break
        problem = task.make(rng, setup)
        if problem.prompt not in without:
            found.append(problem)
            if distinct:
                without.add(problem.prompt)
    if len(found) < count:
        raise InputError(
            f"Found {len(found)} of {count} different problems of these sizes. Raise largest, operations or constants."
        )
    return found


def write_problems(
    setup: Setup, name: str, seed: int, folder: Path, tasks: Mapping[str, Task] = MappingProxyType(TASKS)
) -> None:
    """Prompts to go on with, readings and tests, and conversations to begin with; none is in two of these.

    Args:
      setup: sizes.
      name: of the task.
      seed: of the draws.
      folder: takes a file of each.
      tasks: by name; the place of the task among them is a part of the seed.
    """
    if (folder / "done").exists():
        return
    task, rng, used = tasks[name], np.random.default_rng([seed, list(tasks).index(name)]), set[str]()
    queries, episodes = setup.size(task)
    for file, count in (("held-out", setup.held_out), ("readings", setup.readings), ("prompts", queries * episodes)):
        problems = draw(task, setup, rng, count, used)
        write_lines(folder / f"{file}.jsonl", [{"prompt": prompt_of(x), **x.columns} for x in problems])
    lessons = draw(task, setup, rng, setup.examples, used, distinct=False)
    write_lines(folder / "lessons.jsonl", [{"messages": prompt_of(x) + said(x.answer)} for x in lessons])
    write_file(folder / "done", b"")


# The model to begin with


def lessons(path: Path, tokenizer: Tokenizer, setup: Setup, seed: int) -> Iterator[Batch]:
    """Batches of whole conversations, in a new random order each time they are used up."""
    rng, examples = np.random.default_rng(seed), []
    for line in path.read_text().splitlines():
        found = render_example(tokenizer, json.loads(line)["messages"])
        examples.append(Example(np.asarray(found.ids, np.int32), np.asarray(found.trained, bool)))
    endless = (examples[i] for _ in itertools.count() for i in rng.permutation(len(examples)))
    rest = next(endless)
    while True:
        rows: list[list[Example]] = []
        for _ in range(setup.start_rows):
            row, room = [], setup.length
            while len(rest.ids) <= room:
                row.append(rest)
                room, rest = room - len(rest.ids), next(endless)
            rows.append(row)
        yield pack_segments(rows, setup.length)


def teach(
    setup: Setup, name: str, seed: int, folder: Path, tasks: Mapping[str, Task] = MappingProxyType(TASKS)
) -> None:
    """Tunes a model from random weights until its accuracy is in the range; writes it with what was read.

    Args:
      setup: sizes.
      name: of the task.
      seed: of weights, order and sampling.
      folder: has the files of `write_problems`, and takes `start/`.
      tasks: by name.

    Raises:
      InputError: the accuracy was not reached, or passed the range between two readings.
    """
    start = folder / "start"
    if (start / "start.json").exists():
        return
    model = PostSetup(layers=setup.layers, hidden=setup.hidden, length=setup.length).model()
    tokenizer = train_bpe(["of bytes alone"], IDS)
    mesh, begin = make_mesh({}, jax.devices()[:1]), time.perf_counter()
    schedule = Schedule(setup.start_steps, setup.start_rate, min(50, setup.start_steps // 4), "wsd", 0, 1.0)
    optimizer, config = OptimizerConfig(schedule, AdamW(weight_decay=0.1)), setup.step()
    read = read_prompts([str(folder / "readings.jsonl")], tokenizer, setup.length)
    batches = lessons(folder / "lessons.jsonl", tokenizer, setup, seed)
    rewards = {"true": load_reward(tasks[name].true.spec)}
    ends = [tokenizer.control_ids["<|im_end|>"], tokenizer.control_ids["<|endoftext|>"]]
    readings: list[tuple[int, float]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: close_rewards(rewards.values()))
        stack.enter_context(jax.set_mesh(mesh))
        state = init_state(model, optimizer, seed, mesh)
        step = make_train_step(NextToken(model, PretrainConfig(loss_chunk=16_384)), optimizer, config, mesh)
        # The engine reads with the weights of the moment.
        weights = InferenceLayout(model, config, mesh, [mesh], setup.dtype)(state.params)[0]
        pages = setup.readings * -(-setup.length // 32)
        of_engine: dict[str, Any] = {"max_seqs": setup.readings, "max_length": setup.length, "num_pages": pages}
        engine = ContinuousEngine(
            model, weights, mesh, tokenizer=tokenizer, dtype=setup.dtype, eos_token_ids=ends, **of_engine
        )
        stack.callback(engine.close)
        hand_over = make_handover(model, config, mesh, engine)
        sampler = Sampler(engine, SamplingConfig(1, setup.max_new_tokens, seed=seed))
        every = setup.read_every
        for done in range(1, setup.start_steps + 1):
            state, _ = step(state, place(next(batches), mesh))
            if done % every:
                continue
            hand_over(state.params)
            texts = [group[0] for group in sampler.sample(read.prompts, version=0)]
            scores = score(
                rewards,
                [prompt.text_or_messages for prompt in read.prompts],
                [sample.text or "" for sample in texts],
                [sample.finished for sample in texts],
                {key: [prompt.columns[key] for prompt in read.prompts] for key in read.prompts[0].columns},
            )
            readings.append((done, float(np.nanmean(scores))))
            print(f"{name}, seed {seed}: after {done} steps {readings[-1][1]:.3f}", flush=True)
            if readings[-1][1] >= setup.start_accuracy:
                break
            if tasks[name].sandbox and readings[-1][1] >= setup.start_accuracy / 5:
                every = min(every, setup.code_read_every)
        reached = readings[-1][1] if readings else 0.0
        if not setup.start_accuracy <= reached <= START_RANGE[1]:
            raise InputError(
                f"{name}, seed {seed}: the accuracy is {reached:.2f} after {done} steps; expected "
                f"{setup.start_accuracy} to {START_RANGE[1]}. "
                + ("Read more often (--read-every)." if reached > START_RANGE[1] else "Raise --start-steps.")
            )
        export(state.params, model, start / "model")
    tokenizer.save(start / "model")
    about = {"steps": done, "accuracy": reached, "readings": readings, "seconds": time.perf_counter() - begin}
    write_file(start / "start.json", (to_json(about, indent=2) + "\n").encode())


# GRPO


def grpo_config(setup: Setup, name: str, seed: int, folder: Path, variant: str) -> GrpoRunConfig:
    """The run of a variant: the report's group size, no KL term, one step for each episode."""
    task = TASKS[name]
    queries, episodes = setup.size(task)
    return GrpoRunConfig(
        output=str(folder / variant),
        model=str(folder / "start" / "model"),
        prompts={"prompts": str(folder / "prompts.jsonl")},
        rewards=(task.random if variant == "random" else task.true,),
        objective=GrpoConfig(kl_weight=0.0, loss_chunk=16_384),
        sampling=SamplingConfig(setup.group_size, setup.max_new_tokens, seed=seed),
        engine=EngineConfig(max_seqs=queries * setup.group_size, compile_first=False),
        held_out={"test": str(folder / "held-out.jsonl")},
        queries=queries,
        episodes=episodes,
        prompt_length=setup.length - setup.max_new_tokens,
        row_length=setup.length,
        learning_rate=_FROZEN_RATE if variant == "frozen" else setup.code_rate if task.sandbox else setup.rate,
        warmup_fraction=setup.warmup,
        seed=seed,
        step=setup.step(),
        loop=LoopConfig(evaluate_every=setup.evaluate_every),
        checkpoints=CheckpointConfig(every=0),
        keep_rollouts=2,
    )


def run(setup: Setup, seeds: Sequence[int], tasks: Sequence[str], variants: Sequence[str], folder: Path) -> None:
    """Everything that is not done yet.

    Args:
      setup: sizes; those of an earlier call in the same folder.
      seeds: of weights, problems, sampling and order.
      tasks: of `TASKS`.
      variants: of `VARIANTS`.
      folder: takes everything.

    Raises:
      InputError: the folder has runs of other sizes, or `teach` did not reach its range.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "setup.json", dataclasses.asdict(setup)
    if path.exists() and read_json(path) != settings:
        raise InputError(f"{folder} has runs of other settings ({path}). Give the same ones, or another folder.")
    write_file(path, (to_json(settings, indent=2) + "\n").encode())
    formats = _Formats()
    for name in tasks:
        if TASKS[name].sandbox and (reason := no_sandbox()):
            print(f"{name}: skipped, the sandbox does not hold here: {reason}", flush=True)
            continue
        for seed in seeds:
            place_ = folder / str(seed) / name
            write_problems(setup, name, seed, place_)
            teach(setup, name, seed, place_)
            for variant in variants:
                # The model is written after the last step.
                if not (place_ / variant / "model" / "config.json").exists():
                    begin = time.perf_counter()
                    if train_grpo(grpo_config(setup, name, seed, place_, variant), formats):
                        raise SystemExit(f"{name}, seed {seed}, {variant} was stopped; the same command goes on.")
                    print(f"{name}, seed {seed}, {variant}: {time.perf_counter() - begin:.0f} s", flush=True)


def no_sandbox() -> str | None:
    """Why code cannot be run here; None if it can."""
    try:
        with Sandbox(workers=1):
            return None
    except InputError as error:
        return str(error)


# Results


Curves = Mapping[tuple[str, str, int], Sequence[tuple[int, float]]]
"""Held-out accuracy after some steps, by task, variant and seed."""


def read_curves(folder: Path) -> dict[tuple[str, str, int], list[tuple[int, float]]]:
    """The curves of all runs in a folder, also of unfinished ones."""
    found = {}
    for name, variant in itertools.product(TASKS, VARIANTS):
        for log in sorted(folder.glob(f"*/{name}/{variant}/metrics.jsonl")):
            readings = {int(r["step"]): r["held_out_reward"] for r in read_log(log) if "held_out_reward" in r}
            if len(readings) > 1:
                found[name, variant, int(log.parts[-4])] = sorted(readings.items())
    return found


def table(curves: Curves) -> str:
    """A Markdown table of the accuracy before and after, and the expectations that are met or not."""
    lines = ["| task | reward | seeds | before | after | gain |", "|---|---|---|---|---|---|"]
    verdicts = []
    for name, variant in itertools.product(TASKS, VARIANTS):
        mine = [curve for (task, which, _), curve in curves.items() if (task, which) == (name, variant)]
        if not mine:
            continue
        before, after = (np.asarray([curve[end][1] for curve in mine]) for end in (0, -1))
        cells = [_mean(before), _mean(after), _mean(after - before)]
        lines.append(f"| {name} | {_LABELS[variant]} | {len(mine)} | " + " | ".join(cells) + " |")
        gain = float((after - before).mean())
        low, high = START_RANGE
        wanted = {
            "true": (f"at least {LEAST_GAIN:.2f}", gain >= LEAST_GAIN),
            "random": (f"at most {MOST_RANDOM_GAIN:.2f}", gain <= MOST_RANDOM_GAIN),
            "frozen": (f"0 within {MOST_FROZEN_CHANGE}", bool(np.abs(after - before).max() <= MOST_FROZEN_CHANGE)),
        }[variant]
        verdicts.append(f"- {name}, {_LABELS[variant]}: gain {gain:+.3f}, expected {wanted[0]}: {_met(wanted[1])}")
        if variant == "true":
            inside = bool(((before >= low) & (before <= high)).all())
            verdicts.append(f"- {name}: start between {low:.2f} and {high:.2f} for every seed: {_met(inside)}")
    return "\n".join([*lines, "", *verdicts])


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _met(met: bool) -> str:
    return "met" if met else "NOT MET"


def draw_curves(curves: Curves, path: Path) -> None:
    """A picture: a panel for each task, a line for each seed and variant."""
    tasks = [name for name in TASKS if any(task == name for task, _, _ in curves)]
    figure = Figure(figsize=(5.5 * max(len(tasks), 1), 4.2), dpi=150, layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, max(len(tasks), 1))), tasks, strict=False):
        seen = set[str]()
        for (task, variant, _), curve in sorted(curves.items()):
            if task == name:
                label = _LABELS[variant] if variant not in seen else None
                seen.add(variant)
                axes.plot(*zip(*curve, strict=True), color=_COLORS[variant], alpha=0.8, marker="o", ms=3, label=label)
        axes.set_title(f"{name}: held-out accuracy, a line for each seed", loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 1 2, of the toy 0")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add_setup_arguments(parser, "grpo-run", Setup)
    args = parser.parse_args()
    if not args.table:
        setup = chosen(args, TOY if args.toy else Setup())
        if args.limit:
            save_after(args.limit)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            # All runs have the same programs.
            jax.config.update("jax_compilation_cache_dir", str((args.folder / "compiled").absolute()))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        run(setup, args.seeds or ([0] if args.toy else [0, 1, 2]), args.tasks, args.variants, args.folder)
    curves = read_curves(args.folder)
    if curves:
        draw_curves(curves, args.folder / "learning.png")
    print(table(curves))


if __name__ == "__main__":
    main()
