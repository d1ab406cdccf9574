"""Tokens per second and peak memory of fine-tuning steps, beside pre-training of the same shape and beside TRL.

    python -m experiments.post.benchmark pretrain sft dpo --model qwen2.5-1.5b --lengths 8192 32768 --trl
    python -m experiments.post.benchmark pretrain lora --model qwen2.5-7b --lengths 8192 --tokens 8192
    python -m experiments.post.benchmark pretrain sft lora dpo --model tiny --lengths 128 --trained 0.5

Weights and tokens are random. Every measurement is a process of its own, so that each has the whole memory. Every line
of output is a JSON object: a measurement, or a comparison with its target as soon as both kinds are measured.

All kinds have the same rows: `--documents` segments of equal length, each a prompt and an answer, and the answer is
`--trained` of it. `pretrain` trains all tokens. `sft` and `lora` are the steps of `train sft`, on the answers. In `dpo`
neighbouring segments are a pair, and the log-probabilities of the reference are computed before the steps.
`experiments.train.benchmark.measure` times the steps. `--trl` adds TRL's trainers (`trl_step.py`).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any, cast

import jax
import numpy as np

from experiments.decode.benchmark import random_params, say
from experiments.train.benchmark import (
    NO_MEMORY,
    RATE,
    architecture,
    measure,
    out_of_memory,
    random_tokens,
    report,
)
from qwen_jax.config import ModelConfig
from qwen_jax.lora import LoRA
from qwen_jax.parallel.sharding import Sharding, make_mesh
from train.data.batch import place
from train.data.examples import Example, Pair
from train.data.packing import pack_segments
from train.data.pairs import pack_pairs
from train.dpo import Dpo, DpoConfig, make_reference_pass
from train.objective import Objective
from train.observe.metrics import flops_per_token
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.sft import Sft
from train.state import init_state
from train.step import StepConfig, make_train_step

OURS = ("pretrain", "sft", "lora", "dpo")
TRL = ("trl-sft", "trl-dpo")
TARGETS = {
    ("sft", "pretrain"): 0.95,
    ("lora", "pretrain"): 0.95,
    ("dpo", "sft"): 0.9,
    ("sft", "trl-sft"): 1.3,
    ("dpo", "trl-dpo"): 1.3,
}
"""The least ratio of tokens per second of one kind to another."""
LEAST_SECONDS = 20.0
"""That a measurement needs: none is begun where less is left of `--seconds`."""


def examples(args: argparse.Namespace, model: ModelConfig, rows: int) -> list[list[Example]]:
    """The segments of each row: equally long, of random tokens, with the last ones trained."""
    size = args.length // args.documents
    prompt = size - round(args.trained * size)
    trained = np.arange(size) >= prompt
    tokens = random_tokens(model, rows, args.length).reshape(rows, args.documents, size)
    # The chosen and the rejected answer of a pair have the same prompt.
    if args.documents % 2 == 0:
        tokens[:, 1::2, :prompt] = tokens[:, ::2, :prompt]
    return [[Example(ids, trained) for ids in row] for row in tokens]


def pairs(rows: list[list[Example]]) -> list[list[Pair]]:
    """Neighbouring segments as pairs."""
    return [[Pair(*both) for both in zip(row[::2], row[1::2], strict=True)] for row in rows]


def model_flops(args: argparse.Namespace, model: ModelConfig, kind: str) -> float:
    """FLOPs of one token that the kind needs: the head where a token is trained, no gradient of frozen weights."""
    total = flops_per_token(model, args.length // args.documents)
    if kind == "pretrain":
        return total
    head = 6.0 * model.vocab_size * model.hidden_size
    rest, attention = flops_per_token(model, 0) - head, total - flops_per_token(model, 0)
    # Of the three products with each weight, LoRA does without that of the weight's gradient.
    share = 2 / 3 if kind == "lora" else 1.0
    return share * (rest + args.trained * head) + attention


def run_ours(args: argparse.Namespace, kind: str) -> None:
    """Measures one of `OURS` in this process."""
    model, mesh = architecture(args), make_mesh({}, jax.devices()[:1])
    optimizer = OptimizerConfig(Schedule(10**6, RATE, schedule="wsd"))
    lora = LoRA(rank=args.rank) if kind == "lora" else None
    config = StepConfig(
        remat=args.remat, accumulation=args.accumulation, scan_layers=kind != "lora" and args.scan_layers, lora=lora
    )
    rows = examples(args, model, args.batch)
    objective: NextToken | Sft | Dpo
    if kind == "dpo":
        objective = Dpo(model, DpoConfig(max_segments=args.documents, loss_chunk=args.loss_chunk))
        batch: Any = pack_pairs(pairs(rows), args.length)
    else:
        settings = PretrainConfig(loss_chunk=args.loss_chunk)
        objective = NextToken(model, settings) if kind == "pretrain" else Sft(model, settings)
        if kind == "pretrain":
            rows = [[Example(x.ids, np.ones_like(x.trained)) for x in row] for row in rows]
        batch = pack_segments(rows, args.length)
    more = {name: getattr(args, name) for name in ("documents", "trained", "accumulation", "loss_chunk")}
    if kind == "pretrain":
        more["trained"] = 1.0
    if lora is not None:
        more["rank"] = lora.rank
    with jax.set_mesh(mesh):
        # The frozen weights are a list of layers in bfloat16, as in a run.
        frozen = None if lora is None else random_params(model, mesh, Sharding.for_training(model, mesh))
        state = init_state(model, optimizer, 0, mesh, lora, frozen)
        placed = place(batch, mesh)
        if isinstance(objective, Dpo):
            placed = make_reference_pass(objective, config, mesh)(state.params, placed)
        if frozen is not None:
            more["frozen_gb"] = sum(x.nbytes for x in jax.tree.leaves(frozen)) / 1e9
        step = make_train_step(cast(Objective[Any, Any, Any], objective), optimizer, config, mesh)
        measure(args, kind, state, step, placed, frozen, model_flops=model_flops(args, model, kind), **more)


def run_trl(args: argparse.Namespace, kind: str) -> None:
    """Measures one of `TRL` in this process."""
    from experiments.post import trl_step

    model, what = architecture(args), kind.removeprefix("trl-")
    rows: Any = examples(args, model, args.batch * (args.warmup + args.steps + 1))
    seconds, more = trl_step.measure(args, model, what, pairs(rows) if what == "dpo" else rows)
    more |= {"documents": args.documents, "trained": args.trained, "weights": args.weights}
    report(args, kind, seconds, None, model_flops(args, model, what), **more)


def run_here(args: argparse.Namespace, kind: str) -> None:
    """Measures one kind at one length in this process; ends with `NO_MEMORY` if it does not fit."""
    if kind in TRL:
        # JAX is not to take the card's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    elif "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    args.length = args.lengths[0]
    args.batch = max(args.tokens // args.length, 1)
    try:
        if kind in OURS:
            say(jax=jax.__version__, device=jax.devices()[0].device_kind, date=time.strftime("%Y-%m-%d"))
        (run_trl if kind in TRL else run_ours)(args, kind)
    except Exception as error:
        if not out_of_memory(error):
            raise
        say(what=kind, model=args.model, length=args.length, error="out of memory")
        print(str(error)[:2000], file=sys.stderr)
        sys.exit(NO_MEMORY)


def run_all(args: argparse.Namespace, argv: list[str]) -> None:
    """Measures each kind at each length in a process of its own, and compares them."""
    kinds = [*args.kinds, *(kind for kind in TRL if args.trl and kind.removeprefix("trl-") in args.kinds)]
    records: dict[tuple[str, int], dict[str, Any]] = {}
    end = time.perf_counter() + args.seconds
    for length in args.lengths:
        for kind in kinds:
            record: dict[str, Any] = {}
            # TRL's trainers get the fastest settings that fit; ours run as they are asked to.
            for attempt in args.trl_tries if kind in TRL else [f"{args.remat}/{args.accumulation}"]:
                remat, accumulation = attempt.split("/")
                left = end - time.perf_counter()
                if left < LEAST_SECONDS:
                    record = {"error": "no time left"}
                else:
                    record = _attempt(
                        [
                            *(*argv, "--here", kind, "--lengths", str(length), "--tokens", str(args.tokens)),
                            *("--remat", remat, "--accumulation", accumulation),
                        ],
                        min(args.each, left),
                    )
                record = {"what": kind, "model": args.model, "length": length, "try": attempt, **record}
                say(**record)
                if record.get("error") != "out of memory":
                    break
            records[kind, length] = record
            for (ours, other), target in TARGETS.items():
                if kind in (ours, other):
                    _compare(records.get((ours, length), {}), records.get((other, length), {}), target)


def _attempt(argv: list[str], seconds: float) -> dict[str, Any]:
    """What a process measured, or why it measured nothing."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "experiments.post.benchmark", *argv]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {seconds:.0f} s"}
    took = {"process_s": round(time.perf_counter() - begin, 1)}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode in (0, NO_MEMORY) and lines:
        return {**lines[0], **lines[-1], **took}
    return {"error": f"status {done.returncode}: " + "\n".join(done.stderr.splitlines()[-6:])[-1500:], **took}


