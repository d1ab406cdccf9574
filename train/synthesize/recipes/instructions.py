"""Instructions whose following is verified by execution, after the Qwen2.5 report (arXiv:2412.15115, section 4.1,
"Instruction following"), by the scheme of AutoIF (arXiv:2406.13542).

The steps:
1. Instructions come from seeds, which a model adds to, and from the built-in kinds, which need no model.
2. For each of the others the model writes several functions that verify it, each with three test cases. Functions run
   in the sandbox only, and functions and cases validate one another (`verification.cross_validate`).
3. Functions are translated back into instructions; one that contradicts the instruction rejects it.
4. Instructions are combined with queries, and responses are sampled.
5. Responses are kept by execution: of the functions, or of the built-in check.
6. A judge scores what was kept. Good responses become examples; pairs set them against responses that fail everything.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.rewards.instructions import check_instruction
from train.rewards.verification import LIMITS, ROWS, ask_function
from train.synthesize import verification
from train.synthesize.checks import fault, score_of
from train.synthesize.context import Context, all_of
from train.synthesize.instruction_texts import TEXTS, draw
from train.synthesize.item import Item, Rejected, content_key, make_item
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.programs import Programs
from train.synthesize.sources import records

_JUDGE = "judge"
# Share of items whose checks judge what is known to be right or wrong.
_AUDITED = 0.1
# Seeds that a request for new instructions shows, and functions that are translated back.
_SHOWN, _TRANSLATED = 5, 3
# Positive and negative responses of a prompt that are paired.
_PAIRED = 2


def pipeline(
    *,
    queries: tuple[str, ...],
    query_column: str = "query",
    seeds: tuple[str, ...] = (),
    seed_column: str = "instruction",
    augment: int = 20,
    new: int = 10,
    built_in: int = 0,
    functions: int = 8,
    least_functions: int = 3,
    least_cases: int = 10,
    function_accuracy: float = 0.8,
    queries_each: int = 16,
    shortest_query: int = 20,
    longest_query: int = 300,
    samples: int = 4,
    accuracy: float = 0.5,
    quality: float = 8.0,
    sandboxes: int = 2,
    isolation: Literal["bubblewrap", "none"] = "bubblewrap",
    temperature: float = 0.8,
    answer_tokens: int = 1024,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Make examples of following instructions, verified by functions that run in the sandbox, and by built-in checks.

    Args:
        queries: Files of queries that instructions are added to: JSON lines, JSON, Parquet.
        query_column: Column of the text of a query.
        seeds: Files of instructions to begin with, instead of those that come with the recipe.
        seed_column: Column of the text of an instruction.
        augment: Requests for new instructions.
        new: Instructions that each of them asks for.
        built_in: Instructions of built-in kinds, in turn for each kind.
        functions: Functions that are written for each instruction.
        least_functions: Functions that an instruction must have before they are validated.
        least_cases: Test cases that it must have.
        function_accuracy: Share of the test cases that a function must get right.
        queries_each: Queries that each instruction is combined with.
        shortest_query: Characters of a query at least; other queries are left out.
        longest_query: Characters of a query at most.
        samples: Responses to each query.
        accuracy: Share of the functions that a response must pass to be kept.
        quality: Score, from 1 to 10, above which a response must be.
        sandboxes: Functions that run at the same time.
        isolation: bubblewrap, or none: functions of the model then run with the rights of this process.
        temperature: Of what is written.
        answer_tokens: Of an answer at most.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check(settings)
    known = [q for q in _column(queries, query_column) if shortest_query <= len(q) <= longest_query]
    if not known:
        raise InputError(
            f"{', '.join(queries) or 'No file'} has no query of {shortest_query} to {longest_query} characters in the "
            f"column {query_column}. Give other files or other lengths."
        )
    begun = _column(seeds, seed_column) if seeds else list(verification.SEEDS)
    if not begun:
        raise InputError(f"{', '.join(seeds)} has no instruction. Give files with records, or leave --seeds out.")
    programs = Programs(workers=sandboxes, isolation=isolation, rows=ROWS, limits=LIMITS)
    recipe = _Instructions(programs, settings, known)

    def items() -> Iterator[Item]:
        if augment or seeds:
            programs.require(["python"])
            for text in begun:
                yield make_item({"from": "seed", "instruction": text})
        for number in range(augment):
            yield make_item({"from": "model", "number": number})
        for number in range(built_in):
            yield make_item({"from": "built-in", "kind": list(TEXTS)[number % len(TEXTS)], "number": number})

    made = Pipeline(
        "instructions",
        items,
        [
            Stage("augment", recipe.augment_seeds(begun)),
            Together("once", _once),
            Stage("functions", recipe.write_functions),
            Stage("validate", recipe.validate),
            Stage("translate back", recipe.translate_back),
            Stage("respond", recipe.respond),
            Stage("execute", recipe.execute),
            Stage("score", recipe.score),
        ],
        [Output("sft", _sft), Output("pairs", _pairs), Output("grpo", _prompts), Output("grpo_built_in", _built_in)],
        models=("generator", _JUDGE),
        seed=seed,
        # What is in the files decides the result, and not every query is in an item.
        settings={**settings, "content": content_key(known, begun)},
        measures=programs.measures,
        close=programs.close,
    )
    return cleaned(made, decontaminate, near_duplicates)


def _check(settings: Mapping[str, Any]) -> None:
    if not settings["augment"] and not settings["seeds"] and not settings["built_in"]:
        raise InputError("There are no instructions. Give augment or built_in above 0, or files of seeds.")
    ones = "new functions least_functions least_cases queries_each shortest_query samples sandboxes answer_tokens"
    for name, least in {**dict.fromkeys(ones.split(), 1), "augment": 0, "built_in": 0}.items():
        if settings[name] < least:
            raise InputError(f"{name} must be at least {least}, got {settings[name]}.")
    for name, most in (("function_accuracy", 1), ("accuracy", 1), ("quality", 10)):
        if not 0 < settings[name] <= most:
            raise InputError(f"{name} must lie above 0 and be at most {most}, got {settings[name]}.")
    if settings["least_functions"] > settings["functions"]:
        raise InputError(
            f"least_functions is {settings['least_functions']}, but only {settings['functions']} are written."
        )
    if settings["least_cases"] > 3 * settings["functions"]:
        raise InputError(f"least_cases is {settings['least_cases']}, but each function has three test cases.")


def _column(files: Sequence[str], column: str) -> list[str]:
    """The different texts of a column, in order."""
    if not files:
        return []
    return list(dict.fromkeys(item[column].strip() for item in records(files, {column: str})()))


class _Instructions:
    """The stages, with the sandbox, the options and the queries."""

    def __init__(self, programs: Programs, settings: Mapping[str, Any], queries: Sequence[str]):
        # Draws do not depend on the order of records.
        self._programs, self._settings, self._queries = programs, settings, sorted(queries)
        self._sampling = {"max_tokens": settings["answer_tokens"], "temperature": settings["temperature"]}

    def augment_seeds(self, seeds: Sequence[str]) -> Any:
        """The stage that makes new instructions from seeds."""

        async def augment(item: Item, context: Context) -> Result:
            if item["from"] != "model":
                return item
            shown = item.rng("seeds").sample(sorted(seeds), min(_SHOWN, len(seeds)))
            text = verification.AUGMENT.format(count=self._settings["new"], seeds="\n".join(f"- {s}" for s in shown))
            (answer,) = await context.ask(text, **self._sampling)
            if why := fault(answer, "en"):
                return Rejected(why, answer.text)
            found = verification.read_instructions(answer.text)
            if found is None:
                return Rejected("the instructions cannot be read", answer.text)
            # A model that writes without end is not followed without end.
            return item.without("number").split({"instruction": text} for text in found[: 2 * self._settings["new"]])

        return augment

    async def write_functions(self, item: Item, context: Context) -> Result:
        """The model writes functions, each with test cases."""
        if item["from"] == "built-in":
            return item
        text = verification.WRITE_FUNCTION.format(instruction=item["instruction"])
        answers = await context.ask(text, samples=self._settings["functions"], **self._sampling)
        written: dict[str, verification.Written] = {}
        faults = []
        for answer in answers:
            found = fault(answer) or verification.read_function(answer.text)
            if isinstance(found, str):
                faults.append(found)
            else:
                written.setdefault(found.source, found)
        context.note(functions=len(written), faults=sorted(faults))
        if len(written) < self._settings["least_functions"]:
            return Rejected("too few functions", "; ".join(faults))
        cases = verification.cases_of(list(written.values()))
        if len(cases) < self._settings["least_cases"]:
            return Rejected("too few test cases", f"{len(cases)}")
        return item.update(functions=list(written), cases=[[text, follows] for text, follows in cases.items()])

    async def validate(self, item: Item, context: Context) -> Result:
        """Functions and test cases validate one another, in the sandbox."""
        if item["from"] == "built-in":
            return item
        cases = {text: follows for text, follows in item["cases"]}
        least, follows = self._settings["function_accuracy"], list(cases.values())
        context.note(isolation=self._settings["isolation"])
        answers = await self._answers(context, item["functions"], list(cases))
        if answers is None:
            return Rejected("not judged")
        # Functions that are right, or wrong, because they know the test cases.
        if item.rng("audit").random() < _AUDITED and not verification.one_sided(follows, least):
            tables = [verification.table_function(cases, wrong) for wrong in (False, True)]
            expected = "".join("1" if one else "0" for one in follows)
            for right, line in zip(
                (True, False), await self._answers(context, tables, list(cases)) or (), strict=False
            ):
                passed = verification.share(line, expected, range(len(cases))) >= least
                context.audit("functions in the sandbox", right, passed)
        found = verification.cross_validate(answers, follows, least)
        context.note(functions=len(found.functions), cases=len(found.cases), faults=found.faults)
        if not found.functions:
            # What most functions do that harm themselves is the reason.
            worst = max(found.faults, key=lambda name: found.faults[name], default="")
            broken = sum(found.faults.values()) > len(answers) / 2
            reason = f"most functions fail: {worst}" if broken else "no function agrees with the test cases"
            return Rejected(reason, str(found.faults))
        if verification.one_sided([follows[c] for c in found.cases], least):
            return Rejected("the test cases are one-sided")
        texts = list(cases)
        return item.without("cases").update(
            functions=[item["functions"][i] for i in found.functions],
            certain=[[texts[c], follows[c]] for c in found.certain],
        )

    async def translate_back(self, item: Item, context: Context) -> Result:
        """Functions become instructions again, which must not contradict the first."""
        if item["from"] == "built-in":
            return item
        if item.rng("audit").random() < _AUDITED:
            opposite = verification.OPPOSITE.format(instruction=item["instruction"])
            relation = await self._relation(context, item["instruction"], opposite)
            if not isinstance(relation, Rejected):
                context.audit("contradictions", False, relation != "contradiction")
        functions = item["functions"][:_TRANSLATED]
        found = await all_of([self._compare(context, item["instruction"], function) for function in functions])
        if "contradiction" in found:
            return Rejected("a function contradicts the instruction")
        # One answer that cannot be read proves nothing; if none can, the functions are not known to fit.
        unread = [one for one in found if isinstance(one, Rejected)]
        return unread[0] if len(unread) == len(found) else item

    async def _compare(self, context: Context, instruction: str, function: str) -> str | Rejected:
        """How the instruction that a function seems to check relates to the one that it is for."""
        (answer,) = await context.ask(verification.DESCRIBE.format(function=function), **self._sampling)
        if why := fault(answer, "en"):
            return Rejected(why, answer.text)
        described = verification.field_of(answer.text, "instruction")
        if not isinstance(described, str) or not described.strip():
            return Rejected("the instruction of a function cannot be read", answer.text)
        return await self._relation(context, instruction, described)

    async def _relation(self, context: Context, first: str, second: str) -> str | Rejected:
        text = verification.COMPARE.format(first=first, second=second)
        (answer,) = await context.ask(text, model=_JUDGE, temperature=0.0, max_tokens=self._settings["answer_tokens"])
        if why := fault(answer, "en"):
            return Rejected(why, answer.text)
        relation = verification.field_of(answer.text, "relation")
        known = ("same", "different", "contradiction")
        return relation if relation in known else Rejected("the relation cannot be read", answer.text)

    async def respond(self, item: Item, context: Context) -> Result:
        """The instruction is combined with queries, and responses are sampled."""
        rng = item.rng("queries")
        chosen = rng.sample(self._queries, min(self._settings["queries_each"], len(self._queries)))
        asks: list[dict[str, Any]] = []
        for query in chosen:
            if item["from"] == "built-in":
                drawn = draw(item["kind"], rng, query)
                passed = [check_instruction(drawn.kind, drawn.arguments, text) for text in (drawn.right, drawn.wrong)]
                for right, verdict in zip((True, False), passed, strict=True):
                    context.audit("built-in kinds", right, verdict)
                asks.append({"query": query, "instruction": drawn.text, "arguments": dict(drawn.arguments)})
            else:
                asks.append({"query": query, "instruction": item["instruction"], "arguments": None})
        answers = await all_of(
            [context.ask(_question(ask), samples=self._settings["samples"], **self._sampling) for ask in asks]
        )
        faults = []
        for ask, found in zip(asks, answers, strict=True):
            whys = [fault(answer) for answer in found]
            faults += [why for why in whys if why]
            usable = (answer.text for answer, why in zip(found, whys, strict=True) if why is None)
            ask["responses"] = list(dict.fromkeys(usable))
        context.note(faults=sorted(faults))
        if not any(ask["responses"] for ask in asks):
            return Rejected(max(sorted(set(faults)), key=faults.count), str(len(faults)))
        return item.without("instruction").update(asks=asks)

    async def execute(self, item: Item, context: Context) -> Result:
        """The share of functions that each response passes. A function looks at all responses in one run."""
        asks = item["asks"]
        if item["from"] == "built-in":
            shares = [
                [float(check_instruction(item["kind"], ask["arguments"], text)) for text in ask["responses"]]
                for ask in asks
            ]
            common: dict[str, Any] = {"functions": []}
        else:
            # Some test cases, about which there is no doubt, go with the responses.
            known = item.rng("known").sample(item["certain"], min(4, len(item["certain"])))
            texts = list(dict.fromkeys([*(t for ask in asks for t in ask["responses"]), *(t for t, _ in known)]))
            answers = await self._answers(context, item["functions"], texts)
            if answers is None:
                return Rejected("not judged")
            of = {text: sum(line[i] == "1" for line in answers) / len(answers) for i, text in enumerate(texts)}
            for text, follows in known:
                context.audit("functions on responses", follows, of[text] == 1)
            shares = [[of[text] for text in ask["responses"]] for ask in asks]
            common = {"functions": item["functions"]}
        parts = []
        for ask, line in zip(asks, shares, strict=True):
            scored = [[text, value] for text, value in zip(ask["responses"], line, strict=True)]
            parts.append({**common, **{k: v for k, v in ask.items() if k != "responses"}, "scored": scored})
        # Each part keeps the request for its own query only.
        return [
            dataclasses.replace(part, steps=tuple(step for step in item.steps if _is_of(step, part)))
            for part in item.without("asks", "certain").split(parts)
        ]

    async def score(self, item: Item, context: Context) -> Result:
        """A judge scores the responses that follow the instruction."""
        passed = [text for text, value in item["scored"] if value >= self._settings["accuracy"]]
        if not passed:
            return Rejected("no response follows the instruction")
        question = _question(item)
        if item.rng("audit").random() < _AUDITED:
            bad = await self._score(context, question, verification.BAD_ANSWER)
            if bad is not None:
                context.audit("scores", False, bad > self._settings["quality"])
        scores = await all_of([self._score(context, question, text) for text in passed])
        if all(score is None for score in scores):
            return Rejected("the score cannot be read")
        good = [text for text, s in zip(passed, scores, strict=True) if s is not None and s > self._settings["quality"]]
        if not good:
            return Rejected("low quality", str(scores))
        failed = [text for text, value in item["scored"] if value == 0]
        return item.without("scored").update(good=good, failed=failed)

    async def _score(self, context: Context, question: str, response: str) -> float | None:
        text = verification.SCORE.format(question=question, response=response)
        (answer,) = await context.ask(text, model=_JUDGE, temperature=0.0, max_tokens=self._settings["answer_tokens"])
        return None if fault(answer, "en") else score_of(answer.text)

    async def _answers(self, context: Context, functions: Sequence[str], texts: Sequence[str]) -> list[str] | None:
        """What functions say about texts; None if the machine failed for one of them."""

        def check(source: str) -> Any:
            return lambda: ask_function(self._programs.run, source, texts)

        content = [list(texts), self._settings["isolation"]]
        answers = await all_of(
            [context.check("function in the sandbox", [source, *content], check(source)) for source in functions]
        )
        return None if None in answers else answers


def _once(items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
    """An instruction that was there before, but for spaces, case and punctuation, is rejected."""
    seen = set()
    for item in items:
        if item["from"] == "built-in":
            yield item, item
            continue
        key = content_key(re.sub(r"\W+", " ", item["instruction"]).strip().lower())
        yield item, Rejected("the same instruction") if key in seen else item
        seen.add(key)


def _question(ask: Mapping[str, Any] | Item) -> str:
    return f"{ask['query']}\n\n{ask['instruction']}"


def _is_of(step: Mapping[str, Any], part: Item) -> bool:
    """Whether a step is not the request for another query."""
    asked = step["stage"] == "respond" and "messages" in step
    return not asked or step["messages"][-1]["content"] == _question(part)


def _prompt(item: Item) -> list[dict[str, str]]:
    return [{"role": "user", "content": _question(item)}]


def _sft(item: Item) -> Iterable[Mapping[str, Any]]:
    yield {"messages": [*_prompt(item), {"role": "assistant", "content": item["good"][0]}]}


def _pairs(item: Item) -> Iterable[Mapping[str, Any]]:
    for good in item["good"][:_PAIRED]:
        for bad in item["failed"][:_PAIRED]:
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (good, bad))
            yield {"prompt": _prompt(item), "chosen": chosen, "rejected": rejected}


def _prompts(item: Item) -> Iterable[Mapping[str, Any]]:
    """For the reward `verification`."""
    if item["from"] != "built-in":
        yield {"prompt": _prompt(item), "functions": item["functions"]}


def _built_in(item: Item) -> Iterable[Mapping[str, Any]]:
    """For the reward `instructions`."""
    if item["from"] == "built-in":
        yield {"prompt": _prompt(item), "instruction_id_list": [item["kind"]], "kwargs": [item["arguments"]]}
