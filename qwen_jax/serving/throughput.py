"""A line in the log now and then that tells what the engine does."""

import asyncio
import logging
import time

from qwen_jax.inference.outputs import Stats
from qwen_jax.serving.engine_protocol import EngineLike

log = logging.getLogger(__name__)


def line(before: Stats, now: Stats, seconds: float) -> str | None:
    """What happened between two counts of an engine; None if nothing did.

    Args:
      before, now: the counts.
      seconds: between them.
    """
    prompts, new = now.prompt_tokens - before.prompt_tokens, now.output_tokens - before.output_tokens
    if not (prompts or new or now.running or now.waiting):
        return None
    hits, queries = now.prefix_hits - before.prefix_hits, now.prefix_queries - before.prefix_queries
    return (
        f"prompts {prompts / seconds:.1f} tokens/s, generation {new / seconds:.1f} tokens/s, running {now.running}, "
        f"waiting {now.waiting}, pages {100 * now.pages_used / max(now.pages, 1):.1f}% used, prefix cache "
        f"{100 * hits / max(queries, 1):.1f}% hits"
    )


async def report(engine: EngineLike, interval: float) -> None:
    """Writes a line into the log at each interval in which something happened, until it is cancelled.

    It reads counts that the engine keeps on the host, once an interval, so that it costs the running texts nothing.

    Args:
      engine: of the server.
      interval: in seconds.
    """
    try:
        before, then = engine.stats(), time.monotonic()
        while True:
            await asyncio.sleep(interval)
            now, at = engine.stats(), time.monotonic()
            if text := line(before, now, at - then):
                log.info(text)
            before, then = now, at
    except RuntimeError:
        return  # The engine has failed, as /health says.
