"""Budgets of vertical-slash attention that keep recall: measured on a long text, raised where too little is visited."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qwen_jax.attention.sparse import VerticalSlash, refine, summarise
from qwen_jax.errors import InputError
from qwen_jax.inference.engine import Engine
from qwen_jax.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Round:
    """What a prefill with some budgets has visited.

    Attributes:
      pattern: the budgets.
      recall_LH: share of the softmax that each query head visited, averaged over audit rows at random places.
      density: visited pairs of queries and keys over all visible ones, averaged over heads.
      cut: pieces and columns that did not fit the program's capacity.
    """

    pattern: VerticalSlash
    recall_LH: np.ndarray
    density: float
    cut: int


def check_settings(threshold: float, rounds: int, step: int) -> None:
    """Raises `InputError` for settings of `tune` that make no sense."""
    if not 0 < threshold <= 1 or rounds < 1 or step < 1:
        raise InputError(
            f"Expected a threshold in (0, 1], at least one round and a positive step; got {threshold}, {rounds} and "
            f"{step}."
        )


def tune(
    engine: Engine,
    tokens: Sequence[int],
    pattern: VerticalSlash,
    *,
    threshold: float = 0.9,
    rounds: int = 6,
    step: int = 2048,
    report: Callable[[int, Round], None] | None = None,
) -> Round:
    """Raises the budgets of heads until the recall of all of them reaches a threshold, or rounds are over.

    Args:
      engine: of the model; it keeps the last budgets.
      tokens: a long text, such as one of the length that the budgets are for.
      pattern: budgets to begin with.
      threshold: the least recall of a head, in (0, 1].
      rounds: at most this many prefills.
      step: what is added to the columns and to the slashes of a head whose recall is too low.
      report: called after each prefill with its number, from 1, and the result.

    Returns:
      The last round. Its budgets hold the recall as their score.

    Raises:
      InputError: a threshold, a number or a step that makes no sense, or budgets for another model.

    Source: algorithm 1 of the Qwen2.5-1M report (arXiv:2501.15383).
    """
    check_settings(threshold, rounds, step)
    longest = engine.config.context_length
    most = min(pattern.most_columns + step * (rounds - 1), longest)
    always, engine.sparse_from = engine.sparse_from, 1
    try:
        for number in range(1, rounds + 1):
            engine.use_sparse(pattern, max_columns=most)
            for _ in engine.token_chunks([tokens], SamplingParams(temperature=0), 1):
                pass
            recall_LH, density, cut = summarise(engine.skipped)
            scored = dataclasses.replace(pattern, scores=tuple(map(tuple, recall_LH.astype(float).tolist())))
            result = Round(scored, recall_LH, density, cut)
            if report is not None:
                report(number, result)
            raised = refine(recall_LH, pattern, threshold, step, longest)
            if (raised.columns, raised.slashes) == (pattern.columns, pattern.slashes):
                break
            pattern = raised
    finally:
        engine.sparse_from = always
    return result
