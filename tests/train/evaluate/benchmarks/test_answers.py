"""TheoremQA, MATH and MGSM: what is read as the answer, and when it is the right one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, scores_of, verdicts_of, write_lines
from tests.helpers.runs import print_seed
from train.evaluate.benchmarks.mathematics import MGSM, Mathematics
from train.evaluate.benchmarks.numbers import value_of
from train.evaluate.benchmarks.theorem_qa import TheoremQA, expected_of, is_equal
from train.evaluate.task import DataFile, Generate, Response


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.5 cm", 3.5),
        ("1,234,567", 1234567),
        ("-2/3", -2 / 3),
        (r"\frac{1}{\sqrt{2}}", 1 / math.sqrt(2)),
        (r"3 \times 10^{-4}", 3e-4),
        ("2.5e-3", 2.5e-3),
        ("25%", 0.25),
        (r"2\pi", 2 * math.pi),
        ("$\\approx 1.5$", 1.5),
        ("\u221216", -16),
        ("\u221a2", math.sqrt(2)),
        ("e^2", math.e**2),
        (r"0.5 \text{ m}", 0.5),
        ("", None),
        ("many", None),
        ("9**9**9**9", None),
        ("1/0", None),
        ("__import__('os')", None),
        ("1 2", None),
        ("2 or 3", None),
        ("9.8 m/s^2", 9.8),
        ("(" * 150, None),
    ],
)
def test_numbers_are_read_without_running_anything(text: str, value: float | None) -> None:
    assert value_of(text) == (None if value is None else pytest.approx(value))


def test_any_number_is_read_back() -> None:
    rng = print_seed()
    for _ in range(100):
        value = float(rng.normal() * 10.0 ** rng.integers(-6, 7))
        assert value_of(repr(value)) == value
        assert value_of(f"{value:,.6f}") == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected", "right", "wrong"),
    [
        ("integer", 7, ["7", "7.0", "6.8", r"\frac{14}{2}"], ["6", "7.6", "seven", ""]),
        ("float", 2.0, ["2", "2.07", "1.93", "4/2"], ["2.1", "1.9", "-2"]),
        ("float", "-0.5", ["-0.51"], ["0.5", "-0.53"]),
        ("bool", "True", ["True", "true.", "Yes", r"\text{True}"], ["False", "no", "untrue", ""]),
        ("bool", False, ["False", "No"], ["True"]),
        ("option", "(b)", ["(b)", "b", "B)", "option (b)"], ["(a)", "because"]),
        ("list of integer", "[1, 3]", ["[3, 1]", "(1, 3)", "1, 3", r"\{1, 3\}"], ["[1]", "[1, 4]", "1", "[1, 3, 3]"]),
        ("list of float", [0.5, 2.0], ["[0.49, 2.05]", "[2, 1/2]"], ["[0.4, 2]"]),
    ],
)
def test_theorem_qa_compares_by_the_type_of_the_answer(
    kind: str, expected: Any, right: list[str], wrong: list[str]
) -> None:
    value = expected_of(expected, kind)
    assert value is not None
    assert [text for text in right if not is_equal(text, value, kind)] == []
    assert [text for text in wrong if is_equal(text, value, kind)] == []


def _theorems(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "t.json"
    path.write_text(json.dumps(list(records)))
    return path


_THEOREM = {"Question": "How much is 1 + 1?", "Answer": 2, "Answer_type": "integer", "Picture": None}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("One and one are two. The answer is 2.", 1.0),
        ("The answer is 3. No: the answer is $2$.", 1.0),
        ("Thus \\boxed{2}.", 1.0),
        ("It is 2.", 0.0),
        ("The answer is 2 or 3", 0.0),
        ("", 0.0),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_the_last_final_answer_counts(chat: bool, text: str, score: float, tmp_path: Path) -> None:
    task = TheoremQA("t", chat)
    items = items_of(task, _theorems(tmp_path, _THEOREM))
    (verdict,) = verdicts_of(task, items, lambda *_: text).values()
    assert verdict.scores == {"accuracy": score}
    assert verdict.details["expected"] == 2


def test_an_answer_that_was_cut_is_read_and_said_and_a_missing_one_is_no_verdict(tmp_path: Path) -> None:
    task = TheoremQA("t")
    items = items_of(task, _theorems(tmp_path, _THEOREM, {**_THEOREM, "id": "x"}, {**_THEOREM, "id": "y"}))
    answers = {
        "1": Response("The answer is 2. And", "length"),
        "x": Response("One and", "length"),
        "y": Response(error="the prompt is too long"),
    }
    verdicts = verdicts_of(task, items, lambda item, *_: answers[item.id])
    assert scores_of(verdicts, "accuracy") == {"1": 1.0, "x": 0.0, "y": None}
    assert [verdict.details.get("cut") for verdict in verdicts.values()] == [1, 1, None]
    assert verdicts["y"].problem == "the prompt is too long"


def test_base_models_see_the_examples_and_chat_models_do_not(tmp_path: Path) -> None:
    path = _theorems(tmp_path, _THEOREM)
    for task, shots in ((TheoremQA("t"), 5), (TheoremQA("t", chat=True), 0)):
        (item,) = items_of(task, path)
        (request,) = task.requests(item, ())
        assert isinstance(request, Generate)
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[0]["content"]
        assert task.shots == shots
        # The instruction of the chat has the words once.
        assert text.count("The answer is ") == (5 if shots else 1)
        assert text.count(str(_THEOREM["Question"])) == 1
        assert task.template().replace("{question}", str(_THEOREM["Question"])).startswith(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"Answer_type": "poem"}, "entry 2.*Answer_type"),
        ({"Answer": "x"}, "entry 2.*integer"),
        ({"Answer": [1]}, "entry 2.*integer"),
        ({"Answer_type": "bool", "Answer": "perhaps"}, "entry 2.*bool"),
        ({"Answer_type": "list of float", "Answer": []}, "entry 2.*list of float"),
        ({"Question": 1}, "entry 2.*Question"),
    ],
)
def test_a_theorem_of_another_form_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        items_of(TheoremQA("t"), _theorems(tmp_path, _THEOREM, {**_THEOREM, **change}))


def test_math_is_compared_by_value(tmp_path: Path) -> None:
    """Records of both published forms are read, and equal expressions are right."""
    pytest.importorskip("math_verify")
    records = [
        {"problem": "A?", "solution": "So $\\boxed{\\frac{1}{2}}$.", "level": "Level 5", "type": "Algebra"},
        {"problem": "B?", "solution": "x", "answer": "(1,2]", "subject": "Algebra", "level": 2, "unique_id": "b"},
        {"problem": "C?", "solution": "x", "answer": "x^2+2x", "unique_id": "c"},
        {"problem": "D?", "solution": "x", "answer": "4", "unique_id": "d"},
    ]
    path = write_lines(tmp_path / "m.jsonl", records)
    answers = {
        "1": "Half. The final answer is $0.5$.",
        "b": "\\boxed{(1, 2]}",
        "c": "\\boxed{x(x+2)}",
        "d": "It is 4.",
    }
    task = Mathematics("m", DataFile("math/test.json"))
    items = items_of(task, path)
    assert items[0].groups == {"level": "5", "subject": "Algebra"}
    verdicts = verdicts_of(task, items, lambda item, *_: answers[item.id])
    assert scores_of(verdicts, "accuracy") == {"1": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}
    with pytest.raises(InputError, match=r"line 1.*boxed"):
        items_of(task, write_lines(tmp_path / "x.jsonl", [{"problem": "A?", "solution": "x"}]))


def test_mgsm_reads_its_table(tmp_path: Path) -> None:
    path = tmp_path / "mgsm_de.tsv"
    path.write_text('Wie viele?\t1,080\n"Wann?"\t5\n')
    task = MGSM("de")
    items = items_of(task, path)
    assert [item.fields["question"] for item in items] == ["Wie viele?", "Wann?"]
    verdicts = verdicts_of(task, items, lambda item, *_: "The answer is 1080.")
    assert scores_of(verdicts, "accuracy") == {"de/1": 1.0, "de/2": 0.0}
    path.write_text("Wie viele?\t3\nWann? 5\n")
    with pytest.raises(InputError, match="line 2"):
        items_of(task, path)
