"""Answers prompts of token ids by a server of OpenAI's completions, in place of an engine.

The prompt is sent as token ids, so that its length is exact and a chat template is not applied twice. This repository's
server, vLLM and SGLang take such prompts.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference import Completion, SamplingParams
from train.synthesize.generator import GeneratorDownError
from train.synthesize.openai_client import OpenAIGenerator
from train.synthesize.openai_protocol import FaultError, message_of


class ServedIds:
    """A `train.evaluate.runner.Generator` behind a URL.

    Args:
      url: of the API, such as http://127.0.0.1:8000/v1.
      model: the served name; by default the only model that the server has.
      concurrency: requests that are open at the same time.
      give_up_after: seconds without an answer to any request after which the server counts as down.

    Raises:
      InputError: a wrong URL, or a server that cannot say which model it has.
    """

    def __init__(self, url: str, model: str | None = None, *, concurrency: int = 8, give_up_after: float = 600.0):
        self._client = OpenAIGenerator(url, model, concurrency=concurrency, give_up_after=give_up_after)
        self.url, self.model = self._client.url, self._client.model
        # A client lives in one event loop.
        self._loop = asyncio.Runner()

    def generate(
        self, prompts: Sequence[np.ndarray], sampling: SamplingParams, *, max_new_tokens: int
    ) -> list[Completion]:
        """See `Engine.generate`. A prompt that the server refuses has an error.

        Raises:
          InputError: the server is down, or knows the key, the model or the path not.
        """

        async def all_of_them() -> list[Completion]:
            return await asyncio.gather(
                *(self._complete(prompt.tolist(), sampling, max_new_tokens) for prompt in prompts)
            )

        try:
            return self._loop.run(all_of_them())
        except GeneratorDownError as error:
            raise InputError(f"{error} Start it again; the same command goes on.") from None

    async def _complete(self, ids: list[int], sampling: SamplingParams, max_new_tokens: int) -> Completion:
        body = {
            "prompt": ids,
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        found = await self._client.post("/completions", body, _completion_of)
        if isinstance(found, str):
            return Completion(ids, [], "", "error", None, found)
        text, finish = found
        return Completion(ids, [], text, finish, None)

    def close(self) -> None:
        """Closes the connections."""
        self._loop.run(self._client.close())
        self._loop.close()


def _completion_of(data: bytes) -> tuple[str, str]:
    """Text and finish reason in the body of a completion. Raises FaultError for another body."""
    try:
        reply: Any = json.loads(data)
        choice = reply["choices"][0]
        text, finish = choice["text"], choice["finish_reason"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise FaultError("reply", f"it sent no completion but {message_of(data)}") from None
    if not isinstance(text, str) or finish not in ("stop", "length"):
        raise FaultError(
            "reply", f"it sent a completion with the finish_reason {finish!r:.40}, expected stop or length"
        )
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), finish
