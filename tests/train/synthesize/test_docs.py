"""The recipe of docs/synthesis.md runs, with the command."""

import json
import re
from pathlib import Path

import pytest

from qwen_jax.cli import main
from tests.helpers.scripted_server import scripted_server
from train.synthesize.loading import RECIPES

DOCS = Path(__file__).parents[3] / "docs" / "synthesis.md"


def reply(body: dict[str, object]) -> str:
    text = str(body["messages"])
    if "Rate the answer" in text:
        return "It is wrong. Score: 2" if "question 3" in text else "Good. Score: 9"
    return "This is an answer to the " + (re.findall(r"question \d+", text) or ["question"])[0]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "def pipeline(" in x)
    (tmp_path / "my_recipe.py").write_text(code)
    lines = (json.dumps({"question": f"question {i}"}) + "\n" for i in range(6))
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    return tmp_path


def arguments(folder: Path, url: str) -> list[str]:
    options = {"config": folder / "my_recipe.py", "questions": folder / "questions.jsonl", "model": url}
    options["output"] = folder / "out"
    return ["data", "synthesize", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def test_the_recipe_of_the_docs_runs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(reply) as server:
        assert main([*arguments(recipe, server.url), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["outputs"][0]["rows"] == 5
        assert summary["stages"][1]["rejected"] == {"low score": 1}
        asked = len(server.asked)
        # Again: everything is there, and nothing is asked.
        assert main(arguments(recipe, server.url)) == 0
        assert len(server.asked) == asked == 12
    assert "judge: 5 of 6\n    1 low score" in capsys.readouterr().out
    rows = [json.loads(line) for line in (recipe / "out" / "sft.jsonl").open()]
    assert [row["prompt"] for row in rows] == [f"question {i}" for i in range(6) if i != 3]


def test_help_shows_the_options_of_the_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "synthesize", "--config", str(recipe / "my_recipe.py"), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--questions" in text
    assert "A file of records with the column question" in " ".join(text.replace("│", " ").split())
    assert "--give-up-after" in text


def test_help_without_a_recipe_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "synthesize", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"Recipes: {', '.join(RECIPES)}." in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--config": "poetry"}, "There is no recipe poetry"),
        ({"--config": "none.py"}, "does not exist"),
        ({"--model": "http://127.0.0.1:9/v1"}, "127.0.0.1:9"),
        ({"--questions": "none.jsonl"}, "none.jsonl"),
    ],
)
def test_wrong_arguments_are_named(
    recipe: Path, change: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_server(reply) as server:
        words = [*arguments(recipe, server.url), "--give-up-after", "0.1"]
        for option, value in change.items():
            words[words.index(option) + 1] = value
        assert main(words) == 1
        assert not server.asked
    assert says in capsys.readouterr().err
