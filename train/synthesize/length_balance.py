"""Preference pairs of which the chosen answer is longer about as often as shorter, so that length is not preferred."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from train.synthesize.item import Item, Rejected
from train.synthesize.pipeline import Result

# Items that wait for one of the other direction at most.
_MOST_WAITING = 10_000


class LengthBalance:
    """Chooses a pair of each item's candidates, so that longer and shorter chosen answers differ by one at most.

    An item whose candidates all go the way that is ahead waits for one of the other way, and is yielded after it. Those
    that wait at the end are rejected. Candidates of equal length are taken as they come.

    Attributes:
      counts: of pairs that were yielded, by "longer", "shorter" and "equal".
    """

    def __init__(self, balanced: bool):
        """
        Args:
          balanced: False takes a random candidate of each item, and only counts.
        """
        self._balanced = balanced
        self.counts: Counter[str] = Counter()

    def work(self, items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """Sets "chosen" and "rejected" of items with "candidates", for a `Together` stage."""
        self.counts = Counter()
        waiting: deque[Item] = deque()
        ahead = 0  # Longer ones less shorter ones.
        for item in items:
            ways = _ways(item["candidates"])
            if not self._balanced or "equal" in ways:
                way = "equal" if self._balanced else ways_of_one(item)
                yield item, self._chosen(item, way)
                continue
            behind = "shorter" if ahead > 0 or (waiting and _way(waiting[0]) == "longer") else "longer"
            if not ahead and not waiting:
                way = item.rng("way").choice(sorted(ways))
            elif behind in ways:
                way = behind
            else:
                waiting.append(item)
                if len(waiting) > _MOST_WAITING:
                    yield waiting.popleft(), Rejected("no pair of the other length")
                continue
            ahead += 1 if way == "longer" else -1
            yield item, self._chosen(item, way)
            if waiting and ahead * (1 if _way(waiting[0]) == "longer" else -1) < 1:
                item = waiting.popleft()
                way = _way(item)
                ahead += 1 if way == "longer" else -1
                yield item, self._chosen(item, way)
        for item in waiting:
            yield item, Rejected("no pair of the other length")

    def _chosen(self, item: Item, way: str) -> Item:
        """The item with one of its pairs that go this way."""
        pairs = [pair for pair in item["candidates"] if way in _ways([pair])]
        pair = item.rng("pair").choice(pairs)
        self.counts[way] += 1
        return item.without("candidates").update(**pair)


def ways_of_one(item: Item) -> str:
    """The way of a random candidate."""
    pair = item.rng("candidate").choice(item["candidates"])
    (way,) = _ways([pair])
    return way


def _way(item: Item) -> str:
    """The only way of an item that waits."""
    (way,) = _ways(item["candidates"])
    return way


def _ways(candidates: list[Mapping[str, Any]]) -> set[str]:
    """Whether the chosen answers of pairs are longer, shorter or of equal length, in characters."""
    found = set()
    for pair in candidates:
        more = len(pair["chosen"]) - len(pair["rejected"])
        found.add("longer" if more > 0 else "shorter" if more < 0 else "equal")
    return found
