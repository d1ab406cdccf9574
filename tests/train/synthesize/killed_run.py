"""Runs a small pipeline in a process that a test kills: `python killed_run.py FOLDER LOG SEED`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.scripted_model import ScriptedGenerator
from train.synthesize.context import Context
from train.synthesize.generator import Answer, Request
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.run import RunOptions, run
from train.synthesize.store import Store

ITEMS = 150


def answer(request: Request) -> str:
    """A sum, wrong for some seeds."""
    a, b = map(int, str(request.messages[-1]["content"]).split("+"))
    return str(a + b + (request.seed % 3 == 0))


async def sample(item: Item, context: Context) -> Result:
    answers = await context.ask(f"{item['a']}+{item['b']}", samples=3)
    return item.update(answers=[one.text for one in answers])


async def verify(item: Item, context: Context) -> Result:
    right = []
    for text in item["answers"]:
        content = [item["a"], item["b"], text]
        right.append(await context.check("sum", content, lambda text=text: int(text) == item["a"] + item["b"]))
    passed = [text for text, ok in zip(item["answers"], right, strict=True) if ok]
    if not passed:
        return Rejected("no sample is right", " ".join(item["answers"]))
    return item.split({"answer": text} for text in dict.fromkeys(passed))


def once(items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
    seen = set()
    for item in items:
        key = (item["a"] + item["b"]) % 40
        yield item, Rejected("the same sum") if key in seen else item.update(key=key)
        seen.add(key)


async def comment(item: Item, context: Context) -> Result:
    (found,) = await context.ask(f"{item['a']}+{item['answer']}")
    return item.update(comment=found.text, drawn=item.rng(context.stage).random())


def pipeline(seed: int = 0) -> Pipeline:
    """The pipeline."""
    return Pipeline(
        "sums",
        lambda: (make_item({"a": i, "b": i * i % 97}, [f"line {i}"]) for i in range(ITEMS)),
        [Stage("sample", sample), Stage("verify", verify), Together("once", once), Stage("comment", comment)],
        [Output("sft", lambda item: [{"prompt": f"{item['a']}+{item['b']}", "completion": item["answer"]}])],
        seed=seed,
        settings={"items": ITEMS},
    )


class _Logged(ScriptedGenerator):
    """Writes down each request before it is answered."""

    def __init__(self, log: Path):
        super().__init__(answer, delay=lambda request: request.seed % 7 / 2000, concurrency=8)
        self._log = log.open("a", buffering=1)

    async def ask(self, request: Request) -> Answer:
        self._log.write(f"sent {request.key(self.model)}\n")
        return await super().ask(request)


def main(folder: Path, log: Path, seed: int) -> None:
    keep, kept = Store.add_answer, log.open("a", buffering=1)

    def add_answer(self: Store, key: str, model: str, answer: Answer) -> None:
        keep(self, key, model, answer)
        kept.write(f"kept {key}\n")

    Store.add_answer = add_answer  # type: ignore[method-assign]
    run(pipeline(seed), {"generator": _Logged(log)}, folder, RunOptions(part_items=16, parts_at_once=3, workers=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
