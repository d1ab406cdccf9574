"""Trains a small model on every mesh layout of the devices that there are, and compares the losses with one device.

    python -m experiments.parallel.check                      # all devices; exits with status 1 where a layout differs
    python -m experiments.parallel.check --devices 2 --steps 8 --dtype bfloat16 --json
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python -m experiments.parallel.check --size tiny --dtype float32

Each layout trains a dense and an MoE model for some steps on the same packed documents, from the same weights. The
result is the largest relative difference of a step's loss from the loss on one device. In bfloat16 the layouts round
differently, so that the losses drift apart slowly; a layout that computes something else is off by far more than the
tolerance.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from qwen_jax.config import ModelConfig, MoE
from qwen_jax.moe.exchange import ExpertExchange
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from train.data.batch import Batch, place
from train.data.packing import pack
from train.moe import MoETraining
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import init_state
from train.step import StepConfig, make_train_step

TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, whether its context axis uses ring attention, and the exchange of its expert axis."""

    axes: Mapping[str, int]
    ring: bool = False
    exchange: ExpertExchange = "auto"

    def __str__(self) -> str:
        axes = ",".join(f"{axis}={size}" for axis, size in self.axes.items())
        return axes + (" ring" if self.ring else "") + (f" {self.exchange}" if self.exchange != "auto" else "")


def layouts(devices: int, moe: bool) -> Iterator[Layout]:
    """Each axis alone over all devices; from four devices on, pairs of axes too."""
    for axis in ("data", "fsdp", "tensor", "context"):
        yield Layout({axis: devices})
    yield Layout({"context": devices}, ring=True)
    if moe:
        yield Layout({"expert": devices}, exchange="rows")
        yield Layout({"expert": devices}, exchange="gathered")
    if devices % 2 == 0 and devices >= 4:
        half = devices // 2
        yield Layout({"fsdp": half, "tensor": 2})
        yield Layout({"data": half, "context": 2}, ring=True)
        if moe:
            yield Layout({"expert": half, "fsdp": 2})
            yield Layout({"expert": 2, "tensor": half})


def architecture(size: str, moe: bool) -> ModelConfig:
    """A model that the kernels of GPUs support, or a tiny one for CPUs."""
    if size == "tiny":
        model = dataclasses.replace(published("tiny"), num_heads=8, num_kv_heads=4)
        experts = MoE(8, 2, 64, 64)
    else:
        model = ModelConfig(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1536,
            num_layers=4,
            num_heads=8,
            num_kv_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
            rope_theta=1e4,
            eos_token_ids=(0,),
        )
        experts = MoE(8, 2, 512, 512)
    return dataclasses.replace(model, moe=experts) if moe else model


def batches(model: ModelConfig, steps: int, rows: int, length: int) -> list[Batch]:
    """Packed documents that can be learned: counting, from anywhere, with one of three strides."""
    rng = np.random.default_rng(0)
    found: list[Batch] = []
    for _ in range(steps):
        lengths = rng.integers(length // 8, length, 4 * rows)
        documents = [
            ((rng.integers(model.vocab_size) + rng.integers(1, 4) * np.arange(n)) % model.vocab_size).tolist()
            for n in lengths
        ]
        packed = pack(documents, length)
        found.append(jax.tree.map(lambda x: x[:rows], packed))
    return found


def losses(model: ModelConfig, layout: Layout, steps: int, dtype: str, rows: int, length: int) -> list[float]:
    """The loss of each step on a layout."""
    count = int(np.prod(list(layout.axes.values()))) if layout.axes else 1
    mesh = make_mesh(layout.axes, jax.devices()[:count])
    optimizer = OptimizerConfig(Schedule(steps, 1e-3))
    config = StepConfig(dtype=dtype, remat="none", accumulation=2, ring=layout.ring)  # type: ignore[arg-type]
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, 0, mesh)
        objective = NextToken(model, PretrainConfig(moe=MoETraining(expert_exchange=layout.exchange)))
        step = make_train_step(objective, optimizer, config, mesh)
        found = []
        for batch in batches(model, steps, rows, length):
            state, metrics = step(state, place(batch, mesh))
            # Each step is waited for: fake CPU devices can deadlock with many programs in their queues.
            found.append(float(jax.block_until_ready(metrics)["loss"]))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=0, help="how many; by default all")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative difference of a loss")
    parser.add_argument("--json", action="store_true", help="one JSON object a layout")
    args = parser.parse_args(argv)
    count = args.devices or jax.device_count()
    if not 2 <= count <= jax.device_count():
        parser.error(f"expected 2 to {jax.device_count()} devices, got {count}")
    rows, length = 4 * count, (512 if args.size == "small" else 64)
    if not args.json:
        kind = jax.devices()[0].device_kind
        print(f"{count} x {kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}, {args.steps} steps, {args.dtype}")
    worst = 0.0
    for moe in (False, True):
        model = architecture(args.size, moe)
        settings = args.steps, args.dtype, rows, length
        single = losses(model, Layout({}), *settings)
        for layout in layouts(count, moe):
            found = losses(model, layout, *settings)
            difference = max(abs(a - b) / abs(b) for a, b in zip(found, single, strict=True))
            # A loss that is not a number is as wrong as can be.
            difference = difference if np.isfinite(difference) else float("inf")
            worst = max(worst, difference)
            record = {
                "model": "moe" if moe else "dense",
                "layout": str(layout),
                "relative_difference": difference if np.isfinite(difference) else None,
                "first_loss": single[0],
                "last_loss": single[-1],
                "passed": difference < args.tolerance,
            }
            if args.json:
                print(json.dumps(record), flush=True)
            else:
                verdict = "ok" if record["passed"] else "DIFFERS"
                print(f"{record['model']:6s} {layout!s:24s} {difference:.2e}  {verdict}", flush=True)
    return 0 if worst < args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
