"""Engines in two processes: texts are those of one process. The processes change weights together and end together."""

import dataclasses
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import convert
from convert.huggingface import export
from qwen_jax.attention.sparse import PooledBlocks, summarise
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine, Ending, Engine, Request, SamplingParams
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.inference.runner_state import RunnerState
from qwen_jax.inference.stream import Stream
from qwen_jax.options import Options
from qwen_jax.parallel.multihost import gather_from_processes
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import Params, init_params
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.processes import run
from tests.helpers.runs import print_seed

VOCAB = 288
CHOICES = ["hello world", "hello there"]


def loaded(folder: Path, axes: dict[str, int]) -> Any:
    mesh = make_mesh(axes, None if axes else jax.devices()[:1])
    return *convert.load(folder, mesh, "float32", Options(stacked=False)), mesh


def make_engine(folder: Path, axes: dict[str, int]) -> ContinuousEngine:
    sizes: dict[str, Any] = {"max_seqs": 4, "max_length": 128, "page_size": 16, "max_batched_tokens": 32}
    tokenizer = train_bpe(["hello world, hello there"] * 4, 280)
    some = {"tokenizer": tokenizer, "eos_token_ids": []}
    return ContinuousEngine(*loaded(folder, axes), dtype="float32", **sizes, **some)


def cancelled(engine: ContinuousEngine, request: Request) -> tuple[str, int, int]:
    """Cancels a request after its fourth token: why it ended, its tokens, and the requests that still run."""
    streams: list[Stream] = []
    run = engine._steps.run

    def step() -> None:
        run()
        if engine._steps.output_tokens == before + 4:
            streams[0].cancel()

    def submit() -> None:
        engine._steps.run = step  # type: ignore[method-assign]
        streams.append(engine.submit(request))

    before = engine.stats().output_tokens
    engine.call(submit)
    finished = streams[0].result()
    engine._steps.run = run  # type: ignore[method-assign]
    return finished.finish_reason, len(finished.token_ids), engine.stats().running


def results(folder: Path, other: Path, requests: list[Request], axes: dict[str, int]) -> dict[str, Any] | None:
    """What an engine gives for requests, with two sets of weights; None in a process that does not lead."""
    found: dict[str, Any] = {}
    with make_engine(folder, axes) as engine:
        if engine.leads:
            found["first"] = [(one.token_ids, [t.logprob for t in one.tokens]) for one in engine.generate(requests)]
            grammar = engine.grammars and engine.grammars.choice(CHOICES)
            chosen = [
                dataclasses.replace(requests[i], grammar=grammar, ending=Ending(frozenset(), (), 32)) for i in (0, 1)
            ]
            found["chosen"] = [one.text for one in engine.generate(chosen)]
            found["cancelled"] = cancelled(engine, dataclasses.replace(requests[0], ending=Ending(frozenset(), (), 60)))
            prompts = [list(request.prompt) for request in requests[:2]]
            found["scores"] = engine.score(prompts, prompts[::-1])
            found["embedded"] = engine.embed(prompts)
        else:
            with pytest.raises(RuntimeError, match="process 0 gives the engine its requests"):
                engine.submit(requests[0])
        _, params, _ = loaded(other, axes)
        engine.update_weights(params)
        if engine.leads:
            found["second"] = [(one.token_ids, [t.logprob for t in one.tokens]) for one in engine.generate(requests)]
    return found or None


def read_sparsely(folder: Path, axes: dict[str, int]) -> list[list[int]]:
    """Texts after long prompts that are read by sparse attention, whose threshold leaves no key out."""
    some: dict[str, Any] = {"prefill_chunk": 128, "sparse": PooledBlocks(threshold=0.0, last=64), "sparse_from": 1}
    engine = Engine(*loaded(folder, axes), dtype="float32", eos_token_ids=[], **some)
    prompts = [[(7 * i * i + 3 * j) % 270 for i in range(300 - 90 * j)] for j in range(2)]
    found = engine.generate(prompts, SamplingParams(temperature=0), max_new_tokens=3)
    recall_LH, density, cut = summarise(engine.skipped)
    np.testing.assert_allclose(recall_LH, 1.0, atol=1e-4)
    assert (round(density, 4), cut) == (1, 0)
    return [one.token_ids for one in found]


