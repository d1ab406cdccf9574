"""Arena-Hard: both orders are judged, the win rate is that of Bradley-Terry, and style is held equal."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, verdicts_of, write_lines
from tests.helpers.evaluated import MadeModel
from tests.helpers.runs import print_seed
from train.evaluate.benchmarks.arena_hard import TASKS, controlled_win_rate, game, style, win_rate
from train.evaluate.task import Generate, Request, Response, Tools


def compared(request: Request) -> Response:
    """The judge: prefers the larger number, clearly if it is twice as large; says nothing of 13."""
    assert isinstance(request, Generate)
    text = str(request.prompt[0]["content"])  # type: ignore[index]
    a, b = (int(text.split(f"<assistant_{x}>\n")[1].split("\n")[0]) for x in "AB")
    sign = "=" if a == b else ">>" if max(a, b) >= 2 * min(a, b) else ">"
    better = f"A{sign}B" if a >= b else f"B{sign}A"
    return Response("unsure" if 13 in (a, b) else f"[[A=B]]? No: [[{better}]]")


def files(tmp_path: Path, answers: list[int]) -> list[Path]:
    questions = [
        {"question_id": f"q{i}", "cluster": "sums", "turns": [{"content": f"Q{i}"}]} for i in range(len(answers))
    ]
    lines = [
        {"question_id": f"q{i}", "choices": [{"turns": [{"content": str(answer)}]}]} for i, answer in enumerate(answers)
    ]
    return [write_lines(tmp_path / "question.jsonl", questions), write_lines(tmp_path / "answers.jsonl", lines)]


def test_both_orders_count_and_a_judge_without_verdict_gives_no_score(tmp_path: Path) -> None:
    task = TASKS[0]
    items = items_of(task, *files(tmp_path, [10, 10, 10, 10, 13]))
    answers = {"q0": "20", "q1": "10", "q2": "11", "q3": "5", "q4": "9"}
    found = verdicts_of(task, items, lambda item, *_: answers[item.id], Tools(judge=MadeModel(compared)))
    assert [found[f"q{i}"].scores["win_rate"] for i in range(5)] == [1.0, 0.5, 1.0, 0.0, None]
    assert [found[f"q{i}"].details["win_rate"]["games"] for i in range(4)] == [
        [(1.0, 3), (1.0, 3)],
        [(0.5, 1), (0.5, 1)],
        [(1.0, 1), (1.0, 1)],
        [(0.0, 3), (0.0, 3)],
    ]
    assert found["q4"].problem == "the judge gave no [[verdict]]"
    # Six of one, one of ties, two of small wins, against six: (6 + 1 + 2) / 16.
    assert win_rate([found[f"q{i}"].details["win_rate"] for i in range(4)]) == 9 / 16


def test_version_2_has_another_form(tmp_path: Path) -> None:
    task = TASKS[1]
    questions_of_2 = [
        {"uid": "u", "category": "hard_prompt", "subcategory": "coding", "prompt": "Q"},
        {"uid": "v", "category": "creative_writing", "prompt": "poem"},
    ]
    questions = write_lines(tmp_path / "q.jsonl", questions_of_2)
    content = {"role": "assistant", "content": {"answer": "text"}}
    answers = write_lines(tmp_path / "a.jsonl", [{"uid": "u", "messages": [{"role": "user", "content": "Q"}, content]}])
    (item,) = items_of(task, questions, answers)
    assert (item.fields["question"], item.fields["baseline"], item.groups) == ("Q", "text", {"category": "coding"})
    write_lines(answers, [{"uid": "other", "messages": [content]}])
    with pytest.raises(InputError, match="has no answer to the question u"):
        items_of(task, questions, answers)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[[A>>B]]", (1.0, 3)),
        ("[[A<<B]]", (0.0, 3)),
        ("[[B<A]]", (1.0, 1)),
        ("[[b>>a]]", (0.0, 3)),
        ("[[B=A]]", (0.5, 1)),
        ("[[A>B]] at first, then [[B>A]]", (0.0, 1)),
        ("A>B", None),
    ],
)
def test_verdicts_in_either_direction(text: str, found: tuple[float, int] | None) -> None:
    assert game(Response(text))[0] == found


def drawn(rng: np.random.Generator, strength: float, of_length: float, count: int = 1500) -> list[dict[str, Any]]:
    """Games whose odds are exp(strength + of_length * difference of length), where the model writes more."""
    items = []
    for _ in range(count):
        length = float(np.clip(rng.normal(0.3, 0.3), -1, 1))
        p = 1 / (1 + math.exp(-(strength + of_length * length)))
        items.append({"games": [(float(rng.random() < p), 1) for _ in range(2)], "style": [length, 0.0, 0.0, 0.0]})
    return items


def test_style_is_held_equal() -> None:
    """The rate is that of the Bradley-Terry model with style features, as another optimiser finds it.

    Of two players with strengths s and -s and of standardised differences of style; games of weight 3 stand three times
    in the table, a tie is half a win.
    """
    rng = print_seed()
    for strength, of_length in ((0.0, 3.0), (0.7, -2.0), (-0.5, 0.0)):
        items = drawn(rng, strength, of_length, 300)
        for item in items:
            item["style"] = [item["style"][0], *rng.normal(0, 0.1, 3).tolist()]
            item["games"][0] = (item["games"][0][0], 3)
            if rng.random() < 0.2:
                item["games"][1] = (0.5, 1)
        table = [(y, x["style"]) for x in items for y, weight in x["games"] for _ in range(weight)]
        y, style_ = (np.array(column) for column in zip(*table, strict=True))
        features = style_ / style_.std(axis=0)

        def loss(b: np.ndarray, y: np.ndarray = y, features: np.ndarray = features) -> tuple[float, np.ndarray]:
            logits = 2 * b[0] + features @ b[1:]  # Strength of the model minus that of the baseline.
            gradient = 1 / (1 + np.exp(-logits)) - y
            value = (np.logaddexp(0, logits) - y * logits).sum()
            return float(value), np.concatenate([[2 * gradient.sum()], features.T @ gradient])

        best = scipy.optimize.minimize(loss, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-7})
        assert controlled_win_rate(items) == pytest.approx(1 / (1 + math.exp(-2 * best.x[0])), abs=1e-5)
    # Without a difference of style it is the plain rate.
    plain = [{"games": item["games"], "style": [0.0] * 4} for item in items]
    assert controlled_win_rate(plain) == pytest.approx(win_rate(plain), abs=1e-6)
    # One side has won everything: still a number.
    assert controlled_win_rate([{"games": [(1.0, 3)], "style": [0.5, 0, 0, 0]}] * 20) > 0.9


def test_style_is_measured_as_published() -> None:
    """Markdown is counted outside of fenced code, for each token of four characters, and one more.

    The published program divides by the tokens and one more, so that an empty text has a density.
    """
    rng = print_seed()
    counts, texts = [], []
    for _ in range(2):
        headings, bullets, numbers, bold, under = rng.integers(0, 6, 5).tolist()
        lines = [f"{'#' * int(rng.integers(1, 7))} title"] * headings
        lines += ["- item"] * bullets + [" 3. item"] * numbers
        lines += ["some **bold** word"] * bold + ["some __bold__ word"] * under
        lines += ["```\n# no title\n- no item\n**not bold**\n```", "plain #1 text, 2 * 3", "x" * int(rng.integers(50))]
        texts.append("\n".join(rng.permutation(lines).tolist()))
        counts.append([headings, bullets + numbers, bold + under])
    lengths = [len(text) / 4 for text in texts]
    want = [(lengths[0] - lengths[1]) / sum(lengths)]
    for a, b in zip(*counts, strict=True):
        x, y = a / (lengths[0] + 1), b / (lengths[1] + 1)
        want.append((x - y) / (x + y + 1))
    assert style(*texts) == pytest.approx(want)
    assert style("", "") == [0.0] * 4
