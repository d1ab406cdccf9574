"""Checkpoints of a training run, by Orbax: atomic, in the background, and exact on resume.

The folder holds `run.json`, what must not change on resume; `config.json` and the tokenizer; and one numbered folder
for each kept step, in which the weights (`params`) are apart from the optimiser (`optimizer`). Every numbered folder
has its own `config.json` and tokenizer, so that it is a model like any other: it can be run, converted and verified.
"""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.parallel.multihost import gather_from_processes, in_step
from qwen_jax.tokenizer.base import Tokenizer
from train.checksums import checksums
from train.files import write_file
from train.interrupt import EndNow
from train.loop import CheckpointConfig
from train.state import TrainState

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Close it, or use it in a `with` statement: saves finish in the background.

    Attributes:
      folder: where they are.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: ModelConfig,
        tokenizer: Tokenizer,
        run: Mapping[str, Any] | None = None,
        schedule: CheckpointConfig | None = None,
    ):
        """Opens the folder of a run, or creates it.

        Args:
          folder: of the run's checkpoints.
          config: of the model.
          tokenizer: of the data.
          run: anything else, as JSON values, that decides the sequence of losses: seeds, a fingerprint of the data.
          schedule: how often the loop saves, and which checkpoints are kept; by default as `CheckpointConfig` has it.

        Raises:
          InputError: the folder holds a run with another model, tokenizer or `run`; nothing is changed then.
        """
        self.folder = Path(folder).absolute()
        run = {"tokenizer": tokenizer.fingerprint(), **(run or {})}
        self._config, self._schedule = config, schedule or CheckpointConfig()
        self._saving, self._bytes = "", 0  # The save that began last, and its size.
        self._problem: BaseException | None = None  # Why saving in the background has failed.
        # Look at what is there, and change nothing.
        with in_step(f"Opening {self.folder}"):
            new = not (self.folder / "run.json").exists()
            if not new:
                # How frozen weights are quantised is not saved with those that are trained.
                trained = dataclasses.replace(config, quantization=None)
                saved = dataclasses.asdict(load_config(self.folder))
                _check_same("model", saved, dataclasses.asdict(trained), self.folder)
                _check_same("run", read_json(self.folder / "run.json"), json.loads(json.dumps(run)), self.folder)
            elif is_taken(self.folder):
                raise InputError(f"{self.folder} is not empty and holds no run. Give a new or empty folder.")
        # Process 0 creates the folder, after all processes have looked.
        with in_step(f"Creating {self.folder}"), self._room():
            if new and jax.process_index() == 0:
                temporary = self.folder.with_name(self.folder.name + ".tmp")
                shutil.rmtree(temporary, ignore_errors=True)  # Left by a process that was killed here.
                temporary.mkdir(parents=True)
                tokenizer.save(temporary)
                write_json(temporary / "config.json", config.to_hf())
                write_json(temporary / "run.json", run)
                os.replace(temporary, self.folder)
        with in_step(f"Opening {self.folder}"):
            if not (self.folder / "run.json").exists():
                raise InputError(
                    f"Process 0 has created {self.folder}, and process {jax.process_index()} does not see it. The "
                    "folder of a run must be on a file system that all processes share."
                )
        # Open Orbax's manager.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._schedule.keep_last,
            keep_period=self._schedule.keep_every or None,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._barrier),
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        logging.getLogger("asyncio").addFilter(_not_for_lack_of_room)
        self._tokenizer_files = _files_of(tokenizer)
        with self._room():
            self._label()

    @property
    def every(self) -> int:
        """Steps between two saves; see `CheckpointConfig`."""
        return self._schedule.every

    def _label(self) -> None:
        """Copies configuration and tokenizer into complete checkpoints that lack them; config.json is the last."""
        if jax.process_index():
            return
        files = [path for name in self._tokenizer_files if (path := self.folder / name).is_file()]
        for step in self._steps():
            folder = self.folder / str(step)
            if (folder / "config.json").exists():
                continue
            for path in files:
                temporary = folder / (path.name + ".tmp")
                shutil.copyfile(path, temporary)
                os.replace(temporary, folder / path.name)
            # A damaged checkpoint gets none.
            with contextlib.suppress(OSError, ValueError, KeyError):
                write_json(folder / "config.json", self._about(step)["model"])

    def _about(self, step: int) -> dict[str, Any]:
        about: dict[str, Any] = read_json(self.folder / str(step) / "about" / "metadata")
        return about

    def _steps(self) -> list[int]:
        """The complete checkpoints that this process sees, oldest first; a file is none, whatever its name."""
        # The manager would count those that are still being written.
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def _steps_of_any(self) -> list[int]:
        """The complete checkpoints that any process sees, oldest first; the same list in all processes."""
        mine = self._steps()
        counts = gather_from_processes(len(mine))
        padded = [*mine, *[-1] * (int(counts.max()) - len(mine))]
        return (
            sorted({step for step in gather_from_processes(padded).ravel().tolist() if step >= 0})
            if counts.any()
            else []
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None. With several processes, all of them must ask."""
        return max(self._steps_of_any(), default=None)

    def save(
        self,
        state: TrainState,
        step: int,
        config: ModelConfig | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to save. The state may be donated as soon as this returns. A checkpoint that exists is kept.

        Args:
          state: after `step` steps.
          step: `state.step`, which the caller knows without asking the device.
          config: of the model at this step, if a stage has changed it.
          data: JSON values for `data` to return.

        Raises:
          InputError: there is no room, for this checkpoint or the one before, which is written in the background.
            Complete checkpoints are not changed.
        """
        if step in self._manager.all_steps():
            return
        # Orbax would wait for the save before this one anyway, and that may still be removing old checkpoints.
        self.finish()
        self._clear(step)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_all_but_params(state)),
            "about": ocp.args.JsonSave(
                {"model": (config or self._config).to_hf(), "data": data, "checksums": checksums(state)}
            ),
        }
        self._saving, self._bytes = f"the checkpoint of step {step}", sum(x.nbytes for x in jax.tree.leaves(state))
        with self._room():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def _clear(self, step: int) -> None:
        """Moves a file away that has the name of a checkpoint; Orbax would overwrite it."""
        path = self.folder / str(step)
        if jax.process_index() == 0 and path.is_file():
            os.replace(path, path.with_name(f"{step}.file"))
            _log.warning("%s is a file and no checkpoint; it is kept as %s.file.", path, step)

    def check(self) -> None:
        """Raises if saving in the background has failed by now; it does not wait.

        Raises:
          InputError: as for `save`.
        """
        # `check_for_errors` of the manager would clear the error, and its thread would go on to remove old checkpoints.
        with self._room():
            if self._problem is not None:
                raise self._problem

    def finish(self) -> None:
        """Waits until everything is saved.

        Raises:
          InputError: as for `save`.
        """
        with self._room():
            self._manager.wait_until_finished()
            self._label()
        # The host's copy is freed, but glibc keeps much of the memory, and the next copy would need as much again.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None and self._saving:
            trim(0)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """The barrier between the saving threads of all processes. A thread that has failed does not wait at it.

        The others would wait for what it did not write, and it for them, for 20 minutes.
        """
        if threading.current_thread() is not threading.main_thread():
            self._problem = self._problem or sys.exc_info()[1]
        if self._problem is not None:
            raise self._problem
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Turns a lack of room into an InputError that says what is needed, and removes unfinished checkpoints."""
        try:
            yield
        except Exception as error:  # Orbax raises ValueError, whose text has the system's message.
            reason = _no_room(error)
            if reason is None:
                raise
            if jax.process_index() == 0:
                for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            self._problem = error
            whole = self._steps() if self.folder.is_dir() else []
            needs, free = f"{self._bytes / 2**20:,.1f}", f"{_free(self.folder) / 2**20:,.1f}"
            raise InputError(
                f"Cannot save {self._saving or 'anything'} in {self.folder}: {reason}. It needs up to {needs} MiB, and "
                f"{free} MiB are free. "
                + (f"The checkpoints of steps {whole} are unharmed. " if whole else "There is no earlier checkpoint. ")
                + "Make room, or keep fewer (checkpoints.keep_last, checkpoints.keep_every); the same command resumes "
                "from the newest."
            ) from error

    def data(self, step: int) -> dict[str, Any] | None:
        """What `save` was given as `data`.

        Args:
          step: of the checkpoint.
        """
        record: dict[str, Any] | None = self._about(step)["data"]
        return record

    def model(self, step: int) -> ModelConfig:
        """The model as `save` was given it.

        Args:
          step: of the checkpoint.
        """
        return ModelConfig.from_hf(self._about(step)["model"])

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads a checkpoint onto the devices.

        If the newest is damaged, the one before it is read, and so on; a warning says so, and the damaged folder is
        renamed to `damaged-<step>`.

        Args:
          like: a state of the same run, or its `jax.ShapeDtypeStruct`s with shardings; the mesh may be another.
          step: by default the newest that is undamaged. A step that is given is read, or it is an error.

        Raises:
          InputError: no such checkpoint, or all are damaged.
        """
        self.finish()
        steps = self._steps_of_any()
        if not steps or (step is not None and step not in steps):
            raise InputError(
                f"{self.folder} has no checkpoint {'' if step is None else f'of step {step}'}; it has {steps}."
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = {"params": abstract.params, "optimizer": _all_but_params(abstract)}
        damaged: list[int] = []
        for candidate in reversed(steps) if step is None else [step]:
            state, reason = self._read(candidate, items)
            if state is not None:
                self._put_aside(damaged, "damaged")
                return state
            if step is not None:
                raise InputError(f"The checkpoint of step {step} in {self.folder} is damaged: {reason}")
            _log.warning(
                "The checkpoint of step %d in %s is damaged (%s). Trying the one before it; the damaged one is kept as "
                "damaged-%d.",
                *(candidate, self.folder, reason, candidate),
            )
            damaged.append(candidate)
        raise InputError(
            f"No checkpoint in {self.folder} could be read: those of steps {steps} are damaged. They are not changed. "
            "Restore one from a copy, or begin again in a new folder."
        )

    def _read(self, step: int, items: Mapping[str, Any]) -> tuple[TrainState | None, str]:
        """Reads a checkpoint; None and the reason if any process finds it damaged.

        No process continues with what another one cannot read: they exchange what they found after each phase.
        """
        saved, restored, problem = {}, {}, None
        try:
            saved = self._about(step)["checksums"]
            for name, like in items.items():
                restored[name] = read_arrays(self.folder / str(step) / name, like)
        except Exception as error:  # Orbax has no narrower type for an array that cannot be read.
            problem = error
        # Could all processes read it? Too little memory says nothing about the checkpoint.
        fatal = isinstance(problem, (jax.errors.JaxRuntimeError, MemoryError))
        seen = gather_from_processes(2 * fatal if problem and fatal else int(problem is not None))
        if fatal and problem is not None:
            raise problem
        if (seen == 2).any():
            raise InputError(
                f"Process {int(np.argmax(seen == 2))} could not load the checkpoint of step {step} in {self.folder}; "
                "its message says why."
            )
        # Is it what was saved?
        state = None
        if not seen.any():
            state = TrainState(params=restored["params"], **restored["optimizer"])
            now = checksums(state)
            wrong = [name for name in now if saved.get(name) != now[name]]
            problem = ValueError(f"{wrong[0]} is not what was saved") if wrong else None
            seen = gather_from_processes(int(bool(wrong)))
        if not seen.any():
            return state, ""
        if problem is None:
            return None, f"process {int(np.argmax(seen))} cannot read it"
        text = str(problem).strip()
        return None, text.splitlines()[0][:300] if text else type(problem).__name__

    def reject(self, step: int) -> str:
        """Hears that the weights after a step are ruined. A checkpoint of that step is renamed to `ruined-<step>`.

        It is kept under its name if there is no older one. With several processes, all of them must call this.

        Args:
          step: the last one that was accepted.

        Returns:
          A sentence on what this means for the checkpoints.
        """
        self.finish()
        steps = self._steps_of_any()
        older = [s for s in steps if s < step]
        if step not in steps:
            return (
                f"No checkpoint has these weights; the same command resumes from that of step {steps[-1]}."
                if steps
                else "No checkpoint has these weights, and there is none from before."
            )
        if not older:
            return f"The only checkpoint, that of step {step}, has these weights: begin again in a new folder."
        self._put_aside([step], "ruined")
        return (
            f"The checkpoint of step {step} has these weights and is kept as ruined-{step}; the same command resumes "
            f"from that of step {older[-1]}."
        )

    def _put_aside(self, steps: Sequence[int], why: str) -> None:
        """Renames checkpoints that are not to be resumed from, once an older one is known to be whole."""
        if not steps:
            return
        with in_step(f"Renaming {why} checkpoints in {self.folder}"):
            for step in steps if jax.process_index() == 0 else []:
                target = self.folder / f"{why}-{step}"
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self.folder / str(step), target)
        self._manager.reload()

    def close(self) -> None:
        """Waits until everything is saved.

        Raises:
          InputError: as for `save`.
        """
        self.finish()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self.close()
            return
        if self._problem or (jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)):
            return  # A save in progress would wait for other processes, which may be gone.
        if isinstance(error, EndNow):
            return
        try:
            self.close()
        except Exception as second:  # The first error is the one to report.
            _log.warning("%s", second)


