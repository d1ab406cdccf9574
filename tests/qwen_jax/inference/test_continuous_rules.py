"""Requests with rules in the engine of many requests: grammars, minimum lengths, penalties and biases."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference import SamplingParams, masks, matching
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.matching import Matcher
from qwen_jax.inference.proposers import Ngrams
from qwen_jax.inference.request import Request
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed
from tests.qwen_jax.inference.test_continuous import NO_END, loaded

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"type": "integer", "minimum": 0, "maximum": 9999},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["size", "colour", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(['{"size": 12, "colour": "red", "tags": [true, false]}'] * 4, 290)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_hf_checkpoint(folder, vocab_size=304, num_key_value_heads=2, eos_token_id=None)
    return folder


def make_engine(folder: Path, tokenizer: Tokenizer, **options: Any) -> ContinuousEngine:
    settings = {"max_seqs": 8, "max_length": 256, "page_size": 16, "num_pages": 64, "max_batched_tokens": 64}
    return ContinuousEngine(*loaded(folder), tokenizer=tokenizer, dtype="float32", **{**settings, **options})


def prompts(rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
    return [tuple(rng.integers(0, 256, rng.integers(1, 20)).tolist()) for _ in range(count)]


def test_constrained_texts_are_valid_and_leave_the_others_alone(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Constrained and free requests in one batch; with speculation too, the texts of both are the same."""
    pytest.importorskip("llguidance")
    rng = print_seed()
    ending = Ending(frozenset([tokenizer.eos_id]), (), 120)
    free = [
        Request(prompt, dataclasses.replace(NO_END, max_new_tokens=40), SamplingParams(temperature=1.0, seed=i))
        for i, prompt in enumerate(prompts(rng, 4))
    ]
    with make_engine(checkpoint, tokenizer) as engine:
        alone = [finished.token_ids for finished in engine.generate(free)]
    # JSON may have any white space, and a model that knows nothing writes nothing else.
    spaces = [i for i in range(tokenizer.vocab_size) if set(tokenizer.decode([i])) & set(" \n\r\t")]
    results = []
    for proposer in (None, Ngrams(3, rows=8)):
        with make_engine(checkpoint, tokenizer, proposer=proposer) as engine:
            assert engine.grammars is not None
            grammars = [
                engine.grammars.json_schema(SCHEMA),
                engine.grammars.choice(["yes", "no", "not now"]),
                engine.grammars.regex(r"[a-f]{3}-[0-9]{2,4}"),
            ]
            constrained = [
                Request(
                    prompt,
                    ending,
                    SamplingParams(temperature=1.0, top_k=k, seed=i),
                    grammar=grammars[i % 3],
                    logit_bias=dict.fromkeys(spaces, -100.0) if i % 3 == 0 else {},
                )
                for i, (prompt, k) in enumerate(
                    zip(prompts(np.random.default_rng(0), 9), [0, 0, 0, 20] * 3, strict=False)
                )
            ]
            mixed = [request for pair in zip(constrained, free, strict=False) for request in pair]
            found = engine.generate([*mixed, *constrained[4:]])
            results.append([(finished.token_ids, finished.finish_reason) for finished in found])
            assert [finished.token_ids for finished in found[1:8:2]] == alone
            texts = [finished.text for finished in (*found[:8:2], *found[8:])]
            for i, text in enumerate(texts):
                assert text is not None
                if i % 3 == 0:
                    value = json.loads(text)
                    assert 0 <= value["size"] <= 9999
                    assert value["colour"] in ("red", "green", "blue")
                    assert 1 <= len(value["tags"]) <= 3
                elif i % 3 == 1:
                    assert text in ("yes", "no", "not now")
                else:
                    head, tail = text.split("-")
                    assert len(head) == 3
                    assert set(head) <= set("abcdef")
                    assert 2 <= len(tail) <= 4
                    assert tail.isdigit()
    assert results[0] == results[1]


