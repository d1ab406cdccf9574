"""Two runs never write to one folder, and a process that was killed leaves no lock that blocks the next one."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import configuration
from train import run
from train.lock import LOCK, lock

HOLD = """\
import sys, time
from pathlib import Path
from train.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_by_whom(holder: "subprocess.Popen[str]", tmp_path: Path, material) -> None:
    with pytest.raises(InputError) as caught:
        run.pretrain(configuration(material, tmp_path / "run"))
    told = str(caught.value)
    record = json.loads((tmp_path / "run" / LOCK).read_text())
    assert f"process {holder.pid} on host {socket.gethostname()}, which began at {record['since']}" in told
    assert "give another folder as output" in told
    # The first one is not disturbed, and nothing else was written.
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert holder.poll() is None


def test_a_killed_process_leaves_nothing_that_blocks(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said: list[str] = []
    with lock(tmp_path / "run", said.append):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert len(said) == 1
    assert f"left behind by process {holder.pid}" in said[0]


def test_within_one_process_too(tmp_path: Path) -> None:
    with lock(tmp_path / "run"):
        with pytest.raises(InputError, match=f"process {os.getpid()} on host"), lock(tmp_path / "run"):
            pass
        # The one that was refused has not taken it away.
        with pytest.raises(InputError, match="in use"), lock(tmp_path / "run"):
            pass
    with lock(tmp_path / "run"):
        pass


def test_what_was_created_is_removed_and_what_was_written_stays(tmp_path: Path) -> None:
    with lock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / LOCK).is_file()
    assert not (tmp_path / "a").exists()
    with lock(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "log").write_text("x")
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["log"]


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match=r"Cannot create the folder .*Not a directory"),
        lock(tmp_path / "file" / "run"),
    ):
        pass


def ended_process() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("case", ["ended", "alive", "another process has its id", "another host", "cut", "empty"])
def test_on_a_file_system_without_locks_the_record_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-01 00:00:00 +0000"}
    if case == "ended":
        record["pid"] = ended_process()
    elif case == "another process has its id":
        record["started"] = "1"
    elif case == "another host":
        record |= {"host": "elsewhere", "pid": ended_process()}
    text = json.dumps(record)
    (tmp_path / LOCK).write_text({"cut": text[:20], "empty": ""}.get(case, text))
    if case in ("alive", "another host"):
        with pytest.raises(InputError, match=rf"{record['host']}.*remove .*{LOCK} and start again"), lock(tmp_path):
            pass
        assert (tmp_path / LOCK).read_text() == text
    else:
        with lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
