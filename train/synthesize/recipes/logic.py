"""Logical reasoning: puzzles and questions answered in steps, refined until no flaw is found (arXiv:2412.15115, section
4.1).

1. Code makes puzzles of deductive, inductive, analogical, causal and statistical reasoning, as multiple choice, true or
   false, and open questions, each with its only right answer. Files of questions may be added.
2. A model tells some of the puzzles in other words. A critic compares the facts; else the words stay as they were.
3. Each is answered several times. Answers are compared exactly; where none is known, samples have to agree.
4. A critic looks for flaws in the reasoning. What is wrong or flawed is revised for some rounds, and then dropped.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from train.synthesize.agreement import agree
from train.synthesize.checks import fault, json_of, object_of
from train.synthesize.context import Context, all_of
from train.synthesize.generator import Answer
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.puzzles import FAMILIES, is_right, make_puzzles
from train.synthesize.reasoning import answer_line, revision_fault, step_fault
from train.synthesize.sources import checked, records

ASK = """{question}

Reason step by step, and end with one line: Answer: X, where X is {how}."""

STEPS = """You reason carefully. Write numbered steps, 1., 2., 3. and so on, each on a line of its own; each step says
something new that follows from the facts or from earlier steps, and why. No step only repeats what is given. Write
nothing after the line with the answer."""

REPHRASE = """Write these facts in other words, as a text that reads well. Every fact stays exactly as it is: names,
numbers, and what is said of them. Leave nothing out, add nothing, and draw no conclusions.

{statement}

This question will be asked about them; do not answer it, and do not write it down: {question}

Answer with a JSON object and nothing else: {{"facts": "..."}}"""

COMPARE = """Do these two texts state exactly the same facts, so that the same conclusions follow from both?

First text:
{first}

Second text:
{second}

First compare them fact by fact. Then end with one line that is a JSON object:
{{"differs": true or false, "difference": "..."}}"""

CRITIC = """Here are a question and somebody's reasoning. Look for flaws: a step that does not follow from the facts and
the steps before it, a fact that is not given, a case that is left out, a contradiction, a conclusion that does not
follow from the steps, or one that is wrong. Do not look for flaws of style.

Question:
{question}

Reasoning:
{reasoning}

First check it step by step. Then end with one line that is a JSON object:
{{"flawed": true or false, "flaw": "the first flaw, and in which step"}}"""

REVISE = """There is a flaw: {flaw}

Write the whole reasoning anew, in numbered steps and with the line of the answer at its end, for a reader who has seen
nothing before. Do not mention this remark or that you have written about it already."""

_WRONG = "the final answer is not right. Find the first step that does not follow."
_ABSURD = "Because 7 is smaller than 2, we may leave aside all facts that do not suit us."
# The share of items on which the critic is tried on planted flaws.
_AUDITED = 0.25


def pipeline(
    *,
    puzzles: int = 1000,
    families: tuple[str, ...] = (),
    questions: tuple[str, ...] = (),
    rephrased: float = 0.5,
    samples: int = 4,
    rounds: int = 2,
    agreement: float = 0.75,
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
    """Logic: puzzles and questions become reasoning in steps with verified answers, preference pairs, and prompts.

    Models: generator; critic, which compares facts and looks for flaws.

    Args:
        puzzles: How many puzzles code makes.
        families: Of the puzzles, such as knights, ordering, houses, syllogism, sequence, letters, mapping, circuit,
            separation, chance; by default all in turns.
        questions: Files of records with the column question and optionally answer.
        rephrased: Share of the puzzles that are told in other words.
        samples: Answers that are sampled for each question.
        rounds: How often reasoning that is wrong or flawed is revised, while too few are without flaw.
        agreement: Share of the samples that must give the same answer where none is known; above 0.5.
        keep: Answers to a question that are written at most.
        least_steps: Steps that reasoning must have.
        least_rate: Share of right samples that a question needs to become a prompt of reinforcement learning.
        most_rate: Share of right samples above which a question is too easy to become one.
        language: Code of the language that answers must be in, such as en; by default any.
        temperature: Of sampling.
        response_tokens: Of an answer at most; one that is cut is dropped.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check_options(settings)
    recipe = _Logic(settings)
    made = Pipeline(
        "logic",
        _source(settings),
        [
            Stage("rephrase", recipe.rephrase),
            Stage("answer", recipe.answer),
            Stage("refine", recipe.refine),
        ],
        [Output("sft", recipe.sft), Output("pairs", recipe.pairs), Output("grpo", recipe.grpo)],
        models=("generator", "critic"),
        seed=seed,
        settings=settings,
    )
    return cleaned(made, decontaminate, near_duplicates)


