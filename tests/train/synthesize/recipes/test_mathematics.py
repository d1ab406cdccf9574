"""Mathematics: what is wrong is rejected, what is right is kept, and the given answer does not show."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import train_bpe
from tests.helpers.mistakes import FORMAL, drawn, nonsense
from tests.helpers.runs import print_seed
from tests.helpers.scripted_api import reachable
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from train.data.examples import read_examples
from train.data.prompts import read_prompts
from train.rewards.math import MathReward
from train.synthesize.generator import Answer, Request
from train.synthesize.recipes import mathematics
from train.synthesize.recipes.mathematics import pipeline
from train.synthesize.run import RunOptions, run

SAMPLES = 5
PROBLEM = "A shop has {} boxes with {} pens each, and it sells {} pens on Monday. How many pens are left?"
# The final answer is right.
RIGHT = ("right", "false equation", "restates", "one step", "two boxes", "talks on")
WRONG = ("wrong", "no box", *FORMAL)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """One process compares for all tests."""
    reward, before = MathReward(workers=1, seconds=30.0), mathematics.verifier
    mathematics.verifier = lambda: reward  # type: ignore[assignment]
    yield
    mathematics.verifier = before
    reward.close()


class Pupil:
    """Plays all roles for problems of the form of `PROBLEM`, and remembers which mistake each answer has.

    Attributes:
      kinds: by text of the answer: the problem, and what is wrong with it.
      samples: by problem: the kinds of its samples.
      guided: by problem: the kinds of those that knew the answer.
    """

    def __init__(self, share_right: float = 0.4):
        self.kinds: dict[str, tuple[tuple[int, ...], str]] = {}
        self.samples: dict[tuple[int, ...], list[str]] = {}
        self.guided: dict[tuple[int, ...], list[str]] = {}
        self.rephrased: Counter[str] = Counter()
        self._share_right = share_right

    def __call__(self, request: Request) -> str | Answer:
        prompt = str(request.messages[-1]["content"])
        rng = drawn(request)
        found = re.search(r"(\d+) (?:boxes|crates) with (\d+) pens each, and it sells (\d+)", prompt)
        assert found is not None
        problem = tuple(map(int, found.groups()))
        if "JSON" in prompt:
            return self._new(problem, rng, "other words" in prompt)
        if "Score:" in prompt:
            return self._judge(prompt)
        if "Solution so far" in prompt:
            return self._go_on(problem, prompt, rng)
        if "For you alone" in prompt:
            kind = rng.choice(["good", "leak", "first", "void", "wrong", "false equation", "cut"])
            self.guided.setdefault(problem, []).append(kind)
        else:
            # Some problems are too hard for all samples.
            share = 0.0 if problem[0] % 4 == 0 else self._share_right
            kind = "right" if rng.random() < share else rng.choice((*RIGHT[1:], *WRONG) if share else WRONG)
            self.samples.setdefault(problem, []).append(kind)
        answer = solution(problem, kind, rng)
        self.kinds[answer if isinstance(answer, str) else answer.text] = problem, kind
        return answer

    def _new(self, problem: tuple[int, ...], rng: Any, rephrase: bool) -> str:
        kind = rng.choice(["good", "changed", "half", "same", "list"])
        self.rephrased[kind] += rephrase
        a, b, c = problem if kind == "good" and rephrase else (problem[0] + 1, problem[1], problem[2] + 1)
        text = PROBLEM.format(a, b, c).replace("boxes", "crates")
        if kind == "same":
            text = PROBLEM.format(*problem)
        made = json.dumps([text] if kind == "list" else {"problem": text})
        return made[: len(made) // 2] if kind == "half" else made

    def _judge(self, prompt: str) -> str:
        text = prompt.split("Solution:\n")[1].split("\n\nFirst give")[0]
        if text not in self.kinds:
            return "It founds nothing. Score: 1"
        return f"Well. Score: {5 + len(text) % 5}"

    def _go_on(self, problem: tuple[int, ...], prompt: str, rng: Any) -> str:
        a, b, c = problem
        steps = prompt.split("Solution so far:\n")[1]
        assert not re.search(rf"\b{a * b - c}\b", steps), "the model is shown the answer"
        left = a * b - c if f"{a} * {b} = {a * b}" in steps else rng.randrange(10**6)
        return rf"2. This leaves {a * b} - {c} = {left}." + "\n" + rf"\boxed{{{left}}}"


def solution(problem: tuple[int, ...], kind: str, rng: Any) -> str | Answer:
    """A solution of a kind. The word makes all of them different."""
    a, b, c = problem
    product, left, word = a * b, a * b - c, f"Number {rng.randrange(10**9)} is noted."
    if kind == "wrong":
        left = product + c + rng.randrange(1, 10**6)
    steps = [f"All boxes together hold {a} * {b} = {product} pens. {word}", f"The sale leaves {left} pens for later."]
    if kind != "wrong":
        steps[1] = f"After the sale, {product} - {c} = {left} remain."
    if kind == "false equation":
        steps[0] = steps[0].replace(f"= {product}", f"= {product + 1}")
    if kind == "restates":
        steps.insert(0, PROBLEM.format(*problem).split(". ")[0] + ".")
    if kind == "one step":
        steps = [f"{word} Clearly {product} - {c} = {left} remain."]
    if kind == "leak":
        steps[1] += " This agrees with the given answer."
    if kind == "first":
        steps.insert(0, f"We show that {left} pens are left.")
    if kind == "void":
        steps = [f"Think about pens. {word}", f"Look at the sale. Then = {left}"]
    text = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    text += "" if kind == "no box" else "\n" + rf"So it is \boxed{{{left}}}."
    if kind == "two boxes":
        text = r"1. First \boxed{1} of all. " + text
    if kind == "talks on":
        text += " I hope that this helps you. Do tell me if there is anything else that I can do for you today."
    return FORMAL[kind](text) if kind in FORMAL else text


def make_problems(path: Path, rng: Any, count: int, annotated: bool) -> dict[tuple[int, ...], int]:
    """Writes problems; returns their answers."""
    found: dict[tuple[int, ...], int] = {}
    while len(found) < count:
        a, b = int(rng.integers(20, 90)), int(rng.integers(20, 90))
        c = int(rng.integers(2, 19))
        found[a, b, c] = a * b - c
    rows = [
        {"problem": PROBLEM.format(*numbers), **({"answer": answer} if annotated else {})}
        for numbers, answer in found.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def numbers_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


@pytest.mark.parametrize("case", range(3))
def test_only_right_solutions_are_kept_and_all_of_them(case: int, tmp_path: Path) -> None:
    rng, pupil = print_seed(), Pupil(0.2)
    answers = make_problems(tmp_path / "p.jsonl", rng, 60, annotated=True)
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=SAMPLES, guided=3, keep=9, language="en")
    with reachable({"generator": ScriptedGenerator(pupil)}, over_http=case == 0) as models:
        summary = run(made, models, tmp_path / "run", RunOptions(16))
    kept: dict[tuple[int, ...], set[str]] = {}
    for row in rows_of(tmp_path / "run", "sft"):
        problem, kind = pupil.kinds[row["messages"][2]["content"]]
        assert problem == numbers_of(row["messages"][1]["content"])
        kept.setdefault(problem, set()).add(kind)
    # Precision: nothing else is kept.
    assert all(kinds <= ({"right"} if "right" in kinds else {"good"}) for kinds in kept.values())
    # Recall: every problem with a right solution is kept, or else with a guided one that derives the answer.
    expected = {p for p, kinds in pupil.samples.items() if "right" in kinds}
    expected |= {p for p, kinds in pupil.guided.items() if "good" in kinds}
    print(f"precision 1, recall {len(kept)}/{len(expected)} of {len(answers)} problems")
    assert set(kept) == expected
    assert any("good" in kinds for kinds in kept.values())
    # The guided ones are asked where nothing passed, and only there.
    assert set(pupil.guided) == {p for p, kinds in pupil.samples.items() if "right" not in kinds}
    assert summary["audits"]["math"]["wrong"][1] == 0 < summary["audits"]["math"]["right"][1]
    check_pairs_and_prompts(tmp_path / "run", pupil, answers)


def check_pairs_and_prompts(folder: Path, pupil: Pupil, answers: dict[tuple[int, ...], int]) -> None:
    for row in rows_of(folder, "pairs"):
        (problem, chosen), (other, rejected) = (pupil.kinds[row[x][0]["content"]] for x in ("chosen", "rejected"))
        assert problem == other
        assert chosen in ("right", "good")
        assert rejected == "wrong"
    prompts = {numbers_of(row["prompt"][1]["content"]): row for row in rows_of(folder, "grpo")}
    for problem, kinds in pupil.samples.items():
        rate = sum(kind in RIGHT for kind in kinds) / len(kinds)
        if problem in prompts:
            assert prompts[problem]["pass_rate"] == rate
            assert prompts[problem]["answer"] == str(answers[problem])
        passed = "right" in kinds or "good" in pupil.guided.get(problem, [])
        assert (problem in prompts) == (passed and 0.1 <= rate <= 0.9)
    # What is trained on with these prompts is rewarded for the right answer.
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    read = read_prompts([str(folder / "grpo.jsonl")], tokenizer, 10_000).prompts
    assert len(read) == len(prompts)
    answers_of = {row["messages"][1]["content"]: row["messages"][2]["content"] for row in rows_of(folder, "sft")}
    for prompt in read:
        text = answers_of[prompt.text_or_messages[1]["content"]]  # type: ignore[index]
        assert mathematics.verifier()([text], [True], answer=[prompt.columns["answer"]]) == [1.0]
    assert len(list(read_examples([folder / "sft.jsonl"], "sft"))) == len(rows_of(folder, "sft"))
    assert len(list(read_examples([folder / "pairs.jsonl"], "pairs"))) == len(rows_of(folder, "pairs")) > 0


def test_what_is_made_does_not_depend_on_order_or_parts(tmp_path: Path) -> None:
    make_problems(tmp_path / "p.jsonl", print_seed(), 20, annotated=True)
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=3, altered=1, rank="judge", keep=2)
    for name, options in (("one", RunOptions(64, 4, 4)), ("other", RunOptions(3, 2, 1))):
        pupil = Pupil()
        delay = None if name == "one" else lambda request: request.seed % 5 / 1000
        models = {model: ScriptedGenerator(pupil, model, 4, delay) for model in made.models}
        run(made, models, tmp_path / name, options)
    for output in ("sft.jsonl", "pairs.jsonl", "grpo.jsonl"):
        assert (tmp_path / "one" / output).read_bytes() == (tmp_path / "other" / output).read_bytes()


def test_agreement_stands_in_for_annotated_answers(tmp_path: Path) -> None:
    pupil = Pupil(0.7)
    answers = make_problems(tmp_path / "p.jsonl", print_seed(), 60, annotated=False)
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=SAMPLES, agreement=0.6, language="en")
    summary = run(made, {"generator": ScriptedGenerator(pupil)}, tmp_path / "run")
    agreed = {p for p, kinds in pupil.samples.items() if sum(k in RIGHT for k in kinds) >= 3 and "right" in kinds}
    rows = rows_of(tmp_path / "run", "sft")
    assert {numbers_of(row["messages"][1]["content"]) for row in rows} == agreed
    assert 0 < len(agreed) < len(answers)
    assert not pupil.guided
    for row in rows:
        problem, kind = pupil.kinds[row["messages"][2]["content"]]
        (note,) = [step for step in row["provenance"]["steps"] if "agreement" in step]
        assert (kind, note["answer"]) == ("right", str(answers[problem]))
        assert note["agreement"] == note["votes"] / SAMPLES >= 0.6
    assert summary["stages"][1]["rejected"]["samples do not agree"] > 0
    assert {row["answer_from"] for row in rows_of(tmp_path / "run", "grpo")} == {"agreement"}


@pytest.mark.parametrize("options", [{"rephrased": 3}, {"altered": 4}])
def test_new_problems_need_agreement_and_the_answer_of_their_seed(options: dict[str, int], tmp_path: Path) -> None:
    pupil = Pupil(1.0)
    answers = make_problems(tmp_path / "p.jsonl", print_seed(), 40, annotated=True)
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=3, **options)  # type: ignore[arg-type]
    summary = run(made, {"generator": ScriptedGenerator(pupil)}, tmp_path / "run")
    rejected = {stage["name"]: stage["rejected"] for stage in summary["stages"]}
    rows = rows_of(tmp_path / "run", "sft")
    new = [row for row in rows if "crates" in row["messages"][1]["content"]]
    assert new
    for row in rows:
        problem, kind = pupil.kinds[row["messages"][2]["content"]]
        assert (problem, kind in ("right", "good")) == (numbers_of(row["messages"][1]["content"]), True)
        assert row["provenance"]["sources"][0].startswith(str(tmp_path / "p.jsonl"))
    # In other words the numbers are the same; those that were altered have other numbers than their seed.
    changed = 0 if "rephrased" in options else 1
    for row in new:
        a, b, c = numbers_of(row["messages"][1]["content"])
        assert (a - changed, b, c - changed) in answers
    assert ("rephrasing changed the answer" in rejected["sample"]) == ("rephrased" in options)
    assert rejected["duplicates"]["a duplicate problem"] > 0


def test_the_best_by_the_judge_is_written(tmp_path: Path) -> None:
    pupil = Pupil(1.0)
    make_problems(tmp_path / "p.jsonl", print_seed(), 50, annotated=True)
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=3, guided=0, rank="judge")
    judge = ScriptedGenerator(pupil, model="judge")
    summary = run(made, {"generator": ScriptedGenerator(pupil), "judge": judge}, tmp_path / "run")
    for row in rows_of(tmp_path / "run", "sft"):
        best = row["messages"][2]["content"]
        problem = numbers_of(row["messages"][1]["content"])
        others = [text for text, (of, kind) in pupil.kinds.items() if of == problem and kind == "right"]
        assert len(best) % 5 == max(len(text) % 5 for text in others)
    assert summary["audits"]["judge"]["wrong"][1] == 0 < summary["audits"]["judge"]["wrong"][0]
    lenient = ScriptedGenerator(lambda request: "Score: 10", model="lenient")
    make_problems(tmp_path / "p.jsonl", print_seed(), 250, annotated=True)
    with pytest.raises(InputError, match="The check judge cannot be trusted"):
        run(made, {"generator": ScriptedGenerator(pupil), "judge": lenient}, tmp_path / "lenient", RunOptions(16))


def test_a_reward_function_ranks(tmp_path: Path) -> None:
    pupil = Pupil(0.9)
    make_problems(tmp_path / "p.jsonl", print_seed(), 10, annotated=True)
    reward = tmp_path / "my.py"
    reward.write_text("def long(completions, **columns):\n    return [float(len(text)) for text in completions]\n")
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=4, guided=0, rank=f"{reward}:long")
    run(made, {"generator": ScriptedGenerator(pupil)}, tmp_path / "run")
    rows = rows_of(tmp_path / "run", "sft")
    for row in rows:
        problem = numbers_of(row["messages"][1]["content"])
        right = [text for text, (of, kind) in pupil.kinds.items() if of == problem and kind == "right"]
        assert len(row["messages"][2]["content"]) == max(map(len, right))
    assert rows


def test_a_verifier_that_lets_everything_pass_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_problems(tmp_path / "p.jsonl", print_seed(), 250, annotated=True)
    monkeypatch.setattr(mathematics, "verifier", lambda: lambda completions, finished, answer: [1.0])
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=1, guided=0)
    with pytest.raises(InputError, match="The check math cannot be trusted: it passed"):
        run(made, {"generator": ScriptedGenerator(Pupil())}, tmp_path / "run", RunOptions(16))
    assert not (tmp_path / "run" / "sft.jsonl").exists()


def test_no_verdict_is_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_problems(tmp_path / "p.jsonl", print_seed(), 10, annotated=True)
    monkeypatch.setattr(mathematics, "verifier", lambda: lambda completions, finished, answer: [None])
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=2)
    summary = run(made, {"generator": ScriptedGenerator(Pupil(1.0))}, tmp_path / "run")
    stages = {stage["name"]: stage for stage in summary["stages"]}
    easy = [row for row in (tmp_path / "p.jsonl").open() if numbers_of(json.loads(row)["problem"])[0] % 4]
    assert stages["sample"]["rejected"] == {"not judged": stages["sample"]["in"] - stages["sample"]["out"]}
    assert stages["sample"]["rejected"]["not judged"] >= len(easy)
    assert summary["outputs"][1]["rows"] == 0


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    models = {name: ScriptedGenerator(nonsense, name) for name in ("generator", "judge")}
    for annotated in (True, False):
        make_problems(tmp_path / "p.jsonl", print_seed(), 40, annotated)
        made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=4, rephrased=1, altered=1, rank="judge")
        summary = run(
            made,
            models,
            tmp_path / str(annotated),
        )
        assert [output["rows"] for output in summary["outputs"]] == [0, 0, 0]
        assert summary["stages"][0]["out"] == 40


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for content, message in (
        ("", "no records|empty|no record"),
        ('{"question": "What?"}\n', "expected the column problem"),
        ('{"problem": "What is 1 + 1?", "answer": [2]}\n', "expected the answer"),
        ('{"problem": " ", "answer": 2}\n', "the problem is empty"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            pipeline(problems=(str(path),))
    path.write_text('{"problem": "What is 1 + 1?", "answer": 2}\n')
    for options in (
        {"samples": 0}, {"agreement": 0.5}, {"least_rate": 0.9, "most_rate": 0.1}, {"keep": 0}, {"guided": -1},
        {"temperature": float("nan")}, {"rank": "nothing"}, {"least_score": 5.0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipeline(problems=(str(path),), **options)  # type: ignore[arg-type]


def test_two_hundred_problems_a_second(tmp_path: Path) -> None:
    count = 300
    make_problems(tmp_path / "p.jsonl", print_seed(), count, annotated=True)
    made = pipeline(problems=(str(tmp_path / "p.jsonl"),), samples=2, guided=0)
    models = {"generator": ScriptedGenerator(Pupil(1.0))}
    assert best_rate(count, lambda attempt: run(made, models, tmp_path / str(attempt)), enough=200) > 200
