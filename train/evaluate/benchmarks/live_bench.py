"""LiveBench: questions of six categories, by release, with answers that programs check.

The rules are in `live_bench_rules` and `live_bench_tables`. A question of a task without a rule here has no score.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.benchmarks import live_bench_rules as rules
from train.evaluate.benchmarks.lines import Ids, Kinds, check, read_records, texts
from train.evaluate.benchmarks.live_code_bench import PRELUDE, date_of, decoded_tests, passes_tests
from train.evaluate.task import DataFile, Generate, Item, Message, Metric, Response, Task, Tools, Verdict, mean
from train.rewards.text import last_code_block

FILE = DataFile(
    "live_bench/question.jsonl",
    source="github.com/LiveBench/LiveBench: data/live_bench/CATEGORY/TASK/question.jsonl, joined",
)
_MAX_TOKENS = 4096
_CODE = ("LCB_generation", "coding_completion")
_MATH = "amps_hard"

_Found = tuple[float | None, Any, str | None]
"""The score of an answer, what was read in it, and why there is no score."""


def average(items: Sequence[Sequence[Any]]) -> float:
    """The mean over categories of the mean over their tasks of the mean over their questions.

    Args:
      items: category, task and score of each question.
    """
    parts: dict[str, dict[str, list[float]]] = {}
    for category, task, score in items:
        parts.setdefault(category, {}).setdefault(task, []).append(score)
    return mean([mean([mean(scores) for scores in tasks.values()]) for tasks in parts.values()])


class LiveBench(Task):
    """The questions of a release. The last answer of a conversation counts, without what stands in think tags."""

    citation = "White et al. 2024, LiveBench, arXiv:2406.19314"
    files = (FILE,)
    metrics = (Metric("average", aggregate=average, of_details=True), Metric("score"))

    def __init__(self, name: str, release: str = ""):
        """
        Args:
          name: of the task.
          release: its date, such as "2024-08-31": questions that came by then, and were not removed by then; "" for
            those that have not been removed.

        Raises:
          InputError: the release is no date.
        """
        if release and date_of(release) != release:
            raise InputError(f"A release is a date such as 2024-08-31, got {release!r}.")
        self.name, self._release = name, release
        # Tests of programs by the id of the question. They are many megabytes.
        self._tests: dict[str, tuple[str, ...]] = {}

    def template(self) -> str:
        """See `Task.template`."""
        return (
            "{turns}\n---\nthe last answer, without <think>...</think>; rules of each task as published\n"
            f"release {self._release or 'the newest'}, max_tokens: {_MAX_TOKENS}, greedy\n"
            "AMPS_Hard: the last \\boxed{}, or the last formula of the last line; equal by train.rewards.math\n"
            f"programs: the last fenced code block, after partial_solution where it does not begin so; {PRELUDE!r}"
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        ids = Ids()
        found, releases = [], set()
        kinds: Kinds = {"category": str, "task": str, "question_id": (str, int), "livebench_release_date": str}
        for where, record in read_records(files[FILE.path], kinds):
            came = _date(where, record, "livebench_release_date")
            left = _date(where, record, "livebench_removal_date") if record.get("livebench_removal_date") else ""
            releases.add(came)
            item = self._item(where, record, came)
            ids.new(where, item.id)
            if self._release:
                belongs = came <= self._release and (not left or left > self._release)
            else:
                belongs = not left
            if belongs:
                found.append(item)
        if not found:
            raise InputError(
                f"{self.name}: {files[FILE.path]} has no question of the release {self._release or 'that is newest'}. "
                f"Its questions came at {', '.join(sorted(releases))}."
            )
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Generate]:
        """See `Task.requests`."""
        turns = item.fields["turns"]
        # Nothing can score an answer.
        if item.fields["unscored"]:
            return ()
        # After an error there is nothing to go on with.
        if len(rounds) == len(turns) or any(response.error is not None for (response,) in rounds):
            return ()
        messages: list[Message] = []
        for turn, (response,) in zip(turns, rounds, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": response.text}]
        return (Generate((*messages, {"role": "user", "content": turns[len(rounds)]}), _MAX_TOKENS),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        found: dict[int, _Found] = {}
        answers: dict[str, dict[int, str]] = {"rule": {}, "math": {}, "code": {}}
        for i, (item, rounds) in enumerate(zip(items, responses, strict=True)):
            # No score: an answer that is missing, a task without a rule.
            errors = [response.error for (response,) in rounds if response.error is not None]
            if errors or item.fields["unscored"]:
                found[i] = None, None, errors[0] if errors else item.fields["unscored"]
            else:
                answers[item.fields["way"]][i] = rules.without_thoughts(rounds[-1][0].text)
        for i, answer in answers["rule"].items():
            fields = items[i].fields
            rule = rules.rule_of(fields["task"], fields["subtask"], fields["category"])
            assert rule is not None
            found[i] = rule(fields, answer), None, None
        found |= _mathematics(items, answers["math"], tools)
        found |= self._programs(items, answers["code"], tools)
        return [_verdict(item, found[i], responses[i]) for i, item in enumerate(items)]

    def _item(self, where: str, record: Mapping[str, Any], came: str) -> Item:
        turns = texts(where, record, "turns")
        if not turns:
            raise InputError(f"{where}: the field turns must have a text, found none.")
        name = str(record["question_id"])
        fields: dict[str, Any] = {
            "category": record["category"],
            "task": record["task"],
            "subtask": record["subtask"] if isinstance(record.get("subtask"), str) else "",
            "turns": turns,
            "question": turns[0],
            "truth": record.get("ground_truth"),
            "release": came,
            "unscored": None,
            "way": "rule",
        }
        groups = {"category": fields["category"], "task": fields["task"]}
        rule = rules.rule_of(fields["task"], fields["subtask"], fields["category"])
        if rule is not None:
            fields |= {key: record.get(key) for key in ("instruction_id_list", "kwargs")}
            # A truth that the rule cannot read is found before the model is asked.
            try:
                rule(fields, "")
            except InputError as error:
                if rule not in (rules.instructions, rules.table_form):
                    raise InputError(f"{where}: {error}") from None
                # Kinds of instructions and formats of tables that are not here.
                fields["unscored"] = f"{fields['task']}: {error}"
        elif _MATH in (fields["subtask"] or fields["task"]).lower():
            fields["way"] = "math"
            truth = fields["truth"]
            fields["truth"] = truth = truth[-1] if isinstance(truth, list) and truth else truth
            if not isinstance(truth, str) or not truth.strip():
                raise InputError(f"{where}: expected ground_truth, a formula; found {truth!r:.60}.")
        elif fields["task"] in _CODE:
            fields["way"] = "code"
            fields |= self._code(where, record, name)
        else:
            why = rules.WITHOUT_RULE.get(fields["task"], "it is not known here")
            fields["unscored"] = f"there is no rule for the task {fields['task']} here: {why}"
        return Item(name, fields, groups)

    def _code(self, where: str, record: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The fields of a question that asks for a program. Its tests are kept apart."""
        given = ("public_test_cases", "private_test_cases")
        for field in given:
            check(where, record, field, str)
        self._tests[name] = tuple(record[field] for field in given)
        try:
            source = record.get("original_json") or {}
            source = json.loads(source) if isinstance(source, str) else source
            method = json.loads(source.get("metadata") or "{}").get("func_name") or ""
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"{where}: original_json must be an object whose metadata is the text of one.") from None
        if not isinstance(method, str) or (method and not method.isidentifier()):
            raise InputError(f"{where}: func_name must be the name of a method, found {method!r:.40}.")
        return {"where": where, "method": method, "partial": record.get("partial_solution") or ""}

    def _programs(self, items: Sequence[Item], answers: Mapping[int, str], tools: Tools) -> dict[int, _Found]:
        """Runs the programs in the answers."""

        def one(i: int) -> _Found:
            item = items[i]
            if tools.sandbox is None:
                return None, None, "there is no sandbox to run programs in"
            if item.id not in self._tests:
                return None, None, "the tests have not been read: call `items` first"
            block = last_code_block(answers[i])
            if block is None or not block[1].strip():
                return 0.0, None, None
            partial = item.fields["partial"]
            program = block[1] if not partial or block[1].startswith(partial) else f"{partial}\n{block[1]}"
            try:
                where = item.fields["where"]
                tests = [test for text in self._tests[item.id] for test in decoded_tests(where, text)]
                if not tests:
                    return None, program, f"{where}: the question has no tests"
                tried = passes_tests(tests, item.fields["method"], f"{PRELUDE}\n{program}", tools.sandbox)
            except InputError as error:
                return None, program, str(error)
            passed = tried.passed["pass"]
            return (None, program, tried.reason) if passed is None else (float(passed), program, None)

        with ThreadPoolExecutor(max(1, tools.workers), "programs") as threads:
            return dict(zip(answers, threads.map(one, answers), strict=True))


