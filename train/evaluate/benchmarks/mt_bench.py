"""MT-Bench: conversations of two turns that a judge rates from 1 to 10 (Zheng et al. 2023, arXiv:2306.05685)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.tables import read_rows
from train.evaluate.benchmarks import judges
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict

FILE = DataFile("mt_bench/question.jsonl", source="https://github.com/lm-sys/FastChat", licence="Apache-2.0")
# As published; other categories are greedy.
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_TASK = (
    "You are a fair judge of an assistant's answers. Rate the assistant's last answer in the conversation below. "
    "Consider whether it is helpful, correct, relevant, deep and clear. Longer is not better by itself. Explain your "
    "judgement briefly first. Then give a rating from 1 to 10 in this form: [[rating]], such as [[5]]."
)


class MTBench(Task):
    """The mean rating of both turns, and that of each."""

    name = "mt_bench"
    citation = "arXiv:2306.05685"
    files = (FILE,)
    needs_judge = True
    metrics = (Metric("rating", scale=1.0), Metric("turn_1", scale=1.0), Metric("turn_2", scale=1.0))

    def template(self) -> str:
        """See `Task.template`."""
        return (
            f"{_TASK}\n---\n{_parts('{question}', '{answer}', '{reference}')}\n---\nthe first [[rating]], else [rating]"
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        found = []
        for row in read_rows(files[FILE.path]):
            one: dict[str, Any] = {name: row.values.get(name) for name in ("question_id", "category", "turns")}
            one["reference"] = row.values.get("reference") or []
            texts = all(
                isinstance(of, list) and all(isinstance(x, str) for x in of) for of in (one["turns"], one["reference"])
            )
            if (
                not texts
                or len(one["turns"]) != 2
                or one["question_id"] is None
                or not isinstance(one["category"], str)
            ):
                raise InputError(f"{row.where}: expected question_id, category, two texts turns, and texts reference.")
            found.append(Item(str(one.pop("question_id")), one, {"category": one["category"]}))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Generate]:
        """See `Task.requests`."""
        turns = item.fields["turns"]
        if len(rounds) == len(turns):
            return ()
        messages = []
        for turn, (response,) in zip(turns, rounds, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": response.text}]
        messages.append({"role": "user", "content": turns[len(rounds)]})
        temperature = _TEMPERATURES.get(item.fields["category"], 0.0)
        return (Generate(tuple(messages), 1024, temperature=temperature),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        prompts = []
        for item, rounds in zip(items, responses, strict=True):
            references = [*item.fields["reference"], "", ""]
            parts = [
                _parts(turn, response.text, reference)
                for turn, (response,), reference in zip(item.fields["turns"], rounds, references, strict=False)
            ]
            prompts += ["\n\n".join([_TASK, *parts[:count]]) for count in (1, 2)]
        answers = judges.ask(tools, prompts)
        verdicts = []
        for first, second in zip(answers[::2], answers[1::2], strict=True):
            (one, why), (two, why_2) = judges.rating(first), judges.rating(second)
            both = None if one is None or two is None else (one + two) / 2
            scores = {"rating": both, "turn_1": one, "turn_2": two}
            verdicts.append(Verdict(scores, {"judge": [first.text, second.text]}, why or why_2))
        return verdicts


def _parts(question: str, answer: str, reference: str) -> str:
    known = f"<right_answer>\n{reference}\n</right_answer>\n" if reference else ""
    return f"<question>\n{question}\n</question>\n{known}<answer>\n{answer}\n</answer>"


TASKS = (MTBench(),)
