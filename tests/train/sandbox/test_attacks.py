"""Programs that try to get out, to take more than they may, or to stay: as root, and as a user without rights."""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sandboxes import LIMITS, box_of, needs_bwrap, needs_runc, processes_with
from train.sandbox import Outcome, Run

pytestmark = needs_bwrap
_SECRET = "SANDBOX_TEST_SECRET"


@pytest.fixture(scope="module", params=["this user", "another user", pytest.param("in containers", marks=needs_runc)])
def box(request: pytest.FixtureRequest) -> Iterator[Any]:
    os.environ[_SECRET] = uuid.uuid4().hex
    yield from box_of(request.param)
    del os.environ[_SECRET]


def python(box: Any, source: str) -> Run:
    run: Run = box.run("python", source)
    assert run.outcome is not Outcome.ERROR, run
    # The supervisor is there, and the next program runs as if nothing had been.
    after = box.run("python", "print('still here')")
    assert after.outcome is Outcome.PASS, after
    return run


def printed(box: Any, source: str) -> list[str]:
    run = python(box, source)
    assert run.outcome is Outcome.PASS, run
    return run.stdout.decode().splitlines()


# --- too much


def test_fork_bomb_that_counts(box: Any) -> None:
    source = """
import os, time
count = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    except OSError:
        break
    count += 1
print(count)
"""
    assert 0 < int(printed(box, source)[0]) < LIMITS.processes


def test_fork_bomb_that_never_ends(box: Any) -> None:
    source = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    assert python(box, source).killed_by in ("time", "cpu", "memory")


def test_memory_of_one_process(box: Any) -> None:
    run = python(box, f"x = bytearray({2 * LIMITS.memory_bytes})\nprint(len(x))")
    assert run.outcome is Outcome.FAIL
    assert b"MemoryError" in run.stderr


_HOLD = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(os.urandom(1 << 20) * 50)
        time.sleep(60)
time.sleep(60)
"""
_SHARED = """
import mmap, os, time
for _ in range(8):
    if os.fork() == 0:
        x = mmap.mmap(-1, 60 << 20)
        for i in range(0, len(x), 4096):
            x[i] = 1
        time.sleep(60)
time.sleep(60)
"""


@pytest.mark.parametrize("source", [_HOLD, _SHARED], ids=["private", "shared"])
def test_memory_of_many_processes(box: Any, source: str) -> None:
    assert python(box, source).killed_by == "memory"


def test_memory_that_no_limit_counts(box: Any) -> None:
    """memfd and System V shared memory are in no process once they are unmapped: they do not exist."""
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for call in (lambda: os.memfd_create("x"),):
    try:
        call(); print("made")
    except OSError as error:
        print("refused")
print("made" if libc.shmget(0, 1 << 20, 0o1600) >= 0 else "refused")
print("made" if libc.msgget(0, 0o1600) >= 0 else "refused")
"""
    assert printed(box, source) == ["refused"] * 3


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", "."])
def test_disk_fill(box: Any, place: str) -> None:
    source = f"""
total = 0
try:
    for number in range(100):
        with open(f"{place}/{{number}}", "wb", buffering=0) as file:
            for _ in range(7):
                total += file.write(bytes(1 << 20))
except OSError as error:
    print(total)
"""
    assert 0 < int(printed(box, source)[0]) <= LIMITS.disk_bytes


def test_one_large_file(box: Any) -> None:
    source = """
try:
    with open("x", "wb", buffering=0) as file:
        total = 0
        while True:
            total += file.write(bytes(1 << 20))
except OSError:
    print(total)
"""
    assert int(printed(box, source)[0]) == LIMITS.file_bytes


def test_many_small_files(box: Any) -> None:
    source = "import os, time\nfor i in range(5000):\n    os.close(os.open(str(i), os.O_CREAT))\ntime.sleep(60)"
    assert python(box, source).killed_by == "files"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_flood(box: Any, stream: str) -> None:
    run = python(box, f"import sys\nwhile True:\n    sys.{stream}.write('x' * 10000)")
    assert run.killed_by == "output"
    assert run.outcome is Outcome.FAIL
    assert len(getattr(run, stream)) == LIMITS.output_bytes


def test_time_and_cpu(box: Any) -> None:
    began = time.monotonic()
    assert python(box, "import time\ntime.sleep(60)").killed_by == "time"
    assert python(box, "while True: pass").killed_by in ("cpu", "time")
    assert time.monotonic() - began < 4 * LIMITS.seconds + 5


def test_closed_pipes_do_not_end_the_watch(box: Any) -> None:
    source = "import os, time\nfor i in range(3):\n    os.close(i)\ntime.sleep(60)"
    assert python(box, source).killed_by == "time"


# --- out


