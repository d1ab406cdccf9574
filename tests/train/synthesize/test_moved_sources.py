"""A source that is moved, renamed or put in another order is the same source: nothing is asked, or judged, again."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import print_seed
from tests.helpers.scripted_model import ScriptedGenerator
from tests.train.synthesize.recipes.test_cross_lingual import ASKED, Translator
from tests.train.synthesize.recipes.test_every_recipe import ISOLATION, LONG
from tests.train.synthesize.recipes.test_filtering import Jury, make_examples
from train.synthesize.context import Context
from train.synthesize.generator import Request
from train.synthesize.item import Item, Rejected
from train.synthesize.loading import load_recipe
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.run import run
from train.synthesize.sources import records, texts

# By recipe: the option that takes the files, a record, and other options.
RECIPES: dict[str, tuple[str, Callable[[int], dict[str, Any]], dict[str, Any]]] = {
    "logic": ("questions", lambda i: {"question": f"Is {i} odd?", "answer": str(i % 2 == 1)}, {"puzzles": 2}),
    "code": ("pages", lambda i: {"text": f"How do I add {i} to each number of a list?"}, {"languages": ("python",)}),
    "instructions": (
        "queries", lambda i: {"query": f"Tell me about river number {i}, please."}, {"augment": 0, "built_in": 5},
    ),
    "cross_lingual": ("files", lambda i: {"prompt": f"Tell me of {i}."}, {"languages": ("de",), "embeddings": False}),
    "system_prompts": ("questions", lambda i: {"question": f"What about {i}?"}, {"prompts": 3, "conversations": 4}),
    "long_responses": ("corpus", lambda i: {"text": f"{LONG} It is number {i}."}, {"least_words": 100}),
    "filtering": ("examples", lambda i: {"prompt": f"What about {i}?", "completion": f"It is {i} and that is so."}, {}),
    "preferences": ("prompts", lambda i: {"prompt": f"What about {i}?"}, {"answerers": ("a", "b")}),
}  # fmt: skip


def write(folder: Path, rows: list[dict[str, Any]], *names: str) -> tuple[str, ...]:
    """Shares rows out among files."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        text = "".join(json.dumps(row) + "\n" for row in rows[number :: len(names)])
        (folder / name).write_text(text)
    return tuple(str(folder / name) for name in names)


def says(request: Request) -> str:
    """Something, which depends on the request."""
    return f"I think that it is {request.seed % 7}. It is so in case {request.key('')[:5]}.\nScore: {request.seed % 10}"


def rows_of(folder: Path) -> Counter[str]:
    """The examples of all outputs, without the places where they come from."""
    found: Counter[str] = Counter()
    for path in folder.glob("*.jsonl"):
        for line in path.open():
            row = json.loads(line)
            row["provenance"].pop("sources")
            found[json.dumps(row, sort_keys=True)] += 1
    return found


def again(pipelines: list[Pipeline], model: Callable[[], ScriptedGenerator], folder: Path) -> None:
    """Runs pipelines in one folder, of which the first one alone may ask and judge."""
    made: list[tuple[list[Any], Counter[str]]] = []
    for number, pipeline in enumerate(pipelines):
        given = {name: model() for name in pipeline.models}
        summary = run(pipeline, given, folder)
        assert sum(len(one.asked) for one in given.values()) == summary["asked_now"]
        assert (summary["asked_now"] > 0) == (number == 0), pipeline.name
        counts = [[stage["name"], stage["in"], stage["out"], stage["rejected"]] for stage in summary["stages"]]
        made.append((counts, rows_of(folder)))
    assert all(one == made[0] for one in made)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_asks_nothing_again(name: str, tmp_path: Path) -> None:
    option, row, others = RECIPES[name]
    rng = random.Random(int(print_seed().integers(1 << 30)))
    rows = [row(i) for i in rng.sample(range(100), 7)]
    if name in ("code", "instructions"):
        others = {**others, "isolation": ISOLATION}
    first = write(tmp_path / "first", rows, "a.jsonl")
    second = write(tmp_path / "moved" / "there", rng.sample(rows, 7), "x.jsonl", "b.jsonl")
    pipelines = [load_recipe(name)(**{option: files}, **others) for files in (first, second)]
    again(pipelines, lambda: ScriptedGenerator(says), tmp_path / "run")


def test_tables_may_be_moved(tmp_path: Path) -> None:
    names = ("a.csv", "b.csv")
    pipelines = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names if folder == "first" else names[::-1]):
            lines = [f"town {chr(97 + i)},{i * (7 + number)}" for i in range(9)]
            (tmp_path / folder / name).write_text("town,boats\n" + "\n".join(lines) + "\n")
        options = {"files": (str(tmp_path / folder / "*.csv"),), "tables": 3, "each": 4}
        pipelines.append(load_recipe("structured_data")(**options))
    again(pipelines, lambda: ScriptedGenerator(says), tmp_path / "run")


def test_all_stages_ask_nothing_again(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    rows = [{"prompt": ASKED["en"].format(f"topic{chr(97 + i)}", 2 + i)} for i in range(8)]
    pipelines = []
    for folder in ("first", "second"):
        files = write(tmp_path / folder, rng.sample(rows, 8), f"{folder}.jsonl")
        pipelines.append(load_recipe("cross_lingual")(files=files, languages=("de", "fr")))
    again(pipelines, lambda: Translator(0.8), tmp_path / "translated")
    assert len(rows_of(tmp_path / "translated")) > 8

    make_examples(tmp_path / "examples.jsonl", rng, 60)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").open()]
    pipelines = []
    for folder in ("third", "fourth"):
        files = write(tmp_path / folder, rng.sample(rows, 60), f"{folder}.jsonl")
        pipelines.append(load_recipe("filtering")(examples=files, least_words=8, language="en", critic=False))
    again(pipelines, lambda: ScriptedGenerator(Jury("judge"), "judge"), tmp_path / "filtered")


def test_an_item_that_comes_twice_is_one(tmp_path: Path) -> None:
    async def ask(item: Item, context: Context) -> Result:
        (found,) = await context.ask(item["text"])
        verdict = await context.check("odd", item["text"], lambda: len(item["text"]) % 2)
        return item.update(answer=found.text) if verdict else Rejected("even")

    rng = random.Random(int(print_seed().integers(1 << 30)))
    rows = [{"text": f"{'y' * (i % 3)} text {i}"} for i in range(30)]
    twice = [*rows, *rng.sample(rows, 11)]
    rng.shuffle(twice)
    outputs = [Output("all", lambda item: [{"prompt": item["text"], "completion": item["answer"]}])]
    made = []
    for number, (some, source) in enumerate(((rows, records), (twice, texts), (twice, records))):
        files = write(tmp_path / str(number), some, "f.jsonl")
        begin = source(files, {"text": str}) if source is records else texts(files)
        generator = ScriptedGenerator(says)
        summary = run(Pipeline("p", begin, [Stage("ask", ask)], outputs), {"generator": generator}, tmp_path / "run")
        assert summary["repeated"] == len(some) - 30
        assert len(generator.asked) == (0 if number else 30)
        assert ("came before" in (tmp_path / "run" / "report.html").read_text()) == (some is twice)
        made.append(rows_of(tmp_path / "run"))
    assert made[0] == made[1] == made[2]
