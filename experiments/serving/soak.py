"""Minutes of mixed load with cancellations, bad requests and readers that go away: does everything stay as it was?

    python -m experiments.serving.soak --minutes 9 --folder results
    python -m experiments.serving.soak --minutes 9 --server --folder results
    JAX_PLATFORMS=cpu python -m experiments.serving.soak --size tiny --minutes 0.2

Clients send one request after the other, each of a random kind (`KINDS`). Every few seconds there is a JSON line with
the memory of process and device. The last line says whether all is well: every error was one that was asked for, the
memory of the last quarter is that of the second one, and no page is left in use. The status is 1 if something is not.

With `--server` the engine is in a process of its own, behind the HTTP server, and the memory is that process's. At the
end it gets SIGTERM while requests run: they must reach their ends, and its status must be 0 (`soak_server`).
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.decode.benchmark import say
from experiments.serving.cases import a_tokenizer
from experiments.serving.models import make_engine
from experiments.serving.sizes import SIZES
from qwen_jax.errors import InputError
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.published import published

KINDS = {
    "read": 0.40,
    "whole": 0.15,
    "cancel": 0.15,
    "reader is cancelled": 0.10,
    "reader goes away": 0.05,
    "bad": 0.10,
    "score": 0.03,
    "embed": 0.02,
}
"""What clients do, and how often. A reader that goes away neither reads nor cancels: its request runs to its end."""
GROWTH = 0.02, 32 * 2**20
"""How much memory may grow from the second quarter to the last: this share, and these bytes."""


class Clients:
    """Sends requests, and counts how they ended.

    Args:
      vocab_limit: token ids are below it.
      max_length: tokens of a prompt and its text.
      seed: of what is sent.

    Attributes:
      do: what is done for each of `KINDS`.
      counts: of each kind, and of the reasons for which texts ended.
      unexpected: errors that nobody asked for.
    """

    def __init__(self, vocab_limit: int, max_length: int, seed: int) -> None:
        self.vocab_limit, self.max_length, self.rng = vocab_limit, max_length, np.random.default_rng(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.unexpected: list[str] = []
        self.do: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {}

    async def run(self, until: float) -> None:
        """One request after the other, until a time of `time.monotonic`."""
        kinds, shares = list(KINDS), np.asarray(list(KINDS.values()))
        while time.monotonic() < until:
            kind = kinds[self.rng.choice(len(kinds), p=shares / shares.sum())]
            self.counts[kind] += 1
            try:
                await self.do[kind]()
            except Exception as error:
                self.unexpected.append(f"{kind}: {type(error).__name__}: {error}")
            await asyncio.sleep(float(self.rng.exponential(0.02)))

    def _ids(self, most: int) -> list[int]:
        ids: list[int] = self.rng.integers(0, self.vocab_limit, self.rng.integers(1, most + 1)).tolist()
        return ids


class EngineClients(Clients):
    """Clients of the engine's Python interface.

    Args:
      engine: with a tokenizer.
      seed: of what is sent.
    """

    def __init__(self, engine: ContinuousEngine, seed: int) -> None:
        super().__init__(engine.vocab_limit, engine.max_length, seed)
        self.engine = engine
        self.do = {
            "read": self._read,
            "whole": self._whole,
            "cancel": self._cancel,
            "reader is cancelled": self._cancelled_reader,
            "reader goes away": self._goes_away,
            "bad": self._bad,
            "score": self._score,
            "embed": self._embed,
        }

    def request(self) -> Request:
        """One of any length that fits, greedy or sampled, with and without penalties, stop strings and so on."""
        rng, longest = self.rng, self.max_length
        new = int(rng.integers(1, longest // 2))
        sampling = (
            SamplingParams(),
            SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=int(rng.integers(2**32))),
            SamplingParams(temperature=1.0, repetition_penalty=1.1, seed=int(rng.integers(2**32))),
        )[int(rng.integers(3))]
        few = float(rng.random())
        return Request(
            tuple(self._ids(longest - new)),
            Ending(frozenset(self._ids(3)), ("zq",) if few < 0.2 else (), new),
            sampling,
            presence_penalty=0.5 if few > 0.9 else 0.0,
            logit_bias={1: -5.0} if few > 0.8 else {},
            min_tokens=new // 2 if few > 0.7 else 0,
            top_logprobs=3 if few < 0.1 else 0,
            prompt_logprobs=few < 0.05,
        )

    async def _follow(self, stream: Any, steps: int) -> None:
        async for step in stream:
            steps -= 1
            if step.finished is not None:
                self.counts[f"ended: {step.finished.finish_reason}"] += 1
                if step.finished.error:
                    self.unexpected.append(step.finished.error)
            if not steps:
                return

    async def _read(self) -> None:
        await self._follow(self.engine.submit(self.request()), -1)

    async def _whole(self) -> None:
        await self._follow(self.engine.submit(self.request(), incremental=False), -1)

    async def _cancel(self) -> None:
        stream = self.engine.submit(self.request())
        await self._follow(stream, int(self.rng.integers(1, 20)))
        stream.cancel()

    async def _cancelled_reader(self) -> None:
        stream = self.engine.submit(self.request())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._follow(stream, -1), float(self.rng.exponential(0.1)))
        stream.cancel()

    async def _goes_away(self) -> None:
        await self._follow(self.engine.submit(self.request()), int(self.rng.integers(1, 5)))

    async def _bad(self) -> None:
        limit, longest = self.vocab_limit, self.max_length
        plain = Ending(frozenset(), (), 4)
        bad: tuple[Callable[[], Request], ...] = (
            lambda: Request((limit,), plain),
            lambda: Request((-1,), plain),
            lambda: Request((), plain),
            lambda: Request((1,) * longest, plain),
            lambda: Request((1,), plain, adapter="missing"),
            lambda: Request((1,), plain, presence_penalty=9.0),
            lambda: Request((1,), plain, logit_bias={limit: 1.0}),
            lambda: Request((1,), plain, top_logprobs=99),
        )
        try:
            self.engine.submit(bad[int(self.rng.integers(len(bad)))]())
        except InputError:
            self.counts["refused, as expected"] += 1
            return
        self.unexpected.append("a bad request was accepted")

    async def _score(self) -> None:
        ids = self._ids(self.max_length // 2)
        await asyncio.to_thread(self.engine.score, [ids], [self._ids(8)])

    async def _embed(self) -> None:
        await asyncio.to_thread(self.engine.embed, [self._ids(self.max_length // 2)])


def process_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def device_bytes() -> int:
    """Memory in use of the first device; the bytes of all arrays where it does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_in_use") or sum(x.nbytes for x in jax.live_arrays()))


