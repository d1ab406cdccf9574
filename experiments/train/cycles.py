"""What the TPU compiler expects a layer to take beside our kernels and the collectives.

    python -m experiments.train.cycles
    python -m experiments.train.cycles --model fine-91b-a4.9b --topology v6e:8x16 --mesh fsdp=16 expert=8
    python -m experiments.train.cycles --model qwen2.5-7b --topology v5e:4x4 --mesh fsdp=16 --rows 32 --products int8

Compiles a training step of two layers for a pod that need not be there, and adds up the cycles that the compiler writes
beside its instructions (`estimated_cycles`), one JSON line for each loop. Kernels of ours and collectives have no such
number. What runs only while experts are far from balanced is left out. Needs the TPU compiler: pip install '.[tpu]'.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qwen_jax.kernels.matmul.low_precision import Products
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.published import published
from train.data.batch import Batch
from train.optimizer import OptimizerConfig, Schedule
from train.plan.programs import computations
from train.plan.topology import mesh_of, target
from train.pretrain import NextToken
from train.state import abstract_state
from train.step import StepConfig, make_train_step

_LARGEST = 6


def program(
    model: str, topology: str, axes: dict[str, int], rows: int, length: int, products: Products = "bfloat16"
) -> str:
    """Text of the optimised module of a step of two layers, bfloat16, all recomputed."""
    two = dataclasses.replace(published(model), num_layers=2)
    optimizer = OptimizerConfig(Schedule(1000))
    mesh = mesh_of(target(topology), axes)
    ints, floats = (
        jax.ShapeDtypeStruct((rows, length), dtype, sharding=NamedSharding(mesh, Sharding.tokens))
        for dtype in (jnp.int32, jnp.float32)
    )
    state, batch = abstract_state(two, optimizer, mesh), Batch(ints, ints, ints, floats)
    with jax.set_mesh(mesh):
        step = make_train_step(NextToken(two), optimizer, StepConfig(remat="full", products=products), mesh)
        traced = step.trace(state, batch)  # type: ignore[attr-defined]
        text: str = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    return text


def loops(hlo: str, least: float = 1e6) -> Iterator[dict[str, Any]]:
    """Of each loop's body: pass, cycles, and the largest instructions.

    Args:
      hlo: text of the optimised module.
      least: cycles below which a loop is left out.
    """
    entry, bodies = computations(hlo)
    reached: list[str] = []

    def visit(name: str) -> None:
        for line in bodies.get(name, ()):
            if match := re.search(r"body=%?([\w.\-]+)", line):
                reached.append(match[1])
                visit(match[1])

    visit(entry)
    for name in reached:
        found = [
            (int(match[1]), line.strip())
            for line in bodies[name]
            if (match := re.search(r'estimated_cycles":"(\d+)"', line))
        ]
        total = sum(cycles for cycles, _ in found)
        if total < least:
            continue
        text = "\n".join(bodies[name])
        yield {
            "loop": "layers" if "/moe/" in text or "/mlp/" in text else "loss" if "cross_entropy" in text else name,
            # Either has something of the other: a constant, or what is made again.
            "pass": "backward" if text.count("transpose(jvp") > text.count("/jvp(") else "forward",
            "million_cycles": round(total / 1e6, 1),
            "largest": [
                [round(n / 1e6, 2), re.sub(r"\{.*?\}", "", line)[:90]]
                for n, line in sorted(found)[: -_LARGEST - 1 : -1]
            ],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2-57b-a14b")
    parser.add_argument("--topology", default="v5p:4x4x8")
    parser.add_argument("--mesh", nargs="+", default=["fsdp=16", "expert=8"], metavar="AXIS=SIZE")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--products", choices=get_args(Products), default="bfloat16")
    args = parser.parse_args()
    axes = {axis: int(size) for axis, size in (part.split("=") for part in args.mesh)}
    for found in loops(program(args.model, args.topology, axes, args.rows, args.length, args.products)):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
