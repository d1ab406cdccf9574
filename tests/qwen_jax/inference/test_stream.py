"""The reader's end of a request: steps that join, and event loops that are woken once for all readers of a step."""

import asyncio
import threading

import numpy as np

from qwen_jax.inference.outputs import Finished, Step, TokenInfo, TokenInfos
from qwen_jax.inference.stream import Readers, Stream
from tests.helpers.runs import print_seed


def finished(text: str, tokens: TokenInfos) -> Finished:
    return Finished([token.id for token in tokens], text, "stop", None, None, tokens, None, 0)


def test_a_loop_is_woken_once_for_all_readers_of_a_step() -> None:
    """And every reader gets every token, in order, however slow it is."""
    rng = print_seed()
    readers, woken = Readers(), [0]
    count, steps = 16, 40
    streams = [Stream(lambda: None, readers) for _ in range(count)]
    ids: list[list[int]] = [[] for _ in streams]
    logprobs: list[list[float]] = [[] for _ in streams]
    got: list[list[Step]] = [[] for _ in streams]

    async def read(i: int, pause: bool) -> None:
        async for step in streams[i]:
            got[i].append(step)
            if pause:
                await asyncio.sleep(0.003)

    def write() -> None:
        for n in range(steps):
            for i, stream in enumerate(streams):
                ids[i].append(100 * i + n)
                logprobs[i].append(-float(n))
                new, every = (TokenInfos(ids[i], logprobs[i], None, first, n + 1) for first in (n, 0))
                text = "".join(f"{k} " for k in range(steps))
                stream.put(Step(f"{n} ", new, finished(text, every) if n == steps - 1 else None))
            readers.wake()
            threading.Event().wait(float(rng.exponential(0.002)))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        soon = loop.call_soon_threadsafe

        def counted(*args: object, **kwargs: object) -> asyncio.Handle:
            woken[0] += 1
            return soon(*args, **kwargs)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        tasks = [asyncio.ensure_future(read(i, i % 4 == 0)) for i in range(count)]
        await asyncio.sleep(0)
        writer = threading.Thread(target=write)
        writer.start()
        await asyncio.gather(*tasks)
        writer.join()

    asyncio.run(run())
    assert 0 < woken[0] <= steps
    for i, found in enumerate(got):
        assert [token for step in found for token in step.tokens] == [
            TokenInfo(100 * i + n, -float(n)) for n in range(steps)
        ]
        last = found[-1].finished
        assert last is not None
        assert last.text == "".join(step.text for step in found)
    # The slow readers took several steps as one.
    assert min(len(found) for found in got) < steps


def test_tokens_are_a_sequence_of_the_text_so_far() -> None:
    """Indices, slices and equality are those of a tuple, while the text grows."""
    rng = print_seed()
    ids, logprobs = rng.integers(0, 99, 9).tolist(), rng.normal(size=9).tolist()
    tops = [((int(i), float(x)),) for i, x in zip(rng.integers(0, 99, 9), rng.normal(size=9), strict=True)]
    infos = TokenInfos(ids, logprobs, tops, 2, 7)
    want = tuple(TokenInfo(ids[i], logprobs[i], tops[i]) for i in range(2, 7))
    ids.append(1)
    assert tuple(infos) == want == infos
    assert (len(infos), bool(infos[:0]), infos[-1], infos[1:3]) == (5, False, want[-1], want[1:3])
    assert infos.until(TokenInfos(ids, logprobs, tops, 7, 9)) == [*want, *TokenInfos(ids, logprobs, tops, 7, 9)]
    assert np.isclose(sum(token.logprob for token in infos), sum(logprobs[2:7]))
    assert TokenInfos(ids, logprobs, None, 0, 1)[0].top == ()
