"""M3Exam: questions of school exams in nine languages, at three levels, with labelled options."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.benchmarks.lines import read_records, texts
from train.evaluate.task import (
    DataFile,
    Generate,
    Item,
    Loglikelihood,
    Metric,
    Request,
    Response,
    Task,
    Tools,
    Verdict,
)
from train.rewards.text import answer_span

# The words before a question and before its answer.
_LANGUAGES = {
    "english": ("Question", "Answer"),
    "chinese": ("题目", "答案"),
    "italian": ("Domanda", "Risposta"),
    "portuguese": ("Pergunta", "Resposta"),
    "vietnamese": ("Câu hỏi", "Trả lời"),
    "thai": ("คำถาม", "คำตอบ"),
    "swahili": ("Swali", "Jibu"),
    "afrikaans": ("Vraag", "Antwoord"),
    "javanese": ("Pitakon", "Wangsulan"),
}
# Latin letters, digits, and the letters and digits of Thai, before a mark or alone.
_LABEL = re.compile(r"\s*[(\[]?\s*([A-Za-z]|[1-9]|[\u0e51-\u0e55]|[\u0e01-\u0e07])\s*(?:[)\].:\u3001\uff0e\uff1a]|$)")
_SHOTS = 5
_MARKERS = ("Answer:",)


class M3Exam(Task):
    """M3Exam in one language; questions with images are left out, as for models of text.

    Base models choose the label with the highest log-probability after five solved questions of the development file,
    of the same level and subject where there are as many. Chat models are asked for the label without examples.
    """

    metrics = (Metric("accuracy"),)
    citation = "Zhang et al. 2023, M3Exam, arXiv:2306.05179"
    max_tokens = 1024

    def __init__(self, language: str, chat: bool = False):
        """
        Args:
          language: as in the names of the files, such as "thai".
          chat: whether a chat model is asked.
        """
        self.name = f"m3exam_{language}{'_instruct' if chat else ''}"
        self._language, self._chat = language, chat
        self.shots = 0 if chat else _SHOTS
        parts = ("test",) if chat else ("test", "dev")
        self.files = tuple(
            DataFile(
                f"m3exam/{language}-questions-{part}.json",
                source=f"github.com/DAMO-NLP-SG/M3Exam: text-questions/{language}-questions-{part}.json",
                licence="",
            )
            for part in parts
        )

    def template(self) -> str:
        question, answer = _LANGUAGES[self._language]
        if self._chat:
            return (
                "{background}\n{question}\n{options}\n\n"
                + _asked("{labels}")
                + f"\n---\nmax_tokens: {self.max_tokens}, "
                "greedy\nanswer: the label after the last 'Answer:', in the last \\boxed{}, or the whole answer if "
                "that is a label alone; none is wrong; an answer that was cut is read as it stands"
            )
        return (
            f"{_SHOTS} times: {question}: {{background}}\\n{{question}}\\n{{options}}\\n{answer}: {{label}}\\n\\n\n"
            "label: the option with the highest log-probability of a space and its label; the first of equals"
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        items = self._read(files[self.files[0].path])
        if self._chat:
            return items
        dev = self._read(files[self.files[1].path])
        found = []
        for item in items:
            # First those of the level and the subject; Python's sort keeps the order of the file among equals.
            nearest = sorted(
                (shot for shot in dev if shot.fields["answer"] in shot.fields["labels"]),
                key=lambda shot: (
                    shot.groups["level"] != item.groups["level"],
                    shot.groups.get("subject") != item.groups.get("subject"),
                ),
            )
            shots = "".join(f"{self._shown(shot)} {shot.fields['answer']}\n\n" for shot in nearest[:_SHOTS])
            found.append(Item(item.id, {**item.fields, "shots": shots}, item.groups))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        if rounds:
            return ()
        labels = item.fields["labels"]
        if self._chat:
            content = f"{item.fields['question']}\n\n{_asked(', '.join(labels))}"
            return (Generate(({"role": "user", "content": content},), self.max_tokens),)
        context = item.fields["shots"] + self._shown(item)
        return tuple(Loglikelihood(context, f" {label}") for label in labels)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        return [self._verdict(item, rounds[0]) for item, rounds in zip(items, responses, strict=True)]

    def _verdict(self, item: Item, answers: Sequence[Response]) -> Verdict:
        labels, expected = item.fields["labels"], item.fields["answer"]
        details: dict[str, Any] = {"expected": expected}
        problem = next((answer.error for answer in answers if answer.error is not None), None)
        if problem is None and expected not in labels:
            problem = f"the file's answer {expected!r} is none of its options"
        if problem is None and not self._chat and any(answer.logprob is None for answer in answers):
            problem = "there is no log-probability"
        if problem is not None:
            return Verdict({"accuracy": None}, details, problem)
        if self._chat:
            found = label_in(answers[0].text, labels)
            if answers[0].finish == "length":
                details["cut"] = 1
        else:
            logprobs = [float(answer.logprob or 0.0) for answer in answers]
            found = labels[logprobs.index(max(logprobs))]
            details["logprobs"] = dict(zip(labels, logprobs, strict=True))
        return Verdict({"accuracy": float(found == expected)}, {**details, "answer": found})

    def _shown(self, item: Item) -> str:
        question, answer = _LANGUAGES[self._language]
        return f"{question}: {item.fields['question']}\n{answer}:"

    def _read(self, path: Path) -> list[Item]:
        kinds: dict[str, type | tuple[type, ...]] = {
            "question_text": str,
            "answer_text": (str, int),
            "options": list,
            "need_image": str,
            "level": str,
        }
        found = []
        for number, (where, record) in enumerate(read_records(path, kinds), 1):
            if record["need_image"].strip().lower() != "no":
                continue
            options = texts(where, record, "options")
            labels = []
            for option in options:
                match = _LABEL.match(option)
                if match is None:
                    raise InputError(
                        f"{where}: an option must begin with its label, as in 'A. x', found {option!r:.60}."
                    )
                labels.append(match[1])
            if len(labels) < 2 or len(set(labels)) < len(labels):
                raise InputError(
                    f"{where}: expected options with different labels, found {', '.join(labels) or 'none'}."
                )
            background = record.get("background_description") or []
            background = [background] if isinstance(background, str) else background
            if not isinstance(background, list) or not all(isinstance(text, str) for text in background):
                raise InputError(f"{where}: the field background_description must be a list of texts.")
            parts = [*background, record["question_text"], *options]
            fields = {
                "question": "\n".join(part.strip() for part in parts if part.strip()),
                "labels": labels,
                "answer": str(record["answer_text"]).strip().strip("().[]").strip(),
            }
            groups = {"level": record["level"]}
            if isinstance(record.get("subject_category"), str):
                groups["subject"] = record["subject_category"]
            found.append(Item(f"{self._language}/{number}", fields, groups))
        if not found:
            raise InputError(f"{path}: expected questions without images; the file has none.")
        return found


def label_in(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives; None if it gives none of the labels.

    Args:
      answer: of a chat model.
      labels: of the question.
    """
    span = answer_span(answer, _MARKERS)
    if span is None:
        span = answer.strip().removesuffix(".")
        if len(span) > 4:
            return None
    match = re.match(r"[\s(\[*]*([^\W_]+)", span)
    by_lower = {label.lower(): label for label in labels}
    return None if match is None else by_lower.get(match[1].lower())


def _asked(labels: str) -> str:
    return f"Choose one option: {labels}. Finish with one line of the form: Answer: LABEL"


TASKS = tuple(M3Exam(language, chat) for chat in (False, True) for language in _LANGUAGES)
