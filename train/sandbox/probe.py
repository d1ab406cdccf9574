"""Tries at the start whether the isolation holds on this machine. What is not proved here is refused.

A script in the sandbox tries what must not work, and reports; the judgement is made outside. Where something does work,
the script does no harm and takes back what it did.
"""

import contextlib
import dataclasses
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from train.sandbox.job import Job, Limits, Outcome, Run, Runner

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
# Small, so that the limits are met at once.
_MIB = 1 << 20
LIMITS = Limits(
    seconds=10,
    cpu_seconds=7,
    memory_bytes=96 * _MIB,
    file_bytes=24 * _MIB,
    disk_bytes=16 * _MIB,
    files=2000,
    processes=12,
    open_files=32,
    output_bytes=1 << 16,
)
_SPACE = 64 * _MIB
# Folders and files of a machine that are not those of a sandbox.
_HOST = ("/root", "/home", "/etc/shadow", "/etc/hostname", "/var", "/run", "/sys", "/mnt", "/opt", "/srv", "/boot")
_READ_ONLY = ("/", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/proc/sys/kernel")

_SCRIPT = r"""
exec 2>/dev/null
echo "uid=$(id -u) $(id -G)"
for n in {namespaces}; do echo "ns.$n=$(readlink /proc/self/ns/$n)"; done
grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status | sed 's/:[ \t]*/=/'
echo "environment=$(env | cut -d= -f1 | sort | tr '\n' ' ')"
for p in {host}; do if [ -e "$p" ]; then echo "seen=$p"; fi; done
for d in {read_only}; do if (: > "$d/.probe-{pid}"); then echo "wrote=$d"; rm -f "$d/.probe-{pid}"; fi; done
echo "interfaces=$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | tr '\n' ' ')"
if command -v bash > /dev/null; then
  if bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}'; then echo connected=yes; else echo connected=no; fi
fi
if unshare -U true; then echo userns=yes; else echo userns=no; fi
if kill -0 {pid}; then echo killed=yes; else echo killed=no; fi
echo "processes=$(ls /proc | grep -c '^[0-9]')"
if dd if=/dev/zero of=/dev/null bs=1M count=1; then echo small=yes; fi
if dd if=/dev/zero of=/dev/null bs=128M count=1; then echo memory=yes; else echo memory=no; fi
for d in /tmp /dev/shm; do
  head -c 64M /dev/zero > $d/.probe-{pid}; echo "disk.$d=$(stat -c %s $d/.probe-{pid})"; rm -f $d/.probe-{pid}
done
sed -n 's/^\(Max [a-z ]*[a-z]\)  *\([0-9a-z]*\)  *\([0-9a-z]*\) .*/limit.\1=\3/p' /proc/self/limits
i=0
while [ $i -lt 100 ]; do sleep 2 & i=$((i + 1)); echo "fork=$i"; done
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that must hold, whether it does, and what was found."""

    name: str
    holds: bool
    detail: str


def probe(runner: Runner) -> list[Check]:
    """Tries a runner: what it runs must not see this machine, nor reach it, nor exceed its limits."""
    with contextlib.ExitStack() as held:
        secret = held.enter_context(tempfile.NamedTemporaryFile(prefix="qwen-jax-probe-"))
        os.chmod(secret.name, 0o644)
        port, connected = held.enter_context(_listener())
        pool = held.enter_context(ThreadPoolExecutor(3))
        given = [f"{folder}/" for folder in runner.description.get("folders", ())]
        hidden = [path for path in _HOST if not any(folder.startswith(f"{path}/") for folder in given)]
        main = pool.submit(runner.execute, _main_job([secret.name, *hidden], port))
        # Three processes, each of them within the limit of one, together above that of all.
        hold = "for i in 1 2 3; do head -c 50M /dev/zero | tail -c 50M | sleep 2 & done; wait"
        memory = pool.submit(runner.execute, Job(("/bin/sh", "-c", hold), dataclasses.replace(LIMITS, disk_bytes=_MIB)))
        # A daemon that ignores signals and holds the pipes.
        daemon = "trap '' TERM HUP INT; (setsid sleep 60 &) ; sleep 60"
        late = pool.submit(runner.execute, Job(("/bin/sh", "-c", daemon), dataclasses.replace(LIMITS, seconds=0.1)))
        return [*_judge(main.result(), secret.name, connected), *_judge_kills(memory.result(), late.result())]


@contextlib.contextmanager
def _listener() -> Iterator[tuple[int, threading.Event]]:
    """A TCP server of this machine, and whether anybody has connected."""
    connected = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                with contextlib.suppress(OSError):
                    server.accept()[0].close()
                    connected.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1], connected
        finally:
            done.set()
            thread.join()


