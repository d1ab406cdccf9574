"""Streaming detokenisation: the pieces join to the whole, for every split, and no character comes in halves."""

import itertools
import random
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import StreamDecoder, Tokenizer, train_bpe
from tests.qwen_jax.tokenizer.test_tokenizer import CORPUS, real
from tests.qwen_jax.tokenizer.test_tokenizer_sentencepiece import foreign_pair, trained


@cache
def tokenizer_named(name: str) -> Tokenizer:
    makers: dict[str, Callable[[], Tokenizer]] = {
        "real": real,
        "bytes": lambda: train_bpe([], 278),  # Every character beyond ASCII is several tokens.
        "sentencepiece": lambda: trained("bpe"),
        "leading space": lambda: foreign_pair(True, False)[0],
        "all leading spaces": lambda: foreign_pair(True, True)[0],
    }
    return makers[name]()


NAMES = ["real", "bytes", "sentencepiece", "leading space", "all leading spaces"]


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans(), cuts=st.lists(st.integers(0, 40), max_size=12))
def test_any_ids_in_any_split_join_to_decode(name: str, data: st.DataObject, skip: bool, cuts: list[int]) -> None:
    """Random ids: broken byte sequences, control tokens, leading spaces. Half of them come from the byte tokens."""
    tokenizer = tokenizer_named(name)
    one = st.one_of(st.integers(0, 257), st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(control_ids(name)))
    ids = data.draw(st.lists(one, max_size=40))
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(part) for part in split(ids, cuts)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@cache
def control_ids(name: str) -> list[int]:
    return [*sorted(tokenizer_named(name).special_ids), tokenizer_named(name).encode("<tool_call>")[-1]]


@pytest.mark.parametrize("name", NAMES[:4])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40).filter(lambda text: "\ufffd" not in text))
def test_whole_characters_as_soon_as_they_are_certain(name: str, text: str) -> None:
    """Token by token, what came so far is exactly the complete characters of the bytes so far."""
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode(text, parse_special=False)
    stream = StreamDecoder(tokenizer)
    whole = tokenizer.decode(ids)
    sent = ""
    for n, token in enumerate(ids, start=1):
        sent += stream.push([token])
        assert whole.startswith(sent)
        if "leading" not in name:
            so_far = b"".join(tokenizer.token_bytes(i) for i in ids[:n])
            assert sent == so_far.decode("utf-8", errors="ignore")
    assert sent == whole
    assert stream.flush() == ""


@pytest.mark.parametrize("name", NAMES[:4])
def test_corpus_token_by_token(name: str) -> None:
    tokenizer = tokenizer_named(name)
    for text in CORPUS:
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push([token]) for token in ids]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_flush_ends_a_broken_character_and_starts_anew() -> None:
    tokenizer = tokenizer_named("bytes")
    half = tokenizer.encode("日")[:2]
    stream = StreamDecoder(tokenizer)
    assert stream.push(half) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("日")) == "日"
    assert stream.flush() == ""
    spaced = tokenizer_named("leading space")
    stream = StreamDecoder(spaced)
    ids = spaced.encode("der Hund")
    assert [stream.push(ids) + stream.flush() for _ in range(2)] == ["der Hund", "der Hund"]


def test_a_bad_id_is_named_and_leaves_the_stream_as_it_was() -> None:
    tokenizer = tokenizer_named("bytes")
    first, *rest = tokenizer.encode("日")
    stream = StreamDecoder(tokenizer)
    stream.push([first])
    with pytest.raises(InputError, match="token id 278 "):
        stream.push([rest[0], 278])
    assert stream.push(rest) == "日"


def test_cost_of_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every id is turned into bytes once, and the UTF-8 decoder holds back fewer bytes than a character has."""
    tokenizer = tokenizer_named("bytes")
    calls = 0
    original = tokenizer.byte_decoder

    def counting(*, skip_special_tokens: bool = False) -> Callable[[int], bytes]:
        step = original(skip_special_tokens=skip_special_tokens)

        def count(token_id: int) -> bytes:
            nonlocal calls
            calls += 1
            return step(token_id)

        return count

    monkeypatch.setattr(tokenizer, "byte_decoder", counting)
    stream = StreamDecoder(tokenizer)
    rng = random.Random(0)
    for _ in range(5000):
        stream.push([rng.randrange(256)])
        assert len(stream._utf8.getstate()[0]) < 4
    assert calls == 5000
