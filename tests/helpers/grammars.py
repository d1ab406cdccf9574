"""A small vocabulary, its grammars, and texts that are sampled under their masks."""

import functools
import json
import random
from collections.abc import Sequence

import numpy as np

from qwen_jax.inference.matching import Matcher
from qwen_jax.inference.structured import Grammar, Grammars
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.json_schemas import random_document, random_schema

VOCAB = 1000  # Of the model: the ids after the tokenizer's are padding.


@functools.cache
def small() -> Tokenizer:
    """A vocabulary with tokens such as '": ' and '"}, {"', which are parts of several elements of JSON."""
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        schema = random_schema(rng)
        texts.append(json.dumps(random_document(rng, schema, schema), ensure_ascii=rng.random() < 0.3))
    return train_bpe([*texts, "The quick brown fox, <tool_call> and  </tool_call> again."], 800)


@functools.cache
def grammars() -> Grammars:
    return Grammars(small(), VOCAB, ends())


def ends() -> list[int]:
    ids = [small().token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    return [i for i in ids if i is not None]


def allowed(matcher: Matcher, size: int = VOCAB) -> np.ndarray:
    mask = np.full(-(-size // 32), 0x5A5A5A5A, np.int32)  # What was there before must not matter.
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def sample(grammar: Grammar, rng: random.Random, patience: int = 120, may: Sequence[int] = ()) -> str:
    """A text of tokens drawn uniformly under the masks; after `patience` tokens it ends as soon as it may.

    Also checks that no control token but `may` is ever allowed, and no padding.
    """
    tokenizer, matcher = small(), grammar.matcher()
    forbidden = {*tokenizer.control_ids.values(), *range(tokenizer.vocab_size, VOCAB + 32)} - {*ends(), *may}
    closing = [tokenizer.encode(text)[0] for text in '"}],:']
    blank = {i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i).strip()}
    ids: list[int] = []
    while not matcher.ended:
        choices = allowed(matcher).tolist()
        assert choices
        assert not forbidden & {*choices}
        assert matcher.complete == bool({*ends()} & {*choices})
        if len(ids) < patience:
            token = rng.choice(choices)
        else:
            wanted = [i for i in (*ends(), *closing) if i in choices]
            token = wanted[0] if wanted else rng.choice([i for i in choices if i not in blank] or choices)
        matcher.accept(token)
        if token in ends():
            assert matcher.ended
            break
        ids.append(token)
        assert len(ids) < 5000
    assert allowed(matcher).tolist() == sorted(ends())
    return tokenizer.decode(ids)


def pieces(text: str, rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """A text as tokens at random, not as the tokenizer would split it."""
    control = {*tokenizer.control_ids.values()}
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in control}
    data, ids = text.encode(), []
    while data:
        fits = [n for n in range(1, 16) if data[:n] in by_bytes and n <= len(data)]
        n = rng.choice(fits)
        ids.append(by_bytes[data[:n]])
        data = data[n:]
    return ids


def check_accepts(grammar: Grammar, ids: list[int], size: int = VOCAB, end: int | None = None) -> None:
    """Every token is in the mask of its place, and the text may end."""
    matcher = grammar.matcher()
    for n, token in enumerate(ids):
        assert token in allowed(matcher, size), (n, ids[: n + 1])
        matcher.accept(token)
    end = ends()[0] if end is None else end
    assert end in allowed(matcher, size)
    matcher.accept(end)
    assert matcher.ended