def _compare(ours: dict[str, Any], other: dict[str, Any], target: float) -> None:
    """Prints the ratios of two measurements beside the target."""
    if "tokens_per_s" not in ours or "tokens_per_s" not in other:
        return
    ratio = ours["tokens_per_s"] / other["tokens_per_s"]
    met = ratio >= target
    memory = {}
    if ours["peak_gb"] and other["peak_gb"]:  # A CPU does not tell its peak.
        memory["peak_ratio"] = ours["peak_gb"] / other["peak_gb"]
        # TRL is also not to need less memory.
        met = met and (other["what"] not in TRL or memory["peak_ratio"] <= 1)
    names = {"compare": f"{ours['what']}/{other['what']}", "model": ours["model"], "length": ours["length"]}
    say(**names, tokens_per_s_ratio=ratio, target=target, **memory, met=met)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*OURS, []], metavar="KIND", help=f"of {', '.join(OURS)}")
    parser.add_argument("--trl", action="store_true", help="measure TRL's trainers too, beside sft and dpo")
    parser.add_argument("--model", default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens in a row")
    parser.add_argument("--tokens", type=int, help="in a step, at least one row; by default those of the longest row")
    parser.add_argument("--documents", type=int, default=8, help="segments in a row; two make a pair")
    parser.add_argument("--trained", type=float, default=0.3, help="share of the tokens that are trained")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--loss-chunk", type=int, default=4096, help="tokens whose logits exist at one time")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--scan-layers", action="store_true", help="run the layers in a loop (never with LoRA)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--each", type=float, default=300, help="seconds that one process may take")
    parser.add_argument("--seconds", type=float, default=1500, help="that all of them may take together")
    parser.add_argument("--profile", metavar="DIR", help="leave a trace of our steps there")
    parser.add_argument(
        "--trl-tries",
        nargs="+",
        default=["none/1", "full/1", "full/2", "full/4"],
        metavar="REMAT/ACCUMULATION",
        help="settings of TRL, of which the first that fits is taken; REMAT is none or full (gradient checkpointing)",
    )
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2", "flex_attention"), help="of TRL's models")
    parser.add_argument("--packing", choices=("bfd", "bfd_split", "wrapped"), help="of SFTTrainer")
    parser.add_argument("--liger", action="store_true", help="TRL with Liger's kernels, which must be installed")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="of TRL's models")
    parser.add_argument("--here", choices=(*OURS, *TRL), help=argparse.SUPPRESS)
    # Of the training benchmark, whose helpers read them.
    parser.set_defaults(dense=False, no_matmul=True, compile="none", products="bfloat16")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or max(args.lengths)
    args.kinds = args.kinds or ["pretrain", "sft", "dpo"]
    for length in args.lengths:
        if args.documents < 1 or length % args.documents:
            parser.error(f"expected lengths that {args.documents} documents divide, got {length}")
        size = length // args.documents
        if not 1 <= round(args.trained * size) < size:
            parser.error(f"expected answers shorter than segments of {size} tokens, got --trained {args.trained}")
    if "dpo" in (*args.kinds, args.here) and args.documents % 2 and args.here in (None, "dpo", "trl-dpo"):
        parser.error(f"expected an even number of documents for dpo, two for each pair; got {args.documents}")
    return args


def main() -> None:
    args = parse()
    if args.here:
        return run_here(args, args.here)
    run_all(args, sys.argv[1:])


if __name__ == "__main__":
    main()
