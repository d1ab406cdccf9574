"""Programming tasks: how tests are read, and which are trusted."""

import json
import random

from tests.helpers.runs import print_seed
from train.synthesize import code_tasks


def test_changed_programs_differ_in_one_place_that_is_no_comment() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    source = "# version 1 + 2\nn = int(input()) + 3\nprint(max(n, 4))  # 5\n"
    made = code_tasks.changed(source, rng, 9)
    assert sorted(made) == sorted(
        source.replace(old, new)
        for old, new in ((" + 3", " - 3"), (" + 3", " + 4"), ("max(", "min("), ("n, 4", "n, 5"))
    )


def test_which_tests_are_trusted() -> None:
    """The largest cluster decides; contradictions of equal weight decide nothing."""
    a, b, none = [True, True, False], [False, False, True], [False] * 3
    assert code_tasks.agreed_tests([a, a, b, none, none, none], 2) == [0, 1]
    assert code_tasks.agreed_tests([a, a, b, b], 2) == [0, 1]
    assert code_tasks.agreed_tests([a, b], 2) == "too few solutions agree"
    assert code_tasks.agreed_tests([none, none], 1) == "no solution passes a test"
    assert code_tasks.agreed_tests([[True, False], [False, True]], 1) == "the solutions contradict each other"


def test_what_a_test_may_be() -> None:
    """One comparison of a call with a literal: nothing else in it could be run."""
    texts = [
        "assert f(1) == 2",
        "assert f('a == b') == [1, 'x']",
        "assert f(1) == f(1)",
        "assert True",
        "assert f(1) == 2; import os",
        "assert f(__import__('os')) == 1",
        "assert g(1) == 2",
        3,
    ]
    assert code_tasks.read_tests(json.dumps(texts), "f") == [{"code": texts[0]}, {"code": texts[1]}]
    assert code_tasks.read_tests("[1", "f") is None
    assert code_tasks.read_tests('[{"input": "1", "output": 2}, {"input": "1", "output": "2"}]', None) == [
        {"stdin": "1", "expected_stdout": "2"}
    ]
