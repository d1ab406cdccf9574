"""Programs in several languages, verdicts by output, compilers, infrastructure errors, and what is left behind."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.sandboxes import ISOLATIONS, LIMITS, ROOT, needs_bwrap, processes_with
from train.sandbox import LANGUAGES, Job, Limits, Outcome, Run, Sandbox, Test
from train.sandbox.bubblewrap import Bubblewrap
from train.sandbox.cgroup import Group, find_parent
from train.sandbox.local import FIRST_UID
from train.sandbox.probe import probe
from train.sandbox.sandbox import Isolation
from train.sandbox.unconfined import Unconfined

pytestmark = needs_bwrap


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=20, compile_seconds=60), workers=2) as box:
        yield box


@pytest.fixture(scope="module")
def small() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as box:
        yield box


# Programs that add the numbers of standard input, and write x to standard error.
_SUMS = {row.name: Path(__file__).parent / "programs" / f"sum{row.extensions[0]}" for row in LANGUAGES.values()}
_BROKEN = {
    **{name: "(((" for name in LANGUAGES},
    "php": "<?php ((( ",
    "bash": "if then",
}


def _or_skip(box: Sandbox, language: str) -> None:
    if box.version(language) is None:
        pytest.skip(f"{language} is not installed: apt-get install {LANGUAGES[language].install}")


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages(box: Sandbox, language: str) -> None:
    """Each language reads, computes and prints; a wrong result and a broken source fail."""
    _or_skip(box, language)
    generator = print_seed()
    numbers = [list(map(int, generator.integers(-1000, 1000, 3))) for _ in range(2)]
    tests = [Test("\n".join(map(str, row)) + "\n", f"{sum(row)}\n") for row in numbers]
    tests.append(Test("1\n", "2\n"))
    runs = box.run_tests(language, _SUMS[language].read_text(), tests)
    assert [run.outcome for run in runs] == [Outcome.PASS, Outcome.PASS, Outcome.FAIL], runs
    assert runs[2].reason == "the output: line 1 differs"
    assert all(run.stderr.strip() == b"x" for run in runs)
    broken = box.run(language, _BROKEN[language])
    assert broken.outcome is Outcome.FAIL
    assert broken.stderr + broken.stdout


@pytest.mark.parametrize("language", ["javascript", "java"])
def test_memory_of_run_times_that_reserve_much(box: Sandbox, language: str) -> None:
    _or_skip(box, language)
    source = {
        "javascript": "const b = []; while (true) b.push(Buffer.alloc(1 << 24, 1));",
        "java": "import java.util.*; public class Main { public static void main(String[] a) { List<byte[]> b ="
        " new ArrayList<>(); while (true) b.add(new byte[1 << 24]); } }",
    }[language]
    run = box.run(language, source)
    assert run.outcome is Outcome.FAIL
    assert run.killed_by == "memory" or b"OutOfMemory" in run.stderr


@pytest.mark.parametrize(
    ("output", "passes"),
    [
        ("1\n2\n", True),
        ("1  \n2", True),
        ("1\r\n2\r\n\n\n", True),
        ("1\n", False),
        ("", False),
        ("1\n2\n3\n", False),
        ("1\n\n2\n", False),
        (" 1\n2\n", False),
        ("\n1\n2\n", False),
        ("1\n2\nx", False),
        ("1\n2\0\n", False),
        ("1\x002\n", False),
    ],
)
def test_output_is_compared_exactly(small: Sandbox, output: str, passes: bool) -> None:
    """Truncated and extra output fail, in both directions."""
    run = small.run_tests("python", f"import sys; sys.stdout.buffer.write({output.encode()!r})", [Test("", "1\n2\n")])[
        0
    ]
    assert (run.outcome is Outcome.PASS) is passes, run


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "quit()",
        "pass",
        "import os\nos.kill(os.getpid(), 9)",
        "import os\nos.abort()",
        "print('PASS')",
        'print(\'{"outcome": "pass"}\')',
        "import builtins\nbuiltins.print = lambda *a: None\nprint(4)",
        "import sys\nsys.stdout = sys.stderr\nprint(4)",
        "print(4)\nraise SystemExit(3)",
        "print(4, end='5')",
        "print(4)\nprint(4)",
    ],
)
def test_no_way_to_end_is_a_pass(small: Sandbox, source: str) -> None:
    assert small.run_tests("python", source, [Test("", "4\n")])[0].outcome is Outcome.FAIL


def test_input_files_and_streams(small: Sandbox) -> None:
    source = "import sys\nfrom helper.f import f\n"
    source += "sys.stdout.buffer.write(f(sys.stdin.buffer.read()) + open('d', 'rb').read())"
    files = {"helper/f.py": b"def f(x): return x[::-1]", "d": bytes(range(256))}
    data = os.urandom(30_000)
    run = small.run("python", source, data, files)
    assert run.stdout == data[::-1] + bytes(range(256)), run
    # Much input that nobody reads.
    assert small.run("python", "print(1)", bytes(10 << 20)).outcome is Outcome.PASS
    for name in ("main.py", "/etc/x", "../x", "a/../../x", "", "."):
        with pytest.raises(InputError, match="file"):
            small.run("python", "print(1)", files={name: b""})
    with pytest.raises(InputError, match="disk_bytes"):
        small.run("python", "print(1)", files={"x": bytes(LIMITS.disk_bytes)})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("print(1)\0", "NUL"),
        ("print('\ud800')", "no text"),
        ("#" * (LIMITS.source_bytes + 1), "bytes"),
        (b"print(1)", "no text"),
        ("print(", "syntax"),
        ("return", "syntax"),
        ("(" * 10000, "syntax"),
    ],
)
def test_static_checks(small: Sandbox, source: str, reason: str) -> None:
    """A source that is none fails before it is run, with its reason."""
    runs = small.run_tests("python", source, [Test("", "1\n"), Test("", "2\n")])
    assert all(run.outcome is Outcome.FAIL and reason in run.reason for run in runs), runs
    assert len(runs) == 2


_SLOW_TO_COMPILE = """
template <int a, int b> struct S { static constexpr long v = S<a - 1, b>::v + S<a - 1, b + 1>::v; };
template <int b> struct S<0, b> { static constexpr long v = b; };
constexpr long f(long n) { long s = 0; for (long i = 0; i < n; i++) s += i % 7; return s; }
template <long n> struct T { static constexpr long v = f(30000000 + n) + T<n - 1>::v; };
template <> struct T<0> { static constexpr long v = 0; };
int main() { return T<200>::v + S<20, 0>::v; }
"""


@pytest.mark.parametrize(
    ("language", "source", "killed_by"),
    [
        ("cpp", _SLOW_TO_COMPILE, {"time"}),
        ("c", '#include "/dev/zero"\nint main(void) { return 0; }', {"time", "memory", None}),
        ("c", '#include "/dev/stdin"\n#include "main.c"\nint main(void) { return 0; }', {None}),
        ("c", '#include "/etc/shadow"\nint main(void) { return 0; }', {None}),
        (
            "c",
            "int a[1 << 30] = {1}; int main(void) { return 0; }",
            {"file size", "output", "files", "time", "memory", None},
        ),
    ],
)
def test_compilers_are_confined(language: str, source: str, killed_by: set[str | None]) -> None:
    """A compiler that takes too long or too much is a failure of the program, not of the machine."""
    import dataclasses

    with Sandbox(dataclasses.replace(LIMITS, compile_seconds=0.8), workers=1) as box:
        _or_skip(box, language)
        began = time.monotonic()
        run = box.run(language, source)
        assert time.monotonic() - began < 5
    assert run.outcome is Outcome.FAIL, run
    assert run.reason.startswith("compilation: ")
    assert run.killed_by in killed_by


def test_unknown_and_missing_languages(small: Sandbox) -> None:
    with pytest.raises(InputError, match="no language 'cobol'"):
        small.run("cobol", "x")
    missing = [name for name in LANGUAGES if small.version(name) is None]
    for name in missing[:1]:
        with pytest.raises(InputError, match="not installed"):
            small.run(name, "x")
    with pytest.raises(InputError, match="for python, not for bash"):
        small.run_tests("bash", "echo", [Test(code="assert True")])
    assert small.run_tests("python", "print(1)", []) == []
    assert small.language("C++").name == "cpp"


# --- many, and what is left


# Users of one case of one test only: others may run sandboxes at the same time.
_USERS = {"bubblewrap": range(61_000, 61_016), "runc": range(61_016, 61_032)}


def _state(isolation: Isolation) -> dict[str, object]:
    """What a sandbox could leave behind: in this process, on this machine, zombies of its users included."""
    users = [path for path in Path("/proc").iterdir() if path.name.isdigit() and _owner(path) in _USERS[isolation]]
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "groups": _groups_of(os.getpid()),
        "temporary": os.listdir(tempfile.gettempdir()),
        "processes": len(users),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "threads": {thread.name for thread in threading.enumerate() if "sandbox" in thread.name},
    }


def _containers(supervisor: int) -> list[Path]:
    """The control groups of a supervisor's containers; other tests may run some at the same time."""
    # Groups of other tests may disappear meanwhile, which `os.walk` does not mind.
    prefix = f"qwen-jax-runc-{supervisor}-"
    return [Path(top) / x for top, names, _ in os.walk("/sys/fs/cgroup") for x in names if x.startswith(prefix)]


