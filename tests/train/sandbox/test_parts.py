"""The parts of the sandbox that need no bubblewrap: filter, command line, limits, verdicts, supervision, probe."""

import dataclasses
import errno
import os
import platform
import random
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from train.sandbox import LANGUAGES, Job, Language, Limits, Outcome, Run, Sandbox, Test, Toolchain
from train.sandbox import probe as probes
from train.sandbox.bubblewrap import Bubblewrap
from train.sandbox.cgroup import Group, Parent, find_parent
from train.sandbox.local import limited, to_run
from train.sandbox.sandbox import static_problem
from train.sandbox.seccomp import _CLONE, _DENIED, _MACHINES, _SOCKET, filter_bytes, filter_of_oci
from train.sandbox.supervise import Ended, supervise
from train.sandbox.unconfined import Unconfined
from train.sandbox.verdict import difference

# --- the filter of system calls

_ALLOW, _KILL = 0x7FFF0000, 0x80000000


def decide(program: bytes, call: int, architecture: int, first: int = 0) -> int:
    """What a filter returns for a system call: an interpreter of the instructions of classic BPF that it may use."""
    instructions = list(struct.iter_unpack("<HBBI", program))
    data = struct.pack("<IIQ6Q", call, architecture, 0, first, 0, 0, 0, 0, 0)
    counter, loaded = 0, 0
    while True:
        code, if_true, if_false, value = instructions[counter]
        counter += 1
        if code == 0x20:
            loaded = int(struct.unpack_from("<I", data, value)[0])
        elif code == 0x06:
            return int(value)
        else:
            truth = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
            counter += if_true if truth else if_false


@pytest.mark.parametrize("machine", _MACHINES)
def test_filter_denies_what_is_listed_and_nothing_else(machine: str) -> None:
    program, (architecture, column) = filter_bytes(machine), _MACHINES[machine]
    denied = {row[column]: row[2] for row in _DENIED.values() if row[column] is not None}
    for call in range(500):
        if call in (_CLONE[column], _SOCKET[column]):
            continue
        expected = 0x00050000 | denied[call] if call in denied else _ALLOW
        assert decide(program, call, architecture) == expected, call
    for other in [number for number, _ in _MACHINES.values() if number != architecture] + [0x40000003, 0]:
        assert decide(program, 0, other) == _KILL
    # On x86_64 the same calls have second numbers.
    if machine == "x86_64":
        assert decide(program, 0x40000000 | 101, architecture) == 0x00050000 | errno.ENOSYS


@pytest.mark.parametrize("machine", _MACHINES)
def test_filter_looks_at_arguments(machine: str) -> None:
    program, (architecture, column) = filter_bytes(machine), _MACHINES[machine]
    threads, child = 0x3D0F00, 17
    for flags in (threads, child, 0x4000 | child):
        assert decide(program, _CLONE[column], architecture, flags) == _ALLOW
    for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(program, _CLONE[column], architecture, bit | child) == 0x00050000 | errno.EPERM
    for family in range(50):
        allowed = family in (1, 2, 10)
        expected = _ALLOW if allowed else 0x00050000 | errno.EAFNOSUPPORT
        assert decide(program, _SOCKET[column], architecture, family) == expected


def refused(rules: Sequence[Mapping[str, Any]], name: str, first: int) -> int:
    """The error with which rules of the OCI specification refuse a system call; 0 where they allow it."""
    truths = {
        "SCMP_CMP_EQ": lambda x, value, _: x == value,
        "SCMP_CMP_GE": lambda x, value, _: x >= value,
        "SCMP_CMP_MASKED_EQ": lambda x, mask, value: x & mask == value,
    }
    for rule in rules:
        assert rule["action"] == "SCMP_ACT_ERRNO"
        assert len(rule["args"]) <= 1, "a rule may look at an argument once"
        holds = [truths[arg["op"]](first, arg["value"], arg["valueTwo"]) for arg in rule["args"]]
        if name in rule["names"] and all(holds):
            return int(rule["errnoRet"])
    return 0


