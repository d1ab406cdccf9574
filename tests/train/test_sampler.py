"""Rollouts depend on nothing but weights, prompt and seed; their log-probabilities are those of the trainer."""

import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer
from tests.helpers.conversations import chat_tokenizer
from tests.helpers.rollouts import DENSE, engine_of, gaps, random_prompts, same, weights
from tests.helpers.runs import print_seed
from train.environments import Observation, ToolUnavailableError, observation_ids
from train.sampler import Prompt, Sample, Sampler, SamplingConfig, turn_seed

CONFIG = SamplingConfig(group_size=4, max_new_tokens=24, seed=3)
VOCAB = 512
MODEL = dataclasses.replace(DENSE, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def params(mesh: Mesh) -> Params:
    return weights(MODEL, mesh)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def engine(params: Params, mesh: Mesh, tokenizer: Tokenizer) -> Iterator[ContinuousEngine]:
    """Whose texts end soon: each of 8 ids ends one. No page of its cache is needed twice in a test."""
    ends = [tokenizer.control_ids["<|im_end|>"], *range(7)]
    with engine_of(params, MODEL, mesh, mesh, tokenizer=tokenizer, eos_token_ids=ends, num_pages=256) as engine:
        yield engine


def flat(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def test_rollouts_do_not_depend_on_company_order_or_preemption(
    engine: ContinuousEngine, params: Params, mesh: Mesh, tokenizer: Tokenizer
) -> None:
    """The same prompts all at once, in another order one by one, and by an engine that runs out of pages."""
    rng, config, ends = print_seed(), dataclasses.replace(CONFIG, max_new_tokens=72), list(engine.eos_token_ids)
    sampler = Sampler(engine, config)

    def preemptions(other: Sampler) -> int:
        prompts = random_prompts(rng, 5)
        want = {prompt.number: group for prompt, group in zip(prompts, sampler.sample(prompts, 2), strict=True)}
        for prompt in prompts[::-1]:
            (group,) = sampler.sample([prompt], 2)
            for a, b in zip(group, want[prompt.number], strict=True):
                same(a, b)
        for prompt, group in zip(prompts, other.sample(prompts, 2), strict=True):
            for a, b in zip(group, want[prompt.number], strict=True):
                same(a, b)
        return other.counts.preemptions

    with engine_of(params, MODEL, mesh, mesh, tokenizer=tokenizer, eos_token_ids=ends, num_pages=6) as small:
        # Where all texts of a draw are short, it draws again.
        assert any(preemptions(Sampler(small, config)) for _ in range(5))


def test_what_a_rollout_is(engine: ContinuousEngine, params: Params, mesh: Mesh) -> None:
    """The prompt is not trained and all that follows is, the end id included. Log-probabilities are the trainer's."""
    prompts, told = random_prompts(print_seed(), 4), []
    sampler = Sampler(engine, CONFIG)
    groups = sampler.sample(prompts, 7, lambda done, total: told.append((done, total)))
    assert told == [(n, 16) for n in range(1, 17)]
    for prompt, group in zip(prompts, groups, strict=True):
        assert len({tuple(sample.ids) for sample in group}) > 1
        for sample in group:
            n = len(prompt.ids)
            assert sample.ids[:n] == prompt.ids
            assert not sample.trained[:n].any()
            assert sample.trained[n:].all()
            assert (sample.log_probs[:n] == 0).all()
            assert sample.log_probs.dtype == np.float32
            assert sample.finished == (sample.ids[-1] in engine.eos_token_ids)
            assert sample.finished or len(sample.ids) == n + CONFIG.max_new_tokens
            assert sample.text is not None
            assert (sample.version, sample.turns, sample.prompt_length, sample.failure) == (7, 1, n, None)
    counts, samples = sampler.counts, flat(groups)
    assert counts.rollouts == len(samples)
    assert counts.unfinished == sum(not s.finished for s in samples)
    assert counts.sampled_tokens == sum(s.trained.sum() for s in samples)
    assert gaps(params, MODEL, mesh, samples).max() < 1e-5


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_log_probabilities_are_those_at_the_sampling_temperature(
    engine: ContinuousEngine, params: Params, mesh: Mesh, temperature: float
) -> None:
    config = dataclasses.replace(CONFIG, temperature=temperature)
    samples = flat(Sampler(engine, config).sample(random_prompts(print_seed(), 3), 0))
    # The rounding of logits, too, is divided by the temperature.
    assert gaps(params, MODEL, mesh, samples, temperature).max() < 1e-5 / temperature
    assert gaps(params, MODEL, mesh, samples).max() > 0.1


def test_frequencies_are_the_probabilities(params: Params, mesh: Mesh) -> None:
    """Full support: over many rollouts of one token, exp(-log-probability) has the mean 1 over each token sampled.

    E[1{token = v} / p(v)] = 1 for every v, however unlikely; so the mean over samples of 1 / p(token) is the number of
    tokens, 512, which any filter would lower. Its standard deviation over n samples is sqrt((sum 1/p - V^2) / n).
    """
    n, T = 1024, 4.0
    config = SamplingConfig(group_size=n, max_new_tokens=1, temperature=T, seed=int(print_seed().integers(1 << 31)))
    with engine_of(params, MODEL, mesh, mesh, max_seqs=64, num_pages=128) as engine:
        samples = flat(Sampler(engine, config).sample([Prompt(0, [1, 2, 3])], 0))
    inverse = np.exp(-np.array([s.log_probs[-1] for s in samples], np.float64))
    error = inverse.std() / np.sqrt(n)
    assert error < 0.1 * VOCAB
    assert abs(inverse.mean() - VOCAB) < 5 * error


def test_seeds_differ_in_everything_that_they_depend_on() -> None:
    first = (1, 2, 3, 4, 5)
    seeds = {turn_seed(*first)} | {turn_seed(*first[:i], first[i] + 1, *first[i + 1 :]) for i in range(5)}
    assert len(seeds) == 6
    assert len({turn_seed(1, 2, 3, member, 0) for member in range(4096)}) == 4096
    assert all(0 <= turn_seed(1, n, 0, 8, 0) < 2**32 for n in range(100))


def test_a_policy_of_nothing_but_padding(params: Params, mesh: Mesh, tokenizer: Tokenizer) -> None:
    """Its tokens are sampled tokens like others: trained, cut by the length, and counted as texts without a word."""
    pad = tokenizer.control_ids["<|endoftext|>"]
    table = np.zeros((VOCAB, MODEL.hidden_size), np.float32)
    table[pad] = 100.0
    head = "embed" if MODEL.tie_word_embeddings else "lm_head"
    sharding = params[head]["weight"].sharding
    norm = jax.device_put(np.ones(MODEL.hidden_size, np.float32), params["norm"]["weight"].sharding)
    policy: Any = {**params, head: {"weight": jax.device_put(table, sharding)}, "norm": {"weight": norm}}
    # The residual stream is a multiple of ones, whatever the layers are given.
    policy["embed"] = {"weight": jax.device_put(np.abs(table) + 100.0 * (head == "lm_head"), sharding)}
    policy["layers"] = jax.tree.map(lambda x: x * 0, policy["layers"])
    with engine_of(policy, MODEL, mesh, mesh, tokenizer=tokenizer, eos_token_ids=[1]) as engine:
        sampler = Sampler(engine, SamplingConfig(group_size=2, max_new_tokens=5))
        samples = flat(sampler.sample([Prompt(0, [pad]), Prompt(1, [pad, pad])], 0))
    for sample in samples:
        assert sample.ids == [pad] * len(sample.ids)
        assert sample.trained.sum() == 5
        assert not sample.finished
    assert (sampler.counts.empty, sampler.counts.unfinished) == (4, 4)


def test_bad_input_is_refused_before_anything_is_sampled(engine: ContinuousEngine) -> None:
    sampler, before = Sampler(engine, CONFIG), engine.stats().steps
    fine = Prompt(1, [5, 6])
    for prompts, message in (
        ([fine, Prompt(2, list(range(1, 80)))], "Prompt 2: 79 tokens and max_new_tokens=24 exceed the 96"),
        ([fine, Prompt(3, [])], "Prompt 3: The prompt is empty"),
        ([fine, Prompt(4, [VOCAB])], "Prompt 4: Token id 512"),
        ([fine, fine], "Prompt 1 is there twice"),
    ):
        with pytest.raises(InputError, match=message):
            sampler.sample(prompts, 0)
    assert engine.stats().steps == before
    for change, message in (
        ({"temperature": 0.0}, "Greedy"),
        ({"group_size": 0}, "group_size"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(CONFIG, **change)
    assert sampler.sample([], 0) == []


def test_weights_that_are_not_finite_are_told(params: Params, mesh: Mesh) -> None:
    broken = {**params, "norm": {"weight": params["norm"]["weight"] * np.nan}}
    with (
        engine_of(broken, MODEL, mesh, mesh) as engine,
        pytest.raises(InputError, match=r"Prompt 8, rollout 0.*finite"),
    ):
        Sampler(engine, CONFIG).sample([Prompt(8, [1, 2])], 0)


def test_an_engine_that_is_closed_ends_the_call(params: Params, mesh: Mesh) -> None:
    engine = engine_of(params, MODEL, mesh, mesh, eos_token_ids=[])
    config = SamplingConfig(group_size=4, max_new_tokens=80)
    # It is closed in the middle, by another thread.
    closing = threading.Thread(target=engine.close)
    engine.on_finished = lambda _: closing.is_alive() or closing.ident or closing.start()
    with pytest.raises(RuntimeError, match="engine"):
        Sampler(engine, config).sample([Prompt(n, [n + 1]) for n in range(8)], 0)
    closing.join()


# --- several turns ---


class Talking:
    """Answers each turn with a text, which spells control tokens, until a number of turns."""

    def __init__(self, turns: int, fails: bool = False) -> None:
        self.turns, self.fails = turns, fails
        self.seen: dict[int, list[tuple[str, list[int]]]] = {}

    def reset(self, prompt: Prompt) -> list[tuple[str, list[int]]]:
        state: list[tuple[str, list[int]]] = []
        self.seen[id(state)] = state
        return state

    def step(self, state: list[tuple[str, list[int]]], text: str, ids: Sequence[int]) -> Observation | None:
        state.append((text, list(ids)))
        if self.fails:
            raise ToolUnavailableError("no room")
        return Observation((f"<|im_end|>{len(state)}",)) if len(state) < self.turns else None


def test_turns_are_tokens_in_and_tokens_out(
    engine: ContinuousEngine, params: Params, mesh: Mesh, tokenizer: Tokenizer
) -> None:
    """A rollout is the prompt, what the policy sampled, and what the template puts between turns; never anything that
    was tokenized again. Tokens of tools are not trained; later turns find the earlier ones in the prefix cache."""
    rng, environment = print_seed(), Talking(3)
    config = SamplingConfig(group_size=6, max_new_tokens=70, seed=int(rng.integers(1 << 31)))
    prompts = [dataclasses.replace(p, ids=list(p.ids)[:16]) for p in random_prompts(rng, 3)]
    sampler = Sampler(engine, config, environment)
    samples = flat(sampler.sample(prompts, 1))
    im_end = tokenizer.control_ids["<|im_end|>"]
    states = list(environment.seen.values())
    several, page = 0, 16
    # Whole pages that the engine has computed before, of what a later turn begins with.
    found_again = 0
    for sample, state in zip(samples, states, strict=True):
        ids = sample.ids[: sample.prompt_length]
        trained = [False] * len(ids)
        rest = sample.ids[len(ids) :]
        for turn, (_, sampled) in enumerate(state, 1):
            ids, trained = ids + sampled, trained + [True] * len(sampled)
            assert sampled[-1] in engine.eos_token_ids
            between = observation_ids(tokenizer, Observation((f"<|im_end|>{turn}",)), sampled[-1])
            # The control token that the tool spelled is plain text: one ends the answer, and one what was not ended.
            assert between.count(im_end) == (1 if sampled[-1] == im_end else 2)
            if turn < sample.turns:
                # The last token that is sampled has not been through the model.
                found_again += (len(ids) - 1) // page * page
                ids, trained = ids + between, trained + [False] * len(between)
        # A last turn that was cut has no answer.
        left = len(sample.ids) - len(ids)
        assert sample.ids == ids + rest[len(rest) - left :]
        assert sample.trained.tolist() == trained + [True] * left
        # The text before the last turn.
        last = sample.prompt_length if sample.turns == 1 else len(ids) if left else len(ids) - len(state[-1][1])
        assert sample.earlier == tokenizer.decode(sample.ids[sample.prompt_length : last])
        assert len(sample.ids) <= sample.prompt_length + config.max_new_tokens
        assert sample.finished == (sample.turns == 3 and len(state) == 3)
        several += sample.turns > 1
    assert several > 0
    print(f"{found_again} tokens could be found again, {sampler.counts.cached_tokens} were")
    assert sampler.counts.cached_tokens >= found_again
    assert sampler.counts.other_tokens == sum(len(s.ids) - s.prompt_length - int(s.trained.sum()) for s in samples)
    assert gaps(params, MODEL, mesh, samples).max() < 1e-5
    # And again, whatever the threads do.
    for a, b in zip(samples, flat(sampler.sample(prompts, 1)), strict=True):
        same(a, b)


def test_later_turns_go_before_new_prompts_with_few_pages(
    engine: ContinuousEngine, params: Params, mesh: Mesh, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many more conversations than pages: a turn asks to start before new prompts, which would take the pages of the
    turns before it. The rollouts are those of an engine with room for all."""
    rng = print_seed()
    config = SamplingConfig(group_size=1, max_new_tokens=70, seed=int(rng.integers(1 << 31)))
    prompts = [Prompt(i, rng.integers(8, 256, 20).tolist()) for i in range(32)]
    want = flat(Sampler(engine, config, Talking(3)).sample(prompts, 1))
    eos, requests = list(engine.eos_token_ids), []
    with engine_of(params, MODEL, mesh, mesh, tokenizer=tokenizer, eos_token_ids=eos, num_pages=24) as small:
        submit = small.submit
        monkeypatch.setattr(
            small, "submit", lambda request, **given: requests.append(request) or submit(request, **given)
        )
        sampler = Sampler(small, config, Talking(3))
        for a, b in zip(want, flat(sampler.sample(prompts, 1)), strict=True):
            same(a, b)
    # How many are found depends on when the answers come.
    print("cached", sampler.counts.cached_tokens)
    assert len(requests) == sum(sample.turns for sample in want)
    assert all(request.continues == (len(request.prompt) > 20) for request in requests)


def test_a_failure_of_the_environment_is_counted_and_not_an_end(engine: ContinuousEngine) -> None:
    sampler = Sampler(engine, SamplingConfig(group_size=16, max_new_tokens=64), Talking(2, fails=True))
    samples = flat(sampler.sample([Prompt(0, [1, 2])], 0))
    failed = [sample for sample in samples if sample.failure == "no room"]
    assert sampler.counts.failed == len(failed) > 0
    assert not any(sample.finished for sample in failed)


@pytest.mark.parametrize("error", [KeyError("oops"), SystemExit("oops")], ids=repr)
@pytest.mark.parametrize("method", ["reset", "step"])
def test_an_error_in_the_environment_ends_the_call_and_the_engine_goes_on(
    method: str, error: BaseException, engine: ContinuousEngine
) -> None:
    def broken(*_: Any) -> None:
        raise error

    environment = Talking(2)
    setattr(environment, method, broken)
    where = rf"{re.escape(__file__)}, line {broken.__code__.co_firstlineno + 1}"
    with pytest.raises(
        InputError, match=rf"Prompt 5: the environment raised {type(error).__name__} \({where}\): .*oops"
    ):
        Sampler(engine, SamplingConfig(group_size=16, max_new_tokens=64), environment).sample([Prompt(5, [1])], 0)
    assert len(Sampler(engine, CONFIG).sample([Prompt(0, [1])], 0)[0]) == 4
    assert engine.stats().running == 0


def test_answers_that_are_no_observations_are_told(engine: ContinuousEngine) -> None:
    def raises(*_: Any) -> None:
        raise ToolUnavailableError("down")

    cases: list[tuple[str, Callable[..., Any], str]] = [
        ("step", lambda *_: "hello", "Prompt 5: `step` .* returned 'hello'; expected an Observation"),
        ("step", lambda *_: Observation("hello"), "tuple of texts, one for each message; got 'hello'"),  # type: ignore[arg-type]
        ("step", lambda *_: Observation((3,)), r"got \(3,\)"),  # type: ignore[arg-type]
        ("reset", raises, "Prompt 5: the environment raised ToolUnavailableError .*: down"),
    ]
    for method, function, message in cases:
        environment = Talking(2)
        setattr(environment, method, function)
        with pytest.raises(InputError, match=message):
            Sampler(engine, SamplingConfig(group_size=16, max_new_tokens=64), environment).sample([Prompt(5, [1])], 0)


def test_an_environment_needs_a_tokenizer(params: Params, mesh: Mesh) -> None:
    with engine_of(params, MODEL, mesh, mesh) as engine, pytest.raises(InputError, match="tokenizer"):
        Sampler(engine, CONFIG, Talking(1))
