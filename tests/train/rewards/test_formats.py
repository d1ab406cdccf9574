"""Gates, lengths and JSON: right forms by construction, and each way to spoil them."""

import json
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.rewards import load_reward


def one(reward: Any, text: str, finished: bool = True, **columns: Any) -> float | None:
    (value,) = reward(completions=[text], finished=[finished], **{name: [x] for name, x in columns.items()})
    return value


def test_tags() -> None:
    gate: Any = load_reward("format", tags=("think", "answer"))
    assert gate.gate
    right = "<think>a\nb</think>\n<answer> c </answer>\n"
    assert one(gate, right) == 1
    assert one(gate, right, finished=False) == 0
    for wrong in (
        "", "c", "<think>a</think>", "<answer>c</answer><think>a</think>", right + "more", "more" + right, right * 2,
        right.replace("</think>", "</think>x"), right.replace("<think>", "<think><think>"), right.replace("a\nb", " "),
        right.replace("</answer>", ""), "<think><answer>c</answer>a</think>", "</think>a<think><answer>c</answer>",
        right.replace("think", "Think"),
    ):  # fmt: skip
        assert one(gate, wrong) == 0, wrong


def test_boxes_and_patterns() -> None:
    gate = load_reward("format", boxed=True, pattern=r"So.*\.")
    assert one(gate, "So \n\\boxed{1}.") == 1
    for wrong in ("So.", r"So \boxed{}.", r"So \boxed{1}\boxed{1}.", r"So \boxed{1}", r"\boxed{1}.", r"So \boxed{1."):
        assert one(gate, wrong) == 0, wrong
    for settings, words in (
        ({}, "needs one of"), ({"tags": ("a b",)}, "a name"), ({"tags": ("a", "a")}, "different"),
        ({"pattern": "("}, "no regular expression"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            load_reward("format", **settings)


def test_lengths() -> None:
    """1 within the bounds, linear outside, never below 0; in tokens or words, not characters."""
    rng = print_seed()
    least, most, slope = int(rng.integers(5, 10)), int(rng.integers(10, 20)), int(rng.integers(1, 5))
    lengths = np.arange(40)
    outside = np.maximum(least - lengths, 0) + np.maximum(lengths - most, 0)
    expected = np.clip(1 - outside / slope, 0, 1)
    tokens: Any = load_reward("length", least=least, most=most, slope=slope)
    found = tokens(completions=["x" * 9] * 40, completion_ids=[[7] * n for n in lengths])
    np.testing.assert_allclose(found, expected)
    words: Any = load_reward("length", least=least, most=most, slope=slope, unit="words")
    np.testing.assert_allclose(words(completions=["wörd, " * n for n in lengths]), expected)
    sharp: Any = load_reward("length", most=2)
    assert sharp(completions=[""] * 2, completion_ids=[[1, 2], [1, 2, 3]]) == [1, 0]
    with pytest.raises(InputError, match="unit=words"):
        sharp(completions=[""])
    for settings in (
        {},
        {"least": -1},
        {"least": 3, "most": 2},
        {"most": 1, "slope": -1},
        {"most": 1, "unit": "bytes"},
    ):
        with pytest.raises(InputError):
            load_reward("length", **settings)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_json_that_fits_a_schema() -> None:
    rng = print_seed()
    reward = load_reward("json_schema")
    for _ in range(20):
        value = {"name": "".join(map(chr, rng.integers(32, 1000, 5))), "age": int(rng.integers(0, 99))}
        text = json.dumps(value, indent=int(rng.integers(0, 3)))
        for right in (text, f"\n{text}\n", f"```json\n{text}\n```"):
            assert one(reward, right, schema=SCHEMA) == 1
            assert one(reward, right, schema=json.dumps(SCHEMA)) == 1
        assert one(reward, text, finished=False, schema=SCHEMA) == 0
        assert one(reward, text, schema=None) is None
        for wrong in (text[:-1], text + "}", f"Here: {text}", text.replace("name", "nome"), f"[{text}]", text + text):
            assert one(reward, wrong, schema=SCHEMA) == 0, wrong
    for wrong in ("", "{}", '{"name": 3}', '{"name": "a", "age": -1}', '{"name": "a", "age": NaN}',
                  '{"name": 1, "name": "a"}', "{'name': 'a'}"):  # fmt: skip
        assert one(reward, wrong, schema=SCHEMA) == 0, wrong
    fenced = load_reward("json_schema", schema=SCHEMA, fenced=True)
    assert one(fenced, 'So:\n```json\n{"name": "a"}\n```\nDone.') == 1
    assert one(fenced, '{"name": "a"}') == 0


def test_schemas_that_are_none_fetch_nothing() -> None:
    reward = load_reward("json_schema")
    for schema, words in (
        ({"type": "nonsense"}, "no JSON schema"), ("{", "no JSON schema"), ([1], "an object or its text"),
        ({"$ref": "http://127.0.0.1:1/x.json"}, "nothing is fetched"), ({"$ref": "file:///etc/hostname"}, "fetched"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            one(reward, "1", schema=schema)
    with pytest.raises(InputError, match="no JSON schema"):
        load_reward("json_schema", schema={"pattern": "("})
    # What the checker cannot take is no signal; hostile texts end.
    assert one(reward, "[" * 500 + "]" * 500, schema={"type": "object"}) is None
    assert one(reward, "[" * 100_000, schema={"type": "array"}) == 0
    assert one(reward, '"' + "a" * 50 + '!"', schema={"pattern": "^(a+)+$"}) in (0, None)