@pytest.mark.parametrize("machine", _MACHINES)
def test_filter_of_containers_is_the_same(machine: str) -> None:
    """For each call that is named, and for random first arguments of those whose argument matters."""
    rng = random.Random(seed := random.randrange(2**32))
    print("seed", seed)
    program, (architecture, column) = filter_bytes(machine), _MACHINES[machine]
    found = filter_of_oci(machine)
    assert found["defaultAction"] == "SCMP_ACT_ALLOW"
    assert found["architectures"] == [f"SCMP_ARCH_{machine.upper()}"]
    numbers = {name: row[column] for name, row in _DENIED.items()} | {
        "clone": _CLONE[column],
        "socket": _SOCKET[column],
    }
    for name, number in numbers.items():
        if number is None:
            continue
        firsts = [*range(80), *(1 << bit for bit in range(32)), *(rng.randrange(2**32) for _ in range(200))]
        for first in firsts:
            want = decide(program, number, architecture, first)
            assert refused(found["syscalls"], name, first) == (0 if want == _ALLOW else want & 0xFFFF), (name, first)


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.sandbox.seccomp import machine

    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(InputError, match="riscv64"):
        machine()


# --- the command line


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Bubblewrap:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    done = subprocess.CompletedProcess([], 0, "bubblewrap 0.8.0\n", "")
    monkeypatch.setattr("train.sandbox.bubblewrap.subprocess.run", lambda *args, **kwargs: done)
    # Whether or not this machine has control groups.
    monkeypatch.setattr("train.sandbox.bubblewrap.find_parent", lambda: None)
    return Bubblewrap(workers=3)


def test_command_line(runner: Bubblewrap) -> None:
    """What isolates is in it, before the program's own words, and every limit is."""
    limits = Limits(cpu_seconds=11, file_bytes=12345, disk_bytes=67890, processes=13, open_files=14)
    job = Job(("program", "--share-net"), limits, {"a/b": b"x"}, address_space=987654321, environment={"X": "y"})
    command = runner.command(job, 7, 8, {"/tmp/work/a/b": 9})
    text = " ".join(command)
    end = command.index("--")
    for word in (
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    ):
        assert word in command[:end]
    for words in ("--cap-drop ALL", "--ro-bind /usr /usr", "--proc /proc", "--json-status-fd 7", "--seccomp 8"):
        assert words in text
    for words in ("--size 67890 --tmpfs /tmp", "--remount-ro /dev", "--file 9 /tmp/work/a/b", "--setenv X y"):
        assert words in text
    assert "--share-net" not in command[:end]
    assert "--bind" not in command
    assert command.index("--remount-ro") > command.index("--dev")
    assert command[-2:] == ["program", "--share-net"]
    for limit in ("cpu=11:12", "fsize=12345", "nofile=14", "nproc=13", "core=0", "msgqueue=0", "as=987654321"):
        assert f"--{limit}" in command
    assert not any(word.startswith("--as=") for word in limited(dataclasses.replace(job, address_space=None)))


def test_missing_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="apt-get install bubblewrap"):
        Sandbox()


