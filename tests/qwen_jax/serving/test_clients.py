"""Clients of others: OpenAI's library, and schemathesis, which sends what the description of the API allows."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.fake_engine import FakeEngine
from tests.helpers.serving import Running, serve

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER: Any = {"role": "user", "content": "hi"}


@pytest.fixture
def openai(running: tuple[FakeEngine, Running]) -> Iterator[Any]:
    library = pytest.importorskip("openai")
    with library.OpenAI(base_url=f"{running[1].url}/v1", api_key="secret", max_retries=0) as found:
        yield found


@pytest.fixture
def running() -> Iterator[tuple[FakeEngine, Running]]:
    engine = FakeEngine("Hello, you.")
    with serve(engine, api_keys=("secret",)) as found:
        yield engine, found


def test_openai_models_completions_and_embeddings(openai: Any) -> None:
    assert [model.id for model in openai.models.list()] == ["model", "poet"]
    assert openai.models.retrieve("poet").id == "poet"
    done = openai.completions.create(model="model", prompt=["a", "b"], max_tokens=5, logprobs=2, echo=True)
    assert [choice.text for choice in done.choices] == ["aHello", "bHello"]
    assert done.choices[0].logprobs.token_logprobs[0] is None
    stream = openai.completions.create(model="model", prompt="a", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"
    # The library asks for base64 on its own.
    assert len(openai.embeddings.create(model="model", input="abc").data[0].embedding) == 8


def test_openai_chats(openai: Any, running: tuple[FakeEngine, Running]) -> None:
    answer = openai.chat.completions.create(model="model", messages=[USER], logprobs=True, top_logprobs=2, seed=1)
    assert answer.choices[0].message.content == "Hello, you."
    assert answer.choices[0].logprobs.content[0].token == "H"
    # An answer of the library can be sent back as it is.
    again = [USER, answer.choices[0].message, USER, answer.choices[0].message.model_dump(), USER]
    openai.chat.completions.create(model="model", messages=again)
    running[0].reply = CALL
    called = openai.chat.completions.create(model="model", messages=[USER], tools=[TOOL]).choices[0]
    assert called.finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": called.message.tool_calls[0].id, "content": "2"}
    openai.chat.completions.create(model="model", messages=[USER, called.message, result], tools=[TOOL])


def test_openai_streams_of_chats(openai: Any, running: tuple[FakeEngine, Running]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(openai.chat.completions.create(model="model", messages=[USER], **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, you."
    assert chunks[-1].usage.completion_tokens == 12
    running[0].reply = f"Look.\n{CALL}\n{CALL}"
    with openai.chat.completions.stream(model="model", messages=[USER], tools=[TOOL]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Look."
    assert [call.function.arguments for call in message.tool_calls] == ['{"x": 1}'] * 2


def test_openai_parses_structured_output(openai: Any, running: tuple[FakeEngine, Running]) -> None:
    import pydantic

    class Answer(pydantic.BaseModel):
        x: int

    running[0].reply = '{"x": 3}'
    parsed = openai.chat.completions.parse(model="model", messages=[USER], response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(x=3)
    grammar: Any = running[0].requests[-1].grammar
    assert grammar.source["properties"] == {"x": {"title": "X", "type": "integer"}}


def test_openai_raises_its_own_errors(openai: Any, running: tuple[FakeEngine, Running]) -> None:
    import openai as library

    with pytest.raises(library.NotFoundError) as found:
        openai.chat.completions.create(model="gpt-4", messages=[USER])
    assert found.value.code == "model_not_found"
    with pytest.raises(library.BadRequestError, match="temperature"):
        openai.chat.completions.create(model="model", messages=[USER], temperature=9)
    with pytest.raises(library.AuthenticationError):
        openai.with_options(api_key="wrong").models.list()
    running[0].fail_after = 3
    with pytest.raises(library.APIError, match="not finite"):
        list(openai.chat.completions.create(model="model", messages=[USER], stream=True))


def test_no_request_that_the_description_allows_is_a_server_error() -> None:
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis
    from starlette.testclient import TestClient

    from tests.helpers.serving import client

    http: TestClient = client(FakeEngine())
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=30, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: Any) -> None:
            body = {} if isinstance(case.body, schemathesis.core.NotSet) else {"json": case.body}
            path = case.path.format(**(case.path_parameters or {})) if "{" in case.path else case.path
            answer = http.request(case.method, path, **body)
            assert answer.status_code < 500, (body, answer.text)

        check()
    # Not everything is refused.
    assert http.post("/v1/completions", json={"prompt": "hi", "ignore_eos": True}).status_code == 200
