"""Questions with documents: files of SQuAD and HotpotQA, and the tasks `qa_1` and `qa_2` of RULER that they make."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import why_unusable
from train.evaluate.tasks import Sample, Source, Task, make_sample, room_left

# Tokens of an answer, as in RULER.
_NEW_TOKENS = 32
_BEFORE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n"
)
_AFTER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: "
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
      text: of it.
      answers: each of them is right.
      documents: indices of those that it is answered from, or that must be in the context beside these.
      near: indices of documents of the same article, which are the first distractors.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Questions:
    """A file of questions.

    Attributes:
      task: "qa_1" for the form of SQuAD, "qa_2" for that of HotpotQA.
      questions: in the order of the file.
      documents: distinct texts.
      name: of the file, for errors.
    """

    task: str
    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    name: str


def read_questions(path: Path) -> Questions:
    """Reads a JSON file in the form of SQuAD (1.1 or 2.0) or of HotpotQA (distractor setting), which tells the task.

    Raises:
      InputError: the file cannot be read, has another form, or has no question that has an answer.
    """
    problem = why_unusable(path)
    if problem:
        raise InputError(problem)
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    documents: dict[str, int] = {}
    try:
        squad = isinstance(value, dict)
        found = list(_squad(value, documents) if squad else _hotpot(value, documents))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} is neither in the form of SQuAD (an object with data, paragraphs, context, qas) nor of HotpotQA "
            f"(a list with question, answer, context): {type(error).__name__} {error}."
        ) from None
    if not found:
        raise InputError(f"{path} has no question with an answer. Give a file in the form of SQuAD or HotpotQA.")
    return Questions("qa_1" if squad else "qa_2", tuple(found), tuple(documents), str(path))


def _squad(value: Mapping[str, Any], documents: dict[str, int]) -> Iterator[Question]:
    for article in value["data"]:
        places = [documents.setdefault(p["context"].strip(), len(documents)) for p in article["paragraphs"]]
        for place, paragraph in zip(places, article["paragraphs"], strict=True):
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible", False):
                    near = tuple(dict.fromkeys(other for other in places if other != place))
                    yield Question(asked["question"].strip(), answers, (place,), near)


def _hotpot(value: Sequence[Mapping[str, Any]], documents: dict[str, int]) -> Iterator[Question]:
    for asked in value:
        texts = [f"{title}\n{''.join(sentences)}".strip() for title, sentences in asked["context"]]
        places = tuple(dict.fromkeys(documents.setdefault(text, len(documents)) for text in texts))
        yield Question(asked["question"].strip(), (asked["answer"],), places)


def questions_of(task: str) -> Task:
    """RULER's task that asks the questions of a file; its arguments are those of `train.evaluate.tasks.passkey`.

    The documents of the question stand at random places among distractors: first those of its article, then others of
    the file. Distractors come again where the file has too few, and one is cut so that the length is exact. The depth
    has no effect.

    Args:
      task: "qa_1" or "qa_2".

    Source: RULER (arXiv:2404.06654), section 3.4.
    """

    def make(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
        if task not in source.questions:
            form = "SQuAD" if task == "qa_1" else "HotpotQA"
            raise InputError(f"The task {task} needs a file of questions in the form of {form}. Give --qa FILE.")
        asked = source.questions[task]
        question = asked.questions[int(rng.integers(len(asked.questions)))]
        encoder = source.encoder
        frame = encoder.frame(_BEFORE, f"{_AFTER}{question.text}", " Answer:")
        gap = encoder.ids("\n\n")
        bodies = {i: encoder.ids(asked.documents[i] + "\n\n") for i in question.documents}

        def head(number: int) -> int:
            return len(encoder.ids(f"Document {number}:\n"))

        fixed = sum(map(len, bodies.values())) + sum(head(i + 1) for i in range(len(bodies)))
        room = room_left(task, length, _NEW_TOKENS, frame, fixed)
        # Distractors, until they fill the room; the last one is cut.
        chosen = list(bodies.values())
        for body in _distractors(asked, question, rng, encoder.ids):
            left = room - head(len(chosen) + 1)
            # Less than a head and a word: the cut document before it is the last.
            if left <= len(gap):
                break
            if len(body) > left:
                body = np.concatenate([body[: left - len(gap)], gap])
            chosen.append(body)
            room -= head(len(chosen)) + len(body)
        order = rng.permutation(len(chosen)).tolist()
        parts = [part for n, i in enumerate(order, 1) for part in (encoder.ids(f"Document {n}:\n"), chosen[i])]
        # What is too short for a document is noise before the first one.
        pad = source.noise.filler(rng, room).ids
        context = np.concatenate([pad, *parts])
        return make_sample(frame, context, question.answers, _NEW_TOKENS, "any")

    return make


def _distractors(asked: Questions, question: Question, rng: np.random.Generator, encode: Any) -> Iterator[np.ndarray]:
    """The ids of documents that do not answer the question, without end: near ones, then all others, then again."""
    own = {*question.documents}
    near = [i for i in question.near if i not in own]
    for i in rng.permutation(near).tolist() if near else []:
        yield encode(asked.documents[i] + "\n\n")
    known = {*own, *near}
    others = [i for i in range(len(asked.documents)) if i not in known]
    again = [*near, *others]
    for i in rng.permutation(others).tolist() if others else []:
        yield encode(asked.documents[i] + "\n\n")
    while again:
        for i in rng.permutation(again).tolist():
            yield encode(asked.documents[i] + "\n\n")
