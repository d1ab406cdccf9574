"""The engine of many requests: a text depends on its request alone, whatever runs beside it or is cut short."""

import asyncio
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import convert
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.active import Times
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.outputs import Finished, Step
from qwen_jax.inference.proposers import DraftModel, Ngrams
from qwen_jax.inference.request import Request
from qwen_jax.inference.weights import fuse
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed
from tests.helpers.serving import until

VOCAB = 288
NO_END = Ending(frozenset(), (), 24)
SAMPLED = SamplingParams(temperature=0.9, top_k=12, top_p=0.9, repetition_penalty=1.1, seed=7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_hf_checkpoint(folder, vocab_size=VOCAB, num_key_value_heads=2, eos_token_id=None)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["hello world, hello there"] * 4, 280)


def loaded(folder: Path, axes: dict[str, int] | None = None) -> Any:
    mesh = make_mesh(axes or {}, None if axes else jax.devices()[:1])
    return *convert.load(folder, mesh, "float32", Options(stacked=False)), mesh


def make_engine(folder: Path, axes: dict[str, int] | None = None, **options: Any) -> ContinuousEngine:
    settings = {"max_seqs": 4, "max_length": 128, "page_size": 16, "num_pages": 32, "max_batched_tokens": 32}
    return ContinuousEngine(*loaded(folder, axes), dtype="float32", **{**settings, **options})


@pytest.fixture(scope="module")
def fixed(checkpoint: Path) -> Engine:
    """The loop over a fixed batch, which is compared with transformers elsewhere."""
    return Engine(*loaded(checkpoint), dtype="float32")


def expected(fixed: Engine, request: Request) -> tuple[list[int], list[float]]:
    sampling = dataclasses.replace(request.sampling, logprobs=True)
    (completion,) = fixed.generate([list(request.prompt)], sampling, max_new_tokens=request.ending.max_new_tokens)
    assert completion.logprobs is not None
    return completion.token_ids, completion.logprobs


def random_request(
    rng: np.random.Generator, shared: list[int], prompt: tuple[int, int] = (1, 60), new: tuple[int, int] = (1, 25)
) -> Request:
    """Of any length, half of them with a beginning that others have, too; greedy or sampled."""
    ids = (shared if rng.integers(2) else []) + rng.integers(0, VOCAB, rng.integers(*prompt)).tolist()
    seed = int(rng.integers(1 << 32))
    sampling = (SamplingParams(), dataclasses.replace(SAMPLED, seed=seed), SamplingParams(temperature=1.0, seed=seed))
    ending = dataclasses.replace(NO_END, max_new_tokens=int(rng.integers(*new)))
    return Request(tuple(ids), ending, sampling[int(rng.integers(3))])


@pytest.mark.draw(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_pages": 8},
        {"proposer": Ngrams(3, rows=4)},
        {"prefix_cache": False, "page_size": 32, "max_batched_tokens": 16},
    ],
    ids=["plenty of pages", "few pages", "speculation", "other sizes"],
)
def test_texts_are_those_of_the_fixed_batch(checkpoint: Path, fixed: Engine, options: dict[str, Any]) -> None:
    """Token for token and with the same log-probabilities: with random arrivals and cancellations, under preemption."""
    rng = print_seed()
    shared = rng.integers(0, VOCAB, 32).tolist()
    # Where pages run out, texts are long and come at once.
    few = options.get("num_pages") == 8
    with make_engine(checkpoint, **options) as engine:
        streams = []
        for _ in range(16):
            sizes = ((1, 20), (70, 100)) if few else ((1, 60), (1, 25))
            request = random_request(rng, [] if few else shared, *sizes)
            streams.append((request, engine.submit(request, incremental=bool(rng.integers(2)))))
            if rng.integers(4) == 0:
                streams[int(rng.integers(len(streams)))][1].cancel()
            time.sleep(0 if few else float(rng.exponential(0.02)))
        for request, stream in streams:
            got = stream.result()
            tokens, logprobs = expected(fixed, request)
            if got.finish_reason == "abort":
                tokens = tokens[: len(got.token_ids)]
            assert got.token_ids == tokens
            np.testing.assert_allclose([t.logprob for t in got.tokens], logprobs[: len(tokens)], atol=1e-4)
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert (stats.preemptions > 0) == few
        assert few or (stats.prefix_hits > 0) == options.get("prefix_cache", True)
        engine.call(engine._scheduler.check)
        engine.call(engine._pool.check)


class Counting(DraftModel):
    """A draft model that counts how many of its tokens were right."""

    def propose(self, active: Any) -> np.ndarray:
        proposals = super().propose(active)
        self.proposed = [(one, len(one.row.tokens), line) for one, line in zip(active, proposals, strict=True)]
        self.all_proposed = [*getattr(self, "all_proposed", []), *self.proposed]
        return proposals


