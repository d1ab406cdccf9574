"""Preference pairs of which the chosen answer is longer about as often as shorter, so that length is not preferred."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from train.synthesize.item import Item, Rejected
from train.synthesize.pipeline import Result

# Items that wait for one of the other direction at most.
_MOST_WAITING = 10_000
_STEP = {"longer": 1, "shorter": -1}


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
                pair = item.rng("candidate").choice(item["candidates"])
                yield item, self._chosen(item, "equal" if self._balanced else _ways([pair]).pop())
                continue
            possible = [way for way in sorted(ways) if abs(ahead + _STEP[way]) <= 1]
            if not possible:
                waiting.append(item)
                if len(waiting) > _MOST_WAITING:
                    yield waiting.popleft(), Rejected("no pair of the other length")
                continue
            way = item.rng("way").choice(possible)
            ahead += _STEP[way]
            yield item, self._chosen(item, way)
            # All that wait go the way that was ahead.
            if waiting and abs(ahead + _STEP[way := _ways(waiting[0]["candidates"]).pop()]) <= 1:
                ahead += _STEP[way]
                released = waiting.popleft()
                yield released, self._chosen(released, way)
        for item in waiting:
            yield item, Rejected("no pair of the other length")

    def _chosen(self, item: Item, way: str) -> Item:
        """The item with one of its pairs that go this way."""
        pairs = [pair for pair in item["candidates"] if way in _ways([pair])]
        pair = item.rng("pair").choice(pairs)
        self.counts[way] += 1
        return item.without("candidates").update(**pair)


def _ways(candidates: list[Mapping[str, Any]]) -> set[str]:
    """Whether the chosen answers of pairs are longer, shorter or of equal length, in characters."""
    found = set()
    for pair in candidates:
        more = len(pair["chosen"]) - len(pair["rejected"])
        found.add("longer" if more > 0 else "shorter" if more < 0 else "equal")
    return found
