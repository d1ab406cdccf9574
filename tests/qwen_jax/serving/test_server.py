"""A server on loopback: clients that go, that read slowly or send too much; metrics; the end of the server."""

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
import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference.structured import Grammar
from qwen_jax.serving.server import listen
from tests.helpers.fake_engine import FakeEngine, FakeGrammars
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


def _started(engine: FakeEngine, **settings: Any) -> Running:
    from qwen_jax.serving.settings import Service
    from tests.helpers.fake_engine import defaults

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