def _owner(path: Path) -> int:
    try:
        return path.stat().st_uid
    except OSError:
        return -1


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder for temporary files that other users can enter, as containers need it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_200_programs_in_8_workers_leave_nothing(
    isolation: Isolation, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good programs, floods, daemons, forks, and such as are killed: each gets its own verdict, and nothing stays."""
    monkeypatch.setattr(f"train.sandbox.{isolation}.FIRST_UID", _USERS[isolation].start)
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    before = _state(isolation)
    mark = str(uuid.uuid4().int % 10**12)
    kinds = {
        "print(input()[::-1])": Outcome.PASS,
        "print('wrong')": Outcome.FAIL,
        "while True: print('x' * 10000)": Outcome.FAIL,
        "import os\nopen('/tmp/x', 'w').write('x')\nif os.fork() == 0:\n    os.setsid()\n"
        f"    os.execvp('sleep', ['sleep', '61', '0.{mark}'])\nprint(input()[::-1])": Outcome.PASS,
        "import os\nfor _ in range(5): os.fork()": Outcome.FAIL,
        "x = [0] * 10**10": Outcome.FAIL,
        "import os\nos.kill(1, 9)\nos.kill(os.getppid(), 15)\nprint(input()[::-1])": Outcome.PASS,
    }
    sources = [list(kinds)[i % len(kinds)] for i in range(200)]
    got: dict[int, Run] = {}

    with Sandbox(Limits(seconds=20, memory_bytes=300 << 20), workers=8, isolation=isolation) as box:

        def work(numbers: range) -> None:
            for i in numbers:
                got[i] = box.run_tests("python", sources[i], [Test(f"abc{i}\n", f"{i}"[::-1] + "cba\n")])[0]

        threads = [threading.Thread(target=work, args=(range(start, 200, 8),)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wrong = [(sources[i], got[i]) for i in range(200) if got[i].outcome is not kinds[sources[i]]]
    assert not wrong, wrong[:3]
    assert processes_with(mark) == []
    assert _state(isolation) == before
    assert not _containers(os.getpid())


def _groups_of(supervisor: int) -> list[Path]:
    """The control groups of a supervisor's runs that exist."""
    parent = find_parent()
    return [found for folder in (parent or [])[1:] for found in folder.glob(f"qwen-jax-sandbox-{supervisor}-*")]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_killed_supervisor_takes_its_programs_with_it(isolation: Isolation) -> None:
    mark = str(uuid.uuid4().int % 10**12)
    program = (
        "import os, signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        f"if os.fork() == 0: os.setsid()\nos.execvp('sleep', ['sleep', '61', '0.{mark}'])"
    )
    sandbox = f"Sandbox(Limits(seconds=60), 1, {isolation!r})"
    code = f"from train.sandbox import *\n{sandbox}.run('python', {program!r})"
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 20
    # The supervisor's own command line has the mark too.
    while len(set(processes_with(mark)) - {supervisor.pid}) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(set(processes_with(mark)) - {supervisor.pid}) >= 2
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    until = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < until:
        time.sleep(0.02)
    assert processes_with(mark) == []
    # Its groups are left, and empty once the kernel has taken down what was killed: only then can they be removed.
    until = time.monotonic() + 5
    for folder in (*_groups_of(supervisor.pid), *_containers(supervisor.pid)):
        while folder.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):
                folder.rmdir()
            time.sleep(0.01)
        assert not folder.exists()
    for folder in Path(tempfile.gettempdir()).glob(f"qwen-jax-runc-{supervisor.pid}-*"):
        shutil.rmtree(folder)


