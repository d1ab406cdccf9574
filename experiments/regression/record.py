"""Records what the code computes on the CPU, bit for bit, so that two commits can be compared.

    python -m experiments.regression.record OUT                 # record everything into the folder OUT
    python -m experiments.regression.record OUT --only curves   # one section, or several
    python -m experiments.regression.record --compare A B       # one line for each item; status 1 if anything differs
    python -m experiments.regression.record --begin BASE        # stopped runs, and the results of uninterrupted ones
    python -m experiments.regression.record --resume BASE OUT   # resume copies of these runs, and compare

A change that should change nothing leaves every item identical. Both folders must be made with the same packages on the
same kind of machine. Recording takes about 25 minutes on two cores.
"""

import argparse
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.regression.material import make_material
from experiments.regression.section import Section, attempt
from experiments.regression.sections import SECTIONS, STOP, launch, look_at_run

DEVICES = 8


def environment() -> dict[str, Any]:
    """What the bits may depend on besides the code."""
    import importlib.metadata

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = [line for line in cpu.splitlines() if line.startswith(("model name", "flags"))]
    names = sorted({line.split(":", 1)[1].strip() for line in lines})
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "cpu": hashlib.sha256("".join(names).encode()).hexdigest()[:16],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **versions,
    }


def record(out: Path, only: Sequence[str]) -> int:
    """Records the sections into a folder."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    import qwen_jax

    print(f"recording {Path(qwen_jax.__file__ or '').resolve().parent}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    failures = []
    for name in only or SECTIONS:
        begin, section = time.perf_counter(), Section(name)
        with attempt(section, name):
            SECTIONS[name](section)
        section.write(out)
        failures += [f"{name}: {item}" for item in section.failures]
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        jax.clear_caches()
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def begin(base: Path) -> int:
    """Makes runs that were stopped, and records what whole ones give."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    material = make_material(base / "material")
    section = Section("runs")
    for kind in ("dense", "moe"):
        status = launch(kind, material, base / "stopped" / kind, STOP)
        print(f"{kind}: stopped after step {STOP} with status {status}", flush=True)
        status = launch(kind, material, base / "whole" / kind)
        look_at_run(section, kind, base / "whole" / kind, [status])
    section.write(base / "expected")
    (base / "expected" / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    return 0


def resume(base: Path, out: Path) -> int:
    """Goes on with copies of stopped runs; the originals stay as they are."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    section = Section("runs")
    for kind in ("dense", "moe"):
        with attempt(section, kind):
            folder = out / kind
            if folder.exists():
                raise FileExistsError(f"{folder} exists already. Give a new folder.")
            shutil.copytree(base / "stopped" / kind / "run", folder / "run")
            status = launch(kind, (base / "material").absolute(), folder)
            look_at_run(section, kind, folder, [status])
    section.write(out)
    (out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    return compare(base / "expected", out)


def compare(a: Path, b: Path) -> int:
    """Prints one line for each item of either folder."""
    one, two = (json.loads((folder / "environment.json").read_text()) for folder in (a, b))
    for key in sorted({*one, *two}):
        if one.get(key) != two.get(key):
            print(f"note: {key} was {one.get(key)!r} in {a} and {two.get(key)!r} in {b}, which may change bits")
    sections = sorted({p.stem for folder in (a, b) for p in folder.glob("*.json")} - {"environment"})
    counts = {"identical": 0, "DIFFERENT": 0}
    for name in sections:
        values, arrays = [], []
        for folder in (a, b):
            there = (folder / f"{name}.json").exists()
            values.append(json.loads((folder / f"{name}.json").read_text()) if there else {})
            arrays.append(by_item(folder / f"{name}.npz") if there else {})
        for item in sorted({*values[0], *values[1]}):
            reasons = difference(item, values, arrays, (a, b))
            verdict = "DIFFERENT" if reasons else "identical"
            counts[verdict] += 1
            print(f"{verdict}  {name}: {item}{'; '.join(['', *reasons]).replace('; ', ' -- ', 1)}")
    print(f"{counts['identical']} identical, {counts['DIFFERENT']} different")
    return 1 if counts["DIFFERENT"] else 0


def by_item(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each item."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as file:
        for key in file.files:
            item, name = key.split("::", 1)
            found.setdefault(item, {})[name] = file[key]
    return found


def difference(item: str, values: Sequence[Any], arrays: Sequence[Any], folders: Sequence[Path]) -> list[str]:
    """What differs in an item; nothing if all bits are the same."""
    for i in (0, 1):
        if item not in values[i]:
            return [f"only in {folders[1 - i]}"]
        if "error" in values[i][item]:
            return [f"could not be made in {folders[i]}: {values[i][item]['error']}"]
    reasons = []
    one, two = (x.get(item, {}) for x in arrays)
    if one.keys() != two.keys():
        reasons.append(f"arrays in only one: {', '.join(sorted(one.keys() ^ two.keys())[:5])}")
    different, worst = 0, (-1.0, "", 0.0)
    for name in sorted(one.keys() & two.keys()):
        x, y = one[name], two[name]
        if x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes():
            continue
        different += 1
        if x.shape != y.shape:
            reasons.append(f"{name} has shape {list(x.shape)} and {list(y.shape)}")
            continue
        gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
        largest = float(np.where(np.isnan(gap), np.inf, gap).max(initial=0.0))
        worst = max(worst, (largest, name, float(np.abs(x.astype(np.float64)).max(initial=0.0))))
    if different and worst[1]:
        reasons.append(
            f"{different} of {len(one)} arrays; the largest difference is {worst[0]:.3g}, "
            f"in {worst[1]}, whose largest value is {worst[2]:.3g}"
        )
    paths = sorted(unequal(values[0][item], values[1][item]))
    if paths:
        reasons.append(f"{len(paths)} values: {', '.join(paths[:4])}{', ...' if len(paths) > 4 else ''}")
    return reasons


def unequal(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """The paths at which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            missing = object()
            yield from unequal(a.get(key, missing), b.get(key, missing), f"{path}/{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from unequal(x, y, f"{path}/{i}")
    elif a != b:
        yield path


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder to record into")
    parser.add_argument("--only", nargs="+", default=[], choices=list(SECTIONS), help="sections to record")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    parser.add_argument("--begin", type=Path, metavar="BASE")
    parser.add_argument("--resume", nargs=2, type=Path, metavar=("BASE", "OUT"))
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    if options.begin:
        return begin(options.begin.absolute())
    if options.resume:
        return resume(*(path.absolute() for path in options.resume))
    if options.out is None:
        parser.error("Give a folder to record into.")
    return record(options.out.absolute(), options.only)


if __name__ == "__main__":
    sys.exit(main())
