"""Sampling with parameters for each row: the tokens of sampling by batch, and rules by their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.inference import row_sampling
from qwen_jax.inference.row_sampling import RowValues, Rules, SampledRows, SampleRow, Variant
from qwen_jax.inference.sampling import NOT_FINITE, SamplingParams, SamplingValues, sample_token
from qwen_jax.inference.slots import Slots

V = 1500
GREEDY = [SamplingParams(), SamplingParams(temperature=0.5, top_p=0.0), SamplingParams(repetition_penalty=1.4)]
LISTS = [
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, seed=11),
    SamplingParams(temperature=1.3, top_k=5, min_p=0.05, seed=2**32 - 1),
    SamplingParams(temperature=0.9, top_k=32, top_p=0.9, repetition_penalty=1.2, seed=2**31),
]
FULL = [
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=0.4, top_p=0.9, seed=8),
    SamplingParams(temperature=1.2, top_k=200, min_p=0.02, seed=9),
    SamplingParams(temperature=1.0, top_k=100, top_p=0.95, repetition_penalty=0.8, seed=10),
]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


def random_rows(rng: np.random.Generator, samplings: list[SamplingParams]) -> list[SampleRow]:
    steps = rng.integers(0, 1000, len(samplings))
    return [
        SampleRow(i, s, int(step), rules=s.repetition_penalty != 1)
        for i, (s, step) in enumerate(zip(samplings, steps, strict=True))
    ]


def random_rules(rng: np.random.Generator, rows: int, vocab: int = V) -> Rules:
    counts = rng.poisson(0.5, (rows, vocab)).astype(np.uint16)
    bias = rng.normal(0, 1, (rows, vocab)).astype(np.float32)
    return Rules(jnp.asarray(counts), jnp.asarray(rng.random((rows, vocab)) < 0.2), jnp.asarray(bias))


def values_of(rows: list[SampleRow]) -> RowValues:
    return row_sampling.unpack(jnp.asarray(row_sampling.pack(rows, len(rows), len(rows))))


_sample = jax.jit(row_sampling.sample_rows, static_argnames=("variant", "vocab_limit", "top"))


def sample(
    logits: np.ndarray,
    rows: list[SampleRow],
    rules: Rules | None,
    variant: Variant,
    allowed: np.ndarray | None = None,
    vocab_limit: int = V,
) -> SampledRows:
    masks = None if allowed is None else jnp.asarray(allowed)
    return _sample(jnp.asarray(logits), values_of(rows), rules, masks, variant=variant, vocab_limit=vocab_limit, top=20)


def test_parameters_survive_packing(rng: np.random.Generator) -> None:
    rows = random_rows(rng, GREEDY + LISTS + FULL)
    rows[4] = dataclasses.replace(rows[4], presence=-1.5, frequency=0.25, rules=True)
    got = row_sampling.unpack(jnp.asarray(row_sampling.pack([*rows, None], 12, 77)))
    for i, row in enumerate(rows):
        want = SamplingValues.of(row.sampling)
        for field in dataclasses.fields(SamplingValues):
            assert getattr(got.values, field.name)[i, 0] == getattr(want, field.name)
        assert [int(x[i]) for x in (got.slot_B, got.seed_B, got.step_B)] == [row.slot, row.sampling.seed, row.step]
        assert [float(x[i, 0]) for x in (got.presence_B1, got.frequency_B1)] == [row.presence, row.frequency]
        assert bool(got.rules_B1[i, 0]) == row.rules
    assert got.slot_B[len(rows) :].tolist() == [77, 77]


def test_a_row_gives_the_token_of_a_batch_with_its_parameters(rng: np.random.Generator) -> None:
    """All methods in one batch, in two orders: what `sample_token` gives with each row's parameters alone."""
    samplings = GREEDY + LISTS + FULL
    rows, rules = random_rows(rng, samplings), random_rules(rng, len(samplings))
    rules = rules._replace(bias_BV=jnp.zeros_like(rules.bias_BV))
    logits = rng.normal(0, 3, (len(rows), V)).astype(np.float32)
    got = sample(logits, rows, rules, "all")
    seen = np.asarray(rules.prompt_BV | (rules.counts_BV > 0))
    for i, row in enumerate(rows):
        mode = dataclasses.replace(row.sampling.mode, logprobs=True)
        want = sample_token(
            *(jnp.asarray(logits[i : i + 1]), jnp.asarray(seen[i : i + 1])),
            *(jax.random.key(np.uint32(row.sampling.seed))[None], jnp.int32(row.step)),
            *(SamplingValues.of(row.sampling), mode, V),
        )
        assert want.logprob_B is not None
        assert (got.token_B[i], got.next_B[i]) == (want.token_B[0], want.next_B[0])
        # A likely token's log-probability is a small difference, rounded as its logit is.
        atol = 8 * np.finfo(np.float32).eps * np.abs(logits[i]).max()
        np.testing.assert_allclose(got.logprob_B[i], want.logprob_B[0], rtol=1e-5, atol=atol)
    order = rng.permutation(len(rows))
    moved = sample(
        logits[order], [rows[i] for i in order], Rules(*(jnp.asarray(np.asarray(x)[order]) for x in rules)), "all"
    )
    assert moved.token_B.tolist() == np.asarray(got.token_B)[order].tolist()


