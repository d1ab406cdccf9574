"""Structured data: answers are those of the tables, wrong answers and made-up numbers are dropped, the rest is kept."""

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.mistakes import FORMAL, drawn, nonsense
from tests.helpers.runs import print_seed
from tests.helpers.scripted_api import reachable
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from train.data.examples import read_examples
from train.synthesize.generator import Answer, Request
from train.synthesize.grounding import numbers_of
from train.synthesize.item import Item
from train.synthesize.recipes import structured_data
from train.synthesize.recipes.structured_data import pipeline
from train.synthesize.run import RunOptions, run
from train.synthesize.structured_tasks import TASKS, is_right_answer

RIGHT = ("right", "right", "right", "other form")
WRONG = ("wrong", "made up", "no answer", "restates", *FORMAL)
WORDINGS = (*["faithful"] * 8, "dropped", "other number", "turned", "leak", "list", "half", *FORMAL)
FORMS = {"csv": "CSV", "json": "JSON"}


class Reader:
    """Words questions and answers tasks, and remembers which mistake each text has.

    Attributes:
      kinds: by the text of an answer: number of the item, and what is wrong with it.
      sampled: by item: the kinds of its samples.
      wordings: what is wrong with each wording, in order.
    """

    def __init__(self, items: list[Item], share_right: float = 0.5):
        self.items = items
        self.kinds: dict[str, tuple[int, str]] = {}
        self.sampled: dict[int, list[str]] = {}
        self.wordings: list[str] = []
        self._share_right = share_right
        self._questions = {item["question"]: i for i, item in enumerate(items)}
        self._asked = Counter(item["question"] for item in items)

    def __call__(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        if prompt.startswith("Here is a"):
            return self._word(prompt.split("do not answer.\n\n")[1].split("\n\nAnswer with a JSON")[0], rng)
        number = self._number(prompt)
        # Every seventh task is never solved.
        kind = rng.choice(RIGHT) if number % 7 and rng.random() < self._share_right else rng.choice(WRONG)
        made = self._solve(self.items[number], kind, rng)
        self.kinds[(made if isinstance(made, str) else made.text).strip()] = number, kind
        self.sampled.setdefault(number, []).append(kind)
        return made

    def _number(self, prompt: str) -> int:
        for i, item in enumerate(self.items):
            if item["text"] in prompt and item["question"].replace('"', "'") in prompt.replace('"', "'"):
                return i
        raise AssertionError(prompt)

    def _solve(self, item: Item, kind: str, rng: Any) -> str | Answer:
        mark = f"Call this reading {''.join(rng.choice('abcdefghij') for _ in range(12))}."
        answer = item["wrong"] if kind in ("wrong", "restates") else item["answer"]
        if item["compare"] in FORMS:
            if kind == "other form" and item["compare"] == "json":
                answer = json.dumps(json.loads(answer))
            text = f"This is the whole of it. {mark}\n\n```{item['compare']}\n{answer}\n```"
            text += "\nDone." if kind in ("no answer", "made up") else ""
        else:
            if kind == "other form" and item["compare"] == "number":
                answer = f"{Decimal(answer):,}" if "." not in answer else answer + "0"
            made_up = " That has to do with 7390451.37 here." if kind == "made up" else ""
            text = f"1. We look at the data row by row. {mark}{made_up}\n2. Only this fits what is asked."
            if kind == "restates":
                text = text.partition("\n")[0] + f"\n2. We look at the data row by row. {mark}"
                answer = item["answer"]
            text += "" if kind == "no answer" else f"\nAnswer: {answer}"
        return FORMAL[kind](text) if kind in FORMAL else text

    def _word(self, text: str, rng: Any) -> str | Answer:
        item, kind = self.items[self._questions[text]], rng.choice(WORDINGS)
        if kind == "leak" and self._asked[text] > 1:
            kind = "dropped"
        wording = f"Please look closely. {text}"
        if kind == "dropped":
            wording = wording.replace(item["needed"][0], "that thing")
        if kind == "other number":
            wording += " There are 31415 of them."
        if kind == "turned":
            lower = text.casefold()
            wording += " That is not so." if not {"not", "no"} & set(lower.replace("?", " ").split()) else " 9999"
        if kind == "leak":
            leaks = item["task"] != "verification" and item["answer"].split(", ")[0].casefold() not in text.casefold()
            wording += f' I think of "{item["answer"].split(", ")[0]}".' if leaks else " And 31415."
        self.wordings.append(kind)
        made = json.dumps([wording] if kind == "list" else {"text": wording})
        return FORMAL[kind](made) if kind in FORMAL else made[: len(made) // 2] if kind == "half" else made


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def steps_of_record(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was done to an item, kept or rejected."""
    found: list[dict[str, Any]] = record["steps"]
    return found


@pytest.mark.parametrize("case", range(3))
def test_only_right_answers_are_kept_and_all_of_them(case: int, tmp_path: Path) -> None:
    seed = int(print_seed().integers(1 << 30))
    made = pipeline(tables=40, each=4, seed=seed, samples=3, language="en")
    reader = Reader(list(made.source()))
    with reachable({"generator": ScriptedGenerator(reader)}, over_http=case == 0) as models:
        summary = run(made, models, tmp_path, RunOptions(16))
    kept = Counter[int]()
    for row in rows_of(tmp_path, "sft"):
        user, assistant = (message["content"] for message in row["messages"])
        number, kind = reader.kinds[assistant]
        item = reader.items[number]
        # Precision: only right answers, to a question in words of code or in faithful ones.
        restated = kind == "restates" and item["compare"] in FORMS
        assert kind in RIGHT or restated, kind
        assert is_right_answer(item["answer"], item["compare"], assistant)
        assert item["text"] in user
        assert ("look closely" in user) == any(step.get("worded") for step in row["provenance"]["steps"])
        kept[number] += 1
    lines = [line for path in tmp_path.glob("parts/*/*.jsonl") for line in path.open()]
    worded = sum(bool(step.get("worded")) for line in lines for step in steps_of_record(json.loads(line)))
    assert worded == reader.wordings.count("faithful") > 0
    # Recall: every task with a right sample.
    expected = {i for i, kinds in reader.sampled.items() if set(kinds) & set(RIGHT)}
    print(f"precision 1, recall {len(kept)}/{len(expected)} of {len(reader.items)} tasks")
    assert set(kept) == expected
    assert len(kept) > 50
    assert {reader.items[i]["task"] for i in kept} == set(TASKS)
    assert {item["form"] for item in reader.items} >= {"markdown", "csv", "json", "yaml", "html", "outline"}
    audits = summary["audits"]
    assert audits["answer"] == {"right": [len(reader.items)] * 2, "wrong": [len(reader.items), 0]}
    assert audits["numbers"]["wrong"][0] > 20
    assert audits["numbers"]["wrong"][1] == 0
    assert audits["wording"]["right"][0] == audits["wording"]["right"][1]
    for row in rows_of(tmp_path, "pairs"):
        (number, chosen), (other, rejected) = (reader.kinds[row[x][0]["content"]] for x in ("chosen", "rejected"))
        assert number == other
        assert chosen in RIGHT
        assert rejected in ("wrong", "restates")
    for row in rows_of(tmp_path, "grpo"):
        assert row["prompt"][0]["role"] == "user"
        assert 0.1 <= row["pass_rate"] <= 0.9
    assert len(list(read_examples([tmp_path / "sft.jsonl"]))) == sum(kept.values())


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    made = pipeline(tables=20, seed=int(print_seed().integers(1 << 30)), samples=3)
    summary = run(made, {"generator": ScriptedGenerator(nonsense)}, tmp_path)
    assert [output["rows"] for output in summary["outputs"]] == [0, 0, 0]
    assert summary["stages"][0]["out"] == summary["stages"][0]["in"] > 40


@pytest.mark.parametrize(("name", "blind"), [("answer", True), ("numbers", None), ("wording", None)])
def test_checks_that_let_everything_pass_end_the_run(
    name: str, blind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = {"answer": "is_right_answer", "numbers": "ungrounded_number", "wording": "wording_fault"}[name]
    monkeypatch.setattr(structured_data, function, lambda *arguments: blind)
    made = pipeline(tables=50, worded=1.0, seed=int(print_seed().integers(1 << 30)), samples=2)
    reader = Reader(list(made.source()), 0.9)
    with pytest.raises(InputError, match=f"The check {name} cannot be trusted: it passed"):
        # A wording is made of any question here, so that the reader knows only those of code.
        run(made, {"generator": ScriptedGenerator(_tolerant(reader))}, tmp_path / "run", RunOptions(16))
    assert not (tmp_path / "run" / "sft.jsonl").exists()


def _tolerant(reader: Reader) -> Any:
    """A reader that says nothing of questions it does not know."""

    def answer(request: Request) -> str | Answer:
        try:
            return reader(request)
        except AssertionError:
            return "1. One.\nAnswer: 2"

    return answer


def test_files_of_the_user_are_read(tmp_path: Path) -> None:
    rng = print_seed()
    names = [f"row {chr(97 + i)}" for i in range(9)]
    numbers = [int(n) for n in rng.permutation(900)[:9]]
    (tmp_path / "a.csv").write_text("Name,Size\n" + "".join(f"{a},{b}\n" for a, b in zip(names, numbers, strict=True)))
    records = [{"Name": a, "Size": b} for a, b in zip(names, numbers, strict=True)]
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "d.json").write_text(json.dumps({"a": {"size": 3, "b": [1, {"c": "x"}]}}))
    (tmp_path / "e.tsv").write_text("Name\tSize\n" + "".join(f"{r['Name']}\t{r['Size']}\n" for r in records))
    made = pipeline(tables=0, files=(str(tmp_path),), each=20, most_rows=6)
    items = list(made.source())
    assert {Path(item.sources[0]).name for item in items} == {"a.csv", "b.json", "c.jsonl", "d.json", "e.tsv"}
    # The same task about two files with the same rows is one, which the run sees to.
    assert len({(item.id, item.sources) for item in items}) == len(items)
    for item in items:
        if item["task"] in ("question", "verification"):
            assert item["counts"] <= 6
            assert set(map(int, filter(lambda n: int(n) > 6, item["known"]))) <= set(numbers)
    assert [item.id for item in made.source()] == [item.id for item in items]


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", "", "expected a table"),
        ("b.csv", "x,y\n1\n", "expected a table"),
        ("c.csv", "x,x\n1,2\n", "expected a table"),
        ("d.csv", 'x,y\n1,"2\n', "expected a table"),
        ("e.json", "{", "not valid JSON"),
        ("f.json", '{"a": 1, "a": 2}', "not valid JSON"),
        ("g.json", "3", "expected a JSON object or list"),
        ("h.jsonl", '{"a": 1}\n{"a"', "not valid JSON"),
        ("i.txt", "text", "expected a file of"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            pipeline(files=(str(tmp_path / name),))
    for options in (
        {"tables": 0}, {"tables": -1}, {"each": 0}, {"samples": 0}, {"tasks": ("sums",)}, {"tasks": ()},
        {"formats": ("xml",)}, {"worded": 1.5}, {"least_rate": 0.9, "most_rate": 0.1}, {"temperature": float("nan")},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipeline(**options)  # type: ignore[arg-type]


def test_two_hundred_tasks_a_second(tmp_path: Path) -> None:
    made = pipeline(tables=150, seed=int(print_seed().integers(1 << 30)), samples=1, worded=0.0)
    items = list(made.source())
    known = {(item["text"], item["question"]): item for item in items}
    by_prompt = {structured_data._prompt(item)[0]["content"]: item for item in known.values()}

    def answer(request: Request) -> str:
        item = by_prompt[str(request.messages[-1]["content"])]
        if item["compare"] in FORMS:
            return f"Done.\n```{item['compare']}\n{item['answer']}\n```"
        return f"1. One row fits what is asked.\n2. It decides this.\nAnswer: {item['answer']}"

    models = {"generator": ScriptedGenerator(answer)}
    rate = best_rate(len(items), lambda attempt: run(made, models, tmp_path / str(attempt)), enough=200)
    assert len(rows_of(tmp_path / "0", "sft")) == len(items)
    assert rate > 200


def test_numbers_of_texts() -> None:
    assert numbers_of("In 2023-05-01, 1,234.5 of 7 items (A4, x2) cost 3.50.") == [
        Decimal(n) for n in ("2023", "05", "01", "1234.5", "7", "3.50")
    ]
