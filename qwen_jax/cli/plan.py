"""`qwen-jax plan`: does a run fit, and how fast could it be, without the machine."""

import dataclasses
import json
import os
import sys
from typing import Annotated

import tyro

from qwen_jax.cli.common import sibling


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile the real training step of a run for given chips, and say what it needs: memory on each against what there
    is, FLOPs, bytes over the network, a bound on the time of a step. TPUs need not be there, only their compiler
    (pip install 'qwen-jax[tpu]'). One plan for each kind of stage. Compiled, never run.

    Example: qwen-jax plan --config experiments/pretrain/qwen2_5.py --topology v5p:4x4x4 --mesh fsdp=16,tensor=4
    """

    config: Annotated[str, tyro.conf.arg(metavar="FILE.py[:function]")]
    """Python file with a function that returns the RunConfig (by default main)."""
    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:SHAPE")]
    """Such as v5p:4x4x4, v5e:4x4, v6e:8x8, 7x:2x2x1; or gpu, the GPUs of this machine."""
    num_slices: int = 1
    """How many such slices, joined by the data-centre network."""
    mesh: str | None = None
    """Such as fsdp=16,tensor=4; by default the config's own, or FSDP over each slice."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH=VALUE")] = ()
    """Changes a field of the config."""
    search: bool = False
    """Try meshes (unless --mesh is given), remat policies and micro-batches, and rank them. A compilation each."""
    json: bool = False
    """One JSON object a plan."""

    def run(self) -> int:
        if self.topology != "gpu":
            # A TPU that this machine may have is not to be touched.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from qwen_jax.parallel.sharding import parse_mesh

        plan, where = sibling("train.plan.stage"), sibling("train.plan.topology").target(self.topology, self.num_slices)
        config = sibling("train.config").load(self.config, self.set)
        axes = parse_mesh(self.mesh) if self.mesh else None
        seen: set[tuple[object, ...]] = set()
        plans, fits = [], True
        for index, stage in enumerate(config.stages):
            kind = stage.length, stage.batch_size, stage.remat, stage.accumulation, str(stage.mesh)
            if kind in seen:
                continue
            seen.add(kind)
            if self.search:
                progress = lambda made: print(plan.describe(made), file=sys.stderr)  # noqa: E731
                found = plan.search(config, index, where, axes, progress)
            else:
                found = [plan.plan_stage(config, index, where, axes)]
            plans += found
            fits &= any(made.fits for made in found)
        for made in plans:
            print(json.dumps(dataclasses.asdict(made)) if self.json else plan.describe(made))
        return 0 if fits else 1
