"""Episodes of reinforcement learning: prompts, their rollouts and rewards, and the file that keeps them.

The file is a Parquet table with a row for each rollout. It shows what the policy writes, and a run that was interrupted
within an episode goes on with it: the numbers that training needs are in it exactly.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.data.documents import optional_library
from train.files import write_file
from train.policy import GrpoConfig, group_advantages, overlong_penalty, varied_groups
from train.sampler import Prompt, Sample

_FORMAT = b"qwen_jax.rollouts.1"


@dataclasses.dataclass(frozen=True)
class Episode:
    """Rollouts of some prompts by one version of the policy, with their rewards.

    Attributes:
      number: of the episode, from 0.
      prompts: one for each group.
      groups: of rollouts, all of one size.
      scores: float32 [rollouts, functions], of each reward function in the order of `names`; NaN is no signal.
      rewards: float32 [rollouts], combined, with penalties; NaN is no signal.
      names: of the reward functions.
      advantages: float32 [rollouts]; see `train.policy.group_advantages`.
      gaps: float32 [rollouts], the mean absolute difference of the log-probabilities of sampler and trainer over the
        trained tokens; NaN before the step, and for rollouts that are left out of it.
    """

    number: int
    prompts: Sequence[Prompt]
    groups: Sequence[Sequence[Sample]]
    scores: np.ndarray
    rewards: np.ndarray
    names: tuple[str, ...]
    advantages: np.ndarray
    gaps: np.ndarray

    @classmethod
    def of(
        cls,
        number: int,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Sample]],
        scores: np.ndarray,
        rewards: np.ndarray,
        names: tuple[str, ...],
        config: GrpoConfig,
    ) -> "Episode":
        """An episode with the advantages that follow from the settings of the loss."""
        advantages = np.zeros(len(rewards), np.float32)
        if len(groups[0]) > 1:  # An evaluation may have groups of one, which have no advantages.
            grouped = group_advantages(rewards.reshape(len(groups), -1), config.scale, config.epsilon)
            advantages = grouped.reshape(-1)
        gaps = np.full(len(rewards), np.nan, np.float32)
        return cls(number, prompts, groups, scores, rewards, names, advantages, gaps)

    @classmethod
    def unjudged(
        cls, number: int, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]], names: tuple[str, ...]
    ) -> "Episode":
        """An episode whose rewards are not computed yet: they are NaN."""
        count = sum(map(len, groups))
        scores, unknown = np.full((count, len(names)), np.nan, np.float32), np.full(count, np.nan, np.float32)
        return cls(number, prompts, groups, scores, unknown, names, np.zeros(count, np.float32), unknown)

    @property
    def rollouts(self) -> list[Sample]:
        """All rollouts, group after group."""
        return [rollout for group in self.groups for rollout in group]

    @property
    def version(self) -> int:
        """Of the policy that sampled them: steps taken by then."""
        return self.groups[0][0].version

    @property
    def grouped_rewards(self) -> np.ndarray:
        """Rewards as [prompts, group size]."""
        return self.rewards.reshape(len(self.groups), -1)

    def flat_groups(self) -> np.ndarray:
        """Which groups teach nothing: bool [prompts], all of whose known rewards are equal."""
        rewards = self.grouped_rewards
        return np.ones(len(rewards), bool) if rewards.shape[1] < 2 else ~varied_groups(rewards)

    @property
    def has_signal(self) -> bool:
        """Whether any rollout has a reward; none has before the rewards are computed."""
        return not np.isnan(self.rewards).all()

    def check_signal(self) -> None:
        """Raises InputError if no rollout has a reward."""
        if not self.has_signal:
            raise InputError(
                f"Episode {self.number}: no reward function gave a signal for any of {len(self.rewards)} responses. "
                f"The first failure: {self.rollouts[0].failure or 'the functions returned None'}. Check the reward."
            )

    def metrics(self) -> dict[str, float]:
        """Numbers for the log.

        Means and standard deviations are over the rollouts that have the number, and are left out where there are none.
        """
        rollouts = self.rollouts
        lengths = np.array([int(r.trained.sum()) for r in rollouts])
        ended = lengths[[r.finished for r in rollouts]]
        found = {
            "reward/missing": float(np.isnan(self.rewards).mean()),
            "groups/without_variance": float(self.flat_groups().mean()),
            "response/tokens": float(lengths.mean()),
            "response/shortest": float(lengths.min()),
            "response/longest": float(lengths.max()),
            "response/unfinished": float(np.mean([not r.finished for r in rollouts])),
            "response/turns": float(np.mean([r.turns for r in rollouts])),
            "response/failed_tools": float(np.mean([r.failure is not None for r in rollouts])),
        }
        if len(ended):
            found["response/finished_tokens"] = float(ended.mean())
        for column, name in enumerate(self.names):
            found[f"reward/{name}_missing"] = float(np.isnan(self.scores[:, column]).mean())
        columns = dict(zip(self.names, self.scores.T, strict=True))
        for name, values in {"reward/mean": self.rewards, **{f"reward/{n}": x for n, x in columns.items()}}.items():
            if len(known := values[~np.isnan(values)]):
                found[name] = float(known.mean())
                found["reward/std" if name == "reward/mean" else f"{name}_std"] = float(known.std())
        return found


def with_penalties(rewards: np.ndarray, rollouts: Sequence[Sample], longest: int, config: GrpoConfig) -> np.ndarray:
    """Rewards less the penalty of long responses; NaN where a tool has failed, which is not the policy's fault.

    Args:
      rewards: float32 [rollouts], of `train.rewards.combine`.
      rollouts: with them.
      longest: tokens that a response may have.
      config: `overlong_tokens` and `overlong_weight` of it.
    """
    lengths = np.array([int(rollout.trained.sum()) for rollout in rollouts])
    found = rewards + overlong_penalty(lengths, longest, config)
    found[[rollout.failure is not None for rollout in rollouts]] = np.nan
    return found.astype(np.float32)


def write_episode(path: Path, episode: Episode) -> None:
    """Writes the table of an episode, whole or not at all.

    Args:
      path: of the Parquet file.
      episode: what it keeps.

    Raises:
      InputError: pyarrow is not installed.
    """
    pyarrow = optional_library("pyarrow", "Tables of rollouts")
    parquet = optional_library("pyarrow.parquet", "Tables of rollouts")
    rollouts, size = episode.rollouts, len(episode.groups[0])
    prompts = [prompt for prompt in episode.prompts for _ in range(size)]
    columns: dict[str, Any] = {
        "prompt_number": [prompt.number for prompt in prompts],
        "prompt": [_text(prompt.text_or_messages) for prompt in prompts],
        "is_messages": [not isinstance(prompt.text_or_messages, str) for prompt in prompts],
        "earlier_turns": [rollout.earlier for rollout in rollouts],
        "completion": [rollout.text for rollout in rollouts],
        "reward": pyarrow.array(episode.rewards, pyarrow.float32()),
        **{f"reward_{name}": pyarrow.array(episode.scores[:, i]) for i, name in enumerate(episode.names)},
        "advantage": pyarrow.array(episode.advantages, pyarrow.float32()),
        "gap": pyarrow.array(episode.gaps, pyarrow.float32()),
        "finished": [rollout.finished for rollout in rollouts],
        "tokens": [int(rollout.trained.sum()) for rollout in rollouts],
        "turns": [rollout.turns for rollout in rollouts],
        "failure": pyarrow.array([rollout.failure for rollout in rollouts], pyarrow.string()),
        "version": [rollout.version for rollout in rollouts],
        "prompt_length": [rollout.prompt_length for rollout in rollouts],
        "ids": pyarrow.array([rollout.ids for rollout in rollouts], pyarrow.list_(pyarrow.int32())),
        "trained": [rollout.trained.tolist() for rollout in rollouts],
        "log_probs": pyarrow.array([rollout.log_probs for rollout in rollouts], pyarrow.list_(pyarrow.float32())),
        "columns": [to_json(prompt.columns) for prompt in prompts],
    }
    about = {"episode": episode.number, "names": episode.names, "group_size": size}
    table = pyarrow.table(columns).replace_schema_metadata({_FORMAT: to_json(about)})
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


def read_episode(path: Path) -> Episode:
    """Reads what `write_episode` wrote; all numbers are the same.

    Raises:
      InputError: another file, or pyarrow is not installed.
    """
    parquet = optional_library("pyarrow.parquet", "Tables of rollouts")
    try:
        table = parquet.read_table(path, memory_map=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of rollouts: {str(error).partition(chr(10))[0]}. Remove it.") from None
    metadata = table.schema.metadata or {}
    if _FORMAT not in metadata:
        raise InputError(f"{path} is no table of rollouts of this version. Remove it.")
    about = json.loads(metadata[_FORMAT])
    names, size = tuple(about["names"]), int(about["group_size"])
    rows = table.to_pylist()
    samples = [
        Sample(
            ids=row["ids"],
            trained=np.array(row["trained"], bool),
            log_probs=np.array(row["log_probs"], np.float32),
            finished=row["finished"],
            version=row["version"],
            prompt_length=row["prompt_length"],
            text=row["completion"],
            turns=row["turns"],
            failure=row["failure"],
            earlier=row.get("earlier_turns", ""),
        )
        for row in rows
    ]
    prompts = [
        Prompt(
            row["prompt_number"],
            row["ids"][: row["prompt_length"]],
            json.loads(row["prompt"]) if row["is_messages"] else row["prompt"],
            json.loads(row["columns"]),
        )
        for row in rows[::size]
    ]
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    scores = np.stack([table[f"reward_{name}"].to_numpy() for name in names], axis=1).astype(np.float32)
    if "gap" not in table.column_names:  # A table from before there were gaps.
        table = table.append_column("gap", [np.full(len(rows), np.nan, np.float32)])
    rewards, advantages, gaps = (table[name].to_numpy().astype(np.float32) for name in ("reward", "advantage", "gap"))
    return Episode(int(about["episode"]), prompts, groups, scores, rewards, names, advantages, gaps)


def _text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as one text: messages as JSON."""
    return prompt if isinstance(prompt, str) else to_json(list(prompt))
