"""Tables and nested data: questions, fact verification, error correction and understanding (arXiv:2412.15115, section
4.1).

1. Code makes tables and trees, or reads those of files, and draws questions, statements and faults. It computes their
   answers with a small query language; ties and empty results are left out. Data is shown in several formats.
2. A model words questions and statements. A wording that drops a column or value, has another number or direction, or
   gives the answer away is not used.
3. Each is answered several times. Answers are compared exactly; corrected files are compared by parsing them.
4. Numbers in the reasoning must be in the data, or follow from numbers beside them by one operation.
"""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.text import last_code_block
from train.synthesize.checks import fault, json_of
from train.synthesize.context import Context
from train.synthesize.generator import Answer
from train.synthesize.grounding import numbers_of, ungrounded_number
from train.synthesize.item import Item, Rejected
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.reasoning import answer_line, step_fault
from train.synthesize.sources import checked
from train.synthesize.structured_tasks import TASKS, how_to_end, is_right_answer, tasks_of
from train.synthesize.table_formats import TABLE_FORMATS
from train.synthesize.table_questions import wording_fault

ASK = """{data}

{question}

{how}"""

STEPS = """You read tables and files carefully. Write numbered steps, 1., 2., 3. and so on, each on a line of its own;
say which rows and values you use, and show each calculation as an equation, two numbers at a time. Write nothing after
the line with the answer, or after the code block if one is asked for."""

WORD = """Here is {what} about a table. Say the same as somebody would who looks at the table and talks about it. Names
of columns, values and numbers are written exactly as here. Do not change what is meant, and do not answer.

{text}

Answer with a JSON object and nothing else: {{"text": "..."}}"""

_CLAIM = 'Is this statement supported by the data, refuted by it, or is there not enough information? "{text}"'
_PLANTED = "This uses the number {} of the data.\n"
_NO_WORDING = "What does the data say?"


