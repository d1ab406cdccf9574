"""Fields of vLLM's API: what they do to a prompt and to an answer, and the line about throughput in the log."""

import dataclasses
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_jax.cli.serve import Serve
from qwen_jax.inference.outputs import Stats
from qwen_jax.serving import protocol
from qwen_jax.serving.app import create_app
from qwen_jax.serving.settings import ServerSettings, Service
from qwen_jax.serving.throughput import line
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.fake_engine import FakeEngine, byte_tokenizer, defaults
from tests.helpers.runs import print_seed
from tests.helpers.serving import client, until

USER = {"role": "user", "content": "hi"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BEGINNING = {"role": "assistant", "content": "It is "}


def post(engine: FakeEngine, path: str, **body: Any) -> dict[str, Any]:
    answer = client(engine).post(path, json={("messages" if path == CHAT else "prompt"): [USER], **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- what the model reads ---


def test_an_answer_goes_on_with_the_final_message() -> None:
    engine = FakeEngine("warm.")
    answer = post(engine, CHAT, messages=[USER, BEGINNING], continue_final_message=True)
    opening = byte_tokenizer().encode_chat([USER])
    assert list(engine.requests[0].prompt) == [*opening, *byte_tokenizer().encode("It is ")]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "warm.", "refusal": None}
    # What vLLM's clients send, which must turn the other one off; and what others send.
    off: dict[str, Any] = {"add_generation_prompt": False}
    post(engine, CHAT, messages=[USER, BEGINNING], continue_final_message=True, **off)
    assert engine.requests[1].prompt == engine.requests[0].prompt
    for nothing in (
        {},
        {"continue_final_message": False},
        {"add_generation_prompt": True},
        {"chat_template_kwargs": {}},
    ):
        post(engine, CHAT, **nothing)
        assert list(engine.requests[-1].prompt) == opening


def test_without_an_opening_the_prompt_ends_with_the_last_message() -> None:
    engine = FakeEngine("x")
    answer = post(engine, CHAT, add_generation_prompt=False)
    assert list(engine.requests[0].prompt) == byte_tokenizer().encode_chat([USER], add_generation_prompt=False)
    assert answer["choices"][0]["message"]["role"] == "user"
    said = post(engine, CHAT, continue_final_message=True)["choices"][0]["message"]
    assert said == {"role": "user", "content": "x", "refusal": None}


def test_the_tokenizer_renders_as_the_chat_does() -> None:
    engine = FakeEngine("x")
    for messages, options in (
        ([USER, BEGINNING], {"continue_final_message": True}),
        ([USER], {"add_generation_prompt": False}),
        ([USER], {}),
    ):
        post(engine, CHAT, messages=messages, **options)
        found = client(engine).post("/tokenize", json={"messages": messages, **options})
        assert found.json()["tokens"] == list(engine.requests[-1].prompt)


@pytest.fixture
def thinking(tmp_path: Path) -> Tokenizer:
    """A tokenizer whose chat template reads two variables."""
    byte_tokenizer().save(tmp_path)
    source = "{% if think %}T{{ budget.tokens }}{% endif %}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": source}))
    return load_tokenizer(tmp_path)