# --- control groups of this machine

needs_groups = pytest.mark.skipif(find_parent() is None, reason="needs control groups that this user may write")


@needs_groups
def test_control_groups_end_runs_and_are_removed() -> None:
    """Memory, also that of files, ends the whole run whichever process is killed; 50 runs leave no group behind."""
    hold = "x = bytearray(os.urandom(1 << 20) * 50)"
    programs = {
        f"import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        {hold}\n        time.sleep(60)\n"
        "time.sleep(60)": ("memory",),
        # Only the child is large, and its parent does not mind.
        f"import os, time\npid = os.fork()\nif pid == 0:\n    for _ in range(3):\n        os.fork()\n    {hold}\n"
        "    time.sleep(60)\nos.waitpid(pid, 0)\nprint('well')": ("memory",),
        "for name in 'abcd':\n    open(name, 'wb').write(bytes(80 << 20))": ("memory",),
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass": ("time", "cpu"),
        "import time\ntime.sleep(60)": ("time",),
    }
    small = "print(1)"
    # Time enough for a busy machine: memory is to end a run before time does.
    limits = dataclasses.replace(
        LIMITS, seconds=5.0, cpu_seconds=4, file_bytes=LIMITS.memory_bytes, disk_bytes=2 * LIMITS.memory_bytes
    )
    with Sandbox(limits, workers=1) as box:
        assert str(box.description["memory"]).startswith("cgroup")
        for source in [*programs, *[small] * (50 - len(programs))]:
            run = box.run("python", source)
            if source == small:
                assert (run.outcome, run.stdout) == (Outcome.PASS, b"1\n"), run
            else:
                assert (run.outcome, run.killed_by in programs[source]) == (Outcome.FAIL, True), (source, run)
                assert run.killed_by != "memory" or run.seconds < limits.seconds, run
    assert _groups_of(os.getpid()) == []


