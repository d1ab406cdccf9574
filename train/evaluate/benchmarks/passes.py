"""Benchmarks of programs: several samples of an answer, run in the sandbox, and pass@k."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.task import Generate, Item, Message, Metric, Request, Response, Task, Tools, Verdict
from train.sandbox import Outcome, Run


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that at least one of k samples passes, estimated without bias from more samples.

    It is 1 - C(n - c, k) / C(n, k) for n samples of which c pass. Source: Chen et al. 2021, "Evaluating Large Language
    Models Trained on Code", arXiv:2107.03374, equation 1.

    Args:
      samples: n, at least k.
      passed: c.
      k: samples that are drawn.
    """
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(f"expected 0 <= passed <= samples and 1 <= k <= samples, got {passed}, {samples}, {k}")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many answers are drawn for an item, and how.

    Attributes:
      samples: answers to each item.
      ks: the k of each pass@k.
      temperature: of sampling; 0 is greedy.
      top_p: as in `Generate`.
    """

    samples: int = 1
    ks: tuple[int, ...] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.ks or not all(1 <= k <= self.samples for k in self.ks):
            raise InputError(f"pass@k needs at least k samples and k from 1 on, got {self.samples} for k = {self.ks}.")
        if self.samples > 1 and self.temperature <= 0:
            raise InputError("Several samples need a temperature above 0: greedy answers are all the same.")

    def requests(
        self, item: Item, prompt: str | tuple[Message, ...], max_tokens: int, stop: tuple[str, ...]
    ) -> list[Generate]:
        """A request for each sample. Seeds depend on the item's id and the number of the sample alone."""
        return [
            Generate(prompt, max_tokens, stop, self.temperature, self.top_p, sample_seed(item.id, number))
            for number in range(self.samples)
        ]


