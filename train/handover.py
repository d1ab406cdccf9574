"""The hand-over of weights from training to the engines that sample, on the devices.

One jitted program on the trainer's devices makes the inference layout: LoRA merged, layers unstacked, projections
fused, everything in the engine's dtype and with the engine's shardings. Engines on these devices take the results as
they are; engines on other devices get copies from device to device. No weight goes through the host. Engines free their
old weights before the program runs, so that the two sets of weights that are needed are the only ones.
"""

import concurrent.futures
import dataclasses
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine
from qwen_jax.inference.weights import fused_layer
from qwen_jax.lora import merged
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import AXES, Sharding, on_mesh
from qwen_jax.params import Params, param_specs, union
from qwen_jax.stack import unstack
from train.step import StepConfig

Handover = Callable[..., None]
"""Gives weights to all engines: a function of the trained parameters and, as a second argument or `frozen=`, of the
frozen ones; both as for `train.step.train_step`. They are read, and stay valid."""


def check_handover(model: ModelConfig) -> None:
    """Refuses a model whose weights cannot be handed over.

    Args:
      model: the architecture.

    Raises:
      InputError: it is quantised. An update of LoRA cannot be merged into codes.
    """
    if model.quantization is not None:
        raise InputError(
            "Expected a model in full precision to train and sample in turn, got quantised weights: updates cannot be "
            "merged into them for the engines. Convert the model first (qwen-jax convert --to hf --dtype bfloat16), or "
            "train an adapter beside the quantised weights by SFT or DPO."
        )


class InferenceLayout:
    """Brings a trainer's parameters into the inference layout of one or more meshes, in one jitted program.

    Args:
      model: the architecture.
      step: of the training; `lora` of it.
      mesh: of the trainer.
      targets: the meshes that get the weights, such as those of engines that are replicas of one another. All have the
        same axes. They may be made of the trainer's devices (`split_mesh`), or of others.
      dtype: of the results.

    Raises:
      InputError: a quantised model, a mesh that does not fit the model, or targets with different axes.
    """

    def __init__(self, model: ModelConfig, step: StepConfig, mesh: Mesh, targets: Sequence[Mesh], dtype: str) -> None:
        check_handover(model)
        if not targets:
            raise InputError("Expected at least one mesh to hand weights to, got none.")
        if any(dict(target.shape) != dict(targets[0].shape) for target in targets):
            shapes = ", ".join(str({axis: n for axis, n in target.shape.items() if n > 1}) for target in targets)
            raise InputError(f"Meshes that get the same weights must have the same axes; got {shapes}.")
        self.mesh, self.targets = mesh, tuple(targets)
        source, target = Sharding.for_training(model, mesh), Sharding.for_inference(model, targets[0])
        self._specs = param_specs(model, target, Options(stacked=False, fused=True))
        # In the program all axes are automatic: it has arrays of both meshes, and the compiler moves their parts.
        self._source = _automatic(mesh, dict(mesh.shape))
        arranged = _arranged(mesh, targets[0])
        self._arranged = arranged is not None
        # A single target of the trainer's devices gets the results as they are.
        self._whole = arranged is not None and len(targets) == 1 and [*targets[0].devices.flat] == [*mesh.devices.flat]
        results = targets[0] if self._whole else arranged
        out = jax.tree.map(lambda spec: NamedSharding(results or self._source, spec if results else P()), self._specs)
        specs = param_specs(model, source, Options(stacked=False))
        # The compiler moves parts between two splits of an axis if one is a multiple of the other by whole mesh axes.
        # Otherwise each weight is gathered first, as it would do with a warning.
        gathers = target.tensor not in (1, source.tensor, mesh.size) or target.expert not in (1, source.expert)
        stages = [jax.tree.map(lambda spec: NamedSharding(self._source, spec), specs)]
        if gathers:
            stages.append(jax.tree.map(lambda spec: NamedSharding(self._source, P()), specs))
        convert = functools.partial(_convert, model, step, target, dtype, stages)
        self.program = jax.jit(convert, out_shardings=out)

    def __call__(self, params: Params, frozen: Params | None = None) -> list[Params]:
        """The parameters on each of the targets.

        Args:
          params, frozen: as for `train.step.train_step`.

        Returns:
          For each target the tree for `Options(stacked=False, fused=True)`, in buffers of its own.

        Raises:
          ValueError: parameters that are not those of the model.
        """
        with jax.set_mesh(self._source):
            found = self.program(*self.arguments(params, frozen))
        return [found] if self._whole else [self._place(found, target) for target in self.targets]

    def arguments(self, params: Params, frozen: Params | None = None) -> tuple[Params, Params | None]:
        """The arguments of `program`: the same buffers, on a mesh whose axes are automatic."""
        result: tuple[Params, Params | None] = on_mesh((params, frozen), self._source)
        return result

    def _place(self, found: Params, target: Mesh) -> Params:
        """Results of the program on a mesh: their own buffers where these are on its devices, otherwise copies."""
        leaves, treedef = jax.tree.flatten(found)
        specs = jax.tree.leaves(self._specs, is_leaf=lambda x: isinstance(x, P))
        shardings = [NamedSharding(target, spec) for spec in specs]
        if not self._arranged:
            # One device has everything, and cuts it into the parts that others need.
            placed = jax.device_put([x.addressable_shards[0].data for x in leaves], shardings)
            return jax.tree.unflatten(treedef, placed)
        # For each device of the target its part, and of those that are elsewhere the places in this list.
        taken: list[jax.Array] = []
        elsewhere: dict[int, SingleDeviceSharding] = {}
        for x, sharding in zip(leaves, shardings, strict=True):
            parts = defaultdict[str, dict[jax.Device, jax.Array]](dict)
            for shard in x.addressable_shards:
                parts[str(shard.index)][shard.device] = shard.data
            for device, index in sharding.addressable_devices_indices_map(x.shape).items():
                have = parts[str(index)]
                if not have:
                    raise InputError(
                        f"The trainer's devices of process {jax.process_index()} have not all parts of the weights of "
                        f"an engine of {target.size} devices. Choose engine.tensor and engine.expert whose product "
                        "divides their number in each process."
                    )
                if device not in have:
                    elsewhere[len(taken)] = SingleDeviceSharding(device)
                taken.append(have.get(device, next(iter(have.values()))))
        moved = jax.device_put([taken[i] for i in elsewhere], list(elsewhere.values()))
        for i, part in zip(elsewhere, moved, strict=True):
            taken[i] = part
        parts_in_order = iter(taken)
        placed = [
            jax.make_array_from_single_device_arrays(
                x.shape, sharding, [next(parts_in_order) for _ in sharding.addressable_devices]
            )
            for x, sharding in zip(leaves, shardings, strict=True)
        ]
        return jax.tree.unflatten(treedef, placed)