def _effects(runner: Bubblewrap, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that limits decide: command lines, supervision and watching of a run and of a compiler, and static checks."""
    seen: list[Any] = []
    monkeypatch.setattr("train.sandbox.local.watcher", lambda root, *args: seen.append(args))
    names = ("seconds", "output_bytes")
    monkeypatch.setattr(
        "train.sandbox.local.supervise",
        lambda process, **kwargs: seen.append([kwargs[name] for name in names]) or Ended(0, b"", b"", 0.1, None, False),
    )
    monkeypatch.setattr("train.sandbox.bubblewrap.subprocess.Popen", lambda command, **kwargs: seen.append(command))
    for each in (limits, limits.of_compiler()):
        runner.execute(Job(("program",), each))
        # Descriptors and users differ from run to run.
        plain = re.compile(r"\d{1,3}|--re[ug]id=\d+")
        seen = [[word for word in part if not plain.fullmatch(str(word))] for part in seen]
    return [*seen, static_problem("x" * 300, limits)]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
def test_every_limit_is_read(runner: Bubblewrap, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit, set to a distinctive value, changes something that is done."""
    limits = Limits(source_bytes=200)
    before = _effects(runner, limits, monkeypatch)
    assert _effects(runner, limits, monkeypatch) == before
    changed = dataclasses.replace(limits, **{field: getattr(limits, field) + 12345})
    assert _effects(runner, changed, monkeypatch) != before


class Recorder:
    """A runner that keeps its jobs and answers what it is told."""

    def __init__(self, answer: Run | None = None) -> None:
        self.description: dict[str, Any] = {"isolation": "recorder"}
        self.jobs: list[Job] = []
        self.answer = answer or Run(Outcome.PASS, 0, b"1\n", b"", 0.1, None, "")

    def find(self, program: str) -> str | None:
        return f"/usr/bin/{program}"

    def execute(self, job: Job) -> Run:
        self.jobs.append(job)
        return self.answer

    def converse(self, asking: Job, answering: Job) -> tuple[Run, Run]:
        raise AssertionError("not used")


def boxed(runner: Recorder, limits: Limits | None = None, **kwargs: Any) -> Sandbox:
    """A sandbox over a runner that is not probed."""
    box = Sandbox(limits or Limits(), workers=1, isolation="none", **kwargs)
    box._runner = runner
    return box


def test_a_compiled_program_is_compiled_once_under_limits_of_its_own() -> None:
    """The compiler gets the source and its own limits; runs get what it made and not the source."""
    limits = Limits(seconds=3, compile_seconds=7, memory_bytes=1 << 28, compile_memory_bytes=1 << 31)
    recorder = Recorder(Run(Outcome.PASS, 0, b"archive", b"", 0.1, None, ""))
    with boxed(recorder, limits) as box:
        box.run_tests("c", "int main;", [Test("1", "2"), Test("3", "4")], {"data": b"d"})
    version, compiler, first, second = recorder.jobs
    assert version.command == ("gcc", "--version")
    assert compiler.limits.seconds == 7
    assert compiler.limits.memory_bytes == 1 << 31
    assert compiler.address_space is None
    assert dict(compiler.files) == {"main.c": b"int main;", "data": b"d"}
    for job, stdin in ((first, b"1"), (second, b"3")):
        assert (job.archive, job.stdin, job.limits, job.address_space) == (b"archive", stdin, limits, 1 << 28)
        assert dict(job.files) == {"data": b"d"}
        assert job.arguments()[-1] == "./main"


@pytest.mark.parametrize("outcome", [Outcome.FAIL, Outcome.ERROR])
def test_a_failed_compilation_is_the_verdict_of_all_tests(outcome: Outcome) -> None:
    """A compiler's failure is one of the program; the machine's failure stays an error."""
    recorder = Recorder(Run(Outcome.PASS, 0, b"", b"", 0.1, None, ""))
    with boxed(recorder) as box:
        box.version("c")
        recorder.answer = Run(outcome, 1, b"part of an archive", b"main.c:1: error", 0.1, "time", "why")
        runs = box.run_tests("c", "x", [Test("", "1")] * 3)
    assert [(run.outcome, run.stdout, run.killed_by, run.reason) for run in runs] == [
        (outcome, b"", "time", "compilation: why")
    ] * 3


def test_the_first_tool_chain_that_starts_is_used() -> None:
    rows = {"x": Language("x", (".x",), (Toolchain(("a",), ("a", "-v")), Toolchain(("b",), ("b", "-v"))), "x")}

    class Second(Recorder):
        def execute(self, job: Job) -> Run:
            run = super().execute(job)
            return dataclasses.replace(run, outcome=Outcome.FAIL) if job.command == ("a", "-v") else run

    with boxed(recorder := Second(), languages=rows) as box:
        box.run("x", "source")
        box.run("x", "source")
    # Looked for once.
    assert [job.command for job in recorder.jobs] == [("a", "-v"), ("b", "-v"), ("b",), ("b",)]
    broken = Recorder(Run(Outcome.ERROR, None, b"", b"", 0.1, None, "no machine"))
    with boxed(broken, languages=rows) as box:
        assert box.run("x", "source") is broken.answer
        assert box.run_tests("x", "source", [Test("", "1")] * 2) == [broken.answer] * 2
        with pytest.raises(InputError, match="no machine"):
            box.version("x")
        # Not remembered.
        broken.answer = Recorder().answer
        assert box.version("x") == "1"


def test_the_table_of_languages() -> None:
    wanted = "python javascript typescript c cpp java go rust csharp php bash r".split()
    assert set(wanted) <= set(LANGUAGES)
    names = [name for row in LANGUAGES.values() for name in (row.name, *row.others)]
    assert len(names) == len(set(names))
    extensions = [extension for row in LANGUAGES.values() for extension in row.extensions]
    assert len(extensions) == len(set(extensions))
    for row in LANGUAGES.values():
        for toolchain in row.toolchains:
            given = toolchain.compile or toolchain.run
            assert any(row.file in part for part in given), row.name
            filled = toolchain.filled(toolchain.run, Limits(memory_bytes=512 << 20))
            assert not any("{" in part for part in filled)
            if toolchain.address_space is None:
                assert row.name in ("javascript", "typescript", "java", "go", "csharp")


# --- limits and jobs


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, True, float("nan"), float("inf"), "1", None])
def test_limits_are_positive_numbers(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        Limits(**{field: value})


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="isolation"):
        Sandbox(isolation="docker")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="either an expected_stdout or code"):
        Test("1")
    with pytest.raises(InputError, match="either an expected_stdout or code"):
        Test("", "1", code="assert True")
    with pytest.raises(InputError, match="no stdin"):
        Test("1", code="assert True")
    for name in ("/a", "..", "a/../b", "", "a\0"):
        with pytest.raises(InputError, match="relative path"):
            Job((), Limits(), {name: b""})


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x", None),
        ("é", None),
        ("", "empty"),
        ("\t\n", "empty"),
        ("a\0b", "NUL at character 1"),
        ("\udc80", "no text"),
        ("x" * 11, "11 bytes"),
        ("é" * 6, "12 bytes"),
        (b"x", "a bytes"),
        (None, "NoneType"),
    ],
)
def test_static_problem(source: Any, problem: str | None) -> None:
    found = static_problem(source, Limits(source_bytes=10))
    assert found is None if problem is None else problem in str(found)