@pytest.mark.parametrize("same", [True, False], ids=["the model itself", "another model"])
def test_a_draft_model_changes_no_text(checkpoint: Path, fixed: Engine, tmp_path: Path, same: bool) -> None:
    """Proposals of the model itself are all right; those of a smaller one with a larger vocabulary, some."""
    rng = print_seed()
    if not same:
        make_hf_checkpoint(tmp_path, seed=3, vocab_size=VOCAB + 32, num_hidden_layers=1, eos_token_id=None)
    config, params, mesh = loaded(checkpoint if same else tmp_path)
    sharding = Sharding.for_inference(config, mesh)
    with jax.set_mesh(mesh):
        fused = fuse(params, config, sharding)
    sizes: dict[str, Any] = {"vocab_limit": VOCAB, "max_length": 128, "count": 3, "rows": 4, "max_batched_tokens": 32}
    draft = Counting(config, fused, mesh, dtype="float32", page_size=16, **sizes)
    with make_engine(checkpoint, proposer=draft) as engine:
        requests = [random_request(rng, [], new=(5, 25)) for _ in range(6)]
        for request, got in zip(requests, engine.generate(requests), strict=True):
            assert got.token_ids == expected(fixed, request)[0]
        right = total = 0
        for active, at, line in draft.all_proposed:
            text = active.row.tokens[at : at + 3]
            if active.request.sampling.repetition_penalty == 1:
                right, total = right + sum(a == b for a, b in zip(text, line, strict=False)), total + len(text)
        assert right == total if same else right < total
        assert sorted(draft._free) == list(range(4))


@pytest.mark.parametrize("axes", [{"tensor": 2}], ids=str)
def test_a_mesh_gives_the_same_texts(checkpoint: Path, fixed: Engine, axes: dict[str, int]) -> None:
    rng = print_seed()
    requests = [random_request(rng, []) for _ in range(6)]
    with make_engine(checkpoint, axes) as engine:
        for request, got in zip(requests, engine.generate(requests), strict=True):
            assert got.token_ids == expected(fixed, request)[0]


def test_nothing_compiles_after_the_start(checkpoint: Path) -> None:
    rng = print_seed()
    with make_engine(checkpoint, num_pages=8) as engine:
        told: list[tuple[str, int, int]] = []
        engine.start(lambda name, seconds, n, total: told.append((name, n, total)))
        assert [n for _, n, _ in told] == list(range(1, told[0][2] + 1))
        compiled = 0

        def count(event: str, duration: float, **_: Any) -> None:
            nonlocal compiled
            compiled += event.endswith("backend_compile_duration")

        jax.monitoring.register_event_duration_secs_listener(count)
        engine.generate([random_request(rng, []) for _ in range(8)])
        assert not compiled


