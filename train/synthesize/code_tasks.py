"""Programming tasks and their tests: what models are asked, how their answers are read, and which tests are trusted."""

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from train.synthesize.checks import json_of

# Names as they stand in prompts.
TITLES = {
    "python": "Python", "javascript": "JavaScript", "typescript": "TypeScript", "c": "C", "cpp": "C++", "java": "Java",
    "go": "Go", "rust": "Rust", "csharp": "C#", "php": "PHP", "bash": "Bash", "r": "R", "perl": "Perl",
}  # fmt: skip
TOPICS = (
    "text processing", "dates and times", "parsing a small format", "sorting and searching", "graphs", "trees",
    "dynamic programming", "number theory", "geometry on a grid", "simulation of a machine", "intervals", "matrices",
    "stacks and queues", "counting and grouping records", "bit manipulation", "games with rules", "scheduling",
    "string matching", "money and units", "validation of data", "recursion", "greedy choices", "state machines",
)  # fmt: skip
LEVELS = ("easy", "of medium difficulty", "hard")

AGENT = "You are an experienced {language} programmer who writes exercises for other programmers."
EXAMINER = (
    "You are a strict examiner who programs in {language}. You look for tasks that are unclear and for wrong tests."
)
_PROGRAM = (
    "The solution is a whole program that reads standard input and writes standard output. Say exactly what the input "
    "and the output look like, and give one example. For each input there must be exactly one right output."
)
_FUNCTION = (
    "The solution is one Python function. Say its name, its arguments and what it returns, and give one example. For "
    "the same arguments it always returns the same value, which can be compared with ==."
)
_TASK_REPLY = (
    'Reply with a JSON object and nothing else: {{"task": the text of the task in English, "function": {function}}}.'
)
PROPOSE = "Propose one programming task for {language} that is {level}. Its subject: {topic}.\n{form}\n" + _TASK_REPLY
FROM_PAGE = (
    "Below is a page with questions and answers. Write one programming task for {language} that a question of the page "
    "leads to. It must be understood without the page.\n{form}\n"
    + _TASK_REPLY
    + ' If the page leads to no programming task, reply with {{"task": null}}.\n\nThe page:\n{text}'
)
FROM_SNIPPET = (
    "Below is a piece of source code. Write one programming task for {language} that it gives you an idea for. It must "
    "be understood without the code.\n{form}\n"
    + _TASK_REPLY
    + ' If it leads to no task, reply with {{"task": null}}.\n\nThe code:\n{text}'
)
EXAMINE = (
    "Is this programming task well posed? It is if a programmer knows without a question what to write, and if each "
    'input has exactly one right result.\n\nThe task:\n{task}\n\nReply with a JSON object and nothing else: {{"well_'
    'posed": true or false, "reason": one sentence}}.'
)
TEST_PROGRAM = (
    "Write {count} tests for the programming task below: ordinary cases, small ones, and corner cases. Work out each "
    'output with care. Reply with a JSON array and nothing else: [{{"input": text of standard input, "output": text of '
    "standard output}}, ...].\n\nThe task:\n{task}"
)
TEST_FUNCTION = (
    "Write {count} tests for the programming task below: ordinary cases, small ones, and corner cases. Work out each "
    "value with care. Reply with a JSON array of texts and nothing else; each text is one line of Python of the form "
    "assert {function}(arguments) == value.\n\nThe task:\n{task}"
)
TRANSLATE = (
    "Rewrite this programming task for {language}: the same program with exactly the same input and output, for "
    "someone who programs in {language}. Keep the example. Reply with a JSON object and nothing else: "
    '{{"task": the text}}.\n\nThe task:\n{task}'
)
SOLVE_PROGRAM = "{task}\n\nWrite the program in {language}.{note} Put all of it in one code block."
SOLVE_FUNCTION = "{task}\n\nWrite the function {function} in Python. Put all of the code in one code block."
# What the sandbox needs of a program.
NOTES = {"java": " Name its class Main."}
# What no examiner may find well posed.
UNCLEAR = "Write a program that prints the right number."

_LONGEST_TASK, _LONGEST_TEST, _LONGEST_ASSERTION = 8000, 20_000, 2000
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# A test is one comparison: nothing in it can be run for its effects beside the call.
_NOT_IN_TEST = re.compile(r"__|[;\n]|\b(?:import|exec|eval|open|globals|locals|getattr|setattr|lambda|compile)\b")

_CHANGES = (
    (r"(?<![\w.])\d+(?![\w.])", lambda m: str(int(m[0][:9]) + 1)),
    (r" \+ ", " - "), (r" - ", " + "), (r" == ", " != "), (r" != ", " == "), (r" < ", " >= "), (r" > ", " <= "),
    (r" <= ", " > "), (r" >= ", " < "), (r" and ", " or "), (r" or ", " and "), (r" && ", " || "),
    (r"\bmin\(", "max("), (r"\bmax\(", "min("),
)  # fmt: skip

