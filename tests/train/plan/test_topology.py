"""Topologies, their meshes and their peaks; what is refused."""

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from qwen_jax.errors import InputError
from qwen_jax.parallel import sharding
from qwen_jax.parallel.sharding import AXES
from tests.helpers.tpu_compiler import needs_libtpu
from train.plan.topology import CHIPS, mesh_of, peak_flops, target


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v9:4x4", 1, "v5p:4x4x4"),
        ("v5p", 1, "v5p:4x4x4"),
        ("v5p:4xx4", 1, "v5p:4x4x4"),
        ("v6e:4x4", 0, "at least one slice"),
        ("gpu", 1, "no GPU on this machine"),
    ],
)
def test_what_is_no_topology_is_refused(topology: str, slices: int, message: str) -> None:
    if topology == "gpu" and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(InputError, match=message):
        target(topology, slices)


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_there_is_a_topology_of_every_chip(chip: str) -> None:
    """A device of a v4 is a chip, of a 7x half of one."""
    where = target(f"{chip}:2x2" + "x1" * (chip in ("v4", "v5p", "7x")))
    assert mesh_of(where, {"fsdp": len(where.devices)}).size == (8 if chip == "7x" else 4)
    assert where.chip.hbm_bytes == CHIPS[chip].hbm_bytes // (2 if chip == "7x" else 1)


def _fakes(groups: Sequence[Any], per_group: int, platform: str) -> list[Any]:
    """Devices of slices, in an order that mixes them; of processes where the group is None."""
    fakes = [
        SimpleNamespace(
            platform=platform,
            device_kind="fake",
            process_index=i,
            number=n,
            **({} if g is None else {"slice_index": g}),
        )
        for n in range(per_group)
        for i, g in enumerate(groups)
    ]
    for identity, fake in enumerate(fakes):
        fake.id = identity
    return fakes


@pytest.mark.parametrize(
    ("groups", "platform", "sizes", "between"),
    [
        ((0, 1), "cpu", {"data": 2, "fsdp": 4}, [{0}, {1}]),
        ((0, 1), "cpu", {"data": 4, "fsdp": 2}, [{0}, {0}, {1}, {1}]),
        ((1, 0), "gpu", {"data": 2, "tensor": 4}, [{0}, {1}]),
        # Processes are nodes where GPUs do not say what they are joined by.
        ((None, None), "gpu", {"data": 2, "fsdp": 4}, [{0}, {1}]),
        # Nodes beyond the data axis are joined by fsdp: its first half is one node.
        ((0, 1), "gpu", {"fsdp": 8}, [{0, 1}]),
        ((0, 1, 2, 3), "gpu", {"data": 2, "fsdp": 4, "tensor": 2}, [{0, 1}, {2, 3}]),
    ],
)
def test_what_joins_slices_and_nodes_is_outermost(
    groups: Any, platform: str, sizes: dict[str, int], between: list[set[int]]
) -> None:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = _fakes(groups, math.prod(shape) // len(groups), platform)
    mesh = sharding._arrange(shape, devices)
    key = "process_index" if groups[0] is None else "slice_index"
    assert mesh.shape == shape
    assert [{getattr(d, key) for d in row.flat} for row in mesh] == between
    assert {d.id for d in mesh.flat} == {d.id for d in devices}
    # A row of fsdp, context and tensor stays in one slice or node, but for the parts of fsdp that join nodes.
    for row in mesh.reshape(-1, len(devices) // len(groups)):
        assert len({getattr(d, key) for d in row}) == 1


@pytest.mark.parametrize(
    ("groups", "platform", "sizes", "message"),
    [
        ((0, 1), "cpu", {"fsdp": 8}, "data axis must be a multiple of the 2 slices"),
        ((0, 1, 2), "cpu", {"data": 2, "fsdp": 3}, "data axis must be a multiple of the 3 slices"),
        ((0, 1), "gpu", {"tensor": 8}, "data x fsdp, must be a multiple of the 2 nodes"),
        ((0, 1, 1), "cpu", {"data": 3}, "use the same number of devices of each"),
    ],
)
def test_meshes_that_slices_cannot_make_are_refused(
    groups: Any, platform: str, sizes: dict[str, int], message: str
) -> None:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    with pytest.raises(InputError, match=message):
        sharding._arrange(shape, _fakes(groups, math.prod(shape) // len(groups), platform))


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str
    coords: tuple[int, ...] = (0, 0, 0)
    slice_index: int = 0


def test_the_peak_of_devices_is_that_of_their_chips():
    assert peak_flops([Device("NVIDIA H100 80GB HBM3")] * 8) == 8 * 989e12
    assert peak_flops([Device("TPU v5 lite", (i, 0, 0)) for i in range(4)]) == 4 * 197e12
    assert peak_flops([Device("TPU v5", (i, 0, 0)) for i in range(4)]) == 4 * 459e12
    # Two devices are one chip; the same place in another slice is another.
    halves = [Device("TPU7x", (i // 2, 0, 0), s) for s in range(2) for i in range(4)]
    assert peak_flops(halves) == 4 * 2307e12
    assert peak_flops(jax.devices("cpu")) is None