def _files_of(tokenizer: Tokenizer) -> list[str]:
    """The names of the files that a tokenizer consists of."""
    if jax.process_index():
        return []  # Only process 0 copies them.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return sorted(path.name for path in Path(folder).iterdir())


def read_arrays(folder: Path, like: T) -> T:
    """Reads a tree of arrays onto the devices. Unlike Orbax's own checkpointers, it waits for no other process.

    Args:
      folder: an absolute path, such as `params` of a checkpoint.
      like: `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      Arrays in the tree of `like`.
    """
    return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))


def _no_room(error: BaseException) -> str | None:
    """The system's message if it had no room to write; None for any other failure."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in NO_ROOM else None
    codes = [int(code) for code in re.findall(r"os_error_code='(\d+)'", str(error))]
    return next((os.strerror(code) for code in codes if code in NO_ROOM), None)


def _not_for_lack_of_room(record: logging.LogRecord) -> bool:
    """A filter for log records: all but those about a lack of room.

    Orbax writes many arrays at once and raises the error of the first that finds no room; asyncio would log a traceback
    for each of the others, beside the message that says it all.
    """
    error = record.exc_info[1] if record.exc_info else None
    return error is None or _no_room(error) is None


def _free(folder: Path) -> int:
    """Free bytes on the disk that has a folder, or will have it."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _all_but_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}


def _check_same(what: str, saved: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    names = sorted(name for name in {*saved, *given} if saved.get(name) != given.get(name))
    if names:
        before, now = ({name: repr(x[name]) if name in x else "the default" for name in names} for x in (saved, given))
        difference = "; ".join(f"{name} was {before[name]} and is now {now[name]}" for name in names)
        raise InputError(
            f"{folder} holds a run with another {what}: {difference}. "
            "Resume with what it began with, or begin in a new folder."
        )


def is_taken(folder: Path) -> bool:
    """Whether a path exists and is no empty folder, so that writing a folder there would destroy something."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file. A reader sees the old content or the new one, never a part."""
    write_file(path, (to_json(value, indent=2) + "\n").encode())
