"""The reward of a length within bounds, in tokens or words."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.rewards.text import count_words


class LengthReward:
    """1 for a length from `least` to `most`; outside it falls linearly to 0, which it reaches `slope` further.

    Length is that of what was generated, whether the response ended by itself or was cut.
    """

    def __init__(
        self, least: int = 0, most: int | None = None, slope: int = 0, unit: Literal["tokens", "words"] = "tokens"
    ):
        """
        Args:
          least: the shortest length of full reward.
          most: the longest one; None for any.
          slope: tokens or words outside that give 0; with 0 all of them do.
          unit: "tokens", end tokens included, or "words", runs of letters and digits.

        Raises:
          InputError: a value out of range.
        """
        if unit not in ("tokens", "words"):
            raise InputError(f"unit must be tokens or words, got {unit!r}.")
        if least < 0 or slope < 0 or (most is not None and most < least):
            raise InputError(f"Expected 0 <= least <= most and slope >= 0, got {least=}, {most=}, {slope=}.")
        if not least and most is None:
            raise InputError("The reward length needs one of its settings least and most: every length would get 1.")
        self._least, self._most, self._slope, self._unit = least, math.inf if most is None else most, slope, unit

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
        """The rewards, 0 to 1."""
        if self._unit == "words":
            return [self._reward(count_words(text)) for text in completions]
        if "completion_ids" not in columns:
            raise InputError(
                "the unit is tokens, and the tokens were not given. Give completion_ids, or set unit=words."
            )
        return [self._reward(len(ids)) for ids in columns["completion_ids"]]

    def _reward(self, length: int) -> float:
        outside = max(self._least - length, length - self._most, 0)
        if not outside:
            return 1.0
        return max(1 - outside / self._slope, 0.0) if self._slope else 0.0
