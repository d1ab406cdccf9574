"""Checkpoints of a training run, by Orbax: atomic, in the background, and exact on resume.

A run's folder holds `run.json`, what must not change on resume; `config.json` and the tokenizer; and one numbered
folder for each kept step, with the weights (`params`) apart from the optimiser (`optimizer`). Every numbered folder
gets its own `config.json` and tokenizer, so that it is a model like any other: it can be run, converted and verified.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from qwen_jax.config import ModelConfig, load_config, read_json
from qwen_jax.errors import InputError
from qwen_jax.tokenizer.base import Tokenizer
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
        if (self.folder / "run.json").exists():
            saved = dataclasses.asdict(load_config(self.folder))
            _check_same("model", saved, dataclasses.asdict(config), self.folder)
            _check_same("run", read_json(self.folder / "run.json"), json.loads(json.dumps(run)), self.folder)
        else:
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise InputError(f"{self.folder} is not empty and holds no run. Give a new or empty folder.")
            _meet("a new run")  # All have looked before one of them makes it.
            if jax.process_index() == 0:
                temporary = self.folder.with_name(self.folder.name + ".tmp")
                shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed just here.
                temporary.mkdir(parents=True)
                tokenizer.save(temporary)
                write_json(temporary / "config.json", config.to_hf())
                write_json(temporary / "run.json", run)
                os.replace(temporary, self.folder)
        _meet("the folder of the run")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
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
        """The complete checkpoints, oldest first."""
        # The manager would count those that are still being written.
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self._steps(), default=None)

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
        """
        if step in self._manager.all_steps():
            return
        # Saving would wait for the save before it anyhow, and that one may still be removing old checkpoints.
        self._manager.wait_until_finished()
        self._label()
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_all_but_params(state)),
            "about": ocp.args.JsonSave(
                {"model": (config or self._config).to_hf(), "data": data, "checksums": _checksums(state)}
            ),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

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
        self._manager.wait_until_finished()
        steps = self._steps()
        if not steps or (step is not None and step not in steps):
            raise InputError(
                f"{self.folder} has no checkpoint {'' if step is None else f'of step {step}'}; it has {steps}."
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore(_all_but_params(abstract)),
        }
        for candidate in reversed(steps) if step is None else [step]:
            try:
                saved = self._about(candidate)["checksums"]
                restored = self._manager.restore(candidate, args=ocp.args.Composite(**items))
                state = TrainState(params=restored["params"], **restored["optimizer"])
                now = _checksums(state)
                wrong = [name for name in now if saved.get(name) != now[name]]
                if wrong:
                    raise ValueError(f"{wrong[0]} is not what was saved")
                return state
            except jax.errors.JaxRuntimeError:
                raise  # Too little memory says nothing about the checkpoint.
            except Exception as error:  # Orbax raises no narrower one for an array that cannot be read.
                reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
                if step is not None:
                    raise InputError(f"The checkpoint of step {step} in {self.folder} is damaged: {reason}") from error
                _log.warning(
                    "The checkpoint of step %d in %s is damaged (%s). Trying the one before it; the damaged one is "
                    "kept as damaged-%d.",
                    *(candidate, self.folder, reason, candidate),
                )
                self._put_aside(candidate)
        raise InputError(f"No checkpoint in {self.folder} could be read; the damaged ones are kept as damaged-<step>.")

    def _put_aside(self, step: int) -> None:
        _meet(f"damage {step}")
        if jax.process_index() == 0:
            target = self.folder / f"damaged-{step}"
            shutil.rmtree(target, ignore_errors=True)
            os.replace(self.folder / str(step), target)
        _meet(f"damaged {step}")
        self._manager.reload()

    def close(self) -> None:
        """Waits until everything is saved."""
        self._manager.wait_until_finished()
        self._label()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _meet(where: str) -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; a reader sees all of it or none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
