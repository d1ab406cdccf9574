"""The recipe and the rewards of docs/synthesis.md run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from tests.helpers.runs import print_seed
from tests.helpers.scoring import WORDS, make_reward
from tests.helpers.scripted_server import Fault, scripted_server
from train.rewards import load_reward, score
from train.synthesize.loading import RECIPES
from train.synthesize.puzzles import make_puzzles
from train.synthesize.structured_tasks import TASKS, tasks_of

DOCS = Path(__file__).parents[3] / "docs" / "synthesis.md"


def reply(body: dict[str, object]) -> str:
    text = str(body["messages"])
    if "Rate the answer" in text:
        return "It is wrong. Score: 2" if "question 3" in text else "Good. Score: 9"
    return "This is an answer to the " + (re.findall(r"question \d+", text) or ["question"])[0]


def write_block(path: Path, part: str) -> None:
    """Writes the block of Python in the docs that has this part to a file."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if part in block)
    path.write_text(code)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_block(tmp_path / "my_recipe.py", "def pipeline(")
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
    printed = capsys.readouterr().out
    assert "judge: 5 of 6\n    1 low score" in printed
    assert "not compared with evaluation sets (--decontaminate NAME=FILE)" in printed
    rows = [json.loads(line) for line in (recipe / "out" / "sft.jsonl").open()]
    assert [row["prompt"] for row in rows] == [f"question {i}" for i in range(6) if i != 3]


def test_requests_that_are_sent_again_are_reported(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = [Fault(429), Fault(half=True), Fault(429)]

    def busy(body: dict[str, object]) -> str | Fault:
        return faults.pop() if faults else reply(body)

    with scripted_server(busy) as server:
        assert main(arguments(recipe, server.url)) == 0
        assert len(server.asked) == 12 + 3
        printed = capsys.readouterr()
        said = "scripted: 3 requests sent again (429 2, reply 1)"
        assert said in printed.out
        assert said in " ".join(printed.err.split())
        assert said in (recipe / "out" / "report.html").read_text()
        assert main([*arguments(recipe, server.url), "--json"]) == 0
    # The count is that of one run.
    assert json.loads(capsys.readouterr().out)["retries"] == {}


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
        ({"--model": "critic=http://127.0.0.1:9/v1"}, "names critic, but with these options the recipe asks generator"),
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


def test_the_ranking_of_the_docs_is_that_of_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text has a score, which depends on the text alone."""
    rng, name = print_seed(), "by_reward_model.py"
    make_reward(tmp_path / "models" / "reward", seed=int(rng.integers(1 << 30)))
    write_block(tmp_path / name, f"# {name}")
    monkeypatch.chdir(tmp_path)
    reward: Any = load_reward(f"{name}:best")
    texts = [" ".join(rng.choice(WORDS, count)) for count in (3, 9, 27)]
    prompts = [[{"role": "user", "content": "light of the city"}]] * 4
    first, second, third, again = score({"best": reward}, prompts, [*texts, texts[0]], [True] * 4, {})[:, 0]
    assert len({float(first), float(second), float(third)}) == 3
    assert abs(first - again) < 0.05 * max(abs(first), 1.0)


def test_the_rewards_of_the_docs_give_one_for_the_right_answer_alone(tmp_path: Path) -> None:
    seed = int(print_seed().integers(1 << 20))
    puzzles = [(one.answer, one.wrong, one.compare) for one in make_puzzles(40, seed)]
    items = tasks_of((), 40, 2, TASKS, ("csv", "json", "markdown"), 30, seed)()
    tasks = [(item["answer"], item["wrong"], item["compare"]) for item in items]
    for name, known in (("logic_reward.py", puzzles), ("structured_reward.py", tasks)):
        write_block(tmp_path / name, f"# {name}")
        reward: Any = load_reward(f"{tmp_path / name}:right")
        for answer, wrong, compare in known:
            shown = "```\n{}\n```" if compare in ("csv", "json") else "1. So it is.\nAnswer: {}"
            completions = [shown.format(text) for text in (answer, wrong, answer)]
            columns = {"answer": [answer] * 3, "compare": [compare] * 3}
            found = score({"right": reward}, ["?"] * 3, completions, [True, True, False], columns)
            assert found[:, 0].tolist() == [1.0, 0.0, 0.0], (answer, wrong, compare)
