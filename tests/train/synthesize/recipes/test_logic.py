"""Logic: wrong answers and flawed reasoning are dropped or mended, and what is right is kept."""

import json
import re
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
from train.synthesize.generator import Answer, Request
from train.synthesize.puzzles import Puzzle, is_right, make_puzzles
from train.synthesize.reasoning import answer_line
from train.synthesize.recipes import logic
from train.synthesize.recipes.logic import pipeline
from train.synthesize.run import RunOptions, run

FACTS = ("faithful", "other number", "clue dropped", "half", "list", *FORMAL)
RIGHT = ("right", "flawed", "restates", "one step")
WRONG = ("wrong", "no line", *FORMAL)


def number_in(text: str, puzzles: list[Puzzle]) -> int:
    """The puzzle that a text asks. One with a choice of answers contains the same one without: the longest is meant."""
    asked = (i for i, p in enumerate(puzzles) if p.statement in text and p.question in text)
    return max(asked, key=lambda i: len(puzzles[i].statement) + len(puzzles[i].question))


class Thinker:
    """Plays all roles for puzzles, and remembers which mistake each text has.

    Attributes:
      kinds: by text: number of the puzzle, and what is wrong with it.
      sampled: by puzzle: the kinds of its first samples.
      told: by puzzle: what is wrong with it in other words.
      unread: texts about which the critic said nothing that can be read.
    """

    def __init__(self, puzzles: list[Puzzle], share_right: float = 0.3, right_after: float = 0.6):
        self.kinds: dict[str, tuple[int, str]] = {}
        self.sampled: dict[int, list[str]] = {}
        self.told: dict[int, str] = {}
        self.unread: set[str] = set()
        self._puzzles, self._share_right, self._right_after = puzzles, share_right, right_after

    def __call__(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        if prompt.startswith("Do these two texts"):
            first, second = prompt.split("First text:\n")[1].split("\n\nFirst compare")[0].split("\n\nSecond text:\n")
            return json.dumps({"differs": first not in second, "difference": "?"})
        if prompt.startswith("Here are a question"):
            return self._criticise(prompt, rng)
        whole = "\n".join(str(message["content"]) for message in request.messages)
        number = number_in(whole, self._puzzles)
        if prompt.startswith("Write these facts"):
            return self._tell(number, rng)
        revised = prompt.startswith("There is a flaw")
        share = self._right_after if revised else self._share_right if number % 5 else 0.0
        kinds = (*RIGHT[1:], *WRONG, *(["mentions"] if revised else []))
        kind = "right" if rng.random() < share else rng.choice(kinds)
        if not revised:
            self.sampled.setdefault(number, []).append(kind)
        made = self._reason(number, kind, rng)
        self.kinds[(made if isinstance(made, str) else made.text).strip()] = number, kind
        return made

    def _reason(self, number: int, kind: str, rng: Any) -> str | Answer:
        puzzle, mark = self._puzzles[number], f"Call this case {rng.randrange(10**9)}."
        steps = [f"We look at what is possible here. {mark}", "Only one case does not contradict what is given."]
        if kind == "flawed":
            steps[1] = "The rest is plain to see for everybody, so there is no need to look at it."
        if kind == "restates":
            steps.insert(1, steps[0])
        if kind == "one step":
            steps = steps[:1]
        if kind == "mentions":
            steps[0] += " The previous answer was not right."
        text = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
        if kind != "no line":
            text += f"\nAnswer: {puzzle.wrong if kind == 'wrong' else puzzle.answer}"
        return FORMAL[kind](text) if kind in FORMAL else text

    def _tell(self, number: int, rng: Any) -> str | Answer:
        statement, kind = self._puzzles[number].statement, rng.choice(FACTS)
        self.told[number] = kind
        facts = "It is told that this holds.\n" + statement
        if kind == "other number":
            facts += " This was told 977 times."
        if kind == "clue dropped":
            facts = facts[: len(facts) - 9] + "."
        made = json.dumps([facts] if kind == "list" else {"facts": facts})
        return FORMAL[kind](made) if kind in FORMAL else made[: len(made) // 2] if kind == "half" else made

    def _criticise(self, prompt: str, rng: Any) -> str:
        text = prompt.split("Reasoning:\n")[1].split("\n\nFirst check it")[0]
        if rng.random() < 0.1:
            self.unread.add(text)
            return "I think so."
        _, kind = self.kinds.get(text, (0, "planted"))
        flawed = kind not in ("right", "restates", "one step") and not (kind == "wrong" and rng.random() < 0.3)
        verdict = json.dumps({"flawed": flawed, "flaw": "Step 2 does not follow." if flawed else ""})
        return verdict if rng.random() < 0.5 else f'Step 1 is {{"fine"}}.\nSo is step 2.\n{verdict}'


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


@pytest.mark.parametrize("case", range(3))
def test_only_right_reasoning_is_kept_and_all_of_it(case: int, tmp_path: Path) -> None:
    seed = int(print_seed().integers(1 << 30))
    puzzles = list(make_puzzles(60, seed))
    thinker = Thinker(puzzles)
    made = pipeline(puzzles=60, seed=seed, samples=3, rounds=2, language="en")
    scripted = {name: ScriptedGenerator(thinker, name) for name in made.models}
    with reachable(scripted, over_http=case == 0) as models:
        summary = run(made, models, tmp_path, RunOptions(16))
    kept = {}
    for row in rows_of(tmp_path, "sft"):
        user, assistant = (message["content"] for message in row["messages"])
        number, kind = thinker.kinds[assistant]
        puzzle = puzzles[number]
        # Precision: the answer is right, and so is the reasoning.
        assert kind == "right"
        assert is_right(puzzle.answer, answer_line(assistant), puzzle.compare)
        # The facts are those of the puzzle, in its own words or told faithfully.
        assert puzzle.statement in user
        assert puzzle.question in user
        assert ("It is told" in user) == (thinker.told.get(number) == "faithful")
        assert row["provenance"]["sources"] == [f"puzzle {number} of seed {seed}"]
        kept[number] = assistant
    # Recall: a puzzle is kept if any reasoning was right and the critic said so.
    right = {text: number for text, (number, kind) in thinker.kinds.items() if kind == "right"}
    expected = {number for text, number in right.items() if text not in thinker.unread}
    at_once = {number for number, kinds in thinker.sampled.items() if "right" in kinds}
    print(f"precision 1, recall {len(kept)}/{len(expected)} of 60 puzzles, {len(at_once)} without a revision")
    assert set(kept) == expected
    assert set(kept) - at_once, "nothing was mended"
    assert summary["audits"]["answer"] == {"right": [60, 60], "wrong": [60, 0]}
    assert summary["audits"]["critic"]["wrong"][1] == 0
    check_pairs_and_prompts(tmp_path, thinker, puzzles, set(kept))


def check_pairs_and_prompts(folder: Path, thinker: Thinker, puzzles: list[Puzzle], kept: set[int]) -> None:
    for row in rows_of(folder, "pairs"):
        (number, chosen), (other, rejected) = (thinker.kinds[row[x][0]["content"]] for x in ("chosen", "rejected"))
        assert (number, chosen) == (other, "right")
        assert rejected == ("wrong" if "wrong" in thinker.sampled[number] else "flawed")
    prompts = {}
    for row in rows_of(folder, "grpo"):
        text = row["prompt"][0]["content"]
        number = number_in(text, puzzles)
        prompts[number] = row
        assert (row["answer"], row["answer_from"]) == (puzzles[number].answer, "code")
    for number, kinds in thinker.sampled.items():
        rate = sum(kind in RIGHT for kind in kinds) / len(kinds)
        assert (number in prompts) == (number in kept and 0.1 <= rate <= 0.9)
        assert number not in prompts or prompts[number]["pass_rate"] == rate
    for name in ("sft", "pairs"):
        assert len(list(read_examples([folder / f"{name}.jsonl"], name))) == len(rows_of(folder, name)) > 0  # type: ignore[arg-type]


def test_what_is_made_does_not_depend_on_order_or_parts(tmp_path: Path) -> None:
    seed = int(print_seed().integers(1 << 30))
    puzzles, made = list(make_puzzles(20, seed)), pipeline(puzzles=20, seed=seed, samples=2, keep=2)
    for name, options in (("one", RunOptions(64, 4, 4)), ("other", RunOptions(3, 2, 1))):
        thinker = Thinker(puzzles)
        delay = None if name == "one" else lambda request: request.seed % 5 / 1000
        models = {model: ScriptedGenerator(thinker, model, 4, delay) for model in made.models}
        run(made, models, tmp_path / name, options)
    for output in ("sft.jsonl", "pairs.jsonl", "grpo.jsonl"):
        assert (tmp_path / "one" / output).read_bytes() == (tmp_path / "other" / output).read_bytes()


def chairs(request: Request) -> str:
    """Answers questions of chairs, and criticises them."""
    prompt, rng = str(request.messages[-1]["content"]), drawn(request)
    if prompt.startswith("Here are a question"):
        text = prompt.split("Reasoning:\n")[1].split("\n\nFirst check it")[0]
        a, b = map(int, re.findall(r"(\d+) (?:red|blue)", prompt)[:2])
        right = text.endswith((f"Answer: {a + b}", f"Answer: {a + b}.0")) and "7 is smaller" not in text
        return json.dumps({"flawed": not right, "flaw": "The sum is wrong."})
    a, b = map(int, re.findall(r"(\d+) (?:red|blue)", prompt))
    # Every third question is too hard.
    total = rng.randrange(1000) if a % 3 == 0 or rng.random() < 0.1 else a + b
    steps = f"1. All chairs are red or blue, by case {rng.randrange(10**6)}.\n2. Both together make {total}."
    return f"{steps}\nAnswer: {total}{'.0' if rng.random() < 0.3 else ''}"


def test_questions_without_answers_need_agreement_and_the_critic(tmp_path: Path) -> None:
    rng = print_seed()
    numbers = {(int(a), int(b)) for a, b in rng.integers(10, 90, (60, 2))}
    rows = [{"question": f"A hall has {a} red and {b} blue chairs. How many are there?"} for a, b in sorted(numbers)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = pipeline(puzzles=0, questions=(str(tmp_path / "q.jsonl"),), samples=4, agreement=0.75)
    summary = run(made, {name: ScriptedGenerator(chairs, name) for name in made.models}, tmp_path / "run")
    kept = rows_of(tmp_path / "run", "sft")
    for row in kept:
        a, b = map(int, re.findall(r"(\d+) (?:red|blue)", row["messages"][0]["content"]))
        assert float(answer_line(row["messages"][1]["content"])) == a + b
        assert a % 3
        (note,) = [step for step in row["provenance"]["steps"] if "agreement" in step]
        assert note["agreement"] >= 0.75
    easy = sum(a % 3 > 0 for a, _ in numbers)
    print(f"{len(kept)} of {easy} questions that can be answered")
    assert 0.7 * easy < len(kept) <= easy
    assert summary["stages"][1]["rejected"]["samples do not agree"] >= len(numbers) - easy
    assert {row["answer_from"] for row in rows_of(tmp_path / "run", "grpo")} <= {"agreement"}


def test_annotated_questions_are_compared_with_their_answers(tmp_path: Path) -> None:
    print_seed()
    rows = [
        {"question": f"A hall has {a} red and 7 blue chairs. How many are there?", "answer": a + 7 + (a % 2)}
        for a in range(10, 50)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = pipeline(puzzles=0, questions=(str(tmp_path / "q.jsonl"),), samples=4, rounds=0)
    run(made, {name: ScriptedGenerator(chairs, name) for name in made.models}, tmp_path / "run")
    kept = [int(re.search(r"(\d+) red", row["messages"][0]["content"])[1]) for row in rows_of(tmp_path / "run", "sft")]
    assert set(kept) == {a for a in range(10, 50) if a % 2 == 0 and a % 3}


@pytest.mark.parametrize("name", ["answer", "critic"])
def test_checks_that_let_everything_pass_end_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(print_seed().integers(1 << 30))
    puzzles = list(make_puzzles(300, seed))
    made = pipeline(puzzles=300, seed=seed, samples=2, rounds=0, rephrased=0.0)
    thinker = Thinker(puzzles, 0.8)
    blind = ScriptedGenerator(lambda _: '{"flawed": false}', "blind")
    if name == "answer":
        monkeypatch.setattr(logic, "is_right", lambda answer, given, compare: True)
    with pytest.raises(InputError, match=f"The check {name} cannot be trusted: it passed"):
        run(made, {"generator": ScriptedGenerator(thinker), "critic": blind}, tmp_path / "run", RunOptions(16))
    assert not (tmp_path / "run" / "sft.jsonl").exists()


def test_a_critic_that_takes_all_facts_for_the_same_ends_the_run(tmp_path: Path) -> None:
    made = pipeline(puzzles=250, seed=int(print_seed().integers(1 << 30)), samples=1, rounds=0, rephrased=1.0)

    def tell(request: Request) -> str:
        prompt = str(request.messages[-1]["content"])
        if not prompt.startswith("Write these facts"):
            return "1. One.\n2. Two.\nAnswer: 3"
        facts = prompt.split("conclusions.\n\n")[1].split("\n\nThis question")[0]
        return json.dumps({"facts": facts + " That is all."})

    blind = ScriptedGenerator(lambda _: '{"differs": false}', "blind")
    with pytest.raises(InputError, match="The check comparison of facts cannot be trusted: it passed"):
        run(made, {"generator": ScriptedGenerator(tell), "critic": blind}, tmp_path / "run", RunOptions(16))


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    made = pipeline(puzzles=60, seed=int(print_seed().integers(1 << 30)), samples=3, rephrased=1.0)
    summary = run(made, {name: ScriptedGenerator(nonsense, name) for name in made.models}, tmp_path / "run")
    assert [output["rows"] for output in summary["outputs"]] == [0, 0, 0]
    # Facts keep their words.
    assert summary["stages"][0]["out"] == 60


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for content, message in (
        ("", "no record|empty"),
        ('{"problem": "What?"}\n', "expected the column question"),
        ('{"question": "What?", "answer": [2]}\n', "expected the answer"),
        ('{"question": "", "answer": 2}\n', "the question is empty"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            pipeline(questions=(str(path),))
    for options in (
        {"puzzles": 0}, {"puzzles": -1}, {"families": ("sudoku",)}, {"samples": 0}, {"rounds": -1}, {"agreement": 0.4},
        {"rephrased": 1.5}, {"least_rate": 0.9, "most_rate": 0.1}, {"temperature": float("nan")},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipeline(**options)  # type: ignore[arg-type]


def test_two_hundred_puzzles_a_second(tmp_path: Path) -> None:
    seed, count = int(print_seed().integers(1 << 30)), 300
    by_question = {(p.statement, p.question): p for p in make_puzzles(count, seed)}

    def answer(request: Request) -> str:
        prompt = str(request.messages[-1]["content"])
        criticised = prompt.startswith("Here are a question")
        question = prompt.split("Question:\n")[1].split("\n\nReasoning")[0] if criticised else prompt
        puzzle = by_question[tuple(question.split("\n\nReason step by step")[0].split("\n\n"))]  # type: ignore[index]
        text = f"1. Only one case is possible here.\n2. This decides it.\nAnswer: {puzzle.answer}"
        return json.dumps({"flawed": text not in prompt, "flaw": "?"}) if criticised else text

    made = pipeline(puzzles=count, seed=seed, samples=1, rounds=0, rephrased=0.0)
    models = {name: ScriptedGenerator(answer, name) for name in made.models}
    rate = best_rate(count, lambda attempt: run(made, models, tmp_path / str(attempt)), enough=200)
    assert len(rows_of(tmp_path / "0", "sft")) == count
    assert rate > 200