def pipeline(
    *,
    tables: int = 1000,
    files: tuple[str, ...] = (),
    each: int = 4,
    tasks: tuple[str, ...] = TASKS,
    formats: tuple[str, ...] = TABLE_FORMATS,
    most_rows: int = 20,
    worded: float = 0.7,
    samples: int = 4,
    keep: int = 1,
    least_rate: float = 0.1,
    most_rate: float = 0.9,
    language: str | None = None,
    temperature: float = 0.8,
    response_tokens: int = 2048,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Structured data: tasks about tables and nested data become reasoning with verified answers, pairs, and prompts.

    Args:
        tables: How many tables and trees code makes.
        files: Tables and trees of your own: CSV, TSV, JSON or JSON lines.
        each: Tasks for each table or tree, at most.
        tasks: Kinds of tasks: question, verification, correction, understanding, tree.
        formats: In which tables are shown: markdown, csv, json, yaml, html, outline.
        most_rows: Of a table; of longer ones, neighbouring rows are taken.
        worded: Share of questions and statements that the model words.
        samples: Answers that are sampled for each task.
        keep: Answers to a task that are written at most.
        least_rate: Share of right samples that a task needs to become a prompt of reinforcement learning.
        most_rate: Share of right samples above which a task is too easy to become one.
        language: Code of the language that answers must be in, such as en; by default any.
        temperature: Of sampling.
        response_tokens: Of an answer at most; one that is cut is dropped.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check_options(settings)
    recipe = _StructuredData(settings)
    made = Pipeline(
        "structured_data",
        checked(tasks_of(files, tables, each, tasks, formats, most_rows, seed)),
        [Stage("word", recipe.word), Stage("answer", recipe.answer)],
        [Output("sft", recipe.sft), Output("pairs", recipe.pairs), Output("grpo", recipe.grpo)],
        seed=seed,
        settings=settings,
    )
    return cleaned(made, decontaminate, near_duplicates)


class _StructuredData:
    """The stages and outputs, with their settings."""

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self._sampling = {"temperature": settings["temperature"], "max_tokens": settings["response_tokens"]}

    async def word(self, item: Item, context: Context) -> Result:
        """The question or statement in other words, if nothing shows that it is another one."""
        if not item["needed"] or item.rng("word").random() >= self._settings["worded"]:
            return item
        text, what = item["question"], "a statement" if item["task"] == "verification" else "a question"
        (answer,) = await context.ask(WORD.format(what=what, text=text), **self._sampling)
        value = None if fault(answer, self._settings["language"]) else json_of(answer.text)
        wording = value.get("text") if isinstance(value, dict) else None
        if not isinstance(wording, str) or not wording.strip():
            why: str | None = "no text in the answer"
        else:
            why = wording_fault(wording, text, item["needed"], _to_hide(item))
            if any(one.casefold() not in _NO_WORDING.casefold() for one in item["needed"]):
                dropped = wording_fault(_NO_WORDING, text, item["needed"], None)
                context.audit("wording", False, dropped is None)
            context.audit("wording", True, wording_fault(text, text, item["needed"], _to_hide(item)) is None)
        # What is worded otherwise keeps the words of code.
        context.note(worded=why is None, why=why)
        return item if why or not isinstance(wording, str) else item.update(question=wording.strip(), plain=text)

    async def answer(self, item: Item, context: Context) -> Result:
        """Samples answers, and tells right from wrong."""
        messages = [{"role": "system", "content": STEPS}, *_prompt(item)]
        answers = await context.ask(messages, samples=self._settings["samples"], **self._sampling)
        passed: list[str] = []
        failed: list[str] = []
        faults: list[str] = []
        right_count = 0
        for answer in answers:
            text = answer.text.strip()
            why = self._form_fault(answer, item)
            right = why is None and is_right_answer(item["answer"], item["compare"], text)
            right_count += right
            if why is None and not right:
                why = "wrong answer"
                failed.append(text)
            why = why or self._reasoning_fault(text, item)
            if why is None:
                passed.append(text)
            else:
                faults.append(why)
        _audit(item, context, passed)
        context.note(right=right_count, passed=len(passed), samples=len(answers))
        if not passed:
            # Of several reasons, that of the sample that came furthest.
            return Rejected(max(faults, key=_progress), ", ".join(faults))
        kept = list(dict.fromkeys(passed))[: self._settings["keep"]]
        return item.update(passed=kept, failed=failed, rate=right_count / len(answers))

    def sft(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """Conversations with answers that passed."""
        for text in item["passed"]:
            yield {"messages": [*_prompt(item), {"role": "assistant", "content": text}]}

    def pairs(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """An answer that passed before a wrong one."""
        if item["failed"]:
            yield {
                "prompt": _prompt(item),
                "chosen": [{"role": "assistant", "content": item["passed"][0]}],
                "rejected": [{"role": "assistant", "content": item.rng("pairs").choice(item["failed"])}],
            }

    def grpo(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """The task with its answer, if it is neither too hard nor too easy."""
        if self._settings["least_rate"] <= item["rate"] <= self._settings["most_rate"]:
            columns = {name: item[name] for name in ("answer", "compare", "task")}
            yield {"prompt": _prompt(item), **columns, "pass_rate": item["rate"]}

    def _form_fault(self, answer: Answer, item: Item) -> str | None:
        """What is wrong with the form of an answer."""
        # A file has the language of its values, and repeats itself.
        language = self._settings["language"] if item["compare"] not in _FILES else None
        if (why := fault(answer, language)) is not None:
            return why
        text = answer.text.strip()
        if item["compare"] not in _FILES:
            return "no line with the answer" if answer_line(text) is None else None
        if last_code_block(text) is None or text.count("```") != 2 or not text.endswith("```"):
            return "not one code block at the end"
        return None

    def _reasoning_fault(self, text: str, item: Item) -> str | None:
        """What is wrong with the reasoning to a right answer."""
        if item["compare"] in _FILES:
            return None
        if (why := step_fault(text, item["question"], 1)) is not None:
            return why
        return None if ungrounded_number(text, _numbers(item), item["counts"]) is None else "a number from nowhere"


_FILES = ("csv", "json")
_LATE = ("wrong answer", "a number from nowhere")


def _progress(why: str) -> int:
    return _LATE.index(why) + 1 if why in _LATE else 0


def _numbers(item: Item) -> list[Decimal]:
    """Numbers that reasoning may use: of the data, of the question, and the right answer."""
    texts: Sequence[str] = (item["question"], item["answer"])
    return [*map(Decimal, item["known"]), *(number for text in texts for number in numbers_of(text))]


def _to_hide(item: Item) -> Any:
    """The answer that a wording must not give away."""
    if item["task"] == "verification":
        return None
    if item["compare"] == "number":
        return Decimal(item["answer"])
    return item["answer"].split(", ") if item["compare"] == "set" else item["answer"]


def _prompt(item: Item) -> list[dict[str, str]]:
    """The task as the user sets it."""
    question = item["question"]
    if item["task"] == "verification":
        question = _CLAIM.format(text=question.replace('"', "'"))
    data = f"```{item['form'] if item['form'] in ('csv', 'json', 'yaml', 'html') else ''}\n{item['text']}\n```"
    # A table of Markdown is part of the message.
    data = item["text"] if item["form"] == "markdown" else data
    return [{"role": "user", "content": ASK.format(data=data, question=question, how=how_to_end(item["compare"]))}]


def _audit(item: Item, context: Context, passed: Sequence[str]) -> None:
    """Tries the checks on answers that are known to be right or wrong."""
    shown = (lambda x: f"```\n{x}\n```") if item["compare"] in _FILES else (lambda x: f"Answer: {x}")
    for expected, answer in ((True, item["answer"]), (False, item["wrong"])):
        context.audit("answer", expected, is_right_answer(item["answer"], item["compare"], shown(answer)))
    if passed and item["compare"] not in _FILES:
        # In the first line there is nothing before it that it could follow from.
        known, planted = set(map(abs, _numbers(item))), Decimal("7390451.37")
        while planted in known:
            planted += 1
        found = ungrounded_number(_PLANTED.format(planted) + passed[0], known, item["counts"])
        context.audit("numbers", False, found is None)


def _check_options(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an option out of range."""
    for name in ("each", "samples", "keep", "response_tokens", "most_rows"):
        if settings[name] < 1:
            raise InputError(f"{name} must be at least 1, got {settings[name]}.")
    for name in ("tables", "temperature"):
        if not settings[name] >= 0:
            raise InputError(f"{name} must be at least 0, got {settings[name]}.")
    if not settings["tables"] and not settings["files"]:
        raise InputError("There is nothing to make data of. Ask for tables, or give files.")
    for name, known in (("tasks", TASKS), ("formats", TABLE_FORMATS)):
        if not settings[name] or (unknown := sorted(set(settings[name]) - set(known))):
            got = unknown[0] if settings[name] else "none"
            raise InputError(f"{name} must be some of {', '.join(known)}, got {got}.")
    if not 0 <= settings["worded"] <= 1:
        raise InputError(f"worded must lie between 0 and 1, got {settings['worded']}.")
    if not 0 <= settings["least_rate"] <= settings["most_rate"] <= 1:
        raise InputError(
            f"Expected 0 <= least_rate <= most_rate <= 1, got {settings['least_rate']} and {settings['most_rate']}."
        )
