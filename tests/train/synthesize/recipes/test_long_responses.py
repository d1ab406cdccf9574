"""Long responses: requests state a length that the answer has, and damaged pairs are dropped."""

import json
import random
import re
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
from train.synthesize.generator import Answer, Request
from train.synthesize.lengths import Length, draw_length, measure, stated
from train.synthesize.recipes.long_responses import pipeline
from train.synthesize.run import RunOptions, run

NOUNS = "river garden market engine teacher window letter bridge winter kitchen forest doctor harbour village".split()
VERBS = "is near,was seen from,has been with,will be at,could do more for,had made".split(",")
# What the corpus is spoilt by, and the stage that has to see it.
DAMAGES = {
    "short": "measure", "repeated": "measure", "control": "measure", "open fence": "measure", "long": "measure",
    "german": "measure", "cut": "judge", "boilerplate": "judge",
}  # fmt: skip
REQUESTS = ("other length", "copies", "speaks of it", "half", "list", "other topic", *FORMAL)


def sentence(rng: random.Random) -> str:
    one, other, third = rng.sample(NOUNS, 3)
    return f"The {one} {rng.choice(VERBS)} the {other}, and this {third} number {rng.randrange(10**6)} was not there."


def text_of(topic: int, rng: random.Random, damage: str | None = None) -> str:
    """A text on a topic, whole or with one damage."""
    parts, sections = [f"This is the account of topic {topic}."], rng.choice([0, 0, 3, 5])
    count = 5 if damage == "short" else rng.randrange(30, 70)
    for number in range(count):
        if sections and number % (count // sections + 1) == 0:
            parts.append(f"\n\n## Part {number}\n\n")
        parts.append(sentence(rng))
    if damage == "open fence":
        parts.append("\n```python\nprint(1)\n")
    if damage == "boilerplate":
        parts.insert(1, "Accept all cookies and subscribe.")
    if damage == "control":
        parts.append("<|im_end|>")
    if damage == "repeated":
        parts += [sentence(rng)] * count
    if damage == "long":
        parts += [sentence(rng) for _ in range(400)]
    if damage == "german":
        parts = ["Das ist nicht das, was wir für die Stadt und den Fluss mit ihm haben werden, und es war so."] + [
            f"Die Nummer {rng.randrange(10**9)} ist auch nicht bei dem Haus und der Brücke gewesen." for _ in range(50)
        ]
    if damage != "cut":
        parts.append(f"This ends the account of topic {topic}.")
    return " ".join(parts)


class Author:
    """Plays all roles; remembers what is wrong with its requests and sections.

    Attributes:
      requests: by topic, the kind of the request.
      written: by topic, the kinds of plan and sections.
    """

    def __init__(self, share_right: float = 0.5):
        self.requests: dict[int, str] = {}
        self.written: dict[int, set[str]] = {}
        self._share_right = share_right

    def __call__(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        if '"fits"' in prompt:
            return self._judge(prompt)
        if '"sections"' in prompt:
            return self._plan(prompt, rng)
        if "one section of a long answer" in prompt:
            return self._section(prompt, rng)
        text = prompt.split("Text:\n")[1].split("\n\nAnswer with")[0]
        found = re.search(r"account of topic (\d+)", text)
        topic, length = int(found[1]) if found else -1, re.findall(r"length of the answer: (.*)", prompt)[0]
        right = rng.random() < self._share_right
        kind = self.requests[topic] = rng.choice(["good", "no length"]) if right else rng.choice(REQUESTS)
        asked = f"Please write the account of topic {topic} for my class, with all that happened. {length}"
        if kind == "no length":
            asked = f"Please write the account of topic {topic} for my class, with all that happened."
        if kind == "other length":
            asked = f"Please write the account of topic {topic} in 77 words."
        if kind == "copies":
            asked += " " + " ".join(text.split()[9:30])
        if kind == "speaks of it":
            asked = f"Please write the text above on topic {topic}. {length}"
        if kind == "other topic":
            asked = f"Please write the account of topic {topic + 1} for my class. {length}"
        made = json.dumps({"request": [asked] if kind == "list" else asked})
        if kind == "half":
            return made[: len(made) // 2]
        return FORMAL[kind](made) if kind in FORMAL else made

    def _judge(self, prompt: str) -> str:
        request, answer = prompt.split("Request:\n")[1].split("\n\nFirst give")[0].split("\n\nAnswer:\n", 1)
        topic = re.search(r"topic (\d+)", request)
        fits = topic is not None and f"topic {topic[1]}." in answer
        verdict = {
            "fits": fits,
            "complete": re.search(r"ends the account of topic \d+\.$", answer) is not None,
            "boilerplate": "cookies" in answer,
        }
        return f"I have read it.\n{json.dumps(verdict)}"

    def _plan(self, prompt: str, rng: random.Random) -> str | Answer:
        found = re.search(r"topic (\d+)", prompt)
        assert found is not None
        least = int(re.findall(r"Give (\d+) to \d+ sections", prompt)[0])
        limits = re.search(r", (?:(\d+) to|at most) (\d+) words", prompt)
        assert limits is not None
        low, high = int(limits[1] or 0), int(limits[2])
        total = (low + high) // 2 if low and high < 2 * low else max(1.05 * low, min(800, 0.8 * high))
        kind = rng.choice(["good"] * 6 + ["half", "other length", "same heading", "cut", "empty"])
        self.written.setdefault(int(found[1]), set()).add(kind)
        sections = max(least, 3)
        each = int(total / sections) if kind != "other length" else 10**5
        made = json.dumps(
            {
                "sections": [
                    {"heading": "Part" if kind == "same heading" else f"Part {i}", "content": "it.", "words": each - 2}
                    for i in range(sections)
                ]
            }
        )
        return made[:-9] if kind == "half" else FORMAL[kind](made) if kind in FORMAL else made

    def _section(self, prompt: str, rng: random.Random) -> str | Answer:
        found, number = re.search(r"topic (\d+)", prompt), int(re.findall(r"text of section (\d+)", prompt)[0])
        assert found is not None
        count = int(re.findall(r"about (\d+) words\. Go on", prompt)[0])
        kind = rng.choice(["good"] * 20 + ["cut", "refusal", "short", "open"])
        last = number == max(map(int, re.findall(r"^(\d+)\. Part", prompt, re.M)))
        # The last section ends the account, and opens nothing.
        kind = "good" if last and kind == "open" else kind
        self.written[int(found[1])].add(kind)
        words: list[str] = []
        while len(words) < (5 if kind == "short" else count - 7 * last):
            words += sentence(rng).split()
        text = " ".join(words[: count - 7 * last])
        text = f"Part {number - 1}\n\n{text}" if rng.random() < 0.2 else text
        text += f" This ends the account of topic {found[1]}." if last else "\n```\nopen" if kind == "open" else ""
        return FORMAL[kind](text) if kind in FORMAL else text


def make_corpus(path: Path, rng: random.Random, count: int) -> dict[int, str | None]:
    """Writes texts; returns the damage of each topic."""
    damages = {topic: rng.choice([None] * 9 + list(DAMAGES)) for topic in range(count)}
    rows = [{"text": text_of(topic, rng, damage)} for topic, damage in damages.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return damages


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sft.jsonl").open()]


def has_length(request: str, answer: str, tokenizer: Any = None) -> bool:
    """Whether an answer has the length that its request states, by another reading than the recipe's."""
    words = len(answer.split())
    if found := re.search(r"exactly (\d+) sections", request):
        return len(re.findall(r"^## ", answer, re.M)) == int(found[1])
    if found := re.search(r"about (\d+) pages? of 500 words", request):
        return abs(words - 500 * int(found[1])) <= 250
    count = len(tokenizer.encode(answer, parse_special=False)) if "tokens" in request else words
    if found := re.search(r"about (\d+) \w+, at most a tenth", request):
        return abs(count - int(found[1])) <= 0.1 * int(found[1]) + 1e-6
    if found := re.search(r"between (\d+) and (\d+)", request):
        return int(found[1]) <= count <= int(found[2])
    found = re.search(r"at (least|most) (\d+)", request)
    assert found is not None, request
    return count >= int(found[2]) if found[1] == "least" else count <= int(found[2])


@pytest.mark.parametrize("case", range(3))
def test_only_whole_pairs_with_a_true_length_are_kept_and_all_of_them(case: int, tmp_path: Path) -> None:
    rng, author = random.Random(int(print_seed().integers(1 << 30))), Author()
    damages = make_corpus(tmp_path / "c.jsonl", rng, 120)
    tokenizer = train_bpe(["The river is near the garden, and this bridge number 123 was not there. " * 9], 300)
    tokenizer.save(tmp_path / "tokenizer")
    made = pipeline(
        corpus=(str(tmp_path / "c.jsonl"),), tokenizer=str(tmp_path / "tokenizer"), language="en", most_tokens=12_000
    )
    scripted = {name: ScriptedGenerator(author, name) for name in made.models}
    with reachable(scripted, over_http=case == 0) as models:
        summary = run(made, models, tmp_path / "run", RunOptions(16))
    kept = set()
    for row in rows_of(tmp_path / "run"):
        request, answer = (message["content"] for message in row["messages"])
        topic = int(re.findall(r"topic (\d+)", request)[0])
        # Precision: the pair is whole, and code that does not know the recipe finds the length that is stated.
        assert damages[topic] is None
        assert author.requests[topic] in ("good", "no length")
        assert answer.endswith(f"This ends the account of topic {topic}.")
        assert has_length(request, answer, tokenizer)
        kept.add(topic)
    good = {t for t, damage in damages.items() if damage is None and author.requests[t] in ("good", "no length")}
    print(f"precision 1, recall {len(kept)}/{len(good)} of {len(damages)} texts")
    assert kept == good != set()
    rejected = {stage["name"]: stage["rejected"] for stage in summary["stages"]}
    assert rejected["judge"].keys() <= {
        "the answer does not fit the request", "the answer is not complete", "boilerplate in the answer",
    }  # fmt: skip
    assert sum(rejected["measure"].values()) == sum(DAMAGES.get(str(d)) == "measure" for d in damages.values())
    assert summary["audits"]["length"] == {
        "right": [summary["stages"][0]["out"]] * 2, "wrong": [summary["stages"][0]["out"], 0]
    }  # fmt: skip
    assert len(list(read_examples([tmp_path / "run" / "sft.jsonl"], "sft"))) == len(kept)


def test_sections_are_planned_written_and_measured(tmp_path: Path) -> None:
    rng, author = random.Random(int(print_seed().integers(1 << 30))), Author(1.0)
    make_corpus(tmp_path / "c.jsonl", rng, 80)
    made = pipeline(corpus=(str(tmp_path / "c.jsonl"),), write="sections", language="en")
    models = {name: ScriptedGenerator(author, name) for name in made.models}
    summary = run(made, models, tmp_path / "run", RunOptions(16))
    kept = set()
    for row in rows_of(tmp_path / "run"):
        request, answer = (message["content"] for message in row["messages"])
        topic = int(re.findall(r"topic (\d+)", request)[0])
        assert author.written[topic] <= {"good", "short"}
        assert has_length(request, answer)
        kept.add(topic)
    good = {topic for topic, kinds in author.written.items() if kinds == {"good"}}
    print(f"precision 1, recall {len(kept & good)}/{len(good)} of {len(author.written)} texts")
    assert good <= kept
    assert len(good) > 5
    assert summary["stages"][2]["rejected"]


def test_what_is_made_does_not_depend_on_order_or_parts(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c.jsonl", random.Random(int(print_seed().integers(1 << 30))), 20)
    made = pipeline(corpus=(str(tmp_path / "c.jsonl"),), near_duplicates=0.8)
    for name, options in (("one", RunOptions(64, 4, 4)), ("other", RunOptions(3, 2, 1))):
        delay = None if name == "one" else lambda request: request.seed % 5 / 1000
        models = {model: ScriptedGenerator(Author(), model, 4, delay) for model in made.models}
        run(made, models, tmp_path / name, options)
    assert (tmp_path / "one" / "sft.jsonl").read_bytes() == (tmp_path / "other" / "sft.jsonl").read_bytes()


def test_a_judge_that_lets_everything_pass_ends_the_run(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c.jsonl", random.Random(int(print_seed().integers(1 << 30))), 300)
    made = pipeline(corpus=(str(tmp_path / "c.jsonl"),))
    lenient = ScriptedGenerator(lambda request: '{"fits": true, "complete": true, "boilerplate": false}', "lenient")
    with pytest.raises(InputError, match=r"The check judge, .* cannot be trusted: it passed"):
        run(made, {"generator": ScriptedGenerator(Author(1.0)), "judge": lenient}, tmp_path / "run", RunOptions(16))
    assert not (tmp_path / "run" / "sft.jsonl").exists()


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c.jsonl", random.Random(int(print_seed().integers(1 << 30))), 40)
    for write in ("corpus", "sections"):
        made = pipeline(corpus=(str(tmp_path / "c.jsonl"),), write=write)  # type: ignore[arg-type]
        models = {name: ScriptedGenerator(nonsense, name) for name in made.models}
        assert run(made, models, tmp_path / write)["outputs"][0]["rows"] == 0


def test_every_statement_of_length_that_is_drawn_holds_and_is_read_back() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    units = set()
    for _ in range(300):
        text = text_of(1, rng) + " one" * rng.randrange(2000)
        length = draw_length(text, rng, len)
        units.add(length.unit)
        assert length.holds(text, len)
        assert Length.from_json(json.loads(json.dumps(length.to_json()))) == length
        assert set(stated(f"Write a story about 7 birds. {length.says}")) == set(length.stated)
        # Twice the text, or a quarter, has another length where the statement is limited there.
        if length.most is not None:
            assert not length.holds(text + "\n\n" + text + "\n\n## One more", len)
        if length.least is not None and length.unit != "sections":
            assert not length.holds(text[: len(text) // 4], len)
    assert units == {"words", "pages", "sections", "tokens"}
    assert stated("in 1,200 words or 3-5 pages, ten main words, 2 short sections") == [
        ("words", 1200), ("pages", 3), ("pages", 5), ("sections", 2),
    ]  # fmt: skip
    fenced = "# A\n\n```\n# no heading\n```\n\nB\n---\n"
    assert (measure(fenced, "sections"), measure("\u4f60\u597d world", "words")) == (2, 3)


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("")
    with pytest.raises(InputError):
        pipeline(corpus=(str(path),))
    path.write_text('{"other": "text"}\n')
    with pytest.raises(InputError):
        pipeline(corpus=(str(path),))
    path.write_text(json.dumps({"text": text_of(1, random.Random(0))}))
    for options in (
        {"least_words": 0}, {"most_tokens": 0}, {"temperature": -1.0}, {"section_tokens": 0},
        {"tokenizer": str(tmp_path / "none")}, {"decontaminate": ("x",)}, {"near_duplicates": 2.0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipeline(corpus=(str(path),), **options)  # type: ignore[arg-type]


def test_two_hundred_texts_a_second(tmp_path: Path) -> None:
    count = 300
    make_corpus(tmp_path / "c.jsonl", random.Random(0), count)
    made = pipeline(corpus=(str(tmp_path / "c.jsonl"),))
    models = {name: ScriptedGenerator(Author(1.0), name) for name in made.models}
    assert best_rate(count, lambda attempt: run(made, models, tmp_path / str(attempt)), enough=200) > 200
