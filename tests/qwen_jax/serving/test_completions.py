"""/v1/completions: what goes to the engine, and what comes back, whole and streamed."""

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.settings import GenerationDefaults
from qwen_jax.serving.app import create_app
from qwen_jax.serving.settings import ServerSettings, Service
from tests.helpers.fake_engine import END_OF_TEXT, FakeEngine, FakeGrammar, FakeScorer, byte_tokenizer, logprob
from tests.helpers.serving import client, events


def complete(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    answer = client(engine).post("/v1/completions", json={"prompt": "abc", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("abc", [[64, 65, 66]]),
        ([64, 65], [[64, 65]]),
        (["a", "bc"], [[64], [65, 66]]),
        ([[64], [65, 66]], [[64], [65, 66]]),
    ],
)
def test_a_prompt_is_text_or_ids_or_a_list_of_either(prompt: Any, prompts: list[list[int]]) -> None:
    engine = FakeEngine("xyz")
    answer = complete(engine, prompt=prompt)
    assert [list(request.prompt) for request in engine.requests] == prompts
    assert [choice["text"] for choice in answer["choices"]] == ["xyz"] * len(prompts)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_every_field_reaches_the_engine() -> None:
    engine = FakeEngine("xyz")
    complete(
        engine,
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={"64": 5, "65": -100}, min_tokens=2, seed=11, max_tokens=9,
        stop=["q", "rs"], stop_token_ids=[100], logprobs=3, n=2, user="someone",
    )  # fmt: skip
    first, second = engine.requests
    assert first.sampling == SamplingParams(0.5, 7, 0.9, 0.1, 1.1, 11)
    assert second.sampling.seed == 12
    assert (first.presence_penalty, first.frequency_penalty) == (0.5, -0.5)
    assert first.logit_bias == {64: 5, 65: -100}
    assert (first.min_tokens, first.top_logprobs, first.prompt_logprobs) == (2, 3, False)
    assert first.ending.max_new_tokens == 9
    assert first.ending.stop == ("q", "rs")
    assert first.ending.eos_token_ids == {100, END_OF_TEXT}
    complete(engine, ignore_eos=True, max_tokens=2)
    assert engine.requests[-1].ending.eos_token_ids == frozenset()


def test_what_a_request_does_not_say_comes_from_generation_config() -> None:
    engine = FakeEngine("xyz")
    recommended = GenerationDefaults(SamplingParams(0.7, 20, 0.8, 0.0, 1.05), (END_OF_TEXT,), max_new_tokens=77)
    app = create_app(Service(engine, recommended), ServerSettings())
    with TestClient(app) as http:
        assert http.post("/v1/completions", json={"prompt": "abc", "top_k": -1}).status_code == 200
    request = engine.requests[0]
    assert request.ending.max_new_tokens == 77
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.7, -1, 0.8)
    assert engine.closed
    complete(engine)
    assert engine.requests[-1].ending.max_new_tokens == 16


def test_without_a_seed_each_choice_has_its_own() -> None:
    engine = FakeEngine("xyz")
    complete(engine, n=3)
    complete(engine)
    assert len({request.sampling.seed for request in engine.requests}) == 4
    complete(engine, seed=-1, n=2)
    assert [request.sampling.seed for request in engine.requests[-2:]] == [2**32 - 1, 0]


def test_echo_with_logprobs_as_lm_eval_reads_it() -> None:
    """Log-probabilities of the prompt, and a token's is the maximum of its top ones only if it is the likeliest."""
    answer = complete(
        FakeEngine("x"), prompt=[[65, 66, 67]], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1
    )
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["b", "c", "d", "x"]
    assert logprobs["token_logprobs"] == [None, *(logprob(i) for i in (66, 67, 87))]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"!": logprob(0), "c": logprob(66)}
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert answer["choices"][0]["text"] == "bcdx"


def test_offsets_of_an_echo_are_those_of_its_text() -> None:
    """Also behind control tokens, which are a part of the prompt's text."""
    prompt = "<|im_start|>user\nab<|im_end|>\n<tool_call>cd"
    answer = complete(FakeEngine("xyz"), prompt=prompt, echo=True, max_tokens=1, logprobs=0)
    text, logprobs = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
    assert text.startswith(prompt)
    assert logprobs["text_offset"][-1] == len(prompt)
    for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(name)


def test_echo_of_a_text_without_new_tokens() -> None:
    answer = complete(FakeEngine("xyz"), echo=True, max_tokens=0, logprobs=0)
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    assert answer["usage"]["completion_tokens"] == 0


def test_parts_of_characters_are_told_apart_in_log_probabilities() -> None:
    answer = complete(FakeEngine("é"), logprobs=0)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"][:3] == [0, 0, 1]
    assert answer["choices"][0]["text"] == "é"


