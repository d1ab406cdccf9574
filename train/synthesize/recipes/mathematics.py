"""Mathematical problems with reasoning in steps, by rejection sampling (arXiv:2412.15115, section 4.1).

1. Optionally, new problems are written from those of the file, by rephrasing and by altering them.
2. Each problem is answered several times. The final answers are compared with the annotated one by math-verify, or,
   where there is none, with what most samples agree on. Steps, boxes and sums of plain numbers are checked by code.
3. Where all samples are wrong, the annotated answer guides further ones, which must neither mention it nor put it
   before the steps; the model must reach it from their first steps without knowing it.
4. What passed is ranked, by a judge or a reward function, and the best is written, beside pairs and prompts.
"""

import functools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.functions import score
from train.rewards.loading import load_reward
from train.rewards.math import MathReward
from train.rewards.text import answer_span
from train.synthesize.agreement import agree
from train.synthesize.checks import fault, json_of, score_of
from train.synthesize.context import Context, all_of
from train.synthesize.generator import Answer
from train.synthesize.item import Item, Rejected, content_key
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.reasoning import before_answer, box_fault, guided_fault, step_fault
from train.synthesize.sources import checked, records

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""The system message of samples and examples, as in Qwen2.5-Math."""

SOLVE = r"""Solve this problem.

{problem}

Write numbered steps, 1., 2., 3. and so on, each on a line of its own. Each step derives something new and shows how;
no step only repeats the problem. End with one line that gives the final answer in \boxed{{}}, and write nothing after
it."""

GUIDED = r"""Solve this problem.

{problem}

For you alone: the final answer is {answer}. Write a solution for somebody who does not know it. Derive it from the
problem in numbered steps, 1., 2., 3. and so on, each on a line of its own; each derives something new and shows how.
Never say that you were told the answer, do not write it down before the step that derives it, and do not argue from it.
End with one line that gives the final answer in \boxed{{}}, and write nothing after it."""

CONTINUE = r"""Here are a problem and the first steps of its solution.

Problem:
{problem}

Solution so far:
{steps}

Carry the solution on from where it stops. Rely on these steps; do not begin anew. End with one line that gives the
final answer in \boxed{{}}."""

NEW = {
    "rephrase": """Write this mathematical problem in other words, as a different story if it has one. All quantities
and the question stay the same, and so does the answer. Do not solve it.

{problem}

Answer with a JSON object and nothing else: {{"problem": "..."}}""",
    "alter": """Write a new mathematical problem after the example of this one: change its quantities, what is asked, or
add a condition. It must be complete, and have exactly one final answer. Do not solve it.

{problem}

Answer with a JSON object and nothing else: {{"problem": "..."}}""",
}

JUDGE = """Here are a mathematical problem and a solution. Judge whether each step follows from the ones before it,
whether the conclusion is reached by the steps, and how clear they are.

Problem:
{problem}

Solution:
{solution}

