"""Does it work where it was not trained? A small model, trained at 1,024 tokens, is read at 4 and 8 times that length.

    python -m experiments.long_context.train_and_extend --folder extend-run --seeds 0 1 2
    python -m experiments.long_context.train_and_extend --folder extend-run --table     # of what has been run

It learns the next byte of real text, to repeat sequences of ids, and to find needles. 40% of the tokens are in rows of
one document, 60% in rows that pack documents of a quarter of the length, in which finding is learned sooner. Then,
without further training, it is read by each scheme:

- `rope`: plain positions, beyond those that it has seen.
- `yarn`: YaRN's frequencies and temperature, with the ratio of the lengths as factor.
- `dca`: dual-chunk attention (chunk: the trained length, local: 1/32 of it).
- `dca+scale`: the same, logits scaled by the length.

Each scheme reads prompts with `dense` attention, with `pooled+last`, the sparse prefill of `PooledBlocks()`, and with
`pooled`, the same without dense attention of the last queries of a prompt.

Then training continues at 4,096 tokens with RoPE base 1e6 (`--continue-steps`, 0 leaves it out), with the same shares
of lengths. This model is read at 1, 4, 8 and 16 times the
first length, where the trained length of the schemes is 4,096. `--passkey TOKENS` also asks it for a passkey in
prompts of that length, one for each depth, by `dca+scale` and `pooled+last`.

At each length: `passkey` is one needle in real text, `needle` one of four in random ids, both answered by the engine
with all ids right; the losses are of long held-out documents, by position. The losses are of dense attention only: they
come from a forward pass without a cache, and sparse attention needs one. The others have density and recall instead.
Each seed has its own weights, data order and tests; the schemes have the same tests. One GPU, some minutes a seed.
Leaves a folder for each seed: `model/` and `model-continued/` (Hugging Face folders), a log of each training, a folder
of answers for each reading, and `results.jsonl` with a line for each reading and each long prompt. What has been done
is not done again. Processes may run different seeds of one folder at the same time, also with different `--steps`.

After `--limit SECONDS`, or a SIGTERM, a training saves and ends; a reading ends at once, and what it has answered is
kept. The same command goes on.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

import convert
from convert.huggingface import export
from experiments.command import save_after
from experiments.long_context.prefill import left_out
from experiments.long_context.rows import MixedLengths, Mixture, read_text
from experiments.long_context.sizes import LAYOUT, VOCAB_SIZE, Setup, Stage
from qwen_jax.attention.sparse import PooledBlocks
from qwen_jax.config import DualChunk, ModelConfig, Yarn
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.engine import Chunks
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import train_bpe
from train.checkpoint import Checkpoints
from train.data.batch import Batch, place
from train.evaluate import perplexity, runner, synthetic_ids
from train.evaluate.tasks import Sample
from train.files import append_record, read_records
from train.interrupt import Interruption
from train.loop import ByStep, CheckpointConfig, Indexed, LoopConfig, Monitor, fit
from train.observe.display import Display
from train.observe.metrics import MetricsLog
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import TrainState, fresh_state, init_state
from train.step import StepConfig, make_eval_step, make_train_step

SCHEMES = ("rope", "yarn", "dca", "dca+scale")
ATTENTIONS = ("dense", "pooled", "pooled+last")
# No length is beyond it: dual-chunk attention does not scale its logits.
_NEVER = 2**30
RESULTS = "results.jsonl"
# Prompts that are answered together, at most.
_MOST_ROWS = 32


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


def train(setup: Setup, stage: Stage, text: np.ndarray, seed: int, folder: Path) -> bool:
    """Trains the model of a seed in one stage and exports it, unless it is there.

    The first stage begins with random weights, the second with those that the first has exported. SIGTERM and Ctrl-C
    stop it after the step in progress; it is saved then, and the next call goes on with it.

    Args:
      setup: sizes.
      stage: of `setup.stages()`.
      text: bytes to train on.
      seed: of weights and data.
      folder: of the seed.

    Returns:
      Whether the model is there; otherwise training was stopped.
    """
    destination, first = stage.model_folder(folder), setup.stages()[0]
    if destination.exists():
        return True
    mesh, model = make_mesh({}, jax.devices()[:1]), setup.model(stage)
    optimizer = OptimizerConfig(Schedule(stage.steps, stage.learning_rate, warmup_steps=stage.steps // 20))
    objective = NextToken(model, PretrainConfig(loss_chunk=16_384))
    step = StepConfig(dtype=_dtype(), remat="none" if jax.default_backend() == "cpu" else "dots")
    # As many tokens in a step for any length.
    rows = setup.batch * setup.length // stage.length
    data: Indexed[Batch] = MixedLengths(stage.length, rows, text, seed)
    # The loss of each kind of rows, to see what has been learned. Batches of these random numbers are in no step.
    mixture = Mixture(stage.length, text)
    rng, evaluate = np.random.default_rng([seed, 2**32]), make_eval_step(objective, step, mesh)
    kinds = {"repetition": mixture.repetitions, "needle": mixture.needles, "text": mixture.text}
    shown = {name: place(kind(rng, rows), mesh) for name, kind in kinds.items()}

    def losses(state: TrainState) -> dict[str, float]:
        return {f"{name}_loss": evaluate(state.params, batch)[0].mean_loss() for name, batch in shown.items()}

    saved = folder / f"checkpoints-{stage.name}"
    run = {"seed": seed, "stage": dataclasses.asdict(stage), "text": hashlib.sha256(text.tobytes()).hexdigest()}
    # Checkpoints have a tokenizer, which nothing reads here: ids are bytes and `LAYOUT`.
    tokenizer, schedule = train_bpe([], VOCAB_SIZE), CheckpointConfig(every=0, keep_last=1)
    with (
        jax.set_mesh(mesh),
        Interruption() as interruption,
        Checkpoints(saved, model, tokenizer, json.loads(json.dumps(run)), schedule) as checkpoints,
    ):
        if stage == first:
            state = init_state(model, optimizer, seed, mesh)
        else:
            state = fresh_state(optimizer, convert.load_params(first.model_folder(folder), model, mesh), mesh)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
        log = MetricsLog(folder / f"{destination.name.replace('model', 'train')}.jsonl", int(state.step))
        try:
            with Display(Console(stderr=True), stage.steps) as display:
                state = fit(
                    stage.steps,
                    state,
                    make_train_step(objective, optimizer, step, mesh),
                    ByStep(data),
                    mesh=mesh,
                    config=LoopConfig(evaluate_every=max(stage.steps // 10, 1)),
                    evaluate=losses,
                    checkpoints=checkpoints,
                    stop=interruption.stop,
                    monitor=Monitor(log=log, display=display),
                )
        finally:
            log.close()
    if state.step < stage.steps:
        print(f"Seed {seed}: stopped and saved after step {state.step} of {stage.steps} of the {stage.name} model.")
        return False
    export(state.params, model, destination)
    shutil.rmtree(saved)
    return True


class FixedSizeEngine(Engine):
    """An engine whose batches and caches have one size, so that prompts of all lengths share compiled programs.

    Attributes:
      rows: prompts that are read at a time, a power of two.
    """

    rows: int = 1

    def token_chunks(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, max_new_tokens: int) -> Chunks:
        """As `Engine.token_chunks`, with empty rows filled and room up to the longest context."""
        padded = [*prompts, *[prompts[-1]] * (self.rows - len(prompts))]
        room = self.config.max_position_embeddings - max(map(len, prompts))
        return super().token_chunks(padded, sampling, max(room, max_new_tokens))


def load(
    model: Path,
    scheme: str,
    attention: str,
    *,
    trained: int,
    length: int,
    longest: int,
    chunk: int,
    rows: int = 1,
    cache_dtype: Literal["auto", "int8"] = "auto",
) -> FixedSizeEngine:
    """Loads a model as a scheme reads a length.

    Args:
      model: folder of the model.
      scheme: of `SCHEMES`.
      attention: of `ATTENTIONS`; all but "dense" read every prompt by sparse attention.
      trained: tokens of a row in training.
      length: of prompts with their answers, in tokens.
      longest: the largest length that is to share compiled programs with this one.
      chunk: tokens that are read at a time, rounded up to whole tiles of sparse attention.
      rows: prompts that are read at a time, a power of two.
      cache_dtype: of keys and values.
    """
    mesh = make_mesh({}, jax.devices()[:1])
    patterns = {"pooled": PooledBlocks(last=0), "pooled+last": PooledBlocks()}
    config, params = convert.load(model, mesh, _dtype())
    engine = FixedSizeEngine(
        dataclasses.replace(extended(config, scheme, trained, length), max_position_embeddings=longest),
        params,
        mesh,
        dtype=_dtype(),
        chunk=synthetic_ids.VALUES - 1,
        prefill_chunk=-(-chunk // 128) * 128,
        kv_dtype=cache_dtype,
        sparse=patterns.get(attention),
        sparse_from=1,
        eos_token_ids=[],
    )
    engine.rows = rows
    return engine


def read(setup: Setup, stage: Stage, wanted: Mapping[str, Any], held_out: np.ndarray, folder: Path) -> dict[str, Any]:
    """Reads one length by one scheme and attention.

    Args:
      setup: sizes.
      stage: after which the model is read.
      wanted: what the record begins with: seed, model, scheme, attention, ratio and length.
      held_out: uint8 [windows, longest].
      folder: of the seed.

    Returns:
      Accuracies; of pooled attention, density and recall of the last batch of each task; of dense attention, losses,
      and losses by position.

    Raises:
      InputError: the model refuses the length.
    """
    seed, scheme, attention, length = (wanted[key] for key in ("seed", "scheme", "attention", "length"))
    engine = load(
        stage.model_folder(folder),
        scheme,
        attention,
        trained=stage.length,
        length=length,
        longest=setup.length * max(stage.ratios),
        chunk=setup.length // 2,
        rows=min(_MOST_ROWS, 1 << (setup.samples * len(setup.depths) - 1).bit_length()),
    )

    def make(case: runner.Case) -> Sample:
        rng, depth = case.rng(seed), case.depth or 0.0
        if case.task == "needle":
            return synthetic_ids.needle_sample(rng, length, depth, LAYOUT, 4)
        text = held_out[case.sample % len(held_out), :length].astype(np.int32)
        return synthetic_ids.needle_sample(rng, length, depth, LAYOUT, 1, text)

    answers = folder / "answers" / f"{stage.name}-{scheme}-{attention}-x{wanted['ratio']}"
    settings = {**wanted, "setup": json.loads(json.dumps(dataclasses.asdict(setup)))}
    found: dict[str, Any] = {"cells": []}
    for task in ("passkey", "needle"):
        engine.skipped = []
        cases = runner.cases({task: True}, [length], setup.depths, setup.samples)
        scores = runner.run(engine, make, cases, answers / task, settings, engine.rows)
        found[task] = scores["tasks"][task]
        found["cells"] += scores["cells"]
        if attention != "dense":
            found.setdefault("sparse", {})[task] = left_out(engine)
    if attention != "dense":
        return found
    # The same last tokens for all lengths.
    windows = held_out[:, -length:].astype(np.int32)
    losses = perplexity.position_losses(engine, windows, max(1, 32_768 // length))
    (summary,) = perplexity.summarise([losses], setup.length // 4)
    return {**found, "loss": summary["loss"], "last_loss": summary["last"]["loss"], "buckets": summary["buckets"]}


def read_passkey(engine: Callable[[], Engine], wanted: Mapping[str, Any], held_out: np.ndarray) -> dict[str, Any]:
    """Asks for a passkey in a long prompt, in held-out text that is repeated.

    Args:
      engine: gives the model as it reads the length.
      wanted: what the record begins with: seed, length, depth and others.
      held_out: uint8 [windows, longest].

    Returns:
      Whether it was found, the seconds from the prompt to the answer (the first prompt of a process compiles), density
      and recall.

    Raises:
      InputError: the model refuses the length.
    """
    length, depth = wanted["length"], wanted["depth"]
    rng, noise = runner.Case("passkey", length, depth, 0).rng(wanted["seed"]), np.resize(held_out, length)
    sample = synthetic_ids.needle_sample(rng, length, depth, LAYOUT, 1, noise)
    loaded = engine()
    begin = time.perf_counter()
    (answer,) = loaded.generate([sample.prompt], SamplingParams(temperature=0), max_new_tokens=sample.new_tokens)
    seconds = time.perf_counter() - begin
    found = " ".join(map(str, answer.token_ids)) == sample.references[0]
    return {"found": found, "seconds": seconds, **left_out(loaded)}


def _dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16, but float32 on a CPU, where it is faster."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def run(
    setup: Setup,
    seeds: Sequence[int],
    schemes: Sequence[str],
    attentions: Sequence[str],
    folder: Path,
    text_folders: list[str] | None,
    passkey: int | None = None,
    cache_dtype: Literal["auto", "int8"] = "auto",
) -> None:
    """Trains all seeds in all stages, and reads them by all schemes at all ratios; leaves out what is done.

    Args:
      setup: sizes. A seed in a folder has one.
      seeds: of weights, data and tests.
      schemes: of `SCHEMES`.
      attentions: of `ATTENTIONS`.
      folder: of the experiment.
      text_folders: see `read_text`.
      passkey: length of the long passkey prompts in tokens; None for none.
      cache_dtype: of keys and values of the long passkey prompts.

    Raises:
      InputError: another setup in the folder of a seed, or too little text.
    """
    for seed in seeds:
        runner.open_folder(folder / str(seed), json.loads(json.dumps(dataclasses.asdict(setup))))
    text, held_out = read_text(setup, text_folders)
    for seed in seeds:
        of_seed = folder / str(seed)
        path = of_seed / RESULTS
        for stage in setup.stages():
            if not train(setup, stage, text, seed, of_seed):
                return
            for scheme, attention, ratio in itertools.product(schemes, attentions, stage.ratios):
                wanted = {"seed": seed, "model": stage.name, "scheme": scheme, "attention": attention}
                wanted |= {"ratio": ratio, "length": setup.length * ratio}
                add_record(path, wanted, functools.partial(read, setup, stage, wanted, held_out, of_seed))
        if passkey is None:
            continue
        stage = setup.stages()[-1]
        sizes = {"trained": stage.length, "length": passkey, "longest": passkey, "chunk": min(passkey, 32_768)}
        engine = functools.cache(
            functools.partial(
                load, stage.model_folder(of_seed), "dca+scale", "pooled+last", cache_dtype=cache_dtype, **sizes
            )
        )
        for depth in setup.depths:
            wanted = {"task": "passkey", "seed": seed, "model": stage.name, "scheme": "dca+scale"}
            wanted |= {"attention": "pooled+last", "cache_dtype": cache_dtype, "length": passkey, "depth": depth}
            add_record(path, wanted, functools.partial(read_passkey, engine, wanted, held_out))


def add_record(path: Path, wanted: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Measures, and appends and prints the record, unless it is in the file.

    Args:
      path: of the file of records.
      wanted: what the record begins with, by which it is found again.
      measure: gives the rest. An `InputError` is recorded as "refused", and measured again the next time.
    """
    done = read_records(path, "seed") if path.exists() else []
    if any("refused" not in r and all(r.get(key) == value for key, value in wanted.items()) for r in done):
        return
    try:
        found = measure()
    except InputError as error:
        found = {"refused": str(error)}
    append_record(path, {**wanted, **found})
    print(to_json({**wanted, **{k: v for k, v in found.items() if k not in ("cells", "buckets")}}), flush=True)


