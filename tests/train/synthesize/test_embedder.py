"""Embeddings: those of a server and of an engine in this process, with the retries of the client, and cosines."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.fake_engine import FakeEngine, defaults
from tests.helpers.runs import print_seed
from tests.helpers.scripted_server import Fault, scripted_server
from train.synthesize.embedder import Embedder, cosine, packed, unpacked
from train.synthesize.engine_generator import EngineGenerator
from train.synthesize.openai_client import OpenAIGenerator


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def embedded(url: str, *texts: str) -> list[Any]:
    async def run() -> list[Any]:
        clock = Clock()
        generator = OpenAIGenerator(url, "scripted", sleep=clock.sleep, clock=clock)
        assert isinstance(generator, Embedder)
        try:
            return await asyncio.gather(*map(generator.embed, texts))
        finally:
            await generator.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def reply(vector: Any) -> Fault:
    return Fault(body=json.dumps({"object": "list", "data": [{"index": 0, "embedding": vector}]}).encode())


def test_vectors_of_a_server_come_through_faults_that_pass() -> None:
    faults = iter(
        [Fault(503), Fault(429), Fault(drop="before"), Fault(body=b"{"), reply(["a"]), reply([]), reply(None)]
    )
    with scripted_server(lambda body: next(faults, None) or reply([len(body["input"]), 0.5])) as server:
        assert embedded(server.url, "abc") == [[3.0, 0.5]]
        assert len({one.key for one in server.received}) == 1
        assert len(server.received) == 8
    with scripted_server(lambda body: Fault(400) if body["input"] == "long" else reply([1])) as server:
        assert embedded(server.url, "long", "short") == [None, [1.0]]
    with scripted_server(lambda body: Fault(404)) as server, pytest.raises(InputError, match="404"):
        embedded(server.url, "abc")


def test_vectors_of_an_engine_have_unit_length_and_texts_that_are_too_long_have_none() -> None:
    engine = FakeEngine("a", max_length=50)
    generator = EngineGenerator(engine, "fake", 2, defaults=defaults())

    async def run() -> list[Any]:
        try:
            return [await generator.embed(text) for text in ("abc", "abc", "c" * 400)]
        finally:
            await generator.close()

    first, again, long = asyncio.run(run())
    assert np.linalg.norm(first) == pytest.approx(1.0)
    assert first == again
    assert long is None


def test_cosines_do_not_depend_on_length_and_vectors_survive_packing() -> None:
    rng = print_seed()
    a, b = rng.normal(size=(2, 40))
    assert cosine(a, b) == pytest.approx(cosine(3 * a, 0.1 * b), abs=2e-6)
    assert cosine(a, a) == pytest.approx(1.0)
    assert cosine(a, -a) == pytest.approx(-1.0)
    assert cosine(a, [0.0] * 40) == 0.0
    assert unpacked(packed(list(a))) == list(a.astype(np.float32))
    with pytest.raises(InputError, match="cannot be compared"):
        cosine(a, b[1:])
