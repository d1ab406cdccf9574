"""Sandboxes of many workers are supervised by processes of their own: the same verdicts, and nothing is left."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.sandboxes import ISOLATIONS, LIMITS, ROOT, needs_bwrap, processes_with
from train.rewards.code import CodeReward
from train.sandbox import Job, Limits, Outcome, Run, Sandbox, Test
from train.sandbox.cgroup import find_parent
from train.sandbox.local import FIRST_UID
from train.sandbox.supervisors import MAX_THREADS, Isolation, Supervisors

pytestmark = needs_bwrap
MANY = MAX_THREADS + 2


def supervisors(box: Sandbox) -> list[int]:
    assert isinstance(box._runner, Supervisors)
    return box._runner.processes()


def within(seconds: float, holds: Callable[[], Any]) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(holds())


def sleeper(mark: str, seconds: int = 61) -> str:
    return f"import os\nos.execvp('sleep', ['sleep', '{seconds}', '0.{mark}'])"


def new_mark() -> str:
    return str(uuid.uuid4().int % 10**12)


def left_of(pids: list[int]) -> list[Path]:
    """Control groups and files of supervisors."""
    names = [f"qwen-jax-{kind}-{pid}-*" for kind in ("sandbox", "runc") for pid in pids]
    folders = {*(find_parent() or [])[1:], Path(tempfile.gettempdir())}
    return [path for folder in folders for name in names for path in folder.glob(name)]


# --- verdicts


def random_case(generator: np.random.Generator) -> tuple[str, list[Test], bool]:
    """A program with tests, and whether its end is the same each time: nobody kills it."""
    a, b, x = (int(n) for n in generator.integers(2, 1000, 3))
    right = f"def f(x):\n    return x * {a} + {b}\n\nif __name__ == '__main__':\n    print(f(int(input())))\n"
    wrong = int(generator.integers(0, 2))
    data = generator.bytes(300).hex()
    cases: list[tuple[str, list[Test], bool]] = [
        (right, [Test(code=f"assert f({x}) == {x * a + b + wrong}")], False),
        (right, [Test(f"{x}\n", f"{x * a + b + wrong}\n"), Test(code=f"assert f({x + 1}) == {x * a + a + b}")], False),
        (right, [Test("no number", "1")], True),
        (f"import sys\nsys.stderr.buffer.write(bytes.fromhex('{data}'))\nsys.exit({a % 256})", [Test("", "")], True),
        (f"print({a}", [Test("", f"{a}")], True),
        (f"raise ValueError({a})", [Test(code="assert f(1)")], False),
        (f"import os, time\nif os.fork() == 0: time.sleep(60)\nprint({a})", [Test("", f"{a}")], True),
        ("while True: print('x' * 1000)", [Test("", "")], False),
        ("x = bytearray(1 << 40)", [Test("", "")], True),
    ]
    return cases[int(generator.integers(len(cases)))]


def known(run: Run, same: bool) -> tuple[Any, ...]:
    return (run.outcome, run.killed_by, *([run.reason, run.exit_status, run.stdout, run.stderr] if same else ()))


@pytest.mark.parametrize("isolation", [*ISOLATIONS, "none"])
def test_verdicts_are_those_of_one_process(isolation: Isolation) -> None:
    """Fresh programs, judged by one process and by several: equal runs, outputs byte for byte."""
    generator = print_seed()
    cases = [random_case(generator) for _ in range(12)]
    found: list[list[list[tuple[Any, ...]]]] = []
    # Without isolation, messages name a temporary folder.
    exact = isolation != "none"
    for workers in (2, MANY):
        # Time enough for a busy machine.
        with Sandbox(dataclasses.replace(LIMITS, seconds=60.0, cpu_seconds=60), workers, isolation) as box:
            runs: list[list[Run]] = [[]] * len(cases)

            def judge(start: int, box: Sandbox = box, runs: list[list[Run]] = runs) -> None:
                for i in range(start, len(cases), 3):
                    runs[i] = box.run_tests("python", *cases[i][:2])

            threads = [threading.Thread(target=judge, args=(start,)) for start in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        found.append([[known(run, case[2] and exact) for run in row] for row, case in zip(runs, cases, strict=True)])
    for case, one, several in zip(cases, *found, strict=True):
        assert one == several, case
        assert len(one) == len(case[1])


@pytest.mark.parametrize("isolation", [*ISOLATIONS, "none"])
def test_time_ends_programs_of_several_processes_too(isolation: Isolation) -> None:
    with Sandbox(dataclasses.replace(LIMITS, seconds=1.0), MANY, isolation) as box:
        runs = list(box._pool.map(lambda _: box.run("python", "import time\ntime.sleep(60)"), range(3)))
        assert [(run.outcome, run.killed_by) for run in runs] == [(Outcome.FAIL, "time")] * 3


def test_contents_reach_programs_and_come_back() -> None:
    """Files, input and output with any bytes, of sizes from none to more than a pipe holds; a compiled program too."""
    generator = print_seed()
    with Sandbox(Limits(seconds=20), MANY) as box:
        for size in (0, 1, int(generator.integers(2, 5000)), int(generator.integers(1 << 17, 1 << 19))):
            data, file = generator.bytes(size), generator.bytes(size)
            source = "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read() + open('a/b', 'rb').read())"
            run = box.run("python", source, data, {"a/b": file})
            assert (run.outcome, run.stdout == data + file) == (Outcome.PASS, True), run.reason
        if box.version("c") is not None:
            number = int(generator.integers(1 << 30))
            source = f'#include <stdio.h>\nint main(void) {{ printf("%d\\n", {number}); return 0; }}'
            runs = box.run_tests("c", source, [Test("", f"{number}\n"), Test("", f"{number + 1}\n")])
            assert [run.outcome for run in runs] == [Outcome.PASS, Outcome.FAIL]


def test_rewards_are_in_order() -> None:
    generator = print_seed()
    values = [int(x) for x in generator.integers(0, 1000, 30)]
    claimed = [value + int(generator.integers(0, 2)) for value in values]
    completions = [f"```python\ndef f(): return {value}\n```" for value in claimed]
    tests = [[{"code": f"assert f() == {value}"}] for value in values]
    reward = CodeReward(workers=MANY)
    expected = [float(a == b) for a, b in zip(values, claimed, strict=True)]
    assert reward(completions, [True] * len(values), tests=tests) == expected
    reward.close()


def test_errors_of_input_are_the_same() -> None:
    """Whoever supervises: the caller sees the InputError of the sandbox."""
    messages = []
    for workers in (2, MANY):
        said = []
        with pytest.raises(InputError) as caught:
            Sandbox(workers=workers, folders=["/nowhere"])
        said.append(str(caught.value))
        with Sandbox(LIMITS, workers) as box:
            for language, files in (("cobol", {}), ("python", {"../x": b""}), ("python", {"x": bytes(1 << 24)})):
                with pytest.raises(InputError) as caught:
                    box.run(language, "print(1)", files=files)
                said.append(str(caught.value))
        messages.append(said)
    assert messages[0] == messages[1]
    with pytest.raises(InputError, match="between 1 and 256 workers"):
        Sandbox(workers=257)


# --- processes


def test_few_workers_start_no_process() -> None:
    with Sandbox(LIMITS, MAX_THREADS) as box:
        assert not isinstance(box._runner, Supervisors)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_each_worker_has_its_own_users(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers at a time: as many supervisors and, where this is root, as many users; no secrets of this process."""
    monkeypatch.setenv("QWEN_TEST_SECRET", secret := uuid.uuid4().hex)
    mark = new_mark()
    with Sandbox(Limits(seconds=60), MANY, isolation) as box:
        threads = [threading.Thread(target=box.run, args=("python", sleeper(mark, 6))) for _ in range(MANY)]
        for thread in threads:
            thread.start()

        def sleeping() -> list[Path]:
            folders = [Path(f"/proc/{pid}") for pid in processes_with(mark)]
            return [folder for folder in folders if (folder / "comm").read_text() == "sleep\n"]

        assert within(40, lambda: len(sleeping()) == MANY)
        if os.geteuid() == 0:
            users = {folder.stat().st_uid for folder in sleeping()}
            assert users == {FIRST_UID + 2 * worker for worker in range(MANY)}
        pids = supervisors(box)
        assert len(pids) == MANY
        for pid in pids:
            assert secret.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        for thread in threads:
            thread.join()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert left_of(pids) == []


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_killed_supervisor_is_no_verdict_and_is_replaced(isolation: Isolation) -> None:
    """Its program has no reward, the others have theirs, and nothing of it is left."""
    mark = new_mark()
    reward = CodeReward(workers=MANY, isolation=isolation, seconds=60.0)
    box = reward._sandbox
    sources = ["x = 1", f"{sleeper(mark)}", "x = 2"]
    tests = [[{"code": "assert x == 1"}]] * 3
    completions = [f"```python\n{source}\n```" for source in sources]
    rewards: list[float | None] = []
    thread = threading.Thread(target=lambda: rewards.extend(reward(completions, [True] * 3, tests=tests)))
    thread.start()
    assert within(40, lambda: [pid for pid in processes_with(mark) if pid not in supervisors(box)])

    def parents(pid: int) -> list[int]:
        found = []
        while pid > 1:
            found.append(pid := int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))
        return found

    (killed,) = {pid for child in processes_with(mark) for pid in parents(child)} & set(supervisors(box))
    os.kill(killed, signal.SIGKILL)
    thread.join(30)
    assert rewards == [1.0, None, 0.0]
    assert within(5, lambda: not processes_with(mark))
    assert left_of([killed]) == []
    # As many as there are workers run again.
    runs = list(box._pool.map(lambda i: box._runner.execute(Job(("echo", str(i)), LIMITS)), range(2 * MANY)))
    assert [run.stdout for run in runs] == [f"{i}\n".encode() for i in range(2 * MANY)]
    assert killed not in supervisors(box)
    reward.close()


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_supervisor_killed_at_any_moment_leaves_nothing(isolation: Isolation) -> None:
    """Also while its sandbox is being set up, when that has not yet asked to die with it."""
    generator = print_seed()
    mark = new_mark()
    runner = Supervisors(isolation, 1)
    quick, long = (Job(command, Limits(seconds=60)) for command in (("true",), ("sleep", "61", f"0.{mark}")))
    for _ in range(15):
        assert runner.execute(quick).outcome is Outcome.PASS
        (pid,) = runner.processes()
        runs: list[Run] = []
        thread = threading.Thread(target=lambda runs=runs: runs.append(runner.execute(long)))
        thread.start()
        time.sleep(float(generator.uniform(0, 0.05)))
        os.kill(pid, signal.SIGKILL)
        thread.join(30)
        assert runs[0].outcome is Outcome.ERROR
        assert within(5, lambda: not processes_with(mark))
        assert left_of([pid]) == []
    runner.close()
    assert runner.processes() == []


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_supervisors_end_with_the_process_that_started_them(isolation: Isolation) -> None:
    """Killed, it cannot end them: they see it, and what they run ends too. Only empty control groups and files stay."""
    mark = new_mark()
    code = f"""
import threading, time
from train.sandbox import *
box = Sandbox(Limits(seconds=60), {MANY}, {isolation!r})
for _ in range(2):
    threading.Thread(target=box.run, args=("python", {sleeper(mark)!r})).start()
while True:
    print(*box._runner.processes(), flush=True)
    time.sleep(0.1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None

    def sleeping() -> list[Path]:
        return [Path(f"/proc/{pid}") for pid in processes_with(mark) if pid != process.pid]

    try:
        assert within(40, lambda: len([x for x in sleeping() if (x / "comm").read_text() == "sleep\n"]) == 2)
        process.stdout.readline()
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) >= 2
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    assert within(20, lambda: not sleeping())
    assert within(20, lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
