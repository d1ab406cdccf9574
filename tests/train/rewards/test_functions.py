"""Reward functions get the columns that they name, None is no signal, and what they return is checked."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.rewards import BUILT_IN, close_rewards, combine, load_reward, score

PROMPTS, COMPLETIONS, FINISHED = ["p", "q", "r"], ["a", "bb", ""], [True, False, True]


def scored(columns: Any = None, completion_ids: Any = None, **functions: Any) -> np.ndarray:
    return score(functions, PROMPTS, COMPLETIONS, FINISHED, columns or {}, completion_ids=completion_ids)


def test_functions_get_what_they_name() -> None:
    """By name, in lists; only those with **columns get all; a default stands for a column that is not there."""
    seen: dict[str, Any] = {}

    def everything(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [1, 2.5, np.float32(3)]

    def one(answer: list[int], other: int = 7) -> list[float | None]:
        assert (answer, other) == ([4, 5, 6], 7)
        return [None, *map(float, answer[1:])]

    def array(completions: Any, finished: Any) -> np.ndarray:
        return np.array([len(text) for text in completions]) * np.array(finished)

    found = scored({"answer": (4, 5, 6)}, [[1], [2, 3], []], everything=everything, one=one, array=array)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1, np.nan, 1], [2.5, 5, 0], [3, 6, 0]])
    assert seen == {
        "prompts": PROMPTS, "completions": COMPLETIONS, "finished": FINISHED, "answer": [4, 5, 6],
        "completion_ids": [[1], [2, 3], []],
    }  # fmt: skip
    # All None is counted by the caller, and is no error; no text is none either.
    assert np.isnan(scored(none=lambda completions: [None] * 3)).all()
    assert score({"x": lambda completions: []}, [], [], [], {}).shape == (0, 1)


async def asynchronous(completions: Any) -> list[float]:
    return [0.0]


def raises(completions: Any) -> list[float]:
    raise KeyError("lost")


def ends(completions: Any) -> list[float]:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raises, ["bad", "KeyError", "lost", __file__, f"line {raises.__code__.co_firstlineno + 1}"]),
        (ends, ["bad", "SystemExit", "3"]),
        (lambda completions: [1.0, 2.0], ["bad", "2 values", "3"]),
        (lambda completions: [1.0, math.nan, 2.0], ["bad", "nan", "completion 1"]),
        (lambda completions: [1.0, 2.0, -math.inf], ["bad", "-inf", "completion 2"]),
        (lambda completions: [1.0, 2.0, 1e39], ["bad", "1e+39", "completion 2"]),
        (lambda completions: ["1.0", 2.0, 3.0], ["bad", "'1.0'", "completion 0"]),
        (lambda completions: [1 + 0j, 2.0, 3.0], ["bad", "completion 0"]),
        (lambda completions: 1.0, ["bad", "float", "list of 3"]),
        (lambda completions: "abc", ["bad", "a str"]),
        (lambda completions: None, ["bad", "NoneType"]),
        (lambda completions: np.zeros((3, 1)), ["bad", "[0.0]", "completion 0"]),
        (lambda completions: np.zeros(()), ["bad", "float", "list of 3"]),
        (lambda completions: [1.0, [1.0], [1.0, 2.0]], ["bad", "[1.0]", "completion 1"]),
        (lambda completions: [1.0, 2.0, 10**400], ["bad", "1000", "completion 2"]),
        (lambda completions, solution: [0.0] * 3, ["bad", "solution", "answer"]),
        (lambda completions, /: [0.0] * 3, ["bad", "completions", "by name"]),
        (lambda *texts: [0.0] * 3, ["bad", "texts"]),
        (3, ["bad", "expected a function"]),
    ],
)  # fmt: skip
def test_bad_functions_are_named_with_the_place_and_the_value(function: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        scored({"answer": [1, 2, 3]}, good=lambda completions: [0.0] * 3, bad=function)
    for word in words:
        assert word in str(error.value)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="column finished"):
        scored({"finished": [1, 2, 3]})
    with pytest.raises(InputError, match="answer has 2 entries; expected 3"):
        scored({"answer": [1, 2]})
    with pytest.raises(InputError, match="Completion 1 is a list"):
        score({}, ["p", "q"], ["a", [{"role": "assistant"}]], [True, True], {})  # type: ignore[list-item]


def gate(completions: Any) -> list[float]:
    return [1.0] * len(completions)


gate.gate = True  # type: ignore[attr-defined]


def test_gates_multiply_and_the_others_add() -> None:
    """The reward is the product of the gates times the weighted sum of the rest."""
    rng = print_seed()
    functions = {"a": len, "first": gate, "b": len, "second": gate}
    scores = rng.normal(size=(50, 4)).astype(np.float32)
    scores[:, [1, 3]] = rng.integers(0, 2, (50, 2))
    expected = scores[:, 1] * scores[:, 3] * (2 * scores[:, 0] + scores[:, 2])
    np.testing.assert_allclose(combine(functions, scores, {"a": 2.0}), expected, rtol=1e-5)
    # Of any order.
    order = rng.permutation(50)
    np.testing.assert_array_equal(combine(functions, scores[order]), combine(functions, scores)[order])
    # A closed gate is 0 whatever the others say, also where they say nothing; a gate without signal masks.
    nan = np.nan
    few = np.array([[nan, 1, 5, 1], [nan, 0, 5, 1], [3, nan, 5, 1], [3, nan, 5, 0], [nan, 1, nan, 1]], np.float32)
    np.testing.assert_array_equal(combine(functions, few), [nan, 0, nan, 0, nan])
    np.testing.assert_array_equal(combine(functions, few, missing="ignore"), [5, 0, nan, 0, nan])
    # Gates only.
    np.testing.assert_array_equal(combine({"g": gate}, np.array([[1.0], [0.0], [nan]])), [1, 0, nan])


def test_bad_weights_and_gates() -> None:
    with pytest.raises(InputError, match="weight for c"):
        combine({"a": len}, np.zeros((1, 1)), {"c": 1.0})
    with pytest.raises(InputError, match="is a gate"):
        combine({"g": gate}, np.zeros((1, 1)), {"g": 1.0})
    with pytest.raises(InputError, match="finite"):
        combine({"a": len}, np.zeros((1, 1)), {"a": math.inf})
    with pytest.raises(InputError, match="gate g gave 2"):
        combine({"g": gate}, np.array([[2.0]]))


def test_functions_of_a_file(tmp_path: Path) -> None:
    """With settings bound, which no column replaces; the mark of a gate stays."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\nclass Own:\n    x: 'float' = 2.0\n"
        "def reward(completions, answer, scale=1.0):\n    return [scale * a * Own().x for a in answer]\n"
        "def only(completions, **kwargs):\n    return [float('scale' in kwargs) for _ in completions]\n"
        "only.gate = True\nnumber = 3\n"
    )
    mine = load_reward(f"{file}:reward", scale=10.0)
    np.testing.assert_array_equal(scored({"answer": [1, 2, 3], "scale": [7, 7, 7]}, mine=mine)[:, 0], [20, 40, 60])
    plain = load_reward(f"{file}:reward")
    np.testing.assert_array_equal(scored({"answer": [1, 2, 3]}, plain=plain)[:, 0], [2, 4, 6])
    assert getattr(load_reward(f"{file}:only", other=1), "gate", False)
    np.testing.assert_array_equal(scored({"scale": [7, 7, 7]}, only=load_reward(f"{file}:only"))[:, 0], [1, 1, 1])
    for spec, settings, words in [
        (f"{file}:missing", {}, "has no function missing. It has: reward, only"),
        (f"{file}:number", {}, "no function number"),
        (f"{file}:reward", {"size": 1}, "no setting size"),
        (f"{tmp_path}/other.py:f", {}, "does not exist"),
        ("maths", {}, "math, code, instructions"),
        ("FILE.py", {}, "FILE.py:function"),
        (f"{file}:", {}, "FILE.py:function"),
    ]:
        with pytest.raises(InputError, match=words.replace("(", r"\(")):
            load_reward(spec, **settings)
    file.write_text("1 / 0\n")
    with pytest.raises(InputError, match="cannot be run: line 1: ZeroDivisionError"):
        load_reward(f"{file}:reward")


def test_built_in_rewards_by_name() -> None:
    with pytest.raises(InputError, match="no setting size"):
        load_reward("length", size=1)
    with pytest.raises(InputError, match="needs the setting model"):
        load_reward("reward_model")
    made = load_reward("length", most=3, unit="words")
    np.testing.assert_array_equal(scored(length=made)[:, 0], [1, 1, 1])
    close_rewards([made, len])
    named = {"math", "code", "instructions", "verification", "json_schema", "format", "length", "reward_model"}
    assert set(BUILT_IN) == named
