"""The client of OpenAI's API: what passes is tried again, what does not is refused, and nothing is sent twice."""

import asyncio
import datetime
import email.utils
import itertools
import json
import re
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.scripted_server import Fault, ScriptedServer, scripted_server
from train.synthesize import openai_client
from train.synthesize.engine_generator import tell_apart
from train.synthesize.generator import Answer, GeneratorDownError, Request
from train.synthesize.openai_client import OpenAIGenerator

KEY = "sk-0123456789abcdef"


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def request(number: int = 0, **fields: Any) -> Request:
    return Request([{"role": "user", "content": f"question {number}"}], **{"seed": number, **fields})


def ask(server: ScriptedServer | str, *requests: Request, clock: Clock | None = None, **options: Any) -> Any:
    """The answers to requests, and the counts; faults are raised."""
    clock, url = clock or Clock(), server if isinstance(server, str) else server.url
    options = {"model": "scripted", "key": KEY, "clock": clock, "sleep": clock.sleep, **options}

    async def run() -> Any:
        generator = OpenAIGenerator(url, **options)
        try:
            answers = await asyncio.gather(*map(generator.ask, requests), return_exceptions=True)
        finally:
            await generator.close()
        assert KEY not in repr(generator)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers, generator.counts()

    return asyncio.run(asyncio.wait_for(run(), 60))


def first(*faults: Fault) -> Callable[[dict[str, Any]], str | Fault]:
    """Faults, then good answers."""
    left = iter(faults)
    return lambda body: next(left, "good")


