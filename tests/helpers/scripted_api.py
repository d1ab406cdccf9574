"""Scripted models behind OpenAI's API, so that recipes ask them as they ask any server."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.scripted_server import Fault, scripted_server
from train.synthesize.generator import Generator, Request
from train.synthesize.openai_client import OpenAIGenerator


@contextlib.contextmanager
def reachable(models: Mapping[str, ScriptedGenerator], over_http: bool) -> Iterator[Mapping[str, Generator]]:
    """Generators that ask scripted models, by the names of a pipeline.

    Args:
      models: by the names of a pipeline.
      over_http: whether they are asked through a server of OpenAI's API; otherwise they are given as they are.

    Raises:
      Exception: at the end, what a script has raised in the server's thread.
    """
    if not over_http:
        yield models
        return
    by_name = {model.model: model for model in models.values()}
    raised: list[Exception] = []

    def answer(body: dict[str, Any]) -> Fault:
        try:
            return _reply(by_name[body["model"]], body)
        except Exception as error:
            raised.append(error)
            return Fault(400)

    with scripted_server(answer, tuple(by_name)) as server:
        clients = {name: OpenAIGenerator(server.url, name, key="", give_up_after=60.0) for name in by_name}
        try:
            yield {name: clients[model.model] for name, model in models.items()}
        finally:
            if raised:
                raise raised[0]
    assert server.asked


def _reply(model: ScriptedGenerator, body: dict[str, Any]) -> Fault:
    """What the server sends of the model's answer to the body of a request."""
    if "input" in body:
        reply = {"data": [{"index": 0, "embedding": model.vector(body["input"])}]}
        return Fault(body=json.dumps(reply).encode())
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    fields = {name: body[name] for name in ("messages", "max_tokens", "temperature", "top_p", "seed")}
    request = Request(**fields, stop=body.get("stop", ()), schema=schema)
    model.asked.append(request)
    found = model.answer(request)
    if found.refused is not None:
        return Fault(message={"content": None, "refusal": found.refused})
    return Fault(text=found.text, finish=found.finish)
