"""Costs of a program: FLOPs and activations from the traced program, collectives from the compiled one."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters.partial_eval import dce_jaxpr

from qwen_jax.loops import most_times
from qwen_jax.moe.further_rounds import FURTHER_ROUNDS


def count_flops(jaxpr: Jaxpr | ClosedJaxpr, counts: Callable[[np.dtype], bool] = lambda dtype: True) -> float:
    """FLOPs of the matrix products of a jaxpr, on all devices together; a multiply and an add are 2.

    The body of a loop counts as often as it runs, or as it may run at most (`qwen_jax.loops`). Of a condition, the most
    expensive branch counts. Kernels declare their cost. Further rounds of experts do not count, nor do products whose
    results nothing uses: the compiler drops them, and remat="dots" traces each forward product again.

    Args:
      jaxpr: as from `jax.jit(f).trace(...).jaxpr`.
      counts: whether products count whose first operand has this dtype; of kernels, whose first result has it.
    """
    whole = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return _count_flops(dce_jaxpr(whole, [True] * len(whole.outvars))[0], counts)


def _count_flops(jaxpr: Jaxpr | ClosedJaxpr, counts: Callable[[np.dtype], bool]) -> float:
    total = 0.0
    for eqn in _equations(jaxpr):
        name, params = eqn.primitive.name, eqn.params
        if FURTHER_ROUNDS in str(eqn.source_info.name_stack):
            continue
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            out, left = _shaped(eqn.outvars[0]), _shaped(eqn.invars[0])
            if counts(left.dtype):
                total += 2.0 * out.size * math.prod(left.shape[i] for i in contract)
        elif name == "pallas_call":
            if counts(_shaped(eqn.outvars[0]).dtype):
                total += getattr(params.get("cost_estimate"), "flops", 0) or 0
        elif name == "cond":
            total += max(_count_flops(branch, counts) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            if name == "while":
                times = most_times(str(eqn.source_info.name_stack)) or 1
            if name == "shard_map":
                # Shapes inside a shard_map are those of one device.
                axes = params["manual_axes"] if "manual_axes" in params else params["mesh"].axis_names
                times = math.prod(params["mesh"].shape[axis] for axis in axes)
            total += times * sum(_count_flops(inner, counts) for inner in _inner(params))
    return total


def is_8_bit(dtype: np.dtype) -> bool:
    """Whether a dtype is that of rounded operands: int8, or one of float8."""
    return dtype.itemsize == 1


def kept_for_backward(jaxpr: Jaxpr | ClosedJaxpr, devices: int) -> int:
    """Bytes on one device of the stacked outputs of scans: what the forward pass keeps for the backward pass.

    Args:
      jaxpr: of the step.
      devices: number of devices of the mesh.
    """
    total = 0
    for eqn in _equations(jaxpr):
        if eqn.primitive.name == "scan":
            # What a scan stacks has one axis more than what an iteration returns. JAX 0.11 does not tell how many
            # values are carried.
            returned = eqn.params["jaxpr"].jaxpr.outvars
            pairs = zip(eqn.outvars, returned, strict=True)
            stacked = [out for out, one in pairs if _shaped(out).ndim > _shaped(one).ndim]
            if not stacked:  # A loop over micro-batches: count what one of them keeps.
                total += max(kept_for_backward(inner, devices) for inner in _inner(eqn.params))
            # Scans of the backward pass stack gradients of weights, which are not activations.
            arrays = [] if eqn.params["reverse"] else map(_shaped, stacked)
            total += sum(_local_bytes(array, devices) for array in arrays if array.ndim > 1)
        else:
            total += sum(kept_for_backward(inner, devices) for inner in _inner(eqn.params))
    return total


def _shaped(variable: Var | Literal) -> jax.core.ShapedArray:
    """Shape, dtype and sharding of an array."""
    return cast(jax.core.ShapedArray, variable.aval)


def _equations(jaxpr: Jaxpr | ClosedJaxpr) -> Sequence[JaxprEqn]:
    return jaxpr.jaxpr.eqns if isinstance(jaxpr, ClosedJaxpr) else jaxpr.eqns


def _inner(params: Mapping[str, object]) -> Iterator[Jaxpr | ClosedJaxpr]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                yield item


def _local_bytes(aval: jax.core.ShapedArray, devices: int) -> int:
    """Bytes of a value on one device."""
    sharding = getattr(aval, "sharding", None)
    shape: Sequence[int] = aval.shape
    if sharding is not None and sharding.mesh.size == devices:
        shape = [
            n // math.prod(sharding.mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)) if a)
            for n, axes in zip(aval.shape, sharding.spec, strict=True)
        ]
    return math.prod(shape) * aval.dtype.itemsize


# The text of a compiled program.

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_OP = re.compile(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_SENT_TO_HOST = re.compile(r"= \((\w+)\[([\d,]*)\].* send\(.*xla_megascale_runtime.*_transfer_type=\"(\w+)\"")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|branch_computations|async_execution_thread)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: such as "all-gather".
      bytes: bytes that one device sends each time.
      times: how often a step runs it.
      shape: shape of the result, or of the largest of several results, as text.
      result_bytes: size of the result on one device.
      group: the first group of devices that communicate, numbered in the order of the mesh.
      crosses_slices: whether a group has devices of several slices.
    """

    kind: str
    bytes: float
    times: int
    shape: str
    result_bytes: float = 0.0
    group: tuple[int, ...] = ()
    crosses_slices: bool = False


def computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """Splits a compiled program into its computations.

    Calls of further rounds of experts are left out: they are assumed not to run.

    Args:
      hlo: text of the optimised module.

    Returns:
      The name of the entry computation, and the lines of each computation by its name.
    """
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and not (" conditional(" in line and FURTHER_ROUNDS in line):
            bodies[name].append(line)
    return entry, bodies


def collectives(hlo: str, devices: int, num_slices: int = 1) -> list[Collective]:
    """Finds the collectives of a compiled program.

    An asynchronous collective may consist of several operations, which count once; on TPUs they have a common chain
    number. The TPU compiler writes the reduce-scatter of a ring as a fusion named `all-reduce-scatter`. A ragged
    all-to-all is assumed to send equally to all devices, and further rounds of experts are assumed not to run.

    Args:
      hlo: text of the optimised module.
      devices: number of devices.
      num_slices: number of slices; devices are numbered slice by slice.
    """
    # How often does each computation run?
    entry, bodies = computations(hlo)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, multiple: int) -> None:
        times[name] += multiple
        for line in bodies.get(name, ()):
            loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], multiple * _trip_count(line, loop[1], bodies[name], bodies))
                continue
            for match in _CALLS.finditer(line):
                for callee in re.findall(r"[\w.\-]+", match[1]):
                    if callee in bodies and not (_OP.search(line) and "to_apply" in match[0]):
                        visit(callee, multiple)

    visit(entry, 1)
    # The collectives in each of them.
    found: dict[str | tuple[str, str], Collective] = {}
    for name, body in bodies.items():
        for line in body:
            if not times[name]:
                continue
            if match := _SENT_TO_HOST.search(line):
                found[name, line] = _between_slices(match, times[name], devices, num_slices)
                continue
            match = _OP.search(line)
            if not match:
                continue
            members, crosses = _groups(line, devices, num_slices)
            kind, n, size = match[2], len(members), _result_bytes(match[1], match[2], "-start(" in line)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size / n
            if kind == "ragged-all-to-all":
                size = min(size, _operand_bytes(match[1], line, body))
            moved = {"all-reduce": 2.0 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
            sent = size * moved.get(kind, (n - 1) / n)
            chain = re.search(r'chain_id="(\d+)"', line)
            key: str | tuple[str, str] = chain[1] if chain else (name, line)
            old = found.get(key)
            if old is None or old.times < times[name]:
                shape = max(_SHAPE.findall(match[1]), key=_shape_bytes)
                found[key] = Collective(kind, sent, times[name], "{}[{}]".format(*shape), size, members, crosses)
    return list(found.values())


def _between_slices(match: re.Match[str], times: int, devices: int, num_slices: int) -> Collective:
    """The collective of one device of each slice, which goes through their hosts."""
    kind, shape = match[3].lower().replace("_", "-"), (match[1], match[2])
    size, members = _shape_bytes(shape), tuple(range(0, devices, devices // num_slices))
    sent = size * (2.0 if kind == "all-reduce" else 1.0) * (num_slices - 1) / num_slices
    return Collective(kind, sent, times, "{}[{}]".format(*shape), size, members, crosses_slices=True)


def _trip_count(line: str, condition: str, caller: Sequence[str], bodies: Mapping[str, list[str]]) -> int:
    """The trip count of the loop in a line of its caller."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    if most := most_times(line):
        return most
    # The first number in the state of a scan's loop counts up to a constant in its condition. It begins at 0, or at 1
    # if the compiler has peeled the first iteration.
    limits = [int(n) for text in bodies.get(condition, ()) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    defined = {match[1]: match[2] for text in caller if (match := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)", text))}
    value = re.search(r" while\(%([\w.\-]+)\)", line)
    start = None
    while value and start is None:
        text = defined.get(value[1], "")
        start = re.match(r"s32\[\]\S* constant\((\d+)\)", text)
        value = re.search(r" (?:tuple|copy)\(%([\w.\-]+)", text)
    return max(limits, default=1) - (int(start[1]) if start else 0)


def _shape_bytes(shape: tuple[str, str]) -> int:
    dtype, dims = shape
    return math.prod(map(int, filter(None, dims.split(",")))) * _BYTES.get(dtype, 4)


def _result_bytes(shape: str, kind: str, started: bool) -> float:
    sizes = [_shape_bytes(found) for found in _SHAPE.findall(shape)]
    if started and len(sizes) > 1:
        # An asynchronous start returns its operand and its result.
        return float(min(sizes) if kind == "reduce-scatter" else max(sizes))
    return float(sum(sizes))


def _operand_bytes(result: str, line: str, body: Sequence[str]) -> float:
    """Size of the buffer that is sent or of the one that receives, whichever is smaller.

    The other buffer has room for the worst case.
    """
    if "-start(" in line:  # Its result begins with its operands, the two buffers.
        return min(map(_shape_bytes, _SHAPE.findall(result)[:2]), default=math.inf)
    name = re.search(r"ragged-all-to-all\([^%)]*%([\w.\-]+)", line)
    pattern = re.compile(rf"\s*(?:ROOT )?%{re.escape(name[1])} = (.*?)[\w\-]+\(") if name else None
    shapes = [_SHAPE.findall(match[1]) for text in body if pattern and (match := pattern.match(text))]
    return float(_shape_bytes(shapes[0][0])) if shapes and shapes[0] else math.inf


def _groups(line: str, devices: int, num_slices: int) -> tuple[tuple[int, ...], bool]:
    """The first group of devices that communicate, and whether a group has devices of several slices."""
    slice_size = devices // num_slices

    def crosses(members: np.ndarray) -> bool:
        return num_slices > 1 and bool((members // slice_size != members[..., :1] // slice_size).any())

    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:\s*\(([^)]*)\))?\s*\{([^}]*)\}", line):
        axes = {name.strip("' "): int(size) for name, size in (part.split("=") for part in match[1].split(","))}
        order = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        chosen = [name.strip("' ") for name in match[3].split(",")]
        where = [list(axes).index(name) for name in chosen]
        members = np.moveaxis(order, where, range(-len(where), 0)).reshape(-1, math.prod(axes[n] for n in chosen))
        return tuple(members[0].tolist()), crosses(members)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        order = np.arange(devices).reshape([int(n) for n in match[3].split(",")])
        if match[4]:
            order = order.transpose([int(n) for n in match[4].split(",")])
        members = order.reshape(int(match[1]), int(match[2]))
        return tuple(members[0].tolist()), crosses(members)
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}", line):
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
        return tuple(groups[0]), any(crosses(np.array(group)) for group in groups)
    return tuple(range(devices)), num_slices > 1
