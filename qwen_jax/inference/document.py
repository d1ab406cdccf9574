"""A document that was read once, and can be continued several times."""

import dataclasses

import jax

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

    @property
    def is_free(self) -> bool:
        """Whether the cache is here: no continuation has it, and none lost it when it was interrupted."""
        return self._cache is not None

    def check_free(self) -> None:
        """Raises `InputError` if a continuation has the cache, or has lost it."""
        if not self.is_free:
            raise InputError(
                "Another completion of this document is still running, or was interrupted while the device had "
                "the cache. Finish or close it first, or read the document again."
            )

    def take(self) -> ContiguousCache:
        """Takes the cache, for one continuation at a time. Raises `InputError` as `check_free`."""
        self.check_free()
        cache, self._cache = self._cache, None
        assert cache is not None
        return cache

    def give_back(self, cache: ContiguousCache) -> None:
        """Returns the cache. What a continuation has written lies behind the document and is forgotten."""
        if any(buffer.is_deleted() for buffer in jax.tree.leaves(cache)):
            return  # Interrupted between a program that took the buffers and what it returned.
        slot = cache.slot * 0 + len(self.tokens)
        self._cache = dataclasses.replace(cache, slot=slot)
