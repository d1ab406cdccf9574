"""What a training step needs on given chips: the real step, compiled for them, without having them.

Memory is the compiler's own account. FLOPs are counted in the traced program, recomputation included. Collectives are
read from the compiled one, loops multiplied out. The time is a bound: the longest of what arithmetic, memory and
network need at their published rates, as if all three overlapped perfectly. Nothing here has run.
"""

import dataclasses
import itertools
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import Sharding
from train.config import RunConfig
from train.data.batch import Batch
from train.observe.metrics import flops_per_token
from train.plan.programs import collectives, count_flops, kept_for_backward
from train.plan.topology import Target, mesh_of
from train.state import abstract_state
from train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs on each device, and how long it must at least take. Compiled for the topology, not run on it.

    Attributes:
      topology, num_slices, devices: what it was compiled for.
      mesh: sizes of the axes that are not 1.
      options: what else was chosen.
      fits: whether the compiler could place it in memory.
      hbm_bytes: of one device; what the compiler reports, or asked for when it did not fit.
      hbm_limit_bytes: what one device has.
      weights_bytes, moments_bytes, activations_bytes, temporary_bytes: parts of `hbm_bytes`: float32 masters, Adam's
        moments, what scans keep for the backward pass, and all else that lives within the step.
      flops_per_step: of all devices, recomputation included.
      model_flops_per_step: without recomputation, by the formula of docs/training.md.
      collective_bytes: that one device sends in a step, by kind.
      dcn_bytes: the part of them that leaves a slice.
      gathered_bytes: the result of the largest single all-gather.
      gathers: each all-gather by the shape of its result, largest first, and how often a step runs such.
      compute_seconds, memory_seconds, network_seconds: the bounds.
      estimated_step_seconds: the largest of them.
      mfu_bound: model FLOPs over peak FLOPs in that time.
      compile_seconds: what compiling took.
      why_not: the compiler's words when it does not fit.
    """

    topology: str
    num_slices: int
    devices: int
    mesh: dict[str, int]
    options: dict[str, Any]
    fits: bool
    hbm_bytes: int
    hbm_limit_bytes: int
    weights_bytes: int = 0
    moments_bytes: int = 0
    activations_bytes: int = 0
    temporary_bytes: int = 0
    flops_per_step: float = 0.0
    model_flops_per_step: float = 0.0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    dcn_bytes: float = 0.0
    gathered_bytes: float = 0.0
    gathers: dict[str, int] = dataclasses.field(default_factory=dict)
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    estimated_step_seconds: float = 0.0
    mfu_bound: float = 0.0
    compile_seconds: float = 0.0
    why_not: str = ""


def plan_step(
    where: Target,
    mesh: Mesh,
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    model_flops: float,
    options: Mapping[str, Any] | None = None,
    *,
    hopeless: bool = True,
) -> Plan:
    """Compiles a step and takes its measure.

    Args:
      where: from `target`.
      mesh: of its devices.
      step: jitted, (state, batch) -> anything.
      state: a TrainState with `jax.ShapeDtypeStruct` leaves that carry shardings.
      batch: likewise.
      model_flops: of one step by formula.
      options: to be repeated in the plan.
      hopeless: compile also what cannot fit, by the sizes in the traced program alone.
    """
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    chip, devices = where.chip, mesh.size
    weights, moments = (sum(map(_struct_bytes, jax.tree.leaves(x))) for x in (state.params, state.opt_state))
    start = time.perf_counter()
    platform = "tpu" if where.topology != "gpu" else "cuda"
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch)  # type: ignore[attr-defined]
        lowered = traced.lower(lowering_platforms=(platform,))
    flops, kept = count_flops(traced.jaxpr), kept_for_backward(traced.jaxpr, devices)
    known: dict[str, Any] = dict(
        topology=where.topology, num_slices=where.num_slices, devices=devices, mesh=sizes, options=dict(options or {}),
        hbm_limit_bytes=chip.hbm_bytes, weights_bytes=weights, moments_bytes=moments, activations_bytes=kept,
        flops_per_step=flops, model_flops_per_step=model_flops,
    )  # fmt: skip
    least = weights + moments + kept
    if least > chip.hbm_bytes and not hopeless:
        why = "Weights, moments and what is kept for the backward pass alone are more; not compiled."
        return Plan(fits=False, hbm_bytes=least, compile_seconds=time.perf_counter() - start, why_not=why, **known)
    try:
        compiled = lowered.compile()
    except Exception as error:
        needed = _asked_for(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        first = str(error).splitlines()[0]
        return Plan(fits=False, hbm_bytes=needed, compile_seconds=seconds, why_not=first, **known)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    aliased, arguments = memory.alias_size_in_bytes, memory.argument_size_in_bytes
    hbm = arguments + memory.output_size_in_bytes - aliased + memory.temp_size_in_bytes
    found = collectives(compiled.as_text(), devices, where.num_slices)
    gathers = sorted((c for c in found if c.kind == "all-gather"), key=lambda c: -c.result_bytes)
    by_kind: dict[str, float] = defaultdict(float)
    for c in found:
        by_kind[c.kind] += c.bytes * c.times
    dcn = sum(c.bytes * c.times for c in found if c.crosses_slices)
    compute = flops / devices / chip.flops
    # At the least, the state is read once and written once.
    bandwidth = (arguments + memory.output_size_in_bytes) / chip.hbm_bandwidth
    network = max((sum(by_kind.values()) - dcn) / chip.ici_bandwidth, dcn / chip.dcn_bandwidth)
    bound = max(compute, bandwidth, network)
    return Plan(
        fits=hbm <= chip.hbm_bytes,
        hbm_bytes=hbm,
        temporary_bytes=max(memory.temp_size_in_bytes - kept, 0),
        collective_bytes=dict(by_kind),
        dcn_bytes=dcn,
        gathered_bytes=max((c.result_bytes for c in gathers), default=0.0),
        gathers={shape: sum(c.times for c in gathers if c.shape == shape) for shape in [c.shape for c in gathers]},
        compute_seconds=compute,
        memory_seconds=bandwidth,
        network_seconds=network,
        estimated_step_seconds=bound,
        mfu_bound=model_flops / (bound * devices * chip.flops),
        compile_seconds=seconds,
        **known,
    )


def _struct_bytes(x: Any) -> int:
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


# What the TPU compiler says early, from the sizes of a program's values, and what it says when it has placed them.
_TOO_LARGE = (
    r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\)",
    r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm",
)


def _asked_for(message: str) -> int | None:
    """Bytes that a compiler says it would have needed, 0 if it does not say; None if it complains of another thing."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    for pattern in _TOO_LARGE:
        if match := re.search(pattern, message):
            return int(float(match[1]) * units[match[2]])
    return 0 if re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", message) else None


