"""Every wrong request gets its own error, in OpenAI's form and with the right status, and disturbs no other."""

import json
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_jax.errors import InputError
from qwen_jax.serving.app import create_app
from qwen_jax.serving.settings import ServerSettings, Service
from tests.helpers.fake_engine import FakeEngine, FakeScorer, defaults
from tests.helpers.serving import client

USER = {"role": "user", "content": "hi"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NAMED = {"type": "function", "function": {"name": "g"}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


SHARED: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 1e-6}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty"),
    ({"repetition_penalty": 1e30}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"64": 101}}, "logit_bias.64"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"320": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [320]}, "stop_token_ids"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"model": "gpt-4"}, "model"),
    ({"model": "../../etc"}, "model"),
    ({"unknown": 1}, "unknown"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 4097}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 2.5}, "truncate_prompt_tokens"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"return_token_ids": "yes"}, "return_token_ids"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 1025}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"prompt_cache_key": 5}, "prompt_cache_key"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"lora_path": "/tmp/x"}, "lora_path"),
    ({"guided_regex": "bad("}, "guided_regex"),
    ({"guided_json": {"bad": 1}}, "guided_json"),
    ({"guided_json": "not JSON"}, "guided_json"),
    ({"guided_json": "[1]"}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "bad"}, "guided_grammar"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "bad"}}}},
        "response_format",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
]
CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages[0].extra"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [USER, {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages[1].content[0]",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]"),
    ({"messages": [{**USER, "tool_calls": [tool(name="f", arguments="{}")]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [tool(name="f", arguments="{")]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
    ({"max_tokens": 4096}, "messages"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [tool(name="")]}, "tools[0].function.name"),
    ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [tool(name="f"), tool(name="f")]}, "tools"),
    ({"tools": [tool(name="f", parameters={"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": [tool(name="f", parameters={"bad": 1})], "tool_choice": "required"}, "tools"),
    ({"tools": [tool(name="f")], "tool_choice": NAMED}, "tool_choice"),
    ({"tools": [tool(name="f")], "tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool(name="f")], "response_format": {"type": "json_object"}}, "response_format"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"continue_final_message": 1}, "continue_final_message"),
    (
        {
            "messages": [USER, {"role": "assistant", "tool_calls": [tool(name="f", arguments="{}")]}],
            "continue_final_message": True,
        },
        "messages",
    ),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
    ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs.add_generation_prompt"),
    ({"chat_template_kwargs": {"namespace": 1}}, "chat_template_kwargs.namespace"),
    ({"messages": [{"role": "user", "content": "x" * 5000}], "truncate_prompt_tokens": 4096}, "messages"),
    ({"truncate_prompt_tokens": -1, "max_tokens": 4096}, "messages"),
    ({"audio": {}}, "audio"),
    ({"store": True}, "store"),
]
TEXTS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**40]}, "prompt"),
    ({"prompt": [278]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 1000, "n": 2}, "n"),
    ({"prompt": "x" * 4096}, "prompt"),
    ({"prompt": "x" * 5000, "truncate_prompt_tokens": 4096}, "prompt"),
    ({"prompt": "x" * 5000, "truncate_prompt_tokens": 4000, "max_tokens": 97}, "prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ({"max_tokens": 4096}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 65}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
]
OTHERS: list[tuple[str, dict[str, Any], str | None]] = [
    ("/v1/embeddings", {}, "input"),
    ("/v1/embeddings", {"input": ""}, "input"),
    ("/v1/embeddings", {"input": "x" * 5000}, "input"),
    ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ("/v1/embeddings", {"input": "x", "pooling": "max"}, "pooling"),
    ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 4097}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": "x", "model": "poet"}, "model"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
    ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
    (
        "/tokenize",
        {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ("/tokenize", {"messages": [USER], "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
    ("/detokenize", {"tokens": [278]}, "tokens"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
]
CASES = [
    *((CHAT, {"messages": [USER], **body}, param) for body, param in SHARED + CHATS),
    *((TEXT, {"prompt": "abc", **body}, param) for body, param in SHARED + TEXTS),
    *OTHERS,
]


@pytest.fixture(scope="module")
def http() -> TestClient:
    return client(FakeEngine(), max_body_bytes=100_000)


def check(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error object of an answer."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    return error


@pytest.mark.parametrize(("path", "body", "param"), CASES, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(http: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    answer = http.post(path, json=body)
    unknown_model = body.get("model") in ("gpt-4", "../../etc")
    error = check(answer, 404 if unknown_model else 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert http.post(TEXT, json={"prompt": "abc"}).status_code == 200


def test_too_long_a_prompt_is_told_with_the_numbers(http: TestClient) -> None:
    error = check(http.post(TEXT, json={"prompt": "x" * 4000, "max_tokens": 200}))
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("4096", "4000", "200"))


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "temperature": Infinity}', 400),
        (b'{"prompt": ' + b"[" * 50_000, 400),
        (b'{"prompt": "a"} {}', 400),
        (b'\xef\xbb\xbf{"prompt": "a"}', 400),
        ('{"prompt": "a"}'.encode("utf-16"), 400),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_not_an_object(http: TestClient, data: bytes, status: int) -> None:
    check(http.post(TEXT, content=data, headers={"Content-Type": "application/json"}), status)


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        (TEXT, "prompt", "[1]"),
        (TEXT, "prompt", '"a"'),
        (CHAT, "messages", '{"role": "user", "content": "a"}'),
        (CHAT, "messages", '{"role": "bad", "content": "a"}'),
        ("/v1/embeddings", "input", "[1]"),
        ("/tokenize", "messages", '{"role": "user", "content": "a"}'),
    ],
)
def test_a_million_small_items_are_refused_soon(path: str, field: str, item: str) -> None:
    """The loop that answers all clients reads bodies, so that one body must not keep it."""
    http = client(FakeEngine(), max_body_bytes=10**8)
    data = f'{{"{field}": [{", ".join([item] * 500_000)}]}}'.encode()
    start = time.process_time()
    error = check(http.post(path, content=data, headers={"Content-Type": "application/json"}))
    assert time.process_time() - start < 1.5
    if "[" in item or "{" in item:
        assert "objects and lists" in error["message"]
    else:
        assert error["param"] == field


def test_strings_without_an_end_do_not_keep_the_loop() -> None:
    """Each of a million quotes could begin a string to the end of the body."""
    http = client(FakeEngine(), max_body_bytes=10**8)
    data = b'{"prompt": ' + b"[" * 200_001 + b'"\\' * 1_000_000
    start = time.process_time()
    error = check(http.post(TEXT, content=data, headers={"Content-Type": "application/json"}))
    assert time.process_time() - start < 1.5
    assert "objects and lists" in error["message"]


def test_brackets_in_strings_are_text() -> None:
    http = client(FakeEngine(), max_body_bytes=10**8)
    text = json.dumps({"prompt": '\\"[{' * 110_000}).encode()
    assert "context" in check(http.post(TEXT, content=text, headers={"Content-Type": "application/json"}))["message"]


def test_the_body_must_be_declared_as_json(http: TestClient) -> None:
    """Without that, any web page could send requests to a server on the reader's own machine."""
    data = json.dumps({"prompt": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        check(http.post(TEXT, content=data, headers={"Content-Type": kind}), 415)
    kind = "application/json; charset=utf-8"
    assert http.post(TEXT, content=data, headers={"Content-Type": kind}).status_code == 200


def test_unknown_paths_and_methods(http: TestClient) -> None:
    check(http.post("/v1/images"), 404)
    check(http.get("/v1/models/nope"), 404)
    assert check(http.get(TEXT), 405)
    for path in ("/../etc/passwd", "/page.html", "/docs", "/static/x"):
        check(http.get(path), 404)


def test_images_are_refused_in_words(http: TestClient) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = check(http.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]}))
    assert "image_url" in error["message"]
    assert "reads text only" in error["message"]


def test_what_the_engine_refuses_is_an_error_of_the_request() -> None:
    engine = FakeEngine()

    def submit(request: Any, **options: Any) -> Any:
        raise InputError("the cache has no room for this request")

    engine.submit = submit  # type: ignore[method-assign]
    error = check(client(engine).post(TEXT, json={"prompt": "abc"}))
    assert error["message"] == "The cache has no room for this request."


def test_of_several_choices_none_is_left_running_when_one_is_refused() -> None:
    engine = FakeEngine(delay=0.01)
    submit, count = engine.submit, 0

    def third_fails(request: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise InputError("no room")
        return submit(request)

    engine.submit = third_fails  # type: ignore[method-assign]
    check(client(engine).post(TEXT, json={"prompt": "abc", "n": 4}))
    assert not engine.running
    assert all(stream.cancelled.is_set() for stream in engine.streams)


def test_an_engine_that_died_is_a_server_error() -> None:
    engine = FakeEngine()
    engine.dead = True
    http = client(engine)
    assert check(http.post(TEXT, json={"prompt": "abc"}), 500)["code"] == "internal_error"
    assert http.get("/health").status_code == 503


def test_without_grammars_structured_output_is_refused() -> None:
    engine = FakeEngine()
    engine.grammars = None
    for body in ({"guided_regex": "a"}, {"tools": [tool(name="f")], "tool_choice": "required"}):
        assert "llguidance" in check(client(engine).post(CHAT, json={"messages": [USER], **body}))["message"]


def test_a_full_queue_and_a_server_that_ends_ask_to_come_again() -> None:
    engine = FakeEngine()
    http = client(engine, max_waiting=3)
    # What would start at once takes no place in the queue.
    engine.free = 4
    assert http.post(TEXT, json={"prompt": "abc", "n": 7}).status_code == 200
    assert "7 at a time" in check(http.post(TEXT, json={"prompt": "abc", "n": 8}))["message"]
    engine.free, engine.waiting = 0, 2
    assert http.post(TEXT, json={"prompt": "abc"}).status_code == 200
    answer = http.post(TEXT, json={"prompt": "abc", "n": 2})
    assert check(answer, 503)["code"] == "overloaded"
    assert answer.headers["retry-after"] == "1"
    http.app.state.context.draining = True  # type: ignore[attr-defined]
    check(http.post(CHAT, json={"messages": [USER]}), 503)
    assert http.get("/health").status_code == 503


def test_keys() -> None:
    http = client(FakeEngine(), api_keys=("first", "schlüssel"))
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer firs"},
        {"Authorization": "Basic first"},
        {"Authorization": "first"},
        {"X-Api-Key": "first"},
    ):
        answer = http.get("/v1/models", headers=headers)
        assert check(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for key in (b"first", "schlüssel".encode()):
        assert http.get("/v1/models", headers={"Authorization": b"Bearer " + key}).status_code == 200
    for path in ("/metrics", "/version", "/openapi.json", "/v1/nothing"):
        check(http.get(path), 401)
    # The key is asked for before the body is looked at.
    check(http.post(TEXT, content=b"x" * 10**7), 401)
    assert http.get("/health").status_code == http.get("/").status_code == 200


def test_other_origins_are_let_in_only_by_name() -> None:
    origin = {"Origin": "https://a.example"}
    ask = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    closed = client(FakeEngine())
    assert "access-control-allow-origin" not in closed.get("/v1/models", headers=origin).headers
    check(closed.options(TEXT, headers=ask), 405)
    opened = client(FakeEngine(), allowed_origins=("https://a.example",), api_keys=("k",))
    assert opened.options(TEXT, headers=ask).headers["access-control-allow-origin"] == "https://a.example"
    # A browser shows an error to the page only with this header.
    assert opened.get("/v1/models", headers=origin).headers["access-control-allow-origin"] == "https://a.example"
    other = {"Origin": "https://b.example"}
    assert "access-control-allow-origin" not in opened.get("/health", headers=other).headers


def test_settings_that_make_no_sense() -> None:
    engine = FakeEngine()
    for wrong in ({"served_names": ()}, {"api_keys": ("",)}, {"max_logprobs": 21}, {"max_choices": 0}):
        with pytest.raises(InputError):
            ServerSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="poet"):
        create_app(Service(engine, defaults()), ServerSettings(served_names=("poet",)))
    for parts in ({}, {"engine": engine}, {"engine": engine, "scorer": FakeScorer(engine.config)}):
        with pytest.raises(InputError):
            Service(**parts)  # type: ignore[arg-type]