def test_variants_agree(rng: np.random.Generator) -> None:
    """A row's token is the same in each variant that can serve it, whatever is left in the rules of its slot."""
    for step in range(5):
        rows = random_rows(rng, [GREEDY[0], GREEDY[1], *GREEDY[:2]])
        logits, rules = rng.normal(0, 3, (4, V)).astype(np.float32), random_rules(rng, 4)
        tokens = [sample(logits, rows, rules, variant).token_B.tolist() for variant in row_sampling.VARIANTS]
        assert all(other == logits.argmax(1).tolist() for other in tokens), step
        rows = random_rows(rng, [*LISTS, GREEDY[2]])
        rows = [dataclasses.replace(row, rules=i > 1) for i, row in enumerate(rows)]
        everything = np.full((4, -(-V // 32)), -1, np.int32)
        cases: list[tuple[Variant, np.ndarray | None]] = [(v, None) for v in row_sampling.WITH_RULES]
        cases += [(variant, everything) for variant in row_sampling.WITH_MASKS if variant in row_sampling.WITH_RULES]
        tokens = [sample(logits, rows, rules, variant, mask).token_B.tolist() for variant, mask in cases]
        assert all(other == tokens[0] for other in tokens)
        # Without rules.
        rows = random_rows(rng, [*LISTS[:2], *GREEDY[:2]])
        tokens = [
            sample(logits, rows, rules, variant).token_B.tolist() for variant in ("listed", *row_sampling.WITH_RULES)
        ]
        assert all(other == tokens[0] for other in tokens)
        # With masks, of the methods that draw from all tokens, too.
        rows = random_rows(rng, [*LISTS[:2], GREEDY[0], FULL[0]])
        mask = rng.integers(-(2**31), 2**31, everything.shape).astype(np.int32) | 1
        tokens = [sample(logits, rows, rules, variant, mask).token_B.tolist() for variant in ("drawn", "all")]
        assert tokens[0] == tokens[1]
        of_greedy = {int(sample(logits, rows, rules, v, mask).token_B[2]) for v in row_sampling.WITH_MASKS}
        assert of_greedy == {tokens[0][2]}


def test_rows_without_filters_get_the_tokens_of_the_search_for_thresholds(rng: np.random.Generator) -> None:
    """The program without filters draws the tokens of the one with all of them, padding and bad logits included.

    The programs are those that the runner compiles, and the law is about single draws, not about their distribution.
    """
    drawn = zip(10 ** rng.uniform(-2, 1, 60), rng.integers(2**32, size=60), strict=True)
    rows = random_rows(rng, [SamplingParams(temperature=float(t), seed=int(seed)) for t, seed in drawn])
    rows += random_rows(rng, GREEDY[:2])
    logits = rng.normal(0, 5, (len(rows), V)).astype(np.float32)
    logits[1, 3], logits[2, 4], logits[3, 5:] = np.nan, np.inf, -np.inf
    open_, all_ = (sample(logits, rows, None, variant, vocab_limit=1400) for variant in ("open", "all"))
    assert open_.token_B.tolist() == all_.token_B.tolist()
    assert open_.next_B.tolist() == all_.next_B.tolist()
    np.testing.assert_array_equal(open_.logprob_B, all_.logprob_B)
    assert [int(open_.token_B[i]) for i in (1, 2)] == [NOT_FINITE] * 2
    assert open_.top_ids_BN is None


def test_the_smallest_variant_is_chosen() -> None:
    greedy, listed, full, filtered = (SampleRow(0, s, 0) for s in (GREEDY[0], LISTS[0], FULL[0], FULL[1]))
    smallest_p = SampleRow(0, SamplingParams(temperature=1.0, min_p=0.1), 0)
    for rows, want in (
        ([greedy, None], "plain"),
        ([None], "plain"),
        ([greedy, listed], "listed"),
        ([dataclasses.replace(greedy, rules=True)], "ruled"),
        ([full, None, greedy], "open"),
        ([listed, full], "drawn"),
        ([full, filtered], "all"),
        ([full, smallest_p], "all"),
        ([dataclasses.replace(full, top=True)], "all"),
        ([dataclasses.replace(full, rules=True)], "all"),
        ([dataclasses.replace(greedy, top=True), listed], "detailed"),
    ):
        assert row_sampling.variant_of(rows) == want
        with_mask = {"plain": "masked", "listed": "drawn", "open": "drawn"}
        assert row_sampling.with_mask(row_sampling.variant_of(rows)) == with_mask.get(want, want)
        # By slot, as the steps of many rows are packed.
        slots = Slots(4, 1, 16)
        for i, row in enumerate(rows):
            if row is not None:
                slots.place(dataclasses.replace(row, slot=i), [])
        packed = slots.pack_sampling([None if row is None else i for i, row in enumerate(rows)], [0] * len(rows), 8)
        assert packed[1] == want


@pytest.mark.parametrize("method", ["list", "full"])
def test_rules_give_the_distribution_of_their_formulas(rng: np.random.Generator, method: str) -> None:
    """Repetition, presence and frequency penalty, bias and mask, by chi-squared against NumPy."""
    vocab, draws = 30, 4000
    top_k = 32 if method == "list" else 0
    params = SamplingParams(temperature=0.8, top_k=top_k, repetition_penalty=1.3, seed=int(rng.integers(2**32)))
    row = SampleRow(0, params, 0, presence=0.9, frequency=0.4, rules=True)
    rules, logits = random_rules(rng, 1, vocab), rng.normal(0, 1.5, (1, vocab)).astype(np.float32)
    allowed = rng.random(vocab) < 0.7
    allowed[0] = True
    mask = np.packbits(np.pad(allowed, (0, 32 - vocab)), bitorder="little").view(np.int32)

    # By the formulas.
    counts, prompt, bias = (np.asarray(x, np.float64)[0] for x in rules)
    x = logits[0].astype(np.float64)
    x = np.where((prompt > 0) | (counts > 0), np.where(x > 0, x / 1.3, x * 1.3), x)
    x = np.where(allowed, x - 0.9 * (counts > 0) - 0.4 * counts + bias, -np.inf) / 0.8
    expected = np.exp(x - x.max())
    expected *= draws / expected.sum()

    # By as many rows with seeds of their own.
    values = values_of([row])
    seeds = jnp.arange(draws, dtype=jnp.uint32) + np.uint32(params.seed)
    wide: RowValues = jax.tree.map(lambda a: jnp.broadcast_to(a, (draws, *a.shape[1:])), values)
    rules = Rules(*(jnp.broadcast_to(a, (draws, vocab)) for a in rules))
    found = row_sampling.sample_rows(
        *(jnp.broadcast_to(logits, (draws, vocab)), wide._replace(seed_B=seeds), rules),
        jnp.broadcast_to(mask, (draws, 1)),
        variant="all",
        vocab_limit=vocab,
        top=5,
    )
    counted = np.bincount(np.asarray(found.token_B), minlength=vocab)
    assert not counted[expected == 0].any()
    likely = expected > 5
    cells = np.append(counted[likely], counted[~likely].sum()), np.append(expected[likely], expected[~likely].sum())
    chi = ((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1)).sum()
    freedom = likely.sum()
    # Six standard deviations of the normal approximation, with room for its skew.
    assert chi < freedom + 6 * np.sqrt(2 * freedom) + 10
    # Log-probabilities are those of the model.
    plain = np.asarray(jax.nn.log_softmax(logits[0]))
    np.testing.assert_allclose(found.logprob_B, plain[np.asarray(found.token_B)], atol=1e-5)


def test_rows_with_nan_or_infinity_are_marked_and_the_others_are_not(rng: np.random.Generator) -> None:
    """In each variant, also where the mask allows no bad logit; and a mask that allows nothing marks its row."""
    rows = random_rows(rng, [GREEDY[0], GREEDY[1], GREEDY[0], GREEDY[0]])
    clean = rng.normal(0, 3, (4, V)).astype(np.float32)
    mask = np.full((4, -(-V // 32)), -1, np.int32)
    mask[:, 5] = 0
    for variant in row_sampling.VARIANTS:
        want = sample(clean, rows, None, variant).token_B.tolist()
        for bad in (np.nan, np.inf):
            logits = clean.copy()
            logits[1, 5 * 32 + 3] = bad
            marked = [want[0], NOT_FINITE, *want[2:]]
            assert sample(logits, rows, None, variant).token_B.tolist() == marked
            if variant in row_sampling.WITH_MASKS:
                masked = sample(clean, rows, None, variant, mask).token_B.tolist()
                masked[1] = NOT_FINITE
                assert sample(logits, rows, None, variant, mask).token_B.tolist() == masked
    mask[2] = 0
    found = sample(clean, rows, None, "all", mask)
    assert found.token_B[2] == NOT_FINITE
    assert (np.asarray(found.next_B) >= 0).all()


def test_padding_ids_are_neither_sampled_nor_among_the_most_likely(rng: np.random.Generator) -> None:
    rows = random_rows(rng, [GREEDY[0], LISTS[0], FULL[0]])
    logits = rng.normal(0, 3, (3, V)).astype(np.float32)
    logits[:, 1400:] = 9.0
    found = sample(logits, rows, random_rules(rng, 3), "all", vocab_limit=1400)
    assert (np.asarray(found.token_B) < 1400).all()
    assert found.top_ids_BN is not None
    assert (np.asarray(found.top_ids_BN) < 1400).all()


def test_counts_stop_at_the_largest_number() -> None:
    counts = jnp.zeros((2, 4), jnp.uint16).at[0, 1].set(65_535)
    counts = row_sampling.count_tokens(counts, jnp.arange(2), jnp.asarray([1, 2]))
    counts = row_sampling.count_tokens(counts, jnp.arange(2), jnp.asarray([0, 2]), jnp.asarray([False, True]))
    assert counts.tolist() == [[0, 65_535, 0, 0], [0, 0, 2, 0]]
