"""The recipe `instructions`: what does not follow is out, and functions do harm in the sandbox only."""

import ast
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.conversations import chat_tokenizer
from tests.helpers.runs import print_seed
from tests.helpers.scripted_api import reachable
from tests.helpers.scripted_instructor import Instructor
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from train.data.examples import read_examples
from train.data.prompts import read_prompts
from train.rewards.instructions import InstructionReward
from train.rewards.loading import load_reward
from train.synthesize import verification
from train.synthesize.generator import Request
from train.synthesize.instruction_texts import Instruction, draw
from train.synthesize.recipes import instructions as recipe
from train.synthesize.recipes.instructions import pipeline
from train.synthesize.run import run

ONE_AT_A_TIME = threading.Lock()
ISOLATION: Any = "bubblewrap" if shutil.which("bwrap") else "none"


@pytest.fixture
def queries(tmp_path: Path) -> str:
    path = tmp_path / "queries.jsonl"
    asked = [f"What should I know about the subject with number {i}?" for i in range(7)]
    path.write_text("".join(json.dumps({"query": query}) + "\n" for query in [*asked, "Hi?", "long " * 99]))
    return str(path)


@pytest.fixture
def seeds(tmp_path: Path) -> str:
    path = tmp_path / "seeds.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"Use the word w{i} at least twice in it."}) + "\n" for i in (1001,))
    )
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lost(folder: Path, stage: str) -> Iterator[dict[str, Any]]:
    """The items that a stage rejected."""
    for path in sorted(folder.glob("parts/*/*.rejected.jsonl")):
        yield from (row for row in rows_of(path) if row["stage"] == stage)


