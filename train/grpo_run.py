"""GRPO runs: from a configuration to a job, which `train.launch` takes to its end, or to scores of its prompts."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.parallel.multihost import in_step
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import Tokenizer
from train.checkpoint import Checkpoints
from train.data.documents import optional_library
from train.data.prompts import PromptOrder, PromptSet, order_by_variance, read_prompts, read_scores
from train.data.rollouts import RolloutBatch
from train.data.shards import digest
from train.environments import Environment, FileSearchTool, PythonTool, Tool, ToolEnvironment
from train.evaluate.in_training import OpenedTasks
from train.fields import call
from train.files import write_file
from train.grpo_config import GrpoRunConfig
from train.grpo_data import OpenedRun, Rollouts, make_engines, rows_that_fit
from train.handover import check_handover, local_meshes, split_mesh
from train.judge import Judge
from train.launch import Export, Job, Phase
from train.loop import Measurement
from train.observe.report import Report, ReportedStage
from train.resume import changed_tuning, check_moments
from train.sampler import Sampler
from train.sandbox import Sandbox
from train.shared_rollouts import SharedRollouts
from train.start import Started, begin
from train.tuned import Formats, TunedModel, check_beside


def train_grpo(config: GrpoRunConfig, formats: Formats, console: Console | None = None) -> int:
    """Trains a policy from the newest checkpoint of the run's folder, or from the beginning, to the end of the run.

    Args:
      config: of the run.
      formats: reads and writes models.
      console: for progress; standard error by default.

    Returns:
      The number of the signal that stopped the run early, with everything saved; 0 if it has ended.

    Raises:
      InputError: prompts, rewards, model and folder that do not fit each other or the run in the folder; a quantised
        model; a folder in use; a reward that fails; or an episode without any reward.
    """
    with _opened(config, formats, console) as run:
        return run.begun.launch(config.output, run.job)


def score_prompts(config: GrpoRunConfig, formats: Formats, output: Path, console: Console | None = None) -> None:
    """Samples a group for each prompt with the weights that a run begins with, and writes their rewards to a file.

    The file is one for `GrpoRunConfig.order`. Nothing else is written.

    Args:
      config: of the run; only its model, prompts, rewards, tools and how it samples are used.
      formats: reads models.
      output: the file.
      console: for progress; standard error by default.

    Raises:
      InputError: prompts, rewards and model that do not fit each other; a folder in the place of the file; a reward
        that fails; or no reward at all.
    """
    if output.is_dir():
        raise InputError(f"{output} is a folder. Give the file that scores are written to.")
    rewards = tuple(
        dataclasses.replace(use, settings={"verdicts": None, **use.settings}) if use.spec == "code" else use
        for use in config.rewards
    )
    unused: dict[str, Any] = {"held_out": {}, "tasks": None, "order": None, "updates": 1, "wandb_project": None}
    engine = dataclasses.replace(config.engine, devices=0)
    config = dataclasses.replace(config, output=str(output), rewards=rewards, engine=engine, **unused)
    with _opened(config, formats, console, one_episode=True) as run:
        run.write_scores(output)


@contextlib.contextmanager
def _opened(
    config: GrpoRunConfig, formats: Formats, console: Console | None, one_episode: bool = False
) -> Iterator["_Run"]:
    begun = begin(config, console)
    model, tokenizer, origin = formats.describe(config.model)
    if model.score is not None:
        raise InputError(f"{config.model} is a reward model, which writes no text. Give a language model.")
    check_handover(model)
    if config.reference is not None:
        check_beside("reference", config.reference, config.model, tokenizer, formats)
    with contextlib.ExitStack() as stack:
        yield _Run(config, formats, model, tokenizer, origin, begun, stack, one_episode)


class _Run:
    """A run that is opened, and its job. What must be closed at the end is put on the stack.

    `one_episode` has all prompts, instead of `queries`.
    """

    def __init__(
        self,
        config: GrpoRunConfig,
        formats: Formats,
        model: ModelConfig,
        tokenizer: Tokenizer,
        origin: Path,
        begun: Started,
        stack: contextlib.ExitStack,
        one_episode: bool,
    ):
        self.begun, self.console, self.clock, self._stack = begun, begun.console, begun.clock, stack
        self.changes = changed_tuning(config)
        self.report: Report | None = None
        self.rollouts: Rollouts | None = None
        positions = max(model.max_position_embeddings, config.longest)
        self.model = dataclasses.replace(model, max_position_embeddings=positions)
        mesh, engine_meshes = _meshes(config)
        # Prompts and rewards: everything that can be wrong with them is found before weights are read.
        optional_library("pyarrow", "Tables of rollouts")
        environment = self._open_environment(config)
        tools = getattr(environment, "schemas", None) or None
        read = functools.partial(read_prompts, tokenizer=tokenizer, max_tokens=config.prompt_length, tools=tools)
        prompts = read(list(config.prompts.values()))
        held_out = {name: read([path]) for name, path in config.held_out.items()}
        if one_episode:
            config = dataclasses.replace(config, queries=len(prompts.prompts))
        self.config = config
        fixed = None if config.order is None else _fixed_order(Path(config.order), prompts)
        order = PromptOrder(len(prompts.prompts), config.queries, config.seed, fixed)
        judge = self._stack.enter_context(contextlib.closing(Judge(config, formats, engine_meshes[0], tokenizer)))
        judge.check(prompts.prompts)
        for name, some in held_out.items():
            judge.check(some.prompts, f"held out, {name}: ")
        tuned = TunedModel(config, formats, self.model, tokenizer, origin)
        self.measurement: Measurement | None = None
        if config.tasks is not None:
            tasks = self._stack.enter_context(contextlib.closing(OpenedTasks(config.tasks, tokenizer)))
            self.measurement = tuned.measurement(tasks, self.model, config.step, mesh, begun.say)
        data = prompts, held_out, order, judge, environment
        self.opened = OpenedRun(config, formats, tuned, mesh, engine_meshes, *data, begun.console)
        self.steps = self.opened.episodes * config.updates

    def _open_environment(self, config: GrpoRunConfig) -> Environment | None:
        """What answers the policy's turns; None for rollouts of one turn."""
        if config.environment is not None:
            found: Any = call(config.environment)
            if not callable(getattr(found, "step", None)) or not callable(getattr(found, "reset", None)):
                raise InputError(
                    f"{config.environment} must return an environment with reset and step, got {type(found).__name__}."
                )
            environment: Environment = found
            return environment
        tools: list[Tool] = []
        for name in config.tools:
            if name == "python":
                tools.append(PythonTool(self._stack.enter_context(Sandbox())))
            else:
                tools.append(FileSearchTool(name.removeprefix("search:")))
        return ToolEnvironment(tools) if tools else None

    def job(self) -> Job[RolloutBatch]:
        """What `launch` takes to its end."""
        config = self.config
        opened, tuned, objective = self.opened, self.opened.tuned, config.objective_of(self.model)
        rollouts = self._stack.enter_context(contextlib.closing(Rollouts(opened, objective, self._log)))
        self.rollouts = rollouts
        folder = config.export_folder
        return Job(
            folder=Path(config.output).absolute() / "checkpoints",
            model=self.model,
            tokenizer=tuned.tokenizer,
            optimizer=config.optimizer_config(self.steps),
            phases=(
                Phase(
                    end=self.steps,
                    objective=objective,
                    step=config.step,
                    mesh=opened.mesh,
                    data=lambda step: rollouts,
                    evaluate=rollouts.evaluate if opened.held_out else None,
                    measurement=self.measurement,
                ),
            ),
            report=self._report,
            seed=config.seed,
            identity={"seed": config.seed, "method": "grpo", "model": config.model},
            data_record=self._record(),
            loop=config.loop,
            checkpoints=config.checkpoints,
            initial=tuned.initial,
            frozen=None if config.step.lora is None else tuned.frozen,
            check_resume=self._check_resume,
            export=None if folder is None else Export(folder, lambda params: tuned.export(params, self.model)),
            nothing_left=f"{config.output} has ended: all {self.steps:,} steps are taken",
        )

    def _log(self, numbers: Mapping[str, float]) -> None:
        if self.report is not None and self.report.log is not None:
            self.report.log.write(numbers)

    def _record(self) -> dict[str, Any]:
        """What decides which rollouts a step learns from."""
        prompts = [[p.number, list(p.ids)] for p in self.opened.prompts.prompts]
        order = None if self.config.order is None else digest(Path(self.config.order).read_text())
        return {
            "prompts": digest(prompts),
            "order": order,
            "queries": self.config.queries,
            "updates": self.config.updates,
            "sampling": dataclasses.asdict(self.config.sampling),
        }

    def _check_resume(self, checkpoints: Checkpoints, step: int) -> None:
        check_moments(self.config, self.changes)
        saved = checkpoints.data(step) or {}
        for name, value in self._record().items():
            if saved.get(name) != value:
                raise InputError(
                    f"The run in {self.config.output} has taken {step} steps with other {name} than these. Give the "
                    "same, or begin a new run (output)."
                )

    def _report(self, step: int) -> Report:
        config, opened = self.config, self.opened
        rows = rows_that_fit(config.samples, opened.unit_rows)
        length = config.row_length or config.longest
        stage = ReportedStage(self.steps, rows, length, config.learning_rate, self.model, opened.mesh)
        shown = [opened.prompts.describe()]
        shown += [f"held out, {name}: {prompts.describe()}" for name, prompts in opened.held_out.items()]
        shown.append(
            f"{opened.episodes:,} episodes of {config.queries} prompts x {config.sampling.group_size} responses; "
            f"{len(opened.engine_meshes) * jax.process_count()} engine(s) of {opened.engine_meshes[0].size} device(s)"
        )
        for name, function in opened.judge.functions.items():
            if described := getattr(function, "description", None):
                shown.append(f"reward {name}: {described}")
        changes = self.changes if step else {}
        of_launch = config, [stage], step, self.console, self.clock, "\n".join(shown), changes
        adapter = config.step.lora is not None
        self.report = Report(*of_launch, exported=config.export_folder, adapter=adapter, unit="a response")
        assert self.rollouts is not None
        of_experts, of_rollouts = self.report.arrays, self.rollouts.take

        def arrays(step: int, name: str, value: np.ndarray) -> None:
            of_rollouts(step, name, value)
            if of_experts is not None:
                of_experts(step, name, value)

        self.report.arrays = arrays
        return self.report

    def write_scores(self, path: Path) -> None:
        """Samples a group for each prompt with the first weights, and writes the rewards."""
        opened, prompts = self.opened, self.opened.prompts.prompts
        engines = make_engines(opened)
        sampler = Sampler(engines, self.config.sampling, opened.environment)
        try:
            with opened.progress("sampling") as advance:
                episode, _ = SharedRollouts(opened.judge).episode(0, prompts, sampler, 0, advance)
        finally:
            for engine in engines:
                engine.close()
        episode.check_signal()
        lines = []
        for prompt, rewards in zip(episode.prompts, episode.grouped_rewards, strict=True):
            scores = [None if np.isnan(reward) else float(reward) for reward in rewards]
            lines.append(to_json({"number": prompt.number, "scores": scores}))
        with in_step(f"Writing {path}"):
            if jax.process_index() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, ("\n".join(lines) + "\n").encode())
        self.console.print(f"scores of {len(lines):,} prompts: {path}", highlight=False, markup=False, soft_wrap=True)


