"""Data of lm-eval's tasks from files: no hub is called unless the user asks for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.registry import sha256_of

# Data sets that are a kind of file and name their files themselves.
_KINDS = {"json", "csv", "parquet", "arrow", "text"}
_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst"}


class LocalData:
    """Where data sets are found: below a folder, under their name on the Hub.

    A data set `cais/mmlu` lies in `ROOT/cais/mmlu`, in the form in which the Hub has it, such as
    `hf download --repo-type dataset cais/mmlu --local-dir ROOT/cais/mmlu` leaves it: with its README.md, which names
    the files of each configuration, or with a folder for each configuration, or with files named after their splits
    (`test.jsonl`).

    Attributes:
      files: sha256 of each file of the data sets that were read, by path below the root.
    """

    def __init__(self, root: Path | None, hub: bool = False):
        """
        Args:
          root: the folder; None if there is none.
          hub: whether data that is not there is asked from the Hub.
        """
        self.root, self.hub = root, hub
        self.files: dict[str, str] = {}
        self._hashed: dict[Path, str] = {}

    def folder(self, path: str) -> Path | None:
        """The folder of a data set, or None if it is not there."""
        for candidate in ([self.root / path] if self.root is not None else []) + [Path(path)]:
            if candidate.is_dir():
                return candidate
        return None

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While it is open, lm-eval's tasks load their data through this."""
        if not self.hub:
            os.environ["HF_HUB_OFFLINE"] = "1"
        import datasets

        original = datasets.load_dataset

        def load(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
            return self._load(original, path, name, *args, **kwargs)

        datasets.load_dataset = load
        try:
            yield
        finally:
            datasets.load_dataset = original

    def _load(self, original: Any, path: str, name: str | None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("trust_remote_code", None)
        if path in _KINDS:
            kwargs["data_files"] = self._located(kwargs.get("data_files"))
            return original(path, name, *args, **kwargs)
        folder = self.folder(path)
        if folder is None:
            if self.hub:
                return original(path, name, *args, **kwargs)
            where = "Give --data-root" if self.root is None else f"Expected the folder {self.root / path}"
            raise InputError(
                f"The data set {path} is not here. {where}, made by `hf download --repo-type dataset "
                f"{path} --local-dir DATA_ROOT/{path}`, or let it be fetched (--hub)."
            )
        # Without a README.md nothing names the files of a configuration but its folder.
        if name is not None and not (folder / "README.md").is_file():
            folder, name = (folder / name if (folder / name).is_dir() else folder), None
        for file in sorted(folder.rglob("*")):
            if file.suffix in _SUFFIXES and file.is_file():
                self._note(file)
        try:
            return original(str(folder), name, *args, **kwargs)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise InputError(f"The files in {folder} are not the data set {path} as the Hub has it: {error}") from error

    def _located(self, files: Any) -> Any:
        """Paths of files that a task names, below the root where they are there."""
        if isinstance(files, dict):
            return {split: self._located(some) for split, some in files.items()}
        if isinstance(files, (list, tuple)):
            return [self._located(file) for file in files]
        if files is None or "://" in str(files):
            if self.hub:
                return files
            raise InputError(f"A task reads {files or 'no file'}; expected a file of this machine, or --hub.")
        path = self.root / files if self.root is not None and (self.root / files).exists() else Path(files)
        if not path.is_file():
            raise InputError(f"A task reads {files}, which is neither a file nor one below --data-root.")
        self._note(path)
        return str(path)

    def _note(self, file: Path) -> None:
        if file not in self._hashed:
            self._hashed[file] = sha256_of(file)
        inside = self.root is not None and file.is_relative_to(self.root)
        self.files[str(file.relative_to(self.root)) if inside and self.root else str(file)] = self._hashed[file]