def table_of(folder: Path) -> str:
    """What has been read in a folder, of all seeds; and the settings in which they differ, if any.

    Args:
      folder: of the experiment.
    """
    paths = sorted(folder.glob(f"*/{RESULTS}"))
    lines = [table([record for path in paths for record in read_records(path, "seed")])]
    settings = {path.parent.name: read_json(path.with_name(runner.SETTINGS)) for path in paths}
    for name in dict.fromkeys(name for of in settings.values() for name in of):
        values = {seed: of[name] for seed, of in settings.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            lines += ["", f"{name}: " + ", ".join(f"{value} (seed {seed})" for seed, value in values.items())]
    return "\n".join(lines)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds, and their standard deviations, as Markdown; then a line for the long prompts of each seed.

    Args:
      records: of `run`. Of several for one reading the last counts.
    """
    long: dict[tuple[Any, ...], dict[float, Mapping[str, Any]]] = {}
    for r in records:
        if "task" in r:
            long.setdefault((r["length"], r["model"], r["seed"], r["cache_dtype"]), {})[r["depth"]] = r
    records = [r for r in records if "task" not in r]
    last = {((r["model"], r["scheme"], r["attention"]), r["ratio"], r["seed"]): r for r in records}
    ratios = sorted({r["ratio"] for r in records})
    names = {"passkey": ".2f", "needle": ".2f", "loss": ".3f", "last_loss": ".3f"}
    lines = ["| | " + " | ".join(f"{name}, {ratio}x" for name in names for ratio in ratios) + " |"]
    lines.append("|---" * (1 + len(names) * len(ratios)) + "|")
    for reading in dict.fromkeys(found for found, _, _ in last):
        cells = []
        for name, ratio in itertools.product(names, ratios):
            of = [r for (found, n, _), r in last.items() if (found, n) == (reading, ratio)]
            values = [r[name] for r in of if r.get(name) is not None]
            if not values:
                cells.append("refused" if any("refused" in r for r in of) else "-")
                continue
            spread = f" ± {np.std(values, ddof=1):{names[name]}}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):{names[name]}}{spread}")
        lines.append(f"| {', '.join(reading)} | " + " | ".join(cells) + " |")
    if long:
        lines += ["", "| passkey, tokens | model | seed | cache | found | seconds | density |", "|---" * 7 + "|"]
    for (length, model, seed, cache_dtype), by_depth in long.items():
        read = [r for r in by_depth.values() if "refused" not in r]
        cells = ["refused", "-", "-"]
        if read:
            seconds, density = (np.median([r[name] for r in read]) for name in ("seconds", "density"))
            cells = [f"{sum(r['found'] for r in read)} of {len(read)}", f"{seconds:.1f}", f"{density:.1%}"]
        lines.append("| " + " | ".join([f"{length:,}", model, str(seed), cache_dtype, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("extend-run"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--schemes", nargs="*", choices=SCHEMES, default=SCHEMES, help="none: only train, and read --passkey"
    )
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS)
    parser.add_argument(
        "--passkey", type=int, metavar="TOKENS", help="also ask for a passkey in prompts of this length"
    )
    parser.add_argument("--cache-dtype", choices=["auto", "int8"], default="auto", help="of --passkey")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which the run saves and ends")
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
        print(table_of(args.folder))
        return
    if args.limit:
        save_after(args.limit)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Setup):
        value = getattr(args, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        how = args.seeds, args.schemes, args.attention, args.folder, args.text_folders
        run(Setup(**values), *how, args.passkey, args.cache_dtype)
    except InputError as error:
        parser.error(str(error))
    print(table_of(args.folder))


if __name__ == "__main__":
    main()
