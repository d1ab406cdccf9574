"""The server over the real engine: HTTP gives what the engine gives, and the command serves until it is told to end."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

import convert
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine, Engine, SamplingParams, load_generation_defaults
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.serving.app import create_app
from qwen_jax.serving.settings import ServerSettings, Service
from qwen_jax.tokenizer import load_tokenizer, render_chat
from tests.helpers.processes import launch
from tests.helpers.runs import print_seed
from tests.helpers.scripted import make_words
from tests.helpers.serving import events, until

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_words(tmp_path_factory.mktemp("model"))


def loaded(folder: Path) -> Any:
    mesh = make_mesh({}, jax.devices()[:1])
    return *convert.load(folder, mesh, "float32", Options(stacked=False)), mesh


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    sizes: dict[str, Any] = {
        "max_seqs": 4,
        "max_length": 256,
        "page_size": 16,
        "num_pages": 64,
        "max_batched_tokens": 64,
    }
    engine = ContinuousEngine(*loaded(folder), tokenizer=load_tokenizer(folder), dtype="float32", **sizes)
    config = engine.config
    app = create_app(Service(engine, load_generation_defaults(folder, config)), ServerSettings(served_names=("m",)))
    with TestClient(app) as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": "m", **body})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_prompts_that_are_read_for_log_probabilities_are_cut(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of time, those that wait are told so and are never read."""
    context = client.app.state.context  # type: ignore[attr-defined]
    engine, read = context.engine, []

    def slow(ids: list[int], adapter: int) -> Any:
        read.append(ids)
        time.sleep(0.5)
        raise InputError("it is read too late")

    monkeypatch.setattr(engine._runner, "prompt_logprobs", slow)
    monkeypatch.setattr(context, "settings", dataclasses.replace(context.settings, request_timeout=0.4))
    with ThreadPoolExecutor(6) as threads:
        body = {"model": "m", "echo": True, "logprobs": 1, "max_tokens": 1}
        ask = [
            threads.submit(client.post, "/v1/completions", json={**body, "prompt": f"hello {i}", "stream": False})
            for i in range(6)
        ]
        answers = [asked.result() for asked in ask]
    assert [answer.status_code for answer in answers] == [504] * 6
    until(lambda: engine.stats().waiting == engine.stats().running == 0)
    assert len(read) <= 2


EXTREMES = [1e-40, 5e-324, -0.0, 1e-10, 1e-5, 0.01, 1.0, 2.0, 100.0, 1e5, 3.4e38, 1e300, -1e-40, -2.0, -1e300, 10**30]
EXTREMES += [0, 1, 2**31 - 1, 2**63, -(2**63), 10**400]
FIELDS = "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty top_k seed logit_bias".split()


@pytest.mark.parametrize("field", FIELDS)
def test_extreme_numbers_give_a_text_or_an_error_of_the_field(client: TestClient, field: str) -> None:
    """Whatever is taken leaves the logits finite; whatever is refused is refused in OpenAI's form."""
    codes = set()
    for number in EXTREMES:
        value = {"5": number, "70": number} if field == "logit_bias" else number
        sampled = {} if field == "temperature" else {"temperature": 1.0}
        body = {"model": "m", "prompt": "hello", "max_tokens": 4, "logprobs": 2, **sampled, field: value}
        answer = client.post("/v1/completions", json=body)
        codes.add(answer.status_code)
        if answer.status_code == 400:
            assert answer.json()["error"]["param"].startswith(field)
        else:
            assert answer.status_code == 200, (number, answer.text)
    assert 200 in codes
    assert 400 in codes or field == "seed"


