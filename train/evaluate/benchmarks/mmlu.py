"""MMLU: questions of 57 subjects with four answers (Hendrycks et al. 2021, arXiv:2009.03300)."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_jax.errors import InputError
from train.evaluate.task import DataFile, Item, Loglikelihood, Metric, Request, Response, Task, Tools, Verdict

_SOURCE = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
_LETTERS = "ABCD"
_HEAD = "The following are multiple choice questions (with answers) about {subject}.\n\n"
_QUESTION = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"


class Mmlu(Task):
    """The answer is the letter with the largest log-probability after the question and solved examples."""

    name = "mmlu"
    citation = "arXiv:2009.03300"
    shots = 5
    metrics = (Metric("accuracy"),)
    files = (
        DataFile("mmlu/dev.csv", source=_SOURCE, licence="MIT"),
        DataFile("mmlu/test.csv", source=_SOURCE, licence="MIT"),
    )

    def template(self) -> str:
        """See `Task.template`."""
        return _HEAD + (_QUESTION + " {answer}\n\n") * self.shots + _QUESTION + "\n' A', ' B', ' C' or ' D'"

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """Reads both files: subject, question, four answers and the letter of the right one, without a header."""
        solved: dict[str, list[list[str]]] = {}
        for row in _read(files["mmlu/dev.csv"]):
            solved.setdefault(row[0], []).append(row)
        found = []
        for i, row in enumerate(_read(files["mmlu/test.csv"])):
            subject = row[0]
            examples = solved.get(subject, [])[: self.shots]
            if len(examples) < self.shots:
                raise InputError(
                    f"{files['mmlu/dev.csv']} has {len(examples)} examples of {subject}, expected {self.shots}."
                )
            head = _HEAD.format(subject=subject.replace("_", " "))
            prompt = head + "".join(f"{_asked(one)} {one[6]}\n\n" for one in examples) + _asked(row)
            found.append(Item(str(i), {"prompt": prompt, "answer": row[6]}, {"subject": subject}))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        """See `Task.requests`."""
        return () if rounds else [Loglikelihood(item.fields["prompt"], f" {letter}") for letter in _LETTERS]

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        verdicts = []
        for item, rounds in zip(items, responses, strict=True):
            values = [response.logprob for response in rounds[0] if response.logprob is not None]
            if len(values) < len(_LETTERS):
                verdicts.append(Verdict({"accuracy": None}, problem="no log-probability"))
                continue
            found = _LETTERS[values.index(max(values))]
            right = float(found == item.fields["answer"])
            verdicts.append(Verdict({"accuracy": right}, {"found": found, "expected": item.fields["answer"]}))
        return verdicts


def _asked(row: Sequence[str]) -> str:
    return _QUESTION.format(question=row[1].strip(), **dict(zip(_LETTERS, row[2:6], strict=True)))


def _read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    for i, row in enumerate(rows):
        if len(row) != 7 or row[6] not in _LETTERS or not row[6]:
            raise InputError(
                f"{path}, row {i + 1}: expected subject, question, four answers, and A, B, C or D; got {len(row)} "
                f"fields{f' and {row[6]!r}' if len(row) == 7 else ''}."
            )
    return rows


TASKS = (Mmlu(),)
