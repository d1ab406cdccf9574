"""The measurements of our engine. `benchmark.py` starts a process for each; they print JSON lines."""

import argparse
import dataclasses
import gc
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.decode.benchmark import Loop, random_params, say, step_bytes
from experiments.serving import lengths, load
from experiments.serving.floors import Ceilings, decode_seconds, floor_seconds
from experiments.serving.host_times import HostTimes
from experiments.serving.models import make_engine, random_prompts
from experiments.serving.sizes import SIZES, Size
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.programs import StaticArgs
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import SamplingValues
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from qwen_jax.tokenizer import Tokenizer, load_tokenizer, train_bpe

SCHEMA = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "count": {"type": "integer"}},
        "required": ["name", "count"],
        "additionalProperties": False,
    },
}
"""A text that does not end by itself within the tokens that are asked for."""


class Case:
    """What the measurements share: sizes, ceilings of the device, and engines that have all programs.

    Args:
      args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size = args, SIZES[args.size]
        self.config = published(self.size.model)
        # Before an engine takes the memory.
        self.rates = Ceilings.measure()
        say(**self.rates.record())

    def engine(self, **settings: Any) -> ContinuousEngine:
        """An engine whose programs are compiled; says how long that took and how many there are."""
        if self.args.max_batched_tokens:
            settings.setdefault("max_batched_tokens", self.args.max_batched_tokens)
        common = {"dtype": self.size.dtype, "max_seqs": self.args.max_seqs or self.size.max_seqs}
        began = time.perf_counter()
        engine = make_engine(self.config, **{**common, **settings})
        made, programs = time.perf_counter() - began, engine.call(lambda: len(engine._runner.programs()))
        each: dict[str, float] = {}
        compiled = (
            engine.start(lambda name, seconds, *_: each.update({name: seconds})) if self.args.warm == "start" else 0.0
        )
        slowest = dict(sorted(each.items(), key=lambda of: -of[1])[:5])
        say(
            weights_s=made,
            compile_s=compiled,
            compile_sum_s=sum(each.values()),
            slowest=slowest,
            programs=programs,
            cache_pages=engine.stats().pages,
        )
        return engine

    def warm(self, engine: ContinuousEngine, requests: list[Request], **how: Any) -> None:
        """Runs a part of the requests, or with `--warm run` all of them, before anything is measured."""
        some = requests if self.args.warm == "run" else requests[:4]
        load.drive(engine, some, **how)

    def measured(
        self, engine: ContinuousEngine, requests: list[Request], floor_rows: int = 0, cached: int = 0, **how: Any
    ) -> dict[str, Any]:
        """Runs requests, and what it took, with the host's times and counts of the engine.

        Args:
          engine: where.
          requests: what.
          floor_rows: rows of a step for the floor; 0 for none, where arrivals bound the rate.
          cached: tokens of each prompt that the floor does not read.
          **how: see `load.drive`.
        """
        before, times = engine.stats(), HostTimes()
        compiled = Compilations()
        with times.of(engine):
            timings = load.drive(engine, requests, **how)
        after = engine.stats()
        found = load.summary(timings, how.get("incremental", True))
        if floor_rows:
            each = [(len(r.prompt), r.ending.max_new_tokens) for r in requests]
            floor = floor_seconds(self.config, self.rates, each, floor_rows, cached)
            found |= {"floor_s": floor, "floor_tokens_per_s": found["output_tokens"] / floor}
            found["of_floor"] = floor / found["seconds"]
        queries = after.prefix_queries - before.prefix_queries
        hits = (after.prefix_hits - before.prefix_hits) / max(queries, 1)
        counts = {"preemptions": after.preemptions - before.preemptions, "prefix_hit_share": hits}
        return {**found, **times.record(), **counts, "compiled_meanwhile": compiled.count, "peak_gb": peak_gb()}


class Compilations:
    """Counts programs that are compiled from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event.endswith("backend_compile_duration")


