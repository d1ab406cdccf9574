"""A document that was read once, and can be continued several times."""

import dataclasses

from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.errors import InputError


@dataclasses.dataclass
class Document:
    """The tokens of a document and its keys and values in a cache. `Engine.read` makes it.

    Attributes:
      tokens: ids of the document.
      slots: length of the cache.
      room: tokens that a continuation and its completion may have together.
    """

    tokens: list[int]
    slots: int
    room: int
    _cache: ContiguousCache | None

    def check_free(self) -> None:
        """Raises `InputError` if a continuation has the cache."""
        if self._cache is None:
            raise InputError(
                "Another completion of this document is still running, or was interrupted while its prompt was read. "
                "Finish or close it first, or read the document again."
            )

    def take(self) -> ContiguousCache:
        """Takes the cache, for one continuation at a time. Raises `InputError` as `check_free`."""
        self.check_free()
        cache, self._cache = self._cache, None
        assert cache is not None
        return cache

    def give_back(self, cache: ContiguousCache) -> None:
        """Returns the cache. What a continuation has written lies behind the document and is forgotten."""
        slot = cache.slot * 0 + len(self.tokens)
        self._cache = dataclasses.replace(cache, slot=slot)
