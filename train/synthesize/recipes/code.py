"""Code whose tests pass in the sandbox, after the Qwen2.5 report (arXiv:2412.15115, section 4.1, "Coding").

The steps:
1. Tasks come from pages with questions and answers, from code snippets of a corpus, and from agents, one for each
   language, that propose tasks.
2. An examiner, of another language where there is one, asks whether the task is well posed. Proposer and examiner each
   write tests.
3. Tasks for whole programs are translated into other languages, with the same tests.
4. Several solutions are sampled. Static checks and the tests run in the sandbox.
5. The tests that the largest group of solutions agrees on are kept (`code_tasks.agreed_tests`). Tests that an empty
   program passes are thrown out, and tasks whose tests let a constant or all changed programs pass.
6. Solutions that pass all of these tests become examples; those that fail become the worse answers of pairs.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.rewards.languages import language_of
from train.rewards.text import last_code_block
from train.sandbox import LANGUAGES
from train.synthesize import code_tasks
from train.synthesize.checks import fault, json_of
from train.synthesize.context import Context, all_of
from train.synthesize.generator import Answer
from train.synthesize.item import Item, Rejected, content_key, make_item
from train.synthesize.overlap import cleaned
from train.synthesize.pipeline import Output, Pipeline, Result, Stage, Together
from train.synthesize.programs import Judged, Programs, static_fault
from train.synthesize.sources import texts

_EXAMINER = "examiner"
# Share of items whose checks judge what is known to be right or wrong.
_AUDITED = 0.1
# Characters of a page or a snippet that a model is shown.
_SHOWN = 6000
_MOST_PAIRS = 2


def pipeline(
    *,
    pages: tuple[str, ...] = (),
    page_column: str = "text",
    snippets: tuple[str, ...] = (),
    snippet_column: str = "text",
    tasks: int = 0,
    languages: tuple[str, ...] = ("python", "javascript", "cpp", "java"),
    functions: float = 0.5,
    translations: int = 1,
    samples: int = 5,
    agree: int = 2,
    tests: int = 5,
    least_tests: int = 3,
    mutants: int = 4,
    kept: int = 1,
    seconds: float = 5.0,
    sandboxes: int = 2,
    isolation: Literal["bubblewrap", "none"] = "bubblewrap",
    temperature: float = 0.8,
    answer_tokens: int = 2048,
    decontaminate: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    seed: int = 0,
) -> Pipeline:
    """Make code examples whose tests pass in the sandbox: tasks, tests, solutions, preference pairs and prompts.

    Args:
        pages: Files of pages with questions and answers: text, JSON lines or Parquet.
        page_column: Field or column of the text of a page.
        snippets: Files of source code.
        snippet_column: Field or column of the text of a snippet.
        tasks: Tasks that the agents propose, in turn for each language.
        languages: Names in the sandbox's table of languages.
        functions: Share of Python tasks that ask for a function, tested by assertions; the others ask for a program.
        translations: Other languages that a task for a program is translated into.
        samples: Solutions of each task.
        agree: Solutions that must pass the same tests.
        tests: Tests that proposer and examiner are each asked for.
        least_tests: Tests that a task must have in the end.
        mutants: Changed copies of a right solution, of which the tests must find one.
        kept: Right solutions of a task that become examples.
        seconds: Time of one test.
        sandboxes: Programs that run at the same time.
        isolation: bubblewrap, or none: programs of the model then run with the rights of this process.
        temperature: Of tasks and solutions.
        answer_tokens: Of an answer at most.
        decontaminate: Evaluation sets, each NAME=FILE, with which no example may share 13 words in a row.
        near_duplicates: Similarity of words, such as 0.8, from which an example repeats an earlier one and is dropped.
        seed: Of all random numbers.
    """
    settings = dict(locals())
    _check(settings)
    sources = [
        (kind, texts(files, field=field, least=40))
        for kind, files, field in (("page", pages, page_column), ("snippet", snippets, snippet_column))
        if files
    ]
    for _, source in sources:
        # An empty file is found before anything is asked.
        next(source())
    programs = Programs(seconds, sandboxes, isolation)
    recipe = _Code(programs, settings)

    def items() -> Iterator[Item]:
        programs.require(list(dict.fromkeys(["python", *languages])))
        for kind, source in sources:
            for item in source():
                yield make_item({"from": kind, "text": item["text"]}, item.sources)
        for number in range(tasks):
            yield make_item({"from": "agent", "number": number})

    made = Pipeline(
        "code",
        items,
        [
            Stage("propose", recipe.propose),
            Together("once", _once),
            Stage("examine", recipe.examine),
            Stage("test", recipe.write_tests),
            Stage("translate", recipe.translate),
            Stage("solve", recipe.solve),
            Stage("verify", recipe.verify),
        ],
        [Output("sft", recipe.sft), Output("pairs", _pairs), Output("grpo", _prompts)],
        models=("generator", _EXAMINER),
        seed=seed,
        settings=settings,
        measures=programs.measures,
        close=programs.close,
    )
    return cleaned(made, decontaminate, near_duplicates)


def _check(settings: Mapping[str, Any]) -> None:
    if not settings["pages"] and not settings["snippets"] and settings["tasks"] < 1:
        raise InputError("There is nothing to make tasks from. Give pages, snippets, or a number of tasks above 0.")
    if unknown := [name for name in settings["languages"] if name not in LANGUAGES]:
        raise InputError(f"There is no language {unknown[0]} in the sandbox. There are {', '.join(LANGUAGES)}.")
    if not settings["languages"]:
        raise InputError("Expected at least one language.")
    least = {"samples": 1, "agree": 1, "tests": 1, "least_tests": 2, "kept": 1, "sandboxes": 1, "answer_tokens": 1}
    for name, bound in {**least, "tasks": 0, "translations": 0, "mutants": 0}.items():
        if settings[name] < bound:
            raise InputError(f"{name} must be at least {bound}, got {settings[name]}.")
    if not 0 <= settings["functions"] <= 1:
        raise InputError(f"functions must lie between 0 and 1, got {settings['functions']}.")
    if settings["agree"] > settings["samples"]:
        raise InputError(f"agree is {settings['agree']}, but there are only {settings['samples']} samples.")
    if not 0 < settings["seconds"] < 600:
        raise InputError(f"seconds must lie between 0 and 600, got {settings['seconds']}.")


class _Code:
    """The stages, with the sandbox and the options."""

    def __init__(self, programs: Programs, settings: Mapping[str, Any]):
        self._programs, self._settings = programs, settings
        self._languages: tuple[str, ...] = settings["languages"]

    async def propose(self, item: Item, context: Context) -> Result:
        """A page, a snippet or nothing becomes a task for a language."""
        rng = item.rng("task")
        agent = item["from"] == "agent"
        language = self._languages[item["number"] % len(self._languages)] if agent else rng.choice(self._languages)
        function = language == "python" and rng.random() < self._settings["functions"]
        ask = {"agent": code_tasks.PROPOSE, "page": code_tasks.FROM_PAGE, "snippet": code_tasks.FROM_SNIPPET}
        text = ask[item["from"]].format(
            language=code_tasks.TITLES.get(language, language),
            level=rng.choice(code_tasks.LEVELS),
            topic=rng.choice(code_tasks.TOPICS),
            text=str(item.get("text", ""))[:_SHOWN],
            **code_tasks.form_of(function),
        )
        answer = await self._ask(context, _role(code_tasks.AGENT, language), text)
        if why := fault(answer, "en"):
            return Rejected(why, answer.text)
        task = code_tasks.read_task(answer.text, function)
        if isinstance(task, str):
            return Rejected(task, answer.text)
        return item.without("text", "number").update(language=language, **task)

    async def examine(self, item: Item, context: Context) -> Result:
        """Another role says whether the task is well posed."""
        examiner = self._examiner(item)
        if item.rng("audit").random() < _AUDITED:
            unclear = await self._well_posed(context, examiner, code_tasks.UNCLEAR)
            if isinstance(unclear, bool):
                context.audit("well posed", False, unclear)
        verdict = await self._well_posed(context, examiner, item["task"])
        if isinstance(verdict, Rejected):
            return verdict
        return item if verdict else Rejected("not well posed", item["task"])

    async def _well_posed(self, context: Context, examiner: str, task: str) -> bool | Rejected:
        system = _role(code_tasks.EXAMINER, examiner)
        answer = await self._ask(
            context, system, code_tasks.EXAMINE.format(task=task), model=_EXAMINER, temperature=0.0
        )
        if why := fault(answer, "en"):
            return Rejected(why, answer.text)
        value = json_of(answer.text)
        verdict = value.get("well_posed") if isinstance(value, dict) else None
        return verdict if isinstance(verdict, bool) else Rejected("the verdict cannot be read", answer.text)

    async def write_tests(self, item: Item, context: Context) -> Result:
        """Proposer and examiner write tests."""
        function = item["function"]
        form = code_tasks.TEST_PROGRAM if function is None else code_tasks.TEST_FUNCTION
        text = form.format(task=item["task"], function=function, count=self._settings["tests"])
        answers = await all_of(
            [
                self._ask(context, _role(code_tasks.AGENT, item["language"]), text),
                self._ask(context, _role(code_tasks.EXAMINER, self._examiner(item)), text, model=_EXAMINER),
            ]
        )
        found: dict[str, dict[str, str]] = {}
        for author, answer in zip(("proposer", "examiner"), answers, strict=True):
            why = fault(answer)
            read = None if why else code_tasks.read_tests(answer.text, function)
            context.note(tests_of=author, fault=why or (None if read else "the tests cannot be read"))
            # One author who writes without end does not outweigh the other.
            for test in (read or [])[: 2 * self._settings["tests"]]:
                found.setdefault(repr(sorted(test.items())), test)
        if len(found) < self._settings["least_tests"]:
            return Rejected("too few tests", f"{len(found)} of {self._settings['least_tests']}")
        return item.update(tests=list(found.values()))

    async def translate(self, item: Item, context: Context) -> Result:
        """A task for a program also becomes tasks for other languages."""
        others = [language for language in self._languages if language != item["language"]]
        count = min(self._settings["translations"], len(others)) if item["function"] is None else 0
        chosen = item.rng("languages").sample(others, count)
        parts = [{"task": item["task"], "language": item["language"], "translated": False}]
        for language in chosen:
            title = code_tasks.TITLES.get(language, language)
            text = code_tasks.TRANSLATE.format(language=title, task=item["task"])
            answer = await self._ask(context, _role(code_tasks.AGENT, language), text)
            why = fault(answer, "en")
            task: dict[str, Any] | str = why or code_tasks.read_task(answer.text, False)
            if isinstance(task, str):
                context.note(translation=language, fault=task)
            else:
                parts.append({"task": task["task"], "language": language, "translated": True})
        return item.split(parts)

    async def solve(self, item: Item, context: Context) -> Result:
        """Samples solutions, and looks at their form."""
        answers = await context.ask(
            _question(item),
            samples=self._settings["samples"],
            max_tokens=self._settings["answer_tokens"],
            temperature=self._settings["temperature"],
        )
        solutions, faults = [], []
        for answer in answers:
            code, why = _code_of(answer, item["language"], item["function"])
            if why is None:
                solutions.append({"text": answer.text, "code": code})
            else:
                faults.append(why)
        context.note(solutions=len(solutions), faults=sorted(faults))
        if len(solutions) < self._settings["agree"]:
            # The commonest fault is the reason.
            return Rejected(max(sorted(set(faults)), key=faults.count) if faults else "too few solutions", str(faults))
        return item.update(solutions=solutions)

    async def verify(self, item: Item, context: Context) -> Result:
        """Runs all solutions, keeps the tests that are to be trusted, and what passes and fails them."""
        function, tests = item["function"], item["tests"]
        context.note(isolation=self._settings["isolation"])
        # Tests that an empty program passes say nothing.
        empty = "pass\n" if function is None else f"def {function}(*args, **kwargs):\n    pass\n"
        idle = await self._judge(context, "python", empty, tests)
        if idle is None:
            return Rejected("not judged")
        if not all(map(code_tasks.expects_nothing, tests)):
            context.audit("tests: an empty program", False, all(idle.passed))
        tests = [test for test, passed in zip(tests, idle.passed, strict=True) if not passed]
        if len(tests) < self._settings["least_tests"]:
            return Rejected("an empty program passes the tests")
        # Run the solutions; what the machine did not judge is left out.
        codes = [solution["code"] for solution in item["solutions"]]
        verdicts = await all_of([self._judge(context, item["language"], code, tests) for code in codes])
        judged = [(s["text"], s["code"], v) for s, v in zip(item["solutions"], verdicts, strict=True) if v is not None]
        if not judged:
            return Rejected("not judged")
        # Which tests are trusted.
        agreed = code_tasks.agreed_tests([v.passed for _, _, v in judged], self._settings["agree"])
        if isinstance(agreed, str):
            return Rejected(agreed)
        trusted = [tests[i] for i in agreed]
        if len(trusted) < max(self._settings["least_tests"], len(tests) / 2):
            return Rejected("solutions and tests disagree", f"{len(trusted)} of {len(tests)} tests")
        if len({code_tasks.expected_of(test) for test in trusted}) < 2:
            return Rejected("a constant passes the tests")
        passed = {text: code for text, code, v in judged if all(v.passed[i] for i in agreed)}
        failed = [text for text, _, v in judged if text not in passed]
        if not await self._find_changes(item, context, next(iter(passed.values())), trusted):
            return Rejected("changed programs pass the tests")
        await self._audit(item, context, trusted)
        return item.without("solutions").update(tests=trusted, passed=list(passed), failed=list(dict.fromkeys(failed)))

    async def _find_changes(self, item: Item, context: Context, code: str, tests: Sequence[Mapping[str, str]]) -> bool:
        """Whether the tests find one of the changed programs; also if none of them can be run."""
        ran = False
        for mutant in code_tasks.changed(code, item.rng("mutants"), self._settings["mutants"]):
            verdict = await self._judge(context, item["language"], mutant, tests)
            if verdict is not None and verdict.fault is None:
                if not all(verdict.passed):
                    return True
                ran = True
        return not ran

    async def _audit(self, item: Item, context: Context, tests: Sequence[Mapping[str, str]]) -> None:
        """Judges a program that is right because it knows the tests, and one that is wrong in one of them."""
        rng = item.rng("audit")
        if item["function"] is not None or rng.random() >= _AUDITED:
            return
        for expected, wrong in ((True, None), (False, rng.randrange(len(tests)))):
            verdict = await self._judge(context, "python", code_tasks.table_program(tests, wrong), tests)
            if verdict is not None:
                context.audit("tests: a table of the outputs", expected, all(verdict.passed))

    async def _judge(
        self, context: Context, language: str, source: str, tests: Sequence[Mapping[str, str]]
    ) -> Judged | None:
        def check() -> dict[str, Any] | None:
            judged = self._programs.judge(language, source, tests)
            return None if judged is None else judged.to_json()

        content = [language, source, list(tests), self._settings["seconds"], self._settings["isolation"]]
        value = await context.check("tests in the sandbox", content, check)
        return None if value is None else Judged.from_json(value)

    async def _ask(self, context: Context, system: Mapping[str, str], text: str, **others: Any) -> Answer:
        sampling = {"temperature": self._settings["temperature"], "max_tokens": self._settings["answer_tokens"]}
        (answer,) = await context.ask([system, {"role": "user", "content": text}], **{**sampling, **others})
        return answer

    def _examiner(self, item: Item) -> str:
        """The language of the examiner: another one than that of the proposer, where there is one."""
        others = [language for language in self._languages if language != item["language"]]
        return item.rng("examiner").choice(others or self._languages)

    def sft(self, item: Item) -> Iterable[Mapping[str, Any]]:
        """The kept solutions as conversations."""
        question = {"role": "user", "content": _question(item)}
        for text in item["passed"][: self._settings["kept"]]:
            yield {"messages": [question, {"role": "assistant", "content": text}]}


def _once(items: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
    """A task that was there before, but for spaces, case and punctuation, is rejected."""
    seen = set()
    for item in items:
        key = content_key(item["language"], re.sub(r"\W+", " ", item["task"]).strip().lower())
        yield item, Rejected("the same task") if key in seen else item
        seen.add(key)


def _role(system: str, language: str) -> dict[str, str]:
    return {"role": "system", "content": system.format(language=code_tasks.TITLES.get(language, language))}


def _question(item: Item) -> str:
    """What the model that is trained is asked."""
    ask = code_tasks.SOLVE_PROGRAM if item["function"] is None else code_tasks.SOLVE_FUNCTION
    title = code_tasks.TITLES.get(item["language"], item["language"])
    note = code_tasks.NOTES.get(item["language"], "")
    return ask.format(task=item["task"], language=title, function=item["function"], note=note)


def _code_of(answer: Answer, language: str, function: str | None) -> tuple[str, str | None]:
    """The program of an answer, or why it is none."""
    if why := fault(answer):
        return "", why
    block = last_code_block(answer.text)
    if block is None:
        return "", "no code block"
    tag, code = block
    row = LANGUAGES[language]
    if tag and tag not in (row.name, *row.others, *(extension.lstrip(".").lower() for extension in row.extensions)):
        return "", "another programming language"
    if language_of(re.sub(r"```.*?```", "", answer.text, flags=re.DOTALL)) not in (None, "en"):
        return "", "another language"
    return code, static_fault(language, code, function)


def _pairs(item: Item) -> Iterable[Mapping[str, Any]]:
    prompt = [{"role": "user", "content": _question(item)}]
    for chosen, rejected in zip(item["passed"][:_MOST_PAIRS], item["failed"][:_MOST_PAIRS], strict=False):
        chosen, rejected = ({"role": "assistant", "content": text} for text in (chosen, rejected))
        yield {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def _prompts(item: Item) -> Iterable[Mapping[str, Any]]:
    yield {
        "prompt": [{"role": "user", "content": _question(item)}],
        "tests": item["tests"],
        "language": item["language"],
    }