def test_the_steps_of_a_stream_join_to_the_text(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """In threads and in asyncio, with a stop string and without."""
    rng = print_seed()
    plain = Request(tuple(rng.integers(0, 256, 9).tolist()), dataclasses.replace(NO_END, max_new_tokens=40))
    with make_engine(checkpoint, tokenizer=tokenizer) as engine:
        whole = engine.generate([plain])[0]
        assert whole.text == tokenizer.decode(whole.token_ids, skip_special_tokens=True)
        stop = whole.text[len(whole.text) // 2 :][:3]
        stopped = dataclasses.replace(plain, ending=dataclasses.replace(plain.ending, stop=(stop,)))

        async def read(request: Request) -> list[Step]:
            return [step async for step in engine.submit(request)]

        async def both() -> list[list[Step]]:
            return list(await asyncio.gather(read(plain), read(stopped)))

        for request, steps in zip((plain, stopped), asyncio.run(both()), strict=True):
            check_steps(steps, engine.generate([request])[0])
            check_steps(list(engine.submit(request)), engine.generate([request])[0])
        last = engine.generate([stopped])[0]
        assert (last.finish_reason, last.stop) == ("stop", stop)
        assert last.text == whole.text[: whole.text.index(stop)]


def check_steps(steps: list[Step], finished: Finished) -> None:
    assert "".join(step.text for step in steps) == finished.text
    assert [token.id for step in steps for token in step.tokens] == finished.token_ids
    assert [step.finished is not None for step in steps] == [False] * (len(steps) - 1) + [True]
    last = steps[-1].finished
    assert last is not None
    assert (last.token_ids, last.text, last.finish_reason, last.stop) == (
        finished.token_ids,
        finished.text,
        finished.finish_reason,
        finished.stop,
    )


def test_scores_are_the_log_probabilities_of_generation(checkpoint: Path, fixed: Engine) -> None:
    rng = print_seed()
    requests = [random_request(rng, []) for _ in range(3)]
    with make_engine(checkpoint) as engine:
        texts = [expected(fixed, request) for request in requests]
        scores = engine.score([r.prompt for r in requests], [ids for ids, _ in texts])
        for got, (_, want) in zip(scores, texts, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)
        # Beside the text, and with the most likely tokens.
        request = dataclasses.replace(requests[0], prompt_logprobs=True, top_logprobs=5)
        finished = engine.generate([request])[0]
        infos = finished.prompt_logprobs
        assert infos is not None
        assert infos[0] is None
        assert [info.id for info in infos[1:] if info] == list(request.prompt[1:])
        assert all(len(info.top) == 5 for info in (*infos[1:], *finished.tokens) if info)
        for info in (*infos[1:], *finished.tokens):
            assert info is not None
            assert [p for _, p in info.top] == sorted((p for _, p in info.top), reverse=True)
            assert info.logprob <= info.top[0][1] + 1e-6


def test_new_weights_change_texts_that_run_and_nothing_old_is_found(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf_checkpoint(tmp_path, seed=5, vocab_size=VOCAB, num_key_value_heads=2, eos_token_id=None)
    request = Request(tuple(range(40)), dataclasses.replace(NO_END, max_new_tokens=80))
    with make_engine(tmp_path) as other:
        want = other.generate([request])[0].token_ids
    with make_engine(checkpoint) as engine:
        before = engine.generate([request])[0].token_ids
        assert before != want
        # The new weights come after a third of the text.
        decode, calls = engine._runner.decode_slots, 0

        def until_there_is_a_command(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            while calls == 27 and not engine._work:
                time.sleep(0.001)
            return decode(*args)

        monkeypatch.setattr(engine._runner, "decode_slots", until_there_is_a_command)
        new, stream = loaded(tmp_path)[1], engine.submit(request)
        while calls < 27:
            time.sleep(0.001)
        engine.update_weights(new)
        got = stream.result().token_ids
        assert got[:25] == before[:25]
        assert got != before
        assert engine.generate([request])[0].token_ids == want
        engine.update_weights(loaded(checkpoint)[1])
        again = engine.generate([request])[0]
        assert (again.token_ids, again.cached_tokens) == (before, 0)


def test_a_failure_of_the_device_ends_all_requests_with_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(checkpoint)

    def broken(*_: Any) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(engine._runner, "decode_slots", broken)
    streams = [engine.submit(Request((1, 2, 3), NO_END)) for _ in range(2)]
    for stream in streams:
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.result()
    with pytest.raises(RuntimeError, match="stopped"):
        engine.submit(Request((1, 2, 3), NO_END))
    engine.close()


def test_a_failure_before_a_request_is_queued_ends_it_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is told of finished requests may fail, too."""
    with make_engine(checkpoint) as engine:

        def broken(*_: Any) -> None:
            raise MemoryError("out of memory")

        monkeypatch.setattr(engine._runner, "prompt_logprobs", broken)
        engine.on_finished = broken
        stream = engine.submit(Request((1, 2, 3), NO_END, prompt_logprobs=True))
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.result()
        assert engine.generate([Request((1, 2, 3), NO_END)])[0].finish_reason == "length"


def test_a_request_is_cancelled_before_it_is_queued(checkpoint: Path) -> None:
    with make_engine(checkpoint) as engine:
        release = threading.Event()
        blocker = threading.Thread(target=lambda: engine.call(lambda: release.wait(10)))
        blocker.start()
        streams = [engine.submit(Request((1, 2, 3), NO_END, prompt_logprobs=reads)) for reads in (False, True)]
        for stream in streams:
            stream.cancel()
        release.set()
        assert {stream.result().finish_reason for stream in streams} <= {"abort"}
        blocker.join()
        assert engine.stats().waiting == 0


def test_a_stream_has_one_reader(checkpoint: Path) -> None:
    async def both(stream: Any) -> list[Any]:
        async def read() -> list[Step]:
            return [step async for step in stream]

        return list(await asyncio.gather(read(), read(), return_exceptions=True))

    with make_engine(checkpoint) as engine:
        found = asyncio.run(both(engine.submit(Request((1, 2, 3), dataclasses.replace(NO_END, max_new_tokens=60)))))
    failures = [one for one in found if isinstance(one, RuntimeError)]
    assert len(failures) == 1
    assert "one reader" in str(failures[0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Request((1.5, 2), NO_END),  # type: ignore[arg-type]
        lambda: Request((1,), dataclasses.replace(NO_END, eos_token_ids=frozenset([10**6]))),
        lambda: Request((1,), dataclasses.replace(NO_END, eos_token_ids=frozenset([-1]))),
        lambda: Request((1,), dataclasses.replace(NO_END, stop=("",))),
        lambda: Request((1,), dataclasses.replace(NO_END, stop="ab")),  # type: ignore[arg-type]
        lambda: Request((1,), NO_END, grammar=object()),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_refused_and_hurt_nobody(checkpoint: Path, tokenizer: Tokenizer, wrong: Any) -> None:
    with make_engine(checkpoint, tokenizer=tokenizer) as engine:
        with pytest.raises(InputError):
            engine.submit(wrong())
        assert engine.generate([Request((1, 2), NO_END)])[0].finish_reason == "length"


@pytest.mark.parametrize("top", [21, -1, 1.5, True])
def test_more_log_probabilities_than_there_are_are_refused(checkpoint: Path, top: Any) -> None:
    with make_engine(checkpoint) as engine, pytest.raises(InputError, match="top must be"):
        engine.prompt_logprobs([1, 2, 3], top)


def test_what_would_start_at_once_is_told(checkpoint: Path) -> None:
    """The places of the batch that are free, and none while the first in the queue waits for pages."""
    with make_engine(checkpoint, max_seqs=4, num_pages=8) as engine:
        assert engine.stats().free == 4
        ending = dataclasses.replace(NO_END, max_new_tokens=100)
        streams = [engine.submit(Request((1, 2, 3), ending))]
        next(iter(streams[0]))
        assert (engine.stats().running, engine.stats().free) == (1, 3)
        # Prompts that fill the pages.
        streams += [engine.submit(Request(tuple(range(90)), dataclasses.replace(NO_END, max_new_tokens=30)))]
        streams += [engine.submit(Request(tuple(range(5, 95)), dataclasses.replace(NO_END, max_new_tokens=30)))]
        for _ in streams[0]:
            if engine._scheduler.blocked:
                break
        assert engine.stats().waiting
        assert engine.stats().free == 0
        times: list[Times] = []
        engine.on_finished = times.append
        for stream in streams:
            stream.cancel()
        until(lambda: engine.stats().free == 4)
        begun = [x for x in times if x.started is not None]
        assert begun
        assert len(times) == 3
        assert all(x.submitted <= x.started <= x.finished for x in begun if x.started is not None)


def test_closing_drains_or_cancels(checkpoint: Path) -> None:
    for drain, reason in ((60.0, "length"), (0.0, "abort")):
        engine = make_engine(checkpoint)
        stream = engine.submit(Request((1, 2, 3), dataclasses.replace(NO_END, max_new_tokens=100)))
        next(stream)
        engine.close(drain)
        assert stream.result().finish_reason == reason
        assert not any(thread.name == "engine" and thread is engine._thread for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((1, VOCAB), NO_END), "out of range"),
        (Request((1,) * 120, NO_END), "exceed the 128 tokens"),
        (Request((1,), NO_END, logit_bias={VOCAB: 1.0}), "out of range"),
        (Request((1,), dataclasses.replace(NO_END, stop=("x",))), "need a tokenizer"),
        (Request((1,), NO_END, adapter="x"), "no adapter 'x'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_can_never_run_is_refused(checkpoint: Path, request_: Request, message: str) -> None:
    with make_engine(checkpoint) as engine, pytest.raises(InputError, match=message):
        engine.submit(request_)


@pytest.mark.parametrize(
    "options",
    [{"max_seqs": 0}, {"page_size": 24}, {"memory_fraction": 1.5}, {"max_batched_tokens": 0}, {"num_pages": 0}],
    ids=str,
)
def test_bad_sizes(checkpoint: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make_engine(checkpoint, **options)


def test_a_draft_model_serves_more_texts_than_it_has_places(checkpoint: Path, fixed: Engine) -> None:
    """Texts come and go, and lose their pages: places are passed on, and no text changes."""
    rng = print_seed()
    config, params, mesh = loaded(checkpoint)
    with jax.set_mesh(mesh):
        fused = fuse(params, config, Sharding.for_inference(config, mesh))
    sizes: dict[str, Any] = {"vocab_limit": VOCAB, "max_length": 128, "count": 2, "rows": 2, "max_batched_tokens": 32}
    draft = DraftModel(config, fused, mesh, dtype="float32", page_size=16, **sizes)
    with make_engine(checkpoint, num_pages=9, max_seqs=3, proposer=draft) as engine:
        requests = [random_request(rng, [], (1, 20), (85, 90)) for _ in range(6)]
        for request, got in zip(requests, engine.generate(requests), strict=True):
            assert got.token_ids == expected(fixed, request)[0]
        assert engine.stats().preemptions
        assert sorted(draft._free) == [0, 1]