# --- verdicts

_LINES = st.lists(st.text(alphabet="ab \t", max_size=4), max_size=5)


@given(_LINES, _LINES)
def test_difference_is_that_of_lines(first: list[str], second: list[str]) -> None:
    """Two outputs are the same if their lines are, without trailing white space and empty lines at the end."""

    def plain(lines: list[str]) -> list[str]:
        lines = [line.rstrip() for line in lines]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    got = difference("\n".join(first).encode(), "\n".join(second).encode())
    assert (got is None) == (plain(first) == plain(second))
    assert (difference("\n".join(second).encode(), "\n".join(first).encode()) is None) == (got is None)
    assert difference("\n".join(first).encode() + b"  \n\n", "\r\n".join(first).encode()) is None


def test_difference_does_not_show_what_is_expected() -> None:
    assert difference(b"1\n", b"SECRET\n") == "line 1 differs"
    assert difference(b"1\n", b"1\nSECRET\n") == "1 lines instead of 2"


def _ended(**changes: Any) -> Ended:
    return dataclasses.replace(Ended(0, b"out", b"err", 0.1, None, False), **changes)


@pytest.mark.parametrize(
    ("ended", "status", "out_of_memory", "outcome", "killed_by"),
    [
        ({}, 0, False, Outcome.PASS, None),
        ({}, 1, False, Outcome.FAIL, None),
        ({}, 139, False, Outcome.FAIL, None),
        ({}, 152, False, Outcome.FAIL, "cpu"),
        ({}, 153, False, Outcome.FAIL, "file size"),
        ({"killed_by": "time"}, 137, False, Outcome.FAIL, "time"),
        ({"killed_by": "time"}, None, False, Outcome.FAIL, "time"),
        ({"killed_by": "output"}, 0, False, Outcome.FAIL, "output"),
        ({"killed_by": "memory"}, None, False, Outcome.FAIL, "memory"),
        ({}, 137, True, Outcome.FAIL, "memory"),
        ({}, 0, True, Outcome.FAIL, "memory"),
        # bwrap reports no status: it could not set up, or was killed by somebody else.
        ({"status": 1}, None, False, Outcome.ERROR, None),
        ({"status": -9}, None, False, Outcome.ERROR, None),
        # Something could not be killed.
        ({"status": None, "killed_by": "time"}, None, False, Outcome.ERROR, "time"),
        ({"open": True}, 0, False, Outcome.ERROR, None),
    ],
)
def test_outcomes(
    ended: dict[str, Any], status: int | None, out_of_memory: bool, outcome: Outcome, killed_by: str | None
) -> None:
    run = to_run(Job((), Limits()), _ended(**ended), status, out_of_memory)
    assert (run.outcome, run.killed_by) == (outcome, killed_by)
    assert bool(run.reason) == (outcome is not Outcome.PASS)


