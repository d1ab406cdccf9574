"""The generator in this process: its answers are those of the server and of the engine; it never blocks its loop."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_jax.cli.synthesize import load_engine
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.request import Request as EngineRequest
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.settings import GenerationDefaults
from qwen_jax.serving.app import create_app
from qwen_jax.serving.settings import ServerSettings, Service
from qwen_jax.tokenizer.control import TURN_END
from tests.helpers.fake_engine import FakeEngine, defaults
from tests.helpers.runs import print_seed
from tests.helpers.scripted import edit_json, make_words
from tests.helpers.scripted_server import scripted_server
from tests.helpers.serving import run
from train.synthesize.engine_generator import EngineGenerator, open_generator
from train.synthesize.generator import Answer, GeneratorDownError, Request
from train.synthesize.openai_client import OpenAIGenerator

CONCURRENCY = 4
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ContinuousEngine, GenerationDefaults]]:
    """A checkpoint as the command loads it."""
    folder = make_words(tmp_path_factory.mktemp("model"))
    edit_json(folder / "generation_config.json", do_sample=True, top_k=20, repetition_penalty=1.05)
    edit_json(folder / "config.json", max_position_embeddings=128)
    engine, found = load_engine(str(folder), CONCURRENCY)
    yield engine, found
    engine.close()


def ask(generator: Any, *requests: Request) -> list[Answer]:
    async def together() -> list[Answer]:
        return list(await asyncio.gather(*map(generator.ask, requests)))

    answers: list[Answer] = run(together())
    return answers


def drawn(count: int) -> list[Request]:
    """Requests with fresh texts, seeds and lengths: some end, some are cut, some are too long."""
    rng, words = print_seed(), "hello world there user assistant".split()
    made = []
    for _ in range(count):
        text = " ".join(rng.choice(words, int(rng.integers(1, 60))))
        made.append(
            Request(
                [{"role": "system", "content": "hello"}, {"role": "user", "content": text}],
                max_tokens=int(rng.integers(1, 30)),
                temperature=float(rng.choice([0.0, 0.7, 1.5])),
                top_p=float(rng.choice([0.8, 1.0])),
                seed=int(rng.integers(2**31)),
                stop=tuple(rng.choice(list("aeiou "), int(rng.integers(3)), replace=False).tolist()),
            )
        )
    return made


def test_answers_are_those_of_the_server_and_of_the_engine(
    loaded: tuple[ContinuousEngine, GenerationDefaults],
) -> None:
    """Text, end, counts and refusals, whatever runs beside a request."""
    engine, found = loaded
    with_schema = Request([{"role": "user", "content": "hello"}], 40, 1.0, 1.0, 5, (), SCHEMA)
    wrong = [
        Request([{"role": "user", "content": "hello " * 200}]),
        Request([{"role": "user", "content": "hello"}], max_tokens=10_000),
        Request([{"role": "nobody", "content": "hello"}]),
        Request([{"role": "user", "content": "hello"}], temperature=9.0),
    ]
    requests = [*drawn(10), with_schema, *wrong]
    generator = EngineGenerator(engine, "m", CONCURRENCY, defaults=found)
    answers = ask(generator, *requests)
    assert sum(answer.refused is None for answer in answers) >= 8
    # The server, one after the other.
    client = TestClient(create_app(Service(engine, found), ServerSettings(served_names=("m",))))
    for request, answer in zip(requests, answers, strict=True):
        body = {
            "model": "m",
            "messages": request.messages,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop": list(request.stop),
        }
        if request.schema:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": request.schema}}
            body["response_format"] = form
        response = client.post("/v1/chat/completions", json=body)
        reply = response.json()
        if answer.refused is not None:
            assert response.status_code == 400
            assert reply["error"]["message"] == answer.refused
            continue
        choice, usage = reply["choices"][0], reply["usage"]
        expected = choice["message"]["content"], choice["finish_reason"]
        assert (answer.text, answer.finish) == expected
        assert (answer.prompt_tokens, answer.tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert [answer.refused is None for answer in answers[-4:]] == [False] * 4
    answer = answers[10]
    assert answer.finish == "length" or json.loads(answer.text)["a"] in (1, 22)
    # The engine itself, all together.
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    turn_end = tokenizer.token_to_id(TURN_END)
    assert turn_end is not None
    good = [(r, a) for r, a in zip(requests, answers, strict=True) if a.refused is None and r.schema is None]
    own = []
    for request, _ in good:
        params = SamplingParams(request.temperature, 20, request.top_p, repetition_penalty=1.05, seed=request.seed)
        ends = frozenset({*engine.eos_token_ids, turn_end})
        prompt = tokenizer.encode_chat([dict(m) for m in request.messages], add_generation_prompt=True)
        own.append(EngineRequest(tuple(prompt), Ending(ends, tuple(request.stop), request.max_tokens), params))
    for (_, answer), finished in zip(good, engine.generate(own), strict=True):
        assert answer.text == finished.text
        assert answer.finish == finished.finish_reason
        assert answer.tokens == len(finished.token_ids)
    counts = generator.counts()
    assert counts["requests"] == len(requests) == counts["answers"] + counts["refused"]
    assert counts["tokens"] == sum(answer.tokens for answer in answers)


def test_the_loop_goes_on_and_no_more_are_open_than_may_be() -> None:
    engine = FakeEngine("a" * 20, delay=0.005)
    generator = EngineGenerator(engine, "fake", 3, defaults=defaults())
    requests = [Request([{"role": "user", "content": f"{i}"}], seed=i) for i in range(9)]

    async def watched() -> tuple[int, int]:
        asking = asyncio.gather(*map(generator.ask, requests))
        most = ticks = 0
        while not asking.done():
            most, ticks = max(most, len(engine.running)), ticks + 1
            await asyncio.sleep(0.001)
        assert {answer.text for answer in await asking} == {"a" * 20}
        await generator.close()
        return most, ticks

    most, ticks = run(watched())
    assert most == 3
    assert ticks > 30
    assert sorted(request.sampling.seed for request in engine.requests) == list(range(9))
    assert engine.closed


def test_a_request_that_fails_is_refused_and_an_engine_that_stops_is_down() -> None:
    request = Request([{"role": "user", "content": "hello"}])
    failing = EngineGenerator(FakeEngine("abcdef", fail_after=2), "fake", 2)
    assert ask(failing, request)[0].refused == "The logits are not finite."
    engine = FakeEngine()
    generator = EngineGenerator(engine, "fake", 2)
    assert ask(generator, request)[0].text == "Hello."
    engine.dead = True
    with pytest.raises(GeneratorDownError, match="engine is dead"):
        ask(generator, request)


def test_a_request_that_is_cancelled_leaves_the_engine() -> None:
    engine = FakeEngine("a" * 1000, delay=0.01)
    generator = EngineGenerator(engine, "fake", 2)

    async def cancelled() -> None:
        asking = asyncio.ensure_future(generator.ask(Request([{"role": "user", "content": "hello"}])))
        while not engine.running:
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert not engine.running

    run(cancelled())


def test_wrong_engines_are_refused_at_once() -> None:
    engine = FakeEngine()
    with pytest.raises(InputError, match="concurrency"):
        EngineGenerator(engine, "fake", 0)
    engine.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        EngineGenerator(engine, "fake")


def test_a_text_names_a_generator() -> None:
    asked = []

    def load(name: str, max_seqs: int) -> tuple[FakeEngine, GenerationDefaults]:
        asked.append((name, max_seqs))
        return FakeEngine(), defaults()

    generator: Any = open_generator("a/folder", load=load, concurrency=5, give_up_after=9.0, prices=(1.0, 2.0))
    assert isinstance(generator, EngineGenerator)
    assert (generator.model, generator.concurrency, generator.prices) == ("a/folder", 5, (1.0, 2.0))
    assert asked == [("a/folder", 5)]
    ask(generator, Request([{"role": "user", "content": "hello"}]))
    counts = generator.counts()
    assert counts["cost"] == (counts["prompt_tokens"] + 2 * counts["tokens"]) / 1e6 > 0
    named = open_generator("a/folder", load=load, model="mine")
    assert named.model == "mine"
    with pytest.raises(InputError, match="no URL"):
        open_generator("a/folder")
    with scripted_server(lambda body: "text") as server:
        generator = open_generator(server.url, load=load, concurrency=6, give_up_after=9.0, key="")
        assert isinstance(generator, OpenAIGenerator)
        assert (generator.model, generator.concurrency) == ("scripted", 6)
        assert ask(generator, Request([{"role": "user", "content": "hello"}]))[0].text == "text"