def plan_stage(
    config: RunConfig, index: int, where: Target, axes: Mapping[str, int] | None = None, *, hopeless: bool = True
) -> Plan:
    """The plan of one stage of a run.

    Args:
      config: of the run.
      index: of the stage, from 0.
      where: from `target`.
      axes: of the mesh; by default the config's, or FSDP over all devices of a slice if it has none.
      hopeless: see `plan_step`.

    Raises:
      InputError: a mesh that does not cover the devices, or that the model or the batch does not divide by.
    """
    stage, objective, step = config.stages[index], config.next_token(index), config.step_config(index)
    axes = axes or config.mesh_axes(index) or _all_fsdp(where)
    mesh = mesh_of(where, axes)
    tokens = NamedSharding(mesh, Sharding.tokens)  # As `Batch` is placed: the step itself splits rows.
    shape = stage.batch_size, stage.length
    ints, floats = (jax.ShapeDtypeStruct(shape, dtype, sharding=tokens) for dtype in (jnp.int32, jnp.float32))
    options = {
        "stage": index,
        "batch_size": stage.batch_size,
        "length": stage.length,
        "accumulation": step.accumulation,
        "remat": step.remat,
    }
    return plan_step(
        where,
        mesh,
        make_train_step(objective, config.optimizer_config(), step, mesh),
        abstract_state(objective.model, config.optimizer_config(), mesh),
        Batch(ints, ints, ints, floats),
        flops_per_token(objective.model, stage.length) * math.prod(shape),
        options,
        hopeless=hopeless,
    )


