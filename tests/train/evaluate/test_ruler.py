"""RULER's thirteen tasks: an oracle solves each from the prompt's text alone, and fails where the needle is gone."""

import collections
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.runs import print_seed
from train.evaluate import words
from train.evaluate.questions import read_questions
from train.evaluate.ruler import RULER
from train.evaluate.score import score
from train.evaluate.tasks import Sample, Source
from train.evaluate.text import NOISE, Encoder

BOOK = (
    "It was late in the year. Nobody had seen the old captain for days! Where was he? Perhaps in the harbor.\n"
    "He had promised to return before the storm, and he always kept his word. The letters said nothing.\n\n"
) * 40
PEOPLE = words.pairs(np.random.default_rng(3), 60)


def colour(i: int) -> str:
    return words.pairs(np.random.default_rng(i), 1)[0]


def squad() -> dict[str, Any]:
    """Invented questions in the form of SQuAD 2.0: one fact a paragraph, some paragraphs an article."""
    paragraphs = [
        {
            "context": f"The lantern of {name} is old. The colour of the lantern of {name} is {colour(i)}. So it is.",
            "qas": [
                {
                    "question": f"What is the colour of the lantern of {name}?",
                    "answers": [{"text": colour(i), "answer_start": 0}, {"text": f"{colour(i)} light"}],
                    "is_impossible": False,
                },
                {"question": "What is not said?", "answers": [], "is_impossible": True},
            ],
        }
        for i, name in enumerate(PEOPLE)
    ]
    return {"data": [{"title": str(i), "paragraphs": paragraphs[i : i + 4]} for i in range(0, 60, 4)]}


def hotpot() -> list[dict[str, Any]]:
    """Invented questions in the form of HotpotQA: two documents lead to an answer, two others do not."""
    return [
        {
            "question": f"Which river flows through the town of {name}?",
            "answer": colour(i),
            "context": [
                [name, [f"{name} is a person.", f" The town of {name} is Town{i}x."]],
                [f"Town{i}x", [f"The river of Town{i}x is the {colour(i)}."]],
                [f"Town{i}y", [f"The river of Town{i}y is the {colour(1000 + i)}."]],
            ],
            "supporting_facts": [],
        }
        for i, name in enumerate(PEOPLE)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "One of the special magic numbers is: 12 mentioned in the provided text. VAR Document given documents."
    return train_bpe([BOOK, NOISE * 5, text * 3, json.dumps(squad())], 900)


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("questions")
    (folder / "squad.json").write_text(json.dumps(squad()))
    (folder / "hotpot.json").write_text(json.dumps(hotpot()))
    found = [read_questions(folder / name) for name in ("squad.json", "hotpot.json")]
    assert [of.task for of in found] == ["qa_1", "qa_2"]
    return Source.of(Encoder(tokenizer), BOOK, questions={of.task: of for of in found})


# --- oracles: from the text to an answer ---


def find_needles(text: str) -> str:
    asked = re.findall(
        r"\nWhat (?:is|are all) the special magic \w+ for ([^?]*) mentioned in the provided text\?", text
    )[-1]
    keys = re.split(r", (?:and )?", asked)
    return ", ".join(value for key in keys for value in re.findall(rf"magic \w+s for {key} is: ([\w-]+)\.", text))


def follow_variables(text: str) -> str:
    value = re.findall(r"assigned the value (\d+) in the text above", text)[-1]
    chain = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text))

    def ends_in_value(name: str) -> bool:
        while name in chain:
            name = chain[name]
        return name == value

    return " ".join(name for name in chain if ends_in_value(name))


def count_words(text: str) -> str:
    listed = text.split("appear most often.\n")[-1].split("\nQuestion:")[0]
    counted = collections.Counter(re.findall(r"\d+\. ([a-z-]+)", listed))
    return " ".join(word for word, _ in counted.most_common(10))


def count_codes(text: str) -> str:
    coded = text.split("frequently appeared coded words.")[1].split("\nQuestion:")[0]
    return " ".join(word for word, _ in collections.Counter(re.findall(r"\b[a-z]{6}\b", coded)).most_common(3))


def read_squad(text: str) -> str:
    asked = re.findall(r"Question: What is (the colour of the lantern of [\w-]+)\?", text)[-1]
    found = re.search(rf"T{asked[1:]} is ([\w-]+)\.", text)
    return found[1] if found else "nothing"


def read_hotpot(text: str) -> str:
    name = re.findall(r"Question: Which river flows through the town of ([\w-]+)\?", text)[-1]
    town = re.search(rf"The town of {name} is (\w+)\.", text)
    river = re.search(rf"The river of {town[1]} is the ([\w-]+)\.", text) if town else None
    return river[1] if river else "nothing"


ORACLES: dict[str, Callable[[str], str]] = {
    **{name: find_needles for name in RULER if name.startswith("niah_")},
    "vt": follow_variables,
    "cwe": count_words,
    "fwe": count_codes,
    "qa_1": read_squad,
    "qa_2": read_hotpot,
}


def without_needle(task: str, text: str, reference: str) -> str:
    """The prompt without what states a reference."""
    if task == "cwe":
        return re.sub(rf"\d+\. {reference}(?=[ \n])", "", text)
    if task == "fwe":
        return re.sub(rf"\b{reference}\b", "", text)
    if task == "vt":
        return re.sub(rf" VAR {reference} = [^.]*\.", "", text)
    return re.sub(rf"[^.?!\n]*\b{reference}\.", "", text)


