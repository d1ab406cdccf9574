"""LiveBench's form and rules, on questions made for these tests."""

import csv
import functools
import html
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, scores_of, verdicts_of, write_lines
from tests.helpers.runs import print_seed
from tests.helpers.sandboxes import needs_bwrap
from train.evaluate import registry
from train.evaluate.benchmarks import live_bench_rules as rules
from train.evaluate.benchmarks.live_bench import LiveBench, average
from train.evaluate.benchmarks.live_bench_tables import FORMATS, has_table, is_same_table, join_score, read_table
from train.evaluate.run import values_of
from train.evaluate.suites import SUITES
from train.evaluate.task import Item, Request, Response, Tools

OLD, NEW = "2024-06-24", "2024-11-25"


def _record(name: str, task: str, truth: Any = "x", category: str = "reasoning", **more: Any) -> dict[str, Any]:
    return {
        "question_id": name,
        "category": category,
        "task": task,
        "turns": [f"Question {name}?"],
        "ground_truth": truth,
        "livebench_release_date": OLD,
        "livebench_removal_date": "",
        **more,
    }


def _drawn() -> random.Random:
    return random.Random(int(print_seed().integers(2**31)))


def _score(task: str, truth: Any, answer: str, release: str = OLD, question: str = "?", subtask: str = "") -> float:
    rule = rules.rule_of(task, subtask, "any")
    assert rule is not None
    return rule({"truth": truth, "question": question, "release": release, "task": task}, answer)


def test_a_release_has_the_questions_that_had_come_and_were_not_removed(tmp_path: Path) -> None:
    """A question belongs to the releases from its first date up to but not including the date of its removal."""
    dates = {"a": (OLD, ""), "b": (OLD, "2024-08-31"), "c": ("2024-08-31", NEW), "d": (NEW, "")}
    path = write_lines(
        tmp_path / "q.jsonl",
        [
            _record(name, "typos", livebench_release_date=came, livebench_removal_date=left)
            for name, (came, left) in dates.items()
        ],
    )
    found = {release: "".join(item.id for item in items_of(LiveBench("l", release), path)) for release in (OLD, NEW)}
    found |= {release: "".join(i.id for i in items_of(LiveBench("l", release), path)) for release in ("2024-08-31", "")}
    assert found == {OLD: "ab", "2024-08-31": "ac", NEW: "ad", "": "ad"}
    assert items_of(LiveBench("l"), path)[0].groups == {"category": "reasoning", "task": "typos"}
    assert "2024-08-31" in LiveBench("l", "2024-08-31").template()
    with pytest.raises(InputError, match=OLD):
        items_of(LiveBench("l", "2024-01-01"), path)
    with pytest.raises(InputError, match="A release is a date"):
        LiveBench("l", "0831")


def test_the_average_gives_each_task_of_a_category_and_each_category_the_same_weight() -> None:
    """Copies of the questions of a task do not change it."""
    items = [["m", "t", 1.0], ["m", "t", 0.0], ["m", "u", 1.0], ["r", "v", 0.0]]
    assert average(items) == pytest.approx((0.75 + 0.0) / 2)
    assert average(items + items[2:3] * 7 + items[3:] * 2) == pytest.approx(average(items))