def _all_fsdp(where: Target) -> dict[str, int]:
    return {"data": where.num_slices, "fsdp": len(where.devices) // where.num_slices}


def search(
    config: RunConfig,
    index: int,
    where: Target,
    axes: Mapping[str, int] | None = None,
    say: Callable[[Plan], None] = lambda _: None,
) -> list[Plan]:
    """Plans of a stage with other meshes, remat policies and micro-batches, those that fit first, fastest first.

    Accumulation is raised only until a mesh and policy fit: more of it is never faster. What cannot fit by the traced
    program alone is not compiled.

    Args:
      config: of the run.
      index: of the stage, from 0.
      where: from `target`.
      axes: keep this mesh, and try the rest.
      say: is told of each plan as it is made.

    Raises:
      InputError: nothing can be tried: no mesh divides the model and the batch, or `axes` is no mesh for them.
    """
    stage, plans = config.stages[index], []
    meshes = _meshes(config, index, where) if axes is None else [dict(axes)]
    for mesh, remat in itertools.product(meshes, ("none", "dots", "full")):
        shards = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
        for accumulation in (1, 2, 4, 8):
            if stage.batch_size % (accumulation * shards):
                break
            changed = dataclasses.replace(stage, remat=remat, accumulation=accumulation)  # type: ignore[arg-type]
            stages = (*config.stages[:index], changed, *config.stages[index + 1 :])
            plan = plan_stage(dataclasses.replace(config, stages=stages), index, where, mesh, hopeless=False)
            say(plan)
            plans.append(plan)
            if plan.fits:
                break
    if not plans:
        raise InputError(
            f"Nothing to try for stage {index + 1}: {stage.batch_size} rows of {stage.length} tokens and this model do "
            f"not divide over {len(where.devices)} devices {'in any mesh' if axes is None else f'as {dict(axes)}'}. "
            f"Change the batch, or the number of devices."
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.estimated_step_seconds, plan.hbm_bytes))


# Shorter rows have no use for a context axis.
_LONG = 16_384


def _meshes(config: RunConfig, index: int, where: Target) -> list[dict[str, int]]:
    """The meshes of all devices that divide the model, the rows and the batch of a stage."""
    stage, model, meshes = config.stages[index], config.next_token(index).model, []
    contexts = (1, 2, 4, 8, 16) if stage.length >= _LONG else (1,)
    experts = (1, 2, 4, 8, 16) if model.moe is not None else (1,)
    for expert, context, tensor in itertools.product(experts, contexts, (1, 2, 4, 8)):
        fsdp, rest = divmod(len(where.devices) // where.num_slices, expert * context * tensor)
        axes = {"data": where.num_slices, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
        rows = where.num_slices * fsdp * expert
        if rest or fsdp < 1 or stage.length % (2 * context) or stage.batch_size % rows:
            continue
        try:
            Sharding.for_model(model, mesh_of(where, axes), split_rows=True)
        except InputError:  # of a dimension of the model that these axes do not divide
            continue
        meshes.append(axes)
    return meshes


def describe(plan: Plan) -> str:
    """The plan in words, for people."""
    gib, o = 1 << 30, plan.options
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    slices = f", {plan.num_slices} slices" if plan.num_slices > 1 else ""
    head = (
        f"stage {o['stage']}: {o['batch_size']} rows of {o['length']:,}, remat {o['remat']}, accumulation "
        f"{o['accumulation']}, {mesh}; compiled for {plan.topology}{slices} in {plan.compile_seconds:.0f} s"
    )
    if plan.why_not:
        return f"{head}\n  DOES NOT FIT in {plan.hbm_limit_bytes / gib:.2f} GiB a device: {plan.why_not}"
    parts = {
        "weights": plan.weights_bytes,
        "moments": plan.moments_bytes,
        "kept for the backward pass": plan.activations_bytes,
        "temporary": plan.temporary_bytes,
    }
    lines = [
        head,
        f"  {'fits' if plan.fits else 'DOES NOT FIT'}: {plan.hbm_bytes / gib:.2f} of {plan.hbm_limit_bytes / gib:.2f} "
        "GiB a device: " + ", ".join(f"{name} {size / gib:.2f}" for name, size in parts.items()),
    ]
    if plan.estimated_step_seconds:
        sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in plan.collective_bytes.items()) or "none"
        lines += [
            f"  {plan.flops_per_step:.3g} FLOPs a step ({plan.model_flops_per_step:.3g} by the model's formula); "
            f"GB sent by a device: {sent}",
            f"  at least {plan.estimated_step_seconds:.3f} s a step (arithmetic {plan.compute_seconds:.3f}, state "
            f"through memory {plan.memory_seconds:.3f}, network {plan.network_seconds:.3f}): MFU at most "
            f"{plan.mfu_bound:.0%}",
        ]
    return "\n".join(lines)
