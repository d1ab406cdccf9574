"""Sends requests to an engine as clients would, and times what comes back."""

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.structured import Grammar

GREEDY = SamplingParams()
RECOMMENDED = SamplingParams(temperature=0.7, top_k=20, top_p=0.8)


@dataclasses.dataclass(frozen=True)
class Timing:
    """When a request was to be sent, when its first and last tokens came, and how many came. In seconds."""

    due: float
    first: float
    last: float
    tokens: int


def make_requests(
    prompts: Iterable[tuple[int, ...]],
    new: Iterable[int],
    sampling: SamplingParams = GREEDY,
    grammar: Grammar | None = None,
) -> list[Request]:
    """Requests that end by their length alone, each with a seed of its own."""
    return [
        Request(ids, Ending(frozenset(), (), count), dataclasses.replace(sampling, seed=i), grammar=grammar)
        for i, (ids, count) in enumerate(zip(prompts, new, strict=True))
    ]


def poisson(count: int, rate: float, seed: int = 0) -> list[float]:
    """Times of arrival, in seconds: `rate` a second on average, independent of one another."""
    times: list[float] = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()
    return times


async def _drive(
    engine: ContinuousEngine,
    requests: Sequence[Request],
    at: Sequence[float] | None,
    concurrency: int,
    incremental: bool,
) -> list[Timing]:
    begin, gate = time.monotonic(), asyncio.Semaphore(concurrency or len(requests))

    async def one(i: int) -> Timing:
        due = begin
        if at is not None:
            due = begin + at[i]
            await asyncio.sleep(max(due - time.monotonic(), 0))
        async with gate:
            if at is None and concurrency:
                due = time.monotonic()
            first, last, tokens = 0.0, 0.0, 0
            async for step in engine.submit(requests[i], incremental=incremental):
                last = time.monotonic()
                first = first or last
                tokens += len(step.tokens)
        return Timing(due, first, last, tokens)

    return list(await asyncio.gather(*(one(i) for i in range(len(requests)))))


def drive(
    engine: ContinuousEngine,
    requests: Sequence[Request],
    *,
    at: Sequence[float] | None = None,
    concurrency: int = 0,
    incremental: bool = True,
) -> list[Timing]:
    """Sends requests from one event loop, as a server does, and waits for all of them.

    Args:
      engine: where to.
      requests: what.
      at: seconds from now at which each is due; None: all at once. A request that is sent late counts from then.
      concurrency: at most so many run at a time, the next one starts when one ends; 0: no limit.
      incremental: whether tokens are given as they come; otherwise with the end of the text.
    """
    return asyncio.run(_drive(engine, requests, at, concurrency, incremental))


def percentiles(values: Sequence[float], name: str) -> dict[str, float]:
    """The median and the 99th percentile, in milliseconds."""
    if not values:
        return {}
    median, high = np.percentile(1e3 * np.asarray(values), [50, 99])
    return {f"{name}_median_ms": float(median), f"{name}_p99_ms": float(high)}


def summary(timings: Sequence[Timing], incremental: bool = True) -> dict[str, Any]:
    """Rates, and with `incremental` the times to the first token and of each token after it.

    A request's time per output token is from its first token to its last, over the tokens after the first.
    """
    seconds = max(t.last for t in timings) - min(t.due for t in timings)
    tokens = sum(t.tokens for t in timings)
    found: dict[str, Any] = {
        "requests": len(timings),
        "seconds": seconds,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
        "requests_per_s": len(timings) / seconds,
    }
    if incremental:
        found |= percentiles([t.first - t.due for t in timings], "ttft")
        found |= percentiles([(t.last - t.first) / (t.tokens - 1) for t in timings if t.tokens > 1], "tpot")
    return found
