"""What a stage may do with an item: ask models, run checks, and note what it did."""

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.synthesize.embedder import cosine, packed, unpacked
from train.synthesize.generator import Answer, Generator, Message, Request
from train.synthesize.item import Item, content_key
from train.synthesize.store import Store


class StoppedError(Exception):
    """The run ends: what was asked is still answered and kept, nothing else is asked."""


@dataclasses.dataclass
class Services:
    """What the stages of a run share.

    Attributes:
      generators: by the name under which stages ask them.
      store: of answers and verdicts.
      threads: that checks run in.
      workers: how many checks run at the same time.
      seed: of the pipeline.
      may_go_on: raises `StoppedError` once the run is to end.
      may_ask: the same, and once nothing more may be spent.
      answered: is told of each answer that a model gave.
    """

    generators: Mapping[str, Generator]
    store: Store
    threads: concurrent.futures.Executor
    workers: int = 1
    seed: int = 0
    may_go_on: Callable[[], None] = lambda: None
    may_ask: Callable[[], None] = lambda: None
    answered: Callable[[Generator, Answer], None] = lambda generator, answer: None
    _pending: dict[str, asyncio.Future[Any]] = dataclasses.field(default_factory=dict)
    _gates: dict[str, asyncio.Semaphore] = dataclasses.field(default_factory=dict)

    async def answer(self, generator: Generator, request: Request) -> Answer:
        """The answer to a request: the one that is kept, or that of the model."""
        key = request.key(generator.model)

        async def ask() -> Answer:
            async with self._gate(generator.model, generator.concurrency):
                self.may_ask()
                answer = await generator.ask(request)
            self.store.add_answer(key, generator.model, answer)
            self.answered(generator, answer)
            return answer

        return await self._once(key, lambda: self.store.answer(key), ask)

    async def verdict(self, key: str, check: Callable[[], Any]) -> Any:
        """The verdict of a check: the one that is kept, or that of the check, which runs in a thread."""

        async def run() -> Any:
            async with self._gate("checks", self.workers):
                self.may_go_on()
                value = await asyncio.get_running_loop().run_in_executor(self.threads, check)
            if value is not None:
                self.store.add_verdict(key, value)
            return value

        def kept() -> Any:
            found = self.store.verdict(key)
            return None if found is None else found[0]

        return await self._once(key, kept, run)

    async def vector(self, generator: Generator, text: str) -> list[float] | None:
        """The vector of a text: the one that is kept, or that of the model; None if it cannot have one.

        Raises:
          InputError: the model has no vectors.
        """
        key = content_key("vector", generator.model, text)
        # As the protocol says; `isinstance` would look at it anew for each text.
        if not hasattr(generator, "embed"):
            raise InputError(f"The model {generator.model} gives no embeddings. Give one that does for them.")

        async def embed() -> list[float] | None:
            async with self._gate(generator.model, generator.concurrency):
                self.may_ask()
                vector = await generator.embed(text)
            if vector is not None:
                self.store.add_verdict(key, packed(vector))
            return vector

        def kept() -> list[float] | None:
            found = self.store.verdict(key)
            return None if found is None else unpacked(found[0])

        vector: list[float] | None = await self._once(key, kept, embed)
        return vector

    async def _once(self, key: str, kept: Callable[[], Any], make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """What is kept under a key, or else what `make` gives. Whoever asks meanwhile waits for the same."""
        if (pending := self._pending.get(key)) is None:
            if (found := kept()) is not None:
                return found
            pending = self._pending[key] = asyncio.ensure_future(make())
            pending.add_done_callback(lambda _: self._pending.pop(key))
        # A stage that is cancelled does not cancel what is paid for.
        return await asyncio.shield(pending)

    def _gate(self, name: str, width: int) -> asyncio.Semaphore:
        return self._gates.setdefault(name, asyncio.Semaphore(width))


class Context:
    """What the work of a stage may use for one item.

    Attributes:
      stage: its name.
      seed: of the pipeline.
      steps: what was done to the item in this stage.
      audits: verdicts on answers that are known to be right or wrong: name, whether it should pass, whether it did.
    """

    def __init__(self, item: Item, stage: str, services: Services):
        """
        Args:
          item: which it is.
          stage: its name.
          services: of the run.
        """
        self.stage, self.seed = stage, services.seed
        self.steps: list[dict[str, Any]] = []
        self.audits: list[tuple[str, bool, bool]] = []
        self._item, self._services = item, services

    async def ask(
        self,
        messages: Sequence[Message] | str,
        *,
        model: str = "generator",
        samples: int = 1,
        first: int = 0,
        shared: str | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Asks a model, and notes it among the steps of the item.

        Args:
          messages: the conversation, or the text of one message of the user.
          model: which of the pipeline's models.
          samples: how many answers; they differ by their seeds.
          first: number of the first sample. Seeds follow from the item, the stage and the number of the sample, so
            that a later round with other numbers gives other answers to the same messages.
          shared: a text that stands for the item in the seeds: what several items ask with the same one is asked once,
            such as the translation of a text that they have in common.
          **sampling: other fields of `Request`, such as max_tokens and temperature.

        Returns:
          The answers, in the order of their numbers. Look at `refused` and `finish`, or use `checks.fault`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        generator = self._services.generators[model]
        seeds = [self._seed(first + i, shared) for i in range(samples)]
        requests = [Request(messages, seed=seed, **sampling) for seed in seeds]
        self.steps.append(
            {"model": generator.model, "messages": list(messages), "seeds": seeds, **sampling, "stage": self.stage}
        )
        return await all_of([self._services.answer(generator, request) for request in requests])

    async def check(self, name: str, content: object, check: Callable[[], Any]) -> Any:
        """Runs a check, or takes the verdict that is kept, and notes it among the steps of the item.

        Args:
          name: of the check; a part of what the verdict is kept under. Change it when the check changes.
          content: everything that decides the verdict, as JSON values.
          check: gives the verdict, a JSON value; None says that there is none (such as a sandbox that failed), which
            is not kept. It runs in a thread.
        """
        verdict = await self._services.verdict(content_key("verdict", name, content), check)
        self.steps.append({"check": name, "verdict": verdict, "stage": self.stage})
        return verdict

    async def similarity(self, first: str, second: str, *, model: str) -> float | None:
        """The cosine between the vectors of two texts, from -1 to 1, and notes it among the steps of the item.

        Args:
          first, second: texts; the vector of each is asked for once, and kept.
          model: which of the pipeline's models gives the vectors.

        Returns:
          None if a text cannot have a vector, such as one that is too long.

        Raises:
          InputError: the model has no vectors.
        """
        generator = self._services.generators[model]
        vectors = await all_of([self._services.vector(generator, text) for text in (first, second)])
        found = None if None in vectors else cosine(*vectors)
        self.steps.append({"similarity": found, "model": generator.model, "stage": self.stage})
        return found

    def note(self, **what: Any) -> None:
        """Notes something among the steps of the item, as JSON values."""
        self.steps.append({**what, "stage": self.stage})

    def audit(self, name: str, expected: bool, verdict: bool) -> None:
        """Counts the verdict of a check on an answer that is known to be right or wrong, such as a changed number.

        A check that lets wrong answers pass, or none, spoils the data without a trace. The report shows these counts,
        and a run ends where more than a tenth of at least twenty verdicts are wrong.

        Args:
          name: of the check.
          expected: whether the answer is right.
          verdict: whether the check let it pass.
        """
        self.audits.append((name, expected, verdict))

    def taken(self) -> list[dict[str, Any]]:
        """The steps, ordered by their content: the order in which they ended is another in every run."""
        return sorted(self.steps, key=to_json)

    def _seed(self, number: int, shared: str | None) -> int:
        whose = self._item.id if shared is None else ["shared", shared]
        return int(content_key("seed", self.seed, whose, self.stage, number)[:8], 16) >> 1


async def all_of(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of coroutines that run at the same time. The first fault is raised once all have ended."""
    if len(work) == 1:
        return [await work[0]]
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