def _main_job(hidden: list[str], port: int) -> Job:
    script = _SCRIPT
    for name, value in {
        "namespaces": " ".join(_NAMESPACES),
        "host": " ".join(hidden),
        "read_only": " ".join(_READ_ONLY),
        "port": str(port),
        "pid": str(os.getpid()),
    }.items():
        script = script.replace(f"{{{name}}}", value)
    return Job(("/bin/sh", "-c", script), LIMITS, address_space=_SPACE)


def _judge(run: Run, secret: str, connected: threading.Event) -> list[Check]:
    """The checks of the main script."""
    found: dict[str, list[str]] = {}
    for line in run.stdout.decode(errors="replace").splitlines():
        name, _, value = line.partition("=")
        found.setdefault(name, []).append(value.strip())

    def first(name: str) -> str:
        return found.get(name, [""])[0]

    checks: list[Check] = []

    def check(name: str, holds: bool, detail: str) -> None:
        checks.append(Check(name, holds, detail))

    started = run.outcome is not Outcome.ERROR and "uid" in found
    check("programs start", started, run.reason if not started else "a shell script runs")
    if not started:
        return checks
    check("the user is not root", bool(first("uid")) and "0" not in first("uid").split(), f"ids {first('uid')}")
    same = [name for name in _NAMESPACES if first(f"ns.{name}") in ("", _own_namespace(name))]
    check("all namespaces are its own", not same, f"shared: {', '.join(same)}" if same else ", ".join(_NAMESPACES))
    capabilities = {name: first(name) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    none = all(value and int(value, 16) == 0 for value in capabilities.values())
    check("no capabilities", none, "none" if none else str(capabilities))
    check("no new privileges", first("NoNewPrivs") == "1", f"NoNewPrivs {first('NoNewPrivs')}")
    check("system calls are filtered", first("Seccomp") == "2", f"Seccomp {first('Seccomp')}")
    check("no new user namespaces", first("userns") == "no", f"unshare -U: {first('userns')}")
    own = set(os.environ) - {"PATH", "HOME", "LANG", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_"}
    kept = {"PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    leaked = sorted(own & set(first("environment").split()) - kept)
    check("the environment is empty", not leaked, f"seen: {', '.join(leaked)}" if leaked else "nothing of this process")
    seen = found.get("seen", [])
    check("files of the machine are absent", not seen, f"seen: {', '.join(seen)}" if seen else f"{secret} and others")
    wrote = found.get("wrote", [])
    check("nothing but /tmp can be written", not wrote, f"wrote: {', '.join(wrote)}" if wrote else "read-only")
    reached = connected.is_set() or first("connected") == "yes" or set(first("interfaces").split()) - {"lo"}
    check("the network is unreachable", not reached, f"interfaces: {first('interfaces')}")
    few = first("processes").isdigit() and int(first("processes")) < 10
    alone = few and first("killed") == "no"
    check("other processes are invisible", alone, f"{first('processes')} processes visible")
    # A process that is killed at the limit of all processes has none of its own.
    large = "ended at the limit of all" if run.killed_by == "memory" else first("memory")
    memory = first("small") == "yes" and large == "no"
    check("the memory of a process is limited", memory, f"128 MiB at a limit of 64: {large}")
    disks = {place: first(f"disk.{place}") for place in ("/tmp", "/dev/shm")}
    small = all(value.isdigit() and int(value) <= LIMITS.disk_bytes for value in disks.values())
    check("files are limited", small, ", ".join(f"{place} {value} bytes" for place, value in disks.items()))
    forks = len(found.get("fork", []))
    check("processes are limited", 0 < forks <= LIMITS.processes, f"{forks} started at a limit of {LIMITS.processes}")
    wanted = {
        "Max cpu time": LIMITS.cpu_seconds + 1,
        "Max file size": LIMITS.file_bytes,
        "Max open files": LIMITS.open_files,
        "Max core file size": 0,
    }
    limits = {name: first(f"limit.{name}") for name in wanted}
    wrong = [f"{name} {limits[name]}" for name, value in wanted.items() if limits[name] != str(value)]
    check("limits of resources are set", not wrong, ", ".join(wrong) if wrong else ", ".join(wanted))
    return checks


def _judge_kills(memory: Run, late: Run) -> list[Check]:
    """The checks of the two jobs that must be killed."""
    return [
        Check(
            "the memory of all processes is limited",
            memory.killed_by == "memory" and memory.outcome is Outcome.FAIL,
            f"150 MB in three processes at a limit of 96 MiB: killed by {memory.killed_by}",
        ),
        Check(
            "time ends everything",
            late.killed_by == "time" and late.outcome is Outcome.FAIL and late.seconds < 5,
            f"a daemon and its parent: killed by {late.killed_by} after {late.seconds:.2f} seconds",
        ),
    ]


def _own_namespace(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return "unknown"
