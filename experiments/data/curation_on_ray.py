"""One curation on both engines: a process by itself, and two local Ray nodes; their files must be equal.

    python -m experiments.data.curation_on_ray [--documents 20000]

Prints the seconds of both, and fails where a byte differs.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train.curate.curation import Curation, Input, Select
from train.curate.run import RunOptions, run
from train.data.text import standard_library


def curation(folder: str) -> Curation:
    """Documents with ids, some used twice, and a condition on their length."""
    return Curation([Input("code", folder, id="key")], [Select("length(text) > 500")], shard_megabytes=2)


def make_input(folder: Path, count: int) -> None:
    """Pieces of Python's standard library, as JSON lines."""
    text = "".join(path.read_text("utf-8", "replace") for path in standard_library())
    with (folder / "code.jsonl").open("w") as file:
        for i in range(count):
            at = i * 997 % (len(text) - 3000)
            row = {"key": str(i if i % 100 else 0), "text": text[at : at + 100 + i * 31 % 2900]}
            file.write(json.dumps(row) + "\n")


def on_two_nodes(source: str, output: str) -> None:
    """Starts two Ray nodes on this machine and runs the curation there."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        run(curation(source), Path(output), RunOptions("ray", address=cluster.address))
    finally:
        ray.shutdown()
        cluster.shutdown()


def in_one_process(source: str, output: str) -> None:
    """Runs the curation on the native engine."""
    run(curation(source), Path(output), RunOptions("native", 1))


def hashes(folder: Path) -> dict[str, str]:
    """The files of a run but those that say how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("summary.json", "report.html")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    documents = parser.parse_args().documents
    folder = Path(tempfile.mkdtemp(prefix="qwen-jax-curation-"))
    try:
        (folder / "input").mkdir()
        make_input(folder / "input", documents)
        seconds: dict[str, Any] = {}
        for name, function in (("native", in_one_process), ("ray", on_two_nodes)):
            began = time.monotonic()
            # A process has one engine.
            process = multiprocessing.get_context("spawn").Process(
                target=function, args=(str(folder / "input"), str(folder / name))
            )
            process.start()
            process.join()
            if process.exitcode:
                return 1
            seconds[name] = time.monotonic() - began
        native, ray = hashes(folder / "native"), hashes(folder / "ray")
        different = sorted(name for name in {*native, *ray} if native.get(name) != ray.get(name))
        print(json.dumps({"documents": documents, "files": len(native), "different": different, "seconds": seconds}))
        return bool(different)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
