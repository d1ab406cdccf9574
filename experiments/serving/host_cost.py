"""What the host's Python costs for each decode step, on the CPU, without a device that computes.

    JAX_PLATFORMS=cpu python -m experiments.serving.host_cost --rows 256

The engine, its scheduler, its packing and its transfers are real. Only the compiled programs are replaced: a call gives
arrays that were made before, so that what is measured is Python and numpy. Times are of the thread's processor clock,
but for `wall_ms`. The model is tiny, since its size does not matter then; `--dispatch` measures what is left out, the
call of a program with as many arrays as 7B has.
"""

import argparse
import asyncio
import json
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.serving.host_times import HostTimes
from experiments.serving.models import make_engine, random_prompts
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.request import Request
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.stream import Stream
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe

RECOMMENDED = SamplingParams(temperature=0.7, top_k=20, top_p=0.8)


def replace_programs(engine: ContinuousEngine) -> None:
    """Has the engine's runner compute nothing: every program gives the same arrays whenever it is called."""
    runner = engine._runner
    logits: dict[int, jax.Array] = {}
    sampled: dict[int, jax.Array] = {}

    def run(program: Program, *args: Any) -> Any:
        if program.kind in ("prefill", "decode"):
            if program.rows not in logits:
                logits[program.rows] = jnp.zeros((program.rows, 1))
            return logits[program.rows], runner._pages
        if program.kind == "sample":
            if program.rows not in sampled:
                fields = np.zeros((1, program.rows, 3), np.int32)
                fields[..., 0] = np.arange(program.rows) % 200 + 32
                sampled[program.rows] = jnp.asarray(fields)
            # The newest tokens and the counts stay as they are.
            return sampled[program.rows], *args[1:3]
        return runner._state.rules

    runner._run = run  # type: ignore[method-assign]


def measure(
    rows: int, steps: int, prompt: int, *, incremental: bool, text: bool, detail: bool = False, read: bool = False
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
    """
    tokenizer = train_bpe(["hello world, hello there"] * 4, 280) if text else None
    engine = make_engine(
        published("tiny"),
        dtype="float32",
        tokenizer=tokenizer,
        max_seqs=rows,
        max_length=512,
        max_batched_tokens=2048,
        num_pages=rows * 16,
        prefix_cache=True,
    )
    with engine:
        replace_programs(engine)
        ending = Ending(frozenset(), (), 511 - prompt)
        requests = [Request(ids, ending, RECOMMENDED) for ids in random_prompts(engine, [prompt] * rows)]
        times = HostTimes(time.thread_time)
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
                time.sleep(0.005)
            wall = (time.perf_counter() - begin) / (times.decode_steps - first)
        done.set()
        for stream in streams:
            stream.cancel()
    found = times.record()
    names = {"rows": rows, "incremental": incremental, "text": text, "detail": detail}
    return {**names, "read": read, "wall_ms": 1e3 * wall, **found}


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
    parser.add_argument("--dispatch", action="store_true", help="the call of a program instead")
    args = parser.parse_args()
    if args.dispatch:
        print(json.dumps(dispatch()))
        return
    for incremental, text, read in (
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ):
        how: dict[str, Any] = {"incremental": incremental, "text": text, "read": read}
        print(json.dumps(measure(args.rows, args.steps, args.prompt, detail=args.detail, **how)), flush=True)


if __name__ == "__main__":
    main()
