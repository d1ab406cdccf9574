"""One curation on both engines: a process by itself, and two local Ray nodes; their files must be equal.

    python -m experiments.data.curation_on_ray [--documents 20000]
    python -m experiments.data.curation_on_ray --documents 400 --devices 4

With `--devices` a small model with random weights also scores the documents: a worker is one actor that holds the model
on so many devices of a CPU, which stand for the accelerators of a host. Prints the seconds of both engines, and fails
where a byte differs.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from convert.huggingface import export
from qwen_jax.cli.formats import CheckpointFormats
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import init_params
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from train.curate.curation import Curation, Input, Map, Select, Stage
from train.curate.deduplicate_stage import Deduplicate
from train.curate.engine import Resources
from train.curate.operators.fingerprint import Fingerprint
from train.curate.run import SUMMARY, RunOptions, run
from train.curate.scoring.model import ScoringOptions
from train.curate.scoring.operators import ModelScores
from train.curate.scoring.questions import RUBRICS
from train.data.text import standard_library


def curation(folder: Path, devices: int) -> Curation:
    """Documents with ids, some used twice, a condition on their length, duplicates, and scores."""
    stages: list[Stage] = [Select("length(text) > 500"), Map("fingerprints", [Fingerprint()]), Deduplicate()]
    if devices:
        options = ScoringOptions(max_tokens=128, row_tokens=512, batch_tokens=512 * devices, dtype="float32")
        scores = ModelScores(str(folder / "model"), RUBRICS[:2], CheckpointFormats(), f"data={devices}", options)
        # As for TPUs: an actor takes a whole host, and each node has one.
        stages.append(Map("scores", [scores], Resources(2, ray_options={"resources": {"TPU": devices}})))
    return Curation([Input("code", str(folder / "input"), id="key")], stages, shard_megabytes=2 if not devices else 0.2)


def use_devices(devices: int) -> None:
    """Makes JAX see so many devices of a CPU, in this process and in those that it starts."""
    os.environ |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}


def make_model(folder: Path) -> None:
    """A small model with random weights and a tokenizer of the library's text."""
    tokenizer = train_bpe([path.read_text("utf-8", "replace") for path in standard_library()[:60]], 2048)
    model = dataclasses.replace(published("tiny"), vocab_size=tokenizer.vocab_size, dtype="float32")
    mesh = make_mesh({}, jax.devices()[:1])
    params = init_params(model, jax.random.key(0), mesh)
    export(params, model, folder)
    tokenizer.save(folder)


def make_input(folder: Path, count: int) -> None:
    """Pieces of Python's standard library, as JSON lines."""
    text = "".join(path.read_text("utf-8", "replace") for path in standard_library())
    with (folder / "code.jsonl").open("w") as file:
        for i in range(count):
            at = i * 997 % (len(text) - 3000)
            row = {"key": str(i if i % 100 else 0), "text": text[at : at + 100 + i * 31 % 2900]}
            file.write(json.dumps(row) + "\n")


def on_two_nodes(folder: Path, output: Path, devices: int) -> None:
    """Starts two Ray nodes on this machine and runs the curation there."""
    import ray
    from ray.cluster_utils import Cluster

    if devices:
        use_devices(devices)
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, resources={"TPU": devices} if devices else None)
        cluster.wait_for_nodes()
        run(curation(folder, devices), output, RunOptions("ray", address=cluster.address))
    finally:
        ray.shutdown()
        cluster.shutdown()


def in_one_process(folder: Path, output: Path, devices: int) -> None:
    """Runs the curation on the native engine."""
    if devices:
        use_devices(devices)
    run(curation(folder, devices), output, RunOptions("native", 1))


def hashes(folder: Path) -> dict[str, str]:
    """The files of a run but those that say how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("summary.json", "report.html")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--devices", type=int, default=0, help="of the model that scores; by default none does")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qwen-jax-curation-"))
    try:
        (folder / "input").mkdir()
        make_input(folder / "input", args.documents)
        if args.devices:
            make_model(folder / "model")
        seconds: dict[str, Any] = {}
        for name, function in (("native", in_one_process), ("ray", on_two_nodes)):
            began = time.monotonic()
            # A process has one engine.
            process = multiprocessing.get_context("spawn").Process(
                target=function, args=(folder, folder / name, args.devices)
            )
            process.start()
            process.join()
            if process.exitcode:
                return 1
            seconds[name] = time.monotonic() - began
        native, ray = hashes(folder / "native"), hashes(folder / "ray")
        different = sorted(name for name in {*native, *ray} if native.get(name) != ray.get(name))
        stages = json.loads((folder / "native" / SUMMARY).read_text())["stages"]
        removed = {stage["name"]: stage["removed"] for stage in stages}
        found = {"files": len(native), "different": different, "removed": removed, "seconds": seconds}
        print(json.dumps({**vars(args), **found}))
        return bool(different)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
