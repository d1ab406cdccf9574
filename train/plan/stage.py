"""Plans: the training step of a stage, compiled for chips that need not be present, with its memory, FLOPs and traffic.

Memory is what the compiler reports. FLOPs are counted in the traced program and include recomputation. Collectives are
read from the compiled program and multiplied by the trip counts of their loops. The time is a lower bound: the longest
of arithmetic, memory traffic and network at their published rates, as if these overlapped perfectly. Nothing is run.
"""

import dataclasses
import itertools
import math
import re
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params
from train.observe.metrics import flops_per_token
from train.plan.of_run import RunStage
from train.plan.programs import collectives, count_flops, is_8_bit, kept_for_backward
from train.plan.topology import Target, mesh_of
from train.state import TrainState, abstract_state
from train.step import TrainStep, check_divides, make_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, FLOPs, traffic and minimum time of a training step. It was compiled for the topology, not run on it.

    Attributes:
      topology, num_slices, devices: what the step was compiled for.
      mesh: sizes of the mesh axes that are not 1.
      options: stage (counted from 1), batch_size, length, accumulation and remat, and products if they are
        not in the compute dtype.
      fits: whether the step fits in the memory of a device.
      hbm_bytes: memory on one device, as the compiler reports it; if the step does not fit, what it would need.
      hbm_limit_bytes: memory of one device.
      weights_bytes: part of `hbm_bytes`: float32 weights.
      moments_bytes: part of `hbm_bytes`: state of the optimiser: moments of Adam and, with online merging, tau.
      frozen_bytes: part of `hbm_bytes`: with LoRA, the weights that are not trained, in the compute dtype.
      activations_bytes: part of `hbm_bytes`: what scans keep for the backward pass.
      temporary_bytes: part of `hbm_bytes`: everything else that exists within the step.
      flops_per_step: FLOPs on all devices, with recomputation.
      low_precision_flops_per_step: part of `flops_per_step`: of products of 8 bits.
      model_flops_per_step: FLOPs without recomputation, by the formula of docs/training.md.
      collective_bytes: bytes that one device sends in a step, by kind of collective.
      dcn_bytes: the part of `collective_bytes` that leaves a slice.
      gathered_bytes: size of the largest result of an all-gather.
      gathers: number of all-gathers in a step by the shape of their result, largest first.
      compute_seconds, memory_seconds, network_seconds: lower bounds of the step time.
      estimated_step_seconds: the largest of these bounds.
      mfu_bound: model FLOPs over peak FLOPs in that time.
      compile_seconds: duration of tracing and compiling.
      why_not: the beginning of the compiler's message if the step does not fit.
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
    frozen_bytes: int = 0
    activations_bytes: int = 0
    temporary_bytes: int = 0
    flops_per_step: float = 0.0
    low_precision_flops_per_step: float = 0.0
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
    step: TrainStep[Any],
    state: TrainState,
    batch: Any,
    model_flops: float,
    options: Mapping[str, str | int] | None = None,
    *,
    frozen: Params | None = None,
    always_compile: bool = True,
) -> Plan:
    """Compiles a training step for a topology, and determines what it needs.

    Args:
      where: the topology, from `target`.
      mesh: mesh of its devices.
      step: jitted training step.
      state: its state, with `jax.ShapeDtypeStruct` leaves that have shardings.
      batch: its batch, with such leaves too.
      model_flops: model FLOPs of one step, by formula.
      options: `options` of the plan.
      frozen: with LoRA, the weights that are not trained, with such leaves too.
      always_compile: also compile a step that cannot fit by the sizes of its arrays alone.
    """
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    chip, devices = where.chip, mesh.size
    weights, moments, fixed = (
        sum(map(_struct_bytes, jax.tree.leaves(x))) for x in (state.params, state.opt_state, frozen)
    )
    # Trace: FLOPs, and what is kept for the backward pass.
    start = time.perf_counter()
    platform = "tpu" if where.topology != "gpu" else "cuda"
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch, frozen)  # type: ignore[attr-defined]
        lowered = traced.lower(lowering_platforms=(platform,))
    flops, narrow = count_flops(traced.jaxpr), count_flops(traced.jaxpr, is_8_bit)
    kept = kept_for_backward(traced.jaxpr, devices)
    known: dict[str, Any] = dict(
        topology=where.topology, num_slices=where.num_slices, devices=devices, mesh=sizes, options=dict(options or {}),
        hbm_limit_bytes=chip.hbm_bytes, weights_bytes=weights, moments_bytes=moments, frozen_bytes=fixed,
        activations_bytes=kept, flops_per_step=flops, low_precision_flops_per_step=narrow,
        model_flops_per_step=model_flops,
    )  # fmt: skip
    least = weights + moments + fixed + kept
    if least > chip.hbm_bytes and not always_compile:
        why = "Weights, moments and what is kept for the backward pass alone are larger; not compiled."
        return Plan(fits=False, hbm_bytes=least, compile_seconds=time.perf_counter() - start, why_not=why, **known)
    # Compile: memory and collectives.
    try:
        compiled = lowered.compile()
    except Exception as error:
        needed = _asked_for(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        why = textwrap.shorten(str(error), 400, placeholder=" ...")
        return Plan(fits=False, hbm_bytes=needed, compile_seconds=seconds, why_not=why, **known)
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
    # Lower bounds of the time. The state is read and written at least once.
    compute = ((flops - narrow) / chip.flops + narrow / (chip.low_precision_flops or chip.flops)) / devices
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


def _struct_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device."""
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


# The TPU compiler refuses a program early, by the total size of its values, or after it has placed them.
_TOO_LARGE = (
    r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)i?B?\)",
    r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm",
)


def _asked_for(message: str) -> int | None:
    """Bytes that a step needs by the compiler's message, or 0 if it does not say; None for other errors."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    for pattern in _TOO_LARGE:
        if match := re.search(pattern, message):
            return int(float(match[1]) * units[match[2]])
    return 0 if re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", message) else None


def plan_stage(
    stage: RunStage, where: Target, axes: Mapping[str, int] | None = None, *, always_compile: bool = True
) -> Plan:
    """Plans one stage of a run.

    Args:
      stage: of `train.plan.of_run.stages_of`.
      where: the topology, from `target`.
      axes: sizes of the mesh axes; by default those of the configuration or, if it has none, FSDP over each slice.
      always_compile: see `plan_step`.

    Raises:
      InputError: the mesh does not have all devices, or the model or the batch does not divide over it.
    """
    model, step = stage.objective.model, stage.step
    mesh = mesh_of(where, axes or stage.axes or _all_fsdp(where))
    shards = Sharding.for_training(model, mesh).batch_shards
    check_divides(stage.batch_size, step.accumulation, shards, where=f"Stage {stage.number}: ")
    frozen = stage.frozen(mesh)
    options = {
        "stage": stage.number,
        "batch_size": stage.batch_size,
        "length": stage.length,
        "accumulation": step.accumulation,
        "remat": step.remat,
        **({} if step.products == "bfloat16" else {"products": step.products}),
    }
    return plan_step(
        where,
        mesh,
        make_train_step(stage.objective, stage.optimizer, step, mesh),
        abstract_state(model, stage.optimizer, mesh, step.lora, frozen),
        stage.batch(mesh),
        flops_per_token(model, stage.length) * stage.batch_size * stage.length,
        options,
        frozen=frozen,
        always_compile=always_compile,
    )


def _all_fsdp(where: Target) -> dict[str, int]:
    return {"data": where.num_slices, "fsdp": len(where.devices) // where.num_slices}


def search(
    stage: RunStage,
    where: Target,
    axes: Mapping[str, int] | None = None,
    say: Callable[[Plan], None] = lambda _: None,
) -> list[Plan]:
    """Plans a stage with other meshes, remat policies and micro-batches.

    For each mesh and policy, accumulation is raised only until the step fits, because more is never faster. Steps that
    cannot fit by the sizes of their arrays alone are not compiled.

    Args:
      stage: of `train.plan.of_run.stages_of`.
      where: the topology, from `target`.
      axes: sizes of the mesh axes; by default all meshes are tried.
      say: is called with each plan when it is made.

    Returns:
      The plans: those that fit come first, and of these the fastest.

    Raises:
      InputError: nothing can be tried, because no mesh divides the model and the batch, or `axes` does not.
    """
    plans = []
    meshes = _meshes(stage, where) if axes is None else [dict(axes)]
    for mesh, remat in itertools.product(meshes, ("none", "dots", "full")):
        shards = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
        for accumulation in (1, 2, 4, 8):
            if stage.batch_size % (accumulation * shards):
                break
            step = dataclasses.replace(stage.step, remat=remat, accumulation=accumulation)  # type: ignore[arg-type]
            plan = plan_stage(dataclasses.replace(stage, step=step), where, mesh, always_compile=False)
            say(plan)
            plans.append(plan)
            if plan.fits:
                break
    if not plans:
        raise InputError(
            f"Nothing to try for stage {stage.number}: {stage.batch_size} rows of {stage.length} tokens and this model "
            f"do not divide over {len(where.devices)} devices {'in any mesh' if axes is None else f'as {dict(axes)}'}. "
            "Change batch_size, or the number of devices."
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.estimated_step_seconds, plan.hbm_bytes))


# A context axis is not tried for shorter rows.
_LONG = 16_384


def _meshes(stage: RunStage, where: Target) -> list[dict[str, int]]:
    """The meshes of all devices over which the model, the rows and the batch of a stage divide."""
    model, meshes = stage.objective.model, []
    contexts = (1, 2, 4, 8, 16) if stage.length >= _LONG else (1,)
    experts = (1, 2, 4, 8, 16) if model.moe is not None else (1,)
    for expert, context, tensor in itertools.product(experts, contexts, (1, 2, 4, 8)):
        fsdp, rest = divmod(len(where.devices) // where.num_slices, expert * context * tensor)
        axes = {"data": where.num_slices, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
        rows = where.num_slices * fsdp * expert
        if rest or fsdp < 1 or stage.length % (2 * context) or stage.batch_size % rows:
            continue
        try:
            Sharding.for_training(model, mesh_of(where, axes))
        except InputError:  # A dimension of the model does not divide over these axes.
            continue
        meshes.append(axes)
    return meshes


def describe(plan: Plan) -> str:
    """Formats a plan as a few lines of text.

    Args:
      plan: from `plan_stage`.
    """
    gib, o = 1 << 30, plan.options
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    slices = f", {plan.num_slices} slices" if plan.num_slices > 1 else ""
    products = f"products {o['products']}, " if "products" in o else ""
    head = (
        f"stage {o['stage']}: {o['batch_size']} rows of {o['length']:,}, remat {o['remat']}, {products}accumulation "
        f"{o['accumulation']}, {mesh}; compiled for {plan.topology}{slices} in {plan.compile_seconds:.0f} s"
    )
    if plan.why_not:
        return f"{head}\n  DOES NOT FIT in {plan.hbm_limit_bytes / gib:.2f} GiB a device: {plan.why_not}"
    parts = {
        "weights": plan.weights_bytes,
        "moments": plan.moments_bytes,
        **({"frozen weights": plan.frozen_bytes} if plan.frozen_bytes else {}),
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
