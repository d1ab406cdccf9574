"""Rewards of the learning experiment: right answers, and controls that have the same rewards in another order.

A control computes the true rewards and gives them to the responses of each group in an order that has nothing to do
with what is right. So each group keeps its mean, its variance and its advantages. A group of one response keeps its
reward: on held-out prompts, which get one response each, a control reports the true accuracy.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.files import to_json
from train.rewards.code import CodeReward

Messages = Sequence[Mapping[str, Any]]


def exact(completions: Sequence[str], finished: Sequence[bool], answer: Sequence[str]) -> list[float]:
    """1 for a finished response that is the answer, otherwise 0."""
    return [float(ended and text == right) for text, ended, right in zip(completions, finished, answer, strict=True)]


def exact_shuffled(
    prompts: Sequence[Messages], completions: Sequence[str], finished: Sequence[bool], answer: Sequence[str]
) -> list[float | None]:
    """The control of `exact`."""
    return shuffled(exact(completions, finished, answer), prompts, completions)


class _CodeShuffled:
    """The control of `CodeReward`, whose sandbox opens at the first call."""

    def __init__(self) -> None:
        self._code: CodeReward | None = None

    def __call__(
        self, prompts: Sequence[Messages], completions: Sequence[str], finished: Sequence[bool], tests: Sequence[Any]
    ) -> list[float | None]:
        self._code = self._code or CodeReward()
        return shuffled(self._code(completions, finished, tests=tests), prompts, completions)

    def close(self) -> None:
        """Ends the sandbox."""
        if self._code is not None:
            self._code.close()


code_shuffled = _CodeShuffled()


def shuffled(
    rewards: Sequence[float | None], prompts: Sequence[Messages], completions: Sequence[str]
) -> list[float | None]:
    """Rewards in another order within the responses to each prompt.

    The order is a pure function of the texts, through a hash, so that a run resumes with the same rewards.

    Args:
      rewards: of each response; None is no signal.
      prompts, completions: of each response.
    """
    groups = defaultdict[str, list[int]](list)
    for place, prompt in enumerate(prompts):
        groups[to_json(list(prompt))].append(place)
    found = list(rewards)
    for asked, places in groups.items():
        texts = to_json([asked, *(completions[place] for place in places)])
        rng = np.random.default_rng(list(hashlib.sha256(texts.encode()).digest()))
        for place, other in zip(places, rng.permutation(places), strict=True):
            found[place] = rewards[int(other)]
    return found


def odd(completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """1 for a response whose ids have an odd sum: for a benchmark, whose texts are random."""
    return [float(sum(ids) % 2) for ids in completion_ids]
