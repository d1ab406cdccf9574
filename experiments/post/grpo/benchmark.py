"""Speed of GRPO on one GPU: rollouts, hand-over of weights, update, and whole steps beside TRL's.

    python -m experiments.post.grpo.benchmark --model qwen2.5-0.5b
    python -m experiments.post.grpo.benchmark --model qwen2.5-1.5b
    python -m experiments.post.grpo.benchmark --toy                      # on a CPU, in a few minutes

Weights are random, prompts are random letters, and the reward is the parity of a response's ids. The tokenizer has the
bytes and the control tokens alone, so that responses end by themselves: lengths are spread, up to `--new`. Every
measurement is a process of its own. Every line of output is a JSON object: first the measurements, then the comparisons
with their targets; at the end a Markdown table.

* `episode`: `train.grpo_run.train_grpo` for some episodes of `--queries` prompts x `--group` responses, at a learning
  rate that changes nothing, so that all episodes have texts alike. A whole step is an update and the next episode; the
  first one, with the start of the engine and the compilation of the update, is left out.
* `engine`: the same number of prompts, responses and rows in the same engine, without anything else: the first pass
  warms up, the second is measured.
* `handover`: `train.handover.make_handover` from float32 masters; and a program that only reads the same float32
  numbers and writes them in the engine's dtype.
* `grpo`, `sft`: one training step on the same packed rows of rollouts, timed by `experiments.train.benchmark.measure`.
* `trl` (`trl_grpo.py`): TRL's `GRPOTrainer`, which generates with transformers, from the same folder. Where
  trl is not installed, a line says so.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.huggingface import export
from experiments.decode.benchmark import random_params, say
from experiments.post.grpo import rewards
from experiments.post.learning import IDS, write_lines
from experiments.serving.load import drive
from experiments.train.benchmark import NO_MEMORY, RATE, architecture, measure, out_of_memory
from qwen_jax.cli.train import _Formats
from qwen_jax.config import ModelConfig
from qwen_jax.inference import ContinuousEngine, Ending, Request, SamplingParams
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import CONTROL_TOKENS, load_tokenizer, train_bpe
from qwen_jax.tokenizer.control import END_OF_TEXT, TURN_END
from train.data.batch import place
from train.data.packing import best_fit
from train.data.prompts import read_prompts
from train.data.rollouts import Rollout, RolloutBatch, pack_rollouts
from train.grpo import Grpo
from train.grpo_config import EngineConfig, GrpoRunConfig, RewardUse
from train.grpo_run import train_grpo
from train.handover import InferenceLayout, make_handover
from train.loop import CheckpointConfig
from train.observe.metrics import read_log
from train.optimizer import OptimizerConfig, Schedule
from train.policy import GrpoConfig
from train.pretrain import NextToken, PretrainConfig
from train.sampler import SamplingConfig, turn_seed
from train.state import init_state
from train.step import StepConfig, make_train_step

KINDS = ("episode", "engine", "handover", "grpo", "sft", "trl")
_FROZEN_RATE = 1e-30


def shape(args: argparse.Namespace) -> ModelConfig:
    """The architecture that is measured. Texts end with the ids that end them in a run, and with no others, so that all
    kinds have responses of the same lengths."""
    control = [token.content for token in CONTROL_TOKENS]
    ends = tuple(IDS - len(control) + control.index(token) for token in (TURN_END, END_OF_TEXT))
    return dataclasses.replace(architecture(args), bos_token_id=None, eos_token_ids=ends)


def make_folder(args: argparse.Namespace) -> None:
    """Writes a Hugging Face folder of random weights with a tokenizer, and the prompts."""
    if (args.folder / "done").exists():
        return
    model, mesh = shape(args), make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        export(random_params(model, mesh), model, args.folder / "model")
    train_bpe(["of bytes alone"], IDS).save(args.folder / "model")
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    texts = ["".join(rng.choice(letters, args.prompt)) for _ in range(args.queries * args.episodes)]
    write_lines(args.folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    (args.folder / "done").touch()


def step_config(args: argparse.Namespace, accumulation: int) -> StepConfig:
    """How steps are computed, in runs and alone."""
    return StepConfig(dtype=args.dtype, remat=args.remat, accumulation=accumulation, scan_layers=args.scan_layers)


def run_config(args: argparse.Namespace) -> GrpoRunConfig:
    """The run of `episode`."""
    return GrpoRunConfig(
        output=str(args.folder / "run"),
        model=str(args.folder / "model"),
        prompts={"prompts": str(args.folder / "prompts.jsonl")},
        rewards=(RewardUse(f"{Path(rewards.__file__).resolve()}:odd"),),
        objective=GrpoConfig(kl_weight=0.0, loss_chunk=args.loss_chunk),
        sampling=SamplingConfig(args.group, args.new),
        engine=EngineConfig(max_seqs=args.max_seqs, dtype=args.dtype),
        queries=args.queries,
        episodes=args.episodes,
        prompt_length=args.prompt,
        row_length=args.length,
        learning_rate=_FROZEN_RATE,
        step=step_config(args, args.accumulation),
        checkpoints=CheckpointConfig(every=0),
        keep_rollouts=args.episodes + 1,
        export="",
    )


def episode(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each phase of a run, medians of the episodes that compile nothing."""
    config = run_config(args)
    train_grpo(config, _Formats())
    log = read_log(Path(config.output) / "metrics.jsonl")
    records = [record for record in log if "seconds/rollouts" in record][2:]
    # The first step has the engine's start and the compilation of the update in it, and after the last no episode is
    # sampled.
    steps = sorted((record["step"], record["seconds"]) for record in log if "seconds" in record)[1:-1]

    def median(name: str) -> float:
        return float(np.median([record[name] for record in records]))

    whole = float(np.median([seconds for _, seconds in steps]))
    rollouts, judged = median("seconds/rollouts"), median("seconds/rewards")
    return {
        "step_s": whole,
        "rollouts_s": rollouts,
        "rewards_s": judged,
        # Packing, the update, and the hand-over, which waits for the update.
        "update_and_handover_s": whole - rollouts - judged,
        "sampled_tokens": median("rollouts/tokens"),
        "tokens_per_s": float(np.median([r["rollouts/tokens"] / r["seconds/rollouts"] for r in records])),
        "preemptions": median("rollouts/preemptions"),
        "mean_response": median("response/tokens"),
        "samples_per_s": args.queries * args.group / whole,
    }


