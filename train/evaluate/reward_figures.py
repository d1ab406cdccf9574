"""The numbers of reward-model benchmarks: what an item is worth, how parts are weighted, intervals by bootstrap.

An item gives a row of numbers. The rows of a part are averaged, and every figure is a function of these means. So an
interval comes from the same function of resampled means.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import gammaln

from train.evaluate.reward_sets import PPE_PARTS, PRIOR_SETS, REWARD_BENCH_COUNTS, SECTIONS, Ranking

RMB_COLUMNS = ("Helpfulness (BoN)", "Helpfulness (Pairwise)", "Harmlessness (BoN)", "Harmlessness (Pairwise)")
"""RMB's columns in the report's table."""

TABLE: Mapping[str, tuple[str, ...]] = {
    "reward-bench": (*SECTIONS, "Score"),
    "rmb": (*RMB_COLUMNS, "Overall"),
    "ppe": (*PPE_PARTS.values(), "Objective-Avg"),
}
"""The rows of table 15 of the Qwen2.5 report (arXiv:2412.15115), by benchmark."""

# Bootstrap samples that are drawn at once.
_CHUNK = 100


def item_row(ranking: Ranking, scores: Sequence[float]) -> np.ndarray:
    """The numbers of an item, float64.

    Args:
      ranking: the item.
      scores: of its answers. The better answer of a pair must have the greater score; a tie is not right.

    Returns:
      [1]: whether all pairs are right, so the best of n must beat all others. Or, where the benchmark says which
      answers are right, [3 + 2n] for n answers: right pairs; pairs; the area under the ROC curve, NaN if all answers
      are right or none is; for k = 1 to n, the expectation that the answer with the greatest score among k random ones
      is right; and the same for a perfect choice.
    """
    won = [scores[better] > scores[worse] for better, worse in ranking.pairs]
    if not ranking.right:
        return np.array([float(all(won))])
    right = np.array(ranking.right, float)
    values = np.asarray(scores, float)
    wins = (values[right == 1][:, None] > values[right == 0]).mean() if 0 < right.sum() < len(right) else np.nan
    ties = (values[right == 1][:, None] == values[right == 0]).mean() if 0 < right.sum() < len(right) else np.nan
    return np.concatenate([[sum(won), len(won), wins + ties / 2], best_of_k(values, right), best_of_k(right, right)])


def best_of_k(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The expected correctness of the answer with the greatest score among k of n, over all subsets of k.

    Args:
      scores: float [n]. Among equal ones each is as likely to be chosen.
      right: 0 or 1, float [n].

    Returns:
      Float64 [n], for k = 1 to n.

    Source: the best-of-k curve of PPE (arXiv:2410.14872), there by sampling, here exact: the answer of rank i (from 0)
    is the best of C(n-1-i, k-1) subsets of C(n, k).
    """
    n = len(scores)
    # Answers with equal scores count as their mean.
    _, group = np.unique(-scores, return_inverse=True)
    mean = np.bincount(group, right) / np.bincount(group)
    ranked = np.sort(group)
    rank, k = np.arange(n), np.arange(1, n + 1)[:, None]
    with np.errstate(invalid="ignore"):
        log_ways = _log_choose(n - 1 - rank, k - 1) - _log_choose(n, k)
    share = np.where(n - 1 - rank >= k - 1, np.exp(log_ways), 0.0)
    return share @ mean[ranked]


def _log_choose(n: np.ndarray | int, k: np.ndarray) -> np.ndarray:
    return gammaln(np.add(n, 1)) - gammaln(k + 1) - gammaln(np.maximum(np.subtract(n, k), 0) + 1)