class Servers:
    """Servers of this machine, and who has reached them."""

    def __init__(self, folder: Path):
        self.reached: list[str] = []
        self.tcp, self.udp = socket.create_server(("0.0.0.0", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("0.0.0.0", 0))
        self.abstract, self.path = f"qwen-{uuid.uuid4().hex}", str(folder / "socket")
        self.unix = []
        for name in ("\0" + self.abstract, self.path):
            server = socket.socket(socket.AF_UNIX)
            server.bind(name)
            server.listen()
            self.unix.append(server)
        os.chmod(self.path, 0o777)
        for server in (self.tcp, self.udp, *self.unix):
            server.settimeout(0.1)
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(s,)) for s in (self.tcp, self.udp, *self.unix)]
        for thread in self._threads:
            thread.start()

    def _serve(self, server: socket.socket) -> None:
        while not self._done.is_set():
            with contextlib.suppress(OSError):
                if server is self.udp:
                    server.recvfrom(10)
                else:
                    server.accept()[0].close()
                self.reached.append(str(server))

    def close(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        for server in (self.tcp, self.udp, *self.unix):
            server.close()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path)
    yield servers
    servers.close()


def test_network(box: Any, servers: Servers) -> None:
    """TCP, UDP and Unix sockets reach nothing outside; sockets of families without namespaces do not exist."""
    tcp, udp = servers.tcp.getsockname()[1], servers.udp.getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        with contextlib.suppress(OSError):
            outward.connect(("192.0.2.1", 9))
        address = outward.getsockname()[0]
    # The servers can be reached at all.
    socket.create_connection(("127.0.0.1", tcp)).close()
    time.sleep(0.05)
    assert servers.reached
    servers.reached.clear()
    source = f"""
import socket
def attempt(name, family, kind, address):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(0.2)
            s.connect(address)
            s.send(b"hello")
        print("reached", name)
    except OSError:
        pass
for host in ("127.0.0.1", {address!r}, "8.8.8.8"):
    attempt("tcp", socket.AF_INET, socket.SOCK_STREAM, (host, {tcp}))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.sendto(b"hello", (host, {udp}))
    except OSError:
        pass
attempt("tcp6", socket.AF_INET6, socket.SOCK_STREAM, ("::1", {tcp}))
for name in ({servers.path!r}, "\\0" + {servers.abstract!r}):
    attempt("unix", socket.AF_UNIX, socket.SOCK_STREAM, name)
for family in (socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_ALG):
    for kind in (socket.SOCK_STREAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try:
            socket.socket(family, kind)
            print("family", family)
        except OSError:
            pass
"""
    assert printed(box, source) == []
    time.sleep(0.1)
    assert servers.reached == []


def test_files_and_environment_of_the_machine(box: Any, tmp_path: Path) -> None:
    secret = uuid.uuid4().hex
    file = tmp_path / "secret"
    file.write_text(secret)
    for folder in (file, *list(file.parents)[:3]):
        folder.chmod(0o755)
    source = f"""
import os, subprocess
names = [{str(file)!r}, "/etc/shadow", "/etc/hostname", "/root", "/home", "/var", "/run", "/sys", {str(Path.cwd())!r}]
for name in names:
    for root in ("", "/proc/1/root", "/proc/self/root", "/proc/1/cwd/../..", "/usr/../.."):
        if os.path.exists(root + name):
            print("seen", root + name)
environments = [open(f"/proc/{{pid}}/environ", "rb").read() for pid in os.listdir("/proc") if pid.isdigit()]
print({_SECRET!r} in os.environ, any({_SECRET!r}.encode() in one for one in environments))
print(sum(1 for line in open("/etc/passwd") if line.strip()))
print([fd for fd in os.listdir("/proc/self/fd") if int(fd) > 3])
print(subprocess.run(["cat", "/proc/1/cmdline"], capture_output=True).stdout.decode().count({str(Path.cwd())!r}))
"""
    assert printed(box, source) == ["False False", "1", "[]", "0"]


def test_writing_outside(box: Any) -> None:
    source = """
import os
for folder in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/proc/sys/kernel", "/lib", "/usr/lib", "/var"):
    try:
        open(f"{folder}/written", "w")
        print("wrote", folder)
    except OSError:
        pass
for file in ("/etc/passwd", "/usr/bin/env", "/etc/ld.so.cache", "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern"):
    for attempt in (lambda: open(file, "a"), lambda: os.unlink(file), lambda: os.chmod(file, 0o777),
                    lambda: os.rename(file, "/tmp/x"), lambda: os.utime(file)):
        try:
            attempt()
            print("changed", file)
        except OSError:
            pass
"""
    assert printed(box, source) == []


def test_links(box: Any, tmp_path: Path) -> None:
    """Symbolic links resolve inside; hard links to what is outside cannot be made."""
    file = tmp_path / "secret"
    file.write_text("secret")
    source = f"""
import os
os.symlink({str(file)!r}, "link")
os.symlink("/usr/bin/env", "program")
os.symlink("/proc/1/root/..", "up")
for attempt in (lambda: open("link"), lambda: open("program", "r+b"), lambda: os.link("/usr/bin/env", "hard"),
                lambda: os.link("/etc/passwd", "hard"), lambda: open("up" + {str(file)!r}),
                lambda: os.link("/proc/self/exe", "hard", follow_symlinks=True),
                lambda: os.mknod("device", 0o20666, os.makedev(8, 0))):
    try:
        attempt()
        print("worked")
    except OSError:
        pass
"""
    assert printed(box, source) == []


