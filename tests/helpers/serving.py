"""What tests of the server share: a client without sockets, a server on loopback, and events of a stream."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from qwen_jax.serving.app import create_app
from qwen_jax.serving.server import Server, listen
from qwen_jax.serving.settings import ServerSettings, Service
from tests.helpers.fake_engine import FakeEngine, defaults


def client(engine: FakeEngine, **settings: Any) -> TestClient:
    """A client of an application in this process."""
    return TestClient(create_app(Service(engine, defaults()), ServerSettings(**settings)))


class Running:
    """A server on loopback in a thread of this process.

    Attributes:
      url: where it serves.
      server: uvicorn's; `stop` does what SIGTERM does.
    """

    def __init__(self, service: Service, **settings: Any) -> None:
        app = create_app(service, ServerSettings(**settings))
        self.context = app.state.context
        self._listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=30)
        self.server = Server(config, self.context)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.handle_exit(15, None)

    def join(self, seconds: float = 20) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def serve(engine: FakeEngine, **settings: Any) -> Iterator[Running]:
    """A running server, which is stopped at the end."""
    running = Running(Service(engine, defaults()), **settings)
    try:
        yield running
    finally:
        running.context.abort()
        running.stop()
        running.join()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for a condition. Raises AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a stream that has ended with [DONE]."""
    parts = text.split("\n\n")
    assert parts[-1] == ""
    assert parts[-2] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def run(coroutine: Any) -> Any:
    """Runs a coroutine, with a time limit."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))
