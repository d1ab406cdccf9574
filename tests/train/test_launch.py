"""The scripts that launch a run on several machines: what they start, with short scripts in the schedulers' place."""

import hashlib
import importlib
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from qwen_jax.errors import InputError
from tests.helpers.runs import config_file, launches, losses, make_material, print_seed
from train.distributed import from_process_0

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "launch"
# Runs as many tasks as SLURM_NTASKS says, with the variables that SLURM gives each, and ends with the worst status.
SRUN = """\
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""
RECORD = """\
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit(int(os.environ.get("STATUS", "0")))
"""
# Records the call, and does what the command line asks of the machines, on this one.
REMOTE = """\
import json, os, subprocess, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
commands = [a.removeprefix("--command=") for a in sys.argv if a.startswith("--command=")]
sys.exit(subprocess.run(["bash", "-c", commands[0]], cwd=os.environ["HOME"]).returncode if commands else 0)
"""


class Machines:
    """Commands on the PATH that play a cluster, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "CALLS": str(folder / "calls"),
            "HOME": str(folder),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
        }

    def add(self, name: str, code: str, folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    def run(self, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        environment = {**self.environment, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_scripts_are_bash_and_can_be_run(script: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / script)], check=True)
    assert os.access(FOLDER / script, os.X_OK)


def free_job_id() -> int:
    """A job number for which the port that JAX derives from it is free."""
    rng = print_seed()
    while True:
        job = int(rng.integers(1_000_000))
        with socket.socket() as probe:
            try:
                probe.bind(("", job % 2**12 + 65535 - 2**12 + 1))
            except OSError:
                continue
            return job


@pytest.mark.slow
def test_slurm_tasks_find_each_other_and_train(machines: Machines, tmp_path: Path) -> None:
    """Through JAX's own detection of SLURM; process 0 alone writes the log."""
    (tmp_path / "material").mkdir()
    file = config_file(tmp_path / "my run.py", make_material(tmp_path / "material"), tmp_path / "run")
    machines.add("srun", SRUN)
    machines.add("qwen-jax", "import sys\nfrom qwen_jax.cli import main\nsys.exit(main())\n")
    machines.add("scontrol", RECORD)
    cluster = {
        "SLURM_JOB_ID": str(free_job_id()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    changes = ("mesh.data=2", "stages.1.accumulation=1")
    done = machines.run(str(FOLDER / "slurm.sbatch"), str(file), "--set", *changes, **cluster)
    assert done.returncode == 0, done.stderr
    (launch,) = launches(tmp_path / "run")
    assert launch["processes"] == 2
    assert launch["devices"]["count"] == 2
    assert len(losses(tmp_path / "run")) == 10
    assert machines.calls == []


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (143, True)])
def test_slurm_curates_on_ray(machines: Machines, status: int, again: bool) -> None:
    """Ray on all nodes, the command on the first of them, and the job again where its time was over."""
    machines.add("srun", SRUN)
    # The names of the nodes are what it prints, whatever it is asked.
    machines.add("scontrol", RECORD.rpartition("sys.exit")[0] + 'print("node7\\nnode8")\n')
    machines.add("ray", RECORD)
    nodes = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "1"}
    done = machines.run(
        str(FOLDER / "curate.sbatch"), "my curation.py", "--output", "/data/run", STATUS=str(status), **nodes
    )
    assert done.returncode == status, done.stderr
    command = "qwen-jax data curate --engine ray --address node7:6379 --config".split()
    started = ["ray", "symmetric-run", "--address", "node7:6379", "--min-nodes", "2", "--", *command]
    assert machines.calls[1] == [*started, "my curation.py", "--output", "/data/run"]
    assert machines.calls[2:] == ([["scontrol", "requeue", "5"]] if again else [])


