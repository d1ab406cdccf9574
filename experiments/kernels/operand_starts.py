"""Checks that kernels get arrays that begin at a multiple of 256 bytes, in programs compiled for an H200.

    python -m experiments.kernels.operand_starts
    python -m experiments.kernels.operand_starts --programs dpo grpo --model qwen2.5-7b

XLA for GPUs hands a kernel a slice of an array in place of a copy, if it is contiguous, and lets a kernel write into
one. Kernels of Mosaic GPU refuse arrays that begin elsewhere than at a multiple of 256 bytes: the program then fails
when it is run, on a card alone. Nothing is run here. It needs `jax[cuda13]` and no GPU. Prints a JSON line for each
program; the status is 1 if one of them has such a slice.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from experiments.long_context.compile import CHUNK, PATTERNS, compile_programs
from experiments.train.fp8_products import abstract_rows, add_sizes, compile_for_gpu, described_mesh
from qwen_jax.config import ModelConfig
from qwen_jax.lora import LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import abstract_params, param_specs
from qwen_jax.published import published
from train.data.pairs import PairBatch
from train.data.rollouts import RolloutBatch
from train.dpo import Dpo, DpoConfig, make_reference_pass
from train.grpo import Grpo, make_log_prob_pass
from train.optimizer import OptimizerConfig, Schedule
from train.policy import GrpoConfig
from train.pretrain import NextToken, PretrainConfig
from train.sft import Sft
from train.state import abstract_state
from train.step import StepConfig, make_train_step

ALIGNMENT = 256
_COMPUTATION = re.compile(r"^(?:ENTRY )?%\S+ \(.*\{$")
_ARRAY = re.compile(r"%(\S+) = ([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)[^}]*\})? ([a-z-]+)\((.*)")
_KERNEL = 'custom_call_target="mosaic_gpu'


def slices_off(text: str) -> list[str]:
    """Slices that a kernel reads or writes in place, and that may begin elsewhere than at a multiple of 256 bytes.

    Args:
      text: a program compiled for a GPU.

    Returns:
      A sentence for each.
    """
    return [f"{kernel}: {found}" for kernel, lines in _kernels(text) for found in _off(lines)]


def kernels_with_slices(text: str) -> int:
    """How many kernels of a compiled program read or write a slice in place."""
    return sum(any(" slice(" in x or "dynamic-" in x.partition("(")[0] for x in lines) for _, lines in _kernels(text))


def _kernels(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of each computation that is one kernel with the slices around it."""
    lines: list[str] = []
    name = ""
    for line in text.splitlines():
        if _COMPUTATION.match(line):
            name, lines = line.split(" ")[0].lstrip("%"), []
        elif line == "}":
            # The others are whole programs, bodies of loops and branches, whose slices are copies.
            if name.startswith(("dynamic-slice-fusion", "address-computation")) and any(_KERNEL in x for x in lines):
                yield name, lines
        else:
            lines.append(line)


def _off(lines: list[str]) -> Iterator[str]:
    arrays: dict[str, tuple[list[int], list[int], str]] = {}
    constants: dict[str, int] = {}
    for line in lines:
        if (match := _ARRAY.search(line)) is None:
            continue
        name, dtype, sizes, order, operation, rest = match.groups()
        shape = [int(size) for size in sizes.split(",") if size]
        minor_to_major = [int(axis) for axis in (order or "").split(",") if axis]
        strides, stride = [0] * len(shape), _bytes(dtype)
        for axis in minor_to_major:
            strides[axis], stride = stride, stride * shape[axis]
        arrays[name] = shape, strides, dtype
        operands = re.findall(r"%([^\s,()]+)", rest.partition(")")[0])
        if operation == "constant" and (number := re.match(r"(-?\d+)\)", rest)):
            constants[name] = int(number[1])
        elif operation == "slice":
            starts = [int(start) for start in re.findall(r"\[(\d+):", rest)]
            offset = sum(a * b for a, b in zip(starts, arrays[operands[0]][1], strict=True))
            if offset % ALIGNMENT:
                yield f"{name} begins {offset} bytes from the start of {dtype}{arrays[operands[0]][0]}"
        elif operation in ("dynamic-slice", "dynamic-update-slice"):
            update = operation == "dynamic-update-slice"
            whole, strides, _ = arrays[operands[0]]
            part = arrays[operands[1]][0] if update else shape
            indices = operands[2 if update else 1 :]
            steps = [
                stride * constants.get(index, 1)
                for index, size, all_of_it, stride in zip(indices, part, whole, strides, strict=True)
                if size != all_of_it
            ]
            if math.gcd(ALIGNMENT, *steps) != ALIGNMENT:
                yield f"{name}, {part} of {dtype}{whole}, may begin at a multiple of {math.gcd(*steps)} bytes"


