"""`qwen-jax plan`: compiles the training step of a run for chips that need not be present."""

import dataclasses
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qwen_jax.cli.common import sibling
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile the training step of each kind of stage of a run for given chips, and report what it needs: memory on
    each chip, FLOPs, bytes over the network, and a lower bound of the step time. TPUs need not be present, only their
    compiler (pip install 'qwen-jax[tpu]'). Nothing is run. The exit status is 1 if a stage does not fit.

    Example: qwen-jax plan --config experiments/pretrain/qwen2_5.py:standard --topology v5p:4x4x4 --mesh fsdp=64
    """

    config: Annotated[str, tyro.conf.arg(metavar="FILE.py[:function]")]
    """Python file with a function that returns the RunConfig or the TuneConfig, by default `config` or the only one."""
    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:SHAPE")]
    """A chip and the number of chips along each axis: v5p:4x4x4, v5e:4x4, v6e:8x8, 7x:2x2x1; or gpu for the GPUs of
    this machine."""
    model: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """Of a TuneConfig: a published model such as Qwen2.5-7B, whose architecture to plan for; by default that in
    config.json of the checkpoint that the run begins with."""
    num_slices: int = 1
    """Number of such slices, connected by the data-centre network."""
    mesh: str | None = None
    """Such as fsdp=16,tensor=4; by default the mesh of the config or, if it has none, FSDP over each slice."""
    set: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH=VALUE [PATH=VALUE ...]")
    ] = ()
    """Change fields of the config."""
    search: bool = False
    """Try meshes (without --mesh), remat policies and micro-batches, and rank them. Each try is a compilation."""
    json: bool = False
    """Print one JSON object for each plan."""

    def run(self) -> int:
        if self.topology != "gpu":
            # Leave a TPU of this machine alone.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from qwen_jax.parallel.sharding import parse_mesh

        planner, runs = sibling("train.plan.stage"), sibling("train.plan.of_run")
        where = sibling("train.plan.topology").target(self.topology, self.num_slices)
        stages = runs.stages_of(*self._config(runs))
        axes = parse_mesh(self.mesh) if self.mesh else None
        # One plan for each kind of stage; stages that differ only in data or schedule have the same.
        seen: set[tuple[object, ...]] = set()
        plans, fits = [], True
        for stage in stages:
            kind = stage.length, stage.batch_size, stage.step, str(stage.axes)
            if kind in seen:
                continue
            seen.add(kind)
            if self.search:
                progress = lambda made: print(planner.describe(made), file=sys.stderr)  # noqa: E731
                found = planner.search(stage, where, axes, progress)
            else:
                found = [planner.plan_stage(stage, where, axes)]
            plans += found
            fits &= any(plan.fits for plan in found)
        from qwen_jax.files import to_json

        for plan in plans:
            print(to_json(dataclasses.asdict(plan)) if self.json else planner.describe(plan))
        return 0 if fits else 1

    def _config(self, runs: ModuleType) -> tuple[Any, "ModelConfig | None"]:
        """The configuration, and for tuning the architecture of the checkpoint, of which only config.json is read."""
        config = runs.load(self.config, [change for changes in self.set for change in changes])
        if not isinstance(config, runs.TuneConfig):
            if self.model is not None:
                raise InputError("--model is for tuning runs. A run of pre-training has its model in the config.")
            return config, None
        from qwen_jax.config import load_config
        from qwen_jax.hub import CONFIG, resolve
        from qwen_jax.published import published

        if self.model is not None:
            return config, published(self.model)
        try:
            return config, load_config(resolve(config.model, CONFIG))
        except InputError as error:
            raise InputError(
                f"{error} Or give --model SIZE, such as Qwen2.5-7B, to plan without a checkpoint."
            ) from None
