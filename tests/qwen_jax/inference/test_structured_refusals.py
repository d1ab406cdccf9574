"""Structured output: what cannot be enforced is refused with its reason, and nothing hangs or crashes the process."""

import itertools
import random
import sys
from typing import Any

import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference import grammar_check
from qwen_jax.inference.structured import Grammars
from tests.helpers.grammars import VOCAB, ends, grammars, small

pytest.importorskip("llguidance")


def nested(count: int) -> str:
    return '{"type":"array","items":' * count + "{}" + "}" * count


def either(i: int) -> dict[str, Any]:
    return {"anyOf": [{"properties": {f"a{i}": {"type": kind}}} for kind in ("null", "string")]}


def chain(count: int) -> dict[str, Any]:
    names = [f"d{i}" for i in range(count)]
    following = dict(itertools.pairwise(names))
    return {
        "$ref": "#/$defs/d0",
        "$defs": {a: {"$ref": f"#/$defs/{b}"} for a, b in following.items()} | {names[-1]: {}},
    }


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json_schema", {"not": {}}, r"not"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ("json_schema", {"type": "strin"}, "strin"),
        ("json_schema", {"type": 5}, "type must be"),
        ("json_schema", {"$ref": "http://example.com/x.json"}, "example.com"),
        ("json_schema", {"$ref": "#"}, "no text matches"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ("json_schema", {"type": "string", "pattern": "("}, "unclosed group"),
        ("json_schema", {"type": "string", "format": "colour"}, "colour"),
        ("json_schema", "[1]", "must be a JSON object, got list"),
        ("json_schema", "{", "is not JSON"),
        ("json_schema", 5, "must be a JSON object"),
        ("json_schema", {"const": float("nan")}, "is not JSON"),
        ("json_schema", {"const": {1, 2}}, "is not JSON"),
        ("json_schema", nested(5000), "nested too deeply"),
        ("json_schema", nested(200), "recursion limit"),
        ("json_schema", chain(3000), "nested too deeply"),
        ("json_schema", {"enum": ["x" * 300_000]}, "too large"),
        ("json_schema", {"allOf": [either(i) for i in range(20)]}, "too large"),
        ("json_schema", {"type": "integer", "multipleOf": 99_999_989}, "seconds"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"[^\s\S]", "no text matches"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "nested"),
        ("regex", "a" * 300_000, "too large"),
        ("regex", None, "must be a text"),
        ("ebnf", "", "(?i)empty"),
        ("ebnf", 'foo: "a"', "no start rule"),
        ("ebnf", "start: foo", "foo"),
        ("ebnf", 'start: "a" <|im_start|>', "control token"),
        ("ebnf", "start: <[5-20]>", "control token"),
        ("ebnf", "root ::= (((", "GBNF"),
        ("ebnf", '{"grammars": [{"lark_grammar": "start: <|im_start|>"}]}', "got JSON"),
        ("ebnf", 5, "must be a text"),
        ("ebnf", "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(3000)), 'r3000: "a"']), "deeply"),
        ("ebnf", "start: T\nT: " + " & ".join(f"/.*w{i}.*/" for i in range(30)), "seconds|memory|fuel"),
        ("choice", [], "at least one"),
        ("choice", "abc", "list of texts"),
        ("choice", [5], "must be a text"),
        ("choice", ["\ud800"], "surrogate"),
        ("choice", ["a"] * 10_001, "at most 10000"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, kind: str, value: Any, reason: str
) -> None:
    """Also what would hang or crash the process. Afterwards other grammars compile as before; the refusal is kept."""
    monkeypatch.setattr(grammar_check, "SECONDS", 1.0)
    for _ in range(2):
        with pytest.raises(InputError, match=reason):
            getattr(grammars(), kind)(value)
    monkeypatch.setattr(grammar_check, "SECONDS", 10.0)
    grammars().regex(f"fresh{random.random()}")


@pytest.mark.parametrize(
    ("tools", "named", "reason"),
    [
        ([], None, "at least one tool"),
        ([("a", {})], "b", "no tool named 'b'"),
        ([("a", {}), ("a", {})], None, "two tools named 'a'"),
        ([("a", {"type": "string"})], None, "of type object"),
        ([("a", {"properties": {"x": {"type": "integer", "multipleOf": 99_999_989}}})], None, "seconds"),
        ([("a", {"not": {}})], None, "not"),
        ([("\ud800", {})], None, "surrogate"),
    ],
)
def test_tools_that_cannot_be_enforced(
    monkeypatch: pytest.MonkeyPatch, tools: list[tuple[str, Any]], named: str | None, reason: str
) -> None:
    monkeypatch.setattr(grammar_check, "SECONDS", 1.0)
    with pytest.raises(InputError, match=reason):
        grammars().tool_calls(tools, named, True)


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    made = Grammars(small(), VOCAB, ends())
    for ask in (made.json_object, made.prepare, lambda: made.regex("a")):
        with pytest.raises(InputError, match=r"qwen-jax\[serve\]"):
            ask()


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size"):
        Grammars(small(), small().vocab_size - 1, [])


def test_the_checking_process_ends_with_its_owner() -> None:
    checker = grammar_check.Checker()
    assert checker.check("lark", 'start: "a"', {}) == ('start: "a"', None)
    process = checker._process
    assert process is not None
    del checker
    assert process.wait(timeout=60) < 0
