"""GSM8K: problems of school mathematics whose answer is a number (Cobbe et al. 2021, arXiv:2110.14168)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_jax.errors import InputError
from train.evaluate.benchmarks.lines import read_records
from train.evaluate.task import DataFile, Generate, Item, Metric, Request, Response, Task, Tools, Verdict

_SOURCE = "https://github.com/openai/grade-school-math"
TEST = DataFile("gsm8k/test.jsonl", source=_SOURCE, licence="MIT")
TRAIN = DataFile("gsm8k/train.jsonl", source=_SOURCE, licence="MIT")
_EXTRACTION = "The answer is the number after the last 'The answer is', else the last number of the text."
_ASK = "{question}\nReason step by step. End with: The answer is NUMBER."
# A number as people write it: a sign that is no minus after a digit, groups of thousands, decimals.
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = re.compile(r"[Tt]he (?:final )?answer is\b")
# Annotations of the data set, such as <<48/2=24>>.
_CALCULATION = re.compile(r"<<[^<>]*>>")


class Gsm8k(Task):
    """The score is whether the number equals that of the solution."""

    citation = "arXiv:2110.14168"
    metrics = (Metric("accuracy"),)

    def __init__(self, name: str, shots: int):
        """
        Args:
          name: of the task.
          shots: solved examples before the question, the first ones of the training set; 0 asks in a conversation.
        """
        self.name, self.shots = name, shots
        self.files = (TEST, TRAIN) if shots else (TEST,)

    def template(self) -> str:
        """See `Task.template`."""
        form = "Question: {question}\nAnswer: {solution}\n\n" * self.shots + "Question: {question}\nAnswer:"
        return (form if self.shots else _ASK) + "\n" + _EXTRACTION

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        examples = ""
        if self.shots:
            solved = _read(files[TRAIN.path])
            if len(solved) < self.shots:
                raise InputError(f"{files[TRAIN.path]} has {len(solved)} examples, expected at least {self.shots}.")
            examples = "".join(f"{_text(one)} {_solution(one)}\n\n" for one in solved[: self.shots])
        found = []
        for i, one in enumerate(_read(files[TEST.path])):
            fields = {"question": one["question"], "prompt": examples + _text(one), "answer": number(_final(one))}
            if fields["answer"] is None:
                raise InputError(f"{files[TEST.path]}, line {i + 1}: expected a solution that ends in '#### NUMBER'.")
            found.append(Item(str(i), fields))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        """See `Task.requests`."""
        if rounds:
            return ()
        if self.shots:
            return (Generate(item.fields["prompt"], 512, ("\nQuestion:", "\n\nQuestion", "\n\n\n")),)
        message = {"role": "user", "content": _ASK.format(question=item.fields["question"])}
        return (Generate((message,), 2048),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        verdicts = []
        for item, rounds in zip(items, responses, strict=True):
            found = answer(rounds[0][0].text)
            expected = item.fields["answer"]
            right = found is not None and abs(float(found) - float(expected)) < 1e-6 * max(1, abs(float(expected)))
            verdicts.append(Verdict({"accuracy": float(right)}, {"found": found, "expected": expected}))
        return verdicts


def answer(text: str) -> str | None:
    """The number that a text gives as its answer, or None."""
    marks = list(_MARK.finditer(text))
    after = number(text[marks[-1].end() :], first=True) if marks else None
    return after if after is not None else number(text)


def number(text: str, first: bool = False) -> str | None:
    """The last or the first number of a text, without groups of thousands; None if there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[0 if first else -1].replace(",", "").rstrip(".") if numbers else None


def _text(one: Mapping[str, str]) -> str:
    return f"Question: {one['question']}\nAnswer:"


def _solution(one: Mapping[str, str]) -> str:
    """The solution without annotations, in the words that the answer is found by."""
    reasons, _, final = _CALCULATION.sub("", one["answer"]).rpartition("####")
    return f"{reasons.strip()} The answer is {final.strip()}."


def _final(one: Mapping[str, str]) -> str:
    return one["answer"].rpartition("####")[2] if "####" in one["answer"] else ""


def _read(path: Path) -> list[dict[str, str]]:
    return [record for _, record in read_records(path, {"question": str, "answer": str})]


TASKS = (Gsm8k("gsm8k", 4), Gsm8k("gsm8k_chat", 0))
