"""What GPUs compute while tokens travel between them, as compiled for GPUs that need not be there.

    python -m experiments.moe.overlap --target h200.txtpb --devices 2 4

Compiles the forward and backward pass of one layer of Qwen1.5-MoE-A2.7B (`experiments.moe.exchange`), and lists for
each exchange of at least a megabyte the matrix products between its start and its end in the order in which the program
runs, one JSON line each. What comes in between can run at the same time; whether it does, only a profile on GPUs tells.
Needs jax with its CUDA plugin, and a description of the GPU: a file of xla/backends/gpu/target_config/specs in XLA's
repository, with a line `runtime_version { major: 13 minor: 0 }` for CUDA 13.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from experiments.moe.exchange import layer_step, size_of
from qwen_jax import platform
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import AXES, Sharding

_EXCHANGES = ("all-gather", "all-to-all", "ragged-all-to-all")
_LINE = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(?:bf16|f16|f32|s32)\[([\d,]+)\]")


def meanwhile(hlo: str, least: int = 2**19) -> Iterator[dict[str, Any]]:
    """For each large exchange of the entry computation, the products between its start and its end.

    Args:
      hlo: text of the optimised module, in the order in which it runs.
      least: elements of an array below which an exchange is left out.
    """
    under_way: dict[str, dict[str, Any]] = {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        name, shape, kind, rest = match.groups()
        where = re.search(r'op_name="(.*?)"', rest)
        source = where[1] if where else ""
        if kind.endswith("-start") and kind.removesuffix("-start") in _EXCHANGES:
            arrays = [math.prod(map(int, dims.split(","))) for dims in _SHAPE.findall(shape)]
            if max(arrays, default=0) >= least:
                direction = "backward" if "transpose" in source else "forward"
                under_way[name] = {"exchange": kind.removesuffix("-start"), "pass": direction, "products": []}
        elif kind.endswith("-done") and (begun := re.search(r"%?([\w.\-]+-start[\w.\-]*)", rest)):
            if begun[1] in under_way:
                yield under_way.pop(begun[1])
        elif kind not in ("fusion", "custom-call", "while"):
            continue
        elif product := re.search(r"([\w,\->]+)\)*/dot_general$|(grouped_\w+)/", source):
            for exchange in under_way.values():
                exchange["products"].append(product[1] or product[2])


def program(target: str, devices: int, exchange: Any) -> str:
    """Text of the optimised module of a layer on an expert axis.

    Args:
      target: text of the description of the GPU.
      devices: size of the axis.
      exchange: see `qwen_jax.options.Options`.
    """
    from jax.experimental import topologies

    where = topologies.get_topology_desc("", "cuda", target_config=target, topology=f"1x1x{devices}")
    shape = [devices if axis == "expert" else 1 for axis in AXES]
    mesh = Mesh(np.array(where.devices).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    size = size_of("a2.7b", layers=1)
    sharding = Sharding.for_training(size.model, mesh)
    # The kernels for Hopper ask for GPUs that are there.
    platform.on_hopper = lambda: True
    with jax.set_mesh(mesh):
        weights, step = layer_step(size.model, sharding, Options(dtype=size.dtype, expert_exchange=exchange), True)
        array = lambda shape, dtype, spec: jax.ShapeDtypeStruct(  # noqa: E731
            shape, dtype, sharding=NamedSharding(mesh, spec)
        )
        x = array((size.rows * devices, size.length, size.model.hidden_size), size.dtype, sharding.hidden)
        norm, valid = array(x.shape[2:], "float32", sharding.norm), array(x.shape[:2], bool, sharding.tokens)
        lowered = step.trace(weights, norm, x, valid, x).lower(lowering_platforms=("cuda",))
        # Without a GPU nothing can be timed for a choice between kernels.
        text: str = lowered.compile({"xla_gpu_autotune_level": 0}).as_text()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="description of the GPU")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--exchange", choices=("rows", "gathered"), default="gathered")
    args = parser.parse_args()
    for devices in args.devices:
        for found in meanwhile(program(args.target.read_text(), devices, args.exchange)):
            print(json.dumps({"devices": devices, **found}), flush=True)


if __name__ == "__main__":
    main()
