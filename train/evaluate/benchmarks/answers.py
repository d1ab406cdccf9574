"""Benchmarks whose answer is one short value at the end of a text, such as a number or an expression."""

from collections.abc import Sequence
from typing import Any

from train.evaluate.task import Generate, Item, Message, Metric, Request, Response, Task, Tools, Verdict

MARKERS = ("The final answer is", "The answer is")

CUT = (
    "An answer that was cut is read as it stands; it is wrong where it has no final answer, and counted as cut in the "
    "details."
)
"""The rule for answers that reached `max_tokens`."""


class AnswerTask(Task):
    """A benchmark with one answer to each item and one metric, the accuracy. Subclasses write `items` and `judge`.

    Items have the fields `question` and `answer`. An answer that was cut is read as it stands; see `CUT`.

    Attributes:
      ask: what a chat model is asked, with {question}.
      form: of a question and its solution in a prompt for base models, with {question}; the solution follows.
      examples: questions with solutions, which precede the question of a base model.
      rules: of extraction and comparison, for people; a part of the template.
    """

    metrics = (Metric("accuracy"),)
    ask: str = ""
    form: str = ""
    examples: Sequence[tuple[str, str]] = ()
    rules: str = ""
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()

    def __init__(self, name: str, chat: bool = False):
        """
        Args:
          name: of the task.
          chat: whether a chat model is asked, without examples.
        """
        self.name, self.chat = name, chat
        self.shots = 0 if chat else len(self.examples)

    def template(self) -> str:
        asked = self.ask if self.chat else self._shown("{question}")
        stop = f"stop: {[] if self.chat else list(self.stop)!r}, max_tokens: {self.max_tokens}, greedy"
        return f"{asked}\n---\n{stop}\n{self.rules}\n{CUT}"

    def judge(self, items: Sequence[Item], answers: Sequence[str], tools: Tools) -> Sequence[tuple[float | None, Any]]:
        """The score of each answer and what was read as its final answer. None is no verdict."""
        raise NotImplementedError

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        if rounds:
            return ()
        question = item.fields["question"]
        if self.chat:
            message: Message = {"role": "user", "content": self.ask.replace("{question}", question)}
            return (Generate((message,), self.max_tokens),)
        return (Generate(self._shown(question), self.max_tokens, self.stop),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        answers = [rounds[0][0] for rounds in responses]
        there = [i for i, answer in enumerate(answers) if answer.error is None]
        judged = dict(
            zip(there, self.judge([items[i] for i in there], [answers[i].text for i in there], tools), strict=True)
        )
        verdicts = []
        for i, answer in enumerate(answers):
            score, found = judged.get(i, (None, None))
            details = {"answer": found, "expected": items[i].fields["answer"]}
            if answer.finish == "length":
                details["cut"] = 1
            problem = None
            if score is None:
                problem = answer.error or "the answer could not be compared"
            verdicts.append(Verdict({"accuracy": score}, details, problem))
        return verdicts

    def _shown(self, question: str) -> str:
        shown = [self.form.replace("{question}", asked) + solution + "\n\n" for asked, solution in self.examples]
        return "".join([*shown, self.form.replace("{question}", question)])