def test_completions_are_those_of_the_fixed_batch(client: TestClient, folder: Path) -> None:
    engine = Engine(*loaded(folder), tokenizer=load_tokenizer(folder), dtype="float32")
    prompts = ["hello", "hello there, world", "assistant"]
    want = [completion.text for completion in engine.generate(prompts, max_new_tokens=20)]
    answer = post(client, "/v1/completions", prompt=prompts, max_tokens=20, temperature=0)
    assert [choice["text"] for choice in answer["choices"]] == want
    # As a stream, and several choices of one prompt with seeds of their own.
    with client.stream(
        "POST",
        "/v1/completions",
        json={"model": "m", "prompt": prompts[1], "max_tokens": 20, "temperature": 0, "stream": True},
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert (
        "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1] if json.loads(line)["choices"]) == want[1]
    )
    several = post(client, "/v1/completions", prompt="hello", n=3, seed=5, max_tokens=12, temperature=1.0)
    third = post(client, "/v1/completions", prompt="hello", seed=7, max_tokens=12, temperature=1.0)
    assert several["choices"][2]["text"] == third["choices"][0]["text"]


def test_echoed_prompts_have_log_probabilities(client: TestClient) -> None:
    """As lm-eval asks for them: token ids, no new tokens."""
    answer = post(client, "/v1/completions", prompt=[[1, 2, 3, 4]], echo=True, logprobs=1, max_tokens=0, temperature=0)
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    assert len(found["token_logprobs"]) == 4
    assert all(value < 0 for value in found["token_logprobs"][1:])


WORDS = "hello", "there", "world", "user", "a", "é", " ", "\n"


def random_messages(rng: np.random.Generator) -> list[dict[str, str]]:
    """A conversation that ends with the beginning of an answer."""
    roles = ["user", "assistant"] * int(rng.integers(1, 3))
    return [{"role": role, "content": "".join(rng.choice(WORDS, int(rng.integers(1, 9))))} for role in roles]


def streamed(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The choices of the chunks of a stream."""
    answer = client.post(path, json={"model": "m", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    return [choice for chunk in events(answer.text) for choice in chunk["choices"]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_goes_on_as_the_completion_of_the_same_text_does(
    client: TestClient, folder: Path, temperature: float
) -> None:
    """Token for token, whole and streamed."""
    rng, tokenizer = print_seed(), load_tokenizer(folder)
    end = tokenizer.token_to_id("<|im_end|>")
    for _ in range(3):
        messages = random_messages(rng)
        sampling = {"temperature": temperature, "seed": int(rng.integers(100)), "max_tokens": 12}
        options = {**sampling, "return_token_ids": True}
        rendered = render_chat(messages[:-1]) + messages[-1]["content"]
        completed = post(client, "/v1/completions", prompt=rendered, stop_token_ids=[end], **options)["choices"][0]
        asked = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        chatted = post(client, "/v1/chat/completions", **asked, **options)
        assert chatted["prompt_token_ids"] == completed["prompt_token_ids"]
        assert chatted["choices"][0]["token_ids"] == completed["token_ids"]
        assert chatted["choices"][0]["message"]["content"] == completed["text"]
        parts = streamed(client, "/v1/chat/completions", **asked, **options)
        assert [token for part in parts for token in part["token_ids"]] == completed["token_ids"]
        assert "".join(part["delta"].get("content", "") for part in parts) == completed["text"]


def test_a_prompt_that_is_cut_gives_the_text_of_its_last_tokens(client: TestClient, folder: Path) -> None:
    rng, tokenizer = print_seed(), load_tokenizer(folder)
    end = tokenizer.token_to_id("<|im_end|>")
    for _ in range(3):
        messages, sampling = random_messages(rng), {"seed": int(rng.integers(100)), "temperature": 1.0, "max_tokens": 8}
        ids = tokenizer.encode_chat(messages)
        count = int(rng.integers(1, len(ids) + 1))
        options = {**sampling, "stop_token_ids": [end], "return_token_ids": True}
        wanted = post(client, "/v1/completions", prompt=[ids[-count:]], **options)["choices"][0]
        cut = post(client, "/v1/completions", prompt=[ids], truncate_prompt_tokens=count, **options)["choices"][0]
        assert cut == wanted
        chatted = post(client, "/v1/chat/completions", messages=messages, truncate_prompt_tokens=count, **options)
        assert chatted["prompt_token_ids"] == ids[-count:]
        assert chatted["choices"][0]["token_ids"] == wanted["token_ids"]
        parts = streamed(client, "/v1/completions", prompt=[ids], truncate_prompt_tokens=count, **options)
        assert "".join(part["text"] for part in parts) == wanted["text"]
        assert [token for part in parts for token in part["token_ids"]] == wanted["token_ids"]


def test_keys_and_salts_of_the_cache_change_no_text(client: TestClient) -> None:
    """A salt has the prompt found by requests with the same salt alone, a key changes nothing."""
    rng = print_seed()
    # A beginning that no other test has.
    prompt = rng.integers(0, 256, 50).tolist()
    options = {"prompt": [prompt], "temperature": 1.0, "seed": int(rng.integers(100)), "max_tokens": 8}

    def cached(**fields: Any) -> int:
        answer = post(client, "/v1/completions", **options, **fields)
        assert answer["choices"][0]["text"] == text
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    text = post(client, "/v1/completions", **options)["choices"][0]["text"]
    first, second = (str(rng.integers(2**60)) for _ in range(2))
    # Pages have 16 tokens.
    assert cached() == cached(prompt_cache_key=first) == cached(prompt_cache_key=second) == 48
    assert [cached(cache_salt=salt) for salt in (first, first, second, first)] == [0, 48, 0, 48]
    assert cached() == 48


def test_a_stop_string_that_stays_is_what_was_cut_off(client: TestClient) -> None:
    rng = print_seed()
    for _ in range(4):
        options = {"prompt": "hello", "seed": int(rng.integers(1000)), "temperature": 1.0, "max_tokens": 16}
        text = post(client, "/v1/completions", **options)["choices"][0]["text"]
        start = int(rng.integers(0, max(1, len(text))))
        stop = text[start : start + int(rng.integers(1, 6))] or "x"
        without = post(client, "/v1/completions", stop=stop, **options)["choices"][0]
        for ids in ({}, {"return_token_ids": True}):
            body = {**options, **ids, "stop": stop, "include_stop_str_in_output": True}
            included = post(client, "/v1/completions", **body)["choices"][0]
            cut = stop if without["stop_reason"] == stop else ""
            assert included["text"] == without["text"] + cut
            assert (included["finish_reason"], included["stop_reason"]) == (
                without["finish_reason"],
                without["stop_reason"],
            )
            assert "".join(part["text"] for part in streamed(client, "/v1/completions", **body)) == included["text"]


def test_structured_answers_parse(client: TestClient, folder: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tokenizer = load_tokenizer(folder)
    spaces = {str(i): -100 for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isspace()}
    answer = post(
        client,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hello"}],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        max_tokens=60,
        logit_bias=spaces,
    )
    assert json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 22)


def test_embeddings_are_means_of_hidden_states(client: TestClient) -> None:
    answer = post(client, "/v1/embeddings", input=["hello", "hello there"])
    first, second = (np.asarray(one["embedding"]) for one in answer["data"])
    assert first.shape == second.shape == (64,)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(folder: Path) -> None:
    arguments = ["serve", str(folder), "--port", "0", "--lazy-compile", "--max-model-len", "128", "--max-num-seqs", "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "qwen_jax", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("Serving at "))
        url = line.split()[2]
        body = {"model": folder.name, "prompt": "hello", "max_tokens": 5}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] <= 5
        assert httpx.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_two_processes_serve_one_model(folder: Path) -> None:
    """Process 0 answers what one process answers. SIGTERM, which a scheduler sends to all, lets a request end first."""
    (completion,) = Engine(*loaded(folder), tokenizer=load_tokenizer(folder), dtype="float32").generate(
        "hello", max_new_tokens=60, eos_token_ids=[], sampling=SamplingParams(temperature=0)
    )
    arguments = ["serve", str(folder), "--port", "0", "--lazy-compile", "--max-model-len", "128", "--max-num-seqs", "2"]
    with launch([*arguments, "--mesh", "tensor=2"], processes=2) as job:
        until(lambda: "Serving at " in job.output(0) or None not in [p.poll() for p in job.started], 120)
        url = job.output(0).partition("Serving at ")[2].split()[0]
        body = {"model": folder.name, "prompt": "hello", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
            chunks = answer.iter_lines()
            first = next(chunks)
            for process in job.started:
                process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in [first, *chunks] if line.startswith("data: {")]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == completion.text
        assert job.wait(60) == [0, 0], job
        assert "Traceback" not in str(job)


def test_the_packages_of_the_server_are_installed() -> None:
    """In the development environment; elsewhere `serve` names what is missing."""
    assert all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "prometheus_client"))
