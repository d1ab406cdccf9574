"""Checkpoints of a training run, by Orbax: atomic, in the background, and exact on resume.

A run's folder holds `run.json`, what must not change on resume; `config.json` and the tokenizer; and one numbered
folder for each kept step, with the weights (`params`) apart from the optimiser (`optimizer`). Every numbered folder
gets its own `config.json` and tokenizer, so that it is a model like any other: it can be run, converted and verified.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qwen_jax.config import ModelConfig, load_config, read_json
from qwen_jax.errors import InputError
from qwen_jax.tokenizer.base import Tokenizer
from train.state import TrainState


class Checkpoints:
    """The checkpoints of one run. Close it, or use it in a `with` statement: saving goes on in the background."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: ModelConfig,
        tokenizer: Tokenizer,
        run: Mapping[str, Any] | None = None,
        keep_last: int = 2,
    ):
        """Opens the folder of a run, or begins one.

        Args:
          folder: of the run's checkpoints.
          config: of the model.
          tokenizer: that made the data.
          run: anything else, as JSON values, that decides the sequence of losses: seeds, a fingerprint of the data.
          keep_last: how many of the newest checkpoints stay.

        Raises:
          InputError: the folder holds a run with another model, tokenizer or `run`; nothing is touched then.
        """
        self.folder = Path(folder).absolute()
        run = {"tokenizer": tokenizer.fingerprint(), **(run or {})}
        if (self.folder / "run.json").exists():
            saved = dataclasses.asdict(load_config(self.folder))
            _check_same("model", saved, dataclasses.asdict(config), self.folder)
            _check_same("run", read_json(self.folder / "run.json"), json.loads(json.dumps(run)), self.folder)
        else:
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise InputError(f"{self.folder} is not empty and holds no run. Give a new or empty folder.")
            temporary = self.folder.with_name(self.folder.name + ".tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed just here.
            temporary.mkdir(parents=True)
            tokenizer.save(temporary)
            write_json(temporary / "config.json", config.to_hf())
            write_json(temporary / "run.json", run)
            os.replace(temporary, self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._label()

    def _label(self) -> None:
        """Puts configuration and tokenizer into the complete checkpoints that lack them; config.json is the last."""
        if jax.process_index():
            return
        files = [path for path in self.folder.iterdir() if path.is_file() and path.name != "run.json"]
        files.sort(key=lambda path: path.name == "config.json")
        for step in self.folder.iterdir():
            if step.name.isdecimal() and not (step / "config.json").exists():
                for path in files:
                    temporary = step / (path.name + ".tmp")
                    shutil.copyfile(path, temporary)
                    os.replace(temporary, step / path.name)

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState, step: int) -> None:
        """Begins to save; the state may be donated as soon as this returns. A step that is there already is kept.

        Args:
          state: after `step` steps.
          step: `state.step`, which the caller knows without asking the device.
        """
        if step in self._manager.all_steps():
            return
        self._label()
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_all_but_params(state)),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads a checkpoint onto the devices.

        Args:
          like: a state, or its `jax.ShapeDtypeStruct`s with shardings, of the same run.
          step: by default the newest.

        Raises:
          InputError: no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        step = steps[-1] if step is None and steps else step
        if step not in steps:
            raise InputError(
                f"{self.folder} has no checkpoint {'' if step is None else f'of step {step}'}; it has {steps}."
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore(_all_but_params(abstract)),
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(params=restored["params"], **restored["optimizer"])

    def close(self) -> None:
        """Waits until everything is saved."""
        self._manager.wait_until_finished()
        self._label()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _all_but_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}


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
