"""Proposals for speculative decoding by prompt look-up: what followed the last time that the text's end occurred."""

from collections.abc import Iterable, Sequence


class NgramIndex:
    """The n-grams of one growing text, for proposals whose cost does not depend on its length.

    A proposal is what followed the latest earlier occurrence of the text's last n tokens, for the largest n that has
    occurred before. Where the text ends before enough tokens have followed, it is taken to go on in that way: after
    "a b a b" come "a b a b …".

    Args:
      tokens: the text so far, such as a prompt.
      longest, shortest: the largest and the smallest n.
    """

    def __init__(self, tokens: Iterable[int] = (), longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"Expected 1 <= shortest <= longest, got {shortest} and {longest}.")
        self._tokens: list[int] = []
        self._sizes = range(longest, shortest - 1, -1)
        # For each n: hash of an n-gram to where its latest occurrence ends. Hashes take less memory than n-grams; one
        # that is shared by two n-grams only makes a proposal worse.
        self._ends: list[dict[int, int]] = [{} for _ in self._sizes]
        # For each n: where the last n tokens occurred before, or 0.
        self._before = [0] * len(self._sizes)
        for token in tokens:
            self.push(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def push(self, token: int) -> None:
        """Appends a token."""
        tokens = self._tokens
        tokens.append(token)
        end = len(tokens)
        last = tuple(tokens[-self._sizes[0] :])
        for i, n in enumerate(self._sizes):
            if n <= end:
                key = hash(last[-n:])
                self._before[i] = self._ends[i].get(key, 0)
                self._ends[i][key] = end

    def propose(self, k: int) -> list[int]:
        """Returns k tokens that may follow, or none if the text's end has not occurred before."""
        tokens, end = self._tokens, len(self._tokens)
        for before, n in zip(self._before, self._sizes, strict=True):
            if before and tokens[before - n : before] == tokens[end - n :]:
                period = end - before
                return [tokens[before + i % period] for i in range(k)]
        return []


def propose(tokens: Sequence[int], k: int, longest: int = 4, shortest: int = 2) -> list[int]:
    """Proposals for a whole text; see `NgramIndex`."""
    return NgramIndex(tokens, longest, shortest).propose(k)