PASSING = {
    **{str(status): Fault(status) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)},
    "timeout": Fault(sleep=30.0),
    "connection": Fault(drop="before"),
    "connection in the middle": Fault(drop="middle"),
    "reply: half": Fault(half=True),
    "reply: text": Fault(body=b"<html>Bad gateway"),
    "reply: not UTF-8": Fault(body=b'{"a": "\xff"}'),
    "reply: nothing": Fault(body=b""),
    "reply: deep": Fault(body=b"[" * 100_000),
    "reply: long number": Fault(body=b"1" * 10_000),
    "reply: a list": Fault(body=b"[]"),
    "reply: an error": Fault(body=b'{"error": {"message": "overloaded"}}'),
    "reply: no choices": Fault(body=b'{"choices": []}'),
    "reply: null choices": Fault(body=b'{"choices": null}'),
    "reply: no message": Fault(body=b'{"choices": [{"finish_reason": "stop"}]}'),
    "reply: text for a choice": Fault(body=b'{"choices": ["stop"]}'),
    "reply: content is a number": Fault(message={"content": 5}),
    "reply: content is null": Fault(message={"content": None}),
    "reply: content is a list": Fault(message={"content": ["a"]}),
    "reply: no end": Fault(finish=None),
    "reply: an unhashable end": Fault(finish=["stop"]),
    "reply: too long": Fault(body=b" " * 10_000),
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_are_tried_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same body and the same key, after a pause that grows at most as 0.5, 1, 2, ... seconds."""
    monkeypatch.setattr(openai_client, "_LARGEST_REPLY", 9_000)
    reason, clock = name.split(" ")[0].rstrip(":"), Clock()
    times = 1 if reason == "timeout" else 3
    timeout = 1.0 if reason == "timeout" else 30.0
    with scripted_server(first(*[PASSING[name]] * times)) as server:
        (answer,), counts = ask(server, request(), clock=clock, timeout=timeout)
    assert answer == Answer("good", prompt_tokens=2, tokens=1)
    assert counts["retries"] == {reason: times}
    assert counts["requests"] == times + 1
    assert all(body == server.asked[0] for body in server.asked)
    assert {one.key for one in server.received} == {request().key("scripted")}
    assert len(clock.slept) == times
    assert all(0 <= seconds <= 0.5 * 2**i for i, seconds in enumerate(clock.slept))


@pytest.mark.parametrize("status", [400, 413, 418, 422])
def test_requests_that_are_wrong_are_refused_and_sent_once(status: int) -> None:
    answered = Fault(status, body=json.dumps({"error": {"message": f"too long {KEY}\n" + "x" * 9999}}).encode())
    with scripted_server(lambda body: answered) as server:
        (answer,), counts = ask(server, request())
    assert answer.text == ""
    assert answer.refused.startswith(f"{status}: too long [key] xxx")
    assert len(answer.refused) < 400
    assert len(server.asked) == counts["requests"] == counts["refused"] == 1
    assert not counts["retries"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": "in short"}', "400: in short"),
        (b'{"object": "error", "message": "of vLLM"}', "400: of vLLM"),
        (b'{"detail": "of FastAPI"}', "400: of FastAPI"),
        (b"a plain\x00 text", "400: a plain text"),
        (b"", "400: nothing"),
    ],
)
def test_errors_are_read_in_all_forms(body: bytes, expected: str) -> None:
    with scripted_server(lambda _: Fault(400, body=body)) as server:
        (answer,), _ = ask(server, request())
    assert answer.refused == expected


def test_ends_of_answers() -> None:
    answers = {
        "cut": Fault(finish="length", text="a b"),
        "cut in its reasoning": Fault(finish="length", message={"content": None}),
        "filtered": Fault(finish="content_filter", message={"content": None}),
        "tool": Fault(finish="tool_calls", message={"content": None, "tool_calls": [{}]}),
        "refusal": Fault(message={"content": None, "refusal": "I cannot."}),
        "half a character": Fault(text="a\ud800b"),
    }
    with scripted_server(lambda body: answers[body["messages"][0]["content"]]) as server:
        asked = [Request([{"role": "user", "content": name}]) for name in answers]
        cut, reasoning, filtered, tool, refusal, half = ask(server, *asked)[0]
    assert (cut.text, cut.finish, cut.refused) == ("a b", "length", None)
    assert (reasoning.text, reasoning.finish, reasoning.refused) == ("", "length", None)
    assert half.text == "a\ufffdb"
    for answer, why in ((filtered, "filter"), (tool, "tool"), (refusal, "I cannot.")):
        assert answer.text == ""
        assert why in answer.refused
    assert len(server.asked) == len(answers)


@pytest.mark.parametrize("status", [301, 302, 307, 308, 401, 402, 403, 404, 405])
def test_what_no_request_survives_ends_the_run_at_once(status: int) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    headers = {"Location": f"http://127.0.0.1:1/{KEY}"} if status < 400 else {}
    with (
        scripted_server(lambda _: Fault(status, headers, body=body)) as server,
        pytest.raises(InputError) as error,
    ):
        ask(server, request())
    assert len(server.received) == 1
    assert str(status) in str(error.value)
    assert KEY not in str(error.value)
    assert "[key]" in str(error.value)
    assert error.value.__cause__ is None


def test_what_goes_well_is_sent_once_and_counted() -> None:
    """Nothing is lost, mixed up or paid twice, and no more requests are open than may be."""
    rng = print_seed()
    concurrency, count = int(rng.integers(2, 12)), 80

    def answer(body: dict[str, Any]) -> Fault:
        return Fault(sleep=float(rng.random()) / 100, text=f"answer {body['seed']}")

    requests = [request(i) for i in range(count)]
    with scripted_server(answer) as server:
        answers, counts = ask(server, *requests, concurrency=concurrency, prices=(1.0, 3.0))
    assert [one.text for one in answers] == [f"answer {i}" for i in range(count)]
    assert sorted(one.key or "" for one in server.received) == sorted(one.key("scripted") for one in requests)
    assert 1 < server.most_at_once <= concurrency or concurrency == 1
    assert counts == {
        "requests": count,
        "answers": count,
        "refused": 0,
        "prompt_tokens": 2 * count,
        "tokens": 2 * count,
        "retries": {},
        "cost": 2 * count * 4 / 1e6,
    }


def test_requests_that_wait_after_a_fault_keep_their_place() -> None:
    """A server that is overloaded gets no further requests from those that wait behind."""
    with scripted_server(first(*[Fault(429)] * 20)) as server:
        answers, counts = ask(server, *map(request, range(30)), concurrency=4)
    assert {one.text for one in answers} == {"good"}
    assert counts["retries"] == {"429": 20}
    assert len({one.key for one in server.received[:20]}) == 4
    assert server.most_at_once <= 4


def test_retry_after_is_honoured() -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=200)
    told = [("7", 7), ("0.5", 0.5), (email.utils.format_datetime(later, usegmt=True), 195), ("soon", 0), ("-5", 0)]
    clock = Clock()
    with scripted_server(first(*[Fault(429, {"Retry-After": text}) for text, _ in told])) as server:
        ask(server, request(), clock=clock)
    assert len(clock.slept) == len(told)
    for i, (slept, (text, seconds)) in enumerate(zip(clock.slept, told, strict=True)):
        assert seconds <= slept <= seconds + 0.5 * 2**i + 6, text


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "9" * 400}])
def test_a_server_that_answers_nothing_is_given_up(headers: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with (
        scripted_server(lambda _: Fault(503, headers, body=f"no {KEY}".encode())) as server,
        pytest.raises(GeneratorDownError, match=r"600 s.*503: no \[key\]\.$") as error,
    ):
        ask(server, *map(request, range(3)), clock=clock)
    assert 700 <= clock.now <= 701
    # One line says what is waited for, long before.
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"does not answer \(.*503: no \[key\]\); it is asked again for up to \d+ s", line)
    assert KEY not in "".join(traceback.format_exception(error.value))


def test_a_server_that_is_not_there_is_given_up() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(GeneratorDownError, match="no connection"):
            ask(url, request())
        with pytest.raises(InputError, match=r"no connection.*name the model"):
            ask(url, model=None)


def test_the_time_in_which_nothing_was_asked_is_not_the_servers() -> None:
    clock, faults = Clock(), itertools.cycle([Fault(500), "good"])
    with scripted_server(lambda _: next(faults)) as server:

        async def run() -> None:
            generator = OpenAIGenerator(server.url, "m", clock=clock, sleep=clock.sleep)
            for i in range(3):
                assert (await generator.ask(request(i))).text == "good"
                clock.now += 10_000
            await generator.close()

        asyncio.run(run())


def test_a_request_that_the_server_cannot_digest_is_refused_where_others_are_answered() -> None:
    clock = Clock()

    def answer(body: dict[str, Any]) -> str | Fault:
        return Fault(500) if body["seed"] == 0 else "good"

    with scripted_server(answer) as server:

        async def run() -> Answer:
            generator = OpenAIGenerator(server.url, "m", clock=clock, sleep=clock.sleep)
            bad = asyncio.create_task(generator.ask(request(0)))
            for i in itertools.count(1):
                assert (await generator.ask(request(i))).text == "good"
                if bad.done():
                    break
            await generator.close()
            return bad.result()

        refused = asyncio.run(run()).refused or ""
    assert "scripted 500" in refused
    assert "answer" not in refused
    assert clock.now > 700


def test_requests_say_what_is_asked() -> None:
    schema = {"type": "object"}
    messages = [{"role": "system", "content": "be\ud800"}, {"role": "user", "content": "ü"}]
    whole = Request(messages, 7, 0.25, 0.5, 9, ("a", "b"), schema)
    with scripted_server(first()) as server:
        ask(server, whole)
        ask(server, request(), extra_body={"top_k": 5, "top_p": None}, key="")
    assert server.asked[0] == {
        "model": "scripted",
        "messages": messages,
        "max_tokens": 7,
        "temperature": 0.25,
        "top_p": 0.5,
        "seed": 9,
        "stop": ["a", "b"],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    }
    assert server.received[0].headers["authorization"] == f"Bearer {KEY}"
    assert server.asked[1].keys() == {"model", "messages", "max_tokens", "temperature", "seed", "top_k"}
    assert "authorization" not in server.received[1].headers
    # Answers to other fields are kept under other names.
    assert server.received[1].key != request().key("scripted")


def test_the_key_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment\n")
    with scripted_server(first()) as server:
        ask(server, request(), key=None)
    assert server.received[0].headers["authorization"] == "Bearer of-the-environment"


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server(first()) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(InputError, match="404"):
            ask("http://elsewhere.invalid/v1", request())
    assert server.received[0].path == "http://elsewhere.invalid/v1/chat/completions"


def test_the_only_model_of_a_server_is_found() -> None:
    with scripted_server(first()) as server:
        # With an event loop running, and without.
        assert OpenAIGenerator(server.url + "/", key="").model == "scripted"
        _, counts = ask(server, request(), model=None)
        assert counts["requests"] == 2
        for models in ((), ("a", "b")):
            server.models = models
            with pytest.raises(InputError, match="a, b" if models else "no model"):
                OpenAIGenerator(server.url, key="")
    with pytest.raises(InputError, match="name the model"):
        OpenAIGenerator(server.url, key="", sleep=Clock().sleep)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "localhost:8000"},
        {"url": "ftp://host/v1"},
        {"url": "http://"},
        {"url": "http://host:99999/v1"},
        {"url": f"http://user:{KEY}@host/v1"},
        {"url": f"http://host/v1?key={KEY}"},
        {"key": f"{KEY}\nX: y"},
        {"key": f"{KEY}ü"},
        {"concurrency": 0},
        {"timeout": 0},
        {"give_up_after": float("nan")},
        {"prices": (1.0, -1.0)},
        {"extra_body": {"messages": []}},
        {"extra_body": {"x": object()}},
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        OpenAIGenerator(**{"url": "http://host/v1", "model": "m", **options})
    assert KEY not in str(error.value)


def test_in_a_storm_of_faults_every_request_gets_its_answer_once() -> None:
    """Whatever goes wrong in between: requests sent are answers and retries, and each answer is that of its request."""
    rng, faults = print_seed(), [fault for fault in PASSING.values() if not fault.sleep]

    def answer(body: dict[str, Any]) -> str | Fault:
        return faults[int(rng.integers(len(faults)))] if rng.random() < 0.4 else f"answer {body['seed']}"

    with scripted_server(answer) as server:
        # Pauses of some requests move the clock of all; none may take the others for a server that is down.
        answers, counts = ask(server, *map(request, range(150)), concurrency=8, give_up_after=1e6)
    assert [one.text for one in answers] == [f"answer {i}" for i in range(150)]
    assert counts["answers"] == 150
    assert counts["requests"] == len(server.asked) == 150 + sum(counts["retries"].values())
    assert len({one.key for one in server.received}) == 150
    assert server.most_at_once <= 8


def test_servers_with_one_name_are_told_apart() -> None:
    def named(*models: str) -> list[OpenAIGenerator]:
        return [OpenAIGenerator(f"http://h:{8000 + i}/v1", name, key="") for i, name in enumerate(models)]

    # One server, or servers with different names, may move without another name.
    for models in (("a",), ("a", "b")):
        found = named(*models)
        tell_apart(found)
        assert [one.model for one in found] == list(models)
    found = named("a", "b", "a")
    tell_apart(found)
    assert [one.model for one in found] == ["a@h:8000/v1", "b", "a@h:8002/v1"]
    assert len({request().key(one.model) for one in found}) == 3
    with scripted_server(lambda body: body["model"]) as server:
        one = OpenAIGenerator(server.url, "scripted", key="")
        one.model = "another"
        answer = asyncio.run(asyncio.wait_for(one.ask(request()), 60))
    assert answer.text == "scripted"