def record_draws(model: Instructor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the scripted model know which instructions of built-in kinds are drawn."""

    def recorded(kind: str, rng: random.Random, query: str) -> Instruction:
        drawn = draw(kind, rng, query)
        model.drawn[f"{query}\n\n{drawn.text}"] = drawn
        return drawn

    monkeypatch.setattr(recipe, "draw", recorded)


@pytest.mark.parametrize("case", range(3))
def test_what_does_not_follow_is_rejected_and_what_follows_is_kept(
    case: int, tmp_path: Path, queries: str, seeds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precision is 1. Recall is 1 for responses, and for functions unless a fifth of the test cases is wrong."""
    seed = int(print_seed().integers(1 << 30))
    model = Instructor(seed)
    record_draws(model, monkeypatch)
    made = pipeline(
        queries=(queries,), seeds=(seeds,), augment=1, built_in=24, functions=6, queries_each=2, samples=3, seed=seed,
        isolation=ISOLATION,
    )  # fmt: skip
    began = time.monotonic()
    with reachable({"generator": (g := ScriptedGenerator(model)), "judge": g}, over_http=case == 0) as models:
        summary = run(made, models, tmp_path)
    seconds = time.monotonic() - began
    names = "sft", "pairs", "grpo", "grpo_built_in"
    sft, pairs, prompts, built_in = (rows_of(tmp_path / f"{name}.jsonl") for name in names)
    # Precision: of responses, of pairs, and of functions.
    for row in sft:
        question, response = (message["content"] for message in row["messages"])
        assert model.follows(question, response)
        assert "poorly" not in response
    for row in pairs:
        question = row["prompt"][0]["content"]
        assert model.follows(question, row["chosen"][0]["content"])
        assert not model.follows(question, row["rejected"][0]["content"])
    for row in prompts:
        assert row["functions"]
        assert all(">= 2" in function for function in row["functions"])
    assert len(prompts) + len(built_in) == len(sft)
    # Recall.
    for row in lost(tmp_path, "score"):
        data = row["data"]
        question = f"{data['query']}\n\n{data['instruction']}"
        assert not any(model.follows(question, text) and "poorly" not in text for text, _ in data["scored"])
    for row in lost(tmp_path, "validate"):
        word = row["data"]["instruction"].split()[3]
        right = [(text.count(word) >= 2) == follows for text, follows in row["data"]["cases"]]
        solved = any(">= 2" in function for function in row["data"]["functions"])
        assert not solved or sum(right) < 0.8 * len(right) or row["reason"] == "the test cases are one-sided"
    print(f"{len(sft)} examples, {len(sft) / seconds:.0f}/s, {summary['measures']}")
    assert "built-in kinds" in summary["audits"]
    # Each prompt's provenance has its own request only.
    for row in (*prompts, *built_in):
        asked = [s for s in row["provenance"]["steps"] if s["stage"] == "respond" and "messages" in s]
        assert [s["messages"] for s in asked] == [row["prompt"]]
    # Training reads the files, and the rewards agree with the pairs.
    assert len(list(read_examples([tmp_path / "sft.jsonl"]))) == len(sft)
    assert len(list(read_examples([tmp_path / "pairs.jsonl"]))) == len(pairs)
    for name, rows in (("grpo", prompts), ("grpo_built_in", built_in)):
        if not rows:
            continue
        assert len(read_prompts([str(tmp_path / f"{name}.jsonl")], chat_tokenizer(), 10_000).prompts) == len(rows)
        of = {row["prompt"][0]["content"]: row for row in rows}
        some = [row for row in pairs if row["prompt"][0]["content"] in of][:3]
        texts = [row[side][0]["content"] for row in some for side in ("chosen", "rejected")]
        twice = [of[row["prompt"][0]["content"]] for row in some for _ in range(2)]
        columns = {key: [row[key] for row in twice] for key in rows[0] if key not in ("prompt", "provenance")}
        reward: Any = load_reward("verification", isolation=ISOLATION) if name == "grpo" else InstructionReward()
        assert reward(texts, [True] * len(texts), **columns) == [1.0, 0.0] * len(some)


def test_nonsense_becomes_nothing(tmp_path: Path, queries: str) -> None:
    """Words as a model gives that was never trained: nothing breaks, and nothing reaches the sandbox."""
    rng = print_seed()
    words = ["the", "{", "}", "def", "[", "```", "\n", "True", "42", '"function"', ":", "Score", "\u4e2d"]

    def babble(request: Request) -> str:
        return " ".join(rng.choice(words, size=int(rng.integers(1, 60))))

    generators = {"generator": (g := ScriptedGenerator(babble)), "judge": g}
    summary = run(pipeline(queries=(queries,), augment=300, isolation=ISOLATION), generators, tmp_path)
    assert summary["finished"]
    assert [output["rows"] for output in summary["outputs"]] == [0, 0, 0, 0]


def test_built_in_kinds_take_at_least_two_hundred_prompts_a_second(
    tmp_path: Path, queries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need no sandbox, and no model for their checks."""
    model = Instructor(5, mistakes=0.0)
    record_draws(model, monkeypatch)
    made = pipeline(queries=(queries,), augment=0, built_in=96, queries_each=7, samples=1, isolation=ISOLATION)
    models = {"generator": (g := ScriptedGenerator(model)), "judge": g}
    summaries: list[dict[str, Any]] = []
    rate = best_rate(96 * 7, lambda attempt: summaries.append(run(made, models, tmp_path / str(attempt))), enough=200)
    assert rate > 200
    assert summaries[0]["measures"] == {"programs": 0}
    assert summaries[0]["outputs"][3]["rows"] > 300


@pytest.mark.parametrize("said", ["1", "0"])
def test_a_sandbox_that_always_says_the_same_ends_the_run(
    said: str, tmp_path: Path, queries: str, seeds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "ask_function", lambda run, source, texts: said * len(texts))
    monkeypatch.setattr(recipe, "_AUDITED", 1.0)
    generators = {"generator": (g := ScriptedGenerator(Instructor(0, mistakes=0.0))), "judge": g}
    made = pipeline(queries=(queries,), seeds=(seeds,), augment=30, functions=4, isolation="none")
    with pytest.raises(InputError, match="functions in the sandbox cannot be trusted"):
        run(made, generators, tmp_path)


@pytest.mark.parametrize(("built_in", "augment", "check"), [(24, 0, "scores"), (0, 30, "contradictions")])
def test_a_judge_that_finds_everything_good_ends_the_run(
    built_in: int, augment: int, check: str, tmp_path: Path, queries: str, seeds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Instructor(0, mistakes=0.0, trusting=True)
    record_draws(model, monkeypatch)
    monkeypatch.setattr(recipe, "ask_function", pretend)
    monkeypatch.setattr(recipe, "_AUDITED", 1.0)
    made = pipeline(
        queries=(queries,), seeds=(seeds,), augment=augment, built_in=built_in, queries_each=1, samples=1,
        isolation="none",
    )  # fmt: skip
    with pytest.raises(InputError, match=f"{check} cannot be trusted: it passed"):
        run(made, {"generator": (g := ScriptedGenerator(model)), "judge": g}, tmp_path)


def pretend(run: Any, source: str, texts: list[str]) -> str:
    """What the right function, or a table of the test cases, says: without running it."""
    if source.startswith("CASES = "):
        # Python 3.11 may raise SystemError where several threads build syntax trees at once.
        with ONE_AT_A_TIME:
            table = ast.literal_eval(source.partition("\n")[0].removeprefix("CASES = "))
        return "".join("1" if table[text] is ("is True" in source) else "0" for text in texts)
    word = source.split("count('")[1].partition("'")[0]
    return "".join("1" if text.count(word) >= 2 else "0" for text in texts)


@pytest.mark.skipif(ISOLATION == "none", reason="an attack needs a sandbox")
def test_functions_that_attack_are_contained_and_counted(tmp_path: Path, queries: str, seeds: str) -> None:
    """A fork bomb, a bomb of memory, a forged report, a network connection: none is kept, and the right ones stay."""
    attacks = [
        "    while True:\n        os.fork()\n",
        "    return [bytearray(1 << 28) for _ in range(99)] == response\n",
        "    open(f'/proc/{os.getppid()}/fd/1', 'w').write('1' * 40)\n",
        "    io.open('/etc/hostname')\n",
    ]
    model = Instructor(3, mistakes=0.0)
    turn = iter(range(999))

    def answer(request: Request) -> Any:
        text = model(request)
        if "Write a Python function" in request.messages[-1]["content"]:
            value = json.loads(str(text))
            # Half of the functions attack.
            if (number := next(turn)) % 2:
                value["function"] = f"import os, io\ndef evaluate(response):\n{attacks[number // 2 % 4]}"
                return json.dumps(value)
        return text

    made = pipeline(queries=(queries,), seeds=(seeds,), augment=0, queries_each=1, samples=2)
    # The static check would refuse a part of them already.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "static_fault", lambda language, source, function: None)
        run(made, {"generator": (g := ScriptedGenerator(answer)), "judge": g}, tmp_path)
    prompts = rows_of(tmp_path / "grpo.jsonl")
    assert prompts
    for row in prompts:
        assert row["functions"]
        assert all(">= 2" in function for function in row["functions"])
        faults = [
            step["faults"] for step in row["provenance"]["steps"] if step["stage"] == "validate" and "faults" in step
        ]
        assert sum(faults[0].values()) >= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": ()}, "has no query"),
        ({"query_column": "text"}, "column text"),
        ({"shortest_query": 500, "longest_query": 900}, "has no query of 500"),
        ({"augment": 0}, "There are no instructions"),
        ({"functions": 2}, "least_functions is 3"),
        ({"least_cases": 100}, "least_cases is 100"),
        ({"quality": 11.0}, "quality must lie"),
        ({"accuracy": 0.0}, "accuracy must lie"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_anything_is_asked(settings: dict[str, Any], message: str, queries: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(**{"queries": (queries,), **settings})


def test_functions_that_check_something_else_are_found_by_translation(
    tmp_path: Path, queries: str, seeds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contradiction rejects the instruction; a description that cannot be read does not, unless all are so."""
    monkeypatch.setattr(recipe, "ask_function", pretend)
    model = Instructor(1, mistakes=0.0)
    for said, reason in (
        (["{", '{"instruction": "Use it twice."}', "I can't."], None),
        (["{", '{"instruction": "An answer that breaks it."}', "I can't."], "a function contradicts the instruction"),
        (["{", "{", "{"], "the instruction of a function cannot be read"),
    ):
        left = list(said)

        def answer(request: Request, left: list[str] = left) -> Any:
            described = "Here is a Python function" in request.messages[-1]["content"]
            return left.pop() if described else model(request)

        made = pipeline(queries=(queries,), seeds=(seeds,), augment=0, queries_each=1, samples=1, isolation="none")
        folder = tmp_path / str(reason)
        summary = run(made, {"generator": (g := ScriptedGenerator(answer)), "judge": g}, folder)
        (stage,) = (stage for stage in summary["stages"] if stage["name"] == "translate back")
        assert stage["rejected"] == ({reason: 1} if reason else {})