def make_handover(
    model: ModelConfig, step: StepConfig, mesh: Mesh, engine: ContinuousEngine | Sequence[ContinuousEngine]
) -> Handover:
    """Makes the function that gives a trainer's weights to an engine, or to several that are replicas of one another.

    What engines know of earlier texts is forgotten: no key or value of older weights is found again.

    Args:
      model: the architecture that is trained.
      step: of the training; `lora` of it.
      mesh: of the trainer.
      engine: on the same devices (`split_mesh`) or on others.

    Raises:
      InputError: an engine of another model, or engines of different dtypes or axes.
    """
    engines = [engine] if isinstance(engine, ContinuousEngine) else list(engine)
    for other in engines:
        if other.config != model:
            fields = (f.name for f in dataclasses.fields(model))
            names = [name for name in fields if getattr(model, name) != getattr(other.config, name)]
            raise InputError(
                f"The engine's model differs from the trained one in {', '.join(names)}. Make the engine with the "
                "architecture that is trained."
            )
    if len({other.dtype for other in engines}) > 1:
        raise InputError(f"Engines must have the same dtype; got {', '.join(other.dtype for other in engines)}.")
    layout = InferenceLayout(model, step, mesh, [other.mesh for other in engines], engines[0].dtype)

    def hand_over(params: Params, frozen: Params | None = None) -> None:
        found: list[Params] = []
        # The program runs when the last engine has freed its weights.
        freed = threading.Barrier(len(engines), action=lambda: found.extend(layout(params, frozen)))

        def take(number: int) -> Params:
            freed.wait()
            return found[number]

        def update(number: int) -> None:
            try:
                engines[number].update_weights(functools.partial(take, number))
            except BaseException:
                # The others need not wait for this one.
                freed.abort()
                raise

        errors: list[BaseException] = []
        # The first engine is served here: most often it is the only one.
        with concurrent.futures.ThreadPoolExecutor(len(engines)) as pool:
            others = [pool.submit(update, number) for number in range(1, len(engines))]
            try:
                update(0)
            except Exception as failure:
                errors.append(failure)
        errors += filter(None, (other.exception() for other in others))
        # Those that waited for the one that failed have nothing to tell.
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error

    return hand_over