def _meshes(config: GrpoRunConfig) -> tuple[Mesh, list[Mesh]]:
    """The mesh of the trainer and those of this process's engines: on all devices in turn, or each on its own.

    Each process gives as many of its devices to engines, so that weights are handed over within it.
    """
    devices, (apart, rest) = jax.devices(), divmod(config.engine.devices, jax.process_count())
    if rest:
        raise InputError(
            f"engine.devices={config.engine.devices} must be a multiple of the {jax.process_count()} processes."
        )
    of_process = collections.defaultdict[int, list[jax.Device]](list)
    for device in devices:
        of_process[device.process_index].append(device)
    if any(apart >= len(own) for own in of_process.values()):
        raise InputError(f"engine.devices={config.engine.devices} leaves none of {len(devices)} devices to train on.")
    training = [device for own in of_process.values() for device in own[: len(own) - apart]]
    mesh = make_mesh(config.mesh, training if apart else None)
    if mesh.shape["context"] > 1:
        raise InputError("GRPO has no context axis. Leave mesh.context out.")
    tensor, expert = config.engine.tensor, config.engine.expert
    if not apart:
        return mesh, local_meshes(split_mesh(mesh, tensor, expert))
    own = of_process[jax.process_index()][-apart:]
    return mesh, split_mesh(make_mesh({"data": apart}, own), tensor, expert)


def _fixed_order(path: Path, prompts: PromptSet) -> list[int]:
    """Places of prompts by the variance of their scores."""
    scores = read_scores(path)
    places = {prompt.number: place for place, prompt in enumerate(prompts.prompts)}
    if missing := sorted(set(places) - set(scores)):
        raise InputError(
            f"{path} has no scores of prompt {missing[0]} and {len(missing) - 1} others. Write it for these prompts "
            "(qwen-jax score --prompts)."
        )
    return [places[number] for number in order_by_variance(scores) if number in places]
