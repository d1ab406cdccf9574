"""Pages: none is lost or given away twice, and the prefix cache returns exactly what was registered."""

import random
from collections import Counter

import pytest

from qwen_jax.inference.pages import PagePool

ROOT = PagePool(1, 1).salt(None)


def store(pool: PagePool, tokens: list[int], salt: bytes = ROOT) -> list[int]:
    """Allocates and registers the full pages of a text."""
    size = pool.page_size
    pages = pool.allocate(len(tokens) // size)
    assert pages is not None
    for i, page in enumerate(pages):
        salt = pool.register(page, salt, tokens[i * size : (i + 1) * size])
    return pages


def test_pages_are_given_once_and_come_back() -> None:
    pool = PagePool(4, 2)
    first, second = pool.allocate(3), pool.allocate(1)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.num_free == 0
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.release(first)
    assert pool.num_free == 3
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    pool.check()


def test_a_released_page_cannot_be_released_again() -> None:
    pool = PagePool(2, 2)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(ValueError, match="has no reference"):
        pool.release(pages)
    pool.check()


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_a_pool_has_pages_and_slots(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(*sizes)


def test_the_longest_chain_of_full_pages_is_found_while_used_and_afterwards() -> None:
    pool = PagePool(8, 2)
    pages = store(pool, [1, 2, 3, 4, 5, 6])
    for _ in range(2):
        for tokens, count in (([1, 2, 3, 4, 5, 6, 7], 3), ([1, 2, 3, 4, 5], 2), ([1, 2, 9, 4], 1), ([9, 2, 3, 4], 0)):
            assert pool.match(tokens, ROOT) == pages[:count]
            pool.release(pages[:count])
        assert pool.match([1], ROOT) == []
        if pool.users(pages[0]):
            pool.release(pages)
    pool.check()


def test_a_page_is_known_by_all_tokens_before_it() -> None:
    """The same tokens after another beginning have other keys and values."""
    pool = PagePool(8, 2)
    store(pool, [1, 2, 3, 4])
    other = store(pool, [5, 6, 3, 4])
    assert pool.match([5, 6, 3, 4], ROOT) == other
    assert pool.match([3, 4], ROOT) == []


def test_hits_and_queries_are_counted_in_tokens() -> None:
    pool = PagePool(8, 2)
    store(pool, [1, 2, 3, 4])
    pool.match([1, 2, 3, 4, 5], ROOT)
    pool.match([1, 2, 9], ROOT)
    assert (pool.hits, pool.queries) == (6, 8)


def test_adapters_and_weights_do_not_share_pages() -> None:
    pool = PagePool(8, 2)
    salts = [pool.salt(None), pool.salt(""), pool.salt("a"), pool.salt("0"), pool.salt("0 a")]
    pool.clear()
    salts += [pool.salt(None), pool.salt("a")]
    assert len(set(salts)) == len(salts)
    salts += [pool.salt(None, ""), pool.salt(None, "a"), pool.salt("a", "a"), pool.salt("a a", "a")]
    salts += [pool.salt(None, "1 a"), pool.salt("a", "1 a"), pool.salt(None, "\ud800")]
    assert len(set(salts)) == len(salts)
    store(pool, [1, 2], pool.salt("a"))
    assert pool.match([1, 2], pool.salt(None)) == []
    assert pool.match([1, 2], pool.salt("b")) == []
    assert len(pool.match([1, 2], pool.salt("a"))) == 1


def test_cached_pages_are_evicted_last_and_the_least_recently_used_first() -> None:
    pool = PagePool(4, 2)
    old, new = store(pool, [1, 2]), store(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 4
    unknown = pool.allocate(2)
    assert unknown is not None
    assert not set(unknown) & {*old, *new}, "free pages come first"
    pool.release(pool.match([1, 2], ROOT))
    assert pool.allocate(1) == new, "page 'old' was used later"
    assert pool.match([3, 4], ROOT) == []
    assert pool.match([1, 2], ROOT) == old
    pool.check()


def test_leaves_are_evicted_before_their_parents() -> None:
    pool = PagePool(4, 1)
    pages = store(pool, [1, 2, 3, 4])
    pool.release(pages)
    for left in (3, 2, 1, 0):
        assert pool.allocate(1) == [pages[left]]
        assert pool.match([1, 2, 3, 4], ROOT) == pages[:left]
        pool.release(pages[:left])


def test_of_two_pages_with_the_same_tokens_the_older_is_found() -> None:
    pool = PagePool(4, 2)
    older, newer = store(pool, [1, 2]), store(pool, [1, 2])
    assert pool.match([1, 2], ROOT) == older
    assert not pool.is_registered(newer[0])
    pool.release(newer)
    pool.release(older)
    pool.release(older)
    pool.check()
    assert pool.match([1, 2], ROOT) == older


def test_registering_needs_a_used_full_page() -> None:
    pool = PagePool(4, 2)
    with pytest.raises(ValueError, match="a used page and 2 tokens"):
        pool.register(0, ROOT, [1, 2])
    pages = pool.allocate(1)
    assert pages is not None
    with pytest.raises(ValueError, match="a used page and 2 tokens"):
        pool.register(pages[0], ROOT, [1])
    key = pool.register(pages[0], ROOT, [1, 2])
    assert pool.register(pages[0], ROOT, [1, 2]) == key
    with pytest.raises(ValueError, match="other tokens"):
        pool.register(pages[0], ROOT, [1, 3])
    pool.check()


def test_new_weights_forget_all_content_and_no_reference() -> None:
    pool = PagePool(4, 2)
    used, cached = store(pool, [1, 2]), store(pool, [3, 4])
    pool.release(cached)
    pool.clear()
    pool.check()
    assert (pool.version, pool.num_free) == (1, 3)
    assert pool.match([1, 2], ROOT) == pool.match([3, 4], ROOT) == []
    assert pool.users(used[0]) == 1
    pool.release(used)
    pool.check()
    assert pool.num_free == 4


@pytest.mark.parametrize("run", range(4))
def test_random_operations(run: int) -> None:
    """A chain that is found holds exactly the tokens asked for, and each page has exactly its references."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    size = rng.randint(1, 3)
    pool = PagePool(rng.randint(1, 16), size)
    # What the pages of the device hold: all tokens up to the end of the page. And each text's pages and salt.
    content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
    texts: list[list[int]] = []
    for _ in range(2500):
        what = rng.random()
        if what < 0.5:
            salt = pool.salt(rng.choice([None, "a"]))
            tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, 6 * size))]
            found = pool.match(tokens, salt)
            for i, page in enumerate(found):
                assert content[page] == (salt, tuple(tokens[: (i + 1) * size]))
            count = len(tokens) // size - len(found)
            enough = pool.num_free >= count
            new = pool.allocate(count)
            assert (new is not None) == enough
            if new is None:
                pool.release(found)
            else:
                key = salt
                texts.append(found + new)
                for i, page in enumerate(texts[-1]):
                    if i >= len(found):
                        content[page] = salt, tuple(tokens[: (i + 1) * size])
                    key = pool.register(page, key, tokens[i * size : (i + 1) * size])
                assert pool.match(tokens, salt) != [] or not texts[-1], "what was just stored is found"
                pool.release([pool.find(k) for k in chain(pool, tokens, salt)])  # type: ignore[misc]
        elif what < 0.99 and texts:
            pool.release(texts.pop(rng.randrange(len(texts))))
        elif what >= 0.995:
            pool.clear()
        pool.check()
        users = Counter(page for text in texts for page in text)
        assert all(pool.users(page) == users[page] for page in range(pool.num_pages))
    for text in texts:
        pool.release(text)
    pool.check()
    assert pool.num_free == pool.num_pages


def chain(pool: PagePool, tokens: list[int], salt: bytes) -> list[bytes]:
    """Keys of the full pages of a text."""
    keys = list[bytes]()
    for start in range(0, len(tokens) - pool.page_size + 1, pool.page_size):
        keys.append(pool.key(keys[-1] if keys else salt, tokens[start : start + pool.page_size]))
    return keys
