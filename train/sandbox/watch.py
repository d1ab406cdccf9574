"""Looks at what the processes of one sandbox use, through the sandbox's own /proc."""

import os
from collections.abc import Callable

_PAGE = os.sysconf("SC_PAGE_SIZE")


# Paths are texts: a look is taken every 25 ms of every sandbox, and `pathlib` nearly doubles its time.
def watcher(root: Callable[[], str | None], memory_bytes: int | None, files: int) -> Callable[[], str | None]:
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
        if memory_bytes is not None and _memory(f"{where}/proc", memory_bytes) > memory_bytes:
            return "memory"
        return "files" if any(_files(f"{where}/{name}") > files for name in ("tmp", "dev/shm")) else None

    return look


def _own_proc(root: str) -> bool:
    """Whether a root folder has a /proc of its own: until bwrap has set it up, it is that of the machine."""
    try:
        device = os.stat(f"{root}/proc").st_dev
        return device != os.stat("/proc").st_dev and device != os.stat(root).st_dev
    except OSError:
        return False


def _memory(proc: str, enough: int) -> int:
    """Bytes that the processes use. Pages of several processes are counted once, but only if it matters."""
    try:
        names = [name for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return 0
    resident = 0
    for name in names:
        # Of a process that has just ended the file is empty.
        numbers = _content(f"{proc}/{name}/statm").split()
        resident += _PAGE * int(numbers[1]) if numbers else 0
    if resident <= enough:
        return resident
    return sum(_proportional(f"{proc}/{name}") for name in names)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _proportional(process: str) -> int:
    """The proportional set size of a process: its own pages, and its share of those that it shares."""
    try:
        with open(f"{process}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
    except PermissionError:
        numbers = _content(f"{process}/statm").split()
        return _PAGE * int(numbers[1]) if numbers else 0
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(b"Pss:"))


def _files(folder: str) -> int:
    try:
        state = os.statvfs(folder)
    except OSError:
        return 0
    return state.f_files - state.f_ffree
