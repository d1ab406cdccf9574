"""Processes that hang, die, lie or do not start cost an answer and nothing else."""

import os
import time
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from train.rewards.workers import WorkerPool

SCRIPT = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task["do"] == "hang":
        if not os.fork():
            time.sleep(100)  # A child, which must be killed too.
        time.sleep(100)
    if task["do"] == "die":
        os._exit(0)
    if task["do"] == "lie":
        print("}{", flush=True)
    if task["do"] == "flood":
        os.write(1, b"x" * 10_000_000)
    print(json.dumps([os.getpid(), sorted(os.environ), task["do"]]), flush=True)
"""


def ended(group: int) -> bool:
    """Whether all processes of a group end within 20 seconds: a signal reaches a process when it runs next."""
    deadline = time.monotonic() + 20
    while in_group(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not in_group(group)


def in_group(group: int) -> list[int]:
    """The processes of a group that are not yet reaped zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "worker.py"
    file.write_text(SCRIPT)
    return file


def test_only_the_bad_answers_are_missing(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    pool = WorkerPool(script, (), workers=2, seconds=3, recycle=100)
    questions = ["a", "hang", "b", "die", "c", "lie", "d", "flood", "e"]
    began = time.monotonic()
    answers = pool.ask([{"do": x} for x in questions])
    assert time.monotonic() - began < 60
    assert [answer and answer[2] for answer in answers] == ["a", None, "b", None, "c", None, "d", None, "e"]
    # The environment of this process is not theirs.
    assert "SECRET_TOKEN" not in answers[0][1]
    # After close nothing is left, and it starts again if asked.
    alive = pool.processes()
    assert alive
    pool.close()
    assert all(ended(pid) for pid in alive)
    assert pool.ask([{"do": "a"}])[0][2] == "a"
    pool.close()


def test_a_hanging_process_is_killed_with_its_children(script: Path) -> None:
    pool = WorkerPool(script, (), workers=1, seconds=2, recycle=100)
    (first,) = pool.ask([{"do": "a"}])
    assert pool.ask([{"do": "hang"}]) == [None]
    assert ended(first[0])
    (second,) = pool.ask([{"do": "a"}])
    assert second[0] != first[0]
    # One that dies between two questions costs no answer.
    os.kill(second[0], 9)
    while second[0] in pool.processes():
        time.sleep(0.01)
    assert pool.ask([{"do": "a"}])[0][2] == "a"
    pool.close()


def test_processes_are_replaced(script: Path) -> None:
    pool = WorkerPool(script, (), workers=1, seconds=20, recycle=2)
    pids = [answer[0] for answer in pool.ask([{"do": str(i)} for i in range(5)])]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
    assert len(pool.processes()) == 1
    pool.close()


def test_a_process_that_does_not_start_says_why(tmp_path: Path) -> None:
    file = tmp_path / "worker.py"
    file.write_text("raise ImportError('no such package')")
    pool = WorkerPool(file, (), workers=1, seconds=20, recycle=2)
    with pytest.raises(InputError, match=r"does not start: .*ImportError: no such package"):
        pool.ask([{}])
    assert pool.processes() == []
