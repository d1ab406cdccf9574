"""Agreement of labellers: kappa is its definition, and nothing but the answers decides it."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.review import open_review, prefer, text_rows, values, write_rows
from tests.helpers.runs import print_seed
from train.synthesize.kappa import cohen_kappa, report, to_text
from train.synthesize.review import QUESTIONS


def test_kappa_of_a_table_by_hand() -> None:
    """20 times both say 0, 15 times both 1: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5, so kappa is 0.4."""
    counts = {(0, 0): 20, (0, 1): 5, (1, 0): 10, (1, 1): 15}
    items = list(itertools.chain.from_iterable([pair] * count for pair, count in counts.items()))
    a, b = zip(*items, strict=True)
    for weighted in (False, True):  # With two categories the weights are the same.
        assert cohen_kappa(a, b, 2, weighted=weighted) == pytest.approx(0.4, abs=1e-12)
    # Three categories, three items: observed (0 + 1/2 + 1) / 3; expected, of all nine pairs of one label of each.
    a, b = (0, 1, 2), (0, 2, 0)
    expected = (0 + 1 + 0 + 0.5 + 0.5 + 0.5 + 1 + 0 + 1) / 9
    assert cohen_kappa(a, b, 3, weighted=True) == pytest.approx(1 - 0.5 / expected, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_kappa_is_its_definition(weighted: bool) -> None:
    """1 - mean disagreement of the items / mean disagreement of all pairs of a label of one and one of the other."""
    rng = print_seed()
    for _ in range(50):
        categories, n = int(rng.integers(2, 6)), int(rng.integers(1, 40))
        a, b = (rng.choice(categories, n, p=rng.dirichlet(np.ones(categories))).tolist() for _ in range(2))

        def distance(x: int, y: int, categories: int = categories) -> float:
            return abs(x - y) / (categories - 1) if weighted else float(x != y)

        observed = sum(map(distance, a, b)) / n
        chance = sum(distance(x, y) for x in a for y in b) / n**2
        kappa = cohen_kappa(a, b, categories, weighted=weighted)
        if chance == 0:
            assert kappa is None
        else:
            assert kappa == pytest.approx(1 - observed / chance, abs=1e-9)
            assert cohen_kappa(b, a, categories, weighted=weighted) == pytest.approx(kappa, abs=1e-9)


def test_kappa_of_independent_and_of_equal_labels() -> None:
    """Independent labels have a kappa of about 0, whatever their frequencies: its deviation is about n ** -0.5."""
    rng = print_seed()
    n = 10_000
    for weighted in (False, True):
        a, b = (rng.choice(3, n, p=p).tolist() for p in ([0.7, 0.2, 0.1], [0.5, 0.1, 0.4]))
        kappa = cohen_kappa(a, b, 3, weighted=weighted)
        assert kappa is not None
        assert abs(kappa) < 6 / n**0.5
        assert cohen_kappa(a, a, 3, weighted=weighted) == pytest.approx(1)
    assert cohen_kappa([1, 1], [1, 1], 3) is None
    assert cohen_kappa([], [], 3) is None
    assert cohen_kappa([1, 1], [1, 0], 3) == pytest.approx(0)


def test_the_report_depends_on_the_preferred_answers_alone(tmp_path: Path) -> None:
    """Not on the sides on which they were shown, nor on which of them the file calls chosen."""
    rng = print_seed()
    rows = text_rows(30)
    wanted = {(name, i): int(rng.integers(0, 3)) for name in ("ann", "bob", "cem") for i in range(30)}
    reports = []
    for turned, seed in ((False, 0), (True, int(rng.integers(1, 2**31)))):
        folder = tmp_path / str(seed)
        folder.mkdir()
        file = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if turned else row for row in rows]
        review = open_review(write_rows(folder / "pairs.jsonl", file), seed)
        for (name, i), choice in wanted.items():
            pair = review.pairs[i]
            ids = pair.ids[::-1] if turned else pair.ids
            prefer(review, name, pair, None if choice == 1 else ids[choice // 2])
        reports.append(report(review.pairs, review.labels.newest()))
    assert reports[0]["agreement"] == reports[1]["agreement"]
    assert [two["labellers"] for two in reports[0]["agreement"]] == [["ann", "bob"], ["ann", "cem"], ["bob", "cem"]]
    for two in reports[0]["agreement"]:
        names = two["labellers"]
        same = np.mean([wanted[names[0], i] == wanted[names[1], i] for i in range(30)])
        assert set(two["questions"]) == set(QUESTIONS)
        assert two["questions"]["overall"]["agreement"] == pytest.approx(same)
    for found, file in zip(reports, (0, 2), strict=True):
        for one in found["labellers"]:
            choices = [wanted[one["name"], i] for i in range(30)]
            decided = [choice for choice in choices if choice != 1]
            assert one["tie"] == choices.count(1)
            assert one["left"] + one["right"] == len(decided)
            assert one["agrees_with_file"] == pytest.approx(decided.count(file) / len(decided))


def test_what_is_undefined_is_null_with_a_reason(tmp_path: Path) -> None:
    """Ties only have no variance; skipped pairs and pairs of one labeller are not common; other pairs are counted."""
    review = open_review(write_rows(tmp_path / "pairs.jsonl", text_rows(4)))
    for name in ("ann", "bob"):
        for pair in review.pairs[:2]:
            prefer(review, name, pair, None)
    prefer(review, "ann", review.pairs[2], review.pairs[2].ids[0])
    review.add(values(review.show("bob", 2), "bob", None))
    prefer(review, "cem", review.pairs[3], None)
    found = report(review.pairs, review.labels.newest())
    by_names = {tuple(two["labellers"]): two for two in found["agreement"]}
    tie = by_names["ann", "bob"]
    assert tie["common"] == 2
    expected = {"agreement": 1.0, "kappa": None, "reason": "no variance: both always say tie"}
    assert tie["questions"]["truthfulness"] == expected
    assert tie["questions"]["overall"] == {**expected, "weighted_kappa": None}
    none = by_names["ann", "cem"]
    assert none["common"] == 0
    assert none["questions"]["relevance"] == {"agreement": None, "kappa": None, "reason": "no common pairs"}
    text = to_text(found)
    assert "ann: 3 of 4 pairs labelled, 0 skipped" in text
    assert "bob: 2 of 4 pairs labelled, 1 skipped" in text
    assert "kappa undefined (no variance: both always say tie), raw agreement 100.0%" in text
    assert report(review.pairs[1:], review.labels.newest())["labels_of_other_pairs"] == 2
    assert "No labels of these 4 pairs yet" in to_text(report(review.pairs, {}))