# --- supervision, of plain processes


def serve(code: str, stdin: bytes = b"", seconds: float = 20.0, output_bytes: int = 1 << 20, **kwargs: Any) -> Ended:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    arguments: dict[str, Any] = {"kill": process.kill, "watch": lambda: None, "patience": 0.3, **kwargs}
    return supervise(process, stdin=stdin, seconds=seconds, output_bytes=output_bytes, **arguments)


def test_supervised_pipes() -> None:
    """All of the input arrives, all of the output is kept, up to exactly the limit."""
    data = os.urandom(500_000)
    echo = "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer); sys.stderr.write('e')"
    ended = serve(echo, data)
    assert (ended.status, ended.stdout, ended.stderr, ended.killed_by) == (0, data, b"e", None)
    assert serve(echo, data, output_bytes=len(data)).killed_by is None
    over = serve(echo, data, output_bytes=len(data) - 1)
    assert (over.killed_by, over.stdout) == ("output", data[:-1])
    assert serve("pass", data).status == 0


def test_supervised_ends() -> None:
    ended = serve("import time; time.sleep(60)", seconds=0.1)
    assert (ended.killed_by, ended.status) == ("time", -9)
    assert ended.seconds < 5
    assert serve("import time; time.sleep(60)", watch=lambda: "memory").killed_by == "memory"
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    assert serve("import time; time.sleep(60)", stop=stop).killed_by == "stop"
    # A child that holds the pipes is waited for, but not long.
    began = time.monotonic()
    left = serve("import os, time\nif os.fork() == 0: time.sleep(2)")
    assert (left.status, left.open) == (0, True)
    assert time.monotonic() - began < 2


# --- no isolation


def test_no_isolation_is_explicit_and_recorded() -> None:
    with Sandbox(Limits(seconds=10), workers=2, isolation="none") as box:
        assert box.description["isolation"] == "none"
        run = box.run("python", "import sys, f\nprint(f.x, sys.stdin.read())", b"in", {"f.py": b"x = 1"})
        assert (run.outcome, run.stdout) == (Outcome.PASS, b"1 in\n"), run
        tests = [Test(code="assert f(2) == 4"), Test(code="assert f(2) == 5"), Test("", "x")]
        runs = box.run_tests("python", "def f(x): return x * 2\nif __name__ == '__main__': print('x')", tests)
        assert [run.outcome for run in runs] == [Outcome.PASS, Outcome.FAIL, Outcome.PASS], runs
    with Sandbox(Limits(seconds=0.3), workers=1, isolation="none") as box:
        assert box.run("python", "import time\ntime.sleep(60)").killed_by == "time"


def test_a_failing_start_without_isolation_is_an_error() -> None:
    assert Unconfined().execute(Job(("/nowhere/program",), Limits())).outcome is not Outcome.PASS


# --- control groups


def _hierarchy(folder: Path, *groups: str, **files: str) -> None:
    """A folder like the mount of a hierarchy, with groups that have some files."""
    for group in groups:
        (folder / group).mkdir(parents=True, exist_ok=True)
        for name, content in {"cgroup.procs": "", **files}.items():
            (folder / group / name.replace("__", ".")).write_text(content)


