"""Log-probabilities of continuations are those of transformers, however pairs share rows and prefixes."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import convert
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine
from qwen_jax.inference.likelihood import Likelihood, LikelihoodScorer, Pair, _likelihoods
from qwen_jax.inference.row_packing import RowPacker
from qwen_jax.inference.shared_prefixes import blocks
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed

VOCAB, CONTEXT = 160, 256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_hf_checkpoint(folder, seed=int(print_seed().integers(1000)), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def pairs(checkpoint: tuple[Path, Any]) -> list[Pair]:
    """Pairs alone, questions after the same examples with several answers, answers that begin alike, greedy ones."""
    rng = print_seed()

    def ids(count: int) -> list[int]:
        found: list[int] = rng.integers(0, VOCAB, count).tolist()
        return found

    found: list[Pair] = [(ids(int(rng.integers(1, 60))), ids(int(rng.integers(1, 6)))) for _ in range(4)]
    examples = ids(70)
    for _ in range(3):
        question = examples + ids(int(rng.integers(1, 20)))
        found += [(question, ids(1)) for _ in range(4)]
    context, answer = ids(90), ids(3)
    found += [(context, ids(7)), (context, answer), (context, answer + ids(2)), (context + answer, ids(2))]
    found += [(context, answer), (ids(CONTEXT), ids(1))]
    with torch.no_grad():
        best = int(checkpoint[1](torch.tensor([context])).logits[0, -1].argmax())
    return [*found, (context, [best]), (context, [best, *ids(1)])]


def theirs(model: Any, pairs: list[Pair]) -> list[tuple[float, bool]]:
    found = []
    for context, continuation in pairs:
        tokens, targets = torch.tensor([[*context, *continuation][:-1]]), torch.tensor(continuation)
        with torch.no_grad():
            log_probs = model(tokens).logits[0].log_softmax(-1)[len(context) - 1 :]
        logprob = float(log_probs.gather(1, targets[:, None]).sum())
        found.append((logprob, bool((log_probs.argmax(-1) == targets).all())))
    return found


def agree(got: list[Likelihood], want: list[tuple[float, bool]]) -> None:
    """Equal up to the rounding of float32 sums of some dozen terms."""
    np.testing.assert_allclose([x.logprob for x in got], [x[0] for x in want], atol=1e-4, rtol=1e-5)
    assert [x.greedy for x in got] == [x[1] for x in want]


@pytest.mark.parametrize(
    ("axes", "tokens", "share"),
    [({}, 128, True), ({}, 16_384, False), ({"data": 2, "fsdp": 2, "tensor": 2}, 512, True)],
    ids=str,
)
def test_likelihoods_are_those_of_transformers_for_any_packing_and_mesh(
    axes: dict[str, int], tokens: int, share: bool, checkpoint: tuple[Path, Any], pairs: list[Pair]
) -> None:
    folder, model = checkpoint
    want, mesh = theirs(model, pairs), make_mesh(axes)
    assert len({greedy for _, greedy in want}) == 2
    config, params = convert.load(folder, mesh, "float32")
    scorer = LikelihoodScorer(config, params, mesh, dtype="float32", tokens_per_batch=tokens, share_prefixes=share)
    got = scorer.score(pairs)
    agree(got, want)
    assert [x.tokens for x in got] == [len(continuation) for _, continuation in pairs]
    # In another order, and a part of them; each result is reported once.
    seen: dict[int, Likelihood] = {}
    agree(scorer.score(pairs[::-1], lambda i, found: seen.setdefault(i, found) and None), want[::-1])
    assert sorted(seen) == list(range(len(pairs)))
    agree(scorer.score(pairs[:4]), want[:4])
    assert scorer.score([]) == []


def test_an_engine_and_dual_chunk_attention_give_the_same(checkpoint: tuple[Path, Any], pairs: list[Pair]) -> None:
    folder, model = checkpoint
    want, mesh = theirs(model, pairs), make_mesh()
    config, params = convert.load(folder, mesh, "float32", Options(stacked=False))
    alone = LikelihoodScorer(config.with_dual_chunk(trained_length=CONTEXT), params, mesh, dtype="float32")
    agree(alone.score(pairs[4:9]), want[4:9])
    engine = Engine(config, params, mesh, dtype="float32")
    agree(LikelihoodScorer(config, engine.params, mesh, dtype="float32").score(pairs), want)


def test_a_warm_scorer_compiles_nothing(checkpoint: tuple[Path, Any], pairs: list[Pair]) -> None:
    mesh = make_mesh()
    config, params = convert.load(checkpoint[0], mesh, "float32")
    scorer = LikelihoodScorer(config, params, mesh, dtype="float32")
    scorer.score(pairs)
    compiled = _likelihoods._cache_size()
    rng = print_seed()
    scorer.score([(rng.permutation(context).tolist(), continuation) for context, continuation in pairs[::-1]][:-9])
    scorer.score([([*context, 1][:CONTEXT], continuation) for context, continuation in pairs])
    assert _likelihoods._cache_size() <= compiled + 2


def test_each_text_is_in_one_block_and_shared_beginnings_are_read_once() -> None:
    rng = print_seed()
    examples = rng.integers(0, 9, (3, 60)).astype(np.int32)
    texts = [np.concatenate([x, rng.integers(0, 9, n)]).astype(np.int32) for x in examples for n in range(1, 14)]
    texts = list({x.tobytes(): x for x in [*texts, *examples[:1], *[x[:40] for x in examples]]}.values())
    rng.shuffle(texts)  # type: ignore[arg-type]
    for row in (128, 1024):
        found = blocks(texts, row)
        assert sorted(i for block in found for i in block.texts) == list(range(len(texts)))
        for block in found:
            begin = texts[block.texts[0]][: block.prefix]
            assert all(np.array_equal(texts[i][: block.prefix], begin) for i in block.texts)
            assert block.size == block.prefix + sum(len(texts[i]) - block.prefix for i in block.texts) <= row
        assert sum(block.size for block in found) < sum(map(len, texts)) / 2
    # Nothing in common: each is alone.
    apart = [np.array([i, 1, 2], np.int32) for i in range(9)]
    assert [block.prefix for block in blocks(apart, 128)] == [0] * 9


def test_rows_hold_each_text_once_with_little_padding() -> None:
    rng = print_seed()
    sizes = [int(n) for n in rng.integers(1, 700, 400)]
    batches = list(RowPacker(sizes, shards=2, tokens=8192, row=2048))
    assert sorted(i for rows, _ in batches for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= length for rows, length in batches for row in rows)
    assert all(len(rows) % 2 == 0 and len(rows) * length <= 8192 for rows, length in batches)
    assert sum(sizes) > 0.85 * sum(len(rows) * length for rows, length in batches)


def test_bad_pairs_are_named(checkpoint: tuple[Path, Any]) -> None:
    mesh = make_mesh()
    config, params = convert.load(checkpoint[0], mesh, "float32")
    scorer = LikelihoodScorer(config, params, mesh, dtype="float32")
    for pair, said in (
        (([], [1]), "Pair 1 has 0 tokens of context"),
        (([1], []), "0 of continuation"),
        (([1], [VOCAB]), "Pair 1 has something else than token ids"),
        (([1], [-1]), "something else"),
        (([1.5], [1]), "something else"),
        (([1] * CONTEXT, [1, 2]), f"expected at most {CONTEXT + 1}"),
    ):
        with pytest.raises(InputError, match=said):
            scorer.score([([1], [2]), pair])  # type: ignore[list-item]
    with pytest.raises(InputError, match="tokens_per_batch"):
        LikelihoodScorer(config, params, mesh, tokens_per_batch=0)
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(InputError, match="pair 0 is not finite"):
        LikelihoodScorer(config, broken, mesh, dtype="float32").score([([1], [2])])
