"""General system prompts, and conversations that keep to them (arXiv:2412.15115, section 4.1, robustness).

1. Code makes system prompts of roles, styles and rules; a model writes some of them in other words. Rules that code can
   check are kept beside them. The same words are one prompt.
2. Questions of a file, or ones that a model writes, are answered under a system prompt.
3. Rules are checked by code. A judge says whether the rest of the system prompt is followed, too.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from train.data.tables import find_tables, read_rows
from train.synthesize.checks import fault, json_of
from train.synthesize.context import Context
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.made_system_prompts import broken_rule, make_system_prompt
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.sources import checked

REWRITE = """Here is a system prompt for an assistant. Write it in other words. Its role and each of its rules stay
exactly as they are; texts in quotation marks and numbers are written as here. Add no rule.

{prompt}

Answer with a JSON object and nothing else: {{"prompt": "..."}}"""

QUESTION = """Write one message that a user may send to an assistant with this system prompt. It asks for something
that can be answered in words, and says nothing of the system prompt.

{prompt}

Answer with a JSON object and nothing else: {{"message": "..."}}"""

JUDGE = """Here are the system prompt of an assistant, a message of a user, and the assistant's answer. Does the
answer keep to the role, the style and every rule of the system prompt, and does it answer the message?

System prompt:
{prompt}

Message:
{question}

Answer:
{answer}

First check it rule by rule. Then end with one line that is a JSON object:
{{"follows": true or false, "broken": "..."}}"""

_OFFENCES = (
    "WHATEVER. I do not keep to any rules, and I am not who you say I am.",
    "I ignore my system prompt, very, basically, obviously, actually, literally, and I say nothing of your question.",
)
_GERMAN = "Ich halte mich nicht an das, was hier steht, und ich bin auch nicht, wer du denkst. very, actually,"
_AUDITED = 0.25


def pipeline(
    *,
    prompts: int = 500,
    conversations: int = 8,
    questions: tuple[str, ...] = (),
    rewritten: float = 0.5,
    samples: int = 2,
    keep: int = 1,
    temperature: float = 0.8,
    response_tokens: int = 1024,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """System prompts: conversations under hundreds of system prompts that they keep to, preference pairs, and prompts.

    Models: generator; judge, which says whether a system prompt is followed.

    Args:
        prompts: How many system prompts code makes; those with the same words are one.
        conversations: Questions that are answered under each of them.
        questions: Files of records with the column question; by default the model writes them.
        rewritten: Share of the system prompts that the model writes in other words.
        samples: Answers that are sampled for each question.
        keep: Answers to a question that are written at most.
        temperature: Of sampling.
        response_tokens: Of an answer at most; one that is cut is dropped.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check_options(settings)
    recipe = _SystemPrompts(settings, _questions(questions) if questions else [])
    made = Pipeline(
        "system_prompts",
        checked(_source(prompts, seed)),
        [
            Stage("rewrite", recipe.rewrite),
            Together("duplicates", _without_duplicates),
            Stage("question", recipe.question),
            Stage("answer", recipe.answer),
        ],
        [Output("sft", recipe.sft), Output("pairs", recipe.pairs), Output("grpo", recipe.grpo)],
        models=("generator", "judge"),
        seed=seed,
        settings=settings,
    )
    return cleaned(made, decontaminate, near_duplicates)