def test_a_question_without_a_rule_or_an_answer_has_no_score(tmp_path: Path) -> None:
    """Unknown tasks, kinds of instructions and formats, programs without a sandbox, and errors have none; others do."""
    code = {"public_test_cases": "[]", "private_test_cases": "[]", "original_json": {"metadata": "{}"}}
    follow = {"category": "instruction_following", "truth": None}
    path = write_lines(
        tmp_path / "q.jsonl",
        [
            _record("unknown", "astrology"),
            _record("code", "LCB_generation", None, "coding", **code),
            _record("new_kind", "paraphrase", **follow, instruction_id_list=["moon:phase"], kwargs=[{}]),
            _record("format", "tablereformat", turns=["Target Format: XLSX"]),
            _record("late", "typos"),
            _record("right", "typos"),
            _record("wrong", "typos", "y"),
            _record(
                "half",
                "paraphrase",
                **follow,
                instruction_id_list=["punctuation:no_comma", "startend:quotation"],
                kwargs=[{"keywords": None}, {}],
            ),
        ],
    )
    task = LiveBench("l")

    def answer(item: Item, number: int, request: Request) -> Response:
        return Response("<think>y, y</think>\nx", error="too long" if item.id == "late" else None)

    verdicts = verdicts_of(task, items_of(task, path), answer)
    expected = {"right": 1.0, "wrong": 0.0, "half": 0.25}
    assert scores_of(verdicts, "score") == dict.fromkeys(verdicts) | expected
    reasons = {"unknown": "astrology", "code": "sandbox", "new_kind": "moon", "format": "xlsx", "late": "too long"}
    for name, reason in reasons.items():
        assert reason in str(verdicts[name].problem)
    assert average(values_of(task.metrics[0], list(verdicts.values()))) == pytest.approx((0.5 + 0.25) / 2)


def test_tasks_without_a_rule_are_named_and_neither_asked_nor_scored(tmp_path: Path) -> None:
    """All that are known, and any other name: no score, never zero; the numbers are those without these questions."""
    names = [*rules.WITHOUT_RULE, f"task_{_drawn().randrange(10**6)}"]
    path = write_lines(
        tmp_path / "q.jsonl",
        [_record("scored", "typos", "right"), *(_record(f"q-{name}", name, category="new") for name in names)],
    )
    task = LiveBench("live_bench")
    items = items_of(task, path)
    assert [item.id for item in items if task.requests(item, [])] == ["scored"]
    found = verdicts_of(task, items, lambda item, *_: "right")
    assert found["scored"].scores == {"average": 1.0, "score": 1.0}
    for name in names:
        verdict = found[f"q-{name}"]
        assert verdict.scores == {"average": None, "score": None}
        assert f"there is no rule for the task {name} here: " in str(verdict.problem)
        assert rules.rule_of(name, "", "new") is None
    for metric in task.metrics:
        assert metric.aggregate(values_of(metric, list(found.values()))) == 1.0
    # The documentation has the same list.
    text = (Path(__file__).parents[4] / "docs" / "benchmarks.md").read_text()
    assert all(f"`{name}`" in text for name in rules.WITHOUT_RULE)


