"""An engine without a model, for tests of the server: it writes what a script says, at the speed that is asked for."""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.active import Times
from qwen_jax.inference.completion import Row
from qwen_jax.inference.outputs import Finished, Stats, Step, TokenInfo
from qwen_jax.inference.request import Request
from qwen_jax.inference.settings import GenerationDefaults
from qwen_jax.inference.structured import Grammar
from qwen_jax.serving.engine_protocol import Grammars, Pooling
from qwen_jax.tokenizer import Tokenizer, train_bpe

END_OF_TEXT, TURN_END = 256, 258
"""Ids of the tokenizer's control tokens; the ids below are bytes."""


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then Qwen2.5's control tokens, `<tool_call>` among them: 278 ids."""
    return train_bpe(["abc"], 278)


def logprob(token: int) -> float:
    """The log-probability that the fake engine gives a token."""
    return -0.01 * (token % 50) - 0.001


@dataclasses.dataclass(eq=False)
class FakeGrammar(Grammar):
    """Remembers what it was made of."""

    kind: str
    source: Any


class FakeGrammars:
    """Makes grammars that constrain nothing. A schema or pattern that holds "bad" is refused."""

    def __init__(self) -> None:
        self.made: list[FakeGrammar] = []

    def _make(self, kind: str, source: Any) -> Grammar:
        if "bad" in str(source):
            raise InputError(f"the {kind} cannot be compiled: it is bad.")
        self.made.append(FakeGrammar(kind, source))
        return self.made[-1]

    def json_schema(self, schema: Mapping[str, Any] | str) -> Grammar:
        return self._make("json_schema", schema)

    def json_object(self) -> Grammar:
        return self._make("json_object", None)

    def regex(self, pattern: str) -> Grammar:
        return self._make("regex", pattern)

    def ebnf(self, text: str) -> Grammar:
        return self._make("ebnf", text)

    def choice(self, choices: list[str]) -> Grammar:
        return self._make("choice", choices)

    def tool_calls(self, tools: Sequence[tuple[str, Mapping[str, Any]]], named: str | None, parallel: bool) -> Grammar:
        return self._make("tool_calls", (list(tools), named, parallel))


class FakeStream:
    """The steps of one request."""

    def __init__(self, engine: "FakeEngine", request: Request) -> None:
        self._engine, self.request = engine, request
        self.cancelled = asyncio.Event()
        self._row = Row(
            list(request.prompt),
            request.ending,
            engine.tokenizer,
            logprobs=False,
            incremental=True,
            dtype="float32",
            min_tokens=request.min_tokens,
        )

    def cancel(self) -> None:
        self.cancelled.set()
        self._engine.running.discard(self)

    async def __aiter__(self) -> AsyncIterator[Step]:
        engine, row = self._engine, self._row
        script = engine.script(self.request)
        for start in range(0, len(script), engine.tokens_per_step):
            if engine.delay:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.cancelled.wait(), engine.delay)
            if self.cancelled.is_set():
                yield Step("", (), self._finished("abort"))
                return
            if engine.fail_after is not None and start >= engine.fail_after:
                yield Step("", (), self._finished("error", "The logits are not finite."))
                return
            known = len(row.tokens)
            row.add(np.asarray(script[start : start + engine.tokens_per_step]), None)
            tokens = tuple(map(self._info, row.tokens[known:]))
            engine.output_tokens += len(tokens)
            if row.finish_reason:
                finished = self._finished(row.finish_reason)
                yield Step(row.rest(finished.text), tokens, finished)
                return
            yield Step(row.new_text(), tokens)
        raise RuntimeError("The script ends before the text does.")

    def _info(self, token: int) -> TokenInfo:
        top = tuple((i, logprob(i)) for i in range(self.request.top_logprobs))
        return TokenInfo(token, logprob(token), top)

    def _finished(self, reason: str, error: str | None = None) -> Finished:
        self._engine.running.discard(self)
        completion = self._row.completion()
        prompt = None
        if self.request.prompt_logprobs:
            prompt = [None, *map(self._info, self.request.prompt[1:])]
        last = completion.token_ids[-1] if completion.token_ids else None
        stop = last if reason == "stop" and last in self.request.ending.eos_token_ids else None
        return Finished(
            token_ids=completion.token_ids,
            text=completion.text,
            finish_reason=reason,
            stop=stop if stop is not None or reason != "stop" else self.request.ending.stop[0],
            error=error,
            tokens=list(map(self._info, completion.token_ids)),
            prompt_logprobs=prompt,
            cached_tokens=0,
        )


