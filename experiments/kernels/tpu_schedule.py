"""Estimates the time of a Pallas TPU kernel without a TPU, from the final schedule of the compiler.

`tpu_attention` and `grouped_tpu` print tables of our kernels.

    python -m experiments.kernels.tpu_schedule module:function --kwargs '{"d": 64}' --topology v6e:2x2
    python -m experiments.kernels.tpu_schedule module:function --executions '{"step": 528, "step.1": 496, ...}'

`module:function` returns another function and its arguments as `jax.ShapeDtypeStruct`s. The kernels in that function
are compiled for the topology, in a separate process. Only while it is traced can it ask for the device
(`pltpu.get_tpu_info`); before that there is only the CPU. A TPU core issues one bundle of instructions per cycle, in
order. So the time of a kernel is bundles x executions / clock, or that of its bytes from and to HBM if that is longer.
The estimate does not include waiting for a copy that was started too late, the launch, and the operations of XLA around
the kernel.

The schedule has each bundle once, in branches and loops too. The command lists the regions between branches: `grid` is
the loop over the grid, `step` its body, `step.0`, `step.1` ... the branches (`pl.when`, each side of `lax.cond`) and
loops in it in the order of the program, `step.1.0` a region inside one of them. With `--scopes` a `jax.named_scope`
around everything in a branch names it. How often each region runs depends on shapes and masks: pass it as `executions`,
summed over all cores.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from train.plan.topology import CHIPS


@dataclasses.dataclass(frozen=True)
class Core:
    """What a schedule depends on: one TensorCore.

    Attributes:
      clock: Hz.
      cores: cores of one JAX device; with two, a grid with a parallel dimension is split between them (megacore).
      devices: JAX devices of one chip.
      mxu_width: rows and columns of a matrix unit. A product uses that many of each at once, filled or not.
      vmem: bytes of VMEM.
      delay_slots: bundles after a branch that run whether it is taken or not.
    """

    clock: float
    cores: int
    devices: int
    mxu_width: int
    vmem: int
    delay_slots: int


MiB = 1 << 20
# Clocks are the published peaks (train/plan/topology.py) over the work of the matrix units in a cycle: 4 of 128x128,
# from v6e on 2 of 256x256 that take two rows. Sizes of a core are from jax/_src/pallas/mosaic/tpu_info.py; delay slots
# are those of schedules. The peak of 7x implies 2.2 GHz; XLA itself uses 1.9, and published times agree with that.
CORES = {
    "v4": Core(1.05e9, 2, 1, 128, 16 * MiB, 4),
    "v5e": Core(1.50e9, 1, 1, 128, 128 * MiB, 4),
    "v5p": Core(1.75e9, 2, 1, 128, 64 * MiB, 4),
    "v6e": Core(1.75e9, 1, 1, 256, 128 * MiB, 4),
    "7x": Core(1.90e9, 1, 2, 256, 64 * MiB, 6),
}
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "7x:2x2x1"}

# Columns of the compiler's table: slots of each unit that a bundle uses. Loads and stores of spilled registers are also
# counted in separate columns.
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")

_MODULE = "experiments.kernels.tpu_schedule"
_RECORD_SCOPES = "--xla_enable_custom_call_region_trace=true --xla_xprof_register_llo_debug_info=true "

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})?: +>* *\{")
_BRANCH = re.compile(r"sbr\.rel (?:\([^)]*\) )?target bundleno = (\d+)")
_TRIPS = re.compile(r"totalorder %\w+, (\d+) /\* loop exit test \*/")
_SCOPE = re.compile(r"TraceMeStart\((.*?)\)")
_VMEM = re.compile(r"(#allocation\w+) \[.*?space=vmem, size = (0x[0-9a-f]+)(?:.*?tag = '([^']*))?")


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles between branches.

    Attributes:
      name: unique in its kernel.
      kind: "kernel", "loop" or "when".
      parent: name of the region around it, "" of the kernel.
      bundles: without those of the regions inside it.
      slots: used in these bundles, for each of `UNITS`.
      capacity: slots of each unit in one bundle.
      trips: of a loop from 0 to a constant, on one core; otherwise None.
    """

    name: str
    kind: str
    parent: str
    bundles: int
    slots: tuple[int, ...]
    capacity: tuple[int, ...]
    trips: int | None

    def share(self, unit: str) -> float:
        """The share of the slots of a unit that is used."""
        i = UNITS.index(unit)
        return self.slots[i] / (self.capacity[i] * self.bundles) if self.bundles else 0.0

    @property
    def spills(self) -> int:
        """Stores of spilled vector registers."""
        return self.slots[UNITS.index("VSTORE:SPILL")]

    @property
    def fills(self) -> int:
        """Loads of spilled vector registers."""
        return self.slots[UNITS.index("VLOAD:FILL")]

    @property
    def busiest(self) -> str:
        """The unit with the largest share."""
        return max(UNITS, key=self.share)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
      name: in the compiled program.
      chip: key of `CORES`.
      regions: in the order of the program, the kernel itself first.
      cores: that run it.
      vmem: bytes of windows, scratch and spilled registers.
      vmem_spilled: bytes of spilled registers.
    """

    name: str
    chip: str
    regions: tuple[Region, ...]
    cores: int
    vmem: int
    vmem_spilled: int

    def __getitem__(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)

    @property
    def products(self) -> list[str]:
        """Names of the regions with matrix products."""
        return [region.name for region in self.regions if region.share("MXU")]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated time of a kernel.

    Attributes:
      kernel: what was compiled.
      executions: of each region, summed over all cores.
      assumed: regions whose executions were not given.
      schedule: seconds of the bundles.
      hbm: seconds of the bytes.
    """

    kernel: Kernel
    executions: dict[str, float]
    assumed: tuple[str, ...]
    schedule: float
    hbm: float

    @property
    def seconds(self) -> float:
        """The longer of both."""
        return max(self.schedule, self.hbm)

    def part(self, region: Region) -> float:
        """The share of a region in the executed bundles."""
        total = sum(r.bundles * self.executions[r.name] for r in self.kernel.regions)
        return region.bundles * self.executions[region.name] / total


