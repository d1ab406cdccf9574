"""Plans of the published sizes: training steps compiled for pods, with their memory, traffic and minimum time.

    python -m experiments.plans.table             # compiles the rows without a result, and writes README.md's table
    python -m experiments.plans.table 7b-v5e-4x4  # compiles these rows again

Each row has a JSON file in results/. A compilation takes minutes and needs the TPU compiler: pip install '.[tpu]'.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.pretrain.qwen2_5 import turbo
from qwen_jax.config import ModelConfig
from qwen_jax.files import to_json
from qwen_jax.moe.dispatch import ROOM
from qwen_jax.published import published
from qwen_jax.remat import Remat
from train.config import RunConfig, Stage
from train.files import write_file
from train.optimizer import Schedule
from train.step import StepConfig

_HERE = Path(__file__).parent
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
GiB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      config: configuration of the run.
      topology: topology of a slice.
      stage: index of the stage, from 0.
      num_slices: number of slices.
    """

    config: RunConfig
    topology: str
    stage: int = 0
    num_slices: int = 1


def _run(
    model: str,
    rows: int,
    mesh: Mapping[str, int],
    remat: Remat = "full",
    accumulation: int = 1,
    length: int = 4096,
    rope_theta: float | None = None,
) -> RunConfig:
    """A run of one stage."""
    stage = Stage(Schedule(1000), length, rows, {"web": 1}, rope_theta, accumulation)
    step = StepConfig(remat=remat)
    return RunConfig("run", published(model), "tokenizer", {"web": "data"}, (stage,), mesh=mesh, step=step)


ROWS = {
    "7b-v5e-4x4": Row(_run("qwen2.5-7b", 12, {"fsdp": 4, "tensor": 4}), "v5e:4x4"),
    "7b-v6e-4x4": Row(_run("qwen2.5-7b", 32, {"data": 2, "fsdp": 8}), "v6e:4x4"),
    "7b-v6e-4x4-two-slices": Row(_run("qwen2.5-7b", 64, {"data": 2, "fsdp": 16}), "v6e:4x4", num_slices=2),
    "7b-262144-v5p-4x4x4": Row(turbo(), "v5p:4x4x4", stage=3),
    "32b-v5p-4x4x8": Row(_run("qwen2.5-32b", 1024, {"data": 4, "fsdp": 32}), "v5p:4x4x8"),
    "32b-v5p-8x8x8": Row(_run("qwen2.5-32b", 1024, {"data": 4, "fsdp": 128}), "v5p:8x8x8"),
    "72b-v5p-4x4x8": Row(_run("qwen2.5-72b", 1024, {"data": 2, "fsdp": 64}, accumulation=2), "v5p:4x4x8"),
    "57b-a14b-v5p-4x4x8": Row(_run("qwen2-57b-a14b", 256, {"fsdp": 16, "expert": 8}), "v5p:4x4x8"),
    "57b-a14b-262144-v5p-4x4x8": Row(
        _run("qwen2-57b-a14b", 16, {"fsdp": 16, "context": 4, "tensor": 2}, length=262_144, rope_theta=1e7), "v5p:4x4x8"
    ),
    "91b-a5b-256-experts-v5p-4x4x8": Row(_run("fine-91b-a4.9b", 256, {"fsdp": 16, "expert": 8}), "v5p:4x4x8"),
    "72b-v5p-8x8x8": Row(_run("qwen2.5-72b", 1024, {"data": 8, "fsdp": 64}), "v5p:8x8x8"),
}


def unexpected_gathers(plan: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """Finds all-gathers that are not one matrix of one layer, the head, keys or values of own rows, or small.

    Args:
      plan: the plan, as JSON.
      model: the architecture.

    Returns:
      Their shapes. A parameter of all layers together would be among them.
    """
    mesh, o, D, d = plan["mesh"], plan["options"], model.hidden_size, model.head_dim
    rows = o["batch_size"] // o["accumulation"] // math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    sizes = {
        D * model.num_heads * d,
        D * model.num_kv_heads * d,
        D * model.intermediate_size,
        D * model.vocab_size,
        rows * o["length"] * model.num_kv_heads * d,
    }
    if model.moe is not None:
        expert = model.moe.num_experts // mesh.get("expert", 1) * D * model.moe.intermediate_size
        sizes |= {expert, 2 * expert, D * model.moe.shared_intermediate_size}
        # One number for each row that is sent to an expert, or that there is room for, on all devices.
        chosen = rows * o["length"] * model.moe.num_experts_per_tok * mesh.get("expert", 1) * mesh.get("tensor", 1)
        sizes |= {chosen, math.ceil(ROOM * chosen)}
    allowed = {size // mesh.get("tensor", 1) for size in sizes}
    if model.moe is not None:
        allowed.add(D * model.moe.num_experts)  # The router is not split over a tensor axis.
    found = {shape: math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2]))) for shape in plan["gathers"]}
    small = max(D, model.intermediate_size)  # A norm or a bias.
    return [s for s, size in found.items() if not s.startswith("s32") and size > small and size not in allowed]


