"""Items that are recorded: arrays in an .npz file, other values in a .json file, and how files are hashed."""

import contextlib
import hashlib
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class Section:
    """The items of one section, with arrays (for an .npz file) and JSON values (for a .json file)."""

    def __init__(self, name: str):
        self.name = name
        self._arrays: dict[str, np.ndarray] = {}
        self._values: dict[str, dict[str, Any]] = {}

    def add(self, item: str, arrays: Any = None, **values: Any) -> None:
        """Records an item.

        Args:
          item: its name, not used before.
          arrays: a tree of arrays. Those of a dtype that NumPy lacks are widened to float32, which is exact.
          **values: anything else, as JSON values.
        """
        if item in self._values:
            raise ValueError(f"There are two items {item!r}.")
        found = named(arrays if arrays is not None else {})
        dtypes = {name: str(array.dtype) for name, array in found.items()}
        self._values[item] = {**values, "dtypes": dtypes} if found else values
        for name, array in found.items():
            wide = array.astype(np.float32) if array.dtype.kind not in "fiub" else array
            self._arrays[f"{item}::{name}"] = wide

    def failed(self, item: str) -> None:
        """Records the exception that is being handled."""
        traceback.print_exc()
        self._values[item] = {"error": traceback.format_exc(limit=-1).strip().splitlines()[-1]}

    @property
    def failures(self) -> list[str]:
        """The items that could not be made."""
        return [item for item, values in self._values.items() if "error" in values]

    def write(self, folder: Path) -> None:
        """Writes both files."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"{self.name}.npz", **self._arrays)  # type: ignore[arg-type]
        (folder / f"{self.name}.json").write_text(json.dumps(self._values, indent=1, sort_keys=True) + "\n")


def named(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def sha256(array: np.ndarray) -> str:
    """Of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hashes(tree: Any) -> dict[str, str]:
    """The sha256 of each leaf."""
    return {name: sha256(array) for name, array in named(tree).items()}


# Fields of Orbax's JSON files that are times.
_TIMES = ("init_timestamp_nsecs", "commit_timestamp_nsecs")


def file_hashes(folder: Path) -> dict[str, str]:
    """How each file of a folder is compared, and its sha256.

    A JSON file with times in it is hashed without them.
    """
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content, how = path.read_bytes(), "bytes"
        if path.name == "commit_success.txt":  # It holds the time.
            content, how = b"", "exists"
        if path.name == "_CHECKPOINT_METADATA":
            value = json.loads(content)
            content = json.dumps({k: v for k, v in value.items() if k not in _TIMES}, sort_keys=True).encode()
            how = "JSON without times"
        found[path.relative_to(folder).as_posix()] = f"{how}: {hashlib.sha256(content).hexdigest()}"
    return found


def orbax_arrays(folder: Path) -> Any:
    """A tree that Orbax restores by itself."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute())


@contextlib.contextmanager
def attempt(section: Section, item: str) -> Iterator[None]:
    """What fails is recorded as failed, and the rest goes on."""
    try:
        yield
    except Exception:
        section.failed(item)
