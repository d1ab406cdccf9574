"""Control groups of version 2, where this process may make them: exact limits of memory and processes.

Each run has a group of its own below the group of this process, or beside it where that has processes and no delegated
controllers (the rule of "no internal processes"). Nothing else on the machine is changed.
"""

import contextlib
import os
import time
from pathlib import Path

_NEEDED = {"memory", "pids"}


def find_parent(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Path | None:
    """The group below which runs get theirs, or None where there is none that can be written.

    Args:
      mount: where version 2 is mounted.
      own: the file that names this process's group.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    if name is None:
        return None
    group = mount / name.lstrip("/")
    for parent in (group, group.parent):
        if parent != mount.parent and _can_hold(parent):
            return parent
    return None


def _can_hold(parent: Path) -> bool:
    try:
        passed_on = set((parent / "cgroup.subtree_control").read_text().split())
    except OSError:
        return False
    return passed_on >= _NEEDED and os.access(parent, os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK)


class Group:
    """A control group for one run. `close` kills what is in it and removes it."""

    def __init__(self, parent: Path, name: str, memory_bytes: int, processes: int):
        self.path = parent / name
        self.path.mkdir()
        try:
            self._set("memory.max", memory_bytes)
            self._set("pids.max", processes)
            # One process over the limit ends the run, not a process of the kernel's choice. Swap is memory too.
            with contextlib.suppress(OSError):
                self._set("memory.oom.group", 1)
            with contextlib.suppress(OSError):
                self._set("memory.swap.max", 0)
        except OSError:
            self.close()
            raise

    def _set(self, name: str, value: int) -> None:
        # Not created if it does not exist: that is no control group.
        with open(self.path / name, "r+") as file:
            file.write(str(value))

    def joined(self, command: list[str]) -> list[str]:
        """A command that first enters the group, by a shell that then becomes the command."""
        return ["/bin/sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(self.path), *command]

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed for memory here."""
        try:
            events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        except (OSError, ValueError):
            return False
        return int(events.get("oom_kill", 0)) > 0

    def close(self) -> None:
        """Kills what is left and removes the group."""
        with contextlib.suppress(OSError):
            self._set("cgroup.kill", 1)
        for _ in range(100):
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.01)
