"""Balanced pairs: the chosen answer is longer as often as shorter, and nothing is dropped without need."""

import random
from typing import Any

from tests.helpers.runs import print_seed
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.length_balance import LengthBalance


def make_items(rng: random.Random, count: int, longer: float) -> list[Item]:
    """Items with one to four candidates, of which most or few are longer."""

    def pair() -> dict[str, str]:
        more = rng.choice([0, rng.randrange(1, 9)]) if rng.random() < 0.1 else rng.randrange(1, 9)
        chosen, rejected = "x" * (20 + more), "y" * 20
        return (
            {"chosen": chosen, "rejected": rejected}
            if rng.random() < longer
            else {"chosen": rejected, "rejected": chosen}
        )

    return [make_item({"number": i, "candidates": [pair() for _ in range(rng.randrange(1, 4))]}) for i in range(count)]


def more(pair: Any) -> int:
    return len(pair["chosen"]) - len(pair["rejected"])


def test_longer_and_shorter_differ_by_one_at_most_at_any_time() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    for longer in (0.0, 0.1, 0.5, 0.8, 1.0):
        for count in (1, 2, 30, 200):
            items = make_items(rng, count, longer)
            by_id = {item.id: item for item in items}
            balance = LengthBalance(True)
            ahead, lost, seen = 0, set(), []
            for item, result in balance.work(iter(items)):
                seen.append(item.id)
                if isinstance(result, Rejected):
                    lost |= {more(pair) > 0 for pair in item["candidates"]}
                    continue
                assert isinstance(result, Item)
                assert {"chosen": result["chosen"], "rejected": result["rejected"]} in by_id[item.id]["candidates"]
                ahead += (more(result.data) > 0) - (more(result.data) < 0)
                assert abs(ahead) <= 1
            assert sorted(seen) == sorted(by_id)
            # What is lost goes one way, the one that is ahead; with other ways, nothing is lost.
            assert len(lost) <= 1
            assert not lost or ahead == (1 if True in lost else -1)
            counts = balance.counts
            assert abs(counts["longer"] - counts["shorter"]) <= 1


def test_without_balance_all_are_kept_and_only_counted() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    items = make_items(rng, 300, 0.9)
    balance = LengthBalance(False)
    kept = [result for _, result in balance.work(iter(items)) if isinstance(result, Item)]
    assert [item.id for item in kept] == [item.id for item in items]
    longer = sum(more(item.data) > 0 for item in kept)
    assert balance.counts["longer"] == longer > 200
