"""Filtering: an example stays if rules, critic and scorers find no flaw, and scorers that miss flaws are found out."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.mistakes import drawn, nonsense
from tests.helpers.runs import print_seed
from tests.helpers.scripted_api import reachable
from tests.helpers.scripted_model import ScriptedGenerator
from tests.helpers.timing import best_rate
from train.data.examples import read_examples
from train.synthesize.generator import Answer, Request
from train.synthesize.kappa import cohen_kappa
from train.synthesize.recipes.filtering import pipeline
from train.synthesize.run import RunOptions, run

# Flaws that rules see, and the reason they give.
FORMS = {
    "empty code": "an open block of code",
    "repeats": "garbage",
    "control": "garbage",
    "declines": "the model declines",
    "german": "another language",
    "short": "too short",
}
# Flaws of content, by the model that sees them.
CONTENTS = {"false": ("critic",), "rude": ("judge",), "vague": ("taste",), "awful": ("critic", "judge", "taste")}
SCORERS = ("judge=8", "taste=5.5")


def question(number: int) -> str:
    return f"How does the machine of kind {number} work?"


def answer_of(number: int, kind: str, rng: random.Random) -> str:
    """An answer of five sentences in order, with one flaw."""
    words = [f"First the machine of kind {number} takes the wood that is there."]
    words += [f"Step {i} is that it moves the {rng.randrange(10**6)} parts to the next place." for i in (1, 2, 3)]
    words.append("So it ends, and the work is done.")
    if kind in CONTENTS:
        words[2] += f" [{kind}]"
    text = " ".join(words)
    return {
        "empty code": f"{text}\n```python\nprint(1)",
        "repeats": "We go on and on. " * 40,
        "control": f"{text}<|im_start|>",
        "declines": f"I'm sorry, but I cannot help. {text}",
        "german": "Das ist nicht so einfach, weil die Maschine für uns auch nicht da ist, und das war es auch schon.",
        "short": "It just works.",
    }.get(kind, text)


def flawed(prompt: str, name: str) -> bool:
    """Whether an answer has a flaw that a model of this name sees, with those that are planted."""
    conversation, answer = prompt.split("Conversation:\n")[1].split("\n\nAnswer:\n", 1)
    answer = re.split(r"\n\n(?:Answer with a JSON|First give)", answer)[0]
    number = re.findall(r"kind (\d+)", conversation)[-1]
    order = [int(i) for i in re.findall(r"Step (\d)", answer)]
    whole = answer.startswith("First") and answer.endswith("So it ends, and the work is done.")
    content = any(f"[{kind}]" in answer for kind, seers in CONTENTS.items() if name in seers)
    return content or not whole or order != [1, 2, 3] or f"kind {number} " not in answer


class Jury:
    """Plays the critic or a scorer, which gives no verdict now and then."""

    def __init__(self, name: str, silent: float = 0.0):
        self._name, self._silent = name, silent

    def __call__(self, request: Request) -> str | Answer:
        prompt, rng = str(request.messages[-1]["content"]), drawn(request)
        if rng.random() < self._silent:
            return rng.choice(
                ["", '{"flaws": ["half', "Score: 11", "I'm sorry, I cannot do that.", '{"flaws": "none"}']
            )
        bad = flawed(prompt, self._name)
        if self._name == "critic":
            return json.dumps({"flaws": ["it is not so"] if bad else rng.choice([[], [" "]])})
        return f"I have looked at it. Score: {rng.choice([2, 5, 5.4]) if bad else rng.choice([8, 9, 10])}"


def jury(silent: float = 0.0) -> dict[str, ScriptedGenerator]:
    return {name: ScriptedGenerator(Jury(name, silent), name) for name in ("critic", "judge", "taste")}


def make_examples(path: Path, rng: random.Random, count: int, form: str = "messages") -> list[str]:
    """Writes examples; returns their kinds."""
    kinds = [rng.choice(["good"] * 10 + list(FORMS) + list(CONTENTS)) for _ in range(count)]
    with path.open("w") as file:
        for number, kind in enumerate(kinds):
            text = answer_of(number, kind, rng)
            messages = [{"role": "user", "content": question(number)}, {"role": "assistant", "content": text}]
            row: dict[str, Any] = {"messages": messages}
            if form == "text":
                row = {"prompt": question(number), "completion": text}
            if form == "pairs":
                worse = answer_of(number, "awful" if number % 3 else kind, rng)
                worse += " Or so." if worse == text else ""
                row = {"prompt": messages[:1], "chosen": messages[1:], "rejected": [{**messages[1], "content": worse}]}
            file.write(json.dumps({**row, "provenance": {"id": "x"}}) + "\n")
    return kinds


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


@pytest.mark.parametrize("form", ["messages", "text", "pairs"])
def test_only_what_all_hold_flawless_stays_and_all_of_it(form: str, tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    kinds = make_examples(tmp_path / "e.jsonl", rng, 150, form)
    made = pipeline(
        examples=(str(tmp_path / "e.jsonl"),), scorers=SCORERS if form != "pairs" else (), least_words=8, language="en"
    )
    with reachable({name: jury()[name] for name in made.models}, over_http=form == "messages") as models:
        summary = run(made, models, tmp_path / "run", RunOptions(16))
    name = "pairs" if form == "pairs" else "sft"
    rows = rows_of(tmp_path / "run" / f"{name}.jsonl")
    seers = {kind: [n for n in by if n in made.models] for kind, by in CONTENTS.items()}
    good = [i for i, kind in enumerate(kinds) if kind == "good" or (kind in seers and not seers[kind])]
    before = rows_of(tmp_path / "e.jsonl")
    kept = [{k: v for k, v in row.items() if k != "provenance"} for row in rows]
    print(f"precision 1, recall {len(kept)}/{len(good)}")
    # In order, and as they were.
    assert kept == [{k: v for k, v in before[i].items() if k != "provenance"} for i in good]
    assert len(list(read_examples([tmp_path / "run" / f"{name}.jsonl"]))) == len(good)
    rejected = {stage["name"]: stage["rejected"] for stage in summary["stages"]}
    for reason in set(FORMS.values()):
        assert rejected["rules"].get(reason, 0) == sum(FORMS.get(kind) == reason for kind in kinds)
    for kind, by in seers.items():
        same = [k for k in seers if seers[k] == by]
        assert not by or rejected["decide"].get(f"flawed: {', '.join(by)}", 0) == sum(k in same for k in kinds), kind
    assert all(counts["wrong"][1] == 0 for counts in summary["audits"].values())
    assert {f"critic, {kind}" for kind in ("truncated", "out of order", "another question")} <= set(summary["audits"])


def test_agreement_and_rejections_of_scorers_are_reported(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    kinds = make_examples(tmp_path / "e.jsonl", rng, 200)
    made = pipeline(examples=(str(tmp_path / "e.jsonl"),), scorers=SCORERS, least_words=8, language="en")
    for _ in range(2):
        # A second run asks nothing, and reports the same.
        summary = run(made, jury(), tmp_path / "run", RunOptions(16))
        contents = [kind for kind in kinds if kind not in FORMS]
        verdicts = {n: [int(n not in CONTENTS.get(k, ())) for k in contents] for n in ("critic", "judge", "taste")}
        for name, given in verdicts.items():
            alone = sum(CONTENTS.get(kind) == (name,) for kind in contents)
            counted = {"judged": len(given), "rejected": given.count(0), "rejected_alone": alone, "no_verdict": 0}
            assert summary["measures"]["scorers"][name] == counted
        for one, pair in zip(
            summary["measures"]["agreement of scorers"], itertools.combinations(verdicts, 2), strict=True
        ):
            kappa = cohen_kappa(verdicts[pair[0]], verdicts[pair[1]], 2)
            assert one == {"scorers": list(pair), "common": len(contents), "kappa": kappa}
    assert summary["asked_now"] == 0
    assert "agreement of scorers" in (tmp_path / "run" / "report.html").read_text()


def test_no_verdict_is_no_flaw_and_never_kept(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    kinds = make_examples(tmp_path / "e.jsonl", rng, 120)
    made = pipeline(examples=(str(tmp_path / "e.jsonl"),), scorers=SCORERS, least_words=8, language="en")
    summary = run(made, jury(0.2), tmp_path / "run", RunOptions(16))
    rows = rows_of(tmp_path / "run" / "sft.jsonl")
    numbers = [int(re.findall(r"kind (\d+)", row["messages"][0]["content"])[0]) for row in rows]
    assert all(kinds[number] == "good" for number in numbers)
    silent = sum(n for reason, n in summary["stages"][2]["rejected"].items() if reason.startswith("not judged"))
    # An example with a flaw is one of them where the only one who would see it is silent.
    assert silent >= kinds.count("good") - len(rows) > 0
    assert sum(one["no_verdict"] for one in summary["measures"]["scorers"].values()) >= silent


def test_a_chosen_answer_must_be_scored_above_the_rejected_one(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    kinds = make_examples(tmp_path / "e.jsonl", rng, 60, "pairs")
    # A reward function of a file, as of a reward model.
    (tmp_path / "by.py").write_text(
        "def mark(prompts, completions, **columns):\n"
        "    return [0.0 if '[' in t or 'So it ends, and' not in t else 1.0 for t in completions]\n"
    )
    scorer = f"model=0.5={tmp_path / 'by.py'}:mark"
    options = {"critic": False, "scorers": (scorer,), "least_words": 8, "language": "en"}
    made = pipeline(examples=(str(tmp_path / "e.jsonl"),), **options)  # type: ignore[arg-type]
    assert made.models == ()
    # It does not see that another question is answered.
    make_examples(tmp_path / "many.jsonl", rng, 900, "pairs")
    many = pipeline(examples=(str(tmp_path / "many.jsonl"),), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"The check model, .* cannot be trusted"):
        run(many, {}, tmp_path / "many")
    run(made, {}, tmp_path / "run")
    prompts = [row["prompt"][0]["content"] for row in rows_of(tmp_path / "run" / "pairs.jsonl")]
    # Where the rejected answer is as good as the chosen one, the pair goes.
    assert prompts == [question(i) for i, kind in enumerate(kinds) if kind == "good" and i % 3]


@pytest.mark.parametrize("bad", ["critic", "judge"])
def test_a_scorer_that_lets_everything_pass_ends_the_run(bad: str, tmp_path: Path) -> None:
    make_examples(tmp_path / "e.jsonl", random.Random(int(print_seed().integers(1 << 30))), 400)
    models = jury()
    models[bad] = ScriptedGenerator(lambda request: '{"flaws": []}' if bad == "critic" else "Score: 10", "lenient")
    made = pipeline(examples=(str(tmp_path / "e.jsonl"),), scorers=SCORERS)
    with pytest.raises(InputError, match=rf"The check {bad}, .* cannot be trusted: it passed"):
        run(made, models, tmp_path / "run", RunOptions(16))
    assert not (tmp_path / "run" / "sft.jsonl").exists()


def test_what_is_made_does_not_depend_on_order_or_parts(tmp_path: Path) -> None:
    make_examples(tmp_path / "e.jsonl", random.Random(int(print_seed().integers(1 << 30))), 40)
    made = pipeline(examples=(str(tmp_path / "e.jsonl"),), scorers=SCORERS)
    for name, options in (("one", RunOptions(64, 4, 4)), ("other", RunOptions(3, 2, 1))):
        delay = None if name == "one" else lambda request: request.seed % 5 / 1000
        models = {model: ScriptedGenerator(Jury(model, 0.1), model, 4, delay) for model in made.models}
        run(made, models, tmp_path / name, options)
    assert (tmp_path / "one" / "sft.jsonl").read_bytes() == (tmp_path / "other" / "sft.jsonl").read_bytes()


def test_nonsense_gives_nothing(tmp_path: Path) -> None:
    make_examples(tmp_path / "e.jsonl", random.Random(int(print_seed().integers(1 << 30))), 60)
    made = pipeline(examples=(str(tmp_path / "e.jsonl"),), scorers=SCORERS)
    models = {name: ScriptedGenerator(nonsense, name) for name in made.models}
    assert run(made, models, tmp_path / "run")["outputs"][0]["rows"] == 0


def test_bad_input_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    for content in ("", '{"text": "x"}\n', '{"messages": []}\n', '{"prompt": "x", "completion": 3}\n'):
        path.write_text(content)
        with pytest.raises(InputError):
            pipeline(examples=(str(path),))
    make_examples(path, random.Random(0), 3)
    for options in (
        {"scorers": ("judge",)}, {"scorers": ("judge=x",)}, {"scorers": ("judge=11",)}, {"scorers": ("a=1", "a=2")},
        {"scorers": ("critic=3",)}, {"scorers": ("rm=0=none.py:f",)}, {"scorers": (), "critic": False},
        {"least_words": 0}, {"most_words": 0}, {"near_duplicates": 0.0}, {"decontaminate": ("x=none.jsonl",)},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipeline(examples=(str(path),), **options)  # type: ignore[arg-type]


def test_two_hundred_examples_a_second(tmp_path: Path) -> None:
    count = 400
    make_examples(tmp_path / "e.jsonl", random.Random(0), count)
    made = pipeline(examples=(str(tmp_path / "e.jsonl"),), scorers=SCORERS)
    assert best_rate(count, lambda attempt: run(made, jury(), tmp_path / str(attempt)), enough=200) > 200