def _compile(name: str) -> dict[str, Any]:
    # Imported late, after `main` has set the environment of JAX.
    from train.plan.of_run import stages_of
    from train.plan.stage import plan_stage
    from train.plan.topology import target

    row = ROWS[name]
    plan = dataclasses.asdict(plan_stage(stages_of(row.config)[row.stage], target(row.topology, row.num_slices)))
    return {
        "row": name,
        "parameters": row.config.model.num_params()["total"],
        "plan": plan,
        "unexpected_gathers": unexpected_gathers(plan, row.config.model),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }


def line(result: Mapping[str, Any]) -> str:
    """Formats a row of the table in Markdown."""
    p, o = result["plan"], result["plan"]["options"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in p["mesh"].items())
    where = p["topology"] if p["num_slices"] == 1 else f"{p['num_slices']} slices of {p['topology']}"
    rows = f"{o['batch_size']} x {o['length']:,}" + (f" in {o['accumulation']} parts" if o["accumulation"] > 1 else "")
    fits = f"{p['hbm_bytes'] / GiB:.1f} of {p['hbm_limit_bytes'] / GiB:.1f}" + (
        "" if p["fits"] else ": **does not fit**"
    )
    sent = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in p["collective_bytes"].items() if size >= 5e7)
    sent += f"; {p['dcn_bytes'] / 1e9:.2f} leave the slice" if p["dcn_bytes"] else ""
    largest = next(iter(p["gathers"]), "none")
    cells = (
        f"{result['parameters'] / 1e9:.1f}B", where, mesh, rows, o["remat"], fits, sent,
        f"{largest}: {p['gathered_bytes'] / 1e9:.2f}" + " **unexpected**" * bool(result["unexpected_gathers"]),
        f"{p['estimated_step_seconds']:.2f}", f"{p['mfu_bound']:.0%}", f"{p['compile_seconds']:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _not_run(row: Row) -> str:
    """Formats a row of the table that has no result yet."""
    stage, mesh = row.config.stages[row.stage], row.config.mesh_axes(row.stage)
    cells = (
        f"{row.config.model.num_params()['total'] / 1e9:.1f}B", row.topology,
        ", ".join(f"{axis}={size}" for axis, size in mesh.items()), f"{stage.batch_size} x {stage.length:,}",
        row.config.step_config(row.stage).remat, "not run yet", *[""] * 5,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _row_of(name: str) -> str:
    file = result_file(name)
    return line(json.loads(file.read_text())) if file.exists() else _not_run(ROWS[name])


def _write_table() -> None:
    """Writes the table of all rows into README.md, between its two marks."""
    heads = (
        "parameters", "compiled for", "mesh", "rows x tokens", "remat", "GiB a device", "GB sent by a device in a step",
        "largest all-gather, GB", "seconds a step, at least", "MFU, at most", "seconds to compile",
    )  # fmt: skip
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *map(_row_of, ROWS)]
    readme = _HERE / "README.md"
    before, _, rest = readme.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    readme.write_text(before + "<!-- table -->\n" + "\n".join(rows) + "\n<!-- end -->" + after)


def result_file(name: str) -> Path:
    return _HERE / "results" / f"{name}.json"


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(description="Compile steps for pods and write the table.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default those without result")
    chosen = parser.parse_args().rows or [name for name in ROWS if not result_file(name).exists()]
    if unknown := set(chosen) - set(ROWS):
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in chosen:
        print(f"{name} ...", flush=True)
        result = _compile(name)
        print(line(result), flush=True)
        result_file(name).parent.mkdir(exist_ok=True)
        write_file(result_file(name), (to_json(result, indent=1) + "\n").encode())
    _write_table()


if __name__ == "__main__":
    main()