def make(source: Source, task: str, length: int, rng: np.random.Generator) -> tuple[Sample, str]:
    sample = RULER[task](source, length, float(rng.uniform(0, 100)), rng)
    return sample, source.encoder.tokenizer.decode(sample.prompt.tolist())


def test_there_are_thirteen() -> None:
    assert len(RULER) == 13
    assert set(ORACLES) == set(RULER)


@pytest.mark.parametrize("task", RULER)
def test_an_oracle_solves_the_task_from_the_text_alone(source: Source, task: str) -> None:
    """Every reference follows from the text; and none does once its needle is removed."""
    rng = print_seed()
    for length in (3000, 6000):
        sample, text = make(source, task, length, rng)
        assert len(sample.prompt) + sample.new_tokens == length
        answer = ORACLES[task](text)
        assert score(sample.metric, answer, sample.references) == 1.0, answer
        for reference in sample.references[:1] if sample.metric == "any" else sample.references:
            cut = without_needle(task, text, reference)
            assert cut != text
            # As a word: "lean" is also in the answer "clean".
            assert reference not in re.findall(r"[\w-]+", ORACLES[task](cut))


@pytest.mark.parametrize("task", [name for name in RULER if name.startswith("niah_")])
def test_each_value_is_there_once(source: Source, task: str) -> None:
    """A model cannot find a value without looking at its needle; the prompt has as many needles as RULER says."""
    rng = print_seed()
    sample, text = make(source, task, 4000, rng)
    assert [text.count(reference) for reference in sample.references] == [1] * len(sample.references)
    needles = len(re.findall("One of the special magic", text))
    if not task.startswith(("niah_multikey_2", "niah_multikey_3")):
        assert needles == {"niah_single": 1}.get(task[:11], 4)
    assert len(sample.references) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
    kind = "uuid" if task in ("niah_single_3", "niah_multikey_3") else "number"
    plural = "s" if len(sample.references) > 1 else ""
    assert f"memorize it. I will quiz you about the {kind}{plural} afterwards." in text
    assert text.endswith(" are" if plural else " is")


def test_variables_are_in_order_and_words_have_the_published_counts(source: Source) -> None:
    rng = print_seed()
    sample, text = make(source, "vt", 3000, rng)
    order = [text.index(f"VAR {name} = ") for name in sample.references]
    assert order == sorted(order)
    assert [text.count(name) for name in sample.references] == [2, 2, 2, 2, 1]
    for length, often, seldom in ((3000, 6, 1), (16_000, 30, 3)):
        sample, text = make(source, "cwe", length, rng)
        listed = re.findall(r"\d+\. ([a-z-]+)", text.split("\n\n")[1])
        counts = collections.Counter(listed).most_common()
        assert {word for word, _ in counts[:10]} == {*sample.references}
        assert {count for _, count in counts} == {often, seldom}
        assert not any(key in word for key in sample.references for word in {*listed} - {key})
        assert [int(n) for n in re.findall(r"(\d+)\. ", text.split("\n\n")[1])] == list(range(1, len(listed) + 1))


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_documents_are_numbered_and_those_of_the_question_are_whole(source: Source, task: str) -> None:
    """Documents count from 1; those that answer are there once and whole; at most one distractor is cut."""
    rng = print_seed()
    for length in (1000, 5000, 20_000):
        sample, text = make(source, task, length, rng)
        numbers = [int(n) for n in re.findall(r"(?:^|\n\n|[.a-z ])Document (\d+):\n", text)]
        assert numbers == list(range(1, len(numbers) + 1))
        asked = source.questions[task]
        question = next(q for q in asked.questions if f"Question: {q.text} Answer:" in text)
        assert question.answers == sample.references
        for i in question.documents:
            assert text.count(f":\n{asked.documents[i]}\n\n") == 1
        shown = re.split(r"Document \d+:\n", text.split("documents.\n\n")[1].split("Answer the question")[0])[1:]
        assert sum(part.removesuffix("\n\n") not in asked.documents for part in shown) <= 1
        if task == "qa_1" and length == 1000:
            # The article's own documents are the first distractors.
            near = {asked.documents[i] for i in question.near}
            assert near & {part.removesuffix("\n\n") for part in shown}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', "neither in the form of SQuAD"),
        ('[{"question": "a", "answer": "b"}]', "nor of HotpotQA"),
        ('{"data": []}', "no question with an answer"),
    ],
)
def test_a_file_of_another_form_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "q.json")


def test_questions_need_their_file(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"qa_2 needs a file of questions in the form of HotpotQA\. Give --qa"):
        RULER["qa_2"](Source.of(Encoder(tokenizer)), 3000, 50, np.random.default_rng(0))


@pytest.mark.parametrize(("task", "length"), [("niah_multikey_1", 2**20), ("niah_multikey_2", 2**17), ("qa_1", 2**17)])
def test_long_prompts_take_seconds_and_little_memory(source: Source, task: str, length: int) -> None:
    """A million tokens are made in seconds, and an eighth where all is encoded anew in an eighth of that. The memory is
    that of a few copies of the ids."""
    started = time.process_time()
    sample = RULER[task](source, length, 50.0, np.random.default_rng(0))
    seconds = time.process_time() - started
    assert len(sample.prompt) + sample.new_tokens == length
    assert seconds < 30 * length / 2**20 + (1 if length < 2**20 else 0)
    # Memory is measured on a part: tracing it makes everything slow.
    tracemalloc.start()
    try:
        RULER[task](source, length // 8, 50.0, np.random.default_rng(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * length // 8
