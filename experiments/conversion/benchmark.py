"""Speed and memory of checkpoint conversion, compared with `cp` of the same bytes on the same disk.

    python -m experiments.conversion.benchmark --directory /some/disk [--size 1.5b] [--repeats 3] [--json out.json]

Builds a random bfloat16 checkpoint of a published shape, then converts it to Orbax and back, each time in a fresh
process. Expected on a laptop or server with a warm page cache: less than 0.5 GB above the interpreter, and at least
half the speed of `cp`. Each is timed twice: until the command returns, and until the bytes are on the disk. The source
is in the page cache each time. Needs four times the size of the checkpoint on the disk, and removes it afterwards.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_CHILD = """
import json, sys, time
import jax, orbax.checkpoint, convert, convert.huggingface, convert.orbax
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e6
before, start, cpu = peak(), time.perf_counter(), time.process_time()
convert.convert(sys.argv[1], sys.argv[2])
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"convert_s": seconds, "cpu_s": cpu, "peak_gb_above_interpreter": peak() - before}))
"""


def build(folder: Path, size: str) -> int:
    """Writes a random bfloat16 checkpoint of a published shape and returns its bytes."""
    import ml_dtypes
    import numpy as np

    from convert.names import leaves
    from convert.safetensors import Writer
    from qwen_jax.published import published

    config = published(f"qwen2.5-{size}")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = {name: (dtype, leaf.hf_shape) for leaf in leaves(config) for name in leaf.names}
    random = np.random.default_rng(0)
    with Writer(folder, tensors, 5e9) as writer:
        for name, (_, shape) in tensors.items():
            writer.write(name, 0, (random.standard_normal(shape, np.float32) * 0.02).astype(dtype))
    return sum(path.stat().st_size for path in folder.iterdir())


def converted(source: Path, destination: Path) -> dict[str, float]:
    """Converts in a fresh process; measures with and without the start of Python and its imports."""
    start = time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(source), str(destination)],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    process = time.perf_counter() - start
    os.sync()
    synced = time.perf_counter() - start
    return {**json.loads(done.stdout), "process_s": process, "synced_s": synced}


def copied(source: Path, destination: Path) -> dict[str, float]:
    """Copies with `cp -r`."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    process, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    os.sync()
    return {"process_s": process, "cpu_s": cpu, "synced_s": time.perf_counter() - start}


def warm(folder: Path) -> None:
    """Reads every file once, so that it is in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def measure(directory: Path, size: str, repeats: int) -> dict[str, Any]:
    """Runs everything and returns the medians, with the machine on which they were measured."""
    runs: dict[str, list[dict[str, float]]] = {"cp": [], "hf -> orbax": [], "orbax -> hf": []}
    work = Path(tempfile.mkdtemp(prefix="conversion-", dir=directory))
    try:
        nbytes = build(work / "hf", size)
        os.sync()
        # The first write to new blocks is slower on many virtual disks: it is not timed.
        copied(work / "hf", work / "scratch")
        shutil.rmtree(work / "scratch")
        for _ in range(repeats):
            warm(work / "hf")
            runs["cp"].append(copied(work / "hf", work / "copy"))
            shutil.rmtree(work / "copy")
            warm(work / "hf")
            runs["hf -> orbax"].append(converted(work / "hf", work / "orbax"))
            warm(work / "orbax")
            runs["orbax -> hf"].append(converted(work / "orbax", work / "back"))
            same = subprocess.run(["cmp", work / "hf/model.safetensors", work / "back/model.safetensors"], check=False)
            if same.returncode != 0:
                raise SystemExit("The round trip changed the bytes.")
            shutil.rmtree(work / "orbax")
            shutil.rmtree(work / "back")
    finally:
        shutil.rmtree(work)
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()
    }
    return {"size": size, "bytes": nbytes, "machine": machine(), "runs": runs, "medians": medians}


def machine() -> dict[str, str]:
    """Describes the machine and the versions of the packages."""
    import jax
    import orbax.checkpoint

    return {
        "cpus": str(os.cpu_count()),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "tensorstore": importlib.metadata.version("tensorstore"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", default="1.5b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.directory, arguments.size, arguments.repeats)
    cp = result["medians"]["cp"]
    print(f"{result['bytes'] / 1e9:.2f} GB, medians of {arguments.repeats}; {result['machine']}")
    print("| | seconds | x cp | on disk | x cp | CPU seconds | with Python's start | peak above interpreter |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in result["medians"].items():
        seconds = row.get("convert_s", row["process_s"])
        on_disk = row["synced_s"] - (row["process_s"] - seconds)
        start = f"{row['process_s']:.2f}"
        peak = f"{row['peak_gb_above_interpreter']:.2f} GB" if "convert_s" in row else ""
        print(
            f"| {name} | {seconds:.2f} | {cp['process_s'] / seconds:.2f} | {on_disk:.2f} "
            f"| {cp['synced_s'] / on_disk:.2f} | {row['cpu_s']:.2f} | {start} | {peak} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
