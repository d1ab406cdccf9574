"""A made-up model and a made-up benchmark, to test what runs benchmarks."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.evaluate.task import (
    DataFile,
    Generate,
    Item,
    Loglikelihood,
    Metric,
    Request,
    Response,
    Task,
    Tools,
    Verdict,
)


class MadeModel:
    """Answers by a function of the request, in a random order, and counts what it is asked.

    Args:
      answer: of a request.
      name: of the model.
      rng: decides the order.
      fail_after: requests after which it is interrupted.
    """

    context_length: int | None = None

    def __init__(
        self,
        answer: Callable[[Request], Response],
        name: str = "made",
        rng: np.random.Generator | None = None,
        fail_after: int | None = None,
    ):
        self.name, self.asked, self._answer = name, list[Request](), answer
        self._rng, self._fail_after = rng or np.random.default_rng(0), fail_after

    def identity(self) -> Mapping[str, Any]:
        return {"weights": self.name}

    def answer(self, requests: Sequence[Request], done: Callable[[int, Response], None]) -> None:
        for i in self._rng.permutation(len(requests)).tolist():
            if self._fail_after is not None and len(self.asked) >= self._fail_after:
                raise KeyboardInterrupt
            self.asked.append(requests[i])
            done(i, self._answer(requests[i]))


class Sums(Task):
    """Sums of two numbers: a text, then a second question about it, and the log-probability of the answer."""

    name = "sums"
    citation = "made here"
    metrics = (Metric("accuracy"), Metric("logprob", scale=1.0))
    files = (DataFile("sums/test.jsonl", licence="none"),)

    def template(self) -> str:
        return "{a}+{b}="

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        lines = [json.loads(line) for line in files["sums/test.jsonl"].read_text().splitlines()]
        return [Item(str(i), one, {"parity": str(one["a"] % 2)}) for i, one in enumerate(lines)]

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        prompt = f"{item.fields['a']}+{item.fields['b']}="
        if not rounds:
            return [Generate(prompt, 8)]
        if len(rounds) == 1:
            return [Loglikelihood(prompt, rounds[0][0].text), Generate(f"sure of {rounds[0][0].text}?", 4)]
        return ()

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        verdicts = []
        for item, rounds in zip(items, responses, strict=True):
            text = rounds[0][0].text
            if text == "?":
                verdicts.append(Verdict({"accuracy": None, "logprob": None}, problem="no verdict"))
                continue
            right = float(text == str(item.fields["a"] + item.fields["b"]))
            verdicts.append(Verdict({"accuracy": right, "logprob": rounds[1][0].logprob}, {"found": text}))
        return verdicts


def write_sums(root: Path, rng: np.random.Generator, count: int = 40) -> None:
    """The data of `Sums`."""
    (root / "sums").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"a": i, "b": int(rng.integers(100))}) for i in range(count)]
    (root / "sums" / "test.jsonl").write_text("\n".join(lines) + "\n")


def adds(request: Request) -> Response:
    """Right for all sums of an even number; cut where the first number divides by 7, and without verdict for 5."""
    if isinstance(request, Loglikelihood):
        return Response(logprob=-float(len(request.context)), tokens=1)
    assert isinstance(request, Generate)
    assert isinstance(request.prompt, str)
    if not request.prompt.endswith("="):
        return Response("yes")
    a, b = map(int, request.prompt[:-1].split("+"))
    if a == 5:
        return Response("?")
    if a == 11:
        return Response(error="the prompt is too long")
    return Response(str(a + b + a % 2), "length" if a % 7 == 0 else "stop", 1)