@needs_groups
def test_closing_a_group_ends_a_fork_bomb() -> None:
    """The group alone bounds the number of processes, and removing it kills those that go on forking."""
    parent = find_parent()
    assert parent is not None
    mark, most = uuid.uuid4().hex, 30
    group = Group(parent, f"qwen-jax-sandbox-{os.getpid()}-{mark}", 200 << 20, most)
    # Tame where no group holds it: 128 processes for a few seconds.
    bomb = """
import os, time
end, depth = time.monotonic() + 6, 0
while time.monotonic() < end:
    try:
        if depth < 7:
            depth += 1
            os.fork()
    except OSError:
        depth -= 1
    time.sleep(0.001)
"""
    try:
        process = subprocess.Popen(group.joined([sys.executable, "-S", "-c", bomb, mark]))
        until = time.monotonic() + 5
        while len(processes_with(mark)) < most and time.monotonic() < until:
            time.sleep(0.02)
        assert len(processes_with(mark)) == most
    finally:
        group.close()
    assert process.wait(5) == -signal.SIGKILL
    assert _groups_of(os.getpid()) == []
    assert processes_with(mark) == []


# --- the machine fails


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_sandbox_killed_from_outside_is_an_error(isolation: Isolation) -> None:
    """As by the kernel when the machine is out of memory: no verdict."""
    mark = str(uuid.uuid4().int % 10**12)
    with Sandbox(workers=1, isolation=isolation) as box:
        runs: list[Run] = []
        source = f"import os\nos.execvp('sleep', ['sleep', '5', '0.{mark}'])"
        thread = threading.Thread(target=lambda: runs.append(box.run("python", source)))
        thread.start()
        # The program, process 1 of the sandbox, bwrap or runc.
        while not (program := [pid for pid in processes_with(mark) if b"sleep" in _name(pid)]):
            time.sleep(0.02)
        if os.geteuid() == 0:
            assert _owner(Path(f"/proc/{program[0]}")) in range(FIRST_UID, FIRST_UID + 2)
        os.kill(_parent(_parent(program[0])), signal.SIGKILL)
        thread.join()
        assert runs[0].outcome is Outcome.ERROR, runs
        assert processes_with(mark) == []
        assert box.run("python", "print(1)").outcome is Outcome.PASS
    assert not _containers(os.getpid())


