"""`qwen-jax plan`: compiles the training step of a run for chips that need not be present."""

import dataclasses
import os
import sys
from typing import Annotated

import tyro

from qwen_jax.cli.common import sibling


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile the training step of each kind of stage of a run for given chips, and report what it needs: memory on
    each chip, FLOPs, bytes over the network, and a lower bound of the step time. TPUs need not be present, only their
    compiler (pip install 'qwen-jax[tpu]'). Nothing is run. The exit status is 1 if a stage does not fit.

    Example: qwen-jax plan --config experiments/pretrain/qwen2_5.py --topology v5p:4x4x4 --mesh fsdp=16,tensor=4
    """

    config: Annotated[str, tyro.conf.arg(metavar="FILE.py[:function]")]
    """Python file with a function that returns the RunConfig, by default `config` or the only one."""
    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:SHAPE")]
    """A chip and the number of chips along each axis: v5p:4x4x4, v5e:4x4, v6e:8x8, 7x:2x2x1; or gpu for the GPUs of
    this machine."""
    num_slices: int = 1
    """Number of such slices, connected by the data-centre network."""
    mesh: str | None = None
    """Such as fsdp=16,tensor=4; by default the mesh of the config or, if it has none, FSDP over each slice."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH=VALUE")] = ()
    """Change a field of the config."""
    search: bool = False
    """Try meshes (without --mesh), remat policies and micro-batches, and rank them. Each try is a compilation."""
    json: bool = False
    """Print one JSON object for each plan."""

    def run(self) -> int:
        if self.topology != "gpu":
            # Leave a TPU of this machine alone.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from qwen_jax.parallel.sharding import parse_mesh

        planner, where = (
            sibling("train.plan.stage"),
            sibling("train.plan.topology").target(self.topology, self.num_slices),
        )
        config = sibling("train.config").load(self.config, self.set)
        axes = parse_mesh(self.mesh) if self.mesh else None
        # One plan for each kind of stage; stages that differ only in data or schedule have the same.
        seen: set[tuple[object, ...]] = set()
        plans, fits = [], True
        for index, stage in enumerate(config.stages):
            kind = stage.length, stage.batch_size, stage.remat, stage.accumulation, str(stage.mesh)
            if kind in seen:
                continue
            seen.add(kind)
            if self.search:
                progress = lambda made: print(planner.describe(made), file=sys.stderr)  # noqa: E731
                found = planner.search(config, index, where, axes, progress)
            else:
                found = [planner.plan_stage(config, index, where, axes)]
            plans += found
            fits &= any(plan.fits for plan in found)
        from qwen_jax.files import to_json

        for plan in plans:
            print(to_json(dataclasses.asdict(plan)) if self.json else planner.describe(plan))
        return 0 if fits else 1
