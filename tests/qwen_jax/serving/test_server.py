"""A server on loopback: clients that go, that read slowly or send too much; metrics; the end of the server."""

import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference.active import Times
from qwen_jax.inference.structured import Grammar
from qwen_jax.serving.context import in_pieces, to_json
from qwen_jax.serving.server import listen
from qwen_jax.serving.settings import Service
from tests.helpers.fake_engine import FakeEngine, FakeGrammars, FakeScorer, defaults
from tests.helpers.serving import Running, client, events, serve, until

ROOT = Path(__file__).parents[3]
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture
def slow() -> Iterator[tuple[FakeEngine, Running]]:
    """A server whose texts take minutes."""
    engine = FakeEngine("a" * 4000, delay=0.05)
    with serve(engine, send_timeout=5.0) as running:
        yield engine, running


def raw(running: Running, path: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request and leaves the answer to the caller."""
    host, _, port = running.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_cancels_its_request(slow: tuple[FakeEngine, Running], stream: bool, n: int) -> None:
    engine, running = slow
    connection = raw(running, TEXT, {"prompt": "abc", "max_tokens": 3000, "stream": stream, "n": n})
    until(lambda: len(engine.running) == n)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    until(lambda: not engine.running, 5)
    assert all(request.cancelled.is_set() for request in engine.streams)
    assert not running.context.active
    assert running.context.metrics.finished["abort"] == n


def test_a_client_that_goes_before_its_body_has_come_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    with serve(FakeEngine()) as running:
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
            connection.sendall(f"{head}\r\n{{".encode())
            time.sleep(0.1)
        until(lambda: running.context.metrics.http["POST", "/tokenize", "499"] == 1)
    assert not caplog.records


def test_a_reader_that_is_slow_holds_up_nobody() -> None:
    """Its stream waits in its own connection until it is given up."""
    # More than the buffers of the system take.
    engine = FakeEngine("a" * 150_000, tokens_per_step=50, max_length=10**6)
    with serve(engine, send_timeout=1.0) as running:
        body = {"prompt": "abc", "max_tokens": 150_000, "stream": True, "logprobs": 5}
        sleeper = raw(running, TEXT, body)
        until(lambda: len(engine.streams) == 1)
        start = time.monotonic()
        assert httpx.post(running.url + TEXT, json={"prompt": "abc", "max_tokens": 5}).status_code == 200
        assert time.monotonic() - start < 2
        until(lambda: engine.streams[0].cancelled.is_set(), 20)
        assert engine.output_tokens < 150_000
        sleeper.close()


def test_many_at_once_each_get_their_own_text() -> None:
    engine = FakeEngine(lambda request: f"text {len(request.prompt)}", delay=0.002)
    with serve(engine) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        answers: dict[int, str] = {}

        def ask(size: int) -> None:
            body = {"prompt": "x" * size, "max_tokens": 50, "stream": size % 2 == 0}
            answer = http.post(TEXT, json=body)
            if size % 5 == 0:
                assert http.post(TEXT, json={"prompt": [], "n": "many"}).status_code == 400
            chunks = events(answer.text) if size % 2 == 0 else [answer.json()]
            answers[size] = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])

        threads = [threading.Thread(target=ask, args=(size,)) for size in range(1, 41)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert answers == {size: f"text {size}" for size in range(1, 41)}
        assert not engine.running


def test_a_grammar_that_takes_long_delays_no_request_without_one() -> None:
    engine = FakeEngine("Hello.")
    done = threading.Event()

    class Slow(FakeGrammars):
        def regex(self, pattern: str) -> Grammar:
            done.wait(10)
            return super().regex(pattern)

    engine.grammars = Slow()
    with serve(engine) as running:
        sleepers = [raw(running, TEXT, {"prompt": "abc", "guided_regex": "a"}) for _ in range(20)]
        start = time.monotonic()
        assert httpx.post(running.url + TEXT, json={"prompt": "abc"}).status_code == 200
        assert time.monotonic() - start < 3
        done.set()
        for sleeper in sleepers:
            assert sleeper.recv(100).startswith(b"HTTP/1.1 200")
            sleeper.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_refused_without_being_kept(chunked: bool) -> None:
    import psutil

    with serve(FakeEngine(), max_body_bytes=10**6) as running:
        host, _, port = running.url.removeprefix("http://").partition(":")
        before = psutil.Process().memory_info().rss
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        piece = b"a" * 10**5
        body: Any = iter([piece] * 1000)
        headers = {"Content-Type": "application/json", **({} if chunked else {"Content-Length": str(10**8)})}
        connection.request("POST", TEXT, body=body, headers=headers, encode_chunked=chunked)
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read())["error"]["code"] == "request_too_large"
        assert psutil.Process().memory_info().rss - before < 60 * 10**6
        assert httpx.get(running.url + "/health").status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    with serve(FakeEngine(), body_timeout=0.3) as running:
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
            connection.sendall(f"{head}\r\n{{".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_running_requests_end_before_the_server_does() -> None:
    engine = FakeEngine("a" * 20, delay=0.05)
    running = _started(engine, drain_timeout=10)
    answer: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answer.append(httpx.post(running.url + TEXT, json={"prompt": "abc"})))
    thread.start()
    until(lambda: len(engine.running) == 1)
    running.stop()
    until(lambda: not _listens(running))
    thread.join(10)
    running.join()
    assert answer[0].json()["choices"][0]["text"] == "a" * 16
    assert engine.closed


def test_what_still_runs_at_the_limit_is_told_so() -> None:
    engine = FakeEngine("a" * 4000, delay=0.05)
    running = _started(engine, drain_timeout=0.5)
    answers: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        body = {"prompt": "abc", "max_tokens": 3000, "stream": stream}
        answers[stream] = httpx.post(running.url + TEXT, json=body, timeout=20)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    until(lambda: len(engine.running) == 2)
    running.stop()
    running.join()
    for thread in threads:
        thread.join(10)
    assert answers[False].status_code == 503
    assert "retry-after" in answers[False].headers
    assert events(answers[True].text)[-1]["error"]["code"] == "overloaded"
    assert engine.closed


def models(delay: float) -> list[tuple[Any, Service, str]]:
    """An engine and a reward model whose work takes long, and their paths."""
    engine = FakeEngine(delay=delay)
    scorer = FakeScorer(engine.config, delay)
    scores = Service(scorer=scorer, scorer_tokenizer=engine.tokenizer)
    return [(engine, Service(engine, defaults()), "/v1/embeddings"), (scorer, scores, "/v1/score")]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("how", ["timeout", "end", "gone"])
def test_embeddings_and_scores_are_cut(kind: int, how: str) -> None:
    """By the limit of time, by the end of the server, and by clients that go: what runs, and what waits for it."""
    model, service, path = models(0.05)[kind]
    running = Running(service, request_timeout=0.5 if how == "timeout" else 0.0, drain_timeout=0.5)
    body = {"input": ["abc"] * 1000}
    if how == "gone":
        connections = [raw(running, path, body) for _ in range(3)]
        until(lambda: len(running.context.jobs) == 3 and model.work > 0)
        for connection in connections:
            connection.close()
    else:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(running.url + path, json=body, timeout=20))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(running.context.jobs) == 3)
        if how == "end":
            running.stop()
        for thread in threads:
            thread.join(10)
        want = (504, "timeout") if how == "timeout" else (503, "overloaded")
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [want] * 3
    until(lambda: not running.context.jobs)
    # The thread is free at once, and nothing of what waited was begun.
    assert running.context.device_thread.submit(lambda: 7).result(2) == 7 if how != "end" else True
    assert model.work < 30
    running.stop()
    running.join()


def test_a_request_whose_grammar_waits_is_cut() -> None:
    engine, done = FakeEngine(), threading.Event()

    class Slow(FakeGrammars):
        def regex(self, pattern: str) -> Grammar:
            done.wait(10)
            return super().regex(pattern)

    engine.grammars = Slow()
    with serve(engine, request_timeout=0.3) as running:
        for stream in (False, True):
            body = {"prompt": "abc", "guided_regex": "a", "stream": stream}
            answer = httpx.post(running.url + TEXT, json=body, timeout=20)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        done.set()
        assert not engine.requests


def test_what_waits_for_the_device_has_a_limit() -> None:
    with serve(FakeEngine(delay=0.2), max_waiting=2) as running:
        connections = [raw(running, "/v1/embeddings", {"input": ["abc"] * 100}) for _ in range(3)]
        until(lambda: len(running.context.jobs) == 3)
        assert httpx.post(running.url + "/v1/embeddings", json={"input": "a"}).status_code == 503
        assert httpx.post(running.url + TEXT, json={"prompt": "abc"}).status_code == 200
        for connection in connections:
            connection.close()


def test_an_engine_that_failed_has_metrics_of_http_only() -> None:
    engine = FakeEngine()
    http_client = client(engine)
    assert http_client.post(TEXT, json={"prompt": "abc"}).status_code == 200
    assert "vllm:num_requests_running" in http_client.get("/metrics").text
    engine.dead = True
    answer = http_client.get("/metrics")
    assert answer.status_code == 200
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="200"} 1.0' in answer.text
    assert "vllm:num_requests_running" not in answer.text
    assert http_client.get("/health").status_code == http_client.get("/ping").status_code == 503


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
def test_a_large_answer_stops_nobody(path: str) -> None:
    """While half a million numbers are written down, other requests are answered."""
    engine = FakeEngine("a" * 400, tokens_per_step=400)
    engine.embed = lambda prompts, pooling, *, stopped: np.random.default_rng(0).random((len(prompts), 2000))  # type: ignore[method-assign]
    chat = {"messages": [{"role": "user", "content": "a"}], "n": 40, "logprobs": True, "top_logprobs": 20}
    body = chat if path == CHAT else {"input": ["abc"] * 1000}
    with serve(engine) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        sizes: list[int] = []
        start = time.monotonic()
        post = functools.partial(httpx.post, running.url + path, json=body, timeout=60)
        thread = threading.Thread(target=lambda: sizes.append(len(post().content)))
        thread.start()
        longest = 0.0
        while thread.is_alive():
            began = time.monotonic()
            http.get("/version")
            longest = max(longest, time.monotonic() - began)
        assert sizes[0] > 10**7
        assert longest < 0.5 * (time.monotonic() - start)


def test_json_in_pieces_is_the_same_json() -> None:
    nested: dict[str, Any] = {
        "a": [{"b": [{"c": [[1, 2], [3.5]], "ä": None}], "d": {}}, []],
        "e": [],
        "f": [1, "x", None],
    }
    for depth in range(7):
        assert in_pieces(nested, depth) == to_json(nested)


def test_the_times_of_a_request_are_counted() -> None:
    """Queue, prefill and decode add up to what the engine took. A request that never began waited for nothing."""
    engine = FakeEngine()
    http_client = client(engine)
    assert engine.on_finished is not None
    engine.on_finished(Times(1.0, 1.5, 3.5, 7.5, 10, 20, "stop"))
    engine.on_finished(Times(1.0, None, None, 7.5, 10, 0, "abort"))
    text = http_client.get("/metrics").text
    for name, seconds in (("queue", 0.5), ("prefill", 2.0), ("decode", 4.0)):
        label = '{engine="0",model_name="model"}'
        assert f"vllm:request_{name}_time_seconds_count{label} 1.0" in text
        assert f"vllm:request_{name}_time_seconds_sum{label} {seconds}" in text


def _started(engine: FakeEngine, **settings: Any) -> Running:
    return Running(Service(engine, defaults()), **settings)


def _listens(running: Running) -> bool:
    try:
        httpx.get(running.url + "/health", timeout=1)
    except httpx.HTTPError:
        return False
    return True


PROGRAM = """
import sys
from qwen_jax.serving.app import create_app
from qwen_jax.serving.server import run
from qwen_jax.serving.settings import ServerSettings, Service
from tests.helpers.fake_engine import FakeEngine, defaults
app = create_app(Service(FakeEngine("a" * 40, delay=0.05), defaults()), ServerSettings())
interrupted = run(app, "127.0.0.1", 0, lambda url: print(url, flush=True))
print("interrupted" if interrupted else "ended", flush=True)
"""


@pytest.mark.parametrize(("number", "last"), [(signal.SIGTERM, "ended"), (signal.SIGINT, "interrupted")])
def test_a_signal_drains(number: int, last: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    text = ""
    with httpx.stream(
        "POST", url + TEXT, json={"prompt": "abc", "max_tokens": 30, "stream": True}, timeout=30
    ) as answer:
        for i, line in enumerate(answer.iter_lines()):
            if i == 3:
                process.send_signal(number)
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == "a" * 30
    assert process.wait(20) == 0
    assert process.stdout.read().strip() == last


@pytest.mark.parametrize("stuck", [False, True])
def test_a_second_signal_ends_requests_now(stuck: bool) -> None:
    """Their clients are told so; one that does not read is cut off. No traceback is printed."""
    slow, fast = '"a" * 4000, delay=0.05', '"a" * 150_000, tokens_per_step=50, max_length=10**6'
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace('"a" * 40, delay=0.05', fast if stuck else slow)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    url = process.stdout.readline().strip()
    answers: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        body = {"prompt": "abc", "max_tokens": 3000, "stream": stream}
        answers[stream] = httpx.post(url + TEXT, json=body, timeout=20)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True) if not stuck]
    for thread in threads:
        thread.start()
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps({"prompt": "abc", "max_tokens": 150_000, "stream": True, "logprobs": 20})
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sleeper = socket.create_connection((host, int(port)))
    if stuck:
        sleeper.sendall((head + body).encode())
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    for thread in threads:
        thread.join(10)
    sleeper.close()
    errors = process.stderr.read()
    assert "Traceback" not in errors
    assert process.stdout.read().strip() == "ended"
    if not stuck:
        assert answers[False].status_code == 503
        assert events(answers[True].text)[-1]["error"]["code"] == "overloaded"


def test_an_address_that_is_taken_is_an_error() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match="--port"):
            listen("127.0.0.1", taken.getsockname()[1])
    for host, port in ("no such host", 80), ("127.0.0.1", 70_000), ("", -1):
        with pytest.raises(InputError, match="--port"):
            listen(host, port)


def test_metrics_have_vllms_names() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    http_client = client(FakeEngine("Hello"), served_names=("qwen", "other"))
    for n, stream in (1, False), (2, True):
        http_client.post(CHAT, json={"messages": [{"role": "user", "content": "a"}], "n": n, "stream": stream})
    http_client.post(TEXT, json={"prompt": ""})
    families = {family.name: family for family in text_string_to_metric_families(http_client.get("/metrics").text)}
    assert families.keys() >= {
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions",
        "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success", "vllm:time_to_first_token_seconds",
        "vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds",
        "vllm:request_prompt_tokens", "vllm:request_generation_tokens", "vllm:request_params_n",
        "vllm:request_time_per_output_token_seconds", "vllm:request_params_max_tokens", "http_requests",
    }  # fmt: skip
    (cache,) = families["vllm:cache_config_info"].samples
    told = {"cache_dtype": "int8", "block_size": "16", "num_gpu_blocks": "10"}
    assert told.items() <= cache.labels.items()
    assert http_client.get("/health").json() == {"status": "ok", "kv_dtype": "int8"}
    values = {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("status")): sample.value
        for family in families.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert values["vllm:generation_tokens_total", None] == 18
    assert values["vllm:request_success_total", "stop"] == 3
    assert values["vllm:time_to_first_token_seconds_count", None] == 3
    assert values["vllm:inter_token_latency_seconds_count", None] == 15
    assert values["vllm:e2e_request_latency_seconds_count", None] == 3
    assert values["vllm:kv_cache_usage_perc", None] == pytest.approx(0.3)
    assert values["http_requests_total", "400"] == 1
    labels = families["vllm:num_requests_running"].samples[0].labels
    assert labels == {"model_name": "qwen", "engine": "0"}
    assert families["vllm:prompt_tokens"].samples[0].name == "vllm:prompt_tokens_total"