def test_groups_of_version_2_are_found(tmp_path: Path) -> None:
    """The group of this process or the one above it, whichever passes both controllers on; not above the mount."""
    mount = tmp_path / "mount"
    mine = mount / "jobs" / "mine"
    (tmp_path / "cgroup").write_text("12:pids:/x\n0::/jobs/mine\n")
    (tmp_path / "mountinfo").write_text(f"41 31 0:38 / {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n")
    assert find_parent(tmp_path / "absent") is None
    assert find_parent(tmp_path) is None
    _hierarchy(mount, "jobs/mine", cgroup__subtree_control="cpu memory\n")
    assert find_parent(tmp_path) is None
    _hierarchy(mount, "jobs", cgroup__subtree_control="cpu memory pids\n")
    assert find_parent(tmp_path) == (2, mine.parent, mine.parent)
    _hierarchy(mount, "jobs/mine", cgroup__subtree_control="memory pids\n")
    assert find_parent(tmp_path) == (2, mine, mine)
    (tmp_path / "cgroup").write_text("0::/\n")
    _hierarchy(tmp_path, ".", cgroup__subtree_control="memory pids\n")
    assert find_parent(tmp_path) is None
    (tmp_path / "cgroup").write_text("12:pids:/x\n")
    assert find_parent(tmp_path) is None
    # A folder that is no control group has no files to write.
    for version in (1, 2):
        with pytest.raises(FileNotFoundError):
            Group(Parent(version, mine, mount), "run", 1 << 20, 10)
        assert not any(folder.joinpath("run").exists() for folder in (mine, mount))


def test_groups_of_version_1_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hierarchies, by their controllers, at the mount that shows this process's group, and only if writable."""
    mount = tmp_path / "with space"
    escaped = str(mount).replace(" ", r"\040")
    (tmp_path / "cgroup").write_text("9:name=memory:/no\n8:cpu,pids:/a:b\n4:memory:/box/mine\n0::/\n")
    mounts = [
        f"30 1 0:27 / {escaped}/unified rw - cgroup2 cgroup2 rw",
        f"31 1 0:28 / {escaped}/named rw - cgroup cgroup rw,name=memory",
        f"32 1 0:29 / {escaped}/pids rw,relatime shared:3 master:1 - cgroup cgroup rw,cpu,pids",
        f"33 1 0:30 /other {escaped}/other rw - cgroup cgroup rw,memory",
        f"34 1 0:30 /box {escaped}/memory rw - cgroup cgroup rw,memory",
    ]
    _hierarchy(mount, "unified", "named/no", "named/box/mine", "pids/a:b", "other/mine", "memory/mine")
    for count in range(len(mounts) + 1):
        (tmp_path / "mountinfo").write_text("\n".join(mounts[:count]))
        expected = (1, mount / "memory/mine", mount / "pids/a:b") if count == len(mounts) else None
        assert find_parent(tmp_path) == expected, count
    # Version 2 comes first.
    _hierarchy(mount, "unified", cgroup__subtree_control="memory pids")
    assert find_parent(tmp_path) == (2, mount / "unified", mount / "unified")
    for folder in ("pids/a:b", "memory/mine"):
        closed = [mount / "unified", mount / folder]
        with monkeypatch.context() as patched:
            patched.setattr(os, "access", lambda path, mode, closed=closed: path not in closed)
            assert find_parent(tmp_path) is None


_FILES = {
    2: {"memory.max": "123456", "memory.swap.max": "0", "memory.oom.group": "1", "pids.max": "78"},
    1: {"memory.limit_in_bytes": "123456", "memory.memsw.limit_in_bytes": "123456", "pids.max": "78"},
}


