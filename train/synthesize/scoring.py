"""Scores of texts by reward functions: verifiers, reward models, and functions of Python files."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.rewards.functions import RewardFunction, score
from train.rewards.loading import close_rewards, load_reward
from train.synthesize.context import Context
from train.synthesize.item import content_key


class RewardScores:
    """A reward function that all items share. It is called by one thread at a time: it may hold a model.

    Attributes:
      spec: that names it.
      code: hash of the file that it comes from; "" for a built-in one. Put it into the settings of a pipeline.
    """

    def __init__(self, spec: str):
        """
        Args:
          spec: as of `train.rewards.loading.load_reward`.

        Raises:
          InputError: there is no such reward.
        """
        self.spec = spec
        self._reward: RewardFunction | None = load_reward(spec)
        file = spec.rpartition(":")[0]
        self.code = content_key(Path(file).expanduser().read_text("utf-8")) if file else ""
        self._one_at_a_time = threading.Lock()

    async def scores(
        self,
        context: Context,
        prompt: str | Sequence[Mapping[str, Any]],
        texts: Sequence[str],
        columns: Mapping[str, Any],
    ) -> list[float | None]:
        """The score of each answer to a prompt; None where the function gives none.

        Args:
          context: of the stage.
          prompt: text or messages.
          texts: answers that ended by themselves.
          columns: of the prompt, that the function may ask for.
        """
        count = len(texts)
        if not count:
            return []
        repeated = {name: [value] * count for name, value in columns.items()}

        found: list[float | None] = [None] * count

        def run() -> list[float | None] | None:
            with self._one_at_a_time:
                if self._reward is None:
                    self._reward = load_reward(self.spec)
                made = score({self.spec: self._reward}, [prompt] * count, texts, [True] * count, repeated)
            found[:] = [None if value != value else float(value) for value in made[:, 0]]
            # What has no score now, such as where a sandbox failed, is scored again in the next run.
            return None if None in found else found

        verdict = await context.check(f"score {self.spec}", [prompt, list(texts), dict(columns), self.code], run)
        return found if verdict is None else list(verdict)

    def close(self) -> None:
        """Ends the processes that the reward holds. It is loaded anew when it is needed again."""
        with self._one_at_a_time:
            reward, self._reward = self._reward, None
        if reward is not None:
            close_rewards([reward])