def split_mesh(mesh: Mesh, tensor: int = 1, expert: int = 1) -> list[Mesh]:
    """Meshes for engines on the devices of a trainer: as many as fit, each with consecutive devices.

    Args:
      mesh: of the trainer.
      tensor, expert: axes of each engine's mesh.

    Raises:
      InputError: sizes whose product does not divide the number of devices.
    """
    size, devices = tensor * expert, mesh.devices.flatten()
    if size < 1 or len(devices) % size:
        raise InputError(
            f"Engines of {tensor} x {expert} devices (tensor x expert) do not divide the trainer's {len(devices)}. "
            "Choose sizes whose product divides them."
        )
    shape = tuple({"tensor": tensor, "expert": expert}.get(axis, 1) for axis in AXES)
    explicit = (AxisType.Explicit,) * len(AXES)
    return [Mesh(part.reshape(shape), AXES, axis_types=explicit) for part in np.split(devices, len(devices) // size)]


def local_meshes(meshes: Sequence[Mesh]) -> list[Mesh]:
    """The meshes of the engines of this process, of which every process has as many.

    Args:
      meshes: of all engines, from `split_mesh`.

    Raises:
      InputError: an engine would have devices of several processes, or the processes have different numbers of them.
    """
    owners = [{device.process_index for device in mesh.devices.flat} for mesh in meshes]
    if any(len(owner) > 1 for owner in owners):
        raise InputError(
            f"An engine of {meshes[0].size} devices (tensor x expert) would have some of several processes. Choose "
            f"sizes whose product divides the {jax.local_device_count()} devices of each process."
        )
    found = [mesh for mesh, owner in zip(meshes, owners, strict=True) if owner == {jax.process_index()}]
    if len(found) * jax.process_count() != len(meshes):
        raise InputError(
            f"Process {jax.process_index()} has {len(found)} of {len(meshes)} engines; expected as many in each of "
            f"{jax.process_count()} processes. Use a mesh of all {jax.device_count()} devices."
        )
    return found


def _convert(
    model: ModelConfig,
    step: StepConfig,
    target: Sharding,
    dtype: str,
    stages: Sequence[Params],
    params: Params,
    frozen: Params | None,
) -> Params:
    """The program: all weights in the inference layout.

    Args:
      model, step, dtype: as for `InferenceLayout`.
      target: the sharding that the layout is for.
      stages: shardings of unstacked weights on the trainer's mesh, one after the other. The first are those that they
        have: weights are rounded before they are moved.
      params, frozen: of the trainer.
    """

    def unstacked(tree: Params) -> Params:
        """With a list of layers in float32, in which LoRA is added before anything is rounded."""
        layers = tree.get("layers")
        if isinstance(layers, dict):
            layers = unstack(layers, "float32", model.sparse_layers)
        elif layers is not None:
            layers = jax.tree.map(lambda x: x.astype("float32"), layers)
        return tree if layers is None else {**tree, "layers": layers}

    # The whole tree, without LoRA.
    params = unstacked(params)
    if frozen is not None:
        params = union(params, unstacked(frozen))
    if step.lora is not None:
        params = merged(params, step.lora)
    # An output that is an input would be the same buffer, which the next training step donates.
    rounded = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)
    for shardings in stages:
        rounded = jax.lax.with_sharding_constraint(rounded, shardings)
    return {**rounded, "layers": [fused_layer(layer, model, target) for layer in rounded["layers"]]}


def _arranged(mesh: Mesh, target: Mesh) -> Mesh | None:
    """The trainer's devices as copies of a target mesh, in order; None if their number is no multiple of it."""
    copies, rest = divmod(mesh.size, target.size)
    return None if rest or not copies else _automatic(mesh, {**target.shape, "data": copies})


def _automatic(mesh: Mesh, sizes: dict[str, int]) -> Mesh:
    """The devices of a mesh in a shape, with automatic axes."""
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
