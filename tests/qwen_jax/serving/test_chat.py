"""/v1/chat/completions: conversations, tools and log-probabilities, whole and streamed."""

import json
from typing import Any

import pytest

from tests.helpers.fake_engine import END_OF_TEXT, TURN_END, FakeEngine, FakeGrammar, byte_tokenizer
from tests.helpers.serving import client, events

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>"}}\n</tool_call>'


def chat(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    answer = client(engine).post("/v1/chat/completions", json={"messages": [USER], **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice of a whole answer, from the chunks of a stream."""
    mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    assert mine[0]["delta"] == {"role": "assistant", "content": ""}
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    ids: list[int] = []
    tokens: list[Any] = []
    for choice in mine[1:]:
        message["content"] += choice["delta"].get("content", "")
        for call in choice["delta"].get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                # The first delta has the name and no arguments, the others have pieces of these.
                assert (call["index"], call["function"]["arguments"]) == (len(calls), "")
                calls.append({key: value for key, value in call.items() if key != "index"})
            else:
                assert (call["index"], [*call["function"]]) == (len(calls) - 1, ["arguments"])
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        tokens += (choice["logprobs"] or {}).get("content", [])
        ids += choice.get("token_ids", [])
    if "tool_calls" in message:
        message["content"] = message["content"] or None
    assert all(choice["finish_reason"] is None for choice in mine[:-1])
    end = {"finish_reason": mine[-1]["finish_reason"]} | ({"token_ids": ids} if "token_ids" in mine[0] else {})
    return {"index": index, "message": message, "logprobs": tokens, **end}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """The identifiers of calls are random."""
    copy = json.loads(json.dumps(choice))
    for call in copy["message"].get("tool_calls", []):
        assert call.pop("id").startswith("call_")
    copy["logprobs"] = (
        (copy["logprobs"] or {}).get("content", []) if isinstance(copy["logprobs"], dict) else (copy["logprobs"] or [])
    )
    return copy


def test_a_conversation_is_rendered_by_the_models_template() -> None:
    engine = FakeEngine("Hello.")
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "user", "content": "c", "type": "text"},
    ]  # fmt: skip
    answer = chat(engine, messages=messages, tools=[TOOL])
    plain = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "2"},
        {"role": "user", "content": "c"},
    ]
    assert list(engine.requests[0].prompt) == byte_tokenizer().encode_chat(plain, [TOOL])
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello.", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_the_end_of_a_turn_ends_the_text_and_the_context_limits_it() -> None:
    engine = FakeEngine("Hello.", max_length=500)
    chat(engine)
    request = engine.requests[0]
    assert request.ending.eos_token_ids == {END_OF_TEXT, TURN_END}
    assert request.ending.max_new_tokens == 500 - len(request.prompt)
    chat(engine, max_completion_tokens=3)
    assert engine.requests[1].ending.max_new_tokens == 3


@pytest.mark.parametrize("tokens_per_step", [1, 2, 7])
@pytest.mark.parametrize(
    ("reply", "body"),
    [
        ("Hé 🙂", {}),
        ("Hé 🙂", {"logprobs": True, "top_logprobs": 2}),
        ("Hello", {"n": 3}),
        ("Hello", {"max_tokens": 2}),
        ("a <tool_call> b", {}),
        (f"Let me see.\n{CALL}", {"tools": [TOOL]}),
        (f"{CALL}\n{CALL}", {"tools": [TOOL], "n": 2}),
        (f"{CALL}\n{CALL}", {"tools": [TOOL], "parallel_tool_calls": False}),
        (CALL, {"tools": [TOOL], "logprobs": True}),
        (CALL, {"tools": [TOOL], "tool_choice": "required"}),
        (CALL, {"tools": [TOOL], "max_tokens": 35}),
        (CALL, {"tools": [TOOL], "max_tokens": 5}),
        (CALL, {"tools": [TOOL], "tool_choice": "none"}),
        ("<tool_call>{broken</tool_call>", {"tools": [TOOL]}),
        ("Hé 🙂", {"return_token_ids": True, "n": 2}),
        (f"{CALL}\n{CALL}", {"tools": [TOOL], "return_token_ids": True, "logprobs": True}),
        (f"{CALL}\n{CALL}", {"tools": [TOOL], "return_token_ids": True, "parallel_tool_calls": False}),
        ("Hello", {"stop": "ll", "include_stop_str_in_output": True}),
    ],
)
def test_a_stream_equals_the_whole_answer(reply: str, body: dict[str, Any], tokens_per_step: int) -> None:
    engine = FakeEngine(reply, tokens_per_step=tokens_per_step)
    whole = chat(engine, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client(engine).post("/v1/chat/completions", json={"messages": [USER], **body, **options})
    *chunks, last = events(answer.text)
    assert last["usage"] == whole["usage"]
    prompts = [chunk.get("prompt_token_ids") for chunk in chunks]
    assert prompts == [whole.get("prompt_token_ids"), *[None] * (len(chunks) - 1)]
    assert (prompts[0] is not None) == ("return_token_ids" in body)
    for expected in whole["choices"]:
        assert without_ids(joined(chunks, expected["index"])) == without_ids(expected)


def test_tool_calls() -> None:
    choice = chat(FakeEngine(f"Look.\n{CALL}\n{CALL}"), tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Look."
    calls = choice["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == 2
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": '{"x": "</tool_call>"}'}] * 2


def test_without_parallel_calls_the_text_ends_with_the_first() -> None:
    engine = FakeEngine(f"{CALL}\n{CALL}")
    answer = chat(engine, tools=[TOOL], parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert engine.streams[0].cancelled.is_set()
    assert answer["usage"]["completion_tokens"] < len(CALL)


def test_arguments_that_are_cut_off_end_by_length() -> None:
    choice = chat(FakeEngine(CALL), tools=[TOOL], max_tokens=35)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": '}


def test_without_tools_a_call_is_text() -> None:
    engine = FakeEngine(CALL)
    assert chat(engine)["choices"][0]["message"]["content"] == CALL
    answer = chat(engine, tools=[TOOL], tool_choice="none")
    assert answer["choices"][0]["message"]["content"] == CALL
    assert engine.requests[0].prompt == engine.requests[1].prompt


@pytest.mark.parametrize(
    ("choice", "named", "parallel"),
    [("required", None, True), ({"type": "function", "function": {"name": "g"}}, "g", False)],
)
def test_calls_are_forced_by_a_grammar(choice: Any, named: str | None, parallel: bool) -> None:
    engine = FakeEngine(CALL)
    assert chat(engine, tools=[TOOL, OTHER], tool_choice=choice)["choices"][0]["finish_reason"] == "tool_calls"
    grammar = engine.requests[0].grammar
    assert isinstance(grammar, FakeGrammar)
    assert grammar.source == ([("f", {"type": "object"}), ("g", {"type": "object"})], named, parallel)
    chat(engine, tools=[TOOL, OTHER])
    assert engine.requests[1].grammar is None


def test_log_probabilities() -> None:
    content = chat(FakeEngine("é"), logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in content[:2]] == [[0xC3], [0xA9]]
    assert [x["token"] for x in content[0]["top_logprobs"]] == ["!", '"']
    # The token that ended the text has one, too.
    assert content[-1]["token"] == "<|im_end|>"


def test_a_failure_of_one_choice_is_an_error_of_the_request_and_of_no_other() -> None:
    engine = FakeEngine("Hello", fail_after=2)
    http = client(engine)
    failed = http.post("/v1/chat/completions", json={"messages": [USER], "n": 2})
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "model_error"
    streamed = http.post("/v1/chat/completions", json={"messages": [USER], "stream": True})
    assert streamed.status_code == 200
    assert events(streamed.text)[-1]["error"]["message"] == "The logits are not finite."
    assert not engine.running
    engine.fail_after = None
    assert http.post("/v1/chat/completions", json={"messages": [USER]}).status_code == 200


def test_a_request_that_takes_too_long_is_ended() -> None:
    engine = FakeEngine("Hello" * 50, delay=0.05)
    http = client(engine, request_timeout=0.3)
    whole = http.post("/v1/chat/completions", json={"messages": [USER]})
    assert whole.status_code == 504
    streamed = http.post("/v1/chat/completions", json={"messages": [USER], "stream": True, "n": 2})
    assert events(streamed.text)[-1]["error"]["code"] == "timeout"
    assert not engine.running
    assert all(stream.cancelled.is_set() for stream in engine.streams)
