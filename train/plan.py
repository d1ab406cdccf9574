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
from qwen_jax.sharding import Sharding
from train.config import RunConfig
from train.data.batch import Batch
from train.metrics import flops_per_token
from train.pretrain import abstract_state, make_train_step
from train.programs import collectives, count_flops, kept_for_backward
from train.topology import Target, mesh_of


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
      gathered_bytes: the largest single all-gather.
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
        gathered_bytes=max((c.bytes for c in found if c.kind == "all-gather"), default=0.0),
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


def _asked_for(message: str) -> int | None:
    """Bytes that a compiler says it would have needed, if that is what it complains of."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    match = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm", message)
    if match is None and not re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", message):
        return None
    return int(float(match[1]) * units[match[2]]) if match else 0


def plan_stage(config: RunConfig, index: int, where: Target, axes: Mapping[str, int] | None = None) -> Plan:
    """The plan of one stage of a run.

    Args:
      config: of the run.
      index: of the stage, from 0.
      where: from `target`.
      axes: of the mesh; by default the config's, or FSDP over all devices of a slice if it has none.

    Raises:
      InputError: a mesh that does not cover the devices, or that the model or the batch does not divide by.
    """
    stage, step_config = config.stages[index], config.pretrain(index)
    axes = axes or config.mesh_axes(index) or _all_fsdp(where)
    mesh = mesh_of(where, axes)
    sharding = Sharding.for_model(step_config.model, mesh, split_rows=True)
    tokens = NamedSharding(mesh, sharding.tokens)
    shape = stage.batch_size, stage.length
    ints, floats = (jax.ShapeDtypeStruct(shape, dtype, sharding=tokens) for dtype in (jnp.int32, jnp.float32))
    options = {
        "stage": index,
        "batch_size": stage.batch_size,
        "length": stage.length,
        "accumulation": step_config.accumulation,
        "remat": step_config.remat,
    }
    return plan_step(
        where,
        mesh,
        make_train_step(step_config, mesh),
        abstract_state(step_config, mesh),
        Batch(ints, ints, ints, floats),
        flops_per_token(step_config.model, stage.length) * math.prod(shape),
        options,
    )


def _all_fsdp(where: Target) -> dict[str, int]:
    return {"data": where.num_slices, "fsdp": len(where.devices) // where.num_slices}


def search(config: RunConfig, index: int, where: Target, say: Callable[[Plan], None] = lambda _: None) -> list[Plan]:
    """Plans of a stage with other meshes, remat policies and micro-batches, those that fit first, fastest first.

    Accumulation is raised only until a mesh and policy fit: more of it is never faster.

    Args:
      config: of the run.
      index: of the stage, from 0.
      where: from `target`.
      say: is told of each plan as it is made.
    """
    stage, plans = config.stages[index], []
    for tensor, remat in itertools.product((1, 2, 4, 8), ("none", "dots", "full")):
        per_slice, rest = divmod(len(where.devices) // where.num_slices, tensor)
        axes = {"data": where.num_slices, "fsdp": per_slice, "tensor": tensor}
        for accumulation in (1, 2, 4, 8):
            if rest or per_slice < 1 or stage.batch_size % (accumulation * where.num_slices * per_slice):
                break
            changed = dataclasses.replace(stage, remat=remat, accumulation=accumulation)  # type: ignore[arg-type]
            stages = (*config.stages[:index], changed, *config.stages[index + 1 :])
            try:
                plan = plan_stage(dataclasses.replace(config, stages=stages), index, where, axes)
            except InputError:  # of a dimension that these axes do not divide
                break
            say(plan)
            plans.append(plan)
            if plan.fits:
                break
    return sorted(plans, key=lambda plan: (not plan.fits, plan.estimated_step_seconds))


def describe(plan: Plan) -> str:
    """The plan in words, for people."""
    gib, o = 1 << 30, plan.options
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    slices = f", {plan.num_slices} slices" if plan.num_slices > 1 else ""
    head = (
        f"stage {o['stage']}: {o['batch_size']} rows of {o['length']:,}, remat {o['remat']}, accumulation "
        f"{o['accumulation']}, {mesh}; compiled for {plan.topology}{slices} in {plan.compile_seconds:.0f} s"
    )
    if not plan.hbm_bytes:
        return f"{head}\n  does not fit: {plan.why_not}"
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
