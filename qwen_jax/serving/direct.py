"""Answers to requests of OpenAI's API without HTTP, for files of requests."""

import asyncio
import json
import threading
from typing import Any

import pydantic

from qwen_jax.serving import protocol
from qwen_jax.serving.chat import Chat
from qwen_jax.serving.completions import Completions
from qwen_jax.serving.context import Context
from qwen_jax.serving.errors import ApiError, from_validation
from qwen_jax.serving.settings import ServerSettings, Service


async def answer(context: Context, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body of the answer to a request, as the server gives it.

    Args:
      context: of a language model; all of its requests come from one event loop.
      url: the path, such as /v1/chat/completions.
      body: of the request.

    Raises:
      ApiError: the request is wrong, or the model failed.
      RuntimeError: the engine has stopped.
    """
    if body.get("stream"):
        raise ApiError("A request without HTTP cannot be a stream.", param="stream")
    kinds: dict[str, Any] = {
        "/v1/completions": (protocol.CompletionRequest, Completions),
        "/v1/chat/completions": (protocol.ChatRequest, Chat),
    }
    if url not in kinds:
        raise ApiError(f"Expected the url {' or '.join(kinds)}, got {url!r}.", 404)
    model, kind = kinds[url]
    try:
        job = kind(context, model.model_validate_json(json.dumps(body)))
    except pydantic.ValidationError as error:
        raise from_validation(error) from None
    # Nobody sees the text grow, so the event loop need not wake for each token.
    result: dict[str, Any] = await job.answer(await job.start(incremental=False))
    return result


class Direct:
    """Answers requests from any thread; an event loop of its own runs them together.

    Args:
      service: a language model.
      settings: names of the model and limits.
    """

    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._context = Context(service, settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)
        self._thread.start()

    def __call__(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """The body of the answer, as the server gives it.

        Args:
          url: the path, such as /v1/chat/completions.
          body: of the request.

        Raises:
          ApiError: the request is wrong, or the model failed.
        """
        return asyncio.run_coroutine_threadsafe(answer(self._context, url, body), self._loop).result()

    def close(self) -> None:
        """Ends the event loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._context.close()
