"""The rewards of a run: its functions, how they are combined, and the episodes that they judge."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.parallel.multihost import in_step
from qwen_jax.tokenizer import Tokenizer
from train.episodes import Episode, with_penalties
from train.grpo_config import GrpoRunConfig
from train.rewards import BUILT_IN, RewardFunction, check_columns, close_rewards, combine, load_reward, score
from train.sampler import Prompt, Sample
from train.tuned import Formats


class Judge:
    """The reward functions of a run. Close it: some functions hold processes.

    Attributes:
      names: of the functions.
      functions: by name; none but in process 0.
    """

    def __init__(self, config: GrpoRunConfig, formats: Formats, mesh: Mesh, tokenizer: Tokenizer):
        """
        Args:
          config: of the run.
          formats: reads reward models.
          mesh: that reward models are put on, of process 0.
          tokenizer: of the policy.

        Raises:
          InputError: a reward that does not exist, or settings or weights that it does not take.
        """
        self._config = config
        self.names = tuple(use.name for use in config.rewards)
        self.functions: dict[str, RewardFunction] = {}
        self._weights: dict[str, float] = {}
        with in_step("Opening the rewards"):
            if jax.process_index() == 0:
                self._open(formats, mesh, tokenizer)

    def _open(self, formats: Formats, mesh: Mesh, tokenizer: Tokenizer) -> None:
        config = self._config
        for use in config.rewards:
            settings = dict(use.settings)
            if use.spec == "reward_model":
                settings |= {"formats": formats, "mesh": mesh, "policy_tokenizer": tokenizer}
            if use.spec == "code":
                # A resumed run has the verdicts of the run before, also of programs that differ from run to run.
                settings.setdefault("verdicts", Path(config.output) / f"verdicts-{use.name}.jsonl")
            self.functions[use.name] = load_reward(use.spec, **settings)
        # A gate has no weight; one that is not 1 is an error of `combine`.
        gates = [name for name, function in self.functions.items() if getattr(function, "gate", False)]
        self._weights = {use.name: use.weight for use in config.rewards if use.name not in gates or use.weight != 1}
        combine(self.functions, np.zeros((0, len(self.functions)), np.float32), self._weights)

    def close(self) -> None:
        """Ends the processes of reward functions."""
        close_rewards(self.functions.values())

    def check(self, prompts: Iterable[Prompt], where: str = "") -> None:
        """Checks that the functions can judge prompts, before there are responses. All processes call it.

        Built-in functions read the columns of each prompt, beside a response that was cut; others are not called.

        Args:
          prompts: all that are to be judged.
          where: what messages begin with.

        Raises:
          InputError: a column that a function asks for is missing, or a built-in function cannot use what is in it.
        """
        specs = {use.name: use.spec for use in self._config.rewards}
        built_in = {name: function for name, function in self.functions.items() if specs[name] in BUILT_IN}
        with in_step("Checking the prompts"):
            for prompt in prompts if jax.process_index() == 0 else ():
                try:
                    check_columns(self.functions, list(prompt.columns))
                    columns = {name: [value] for name, value in prompt.columns.items()}
                    score(built_in, [prompt.text_or_messages], [""], [False], columns, completion_ids=[[]])
                except InputError as error:
                    raise InputError(f"{where}Prompt {prompt.number}: {error}") from error

    def judge(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]]) -> tuple[np.ndarray, np.ndarray]:
        """The scores and rewards of rollouts; see `Episode`. Process 0 calls it.

        Args:
          prompts: one for each group.
          groups: of rollouts.

        Raises:
          InputError: a function that fails or returns something else than rewards.
        """
        config = self._config
        rollouts = [rollout for group in groups for rollout in group]
        asked = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        scores = score(
            self.functions,
            [prompt.text_or_messages for prompt in asked],
            [rollout.text or "" for rollout in rollouts],
            [rollout.finished for rollout in rollouts],
            {name: [prompt.columns.get(name) for prompt in asked] for name in columns},
            completion_ids=[rollout.ids[rollout.prompt_length :] for rollout in rollouts],
        )
        combined = combine(self.functions, scores, self._weights)
        return scores, with_penalties(combined, rollouts, config.sampling.max_new_tokens, config.objective)

    def episode(
        self,
        number: int,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Sample]],
        scores: np.ndarray,
        rewards: np.ndarray,
    ) -> Episode:
        """An episode with the advantages of its rollouts.

        Args:
          number: of the episode.
          prompts: one for each group.
          groups: of rollouts.
          scores, rewards: of `judge`.
        """
        return Episode.of(number, prompts, groups, scores, rewards, self.names, self._config.objective)
