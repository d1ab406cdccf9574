"""Tokens per second of one training step at true shapes with random weights, beside two yardsticks.

    python -m experiments.train.benchmark ours --model qwen2.5-0.5b --batch 8 --remat dots
    python -m experiments.train.benchmark plain --model qwen2.5-0.5b --batch 8 --remat dots
    python -m experiments.train.benchmark transformers --model qwen2.5-0.5b --batch 8 --remat none
    python -m experiments.train.benchmark all --seconds 1500 --output train.jsonl \
        {ours,plain}/qwen2.5-0.5b/batch={8,16},remat={none,dots} transformers/qwen2.5-0.5b/batch=8,remat=none
    python -m experiments.train.benchmark ours --model qwen2.5-0.5b --batch 8 --remat dots --profile trace
    python -m experiments.train.benchmark kernels trace
    python -m experiments.train.benchmark ours --model qwen2.5-7b --batch 1 --remat full --moments 8bit
    python -m experiments.train.benchmark ours --model qwen2.5-7b --batch 4 --remat dots --no-scan-layers --mesh fsdp=2
    python -m experiments.train.benchmark transformers --model qwen2.5-7b --batch 4 --remat dots --mesh fsdp=2

Everything is measured on one GPU, and ours and transformers also on the GPUs of `--mesh`, among which the rows are
divided: transformers by PyTorch's FSDP2 (`torch_fsdp.py`), on an fsdp axis alone.

A process is one measurement, so that each has the whole memory; `all` starts one after the other. Every step is the
whole one: forward, backward, clipping, AdamW, with float32 master weights and moments and bfloat16 products, or those
of `--products`: ours of fp8, or transformers' by torchao, which is a package of its own. A row is one document of
random tokens. `ours` is the code of a run (`train.pretrain`), `plain` is `plain_step.py`, `transformers` is
`torch_step.py`. A step's time is the median over the ends of successive steps, the next one always on its way, as in a
run. Every line of output is JSON, but for the tables of `all` and `kernels`. A measurement that does not fit into
memory says so and ends with status 3.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode.benchmark import matmul_rate, say
from experiments.train import plain_step
from experiments.train.kernels import print_kernels
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.low_precision import Products
from qwen_jax.parallel.sharding import make_mesh, parse_mesh
from qwen_jax.published import published
from train.data.batch import Batch, place
from train.moments import MOMENTS
from train.observe.metrics import flops_per_token
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import init_state
from train.step import StepConfig, make_train_step

PEAK = 989e12  # Dense bfloat16 FLOP/s of an H100 or H200 (SXM) by the vendor's datasheet.
NO_MEMORY = 3
RATE = 1e-4
PROFILED = 3
REDUCE = "dtype in which FSDP sums gradients over GPUs; ours sums those of layers in bfloat16"

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]


def architecture(args: argparse.Namespace) -> ModelConfig:
    """What is trained: a published model, perhaps with fewer layers, or the dense one beside a mixture of experts.

    That one has a feed-forward layer as wide as the experts of a token are together, and so as many active parameters,
    but for the router.
    """
    model = published(args.model)
    if args.layers:
        model = dataclasses.replace(model, num_layers=args.layers, max_window_layers=args.layers)
    if args.dense and model.moe is not None:
        width = model.moe.num_experts_per_tok * model.moe.intermediate_size + model.moe.shared_intermediate_size
        model = dataclasses.replace(model, moe=None, intermediate_size=width)
    return model


def random_tokens(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    """int32 [batch, length], each of the vocabulary's ids equally likely."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def report(
    args: argparse.Namespace,
    what: str,
    seconds: float,
    matmul: float | None,
    model_flops: float | None = None,
    **more: Any,
) -> None:
    """The line of a measurement.

    Args:
      args: of the command line.
      what: was measured.
      seconds: of a step.
      matmul: bfloat16 FLOP/s of a large product in the same process, or None.
      model_flops: of one token; None for those of next-token training of all weights.
      **more: further entries.
    """
    rate, devices = args.batch * args.length / seconds, more.get("devices", 1)
    if model_flops is None:
        # Attention sees no further than a document.
        model_flops = flops_per_token(architecture(args), args.length // getattr(args, "documents", 1))
    flops = rate * model_flops
    say(
        what=what,
        model=args.model + (f", {args.layers} layers" if args.layers else "") + (", dense" if args.dense else ""),
        length=args.length,
        batch=args.batch,
        remat=args.remat,
        step_ms=seconds * 1e3,
        tokens_per_s=rate,
        **({"tokens_per_s_device": rate / devices} if devices > 1 else {}),
        tflop_per_s=flops / 1e12,
        mfu=flops / PEAK / devices,
        **({} if matmul is None else {"matmul_tflop_per_s": matmul / 1e12, "of_matmul": flops / matmul / devices}),
        **more,
    )


def named(what: str, args: argparse.Namespace) -> str:
    """What is measured, with the options that set it apart from the same on one GPU in bfloat16."""
    usual = {"products": "bfloat16", "moments": "float32", "mesh": ""}
    found = {name: getattr(args, name, value) for name, value in usual.items()}
    return ", ".join([what, *(found[name] for name in usual if found[name] != usual[name])])


def measure(args: argparse.Namespace, what: str, state: Any, step: Any, *inputs: Any, **more: Any) -> None:
    """Compiles a step that donates its state, times it, and reports.

    Args:
      args: of the command line.
      what: is measured.
      state: the first argument of the step.
      step: a jitted function (state, *inputs) -> (state, metrics).
      *inputs: on the device, such as a batch.
      **more: for `report`.
    """
    device = jax.devices()[0]
    start = time.perf_counter()
    lowered = step.lower(state, *inputs)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    memory = compiled.memory_analysis()
    old = jax.tree.leaves(state)
    # Of one device.
    size = sum(leaf.addressable_shards[0].data.nbytes for leaf in old)
    for _ in range(args.warmup):
        state, metrics = compiled(state, *inputs)
    jax.block_until_ready((state, metrics))
    # The buffers that went in are gone, and the program writes its result into them.
    donated = all(leaf.is_deleted() for leaf in old) and memory.alias_size_in_bytes >= size
    ends, waiting = [], None
    for _ in range(args.steps + 1):
        state, metrics = compiled(state, *inputs)
        if waiting is not None:
            ends.append(_end(waiting))
        waiting = metrics
    ends.append(_end(waiting))
    loss = float(metrics["loss"])
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    if args.profile:
        _profile(args, compiled, state, *inputs)
    del state, inputs, old, metrics, waiting
    report(
        args,
        what,
        float(np.median(np.diff(ends))),
        None if args.no_matmul else matmul_rate(),
        donated=donated,
        state_gb=size / 1e9,
        temporaries_gb=memory.temp_size_in_bytes / 1e9,
        peak_gb=peak / 1e9,
        trace_s=traced - start,
        compile_s=ready - traced,
        slowest_ms=float(np.max(np.diff(ends))) * 1e3,
        loss=loss,
        **more,
    )


def _end(metrics: Any) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()


def _profile(args: argparse.Namespace, compiled: Any, state: Any, *inputs: Any) -> None:
    """Leaves a trace of a few steps, and the program, whose names say what the kernels belong to."""
    folder = Path(args.profile)
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED):
            state, metrics = compiled(state, *inputs)
        jax.block_until_ready((state, metrics))
    (folder / "step.hlo.txt").write_text(compiled.as_text())
    (folder / "steps.json").write_text(json.dumps({"steps": PROFILED, "command": sys.argv[1:]}) + "\n")


