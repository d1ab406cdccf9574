"""Checkpoints of a training run, by Orbax: atomic, in the background, and exact on resume.

A run's folder holds `run.json`, what must not change on resume; `config.json` and the tokenizer; and one numbered
folder for each kept step, with the weights (`params`) apart from the optimiser (`optimizer`). Every numbered folder
gets its own `config.json` and tokenizer, so that it is a model like any other: it can be run, converted and verified.
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
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qwen_jax.config import ModelConfig, load_config, read_json
from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.parallel.multihost import gather, in_step
from qwen_jax.tokenizer.base import Tokenizer
from train.files import to_json, write_file
from train.state import TrainState

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Close it, or use it in a `with` statement: saving goes on in the background."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: ModelConfig,
        tokenizer: Tokenizer,
        run: Mapping[str, Any] | None = None,
        keep_last: int = 2,
        keep_every: int = 0,
    ):
        """Opens the folder of a run, or begins one.

        Args:
          folder: of the run's checkpoints.
          config: of the model.
          tokenizer: that made the data.
          run: anything else, as JSON values, that decides the sequence of losses: seeds, a fingerprint of the data.
          keep_last: how many of the newest checkpoints stay.
          keep_every: those of steps that are a multiple of it stay too; 0 is none.

        Raises:
          InputError: the folder holds a run with another model, tokenizer or `run`; nothing is touched then.
        """
        self.folder = Path(folder).absolute()
        run = {"tokenizer": tokenizer.fingerprint(), **(run or {})}
        self._config = config
        self._saving, self._bytes = "", 0  # What was begun to be saved last, and its size.
        self._problem: BaseException | None = None  # Why saving in the background has failed.
        with in_step(f"Opening {self.folder}"):
            new = not (self.folder / "run.json").exists()
            if not new:
                saved = dataclasses.asdict(load_config(self.folder))
                _check_same("model", saved, dataclasses.asdict(config), self.folder)
                _check_same("run", read_json(self.folder / "run.json"), json.loads(json.dumps(run)), self.folder)
            elif is_taken(self.folder):
                raise InputError(f"{self.folder} is not empty and holds no run. Give a new or empty folder.")
        # All have looked before one of them makes it.
        with in_step(f"Making {self.folder}"), self._room():
            if new and jax.process_index() == 0:
                temporary = self.folder.with_name(self.folder.name + ".tmp")
                shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed just here.
                temporary.mkdir(parents=True)
                tokenizer.save(temporary)
                write_json(temporary / "config.json", config.to_hf())
                write_json(temporary / "run.json", run)
                os.replace(temporary, self.folder)
        with in_step(f"Opening {self.folder}"):
            if not (self.folder / "run.json").exists():
                raise InputError(
                    f"{self.folder}, which process 0 has made, is not there for process {jax.process_index()}. "
                    "The folder of a run must be on a file system that all processes see."
                )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every or None,
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
        with self._room():
            self._label()

    def _label(self) -> None:
        """Puts configuration and tokenizer into the complete checkpoints that lack them; config.json is the last."""
        if jax.process_index():
            return
        files = [p for p in self.folder.iterdir() if p.is_file() and p.name not in ("run.json", "config.json")]
        for step in self._steps():
            folder = self.folder / str(step)
            if (folder / "config.json").exists():
                continue
            for path in files:
                temporary = folder / (path.name + ".tmp")
                shutil.copyfile(path, temporary)
                os.replace(temporary, folder / path.name)
            # A damaged one gets none.
            with contextlib.suppress(OSError, ValueError, KeyError):
                write_json(folder / "config.json", self._about(step)["model"])

    def _about(self, step: int) -> dict[str, Any]:
        about: dict[str, Any] = read_json(self.folder / str(step) / "about" / "metadata")
        return about

    def _steps(self) -> list[int]:
        """The complete checkpoints that this process sees, oldest first."""
        # The manager would count those that are still being written.
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def _steps_of_any(self) -> list[int]:
        """The complete checkpoints that any process sees, oldest first; the same in all of them."""
        mine = self._steps()
        counts = gather(len(mine))
        padded = [*mine, *[-1] * (int(counts.max()) - len(mine))]
        return sorted({step for step in gather(padded).ravel().tolist() if step >= 0}) if counts.any() else []

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None. With several processes, all of them must ask."""
        return max(self._steps_of_any(), default=None)

    def save(
        self,
        state: TrainState,
        step: int,
        config: ModelConfig | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to save; the state may be donated as soon as this returns. A step that is there already is kept.

        Args:
          state: after `step` steps.
          step: `state.step`, which the caller knows without asking the device.
          config: of the model at this step, where a stage has changed it.
          data: what `data` shall give back, as JSON values.

        Raises:
          InputError: there is no room, for this one or for the one before, which is written in the background. Complete
            checkpoints stay as they are.
        """
        if step in self._manager.all_steps():
            return
        # Saving would wait for the save before it anyhow, and that one may still be removing old checkpoints.
        self.finish()
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_all_but_params(state)),
            "about": ocp.args.JsonSave(
                {"model": (config or self._config).to_hf(), "data": data, "checksums": _checksums(state)}
            ),
        }
        self._saving, self._bytes = f"the checkpoint of step {step}", sum(x.nbytes for x in jax.tree.leaves(state))
        with self._room():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Whether saving in the background has failed by now; it does not wait.

        Raises:
          InputError: as for `save`.
        """
        # Not `check_for_errors` of the manager: it would take the error from the thread that must not go on to remove
        # old checkpoints.
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
        # What the host's copy took is free, but glibc keeps much of it, and the next copy would come on top.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None and self._saving:
            trim(0)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Where the threads that save meet those of other processes. One that has failed does not wait for them.

        They wait for what it did not write, and it for them, for 20 minutes.
        """
        if threading.current_thread() is not threading.main_thread():
            self._problem = self._problem or sys.exc_info()[1]
        if self._problem is not None:
            raise self._problem
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Says what, where and how much is needed when there is no room, and removes what was not finished."""
        try:
            yield
        except Exception as error:  # Orbax raises ValueError, with the system's message in its text.
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
                + "Make room, or keep fewer (keep_last, keep_every); the same command goes on from the newest."
            ) from error

    def data(self, step: int) -> dict[str, Any] | None:
        """What `save` was given as `data`.

        Args:
          step: of the checkpoint.
        """
        record: dict[str, Any] | None = self._about(step)["data"]
        return record

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads a checkpoint onto the devices.

        Where the newest is damaged, the one before it is read, and so on; a warning says so, and the damaged folder is
        renamed to `damaged-<step>`.

        Args:
          like: a state, or its `jax.ShapeDtypeStruct`s with shardings, of the same run; the mesh may be another.
          step: by default the newest; that of another step is read or an error.

        Raises:
          InputError: no such checkpoint, or none that is whole.
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
                self._put_aside(damaged)
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
            f"No checkpoint in {self.folder} could be read: those of steps {steps} are damaged. They are left as they "
            "are. Put one back from a copy, or begin again in a new folder."
        )

    def _read(self, step: int, items: Mapping[str, Any]) -> tuple[TrainState | None, str]:
        """A checkpoint that every process has found whole, or None and why.

        No process goes on with what another one cannot read: each says what it saw before any takes the next step.
        """
        saved, restored, problem = {}, {}, None
        try:
            saved = self._about(step)["checksums"]
            for name, like in items.items():
                restored[name] = read_arrays(self.folder / str(step) / name, like)
        except Exception as error:  # Orbax raises no narrower one for an array that cannot be read.
            problem = error
        # Too little memory says nothing about the checkpoint.
        fatal = isinstance(problem, (jax.errors.JaxRuntimeError, MemoryError))
        seen = gather(2 * fatal if problem and fatal else int(problem is not None))
        if fatal and problem is not None:
            raise problem
        if (seen == 2).any():
            raise InputError(
                f"Process {int(np.argmax(seen == 2))} could not load the checkpoint of step {step} in {self.folder}; "
                "its message says why."
            )
        state = None
        if not seen.any():
            state = TrainState(params=restored["params"], **restored["optimizer"])
            now = _checksums(state)
            wrong = [name for name in now if saved.get(name) != now[name]]
            problem = ValueError(f"{wrong[0]} is not what was saved") if wrong else None
            seen = gather(int(bool(wrong)))
        if not seen.any():
            return state, ""
        if problem is None:
            return None, f"process {int(np.argmax(seen))} cannot read it"
        text = str(problem).strip()
        return None, text.splitlines()[0][:300] if text else type(problem).__name__

    def _put_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, now that an older one is known to be whole."""
        if not steps:
            return
        with in_step(f"Renaming damaged checkpoints in {self.folder}"):
            for step in steps if jax.process_index() == 0 else []:
                target = self.folder / f"damaged-{step}"
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
        try:
            self.close()
        except Exception as second:  # What came first is what to tell.
            _log.warning("%s", second)


def read_arrays(folder: Path, like: Any) -> Any:
    """Reads a tree of arrays onto the devices. It waits for no other process, as Orbax's own checkpointers would.

    Args:
      folder: an absolute one, as `params` of a checkpoint.
      like: `jax.ShapeDtypeStruct`s with shardings.
    """
    return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))


def _no_room(error: BaseException) -> str | None:
    """What the system said, where it had no room to write; None for any other failure."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in NO_ROOM else None
    codes = [int(code) for code in re.findall(r"os_error_code='(\d+)'", str(error))]
    return next((os.strerror(code) for code in codes if code in NO_ROOM), None)