@pytest.mark.parametrize("version", _FILES)
@pytest.mark.parametrize("together", [True, False])
def test_a_group_is_limited_and_joined(
    version: int, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each limit is written, all hierarchies are entered, a kill for memory is seen, and all folders are removed."""
    entry, events = {2: ("cgroup.procs", "memory.events"), 1: ("tasks", "memory.oom_control")}[version]
    real = Path.mkdir

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        # As the kernel does.
        real(path, *args, **kwargs)
        for name in (*_FILES[version], entry):
            (path / name).write_text("")

    folders = [tmp_path / "it's memory", tmp_path / "it's memory" if together else tmp_path / "pids"]
    for folder in set(folders):
        folder.mkdir()
    monkeypatch.setattr(Path, "mkdir", mkdir)
    group = Group(Parent(version, *folders), "run", 123456, 78)
    memory, pids = (folder / "run" for folder in folders)
    for name, value in _FILES[version].items():
        assert (pids if name == "pids.max" else memory).joinpath(name).read_text() == value, name
    done = subprocess.run(group.joined(["echo", "a b", "$c"]), capture_output=True, text=True)
    assert done.stdout == "a b $c\n"
    assert [(folder / entry).read_text() for folder in (memory, pids)] == ["0\n", "0\n"]
    assert not group.out_of_memory()
    for count in (0, 1, 2):
        (memory / events).write_text(f"oom_kill_disable 0\nunder_oom 1\noom 1\noom_kill {count}\n")
        assert group.out_of_memory() is (count > 0)
    for file in {*memory.iterdir(), *pids.iterdir()}:
        file.unlink()
    group.close()
    assert not memory.exists()
    assert not pids.exists()


# --- the judgement of the probe

_GOOD = "\n".join(
    [
        "uid=1000 1000",
        *(f"ns.{name}={name}:[1]" for name in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")),
        *(f"Cap{name}=0000000000000000" for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")),
        "NoNewPrivs=1",
        "Seccomp=2",
        "environment=HOME LANG PATH PWD TMPDIR",
        "interfaces=lo",
        "connected=no",
        "userns=no",
        "killed=no",
        "processes=5",
        "small=yes",
        "memory=no",
        "disk./tmp=1048576",
        "disk./dev/shm=1048576",
        f"limit.Max cpu time={probes.LIMITS.cpu_seconds + 1}",
        f"limit.Max file size={probes.LIMITS.file_bytes}",
        f"limit.Max open files={probes.LIMITS.open_files}",
        "limit.Max core file size=0",
        "fork=1",
        "fork=2",
    ]
)


def judged(text: str, connected: bool = False, killed_by: str | None = None) -> list[str]:
    event = threading.Event()
    if connected:
        event.set()
    run = Run(Outcome.FAIL, 2, text.encode(), b"", 0.1, killed_by, "")
    return [check.name for check in probes._judge(run, "secret", event) if not check.holds]


def test_a_good_probe_passes() -> None:
    assert judged(_GOOD) == []
    assert judged(_GOOD, connected=True) == ["the network is unreachable"]
    assert judged(_GOOD, killed_by="memory") == ["the memory of a process is limited"]


@pytest.mark.parametrize("line", _GOOD.splitlines()[:-2])
def test_every_line_of_the_probe_is_needed(line: str) -> None:
    """What is not reported is not proved."""
    if line.startswith(("environment=", "interfaces=", "connected=")):
        # Empty where there is nothing; that the network is shared is seen by its namespace too.
        return
    assert judged(_GOOD.replace(line + "\n", "")), line


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("uid=1000 1000", "uid=0 1000", "the user is not root"),
        ("uid=1000 1000", "uid=1000 1000 0", "the user is not root"),
        ("net:[1]", os.readlink("/proc/self/ns/net") if os.path.exists("/proc/self/ns/net") else "", "all namespaces"),
        ("CapBnd=0000000000000000", "CapBnd=0000000000000001", "no capabilities"),
        ("NoNewPrivs=1", "NoNewPrivs=0", "no new privileges"),
        ("Seccomp=2", "Seccomp=0", "system calls"),
        ("interfaces=lo", "interfaces=lo eth0", "the network"),
        ("connected=no", "connected=yes", "the network"),
        ("userns=no", "userns=yes", "user namespaces"),
        ("killed=no", "killed=yes", "other processes"),
        ("processes=5", "processes=50", "other processes"),
        ("memory=no", "memory=yes", "memory of a process"),
        ("disk./tmp=1048576", "disk./tmp=67108864", "files are limited"),
        ("disk./dev/shm=1048576", "disk./dev/shm=67108864", "files are limited"),
        ("fork=2", "\n".join(f"fork={i}" for i in range(99)), "processes are limited"),
        ("Max open files=32", "Max open files=1024", "limits of resources"),
        ("small=yes", "small=yes\nseen=/root", "files of the machine"),
        ("small=yes", "small=yes\nwrote=/usr", "can be written"),
    ],
)
def test_each_weakness_is_seen(old: str, new: str, name: str) -> None:
    assert old in _GOOD
    failed = judged(_GOOD.replace(old, new))
    assert len(failed) == 1
    assert name in failed[0]


def test_a_leaked_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_TEST_LEAK", "1")
    assert judged(_GOOD.replace("environment=", "environment=QWEN_TEST_LEAK ")) == ["the environment is empty"]


def test_a_probe_that_does_not_start_fails() -> None:
    assert judged("") == ["programs start"]
    with pytest.raises(InputError, match="programs start"):
        Sandbox(runner=Recorder())
