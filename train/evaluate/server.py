"""A model behind a URL of OpenAI's API, as a model that is measured or that judges."""

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.task import Generate, Loglikelihood, Request, Response
from train.synthesize.generator import Answer, GeneratorDownError
from train.synthesize.generator import Request as ChatRequest
from train.synthesize.openai_client import OpenAIGenerator
from train.synthesize.openai_protocol import FaultError

Done = Callable[[int, Response], None]
_NO_ROLLING = "a server gives no log-probability of a whole text: load the model in this process (--model)"


class ServerModel:
    """A `train.evaluate.task.Model` at a URL. Conversations are chat completions, texts are completions.

    Log-likelihoods are read from completions with `echo` and `logprobs`, which `qwen-jax serve` and vLLM offer. A
    server without them gives responses with an error that says so.

    Attributes:
      name: as the server calls the model.
      context_length: None: the server refuses what is too long.
    """

    context_length: int | None = None

    def __init__(self, url: str, model: str | None = None, *, concurrency: int = 32, give_up_after: float = 600.0):
        """
        Args:
          url: such as http://127.0.0.1:8000/v1.
          model: by default the only one that the server has.
          concurrency: requests that are open at the same time.
          give_up_after: seconds without any answer after which the server counts as down.

        Raises:
          InputError: a wrong URL, or a server that cannot say which model it has.
        """
        self._how: dict[str, Any] = {"concurrency": concurrency, "give_up_after": give_up_after}
        self._url = url
        self.name = OpenAIGenerator(url, model, **self._how).model

    def identity(self) -> Mapping[str, Any]:
        """See `Model.identity`. The URL plays no part: a server may move."""
        return {"name": self.name, "served": True}

    def answer(self, requests: Sequence[Request], done: Done) -> None:
        """See `Model.answer`.

        Raises:
          InputError: the server is down, or the key or the model is wrong. Responses that are there are kept.
        """
        try:
            asyncio.run(self._answer(requests, done))
        except GeneratorDownError as error:
            raise InputError(f"{error} Responses so far are kept: give the same command again.") from None

    async def _answer(self, requests: Sequence[Request], done: Done) -> None:
        # Connections belong to an event loop, so each call has its own.
        client = OpenAIGenerator(self._url, self.name, **self._how)
        # Few more tasks than connections: a benchmark may have a million requests.
        waiting = asyncio.Semaphore(2 * client.concurrency)

        async def one(i: int, request: Request) -> None:
            try:
                done(i, await self._ask(client, request))
            finally:
                waiting.release()

        try:
            async with asyncio.TaskGroup() as group:
                for i, request in enumerate(requests):
                    await waiting.acquire()
                    group.create_task(one(i, request))
        except* (GeneratorDownError, InputError) as errors:
            raise errors.exceptions[0] from None
        finally:
            await client.close()

    async def _ask(self, client: OpenAIGenerator, request: Request) -> Response:
        if isinstance(request, Loglikelihood):
            return await _loglikelihood(client, request)
        if not isinstance(request, Generate):
            return Response(error=_NO_ROLLING)
        if not isinstance(request.prompt, str):
            asked = ChatRequest(
                request.prompt, request.max_tokens, request.temperature, request.top_p, request.seed, request.stop
            )
            return _response(await client.ask(asked))
        body = {
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop": list(request.stop) or None,
        }
        reply = await client.post("/completions", body, _completion)
        return Response(error=reply) if isinstance(reply, str) else reply


async def _loglikelihood(client: OpenAIGenerator, request: Loglikelihood) -> Response:
    kept = request.context.rstrip()
    continuation = request.context[len(kept) :] + request.continuation
    if not kept:
        return Response(error="a server gives no log-probability of a text's first token: give a context")
    body = {"prompt": kept + continuation, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}

    def read(data: bytes) -> Response:
        return _echoed(data, len(kept), len(kept) + len(continuation))

    reply = await client.post("/completions", body, read)
    return Response(error=reply) if isinstance(reply, str) else reply


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _response(answer: Answer) -> Response:
    return Response(answer.text, answer.finish, answer.tokens, error=answer.refused)


def _choice(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        choice["text"] + ""
    except (ValueError, TypeError, KeyError, IndexError):
        raise FaultError("reply", f"it sent no completion but {data[:200]!r}") from None
    return reply, choice


def _completion(data: bytes) -> Response:
    """The text of a completion."""
    reply, choice = _choice(data)
    tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
    return Response(choice["text"], "length" if choice.get("finish_reason") == "length" else "stop", tokens)


def _echoed(data: bytes, begin: int, end: int) -> Response:
    """The log-probability of the characters from `begin` to `end` of an echoed prompt."""
    _, choice = _choice(data)
    found = choice.get("logprobs")
    names = ("tokens", "token_logprobs", "text_offset")
    nothing = Response(error="the server gives no log-probabilities of a prompt (echo with logprobs)")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in names):
        return nothing
    total, greedy, count = 0.0, True, 0
    tokens, logprobs, offsets = (found[name] for name in names)
    tops = found.get("top_logprobs") or [None] * len(tokens)
    if not len(tokens) == len(logprobs) == len(offsets) > 0 or not all(type(offset) is int for offset in offsets):
        return nothing
    # A token ends where the next one begins: the name of a part of a character is longer than it is.
    stops = [*offsets[1:], offsets[-1] + len(str(tokens[-1]))]
    # The last token is the one that was generated, or where that is left out the prompt's own last one.
    if end not in (offsets[-1], stops[-1]) and not str(tokens[-1]).startswith("bytes:"):
        return Response(error="the server's text offsets are not those of the prompt, so its tokens cannot be told")
    for logprob, offset, stop, top in zip(logprobs, offsets, stops, tops, strict=False):
        # A token that begins before the continuation and ends in it counts as the continuation's.
        if (offset < begin and stop <= begin) or offset >= end:
            continue
        if not _is_number(logprob):
            return Response(error="the server gives no log-probability of a token of the continuation")
        # Without the most likely token nobody knows whether this one is.
        if not isinstance(top, dict) or not top or not all(map(_is_number, top.values())):
            return Response(error="the server does not say which tokens are the most likely (top_logprobs)")
        total, count = total + logprob, count + 1
        greedy = greedy and logprob >= max(top.values()) - 1e-9
    if not count:
        return Response(error="the server's log-probabilities do not reach the continuation")
    return Response(tokens=count, logprob=total, greedy=greedy)