def test_an_end_id_waits_for_the_least_length(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """The end ids are not sampled before; then the text may end. Nearly all ids end it, so it does at once."""
    rng = print_seed()
    ends = frozenset(range(8, 290))
    for least in (0, 7):
        with make_engine(checkpoint, tokenizer) as engine:
            request = Request(
                prompts(rng, 1)[0], Ending(ends, (), 60), SamplingParams(temperature=1.0), min_tokens=least
            )
            finished = engine.generate(
                [dataclasses.replace(request, sampling=SamplingParams(temperature=1.0, seed=s)) for s in range(8)]
            )
        for text in finished:
            assert all(token < 8 for token in text.token_ids[:least])
            assert len(text.token_ids) >= max(least, 1)
            assert text.finish_reason == "stop"
            assert text.stop == text.token_ids[-1]


def test_least_lengths_hold_back_a_grammars_end_and_stop_strings(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Also the end id that `Ending` does not name, and a stop string that the first tokens write; as in vLLM."""
    pytest.importorskip("llguidance")
    rng = print_seed()
    least, prompt = 9, prompts(rng, 1)[0]
    with make_engine(checkpoint, tokenizer) as engine:
        assert engine.grammars is not None
        a, end = tokenizer.encode("a")[0], tokenizer.eos_id
        # The end id is the likeliest where it is allowed, and "a" otherwise.
        bias = {end: 100.0, a: 60.0}
        request = Request(prompt, Ending(frozenset(), ("aa",), 40), logit_bias=bias, min_tokens=least)
        (without,) = engine.generate([dataclasses.replace(request, ending=Ending(frozenset([end]), (), 40))])
        assert without.token_ids == [a] * least + [end]
        grammar = engine.grammars.regex("a+")
        for stop in ((), ("aa",)):
            asked = dataclasses.replace(request, ending=Ending(frozenset(), stop, 40), grammar=grammar)
            (found,) = engine.generate([asked])
            assert (found.token_ids, found.text, found.finish_reason) == ([a] * least + [end], "a" * least, "stop")
        # Without an end, the stop string ends the text with the first token after the least length.
        (found,) = engine.generate([dataclasses.replace(request, logit_bias={a: 100.0})])
        assert (len(found.token_ids), found.text, found.stop) == (least + 1, "a" * (least - 1), "aa")
        # What a grammar completes ends, whatever the least length.
        (found,) = engine.generate([dataclasses.replace(request, grammar=engine.grammars.regex("a{3}"))])
        assert (found.text, found.finish_reason) == ("aaa", "stop")


@pytest.mark.parametrize("speculative", [False, True])
def test_an_ambiguous_grammar_ends_its_request_alone(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, speculative: bool
) -> None:
    """A text's masks have a budget of processor time; the others in the batch are as without it."""
    pytest.importorskip("llguidance")
    rng = print_seed()
    monkeypatch.setattr(matching, "BURST_SECONDS", 0.05)
    monkeypatch.setattr(matching, "TOKEN_SECONDS", 1e-3)
    ending = dataclasses.replace(NO_END, max_new_tokens=120)
    proposer = Ngrams(3, rows=8) if speculative else None
    with make_engine(checkpoint, tokenizer, proposer=proposer) as engine:
        assert engine.grammars is not None
        free = [Request(prompt, ending) for prompt in prompts(rng, 2)]
        grammars = [engine.grammars.regex("[a-z ]*"), engine.grammars.json_object()]
        ruled = [Request(prompts(rng, 1)[0], ending, grammar=grammar) for grammar in grammars]
        want = [finished.token_ids for finished in engine.generate([*free, *ruled])]
        ambiguous = engine.grammars.ebnf('start: e\ne: e e e | e e | "a" | "b"')
        # Also masks that take no time are made in threads here.
        monkeypatch.setattr(masks, "_WORTH_THREADS", -1.0)
        bad = [Request(prompt, ending, grammar=ambiguous, min_tokens=120) for prompt in prompts(rng, 2)]
        found = engine.generate([*bad, *free, *ruled])
        for one in found[:2]:
            assert one.finish_reason == "error"
            assert one.error is not None
            assert "too much work" in one.error or "Too many items" in one.error
            assert len(one.token_ids) < 120
        assert [finished.token_ids for finished in found[2:]] == want


def test_penalties_and_biases_change_texts_as_their_formulas_say(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """A token with a bias of -100 never comes, one with 100 always does; a frequency penalty forbids repetition."""
    rng = print_seed()
    prompt, ending = prompts(rng, 1)[0], dataclasses.replace(NO_END, max_new_tokens=60)
    with make_engine(checkpoint, tokenizer) as engine:
        plain = engine.generate([Request(prompt, ending)])[0].token_ids
        often = max(set(plain), key=plain.count)
        wanted = int(rng.integers(0, 290))
        requests = [
            Request(prompt, ending, logit_bias={often: -100.0}),
            Request(prompt, ending, logit_bias={wanted: 100.0}),
            Request(prompt, ending, frequency_penalty=2.0, presence_penalty=2.0),
        ]
        without, only, varied = (finished.token_ids for finished in engine.generate(requests))
    assert often not in without
    assert set(only) == {wanted}
    assert max(varied.count(i) for i in varied) <= max(plain.count(i) for i in plain)
    assert len(set(varied)) >= len(set(plain))


def test_logits_that_are_not_finite_end_one_request_and_no_other(checkpoint: Path, tmp_path: Path) -> None:
    """One token's embedding is NaN: requests that read it end with an error, also after the pages were reused."""
    model = make_hf_checkpoint(tmp_path, vocab_size=304, num_key_value_heads=2, eos_token_id=None, tie=False)
    model.model.embed_tokens.weight.data[7] = float("nan")
    model.save_pretrained(tmp_path)
    rng = print_seed()
    good = [
        Request(
            tuple(rng.integers(8, 256, 12).tolist()),
            dataclasses.replace(NO_END, max_new_tokens=20),
            logit_bias={7: -100.0},
        )
        for _ in range(4)
    ]
    settings: dict[str, Any] = {
        "max_seqs": 4,
        "max_length": 64,
        "page_size": 16,
        "num_pages": 12,
        "max_batched_tokens": 64,
    }
    with ContinuousEngine(*loaded(tmp_path), dtype="float32", **settings) as engine:
        want = [finished.token_ids for finished in engine.generate(good)]
        bad = [dataclasses.replace(request, prompt=(*request.prompt[:5], 7, *request.prompt[5:])) for request in good]
        for _ in range(3):
            found = engine.generate([request for pair in zip(bad, good, strict=True) for request in pair])
            assert [finished.finish_reason for finished in found[::2]] == ["error"] * 4
            assert "not finite" in (found[0].error or "")
            assert [finished.token_ids for finished in found[1::2]] == want


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("where", ["fill", "accept"])
def test_a_grammar_that_fails_in_the_middle_ends_its_request_alone(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, speculative: bool, where: str
) -> None:
    pytest.importorskip("llguidance")
    rng = print_seed()
    ending = dataclasses.replace(NO_END, max_new_tokens=30)
    proposer = Ngrams(3, rows=8) if speculative else None
    with make_engine(checkpoint, tokenizer, proposer=proposer) as engine:
        assert engine.grammars is not None
        free = [Request(prompt, ending) for prompt in prompts(rng, 3)]
        want = [finished.token_ids for finished in engine.generate(free)]
        original, calls = getattr(Matcher, where), 0

        def failing(matcher: Matcher, *args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 4:
                raise InputError("the grammar is too much work")
            original(matcher, *args)

        monkeypatch.setattr(Matcher, where, failing)
        request = Request(prompts(rng, 1)[0], ending, grammar=engine.grammars.regex("[a-z]{30,}"))
        failed, *others = engine.generate([request, *free])
        assert (failed.finish_reason, failed.error) == ("error", "the grammar is too much work")
        assert [finished.token_ids for finished in others] == want
        monkeypatch.undo()
        assert engine.generate([request])[0].finish_reason == "length"
        engine.call(engine._scheduler.check)
        assert engine.stats().running == 0


def test_masks_are_made_while_the_model_is_started(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode program that is started only when the masks of its step have been made is started, and changes no text.

    Without masks, a step does not begin with reading the one before it."""
    pytest.importorskip("llguidance")
    rng = print_seed()
    ending = dataclasses.replace(NO_END, max_new_tokens=24)
    with make_engine(checkpoint, tokenizer) as engine:
        assert engine.grammars is not None
        grammar = engine.grammars.regex("[a-z]{40}")
        of_grammar = [Request(prompt, ending, grammar=grammar) for prompt in prompts(rng, 3)]
        free = [Request(prompt, ending) for prompt in prompts(rng, 2)]
        want = [finished.token_ids for finished in engine.generate([*of_grammar, *free])]

        made, waited = threading.Event(), 0
        make: Any = engine._steps._masks.make
        decode: Any = engine._runner.decode_slots

        def make_and_tell(*args: Any) -> Any:
            found = make(*args)
            made.set()
            return found

        def decode_after_masks(*args: Any, packed: Any = None) -> Any:
            def begin_and_wait() -> None:
                nonlocal waited
                made.clear()
                packed()
                assert made.wait(60)
                waited += 1

            return decode(*args) if packed is None else decode(*args, packed=begin_and_wait)

        monkeypatch.setattr(engine._steps._masks, "make", make_and_tell)
        monkeypatch.setattr(engine._runner, "decode_slots", decode_after_masks)
        assert [finished.token_ids for finished in engine.generate([*of_grammar, *free])] == want
        assert waited >= 20
        before = waited
        assert [finished.token_ids for finished in engine.generate(free)] == want[3:]
        assert waited == before


@pytest.mark.parametrize("where", ["masks", "model"])
def test_a_failure_in_either_thread_ends_all_requests_with_it(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pytest.importorskip("llguidance")
    rng = print_seed()
    ending = dataclasses.replace(NO_END, max_new_tokens=24)
    engine = make_engine(checkpoint, tokenizer)
    assert engine.grammars is not None
    request = Request(prompts(rng, 1)[0], ending, grammar=engine.grammars.regex("[a-z]{40}"))
    owner: Any = engine._steps._masks if where == "masks" else engine._runner
    name = "make" if where == "masks" else "_forward"
    original, left = getattr(owner, name), int(rng.integers(1, 10))

    def broken(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError("out of memory")
        return original(*args)

    monkeypatch.setattr(owner, name, broken)
    streams = [engine.submit(one) for one in (request, Request(prompts(rng, 1)[0], ending))]
    for stream in streams:
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.result()
    engine.close()