def figures(benchmark: str, means: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The figures of a benchmark, each from 0 to 1. A figure without any data is left out.

    Args:
      benchmark: "reward-bench", "rmb", "ppe" or "preference".
      means: for each part, the mean of its items' rows, [..., columns].
      counts: items of each part.

    Returns:
      By name. RewardBench: sections, weighted by the published numbers of pairs; `Score`, their mean; `Prior Sets`,
      the mean of the four sets; `Score with Prior Sets`, where these count half as much as a section. RMB: items
      count alike in each column; `Overall` is the mean of the columns. PPE: accuracies, `Objective-Avg` over the five
      of correctness, and their best-of-k numbers. Others: accuracy of each set.
    """
    compute = {"reward-bench": _reward_bench, "rmb": _rmb, "ppe": _ppe}.get(benchmark)
    return compute(means, counts) if compute else {part: mean[..., 0] for part, mean in means.items()}


def _reward_bench(means: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    found = {}
    for section, weights in SECTIONS.items():
        present = {part: weight for part, weight in weights.items() if part in means}
        if present:
            found[section] = _mean_of([means[part][..., 0] for part in present], list(present.values()))
    sections = list(found.values())
    complete = len(found) == len(SECTIONS)
    if complete:
        found["Score"] = _mean_of(sections)
    prior = [means[part][..., 0] for part in PRIOR_SETS if part in means]
    if prior:
        found["Prior Sets"] = _mean_of(prior)
        if complete:
            found["Score with Prior Sets"] = _mean_of([*sections, found["Prior Sets"]], [*[1.0] * len(sections), 0.5])
    return found


def _rmb(means: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    found = {}
    for column in RMB_COLUMNS:
        goal, kind = column.rstrip(")").split(" (")
        parts = [part for part in means if part.startswith(f"{kind}_set/{goal}")]
        if parts:
            found[column] = _mean_of([means[part][..., 0] for part in parts], [counts[part] for part in parts])
    if len(found) == len(RMB_COLUMNS):
        found["Overall"] = _mean_of(list(found.values()))
    return found


def _ppe(means: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    found, more = {}, {}
    for part, name in PPE_PARTS.items():
        if part not in means:
            continue
        mean = means[part]
        if part == "human_preference":
            found[name] = mean[..., 0]
            continue
        with np.errstate(invalid="ignore"):
            found[name] = mean[..., 0] / mean[..., 1]
        size = (mean.shape[-1] - 3) // 2
        chosen, perfect = mean[..., 3 : 3 + size], mean[..., 3 + size :]
        more[f"{name}: AUC"] = mean[..., 2]
        more[f"{name}: best of {size}"] = chosen[..., -1]
        more[f"{name}: greatest best of k"] = chosen.max(-1)
        # Of answers that are right or wrong, the squared error is the difference.
        more[f"{name}: error of best of k"] = (perfect - chosen).mean(-1)
    objective = [found[name] for part, name in PPE_PARTS.items() if part != "human_preference" and name in found]
    if len(objective) == len(PPE_PARTS) - 1:
        found["Objective-Avg"] = _mean_of(objective)
    return found | more


def _mean_of(values: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """The weighted mean of some figures, for each bootstrap sample."""
    return np.average(np.stack(values), axis=0, weights=weights)


def incomplete(benchmark: str, counts: Mapping[str, int]) -> dict[str, str]:
    """Why figures are not those of the published set, by name: subsets that are missing, or have other numbers.

    Args:
      benchmark: its name.
      counts: items with a score of each part.
    """
    if benchmark != "reward-bench":
        return {}
    found: dict[str, str] = {}
    for section, subsets in SECTIONS.items():
        wrong = [
            f"{part} has {counts.get(part, 0)} of {REWARD_BENCH_COUNTS[part]} pairs"
            for part in subsets
            if counts.get(part, 0) != REWARD_BENCH_COUNTS[part]
        ]
        if wrong:
            found[section] = "; ".join(wrong)
    if found:
        found["Score"] = found["Score with Prior Sets"] = f"incomplete: {', '.join(found)}"
    missing = [part for part in PRIOR_SETS if part not in counts]
    if missing:
        found["Prior Sets"] = f"missing: {', '.join(missing)}"
        found["Score with Prior Sets"] = "; ".join(
            [*filter(None, [found.get("Score with Prior Sets")]), found["Prior Sets"]]
        )
    return found


def mean_rows(rows: np.ndarray) -> np.ndarray:
    """The mean of items' rows [n, columns] without NaN; NaN where there is nothing else."""
    return _weighted(np.ones((1, len(rows))), rows)[0]


def resampled_means(rows: np.ndarray, draws: int, seed: int, name: str) -> np.ndarray:
    """Means of bootstrap samples of a part's items.

    Args:
      rows: of the items, [n, columns].
      draws: samples, each of n items with replacement.
      seed: with the name, of the random numbers.
      name: of the part.

    Returns:
      Float64 [draws, columns].
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    n = len(rows)
    found = []
    for start in range(0, draws, _CHUNK):
        often = rng.multinomial(n, np.full(n, 1 / n), size=min(_CHUNK, draws - start))
        found.append(_weighted(often.astype(float), rows))
    return np.concatenate(found)


def _weighted(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Weighted means [draws, columns] without NaN."""
    known = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(known, rows, 0.0)) / (weights @ known.astype(float))


def report_table(summaries: Mapping[str, Mapping[str, object]]) -> str:
    """The form of the report's table of reward models, in Markdown: percents, a column for each model.

    Args:
      summaries: of `train.evaluate.reward_models.evaluate_rewards`, by the name of the model.

    Returns:
      "-" is a figure without data; "*" marks one that lacks a part of the published set.
    """
    models = list(summaries)
    lines = ["| Metric | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    found = {model: _known(summary) for model, summary in summaries.items()}
    sets = list(dict.fromkeys(name for of in found.values() for bench, name in of if bench == "preference"))
    for benchmark, names in [*TABLE.items(), ("preference", tuple(sets))]:
        if not names:
            continue
        lines.append(f"| **{benchmark}** |" + " |" * len(models))
        for name in names:
            cells = [found[model].get((benchmark, name), "-") for model in models]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _known(summary: Mapping[str, object]) -> dict[tuple[str, str], str]:
    benchmarks = summary["benchmarks"]
    assert isinstance(benchmarks, Mapping)
    return {
        (benchmark, name): f"{100 * figure['value']:.2f}{'*' if figure['incomplete'] else ''}"
        for benchmark, of in benchmarks.items()
        for name, figure in of["figures"].items()
        # A run gives NaN where there is no value, its file null.
        if figure["value"] is not None and figure["value"] == figure["value"]
    }
