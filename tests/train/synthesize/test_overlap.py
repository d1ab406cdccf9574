"""Overlap: a run of 13 words of an evaluation set is found and named, and what nearly repeats an earlier text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.timing import best_rate
from train.synthesize.context import Context
from train.synthesize.item import Item, make_item
from train.synthesize.overlap import GRAM, EvaluationSets, NearDuplicates, cleaned, texts_of, words
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.run import RunOptions, run


def some_words(rng: random.Random, count: int, vocabulary: int = 10**6) -> list[str]:
    return [f"w{rng.randrange(vocabulary)}" for _ in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def disguised(text: list[str], rng: random.Random) -> str:
    """The same words with other cases, punctuation and spaces."""
    parts = (word.upper() if rng.random() < 0.3 else word for word in text)
    return "".join(part + rng.choice([" ", "  ", "\n", ", ", "_", " (", ") ", "\u3000"]) for part in parts)


def passed_through(
    texts: list[dict[str, Any]], folder: Path, options: RunOptions | None = None, **cleaning: Any
) -> Any:
    async def as_it_is(item: Item, context: Context) -> Result:
        return item

    output = Output("sft", lambda item: [{"prompt": item["q"], "completion": item["a"]}])
    made = Pipeline(
        "same",
        lambda: (make_item({**row, "number": i}) for i, row in enumerate(texts)),
        [Stage("same", as_it_is)],
        [output],
        models=(),
        measures=lambda: {"mine": 1},
    )
    summary = run(cleaned(made, **cleaning), {}, folder, options)
    return summary, [json.loads(line) for line in (folder / "sft.jsonl").open()]


def test_a_leak_is_found_and_reported_by_name(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    sets: dict[str, list[list[str]]] = {}
    for name in ("sums", "trivia"):
        sets[name] = [some_words(rng, rng.randrange(GRAM, 60)) for _ in range(30)]
        write(tmp_path / f"{name}.jsonl", [{"id": i, "question": " ".join(q)} for i, q in enumerate(sets[name])])
    rows, planted = [], []
    for number in range(200):
        text, leak = some_words(rng, 20), None
        kind = rng.choice(["clean", "short of it", "sums", "trivia", "both"])
        for name in {"clean": (), "both": ("sums", "trivia")}.get(kind, (kind,)):
            length = GRAM - (kind == "short of it")
            source = rng.choice(sets[name] if name in sets else sets["sums"])
            at = rng.randrange(len(source) - length + 1)
            text += source[at : at + length] + some_words(rng, 20)
            leak = kind if kind != "short of it" else None
        answer = f"answer {number}"
        pair = [answer, disguised(text, rng)]
        rng.shuffle(pair)
        rows.append({"q": pair[0], "a": pair[1]})
        planted.append(leak)
    options = [f"{name}={tmp_path / name}.jsonl" for name in sets]
    summary, kept = passed_through(rows, tmp_path / "run", decontaminate=options)
    clean = [row for row, leak in zip(rows, planted, strict=True) if leak is None]
    assert [(row["prompt"], row["completion"]) for row in kept] == [(row["q"], row["a"]) for row in clean]
    counts = {name: planted.count(name) for name in ("sums", "trivia", "both")}
    rejected = summary["stages"][-1]["rejected"]
    assert rejected == {
        "in the evaluation set sums": counts["sums"],
        "in the evaluation set trivia": counts["trivia"],
        "in the evaluation set sums, trivia": counts["both"],
    }
    assert summary["measures"] == {"mine": 1, "records of evaluation sets": {"sums": 30, "trivia": 30}}
    # What was not looked for is said.
    page = (tmp_path / "run" / "report.html").read_text()
    assert "not compared with evaluation sets" not in page
    assert "Near duplicates were not looked for" in page


def test_overlap_is_exactly_a_shared_run_of_13_words(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    # With two words, runs of 13 are shared now and then by chance.
    records = [some_words(rng, rng.randrange(GRAM, 40), 2) for _ in range(40)]
    sets = EvaluationSets([f"all={write(tmp_path / 'e.jsonl', [{'text': ' '.join(r)} for r in records])}"])
    grams = {tuple(r[i : i + GRAM]) for r in records for i in range(len(r) - GRAM + 1)}
    found = 0
    for _ in range(500):
        text = some_words(rng, rng.randrange(1, 60), 2)
        runs = [tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)]
        hit = sets.find([" ".join(text)])
        assert (hit is not None) == any(one in grams for one in runs)
        if hit is not None:
            found += 1
            assert tuple(hit.shared.split()) == next(one for one in runs if one in grams)
    assert 0 < found < 500


def test_a_short_record_is_known_by_its_whole_question_and_answer(tmp_path: Path) -> None:
    rows = [
        {"question": "What is the capital of France?", "answer": "Paris", "choices": ["Rome", "Paris"]},
        {"question": "Say hello.", "answer": None},
        {"question": "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f", "answer": "\u5df4\u9ece"},
        {"question": "How many are seven times six?", "answer": 42},
    ]
    sets = EvaluationSets([f"short={write(tmp_path / 's.jsonl', rows)}"])
    for texts, leaks in (
        (["what is the capital of France", "It is Paris, of course."], True),
        (["What is the capital of France?", "It is Rome."], False),
        (["What is the capital of France, my dear?", "Paris"], False),
        (["SAY HELLO!", "Good evening."], True),
        (["Say hello twice.", "Hello hello."], False),
        (["\u6cd5\u56fd \u7684\u9996\u90fd\u662f\u54ea\u91cc", "\u662f\u5df4\u9ece\u3002"], True),
        (["How many are seven times six?", "42"], True),
        (["How many are seven times six?", "421"], False),
    ):
        assert (sets.find(texts) is not None) is leaks, texts
    assert sets.find([]) is None


def test_words_are_normalised() -> None:
    assert words("A_b, C\u00c9 \uff21\uff11!  \u4f60\u597d x") == ["a", "b", "c\u00e9", "a1", "\u4f60", "\u597d", "x"]
    row = {"messages": [{"role": "system", "content": "no"}, {"role": "user", "content": "yes", "n": [1, True, None]}]}
    assert list(texts_of(row)) == ["yes", "1"]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_all_comparisons(threshold: float) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    texts: list[list[str]] = []
    for _ in range(300):
        text = some_words(rng, rng.randrange(1, 120))
        if texts and rng.random() < 0.7:
            # An earlier one with some words changed.
            text = list(rng.choice(texts))
            for at in rng.sample(range(len(text)), int(len(text) * rng.choice([0.0, 0.01, 0.05, 0.1, 0.2]))):
                text[at] = "other"
        texts.append(text)
    near, kept, missed = NearDuplicates(threshold), list[tuple[int, set[Any]]](), 0
    for number, text in enumerate(texts):
        length = min(3, len(text))
        runs = {tuple(text[i : i + length]) for i in range(len(text) - length + 1)}
        similar = {n for n, other in kept if len(runs & other) / len(runs | other) >= threshold}
        found = near.add(str(number), [" ".join(text)])
        if found is not None:
            # The similarity is exact, and never below the threshold.
            other = dict(kept)[int(found[0])]
            assert found[1] == len(runs & other) / len(runs | other) >= threshold
        else:
            missed += bool(similar)
            kept.append((number, runs))
    # Each may be missed with a probability of 0.001.
    assert missed <= 3
    assert 20 < len(kept) < 290


def test_the_first_of_near_duplicates_stays_however_the_run_is_parted(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    firsts = [some_words(rng, 60) for _ in range(30)]
    rows = [{"q": f"question {i}", "a": " ".join(text)} for i, text in enumerate(firsts)]
    for text in firsts:
        text[rng.randrange(60)] = "changed"
        rows.append({"q": "question again", "a": disguised(text, rng)})
    results = []
    for number, options in enumerate((RunOptions(64), RunOptions(7, 2))):
        summary, kept = passed_through(rows, tmp_path / str(number), options, near_duplicates=0.8)
        results.append((tmp_path / str(number) / "sft.jsonl").read_bytes())
        assert [row["prompt"] for row in kept] == [f"question {i}" for i in range(30)]
        assert summary["stages"][-1]["rejected"] == {"a near duplicate": 30}
    assert results[0] == results[1]


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "e.jsonl", [{"question": "one two"}])
    (tmp_path / "empty.jsonl").write_text('{"question": " ... "}\n')
    for given, says in (
        (path, "NAME=FILE"),
        (f"={path}", "NAME=FILE"),
        ("name=", "NAME=FILE"),
        ("name=/no/such.jsonl", "such"),
        (f"name={tmp_path / 'empty.jsonl'}", "no record with words"),
    ):
        with pytest.raises(InputError, match=says):
            EvaluationSets([given])
    for threshold in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="near_duplicates"):
            NearDuplicates(threshold)


def test_two_hundred_texts_a_second(tmp_path: Path) -> None:
    rng = random.Random(0)
    sets = EvaluationSets(
        [f"e={write(tmp_path / 'e.jsonl', [{'text': ' '.join(some_words(rng, 100))} for _ in range(500)])}"]
    )
    texts = [" ".join(some_words(rng, 300)) for _ in range(200)]

    def look(attempt: int) -> None:
        near = NearDuplicates(0.8)
        for number, text in enumerate(texts):
            assert sets.find([text]) is None
            assert near.add(str(number), [text]) is None

    assert best_rate(len(texts), look, enough=200) > 200