def run_ours(args: argparse.Namespace) -> None:
    # The model says once which attention it took.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qwen_jax").setLevel(logging.INFO)
    axes = parse_mesh(args.mesh)
    model, mesh = architecture(args), make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    optimizer = OptimizerConfig(Schedule(10**6, RATE, schedule="wsd"), AdamW(moments=args.moments))
    more = {name: getattr(args, name) for name in ("accumulation", "loss_chunk", "scan_layers", "moments", "mesh")}
    objective = NextToken(model, PretrainConfig(loss_chunk=args.loss_chunk))
    config = StepConfig(
        products=args.products, remat=args.remat, accumulation=args.accumulation, scan_layers=args.scan_layers
    )
    tokens = random_tokens(model, args.batch, args.length)
    # Documents of equal length; one a row by default.
    index = np.broadcast_to(np.arange(args.length, dtype=np.int32), tokens.shape)
    document = -(-args.length // args.documents)
    batch = Batch(tokens, index % document, 1 + index // document, np.ones(tokens.shape, np.float32))
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, 0, mesh)
        more |= {"documents": args.documents, "devices": mesh.size}
        step = make_train_step(objective, optimizer, config, mesh)
        measure(args, named("ours", args), state, step, place(batch, mesh), **more)


def run_plain(args: argparse.Namespace) -> None:
    model = architecture(args)
    if model.moe is not None:
        raise InputError("The plain step has no experts; add --dense, or take another yardstick.")
    start, step = plain_step.make(model, RATE, args.remat, args.loss_chunk, args.unroll)
    tokens = jnp.asarray(random_tokens(model, args.batch, args.length + 1))
    more = {name: getattr(args, name) for name in ("loss_chunk", "unroll")}
    measure(args, "plain", start(jax.random.key(0)), step, tokens, **more)


def run_transformers(args: argparse.Namespace) -> None:
    from experiments.train import torch_step

    tokens, axes = random_tokens(architecture(args), args.batch, args.length + 1), parse_mesh(args.mesh)
    if any(size > 1 for name, size in axes.items() if name != "fsdp"):
        raise InputError(f"transformers has no other axis than fsdp, such as --mesh fsdp=2; got {args.mesh}.")
    args.compile = args.compile or ("layers" if axes else "model")
    if axes:
        from experiments.train import torch_fsdp

        seconds, matmul, more = torch_fsdp.measure(args, architecture(args), tokens, axes.get("fsdp", 1))
        more["mesh"] = args.mesh
    else:
        seconds, matmul, more = torch_step.measure(args, architecture(args), tokens)
    report(args, named("transformers", args), seconds, matmul, **more)


def run_all(args: argparse.Namespace) -> None:
    """Every try in a process of its own, as long as there is time; a table last."""
    begin, records = time.perf_counter(), []
    with Path(args.output).open("a", encoding="utf-8") as log:
        for attempt in args.tries:
            left = args.seconds - (time.perf_counter() - begin)
            if left < 30:
                record: dict[str, Any] = {"error": "no time left"}
            else:
                record = _attempt(attempt, args.options, min(left, args.each))
            record = {"try": attempt, **record}
            records.append(record)
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(json.dumps(record), flush=True)
    _print_table(records)


def _attempt(attempt: str, options: list[str], seconds: float) -> dict[str, Any]:
    """What a process said in its last line, or why it said nothing."""
    kind, model, settings = attempt.split("/")
    pairs = [f"--{setting.replace('_', '-')}" for setting in settings.split(",") if setting]
    command = [sys.executable, "-m", "experiments.train.benchmark", kind, "--model", model, *pairs, *options]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {seconds:.0f} s"}
    took = {"process_s": round(time.perf_counter() - begin, 1)}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode in (0, NO_MEMORY) and lines:
        attention = [line for line in done.stderr.splitlines() if line.startswith("attention on")]
        return {**lines[0], **lines[-1], **({"attention": attention[0]} if attention else {}), **took}
    return {"error": f"status {done.returncode}: " + "\n".join(done.stderr.splitlines()[-6:])[-800:], **took}


def _print_table(records: list[dict[str, Any]]) -> None:
    """The fastest of each kind and model, in tokens/s of a GPU; what it is to the fastest of the yardsticks."""
    best: dict[tuple[str, str], dict[str, Any]] = {}

    def rate_of(record: dict[str, Any]) -> float:
        return float(record.get("tokens_per_s_device", record["tokens_per_s"]))

    for record in records:
        key = record.get("model", ""), record.get("what", "")
        if "tokens_per_s" in record and (key not in best or rate_of(record) > rate_of(best[key])):
            best[key] = record
    columns = "model | | settings | tokens/s a GPU | step, ms | MFU | of matmul | peak, GB | to plain | to transformers"
    print(f"\n| {columns} | to torchao's fp8 | to its default |")
    print("|---" * 12 + "|")
    for (model, what), record in best.items():
        ratios = []
        # On a mesh beside yardsticks on the same one.
        mesh = f", {record['mesh']}" if record.get("mesh") else ""
        others = f"plain{mesh}", f"transformers{mesh}", f"transformers, fp8{mesh}", what.partition(",")[0]
        for yardstick in others:
            other = best.get((model, yardstick))
            ratios.append(f"{rate_of(record) / rate_of(other):.2f}" if other else "-")
        settings, rate = record["try"].split("/")[2], rate_of(record)
        print(
            f"| {model} | {what} | {settings} | {rate:,.0f} | {record['step_ms']:.1f} | {record['mfu']:.1%} | "
            f"{record.get('of_matmul', 0):.1%} | {record['peak_gb']:.1f} | {' | '.join(ratios)} |"
        )
    failed = [record for record in records if "error" in record]
    for record in failed:
        print(f"{record['try']}: {record['error'].splitlines()[-1]}")


def out_of_memory(error: Exception) -> bool:
    """Whether JAX or PyTorch failed for want of memory."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory", "Out of memory"))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("ours", "plain", "transformers"):
        command = commands.add_parser(name)
        command.add_argument("--model", default="qwen2.5-0.5b")
        command.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
        command.add_argument("--dense", action="store_true", help="beside a mixture: the dense one of equal activity")
        command.add_argument("--batch", type=int, default=8, help="rows in a step")
        command.add_argument("--length", type=int, default=4096, help="tokens in a row")
        command.add_argument("--loss-chunk", type=int, default=4096, help="tokens whose logits exist at one time")
        command.add_argument("--steps", type=int, default=10, help="timed steps")
        command.add_argument("--warmup", type=int, default=3, help="steps before them")
        command.add_argument("--no-matmul", action="store_true", help="do not measure the rate of a large product")
        default = "none" if name == "transformers" else "dots"
        command.add_argument("--remat", choices=("none", "dots", "full"), default=default)
        if name != "transformers":
            command.add_argument("--profile", metavar="DIR", help="leave a trace there")
        if name != "plain":
            choices = get_args(Products) if name == "ours" else ("bfloat16", "fp8")
            command.add_argument("--products", choices=choices, default="bfloat16", help="of the projections")
            command.add_argument(
                "--mesh", default="", metavar="AXIS=SIZE,...", help="such as fsdp=2; one device if empty"
            )
        if name == "ours":
            command.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
            command.add_argument("--documents", type=int, default=1, help="in a row")
            command.add_argument("--moments", choices=MOMENTS, default="float32", help="of AdamW")
            command.add_argument(
                "--no-scan-layers", dest="scan_layers", action="store_false", help="layers one after the other"
            )
        if name == "plain":
            command.add_argument("--unroll", type=int, default=1, help="layers in one pass of the scan")
        if name == "transformers":
            command.add_argument(
                "--compile", choices=("model", "layers", "none"), help="by default the model, on a mesh the layers"
            )
            command.add_argument("--reduce", choices=("bfloat16", "float32"), default="bfloat16", help=REDUCE)
            command.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    command = commands.add_parser("all", help="one process for each try")
    command.add_argument("tries", nargs="+", metavar="KIND/MODEL/OPTION=VALUE,...")
    command.add_argument("--seconds", type=float, default=1500, help="no try is begun after this time")
    command.add_argument("--each", type=float, default=240, help="seconds that one try may take")
    command.add_argument("--output", default="train.jsonl", help="file that takes the lines, at its end")
    command.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="given to every try; all that follows")
    command = commands.add_parser("kernels", help="device time of a trace by part of the model and by kernel")
    command.add_argument("folder", type=Path)
    command.add_argument("--top", type=int, default=25)
    args = parser.parse_args(argv)
    for attempt in getattr(args, "tries", ()):
        if attempt.count("/") != 2 or attempt.split("/")[0] not in ("ours", "plain", "transformers"):
            parser.error(
                f"expected KIND/MODEL/OPTION=VALUE,... such as plain/qwen2.5-7b/batch=4,remat=full; got {attempt!r}"
            )
    return args


def main() -> None:
    args = parse()
    if args.command == "all":
        return run_all(args)
    if args.command == "kernels":
        return print_kernels(args.folder, args.top)
    if args.command == "transformers":
        # JAX is not to take the card's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    elif "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # The masters and moments of 7B alone are 91 GB; the default is three quarters of the memory.
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    runs = {"ours": run_ours, "plain": run_plain, "transformers": run_transformers}
    try:
        if args.command != "transformers":
            say(jax=jax.__version__, device=jax.devices()[0].device_kind, date=time.strftime("%Y-%m-%d"))
        runs[args.command](args)
    except Exception as error:
        if not out_of_memory(error):
            raise
        say(what=args.command, model=args.model, batch=args.batch, remat=args.remat, error="out of memory")
        print(str(error)[:2000], file=sys.stderr)
        sys.exit(NO_MEMORY)


if __name__ == "__main__":
    main()