def make_engine(args: argparse.Namespace, weights: Any = None) -> ContinuousEngine:
    """An engine like that of the run."""
    model, mesh, config = shape(args), make_mesh({}, jax.devices()[:1]), run_config(args)
    rows = min(args.max_seqs, args.queries * args.group)
    return ContinuousEngine(
        model,
        random_params(model, mesh) if weights is None else weights,
        mesh,
        tokenizer=load_tokenizer(args.folder / "model"),
        dtype=args.dtype,
        max_seqs=rows,
        max_length=config.longest,
        max_batched_tokens=config.engine.max_batched_tokens,
        page_size=config.engine.page_size,
        num_pages=rows * -(-config.longest // config.engine.page_size),
    )


def engine(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the engine alone, at the run's concurrency."""
    with make_engine(args) as made:
        compile_s = made.start()
        assert made.tokenizer is not None
        prompts = read_prompts([str(args.folder / "prompts.jsonl")], made.tokenizer, args.prompt).prompts
        found = {}
        for i in range(2):
            requests = [
                Request(
                    tuple(prompt.ids),
                    Ending(frozenset(made.eos_token_ids), (), args.new),
                    SamplingParams(temperature=1.0, seed=turn_seed(0, prompt.number, 0, member, 0)),
                )
                for prompt in prompts[i * args.queries : (i + 1) * args.queries]
                for member in range(args.group)
            ]
            begin = time.perf_counter()
            tokens = sum(timing.tokens for timing in drive(made, requests, incremental=False))
            seconds = time.perf_counter() - begin
            found = {
                "tokens": tokens,
                "mean_response": tokens / len(requests),
                "seconds": seconds,
                "tokens_per_s": tokens / seconds,
                "compile_s": compile_s,
            }
    return found


def handover(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a hand-over, and of reading and writing the same bytes."""
    model, mesh, step = shape(args), make_mesh({}, jax.devices()[:1]), step_config(args, 1)
    with jax.set_mesh(mesh):
        params = init_state(model, OptimizerConfig(Schedule(10, RATE)), 0, mesh).params
        made = make_engine(args, InferenceLayout(model, step, mesh, [mesh], args.dtype)(params)[0])
        hand = make_handover(model, step, mesh, made)
        copy = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.array(x, args.dtype, copy=True), tree))
        copied: list[Any] = []

        def copy_once() -> None:
            # Like an engine, which frees its weights before it gets others.
            copied.clear()
            copied.append(copy(params))

        def median(run: Any) -> float:
            times = []
            for i in range(args.repeats + 1):
                begin = time.perf_counter()
                run()
                # The device runs programs one after the other: this one ends after all before it.
                jax.block_until_ready((copied, _wait(jnp.float32(i))))
                times.append(time.perf_counter() - begin)
            return float(np.median(times[1:]))

        handover_s = median(lambda: hand(params))
        made.close()
        copy_s = median(copy_once)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    written = sum(x.size for x in jax.tree.leaves(params)) * jnp.dtype(args.dtype).itemsize
    return {"handover_s": handover_s, "copy_s": copy_s, "read_gb": size / 1e9, "written_gb": written / 1e9}


_wait = jax.jit(lambda x: x + 1)


def rollout_batch(args: argparse.Namespace, model: ModelConfig) -> RolloutBatch:
    """Full rows of random rollouts, whose lengths are spread as those of the run are."""
    rng = np.random.default_rng(0)
    rollouts, room = [], args.update_rows * args.length
    while room > 0:
        # A response ends with one of two ids, all ids equally likely.
        answer = int(min(rng.geometric(2 / IDS), args.new))
        ids = rng.integers(0, model.vocab_size, args.prompt + answer).tolist()
        trained = np.arange(len(ids)) >= args.prompt
        log_probs = np.where(trained, -np.log(model.vocab_size), 0).astype(np.float32)
        rollouts.append(Rollout(ids, trained, log_probs, answer < args.new, 0))
        room -= len(ids)
    config = run_config(args).objective
    layout = best_fit([len(rollout.ids) for rollout in rollouts], args.length, config.max_segments)
    used = [rollouts[i] for row in layout[: args.update_rows] for i in row]
    advantages = rng.choice([-1.0, 1.0], len(used)).astype(np.float32)
    return pack_rollouts(used, advantages, np.ones(len(used), bool), config, args.update_rows, args.length)


def update(args: argparse.Namespace, kind: str) -> None:
    """Times a step of GRPO, or of SFT on the same rows."""
    model, mesh = shape(args), make_mesh({}, jax.devices()[:1])
    optimizer = OptimizerConfig(Schedule(10**6, RATE, schedule="wsd"))
    packed, config = rollout_batch(args, model), step_config(args, args.update_rows // args.micro_rows)
    args.batch = args.update_rows
    weights = packed.batch.loss_weights
    more = {"accumulation": config.accumulation, "trained": float((weights > 0).mean())}
    more["padding"] = float((packed.batch.segment_ids == 0).mean())
    objective: Any = Grpo(model, run_config(args).objective)
    batch: Any = packed
    if kind == "sft":
        objective = NextToken(model, PretrainConfig(loss_chunk=args.loss_chunk, compact_loss=True))
        batch = dataclasses.replace(packed.batch, loss_weights=(weights > 0).astype(np.float32))
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, 0, mesh)
        measure(args, kind, state, make_train_step(objective, optimizer, config, mesh), place(batch, mesh), **more)


def run_here(args: argparse.Namespace, kind: str) -> None:
    """Measures one kind in this process; ends with `NO_MEMORY` if it does not fit."""
    if kind == "trl":
        # JAX is not to take the card's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    try:
        if kind == "folder":
            make_folder(args)
        elif kind == "trl":
            from experiments.post.grpo import trl_grpo

            say(what=kind, model=args.model, **trl_grpo.measure(args))
        elif kind in ("grpo", "sft"):
            update(args, kind)
        else:
            measured = {"episode": episode, "engine": engine, "handover": handover}[kind](args)
            device = jax.devices()[0].device_kind
            say(what=kind, model=args.model, **measured, device=device, jax=jax.__version__, date=time.strftime("%F"))
    except Exception as error:
        if not out_of_memory(error):
            raise
        say(what=kind, model=args.model, error="out of memory")
        print(str(error)[:2000], file=sys.stderr)
        sys.exit(NO_MEMORY)


def attempt(argv: list[str], kind: str, seconds: float) -> dict[str, Any]:
    """What a process measured, or why it measured nothing."""
    command, begin = [sys.executable, "-m", __spec__.name, *argv, "--here", kind], time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"what": kind, "error": f"not finished after {seconds:.0f} s"}
    took = {"process_s": round(time.perf_counter() - begin, 1)}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode in (0, NO_MEMORY):
        return {"what": kind, **(lines[-1] if lines else {}), **took}
    return {
        "what": kind, "error": f"status {done.returncode}: " + "\n".join(done.stderr.splitlines()[-6:])[-1500:], **took
    }  # fmt: skip


def comparisons(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of what was measured, beside their targets; those of which a part is missing are left out.

    Args:
      found: the measurements by kind.
    """

    def value(kind: str, name: str) -> float | None:
        number = found.get(kind, {}).get(name)
        return None if number is None else float(number)

    wanted = (
        # What is compared, ours, the other, the target, and whether the ratio is to be at least that, or at most.
        ("rollout tokens/s to the engine's", ("episode", "tokens_per_s"), ("engine", "tokens_per_s"), 0.8, True),
        ("hand-over s to copying the bytes", ("handover", "handover_s"), ("handover", "copy_s"), 1.5, False),
        ("hand-over s to a whole step", ("handover", "handover_s"), ("episode", "step_s"), 0.01, False),
        ("update tokens/s to SFT's", ("grpo", "tokens_per_s"), ("sft", "tokens_per_s"), 0.9, True),
        ("samples/s of whole steps to TRL's", ("episode", "samples_per_s"), ("trl", "samples_per_s"), 2.0, True),
    )
    lines = []
    for what, ours, other, target, at_least in wanted:
        mine, theirs = value(*ours), value(*other)
        if mine is None or not theirs:
            continue
        ratio = mine / theirs
        met = ratio >= target if at_least else ratio <= target
        bound = f"{'at least' if at_least else 'at most'} {target}"
        lines.append({"compare": what, "ours": mine, "other": theirs, "ratio": ratio, "target": bound, "met": met})
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Comparisons as a Markdown table."""
    head = ["| comparison | ours | other | ratio | target | met |", "|---|---|---|---|---|---|"]
    rows = [
        f"| {x['compare']} | {x['ours']:.4g} | {x['other']:.4g} | {x['ratio']:.3f} | {x['target']} | "
        f"{'yes' if x['met'] else 'no'} |"
        for x in lines
    ]
    return "\n".join(head + rows)


def run_all(args: argparse.Namespace, argv: list[str]) -> None:
    """Measures each kind in a process of its own, and compares them."""
    made = attempt(argv, "folder", args.each)
    if "error" in made:
        say(**made)
        sys.exit(1)
    found: dict[str, dict[str, Any]] = {}
    for kind in args.kinds:
        if kind == "trl" and importlib.util.find_spec("trl") is None:
            found[kind] = {"what": kind, "model": args.model, "error": "not measured: trl is not installed"}
        else:
            found[kind] = {"model": args.model, **attempt(argv, kind, args.each)}
        say(**found[kind])
    lines = comparisons(found)
    for line in lines:
        say(model=args.model, **line)
    print(table(lines))


_TOY = {
    "model": "tiny", "queries": 4, "group": 4, "new": 24, "prompt": 16, "max_seqs": 8, "length": 64, "accumulation": 2,
    "update_rows": 4, "micro_rows": 2, "loss_chunk": 64, "dtype": "float32", "remat": "none", "steps": 2, "warmup": 1,
    "repeats": 2, "scan_layers": True, "episodes": 4,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for a CPU, where options are not given")
    parser.add_argument("--folder", type=Path, default=Path("grpo-benchmark"), help="takes a folder for each model")
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--queries", type=int, default=256, help="prompts of an episode")
    parser.add_argument("--group", type=int, default=8, help="responses to each")
    parser.add_argument("--new", type=int, default=512, help="most tokens of a response")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--max-seqs", type=int, default=256, help="responses that the engine runs at one time")
    parser.add_argument("--episodes", type=int, default=4, help="of which the last two are measured")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--accumulation", type=int, default=64, help="micro-batches of a step of the run")
    parser.add_argument("--update-rows", type=int, default=64, help="rows of the steps that are timed alone")
    parser.add_argument("--micro-rows", type=int, default=8, help="rows of a micro-batch of those")
    parser.add_argument("--loss-chunk", type=int, default=4096, help="tokens whose logits exist at one time")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--scan-layers", action="store_true", help="run the layers in a loop")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of grpo and sft")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--repeats", type=int, default=5, help="timed hand-overs")
    parser.add_argument("--each", type=float, default=590, help="seconds that one process may take")
    parser.add_argument("--trl-micro", type=int, default=8, help="responses of a micro-batch of TRL")
    parser.add_argument("--trl-weights", choices=("float32", "bfloat16"), default="bfloat16", help="of TRL's model")
    parser.add_argument("--here", choices=("folder", *KINDS), help=argparse.SUPPRESS)
    # Of the training benchmark, whose helpers read them.
    parser.set_defaults(dense=False, no_matmul=True, profile=None)
    if "--toy" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**_TOY)
    args = parser.parse_args(argv)
    args.folder = args.folder / (args.model + (f"-{args.layers}" if args.layers else ""))
    args.kinds = args.kinds or list(KINDS)
    if args.episodes < 4:
        parser.error(f"expected at least 4 episodes, of which two are measured; got {args.episodes}")
    if args.length < args.prompt + args.new:
        parser.error(
            f"expected rows of at least --prompt and --new, {args.prompt + args.new} tokens; got {args.length}"
        )
    if args.update_rows % args.micro_rows:
        parser.error(f"expected micro-batches that divide {args.update_rows} rows, got {args.micro_rows}")
    return args


def main() -> None:
    args = parse()
    if args.here:
        return run_here(args, args.here)
    run_all(args, sys.argv[1:])


if __name__ == "__main__":
    main()