def test_best_of_takes_the_likeliest_texts() -> None:
    engine = FakeEngine(lambda request: ["bad", "c!!", "!!!"][request.sampling.seed] + "")
    answer = complete(engine, seed=0, best_of=3, n=2, max_tokens=3)
    assert [choice["text"] for choice in answer["choices"]] == ["!!!", "c!!"]
    assert answer["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3, "seed": 0},
        {"prompt": ["a", "b"], "n": 2, "seed": 0},
        {"logprobs": 2},
        {"echo": True, "n": 2, "seed": 0},
        {"echo": True, "max_tokens": 0},
        {"stop": "l"},
        {"stop": "l", "include_stop_str_in_output": True},
        {"max_tokens": 2},
        {"max_tokens": 200},
        {"return_token_ids": True},
        {"return_token_ids": True, "prompt": ["a", "b"], "n": 2, "seed": 0, "logprobs": 1},
        {"return_token_ids": True, "echo": True, "n": 2, "seed": 0},
        {"return_token_ids": True, "echo": True, "max_tokens": 0},
        {"return_token_ids": True, "truncate_prompt_tokens": 2, "echo": True},
    ],
)
def test_a_stream_equals_the_whole_answer(body: dict[str, Any], tokens_per_step: int) -> None:
    def reply(request: Any) -> str:
        return f"Hé llo {request.sampling.seed}" + "🙂" * (request.sampling.seed % 3)

    engine = FakeEngine(reply, tokens_per_step=tokens_per_step)
    body = {"seed": 5, "max_tokens": 100, **body}
    whole = complete(engine, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client(engine).post("/v1/completions", json={"prompt": "abc", **body, **options})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer.text)
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for expected in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(c["text"] for c in mine) == expected["text"]
        assert [c["finish_reason"] for c in mine][-1] == expected["finish_reason"]
        assert all(c["finish_reason"] is None for c in mine[:-1])
        assert mine[-1]["stop_reason"] == expected["stop_reason"]
        if expected["logprobs"]:
            for key, values in expected["logprobs"].items():
                assert [x for c in mine if c["logprobs"] for x in c["logprobs"][key]] == values
        if "return_token_ids" in body:
            assert [token for c in mine for token in c["token_ids"]] == expected["token_ids"]
            assert [c["prompt_token_ids"] for c in mine] == [expected["prompt_token_ids"], *[None] * (len(mine) - 1)]
        else:
            assert all(c.keys().isdisjoint({"token_ids", "prompt_token_ids"}) for c in [*mine, expected])


def test_stop_strings_are_cut_off_and_named() -> None:
    choice = complete(FakeEngine("Hello"), stop=["ll"])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("He", "stop", "ll")


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"guided_json": {"type": "object"}}, "json_schema", {"type": "object"}),
        ({"guided_json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_grammar": "start: 'a'"}, "ebnf", "start: 'a'"),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"json_object": True}}, "json_object", None),
        ({"response_format": {"type": "json_object"}}, "json_object", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            "json_schema",
            {"type": "array"},
        ),
    ],
)
def test_structured_output(body: dict[str, Any], kind: str, source: Any) -> None:
    engine = FakeEngine("x")
    complete(engine, n=2, **body)
    grammar = engine.requests[0].grammar
    assert isinstance(grammar, FakeGrammar)
    assert (grammar.kind, grammar.source) == (kind, source)
    assert engine.requests[1].grammar is grammar


def test_an_adapter_is_a_model() -> None:
    engine = FakeEngine("x")
    assert complete(engine, model="poet")["model"] == "poet"
    assert complete(engine, model="model")["model"] == "model"
    assert [request.adapter for request in engine.requests] == ["poet", None]


def test_embeddings() -> None:
    http = client(FakeEngine())
    body = {"input": ["a", "bcd"], "model": "model"}
    as_lists = http.post("/v1/embeddings", json=body).json()
    as_text = http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    assert as_lists["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    for i in range(2):
        vector = np.asarray(as_lists["data"][i]["embedding"], np.float32)
        assert np.linalg.norm(vector) == pytest.approx(1)
        decoded = np.frombuffer(base64.b64decode(as_text["data"][i]["embedding"]), "<f4")
        np.testing.assert_array_equal(decoded, vector)
    raw = http.post("/v1/embeddings", json={"input": [[64, 66]], "pooling": "last", "normalize": False}).json()
    assert raw["data"][0]["embedding"][0] == 67


def test_scores_of_a_reward_model() -> None:
    engine = FakeEngine()
    app = create_app(Service(scorer=FakeScorer(engine.config), scorer_tokenizer=byte_tokenizer()), ServerSettings())
    http = TestClient(app)

    def lengths(**body: Any) -> list[int]:
        answer = http.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        assert [x["index"] for x in answer.json()["data"]] == list(range(len(answer.json()["data"])))
        return [round(x["score"] ** 2) for x in answer.json()["data"]]

    assert lengths(input=["a", "bc"]) == [1, 2]
    assert lengths(input=[64, 65, 66]) == [3]
    assert lengths(text_1="ab", text_2=["c", "de"]) == [4, 5]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = len(byte_tokenizer().encode_chat(talk, add_generation_prompt=False))
    assert lengths(messages=talk) == [rendered]
    assert lengths(messages=[talk, talk]) == [rendered] * 2
    for path, body in ("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"}):
        assert http.post(path, json=body).status_code == 404
    assert http.get("/metrics").status_code == http.get("/health").status_code == 200
    assert client(engine).post("/v1/score", json={"input": "a"}).status_code == 404


def test_tokenize_and_detokenize() -> None:
    http = client(FakeEngine())
    ids = http.post("/tokenize", json={"prompt": "aé", "return_token_strs": True}).json()
    assert ids["count"] == 3
    assert ids["max_model_len"] == 4096
    assert ids["token_strs"][0] == "a"
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "aé"}
    messages = [{"role": "user", "content": "hi"}]
    talk = http.post("/tokenize", json={"messages": messages}).json()
    assert talk["tokens"] == byte_tokenizer().encode_chat(messages)
    closed = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert closed["count"] < talk["count"]