def test_turns_are_a_conversation_whose_last_answer_counts(tmp_path: Path) -> None:
    """A later turn sees earlier answers."""
    path = write_lines(tmp_path / "q.jsonl", [_record("a", "typos", "second", turns=["One?", "Two?"])])
    task, asked = LiveBench("l"), []

    def answer(item: Item, number: int, request: Any) -> str:
        asked.append([message["content"] for message in request.prompt])
        return "second" if len(asked) == 2 else "first"

    verdicts = verdicts_of(task, items_of(task, path), answer)
    assert asked == [["One?"], ["One?", "first", "Two?"]]
    assert scores_of(verdicts, "score") == {"a": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"task": "olympiad", "subtask": "imo", "ground_truth": "1,b"},
        {"task": "math_comp", "subtask": "amc_12a", "ground_truth": "F"},
        {"task": "tablejoin", "ground_truth": "no map"},
        {"task": "AMPS_Hard", "ground_truth": []},
        {"task": "typos", "ground_truth": None},
        {"task": "typos", "turns": []},
        {"task": "typos", "livebench_release_date": "June"},
    ],
)
def test_a_question_of_another_form_is_an_error_that_names_the_line(change: dict[str, Any], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", [_record("a", "typos"), _record("b", "typos") | change])
    with pytest.raises(InputError, match=r"q\.jsonl, line 2"):
        items_of(LiveBench("l"), path)


def test_edit_distance_is_that_of_its_recursion() -> None:
    """Drawn sequences against the definition."""
    rng = _drawn()

    @functools.cache
    def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    for _ in range(40):
        a, b = (tuple(rng.choices(range(4), k=rng.randrange(8))) for _ in range(2))
        assert rules.edit_distance(a, b) == distance(a, b)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("So BBBBB.", 1.0),
        ("<solution>B</solution>", 1.0),
        ("<solution>BBB</solution>", 1.0),
        (r"It is \boxed{\text{B}}", 1.0),
        ("Hence the area is 17.", 1.0),
        ("17 is wrong. " + "No. " * 20, 0.0),
        ("CCCCC", 0.0),
        ("<solution>B</solution> <solution>C</solution>", 0.0),
    ],
)
def test_options_of_contests(answer: str, score: float) -> None:
    question = r"Area? $\textbf{(A) } 12 \qquad \textbf{(B) } 17 \qquad \textbf{(C) } 3$"
    assert _score("math_comp", "B", answer, question=question, subtask="amc_12b_2023") == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Because ...\nAnswer: 3, 1, 2, 4", 1.0),
        ("Answer: 9\n**Answer:**\n3,1,2,4", 1.0),
        ("\\boxed{3,1,2,4}", 1.0),
        ("<formula 3>, 1, 2, 4.", 1.0),
        ("Answer: 3, 1, 4", 0.75),
        ("Answer: 3, 2, 1, 4", 0.5),
        ("Answer: 3, 1, 2, 4, 5", 0.8),
        ("I do not know", 0.0),
    ],
)
def test_orders_of_formulas(answer: str, score: float) -> None:
    assert _score("olympiad", "3,1,2,4", answer, subtask="usamo") == pytest.approx(score)


@pytest.mark.parametrize(
    ("task", "truth", "answer", "release", "score"),
    [
        ("math_comp", "073", "... the number is 073.", OLD, 1.0),
        ("math_comp", "073", "073" + " no" * 20, OLD, 0.0),
        ("web_of_lies_v2", "yes, no, yes", "So **yes**, **no, yes.**", OLD, 1.0),
        ("web_of_lies_v2", "yes, no, yes", "<solution>yes, no, yes</solution> **no, no, no**", OLD, 1.0),
        ("web_of_lies_v2", "yes, no, unknown", r"\boxed{\textbf{yes, no, unknown}}", OLD, 1.0),
        ("web_of_lies_v2", "no, no, yes", "not yes, no, no, but no, no, yes", OLD, 1.0),
        ("web_of_lies_v2", "yes, no, yes", "**yes, no, no**", OLD, 0.0),
        ("web_of_lies_v2", "yes, no, yes", "Who knows", OLD, 0.0),
        ("web_of_lies_v3", "yes,no,yes,no", "<solution>yes, no, yes, yes</solution>", NEW, 3 / 8),
        ("web_of_lies_v3", "yes,no,yes,no", "<solution>yes,no,yes,no</solution>", NEW, 1.0),
        ("web_of_lies_v3", "yes,no,yes", "none", NEW, 0.0),
        ("zebra_puzzle", "four", "It is ***4***", OLD, 1.0),
        ("zebra_puzzle", "horror movies", "***horror***", OLD, 1.0),
        ("zebra_puzzle", "tea", "tea, ***milk***", OLD, 0.0),
        ("zebra_puzzle", "tea", "She drinks tea.", OLD, 1.0),
        ("zebra_puzzle", "2,hip-hop,tea", "<solution>position 2, Hip hop, milk</solution>", NEW, 1 / 3),
        ("zebra_puzzle", "2,tea", "<solution>2</solution> <solution>tea</solution>", NEW, 1.0),
        ("zebra_puzzle", "2,tea", "So\n2, tea", NEW, 1.0),
        ("zebra_puzzle", "2,tea", "No idea", NEW, 0.0),
        ("spatial", "12", "**cut** gives **twelve** pieces of **a cube**", OLD, 1.0),
        ("spatial", "triangle", "an **equilateral triangle**", OLD, 1.0),
        ("spatial", "triangle", "a **circle, a square and a triangle**", OLD, 0.0),
        ("spatial", "4", "**4** **5** **6** **7**", OLD, 0.0),
        ("house_traversal", "Ann Bo Cy", "**Ann**, **Bo**, **Cy**", OLD, 1.0),
        ("house_traversal", "Ann Bo Cy", "***Ann, Bo, Cy***", OLD, 1.0),
        ("house_traversal", "Ann Bo Cy", "**Bo, Ann, Cy**", OLD, 0.0),
        ("typos", "The cat sat.", "Here:\nThe cat\n\nsat. Done", OLD, 1.0),
        ("typos", "The cat sat.", "The cat sits.", OLD, 0.0),
        ("connections", "a,b,c,d,e,f,g,h", "**x, y** then **d,c,b,a,e,f,g,x**", OLD, 0.5),
        ("connections", "a,b,c,d,e,f,g,h", "<solution>h,g,f,e,\nA, B,c,d</solution>", NEW, 1.0),
        ("connections", "a,b,c,d,e,f,g,h", "**a,b,c,d,e,f,g,h**", NEW, 0.0),
        ("connections", "a,b,c,d", r"\boxed{\text{a,b,c,d}}", NEW, 1.0),
        ("cta", "Postal Code", "postal-code.", OLD, 1.0),
        ("cta", "Postal Code", r"The type is \boxed{\text{Postal Code}}", OLD, 1.0),
        ("cta", "Postal Code", "It is Postal Code", OLD, 0.0),
        ("tablejoin", {"a": "x", "b": "y"}, "```python\n{'a': 'x',\n 'b': 'y'}\n```", OLD, 1.0),
        ("tablejoin", "{'a': 'x', 'b': 'y'}", "{'a': 'x'}", OLD, 0.67),
        ("tablejoin", {"a": "x"}, "exec('1')", OLD, 0.0),
    ],
)
def test_rules(task: str, truth: Any, answer: str, release: str, score: float) -> None:
    """Each rule on answers whose score follows from its description."""
    subtask = "aime_i_2024" if task == "math_comp" else ""
    assert _score(task, truth, answer, release, subtask=subtask) == pytest.approx(score)


