"""The runner gives what the engine for fixed batches gives, however its steps are put together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from qwen_jax import kernels
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.buckets import Buckets
from qwen_jax.inference.engine import Engine
from qwen_jax.inference.row_sampling import VARIANTS, WITH_MASKS, WITH_RULES, Variant
from qwen_jax.inference.runner import Masks, PrefillInput, RowInput, Runner, RunnerConfig, SampleRow
from qwen_jax.inference.runner_lowering import Program, lower
from qwen_jax.inference.sampling import NOT_FINITE, SamplingParams
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import Params, bind
from qwen_jax.published import published
from tests.helpers.forward import logits as forward_logits
from tests.helpers.forward import random_unstacked
from tests.helpers.runs_of_runner import Text, generate

V, PAGE, NEW = 96, 4, 10
DENSE = dataclasses.replace(published("tiny"), vocab_size=V, eos_token_ids=())
MOE = dataclasses.replace(published("tiny-moe"), vocab_size=V, eos_token_ids=())
BUCKETS = Buckets(rows=(1, 4), slots=(64,), prefill=((1, 16), (3, 48)), prefill_slots=(64, 192), texts=(16, 64))
SETTINGS = RunnerConfig(
    max_seqs=6, max_length=64, page_size=PAGE, num_pages=90, max_batched_tokens=48, max_top_logprobs=5, buckets=BUCKETS
)
GREEDY = SamplingParams()
TOP_K = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=3)
FULL = SamplingParams(temperature=1.1, top_p=0.95, min_p=0.01, seed=2**32 - 1)
PENALISED = SamplingParams(temperature=0.8, top_k=12, repetition_penalty=1.3, seed=5)


def new_rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def rng() -> np.random.Generator:
    return new_rng()


def make(
    config: ModelConfig, axes: dict[str, int] | None = None, seed: int | None = None, **settings: Any
) -> tuple[Engine, Runner]:
    """An engine and a runner with the same random weights."""
    axes = axes or {}
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values()), dtype=int))])
    rng = new_rng() if seed is None else np.random.default_rng(seed)
    params = random_unstacked(config, mesh, rng)
    engine = Engine(config, params, mesh, dtype="float32", chunk=NEW)
    how = dataclasses.replace(SETTINGS, **settings)
    return engine, Runner(config, engine.params, mesh, engine.options, engine.vocab_limit, how)


@pytest.fixture(scope="module")
def dense() -> tuple[Engine, Runner]:
    return make(DENSE, speculate=3)


def texts_of(rng: np.random.Generator, samplings: Sequence[SamplingParams]) -> list[Text]:
    """Texts with prompts of random lengths; the second shares whole pages of the first one's prompt."""
    prompts = [rng.integers(0, V, n).tolist() for n in rng.integers(1, 40, len(samplings))]
    shared = PAGE * int(rng.integers(1, 6))
    prompts[0] = rng.integers(0, V, 24).tolist()
    prompts[1] = prompts[0][:shared] + rng.integers(0, V, int(rng.integers(1, 12))).tolist()
    rows = [SampleRow(0, s, 0, rules=s.repetition_penalty != 1) for s in samplings]
    texts = [Text(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    texts[1].shares, texts[1].shared = texts[0], shared
    return texts


def expected(engine: Engine, text: Text, tokens: int = NEW) -> list[int]:
    (completion,) = engine.generate([text.prompt], text.row.sampling, max_new_tokens=tokens)
    return completion.token_ids


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_texts_are_those_of_the_engine(
    config: ModelConfig, rng: np.random.Generator, request: pytest.FixtureRequest
) -> None:
    """Greedy, top-k, full and penalised rows in one batch; random chunks, companies, orders and pages; shared pages."""
    engine, runner = request.getfixturevalue("dense") if config is DENSE else make(MOE)
    for _ in range(2):
        texts = generate(runner, texts_of(rng, [GREEDY, TOP_K, FULL, PENALISED, GREEDY]), NEW, rng)
        for text in texts:
            assert text.tokens == expected(engine, text), text.row


def test_log_probabilities_are_those_of_the_whole_forward_pass(
    dense: tuple[Engine, Runner], rng: np.random.Generator
) -> None:
    """Of sampled tokens and of prompts, whatever the rules; also the most likely tokens. Sums are never held whole."""
    _, runner = dense
    texts = generate(runner, texts_of(rng, [GREEDY, PENALISED, FULL]), NEW, rng)
    of_prompts = runner.texts_logprobs([text.prompt + text.tokens for text in texts])
    for text, of_prompt in zip(texts, of_prompts, strict=True):
        ids = np.asarray([text.prompt + text.tokens], np.int32)
        logits = forward_logits(DENSE, runner.params, runner.mesh, ids, runner.static.options)[0, :-1]
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        own = logprobs[np.arange(len(logits)), ids[0, 1:]]
        np.testing.assert_allclose(text.logprobs, own[-NEW:], atol=2e-5)
        np.testing.assert_allclose(of_prompt.logprobs, own, atol=2e-5)
        np.testing.assert_allclose(of_prompt.top_logprobs, -np.sort(-logprobs)[:, :5], atol=2e-5)
        np.testing.assert_allclose(
            np.take_along_axis(logprobs, of_prompt.top_ids, axis=1), of_prompt.top_logprobs, atol=2e-5
        )
    # With a token: its own most likely tokens.
    row = dataclasses.replace(texts[0].row, top=True)
    prompt = texts[0].prompt
    chunks = [prompt[:16], prompt[16:]]
    runner.prefill([PrefillInput(row.slot, chunks[0], 0, range(6))])
    found = runner.sample(runner.prefill([PrefillInput(row.slot, chunks[1], 16, range(6))]), [row]).read()
    logits = forward_logits(DENSE, runner.params, runner.mesh, np.asarray([prompt]), runner.static.options)[0, -1]
    want = -np.sort(-np.asarray(jax.nn.log_softmax(logits)))[:5]
    assert found.top_logprobs is not None
    np.testing.assert_allclose(found.top_logprobs[0], want, atol=2e-5)


def test_embeddings_are_the_mean_and_the_last_of_the_hidden_states(
    dense: tuple[Engine, Runner], rng: np.random.Generator
) -> None:
    """Texts that share rows do not see one another."""
    _, runner = dense
    texts = [rng.integers(0, V, n).tolist() for n in rng.integers(1, 50, 9)]
    mean, last = runner.embed(texts, "mean"), runner.embed(texts, "last")
    sharding = runner.static.sharding

    @jax.jit
    def hidden(params: Params, tokens: jax.Array) -> jax.Array:
        positions = jax.reshard(jnp.broadcast_to(jnp.arange(64), (1, 64)), sharding.tokens)
        mask = jax.tree.map(lambda x: jax.reshard(x, sharding.tokens), kernels.causal_mask(1, 64))
        return bind(DENSE, params, sharding, runner.static.options)(tokens, positions, mask).hidden[0]

    for i, text in enumerate(texts):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(text)] = text
        with jax.set_mesh(runner.mesh):
            placed = jax.device_put(tokens, NamedSharding(runner.mesh, sharding.tokens))
            want = np.asarray(hidden(runner.params, placed))[: len(text)]
        np.testing.assert_allclose(mean[i], want.mean(0), atol=2e-5)
        np.testing.assert_allclose(last[i], want[-1], atol=2e-5)


SPECULATED = [
    SampleRow(0, GREEDY, 0),
    SampleRow(0, TOP_K, 0),
    SampleRow(0, FULL, 0),
    SampleRow(0, PENALISED, 0, presence=0.7, frequency=0.4, rules=True),
]


def test_speculation_changes_no_text(dense: tuple[Engine, Runner], rng: np.random.Generator) -> None:
    """Proposals that are right, partly right or none; penalties count the accepted ones."""
    _, runner = dense
    k = runner.settings.speculate
    prompts = [rng.integers(0, V, n).tolist() for n in rng.integers(1, 17, 4)]
    bias = {int(i): float(b) for i, b in zip(rng.permutation(V)[:9], rng.normal(0, 1, 9), strict=True)}
    rows = [dataclasses.replace(row, slot=i) for i, row in enumerate(SPECULATED)]
    want = [t.tokens for t in generate(runner, [Text(p, r, bias) for p, r in zip(prompts, rows, strict=True)], 16, rng)]
    pages = rng.permutation(runner.settings.num_pages).reshape(6, -1)
    got: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if rows[i].rules:
            runner.set_rules(i, prompt, [], bias)
        logits = runner.prefill([PrefillInput(i, prompt, 0, pages[i])])
        got.append([int(runner.sample(logits, [rows[i]]).read().token_ids[0])])
    accepted = 0
    while any(len(text) < 16 for text in got):
        order = [i for i in rng.permutation(4) if len(got[i]) < 16]
        proposals = np.full((len(order), k), -1)
        for proposed, i in zip(proposals, order, strict=True):
            right = want[i][len(got[i]) : len(got[i]) + k]
            proposed[: len(right)] = right
            wrong = rng.random(k) < 0.3
            proposed[wrong] = rng.integers(-1, V, wrong.sum())
        inputs = [RowInput(i, len(prompts[i]) + len(got[i]) - 1, pages[i]) for i in order]
        sampled = [dataclasses.replace(rows[i], step=len(got[i])) for i in order]
        found = runner.sample_verified(runner.verify(inputs, proposals), sampled, proposals).read()
        for i, ids, count in zip(order, found.token_ids, found.counts, strict=True):
            got[i] += ids[:count].tolist()
            accepted += int(count) - 1
    assert accepted > 4
    assert [text[:16] for text in got] == want


def test_steps_by_slot_are_those_by_row(dense: tuple[Engine, Runner], rng: np.random.Generator) -> None:
    """The same arrays go to the device, for random rows and orders, while the sequences get more pages."""
    _, runner = dense
    sent: list[tuple[str, list[np.ndarray]]] = []
    run = runner._run

    def recorded(program: Program, *args: Any) -> Any:
        # All but the newest token and the mask of each slot, which differ.
        arrays = [np.asarray(x) for x in args if getattr(x, "dtype", None) == jnp.int32 and x.ndim == 2]
        sent.append((program.name, arrays))
        return run(program, *args)

    rows = [dataclasses.replace(row, slot=int(i)) for row, i in zip(SPECULATED, rng.permutation(6), strict=False)]
    pages = [rng.permutation(runner.settings.num_pages)[:2].tolist() for _ in rows]
    for row, some in zip(rows, pages, strict=True):
        runner.set_rules(row.slot, [1, 2], [3], {4: 1.0})
        runner.slots.place(row, some)
    runner._run = recorded  # type: ignore[method-assign]
    try:
        for step in range(1, 12):
            order = rng.permutation(len(rows))[: int(rng.integers(1, len(rows) + 1))].tolist()
            for some in pages:
                some += rng.integers(0, runner.settings.num_pages, int(rng.integers(0, 2))).tolist()
            lengths = [int(rng.integers(1, PAGE * len(pages[i]))) for i in order]
            sampled = [None if rng.random() < 0.3 else dataclasses.replace(rows[i], step=step) for i in order]
            masked = np.flatnonzero(rng.random(len(order)) < 0.5).tolist()
            masks = Masks(masked, np.full((len(masked), V // 32), -1, np.int32)) if masked else None
            sent.clear()
            inputs = [RowInput(rows[i].slot, n, pages[i]) for i, n in zip(order, lengths, strict=True)]
            runner.sample(runner.decode(inputs), sampled, masks)
            logits = runner.decode_slots([rows[i].slot for i in order], lengths, [pages[i] for i in order])
            slots = [None if row is None else row.slot for row in sampled]
            runner.sample_slots(logits, slots, [step] * len(order), masks)
            half = len(sent) // 2
            assert half == 2
            for by_row, by_slot in zip(sent[:half], sent[half:], strict=True):
                assert by_row[0] == by_slot[0]
                assert len(by_row[1]) == len(by_slot[1]) >= 1
                for a, b in zip(by_row[1], by_slot[1], strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        runner._run = run  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="pages of 4 slots do not hold"):
        runner.decode_slots([rows[0].slot], [PAGE * len(pages[0])], [pages[0]])


def test_a_preempted_text_goes_on_as_if_nothing_had_happened(
    dense: tuple[Engine, Runner], rng: np.random.Generator
) -> None:
    """Prompt and text are read again into other pages, and the rules of another slot are set from both."""
    _, runner = dense
    row, bias = dataclasses.replace(SPECULATED[3], presence=1.5), {3: 2.0}
    (text,) = generate(runner, [Text(rng.integers(0, V, 9).tolist(), row, bias)], NEW, rng)
    known = int(rng.integers(1, NEW))
    ids, slot = text.prompt + text.tokens[:known], (text.row.slot + 1) % runner.settings.max_seqs
    pages = rng.permutation(runner.settings.num_pages)[:10].tolist()
    runner.set_rules(slot, text.prompt, text.tokens[:known], bias)
    got = []
    for start in range(0, len(ids), 16):
        logits = runner.prefill([PrefillInput(slot, ids[start : start + 16], start, pages, len(ids))])
    for step in range(known, NEW):
        if step > known:
            logits = runner.decode([RowInput(slot, len(text.prompt) + step - 1, pages)])
        sampled = runner.sample(logits, [dataclasses.replace(row, slot=slot, step=step)]).read()
        got.append(int(sampled.token_ids[0]))
    assert got == text.tokens[known:]


def test_a_mask_at_each_place_binds_that_place(dense: tuple[Engine, Runner], rng: np.random.Generator) -> None:
    """One allowed token a row and position, also with rows that are not constrained beside it."""
    _, runner = dense
    only = rng.integers(0, V, (2, 4))
    masks = np.zeros((2, 4, V // 32), np.int32)
    for place, token in np.ndenumerate(only):
        masks[(*place, token // 32)] = np.uint32(1 << int(token % 32)).view(np.int32)
    pages = [range(6), range(6, 12)]
    rows = [SampleRow(0, GREEDY, 1), SampleRow(1, FULL, 1)]
    logits = runner.prefill([PrefillInput(i, [1, 2, 3], 0, pages[i]) for i in range(2)])
    runner.sample(logits, [dataclasses.replace(row, step=0) for row in rows])
    proposals = only[:, :3].copy()
    proposals[1, 1] = (proposals[1, 1] + 1) % V
    logits = runner.verify([RowInput(i, 3, pages[i]) for i in range(2)], proposals)
    found = runner.sample_verified(logits, rows, proposals, Masks(range(2), masks)).read()
    assert found.counts.tolist() == [4, 2]
    assert found.token_ids[0].tolist() == only[0].tolist()
    assert found.token_ids[1, :2].tolist() == only[1, :2].tolist()
    # A mask that allows nothing.
    masks[1, 0] = 0
    logits = runner.decode([RowInput(i, 3, pages[i]) for i in range(2)])
    sampled = runner.sample(logits, rows, Masks(range(2), masks[:, 0])).read()
    assert sampled.token_ids.tolist() == [only[0, 0], NOT_FINITE]
    # The masks of these slots bind no later step that has none, or has some for other rows.
    free = runner.sample(logits, rows).read().token_ids.tolist()
    assert runner.sample(logits, rows, Masks([1], masks[:1, 0])).read().token_ids.tolist() == [free[0], only[0, 0]]


@pytest.mark.parametrize(
    ("sampling", "of_one"), [(SamplingParams(), 1), (SamplingParams(temperature=0.8, seed=5), 1), (FULL, 4)]
)
def test_only_masks_of_masked_rows_are_sent(
    dense: tuple[Engine, Runner], rng: np.random.Generator, sampling: SamplingParams, of_one: int
) -> None:
    """Bytes that go to the device for a step grow with its masked rows: programs take 1 and 4 of them here, and those
    of rarely used variants 4."""
    _, runner = dense
    rows, mask_bytes = [SampleRow(i, sampling, 3) for i in range(4)], V // 32 * 4
    logits = runner.decode([RowInput(i, 1, [i]) for i in range(4)])
    sent: list[int] = []
    place = runner._place
    runner._place = lambda x: sent.append(x.nbytes) or place(x)  # type: ignore[func-returns-value,method-assign]

    def sampled(masked: list[int], allowed: np.ndarray) -> tuple[list[int], int]:
        sent.clear()
        tokens = runner.sample(logits, rows, Masks(masked, allowed) if masked else None).read().token_ids.tolist()
        return tokens, sum(sent)

    try:
        free, without = sampled([], np.zeros((0, V // 32), np.int32))
        for count, sent_masks in ((1, of_one), (2, 4), (4, 4)):
            masked = sorted(rng.permutation(4)[:count].tolist())
            only, allowed = rng.integers(0, V, count), np.zeros((count, V // 32), np.int32)
            for mask_W, token in zip(allowed, only.tolist(), strict=True):
                mask_W[token // 32] = np.uint32(1 << token % 32).view(np.int32)
            tokens, with_masks = sampled(masked, allowed)
            assert with_masks - without == sent_masks * mask_bytes
            want = dict(zip(masked, only.tolist(), strict=True))
            assert tokens == [want.get(i, free[i]) for i in range(4)]
    finally:
        runner._place = place  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("config", "axes"), [(DENSE, {"tensor": 4}), (MOE, {"expert": 2, "tensor": 2})], ids=["tensor", "expert"]
)
def test_sharded_equals_one_device(config: ModelConfig, axes: dict[str, int], rng: np.random.Generator) -> None:
    """tensor=4 has twice as many shards as there are key/value heads."""
    seed = int(rng.integers(2**31))
    engine, _ = make(config, seed=seed)
    _, sharded = make(config, axes, seed=seed)
    for text in generate(sharded, texts_of(rng, [GREEDY, PENALISED, FULL]), NEW, rng):
        assert text.tokens == expected(engine, text)


def test_dual_chunks_beyond_the_length_of_training(rng: np.random.Generator) -> None:
    """The queries' factor is that of the whole prompt in each of its chunks, and of the text when it goes on."""
    engine, runner = make(dataclasses.replace(DENSE, dual_chunk=DualChunk(24, 8, 24)))
    prompts = [rng.integers(0, V, n).tolist() for n in (45, 30, 9)]
    row = SampleRow(0, SamplingParams(logprobs=True), 0)
    for text in generate(runner, [Text(prompt, row) for prompt in prompts], NEW, rng):
        (completion,) = engine.generate([text.prompt], row.sampling, max_new_tokens=NEW)
        assert text.tokens == completion.token_ids
        np.testing.assert_allclose(text.logprobs, completion.logprobs, atol=2e-5)
    whole = runner.prompt_logprobs(prompts[0])
    logits = forward_logits(runner.config, runner.params, runner.mesh, np.asarray([prompts[0]]), runner.static.options)
    want = np.asarray(jax.nn.log_softmax(logits[0, :-1]))[np.arange(44), prompts[0][1:]]
    np.testing.assert_allclose(whole.logprobs, want, atol=2e-5)


compiled: list[str] = []


def test_nothing_compiles_after_compile(rng: np.random.Generator) -> None:
    """Everything that a runner can do, counted by what JAX reports of compilations; and every program is reported."""
    slim = Buckets(rows=(2,), slots=(64,), prefill=((2, 32),), prefill_slots=(128,), texts=(64,))
    _, runner = make(DENSE, buckets=slim, speculate=1)
    reports: list[tuple[str, float, int, int]] = []
    runner.compile(lambda *report: reports.append(report))
    assert sorted(name for name, *_ in reports) == sorted(runner.programs())
    assert [number for *_, number, _ in reports] == list(range(1, len(reports) + 1))
    if not compiled:
        jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append(event))
    jax.jit(lambda x: x + 1)(1.0)
    assert any("backend_compile" in event for event in compiled)
    compiled.clear()
    generate(runner, texts_of(rng, [GREEDY, TOP_K, FULL, PENALISED]), NEW, rng)
    rows = [SampleRow(0, GREEDY, 0), SampleRow(1, FULL, 0)]
    inputs = [RowInput(i, 1, [i]) for i in range(2)]
    masks = np.full((2, 2, V // 32), -1, np.int32)
    proposals = np.full((2, 1), 7)
    for some in (rows[:1], rows):
        runner.sample_verified(runner.verify(inputs[: len(some)], proposals[: len(some)]), some, proposals[: len(some)])
    runner.sample_verified(runner.verify(inputs, proposals), rows, proposals, Masks(range(2), masks)).read()
    runner.sample(runner.decode(inputs), rows, Masks([1], masks[:1, 0])).read()
    for row in rows:
        runner.slots.place(row, range(1))
    runner.sample_slots(runner.decode_slots([0, 1], [1, 1], [range(1), range(2)]), [0, None], [2, 0]).read()
    runner.clear_pages(range(70))
    runner.texts_logprobs([[1, 2], [3]])
    runner.embed([[1, 2], [3]], "mean")
    runner.update_weights(jax.tree.map(lambda x: x, runner.params))
    assert compiled == []


def test_other_weights_without_a_copy(dense: tuple[Engine, Runner], rng: np.random.Generator) -> None:
    _, runner = dense
    other, _ = make(DENSE)
    first = runner.params
    try:
        runner.update_weights(other.params)
        assert runner.params is other.params
        for text in generate(runner, texts_of(rng, [GREEDY, GREEDY]), NEW, rng):
            assert text.tokens == expected(other, text)
        wrong = jax.tree.map(lambda x: x.astype(jnp.bfloat16), first)
        with pytest.raises(ValueError, match=r"as float32 .* got bfloat16"):
            runner.update_weights(wrong)
        with pytest.raises(ValueError, match="another structure"):
            runner.update_weights({**first, "more": first["embed"]})
    finally:
        runner.update_weights(first)


def fill_with_nan(runner: Runner, pages: list[int]) -> None:
    def filled(x: jax.Array) -> jax.Array:
        values = np.array(x)
        values[pages] = np.nan
        return jax.device_put(values, x.sharding)

    runner._pages = jax.tree.map(filled, runner._pages)


def test_pages_of_a_row_that_was_not_finite_are_cleared(dense: tuple[Engine, Runner], rng: np.random.Generator) -> None:
    """NaN in a page behind the slots of a text makes its logits NaN; after `clear_pages` nothing is left of it."""
    engine, runner = dense
    pages = rng.permutation(runner.settings.num_pages)[:6].tolist()
    fill_with_nan(runner, pages)
    prompt = rng.integers(0, V, 5).tolist()
    want = expected(engine, Text(prompt, SampleRow(0, GREEDY, 0)), 2)
    got = []
    for clear in (False, True):
        if clear:
            runner.clear_pages(pages)
        first = runner.sample(runner.prefill([PrefillInput(0, prompt, 0, pages)]), [SampleRow(0, GREEDY, 0)])
        second = runner.sample(runner.decode([RowInput(0, 5, pages)]), [SampleRow(0, GREEDY, 1)])
        got.append([int(sampled.read().token_ids[0]) for sampled in (first, second)])
    assert got == [[NOT_FINITE] * 2, want]


def test_a_prompt_that_is_not_finite_spoils_no_other_of_its_step(rng: np.random.Generator) -> None:
    """Prompts share a row, and attention multiplies the values of others by zero: no NaN may be among them."""
    engine, runner = make(dataclasses.replace(DENSE, tie_word_embeddings=False))
    prompts = [rng.integers(1, V, n).tolist() for n in (7, 12, 5)]
    want = [expected(engine, Text(prompt, SampleRow(0, GREEDY, 0)), 2) for prompt in prompts]
    # The embedding of token 0 is not finite.
    table = np.array(runner.params["embed"]["weight"])
    table[0] = np.nan
    broken = {"weight": jax.device_put(table, runner.params["embed"]["weight"].sharding)}
    runner.update_weights({**runner.params, "embed": broken})
    prompts[1][int(rng.integers(12))] = 0
    pages = rng.permutation(runner.settings.num_pages)[:18].reshape(3, 6).tolist()
    rows = [SampleRow(i, GREEDY, 0) for i in range(3)]
    logits = runner.prefill([PrefillInput(i, p, 0, pages[i]) for i, p in enumerate(prompts)])
    first = runner.sample(logits, rows).read().token_ids
    logits = runner.decode([RowInput(i, len(p), pages[i]) for i, p in enumerate(prompts)])
    second = runner.sample(logits, [dataclasses.replace(row, step=1) for row in rows]).read().token_ids
    got = np.stack([first, second], axis=1).tolist()
    assert got == [want[0], [NOT_FINITE] * 2, want[2]]


def test_other_rows_do_not_see_a_row_that_is_not_finite(dense: tuple[Engine, Runner], rng: np.random.Generator) -> None:
    """Its NaN is in a page of its own, and in the state of its own slot."""
    engine, runner = dense
    prompts = [rng.integers(0, V, 5).tolist() for _ in range(2)]
    pages = rng.permutation(runner.settings.num_pages)[:12].reshape(2, 6).tolist()
    rows = [SampleRow(i, GREEDY, 0) for i in range(2)]
    got = [runner.sample(runner.prefill([PrefillInput(i, p, 0, pages[i]) for i, p in enumerate(prompts)]), rows)]
    fill_with_nan(runner, pages[0][:1])
    for step in range(1, 4):
        rows = [SampleRow(i, GREEDY, step) for i in range(2)]
        got.append(runner.sample(runner.decode([RowInput(i, 4 + step, pages[i]) for i in range(2)]), rows))
    ids = np.asarray([sampled.read().token_ids for sampled in got])
    assert (ids[1:, 0] == NOT_FINITE).all()
    assert ids[:, 1].tolist() == expected(engine, Text(prompts[1], rows[1]), 4)
    runner.clear_pages([*pages[0], *pages[1]])


def test_what_cannot_be_done_is_refused(dense: tuple[Engine, Runner]) -> None:
    engine, runner = dense
    mesh = make_mesh({"data": 2})
    with pytest.raises(InputError, match="data axis is 2, make it 1"):
        Runner(DENSE, engine.params, mesh, engine.options, V, SETTINGS)
    with pytest.raises(ValueError, match="1 pages of 4 slots do not hold 5 tokens"):
        runner.decode([RowInput(0, 4, [0])])
    with pytest.raises(ValueError, match="No prefill program takes 4 chunks of 4 tokens"):
        runner.prefill([PrefillInput(i, [1], 0, [i]) for i in range(4)])
    logits = runner.decode([RowInput(0, 3, [0])])
    with pytest.raises(ValueError, match="needs rules=True"):
        runner.sample(logits, [SampleRow(0, GREEDY, 0, presence=1.0)])
    with pytest.raises(InputError, match="Text 1 has 0 tokens"):
        runner.embed([[1], []], "mean")
    with pytest.raises(InputError, match="speculate must be in"):
        dataclasses.replace(SETTINGS, speculate=-1)


def test_sizes_of_programs() -> None:
    """Few sizes; chunks of any number and sizes have a program, as far as a step takes them."""
    settings = RunnerConfig(256, 32_768, 64, 10_000, 2048)
    buckets = Buckets.of(settings)
    assert buckets.rows == (1, 4, 16, 32, 64, 96, 128, 192, 256)
    assert buckets.slots == (1024, 4096, 16_384, 32_768)
    assert buckets.prefill == ((16, 256), (32, 384), (32, 512), (64, 768), (64, 1024), (64, 1536), (64, 2048))
    assert buckets.prefill_slots == (1024, 4096, 16_384, 32_768)
    assert [len(buckets.prefill_slots_of(t)) for _, t in buckets.prefill] == [4, 4, 4, 3, 3, 3, 3]
    for tokens in (1, 256, 257, 600, 2048):
        for chunks in range(1, min(tokens, 64) + 1):
            r, t = buckets.prefill_size(chunks, tokens)
            assert r >= chunks
            assert tokens <= t <= max(1.5 * tokens, 256 if chunks <= 16 else 384 if chunks <= 32 else 768)
    for wrong in ((1, 2049), (65, 2048)):
        with pytest.raises(ValueError, match="No prefill program takes"):
            buckets.prefill_size(*wrong)
    assert Buckets.of(settings, fewest_rows=4).rows == (4, 16, 32, 64, 96, 128, 192, 256)
    assert Buckets.of(settings, fewest_rows=4).prefill == buckets.prefill
    odd = Buckets.of(dataclasses.replace(settings, max_length=1000, page_size=48, speculate=3, max_seqs=5))
    assert odd.rows == (1, 4, 5)
    assert odd.slots == (1008,)
    assert odd.prefill[-1] == (5, 2048)
    assert odd.prefill_slots == (1056, 4128, 16_416)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling_is_given_what_its_variant_reads_and_replaces_what_it_changes(variant: Variant) -> None:
    """A plain step has no argument that is as large as the vocabulary but its logits."""
    _, runner = make(DENSE, rules=True)
    lowered = lower(Program("sample", 4, variant=variant), runner.static, runner.mesh, runner.params)
    donated = [x.donated for x in jax.tree.leaves(lowered.args_info)]
    # Logits, newest tokens; counts, prompt and bias; masks; what is packed for this step.
    rules, masks = int(variant in WITH_RULES), int(variant in WITH_MASKS)
    assert donated == [False, True, *rules * [True, False, False], *masks * [False], False]
