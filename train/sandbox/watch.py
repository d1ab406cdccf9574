"""Looks at what the processes of one sandbox use, through the sandbox's own /proc."""

import os
from collections.abc import Callable
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def watcher(root: Callable[[], Path | None], memory_bytes: int | None, files: int) -> Callable[[], str | None]:
    """A function that returns the name of a limit that is exceeded, or None.

    Args:
      root: returns the sandbox's root folder as seen from here, /proc/PID/root, once it is known.
      memory_bytes: of all processes together, or None where a control group counts it.
      files: number of files and folders on each file system in memory.
    """

    def look() -> str | None:
        where = root()
        if where is None or not _own_proc(where):
            return None
        if memory_bytes is not None and _memory(where / "proc", memory_bytes) > memory_bytes:
            return "memory"
        return "files" if any(_files(where / name) > files for name in ("tmp", "dev/shm")) else None

    return look


def _own_proc(root: Path) -> bool:
    """Whether a root folder has a /proc of its own: until bwrap has set it up, it is that of the machine."""
    try:
        device = os.stat(root / "proc").st_dev
        return device != os.stat("/proc").st_dev and device != os.stat(root).st_dev
    except OSError:
        return False


def _memory(proc: Path, enough: int) -> int:
    """Bytes that the processes use. Pages of several processes are counted once, but only if it matters."""
    try:
        names = [name for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return 0
    resident = 0
    for name in names:
        # Of a process that has just ended the file is empty.
        numbers = _content(proc / name / "statm").split()
        resident += _PAGE * int(numbers[1]) if numbers else 0
    if resident <= enough:
        return resident
    return sum(_proportional(proc / name) for name in names)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _proportional(process: Path) -> int:
    """The proportional set size of a process: its own pages, and its share of those that it shares."""
    try:
        lines = (process / "smaps_rollup").read_bytes().splitlines()
    except PermissionError:
        numbers = _content(process / "statm").split()
        return _PAGE * int(numbers[1]) if numbers else 0
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(b"Pss:"))


def _files(folder: Path) -> int:
    try:
        state = os.statvfs(folder)
    except OSError:
        return 0
    return state.f_files - state.f_ffree
