"""Control groups, where this process may make them: exact limits of memory and processes of a run.

Version 2 is used where its controllers of memory and processes are passed on, otherwise the hierarchies of version 1.
Each run has a group of its own below the group of this process; in version 2 beside it, where that has processes and no
delegated controllers (the rule of "no internal processes"). Nothing else on the machine is changed.
"""

import contextlib
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CONTROLLERS = ("memory", "pids")


class Parent(NamedTuple):
    """The groups below which runs get theirs, by the controller that limits them. In version 2 they are the same."""

    version: int
    memory: Path
    pids: Path


def find_parent(process: Path = Path("/proc/self")) -> Parent | None:
    """The groups below which runs get theirs, or None where there are none that can be written.

    Args:
      process: the folder of /proc whose files `cgroup` and `mountinfo` name this process's groups and their mounts.
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    paths = {controller: path for _, controllers, path in groups for controller in controllers.split(",")}
    # The unified hierarchy has no list of controllers in either file.
    for group, top in _folders(paths, "", mounts):
        for folder in (group, group.parent) if group != top else (group,):
            if _passes_on(folder) and _writable(folder):
                return Parent(2, folder, folder)
    found = []
    for name in _CONTROLLERS:
        folders = (group for group, _ in _folders(paths, name, mounts))
        found.append(next(filter(_writable, folders), None))
    memory, pids = found
    return Parent(1, memory, pids) if memory and pids else None


def _folders(paths: dict[str, str], controller: str, mounts: list[str]) -> Iterator[tuple[Path, Path]]:
    """Where this process's group of a controller is mounted, with the mount's own folder; proc_pid_mountinfo(5)."""
    if controller not in paths:
        return
    path = Path(paths[controller])
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, point = (re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), x) for x in before.split()[3:5])
        kind, *_, options = after.split()
        right = controller in options.split(",") if controller else True
        # A mount may show only the part of a hierarchy that is below a root of its own.
        if kind == ("cgroup" if controller else "cgroup2") and right and path.is_relative_to(root):
            yield Path(point) / path.relative_to(root), Path(point)


def _passes_on(folder: Path) -> bool:
    try:
        return set((folder / "cgroup.subtree_control").read_text().split()) >= set(_CONTROLLERS)
    except OSError:
        return False


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)


class Group:
    """A control group for one run. `close` kills what is in it and removes it.

    In version 2 a process over the limit of memory ends all of the group. In version 1 the kernel kills one process
    only, so the supervisor must ask `out_of_memory` during the run and end it.
    """

    def __init__(self, parent: Parent, name: str, memory_bytes: int, processes: int):
        memory, pids = parent.memory / name, parent.pids / name
        if parent.version == 2:
            entry, events, limit = "cgroup.procs", "memory.events", "memory.max"
            others = {"memory.oom.group": 1, "memory.swap.max": 0}
        else:
            # A thread that moves only itself does not wait for a lock of all groups, which takes about 10 ms.
            entry, events, limit = "tasks", "memory.oom_control", "memory.limit_in_bytes"
            others = {"memory.memsw.limit_in_bytes": memory_bytes}
        # One folder in version 2, and where one hierarchy of version 1 has both controllers.
        folders = list(dict.fromkeys((pids, memory)))
        self._entries, self._events = [folder / entry for folder in folders], memory / events
        self._made: list[Path] = []
        try:
            for folder in folders:
                folder.mkdir()
                self._made.append(folder)
            _set(pids / "pids.max", processes)
            _set(memory / limit, memory_bytes)
            # Swap is memory too. These files do not exist on every kernel.
            for file, value in others.items():
                with contextlib.suppress(OSError):
                    _set(memory / file, value)
        except OSError:
            self.close()
            raise

    def joined(self, command: list[str]) -> list[str]:
        """A command that first enters the group, by a shell that then becomes the command."""
        enter = [f"echo 0 > {shlex.quote(str(entry))}" for entry in self._entries]
        return ["/bin/sh", "-c", " && ".join([*enter, 'exec "$@"']), "sh", *command]

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed for memory here (version 1: since Linux 4.13)."""
        try:
            events = dict(line.split() for line in self._events.read_text().splitlines())
        except (OSError, ValueError):
            return False
        return int(events.get("oom_kill", 0)) > 0

    def close(self) -> None:
        """Kills what is left and removes the group."""
        for folder in self._made:
            for _ in range(100):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    _kill(folder)
                    time.sleep(0.01)


def _set(file: Path, value: int) -> None:
    # Not created if it does not exist: that is no control group.
    with open(file, "r+") as opened:
        opened.write(str(value))


def _kill(folder: Path) -> None:
    """Kills the processes of a group: all in one step in version 2 (since Linux 5.14), otherwise those seen now."""
    try:
        _set(folder / "cgroup.kill", 1)
    except OSError:
        with contextlib.suppress(OSError):
            # So that they start no others.
            _set(folder / "pids.max", 0)
        with contextlib.suppress(OSError):
            for pid in map(int, (folder / "cgroup.procs").read_text().split()):
                # 0 stands for a process of another namespace, and in kill for this process's own group.
                if pid > 0:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
