"""Documents from seed documents: what a scripted author gets wrong is dropped, and what is right is kept."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import train_bpe
from tests.helpers.mistakes import FORMAL, drawn, nonsense
from tests.helpers.runs import print_seed
from tests.helpers.scripted_model import ScriptedGenerator
from train.data.build import BuildConfig, build
from train.synthesize.generator import Answer, Request
from train.synthesize.recipes.knowledge import pipeline
from train.synthesize.run import RunOptions, run
from train.synthesize.seed_documents import copied_share, name_fault, number_fault, shared_subject

ISOLATION: Any = "bubblewrap" if shutil.which("bwrap") else "none"
PLACES = "Arendal Bergen Cadiz Dover Exeter Faro Gdansk Halifax Izmir Jaffa Kotor Lagos Malaga Nantes Odessa".split()
THINGS = "barrels lanterns bridges windmills vineyards cottages warehouses chapels orchards fountains".split()
FAR = (
    "Penguins sometimes migrate through frozen antarctic territories whenever temperatures decrease, because "
    "particular currents transport abundant plankton towards sheltered breeding colonies."
)
FACT = re.compile(r"(\w+)'?s? (?:merchants counted|has) (\d+) (\w+)")
TEXTS = ("number", "name", "copy", "speaks", "subject", "short", "long", "open", "swap", "half", "notice")
PAIRS = ("number", "name", "speaks", "swap", "twice", "list")
PROBLEMS = ("wrong", "equation", "no box", "one step", "ill-posed", "speaks", "half")
EXERCISES = ("wrong test", "wrong solution", "no name", "forbidden", "few tests", "constant", "speaks", "half")


def facts_of(text: str) -> set[tuple[str, str, str]]:
    return {(place, number, thing) for place, number, thing in FACT.findall(text)}


def document(topic: int, rng: random.Random) -> str:
    """Facts on places, as a merchant tells them."""
    facts = [(rng.choice(PLACES), rng.randrange(100, 10**5), thing) for thing in rng.sample(THINGS, 8)]
    told = [
        f"During the famous inventory {rng.choice(('of spring', 'of autumn', 'of winter'))} the {place} merchants "
        f"counted {number} {thing} with great patience."
        for place, number, thing in facts
    ]
    return f"This is the inventory of topic {topic}. " + " ".join(told)


class Author:
    """Plays all roles; remembers what is wrong with each text.

    Attributes:
      kinds: of each text, question, problem or function, by its words.
      solved: of each problem or function, which of the samples are right.
    """

    def __init__(self, right: float = 0.5):
        self.kinds: dict[str, str] = {}
        self.solved: dict[str, list[bool]] = {}
        self._right = right

    def __call__(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        if '"supported"' in prompt:
            return self._judge(prompt)
        if prompt.startswith("Solve this problem"):
            return self._solve(prompt, rng)
        if "Write the function" in prompt:
            return self._program(prompt, rng)
        text = prompt.split("Document:\n")[1].split("\n\nAnswer with")[0]
        for begins, kinds, make in (
            ("Write the content", TEXTS, self._text),
            ("Write a mathematical", PROBLEMS, self._problem),
            ("Write a programming", EXERCISES, self._exercise),
        ):
            if prompt.startswith(begins):
                kind = "good" if rng.random() < self._right else rng.choice((*kinds, *FORMAL))
                # Answers with a fault of form are good ones otherwise.
                told = make(text, kind, rng)
                told = told[: len(told) // 2] if kind == "half" and begins != "Write the content" else told
                return FORMAL[kind](told) if kind in FORMAL else told
        return json.dumps(self._pairs(text, rng))

    @staticmethod
    def _key(text: str) -> str:
        """What names a text: its words."""
        return " ".join(re.findall(r"\w+", text))

    def _text(self, text: str, kind: str, rng: random.Random) -> str:
        facts = [list(fact) for fact in sorted(facts_of(text))]
        # Two texts of a document are different ones.
        rng.shuffle(facts)
        if kind == "number":
            facts[2][1] = str(int(facts[2][1]) + rng.randrange(1, 9) * 10**5)
        if kind == "name":
            facts[1][0] = "Zanzibar"
        if kind == "swap":
            facts[0][1], facts[1][1] = facts[1][1], facts[0][1]
        told = [f"According to patient counting in the inventory, {p} has {n} {thing}." for p, n, thing in facts]
        if kind == "subject":
            told = [FAR] * 3
            told = [f"{one[:-1]} again." if i else one for i, one in enumerate(told)]
        if kind == "short":
            told = told[:1]
        if kind == "long":
            told = told * 3 + [" ".join(f"counting{i}" for i in range(200)) + "."]
        if kind == "speaks":
            told.insert(1, "As described above, the document counts more.")
        if kind == "notice":
            told.insert(1, "Subscribe to the inventory.")
        made = text if kind == "copy" else " ".join(told) + ("\n```python\n" if kind == "open" else "")
        made = made[: made.rfind(" counting", 0, len(made) * 2 // 3)] if kind == "half" else made
        self.kinds[self._key(made)] = kind
        return made

    def _pairs(self, text: str, rng: random.Random) -> list[Any]:
        made: list[Any] = []
        for place, number, thing in sorted(facts_of(text))[:6]:
            kind = "good" if rng.random() < self._right else rng.choice(PAIRS)
            told = str(int(number) + 10**5) if kind == "number" else number
            told = min(n for _, n, _ in facts_of(text) if n != number) if kind == "swap" else told
            asked = f"How many {thing} of the {'document' if kind == 'speaks' else 'inventory'} are in {place}?"
            if kind == "name":
                asked = f"How many {thing} are in Zanzibar?"
            pair: Any = {"question": asked, "answer": f"The inventory says {place} has {told} {thing}."}
            if kind == "twice":
                made.append(pair)
            made.append([pair] if kind == "list" else pair)
            if kind != "list":
                key = self._key(f"Question: {asked}\nAnswer: {pair['answer']}")
                self.kinds[key] = "good" if kind == "twice" else kind
        return made

    def _judge(self, prompt: str) -> str:
        text = prompt.split("Document:\n")[1].split("\n\nFirst give")[0]
        seed, _, made = text.partition("\n\nText:\n")
        verdict = {
            "supported": facts_of(made) <= facts_of(seed) and "Kalderath" not in made,
            "whole": made.rstrip().endswith("."),
            "teaches": "Subscribe" not in made,
        }
        return f"I have read it.\n{json.dumps(verdict)}"

    def _problem(self, text: str, kind: str, rng: random.Random) -> str:
        a, b, c = (rng.randrange(3, 99) for _ in range(3))
        total = a * b + c + (7 if kind in ("wrong", "equation") else 0)
        problem = (
            f"A port stores {a} crates of {b} candles each, and a ship brings {c} candles more. How many are there?"
        )
        if kind == "ill-posed":
            problem = f"A port stores some crates of {b} candles each, and a ship brings {c} candles more. How many?"
        if kind == "speaks":
            problem = "Use the document above. " + problem
        sum_ = f"{a * b + (7 if kind == 'wrong' else 0)}"
        first = f"1. The crates hold {a} candles times {b}, which makes {sum_} candles."
        second = f"2. With the ship there are {sum_} + {c} = {total} candles."
        steps = [second] if kind == "one step" else [first, second]
        last = f"There are {total}." if kind == "no box" else rf"\boxed{{{total}}}"
        self.kinds[self._key(problem)] = kind
        return json.dumps({"problem": problem, "solution": "\n".join([*steps, last])})

    def _solve(self, prompt: str, rng: random.Random) -> str:
        problem = prompt.split("Solve this problem.\n\n")[1].split("\n\nWrite numbered")[0]
        found = re.search(r"stores (\d+) crates of (\d+) candles each, and a ship brings (\d+)", problem)
        right = found is not None and rng.random() < 0.75
        value = rng.randrange(10**6)
        if found is not None:
            a, b, c = map(int, found.groups())
            value = a * b + c + (0 if right else rng.randrange(1, 1000) * 1000)
        self.solved.setdefault(self._key(problem), []).append(right)
        return rf"1. I count them.{chr(10)}\boxed{{{value}}}"

    def _exercise(self, text: str, kind: str, rng: random.Random) -> str:
        a, b = rng.randrange(2, 50), rng.randrange(2, 50)
        name = f"scaled_{a}_{b}"
        called = "other" if kind == "no name" else name
        values = [1, 5] if kind == "few tests" else [1, 5, 12, 40]
        made = [f"assert {name}({n}) == {a * n + b}" for n in values]
        if kind == "wrong test":
            made[2] = f"assert {name}(12) == {a * 12 + b + 1}"
        if kind == "constant":
            made = [f"assert {name}({n}) == {b}" for n in (0, False, 0.0)]
        body = f"return {a} * n + {b + (kind == 'wrong solution')}"
        if kind == "forbidden":
            body = f"import subprocess\n    {body}"
        about = "In the document, write" if kind == "speaks" else "Write"
        task = f"{about} a function {called}(n) that multiplies n by {a}, adds {b} and returns the result."
        self.kinds[name] = kind
        solution = f"def {name}(n):\n    {body}\n"
        return json.dumps({"task": task, "function": name, "solution": solution, "tests": made})

    def _program(self, prompt: str, rng: random.Random) -> str:
        found = re.search(r"function (\w+)\(n\) that multiplies n by (\d+), adds (\d+)", prompt)
        assert found is not None
        right = rng.random() < 0.8
        self.solved.setdefault(found[1], []).append(right)
        return f"So:\n```python\ndef {found[1]}(n):\n    return {found[2]} * n + {int(found[3]) + (not right)}\n```"


def make_corpus(path: Path, rng: random.Random, count: int) -> None:
    rows = [{"text": document(topic, rng)} for topic in range(count)]
    rows += [{"text": "too short " * 3}, {"text": "tick tock " * 100}, {"text": document(0, rng) * 40}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "documents.jsonl").open()]


def make(folder: Path, author: Author, count: int, rng: random.Random, **options: Any) -> dict[str, Any]:
    make_corpus(folder / "c.jsonl", rng, count)
    made = pipeline(corpus=(str(folder / "c.jsonl"),), language="en", least_words=60, isolation=ISOLATION, **options)
    models = {name: ScriptedGenerator(author, name) for name in made.models}
    summary = run(made, models, folder / "run", RunOptions(16, workers=2))
    assert summary["stages"][0]["rejected"] == {"too short": 1, "garbage": 1, "too long": 1}
    return summary


@pytest.mark.parametrize("case", range(3))
def test_texts_and_questions_are_grounded_and_all_that_are_right_are_kept(case: int, tmp_path: Path) -> None:
    rng, author = random.Random(int(print_seed().integers(1 << 30))), Author()
    summary = make(tmp_path, author, 30, rng, versions=2)
    kept: set[str] = set()
    for row in rows_of(tmp_path / "run"):
        parts = [row["text"]] if row["form"] == "textbook" else row["text"].split("\n\n")
        assert row["form"] == "textbook" or len(parts) >= 2
        assert row["provenance"]["sources"]
        for part in parts:
            # Precision: nothing that is wrong is left, neither a text nor a question.
            assert author.kinds[author._key(part)] == "good", part
            kept.add(author._key(part))
    texts = {key for key, kind in author.kinds.items() if kind == "good" and not key.startswith("Question")}
    pairs = {key for key, kind in author.kinds.items() if kind == "good" and key.startswith("Question")}
    print(f"precision 1, recall {len(kept & texts)}/{len(texts)} texts, {len(kept & pairs)}/{len(pairs)} questions")
    assert texts <= kept
    # Questions are only lost where fewer than two of an answer are right.
    assert len(kept & pairs) > 0.9 * len(pairs)
    assert summary["audits"]["numbers"]["wrong"][1] == 0
    # `data build` reads the rows.
    train_bpe([row["text"] for row in rows_of(tmp_path / "run")], 400).save(tmp_path / "tokenizer")
    built = BuildConfig(
        (str(tmp_path / "run" / "documents.jsonl"),), tmp_path / "tokenizer", 64, tmp_path / "data", workers=1
    )
    assert build(built).documents == len(rows_of(tmp_path / "run"))


@pytest.mark.parametrize("case", range(3))
def test_problems_have_the_answer_that_others_find(case: int, tmp_path: Path) -> None:
    rng, author = random.Random(int(print_seed().integers(1 << 30))), Author()
    summary = make(tmp_path, author, 40, rng, kind="mathematics", forms=("problem",))
    kept = {author._key(row["text"].split("\n\n")[0].removeprefix("Problem: ")) for row in rows_of(tmp_path / "run")}
    # Two of three samples found the answer.
    good = {key for key, kind in author.kinds.items() if kind == "good" and sum(author.solved[key]) >= 2}
    print(f"precision 1, recall {len(kept & good)}/{len(good)}", summary["stages"][1]["rejected"])
    assert kept == good != set()


def test_exercises_run_and_other_solutions_pass_their_tests(tmp_path: Path) -> None:
    rng, author = random.Random(int(print_seed().integers(1 << 30))), Author()
    summary = make(tmp_path, author, 12, rng, kind="code", forms=("exercise",), samples=2, agreement=1.0)
    kept = {re.findall(r"def (\w+)", row["text"])[0] for row in rows_of(tmp_path / "run")}
    good = {name for name, kind in author.kinds.items() if kind == "good" and all(author.solved[name])}
    print(f"precision 1, recall {len(kept & good)}/{len(good)}", summary["measures"])
    assert kept == good
    assert summary["measures"].get("programs", 0) >= len(good)


BLOCK = "One adds what crates hold, and shows how.\n\n```python\n{}\n```\n\nThat is all of it."
COUNTS = "One multiplies 12 by 30 to count the lamps. {} And there are many shelves of lamps."


@pytest.mark.parametrize(
    ("kind", "made", "reasons"),
    [
        (
            "code",
            [BLOCK.format("print(sum(range(3)))"), BLOCK.format("print(undefined)"), BLOCK.format("import socket")],
            {"textbook: its code does not run": 1, "textbook: a forbidden import": 1},
        ),
        (
            "mathematics",
            [
                COUNTS.format("So 12 * 30 = 360."),
                COUNTS.format("So 12 * 30 = 390."),
                COUNTS.format("So 977 are there."),
            ],
            {"textbook: a number that the document lacks": 2},
        ),
        (
            "mathematics",
            [COUNTS.format("So 12 + 30 = 42."), COUNTS.format("So 12 + 12 = 30.")],
            {"textbook: a false equation": 1},
        ),
    ],
)
def test_code_of_texts_runs_and_numbers_follow(
    kind: Any, made: list[str], reasons: dict[str, int], tmp_path: Path
) -> None:
    def author(request: Request) -> str:
        prompt = str(request.messages[-1]["content"])
        if '"supported"' in prompt:
            return '{"supported": true, "whole": true, "teaches": true}'
        return made[int(re.findall(r"shelf (\w+)", prompt)[0])]

    rows = (
        {"text": f"This tells about lamps on shelf {i}: there 12 crates hold 30 lamps each."} for i in range(len(made))
    )
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = pipeline(
        corpus=(str(tmp_path / "c.jsonl"),), kind=kind, forms=("textbook",), least_words=5, isolation=ISOLATION
    )
    summary = run(recipe, {name: ScriptedGenerator(author, name) for name in recipe.models}, tmp_path / "run")
    (row,) = rows_of(tmp_path / "run")
    assert row["text"] == made[0]
    rejected: dict[str, int] = {}
    for stage in summary["stages"]:
        rejected |= stage["rejected"]
    assert rejected == reasons


def test_a_reward_model_drops_what_it_scores_low(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def best(prompts, completions, form, **columns):\n    return [float('Bergen' in one) for one in completions]\n"
    )
    author = Author(1.0)
    make(tmp_path, author, 20, random.Random(5), forms=("textbook",), scorer=f"{tmp_path}/r.py:best", least_score=0.5)
    kept = {author._key(row["text"]) for row in rows_of(tmp_path / "run")}
    assert kept == {key for key in author.kinds if "Bergen" in key} != set(author.kinds)
    assert all(row["score"] == 1.0 for row in rows_of(tmp_path / "run"))


def test_what_is_made_does_not_depend_on_order_or_parts(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c.jsonl", random.Random(int(print_seed().integers(1 << 30))), 12)
    made = pipeline(corpus=(str(tmp_path / "c.jsonl"),), least_words=60, near_duplicates=0.9)
    for name, options in (("one", RunOptions(64, 4, 4)), ("other", RunOptions(3, 2, 1))):
        delay = None if name == "one" else lambda request: request.seed % 5 / 1000
        models = {model: ScriptedGenerator(Author(), model, 4, delay) for model in made.models}
        run(made, models, tmp_path / name, options)
    assert (tmp_path / "one" / "documents.jsonl").read_bytes() == (tmp_path / "other" / "documents.jsonl").read_bytes()


def test_a_judge_that_lets_everything_pass_ends_the_run(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c.jsonl", random.Random(int(print_seed().integers(1 << 30))), 150)
    made = pipeline(corpus=(str(tmp_path / "c.jsonl"),), forms=("textbook",), least_words=60)
    lenient = ScriptedGenerator(lambda request: '{"supported": true, "whole": true, "teaches": true}', "lenient")
    with pytest.raises(InputError, match=r"The check judge, .* cannot be trusted: it passed"):
        run(made, {"generator": ScriptedGenerator(Author(1.0)), "judge": lenient}, tmp_path / "run", RunOptions(16))


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c.jsonl", random.Random(int(print_seed().integers(1 << 30))), 12)
    for kind in ("knowledge", "mathematics", "code"):
        made = pipeline(corpus=(str(tmp_path / "c.jsonl"),), kind=kind, least_words=60, isolation=ISOLATION)
        models = {name: ScriptedGenerator(nonsense, name) for name in made.models}
        assert run(made, models, tmp_path / kind)["outputs"][0]["rows"] == 0


def test_numbers_names_subjects_and_copies_are_seen() -> None:
    seed = "In 1969 Armstrong walked on the Moon for 151 minutes, and 2 others waited near 3.5 tonnes of equipment."
    for text, bad in (
        ("He walked for 151 minutes in 1969.", None), ("1. First, 2 waited.\n2. Then 3 left.", None),
        ("It took 152 minutes.", "152"), ("It weighed 3.50 tonnes.", None), ("It was 1,969 long.", None),
        ("He walked 35 minutes.", "35"), ("302 is twice 151.", "302"),
    ):  # fmt: skip
        assert number_fault(text, seed, False) == bad, text
    assert number_fault("302 is twice 151, that is 2 times it.", seed, True) is None
    assert number_fault("9317 is twice 151.", seed, True) == "9317"
    for text, bad in (
        ("Then Armstrong saw the Moon. He left.", None), ("Then Aldrin saw it.", "Aldrin"), ("The NASA sent I.", None),
        ("# Great Title Here\n\nThe Moon's dust.", None), ("A Heading Without End\n\nIt ended.", None),
        ('He said: "Look at Tycho now."', "Tycho"), ("Lines go on\nand Tycho is\nseen there.", "Tycho"),
        ("Wir haben das nicht mit der Katze und dem Hund gesehen.", None),
    ):  # fmt: skip
        assert name_fault(text, seed) == bad, text
    words = "walking equipment minutes others waiting Armstrong".split()
    long = " ".join(f"{word}{chr(97 + i)}" for i, word in enumerate(words * 3))
    assert shared_subject("short words only", seed) is None
    far = " ".join(f"{a}{b}{a}{b}{a}xyz" for a in "bcdf" for b in "aeio")
    assert shared_subject(far, seed) == 0.0
    assert shared_subject(f"{far} {long}", seed) == pytest.approx(4 / 20, abs=0.11)
    assert copied_share(seed, seed) == 1.0
    assert copied_share("It was in 1969 that somebody walked there for the first time.", seed) == 0.0


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("")
    with pytest.raises(InputError):
        pipeline(corpus=(str(path),))
    path.write_text(json.dumps({"text": document(1, random.Random(0))}))
    for options in (
        {"least_words": 0}, {"kind": "poetry"}, {"forms": ("exercise",)}, {"least_score": 1.0}, {"agreement": 0.5},
        {"most_copied": 2.0}, {"least_length": 3.0}, {"least_words": 4000}, {"least_tests": 9}, {"temperature": -1.0},
        {"scorer": str(tmp_path / "none.py:f")}, {"decontaminate": ("x",)}, {"near_duplicates": 2.0}, {"seconds": 0.0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipeline(corpus=(str(path),), **options)  # type: ignore[arg-type]
