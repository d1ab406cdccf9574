"""Synthetic documents for pre-training, from seed documents: knowledge, mathematics and code (arXiv:2412.15115, 3.1).

1. Documents of a corpus are measured; damaged ones, and those that are too short or too long, are left out.
2. A model writes of each a text of a textbook, and questions with answers, a problem with its solution, or an exercise
   with its program and tests. Code checks form, language, length, that little is copied, and that numbers and names are
   those of the document.
3. Other samples, which see the problem or the exercise alone, must reach its answer or pass its tests; programs run in
   the sandbox.
4. A judge drops texts that say what the document does not, or that need it to be understood; and a reward model, if one
   is given, texts with a low score.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.rewards.text import answer_span
from train.sandbox import Outcome
from train.synthesize import code_tasks
from train.synthesize.agreement import agree
from train.synthesize.checks import fault, json_of, object_of, unbalanced_fences
from train.synthesize.context import Context, all_of
from train.synthesize.generator import Answer
from train.synthesize.item import Item, Rejected
from train.synthesize.knowledge_prompts import (
    CRITERIA,
    EXERCISE,
    FORMS,
    JUDGE,
    PROBLEM,
    QUESTIONS,
    SOLVE,
    STRANGE,
    STYLES,
    TEXTBOOK,
    TEXTBOOK_KIND,
    Kind,
)
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage
from train.synthesize.programs import Judged, Programs, static_fault
from train.synthesize.reasoning import box_fault, false_equation, step_fault
from train.synthesize.recipes.mathematics import equal
from train.synthesize.scoring import RewardScores
from train.synthesize.seed_documents import TO_THE_DOCUMENT, copied_share, name_fault, number_fault, shared_subject
from train.synthesize.sources import checked, texts

_AUDITED = 0.25
_LEAST_QUESTION, _MOST_QUESTION, _LEAST_TASK = 10, 600, 40
_PYTHON = re.compile(r"```(?:python|py)[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
_CODE = re.compile(r"```[^\n]*\n.*?\n?```", re.DOTALL)


def pipeline(
    *,
    corpus: tuple[str, ...],
    kind: Kind = "knowledge",
    forms: tuple[str, ...] = (),
    versions: int = 1,
    field: str = "text",
    least_words: int = 80,
    most_words: int = 3000,
    least_length: float = 0.3,
    most_length: float = 2.0,
    most_copied: float = 0.2,
    least_subject: float = 0.4,
    names: bool = True,
    questions: int = 5,
    least_questions: int = 2,
    samples: int = 3,
    agreement: float = 0.6,
    tests: int = 5,
    least_tests: int = 3,
    scorer: str = "",
    least_score: float | None = None,
    seconds: float = 10.0,
    sandboxes: int = 2,
    isolation: Literal["bubblewrap", "none"] = "bubblewrap",
    language: str | None = None,
    temperature: float = 0.8,
    answer_tokens: int = 4096,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Documents for pre-training: seed documents become texts of textbooks, questions, problems and exercises.

    Models: generator; judge.

    Args:
        corpus: Files of seed documents: text, JSON lines or Parquet, or folders of them.
        kind: What the documents are of, which decides the forms and the checks.
        forms: Some of them: textbook; questions (of knowledge), problem (of mathematics), exercise (of code). By
            default both of the kind.
        versions: Texts of each form that are written of a document.
        field: JSON field or Parquet column that holds the text.
        least_words: Words that a document must have.
        most_words: Words that a document may have.
        least_length: Words of a textbook's text over those of the document, at least.
        most_length: The same, at most.
        most_copied: Share of a text's runs of 8 words that may stand in the document.
        least_subject: Share of a text's long words that the document must have.
        names: Whether words with a capital letter within a sentence must stand in the document.
        questions: Questions that are asked for.
        least_questions: Questions that must be left.
        samples: Solutions of others to a problem or an exercise.
        agreement: Share of them that must give the same answer or pass all tests; above 0.5.
        tests: Tests of an exercise that are asked for.
        least_tests: Tests that it must have.
        scorer: FILE.py:function as of rewards, such as one of a reward model, that scores texts.
        least_score: Texts with a lower score are dropped.
        seconds: Of one test in the sandbox.
        sandboxes: Programs at one time.
        isolation: bubblewrap, or none: programs of the model then run with the rights of this process.
        language: Code of the language that documents and texts must be in, such as en; by default any.
        temperature: Of sampling.
        answer_tokens: Of an answer at most; one that is cut is dropped.
        decontaminate: Evaluation sets, each NAME=FILE, with which no text may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which a text repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check_options(settings)
    settings["forms"] = forms = forms or FORMS[kind]
    programs = Programs(seconds, sandboxes, isolation)
    recipe = _Knowledge(settings, programs)
    if recipe.scorer is not None:
        # Another function under the same name scores anew.
        settings["scorer_code"] = recipe.scorer.code
    source = checked(texts([str(Path(path).expanduser()) for path in corpus], "auto", field, 1, 40 * most_words))

    def items() -> Iterator[Item]:
        if kind == "code":
            programs.require(["python"])
        yield from source()

    last = [Stage("score", recipe.score)] if scorer else []
    made = Pipeline(
        "knowledge",
        items,
        [
            Stage("measure", recipe.measure),
            Stage("write", recipe.write),
            Stage("verify", recipe.verify),
            Stage("judge", recipe.judge),
            *last,
        ],
        [Output("documents", recipe.rows)],
        models=("generator", "judge"),
        seed=seed,
        settings=settings,
        measures=programs.measures,
    )
    return cleaned(made, decontaminate, near_duplicates)


class _Knowledge:
    """The stages and the output, with their settings."""

    def __init__(self, settings: Mapping[str, Any], programs: Programs):
        self._settings, self._programs = settings, programs
        self._sampling = {"temperature": settings["temperature"], "max_tokens": settings["answer_tokens"]}
        self.scorer = RewardScores(settings["scorer"]) if settings["scorer"] else None

    async def measure(self, item: Item, context: Context) -> Result:
        """Looks at the form of a document, and plans what is written of it."""
        text = item["text"].strip()
        count = len(text.split())
        if count < self._settings["least_words"]:
            return Rejected("too short")
        if count > self._settings["most_words"]:
            return Rejected("too long")
        if why := fault(Answer(text), self._settings["language"], refusals=False):
            return Rejected(why)
        versions = range(self._settings["versions"])
        plan = [{"form": form, "version": v, "document": text} for form in self._settings["forms"] for v in versions]
        return item.without("text").split(plan)

    async def write(self, item: Item, context: Context) -> Result:
        """Writes a text, and checks what code can see of it."""
        form, document = item["form"], item["document"]
        prompt = {"textbook": TEXTBOOK, "questions": QUESTIONS, "problem": PROBLEM, "exercise": EXERCISE}[form].format(
            document=document,
            style=item.rng("style").choice(STYLES),
            kind=TEXTBOOK_KIND[self._settings["kind"]],
            count=self._settings["questions" if form == "questions" else "tests"],
        )
        (answer,) = await context.ask(prompt, **self._sampling)
        # JSON and code do not show their language; what they hold is looked at below.
        if why := fault(answer, self._settings["language"] if form == "textbook" else None):
            return Rejected(f"{form}: {why}", answer.text)
        read = {"textbook": self._textbook, "questions": self._questions, "problem": self._problem,
                "exercise": self._exercise}[form]  # fmt: skip
        found = read(answer.text.strip(), document, context)
        if isinstance(found, str):
            return Rejected(f"{form}: {found}", answer.text)
        if form in ("textbook", "questions"):
            self._audit_numbers(item, context, found["parts"][0])
        return item.update(**found)

    async def verify(self, item: Item, context: Context) -> Result:
        """Runs programs, and compares answers of samples that see the problem or the exercise alone."""
        why: str | None = None
        if item["form"] == "problem":
            why = await self._unsolved(item, context)
        elif item["form"] == "exercise":
            why = await self._untested(item, context)
        elif self._settings["kind"] == "code":
            why = await self._unrunnable(item["parts"], context)
        return item if why is None else Rejected(f"{item['form']}: {why}", "\n\n".join(item["parts"]))

    async def judge(self, item: Item, context: Context) -> Result:
        """Drops what the judge finds wrong: the text, or some of its questions."""
        # Problems and exercises have other quantities than the document, and are verified.
        if item["form"] not in ("textbook", "questions"):
            return item.without("document")
        document, parts = item["document"], item["parts"]
        verdicts = await all_of([self._verdict(document, part, context) for part in parts])
        whys = [
            "the judge gives no verdict" if v is None else next((w for n, w in CRITERIA.items() if not v[n]), None)
            for v in verdicts
        ]
        kept = [part for part, why in zip(parts, whys, strict=True) if why is None]
        least = self._settings["least_questions"] if item["form"] == "questions" else 1
        if len(kept) < least:
            return Rejected(_commonest([why for why in whys if why]), "\n\n".join(parts))
        context.note(judged=whys)
        await self._audit_judge(item, context, kept[0])
        return item.without("document").update(parts=kept)

    async def score(self, item: Item, context: Context) -> Result:
        """Drops texts that the reward function scores low."""
        assert self.scorer is not None
        columns = {"kind": self._settings["kind"], "form": item["form"]}
        (value,) = await self.scorer.scores(context, "", ["\n\n".join(item["parts"])], columns)
        if value is None:
            return Rejected("no score")
        least = self._settings["least_score"]
        if least is not None and value < least:
            return Rejected("the score is too low", f"{value:g}")
        return item.update(score=value)

    def rows(self, item: Item) -> Iterator[Mapping[str, Any]]:
        """One document, as `qwen-jax data build` reads it."""
        row = {"text": "\n\n".join(item["parts"]), "kind": self._settings["kind"], "form": item["form"]}
        yield row if item.get("score") is None else {**row, "score": item["score"]}

    def _textbook(self, text: str, document: str, context: Context) -> dict[str, Any] | str:
        """A text of a textbook, or why it cannot be used."""
        ratio = len(text.split()) / len(document.split())
        if not self._settings["least_length"] <= ratio <= self._settings["most_length"]:
            return "too short" if ratio < 1 else "too long"
        if unbalanced_fences(text):
            return "an open block of code"
        return self._grounding_fault(text, document) or {"parts": [text]}

    def _questions(self, text: str, document: str, context: Context) -> dict[str, Any] | str:
        """The questions with their answers that can be used, or why too few can."""
        pairs = json_of(text)
        if not isinstance(pairs, list) or not pairs:
            return "no questions in the answer"
        parts, faults, seen = [], [], set()
        for pair in pairs:
            one = [pair.get(name) if isinstance(pair, dict) else None for name in ("question", "answer")]
            if not all(isinstance(value, str) and value.strip() for value in one):
                faults.append("no questions in the answer")
                continue
            question, answer = (str(value).strip() for value in one)
            part = f"Question: {question}\nAnswer: {answer}"
            why = self._grounding_fault(part, document) or fault(Answer(answer), self._settings["language"])
            if not _LEAST_QUESTION <= len(question) <= _MOST_QUESTION:
                why = "a question of another length"
            elif question.casefold() in seen or answer.casefold() in seen:
                why = "a question comes twice"
            if why is None:
                parts.append(part)
                seen |= {question.casefold(), answer.casefold()}
            else:
                faults.append(why)
        context.note(questions=len(parts), faults=sorted(faults))
        return (
            {"parts": parts} if len(parts) >= self._settings["least_questions"] else _commonest(faults or ["too few"])
        )

    def _problem(self, text: str, document: str, context: Context) -> dict[str, Any] | str:
        """A problem with its solution, or why it cannot be used."""
        value = json_of(text)
        problem, solution = (value.get(n) if isinstance(value, dict) else None for n in ("problem", "solution"))
        if not isinstance(problem, str) or not isinstance(solution, str) or len(problem.strip()) < _LEAST_TASK:
            return "no problem in the answer"
        why = (
            fault(Answer(solution), self._settings["language"])
            or ("it speaks of the document" if TO_THE_DOCUMENT.search(f"{problem}\n{solution}") else None)
            or box_fault(solution)
            or step_fault(solution, problem)
        )
        if why is None and self._copies(problem, document):
            why = "it copies the document"
        parts = [f"Problem: {problem.strip()}", f"Solution:\n{solution.strip()}"]
        return why or {"parts": parts, "problem": problem.strip(), "answer": answer_span(solution)}

    def _exercise(self, text: str, document: str, context: Context) -> dict[str, Any] | str:
        """An exercise with its program and tests, or why it cannot be used."""
        value = json_of(text)
        task = code_tasks.read_task(json.dumps(value), True) if isinstance(value, dict) else "the task cannot be read"
        if isinstance(task, str):
            return task
        assert isinstance(value, dict)
        if len(task["task"]) < _LEAST_TASK or TO_THE_DOCUMENT.search(task["task"]):
            return "it speaks of the document" if len(task["task"]) >= _LEAST_TASK else "the task cannot be read"
        if why := fault(Answer(task["task"]), self._settings["language"]):
            return why
        solution = value.get("solution")
        if not isinstance(solution, str):
            return "no solution in the answer"
        solution = "\n".join(_PYTHON.findall(solution)) or solution
        if why := static_fault("python", solution, task["function"]):
            return why
        found = code_tasks.read_tests(json.dumps(value.get("tests")), task["function"]) or []
        found = list({test["code"]: test for test in found}.values())
        if len(found) < self._settings["least_tests"]:
            return "too few tests"
        if len({code_tasks.expected_of(test) for test in found}) < 2:
            return "a constant passes the tests"
        shown = "\n".join(test["code"] for test in found)
        parts = [f"Exercise: {task['task']}", f"```python\n{solution.strip()}\n```", f"```python\n{shown}\n```"]
        return {"parts": parts, **task, "solution": solution, "tests": found}

    def _grounding_fault(self, text: str, document: str) -> str | None:
        """Why a text does not stand on its document, in a few words; None if it seems to."""
        prose = text if self._settings["kind"] != "code" else _CODE.sub("", text)
        if TO_THE_DOCUMENT.search(prose):
            return "it speaks of the document"
        if number_fault(prose, document, self._settings["kind"] == "mathematics") is not None:
            return "a number that the document lacks"
        if self._settings["kind"] == "mathematics" and false_equation(prose):
            return "a false equation"
        if self._settings["names"] and name_fault(prose, document) is not None:
            return "a name that the document lacks"
        shared = shared_subject(prose, document)
        if shared is not None and shared < self._settings["least_subject"]:
            return "another subject"
        return "it copies the document" if self._copies(prose, document) else None

    def _copies(self, text: str, document: str) -> bool:
        return copied_share(text, document) > self._settings["most_copied"]

    async def _unsolved(self, item: Item, context: Context) -> str | None:
        """Why a problem's answer is not that of samples; None if it is."""
        gold = item["answer"]
        if gold is None:
            return "no final answer in a box"
        prompt = SOLVE.format(problem=item["problem"])
        answers = await context.ask(prompt, samples=self._settings["samples"], **self._sampling)
        spans = [None if fault(answer) else answer_span(answer.text) for answer in answers]
        found = await agree(spans, lambda one, other: equal(context, one, other))
        if found is None or found.share < self._settings["agreement"]:
            return "samples do not agree"
        if item.rng("audit").random() < _AUDITED and (wrong := await equal(context, gold, f"{gold} + 1")) is not None:
            context.audit("math", False, wrong)
        return None if await equal(context, found.answer, gold) is True else "samples have another answer"

    async def _untested(self, item: Item, context: Context) -> str | None:
        """Why an exercise's tests cannot be trusted; None if they can."""
        name, tests = item["function"], item["tests"]
        judged = await self._run(context, item["solution"], tests)
        if judged is None:
            return "not judged"
        if judged.fault is not None or not all(judged.passed):
            return judged.fault or "the solution fails a test"
        empty = await self._run(context, f"def {name}(*args, **kwargs):\n    pass\n", tests)
        if empty is None:
            return "not judged"
        context.audit("tests: an empty program", False, all(empty.passed))
        # Others, who know the task alone.
        prompt = code_tasks.SOLVE_FUNCTION.format(task=item["task"], function=name)
        answers = await context.ask(prompt, samples=self._settings["samples"], **self._sampling)
        codes = ["" if fault(answer) else "\n".join(_PYTHON.findall(answer.text)) for answer in answers]
        usable = [code for code in codes if static_fault("python", code, name) is None]
        verdicts = await all_of([self._run(context, code, tests) for code in usable])
        passed = sum(one is not None and one.fault is None and all(one.passed) for one in verdicts)
        context.note(passed=passed, samples=len(codes))
        return None if passed >= self._settings["agreement"] * len(codes) else "other solutions fail the tests"

    async def _unrunnable(self, parts: Sequence[str], context: Context) -> str | None:
        """Why the Python of a text does not run, its blocks one after another; None if it does, or there is none."""
        source = "\n\n".join(block for part in parts for block in _PYTHON.findall(part))
        if not source.strip():
            return None
        if why := static_fault("python", source):
            return why

        def check() -> bool | None:
            outcome = self._programs.run("python", source).outcome
            return None if outcome is Outcome.ERROR else outcome is Outcome.PASS

        ran = await context.check("run", [source, self._settings["seconds"]], check)
        return None if ran else "not judged" if ran is None else "its code does not run"

    async def _run(self, context: Context, source: str, tests: Sequence[Mapping[str, str]]) -> Judged | None:
        def check() -> dict[str, Any] | None:
            judged = self._programs.judge("python", source, tests)
            return None if judged is None else judged.to_json()

        found = await context.check("tests", [source, list(tests), self._settings["seconds"]], check)
        return None if found is None else Judged.from_json(found)

    async def _verdict(self, document: str, text: str, context: Context) -> dict[str, bool] | None:
        prompt = JUDGE.format(document=document, text=text)
        (found,) = await context.ask(prompt, model="judge", temperature=0.0, max_tokens=1024)
        value = object_of(found)
        verdict = {name: value.get(name) for name in CRITERIA}
        return verdict if all(isinstance(one, bool) for one in verdict.values()) else None  # type: ignore[return-value]

    async def _audit_judge(self, item: Item, context: Context, part: str) -> None:
        """Lets the judge look at a text with a sentence that no document has, and at half of a text."""
        if item.rng("judge").random() >= _AUDITED:
            return
        # Half of it ends within a sentence.
        half = part[: len(part) // 2].rpartition(" ")[0].rstrip(" .!?\n")
        for name, text in (("supported", f"{part} {STRANGE}"), ("whole", half)):
            verdict = await self._verdict(item["document"], text, context)
            if verdict is not None:
                context.audit(f"judge, {name}", False, verdict[name])

    def _audit_numbers(self, item: Item, context: Context, part: str) -> None:
        """The check of numbers has to see one that no document has."""
        if item.rng("numbers").random() < _AUDITED:
            derived = self._settings["kind"] == "mathematics"
            planted = f"{part}\nIt was {item.rng('planted').randrange(10**8, 10**9)}.5 in all."
            context.audit("numbers", True, number_fault(part, item["document"], derived) is None)
            context.audit("numbers", False, number_fault(planted, item["document"], derived) is None)


def _commonest(faults: Sequence[str]) -> str:
    return max(sorted(set(faults)), key=faults.count)


def _check_options(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an option out of range."""
    for name in ("versions", "least_words", "questions", "least_questions", "samples", "answer_tokens", "sandboxes"):
        if settings[name] < 1:
            raise InputError(f"{name} must be at least 1, got {settings[name]}.")
    if settings["kind"] not in FORMS:
        raise InputError(f"kind must be one of {', '.join(FORMS)}, got {settings['kind']!r}.")
    allowed = FORMS[settings["kind"]]
    if unknown := [form for form in settings["forms"] if form not in allowed]:
        raise InputError(f"Documents of {settings['kind']} have the forms {', '.join(allowed)}, got {unknown[0]!r}.")
    if not settings["least_words"] <= settings["most_words"]:
        raise InputError(f"least_words is above most_words: {settings['least_words']}, {settings['most_words']}.")
    if not 0 <= settings["least_length"] <= settings["most_length"]:
        raise InputError(
            f"Expected 0 <= least_length <= most_length, got {settings['least_length']}, {settings['most_length']}."
        )
    for name in ("most_copied", "least_subject"):
        if not 0 <= settings[name] <= 1:
            raise InputError(f"{name} must lie between 0 and 1, got {settings[name]}.")
    if not 0.5 < settings["agreement"] <= 1:
        raise InputError(f"agreement must be above 0.5 and at most 1, got {settings['agreement']}.")
    if not 2 <= settings["least_tests"] <= settings["tests"]:
        raise InputError(f"Expected 2 <= least_tests <= tests, got {settings['least_tests']} and {settings['tests']}.")
    if settings["least_score"] is not None and not settings["scorer"]:
        raise InputError("least_score needs scores. Give --scorer too.")
    if not 0 < settings["seconds"] < 600 or not settings["temperature"] >= 0:
        raise InputError(f"Out of range: seconds {settings['seconds']} or temperature {settings['temperature']}.")