def is_flat(values: list[int]) -> bool:
    """Whether the last quarter is not above the second one by more than `GROWTH`."""
    quarter = len(values) // 4
    if not quarter:
        return True
    before, after = np.mean(values[quarter : 2 * quarter]), np.mean(values[-quarter:])
    return bool(after <= before * (1 + GROWTH[0]) + GROWTH[1])


@dataclasses.dataclass
class Watch:
    """Samples of the memory, in bytes."""

    process: list[int] = dataclasses.field(default_factory=list)
    device: list[int] = dataclasses.field(default_factory=list)

    def look(self, engine: ContinuousEngine) -> dict[str, Any]:
        """Takes a sample: what it is, and the engine's counts."""
        self.process.append(process_bytes())
        self.device.append(device_bytes())
        memory = {"process_gb": self.process[-1] / 1e9, "device_gb": self.device[-1] / 1e9}
        return {**memory, **dataclasses.asdict(engine.stats())}

    def summary(self) -> dict[str, Any]:
        """Whether memory has stayed flat, and how much it was first and last."""
        return {
            "process_is_flat": is_flat(self.process),
            "device_is_flat": is_flat(self.device),
            "process_gb": [self.process[0] / 1e9, self.process[-1] / 1e9],
            "device_gb": [self.device[0] / 1e9, self.device[-1] / 1e9],
        }


def judged(clients: Clients, watch: dict[str, Any], left: dict[str, Any], **checks: bool) -> dict[str, Any]:
    """The last line.

    Args:
      clients: who have ended.
      watch: see `Watch.summary`.
      left: counts of the engine after the last request has ended.
      **checks: what else must be true.
    """
    checks |= {"idle": not (left["running"] or left["waiting"] or left["pages_used"])}
    flat = watch["process_is_flat"] and watch["device_is_flat"]
    return {
        "ok": not clients.unexpected and flat and all(checks.values()),
        **checks,
        **watch,
        "counts": dict(sorted(clients.counts.items())),
        "unexpected": len(clients.unexpected),
        "first_unexpected": clients.unexpected[:5],
        "left": left,
    }


def soak(engine: ContinuousEngine, clients: Clients, seconds: float, number: int, every: float) -> dict[str, Any]:
    """Runs clients for some time, lets all requests end, and looks at what is left.

    Args:
      engine: that the clients use.
      clients: see `EngineClients`.
      seconds: how long.
      number: of clients at a time.
      every: seconds between two looks at the memory.
    """
    watch, begin = Watch(), time.monotonic()
    until = begin + seconds

    async def look() -> None:
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(every, left))
            found = watch.look(engine)
            say(seconds=round(time.monotonic() - begin, 1), unexpected=len(clients.unexpected), **found)

    async def run() -> None:
        await asyncio.gather(look(), *(clients.run(until) for _ in range(number)))

    asyncio.run(run())
    end = time.monotonic() + 120
    while (engine.stats().running or engine.stats().waiting) and time.monotonic() < end:
        time.sleep(0.05)
    engine.call(engine._scheduler.check)
    engine.call(engine._pool.check)
    return judged(clients, watch.summary(), dataclasses.asdict(engine.stats()))


def an_engine(args: argparse.Namespace) -> ContinuousEngine:
    """That of the command line, with all programs compiled."""
    size = SIZES[args.size]
    engine = make_engine(
        published(size.model),
        dtype=size.dtype,
        max_seqs=size.max_seqs,
        max_length=size.max_length,
        num_pages=args.pages,
        tokenizer=a_tokenizer(args),
        speculate=args.speculate,
    )
    say(compile_s=engine.start())
    return engine


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--clients", type=int, default=96, help="requests at a time")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two lines")
    parser.add_argument("--pages", type=int, help="of the cache; few of them, and requests are preempted")
    parser.add_argument("--speculate", type=int, default=0)
    parser.add_argument("--tokenizer", help="a folder; by default a small tokenizer")
    parser.add_argument("--server", action="store_true", help="through the HTTP server, in a process of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="gets the last line, as soak.json")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.server:
        from experiments.serving.soak_server import soak_server

        result = soak_server(args, sys.argv[1:])
    else:
        with an_engine(args) as engine:
            clients = EngineClients(engine, args.seed)
            result = soak(engine, clients, 60 * args.minutes, args.clients, args.every)
        result = {"card": jax.devices()[0].device_kind, **result}
    result = {"jax": jax.__version__, "command": sys.argv[1:], **result}
    print(json.dumps(result))
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
        (Path(args.folder) / "soak.json").write_text(json.dumps(result) + "\n")
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
