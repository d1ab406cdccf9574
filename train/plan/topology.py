"""Topologies to compile for, whether their chips are present or not, and the published figures of these chips."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh

GiB = 1 << 30
# Without a TPU, libtpu looks for the host that it runs on, and prints errors when it finds none. Tell it not to ask the
# metadata server, and name a host; the topology does not depend on it.
_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      name: its name in a topology.
      hbm_bytes: memory that is available to a program, in bytes.
      flops: peak bfloat16 FLOP/s.
      hbm_bandwidth: memory bandwidth in bytes/s.
      ici_bandwidth: bytes/s that a chip can send to its neighbours over all links together.
      dcn_bandwidth: bytes/s that a chip can send to another slice: its share of the host's network.
      low_precision_flops: peak FLOP/s of int8 or float8, of chips on which the training step has such products;
        otherwise 0.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    low_precision_flops: float = 0.0


# Peak, memory bandwidth and networks are from the pages of docs.cloud.google.com/tpu on each generation. Those of v4
# and v5p do not name the hosts' network cards: 100 Gbit/s for a host of 4 chips are assumed. The memory is what the
# compiler says is available when it refuses a program.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GiB), 275e12, 1.2e12, 300e9, 3.1e9),
        Chip("v5e", int(15.75 * GiB), 197e12, 819e9, 200e9, 3.1e9, 394e12),
        Chip("v5p", int(95.74 * GiB), 459e12, 2.765e12, 600e9, 3.1e9, 918e12),
        Chip("v6e", int(31.25 * GiB), 918e12, 1.64e12, 400e9, 12.5e9, 1836e12),
        Chip("7x", int(189.5 * GiB), 2307e12, 7.38e12, 600e9, 12.5e9, 4614e12),
    )
}
# Names of the chips by `device_kind`.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}
# From the data sheets of the SXM parts: NVLink in one direction, and one 400 Gbit/s network card for each GPU.
_GPUS = {
    "H100": Chip("H100", 80 * GiB, 989e12, 3.35e12, 450e9, 50e9, 1979e12),
    "H200": Chip("H200", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9, 1979e12),
    "A100": Chip("A100", 80 * GiB, 312e12, 2.0e12, 300e9, 25e9),
    "B200": Chip("B200", 192 * 10**9, 2250e12, 8.0e12, 900e9, 50e9, 4500e12),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a step is compiled for.

    Attributes:
      topology: its name, as given.
      devices: devices of all slices. A device may be half a chip (a 7x has two cores).
      chip: figures of one device.
      num_slices: number of slices, which only the data-centre network connects.
    """

    topology: str
    devices: tuple[jax.Device, ...]
    chip: Chip
    num_slices: int


def target(topology: str, num_slices: int = 1) -> Target:
    """Describes the devices of a topology, whether they are present or not.

    Args:
      topology: a chip and the number of chips along each axis, such as "v5p:4x4x4", or "gpu" for the GPUs of this
        machine.
      num_slices: number of such slices.

    Raises:
      InputError: the chip or the shape is unknown, the TPU compiler is not installed, or there is no GPU.
    """
    if topology == "gpu":
        return _local_gpus()
    name, _, shape = topology.partition(":")
    name = name.removeprefix("tpu")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape) or num_slices < 1:
        raise InputError(
            f"Expected a topology such as v5p:4x4x4 or v6e:4x4 with a chip of {', '.join(CHIPS)}, or gpu, and at least "
            f"one slice; got {topology!r} and {num_slices}."
        )
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    chips = math.prod(map(int, shape.split("x"))) * num_slices
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{'tpu7x' if name == '7x' else name}:{shape}",
            num_slices=num_slices,
            # The two cores of a v4 are used as one device.
            **({"chip_config_name": "megacore"} if name == "v4" else {}),
        )
    except Exception as error:
        if "libtpu" in str(error) or "PJRT" in str(error):
            raise InputError(f"The TPU compiler is not installed: pip install 'qwen-jax[tpu]'. ({error})") from None
        raise InputError(
            f"The TPU compiler does not know the topology {topology} with {num_slices} slices: {error}"
        ) from None
    devices = tuple(described.devices)
    return Target(topology, devices, _divided(CHIPS[name], len(devices) // chips), num_slices)


def _local_gpus() -> Target:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        raise InputError(
            "There is no GPU on this machine that jax can see. Give a TPU topology such as v5p:4x4x4."
        ) from None
    kind = devices[0].device_kind
    chip = _gpu(kind)
    if chip is None:
        raise InputError(f"No figures are known for {kind!r}, only for {', '.join(_GPUS)}.")
    return Target("gpu", tuple(devices), chip, 1)


def _gpu(kind: str) -> Chip | None:
    return next((chip for name, chip in _GPUS.items() if name in kind), None)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Peak bfloat16 FLOP/s of devices of one kind together; None if the figures of their kind are not known.

    Args:
      devices: as from `jax.devices()`.
    """
    kind = devices[0].device_kind
    if name := _TPU_KINDS.get(kind):
        # A device may be half a chip.
        chips = {(getattr(device, "slice_index", 0), *device.coords) for device in devices}
        return CHIPS[name].flops * len(chips)
    chip = _gpu(kind)
    return chip.flops * len(devices) if chip else None


def _divided(chip: Chip, cores: int) -> Chip:
    """The figures of one of several cores of a chip."""
    numbers = {f.name: getattr(chip, f.name) for f in dataclasses.fields(chip) if f.name != "name"}
    return Chip(chip.name, **{name: type(value)(value / cores) for name, value in numbers.items()})


def mesh_of(where: Target, axes: Mapping[str, int]) -> Mesh:
    """The mesh of all devices of a topology, as a run on them would make it.

    Args:
      where: from `target`.
      axes: sizes of the axes that are not 1.

    Raises:
      InputError: the axes do not use all devices, or `make_mesh` refuses them.
    """
    count = len(where.devices)
    if math.prod(axes.values()) != count:
        raise InputError(
            f"{where.topology} has {count} devices in {where.num_slices} slices; the mesh {dict(axes)} has "
            f"{math.prod(axes.values())}. Give a mesh of all devices."
        )
    return make_mesh(axes, where.devices)
