"""Preferences: pairs of answers for DPO and for reward models (arXiv:2412.15115, sections 4.2 and 4.3).

1. Pairs of samples that passed and failed the checks of another recipe; or else prompts are answered by several models,
   such as checkpoints of different stages, at several temperatures.
2. Those answers are labelled by rules (a verifier), by a judge model that is asked in both orders and believed where it
   says the same in both, or they are written down for people to label.
3. Of the pairs of a prompt some are chosen, on request so that the better answer is longer as often as shorter.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.synthesize.checks import fault, object_of
from train.synthesize.context import Context, all_of
from train.synthesize.item import Item, Rejected, make_item
from train.synthesize.length_balance import LengthBalance
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.scoring import RewardScores
from train.synthesize.sources import checked, records
from train.synthesize.spoilt import out_of_order

JUDGE = """Here are a conversation and two answers to its last message. Decide which is better: more correct, more
helpful, better at doing what was asked. The order in which they stand and their length mean nothing.

Conversation:
{conversation}

Answer 1:
{first}

Answer 2:
{second}

First give your reasons in a few sentences. Then end with one line that is a JSON object:
{{"better": 1 or 2}}, or {{"better": 0}} if neither is better."""

Label = Literal["rules", "judge", "review"]
_AUDITED = 0.25
_NONSENSE = "the of blue seven because not yes apple runs while"
# Rewards for which these words may be right: they look at form alone, or the prompt says what they look at.
_MAY_LIKE_NONSENSE = ("instructions", "verification", "format", "length")


def pipeline(
    *,
    samples: tuple[str, ...] = (),
    prompts: tuple[str, ...] = (),
    prompt_column: str = "prompt",
    answerers: tuple[str, ...] = ("a", "b", "c"),
    temperatures: tuple[float, ...] = (0.7, 1.0),
    each: int = 1,
    label: Label = "judge",
    rule: str = "math",
    least_score: float = 1.0,
    most_judged: int = 4,
    keep: int = 1,
    balanced: bool = False,
    language: str | None = None,
    response_tokens: int = 2048,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Preferences: samples that passed and failed become pairs, or answers of several models data of reward models.

    Models: the answerers by their names; judge, with --label judge. With --samples none is asked.

    Args:
        samples: Files of records with a prompt, and the lists passed and failed. The files parts/NN/*.jsonl of another
            recipe's run are read too. Writes pairs.jsonl.
        prompts: Files of records with a prompt, and whatever columns the rule asks for, instead of samples. Writes
            reward.jsonl, or review.jsonl with --label review.
        prompt_column: Column of the prompt, a text or messages, such as problem.
        answerers: Names of the models that answer, such as checkpoints; --model NAME=MODEL gives each.
        temperatures: Of sampling, all of them for each model.
        each: Answers of each model at each temperature.
        label: Who says which answer is better; review writes all answers for `qwen-jax data review`.
        rule: Reward that tells right answers from wrong ones, such as math, or FILE.py:function.
        least_score: Score by the rule from which an answer is right.
        most_judged: Pairs of a prompt that are judged at most.
        keep: Pairs of a prompt that are written at most; no answer stands in two of them.
        balanced: Whether the chosen answers must be longer as often as shorter.
        language: Code of the language that answers must be in, such as en; by default any.
        response_tokens: Of an answer at most; one that is cut is dropped.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check_options(settings)
    recipe = _Preferences(settings)
    settings["rule_code"] = recipe.rule.code if recipe.rule else ""
    source = checked(_source(settings))
    if samples:
        stages: list[Stage | Together] = [Stage("pair", recipe.pair)]
        models: tuple[str, ...] = ()
    else:
        stages = [Stage("answer", recipe.answer)]
        models = answerers
        if label == "rules":
            stages += [Stage("rules", recipe.by_rule), Stage("pair", recipe.pair)]
        elif label == "judge":
            stages += [Stage("judge", recipe.by_judge), Together("bias", recipe.count_bias)]
            models = (*models, "judge")
    if samples or label != "review":
        stages.append(Together("choose", recipe.balance.work))
        outputs = [Output("pairs" if samples else "reward", recipe.rows)]
    else:
        outputs = [Output("review", recipe.review)]
    made = Pipeline(
        "preferences",
        source,
        stages,
        outputs,
        models=models,
        seed=seed,
        settings=settings,
        measures=recipe.measures,
        close=recipe.rule.close if recipe.rule else lambda: None,
    )
    return cleaned(made, decontaminate, near_duplicates)


class _Preferences:
    """The stages and outputs, with their settings.

    Attributes:
      rule: that labels, or None.
      balance: chooses a pair of the candidates.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        labels = settings["prompts"] and settings["label"] == "rules"
        self.rule = RewardScores(settings["rule"]) if labels else None
        self.balance = LengthBalance(settings["balanced"])
        self._orders: Counter[str] = Counter()

    async def answer(self, item: Item, context: Context) -> Result:
        """Asks all models at all temperatures; answers whose form is at fault are left out."""
        settings, asked = self._settings, []
        for name, temperature in itertools.product(settings["answerers"], settings["temperatures"]):
            asked.append((name, temperature))
        messages = _messages(item["prompt"])
        found = await all_of(
            [
                context.ask(
                    messages,
                    model=name,
                    samples=settings["each"],
                    # One checkpoint under two names gives different answers, too.
                    first=number * settings["each"],
                    temperature=temperature,
                    max_tokens=settings["response_tokens"],
                )
                for number, (name, temperature) in enumerate(asked)
            ]
        )
        faults: Counter[str] = Counter()
        texts: dict[str, dict[str, Any]] = {}
        for (name, temperature), answers in zip(asked, found, strict=True):
            for one in answers:
                if why := fault(one, settings["language"]):
                    faults[why] += 1
                else:
                    made = {"text": one.text.strip(), "by": name, "temperature": temperature}
                    texts.setdefault(made["text"], made)
        context.note(answers=len(texts), faults=dict(sorted(faults.items())))
        if len(texts) < 2:
            return Rejected("fewer than two different answers", ", ".join(faults))
        return item.update(answers=list(texts.values()))

    async def by_rule(self, item: Item, context: Context) -> Result:
        """Splits the answers into those that the rule holds right and wrong."""
        assert self.rule is not None
        texts = [one["text"] for one in item["answers"]]
        least = self._settings["least_score"]
        scores = await self.rule.scores(context, item["prompt"], texts, item["columns"])
        known = [(text, score) for text, score in zip(texts, scores, strict=True) if score is not None]
        if not known:
            return Rejected("not judged")
        await self._audit_rule(item, context)
        passed = [text for text, score in known if score >= least]
        failed = [text for text, score in known if score < least]
        context.note(label="rules", right=len(passed), wrong=len(failed))
        return item.update(passed=passed, failed=failed)

    async def pair(self, item: Item, context: Context) -> Result:
        """Makes groups of samples that passed and failed, of each of which one pair is written."""
        passed, failed = (_distinct(item[name]) for name in ("passed", "failed"))
        failed = [text for text in failed if text not in passed]
        if not passed or not failed:
            return Rejected("nothing passed" if not passed else "nothing failed")
        rng = item.rng("groups")
        rng.shuffle(passed)
        rng.shuffle(failed)
        groups = min(self._settings["keep"], len(passed), len(failed))
        base = item.without("passed", "failed", "answers", "columns")
        return base.split(
            {
                "candidates": [
                    {"chosen": chosen, "rejected": rejected}
                    for chosen, rejected in itertools.product(passed[i::groups], failed[i::groups])
                ]
            }
            for i in range(groups)
        )

    async def by_judge(self, item: Item, context: Context) -> Result:
        """Asks the judge for the better of two answers, in both orders."""
        texts = [one["text"] for one in item["answers"]]
        pairs = list(itertools.combinations(texts, 2))
        item.rng("pairs").shuffle(pairs)
        pairs = pairs[: self._settings["most_judged"]]
        await self._audit_judge(item, context, texts[0])
        found = await all_of([self._compare(item["prompt"], *pair, context) for pair in pairs])
        orders = Counter(order for order, _ in found)
        labelled = [
            {"chosen": pair[better], "rejected": pair[1 - better]}
            for pair, (_, better) in zip(pairs, found, strict=True)
            if better is not None
        ]
        context.note(label="judge", verdicts=dict(sorted(orders.items())))
        # Where each answer stands in one pair at most, all stay candidates that do not share one.
        groups = _apart(labelled, self._settings["keep"])
        base = item.without("answers", "columns").update(verdicts=dict(orders))
        if not groups:
            return base.update(candidates=[])
        return base.split(
            {"candidates": group, "verdicts": dict(orders) if not i else {}} for i, group in enumerate(groups)
        )

    def count_bias(self, items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """Counts verdicts in both orders, and drops what has no pair."""
        self._orders = Counter()
        for item in items:
            self._orders.update(item["verdicts"])
            kept = item.without("verdicts")
            yield item, kept if item["candidates"] else Rejected("no consistent verdict", str(item["verdicts"]))

    def measures(self) -> dict[str, Any]:
        """The lengths of pairs, and what the judge says by the order of the answers."""
        found: dict[str, Any] = {}
        if self.balance.counts:
            found["length of the chosen answer"] = dict(sorted(self.balance.counts.items()))
        if self._orders:
            judged = sum(count for order, count in self._orders.items() if order != "no verdict")
            first, second = self._orders["first twice"], self._orders["second twice"]
            found["judge"] = {
                **dict(sorted(self._orders.items())),
                "position_bias": (first - second) / judged if judged else None,
            }
        return found

    def rows(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """The pair."""
        yield {
            "prompt": _messages(item["prompt"]),
            "chosen": [{"role": "assistant", "content": item["chosen"]}],
            "rejected": [{"role": "assistant", "content": item["rejected"]}],
        }

    def review(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """All answers, for people who label them. Who wrote which stands in other columns, which are not shown."""
        yield {
            "prompt": _messages(item["prompt"]),
            "responses": [[{"role": "assistant", "content": one["text"]}] for one in item["answers"]],
            "by": [one["by"] for one in item["answers"]],
            "temperatures": [one["temperature"] for one in item["answers"]],
        }

    async def _compare(
        self, prompt: str | Sequence[Mapping[str, Any]], one: str, other: str, context: Context
    ) -> tuple[str, int | None]:
        """What the judge says in both orders, in words, and which answer is better, 0 or 1; None if not sure."""
        first, second = await all_of(
            [self._better(prompt, one, other, context), self._better(prompt, other, one, context)]
        )
        if first is None or second is None:
            return "no verdict", None
        if 0 in (first, second):
            return "a tie", None
        if first == second:
            return ("first twice" if first == 1 else "second twice"), None
        return "consistent", first - 1

    async def _better(
        self, prompt: str | Sequence[Mapping[str, Any]], first: str, second: str, context: Context
    ) -> int | None:
        text = JUDGE.format(conversation=_told(prompt), first=first, second=second)
        (answer,) = await context.ask(text, model="judge", temperature=0.0, max_tokens=1024)
        better = object_of(answer).get("better")
        return better if type(better) is int and better in (0, 1, 2) else None

    async def _audit_judge(self, item: Item, context: Context, text: str) -> None:
        """Lets the judge compare an answer with its words out of order."""
        rng = item.rng("audit")
        if rng.random() >= _AUDITED or (spoilt := out_of_order(text, rng)) is None:
            return
        order, better = await self._compare(item["prompt"], text, spoilt, context)
        # Without a verdict that holds in both orders nothing would be written.
        if order == "consistent":
            context.audit("judge, words out of order", False, better == 1)

    async def _audit_rule(self, item: Item, context: Context) -> None:
        """Lets the rule judge nonsense, and for mathematics the annotated answer."""
        assert self.rule is not None
        known = [] if self.rule.spec in _MAY_LIKE_NONSENSE else [(_NONSENSE, False)]
        answer = item["columns"].get("answer")
        if self.rule.spec == "math" and isinstance(answer, str | int | float):
            known.append((rf"The answer is \boxed{{{answer}}}.", True))
        scores = await self.rule.scores(context, item["prompt"], [text for text, _ in known], item["columns"])
        for (_, right), score in zip(known, scores, strict=True):
            if score is not None:
                context.audit(self.rule.spec, right, score >= self._settings["least_score"])


def _source(settings: Mapping[str, Any]) -> Callable[[], Iterator[Item]]:
    """Prompts, or samples of prompts, of files."""
    files, column = settings["samples"] or settings["prompts"], settings["prompt_column"]
    source = records(files, {})

    def items() -> Iterator[Item]:
        for item in source():
            where, values, steps = item.sources[0], dict(item.data), tuple[Any, ...]()
            if {"stage", "reason", "steps"} <= set(values):
                # What another run rejected stands beside what it kept.
                continue
            if {"id", "data", "sources", "steps"} <= set(values):
                # A part of another run: where it comes from, and what was done to it, go on.
                part = Item.from_json(values)
                item, values, steps = dataclasses.replace(item, sources=part.sources), dict(part.data), part.steps
            prompt = values.get(column)
            _check_prompt(prompt, column, where, values)
            data: dict[str, Any] = {"prompt": prompt}
            if settings["samples"]:
                for name in ("passed", "failed"):
                    data[name] = _texts(values.get(name), name, where)
            else:
                read = ("prompts", "completions", "finished", "completion_ids")
                data["columns"] = {
                    name: value for name, value in values.items() if name not in (column, "prompt", *read)
                }
            yield dataclasses.replace(make_item(data, item.sources), steps=steps)

    return items


def _check_prompt(prompt: Any, column: str, where: str, values: Mapping[str, Any]) -> None:
    if isinstance(prompt, str) and prompt.strip():
        return
    if isinstance(prompt, list) and prompt and all(_is_message(one) for one in prompt):
        if prompt[-1]["role"] != "assistant":
            return
        raise InputError(f"{where}: the prompt ends with an answer of the assistant. Leave the answer out.")
    raise InputError(
        f"{where}: expected the column {column} with a text or messages, got {prompt!r:.60}. The record has: "
        f"{', '.join(values) or 'no column'}. --prompt-column names another one."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _texts(value: Any, name: str, where: str) -> list[str]:
    """Samples as texts: they may be objects with a field text, or messages of the assistant."""
    if isinstance(value, list):
        texts = [one if isinstance(one, str) else _text_of(one) for one in value]
        if all(isinstance(text, str) for text in texts):
            return [str(text) for text in texts if str(text).strip()]
    raise InputError(f"{where}: expected the column {name} with a list of texts, got {value!r:.60}.")


def _text_of(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.get("text", value.get("content")) if isinstance(value, dict) else None


def _check_options(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an option out of range."""
    if bool(settings["samples"]) == bool(settings["prompts"]):
        raise InputError("Give either --samples, with answers that passed and failed, or --prompts to be answered.")
    for name in ("each", "keep", "response_tokens", "most_judged"):
        if settings[name] < 1:
            raise InputError(f"{name} must be at least 1, got {settings[name]}.")
    if not settings["temperatures"] or not all(t >= 0 for t in settings["temperatures"]):
        raise InputError(f"temperatures must be at least 0, got {settings['temperatures']}.")
    names = settings["answerers"]
    if not names or len(set(names)) < len(names) or "judge" in names:
        raise InputError(
            f"Expected answerers with different names, none of them judge, got {', '.join(names) or 'none'}."
        )
    if settings["label"] not in ("rules", "judge", "review"):
        raise InputError(f"label must be rules, judge or review, got {settings['label']}.")
    if settings["least_score"] != settings["least_score"]:
        raise InputError("least_score must be a number.")


def _messages(prompt: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]


def _told(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a text."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{one['role']}: {one['content']}" for one in prompt)


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _apart(pairs: Sequence[Mapping[str, str]], most: int) -> list[list[dict[str, str]]]:
    """Groups of pairs, of each of which one is written: with one group all, with more those that share no answer."""
    if most == 1 or not pairs:
        return [[dict(pair) for pair in pairs]] if pairs else []
    used: set[str] = set()
    found: list[list[dict[str, str]]] = []
    for pair in pairs:
        if len(found) < most and not used & {pair["chosen"], pair["rejected"]}:
            used |= {pair["chosen"], pair["rejected"]}
            found.append([dict(pair)])
    return found
