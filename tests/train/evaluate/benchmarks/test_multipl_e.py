"""MultiPL-E: programs of other languages pass or fail by their tests; what cannot be tested has no score."""

from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, scores_of, verdicts_of, write_lines
from tests.helpers.sandboxes import needs_bwrap
from train.evaluate.benchmarks.multipl_e import TASKS, MultiPLE, continuation
from train.evaluate.task import Generate, Tools

# Problems made for these tests, in the form of the published files: prompt, right answer, wrong answer, tests, stops.
_CASES: dict[str, tuple[str, str, str, str, list[str]]] = {
    "sh": (
        "#!/bin/bash\n# Adds two numbers.\n#\n# $1 is an integer\nadd() {\n",
        "    echo $(($1 + $2))\n}\nadd 1 2",
        "    echo $(($1 - $2))\n}\n",
        '}\n\ncandidate() {\n    add "$@"\n}\n\nset -e\nrun_test() {\n'
        '    [[ $(candidate "1" "2") = "3" ]]\n}\n\nrun_test',
        ["\n}"],
    ),
    "js": (
        "//Adds two numbers.\nfunction add(a, b){\n",
        "  return a + b;\n}\nconsole.log(add(1, 2));\n",
        "  return a * b;\n}\n",
        "const assert = require('node:assert');\n\n\nfunction test() {\n  let candidate = add;\n"
        "  assert.deepEqual(candidate(1, 2),3);\n}\n\ntest();",
        ["\nfunction ", "\n/*", "\n//", "\nconsole.log"],
    ),
    "cpp": (
        "#include<assert.h>\n// Adds two numbers.\nlong add(long a, long b) {\n",
        "    return a + b;\n}\nint main() {}",
        "    return a - b;\n}\n",
        "}\nint main() {\n    auto candidate = add;\n    assert(candidate((1), (2)) == (3));\n}\n",
        ["\n}"],
    ),
    "java": (
        "import java.util.*;\nimport org.javatuples.*;\nclass Problem {\n    // Adds two numbers.\n"
        "    public static Pair<Long, Long> add(long a, long b) {\n",
        "        return Pair.with(a + b, a);\n    }\n    public int more;\n",
        "        return Pair.with(a, b);\n    }\n",
        "    }\n    public static void main(String[] args) {\n"
        "    assert(add((1l), (2l)).equals((Pair.with(3l, 1l))));\n    }\n\n}\n",
        ["\n    }\n"],
    ),
}


def _record(case: str, **change: Any) -> dict[str, Any]:
    prompt, _, _, tests, stops = _CASES[case]
    fields = {"prompt": prompt, "tests": tests, "stop_tokens": stops}
    return {"name": "HumanEval_0_add", "language": case, "doctests": "x", **fields, **change}


@needs_bwrap
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("language", ["sh", "js"])
def test_a_program_passes_by_its_tests(language: str, chat: bool, tools: Tools, tmp_path: Path) -> None:
    """The right answer passes and the wrong one does not, whether the answer goes on with the prompt or is a block."""
    task = MultiPLE("humaneval", language, chat=chat)
    prompt, *answers, _, _ = _CASES[language]
    records = [_record(language, name=name) for name in ("right", "wrong")]
    texts = {
        name: f"So:\n```\n{prompt}{answer}\n```\n" if chat else answer
        for name, answer in zip(("right", "wrong"), answers, strict=True)
    }
    items = items_of(task, write_lines(tmp_path / "x.jsonl", records))
    verdicts = verdicts_of(task, items, lambda item, *_: texts[item.id], tools)
    if (reason := verdicts["right"].problem) is not None:
        pytest.skip(reason)
    assert scores_of(verdicts, "pass@1") == {"right": 1.0, "wrong": 0.0}


@needs_bwrap
@pytest.mark.parametrize("language", ["cpp", "java"])
def test_a_wrong_program_of_a_compiled_language_compiles_and_fails(language: str, tools: Tools, tmp_path: Path) -> None:
    """Assertions are on, and the tests have what they import: a wrong program fails when it runs, not before."""
    task = MultiPLE("humaneval", language)
    if tools.sandbox.version(tools.sandbox.language(language).name) is None:
        pytest.skip(f"{language} is not installed")
    (item,) = items_of(task, write_lines(tmp_path / "x.jsonl", [_record(language)]))
    program = task.program(item, _CASES[language][2])
    assert program is not None
    trial = task.trial(item, program, tools.sandbox)
    assert trial.passed == {"pass": False}
    assert not trial.reason.startswith("compilation")


@needs_bwrap
@pytest.mark.parametrize("language", ["lua", "swift", "go", "cs"])
def test_a_language_that_cannot_be_tested_has_no_score(language: str, tools: Tools, tmp_path: Path) -> None:
    task = MultiPLE("mbpp", language)
    records = [_record("sh", language="go_test.go" if language == "go" else language)]
    items = items_of(task, write_lines(tmp_path / "x.jsonl", records))
    (verdict,) = verdicts_of(task, items, lambda *_: "x", tools).values()
    assert verdict.scores == {"pass@1": None}
    assert str(items[0].groups["language"]) in str(verdict.problem)


@needs_bwrap
def test_a_library_that_is_not_there_is_no_failure_of_the_program(tools: Tools, tmp_path: Path) -> None:
    """Perl's tests need Test::Deep: without it there is no score, with it there is one."""
    task = MultiPLE("humaneval", "pl")
    items = items_of(task, write_lines(tmp_path / "x.jsonl", [_record("sh", language="pl")]))
    (verdict,) = verdicts_of(task, items, lambda *_: "x", tools).values()
    assert (verdict.scores["pass@1"] is None) == (task.unusable(tools.sandbox) is not None)


def test_stop_texts_are_those_of_the_record(tmp_path: Path) -> None:
    task = MultiPLE("humaneval", "js")
    (item,) = items_of(task, write_lines(tmp_path / "x.jsonl", [_record("js")]))
    (request,) = task.requests(item, ())
    assert isinstance(request, Generate)
    assert list(request.stop) == _CASES["js"][4]
    assert request.prompt == _CASES["js"][0]


def test_a_block_goes_on_where_the_prompt_ends() -> None:
    """What a block lacks of the prompt comes before it, but for comments; a block without the function is none."""
    prompt = "#include<x>\nusing namespace y;\n// About it.\nlong add(long a) {\n"
    block = "#include<x>\nint helper;\nlong add(long a)  {\n    return a;\n}\n"
    start, rest = continuation(prompt, block) or ("", "")
    assert start == "using namespace y;\n#include<x>\nint helper;\nlong add(long a)  {\n"
    assert rest == "    return a;\n}\n"
    assert continuation(prompt, "long sum(long a) {\n}\n") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"language": "js"}, "line 2.*in sh.*js"),
        ({"stop_tokens": [1]}, "line 2.*stop_tokens"),
        ({"prompt": " "}, "line 2.*prompt"),
        ({"tests": None}, "line 2.*tests"),
    ],
)
def test_a_record_of_another_form_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [_record("sh"), _record("sh", name="y", **change)])
    with pytest.raises(InputError, match=said):
        items_of(MultiPLE("humaneval", "sh"), path)


def test_names_differ() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert {"multipl_e_humaneval_cpp", "multipl_e_mbpp_js_instruct"} <= {task.name for task in TASKS}