def test_namespaces_and_mounts(box: Any) -> None:
    source = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x04000000, 0x08000000, 0x02000000):
    if libc.unshare(flag) == 0:
        print("unshare", hex(flag))
clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
for flag in (0x10000000, 0x00020000, 0x40000000):
    pid = libc.syscall(clone, ctypes.c_ulong(flag | 17), 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        print("clone", hex(flag))
if libc.syscall(435, ctypes.create_string_buffer(88), 88) >= 0:
    print("clone3")
for name in ("user", "mnt", "pid", "net"):
    if libc.setns(os.open(f"/proc/1/ns/{name}", os.O_RDONLY), 0) == 0:
        print("setns", name)
if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0:
    print("mount")
if libc.umount2(b"/usr", 2) == 0:
    print("umount")
if libc.chroot(b"/tmp") == 0:
    print("chroot")
for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try:
        call()
        print("became root")
    except OSError:
        pass
"""
    assert printed(box, source) == []


def test_tracing(box: Any) -> None:
    source = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if child == 0:
    time.sleep(60)
for pid in (1, os.getppid(), child):
    if libc.ptrace(16, pid, 0, 0) == 0 or libc.ptrace(0x4206, pid, 0, 0) == 0:
        print("traced", pid)
    buffer = ctypes.create_string_buffer(8)
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    local = Vector(ctypes.addressof(buffer), 8)
    if libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(local), 1, 0) > 0:
        print("read", pid)
    descriptor = os.pidfd_open(pid)
    if libc.syscall(438, descriptor, 0, 0) >= 0:
        print("took a file of", pid)
if libc.ptrace(0, 0, 0, 0) == 0:
    print("traced itself")
"""
    assert printed(box, source) == []


def test_signals_to_the_supervisor(box: Any) -> None:
    source = f"""
import os, signal
for pid in ({box.supervisor}, {os.getpid()}, {os.getppid()}):
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
            # A process of the sandbox may have this number.
            print("reached", os.path.exists(f"/proc/{{pid}}"))
        except OSError:
            pass
os.killpg(0, 0)
for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
    os.kill(1, number)
    os.kill(os.getppid(), number)
print("alive", flush=True)
try:
    os.kill(-1, signal.SIGKILL)
except ProcessLookupError:
    pass
print("nobody else was killed")
"""
    out = printed(box, source)
    assert "reached False" not in out
    assert out[-2:] == ["alive", "nobody else was killed"]


def test_proc(box: Any) -> None:
    """Writing to the memory of the sandbox's process 1 gains nothing: no pass and no infrastructure error."""
    source = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        if not target.startswith(("pipe:", "/dev/null", "/proc", "anon_inode", "/tmp/work")):
            print("open", target)
print(len([p for p in os.listdir("/proc") if p.isdigit()]) < 4, flush=True)
for name in ("/proc/kcore", "/proc/kmsg", "/dev/mem", "/dev/kmsg", "/proc/1/syscall", "/dev/vda", "/dev/sda"):
    try:
        open(name, "rb").read(1)
        print("read", name, flush=True)
    except OSError:
        pass
with open("/proc/1/mem", "r+b", buffering=0) as memory:
    for line in open("/proc/1/maps"):
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if "x" in line.split()[1] and ("bwrap" in line or "libc" in line):
            for page in range(start, end, 4096):
                memory.seek(page)
                memory.write(b"\\xcc" * 4096)
"""
    run = python(box, source)
    assert run.outcome is not Outcome.ERROR
    lines = [line for line in run.stdout.decode().splitlines() if line != "read /proc/1/syscall"]
    assert lines == ["True"], run


# --- staying


_DAEMON = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        CLOSE
        os.execvp("sleep", ["sleep", "61", "0." + MARK])
    os._exit(0)
time.sleep(0.1)
running = [open(f"/proc/{pid}/cmdline", "rb").read() for pid in os.listdir("/proc") if pid.isdigit()]
print("daemons:", sum(MARK.encode() in line and line.startswith(b"sleep") for line in running), flush=True)
"""


@pytest.mark.parametrize("close", ["pass", "[os.close(i) for i in range(3)]"], ids=["with pipes", "without"])
def test_orphan_daemons(box: Any, close: str) -> None:
    mark = str(uuid.uuid4().int % 10**12)
    source = _DAEMON.replace("CLOSE", close).replace("MARK", repr(mark))
    assert printed(box, source) == ["daemons: 1"]
    assert processes_with(mark) == []
    # And where the parent is killed for its time.
    run = python(box, source + "time.sleep(60)")
    assert run.killed_by == "time"
    assert processes_with(mark) == []


def test_files_do_not_stay(box: Any) -> None:
    """A program sees nothing of those before it."""
    source = "import os\nprint(os.listdir('/tmp'), os.listdir('/tmp/work'), os.listdir('/dev/shm'))\n"
    first = printed(box, source + "open('/tmp/left', 'w'); open('/dev/shm/left', 'w'); open('left', 'w')")
    assert printed(box, source) == first == ["['work'] ['main.py'] []"]