def _name(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.parametrize("what", ["bwrap fails", "no process", "bwrap is gone"])
def test_infrastructure_errors_are_no_verdicts(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run, a test by output and a test with assertions all give ERROR, and later programs run again."""
    with Sandbox(workers=2) as box:
        assert box.run("python", "print(1)").outcome is Outcome.PASS
        runner = box._runner
        assert isinstance(runner, Bubblewrap)
        with monkeypatch.context() as patched:
            if what == "no process":
                real = subprocess.Popen

                def popen(command: list[str], *args: object, **kwargs: object) -> object:
                    raise BlockingIOError(11, "Resource temporarily unavailable")

                patched.setattr("train.sandbox.bubblewrap.subprocess.Popen", popen)
                assert subprocess.Popen is not real
            else:
                program = tmp_path / "bwrap"
                if what == "bwrap fails":
                    program.write_text(
                        "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n"
                    )
                    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
                    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
                        folder.chmod(0o755)
                patched.setattr(runner, "_bwrap", str(program))
            runs = [box.run("python", "print(1)")]
            runs += box.run_tests("python", "print(1)", [Test("", "1\n"), Test(code="pass")])
        assert [run.outcome for run in runs] == [Outcome.ERROR] * 3, runs
        assert all(run.reason for run in runs)
        after = box.run_tests("python", "print(1)", [Test("", "1\n"), Test(code="pass")])
        assert [run.outcome for run in after] == [Outcome.PASS] * 2


# --- the probe


def test_the_probe_refuses_what_does_not_isolate() -> None:
    """A runner without isolation is refused, and the message names what fails."""
    with pytest.raises(InputError, match="does not isolate here") as caught:
        Sandbox(runner=Unconfined())
    for name in ("namespaces", "files of the machine", "network", "system calls", "memory of all", "other processes"):
        assert name in str(caught.value), name


class Weakened(Bubblewrap):
    """Bubblewrap with one part of its command line changed."""

    change: tuple[list[str], list[str]]

    def command(self, job: Job, *args: object) -> list[str]:
        command = super().command(job, *args)  # type: ignore[arg-type]
        old, new = self.change
        for start in range(len(command)):
            if command[start : start + len(old)] == old:
                return command[:start] + new + command[start + len(old) :]
        # Only one of the jobs has a limit of address space.
        assert old[0].startswith("--as"), f"{old} is not in the command"
        return command


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (["--unshare-all"], ["--unshare-all", "--share-net"], "network"),
        (
            ["--symlink", "usr/bin", "/bin"],
            ["--symlink", "usr/bin", "/bin", "--ro-bind", "/var", "/var"],
            "files of the machine",
        ),
        (["--proc", "/proc"], ["--ro-bind", "/proc", "/proc"], "other processes"),
        (["--clearenv"], ["--setenv", "QWEN_TEST_LEAK", "1"], "environment"),
        (["--remount-ro", "/dev"], [], "written"),
        (["--remount-ro", "/"], [], "written"),
        ([f"--nproc={12}"], [], "processes are limited"),
        (["--fsize=25165824"], [], "limits of resources"),
        (["--as=67108864"], ["--as=unlimited"], "memory of a process"),
        (["--size", "16777216", "--tmpfs", "/dev/shm"], ["--tmpfs", "/dev/shm"], "files are limited"),
        (["--disable-userns"], [], None),
    ],
)
def test_the_probe_sees_each_weakness(
    old: list[str], new: list[str], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part of the command line less, and the check that it stands for fails."""
    monkeypatch.setenv("QWEN_TEST_LEAK", "1")
    runner = Weakened(workers=3)
    runner.change = old, new
    failed = " ".join(check.name for check in probe(runner) if not check.holds)
    if name is None:
        # The filter of system calls forbids the same.
        assert failed == ""
    else:
        assert name in failed


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which is then not given up")
def test_the_probe_refuses_root_in_disguise() -> None:
    """A program that runs as root under another number: the kernel does not limit its processes."""
    runner = Bubblewrap(workers=3)
    runner._root = False
    failed = [check.name for check in probe(runner) if not check.holds]
    assert failed == ["processes are limited"]


def test_description_is_a_record() -> None:
    with Sandbox(LIMITS, workers=3) as box:
        record = json.loads(json.dumps(box.description))
    assert record["isolation"] == "bubblewrap"
    assert record["limits"]["memory_bytes"] == LIMITS.memory_bytes
    with pytest.raises(InputError, match="closed"):
        box.run("python", "print(1)")