def _bytes(dtype: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return max(1, bits // 8)


def _train(objective: Any, batch: Callable[[Mesh], Any], **settings: Any) -> Callable[[Mesh], list[Any]]:
    """Compiles a training step, with LoRA over bfloat16 weights if `settings` have it."""

    def compiled(mesh: Mesh) -> list[Any]:
        config, optimizer, model = StepConfig(**settings), OptimizerConfig(Schedule(10)), objective.model
        frozen = None if config.lora is None else _weights(model, mesh)
        state = abstract_state(model, optimizer, mesh, config.lora, frozen)
        step = make_train_step(objective, optimizer, config, mesh)
        return [compile_for_gpu(step, mesh, state, batch(mesh), frozen)]

    return compiled


def _forward(program: Callable[[Mesh], Any], model: ModelConfig, batch: Callable[[Mesh], Any]) -> Any:
    return lambda mesh: [compile_for_gpu(program(mesh), mesh, _weights(model, mesh), batch(mesh))]


def _prefill(model: ModelConfig, pattern: str) -> Callable[[Mesh], list[Any]]:
    return lambda mesh: compile_programs(model, mesh, 4 * CHUNK, pattern)[0]


def _weights(model: ModelConfig, mesh: Mesh) -> Any:
    """bfloat16 weights without values, in the layout of training."""
    sharding = Sharding.for_training(model, mesh)
    shapes = abstract_params(model, sharding, Options(), jnp.bfloat16)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        param_specs(model, sharding, Options()),
    )


def programs(model: ModelConfig, rows: int, length: int) -> dict[str, Callable[[Mesh], list[Any]]]:
    """What compiles the programs of a name for a mesh.

    Args:
      model: the architecture.
      rows, length: of a batch.
    """

    def plain(mesh: Mesh) -> Any:
        return abstract_rows(rows, length, mesh)

    def pairs(mesh: Mesh) -> Any:
        return PairBatch(plain(mesh), *[plain(mesh).loss_weights] * 2)

    def rollouts(mesh: Mesh) -> Any:
        return RolloutBatch(plain(mesh), *[plain(mesh).loss_weights] * 5)

    token, sft, dpo = NextToken(model, PretrainConfig()), Sft(model), Dpo(model, DpoConfig())
    grpo = Grpo(model, GrpoConfig(kl_weight=0.01))
    found: dict[str, Callable[[Mesh], list[Any]]] = {
        "pretrain": _train(token, plain),
        "sft-lora": _train(sft, plain, lora=LoRA()),
        "sft-lora-dropout": _train(sft, plain, lora=LoRA(dropout=0.1)),
        "dpo": _train(dpo, pairs),
        "dpo-lora": _train(dpo, pairs, lora=LoRA()),
        "dpo-reference": _forward(lambda mesh: make_reference_pass(dpo, StepConfig(), mesh), model, pairs),
        "grpo": _train(grpo, rollouts),
        "grpo-lora": _train(grpo, rollouts, lora=LoRA()),
        "grpo-log-probs": _forward(lambda mesh: make_log_prob_pass(grpo, StepConfig(), mesh), model, rollouts),
    }
    unrolled = {
        f"{name}-unrolled": _train(objective, batch, scan_layers=False, remat=remat)
        for name, objective, batch, remat in (("dpo", dpo, pairs, "full"), ("grpo", grpo, rollouts, "none"))
    }
    accumulated = {
        f"{name}-accumulated": _train(objective, batch, accumulation=2)
        for name, objective, batch in (("dpo", dpo, pairs), ("grpo", grpo, rollouts))
    }
    return found | unrolled | accumulated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--fsdp", type=int, default=1, help="GPUs")
    parser.add_argument("--long", default="qwen2.5-7b-instruct-1m", help="model whose programs read long prompts")
    parser.add_argument("--programs", nargs="+", help="all by default")
    args = parser.parse_args()
    model = dataclasses.replace(published(args.model), num_layers=args.layers, max_window_layers=args.layers)
    found = programs(model, args.batch, args.length)
    found |= {f"prefill-{pattern}": _prefill(published(args.long), pattern) for pattern in PATTERNS}
    names = args.programs or list(found)
    if unknown := [name for name in names if name not in found]:
        parser.error(f"expected programs of {', '.join(found)}; got {', '.join(unknown)}")
    wrong = 0
    for name in names:
        start = time.perf_counter()
        mesh = described_mesh(fsdp=1 if name.startswith("prefill") else args.fsdp)
        texts = [str(compiled.as_text()) for compiled in found[name](mesh)]
        off = [line for text in texts for line in slices_off(text)]
        wrong += bool(off)
        kernels, slices = sum(text.count(_KERNEL) for text in texts), sum(map(kernels_with_slices, texts))
        line = {"program": name, "fsdp": args.fsdp, "model": args.long if name.startswith("prefill") else args.model}
        line |= {"kernels": kernels, "of_slices": slices, "off": off, "jax": jax.__version__}
        print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
