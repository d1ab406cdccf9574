"""How far people agree on pairs of answers: Cohen's kappa of each two labellers, and what each of them tends to."""

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.synthesize.review import OVERALL, QUESTIONS, Label
from train.synthesize.review_pairs import ReviewPair

# What a label says of a pair, in this order: its answers by the order of their ids, between them a tie.
_CATEGORIES = 3


def cohen_kappa(a: Sequence[int], b: Sequence[int], categories: int, *, weighted: bool = False) -> float | None:
    """Cohen's kappa of two raters: 1 - observed disagreement / disagreement expected by chance.

    Chance is that both draw independently, each with their own frequencies of the categories (Cohen 1960, Educational
    and Psychological Measurement 20; weighted: Cohen 1968, Psychological Bulletin 70).

    Args:
      a: categories that one rater gave, from 0 to `categories` - 1.
      b: those of the other one, for the same items.
      categories: how many there are, at least 2.
      weighted: a disagreement weighs the distance of its categories; by default all weigh the same.

    Returns:
      At most 1; None where it is undefined: without items, and where both always give the same single category.
    """
    if not len(a):
        return None
    observed = np.zeros((categories, categories))
    np.add.at(observed, (np.asarray(a), np.asarray(b)), 1 / len(a))
    at = np.arange(categories)
    distance = np.abs(at[:, None] - at[None, :])
    weights = distance / (categories - 1) if weighted else (distance > 0).astype(float)
    expected = np.outer(observed.sum(1), observed.sum(0))
    # Without disagreement by chance all is in one cell of the diagonal, up to rounding.
    if len(set(a) | set(b)) == 1:
        return None
    return float(1 - (weights * observed).sum() / (weights * expected).sum())


def report(pairs: Sequence[ReviewPair], newest: Mapping[tuple[str, str], Label]) -> dict[str, Any]:
    """Agreement of each two labellers, and numbers of each labeller.

    The categories are the two answers of a pair, in the order of their hashes, and a tie: neither the side on which an
    answer was shown nor the file's own preference plays a part. The weighted kappa counts a tie as half way.

    Args:
      pairs: that are labelled.
      newest: labels by labeller and key of the pair, as `Labels.newest` gives them.

    Returns:
      A JSON object. `kappa` is null where it is undefined, and `reason` says why.
    """
    by_key = {pair.key: pair for pair in pairs}
    labellers: dict[str, dict[str, Label]] = {}
    others = 0
    for (name, key), label in sorted(newest.items(), key=lambda item: item[0]):
        if key in by_key:
            labellers.setdefault(name, {})[key] = label
        else:
            others += 1
    given = {
        name: {key: label for key, label in mine.items() if label.overall is not None}
        for name, mine in labellers.items()
    }
    return {
        "pairs": len(pairs),
        "labels_of_other_pairs": others,
        "labellers": [
            {"name": name, "skipped": len(mine) - len(given[name]), **_tendencies(given[name], by_key)}
            for name, mine in labellers.items()
        ],
        "agreement": [
            {
                "labellers": [one, other],
                "common": len(given[one].keys() & given[other].keys()),
                "questions": {name: _agreement(given[one], given[other], name) for name in QUESTIONS},
            }
            for one, other in itertools.combinations(labellers, 2)
        ],
    }


def _tendencies(mine: Mapping[str, Label], pairs: Mapping[str, ReviewPair]) -> dict[str, Any]:
    """What a labeller tends to; one who looks at the content takes the left answer as often as the right one."""
    sides = Counter(label.overall for label in mine.values())
    decided = [
        (pairs[key], preferred) for key, label in mine.items() if (preferred := label.preferred(OVERALL)) is not None
    ]
    ranked = [preferred == pair.ids[0] for pair, preferred in decided if pair.ranked]
    return {
        "labelled": len(mine),
        **{side: sides[side] for side in ("left", "tie", "right")},
        "agrees_with_file": statistics.fmean(ranked) if ranked else None,
        "median_seconds": statistics.median(label.seconds for label in mine.values()) if mine else None,
    }


def _category(label: Label, question: str) -> int:
    preferred = label.preferred(question)
    return 1 if preferred is None else 0 if preferred == min(label.left, label.right) else 2


def _agreement(one: Mapping[str, Label], other: Mapping[str, Label], question: str) -> dict[str, Any]:
    keys = sorted(one.keys() & other.keys())
    a, b = ([_category(mine[key], question) for key in keys] for mine in (one, other))
    kappa = cohen_kappa(a, b, _CATEGORIES)
    reason = None
    if kappa is None:
        reason = f"no variance: both always say {'tie' if a[0] == 1 else 'the same'}" if keys else "no common pairs"
    found: dict[str, Any] = {
        "agreement": statistics.fmean(x == y for x, y in zip(a, b, strict=True)) if keys else None,
        "kappa": kappa,
        "reason": reason,
    }
    if question == OVERALL:
        found["weighted_kappa"] = cohen_kappa(a, b, _CATEGORIES, weighted=True)
    return found


def to_text(found: Mapping[str, Any]) -> str:
    """The report for people, a line a number.

    Args:
      found: of `report`.
    """
    lines = []
    for one in found["labellers"]:
        seconds = "" if one["median_seconds"] is None else f", median {one['median_seconds']:.0f} s"
        file = "" if one["agrees_with_file"] is None else f", agrees with the file in {one['agrees_with_file']:.0%}"
        lines.append(
            f"{one['name']}: {one['labelled']:,} of {found['pairs']:,} pairs labelled, {one['skipped']:,} skipped; "
            f"left {one['left']:,}, tie {one['tie']:,}, right {one['right']:,}{file}{seconds}"
        )
    if not lines:
        lines.append(f"No labels of these {found['pairs']:,} pairs yet.")
    for two in found["agreement"]:
        lines.append(f"\n{' and '.join(two['labellers'])}: {two['common']:,} common pairs")
        for name, one in two["questions"].items():
            if one["kappa"] is None:
                text = f"kappa undefined ({one['reason']})"
            else:
                weighted = f", linearly weighted {one['weighted_kappa']:.3f}" if name == OVERALL else ""
                text = f"kappa {one['kappa']:.3f}{weighted}"
            raw = "" if one["agreement"] is None else f", raw agreement {one['agreement']:.1%}"
            lines.append(f"  {name:14s} {text}{raw}")
    if found["labels_of_other_pairs"]:
        lines.append(f"\n{found['labels_of_other_pairs']:,} labels are of pairs that are not in the file.")
    return "\n".join(lines)
