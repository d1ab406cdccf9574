"""Rollouts in several processes: each samples a share of the prompts, process 0 judges, and all get everything.

Each process has engines on its own devices, so no step of an engine waits for another process.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwen_jax.parallel.broadcast import Exchange, Message
from train.episodes import Episode
from train.judge import Judge
from train.sampler import Prompt, Sample, SampleCounts, Sampler

Progress = Callable[[int, int], None]
"""Called with how many rollouts of this process are done, and how many there are."""


class SharedRollouts:
    """Samples and judges, together with the other processes: all of them call it with the same prompts.

    What it returns is the same everywhere, and does not depend on the number of processes. No device takes part in the
    exchange, so a thread may call it while the devices train.

    Attributes:
      exchange: of the thread that calls it.
    """

    def __init__(self, judge: Judge) -> None:
        """
        Args:
          judge: of the run.
        """
        self._judge, self.exchange = judge, Exchange()

    def episode(
        self, number: int, prompts: Sequence[Prompt], sampler: Sampler, version: int, progress: Progress
    ) -> tuple[Episode, dict[str, float]]:
        """An episode, sampled and judged, and numbers of how it was made; see `sample` and `judge`."""
        groups, sampled = self.sample(prompts, sampler, version, progress)
        episode, judged = self.judge(number, prompts, groups)
        return episode, {**sampled, **judged}

    def sample(
        self, prompts: Sequence[Prompt], sampler: Sampler, version: int, progress: Progress
    ) -> tuple[list[list[Sample]], dict[str, float]]:
        """A group of rollouts for each prompt, and numbers of how they were sampled.

        Args:
          prompts: all of them.
          sampler: with the engines of this process.
          version: of the weights.
          progress: of this process.

        Raises:
          InputError: sampling failed here, or in another process.
        """
        begin = time.perf_counter()
        first, step = jax.process_index(), jax.process_count()

        def work() -> Message:
            return _message(sampler.sample(prompts[first::step], version, progress), sampler.counts)

        # Prompts are dealt out in turn.
        groups: list[Any] = [None] * len(prompts)
        counts: list[SampleCounts] = []
        for i, message in enumerate(self.exchange.share("Sampling rollouts", work)):
            groups[i::step], some = _of_message(message, version)
            counts.append(some)
        return groups, {
            "seconds/rollouts": time.perf_counter() - begin,
            "rollouts/tokens": float(sum(one.sampled_tokens for one in counts)),
            "rollouts/preemptions": float(sum(one.preemptions for one in counts)),
            "rollouts/empty": float(sum(one.empty for one in counts)),
        }

    def judge(
        self, number: int, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]]
    ) -> tuple[Episode, dict[str, float]]:
        """An episode of rollouts, with the rewards that process 0 computes, and the seconds that they took.

        Args:
          number: of the episode.
          prompts: one for each group.
          groups: of rollouts.

        Raises:
          InputError: a reward failed here, or in another process.
        """
        begin, judge = time.perf_counter(), self._judge
        judged = self.exchange.share(
            "Judging rollouts", lambda: (None, list(judge.judge(prompts, groups)) if jax.process_index() == 0 else [])
        )
        episode = judge.episode(number, prompts, groups, *judged[0][1])
        return episode, {"seconds/rewards": time.perf_counter() - begin}


def _message(groups: Sequence[Sequence[Sample]], counts: SampleCounts) -> Message:
    samples = [sample for group in groups for sample in group]
    about = {
        "groups": len(groups),
        "counts": dataclasses.asdict(counts),
        "samples": [[len(s.ids), s.finished, s.prompt_length, s.text, s.turns, s.failure, s.earlier] for s in samples],
    }
    ids, trained, log_probs = [np.zeros(0, np.int32)], [np.zeros(0, bool)], [np.zeros(0, np.float32)]
    for s in samples:
        ids.append(np.asarray(s.ids, np.int32))
        trained.append(s.trained)
        log_probs.append(s.log_probs)
    return about, [np.concatenate(ids), np.concatenate(trained), np.concatenate(log_probs)]


def _of_message(message: Message, version: int) -> tuple[list[list[Sample]], SampleCounts]:
    about, (ids, trained, log_probs) = message
    samples, at = [], 0
    for length, finished, *others in about["samples"]:
        part = slice(at, at + length)
        numbers = ids[part].tolist(), trained[part], log_probs[part]
        samples.append(Sample(*numbers, finished, version, *others))
        at += length
    count = about["groups"]
    size = len(samples) // max(count, 1)
    groups = [samples[i * size : (i + 1) * size] for i in range(count)]
    return groups, SampleCounts(**about["counts"])
