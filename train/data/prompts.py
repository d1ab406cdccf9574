"""Prompts of reinforcement learning: read from files, tokenized, and put in an order."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, check_messages, render_example
from train.data.tables import find_tables, read_rows
from train.sampler import Prompt


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts that can be used, and how many cannot.

    Attributes:
      prompts: numbered by their place in the files, from 0.
      too_long: how many were left out because they are too long.
      longest: tokens of the longest that is kept.
    """

    prompts: list[Prompt]
    too_long: int
    longest: int

    def describe(self) -> str:
        """One line for the log."""
        left_out = f"; {self.too_long:,} were too long and are left out" if self.too_long else ""
        return f"{len(self.prompts):,} prompts of at most {self.longest:,} tokens{left_out}"


def read_prompts(
    paths: Sequence[str], tokenizer: Tokenizer, max_tokens: int, tools: Sequence[Mapping[str, Any]] | None = None
) -> PromptSet:
    """Reads prompts: the column `prompt`, text or messages, beside any columns that rewards ask for.

    Messages are rendered with the chat template, up to where the assistant answers. Text is tokenized as it is. Control
    tokens that are typed into either stay plain text.

    Args:
      paths: JSONL, Parquet or `datasets` folders; patterns and folders of files too.
      tokenizer: of the policy.
      max_tokens: of a prompt; longer ones are left out and counted.
      tools: descriptions for the chat template, where a row has no `tools` of its own. Rewards get those of the row as
        its column `tools`.

    Raises:
      InputError: no such file; a row without a usable prompt; columns that differ between rows; or no prompt that is
        short enough. The message names the file and the row.
    """
    prompts, too_long, count, columns = [], 0, 0, None
    for path in find_tables(paths):
        for row in read_rows(path):
            try:
                prompt = _prompt(count, row.values, tokenizer, tools)
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from None
            names = set(prompt.columns) - {"tools"}
            if columns is None:
                columns = names
            elif columns != names:
                other = sorted(columns ^ names)[0]
                raise InputError(
                    f"{row.where}: the column {other!r} is in some rows only, so that rewards cannot read it. Give "
                    "every row the same columns; null stands for nothing in JSON lines."
                )
            count += 1
            if len(prompt.ids) > max_tokens:
                too_long += 1
            else:
                prompts.append(prompt)
    if not prompts:
        raise InputError(
            f"{', '.join(paths)}: all {too_long:,} prompts have more than {max_tokens:,} tokens. Raise prompt_length."
            if too_long
            else f"{', '.join(paths)} has no prompts. Give files with rows."
        )
    return PromptSet(prompts, too_long, max(len(prompt.ids) for prompt in prompts))


def _prompt(
    number: int, values: Mapping[str, Any], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None
) -> Prompt:
    given = values.get("prompt")
    columns = {name: value for name, value in values.items() if name not in ("prompt", "tools")}
    own = values.get("tools")
    if isinstance(own, str):
        try:
            own = json.loads(own)
        except ValueError as error:
            raise InputError(f"'tools' is not JSON: {error}.") from None
    if isinstance(given, str):
        if own or tools:
            raise InputError("Tools need a chat template, and 'prompt' is plain text. Give messages instead.")
        ids = tokenizer.encode(given, parse_special=False)
    elif isinstance(given, list) and given:
        check_messages(given)
        if given[-1]["role"] == "assistant":
            raise InputError("The prompt ends with an answer of the assistant. Leave the answer out.")
        # What comes before an answer, in which control tokens that were typed are plain text.
        answered = [*given, {"role": "assistant", "content": "."}]
        found = render_example(tokenizer, answered, own or tools, trained="last", first=len(given))
        ids = found.ids[: found.trained.index(True)]
    else:
        kind = "none" if given is None else "an empty list" if given == [] else type(given).__name__
        raise InputError(f"Expected a column 'prompt' with a text or a list of messages, got {kind}.")
    if not ids:
        raise InputError("The prompt is empty. Leave the row out.")
    if own or tools:
        columns["tools"] = own or tools
    return Prompt(number, ids, given, columns)


def order_by_variance(scores: Mapping[int, Sequence[float | None]]) -> list[int]:
    """Orders prompts by the variance of their responses' scores, the highest first, as the Qwen2.5 report does.

    It is the population variance of the scores that are known, computed exactly: rounding breaks no tie. Ties, and
    prompts with fewer than two scores, which have variance 0, are in the order of their numbers.

    Args:
      scores: of the responses to each prompt, by its number; None for no signal (arXiv:2412.15115, section 4.3).
    """

    def variance(number: int) -> float:
        known = [score for score in scores[number] if score is not None]
        return statistics.pvariance(known) if len(known) > 1 else 0.0

    return sorted(scores, key=lambda number: (-variance(number), number))


def read_scores(path: Path) -> dict[int, list[float | None]]:
    """Reads a file of scores, as `qwen-jax score --prompts` writes it: a JSON object with number and scores a line.

    Raises:
      InputError: a line that is something else, or a prompt that is there twice.
    """
    found: dict[int, list[float | None]] = {}
    for row in read_rows(path):
        number, scores = row.values.get("number"), row.values.get("scores")
        ok = isinstance(number, int) and isinstance(scores, list)
        if not ok or not all(s is None or isinstance(s, (int, float)) for s in scores or []):
            raise InputError(f'{row.where}: expected {{"number": 0, "scores": [0.0, 1.0]}}, got {row.values!s:.80}.')
        assert isinstance(number, int)
        if number in found:
            raise InputError(f"{row.where}: prompt {number} has scores already. Keep one of the two lines.")
        found[number] = list(scores or [])
    return found


class PromptOrder:
    """Which prompts each episode begins with: a pure function of the seed and the episode.

    Without an order of its own, each epoch has a random one. Prompts that an epoch has left over after its last whole
    episode are not used in it.
    """

    def __init__(self, count: int, queries: int, seed: int, fixed: Sequence[int] | None = None):
        """
        Args:
          count: of prompts.
          queries: prompts of an episode.
          seed: of random orders.
          fixed: the places of prompts in the order of every epoch.

        Raises:
          InputError: fewer prompts than an episode needs.
        """
        available = count if fixed is None else len(fixed)
        if available < queries:
            raise InputError(
                f"An episode needs {queries} different prompts, and there are {available}. Lower queries, or give more."
            )
        self._count, self._queries, self._seed, self._fixed = count, queries, seed, fixed
        self.episodes_per_epoch = available // queries

    def places(self, episode: int) -> list[int]:
        """Places of the prompts of an episode."""
        epoch, part = divmod(episode, self.episodes_per_epoch)
        order = self._fixed
        if order is None:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._count).tolist()
        return list(order[part * self._queries : (part + 1) * self._queries])

    def others(self, episode: int, used: set[int]) -> Iterator[int]:
        """Further places for an episode, in an order of its own, without those that were used."""
        order = np.random.default_rng([self._seed, episode, 1]).permutation(self._count).tolist()
        return (place for place in order if place not in used)
