"""Preferences: the chosen answer is better than the rejected one, by rules or by verdicts that hold in both orders."""

import json
import random
import re
from collections import Counter
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
from train.synthesize.context import Context
from train.synthesize.generator import Answer, Request
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.recipes.preferences import pipeline
from train.synthesize.review_pairs import read_pairs
from train.synthesize.run import RunOptions, run

QUESTION = "What is {} + {}?"
SKILLS = {"a": 0.2, "b": 0.5, "c": 0.8}
RULE = """
def right(completions, total, **columns):
    return [float(text.endswith(f"is {value}.")) for text, value in zip(completions, total)]
"""


def is_right(prompt: str, answer: str) -> bool:
    a, b = map(int, re.findall(r"What is (\d+) \+ (\d+)", prompt)[-1])
    return answer.endswith(f"is {a + b}.")


class Student:
    """Adds numbers, right with some probability, and writes longer when it is right.

    Attributes:
      kinds: by prompt and text: whether it is right, or what is wrong with its form.
    """

    def __init__(self, skill: float):
        self._skill = skill
        self.kinds: dict[tuple[str, str], str] = {}

    def __call__(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        a, b = map(int, re.findall(r"\d+", prompt))
        kind = rng.choice(list(FORMAL)) if rng.random() < 0.2 else "right" if rng.random() < self._skill else "wrong"
        words = " ".join(["We think about it and then we know it."] * (rng.randrange(1, 3) + (kind == "right")))
        total = a + b + (kind == "wrong") * rng.randrange(1, 100)
        text = f"{words} Number {rng.randrange(10**6)} helps. The sum is {total}."
        self.kinds[prompt, text] = kind
        return FORMAL[kind](text) if kind in FORMAL else text


class Judge:
    """Prefers right answers; now and then it prefers a place, says nothing, or sees no difference.

    Attributes:
      verdicts: by prompt and pair: its words for what it says in both orders.
    """

    def __init__(self, biased: float = 0.0, silent: float = 0.0, inverted: bool = False):
        self._biased, self._silent, self._inverted = biased, silent, inverted

    def __call__(self, request: Request) -> str | Answer:
        prompt = str(request.messages[-1]["content"])
        conversation, rest = prompt.split("Conversation:\n")[1].split("\n\nAnswer 1:\n", 1)
        first, second = rest.split("\n\nFirst give")[0].split("\n\nAnswer 2:\n", 1)
        # What it does with a pair does not depend on the order.
        rng = random.Random(repr(sorted([first, second])))
        drawn_number = rng.random()
        if drawn_number < self._silent:
            return rng.choice(["", "I do not know.", '{"better": true}', '{"better": 3}', '{"better": "1"}'])
        better = self.better(conversation, first, second)
        if drawn_number > 1 - self._biased:
            better = 1
        if self._inverted and better:
            better = 3 - better
        return f"Let us see.\n{json.dumps({'better': better})}"

    @staticmethod
    def better(conversation: str, first: str, second: str) -> int:
        rights = [is_right(conversation, text) for text in (first, second)]
        return 0 if rights[0] == rights[1] else 1 if rights[0] else 2


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_prompts(path: Path, rng: random.Random, count: int) -> str:
    numbers = [divmod(n, 1000) for n in sorted(rng.sample(range(1000**2), count))]
    return write(path, [{"prompt": QUESTION.format(a, b), "total": a + b} for a, b in numbers])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def parts(row: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer of a row."""
    return row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_samples_become_pairs_that_share_no_answer(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    rows = []
    for number in range(100):
        passed = [f"right {number} {rng.randrange(4)}" for _ in range(rng.randrange(5))]
        failed: list[Any] = [f"wrong {number} {rng.randrange(4)}" for _ in range(rng.randrange(5))]
        rows.append(
            {
                "prompt": f"question {number}",
                "passed": [{"text": text} for text in passed],
                "failed": failed + passed[:1],
            }
        )
    made = pipeline(samples=(write(tmp_path / "s.jsonl", rows),), keep=2)
    assert made.models == ()
    run(made, {}, tmp_path / "run", RunOptions(16))
    pairs = [parts(row) for row in rows_of(tmp_path / "run" / "pairs.jsonl")]
    for prompt, chosen, rejected in pairs:
        number = prompt.split()[1]
        assert chosen.startswith(f"right {number} ")
        assert rejected.startswith(f"wrong {number} ")
    assert len({(p, c) for p, c, _ in pairs}) == len({(p, r) for p, _, r in pairs}) == len(pairs)
    expected = {
        r["prompt"]: min(2, len({t["text"] for t in r["passed"]}), len({t for t in r["failed"] if "wr" in t}))
        for r in rows
    }
    counted = Counter(prompt for prompt, _, _ in pairs)
    print(f"precision 1, recall {len(pairs)}/{sum(expected.values())}")
    assert all(counted[prompt] == count for prompt, count in expected.items())
    assert len(list(read_examples([tmp_path / "run" / "pairs.jsonl"], "pairs"))) == len(pairs)


@pytest.mark.parametrize("balanced", [False, True])
def test_balanced_pairs_are_longer_as_often_as_shorter(balanced: bool, tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    # What passed is longer four times out of five.
    rows = [
        {
            "prompt": f"question {i}",
            "passed": ["right " * rng.randrange(8, 40) + str(j) for j in range(2)],
            "failed": ["wrong " * rng.randrange(3, 20) + str(j) for j in range(2)],
        }
        for i in range(150)
    ]
    made = pipeline(samples=(write(tmp_path / "s.jsonl", rows),), balanced=balanced)
    summary = run(made, {}, tmp_path / "run", RunOptions(16))
    pairs = [parts(row) for row in rows_of(tmp_path / "run" / "pairs.jsonl")]
    longer = sum(len(chosen) > len(rejected) for _, chosen, rejected in pairs)
    shorter = sum(len(chosen) < len(rejected) for _, chosen, rejected in pairs)
    assert summary["measures"]["length of the chosen answer"]["longer"] == longer
    assert abs(longer - shorter) <= 1 if balanced else longer > 2 * shorter
    assert len(pairs) + summary["stages"][-1]["rejected"].get("no pair of the other length", 0) == len(rows)


def test_the_parts_of_another_run_are_samples(tmp_path: Path) -> None:
    async def sample(item: Item, context: Context) -> Result:
        context.note(what="here")
        if item["number"] % 3 == 0:
            return Rejected("not this one")
        return item.update(passed=[{"text": "yes"}], failed=["no"])

    items = [make_item({"problem": f"problem {i}", "number": i}, [f"line {i}"]) for i in range(30)]
    output = Output("sft", lambda item: [{"prompt": item["problem"], "completion": "yes"}])
    run(Pipeline("other", lambda: iter(items), [Stage("sample", sample)], [output], models=()), {}, tmp_path / "other")
    made = pipeline(samples=(str(tmp_path / "other" / "parts" / "00" / "*.jsonl"),), prompt_column="problem")
    run(made, {}, tmp_path / "run")
    rows = rows_of(tmp_path / "run" / "pairs.jsonl")
    assert [parts(row) for row in rows] == [(f"problem {i}", "yes", "no") for i in range(30) if i % 3]
    for row in rows:
        assert row["provenance"]["sources"] == [row["prompt"][0]["content"].replace("problem", "line")]
        assert row["provenance"]["steps"][0] == {"what": "here", "stage": "sample"}


@pytest.mark.parametrize("case", range(3))
def test_rules_label_answers_of_several_models(case: int, tmp_path: Path) -> None:
    rng, students = random.Random(int(print_seed().integers(1 << 30))), {n: Student(s) for n, s in SKILLS.items()}
    (tmp_path / "rule.py").write_text(RULE)
    prompts = make_prompts(tmp_path / "p.jsonl", rng, 80)
    rule = f"{tmp_path / 'rule.py'}:right"
    made = pipeline(prompts=(prompts,), label="rules", rule=rule, temperatures=(0.5, 1.0), language="en")
    assert made.models == ("a", "b", "c")
    models = {name: ScriptedGenerator(student, name) for name, student in students.items()}
    with reachable(models, over_http=case == 0) as given:
        summary = run(made, given, tmp_path / "run", RunOptions(16))
    # Each model is asked at each temperature, with seeds of its own.
    for model in models.values():
        assert Counter(request.temperature for request in model.asked) == {0.5: 80, 1.0: 80}
    assert len({request.seed for model in models.values() for request in model.asked}) > 400
    kinds = {key: kind for student in students.values() for key, kind in student.kinds.items()}
    rows = [parts(row) for row in rows_of(tmp_path / "run" / "reward.jsonl")]
    for prompt, chosen, rejected in rows:
        assert (kinds[prompt, chosen], kinds[prompt, rejected]) == ("right", "wrong")
        assert is_right(prompt, chosen) > is_right(prompt, rejected)
    by_prompt: dict[str, set[str]] = {}
    for (prompt, _), kind in kinds.items():
        by_prompt.setdefault(prompt, set()).add(kind)
    expected = {prompt for prompt, found in by_prompt.items() if {"right", "wrong"} <= found}
    print(f"precision 1, recall {len(rows)}/{len(expected)}")
    assert {prompt for prompt, _, _ in rows} == expected
    assert summary["audits"][f"{tmp_path / 'rule.py'}:right"]["wrong"][1] == 0
    assert len(list(read_examples([tmp_path / "run" / "reward.jsonl"], "pairs"))) == len(rows)


@pytest.mark.parametrize("case", range(3))
def test_only_verdicts_that_hold_in_both_orders_count(case: int, tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    made = pipeline(prompts=(make_prompts(tmp_path / "p.jsonl", rng, 80),), keep=2, each=2)
    models = {name: ScriptedGenerator(Student(skill), name) for name, skill in SKILLS.items()}
    models["judge"] = ScriptedGenerator(Judge(biased=0.3, silent=0.1), "judge")
    for _ in range(2):
        summary = run(made, models, tmp_path / "run", RunOptions(16))
    assert summary["asked_now"] == 0
    rows = [parts(row) for row in rows_of(tmp_path / "run" / "reward.jsonl")]
    assert all(is_right(prompt, chosen) and not is_right(prompt, rejected) for prompt, chosen, rejected in rows)
    used = [(prompt, text) for prompt, *texts in rows for text in texts]
    assert len(set(used)) == len(used)
    # What is reported is what the judge has said: each pair was asked in both orders.
    said: dict[tuple[str, ...], set[Any]] = {}
    for request in models["judge"].asked:
        prompt = str(request.messages[-1]["content"])
        conversation, rest = prompt.split("Conversation:\n")[1].split("\n\nAnswer 1:\n", 1)
        first, second = rest.split("\n\nFirst give")[0].split("\n\nAnswer 2:\n", 1)
        answer = Judge(biased=0.3, silent=0.1)(request)
        found = re.findall(r'^\{"better": (\d)\}$', str(answer), re.M)
        verdict = int(found[0]) if found and int(found[0]) < 3 else None
        said.setdefault((conversation, *sorted([first, second])), set()).add((first < second, verdict))
    planted = sum(kinds["wrong"][0] for kinds in summary["audits"].values())
    consistent = [key for key, both in said.items() if {v for _, v in both} == {1, 2}]
    measured = summary["measures"]["judge"]
    assert all(len(both) == 2 for both in said.values())
    assert measured["consistent"] == len(consistent) - planted
    assert measured["first twice"] > 0.1 * sum(measured[k] for k in ("consistent", "first twice", "a tie"))
    assert "second twice" not in measured
    total = sum(count for name, count in measured.items() if name not in ("no verdict", "position_bias"))
    assert measured["position_bias"] == pytest.approx(measured["first twice"] / total)
    # Recall: every prompt with a consistent verdict has a pair.
    keys = {row[0] for row in rows}
    labelled = {row["provenance"]["id"].split("/")[0] for row in rows_of(tmp_path / "run" / "reward.jsonl")}
    assert (
        len(labelled)
        == len(keys)
        == summary["stages"][1]["out"]
        - summary["stages"][2]["rejected"].get("no consistent verdict", 0)
        - (len(rows) - len(keys))
    )


def test_a_judge_that_looks_at_the_place_alone_gives_nothing(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    made = pipeline(prompts=(make_prompts(tmp_path / "p.jsonl", rng, 60),), answerers=("a", "b"))
    models = {name: ScriptedGenerator(Student(0.5), name) for name in ("a", "b")}
    models["judge"] = ScriptedGenerator(lambda request: '{"better": 2}', "judge")
    summary = run(made, models, tmp_path / "run")
    assert summary["outputs"][0]["rows"] == 0
    assert summary["measures"]["judge"]["position_bias"] == -1.0


def test_judges_and_rules_that_cannot_be_trusted_end_the_run(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    prompts = make_prompts(tmp_path / "p.jsonl", rng, 300)
    models = {name: ScriptedGenerator(Student(0.9), name) for name in SKILLS}
    models["judge"] = ScriptedGenerator(Judge(inverted=True), "judge")
    with pytest.raises(InputError, match="The check judge, words out of order cannot be trusted"):
        run(pipeline(prompts=(prompts,)), models, tmp_path / "run", RunOptions(16))
    (tmp_path / "rule.py").write_text("def right(completions, **columns):\n    return [1.0] * len(completions)\n")
    made = pipeline(prompts=(prompts,), label="rules", rule=f"{tmp_path / 'rule.py'}:right")
    with pytest.raises(InputError, match=r"The check .*rule.py:right cannot be trusted: it passed"):
        run(made, models, tmp_path / "rules", RunOptions(16))
    assert not [*tmp_path.glob("*/reward.jsonl")]


def test_answers_are_written_for_people_to_label(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    made = pipeline(prompts=(make_prompts(tmp_path / "p.jsonl", rng, 30),), label="review")
    models = {name: ScriptedGenerator(Student(skill), name) for name, skill in SKILLS.items()}
    run(made, models, tmp_path / "run")
    rows = rows_of(tmp_path / "run" / "review.jsonl")
    for row in rows:
        assert len(row["responses"]) == len(row["by"]) == len(row["temperatures"]) >= 2
        assert set(row["by"]) <= set(SKILLS)
    read = read_pairs(tmp_path / "run" / "review.jsonl")
    assert len(read.pairs) == sum(len(row["responses"]) * (len(row["responses"]) - 1) // 2 for row in rows) > 0
    assert not any(pair.ranked for pair in read.pairs)


def test_what_is_made_does_not_depend_on_order_or_parts(tmp_path: Path) -> None:
    prompts = make_prompts(tmp_path / "p.jsonl", random.Random(int(print_seed().integers(1 << 30))), 30)
    made = pipeline(prompts=(prompts,), balanced=True)
    for name, options in (("one", RunOptions(64, 4, 4)), ("other", RunOptions(3, 2, 1))):
        delay = None if name == "one" else lambda request: request.seed % 5 / 1000
        models = {n: ScriptedGenerator(Student(skill), n, 4, delay) for n, skill in SKILLS.items()}
        run(made, {**models, "judge": ScriptedGenerator(Judge(0.2), "judge", 4, delay)}, tmp_path / name, options)
    assert (tmp_path / "one" / "reward.jsonl").read_bytes() == (tmp_path / "other" / "reward.jsonl").read_bytes() != b""


def test_nonsense_gives_no_pairs(tmp_path: Path) -> None:
    prompts = make_prompts(tmp_path / "p.jsonl", random.Random(int(print_seed().integers(1 << 30))), 40)
    (tmp_path / "rule.py").write_text(RULE)
    for label in ("judge", "rules"):
        made = pipeline(prompts=(prompts,), label=label, rule=f"{tmp_path / 'rule.py'}:right")  # type: ignore[arg-type]
        models = {name: ScriptedGenerator(nonsense, name) for name in made.models}
        assert run(made, models, tmp_path / label)["outputs"][0]["rows"] == 0


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for row, options in (
        ({}, {"prompts": True}),
        ({"prompt": ""}, {"prompts": True}),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, {"prompts": True}),
        ({"prompt": "x"}, {"samples": True}),
        ({"prompt": "x", "passed": "y", "failed": []}, {"samples": True}),
        ({"prompt": "x", "passed": [1], "failed": []}, {"samples": True}),
        ({"prompt": "x", "passed": [], "failed": []}, {}),
        ({"prompt": "x", "passed": [], "failed": []}, {"samples": True, "prompts": True}),
        ({"prompt": "x"}, {"prompts": True, "prompt_column": "problem"}),
        ({"prompt": "x"}, {"prompts": True, "each": 0}),
        ({"prompt": "x"}, {"prompts": True, "keep": 0}),
        ({"prompt": "x"}, {"prompts": True, "temperatures": ()}),
        ({"prompt": "x"}, {"prompts": True, "temperatures": (-1.0,)}),
        ({"prompt": "x"}, {"prompts": True, "answerers": ()}),
        ({"prompt": "x"}, {"prompts": True, "answerers": ("a", "a")}),
        ({"prompt": "x"}, {"prompts": True, "answerers": ("judge",)}),
        ({"prompt": "x"}, {"prompts": True, "label": "guess"}),
        ({"prompt": "x"}, {"prompts": True, "label": "rules", "rule": "nothing"}),
        ({"prompt": "x"}, {"prompts": True, "near_duplicates": 3.0}),
    ):  # fmt: skip
        write(path, [row])
        given: dict[str, Any] = {n: (str(path),) if n in ("prompts", "samples") else v for n, v in options.items()}
        with pytest.raises(InputError):
            pipeline(**given)
    path.write_text("")
    with pytest.raises(InputError):
        pipeline(prompts=(str(path),))


def test_two_hundred_prompts_a_second(tmp_path: Path) -> None:
    count = 400
    prompts = make_prompts(tmp_path / "p.jsonl", random.Random(0), count)
    made = pipeline(prompts=(prompts,), answerers=("a",), most_judged=1)
    models = {"a": ScriptedGenerator(Student(0.5), "a"), "judge": ScriptedGenerator(Judge(), "judge")}
    assert best_rate(count, lambda attempt: run(made, models, tmp_path / str(attempt)), enough=200) > 200
