"""What the host's Python costs for each decode step, on the CPU, without a device that computes.

    JAX_PLATFORMS=cpu python -m experiments.serving.host_cost --rows 256
    JAX_PLATFORMS=cpu python -m experiments.serving.host_cost --rows 64 --tokenizer TOKENIZER

The engine, its scheduler, its packing and its transfers are real. Only the compiled programs are replaced: a call
starts one that takes the host's arrays and computes nothing, and gives arrays that were made before. Times are of the
thread's processor clock, but for `wall_ms`. The model is tiny, since its size does not matter then; `--dispatch`
measures what is left out, the call of a program with as many arrays as 7B has.

With `--tokenizer`, texts that follow the JSON schema of part f are measured beside free ones, with masks of the true
size. Masks are made in threads, so that all times are of the wall clock then. The tokens that the device would sample
are chosen before, at random among those that the grammar allows. With `--starting 1.7`, starting a decode program takes
as long as starting that of 7B does on the host of an H200, without Python's lock: another thread may work meanwhile.
"""

import argparse
import asyncio
import dataclasses
import json
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.serving.cases import SCHEMA
from experiments.serving.host_times import HostTimes
from experiments.serving.models import make_engine, random_prompts
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.request import Request
from qwen_jax.inference.row_sampling import FIELDS, SLOT, STEP
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.stream import Stream
from qwen_jax.inference.structured import Grammar
from qwen_jax.published import published
from qwen_jax.tokenizer import Tokenizer, load_tokenizer, train_bpe

RECOMMENDED = SamplingParams(temperature=0.7, top_k=20, top_p=0.8)


def replace_programs(
    engine: ContinuousEngine,
    texts_ST: np.ndarray | None = None,
    times: HostTimes | None = None,
    starting: float = 0.0,
) -> None:
    """Has the engine's runner compute nothing: every program gives the same arrays whenever it is called.

    Args:
      engine: whose runner.
      texts_ST: int32, what is sampled in each slot; None for the same tokens in every step.
      times: where the time of what stands for the device is that of waiting; None if it does not matter.
      starting: seconds that the call of a decode program takes besides, without Python's lock.
    """
    runner = engine._runner
    logits: dict[int, jax.Array] = {}
    sampled: dict[int, jax.Array] = {}

    def run(program: Program, *args: Any) -> Any:
        if program.kind in ("prefill", "decode"):
            if program.rows not in logits:
                logits[program.rows] = jnp.zeros((program.rows, 1))
            return logits[program.rows], runner._pages
        if program.kind == "sample" and texts_ST is not None:
            (packed_BF,) = (x for x in args if isinstance(x, np.ndarray) and x.shape == (program.rows, FIELDS))
            fields = np.zeros((1, program.rows, 3), np.int32)
            fields[0, :, 0] = texts_ST[packed_BF[:, SLOT], packed_BF[:, STEP]]
            return jnp.asarray(fields), *args[1:3]
        if program.kind == "sample":
            if program.rows not in sampled:
                fields = np.zeros((1, program.rows, 3), np.int32)
                fields[..., 0] = np.arange(program.rows) % 200 + 32
                sampled[program.rows] = jnp.asarray(fields)
            # The newest tokens and the counts stay as they are.
            return sampled[program.rows], *args[1:3]
        # Masks or rules, whichever the program changes.
        return args[0]

    # An argument that is not used would not be sent.
    take = jax.jit(lambda *_: (), keep_unused=True)
    given = run if times is None else times.timed("wait", run)

    def start(program: Program, *args: Any) -> Any:
        take(*(x for x in args if isinstance(x, np.ndarray)))
        if starting and program.kind == "decode":
            time.sleep(starting)
        return given(program, *args)

    runner._run = start  # type: ignore[method-assign]