class FakeEngine:
    """Implements `EngineLike`.

    Args:
      reply: the text of a request, or its token ids. Texts are followed by `<|im_end|>`.
      delay: seconds before each step.
      tokens_per_step: how many tokens a step has.
      fail_after: tokens after which a text ends with an error.
    """

    def __init__(
        self,
        reply: Callable[[Request], str | list[int]] | str = "Hello.",
        *,
        delay: float = 0.0,
        tokens_per_step: int = 1,
        fail_after: int | None = None,
        max_length: int = 4096,
        tokenizer: Tokenizer | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self.reply, self.delay, self.tokens_per_step, self.fail_after = reply, delay, tokens_per_step, fail_after
        self.tokenizer: Tokenizer | None = tokenizer or byte_tokenizer()
        self.config = config or ModelConfig(
            vocab_size=320,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
        self.vocab_limit, self.max_length = self.tokenizer.vocab_size, max_length
        self.eos_token_ids: Collection[int] = (END_OF_TEXT,)
        self.grammars: Grammars | None = FakeGrammars()
        self.adapters: Collection[str] = ("poet",)
        self.requests: list[Request] = []
        self.streams: list[FakeStream] = []
        self.running: set[FakeStream] = set()
        self.waiting = self.free = 0
        self.on_finished: Callable[[Times], None] | None = None
        self.work = 0
        self.output_tokens = 0
        self.dead = self.closed = False

    def script(self, request: Request) -> list[int]:
        """The tokens that a request gets; it ends on the way by its own rules.

        A text is repeated, for requests that no id ends.
        """
        reply = self.reply if isinstance(self.reply, (str, list)) else self.reply(request)
        if isinstance(reply, str):
            assert self.tokenizer is not None
            ids = [*self.tokenizer.encode(reply), TURN_END, END_OF_TEXT]
            return ids * max(1, -(-request.ending.max_new_tokens // len(ids)))
        return reply

    def submit(self, request: Request, *, incremental: bool = True) -> FakeStream:
        if self.dead:
            raise RuntimeError("the engine is dead")
        if len(request.prompt) + request.ending.max_new_tokens > self.max_length:
            raise InputError("prompt and new tokens exceed the cache.")
        self.requests.append(request)
        self.streams.append(FakeStream(self, request))
        self.running.add(self.streams[-1])
        return self.streams[-1]

    def embed(
        self, prompts: list[list[int]], pooling: Pooling, *, stopped: Callable[[], bool] = lambda: False
    ) -> np.ndarray:
        """The mean or the last id, in vectors that are not of unit length; `delay` seconds for each."""
        for _ in prompts:
            if stopped():
                raise CancelledError
            self.work += 1
            time.sleep(self.delay)
        values = [np.mean(ids) if pooling == "mean" else ids[-1] for ids in prompts]
        return np.asarray([[value + 1, *[1.0] * 7] for value in values], np.float32)

    def stats(self) -> Stats:
        if self.dead:
            raise RuntimeError("the engine is dead")
        prompt_tokens = sum(len(request.prompt) for request in self.requests)
        return Stats(
            len(self.running),
            self.waiting,
            self.free,
            3,
            10,
            prompt_tokens,
            self.output_tokens,
            7,
            9,
            1,
            11,
            16,
            "int8",
        )

    def close(self, drain: float = 0) -> None:
        self.closed = True


def defaults(**sampling: Any) -> GenerationDefaults:
    """As from a generation_config.json."""
    from qwen_jax.inference.sampling import SamplingParams

    return GenerationDefaults(SamplingParams(**sampling), (END_OF_TEXT,))


class FakeScorer:
    """Scores a text by its length, in `delay` seconds. Implements `ScorerLike`."""

    def __init__(self, config: ModelConfig, delay: float = 0.0) -> None:
        self.config, self.delay, self.work = config, delay, 0

    def score(self, texts: Sequence[Sequence[int]], *, stopped: Callable[[], bool] = lambda: False) -> np.ndarray:
        for _ in texts:
            if stopped():
                raise CancelledError
            self.work += 1
            time.sleep(self.delay)
        return np.asarray([math.sqrt(len(ids)) for ids in texts], np.float32)