def sample_seed(name: str, number: int) -> int:
    """The seed of a sample, below 2**31."""
    return int.from_bytes(hashlib.sha256(f"{name}\n{number}".encode()).digest()[:4], "big") >> 1


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is known of one program.

    Attributes:
      passed: by kind of test; None if the machine or the test failed, so that nothing is known.
      reason: why it has not passed, or why nothing is known.
    """

    passed: Mapping[str, bool | None]
    reason: str = ""


def trial(kind: str, run: Run) -> Trial:
    """The trial that a run of the sandbox is."""
    return Trial({kind: None if run.outcome is Outcome.ERROR else run.outcome is Outcome.PASS}, run.reason)


class ProgramTask(Task):
    """A benchmark whose answers are programs. Subclasses write `items`, `prompt`, `program` and `trial`.

    An answer that was cut at `max_tokens` is scored as it stands, and counted in the details. A sample about which
    nothing is known is left out of pass@k; where fewer than k are left, there is no score.

    Attributes:
      kinds: of tests, the headline first; each has its pass@k.
      max_tokens: of an answer.
      stop: texts that end an answer.
      chat: whether a chat model is asked, in place of going on with a text.
      sampling: of the answers.
    """

    needs_sandbox = True
    kinds: tuple[str, ...] = ("pass",)
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    chat: bool = False
    sampling: Sampling = Sampling()

    def __init__(self, name: str, chat: bool = False, sampling: Sampling = Sampling()):
        """
        Args:
          name: of the task.
          chat: whether a chat model is asked.
          sampling: of the answers.
        """
        self.name, self.chat, self.sampling = name, chat, sampling
        self.metrics = tuple(Metric(f"{kind}@{k}") for kind in self.kinds for k in sampling.ks)

    def prompt(self, item: Item) -> str | tuple[Message, ...]:
        """What the model is asked."""
        raise NotImplementedError

    def stops(self, item: Item) -> tuple[str, ...]:
        """The texts that end an answer to an item."""
        return self.stop

    def program(self, item: Item, answer: str) -> str | None:
        """The program in an answer, or None if there is none."""
        raise NotImplementedError

    def trial(self, item: Item, program: str, sandbox: Any) -> Trial:
        """Tests a program."""
        raise NotImplementedError

    def unusable(self, sandbox: Any) -> str | None:
        """Why no program of this task can be tested in a sandbox; None if they can."""
        return None

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        if rounds:
            return ()
        return self.sampling.requests(item, self.prompt(item), self.max_tokens, self.stops(item))

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        problem = "there is no sandbox to run programs in" if tools.sandbox is None else self.unusable(tools.sandbox)
        if problem is not None:
            return [self._unscored(problem) for _ in items]
        answers = [[response for each in rounds[:1] for response in each] for rounds in responses]
        programs = [
            [None if answer.error is not None else self.program(item, answer.text) for answer in each]
            for item, each in zip(items, answers, strict=True)
        ]
        # Each program of an item once: greedy and short answers are often the same.
        distinct = list(dict.fromkeys((i, p) for i, each in enumerate(programs) for p in each if p is not None))
        tried = dict(zip(distinct, self._tried(items, distinct, tools), strict=True))
        return [
            self._verdict(each, programs[i], [None if p is None else tried[i, p] for p in programs[i]])
            for i, each in enumerate(answers)
        ]

    def _tried(self, items: Sequence[Item], distinct: Sequence[tuple[int, str]], tools: Tools) -> list[Trial]:
        def one(place: tuple[int, str]) -> Trial:
            index, program = place
            try:
                return self.trial(items[index], program, tools.sandbox)
            except InputError as error:
                return Trial(dict.fromkeys(self.kinds), str(error))

        with ThreadPoolExecutor(max(1, tools.workers), "programs") as threads:
            return list(threads.map(one, distinct))

    def _verdict(
        self, answers: Sequence[Response], programs: Sequence[str | None], trials: Sequence[Trial | None]
    ) -> Verdict:
        samples: list[dict[str, Any]] = []
        outcomes: dict[str, list[bool | None]] = {kind: [] for kind in self.kinds}
        for answer, program, tried in zip(answers, programs, trials, strict=True):
            if answer.error is not None:
                tried = Trial(dict.fromkeys(self.kinds), answer.error)
            elif tried is None:
                tried = Trial(dict.fromkeys(self.kinds, False), "there is no program in the answer")
            for kind in self.kinds:
                outcomes[kind].append(tried.passed[kind])
            samples.append({"program": program, "passed": dict(tried.passed), "reason": tried.reason})
            if answer.finish == "length":
                samples[-1]["cut"] = True
        # The estimate from the samples about which something is known.
        scores: dict[str, float | None] = {}
        for kind in self.kinds:
            known = [passed for passed in outcomes[kind] if passed is not None]
            for k in self.sampling.ks:
                scores[f"{kind}@{k}"] = pass_at_k(len(known), sum(known), k) if len(known) >= k else None
        unknown = [sample["reason"] for sample in samples if None in sample["passed"].values()]
        cut = sum(answer.finish == "length" for answer in answers)
        details = {"samples": samples, "cut": cut, "unknown": len(unknown)}
        problem = None
        if None in scores.values():
            problem = f"{len(unknown)} of {len(samples)} samples have no verdict: {(unknown or ['no answer'])[0]}"
        return Verdict(scores, details, problem)

    def _unscored(self, problem: str) -> Verdict:
        return Verdict({metric.name: None for metric in self.metrics}, {}, problem)


def sampling_text(sampling: Sampling) -> str:
    """A sampling as a line of a template."""
    return f"samples {sampling.samples}, temperature {sampling.temperature}, top_p {sampling.top_p}"


def with_reference(run: Run, reference: Callable[[], Run], name: str = "the reference solution") -> Run:
    """A run that met a limit, unless the reference solution does not pass here either: then nothing is known.

    Args:
      run: of a program.
      reference: runs the reference solution. Called only if the program met a limit.
      name: of the reference, for the reason.
    """
    if run.outcome is not Outcome.FAIL or run.killed_by is None:
        return run
    known = reference()
    if known.outcome is Outcome.PASS:
        return run
    return dataclasses.replace(run, outcome=Outcome.ERROR, reason=f"{name} does not pass here: {known.reason}")