def in_two(*args: Any) -> Any:
    """In each of two processes: what engines give, and what the failure of one is for the other process."""
    folder, other, requests, axes = args
    found = results(*args)
    sparse = read_sparsely(folder, axes)
    engine = make_engine(folder, axes)
    (_, first, _), (_, second, _) = loaded(other, axes), loaded(other, axes)

    def fail(*_: Any) -> None:
        raise ValueError("the reason")

    def check_texts() -> None:
        assert found is not None
        assert [one.token_ids for one in engine.generate(requests)] == [ids for ids, _ in found["first"]]

    def fails_in_process_1(params: Params) -> None:
        with pytest.raises(InputError, match="Updating the weights failed in process 1"):
            engine.update_weights(params)

    # Weights for which one process does not come in time. Its patience is set before process 0 begins, and after it.
    patience, engine.patience = engine.patience, 0.5
    gather_from_processes(0)
    if engine.leads:
        fails_in_process_1(first)
    else:
        while not engine._missed:
            time.sleep(0.05)
    engine.patience = patience
    gather_from_processes(0)
    # Weights that one process cannot take, and weights of process 0 alone.
    if engine.leads:
        check_texts()
        for params in (first, second):
            fails_in_process_1(params)
            check_texts()
        # A program that the other process has run and this one has not: who called it goes on, the engine does not.
        engine._runner._run = fail  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="the reason"):
            engine.call(lambda: engine._runner.clear_pages([0]))
        engine._thread.join()
        with pytest.raises(RuntimeError, match="the reason"):
            engine.stats()
    else:
        with pytest.raises(RuntimeError, match="comes too late"):
            engine.update_weights(first)
        take, engine._runner.update_weights = engine._runner.update_weights, fail  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="the reason"):
            engine.update_weights(first)
        engine._runner.update_weights = take  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="failed in process 0: ValueError: the reason"):
            engine.close()
    with pytest.raises(InputError, match="the data axis is 2"):
        make_engine(folder, {"data": 2})
    return found, sparse


def test_logits_are_freed_before_the_next_ones_take_memory() -> None:
    """In a process that repeats programs, as in process 0; programs between two of them get the newest."""
    runner, logits = object.__new__(RunnerState), list[weakref.ref[jax.Array]]()

    def apply(program: Program, *_: np.ndarray, read: jax.Array | None) -> jax.Array | None:
        if program.kind != "decode":
            assert read is logits[-1]()
            return None
        assert all(one() is None for one in logits)
        found = jax.numpy.zeros(4)
        logits.append(weakref.ref(found))
        return found

    runner._read, runner.apply = None, apply  # type: ignore[method-assign]
    for kind in ("decode", "clear", "sample", "decode", "sample"):
        runner.repeat(Program(kind), [])
    assert len(logits) == 2


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Tokens, log-probabilities, grammars, scores and embeddings, before and after other weights."""
    rng = print_seed()
    folders = tmp_path / "first", tmp_path / "second"
    # Large weights: few tokens are nearly as likely as others.
    config = dataclasses.replace(published("tiny"), vocab_size=VOCAB, num_layers=1, initializer_range=0.3)
    mesh = make_mesh({}, jax.devices()[:1])
    for folder in folders:
        with jax.set_mesh(mesh):
            export(init_params(config, jax.random.key(int(rng.integers(2**31))), mesh), config, folder)
    requests = []
    for i in range(4):
        sampling = SamplingParams() if i % 2 else SamplingParams(1.0, seed=int(rng.integers(1 << 32)))
        ending = Ending(frozenset(), (), int(rng.integers(1, 12)))
        more: dict[str, Any] = {"presence_penalty": 0.5, "logit_bias": {3: -1.0}} if i == 2 else {"top_logprobs": i}
        requests.append(Request(tuple(rng.integers(0, 270, rng.integers(1, 60)).tolist()), ending, sampling, **more))
    want = results(*folders, requests, {})
    (got, sparse), (nothing, same) = run(in_two, *folders, requests, {"tensor": 2}, processes=2)
    assert want is not None
    assert nothing is None
    assert sparse == same
    for name in ("first", "second"):
        assert [ids for ids, _ in got[name]] == [ids for ids, _ in want[name]]
        for (_, a), (_, b) in zip(got[name], want[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert got["chosen"] == want["chosen"]
    assert set(got["chosen"]) <= set(CHOICES)
    assert got["cancelled"] == want["cancelled"] == ("abort", 4, 0)
    for name in ("scores", "embedded"):
        for a, b in zip(got[name], want[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