_COMMENT = re.compile(r"(?:#|//)[^\n]*\Z")


def form_of(function: bool) -> dict[str, str]:
    """What a prompt for a task says about the form of the solution: a function of Python, or a whole program."""
    return {"form": _FUNCTION if function else _PROGRAM, "function": "its name" if function else "null"}


def read_task(text: str, function: bool) -> dict[str, Any] | str:
    """The task of an answer, with the name of its function or None; or the reason why it is none."""
    value = json_of(text)
    if not isinstance(value, dict) or "task" not in value:
        return "the task cannot be read"
    task, name = value["task"], value.get("function")
    if task is None:
        return "no task in the text"
    if not isinstance(task, str) or not 20 <= len(task) <= _LONGEST_TASK:
        return "the task cannot be read"
    if not function:
        return {"task": task.strip(), "function": None}
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name not in task:
        return "the task does not name its function"
    return {"task": task.strip(), "function": name}


def read_tests(text: str, function: str | None) -> list[dict[str, str]] | None:
    """The tests of an answer as `CodeReward` takes them; those of another form are left out. None if there are none."""
    values = json_of(text)
    if not isinstance(values, list):
        return None
    found = [_program_test(value) if function is None else _function_test(value, function) for value in values]
    return [test for test in found if test is not None] or None


def _program_test(value: Any) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    texts = value.get("input"), value.get("output")
    if not all(isinstance(text, str) and len(text) < _LONGEST_TEST and "\0" not in text for text in texts):
        return None
    return {"stdin": texts[0], "expected_stdout": texts[1]}  # type: ignore[dict-item]


def _function_test(value: Any, function: str) -> dict[str, str] | None:
    text = value.strip() if isinstance(value, str) else ""
    if len(text) > _LONGEST_ASSERTION or _NOT_IN_TEST.search(text):
        return None
    if not re.fullmatch(rf"assert {function}\(.*\) == \S.*", text) or expected_of({"code": text}) is None:
        return None
    return {"code": text}


def expected_of(test: Mapping[str, str]) -> str | None:
    """What a test expects, as text: an output, or the value of a call. None if the value is no literal of Python."""
    if "expected_stdout" in test:
        return test["expected_stdout"].strip()
    try:
        return repr(ast.literal_eval(test["code"].rpartition(" == ")[2].strip()))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def expects_nothing(test: Mapping[str, str]) -> bool:
    """Whether a program that does nothing passes a test."""
    return expected_of(test) == ("" if "expected_stdout" in test else "None")


def agreed_tests(passed: Sequence[Sequence[bool]], least: int) -> list[int] | str:
    """The tests that solutions and tests agree on, or the reason why there are none.

    Solutions that pass the same tests, and at least one, are a cluster. The largest cluster decides: its tests are
    kept, and the others are thrown out, because solutions that were written without them contradict them. Of clusters
    of the same size the one that passes more tests decides; if that is the same too, the solutions contradict each
    other. (CodeT, arXiv:2207.10397, ranks by solutions times tests; here the number of solutions comes first.)

    Args:
      passed: for each solution whether it passed each test.
      least: solutions that must agree.
    """
    clusters = Counter(tuple(one) for one in passed if any(one))
    if not clusters:
        return "no solution passes a test"
    ranked = sorted(((count, sum(key), key) for key, count in clusters.items()), reverse=True)
    if ranked[0][0] < least:
        return "too few solutions agree"
    if len(ranked) > 1 and ranked[0][:2] == ranked[1][:2]:
        return "the solutions contradict each other"
    return [i for i, ok in enumerate(ranked[0][2]) if ok]


def changed(source: str, rng: Random, most: int) -> list[str]:
    """Up to `most` different copies of a program, each with one number, operator or name of a function changed.

    What stands behind `#` or `//` in its line, which may be a comment, is left alone.
    """
    sites = [(match, change) for pattern, change in _CHANGES for match in re.finditer(pattern, source)]
    sites = [(match, change) for match, change in sites if not _COMMENT.search(source[: match.start()])]
    made = []
    for match, change in rng.sample(sites, min(most, len(sites))):
        new = change(match) if callable(change) else change
        made.append(source[: match.start()] + new + source[match.end() :])
    return list(dict.fromkeys(made))


def table_program(tests: Sequence[Mapping[str, str]], wrong: int | None = None) -> str:
    """A Python program that knows the outputs of tests, so that it is right; with another output for one if asked."""
    table = {test["stdin"]: test["expected_stdout"] for test in tests}
    if wrong is not None:
        table[tests[wrong]["stdin"]] += "\nand more"
    return f"import sys\nprint({table!r}[sys.stdin.read()])\n"
