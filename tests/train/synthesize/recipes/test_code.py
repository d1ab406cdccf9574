"""The recipe `code`: what passes wrong tests or fails right ones is out, and what is right stays."""

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.conversations import chat_tokenizer
from tests.helpers.runs import print_seed
from tests.helpers.scripted_api import reachable
from tests.helpers.scripted_coder import Coder, formula_of
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from train.data.examples import read_examples
from train.data.prompts import read_prompts
from train.rewards.code import CodeReward
from train.sandbox import Sandbox
from train.synthesize import code_tasks
from train.synthesize.generator import Request
from train.synthesize.programs import Judged, Programs
from train.synthesize.recipes import code as recipe
from train.synthesize.recipes.code import pipeline
from train.synthesize.run import RunOptions, run

ISOLATION: Any = "bubblewrap" if shutil.which("bwrap") else "none"
SMALL: dict[str, Any] = {
    "languages": ("bash", "python", "perl"),
    "samples": 4,
    "tests": 4,
    "mutants": 1,
    "seconds": 5.0,
    "isolation": ISOLATION,
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lost(folder: Path, stage: str) -> Iterator[dict[str, Any]]:
    """The items that a stage rejected."""
    for path in sorted(folder.glob("parts/*/*.rejected.jsonl")):
        yield from (row for row in rows_of(path) if row["stage"] == stage)


def is_right(test: dict[str, str], question: str) -> bool:
    """Whether a test of the scripted programmer is right."""
    a, b, _ = formula_of(question)
    if "code" in test:
        call, _, value = test["code"].partition(" == ")
        return value == str(int(call.partition("(")[2].strip("()")) * a + b)
    return test["expected_stdout"] == str(int(test["stdin"]) * a + b)


@pytest.mark.parametrize("case", range(3))
def test_all_that_is_wrong_is_rejected_and_all_that_is_right_is_kept(case: int, tmp_path: Path) -> None:
    """Precision is 1. Recall is 1 for tasks that have two right solutions and enough right tests."""
    seed = int(print_seed().integers(1 << 30))
    coder = Coder(seed)
    pages = tmp_path / "pages.jsonl"
    pages.write_text(
        "".join(json.dumps({"text": f"Question {i}: how do I {i}? " + "word " * 20}) + "\n" for i in range(2))
    )
    made = pipeline(pages=(str(pages),), tasks=3, seed=seed, functions=0.7, **SMALL)
    began = time.monotonic()
    with reachable({"generator": (g := ScriptedGenerator(coder)), "examiner": g}, over_http=case == 0) as models:
        summary = run(made, models, tmp_path)
    seconds = time.monotonic() - began
    # Solutions, of which those that were kept are right and those that were rejected are wrong.
    sft, pairs, prompts = (rows_of(tmp_path / f"{name}.jsonl") for name in ("sft", "pairs", "grpo"))
    assert all(row["messages"][-1]["content"] in coder.right for row in sft)
    for row in pairs:
        assert row["chosen"][0]["content"] in coder.right
        assert row["rejected"][0]["content"] in coder.wrong
    # Tests.
    for row in prompts:
        assert len(row["tests"]) >= 3
        assert all(is_right(test, row["prompt"][0]["content"]) for test in row["tests"])
    # What had two right solutions and enough right tests was not lost.
    missed = []
    for row in lost(tmp_path, "verify"):
        data = row["data"]
        tests = [test for test in data["tests"] if not code_tasks.expects_nothing(test)]
        right = sum(is_right(test, data["task"]) for test in tests)
        solved = sum(solution["text"] in coder.right for solution in data["solutions"])
        if solved >= 2 and right >= max(3, len(tests) / 2):
            missed.append(row["reason"])
    for row in lost(tmp_path, "examine"):
        assert row["reason"] != "not well posed" or "n * " not in row["data"]["task"]
    assert not missed
    print(f"{len(prompts)} tasks, {summary['measures']}, {len(prompts) / seconds:.2f} tasks/s")
    # Few tasks are lost on the way there; each has at least an empty program, which is run.
    assert summary["measures"]["programs"] >= summary["stages"][-1]["in"] > 0
    assert summary["measures"]["sandbox"]["isolation"] == ISOLATION
    # Training reads the files, and the reward agrees with every row.
    if sft:
        assert len(list(read_examples([tmp_path / "sft.jsonl"]))) == len(sft)
        assert len(read_prompts([str(tmp_path / "grpo.jsonl")], chat_tokenizer(), 10_000).prompts) == len(prompts)
    if pairs:
        assert len(list(read_examples([tmp_path / "pairs.jsonl"]))) == len(pairs)
        tests_of = {row["prompt"][0]["content"]: row for row in prompts}
        chosen, asked = random.sample(pairs, 1)[0], []
        asked = [chosen["chosen"][0]["content"], chosen["rejected"][0]["content"]]
        of = tests_of[chosen["prompt"][0]["content"]]
        reward = CodeReward(language_column="language", workers=2, isolation=ISOLATION)
        found = reward(asked, [True, True], tests=[of["tests"]] * 2, language=[of["language"]] * 2)
        reward.close()
        assert found == [1.0, 0.0]


def test_nonsense_becomes_nothing(tmp_path: Path) -> None:
    """Words as a model gives that was never trained: nothing breaks, and nothing is asked of the sandbox."""
    rng = print_seed()
    words = ["the", "{", "}", "assert", "[", "```", "\n", "zu", "42", '"task"', ":", "def", "\u4e2d"]

    def babble(request: Request) -> str:
        return " ".join(rng.choice(words, size=int(rng.integers(1, 60))))

    tasks, generators = 400, {"generator": (g := ScriptedGenerator(babble)), "examiner": g}
    summaries: list[dict[str, Any]] = []

    def attempt(number: int) -> None:
        summaries.append(run(pipeline(tasks=tasks, **SMALL), generators, tmp_path / str(number)))

    assert best_rate(tasks, attempt, enough=200) > 200
    assert all(summary["finished"] for summary in summaries)
    assert [output["rows"] for output in summaries[0]["outputs"]] == [0, 0, 0]


def test_a_verifier_that_lets_everything_pass_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Programs, "judge", lambda self, language, source, tests: Judged(None, (True,) * len(tests)))
    generators = {"generator": (g := ScriptedGenerator(Coder(0, mistakes=0.0))), "examiner": g}
    with pytest.raises(InputError, match="an empty program cannot be trusted: it passed"):
        run(pipeline(tasks=40, **SMALL), generators, tmp_path, RunOptions(part_items=10))


