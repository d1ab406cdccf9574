"""The work folder of a run: finished layers, so that a run that was stopped goes on where it was."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.folder import new_folder
from convert.quantize.quantizer import Outcome
from convert.safetensors import SINGLE, Entry, Writer, read_header
from qwen_jax.errors import InputError
from qwen_jax.files import read_json

_JOB, _OUTCOMES, _OUTPUTS = "job.json", "outcomes.json", "outputs.npy"


class Work:
    """Layers are folders that appear when they are complete, each with its tensors and outcomes.

    The newest one also has the residual stream after it, from which the next layer goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def layer(self, number: int) -> Path:
        """Where a layer is."""
        return self.folder / f"layer-{number:05d}"

    def finished(self) -> int:
        """How many layers there are, from the first one on."""
        number = 0
        while self.layer(number).is_dir():
            number += 1
        return number

    def save(
        self, number: int, tensors: Mapping[str, np.ndarray], outcomes: list[Outcome], x_RTD: np.ndarray | None
    ) -> None:
        """Keeps a finished layer.

        Args:
          number: of the layer.
          tensors: as the file will have them.
          outcomes: of its matrices.
          x_RTD: its outputs on the calibration rows.

        Raises:
          InputError: the disk is full.
        """
        size = sum(data.nbytes for data in tensors.values()) + (0 if x_RTD is None else x_RTD.nbytes)
        with new_folder(self.layer(number), size) as temporary:
            with Writer(
                temporary, {name: (data.dtype, data.shape) for name, data in tensors.items()}, np.inf
            ) as writer:
                for name, data in tensors.items():
                    writer.write(name, 0, np.ascontiguousarray(data))
            text = json.dumps([dataclasses.asdict(outcome) for outcome in outcomes])
            (temporary / _OUTCOMES).write_text(text, encoding="utf-8")
            if x_RTD is not None:
                np.save(temporary / _OUTPUTS, x_RTD)
        if number:
            (self.layer(number - 1) / _OUTPUTS).unlink(missing_ok=True)

    def outputs(self, number: int) -> np.ndarray:
        """The residual stream after the newest layer."""
        result: np.ndarray = np.load(self.layer(number) / _OUTPUTS, allow_pickle=False)
        return result

    def outcomes(self, number: int) -> list[Outcome]:
        """How well the matrices of a layer were rounded."""
        values = json.loads((self.layer(number) / _OUTCOMES).read_text(encoding="utf-8"))
        return [Outcome(**value) for value in values]

    def tensors(self, number: int) -> dict[str, Entry]:
        """The tensors of a layer."""
        return read_header(self.layer(number) / SINGLE)


@contextlib.contextmanager
def open_work(folder: Path, job: dict[str, Any]) -> Iterator[Work]:
    """The work folder of a run, new or left by the same run; removed if the block succeeds.

    Args:
      folder: where it is.
      job: what the run does, as JSON: a folder of another run is refused.

    Raises:
      InputError: another process works in it, or it belongs to another run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}. Give another destination.") from None
    try:
        # A lock on the folder itself ends with the process. File systems without locks go without.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process works in {folder}. Wait for it, or give another destination.") from None
        except OSError:
            pass
        _check_job(folder, job)
        for left in folder.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield Work(folder)
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def _check_job(folder: Path, job: dict[str, Any]) -> None:
    """Compares a run with the one that made the folder; a new folder is given the run."""
    file = folder / _JOB
    job = json.loads(json.dumps(job))
    if file.is_file():
        before = read_json(file)
        changed = sorted(key for key in before.keys() | job.keys() if before.get(key) != job.get(key))
        if not changed:
            return
        if Work(folder).finished():
            raise InputError(
                f"{folder} holds the finished layers of another run: {', '.join(changed)} changed "
                f"({before.get(changed[0])!r} was, {job.get(changed[0])!r} is). Give the same options to continue, "
                "or remove that folder."
            )
    temporary = folder / f".{_JOB}"
    temporary.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
