"""HumanEval, MBPP and their plus forms: right programs pass, wrong ones do not, and faults are no verdict."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, scores_of, verdicts_of, write_lines
from tests.helpers.runs import print_seed
from tests.helpers.sandboxes import needs_bwrap
from train.evaluate.benchmarks.code import MBPP, TASKS, HumanEval, HumanEvalPlus, MBPPPlus
from train.evaluate.benchmarks.plus import restored
from train.evaluate.task import Generate, Item, Request, Tools

# Problems made for these tests.
_HEAD = 'from typing import List\n\n\ndef largest(values: List[int]) -> int:\n    """The largest value."""\n'
HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": _HEAD,
    "entry_point": "largest",
    "canonical_solution": "    return max(values)\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n"
    "    assert candidate([1, 3, 2]) == 3\n    assert candidate([-1]) == -1\n",
}
PLUS = {
    **{key: HUMAN[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")},
    "base_input": [[[1, 3, 2]]],
    "plus_input": [[[-5, -7]], [[2, 2]]],
    "atol": 0,
}
MBPP_RECORDS: list[dict[str, Any]] = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add_{number}(x):\r\n  return x + {number}",
        "test_list": [f"assert add_{number}(1) == {number + 1}", f"assert add_{number}(-{number}) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 11, 12, 510, 511)
]


def _write(folder: Path, *records: dict[str, Any]) -> Path:
    return write_lines(folder / "records.jsonl", records)


@needs_bwrap
@pytest.mark.parametrize(
    ("chat", "answer", "score"),
    [
        (False, "    return max(values)\n", 1.0),
        (False, "    return values[0]\n", 0.0),
        (False, "    return max(values", 0.0),
        # Right for the tests that the program may see, and an attempt to look like a test that has passed.
        (False, "    import os\n    os._exit(0)\n", 0.0),
        (True, "Here:\n```python\ndef largest(values):\n    return max(values)\n```\nIt works.", 1.0),
        # The imports of the prompt come with the program.
        (True, "```py\ndef largest(values: List[int]) -> int:\n    return sorted(values)[-1]\n```", 1.0),
        # What follows the function may show its use, or be cut.
        (True, "```python\ndef largest(v):\n    return max(v)\n```\nUse:\n```\nprint(largest([1]))\n```\n", 1.0),
        (True, "```python\ndef largest(v):\n    return max(v)\n```\nUse:\n```\nprint(lar", 1.0),
        # The last block with the function counts.
        (
            True,
            "```python\ndef largest(v):\n    return max(v)\n```\nor\n```python\ndef largest(v):\n    return 3\n```",
            0.0,
        ),
        (True, "```python\ndef largest(values):\n    return max(values)\n", 0.0),
        (True, "max(values) does it.", 0.0),
    ],
)
def test_a_program_of_humaneval_is_what_its_tests_say(
    chat: bool, answer: str, score: float, tools: Tools, tmp_path: Path
) -> None:
    task = HumanEval("h", chat)
    verdicts = verdicts_of(task, items_of(task, _write(tmp_path, HUMAN)), lambda *_: answer, tools)
    assert scores_of(verdicts, "pass@1") == {"HumanEval/0": score}


def test_prompts_have_the_form_that_is_stated(tmp_path: Path) -> None:
    """A base model goes on with the prompt itself up to the stop texts; a chat model gets a message."""
    for task in (HumanEval("h"), HumanEval("h", chat=True)):
        (item,) = items_of(task, _write(tmp_path, HUMAN))
        (request,) = task.requests(item, ())
        assert isinstance(request, Generate)
        if task.chat:
            assert not request.stop
            assert not isinstance(request.prompt, str)
            assert _HEAD in request.prompt[0]["content"]
        else:
            assert request.prompt == _HEAD
            assert "\ndef" in request.stop
        assert not task.requests(item, [[]])


@needs_bwrap
@pytest.mark.parametrize(
    ("body", "base", "both"),
    [
        ("    return max(values)\n", 1.0, 1.0),
        # Wrong for the further tests only, where all values are negative.
        (
            "    found = 0\n    for value in values:\n        found = max(value, found)\n    return found\n",
            1.0,
            0.0,
        ),
        ("    return 0\n", 0.0, 0.0),
    ],
)
def test_the_further_tests_find_what_the_base_tests_do_not(
    body: str, base: float, both: float, tools: Tools, tmp_path: Path
) -> None:
    task = HumanEvalPlus("p")
    (verdict,) = verdicts_of(task, items_of(task, _write(tmp_path, PLUS)), lambda *_: body, tools).values()
    assert verdict.scores == {"pass@1": both, "base_pass@1": base}


@needs_bwrap
def test_floats_are_compared_with_a_tolerance_and_constants_by_their_rule(tools: Tools, tmp_path: Path) -> None:
    """The rules of MBPP+: floats to 1e-6, sets without order, one admitted constant, roots by their polynomial."""
    value = float(print_seed().uniform(1, 2))
    problems = {
        "Mbpp/1": ("third", "def third(x):\n    return x / 3\n", [[value]]),
        "Mbpp/3": ("find_dissimilar", "def find_dissimilar(a, b):\n    return (2, 1)\n", [[1, 2]]),
        "Mbpp/5": ("are_equivalent", "def are_equivalent(a, b):\n    return a == b\n", [[1, 1], [1, 2]]),
        "Mbpp/6": ("check_str", "def check_str(s):\n    return s or None\n", [["a"], [""]]),
        "Mbpp/7": ("find_zero", "def find_zero(c):\n    return -c[0] / c[1]\n", [[[4, 2]]]),
    }
    records = [
        {
            "task_id": name,
            "prompt": '"""x"""\n',
            "entry_point": entry,
            "canonical_solution": solution,
            "base_input": inputs,
            "plus_input": {} if name == "Mbpp/1" else inputs,
            "atol": 1e-4 if entry == "find_zero" else 0,
        }
        for name, (entry, solution, inputs) in problems.items()
    ]
    task = MBPPPlus("m")
    items = items_of(task, _write(tmp_path, *records))
    right = {
        "Mbpp/1": "def third(x):\n    return x * 0.33333333333",
        "Mbpp/3": "def find_dissimilar(a, b):\n    return [1, 2, 2]",
        "Mbpp/5": "def are_equivalent(a, b):\n    return True",
        "Mbpp/6": "def check_str(s):\n    return s == 'a'",
        "Mbpp/7": "def find_zero(c):\n    return -2.00001",
    }
    wrong = {
        "Mbpp/1": "def third(x):\n    return x * 0.3333",
        "Mbpp/3": "def find_dissimilar(a, b):\n    return [1, 3]",
        "Mbpp/5": "def are_equivalent(a, b):\n    return a != b",
        "Mbpp/6": "def check_str(s):\n    return True",
        "Mbpp/7": "def find_zero(c):\n    return -2.1",
    }
    for bodies, score in ((right, 1.0), (wrong, 0.0)):
        texts = dict(bodies)
        verdicts = verdicts_of(task, items, lambda item, *_, texts=texts: texts[item.id], tools)
        assert scores_of(verdicts, "pass@1") == dict.fromkeys(problems, score)


@needs_bwrap
def test_a_fault_of_the_reference_solution_is_no_verdict(tools: Tools, tmp_path: Path) -> None:
    """A reference that raises says nothing about a program."""
    broken = {**PLUS, "canonical_solution": "    raise ValueError('no')\n"}
    task = HumanEvalPlus("p")
    (verdict,) = verdicts_of(
        task, items_of(task, _write(tmp_path, broken)), lambda *_: "    return max(values)\n", tools
    ).values()
    assert set(verdict.scores.values()) == {None}
    assert "reference" in str(verdict.problem)


def test_inputs_that_json_cannot_hold_are_restored() -> None:
    """One case of each form; problems without a form keep their inputs."""
    assert restored(2, [[1, 2], [3]]) == [(1, 2), (3,)]
    assert restored(63, [[[1, 2], [3, 4]]]) == [[(1, 2), (3, 4)]]
    assert restored(75, [[[1, 2]], 5]) == [[(1, 2)], 5]
    assert restored(106, [[1], [2]]) == [[1], (2,)]
    assert restored(115, [[[1, 1], []]]) == [[{1}, {}]]
    assert restored(124, ["0", "1j"]) == [0.0, 1j]
    assert restored(250, [[1, 2], 3]) == [(1, 2), 3]
    assert restored(307, [[1], 2, 3]) == [(1,), 2, 3]
    assert restored(252, ["1+2j"]) == [1 + 2j]
    assert restored(259, [[[1, 2]], [[3, 4]]]) == [((1, 2),), ((3, 4),)]
    assert restored(278, [[1, [2, 3]]]) == [(1, (2, 3))]
    assert restored(580, [[1, [2, [3]]]]) == [(1, (2, (3,)))]
    assert restored(722, [{"a": [1, 2]}, 3]) == [{"a": (1, 2)}, 3]
    assert restored(10, [[1, 2]]) == [[1, 2]]


@needs_bwrap
@pytest.mark.parametrize("chat", [False, True])
def test_mbpp_runs_its_assertions(chat: bool, tools: Tools, tmp_path: Path) -> None:
    task = MBPP("m", chat)
    items = items_of(task, _write(tmp_path, *MBPP_RECORDS))
    assert [item.id for item in items] == ["MBPP/11", "MBPP/12", "MBPP/510"]

    def answer(item: Item, number: int, request: Request) -> str:
        right = item.fields["code"] if item.id != "MBPP/12" else "def add_12(x):\n  return 13"
        return f"```python\n{right}\n```" if chat else f"{right}\n"

    verdicts = verdicts_of(task, items, answer, tools)
    assert scores_of(verdicts, "pass@1") == {"MBPP/11": 1.0, "MBPP/12": 0.0, "MBPP/510": 1.0}


def test_mbpp_shows_three_solved_problems_to_base_models(tmp_path: Path) -> None:
    task = MBPP("m")
    item, *_ = items_of(task, _write(tmp_path, *MBPP_RECORDS))
    prompt = item.fields["prompt"]
    assert [f"def add_{n}(" in prompt for n in (1, 2, 3, 4, 11)] == [False, True, True, True, False]
    assert prompt.count("[BEGIN]") == 4
    assert prompt.endswith("assert add_11(-11) == 0\n[BEGIN]\n")


@pytest.mark.parametrize(
    ("task", "record", "change", "said"),
    [
        (HumanEval("h"), HUMAN, {"test": None}, "line 2.*test.*must be a text"),
        (HumanEval("h"), HUMAN, {"entry_point": "a; b"}, "line 2.*entry_point"),
        (HumanEval("h"), HUMAN, {"task_id": "HumanEval/0"}, "line 2.*HumanEval/0.*line 1"),
        (HumanEvalPlus("p"), PLUS, {"plus_input": [1]}, "line 2.*plus_input"),
        (HumanEvalPlus("p"), PLUS, {"atol": "x"}, "line 2.*atol"),
        (MBPPPlus("m"), {**PLUS, "task_id": "Mbpp/10"}, {"task_id": "x"}, "line 2.*task_id"),
        (MBPPPlus("m"), {**PLUS, "task_id": "Mbpp/10"}, {"task_id": "Mbpp/124"}, "line 2.*Mbpp/124"),
    ],
)
def test_a_record_of_another_form_is_named(
    task: HumanEval, record: dict[str, Any], change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = _write(tmp_path, record, {**record, "task_id": "HumanEval/1", **change})
    with pytest.raises(InputError, match=said):
        items_of(task, path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}\n", "line 1.*task_id"),
        (b"\n{\n", "line 2.*JSON"),
        (b"[1]", "entry 1.*object"),
        (b"", "at least 1"),
        (b"\xff\xfe{", "UTF-8"),
        (b"\x1f\x8bxx", "cannot be read"),
    ],
)
def test_a_file_that_is_not_the_benchmark_is_an_error(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        items_of(HumanEval("h"), path)


def test_compressed_files_and_arrays_are_read_as_lines_are(tmp_path: Path) -> None:
    task = HumanEval("h")
    lines = items_of(task, _write(tmp_path, HUMAN))
    (tmp_path / "x.gz").write_bytes(gzip.compress(json.dumps(HUMAN).encode()))
    (tmp_path / "x.json").write_text(json.dumps([HUMAN], indent=1))
    assert lines == items_of(task, tmp_path / "x.gz") == items_of(task, tmp_path / "x.json")


def test_every_task_says_what_it_is() -> None:
    """Names differ, and so do the templates of tasks that ask in different ways."""
    assert len({task.name for task in TASKS}) == len(TASKS) == 12
    templates = {task.name: task.template() for task in TASKS}
    assert templates["mbpp"] != templates["mbpp_instruct"]
    assert templates["humaneval"] != templates["humaneval_sampled"]
    assert all(task.files[0].source and task.files[0].licence and task.citation for task in TASKS)
