"""MATH, MATH-500 and MGSM: problems of mathematics, whose answers math-verify or a number decides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax.errors import InputError
from train.evaluate.benchmarks.answers import MARKERS, AnswerTask
from train.evaluate.benchmarks.lines import Ids, read_records, read_text
from train.evaluate.benchmarks.numbers import value_of
from train.evaluate.task import DataFile, Item, Tools
from train.rewards.text import answer_span, last_box

if TYPE_CHECKING:
    from train.rewards.math import MathReward

# Made here, in the way of MATH's own problems.
_EXAMPLES = (
    (
        "Find the sum of all positive integers $n$ for which $n^2 - 7n + 10 < 0$.",
        "We factor: $n^2 - 7n + 10 = (n-2)(n-5)$. It is negative exactly for $2 < n < 5$, so $n = 3$ or $n = 4$. "
        "Their sum is $3 + 4 = 7$. The final answer is $\\boxed{7}$.",
    ),
    (
        "A bag holds 3 red and 5 blue balls. Two balls are drawn without replacement. What is the probability that "
        "they have different colours?",
        "There are $\\binom{8}{2} = 28$ pairs, of which $3 \\cdot 5 = 15$ have different colours. The probability is "
        "$\\frac{15}{28}$. The final answer is $\\boxed{\\frac{15}{28}}$.",
    ),
    (
        "The legs of a right triangle have lengths $\\sqrt{5}$ and $\\sqrt{11}$. What is the length of the hypotenuse?",
        "By the theorem of Pythagoras the square of the hypotenuse is $5 + 11 = 16$, so its length is $4$. The final "
        "answer is $\\boxed{4}$.",
    ),
    (
        "Solve $\\log_2 (x + 1) = 3 + \\log_2 (x - 6)$ for $x$.",
        "We have $x + 1 = 2^3 (x - 6) = 8x - 48$, so $7x = 49$ and $x = 7$, for which both logarithms exist. The final "
        "answer is $\\boxed{7}$.",
    ),
)


class Mathematics(AnswerTask):
    """MATH with four solved examples, or as a chat without any; answers are compared by math-verify."""

    citation = "Hendrycks et al. 2021, Measuring Mathematical Problem Solving With the MATH Dataset, arXiv:2103.03874"
    form = "Problem: {question}\nSolution: "
    examples = _EXAMPLES
    stop = ("\nProblem:",)
    max_tokens = 2048
    ask = "{question}\n\nReason step by step, and put your final answer within \\boxed{}."
    rules = (
        "answer: the last \\boxed{}, or what follows the last 'The final answer is' or 'The answer is'; equal by "
        "train.rewards.math (math-verify); a comparison that fails or takes too long is no verdict"
    )

    def __init__(self, name: str, file: DataFile, chat: bool = False):
        """
        Args:
          name: of the task.
          file: with the problems.
          chat: whether a chat model is asked.
        """
        super().__init__(name, chat)
        self.files = (file,)
        # Long chains of thought are usual in chats.
        self.max_tokens = 4096 if chat else self.max_tokens

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        _reward(1).close()  # A missing package is found before the model is asked.
        ids = Ids()
        found = []
        records = read_records(files[self.files[0].path], {"problem": str, "solution": str})
        for number, (where, record) in enumerate(records, 1):
            answer = record.get("answer")
            if answer is None:
                box = last_box(record["solution"])
                answer = None if box is None else box[1]
            if not isinstance(answer, str) or not answer.strip():
                raise InputError(f"{where}: expected an answer, or a \\boxed{{}} in the solution; found none.")
            groups = {"level": str(record.get("level", "")).removeprefix("Level ")}
            groups["subject"] = str(record.get("subject") or record.get("type") or "")
            name = ids.new(where, str(record.get("unique_id") or number))
            fields = {"question": record["problem"].strip(), "answer": answer}
            found.append(Item(name, fields, {key: value for key, value in groups.items() if value}))
        return found

    def judge(self, items: Sequence[Item], answers: Sequence[str], tools: Tools) -> Sequence[tuple[float | None, Any]]:
        reward = _reward(max(1, tools.workers))
        try:
            gold = [item.fields["answer"] for item in items]
            scores = reward(answers, [True] * len(answers), answer=gold)
        finally:
            reward.close()
        return [(score, answer_span(answer, MARKERS)) for score, answer in zip(scores, answers, strict=True)]


def _reward(workers: int) -> "MathReward":
    # Not at the top: it needs a package that listing tasks does not.
    from train.rewards.math import MathReward

    return MathReward(markers=MARKERS, workers=workers)


class MGSM(AnswerTask):
    """MGSM in one language from its published table, as a chat. lm-eval has the forms with solved examples."""

    citation = "Shi et al. 2022, Language Models are Multilingual Chain-of-Thought Reasoners, arXiv:2210.03057"
    ask = (
        "{question}\n\nReason step by step in the language of the question. Finish with one line of the form: "
        "The answer is X. X is a number without a unit."
    )
    rules = (
        "answer: what follows the last 'The answer is', or the last \\boxed{}; equal as a number, digits in groups of "
        "three joined"
    )

    def __init__(self, language: str):
        """
        Args:
          language: as in the names of the files, such as "de".
        """
        super().__init__(f"mgsm_chat_{language}", chat=True)
        self.files = (
            DataFile(
                f"mgsm/mgsm_{language}.tsv",
                source=f"github.com/google-research/url-nlp: mgsm/mgsm_{language}.tsv",
                licence="CC-BY-SA-4.0",
            ),
        )
        self._language = language

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        path = files[self.files[0].path]
        found = []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            question, tab, answer = line.strip().rpartition("\t")
            if not tab or value_of(answer) is None:
                raise InputError(f"{path}, line {number}: expected a question, a tab and a number, found {line!r:.80}.")
            fields = {"question": question.strip().strip('"'), "answer": answer.strip()}
            found.append(Item(f"{self._language}/{number}", fields, {"language": self._language}))
        if not found:
            raise InputError(f"{path}: the file has no questions.")
        return found

    def judge(self, items: Sequence[Item], answers: Sequence[str], tools: Tools) -> Sequence[tuple[float | None, Any]]:
        judged: list[tuple[float | None, Any]] = []
        for item, answer in zip(items, answers, strict=True):
            span = answer_span(answer, MARKERS)
            value = None if span is None else value_of(span)
            judged.append((float(value is not None and value == value_of(item.fields["answer"])), span))
        return judged


_MATH = DataFile(
    "math/test.json",
    source="github.com/deepseek-ai/DeepSeek-Coder: Evaluation/PAL-Math/datasets/math/test.json",
    licence="MIT",
)
_MATH_500 = DataFile(
    "math_500/test.jsonl",
    source="github.com/hkust-nlp/simpleRL-reason: examples/simplelr_math_eval/data/math500/test.jsonl",
    licence="MIT",
)
TASKS = (
    Mathematics("math", _MATH),
    Mathematics("math_instruct", _MATH, chat=True),
    Mathematics("math_500", _MATH_500),
    Mathematics("math_500_instruct", _MATH_500, chat=True),
    *(MGSM(language) for language in ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")),
)
