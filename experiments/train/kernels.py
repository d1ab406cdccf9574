"""Device time of a training step, by part of the model and by kernel, from a trace of `benchmark.py --profile`."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

# Of an operation's name the innermost counts; "attention" itself is the norm before it and the residual after it.
SCOPES = (
    "embed",
    "attention",
    "qkv",
    "attend",
    "o",
    "mlp",
    "moe",
    "experts",
    "norm",
    "cross_entropy",
    "optimizer",
    "accumulation",
)
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name="([^"]*)"')


def events(trace: Path) -> Iterator[tuple[str, str, float, float]]:
    """What ran on the device.

    Args:
      trace: an `.xplane.pb` file.

    Yields:
      Name of the kernel, name of its HLO instruction or "", start and duration in nanoseconds. Without a GPU, the
      operations of the host, which lie within one another where there are loops; loops themselves are left out.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not (line.name or "").startswith("Stream"):
                continue  # Sums over streams that the profiler adds.
            for event in line.events:
                stats = {key: value for key, value in event.stats if key == "hlo_op"}
                operation = str(stats.get("hlo_op", ""))
                if devices or (operation and not operation.startswith(("while", "call", "conditional"))):
                    yield event.name, operation, event.start_ns, event.duration_ns


def scopes(program: str) -> dict[str, tuple[str, str]]:
    """Part of the model and pass of every instruction of a compiled program.

    Args:
      program: HLO text.

    Returns:
      By the instruction's name: one of `SCOPES`, "stacking" (taking a layer's part from stacked arrays and putting it
      there) or "other"; and "forward", "again" (recomputed) or "backward".
    """
    found = {}
    for line in program.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            name, path = match.groups()
            words = re.findall(r"\w+", path)
            scope = next((word for word in reversed(words) if word in SCOPES), "other")
            if scope == "other" and words[-1] in ("dynamic_slice", "dynamic_update_slice"):
                scope = "stacking"
            turn = "again" if "rematted_computation" in words else "backward" if "transpose" in words else "forward"
            found[name] = scope, "" if scope == "optimizer" else turn
    return found


def kind(kernel: str) -> str:
    """What sort of kernel a name stands for."""
    name = kernel.lower()
    for sort, signs in {
        "attention": ("fmha", "flash", "sdpa", "attention", "fprop_f16", "bprop_f16", "cudnn_generated", "mosaic"),
        "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "dot"),
        "copy": ("memcpy", "memset", "copy"),
        "sort or scatter": ("sort", "scatter", "cub::"),
    }.items():
        if any(sign in name for sign in signs):
            return sort
    return "elementwise, reductions"


def print_kernels(folder: Path, top: int) -> None:
    """Prints tables of a trace.

    Args:
      folder: of `--profile`.
      top: how many kernels by name.

    Raises:
      SystemExit: there is no trace in the folder.
    """
    traces = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    if not traces:
        raise SystemExit(f"{folder} has no plugins/profile/*/*.xplane.pb. Make a trace with --profile {folder}.")
    steps = json.loads((folder / "steps.json").read_text())["steps"]
    of = scopes((folder / "step.hlo.txt").read_text())
    parts, kinds, kernels = (defaultdict[tuple[str, ...], float](float) for _ in range(3))
    counts: Counter[tuple[str, ...]] = Counter()
    first, last = float("inf"), 0.0
    for name, operation, start, duration in events(traces[-1]):
        scope = of.get(operation, of.get(name, ("other", "")))
        key = name[:90], "/".join(filter(None, scope))
        parts[scope] += duration
        kinds[(kind(name),)] += duration
        kernels[key] += duration
        counts[key] += 1
        first, last = min(first, start), max(last, start + duration)
    busy = sum(parts.values())
    if not busy:
        raise SystemExit(f"{traces[-1]} has no events of a device.")
    print(f"{busy / steps / 1e6:.1f} ms of kernels a step, within {(last - first) / steps / 1e6:.1f} ms; {steps} steps")

    def table(title: tuple[str, ...], rows: Any, more: Any = None) -> None:
        print(f"\n| {' | '.join(title)} | ms a step | share |" + (" launches a step |" if more else ""))
        print("|---" * (len(title) + 2 + bool(more)) + "|")
        for key, duration in rows:
            cells = [*key, f"{duration / steps / 1e6:.2f}", f"{duration / busy:.1%}"]
            print("| " + " | ".join(cells + ([f"{more[key] / steps:g}"] if more else [])) + " |")

    def sorted_items(sums: dict[tuple[str, ...], float]) -> list[tuple[tuple[str, ...], float]]:
        return sorted(sums.items(), key=lambda item: -item[1])

    table(("part", "pass"), sorted_items(parts))
    table(("kind",), sorted_items(kinds))
    table(("kernel", "part"), sorted_items(kernels)[:top], counts)