def estimate(kernel: Kernel, executions: Mapping[str, float], hbm_bytes: float = 0.0) -> Estimate:
    """Adds up the regions of a kernel.

    Args:
      kernel: from `compile_kernels`.
      executions: how often each region runs, by name, summed over all cores. By default a region runs as often as the
        region around it, and a loop with a known number of trips that many times more. `grid` runs two more times than
        `step` on each core, because of the pipeline of copies.
      hbm_bytes: bytes read and written.

    Raises:
      InputError: a name that is not a region, or a loop without a known number of trips.
    """
    core, names = CORES[kernel.chip], [region.name for region in kernel.regions]
    if unknown := set(executions) - set(names):
        raise InputError(f"Expected regions of {kernel.name}, which are {', '.join(names)}; got {sorted(unknown)}.")
    counts: dict[str, float] = {}
    assumed = []
    for region in kernel.regions:
        if region.name in executions:
            counts[region.name] = executions[region.name]
            continue
        assumed.append(region.name)
        if region.kind == "kernel":
            counts[region.name] = kernel.cores
        elif region.name == "grid" and "step" in executions:
            counts[region.name] = executions["step"] + 2 * kernel.cores
        elif region.name == "step" and kernel["grid"].trips is not None:
            counts[region.name] = counts["grid"] - 2 * kernel.cores
        elif region.kind == "when":
            counts[region.name] = counts[region.parent]
        elif region.trips is not None:
            counts[region.name] = counts[region.parent] * region.trips
        else:
            raise InputError(
                f"Expected executions of the loop {region.name} of {kernel.name}, whose trips are not known; pass them."
            )
    cycles = sum(region.bundles * counts[region.name] for region in kernel.regions) / kernel.cores
    bandwidth = CHIPS[kernel.chip].hbm_bandwidth / core.devices
    return Estimate(kernel, counts, tuple(assumed), cycles / core.clock, hbm_bytes / bandwidth)


def compile_kernels(
    build: str, topology: str, kwargs: Mapping[str, Any] | None = None, scopes: bool = False
) -> list[Kernel]:
    """Compiles what a function builds for a TPU, in a separate process, and reads the schedules of its kernels.

    Args:
      build: "module:function". Called with `kwargs` it returns a function and its arguments, `jax.ShapeDtypeStruct`s.
      topology: such as "v5p:2x2x1"; one device of it is compiled for.
      kwargs: values that JSON can represent.
      scopes: name regions by the `jax.named_scope` in them. It compiles twice, because recording them moves bundles.

    Raises:
      InputError: the compiler refuses; its message is included.
    """
    chip = topology.partition(":")[0]
    plain = _dump(build, topology, kwargs or {}, "")
    named = _dump(build, topology, kwargs or {}, _RECORD_SCOPES) if scopes else {}
    return [read_kernel(name, chip, *texts, *named.get(name, ())[:1]) for name, texts in plain.items()]