def test_an_examiner_that_lets_everything_pass_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_AUDITED", 1.0)
    coder = Coder(int(print_seed().integers(1 << 30)), mistakes=0.0, trusting=True)

    def answer(request: Request) -> Any:
        return "[]" if "tests for" in request.messages[-1]["content"] else coder(request)

    generators = {"generator": (g := ScriptedGenerator(answer)), "examiner": g}
    with pytest.raises(InputError, match="well posed cannot be trusted: it passed"):
        run(pipeline(tasks=60, **SMALL), generators, tmp_path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [("", "an empty program passes the tests"), ("7", "a constant passes the tests")],
)
def test_tests_that_say_nothing_are_thrown_out(value: str, reason: str, tmp_path: Path) -> None:
    """Tests that an empty program passes, and tests that all expect the same."""
    coder = Coder(1, mistakes=0.0)

    def answer(request: Request) -> Any:
        text = request.messages[-1]["content"]
        if "tests for" in text:
            return json.dumps([{"input": f"{i}\n", "output": value} for i in range(4)])
        if "Write the program" in text:
            return "```bash\necho 7\n```"
        return coder(request)

    settings = {**SMALL, "languages": ("bash",)}
    generators = {"generator": (g := ScriptedGenerator(answer)), "examiner": g}
    summary = run(pipeline(tasks=2, **settings), generators, tmp_path)
    assert summary["stages"][-1]["rejected"] == {reason: 2}


def test_tests_that_changed_programs_pass_are_thrown_out(tmp_path: Path) -> None:
    """The tests are right, but never reach the number that is changed."""
    coder = Coder(2, mistakes=0.0)

    def answer(request: Request) -> Any:
        text = request.messages[-1]["content"]
        if "tests for" in text:
            return json.dumps([{"input": f"{i}\n", "output": str(i)} for i in range(4)])
        if "Write the program" in text:
            return "```bash\nread n\nif false; then echo 5; fi\necho $n\n```"
        return coder(request)

    settings = {**SMALL, "languages": ("bash",)}
    generators = {"generator": (g := ScriptedGenerator(answer)), "examiner": g}
    summary = run(pipeline(tasks=1, **settings), generators, tmp_path)
    assert summary["stages"][-1]["rejected"] == {"changed programs pass the tests": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to make tasks from"),
        ({"tasks": 1, "languages": ("cobol",)}, "no language cobol"),
        ({"tasks": 1, "languages": ()}, "at least one language"),
        ({"tasks": 1, "samples": 0}, "samples must be at least 1"),
        ({"tasks": 1, "samples": 2, "agree": 3}, "agree is 3"),
        ({"tasks": 1, "functions": 1.5}, "functions must lie"),
        ({"tasks": 1, "seconds": 0}, "seconds must lie"),
        ({"pages": ("empty.txt",)}, "document"),
        ({"pages": ("other.jsonl",)}, "document"),
    ],
)
def test_bad_options_are_refused_before_anything_is_asked(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("other.jsonl").write_text('{"body": "a page that has no column named text, but is long enough"}\n')
    with pytest.raises(InputError, match=message):
        pipeline(**settings)


def test_a_language_that_is_not_installed_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with Sandbox(isolation="none") as box:
        missing = [name for name in ("csharp", "r", "php", "go", "typescript") if box.version(name) is None]
    if not missing:
        pytest.skip("all languages are installed")
    generator = ScriptedGenerator(Coder(0))
    made = pipeline(tasks=1, languages=(missing[0],), isolation="none")
    with pytest.raises(InputError, match="not installed"):
        run(made, {"generator": generator, "examiner": generator}, tmp_path)
    assert not generator.asked
