"""A server of OpenAI's completions on loopback that answers by a function, and misbehaves as it is told to."""

import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is sent in place of a good answer.

    Attributes:
      status: of HTTP.
      headers: further ones, such as Retry-After.
      sleep: seconds before anything is sent.
      drop: closes the connection: "before" the answer, or in the "middle" of it.
      body: sent as it is; None is an answer, or an error if the status says so.
      text: of the answer.
      finish: its finish_reason.
      message: changes to the message of the answer.
      half: sends only the first half of the answer's JSON, as if it were all.
    """

    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sleep: float = 0.0
    drop: str = ""
    body: bytes | None = None
    text: str = "text"
    finish: Any = "stop"
    message: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    half: bool = False


@dataclasses.dataclass(frozen=True)
class Received:
    """A request that came.

    Attributes:
      method, path: of HTTP.
      headers: with names in lower case.
      body: of JSON; None without one.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def key(self) -> str | None:
        """Its Idempotency-Key."""
        return self.headers.get("idempotency-key")


class ScriptedServer:
    """A server in a thread of this process.

    Attributes:
      url: of its API.
      received: all requests, in order.
      most_at_once: chat completions that were open at the same time.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], "str | Fault"], models: tuple[str, ...] = ("scripted",)):
        """
        Args:
          answer: is given the body of a request, and gives the text of its answer or a fault (for embeddings always a
            fault, with a body). It runs in the server's
            thread, one request at a time.
          models: what /v1/models says.
        """
        self.received: list[Received] = []
        self.most_at_once = 0
        self.models = models
        self._answer, self._open = answer, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of all chat completions, in order."""
        return [one.body for one in self.received if one.path == "/v1/chat/completions"]

    def close(self) -> None:
        """Closes all connections and ends the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**24, backlog=1024)

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of a connection until one of both sides closes it."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                await writer.drain()
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; returns whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        data = await reader.readexactly(int(headers.get("content-length", "0")))
        one = Received(method, path, headers, json.loads(data) if data else None)
        self.received.append(one)
        if (method, path) == ("GET", "/v1/models"):
            reply = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            writer.write(_response(200, {}, json.dumps(reply).encode()))
            return True
        if method != "POST" or path not in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            writer.write(_response(404, {}, _error("There is nothing here.")))
            return True
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            answer = self._answer(one.body)
            fault = answer if isinstance(answer, Fault) else Fault(text=answer)
            if fault.sleep:
                await asyncio.sleep(fault.sleep)
        finally:
            self._open -= 1
        response = _response(fault.status, fault.headers, _body(one.body, fault))
        if fault.drop:
            writer.write(b"" if fault.drop == "before" else response[:-10])
            return False
        writer.write(response)
        return True


def _body(request: dict[str, Any], fault: Fault) -> bytes:
    if fault.body is not None:
        return fault.body
    if fault.status >= 300:
        return _error(f"This is a scripted {fault.status}.")
    if "prompt" in request:
        choice = {"index": 0, "text": fault.text, "finish_reason": fault.finish}
        return json.dumps({"id": "1", "object": "text_completion", "choices": [choice]}).encode()
    message = {"role": "assistant", "content": fault.text, **fault.message}
    words = sum(len(str(one["content"]).split()) for one in request["messages"])
    usage = {"prompt_tokens": words, "completion_tokens": len(fault.text.split())}
    choice = {"index": 0, "message": message, "finish_reason": fault.finish}
    data = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    return data[: len(data) // 2] if fault.half else data


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "scripted", "param": None, "code": None}}).encode()


def _response(status: int, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status} Scripted", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@contextlib.contextmanager
def scripted_server(
    answer: Callable[[dict[str, Any]], str | Fault], models: tuple[str, ...] = ("scripted",)
) -> Iterator[ScriptedServer]:
    """A running server, which is stopped at the end; see `ScriptedServer`."""
    server = ScriptedServer(answer, models)
    try:
        yield server
    finally:
        server.close()