def test_variables_of_the_template(thinking: Tokenizer) -> None:
    engine = FakeEngine("x", tokenizer=thinking)
    for variables, text in (
        ({"think": True, "budget": {"tokens": 5}}, "T5[hi]"),
        ({"think": False}, "[hi]"),
        ({"budget": None}, "[hi]"),
    ):
        post(engine, CHAT, chat_template_kwargs=variables)
        assert list(engine.requests[-1].prompt) == thinking.encode(text)
    post(engine, CHAT, chat_template_kwargs={"think": True, "budget": {"tokens": 0}}, continue_final_message=True)
    assert list(engine.requests[-1].prompt) == thinking.encode("T0[hi")
    refused = client(engine).post(CHAT, json={"messages": [USER], "chat_template_kwargs": {"think": 1, "thnk": 1}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs.thnk"
    assert "it reads budget, think" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_last_tokens_of_a_prompt_are_kept(path: str) -> None:
    rng = print_seed()
    text = "".join(rng.choice([*"abcdé"], 60))
    asked: dict[str, Any] = {"prompt": text} if path == TEXT else {"messages": [{"role": "user", "content": text}]}
    engine = FakeEngine("xyz")
    post(engine, path, **asked)
    whole = engine.requests[0].prompt
    for count in (1, 2, int(rng.integers(3, len(whole))), len(whole), len(whole) + 1, 4096):
        answer = post(engine, path, **asked, truncate_prompt_tokens=count)
        assert engine.requests[-1].prompt == whole[-count:]
        assert answer["usage"]["prompt_tokens"] == min(count, len(whole))
    # A prompt of ids is cut as one of text is, and what is echoed is what is left.
    if path == TEXT:
        answer = post(engine, path, prompt=[list(whole), [64]], truncate_prompt_tokens=5, echo=True)
        assert [request.prompt for request in engine.requests[-2:]] == [whole[-5:], (64,)]
        assert answer["choices"][0]["text"] == byte_tokenizer().decode(whole[-5:]) + "xyz"


def test_the_last_tokens_of_each_text_are_embedded() -> None:
    """A text that is cut has the vector of its last tokens alone; -1 keeps what the context holds."""
    rng, engine = print_seed(), FakeEngine(max_length=100)
    texts = [rng.integers(64, 90, length).tolist() for length in (3, 150, int(rng.integers(1, 99)))]

    def vectors(texts: list[list[int]], **options: Any) -> list[Any]:
        answer = client(engine).post("/v1/embeddings", json={"input": texts, "normalize": False, **options}).json()
        return [answer["usage"]["prompt_tokens"], *(x["embedding"] for x in answer["data"])]

    for most in (1, int(rng.integers(2, 100)), 100, -1):
        kept = [ids[-(100 if most == -1 else most) :] for ids in texts]
        for pooling in ("mean", "last"):
            options = {"pooling": pooling}
            assert vectors(texts, truncate_prompt_tokens=most, **options) == vectors(kept, **options)


def test_as_many_tokens_are_kept_as_fit() -> None:
    engine = FakeEngine("x", max_length=100)
    for path, options, count in (
        (TEXT, {}, 84),
        (TEXT, {"max_tokens": 30}, 70),
        (CHAT, {}, 99),
        (CHAT, {"max_tokens": 99}, 1),
        (CHAT, {"max_completion_tokens": 40}, 60),
    ):
        long: Any = {"prompt": "a" * 200} if path == TEXT else {"messages": [{"role": "user", "content": "a" * 200}]}
        post(engine, path, **long, truncate_prompt_tokens=-1, **options)
        request = engine.requests[-1]
        assert len(request.prompt) == count
        assert count + request.ending.max_new_tokens == 100


# --- what comes back ---


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_stop_strings_that_stay(path: str) -> None:
    def text(**options: Any) -> tuple[str, Any]:
        prompt = {"prompt": "a"} if path == TEXT else {}
        (choice,) = post(FakeEngine("Hello, you"), path, **prompt, **options)["choices"]
        return choice["text"] if path == TEXT else choice["message"]["content"], choice.get("stop_reason")

    stopped: dict[str, Any] = {"stop": ["lo,"]}
    assert text(**stopped)[0] == "Hel"
    assert text(**stopped, include_stop_str_in_output=False)[0] == "Hel"
    assert text(**stopped, include_stop_str_in_output=True) == ("Hello,", "lo," if path == TEXT else None)
    comma = byte_tokenizer().encode(",")
    assert text(stop_token_ids=comma)[0] == "Hello"
    assert text(stop_token_ids=comma, include_stop_str_in_output=True)[0] == "Hello,"


def test_ids_of_tokens() -> None:
    engine = FakeEngine("Hé", max_length=200)
    answer = post(engine, TEXT, prompt=["a", "bc"], return_token_ids=True, max_tokens=50)
    for choice, request in zip(answer["choices"], engine.requests, strict=True):
        assert choice["prompt_token_ids"] == list(request.prompt)
        assert byte_tokenizer().decode(choice["token_ids"], skip_special_tokens=True).startswith(choice["text"])
    assert sum(len(choice["token_ids"]) for choice in answer["choices"]) == answer["usage"]["completion_tokens"]
    answer = post(engine, CHAT, return_token_ids=True)
    assert answer["prompt_token_ids"] == list(engine.requests[-1].prompt)
    (choice,) = answer["choices"]
    # The id that ended the text is one of them.
    assert byte_tokenizer().decode(choice["token_ids"]) == "Hé<|im_end|>"
    assert "prompt_token_ids" not in post(engine, CHAT, return_token_ids=False)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_reaches_the_engine_and_what_does_not(path: str) -> None:
    engine = FakeEngine("x")
    prompt: dict[str, Any] = {"prompt": "a"} if path == TEXT else {}
    post(engine, path, **prompt, seed=1)
    post(engine, path, **prompt, seed=1, prompt_cache_key="k", include_stop_str_in_output=False)
    assert engine.requests[0] == engine.requests[1]
    post(engine, path, **prompt, seed=1, cache_salt="s")
    assert engine.requests[2] == dataclasses.replace(engine.requests[0], cache_salt="s")


# --- the line about throughput ---


def stats(**counts: Any) -> Stats:
    zero = {field.name: 0 for field in dataclasses.fields(Stats)}
    return Stats(**{**zero, "pages": 200, "kv_dtype": "float32", **counts})


def test_the_line_is_of_the_time_since_the_one_before() -> None:
    before = stats(prompt_tokens=100, output_tokens=50, prefix_hits=10, prefix_queries=100)
    now = stats(
        prompt_tokens=400, output_tokens=90, prefix_hits=160, prefix_queries=300, running=3, waiting=2, pages_used=50
    )
    assert line(before, now, 4.0) == (
        "prompts 75.0 tokens/s, generation 10.0 tokens/s, running 3, waiting 2, pages 25.0% used, "
        "prefix cache 75.0% hits"
    )
    assert line(now, dataclasses.replace(now, running=0, waiting=0), 4.0) is None
    # What runs and does not go on is told, too.
    assert line(now, now, 4.0) is not None
    assert line(stats(), stats(output_tokens=1), 1.0) is not None


def test_the_server_tells_its_throughput_while_something_happens(caplog: pytest.LogCaptureFixture) -> None:
    """It is silent when nothing happens, and ends with the engine."""
    engine = FakeEngine("Hello" * 200, tokens_per_step=10)
    looks, in_vain, look = 0, 0, engine.stats

    def counted() -> Stats:
        nonlocal looks, in_vain
        looks, in_vain = looks + 1, in_vain + engine.dead
        return look()

    engine.stats = counted  # type: ignore[method-assign]
    with (
        caplog.at_level(logging.INFO, "qwen_jax"),
        TestClient(create_app(Service(engine, defaults()), ServerSettings(log_interval=0.05))) as http,
    ):
        until(lambda: looks > 3)
        assert "tokens/s" not in caplog.text
        assert http.post(TEXT, json={"prompt": "abc", "max_tokens": 1000}).status_code == 200
        until(lambda: "tokens/s" in caplog.text)
        # The interval in which the text ended may be told after the one in which it began.
        now = looks
        until(lambda: looks > now + 2)
        seen = caplog.text.count("tokens/s")
        until(lambda: looks > now + 5)
        assert caplog.text.count("tokens/s") == seen
        # It ends with the engine.
        engine.dead = True
        until(lambda: in_vain > 0)
        time.sleep(0.2)
        assert in_vain == 1


def test_no_line_is_written_where_none_is_wanted() -> None:
    engine = FakeEngine()
    engine.dead = True  # It cannot be asked.
    with TestClient(create_app(Service(engine, defaults()), ServerSettings(log_interval=0))) as http:
        assert http.get("/version").status_code == 200


# --- what the documentation says ---


def section(title: str) -> str:
    """A section of docs/serving.md."""
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_fields_that_are_said_to_be_taken_or_refused_are() -> None:
    text = section("Fields of vLLM")
    taken = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert len(taken) == 7
    models = protocol.ChatRequest.model_fields, protocol.CompletionRequest.model_fields
    assert set(taken) <= models[0].keys()
    assert set(taken) & models[1].keys() == set(taken) - protocol.Rendering.model_fields.keys()
    assert set(taken[:3]) == protocol.Rendering.model_fields.keys() <= protocol.TokenizeRequest.model_fields.keys()
    in_chats, everywhere = text.partition("Refused as unknown are ")[2].split(" in chats, and everywhere ")
    http = client(FakeEngine())
    for path, names in (
        (CHAT, re.findall(r"`(\w+)`", in_chats)),
        (CHAT, re.findall(r"`(\w+)`", everywhere)),
        (TEXT, re.findall(r"`(\w+)`", everywhere)),
    ):
        assert names
        for name in names:
            prompt = {"prompt": "a"} if path == TEXT else {"messages": [USER]}
            error = http.post(path, json={**prompt, name: 1}).json()["error"]
            assert (error["param"], error["code"]) == (name, "unknown_parameter")


def test_options_that_are_said_to_stand_for_those_of_vllm_exist() -> None:
    options = {field.name for field in dataclasses.fields(Serve)}
    rows = re.findall(r"^\| (.*) \| (.*) \|$", section("Options of `vllm serve`"), flags=re.MULTILINE)[1:]
    assert len(rows) > 20
    for theirs, ours in rows:
        named = re.findall(r"--([a-z0-9-]+)", theirs if ours == "the same" else ours)
        assert named or ours == "always on" or ours.startswith("none")
        assert {name.replace("-", "_") for name in named} <= options, ours
