"""M3Exam's form: labels of several scripts, the most likely label, the label in a chat answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, scores_of, verdicts_of
from tests.helpers.runs import print_seed
from train.evaluate.benchmarks.m3exam import M3Exam, label_in
from train.evaluate.task import Item, Loglikelihood, Request, Response


def _record(**change: Any) -> dict[str, Any]:
    """A question made for these tests, in the form of the published files."""
    return {
        "question_text": "Which is even?",
        "background_description": ["Read this."],
        "answer_text": "B",
        "options": ["A. 3", "B. 4", "C. 5"],
        "need_image": "no",
        "language": "english",
        "level": "mid",
        "subject": "math",
        "subject_category": "math",
        "year": "2020",
        **change,
    }


def _write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_the_most_likely_label_is_the_answer(tmp_path: Path) -> None:
    """Whatever the log-probabilities are, the answer is the label with the highest one."""
    test = _write(tmp_path / "test.json", *(_record() for _ in range(20)), _record(need_image="yes"))
    dev = _write(tmp_path / "dev.json", *(_record() for _ in range(3)))
    task = M3Exam("english")
    items = items_of(task, test, dev)
    assert len(items) == 20
    rng = print_seed()
    logprobs = {item.id: rng.normal(size=3) for item in items}

    def answer(item: Item, number: int, request: Request) -> Response:
        assert isinstance(request, Loglikelihood)
        assert request.continuation == " " + "ABC"[number]
        return Response(logprob=float(logprobs[item.id][number]))

    verdicts = verdicts_of(task, items, answer)
    assert scores_of(verdicts, "accuracy") == {name: float(values.argmax() == 1) for name, values in logprobs.items()}


def test_examples_of_the_same_level_come_first(tmp_path: Path) -> None:
    """Five of them, those of the level before others, none with a wrong label."""
    test = _write(tmp_path / "test.json", _record(level="high"))
    dev = _write(
        tmp_path / "dev.json",
        *(_record(question_text=f"low {n}", level="low") for n in range(6)),
        *(_record(question_text=f"high {n}", level="high") for n in range(2)),
        _record(question_text="bad", level="high", answer_text="Z"),
    )
    task = M3Exam("english")
    (item,) = items_of(task, test, dev)
    request = task.requests(item, ())[0]
    assert isinstance(request, Loglikelihood)
    shown = [line for line in request.context.split("\n") if line.startswith(("low", "high", "bad"))]
    assert shown == ["high 0", "high 1", "low 0", "low 1", "low 2"]
    assert request.context.count("Answer: B\n\n") == 5
    assert request.context.endswith("C. 5\nAnswer:")


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["(1) a", "(2) b"], "2"),
        (["1. a", "2. b"], "(1)"),
        (["A\u3001x", "B\uff1ay"], "B"),
        (["a) x", "b) y"], "b"),
    ],
)
def test_labels_of_several_forms_are_read(options: list[str], answer: str, tmp_path: Path) -> None:
    task = M3Exam("chinese", chat=True)
    (item,) = items_of(task, _write(tmp_path / "x.json", _record(options=options, answer_text=answer)))
    assert item.fields["answer"] in item.fields["labels"]
    right = item.fields["answer"]
    (verdict,) = verdicts_of(task, [item], lambda *_: f"So.\nAnswer: ({right})").values()
    assert verdict.scores == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Answer: B", "B"),
        ("Answer: A\nWait.\nAnswer: **C**", "C"),
        ("It is \\boxed{b}.", "B"),
        ("B", "B"),
        ("(B).", "B"),
        ("Answer: Because", None),
        ("Answer: D", None),
        ("A good question. B I think.", None),
        ("", None),
    ],
)
def test_the_label_of_a_chat_answer(text: str, label: str | None) -> None:
    assert label_in(text, ["A", "B", "C"]) == label


def test_an_answer_that_is_no_option_has_no_score(tmp_path: Path) -> None:
    """Published files have such questions: they are said, and are neither an error nor a zero."""
    task = M3Exam("english", chat=True)
    items = items_of(task, _write(tmp_path / "x.json", _record(answer_text="E"), _record()))
    verdicts = list(verdicts_of(task, items, lambda *_: "Answer: B").values())
    assert [verdict.scores["accuracy"] for verdict in verdicts] == [None, 1.0]
    assert "none of its options" in str(verdicts[0].problem)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": ["first", "second"]}, "entry 2.*label"),
        ({"options": ["A. x", "A. y"]}, "entry 2.*different"),
        ({"options": "A. x"}, "entry 2.*options"),
        ({"level": None}, "entry 2.*level"),
        ({"background_description": [1]}, "entry 2.*background"),
    ],
)
def test_a_record_of_another_form_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        items_of(M3Exam("english", chat=True), _write(tmp_path / "x.json", _record(), _record(**change)))