class _SystemPrompts:
    """The stages and outputs, with their settings."""

    def __init__(self, settings: Mapping[str, Any], questions: Sequence[str]):
        # Draws do not depend on the order of records.
        self._settings, self._questions = settings, sorted(questions)
        self._sampling = {"temperature": settings["temperature"], "max_tokens": settings["response_tokens"]}

    async def rewrite(self, item: Item, context: Context) -> Result:
        """The system prompt in other words, if it keeps quoted texts, numbers and names of languages."""
        if item.rng("rewrite").random() >= self._settings["rewritten"]:
            return item
        (answer,) = await context.ask(REWRITE.format(prompt=item["prompt"]), **self._sampling)
        value = None if fault(answer, "en") else json_of(answer.text)
        text = value.get("prompt") if isinstance(value, dict) else None
        why = "no prompt in the answer" if not isinstance(text, str) or not text.strip() else None
        if isinstance(text, str) and why is None and _fixed(text) != _fixed(item["prompt"]):
            why = "other numbers or quoted texts"
        # What is not written faithfully keeps its words.
        context.note(rewritten=why is None, why=why)
        return item if why or not isinstance(text, str) else item.update(prompt=text.strip())

    async def question(self, item: Item, context: Context) -> Result:
        """Questions to ask under the system prompt."""
        count, rng = self._settings["conversations"], item.rng("questions")
        if self._questions:
            chosen = rng.sample(self._questions, min(count, len(self._questions)))
            return item.split({"question": text} for text in chosen)
        found: list[str] = []
        for answer in await context.ask(QUESTION.format(prompt=item["prompt"]), samples=count, **self._sampling):
            value = None if fault(answer) else json_of(answer.text)
            text = value.get("message") if isinstance(value, dict) else None
            if isinstance(text, str) and text.strip() and "system prompt" not in text.lower():
                found.append(text.strip())
        parts = [{"question": text} for text in dict.fromkeys(found)]
        return item.split(parts) if parts else Rejected("no question")

    async def answer(self, item: Item, context: Context) -> Result:
        """Samples answers; code checks the rules that it can, and the judge the rest."""
        answers = await context.ask(_prompt(item), samples=self._settings["samples"], **self._sampling)
        passed: list[str] = []
        failed: list[str] = []
        reasons: list[str] = []
        for answer in answers:
            text = answer.text.strip()
            why = fault(answer)
            if why is None:
                broken = broken_rule(item["rules"], text)
                follows = None if broken else await _follows(item, text, context)
                if broken or follows is False:
                    failed.append(text)
                    why = f"a broken rule: {broken}" if broken else "the judge sees a broken rule"
                elif follows is None:
                    why = "not judged"
            if why is None:
                passed.append(text)
            else:
                reasons.append(why)
        if item["rules"]:
            context.audit("rules", False, broken_rule(item["rules"], _breaking(item["rules"])) is None)
        if item.rng("audit").random() < _AUDITED:
            follows = await _follows(item, item.rng("offence").choice(_OFFENCES), context)
            if follows is not None:
                context.audit("judge", False, follows)
        if not passed:
            return Rejected(reasons[0], ", ".join(reasons))
        kept = list(dict.fromkeys(passed))[: self._settings["keep"]]
        return item.update(passed=kept, failed=failed)

    def sft(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """Conversations that keep to their system prompt."""
        for text in item["passed"]:
            yield {"messages": [*_prompt(item), {"role": "assistant", "content": text}]}

    def pairs(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """An answer that keeps to the system prompt before one that does not."""
        if item["failed"]:
            yield {
                "prompt": _prompt(item),
                "chosen": [{"role": "assistant", "content": item["passed"][0]}],
                "rejected": [{"role": "assistant", "content": item.rng("pairs").choice(item["failed"])}],
            }

    def grpo(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """Prompts for the reward `instructions`: those with rules that code can check."""
        if item["rules"]:
            yield {
                "prompt": _prompt(item),
                "instruction_id_list": [kind for kind, _ in item["rules"]],
                "kwargs": [arguments for _, arguments in item["rules"]],
            }


def _source(prompts: int, seed: int) -> Callable[[], Iterator[Item]]:
    def source() -> Iterator[Item]:
        for number in range(prompts):
            made = make_system_prompt(random.Random(f"{seed} system prompt {number}"))
            fields = {"prompt": made.text, "rules": [[kind, dict(arguments)] for kind, arguments in made.rules]}
            yield make_item(fields, [f"system prompt {number} of seed {seed}"])

    return source


def _questions(files: Sequence[str]) -> list[str]:
    """The questions of files. Raises InputError for a record without one."""
    found: dict[str, None] = {}
    for path in find_tables(files):
        for row in read_rows(path):
            question = row.values.get("question")
            if not isinstance(question, str) or not question.strip():
                raise InputError(f"{row.where}: expected a text in the column question, got {question!r:.80}.")
            found[question.strip()] = None
    if not found:
        raise InputError("The files of questions have no records. Give files with at least one.")
    return list(found)


def _without_duplicates(items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
    """Prompts with the same words and numbers are one."""
    seen = set()
    for item in items:
        key = " ".join(re.findall(r"\w+", item["prompt"].casefold()))
        yield item, Rejected("the same system prompt") if key in seen else item
        seen.add(key)


def _check_options(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an option out of range."""
    for name in ("prompts", "conversations", "samples", "keep", "response_tokens"):
        if settings[name] < 1:
            raise InputError(f"{name} must be at least 1, got {settings[name]}.")
    if not settings["temperature"] >= 0:
        raise InputError(f"temperature must be at least 0, got {settings['temperature']}.")
    if not 0 <= settings["rewritten"] <= 1:
        raise InputError(f"rewritten must lie between 0 and 1, got {settings['rewritten']}.")


async def _follows(item: Item, text: str, context: Context) -> bool | None:
    """What the judge says; None if it says nothing that can be read."""
    prompt = JUDGE.format(prompt=item["prompt"], question=item["question"], answer=text)
    (answer,) = await context.ask(prompt, model="judge", temperature=0.0, max_tokens=1024)
    if fault(answer):
        return None
    for part in (answer.text.rstrip().rpartition("\n")[2], answer.text):
        value = json_of(part)
        if isinstance(value, dict) and isinstance(value.get("follows"), bool):
            return bool(value["follows"])
    return None


def _breaking(rules: Sequence[Any]) -> str:
    """An answer that breaks all rules: too long, with commas and the forbidden words, and in another language."""
    languages = [arguments["language"] for kind, arguments in rules if kind == "language:response_language"]
    return (_GERMAN if languages == ["en"] else f"{_OFFENCES[1]} very,") + " 1," * 200


def _fixed(text: str) -> list[str]:
    """Quoted texts, bracketed titles, numbers and names of languages: what other words must leave as it is."""
    return sorted(re.findall(r'"[^"]*"|<<[^<>]*>>|\d+|German|French|Spanish|Italian|English|commas?', text))


def _prompt(item: Item) -> list[dict[str, str]]:
    return [{"role": "system", "content": item["prompt"]}, {"role": "user", "content": item["question"]}]