def test_kuberay_job_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields that KubeRay's RayJob (ray.io/v1) and Kubernetes' pods require, of the types that they have, the
    version of Ray that is installed, and a command that qwen-jax takes."""
    yaml: Any = importlib.import_module("yaml")
    (job,) = yaml.safe_load_all((FOLDER / "curate.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == metadata.version("ray")
    head, *workers = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    assert workers
    for group in workers:
        assert group["groupName"]
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert container["name"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        assert {one["name"]: one["value"] for one in container["env"]} == {
            "DO_NOT_TRACK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for kind in container["resources"].values():
            assert all(re.fullmatch(r"\d+(Mi|Gi|m)?", str(amount)) for amount in kind.values())
        # The command's files are on the volume that all pods share.
        assert all(mount["mountPath"] == "/data" for mount in container["volumeMounts"])
    command = shlex.split(job["spec"]["entrypoint"].replace("/data", str(tmp_path)))
    assert command[:3] == ["qwen-jax", "data", "curate"]
    (tmp_path / "my_curation.py").write_text(
        "from train.curate.curation import Curation, Input\n\n\n"
        'def curation(web: str) -> Curation:\n    return Curation([Input("web", web)])\n'
    )
    called: list[Any] = []

    def run(curation: Any, folder: Path, options: Any, console: Any) -> dict[str, Any]:
        called.append((curation.inputs[0].files, folder, options.engine, options.address))
        raise InputError("enough")

    monkeypatch.setattr("train.curate.run.run", run)
    assert main(command[1:]) == 1
    assert called == [((f"{tmp_path}/crawl/*.warc.gz",), tmp_path / "run", "ray", "auto")]


@pytest.mark.parametrize(
    ("status", "least", "restarts", "again"),
    [
        (0, "0", "0", False),
        (143, "600", "0", True),  # Stopped by the end of its time.
        (1, "600", "0", False),  # Failed at once: it would again.
        (1, "0", "3", True),
        (143, "600", "20", False),
    ],
)
def test_slurm_jobs_are_put_back_when_that_helps(
    machines: Machines, status: int, least: str, restarts: str, again: bool
) -> None:
    for name in ("srun", "scontrol"):
        machines.add(name, RECORD if name == "srun" else RECORD.replace('os.environ.get("STATUS", "0")', "0"))
    environment = {"STATUS": str(status), "MIN_SECONDS": least, "SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": "17"}
    done = machines.run(str(FOLDER / "slurm.sbatch"), "my run.py", "--set", "seed=1", **environment)
    assert done.returncode == status
    run, *rest = machines.calls
    assert run[-8:] == ["qwen-jax", "train", "pretrain", "--distributed", "--config", "my run.py", "--set", "seed=1"]
    assert rest == ([["scontrol", "requeue", "17"]] if again else [])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"TPU": "slice"}, ["compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=z", "--worker=all"]),
        (
            {"QUEUED_RESOURCE": "two"},
            ["compute", "tpus", "queued-resources", "ssh", "two", "--zone=z", "--node=all", "--worker=all"],
        ),
    ],
)
@pytest.mark.parametrize(("status", "expected"), [("0", 0), ("143", 0), ("1", 1)])
def test_tpu_workers_all_get_the_command(
    machines: Machines, where: dict[str, str], words: list[str], status: str, expected: int
) -> None:
    machines.add("gcloud", REMOTE)
    machines.add("qwen-jax", RECORD, machines.folder / "qwen-jax" / ".venv" / "bin")
    environment = {**where, "ZONE": "z", "STATUS": status}
    done = machines.run(
        str(FOLDER / "tpu.sh"), "train", "my run.py", "--set", 'stages.0.mixture={"a": 1}', **environment
    )
    assert done.returncode == expected, done.stderr
    asked, started = machines.calls
    assert asked[1 : 1 + len(words)] == words
    arguments = ["train", "pretrain", "--distributed", "--config", "my run.py", "--set", 'stages.0.mixture={"a": 1}']
    assert started == ["qwen-jax", *arguments]


def test_tpu_needs_to_know_where(machines: Machines) -> None:
    assert machines.run(str(FOLDER / "tpu.sh"), "train", "x.py", ZONE="z").returncode == 2
    assert "ZONE" in machines.run(str(FOLDER / "tpu.sh"), "train", "x.py", TPU="slice").stderr


def test_xpk_gets_the_command(machines: Machines) -> None:
    machines.add("xpk", REMOTE)
    machines.add("qwen-jax", RECORD)
    environment: dict[str, Any] = dict(CLUSTER="c", PROJECT="p", ZONE="z", TPU_TYPE="v5p-128", IMAGE="i", SLICES="2")
    done = machines.run(str(FOLDER / "xpk.sh"), "w", "my run.py", "--set", "seed=1", **environment)
    assert done.returncode == 0, done.stderr
    asked, started = machines.calls
    assert asked[:3] == ["xpk", "workload", "create"]
    assert {"--num-slices=2", "--tpu-type=v5p-128", "--workload=w", "--docker-image=i"} <= set(asked)
    assert started == ["qwen-jax", *"train pretrain --distributed --config".split(), "my run.py", "--set", "seed=1"]
    assert machines.run(str(FOLDER / "xpk.sh"), "w", "x.py").returncode != 0


def test_a_hash_of_process_0_comes_whole() -> None:
    """Whatever its leading zeros; that other processes get it is a part of tuning in two processes."""
    for digest in (hashlib.sha256(secrets.token_bytes(8)).hexdigest(), "0" * 63 + "1", "f" * 64):
        assert from_process_0(digest) == digest