def peak_gb() -> float | None:
    """The most memory that this process has used of the device, in GB; None where the device does not tell."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 1e9


def a_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """That of the command line, or a small one, whose ids are then all that is sampled."""
    return load_tokenizer(args.tokenizer) if args.tokenizer else train_bpe(["hello world, hello there"] * 4, 280)


def file_lengths(size: Size, requests: int) -> list[tuple[int, int]]:
    """Prompt and answer of so many requests of the file of lengths."""
    both = lengths.read()
    pairs = zip(both.input[:requests], both.output[:requests], strict=True)
    return [(max(i // size.shrink, 1), max(o // size.shrink, 2)) for i, o in pairs]


def mean_live(pairs: list[tuple[int, int]]) -> float:
    """Tokens that a row of a decode step attends to, on average over all rows of all steps."""
    return sum((o - 1) * i + o * (o - 1) // 2 for i, o in pairs) / max(sum(o - 1 for _, o in pairs), 1)


# --- the cases ---


def sharegpt(case: Case) -> None:
    """(a) Requests with the lengths of the file, all at once: texts at their ends, and token by token."""
    pairs = file_lengths(case.size, case.size.requests)
    with case.engine(max_length=case.size.max_length) as engine:
        prompts = random_prompts(engine, [i for i, _ in pairs])
        for name, sampling in (("greedy", load.GREEDY), ("sampled", load.RECOMMENDED)):
            requests = load.make_requests(prompts, [o for _, o in pairs], sampling)
            case.warm(engine, requests)
            for incremental in (False, True) if name == "greedy" else (False,):
                engine.call(engine._pool.clear)
                rows = engine._scheduler._max_seqs
                found = case.measured(engine, requests, rows, incremental=incremental)
                say(what=f"engine {name}" + (", streamed" if incremental else ""), mean_live=mean_live(pairs), **found)


def fixed_loop(case: Case) -> None:
    """(a, d) The decode loop of a fixed batch, at given rows and tokens in the cache."""
    rows, live, steps = case.args.rows, case.args.live, case.args.loop_steps
    prompt = max(int(live) - steps // 2, 1)
    mesh = make_mesh({}, jax.devices()[:1])
    engine = Engine(case.config, random_params(case.config, mesh), mesh, dtype=case.size.dtype)
    slots = -(-(prompt + steps) // 128) * 128
    tokens = np.random.default_rng(0).integers(0, engine.vocab_limit, (rows, prompt), dtype=np.int32)
    static = StaticArgs(case.config, engine.sharding, engine.options, load.GREEDY.mode, slots, engine.vocab_limit)
    by_row = jax.NamedSharding(mesh, engine.sharding.rows)
    with jax.set_mesh(mesh):
        tokens_BT = jax.device_put(tokens, jax.NamedSharding(mesh, engine.sharding.tokens))
        ends = jax.device_put((np.full(rows, prompt, np.int32), np.arange(rows, dtype=np.uint32)), by_row)
        loop = Loop(engine, static, SamplingValues.of(load.GREEDY), (tokens_BT, *ends), prompt, steps)
        seconds = []
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready(loop())
            seconds.append((time.perf_counter() - begin) / steps)
    step = float(np.median(seconds[1:]))
    floor = decode_seconds(case.config, case.rates, [(prompt, steps + 1)] * rows, rows) / steps
    say(
        what="fixed-batch decode loop",
        rows=rows,
        prompt=prompt,
        steps=steps,
        step_ms=1e3 * step,
        output_tokens_per_s=rows / step,
        floor_tokens_per_s=rows / floor,
        of_floor=floor / step,
        step_gb=step_bytes(engine.params, case.config, engine.sharding, rows, prompt + steps // 2) / 1e9,
        **loop.compile_seconds,
        peak_gb=peak_gb(),
    )


def even(case: Case) -> None:
    """(b) Prompts and answers of one length, at fixed concurrencies; two requests for each place."""
    size = case.size
    most = max(size.concurrency)
    with case.engine(max_length=2 * size.even, max_seqs=most) as engine:
        for concurrency in size.concurrency:
            prompts = random_prompts(engine, [size.even] * (2 * concurrency))
            requests = load.make_requests(prompts, [size.even] * len(prompts))
            case.warm(engine, requests[:4], concurrency=concurrency)
            engine.call(engine._pool.clear)
            found = case.measured(engine, requests, concurrency, concurrency=concurrency)
            say(what=f"engine, {size.even} in, {size.even} out", concurrency=concurrency, **found)


def arrivals(case: Case, *, chunked: bool) -> None:
    """(c) Poisson arrivals, every tenth prompt long, with prompts read in small chunks or whole."""
    size = case.size
    tokens = size.chunked if chunked else size.whole
    what = f"arrivals, {'chunks' if chunked else 'steps'} of {tokens} prompt tokens"
    with case.engine(max_length=size.longest, max_batched_tokens=tokens) as engine:
        for rate in case.args.rates or size.rates:
            count = round(rate * size.arrival_seconds)
            pairs = (file_lengths(size, size.requests) * (1 + count // size.requests))[:count]
            pairs = [
                (size.long if i % 10 == 5 else a, min(b, size.longest - size.long)) for i, (a, b) in enumerate(pairs)
            ]
            requests = load.make_requests(random_prompts(engine, [a for a, _ in pairs]), [b for _, b in pairs])
            case.warm(engine, requests)
            engine.call(engine._pool.clear)
            found = case.measured(engine, requests, at=load.poisson(count, rate))
            alone = floor_seconds(case.config, case.rates, [(size.long, 2)], 1)
            say(what=what, rate=rate, floor_long_ttft_ms=1e3 * alone, **found)


def single(case: Case, **settings: Any) -> None:
    """(d, g) One request at a time; tokens per second after the first token, the median of three."""
    prompt, new = case.size.single
    with case.engine(max_length=2 * (prompt + new), **settings) as engine:
        say(what="engine, one request", **one_by_one(case, engine, prompt, new))


def one_by_one(case: Case, engine: ContinuousEngine, prompt: int, new: int) -> dict[str, Any]:
    """The median rate of three requests, one after the other."""
    requests = load.make_requests(random_prompts(engine, [prompt] * 4), [new] * 4)
    load.drive(engine, requests[:1])
    found = [case.measured(engine, [request], 1) for request in requests[1:]]
    best = sorted(found, key=lambda x: x["tpot_median_ms"])[1]
    rate = 1e3 / best["tpot_median_ms"]
    floor = (new - 1) / decode_seconds(case.config, case.rates, [(prompt, new)], 1)
    each = {"decode_tokens_per_s": rate, "floor_decode_tokens_per_s": floor, "of_decode_floor": rate / floor}
    spread = [1e3 / x["tpot_median_ms"] for x in found]
    return {**best, **each, "lowest": min(spread), "highest": max(spread), "prompt": prompt, "new": new}


def served(case: Case) -> None:
    """(d) The same through the HTTP server, if this checkout has one."""
    try:
        from experiments.serving import http_client
    except ImportError as error:
        say(what="server, one request", error=f"not measured: {error}")
        return
    prompt, new = case.size.single
    with case.engine(max_length=2 * (prompt + new), tokenizer=a_tokenizer(case.args)) as engine:
        say(what="server, one request", **http_client.one_by_one(engine, prompt, new))


def shared_prompts(case: Case, *, cached: bool) -> None:
    """(e) Prompts that share 90% of their tokens, all at once, with the prefix cache and without."""
    size = case.size
    shared = size.shared_prompt * 9 // 10
    lengths_in = [size.shared_prompt] * size.shared_requests
    with case.engine(max_length=size.shared_prompt + 2 * size.shared_new, prefix_cache=cached) as engine:
        prompts = random_prompts(engine, lengths_in, shared)
        requests = load.make_requests(prompts, [size.shared_new] * len(prompts))
        # Of other texts, so that no page of these is found.
        others = random_prompts(engine, lengths_in, shared, seed=1)
        case.warm(engine, load.make_requests(others, [size.shared_new] * len(others)))
        found = case.measured(engine, requests, engine._scheduler._max_seqs, shared if cached else 0, incremental=False)
        say(what=f"prompts of which 90% is shared, cache {'on' if cached else 'off'}", shared=shared, **found)


def constrained(case: Case) -> None:
    """(f) A JSON schema beside no constraint, in turn on one engine."""
    tokenizer = a_tokenizer(case.args)
    with case.engine(max_length=case.size.max_length, tokenizer=tokenizer) as engine:
        try:
            if engine.grammars is None or not hasattr(engine.grammars, "json_schema"):
                raise ImportError("this checkout has no structured output")
            grammar = engine.grammars.json_schema(SCHEMA)
        except (ImportError, InputError) as error:
            say(what="engine, JSON schema", error=f"not measured: {error}")
            return
        for concurrency, new in case.size.constrained:
            prompts = random_prompts(engine, [64 // case.size.shrink] * concurrency)
            kinds = {
                "free": load.make_requests(prompts, [new] * concurrency),
                "JSON schema": load.make_requests(prompts, [new] * concurrency, grammar=grammar),
            }
            for requests in kinds.values():
                load.drive(engine, requests)
            for kind, requests in kinds.items():
                best = sorted(
                    (case.measured(engine, requests, concurrency) for _ in range(3)),
                    key=lambda x: x["output_tokens_per_s"],
                )[1]
                say(what=f"engine, {kind}", concurrency=concurrency, vocabulary=tokenizer.vocab_size, **best)


def repetitive(case: Case, *, speculate: int) -> None:
    """(g) A text that repeats itself, alone, with proposals and without."""
    case.config = dataclasses.replace(case.config, tie_word_embeddings=False)
    prompt, new = case.size.repetitive
    with case.engine(max_length=2 * (prompt + new), speculate=speculate, period=case.size.period) as engine:
        found = one_by_one(case, engine, prompt, new)
        say(what=f"repetitive text, {speculate} proposals", tokens_per_step=(new - 1) / found["decode_steps"], **found)


def start(case: argparse.Namespace) -> None:
    """(h) From the start of this process to an engine that has all programs and has made a token."""
    began = process_began()
    imported = time.perf_counter() - began
    size = SIZES[case.size]
    config = published(size.model)
    longest = min(case.max_length or config.context_length, config.context_length)
    told: list[tuple[float, str]] = []
    engine = make_engine(config, dtype=size.dtype, max_seqs=case.max_seqs or size.max_seqs, max_length=longest)
    jax.block_until_ready(engine._runner.params)
    weights = time.perf_counter() - began
    with engine:
        compiled = engine.start(lambda name, seconds, n, total: told.append((seconds, name)))
        load.drive(engine, load.make_requests(random_prompts(engine, [8]), [2]))
        ready = time.perf_counter() - began
    say(
        what="start",
        imported_s=imported,
        weights_s=weights,
        compile_s=compiled,
        ready_s=ready,
        programs=len(told),
        longest=f"{max(told)[1]}, {max(told)[0]:.1f} s",
        max_length=longest,
        peak_gb=peak_gb(),
    )


def process_began() -> float:
    """When this process was started, on the clock of `time.perf_counter`."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
        lived = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - lived


CASES: dict[str, Callable[[Case], None]] = {
    "a-engine": sharegpt,
    "a-loop": fixed_loop,
    "b-engine": even,
    "c-chunked": lambda case: arrivals(case, chunked=True),
    "c-whole": lambda case: arrivals(case, chunked=False),
    "d-engine": single,
    "d-loop": fixed_loop,
    "d-server": served,
    "e-cached": lambda case: shared_prompts(case, cached=True),
    "e-uncached": lambda case: shared_prompts(case, cached=False),
    "f-engine": constrained,
    "g-plain": lambda case: repetitive(case, speculate=0),
    "g-speculated": lambda case: repetitive(case, speculate=case.args.speculate),
}


def run(name: str, args: argparse.Namespace) -> None:
    """Runs a case in this process."""
    if name in ("h-cold", "h-cached"):
        start(args)
        return
    CASES[name](Case(args))
    gc.collect()
