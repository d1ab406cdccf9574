"""The soak over HTTP: the server is a process of its own, which gets SIGTERM at the end.

`soak --server` starts `python -m experiments.serving.soak_server` with the same options. That process makes the engine,
serves it as `qwen-jax serve` does, and prints JSON lines: its port, its memory now and then, and what is left after
the drain.
"""

import asyncio
import concurrent.futures
import http.client
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax

from experiments.decode.benchmark import say
from experiments.serving import http_client
from experiments.serving.soak import Clients, Watch, an_engine, judged, parse
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.settings import GenerationDefaults
from qwen_jax.serving.app import create_app
from qwen_jax.serving.server import run
from qwen_jax.serving.settings import ServerSettings, Service

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
# Requests that run when SIGTERM comes, and texts of each: more than there are places, so that some wait.
_DRAINED, _CHOICES = 4, 16


class HttpClients(Clients):
    """Clients of a server: they stream, hang up in the middle, and send bodies that are wrong.

    Args:
      port: of the server on this machine.
      vocab_limit: token ids are below it.
      max_length: tokens of a prompt and its text.
      seed: of what is sent.
      threads: how many requests may be open.
    """

    def __init__(self, port: int, vocab_limit: int, max_length: int, seed: int, threads: int) -> None:
        super().__init__(vocab_limit, max_length, seed)
        self._port, self._pool = port, concurrent.futures.ThreadPoolExecutor(threads)
        self.do = {"read": self._send, "whole": self._send, "bad": self._bad}
        self.do |= {"score": self._score, "embed": self._embed}
        self.do |= dict.fromkeys(("cancel", "reader is cancelled", "reader goes away"), self._hang_up)

    def _body(self) -> tuple[str, dict[str, Any]]:
        """A path and a request: a completion, a chat, or a text that a schema constrains."""
        new, kind = int(self.rng.integers(1, self.max_length // 2)), self.rng.random()
        body: dict[str, Any] = {"max_tokens": new, "temperature": 0.8, "seed": int(self.rng.integers(2**32))}
        if kind < 0.7:
            return "/v1/completions", {**body, "prompt": self._ids(self.max_length - new)}
        if kind < 0.9:
            # The template takes half of the tokens that the smallest size has.
            messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]
            return "/v1/chat/completions", {**body, "messages": messages, "max_tokens": (new + 1) // 2}
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        return "/v1/completions", {**body, "prompt": self._ids(self.max_length - new), "response_format": format}

    async def _post(self, path: str, body: dict[str, Any], lines: int = -1) -> tuple[int, bool]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, http_client.post, self._port, body, lines, path)

    async def _answered(self, path: str, body: dict[str, Any]) -> None:
        status, done = await self._post(path, body)
        self.counts[f"status {status}"] += 1
        if status != 200 or (body.get("stream") and not done):
            self.unexpected.append(f"{path}: status {status}, the stream {'has ended' if done else 'was cut'}")

    async def _send(self) -> None:
        path, body = self._body()
        await self._answered(path, {**body, "stream": bool(self.rng.integers(2))})

    async def _hang_up(self) -> None:
        path, body = self._body()
        status, _ = await self._post(path, {**body, "stream": True}, int(self.rng.integers(1, 40)))
        if status != 200:
            self.unexpected.append(f"{path}: status {status}")

    async def _bad(self) -> None:
        bad: tuple[dict[str, Any], ...] = (
            {"prompt": [self.vocab_limit]},
            {"prompt": []},
            {"prompt": [1], "max_tokens": -1},
            {"prompt": [1], "temperature": 9},
            {"prompt": [1] * (self.max_length + 1)},
            {"prompt": [1], "unknown": 1},
            {"prompt": [1], "model": "missing"},
            {"prompt": [1], "guided_regex": "("},
            {"prompt": [1], "guided_json": {"type": "nothing"}},
        )
        status, _ = await self._post("/v1/completions", bad[int(self.rng.integers(len(bad)))])
        self.counts[f"refused with {status}"] += 1
        if not 400 <= status < 500:
            self.unexpected.append(f"a bad body got status {status}")

    async def _score(self) -> None:
        body = {"prompt": self._ids(self.max_length // 2), "echo": True, "logprobs": 1, "max_tokens": 0}
        await self._answered("/v1/completions", body)

    async def _embed(self) -> None:
        await self._answered("/v1/embeddings", {"input": self._ids(self.max_length // 2)})

    def drain(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Sends SIGTERM while requests run: whether all reached their ends, and how long the process took to end."""
        new = min(self.max_length // 2, 256)
        body = {"prompt": [1, 2, 3], "max_tokens": new, "n": _CHOICES, "temperature": 0.8, "stream": True}
        begun: queue.SimpleQueue[None] = queue.SimpleQueue()

        def ask() -> tuple[int, bool]:
            return http_client.post(self._port, body, begun=lambda: begun.put(None))

        asked = [self._pool.submit(ask) for _ in range(_DRAINED)]
        for _ in asked:
            begun.get(timeout=60)
        running = sum(not one.done() for one in asked)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        ended = [one.result(timeout=60) == (200, True) for one in asked]
        status = process.wait(60)
        return {
            "drained": running > 0 and all(ended) and status == 0,
            "running_at_sigterm": running,
            "ended_whole": sum(ended),
            "exit_status": status,
            "drain_s": time.monotonic() - begin,
        }


def soak_server(args: Any, options: list[str]) -> dict[str, Any]:
    """Starts the server, runs clients for some time, and ends it by SIGTERM.

    Args:
      args: the command line of `soak`.
      options: the same as text, for the process of the server.
    """
    command = [sys.executable, "-m", "experiments.serving.soak_server", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if "port" in (about := _record(line)):
                    break
            else:
                raise SystemExit(f"The server ended before it served, with status {process.wait()}.")
            clients = HttpClients(about["port"], about["vocab_limit"], about["max_length"], args.seed, args.clients)
            told: dict[str, Any] = {}

            def follow() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    told.update(_record(line))
                    print(line, end="", flush=True)

            follower = threading.Thread(target=follow, daemon=True)
            follower.start()
            until = time.monotonic() + 60 * args.minutes

            async def load() -> None:
                await asyncio.gather(*(clients.run(until) for _ in range(args.clients)))

            asyncio.run(load())
            left = _until_idle(about["port"])
            drained = clients.drain(process)
            follower.join(60)
        finally:
            process.kill()  # Where it has ended, nothing happens.
    if not told.keys() >= {"watch", "right"}:
        raise SystemExit(f"The server ended before it told what it had seen, with status {process.wait()}.")
    result = judged(clients, told["watch"], left, drained=drained.pop("drained"), pages_are_right=told["right"])
    return {"card": about["card"], **result, **drained}


def _record(line: str) -> dict[str, Any]:
    """What a line of the server says; empty if it is no JSON object, such as one of a library."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _until_idle(port: int, seconds: float = 120.0) -> dict[str, float]:
    """Waits for the last request's end: what /metrics then says is in use."""
    names = {"running": "num_requests_running", "waiting": "num_requests_waiting", "pages_used": "kv_cache_usage_perc"}
    end = time.monotonic() + seconds
    while True:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        client.request("GET", "/metrics")
        lines = client.getresponse().read().decode().splitlines()
        client.close()
        left = {
            key: float(next(line for line in lines if line.startswith(f"vllm:{name}{{")).split()[-1])
            for key, name in names.items()
        }
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.1)


def main() -> None:
    args = parse()
    engine = an_engine(args)
    app = create_app(Service(engine, GenerationDefaults(SamplingParams(), ())), ServerSettings())
    watch, begin, ends = Watch(), time.monotonic(), threading.Event()

    def look() -> None:
        while not ends.wait(args.every):
            say(seconds=round(time.monotonic() - begin, 1), **watch.look(engine))

    looking = threading.Thread(target=look, daemon=True)

    def announce(url: str) -> None:
        limits = {"vocab_limit": engine.vocab_limit, "max_length": engine.max_length}
        say(port=int(url.rpartition(":")[2]), card=jax.devices()[0].device_kind, **limits)
        looking.start()

    run(app, "127.0.0.1", 0, announce)
    ends.set()
    looking.join()
    # The engine's thread has ended with the server: nothing else touches its books.
    engine._scheduler.check()
    engine._pool.check()
    idle = engine._pool.num_free == engine._pool.num_pages
    print(json.dumps({"watch": watch.summary(), "right": idle}), flush=True)


if __name__ == "__main__":
    main()
