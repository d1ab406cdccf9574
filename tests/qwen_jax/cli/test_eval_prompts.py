"""`qwen-jax eval system-prompts`: the numbers are those of the answers, nothing is asked twice, faults are named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.cli import main
from tests.helpers.runs import print_seed
from tests.helpers.scripted import edit_json, make_words
from tests.helpers.scripted_server import Fault, scripted_server

Capture = pytest.CaptureFixture[str]
REWARD = "def exact(completions, answer):\n    return [float(t == a) for t, a in zip(completions, answer)]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions, a reward, and system prompts."""
    write(tmp_path / "q.jsonl", *({"question": f"question {i} ?", "answer": str(i)} for i in range(20)))
    write(tmp_path / "s.jsonl", *({"prompt": f"prompt {i} !"} for i in range(1, 4)))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, model: str, **changes: Any) -> int:
    options = {
        "questions": folder / "q.jsonl",
        "system-prompts": folder / "s.jsonl",
        "reward": f"{folder / 'reward.py'}:exact",
        "output": folder / "out",
        "give-up-after": 0.2,
        **changes,
    }
    words = (word for name, value in options.items() if value is not None for word in (f"--{name}", str(value)))
    return main(["eval", "system-prompts", model, *words, "--json"])


def numbers(body: dict[str, Any]) -> tuple[int, int]:
    """The system prompt, 0 for none, and the question of a request."""
    texts = {message["role"]: str(message["content"]) for message in body["messages"]}
    return int(texts.get("system", "prompt 0").split()[1]), int(texts["user"].split()[1])


def test_the_numbers_are_those_of_the_answers(folder: Path, capsys: Capture) -> None:
    right = print_seed().random((4, 20)) < np.array([[1.0], [0.8], [0.5], [0.0]])
    write(folder / "s.jsonl", {"prompt": ""}, *({"prompt": f"prompt {i} !"} for i in (1, 2, 3, 1)))
    down = True

    def reply(body: dict[str, Any]) -> str | Fault:
        i, j = numbers(body)
        if down and j > 9:
            return Fault(500)
        return str(j) if right[i, j] else "no"

    with scripted_server(reply) as server:
        # The server goes down, and what was answered before is kept.
        assert run(folder, server.url, concurrency=1) == 1
        assert "run the same command again" in capsys.readouterr().err
        down, first = False, len(server.asked)
        before = {numbers(body) for body in server.asked if numbers(body)[1] <= 9}
        assert run(folder, server.url) == 0
        summary = json.loads(capsys.readouterr().out)
        asked = [numbers(body) for body in server.asked[first:]]
        assert len(before) + len(asked) == len({*before, *asked}) == 80
        assert run(folder, server.url) == 0
        assert len(server.asked) == first + len(asked)
    assert json.loads(capsys.readouterr().out) == summary == json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["system_prompts"], summary["questions"], summary["missing"]) == (4, 20, 0)
    assert summary["mean"] == pytest.approx(right.mean())
    assert summary["variance"] == pytest.approx(right.mean(1).var())
    assert summary["spread"] == pytest.approx(right.var(0).mean())
    assert summary["best"] == {"system_prompt": "", "score": 1.0}
    assert summary["worst"] == {"system_prompt": "prompt 3 !", "score": 0.0}
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").open()]
    assert [line["score"] for line in lines] == pytest.approx(list(right.mean(1)))


def test_general_system_prompts_and_a_model_in_this_process(folder: Path, capsys: Capture) -> None:
    model = make_words(folder / "model")
    edit_json(model / "config.json", max_position_embeddings=2048)
    write(folder / "q.jsonl", {"question": "hello", "answer": "world"})
    options = {"system-prompts": None, "prompts": 3, "max-new-tokens": 3, "concurrency": 4}
    assert run(folder, str(model), **options) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["system_prompts"], summary["questions"], summary["mean"]) == (4, 1, 0.0)
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").open()]
    assert lines[0]["system_prompt"] == ""
    assert all(line["system_prompt"].startswith("You are ") for line in lines[1:])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"questions": "none.jsonl"}, "none.jsonl"),
        ({"questions": None}, "Give --questions"),
        ({"questions": "s.jsonl"}, "expected a text in the column question"),
        ({"system-prompts": "q.jsonl"}, "expected a text in the column prompt"),
        ({"system-prompts": None, "prompts": 999}, "There are 198 general system prompts"),
        ({"system-prompts": None, "prompts": 0}, "at least two system prompts"),
        ({"reward": "joy"}, "There is no reward"),
        ({"reward": "math", "questions": "bare.jsonl"}, "answer"),
        ({"temperature": -1}, "--temperature"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, capsys: Capture, changes: dict[str, Any], says: str) -> None:
    write(folder / "bare.jsonl", {"question": "What?"})
    changes = {name: folder / value if str(value).endswith("jsonl") else value for name, value in changes.items()}
    with scripted_server(lambda body: "text") as server:
        assert run(folder, server.url, **changes) == 1
    assert says in capsys.readouterr().err
