"""Masking takes out exactly the spans, in texts and in lines of JSON, and changes no other byte."""

import json
import random
from typing import Any

from tests.helpers.runs import print_seed
from train.curate.masking import line_without_spans, row_texts, row_without_spans, without_spans


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(3 if depth > 2 else 6)
    if kind < 2:
        return "".join(
            rng.choice(['"', "\\", "\n", "a", " b", "\u00e9", "\u4f60", "\U0001f600", "\t"]) for _ in range(9)
        )
    if kind == 2:
        return rng.choice([None, True, 3, 2.5, -1e30])
    if kind == 3:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 4:
        return {"role": rng.choice(["user", "system"]), "content": random_value(rng, depth + 1)}
    return {f"k\u00e9{i}": random_value(rng, depth + 1) for i in range(rng.randrange(4))}


def test_lines_are_masked_like_their_values() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    masked = 0
    for _ in range(400):
        row = {"a": random_value(rng), "b": random_value(rng), **({"text": "x" * 9} if rng.random() < 0.2 else {})}
        field = rng.choice([None, "a"])
        style = {"ensure_ascii": rng.random() < 0.5, "separators": rng.choice([(",", ":"), (" , ", " :  ")])}
        line = json.dumps(row, **style)
        texts = row_texts(row, field)
        spans = {
            number: [(begin := rng.randrange(9), rng.randrange(begin, 9) + 1) for _ in range(rng.randrange(3))]
            for number, text in enumerate(texts)
            if len(text) == 9 and isinstance(text, str) and not text[:1].isdigit()
        }
        placeholder = rng.choice(["", "[\u00e9]"])
        expected = row_without_spans(row, field, spans, placeholder)
        changed = line_without_spans(line, field, spans, placeholder)
        assert json.loads(changed) == expected
        for number, text in enumerate(row_texts(expected, field)):
            before = texts[number]
            cut = [i for i in range(len(before)) if any(a <= i < b for a, b in spans.get(number, []))]
            kept = "".join(c for i, c in enumerate(before) if i not in cut)
            assert text.replace(placeholder, "") == kept if placeholder else text == kept
        if not any(spans.values()):
            assert changed == line
        masked += any(spans.values())
    assert masked > 30


def test_escapes_and_spaces_of_a_masked_line_stay() -> None:
    line = '{ "text" : "\\u0041b\\/\\ud83d\\ude00 d\\n\u00e9",  "n":1e2 }'
    assert row_texts(json.loads(line), None) == ["Ab/\U0001f600 d\n\u00e9"]
    assert line_without_spans(line, None, {0: [(1, 2), (3, 5)]}, "") == '{ "text" : "\\u0041\\/d\\n\u00e9",  "n":1e2 }'
    assert without_spans("0123456789", [(4, 6), (1, 2), (5, 8)], "#") == "0#23#89"