def test_plots_are_scored_by_the_order_of_their_sentences() -> None:
    """A drawn order has the score of its edit distance; small changes of words do not matter."""
    rng = _drawn()
    sentences = [
        "A storm sinks the ferry",
        "Mira finds seven letters",
        "Old Tom confesses it all",
        "They dance at dawn",
    ]
    order = rng.sample(range(4), 4)
    places = [order.index(n) for n in range(4)]
    text = "<PLOT_SUMMARY>" + " ".join(f"{sentences[n]} indeed." for n in order)
    score = _score("plot_unscrambling", ". ".join(sentences) + ".", f"Tom says. {text}")
    assert score == pytest.approx(1 - rules.edit_distance(range(4), places) / 4)
    assert _score("plot_unscrambling", "A. B.", "") == 0.0


def test_the_score_of_a_join_is_its_f1() -> None:
    """Drawn maps against precision and recall of their pairs."""
    rng = _drawn()
    for _ in range(50):
        found, right = ({k: rng.choice("xyz") for k in rng.sample("abcdef", rng.randint(1, 6))} for _ in range(2))
        hits = len(found.items() & right.items())
        assert join_score(found, right) == round(2 * hits / (len(found) + len(right)), 2)


def _written(rows: Sequence[dict[str, Any]], form: str) -> str:
    names = list(rows[0])
    if form == "json":
        return json.dumps({str(i): row for i, row in enumerate(rows)})
    if form == "jsonl":
        return "\n".join(json.dumps(row) for row in rows)
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    if form == "markdown":
        cells.insert(1, ["---"] * len(names))
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    if form == "html":
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells)
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
    stream = io.StringIO()
    csv.writer(stream, delimiter="," if form == "csv" else "\t", lineterminator="\n").writerows(cells)
    return stream.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_tables_are_equal_in_every_format_and_not_after_a_change(form: str) -> None:
    """The order of columns does not matter; the order of rows, a cell, and a missing row do."""
    rng = _drawn()
    rows: list[dict[str, Any]] = [
        {"Name": f"R&D {n}, west", "Share": round(rng.random() + n, 3), "Note": "" if n % 2 else "ok", "index": n}
        for n in range(rng.randint(2, 5))
    ]
    expected = read_table(_written(rows, "json"), "json")
    assert expected is not None
    turned = [dict(reversed(row.items())) for row in rows]
    text = _written(turned, form)
    found = read_table(text, form)
    assert found is not None
    assert is_same_table(found, expected)
    question = "Please convert the Input Table from CSV format to " + form.upper() + " format"
    assert _score("tablereformat", _written(rows, form), f"Here it is:\n```{form}\n{text}\n```", question=question) == 1
    assert has_table(f"<solution>\n{text}\n</solution>", expected, form)
    if form in ("csv", "jsonl", "html"):
        assert has_table(f"Sure!\n{text}\nThat is all, friend.", expected, form)
    for wrong in (rows[::-1], rows[:-1] or rows * 2, [*rows[:-1], rows[-1] | {"Share": 99}]):
        assert not has_table(_written(wrong, form), expected, form)
    assert not has_table("no table", expected, form)


