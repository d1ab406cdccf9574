"""The batches of a GRPO run: rollouts by engines that have the trainer's weights, judged and packed."""

import concurrent.futures
import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from qwen_jax.inference import ContinuousEngine
from qwen_jax.parallel.broadcast import Exchange
from qwen_jax.parallel.multihost import in_step
from qwen_jax.parallel.placing import read
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params
from train.data.batch import place
from train.data.packing import best_fit
from train.data.prompts import PromptOrder, PromptSet
from train.data.rollouts import RolloutBatch, pack_rollouts, packed_places
from train.environments import Environment
from train.episodes import Episode, read_episode, write_episode
from train.files import write_file
from train.grpo import Grpo, make_log_prob_pass
from train.grpo_config import GrpoRunConfig
from train.handover import Handover, make_handover
from train.judge import Judge
from train.loop import failing_together
from train.policy import GrpoConfig
from train.sampler import Prompt, Sample, Sampler
from train.shared_rollouts import SharedRollouts
from train.state import TrainState
from train.step import EvalStep
from train.tuned import Formats, TunedModel

# An episode, and numbers of how it was sampled.
Sampled = tuple[Episode, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A run whose prompts, rewards and meshes are open.

    Attributes:
      config: of the run.
      formats: reads models.
      tuned: the model that is trained.
      mesh: of the trainer.
      engine_meshes: one for each engine of this process; every process has as many.
      prompts: to train on.
      held_out: to evaluate on, by name.
      order: of the prompts.
      judge: the rewards.
      environment: what answers the policy's turns; None for rollouts of one turn.
      console: for progress.
    """

    config: GrpoRunConfig
    formats: Formats
    tuned: TunedModel
    mesh: Mesh
    engine_meshes: list[Mesh]
    prompts: PromptSet
    held_out: Mapping[str, PromptSet]
    order: PromptOrder
    judge: Judge
    environment: Environment | None
    console: Console

    @property
    def episodes(self) -> int:
        """How many the run has."""
        return self.config.episodes or max(1, round(self.config.epochs * self.order.episodes_per_epoch))

    @property
    def unit_rows(self) -> int:
        """What mesh and micro-batches divide: a batch has a multiple of this many rows."""
        return Sharding.for_training(self.tuned.model, self.mesh).batch_shards * self.config.step.accumulation

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar; yields a function of how many are done, and how many there are."""
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def make_engines(run: OpenedRun) -> list[ContinuousEngine]:
    """The engines, with the weights of the checkpoint that the run begins with."""
    config, settings = run.config, run.config.engine
    rollouts = config.queries * config.sampling.group_size
    max_seqs = min(settings.max_seqs, max(1, -(-rollouts // (len(run.engine_meshes) * jax.process_count()))))
    pages = settings.num_pages or max_seqs * -(-config.longest // settings.page_size)
    dtype = settings.dtype or config.step.dtype
    engines = []
    for mesh in run.engine_meshes:
        engine = ContinuousEngine(
            run.tuned.model,
            run.formats.load(config.model, run.tuned.model, mesh, dtype, stacked=False),
            mesh,
            tokenizer=run.tuned.tokenizer,
            dtype=dtype,
            max_seqs=max_seqs,
            max_length=config.longest,
            max_batched_tokens=settings.max_batched_tokens,
            page_size=settings.page_size,
            num_pages=pages,
            eos_token_ids=run.tuned.end_ids(),
        )
        engines.append(engine)
        if settings.compile_first:
            seconds = engine.start()
            run.console.print(f"engine {len(engines)}: programs compiled in {seconds:.0f} s", highlight=False)
    return engines


class Rollouts:
    """The batches of a GRPO run: `train.loop.Data` that samples with the weights of the state.

    With devices of their own, engines sample the next episode while the trainer learns from this one.
    """

    def __init__(self, run: OpenedRun, objective: Grpo, log: Callable[[Mapping[str, float]], None]):
        """
        Args:
          run: whose prompts, rewards and meshes are open.
          objective: of the training.
          log: gets the numbers of each episode, in process 0.
        """
        self._run, self._config, self._write_log = run, run.config, log
        self._folder = Path(run.config.output).absolute() / "rollouts"
        # The first is of the thread that samples, the second of the loop's.
        self._shared, self._exchange = SharedRollouts(run.judge), Exchange()
        self._sampler: Sampler | None = None
        self._engines: list[ContinuousEngine] = []
        self._hand_over: Handover | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "rollouts")
        self._next: concurrent.futures.Future[Sampled] | None = None
        self._episode: Episode | None = None
        self._batches: list[RolloutBatch] = []
        # Of the steps whose metrics are not there yet.
        self._stepped: dict[int, Episode] = {}
        self._reference: Callable[[RolloutBatch], jax.Array] | None = None
        self._log_probs = make_log_prob_pass(objective, run.config.step, run.mesh)

    def batch(self, step: int, state: TrainState) -> RolloutBatch:
        """The batch of a step: its share of the episode, which is sampled at the episode's first step."""
        number, part = divmod(step, self._config.updates)
        if self._episode is None or self._episode.number != number:
            self._episode, times = self._obtain(number, step, state)
            if self._config.engine.devices and number + 1 < self._run.episodes:
                # The engines go on with the weights of this step.
                self._next = self._ahead(number + 1, step, state)
            self._batches = self._packed(self._episode, part, state)
            self._log(step, self._episode, times)
        self._stepped[step + 1] = self._episode
        return self._batches[part]

    def take(self, step: int, name: str, value: np.ndarray) -> None:
        """Adds the gaps of a step to the table of its episode; a hook for `Monitor.arrays` of every process.

        Args:
          step: its number.
          name: of a metric; all but `rollout_gaps` are ignored.
          value: of the metric, [rollouts of the step].

        Raises:
          SharedError: process 0 cannot write the table.
        """
        if name != "rollout_gaps":
            return
        config, episode = self._config, self._stepped.pop(step)
        begin = (step - 1) % config.updates * config.samples
        rollouts = episode.rollouts[begin : begin + config.samples]
        counted = ~np.isnan(episode.rewards[begin : begin + config.samples])
        for i in packed_places(rollouts, counted, config.objective):
            episode.gaps[begin + i] = value[i] / rollouts[i].trained.sum()
        with failing_together():
            self._exchange.from_process_0("Writing rollouts", lambda: self._write(episode.number, episode))

    def evaluate(self, state: TrainState, eval_step: EvalStep[RolloutBatch]) -> dict[str, float]:
        """Mean rewards of one response to each held-out prompt, sampled with the same seeds in every evaluation.

        Means of no reward at all are left out.
        """
        if self._next is not None:
            concurrent.futures.wait([self._next])
        self._hand(state)
        config, run = self._config, self._run
        found: dict[str, float] = {}
        sampling = dataclasses.replace(config.sampling, group_size=1)
        sampler = Sampler(self._engines, sampling, run.environment)
        rewards: list[np.ndarray] = []
        for name, held_out in run.held_out.items():
            with failing_together(), run.progress(f"held out, {name}") as advance:
                episode, _ = self._shared.episode(0, held_out.prompts, sampler, 0, advance)
            metrics = episode.metrics()
            kept = ["reward/mean", "reward/missing", "response/tokens", "response/unfinished"]
            kept += [f"reward/{n}" for n in episode.names]
            found |= {f"{name}_{key}": metrics[key] for key in kept if key in metrics}
            rewards.append(episode.rewards[~np.isnan(episode.rewards)])
        everything = np.concatenate(rewards)
        return {"reward": float(everything.mean()), **found} if len(everything) else found

    def close(self) -> None:
        """Ends engines; rollouts in flight are written first, so that the run resumes with them."""
        if self._next is not None:
            concurrent.futures.wait([self._next])
        self._thread.shutdown()
        for engine in self._engines:
            engine.close()

    # --- an episode ---

    def _obtain(self, number: int, step: int, state: TrainState) -> Sampled:
        """The episode of a step: one that was sampled ahead, one that an earlier launch wrote, or a new one.

        Of an episode that an earlier launch has sampled and not judged, only the rewards are computed.
        """
        if self._next is not None:
            ahead, self._next = self._next, None
            return ahead.result()
        written = self._written(number, step)
        if written is not None and written.has_signal:
            return written, {}
        begin = time.perf_counter()
        self._hand(state)
        seconds = time.perf_counter() - begin
        episode, times = self._sample(number, step, written)
        return episode, {**times, "seconds/hand_over": seconds}

    def _ahead(self, number: int, step: int, state: TrainState) -> concurrent.futures.Future[Sampled]:
        """The next episode, which the engines sample in another thread."""
        written = self._written(number, step)
        if written is not None and written.has_signal:
            found: concurrent.futures.Future[Sampled] = concurrent.futures.Future()
            found.set_result((written, {}))
            return found
        self._hand(state)
        return self._thread.submit(self._sample, number, step, written)

    def _written(self, number: int, step: int) -> Episode | None:
        """An episode that an earlier launch has sampled with earlier weights than those of this step."""
        path = self._path(number)
        if not self._shared.exchange.from_process_0(f"Looking for {path}", path.exists):
            return None
        # Rollouts of the weights of this very step are sampled again, in case the run has changed.
        written = read_episode(path)
        return written if written.number == number and written.version < step else None

    @failing_together()
    def _sample(self, number: int, version: int, unjudged: Episode | None = None) -> Sampled:
        """Samples an episode, unless that is done, judges it, and writes its table."""
        run, order = self._run, self._run.order
        places = order.places(number)
        prompts = [run.prompts.prompts[place] for place in places]
        if unjudged is None:
            groups, times = self._groups(number, prompts, version)
            if version < number * self._config.updates:
                # Sampled ahead: a launch that has to judge it will have newer weights.
                ahead = Episode.unjudged(number, prompts, groups, run.judge.names)
                self._shared.exchange.from_process_0("Writing rollouts", lambda: self._write(number, ahead))
        else:
            groups, times = unjudged.groups, {}
        episode, more = self._shared.judge(number, prompts, groups)
        times = {**times, **more}
        # Prompts whose responses all have the same reward are replaced, as often as the run allows.
        others = order.others(number, set(places))
        replaced = 0
        for _ in range(self._config.resample):
            flat = np.flatnonzero(episode.flat_groups()).tolist()
            fresh = [run.prompts.prompts[place] for _, place in zip(flat, others, strict=False)]
            if not fresh:
                break
            groups, sampled = self._groups(number, fresh, version)
            new, judged = self._shared.judge(number, fresh, groups)
            episode = _with_groups(episode, flat[: len(fresh)], new, self._config.objective)
            times = {name: times.get(name, 0.0) + more for name, more in (sampled | judged).items()}
            replaced += len(fresh)
        episode.check_signal()
        self._shared.exchange.from_process_0("Writing rollouts", lambda: self._write(number, episode))
        return episode, {**times, "groups/replaced": float(replaced)}

    def _write(self, number: int, episode: Episode) -> None:
        write_episode(self._path(number), episode)
        (self._folder / f"{number - self._config.keep_rollouts:08d}.parquet").unlink(missing_ok=True)

    def _groups(
        self, number: int, prompts: Sequence[Prompt], version: int
    ) -> tuple[Sequence[Sequence[Sample]], dict[str, float]]:
        assert self._sampler is not None
        with self._run.progress(f"episode {number + 1}") as advance:
            return self._shared.sample(prompts, self._sampler, version, advance)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.parquet"

    def _hand(self, state: TrainState) -> None:
        """Gives the weights of a state to the engines, which are made the first time."""
        run = self._run
        if self._hand_over is None:
            self._engines = make_engines(run)
            self._sampler = Sampler(self._engines, self._config.sampling, run.environment)
            self._hand_over = make_handover(run.tuned.model, self._config.step, run.mesh, self._engines)
        self._hand_over(state.params, self._frozen())

    def _frozen(self) -> Params | None:
        return None if self._config.step.lora is None else self._run.tuned.frozen(self._run.mesh)

    # --- batches ---

    def _packed(self, episode: Episode, part: int, state: TrainState) -> list[RolloutBatch]:
        """The batches of all steps of an episode, on the devices."""
        config, mesh = self._config, self._run.mesh
        rollouts, advantages = episode.rollouts, episode.advantages
        counted = ~np.isnan(episode.rewards)
        length, batches = config.row_length or config.longest, []
        for i in range(config.updates):
            share = slice(i * config.samples, (i + 1) * config.samples)
            chosen = rollouts[share]
            lengths = [len(rollout.ids) for rollout in chosen]
            rows = rows_that_fit(len(best_fit(lengths, length, config.objective.max_segments)), self._run.unit_rows)
            packed = pack_rollouts(chosen, advantages[share], counted[share], config.objective, rows, length)
            batches.append(place(packed, mesh))
        if config.objective.needs_reference:
            batches = [dataclasses.replace(batch, reference_BT=self._of_reference(batch)) for batch in batches]
        if config.objective.old == "trainer":
            old = self._old(episode.number, part, batches, state)
            batches = [dataclasses.replace(batch, old_BT=x) for batch, x in zip(batches, old, strict=True)]
        return batches

    def _of_reference(self, batch: RolloutBatch) -> jax.Array:
        """Log-probabilities under the reference, whose weights are read the first time."""
        if self._reference is None:
            config, run = self._config, self._run
            lora, path = config.step.lora, config.reference or config.model
            step = dataclasses.replace(config.step, lora=None)
            model, _, _ = self._run.formats.describe(path)
            model = dataclasses.replace(model, max_position_embeddings=run.tuned.model.max_position_embeddings)
            if lora is not None and config.reference is None and not lora.whole:
                params = run.tuned.frozen(run.mesh)  # The model without its adapter.
            else:
                params = run.formats.load(path, model, run.mesh, step.dtype, stacked=step.scan_layers)
            log_probs = make_log_prob_pass(Grpo(model, config.objective), step, run.mesh)
            self._reference = lambda batch: log_probs(params, batch, None)
        return self._reference(batch)

    def _old(self, number: int, part: int, batches: Sequence[RolloutBatch], state: TrainState) -> list[Any]:
        """Log-probabilities under the weights before the first step of an episode."""
        path, mesh = self._folder / f"{number:08d}.old.npz", self._run.mesh
        if part:
            # The weights have moved on since; their numbers were kept.
            with np.load(path, allow_pickle=False) as saved:
                return [place(saved[f"part_{i}"], mesh) for i in range(len(batches))]
        found = [self._log_probs(state.params, batch, self._frozen()) for batch in batches]
        if len(batches) > 1:
            content = io.BytesIO()
            arrays: dict[str, Any] = {f"part_{i}": read(x) for i, x in enumerate(found)}
            with failing_together(), in_step(f"Writing {path}"):
                if jax.process_index() == 0:
                    np.savez(content, **arrays)
                    write_file(path, content.getvalue())
                    (self._folder / f"{number - 2:08d}.old.npz").unlink(missing_ok=True)
        return found

    def _log(self, step: int, episode: Episode, times: Mapping[str, float]) -> None:
        metrics = {**episode.metrics(), **times, "staleness": float(step - episode.version)}
        if (seconds := times.get("seconds/rollouts")) and seconds > 0:
            metrics["rollouts/tokens_per_second"] = times["rollouts/tokens"] / seconds
        with failing_together():
            record = {"step": step + 1, **metrics}
            self._exchange.from_process_0("Writing the log", lambda: self._write_log(record))
        self._run.console.print(
            f"episode {episode.number + 1}: reward {metrics['reward/mean']:.3f} ± {metrics['reward/std']:.3f}, "
            f"{metrics['response/tokens']:.0f} tokens a response, {metrics['response/unfinished']:.0%} cut, "
            f"{metrics['groups/without_variance']:.0%} of groups without variance",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _with_groups(episode: Episode, places: Sequence[int], new: Episode, config: GrpoConfig) -> Episode:
    """An episode with the groups at some places replaced by those of another."""
    size = len(episode.groups[0])
    prompts, groups = list(episode.prompts), list(episode.groups)
    scores, rewards = episode.scores.copy(), episode.rewards.copy()
    for i, place_ in enumerate(places):
        prompts[place_], groups[place_] = new.prompts[i], new.groups[i]
        here, there = slice(place_ * size, (place_ + 1) * size), slice(i * size, (i + 1) * size)
        scores[here], rewards[here] = new.scores[there], new.rewards[there]
    return Episode.of(episode.number, prompts, groups, scores, rewards, episode.names, config)


def rows_that_fit(needed: int, unit: int) -> int:
    """Rows of a batch: 1, 2, 3, 4, 6, 8, 12, ... times the unit, so that a run compiles few steps.

    Args:
      needed: rows that the rollouts fill.
      unit: what mesh and micro-batches divide.
    """
    factor = 1
    while factor * unit < needed:
        factor = factor * 4 // 3 if factor % 3 == 0 else (factor * 3 // 2 if factor > 1 else 2)
    return factor * unit