def _mathematics(items: Sequence[Item], answers: Mapping[int, str], tools: Tools) -> dict[int, _Found]:
    """Compares expressions by math-verify."""
    if not answers:
        return {}
    # Not at the top: it starts processes and needs a package that listing tasks does not.
    from train.rewards.math import MathReward

    spans = {i: rules.expression(answer) for i, answer in answers.items()}
    read = [i for i, span in spans.items() if span is not None]
    reward = MathReward(workers=max(1, tools.workers))
    try:
        truths = [items[i].fields["truth"] for i in read]
        scores = reward([f"\\boxed{{{spans[i]}}}" for i in read], [True] * len(read), answer=truths)
    finally:
        reward.close()
    found: dict[int, _Found] = {
        i: (score, spans[i], "the answer could not be compared" if score is None else None)
        for i, score in zip(read, scores, strict=True)
    }
    for i, answer in answers.items():
        if spans[i] is None:
            # Without a formula the truth itself must end the answer.
            found[i] = float(answer.strip().removesuffix(".").endswith(items[i].fields["truth"])), None, None
    return found


def _verdict(item: Item, found: _Found, rounds: Sequence[Sequence[Response]]) -> Verdict:
    score, read, problem = found
    fields = item.fields
    details: dict[str, Any] = {"answer": read, "expected": fields["truth"]}
    if any(response.finish == "length" for (response,) in rounds):
        details["cut"] = 1
    if score is not None:
        details["average"] = [fields["category"], fields["task"], score]
    return Verdict({"average": score, "score": score}, details, problem)


def _date(where: str, record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    date = date_of(value) if isinstance(value, str) else None
    if date is None:
        raise InputError(f"{where}: {name} must begin with a date such as 2024-08-31, found {value!r:.40}.")
    return date


TASKS = (LiveBench("live_bench"), LiveBench("live_bench_2408", "2024-08-31"))