First give your reasons in a few sentences. Then end with one line: Score: N, where N is a number from 0 (wrong or
unfounded) to 10 (correct, complete and clear)."""

# Shares of items, and of the solutions to rank, on which checks are checked.
_AUDITED = 0.25


def pipeline(
    *,
    problems: tuple[str, ...],
    samples: int = 8,
    guided: int = 4,
    agreement: float = 0.6,
    rephrased: int = 0,
    altered: int = 0,
    rank: str = "",
    least_score: float | None = None,
    keep: int = 1,
    least_steps: int = 2,
    least_rate: float = 0.1,
    most_rate: float = 0.9,
    language: str | None = None,
    temperature: float = 0.8,
    response_tokens: int = 2048,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Mathematics: problems become solutions in steps whose final answers are verified, preference pairs, and prompts.

    Models: generator; judge, with --rank judge.

    Args:
        problems: Files of records with the column problem and optionally answer, a text or a number.
        samples: Solutions that are sampled for each problem.
        guided: Solutions that are sampled with the annotated answer in the prompt where all others fail; 0 for none.
        agreement: Share of the samples that must give the same answer where none is annotated; above 0.5.
        rephrased: Problems in other words that are written from each one. Its annotated answer must be found again.
        altered: Changed problems that are written from each one.
        rank: How solutions are ranked: judge, or FILE.py:function as of rewards, such as one of a reward model; by
            default the first one that passed is the best.
        least_score: Solutions with a lower score are dropped.
        keep: Solutions of a problem that are written at most, the best first.
        least_steps: Steps that a solution must have, the conclusion among them.
        least_rate: Share of right samples that a problem needs to become a prompt of reinforcement learning.
        most_rate: Share of right samples above which a problem is too easy to become one.
        language: Code of the language that solutions must be in, such as en; by default any.
        temperature: Of sampling.
        response_tokens: Of a solution at most; one that is cut is dropped.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check_options(settings)
    recipe = _Mathematics(settings)
    if file := rank.rpartition(":")[0]:
        # Another function under the same name ranks anew.
        settings["rank_code"] = content_key(Path(file).expanduser().read_text("utf-8"))
    judged: Sequence[str] = ("generator", "judge") if rank == "judge" else ("generator",)
    new = [Stage("new", recipe.write_new)] if rephrased or altered else []
    made = Pipeline(
        "mathematics",
        checked(_source(problems)),
        [
            *new,
            Together("duplicates", _without_duplicates),
            Stage("sample", recipe.sample),
            Stage("guide", recipe.guide),
            Stage("rank", recipe.rank),
        ],
        [Output("sft", recipe.sft), Output("pairs", recipe.pairs), Output("grpo", recipe.grpo)],
        models=judged,
        seed=seed,
        settings=settings,
    )
    return cleaned(made, decontaminate, near_duplicates)


class _Mathematics:
    """The stages and outputs, with their settings."""

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self._sampling = {"temperature": settings["temperature"], "max_tokens": settings["response_tokens"]}
        rank = settings["rank"]
        # A file with a fault is found before anything is asked.
        self._reward = load_reward(rank) if rank not in ("", "judge") else None
        # Checks run in several threads, and a reward function may hold a model.
        self._one_at_a_time = threading.Lock()

    async def write_new(self, item: Item, context: Context) -> Result:
        """The problem itself and new ones, which have no annotated answer."""
        made: list[dict[str, Any]] = [{"origin": "given"}]
        lost = 0
        for kind, count in (("rephrase", self._settings["rephrased"]), ("alter", self._settings["altered"])):
            prompt = NEW[kind].format(problem=item["problem"])
            first = self._settings["rephrased"] if kind == "alter" else 0
            for answer in await context.ask(prompt, samples=count, first=first, **self._sampling):
                text = _problem_of(answer, self._settings["language"])
                if text is None or _normal(text) == _normal(item["problem"]):
                    lost += 1
                    continue
                # A problem in other words has the answer of its seed, which agreement has to find again.
                must = item.get("answer") if kind == "rephrase" else None
                made.append({"origin": kind, "problem": text, "answer": None, "must": must})
        context.note(new_problems=len(made) - 1, no_new_problem=lost)
        return item.split(made)

    async def sample(self, item: Item, context: Context) -> Result:
        """Samples solutions, and finds out which are right."""
        answers = await context.ask(self._messages(SOLVE, item), samples=self._settings["samples"], **self._sampling)
        tried = [{"text": answer.text, "fault": self._form_fault(answer, item)} for answer in answers]
        spans = [answer_span(answer.text) if answer.finish == "stop" else None for answer in answers]
        gold, source = _text_of(item.get("answer")), "annotation"
        if gold is None:
            found = await agree(spans, lambda one, other: equal(context, one, other))
            if found is None or found.votes < 2 or found.share < self._settings["agreement"]:
                return Rejected("samples do not agree", f"{found.votes} of {len(answers)}" if found else "")
            gold, source = found.answer, "agreement"
            context.note(answer=gold, agreement=found.share, votes=found.votes, samples=len(answers))
            must = _text_of(item.get("must"))
            if must is not None and await equal(context, must, gold) is not True:
                return Rejected("rephrasing changed the answer", f"{must} became {gold}")
        context.note(answer_from=source)
        await self._audit(item, context, gold)
        rights = await all_of([equal(context, gold, span) for span in spans])
        compared = [right for right, span in zip(rights, spans, strict=True) if span is not None]
        if compared and all(right is None for right in compared):
            return Rejected("not judged", gold)
        for one, right in zip(tried, rights, strict=True):
            one["right"] = right
        judged = [right for right in rights if right is not None]
        return item.update(
            answer=gold,
            answer_from=source,
            rate=sum(judged) / len(judged),
            passed=[{"text": one["text"]} for one in _distinct(tried) if one["right"] and one["fault"] is None],
            failed=[one["text"] for one in _distinct(tried) if _is_wrong(one)],
            faults=sorted({one["fault"] for one in tried if one["right"] and one["fault"]}),
        )

    async def guide(self, item: Item, context: Context) -> Result:
        """Where no sample passed, solutions that know the annotated answer and must not show it."""
        if item["passed"]:
            return item
        reason = f"right, but {item['faults'][0]}" if item["faults"] else "no sample is right"
        if item["answer_from"] != "annotation" or not self._settings["guided"]:
            return Rejected(reason)
        messages = self._messages(GUIDED, item, answer=item["answer"])
        faults: list[str | None] = []
        passed: list[dict[str, Any]] = []
        for answer in await context.ask(messages, samples=self._settings["guided"], **self._sampling):
            why = await self._guided_fault(answer, item, context, len(faults))
            faults.append(why)
            if why is None:
                passed.append({"text": answer.text, "guided": True})
        context.note(guided=faults)
        if not passed:
            return Rejected(f"guided: {next(why for why in faults if why)}", ", ".join(str(why) for why in faults))
        return item.update(passed=_distinct(passed))

    async def rank(self, item: Item, context: Context) -> Result:
        """Orders the solutions by their scores, the best first."""
        passed: list[dict[str, Any]] = item["passed"]
        if self._settings["rank"]:
            texts = [one["text"] for one in passed]
            scores = await (self._judge(item, context, texts) if self._reward is None else self._score(item, context))
            known = [{**one, "score": value} for one, value in zip(passed, scores, strict=True) if value is not None]
            if not known:
                return Rejected("no score")
            passed = sorted(known, key=lambda one: -float(one["score"]))
            least = self._settings["least_score"]
            if least is not None:
                passed = [one for one in passed if one["score"] >= least]
            if not passed:
                return Rejected("the score is too low")
        return item.update(passed=passed[: self._settings["keep"]])

    def sft(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """Conversations with the best solutions."""
        for one in item["passed"]:
            yield {"messages": [*_prompt(item), {"role": "assistant", "content": one["text"]}]}

    def pairs(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """The best solution before one of another answer."""
        if item["failed"]:
            chosen, rejected = item["passed"][0]["text"], item.rng("pairs").choice(item["failed"])
            yield {
                "prompt": _prompt(item),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }

    def grpo(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """The problem with its answer, if it is neither too hard nor too easy."""
        if self._settings["least_rate"] <= item["rate"] <= self._settings["most_rate"]:
            yield {
                "prompt": _prompt(item),
                "answer": item["answer"],
                "answer_from": item["answer_from"],
                "pass_rate": item["rate"],
            }

    def _messages(self, prompt: str, item: Item, **values: str) -> list[dict[str, str]]:
        content = prompt.format(problem=item["problem"], **values)
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": content}]

    def _form_fault(self, answer: Answer, item: Item) -> str | None:
        return (
            fault(answer, self._settings["language"])
            or box_fault(answer.text)
            or step_fault(answer.text, item["problem"], self._settings["least_steps"])
        )

    async def _guided_fault(self, answer: Answer, item: Item, context: Context, number: int) -> str | None:
        """Why a solution that knew the answer cannot be used."""
        gold = item["answer"]
        why = self._form_fault(answer, item) or guided_fault(answer.text, item["problem"], gold)
        if why is not None:
            return why
        if await equal(context, gold, answer_span(answer.text)) is not True:
            return "another answer"
        # Somebody who does not know the answer has to reach it from the steps before it.
        steps = before_answer(answer.text, item["problem"], gold)
        prompt = CONTINUE.format(problem=item["problem"], steps=steps)
        (further,) = await context.ask(prompt, first=number, **self._sampling)
        if fault(further) is not None or await equal(context, gold, answer_span(further.text)) is not True:
            return "the steps do not lead to the answer"
        return None

    async def _audit(self, item: Item, context: Context, gold: str) -> None:
        """Lets the verifier judge an answer that is right and one that is wrong."""
        if item.rng("audit").random() >= _AUDITED:
            return
        for text, expected in _known_answers(gold):
            verdict = await equal(context, gold, text)
            if verdict is not None:
                context.audit("math", expected, verdict)

    async def _judge(self, item: Item, context: Context, texts: Sequence[str]) -> list[float | None]:
        """The scores of a judge, which must prefer a solution to one without steps and with a wrong answer."""
        scores = await all_of([self._judged(item, context, text) for text in texts])
        if scores[0] is not None and item.rng("judge").random() < _AUDITED:
            wreck = "1. The problem is easy.\n" + rf"\boxed{{{_known_answers(_text_of(item['answer']) or '')[1][0]}}}"
            planted = await self._judged(item, context, wreck)
            if planted is not None:
                context.audit("judge", False, planted >= scores[0])
        return scores

    async def _judged(self, item: Item, context: Context, text: str) -> float | None:
        prompt = JUDGE.format(problem=item["problem"], solution=text)
        (answer,) = await context.ask(prompt, model="judge", temperature=0.0, max_tokens=1024)
        return None if fault(answer) else score_of(answer.text)

    async def _score(self, item: Item, context: Context) -> list[float | None]:
        """The scores of a reward function."""
        assert self._reward is not None
        reward = self._reward
        texts, name = [one["text"] for one in item["passed"]], self._settings["rank"]

        def run() -> list[float | None]:
            count = len(texts)
            columns = {"answer": [item["answer"]] * count}
            with self._one_at_a_time:
                found = score({name: reward}, [_prompt(item)] * count, texts, [True] * count, columns)
            return [None if value != value else float(value) for value in found[:, 0]]

        content = [_prompt(item), texts, item["answer"], self._settings.get("rank_code")]
        scores: list[float | None] = await context.check(f"rank {name}", content, run)
        return scores


@functools.cache
def verifier() -> MathReward:
    """The verifier of all items; its processes end with this one."""
    return MathReward()


async def equal(context: Context, gold: str, answer: str | None) -> bool | None:
    """Whether a final answer equals the right one; None if that cannot be told."""
    if answer is None:
        return False
    verdict: float | None = await context.check(
        "math", [gold, answer], lambda: verifier()([rf"\boxed{{{answer}}}"], [True], answer=[gold])[0]
    )
    return None if verdict is None else verdict == 1.0


def _source(problems: Sequence[str]) -> Any:
    """The items of problem files, with answers as texts."""
    source = records(problems, {"problem": str})

    def items() -> Iterator[Item]:
        for item in source():
            answer = item.get("answer")
            if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
                raise InputError(
                    f"{item.sources[0]}: expected the answer as a text or a number, got {type(answer).__name__}."
                )
            if not item["problem"].strip():
                raise InputError(f"{item.sources[0]}: the problem is empty. Leave the record out.")
            yield item

    return items


def _without_duplicates(items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
    """Problems with the same words and numbers are one problem; the first is kept."""
    seen: set[str] = set()
    for item in items:
        key = content_key(_normal(item["problem"]))[:16]
        yield item, Rejected("a duplicate problem") if key in seen else item
        seen.add(key)


def _known_answers(gold: str) -> list[tuple[str, bool]]:
    """Other answers, each with whether it equals the right one."""
    if re.fullmatch(r"-?\d{1,15}", gold):
        value = int(gold)
        return [(rf"\frac{{{2 * value}}}{{2}}", True), (str(value + 1), False)]
    if re.fullmatch(r"-?\d{1,12}(?:\.\d{1,6}|/\d{1,9})", gold) and not re.search(r"/0+$", gold):
        value_plus = Fraction(gold) + 1
        return [(gold, True), (rf"\frac{{{value_plus.numerator}}}{{{value_plus.denominator}}}", False)]
    # A number that nobody writes, and another one for each answer.
    return [(gold, True), (f"{int(content_key('wrong', gold)[:10], 16) + 10**12}.25", False)]


def _check_options(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an option out of range."""
    for name in ("samples", "keep", "least_steps", "response_tokens"):
        if settings[name] < 1:
            raise InputError(f"{name} must be at least 1, got {settings[name]}.")
    for name in ("guided", "rephrased", "altered", "temperature"):
        if not settings[name] >= 0:
            raise InputError(f"{name} must be at least 0, got {settings[name]}.")
    if not 0.5 < settings["agreement"] <= 1:
        raise InputError(f"agreement must be above 0.5 and at most 1, got {settings['agreement']}.")
    if not 0 <= settings["least_rate"] <= settings["most_rate"] <= 1:
        raise InputError(
            f"Expected 0 <= least_rate <= most_rate <= 1, got {settings['least_rate']} and {settings['most_rate']}."
        )
    if settings["least_score"] is not None and not settings["rank"]:
        raise InputError("least_score needs scores. Give --rank too.")


def _prompt(item: Item) -> list[dict[str, str]]:
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": item["problem"]}]


def _problem_of(answer: Answer, language: str | None) -> str | None:
    """The problem in an answer; None if there is none."""
    if fault(answer, language) is not None:
        return None
    value = json_of(answer.text)
    text = value.get("problem") if isinstance(value, dict) else None
    return text.strip() if isinstance(text, str) and len(text.strip()) >= 20 and r"\boxed" not in text else None


def _text_of(answer: Any) -> str | None:
    """An annotated answer as a text; None if there is none."""
    if answer is None or answer == "":
        return None
    if not isinstance(answer, str):
        return repr(answer)
    return answer_span(answer) or answer.strip() or None


def _is_wrong(one: Mapping[str, Any]) -> bool:
    """Whether a sample is a whole solution with another answer, that may stand in a pair."""
    return one["right"] is False and (one["fault"] is None or one["fault"] in _FAULTS_OF_CONTENT)


_FAULTS_OF_CONTENT = ("a false equation", "a step only restates", "too few steps")


def _distinct(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({one["text"]: one for one in reversed(samples)}.values())[::-1]


def _normal(problem: str) -> str:
    return " ".join(re.findall(r"\w+|[^\w\s]", problem.casefold()))
