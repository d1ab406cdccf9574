"""A generator that answers by a function, at once or after a while, and remembers what it was asked."""

import asyncio
from collections.abc import Callable

from train.synthesize.generator import Answer, GeneratorDownError, Request


class ScriptedGenerator:
    """A `train.synthesize.generator.Generator` that is a function.

    Attributes:
      model, concurrency: as of `Generator`.
      asked: all requests, in order.
      most_at_once: requests that were open at the same time.
    """

    def __init__(
        self,
        answer: Callable[[Request], str | Answer],
        model: str = "scripted",
        concurrency: int = 16,
        delay: Callable[[Request], float] | None = None,
        down_after: int | None = None,
    ):
        """
        Args:
          answer: gives the text, or the whole answer.
          model: its name.
          concurrency: as of `Generator`.
          delay: seconds before an answer.
          down_after: answers that it gives before it is down.
        """
        self.model, self.concurrency = model, concurrency
        self.asked: list[Request] = []
        self.most_at_once = 0
        self._answer, self._delay, self._down_after, self._open = answer, delay, down_after, 0

    async def ask(self, request: Request) -> Answer:
        if self._down_after is not None and len(self.asked) >= self._down_after:
            raise GeneratorDownError("The scripted generator is down.")
        self.asked.append(request)
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        if self._delay is not None:
            await asyncio.sleep(self._delay(request))
        self._open -= 1
        return self.answer(request)

    def answer(self, request: Request) -> Answer:
        """The answer to a request, which is not remembered."""
        made = self._answer(request)
        if isinstance(made, Answer):
            return made
        words = sum(len(str(message["content"]).split()) for message in request.messages)
        return Answer(made, prompt_tokens=words, tokens=len(made.split()))

    def vector(self, text: str) -> list[float]:
        """The embedding of a text, where the model has one."""
        raise NotImplementedError

    async def close(self) -> None:
        pass