def test_expressions_are_compared_as_mathematics(tmp_path: Path) -> None:
    """The last box, or the last formula of the last line, without a constant; a truth may be a list."""
    pytest.importorskip("math_verify")
    answers = {
        "box": r"So \boxed{F(x) = \frac{1}{2} x^2 + C}",
        "formula": "First $1$.\nThus $y = \\frac{x^2}{2}$.",
        "wrong": r"\boxed{x^2}",
        "plain": "Thus it is x^2/2.",
        "none": "I cannot.",
    }
    path = write_lines(
        tmp_path / "q.jsonl", [_record(name, "AMPS_Hard", ["0", "x^2/2"], "math", subtask="") for name in answers]
    )
    task = LiveBench("l")
    verdicts = verdicts_of(task, items_of(task, path), lambda item, number, request: answers[item.id])
    right = {"box", "formula", "plain"}
    assert scores_of(verdicts, "score") == {name: float(name in right) for name in answers}


@needs_bwrap
def test_programs_run_after_what_the_question_gives_of_them(tools: Tools, tmp_path: Path) -> None:
    """A completion is joined to its beginning; public and private tests count."""
    tests = [{"input": f"{n}\n", "output": f"{n + 1}\n", "testtype": "stdin"} for n in (1, 5)]
    code = {
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": json.dumps(tests[1:]),
        "original_json": {"metadata": "{}"},
        "category": "coding",
    }
    path = write_lines(
        tmp_path / "q.jsonl",
        [
            _record("whole", "LCB_generation", **code),
            _record("part", "coding_completion", **code, partial_solution="n = int(input())"),
            _record("wrong", "LCB_generation", **code),
            _record("none", "LCB_generation", **code),
        ],
    )
    answers = {
        "whole": "```python\nprint(int(input()) + 1)\n```",
        "part": "```python\nprint(n + 1)\n```",
        "wrong": "```python\nprint(2)\n```",
        "none": "print(2)",
    }
    task = LiveBench("l")
    verdicts = verdicts_of(task, items_of(task, path), lambda item, number, request: answers[item.id], tools)
    assert scores_of(verdicts, "score") == {"whole": 1.0, "part": 1.0, "wrong": 0.0, "none": 0.0}


def test_the_suite_names_a_task_that_there_is() -> None:
    entries = [entry for suite in SUITES.values() for entry in suite.entries if "LiveBench" in entry.benchmark]
    assert [entry.task for entry in entries] == ["live_bench_2408"]
    assert registry.find(["live_bench", "live_bench_2408"])
