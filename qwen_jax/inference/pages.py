"""Pages of the key-value cache on the host: reference counts, and the prefix cache of pages that nobody uses.

The device holds keys and values in pages of `page_size` slots (`attention.paged_cache.PagedCache`). Which page holds
what is known here alone. A full page is named by a key: the hash of its parent's key and of its own tokens, so that a
key stands for all tokens from the start of the text up to the end of the page. Texts with a common prefix share its
pages.
"""

import hashlib
from array import array
from collections.abc import Sequence


class PagePool:
    """Hands out pages, and keeps the content of registered pages until their memory is needed.

    A page is in one of three states: used (it has references), cached (registered, without references), or free.
    `allocate` takes free pages first and then evicts cached ones, the least recently used first. Not thread-safe.

    Args:
      num_pages: pages are the integers 0 to num_pages - 1.
      page_size: slots, that is tokens, in a page.

    Attributes:
      version: of the weights; `clear` raises it.
      hits, queries: tokens that were found in the prefix cache, and tokens that were looked up.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"Expected at least one page of at least one slot, got {num_pages} pages of {page_size}.")
        self.num_pages, self.page_size = num_pages, page_size
        self.version = self.hits = self.queries = 0
        self._users = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        # A dictionary keeps the order of insertion: the page that was released first comes first.
        self._cached: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: free ones, and cached ones that it may evict."""
        return len(self._free) + len(self._cached)

    # --- references ---

    def allocate(self, count: int) -> list[int] | None:
        """Returns `count` pages with one reference each and unknown content; None if there are not enough."""
        if count > self.num_free:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._cached))
                del self._cached[page]
                self._forget(page)
            self._users[page] = 1
            pages.append(page)
        return pages

    def take(self, pages: Sequence[int]) -> None:
        """Adds a reference to each page; they must be used or cached."""
        for page in pages:
            if not self._users[page]:
                del self._cached[page]
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drops a reference of each page. Registered pages without further references stay cached.

        Args:
          pages: in the order of the text. The last is released first, so that it is evicted before those it continues:
            a page is of no use without its parents.

        Raises:
          ValueError: a page has no reference.
        """
        for page in reversed(pages):
            if not self._users[page]:
                raise ValueError(f"Page {page} is released but has no reference.")
            self._users[page] -= 1
            if self._users[page]:
                continue
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def users(self, page: int) -> int:
        """References of a page."""
        return self._users[page]

    # --- prefix cache ---

    def salt(self, adapter: str | None, secret: str | None = None) -> bytes:
        """The root of the chain of keys, for `match` and `register`: pages of other weights have other keys.

        Args:
          adapter: name of the adapter, or None.
          secret: pages are found with the same one only; None is one of its own.
        """
        root = (str(self.version) if adapter is None else f"{self.version} {adapter}").encode()
        if secret is None:
            return root
        # Hashed, so that no text of a client's can be the root or the key of something else.
        key = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        return hashlib.blake2b(root, key=key, digest_size=32).digest()

    @staticmethod
    def key(parent: bytes, tokens: Sequence[int]) -> bytes:
        """Returns the key of a full page.

        Args:
          parent: key of the page before, or the salt for the first page.
          tokens: of the page. All pages have equally many, so parent and tokens cannot be confused.
        """
        return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=32).digest()

    def find(self, key: bytes) -> int | None:
        """Returns the page that is registered under a key, without a reference; None if there is none."""
        return self._page_of.get(key)

    def match(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        """Returns the longest chain of registered pages that holds the start of `tokens`, with a reference on each.

        Args:
          tokens: those after the last full page are ignored. At least one token of a prompt must be computed, so the
            caller leaves it out.
          salt: see `salt`.
        """
        size, pages, key = self.page_size, list[int](), salt
        for start in range(0, len(tokens) - size + 1, size):
            key = self.key(key, tokens[start : start + size])
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        self.take(pages)
        self.count(len(pages) * size, len(tokens))
        return pages

    def count(self, hits: int, queries: int) -> None:
        """Counts tokens of a prompt that were found and looked up."""
        self.hits += hits
        self.queries += queries

    def register(self, page: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Makes a used page known to `match`. From now on it must not be written.

        Args:
          page: keys and values of all its slots are written, or will be by steps that were dispatched.
          parent: key of the page before, or the salt for the first page.
          tokens: of the page.

        Returns:
          Its key. If an older page has the same key, that page keeps it, and this one stays private.

        Raises:
          ValueError: the page has no reference, is registered under another key, or is not full.
        """
        if not self._users[page] or len(tokens) != self.page_size:
            raise ValueError(
                f"Expected a used page and {self.page_size} tokens to register, got page {page} with "
                f"{self._users[page]} references and {len(tokens)} tokens."
            )
        key = self.key(parent, tokens)
        if self._keys[page] not in (None, key):
            raise ValueError(f"Page {page} is registered with other tokens.")
        if self._page_of.setdefault(key, page) == page:
            self._keys[page] = key
        return key

    def is_registered(self, page: int) -> bool:
        """Whether `match` can return a page."""
        return self._keys[page] is not None

    def clear(self) -> None:
        """Forgets all cached content, for new weights. Used pages stay used and are no longer registered."""
        self.version += 1
        self._free.extend(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._keys = [None] * self.num_pages

    def forget(self, pages: Sequence[int]) -> list[int]:
        """Makes pages unknown to `match`, and returns them, except those that several sequences use."""
        alone = [page for page in pages if self._users[page] == 1]
        for page in alone:
            if self._keys[page] is not None:
                self._forget(page)
        return alone

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None, page
        del self._page_of[key]
        self._keys[page] = None

    def check(self) -> None:
        """Raises AssertionError unless all invariants hold; for tests."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page, users in enumerate(self._users) if users}
        assert min(self._users) >= 0, "a page has a negative number of references"
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(cached) + len(used) == self.num_pages, "a page is lost, or in two states"
        assert free | cached | used == set(range(self.num_pages)), "a page is lost"
        registered = {page for page, key in enumerate(self._keys) if key is not None}
        assert cached <= registered <= cached | used, "a page is registered but free, or cached but not registered"
        assert {key: page for page, key in enumerate(self._keys) if key is not None} == self._page_of, "keys differ"
