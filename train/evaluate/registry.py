"""Which benchmarks there are, and where their files lie."""

import dataclasses
import difflib
import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import why_unusable
from train.evaluate.task import DataFile, Task

# Modules of train/evaluate/benchmarks, each with `TASKS`.
_MODULES = (
    "arena_hard",
    "code",
    "flores",
    "gsm8k",
    "ifeval",
    "live_bench",
    "live_code_bench",
    "lv_eval",
    "m3exam",
    "mathematics",
    "mmlu",
    "mt_bench",
    "multipl_e",
    "theorem_qa",
)


@dataclasses.dataclass(frozen=True)
class Located:
    """A file of a task that was found.

    Attributes:
      file: as the task describes it.
      path: where it lies.
      sha256: of its content, in hexadecimal.
      known: whether that is a published version; None if the task knows none.
    """

    file: DataFile
    path: Path
    sha256: str
    known: bool | None

    def to_json(self) -> dict[str, Any]:
        """What is written with a score."""
        return {
            "path": self.file.path,
            "sha256": self.sha256,
            "known": self.known,
            "licence": self.file.licence,
            "source": self.file.source,
        }


def tasks() -> dict[str, Task]:
    """All benchmarks by name."""
    found: dict[str, Task] = {}
    for module in _MODULES:
        for task in importlib.import_module(f"train.evaluate.benchmarks.{module}").TASKS:
            if task.name in found:
                raise ValueError(f"Two benchmarks have the name {task.name}.")
            found[task.name] = task
    return found


def find(names: Sequence[str]) -> list[Task]:
    """Benchmarks by name.

    Raises:
      InputError: nothing, a name twice, or one that is not known; names similar ones.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(f"Expected names of tasks, each once; got {', '.join(names) or 'none'}.")
    known = tasks()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or sorted(known)
            raise InputError(f"There is no task {name!r}. Similar ones: {', '.join(near)}; see qwen-jax eval list.")
    return [known[name] for name in names]


def locate(task: Task, root: Path | None, allow_changed: bool = False) -> list[Located]:
    """The files of a task.

    Args:
      task: whose.
      root: the data root; tasks without files need none.
      allow_changed: whether a file may have another content than all published versions.

    Raises:
      InputError: no data root, a missing file, or one that has changed: names both hashes.
    """
    if not task.files:
        return []
    if root is None:
        names = ", ".join(file.path for file in task.files)
        raise InputError(f"The task {task.name} reads {names}. Say below which folder they lie: --data-root DIR.")
    found = []
    for file in task.files:
        path = root / file.path
        if problem := why_unusable(path):
            where = f" It is published at {file.source}." if file.source else ""
            raise InputError(f"The task {task.name} cannot be run. {problem}{where}")
        sha256 = sha256_of(path)
        known = sha256 in file.sha256 if file.sha256 else None
        if known is False and not allow_changed:
            raise InputError(
                f"{path} has changed: expected the sha256 {' or '.join(file.sha256)}, got {sha256}. Get the published "
                "file, or give --allow-changed-data; the score then says so."
            )
        found.append(Located(file, path, sha256, known))
    return found


def states(task: Task, root: Path | None) -> dict[str, str]:
    """By path, whether a file of a task is "there", "changed" (no published version) or "missing"."""
    found = {}
    for file in task.files:
        if root is None or why_unusable(root / file.path) is not None:
            found[file.path] = "missing"
        else:
            changed = bool(file.sha256) and sha256_of(root / file.path) not in file.sha256
            found[file.path] = "changed" if changed else "there"
    return found


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