def _not_for_lack_of_room(record: logging.LogRecord) -> bool:
    """Whether a record is about anything else.

    Orbax writes many arrays at once and raises the error of the first that finds no room; asyncio would log those of
    the others, a traceback for each, beside the message that says all there is to say.
    """
    error = record.exc_info[1] if record.exc_info else None
    return error is None or _no_room(error) is None


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _all_but_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}


def _checksums(state: TrainState) -> dict[str, int]:
    """One number for each array, the same on every mesh; any change of a single element changes it.

    The disk's bytes have no checksum of their own, and a flipped bit in a weight would otherwise pass for a weight.
    """
    numbers = jax.device_get(_sums(state))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): int(x) for path, x in jax.tree.leaves_with_path(numbers)
    }


@jax.jit
def _sums(tree: Any) -> Any:
    def weighted(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        # The index of each element, modulo 2^32.
        place, stride = jnp.zeros((), jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place = place + jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            stride *= x.shape[axis]
        # Times an odd number: no difference of a single element can vanish.
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(weighted, tree)


def _check_same(what: str, saved: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    names = sorted(name for name in {*saved, *given} if saved.get(name) != given.get(name))
    if names:
        difference = "; ".join(f"{name} was {saved.get(name)!r} and is now {given.get(name)!r}" for name in names)
        raise InputError(
            f"{folder} holds a run with another {what}: {difference}. "
            "Resume with what it began with, or begin in a new folder."
        )


def is_taken(folder: Path) -> bool:
    """Whether something is there already that a new folder would destroy."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file. A reader sees the old content or the new one, never a part."""
    write_file(path, (to_json(value, indent=2) + "\n").encode())
