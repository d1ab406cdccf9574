"""A lock on the folder of a run, so that two runs cannot write to it at once."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError

LOCK = "lock.json"
# What a file system answers that has no locks.
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL))


@contextlib.contextmanager
def lock(folder: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Holds the lock of a run's folder, which is created if need be.

    The lock is `lock.json`, with host, process id and time, and locked by `flock`: the system releases it when the
    process ends, however it ends. On a file system without such locks, the record decides: a process of this host that
    has ended does not hold a lock. What was created is removed at the end: the file, and folders that are still empty.

    With several processes, process 0 holds the lock for all.

    Args:
      folder: of the run.
      say: shows that a lock was left behind.

    Raises:
      InputError: another process holds the lock, or the folder cannot be created.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot create the folder {folder}: {error.strerror}. Give another as output.") from None
    file = _acquire(folder / LOCK, say)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(file)
        with contextlib.suppress(OSError):  # A folder that is not empty stays.
            for path in created:
                path.rmdir()


def _acquire(path: Path, say: Callable[[str], None]) -> int:
    """Locks the file and writes the record of this process; returns its descriptor."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"Cannot write {path}: {error.strerror}. Give another folder as output.") from None
        try:
            held = _locked_by_another(file)
            left = _record(file)
            if held or (held is None and left and not _has_ended(left)):
                raise InputError(_refusal(path, left, certain=held is True))
            # A process that ended its run may have removed the file before it was locked here.
            if not path.exists() or os.fstat(file).st_ino != path.stat().st_ino:
                os.close(file)
                continue
            if left:
                say(f"{path} was left behind by {_who(left)}, which has ended; the lock is taken over")
            record = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            content = json.dumps({**record, "started": _started(os.getpid())}).encode()
            os.ftruncate(file, 0)
            os.pwrite(file, content + b"\n", 0)
            return file
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(file)
            raise


def _locked_by_another(file: int) -> bool | None:
    """Tries to lock a file; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise InputError(f"Cannot lock {LOCK}: {error.strerror}. Give another folder as output.") from None
    return False


def _record(file: int) -> dict[str, Any]:
    """What the lock's owner wrote into it; empty if it wrote nothing or was killed while it did."""
    try:
        record = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _has_ended(record: dict[str, Any]) -> bool:
    """Whether the owner is a process of this host that is known to have ended."""
    pid = record.get("pid")
    if record.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    # The number may have been given to another process since.
    return record.get("started") is not None and _started(pid) != record["started"]


def _started(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; None where the system has no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _who(record: dict[str, Any]) -> str:
    if not record:
        return "an unknown process"
    return f"process {record.get('pid')} on host {record.get('host')}, which began at {record.get('since')}"


def _refusal(path: Path, record: dict[str, Any], certain: bool) -> str:
    folder = path.parent
    if certain:
        return (
            f"{folder} is in use by another run: {_who(record)}, holds {path.name}. Two runs would mix their "
            "files. Wait until it ends, stop it, or give another folder as output."
        )
    return (
        f"{folder} may be in use by another run: {path.name} is of {_who(record)}, and this file system cannot tell "
        f"whether it is still running. If it is not, remove {path} and start again."
    )
