"""Does data teach that a model makes itself? Rejection sampling: only what a check lets pass is learned.

    python -m experiments.post.synthesis --folder synthesis-run --seeds 0 1 2
    python -m experiments.post.synthesis --folder synthesis-run --table     # of what has been run
    python -m experiments.post.synthesis --folder synthesis-toy --toy       # the whole path on a CPU, some minutes

Two kinds of problems: sums and differences, and edits of texts (reversal, last word, format), judged by exact
comparison. `--tasks code` is a third, judged in the sandbox; where that does not hold, it is left out, and a line says
so. For each seed and kind:

1. `start`: a model on bytes, tuned from random weights until its accuracy at temperature 1 is in the range; see
   `experiments.post.grpo.learning`.
2. `synthesis-1`: a pipeline of `train.synthesize`. The model answers fresh problems, `samples` times each. A check
   compares each answer with the right one, which the model does not see. Right and wrong answers that are known audit
   the check.
3. `filtered-1`: supervised fine-tuning of `start` on the answers that passed, the distinct ones of each problem.
4. `unfiltered-1`, the control: the same, on as many answers to the same problems, drawn without looking at the
   verdicts. So both learn from the problems that the model has solved, and only one from what a check lets pass.
5. With `--rounds`: the same from `filtered-1` with further problems, without the control.

Read of each model: accuracy on held-out problems, of answers at temperature 1 with the same seeds for all, and of
greedy ones. Held-out problems are none of those that anything was trained on.

Leaves in the folder for each seed and kind: problems, `start/`, a folder of each pipeline and run; `results.jsonl` has
a line for each reading. What has been done is not done again; a run that a signal stops goes on from there.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from experiments.command import add_setup_arguments, chosen, save_after
from experiments.post import tasks as edits
from experiments.post.grpo import learning
from experiments.post.grpo.tasks import TASKS, Problem, Sizes, Task
from experiments.post.learning import RESULTS
from experiments.post.results import Results
from experiments.post.tasks import corrupted
from qwen_jax.cli.train import _Formats
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.inference import ContinuousEngine, Engine, SamplingParams
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import load_tokenizer
from train.files import write_file
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import AdamW
from train.pretrain import PretrainConfig
from train.rewards import close_rewards, load_reward, score
from train.synthesize.checks import fault
from train.synthesize.context import Context
from train.synthesize.engine_generator import EngineGenerator
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.run import SUMMARY
from train.synthesize.run import run as run_pipeline
from train.tune import tune
from train.tune_config import TuneConfig, TuneStage

EDITS, DEFAULT_TASKS = ("reverse", "last", "format"), ("arithmetic", "edits")
# Fixed before anything was measured: gains in held-out accuracy at temperature 1, as means over seeds.
LEAST_GAIN, MOST_UNFILTERED_GAIN = 0.10, 0.05
# Held-out prompts that are answered together.
_ROWS = 256
_NO_FUNCTION = "```python\ndef f(x):\n    return None\n```"


@dataclasses.dataclass(frozen=True)
class Setup(learning.Setup):
    """Sizes of everything: those of the GRPO experiment for `start`, and these.

    Attributes:
      short: 1 for short texts to edit, otherwise 0.
      prompts: fresh problems of a round.
      samples: answers to each.
      sequences: answers that are written at the same time.
      rounds: of synthesis and tuning.
      tune_batch, tune_epochs, tune_rate: of supervised fine-tuning.
    """

    short: int = 0
    prompts: int = 2048
    samples: int = 8
    sequences: int = 256
    rounds: int = 1
    tune_batch: int = 8
    tune_epochs: float = 3.0
    tune_rate: float = 1e-4

    def size(self, task: Task) -> tuple[int, int]:
        """Problems of a round, and rounds."""
        return self.prompts, self.rounds


TOY = Setup(
    **{**dataclasses.asdict(learning.TOY), "largest": 19, "held_out": 64},
    short=1, prompts=128, sequences=32, tune_batch=4, tune_rate=1e-3,
)  # fmt: skip


def tasks_of(setup: Setup) -> dict[str, Task]:
    """The kinds of problems, by name."""
    exact = TASKS["arithmetic"]
    return {**TASKS, "edits": Task(functools.partial(_edit, bool(setup.short)), exact.true, exact.random)}


def _edit(short: bool, rng: np.random.Generator, sizes: Sizes) -> Problem:
    """A text to reverse, to take the last word of, or to format."""
    item = edits.TASKS[EDITS[rng.integers(len(EDITS))]](rng, short)
    return Problem(item.prompt, item.answer, {"answer": item.answer})


# Data


class Judge:
    """Says of answers to a problem whether they are right. `close()` ends what it started, such as a sandbox."""

    def __init__(self, task: Task):
        self._rewards = {"true": load_reward(task.true.spec)}

    def __call__(
        self, prompts: Sequence[Any], texts: Sequence[str], columns: Sequence[Mapping[str, Any]], ended: Sequence[bool]
    ) -> list[bool] | None:
        """The verdicts; None if one of them could not be found.

        Args:
          prompts, texts, columns: the messages, the answer, and what rewards read, of each answer.
          ended: whether the answer ended by itself.
        """
        by_name = {key: [row[key] for row in columns] for key in columns[0]}
        found = np.asarray(score(self._rewards, prompts, texts, ended, by_name), float).reshape(len(texts), -1)[:, 0]
        return None if np.isnan(found).any() else [bool(x >= 1.0) for x in found]

    def close(self) -> None:
        """Ends what the reward started."""
        close_rewards(self._rewards.values())


def pipeline(setup: Setup, name: str, seed: int, problems: Path, number: int, judge: Judge) -> Pipeline:
    """Rejection sampling of the problems that are solved, and its control.

    Its outputs: `sft`, the distinct answers that passed, and `unfiltered`, as many answers to each of these problems,
    drawn without looking at the verdicts.

    Args:
      setup: sizes.
      name: of the task.
      seed: of the sampling.
      problems: prompts with the columns of the reward, as JSON lines; each round has its own.
      number: of the round, from 1.
      judge: of answers.
    """

    def source() -> Iterator[Item]:
        with problems.open() as file:
            for place, line in enumerate(file):
                if (number - 1) * setup.prompts <= place < number * setup.prompts:
                    columns = json.loads(line)
                    prompt = columns.pop("prompt")
                    yield make_item({"prompt": prompt, "columns": columns}, [f"{problems.name}:{place}"])

    async def sample(item: Item, context: Context) -> Result:
        answers = await context.ask(
            item["prompt"], samples=setup.samples, temperature=1.0, max_tokens=setup.max_new_tokens
        )
        texts = [answer.text for answer in answers if fault(answer) is None]
        return item.update(texts=texts) if texts else Rejected("no answer has the right form")

    async def verify(item: Item, context: Context) -> Result:
        # Answers that are known to be right or wrong are judged with the others.
        right = item["columns"].get("answer")
        drawn = np.random.default_rng(item.rng("audit").getrandbits(32))
        known = [(_NO_FUNCTION, False)] if right is None else [(right, True), (corrupted(drawn, right), False)]
        texts = [*item["texts"], *(text for text, _ in known)]
        count, columns = len(texts), item["columns"]
        verdicts = await context.check(
            f"{name} is right",
            [columns, texts],
            lambda: judge([item["prompt"]] * count, texts, [columns] * count, [True] * count),
        )
        if verdicts is None:
            return Rejected("not judged")
        for (_, expected), verdict in zip(known, verdicts[len(item["texts"]) :], strict=True):
            context.audit(f"{name} is right", expected, verdict)
        passed = [text for text, ok in zip(item["texts"], verdicts, strict=False) if ok]
        if not passed:
            return Rejected("no answer is right")
        distinct = list(dict.fromkeys(passed))
        return item.update(passed=distinct, drawn=item.rng("control").sample(item["texts"], len(distinct)))

    def talk(item: Item, text: str) -> dict[str, Any]:
        return {"messages": item["prompt"] + edits.said(text)}

    return Pipeline(
        f"{name}-{number}",
        source,
        [Stage("sample", sample), Stage("verify", verify)],
        [
            Output("sft", lambda item: [talk(item, text) for text in item["passed"]]),
            Output("unfiltered", lambda item: [talk(item, text) for text in item["drawn"]]),
        ],
        seed=seed,
        settings={"prompts": setup.prompts, "samples": setup.samples, "max_new_tokens": setup.max_new_tokens},
    )


def synthesize(setup: Setup, name: str, seed: int, place: Path, number: int, model: Path) -> None:
    """Makes the data of a round with a model, and those of the control.

    Args:
      setup: sizes.
      name: of the task.
      seed: of the sampling.
      place: folder of the seed and task.
      number: of the round, from 1.
      model: folder of the model that answers.

    Raises:
      InputError: no answer passed, or the check cannot be trusted.
    """
    folder = place / f"synthesis-{number}"
    # Both outputs are there whole once the summary says so.
    if (path := folder / SUMMARY).exists() and any(output["rows"] for output in read_json(path)["outputs"]):
        return
    mesh, tokenizer = make_mesh({}, jax.devices()[:1]), load_tokenizer(model)
    config, params = convert.load(model, mesh, setup.dtype)
    pages = setup.sequences * -(-setup.length // 32)
    engine = ContinuousEngine(
        config,
        params,
        mesh,
        tokenizer=tokenizer,
        dtype=setup.dtype,
        eos_token_ids=_ends(tokenizer),
        max_seqs=setup.sequences,
        max_length=setup.length,
        num_pages=pages,
    )
    judge = Judge(tasks_of(setup)[name])
    try:
        # The run closes the generator, and that the engine.
        generator = EngineGenerator(engine, f"{name}-{seed}-{number}", setup.sequences)
        made = pipeline(setup, name, seed, place / "prompts.jsonl", number, judge)
        summary = run_pipeline(made, {"generator": generator}, folder)
    finally:
        judge.close()
    if summary["stopped_by"]:
        raise SystemExit(f"{folder} was stopped; the same command goes on.")
    rows = {output["name"]: output["rows"] for output in summary["outputs"]}
    if not rows["sft"]:
        raise InputError(f"No answer in {folder} is right. Raise --prompts, --samples or --start-accuracy.")
    solved = summary["stages"][-1]["out"]
    print(f"{name}, seed {seed}: {rows['sft']} right answers, {solved} of {setup.prompts} problems solved", flush=True)


# Runs


def tune_config(setup: Setup, seed: int, data: Path, model: Path, output: Path) -> TuneConfig:
    """Supervised fine-tuning on a file of conversations."""
    stage = TuneStage(setup.length, setup.tune_batch, setup.tune_epochs, (), setup.tune_rate)
    return TuneConfig(
        output=str(output),
        model=str(model),
        data={"synthesised": str(data)},
        objective=PretrainConfig(loss_chunk=16_384),
        stages=(stage,),
        seed=seed,
        optimizer=AdamW(weight_decay=0.0),
        step=setup.step(),
        loop=LoopConfig(evaluate_every=1_000_000),
        checkpoints=CheckpointConfig(every=0),
        samples=0,
    )


def run(setup: Setup, seeds: Sequence[int], names: Sequence[str], folder: Path) -> None:
    """Everything that is not done yet.

    Args:
      setup: sizes; those of an earlier call in the same folder.
      seeds: of weights, problems, sampling and order.
      names: of tasks.
      folder: takes everything.

    Raises:
      InputError: the folder has runs of other sizes, a start was not reached, or nothing passed the check.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "setup.json", dataclasses.asdict(setup)
    if path.exists() and read_json(path) != settings:
        raise InputError(f"{folder} has runs of other settings ({path}). Give the same ones, or another folder.")
    write_file(path, (to_json(settings, indent=2) + "\n").encode())
    formats, results, tasks = _Formats(), Results(folder / RESULTS), tasks_of(setup)
    for name in names:
        if tasks[name].sandbox and (reason := learning.no_sandbox()):
            print(f"{name}: skipped, the sandbox does not hold here: {reason}", flush=True)
            continue
        for seed in seeds:
            begin, place = time.perf_counter(), folder / str(seed) / name
            learning.write_problems(setup, name, seed, place, tasks)
            learning.teach(setup, name, seed, place, tasks)
            model = place / "start" / "model"
            _read(setup, name, seed, place, model, results)
            for number in range(1, setup.rounds + 1):
                data = place / f"synthesis-{number}"
                synthesize(setup, name, seed, place, number, model)
                runs = {"filtered": "sft", **({"unfiltered": "unfiltered"} if number == 1 else {})}
                for kind, file in runs.items():
                    output = place / f"{kind}-{number}"
                    # The model is written after the last step.
                    if not (output / "model" / "config.json").exists() and tune(
                        tune_config(setup, seed, data / f"{file}.jsonl", model, output), formats
                    ):
                        raise SystemExit(f"{output} was stopped; the same command goes on.")
                    _read(setup, name, seed, place, output / "model", results)
                model = place / f"filtered-{number}" / "model"
            print(f"{name}, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)


# Readings


def _ends(tokenizer: Any) -> list[int]:
    return [tokenizer.control_ids["<|im_end|>"], tokenizer.control_ids["<|endoftext|>"]]


def _read(setup: Setup, name: str, seed: int, place: Path, model: Path, results: Results) -> None:
    """Takes the readings of a model that were not taken yet."""
    which = f"{name}/{model.parent.name}"
    if not results.has(seed, which):
        readings = read_accuracy(setup, tasks_of(setup)[name], seed, place / "held-out.jsonl", model)
        print(f"{which}, seed {seed}: {readings}", flush=True)
        results.add(seed, which, readings)


def read_accuracy(setup: Setup, task: Task, seed: int, held_out: Path, folder: Path) -> dict[str, float]:
    """Accuracy on held-out problems: `sampled`, at temperature 1, and `greedy`.

    Args:
      setup: sizes.
      task: whose reward judges.
      seed: of the sampling.
      held_out: the problems, as JSON lines.
      folder: of the model.

    Raises:
      InputError: an answer could not be judged.
    """
    mesh, tokenizer = make_mesh({}, jax.devices()[:1]), load_tokenizer(folder)
    config, params = convert.load(folder, mesh, setup.dtype)
    engine = Engine(config, params, mesh, tokenizer=tokenizer, dtype=setup.dtype, eos_token_ids=_ends(tokenizer))
    problems = [json.loads(line) for line in held_out.read_text().splitlines()]
    prompts = [problem.pop("prompt") for problem in problems]
    ids = [tokenizer.encode_chat(prompt) for prompt in prompts]
    judge, readings = Judge(task), {}
    try:
        for metric, sampling in (
            ("sampled", SamplingParams(temperature=1.0, seed=seed)),
            ("greedy", SamplingParams()),
        ):
            done = []
            for first in range(0, len(ids), _ROWS):
                done += engine.generate(ids[first : first + _ROWS], sampling, max_new_tokens=setup.max_new_tokens)
            texts, ended = [one.text or "" for one in done], [one.finish_reason == "stop" for one in done]
            verdicts = judge(prompts, texts, problems, ended)
            if verdicts is None:
                raise InputError(f"Some answers of {folder} could not be judged. Run the same command again.")
            readings[metric] = float(np.mean(verdicts))
    finally:
        judge.close()
    return readings


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the accuracies and gains, and the expectations that are met or not."""
    values = {(r["model"], r["seed"], r["metric"]): float(r["value"]) for r in records}
    lines = ["| kind | model | seeds | sampled | gain | greedy | gain |", "|---|---|---|---|---|---|---|"]
    verdicts = []
    for model in dict.fromkeys(model for model, _, _ in values):
        name, which = model.split("/")
        start, cells = f"{name}/start", []
        seeds = [s for m, s, metric in values if (m, metric) == (model, "complete") and (start, s, "greedy") in values]
        if not seeds:
            continue
        gains = {}
        for metric in ("sampled", "greedy"):
            mine, before = (np.asarray([values[m, s, metric] for s in seeds]) for m in (model, start))
            gains[metric] = float((mine - before).mean())
            cells += [_mean(mine), "" if which == "start" else _mean(mine - before)]
        lines.append(f"| {name} | {which} | {len(seeds)} | " + " | ".join(cells) + " |")
        gain = gains["sampled"]
        if which == "start":
            low, high = learning.START_RANGE
            inside = all(low <= values[model, s, "sampled"] <= high for s in seeds)
            verdicts.append(f"- {name}: start between {low:.2f} and {high:.2f} for every seed: {_met(inside)}")
        elif which == "filtered-1":
            text = f"expected at least {LEAST_GAIN:.2f}: {_met(gain >= LEAST_GAIN)}"
            verdicts.append(f"- {name}, filtered: gain {gain:+.3f}, {text}")
        elif which == "unfiltered-1":
            text = f"expected at most {MOST_UNFILTERED_GAIN:.2f}: {_met(gain <= MOST_UNFILTERED_GAIN)}"
            verdicts.append(f"- {name}, unfiltered: gain {gain:+.3f}, {text}")
    return "\n".join([*lines, "", *verdicts])


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _met(met: bool) -> str:
    return "met" if met else "NOT MET"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 1 2, of the toy 0")
    # So small a model does not learn to edit texts in the steps of the toy.
    kinds = "by default arithmetic and edits, of the toy arithmetic"
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, "edits"), help=kinds)
    add_setup_arguments(parser, "synthesis-run", Setup)
    args = parser.parse_args()
    if not args.table:
        setup = chosen(args, TOY if args.toy else Setup())
        if args.limit:
            save_after(args.limit)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            # All runs have the same programs.
            jax.config.update("jax_compilation_cache_dir", str((args.folder / "compiled").absolute()))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        seeds, tasks = ([0], ["arithmetic"]) if args.toy else ([0, 1, 2], list(DEFAULT_TASKS))
        run(setup, args.seeds or seeds, args.tasks or tasks, args.folder)
    print(table(Results(args.folder / RESULTS).records))


if __name__ == "__main__":
    main()