def _dump(build: str, topology: str, kwargs: Mapping[str, Any], flags: str) -> dict[str, tuple[str, str, str]]:
    """For each kernel its bundles, the table of units and the allocations, as text."""
    folder = Path(tempfile.mkdtemp(prefix="tpu_schedule_"))
    try:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"{flags}--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=(post-ra|pre-delay)",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-m", _MODULE, build, "--compile", "--topology", topology, "--kwargs"]
        start = time.perf_counter()
        result = subprocess.run(
            [*command, json.dumps(dict(kwargs))], env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        print(f"{build} {dict(kwargs)} for {topology}: compiled in {seconds:.0f} s", file=sys.stderr, flush=True)
        if result.returncode:
            raise InputError(f"{build} {dict(kwargs)} does not compile for {topology}: {result.stderr[-3000:]}")
        names = json.loads(result.stdout.splitlines()[-1])
        kinds = ("packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization", "post-ra")
        return {name: tuple(_text(folder, name, kind) for kind in kinds) for name in names}  # type: ignore[misc]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _text(folder: Path, name: str, kind: str) -> str:
    files = [x for x in folder.iterdir() if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{kind}\.txt", x.name)]
    if not files:
        raise InputError(
            f"Expected a file {kind} of {name} from the compiler; this version of libtpu is not supported."
        )
    return files[0].read_text()


def compile_here(build: str, topology: str, kwargs: Mapping[str, Any]) -> list[str]:
    """Compiles in this process, and returns the names of the kernels."""
    import jax

    from train.plan.topology import target

    module, _, name = build.partition(":")
    function, arguments = getattr(importlib.import_module(module), name)(**kwargs)
    device = target(topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    # Functions that ask for the device while tracing, such as `get_tpu_info`, look at the mesh.
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        text = jax.jit(function).lower(*placed).compile().as_text() or ""
    return re.findall(r"%(\S+) = .*custom_call_target=\"tpu_custom_call\"", text)


def read_kernel(name: str, chip: str, bundles: str, units: str, allocations: str, scopes: str = "") -> Kernel:
    """Reads the files of the compiler for one kernel.

    Args:
      name: of the kernel.
      chip: key of `CORES`.
      bundles: the file `*-packed-bundles-post-ra.txt`: one entry for each cycle, branches with their targets.
      units: the file `*-pre-delay_hlo-static-per-bundle-utilization.txt`: one row for each of those.
      allocations: the file `*-post-ra.txt`.
      scopes: `bundles` of a compilation that records the names of scopes, or "".

    Raises:
      InputError: the files do not match.
    """
    core = CORES[chip]
    texts = _bundles(bundles)
    head, _, table = units.partition("== UTILIZATION:\n")
    capacity = tuple(map(int, head.strip().splitlines()[-1].split()))
    rows = np.array([line.split() for line in table.splitlines() if line.strip()], int)
    if rows.shape != (len(texts), len(UNITS)):
        raise InputError(f"Expected {len(texts)} rows of {len(UNITS)} units for {name}; got {rows.shape}.")
    spans = _spans(texts, core.delay_slots)
    names = _names(spans, _scope_names(scopes, spans, core.delay_slots) if scopes else {})
    inner = {i: [j for j, span in enumerate(spans) if span.parent == i] for i in range(len(spans))}
    regions = []
    for i, span in enumerate(spans):
        own = np.zeros(len(texts), bool)
        own[span.start : span.end] = True
        for j in inner[i]:
            own[spans[j].start : spans[j].end] = False
        found = [_TRIPS.search(texts[k]) for k in np.flatnonzero(own)] if span.kind == "loop" else []
        trips = next((int(x[1]) for x in found if x), None)
        parent = "" if span.parent is None else names[span.parent]
        slots = tuple(int(x) for x in rows[own].sum(0))
        regions.append(Region(names[i], span.kind, parent, int(own.sum()), slots, capacity, trips))
    vmem = {x[0]: (int(x[1], 16), "spilled" in x[2]) for x in _VMEM.findall(allocations)}
    cores = 1 if "(PrimaryCoreRegion)" in allocations else core.cores
    spilled = sum(size for size, is_spill in vmem.values() if is_spill)
    return Kernel(name, chip, tuple(regions), cores, sum(size for size, _ in vmem.values()), spilled)


@dataclasses.dataclass
class _Span:
    kind: str
    start: int
    end: int
    parent: int | None


def _bundles(text: str) -> list[str]:
    """The text of each bundle, which may have several lines."""
    texts: list[str] = []
    for line in text.splitlines():
        if (found := _BUNDLE.match(line)) and int(found[1], 16) == len(texts):
            texts.append(line)
        elif texts:
            texts[-1] += line
    return texts


def _spans(texts: Sequence[str], delay_slots: int) -> list[_Span]:
    """Spans of code: a forward branch guards what it jumps over, a backward branch ends a loop that begins there."""
    found = []
    for i, text in enumerate(texts):
        for branch in _BRANCH.finditer(text):
            to, behind = int(branch[1]), i + 1 + delay_slots
            found.append(_Span("loop", to, behind, None) if to <= i else _Span("when", behind, to, None))
    found = [span for span in found if span.start < span.end]
    # If a guard and a loop are the same span, the guard is around the loop.
    found.sort(key=lambda x: (x.start, -x.end, x.kind == "loop"))
    spans = [_Span("kernel", 0, len(texts), None), *found]
    open_ = [0]
    for i, span in enumerate(spans[1:], 1):
        while spans[open_[-1]].end <= span.start:
            open_.pop()
        span.parent, span.end = open_[-1], min(span.end, spans[open_[-1]].end)
        open_.append(i)
    return spans


def _names(spans: Sequence[_Span], scopes: Mapping[int, str]) -> list[str]:
    loops = [i for i, span in enumerate(spans) if span.kind == "loop"]
    grid = max(loops, key=lambda i: spans[i].end - spans[i].start, default=0)
    guards = [i for i, span in enumerate(spans) if span.parent == grid and span.kind == "when"]
    step = max(guards, key=lambda i: spans[i].end - spans[i].start, default=0)
    names: list[str] = []
    children = [0] * len(spans)
    for i, span in enumerate(spans):
        if span.parent is None:
            name = "kernel"
        elif i == grid:
            name = "grid"
        elif i == step:
            name = "step"
        else:
            name = f"{names[span.parent]}.{children[span.parent]}"
            children[span.parent] += 1
        scope = scopes.get(i, name)
        names.append(name if scope in names else scope)
    return names


def _scope_names(text: str, plain: Sequence[_Span], delay_slots: int) -> dict[int, str]:
    """The first scope that begins in each region; none if recording scopes changed the regions."""
    texts = _bundles(text)
    spans = _spans(texts, delay_slots)
    if [(x.kind, x.parent) for x in spans] != [(x.kind, x.parent) for x in plain]:
        return {}
    found: dict[int, str] = {}
    for k, bundle in enumerate(texts):
        if scope := _SCOPE.search(bundle):
            owner = max(i for i, span in enumerate(spans) if span.start <= k < span.end)
            found.setdefault(owner, scope[1])
    return found


def report(result: Estimate) -> str:
    """A summary of a kernel, with its regions as a Markdown table."""
    kernel, core, units = result.kernel, CORES[result.kernel.chip], ("MXU", "VALU", "XLU", "EUP", "VLOAD", "VSTORE")
    lines = [
        f"{kernel.name}: {kernel.cores} core(s) of {kernel.chip} at {core.clock / 1e9:.2f} GHz; VMEM "
        f"{kernel.vmem / MiB:.1f} of {core.vmem / MiB:.0f} MiB, {kernel.vmem_spilled / MiB:.1f} of it spilled "
        f"registers; schedule {result.schedule * 1e3:.3f} ms, HBM {result.hbm * 1e3:.3f} ms.",
        f"| region | runs | bundles | of the time | {' | '.join(units)} | registers spilled | restored |",
        "|---" * 12 + "|",
    ]
    for region in kernel.regions:
        lines.append(
            f"| {region.name} | {result.executions[region.name]:.0f}{'?' * (region.name in result.assumed)} | "
            f"{region.bundles} | {result.part(region):.2f} | {' | '.join(f'{region.share(u):.2f}' for u in units)} | "
            f"{region.spills} | {region.fills} |"
        )
    return "\n".join(lines)


def as_json(result: Estimate) -> str:
    """Everything known of a kernel as one line of JSON; `slots` are those of `units`."""
    return json.dumps({"seconds": result.seconds, "units": UNITS, **dataclasses.asdict(result)})


def main() -> None:
    """Prints the report of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", help="module:function, which returns a function and its arguments")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="for the function, as JSON")
    parser.add_argument("--topology", default="v5p:2x2x1", help="; ".join(TOPOLOGIES.values()))
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--executions", type=json.loads, default={}, help="of regions, summed over all cores, as JSON")
    parser.add_argument("--hbm-bytes", type=float, default=0.0, help="bytes that the kernel reads and writes")
    parser.add_argument("--scopes", action="store_true", help="name regions by jax.named_scope; compiles twice")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each kernel")
    parser.add_argument("--compile", action="store_true", help="only compile, and print the kernels' names")
    args = parser.parse_args()
    if args.compile:
        print(json.dumps(compile_here(args.build, args.topology, args.kwargs)))
        return
    for kernel in compile_kernels(args.build, args.topology, args.kwargs, args.scopes):
        if args.kernel in kernel.name:
            # A loop with an unknown number of trips is counted once.
            unknown = {r.name: 1.0 for r in kernel.regions if r.kind == "loop" and r.trips is None}
            result = estimate(kernel, unknown | args.executions, args.hbm_bytes)
            print(as_json(result) if args.json else report(result), flush=True)


if __name__ == "__main__":
    main()
