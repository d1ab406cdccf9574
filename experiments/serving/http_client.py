"""One client of the HTTP server, in this process over loopback. Needs `qwen_jax.serving`."""

import http.client
import importlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from experiments.serving.models import random_prompts
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.settings import GenerationDefaults

_serving = {name: importlib.import_module(f"qwen_jax.serving.{name}") for name in ("app", "server", "settings")}


@contextmanager
def serve(engine: ContinuousEngine) -> Iterator[int]:
    """A server of an engine; gives its port. The engine ends with the server."""
    uvicorn = importlib.import_module("uvicorn")
    settings = _serving["settings"]
    service = settings.Service(engine, GenerationDefaults(SamplingParams(), ()))
    app = _serving["app"].create_app(service, settings.ServerSettings())
    listener = _serving["server"].listen("127.0.0.1", 0)
    server = _serving["server"].Server(uvicorn.Config(app, log_level="warning"), app.state.context)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.handle_exit(15, None)
        thread.join()
        listener.close()


def complete(port: int, prompt: tuple[int, ...], new: int) -> tuple[float, float, int]:
    """Streams one completion: seconds to the first token, seconds from there to the last one, and tokens."""
    body = {
        "prompt": list(prompt),
        "max_tokens": new,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    begin = time.perf_counter()
    client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = client.getresponse()
    if response.status != 200:
        raise RuntimeError(f"The server answered {response.status}: {response.read()[:500]!r}")
    first = last = 0.0
    tokens = 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if event.get("choices"):
            last = time.perf_counter()
            first = first or last
    client.close()
    return first - begin, last - first, tokens


def one_by_one(engine: ContinuousEngine, prompt: int, new: int) -> dict[str, Any]:
    """The median rate of three requests, one after the other, after one that is not counted."""
    prompts = random_prompts(engine, [prompt] * 4)
    with serve(engine) as port:
        found = [complete(port, ids, new) for ids in prompts][1:]
    rates = [(tokens - 1) / seconds for _, seconds, tokens in found]
    return {
        "decode_tokens_per_s": float(np.median(rates)),
        "lowest": min(rates),
        "highest": max(rates),
        "ttft_median_ms": 1e3 * float(np.median([first for first, *_ in found])),
        "prompt": prompt,
        "new": new,
    }


def post(
    port: int,
    body: dict[str, Any],
    lines: int = -1,
    path: str = "/v1/completions",
    begun: Callable[[], Any] | None = None,
) -> tuple[int, bool]:
    """Sends a request, and hangs up after some lines of the answer: the status, and whether a stream has ended.

    Args:
      port: of the server on this machine.
      body: of the request.
      lines: to read before hanging up; -1 for all.
      path: of the endpoint.
      begun: is called when the status has come.
    """
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    done = False
    try:
        client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = client.getresponse()
        if begun is not None:
            begun()
        for line in response:
            done |= line.startswith(b"data: [DONE]")
            lines -= 1
            if not lines:
                break
        return response.status, done
    finally:
        client.close()
