"""MT-Bench: conversations of two turns that a judge rates from 1 to 10 (Zheng et al. 2023, arXiv:2306.05685)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_jax.errors import InputError
from train.data.tables import read_rows
from train.evaluate.benchmarks import judges
from train.evaluate.benchmarks.recorded import id_of, read_answers
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict

_SOURCE = "https://github.com/lm-sys/FastChat"
FILE = DataFile("mt_bench/question.jsonl", source=_SOURCE, licence="Apache-2.0")
REFERENCES = DataFile("mt_bench/reference_answer/gpt-4.jsonl", source=_SOURCE, licence="Apache-2.0")
# As published: the judge sees GPT-4's answers to questions of these categories alone.
_WITH_REFERENCE = ("math", "reasoning", "coding")
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
    version = 2
    citation = "arXiv:2306.05685"
    files = (FILE, REFERENCES)
    needs_judge = True
    metrics = (Metric("rating", scale=1.0), Metric("turn_1", scale=1.0), Metric("turn_2", scale=1.0))

    def template(self) -> str:
        """See `Task.template`."""
        return (
            f"{_TASK}\n---\n{_parts('{question}', '{answer}', '{reference}')}\n---\nthe first [[rating]], else [rating]"
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        found, references = [], read_answers(files[REFERENCES.path])
        for row in read_rows(files[FILE.path]):
            name = id_of(row.values)
            category, turns = row.values.get("category"), row.values.get("turns")
            texts = isinstance(turns, list) and len(turns) == 2 and all(isinstance(x, str) for x in turns)
            if name is None or not texts or not isinstance(category, str):
                raise InputError(f"{row.where}: expected question_id, the text category, and two texts turns.")
            reference: list[str] = []
            if category in _WITH_REFERENCE:
                reference = references.get(name, [])
                if len(reference) != 2:
                    raise InputError(
                        f"{row.where}: the judge needs the answers of GPT-4 to both turns of the question {name} "
                        f"({category}); {files[REFERENCES.path]} has {len(reference)}. Give the file of FastChat, "
                        "data/mt_bench/reference_answer/gpt-4.jsonl."
                    )
            found.append(
                Item(name, {"turns": turns, "category": category, "reference": reference}, {"category": category})
            )
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
