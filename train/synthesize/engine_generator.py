"""Generators in this process: an engine that answers as `qwen-jax serve` does, without HTTP. And generators by name."""

import asyncio
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.inference.settings import GenerationDefaults
from qwen_jax.serving.engine_protocol import EngineLike
from train.synthesize.generator import Answer, Generator, GeneratorDownError, Request
from train.synthesize.openai_protocol import chat_body
from train.synthesize.tally import Tally

# Of the extra `serve`: the code of the server makes the engine's requests.
_PACKAGES = ("fastapi", "prometheus_client")

LoadEngine = Callable[[str, int], tuple[EngineLike, GenerationDefaults]]
"""Loads a checkpoint: a folder or Hub id, and how many requests run at the same time, to its engine and defaults."""


class EngineGenerator:
    """A `Generator` that is an engine in this process. Use it in one event loop.

    An answer is that of `qwen-jax serve` to the same request; it depends on nothing but the request.

    Attributes:
      model, concurrency, prices: as given.
    """

    def __init__(
        self,
        engine: EngineLike,
        name: str,
        concurrency: int = 32,
        *,
        defaults: GenerationDefaults | None = None,
        prices: tuple[float, float] | None = None,
    ):
        """
        Args:
          engine: such as a `ContinuousEngine`, of a model with a chat template. It is closed with the generator.
          name: of the weights; answers are kept under it.
          concurrency: requests that are open at the same time, such as the engine's `max_seqs`.
          defaults: what requests do not say, such as top_k; by default they are those of `SamplingParams`.
          prices: of a million prompt tokens and of a million generated ones, if computing is to be counted as cost.

        Raises:
          InputError: missing packages, an engine without a tokenizer or a chat template, or a wrong number.
        """
        if missing := [package for package in _PACKAGES if importlib.util.find_spec(package) is None]:
            raise InputError(f"Generating here needs {', '.join(missing)}: run pip install 'qwen-jax[serve]'.")
        from qwen_jax.inference.sampling import SamplingParams
        from qwen_jax.serving.context import Context
        from qwen_jax.serving.settings import ServerSettings, Service

        if concurrency < 1:
            raise InputError(f"concurrency must be at least 1, got {concurrency}.")
        if engine.tokenizer is None:
            raise InputError(f"{name} has no tokenizer, so it can answer no texts. Give a checkpoint with one.")
        # A template that cannot be used is found now, and not with each request.
        engine.tokenizer.encode_chat([{"role": "user", "content": "text"}], add_generation_prompt=True)
        self.model, self.concurrency, self.prices = name, concurrency, prices
        if defaults is None:
            defaults = GenerationDefaults(SamplingParams(), tuple(engine.eos_token_ids))
        # The queue is `ask`'s: the engine's own takes all.
        self._context = Context(Service(engine, defaults), ServerSettings(served_names=(name,), max_waiting=1 << 30))
        self._engine, self._slots = engine, asyncio.Semaphore(concurrency)
        self._tally = Tally(prices)

    async def ask(self, request: Request) -> Answer:
        """See `Generator.ask`.

        Raises:
          GeneratorDownError: the engine has stopped.
        """
        async with self._slots:
            self._tally.requests += 1
            answer = await self._ask(request)
        self._tally.add(answer)
        return answer

    async def embed(self, text: str) -> list[float] | None:
        """See `train.synthesize.embedder.Embedder.embed`. Raises as `ask` does."""
        from qwen_jax.serving.errors import ApiError
        from qwen_jax.serving.protocol import EmbeddingRequest
        from qwen_jax.serving.texts import embeddings

        async with self._slots:
            try:
                reply = await embeddings(self._context, EmbeddingRequest(input=text))
            except ApiError as error:
                if error.status == 503:
                    raise GeneratorDownError(f"{self.model}: {error.message}") from None
                return None
            except RuntimeError as error:
                raise GeneratorDownError(f"{self.model}: {error}") from error
        vector: list[float] = reply["data"][0]["embedding"]
        return vector

    def counts(self) -> dict[str, Any]:
        """What was done; see `Tally`."""
        return self._tally.to_json()

    async def close(self) -> None:
        """Closes the engine."""
        self._context.close()
        await asyncio.to_thread(self._engine.close)

    async def _ask(self, request: Request) -> Answer:
        from qwen_jax.serving.direct import answer
        from qwen_jax.serving.errors import ApiError

        try:
            reply = await answer(self._context, "/v1/chat/completions", chat_body(request))
        except ApiError as error:
            # 503 is that of an engine that ends.
            if error.status == 503:
                raise GeneratorDownError(f"{self.model}: {error.message}") from None
            return Answer("", refused=error.message)
        except RuntimeError as error:
            raise GeneratorDownError(f"{self.model}: {error}") from error
        choice, usage = reply["choices"][0], reply["usage"]
        return Answer(
            choice["message"]["content"], choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"]
        )


def tell_apart(generators: Iterable[Generator]) -> None:
    """Gives models at different URLs that have the same name other names: those with the address of their server.

    Answers are kept under the name of a model alone, so that a server may move. Where two servers of a run have the
    same name, the answers of one would be taken for those of the other.

    Args:
      generators: of one run, each once.
    """
    by_name: dict[str, list[Generator]] = {}
    for generator in generators:
        by_name.setdefault(generator.model, []).append(generator)
    for name, same in by_name.items():
        for generator in same if len(same) > 1 else ():
            if (url := getattr(generator, "url", None)) is not None:
                generator.model = f"{name}@{url.partition('://')[2]}"


def open_generator(
    spec: str,
    *,
    load: LoadEngine | None = None,
    model: str | None = None,
    concurrency: int = 32,
    prices: tuple[float, float] | None = None,
    **of_url: Any,
) -> Generator:
    """The generator that a text names.

    Args:
      spec: the URL of an OpenAI-compatible API, or a checkpoint: a folder or a Hub id.
      load: loads a checkpoint into an engine; the command line gives that of `convert`.
      model: the name of the model in requests to a URL; of a checkpoint, the name under which its answers are kept, by
        default `spec`.
      concurrency: requests that are open at the same time.
      prices: of a million prompt tokens and of a million generated ones.
      **of_url: further arguments of `OpenAIGenerator`, without effect on a checkpoint: key, timeout, give_up_after,
        extra_body.

    Raises:
      InputError: no such model, or a wrong argument.
    """
    if spec.lower().startswith(("http://", "https://")):
        from train.synthesize.openai_client import OpenAIGenerator

        return OpenAIGenerator(spec, model, concurrency=concurrency, prices=prices, **of_url)
    if load is None:
        raise InputError(f"{spec} is no URL, and nothing that loads checkpoints was given.")
    engine, defaults = load(spec, concurrency)
    return EngineGenerator(engine, model or spec, concurrency, defaults=defaults, prices=prices)
