"""Conditions on columns, beside Python's own arithmetic with nulls written out."""

import random
from typing import Any

import pyarrow as pa
import pytest

from qwen_jax.errors import InputError
from train.curate.select import Select

COLUMNS: dict[str, list[Any]] = {
    "words": [10, 50, 200, None, 0],
    "score": [0.1, 0.9, None, 0.7, 0.0],
    "language": ["en", "de", None, "en", "fr"],
    "code": [True, False, None, False, None],
    "text": ["a cat", "Haus", "猫", None, ""],
}


def reasons(condition: str, columns: dict[str, list[Any]] = COLUMNS) -> list[str | None]:
    select = Select(condition)
    table = pa.table({name: columns[name] for name in select.reads})
    found: list[str | None] = select.start()(table)["reason"].to_pylist()
    return found


@pytest.mark.parametrize(
    ("condition", "kept", "unknown"),
    [
        ("words >= 50", [1, 2], [3]),
        ("words / 0 > 1 or words == 50", [1], [0, 2, 3, 4]),
        ("words * 2 - 1 > 19", [1, 2], [3]),
        ("0 < words < 100", [0, 1], [3]),
        ("language == 'en'", [0, 3], [2]),
        ("language in ('en', 'de')", [0, 1, 3], [2]),
        ("language not in ['en']", [1, 4], [2]),
        ("words is None or words >= 50", [1, 2, 3], []),
        ("default(words, 60) >= 50", [1, 2, 3], []),
        ("score is not None", [0, 1, 3, 4], []),
        ("not code", [1, 3], [2, 4]),
        ("code", [0], [2, 4]),
        # True is enough for `or`, and False for `and` below the top, whatever the other side.
        ("code or words >= 10", [0, 1, 2], [3, 4]),
        ("not (code and words < 50)", [1, 2, 3], [4]),
        ("length(text) > 1", [0, 1], [3]),
        ("contains(text, 'cat') or starts_with(text, 'Ha')", [0, 1], [3]),
        ("ends_with(text, 's')", [1], [3]),
        ("abs(words - 40) <= 30", [0, 1], [3]),
        ("score > -1", [0, 1, 3, 4], [2]),
    ],
)
def test_a_condition_keeps_and_names(condition: str, kept: list[int], unknown: list[int]) -> None:
    found = reasons(condition)
    assert [i for i, reason in enumerate(found) if reason is None] == kept
    assert [i for i, reason in enumerate(found) if reason and reason.endswith(" is unknown")] == unknown


def test_each_rule_has_a_reason_and_the_first_is_told() -> None:
    found = reasons("language == 'en' and score > 0.5 and words >= 50")
    assert found == [
        "not (score > 0.5)",
        "not (language == 'en')",
        "language == 'en' is unknown",
        "words >= 50 is unknown",
        "not (language == 'en')",
    ]


def test_a_column_of_decisions_says_the_reason() -> None:
    columns = {"code": [True, False, False], "quality": ["short", "long", None], "url": ["a", "b", None]}
    assert reasons("code or quality is None", columns) == [None, "quality: long", None]
    assert reasons("code and quality is not None", columns)[1:] == ["not (code)", "not (code)"]
    # A column of the documents themselves would give as many reasons as there are documents.
    assert reasons("url is None or code", columns) == [None, "not (url is None or code)", None]


def test_conditions_of_two_columns_are_those_of_python() -> None:
    rng = random.Random()
    seed = rng.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    names = ["a", "b", "c"]
    columns = {name: [rng.randrange(-3, 4) for _ in range(50)] for name in names}

    def number(depth: int) -> str:
        if depth == 0 or rng.random() < 0.3:
            return rng.choice([*names, str(rng.randrange(-3, 4))])
        return f"({number(depth - 1)} {rng.choice('+-*')} {number(depth - 1)})"

    def truth(depth: int) -> str:
        if depth == 0:
            return f"{rng.choice(names)} {rng.choice(['<', '<=', '>', '>=', '==', '!='])} {number(2)}"
        kind = rng.randrange(3)
        if kind == 0:
            return f"not ({truth(depth - 1)})"
        return f"({truth(depth - 1)}) {('and', 'or')[kind - 1]} ({truth(depth - 1)})"

    for _ in range(30):
        condition = truth(2)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        assert [r is None for r in reasons(condition, columns)] == [bool(eval(condition, {}, row)) for row in rows]


@pytest.mark.parametrize(
    "condition",
    [
        "",
        "words >",
        "__import__('os').system('true')",
        "words.__class__ == 1",
        "[w for w in words]",
        "lambda: words",
        "words == None",
        "words is 5",
        "words in other",
        "words in (None, 1)",
        "length(text, 1) > 2",
        "f'{words}' == 'a'",
        "1 < 2",
        "words ** 9",
        "print(words)",
        "(words := 5)",
        "(" * 500 + "words" + ")" * 500,
    ],
)
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(InputError, match=r"condition"):
        reasons(condition)


def test_types_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"words > 9{25} cannot be computed, where words is int64: .*too large"):
        reasons(f"words > {'9' * 25}")
    with pytest.raises(InputError, match=r"words > 'x' cannot be computed, where words is int64"):
        reasons("words > 'x'")
    with pytest.raises(InputError, match="must be true or false, it is int64"):
        reasons("words + 1")