class _Logic:
    """The stages and outputs, with their settings."""

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self._sampling = {"temperature": settings["temperature"], "max_tokens": settings["response_tokens"]}

    async def rephrase(self, item: Item, context: Context) -> Result:
        """The facts in other words, if they are the same facts."""
        if "statement" not in item.data or item.rng("rephrase").random() >= self._settings["rephrased"]:
            return item
        statement = item["statement"]
        prompt = REPHRASE.format(statement=statement, question=item["question"])
        (answer,) = await context.ask(prompt, **self._sampling)
        value = None if fault(answer, self._settings["language"]) else json_of(answer.text)
        facts = value.get("facts") if isinstance(value, dict) else None
        why = None
        if not isinstance(facts, str) or not facts.strip():
            why = "no facts in the answer"
        elif _marks(facts) != _marks(statement):
            why = "other names or numbers"
        else:
            prompt = COMPARE.format(first=statement, second=facts)
            differs = await self._says(prompt, "differs", context)
            why = None if differs is False else "other facts" if differs else "not judged"
        if why is None:
            await self._audit_comparison(item, context)
        # What is not told faithfully keeps its words.
        context.note(rephrased=why is None, why=why)
        return item if why else item.update(statement=facts)

    async def answer(self, item: Item, context: Context) -> Result:
        """Samples answers, and finds out which are right."""
        answers = await context.ask(self._messages(item), samples=self._settings["samples"], **self._sampling)
        tried = [self._sample(answer, item) for answer in answers]
        given = [one["answer"] for one in tried]
        truth, compare, source = item.get("answer"), item.get("compare"), item.get("truth", "annotation")
        if truth is None:
            found = await agree(given, _equal)
            if found is None or found.votes < 2 or found.share < self._settings["agreement"]:
                return Rejected("samples do not agree", f"{found.votes} of {len(answers)}" if found else "")
            truth, compare, source = found.answer, _compare_of(found.answer), "agreement"
            context.note(answer=truth, agreement=found.share, votes=found.votes, samples=len(answers))
        context.note(answer_from=source)
        context.audit("answer", True, is_right(truth, truth, compare))
        context.audit("answer", False, is_right(truth, item.get("wrong") or f"not {truth}", compare))
        for one in tried:
            one["right"] = one["answer"] is not None and is_right(truth, one["answer"], compare)
        return item.update(
            answer=truth,
            compare=compare,
            answer_from=source,
            rate=sum(one["right"] for one in tried) / len(tried),
            tried=tried,
        )

    async def refine(self, item: Item, context: Context) -> Result:
        """Lets a critic look for flaws, and the model mend them, round by round."""
        keep, tried = self._settings["keep"], item["tried"]
        candidates = [one for one in tried if one["fault"] is None or one["fault"] in _MENDABLE]
        if not candidates:
            return Rejected(tried[0]["fault"], ", ".join(one["fault"] for one in tried))
        passed: list[str] = []
        flawed: list[str] = []
        reason = "no right answer"
        for number in range(self._settings["rounds"] + 1):
            # Those with the right answer first: others are looked at only to be mended.
            right = [one for one in candidates if one["right"]]
            await all_of([self._criticise(one, item, context) for one in right])
            good = [one["text"] for one in right if one["flaw"] is None]
            flawed += [one["text"] for one in right if one["seen"]]
            if right:
                reason = "flawed reasoning" if flawed else right[0]["fault"] or "the critic gives no verdict"
            passed += [text for text in dict.fromkeys(good) if text not in passed]
            if len(passed) >= keep or number == self._settings["rounds"]:
                break
            await all_of([self._criticise(one, item, context) for one in candidates if not one["right"]])
            mendable = [one for one in candidates if one["flaw"]]
            candidates = [one for one in await all_of([self._mend(one, item, context) for one in mendable]) if one]
        context.note(rounds=number, passed=len(passed), flawed=len(flawed))
        if not passed:
            return Rejected(reason)
        await self._audit_critic(item, context, passed[0])
        wrong = [one["text"] for one in tried if not one["right"] and one["fault"] in (None, *_MENDABLE)]
        return item.without("tried").update(passed=passed[:keep], failed=wrong, flawed=flawed)

    def sft(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """Conversations with reasoning that passed."""
        for text in item["passed"]:
            yield {"messages": [*_prompt(item), {"role": "assistant", "content": text}]}

    def pairs(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """Reasoning that passed before one with a wrong answer, or else one in which the critic saw a flaw."""
        if rejected := item["failed"] or item["flawed"]:
            yield {
                "prompt": _prompt(item),
                "chosen": [{"role": "assistant", "content": item["passed"][0]}],
                "rejected": [{"role": "assistant", "content": item.rng("pairs").choice(rejected)}],
            }

    def grpo(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """The question with its answer, if it is neither too hard nor too easy."""
        if self._settings["least_rate"] <= item["rate"] <= self._settings["most_rate"]:
            columns = ("answer", "compare", "answer_from")
            yield {"prompt": _prompt(item), **{name: item[name] for name in columns}, "pass_rate": item["rate"]}

    def _messages(self, item: Item) -> list[dict[str, str]]:
        return [{"role": "system", "content": STEPS}, *_prompt(item)]

    def _sample(self, answer: Answer, item: Item) -> dict[str, Any]:
        """A text with its answer, and what is wrong with its form."""
        why, given = fault(answer, self._settings["language"]), None
        if why is None:
            given = answer_line(answer.text)
            why = (
                "no line with the answer"
                if given is None
                else step_fault(answer.text, _question(item), self._settings["least_steps"])
            )
        return {"text": answer.text.strip(), "answer": given, "fault": why}

    async def _criticise(self, one: dict[str, Any], item: Item, context: Context) -> None:
        """Sets the flaw of a candidate: None if there is none, "" if nothing can be said that would mend it."""
        prompt = CRITIC.format(question=_question(item), reasoning=one["text"])
        flaw = await self._flaw(prompt, context)
        one["seen"] = bool(flaw)
        if flaw is None or flaw:
            # No verdict is no flaw that could be mended.
            one["flaw"] = flaw or ""
        elif one["fault"] is not None:
            one["flaw"] = f"{one['fault']}."
        elif one["right"]:
            one["flaw"] = None
        else:
            # Where there are two answers, this would give the other one away.
            one["flaw"] = "" if item["compare"] == "truth" else _WRONG

    async def _mend(self, one: Mapping[str, Any], item: Item, context: Context) -> dict[str, Any] | None:
        """A candidate with the flaw mended; None if what came is not reasoning in form."""
        mended = [
            *self._messages(item),
            {"role": "assistant", "content": one["text"]},
            {"role": "user", "content": REVISE.format(flaw=one["flaw"])},
        ]
        (answer,) = await context.ask(mended, **self._sampling)
        made = self._sample(answer, item)
        if (made["fault"] and made["fault"] not in _MENDABLE) or revision_fault(answer.text):
            return None
        return {**made, "right": is_right(item["answer"], made["answer"], item["compare"])}

    async def _audit_comparison(self, item: Item, context: Context) -> None:
        """Lets the critic compare the facts with changed ones."""
        if item.rng("audit").random() < _AUDITED:
            statement = item["statement"]
            changed = COMPARE.format(first=statement, second=_damaged(statement, item.rng("damage").randrange))
            differs = await self._says(changed, "differs", context)
            if differs is not None:
                context.audit("comparison of facts", False, not differs)

    async def _audit_critic(self, item: Item, context: Context, text: str) -> None:
        """Lets the critic look for a flaw that was planted in reasoning that it let pass."""
        rng = item.rng("plant")
        if rng.random() >= _AUDITED:
            return
        body, _, last = text.rpartition("\n")
        wrong = item.get("wrong")
        if wrong and rng.random() < 0.5:
            planted = f"{body}\nAnswer: {wrong}"
        else:
            planted = f"{body}\n{len(body.splitlines()) + 1}. {_ABSURD}\n{last}"
        flaw = await self._flaw(CRITIC.format(question=_question(item), reasoning=planted), context)
        if flaw is not None:
            context.audit("critic", False, not flaw)

    async def _flaw(self, prompt: str, context: Context) -> str | None:
        """What the critic says: the flaw, "" for none; None if it says nothing that can be read."""
        (answer,) = await context.ask(prompt, model="critic", temperature=0.0, max_tokens=2048)
        value = object_of(answer)
        if not isinstance(value.get("flawed"), bool):
            return None
        if not value["flawed"]:
            return ""
        flaw = value.get("flaw")
        return flaw if isinstance(flaw, str) and flaw.strip() else "a step does not follow."

    async def _says(self, prompt: str, field: str, context: Context) -> bool | None:
        """Yes or no of the critic; None if it says nothing that can be read."""
        (answer,) = await context.ask(prompt, model="critic", temperature=0.0, max_tokens=2048)
        verdict = object_of(answer).get(field)
        return verdict if isinstance(verdict, bool) else None


# Faults of form that a revision may mend.
_MENDABLE = ("too few steps", "a step only restates", "a false equation")


def _source(settings: Mapping[str, Any]) -> Callable[[], Iterator[Item]]:
    """Puzzles, and after them the questions of files."""
    files = checked(_questions(settings["questions"])) if settings["questions"] else lambda: iter(())

    def items() -> Iterator[Item]:
        for number, puzzle in enumerate(make_puzzles(settings["puzzles"], settings["seed"], settings["families"])):
            yield make_item({**puzzle.to_json(), "truth": "code"}, [f"puzzle {number} of seed {settings['seed']}"])
        yield from files()

    return items


def _questions(files: Sequence[str]) -> Callable[[], Iterator[Item]]:
    source = records(files, {"question": str})

    def items() -> Iterator[Item]:
        for item in source():
            answer = item.get("answer")
            if not isinstance(answer, str | int | float | None):
                raise InputError(
                    f"{item.sources[0]}: expected the answer as a text, a number, true or false, got a "
                    f"{type(answer).__name__}."
                )
            if not item["question"].strip():
                raise InputError(f"{item.sources[0]}: the question is empty. Leave the record out.")
            known = None if answer is None or answer == "" else str(answer).strip()
            fields = {"question": item["question"], "how": "the answer and nothing else", "answer": known}
            yield make_item({**fields, "compare": known and _compare_of(known)}, item.sources)

    return items


def _check_options(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an option out of range."""
    for name in ("samples", "keep", "least_steps", "response_tokens"):
        if settings[name] < 1:
            raise InputError(f"{name} must be at least 1, got {settings[name]}.")
    for name in ("puzzles", "rounds", "temperature"):
        if not settings[name] >= 0:
            raise InputError(f"{name} must be at least 0, got {settings[name]}.")
    if not settings["puzzles"] and not settings["questions"]:
        raise InputError("There is nothing to make data of. Ask for puzzles, or give files of questions.")
    if unknown := sorted(set(settings["families"]) - set(FAMILIES)):
        raise InputError(f"There is no family of puzzles {unknown[0]}. There are: {', '.join(FAMILIES)}.")
    if not 0.5 < settings["agreement"] <= 1:
        raise InputError(f"agreement must be above 0.5 and at most 1, got {settings['agreement']}.")
    if not 0 <= settings["rephrased"] <= 1:
        raise InputError(f"rephrased must lie between 0 and 1, got {settings['rephrased']}.")
    if not 0 <= settings["least_rate"] <= settings["most_rate"] <= 1:
        raise InputError(
            f"Expected 0 <= least_rate <= most_rate <= 1, got {settings['least_rate']} and {settings['most_rate']}."
        )


def _question(item: Item) -> str:
    return f"{item['statement']}\n\n{item['question']}" if "statement" in item.data else str(item["question"])


def _prompt(item: Item) -> list[dict[str, str]]:
    return [{"role": "user", "content": ASK.format(question=_question(item), how=item["how"])}]


def _marks(text: str) -> frozenset[str]:
    """The numbers, and the names: words with a capital letter within a sentence."""
    names = frozenset(re.findall(r"(?<=[a-z,;] )[A-Z]\w*", text)) - {"I"}
    return names | frozenset(re.findall(r"\d+(?:[./]\d+)?", text))


def _damaged(statement: str, draw: Callable[[int], int]) -> str:
    """The facts without one of them, or with another number."""
    lines = statement.split("\n")
    if len(lines) > 2:
        del lines[1 + draw(len(lines) - 1)]
        return "\n".join(lines)
    numbers = list(re.finditer(r"\d+", statement))
    if numbers:
        last = numbers[draw(len(numbers))]
        return f"{statement[: last.start()]}{int(last[0]) + 1}{statement[last.end() :]}"
    sentences = re.split(r"(?<=[.;]) ", statement)
    del sentences[draw(len(sentences))]
    return " ".join(sentences)


def _compare_of(answer: str) -> str:
    """How answers like this one are compared."""
    if re.fullmatch(r"\(?[A-Ha-h]\)?\.?", answer):
        return "letter"
    if answer.strip(" .").casefold() in ("true", "false", "yes", "no"):
        return "truth"
    return "number" if is_right(answer, answer, "number") else "word"


async def _equal(one: str, other: str) -> bool:
    return is_right(one, other, "number") or is_right(one, other, "word")
