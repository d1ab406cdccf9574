"""Decode speed on a tensor axis at true shapes, beside the floor of bytes and the bytes of collectives.

    python -m experiments.decode.tensor --model qwen2.5-7b --devices 1,2
    python -m experiments.decode.tensor --model qwen2.5-72b --devices 4 --batch 1,64 --json
    python -m experiments.decode.tensor --model qwen2.5-72b --devices 2 --codes int4
    python -m experiments.decode.tensor --model qwen2.5-7b --devices 1 --batch 1 --codes int4 --one-row graphs
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 python -m experiments.decode.tensor --model tiny --prompt 16 --steps 4

Weights are random and made on the devices. Each case times the engine's own compiled decode loop, greedy and with the
sampling that Qwen2.5 recommends (temperature 0.7, top-k 20, top-p 0.8, repetition penalty 1.05). The floor is what one
device cannot help reading in a step, at the copy bandwidth of one device, measured in the same process: its part of
every weight but the embedding table, and of the live cache. Bytes of collectives are those that one device sends in a
step, from the compiled program. `--one-row` says how one row on one device is decoded: by itself (`auto`), by kernels
that are launched one by one and overlap, by the same kernels in CUDA graphs, by these kernels with integer codes that
are converted to bfloat16 and not multiplied as integers (`converted`), or by the model's general path.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator

import jax
import numpy as np

from experiments.decode.benchmark import (
    RECOMMENDED,
    SCHEMES,
    Loop,
    copy_bandwidth,
    median_seconds,
    random_params,
    step_bytes,
    with_codes,
)
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams, one_row
from qwen_jax.inference.programs import StaticArgs
from qwen_jax.inference.sampling import SamplingValues
from qwen_jax.kernels.matmul import quantized_gpu_digits
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from train.plan.programs import collectives


@dataclasses.dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
      model, devices, batch, sampling: which.
      step_ms: median time of a decode step.
      tokens_per_s: of the whole batch.
      floor_ms: the floor of bytes.
      of_floor: the share of it that is reached.
      collective_kb: kilobytes that one device sends in a step.
      collectives: how many of them a step has.
    """

    model: str
    devices: int
    batch: int
    sampling: str
    step_ms: float
    tokens_per_s: float
    floor_ms: float
    of_floor: float
    collective_kb: float
    collectives: float


def measure(
    config: ModelConfig, name: str, devices: int, batches: list[int], prompt: int, steps: int, bandwidth: float
) -> Iterator[Result]:
    """Times all cases of one number of devices.

    Args:
      config: the architecture, dense.
      name: of the model.
      devices: size of the tensor axis.
      batches: rows.
      prompt: tokens of each prompt.
      steps: tokens that are decoded after it.
      bandwidth: bytes that one device reads in a second.
    """
    mesh = make_mesh({"tensor": devices}, jax.devices()[:devices])
    engine = Engine(config, random_params(config, mesh), mesh, dtype="bfloat16")
    slots = -(-(prompt + steps) // 128) * 128
    for batch in batches:
        floor = step_bytes(engine.params, config, engine.sharding, batch, prompt + steps // 2) / bandwidth
        tokens = np.random.default_rng(0).integers(0, engine.vocab_limit, (batch, prompt), dtype=np.int32)
        with jax.set_mesh(mesh):
            rows = jax.NamedSharding(mesh, engine.sharding.rows)
            tokens_BT = jax.device_put(tokens, jax.NamedSharding(mesh, engine.sharding.tokens))
            lengths, seeds = jax.device_put((np.full(batch, prompt, np.int32), np.arange(batch, dtype=np.uint32)), rows)
            for how, sampling in (("greedy", SamplingParams()), ("sampled", RECOMMENDED)):
                static = StaticArgs(config, engine.sharding, engine.options, sampling.mode, slots, engine.vocab_limit)
                loop = Loop(engine, static, SamplingValues.of(sampling), (tokens_BT, lengths, seeds), prompt, steps)
                seconds = median_seconds(loop) / steps
                found = collectives(loop.compiled.as_text(), devices) if devices > 1 else []
                yield Result(
                    *(name, devices, batch, how, 1e3 * seconds, batch / seconds, 1e3 * floor, floor / seconds),
                    sum(c.bytes * c.times for c in found) / steps / 1e3,
                    sum(c.times for c in found) / steps,
                )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Runs the command. Raises InputError for a model with experts or too few devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b", help="a published dense model")
    parser.add_argument(
        "--devices", type=_numbers, help="sizes of the tensor axis, such as 1,2; by default all devices"
    )
    parser.add_argument("--batch", type=_numbers, default=[1, 64], help="rows, by default 1,64")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=128, help="tokens that are decoded")
    parser.add_argument("--codes", choices=sorted(SCHEMES), help="quantise the projections")
    parser.add_argument("--one-row", choices=("auto", "overlap", "graphs", "converted", "general"), default="auto")
    parser.add_argument("--bandwidth", type=float, help="TB/s that a device reads; by default it is measured")
    parser.add_argument("--json", action="store_true", help="one JSON object for each case")
    args = parser.parse_args(argv)
    config = published(args.model)
    if config.moe is not None:
        raise InputError(
            f"{args.model} has experts; the floor of bytes here is that of dense models. Choose a dense one."
        )
    if args.one_row in ("graphs", "overlap"):
        options = one_row.COMPILER_OPTIONS if args.one_row == "overlap" else None
        one_row.compiler_options = lambda *_: options
    elif args.one_row == "converted":
        quantized_gpu_digits.ENABLED = False
    elif args.one_row == "general":
        one_row.supports = lambda *_: False
    config = with_codes(config, args.codes)
    bandwidth = 1e12 * args.bandwidth if args.bandwidth else copy_bandwidth()
    name = " ".join([args.model, *filter(None, [args.codes, args.one_row if args.one_row != "auto" else None])])
    if not args.json:
        print(f"{jax.devices()[0].device_kind}, {bandwidth / 1e12:.3g} TB/s, jax {jax.__version__}\n")
        heads = ["model", "devices", "batch", "sampling", "step, ms", "tokens/s", "floor, ms", "of the floor"]
        heads += ["sent, KB", "collectives"]
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for devices in args.devices or [jax.device_count()]:
        for r in measure(config, name, devices, args.batch, args.prompt, args.steps, bandwidth):
            if args.json:
                print(json.dumps({**dataclasses.asdict(r), "bandwidth_tb_per_s": bandwidth / 1e12}), flush=True)
                continue
            numbers = f"{r.step_ms:.3f} | {r.tokens_per_s:,.0f} | {r.floor_ms:.3f} | {r.of_floor:.0%}"
            sent = f"{r.collective_kb:,.1f} | {r.collectives:.1f}"
            print(f"| {r.model} | {r.devices} | {r.batch} | {r.sampling} | {numbers} | {sent} |", flush=True)


if __name__ == "__main__":
    main()