def allowed_texts(grammar: Grammar, rows: int, tokens: int, vocab_size: int) -> np.ndarray:
    """Texts that a grammar allows, int32 [rows, tokens]: each token is equally likely among those that may come next.

    Args:
      grammar: one whose texts are longer than `tokens`.
      rows, tokens: how many.
      vocab_size: of the model.
    """
    rng, mask_W = np.random.default_rng(0), np.zeros(-(-vocab_size // 32), np.int32)
    texts_RT = np.zeros((rows, tokens), np.int32)
    for text_T in texts_RT:
        matcher = grammar.matcher()
        for i in range(tokens):
            matcher.fill(mask_W)
            text_T[i] = rng.choice(np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")))
            matcher.accept(int(text_T[i]))
    return texts_RT


def measure(
    rows: int,
    steps: int,
    prompt: int,
    *,
    incremental: bool,
    text: bool,
    detail: bool = False,
    read: bool = False,
    tokenizer: Tokenizer | None = None,
    constrained: bool = False,
    starting: float = 0.0,
) -> dict[str, Any]:
    """Milliseconds of a decode step by part.

    Args:
      rows: requests that run, all from the beginning to the end.
      steps: that are measured, all of them with all rows.
      prompt: tokens of each prompt.
      incremental: whether steps are given as tokens come.
      text: whether the engine has a tokenizer, and makes text.
      detail: see `HostTimes.of`.
      read: whether an event loop in another thread reads the streams meanwhile, and takes its share of the interpreter.
      tokenizer: instead of a small one. Times are of the wall clock then.
      constrained: whether texts follow `SCHEMA`. Free ones have the same tokens, if there is a tokenizer.
      starting: see `replace_programs`.
    """
    config, clock, of_grammar = published("tiny"), time.thread_time, tokenizer is not None
    if tokenizer is not None:
        config, clock = dataclasses.replace(config, vocab_size=-(-tokenizer.vocab_size // 128) * 128), time.perf_counter
    elif text:
        tokenizer = train_bpe(["hello world, hello there"] * 4, 280)
    engine = make_engine(
        config,
        dtype="float32",
        tokenizer=tokenizer,
        max_seqs=rows,
        max_length=512,
        max_batched_tokens=2048,
        num_pages=rows * 16,
        prefix_cache=True,
    )
    with engine:
        times, ending = HostTimes(clock), Ending(frozenset(), (), 511 - prompt)
        grammar = texts_ST = None
        if of_grammar and engine.grammars is not None:
            grammar = engine.grammars.json_schema(SCHEMA)
            texts_ST = allowed_texts(grammar, rows + 1, ending.max_new_tokens + 2, config.vocab_size)
        replace_programs(engine, texts_ST, times, starting)
        requests = [
            Request(ids, ending, RECOMMENDED, grammar=grammar if constrained else None)
            for ids in random_prompts(engine, [prompt] * rows)
        ]
        streams = [engine.submit(request, incremental=incremental) for request in requests]
        done = threading.Event()
        if read:
            reader = threading.Thread(target=_read_all, args=(streams, done), daemon=True)
            reader.start()
        while engine.stats().prompt_tokens < rows * prompt:
            time.sleep(0.002)
        with times.of(engine, detail):
            begin, first = time.perf_counter(), times.decode_steps
            while times.decode_steps < first + steps:
                engine.stats()  # Raises if the engine has stopped.
                time.sleep(0.005)
            wall = (time.perf_counter() - begin) / (times.decode_steps - first)
        done.set()
        ended = sum(stream._ended or stream._failure is not None for stream in streams)
        for stream in streams:
            stream.cancel()
    found = times.record()
    names = {"rows": rows, "incremental": incremental, "text": text, "detail": detail, "constrained": constrained}
    return {**names, "read": read, "ended": ended, "wall_ms": 1e3 * wall, **found}


def _read_all(streams: list[Stream], done: threading.Event) -> None:
    """Reads all streams from one event loop, as a server does."""

    async def one(stream: Stream) -> None:
        async for _ in stream:
            if done.is_set():
                return

    async def every() -> None:
        await asyncio.gather(*map(one, streams))

    asyncio.run(every())


def dispatch(layers: int = 28) -> dict[str, Any]:
    """Microseconds to call a compiled program with as many arrays as decoding 7B has, and to send one small array."""
    leaves = [jnp.zeros((8,), jnp.bfloat16) for _ in range(layers * 10 + 3)]
    pages = [jnp.zeros((8,), jnp.bfloat16) for _ in range(layers * 2)]
    params = {"layers": [leaves[i * 10 : (i + 1) * 10] for i in range(layers)], "rest": leaves[layers * 10 :]}
    packed = np.zeros((256, 68), np.int32)

    def function(params: Any, pages: Any, packed: jax.Array) -> Any:
        return packed[:, 0], pages

    call = jax.jit(function, donate_argnums=1).lower(params, pages, jnp.asarray(packed)).compile()
    place, placed = jax.sharding.SingleDeviceSharding(jax.devices()[0]), jnp.asarray(packed)
    result: dict[str, Any] = {"arrays": len(leaves) + len(pages)}
    count = 300
    begin = time.perf_counter()
    for _ in range(count):
        out, pages = call(params, pages, placed)
    jax.block_until_ready(out)
    result["call_us"] = 1e6 * (time.perf_counter() - begin) / count
    begin = time.perf_counter()
    for _ in range(count):
        placed = jax.device_put(packed, place)
    jax.block_until_ready(placed)
    result["device_put_us"] = 1e6 * (time.perf_counter() - begin) / count
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150, help="that are measured")
    parser.add_argument("--prompt", type=int, default=100, help="tokens")
    parser.add_argument("--detail", action="store_true", help="take and give as parts of their own")
    parser.add_argument("--tokenizer", help="a folder: with and without a JSON schema")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each with --tokenizer, in turns")
    parser.add_argument("--starting", type=float, default=0.0, help="ms that starting a decode program takes besides")
    parser.add_argument("--dispatch", action="store_true", help="the call of a program instead")
    args = parser.parse_args()
    if args.dispatch:
        print(json.dumps(dispatch()))
        return
    starting = args.starting / 1e3
    if args.tokenizer:
        of_kind: dict[str, Any] = {"incremental": True, "text": True, "tokenizer": load_tokenizer(args.tokenizer)}
        of_kind["starting"] = starting
        for constrained in (False, True) * args.repeat:
            line = measure(args.rows, args.steps, args.prompt, detail=args.detail, constrained=constrained, **of_kind)
            print(json.dumps(line), flush=True)
        return
    for incremental, text, read in (
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ):
        how: dict[str, Any] = {"incremental": incremental, "text": text, "read": read, "starting": starting}
        print(json.dumps(measure(args.rows, args.steps, args.prompt, detail=args.detail, **how)), flush=True)


if __name__ == "__main__":
    main()
