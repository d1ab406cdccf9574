"""Lines repeated within a document: the first one stays, and lines that may well come again stay too."""

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.curation import applied, check_laws, documents
from tests.helpers.runs import print_seed
from train.curate.operators.lines import RemoveRepeatedLines

LONG = "This is a line of well over forty characters, which is removed."
MENU = "Home page\nAbout the company\nContact us and more\nImprint"


def text_after(text: str, **fields: int) -> str:
    made: str = applied(RemoveRepeatedLines(**fields), documents([text]))["text"].to_pylist()[0]
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("one\ntwo\n", "one\ntwo\n"),
        (f"{LONG}\nother\n  {LONG} \nend", f"{LONG}\nother\nend"),
        (f"{MENU}\ntext\n\n{MENU}\nend", f"{MENU}\ntext\n\nend"),
        ("if a:\n    }\n}\nif b:\n    }\n}\n" * 2, "if a:\n    }\n}\nif b:\n    }\n}\n" * 2),
        ("}\n" * 50, "}\n" * 50),
        ("Home page\ntext\nHome page\nmore", "Home page\ntext\nHome page\nmore"),
        (f"{MENU}\n{MENU}\n{MENU}", MENU),
        ("\n\n\n\n", "\n\n\n\n"),
    ],
)
def test_cases(text: str, expected: str) -> None:
    assert text_after(text) == expected


def test_planted_repetitions_are_all_that_goes() -> None:
    rng = print_seed()
    texts, expected = [], []
    for _ in range(60):
        lines = [f"line {rng.integers(10**9)} " + "word " * int(rng.integers(0, 15)) for _ in range(30)]
        kept, all_lines = list(lines), list(lines)
        for _ in range(int(rng.integers(0, 6))):
            source = [line for line in lines if len(line.strip()) >= 40]
            if source:
                all_lines.append(str(rng.choice(source)))
        texts.append("\n".join(all_lines))
        expected.append("\n".join(kept))
    made = check_laws(RemoveRepeatedLines(), documents(texts), rng)
    assert made["text"].to_pylist() == expected
    counts = [text.count("\n") - right.count("\n") for text, right in zip(texts, expected, strict=True)]
    assert made["lines_removed"].to_pylist() == counts


def test_random_lines_reach_a_fixed_point() -> None:
    rng = print_seed()
    pool = np.array(["", "a", "}", "  }", "short", LONG, "x" * 25, "y" * 20])
    texts = ["\n".join(rng.choice(pool, int(rng.integers(0, 40)))) for _ in range(60)]
    made = check_laws(RemoveRepeatedLines(), documents(texts), rng)
    for before, after in zip(texts, made["text"].to_pylist(), strict=True):
        # Nothing that was there once is lost.
        assert {line.strip() for line in before.split("\n")} - {""} == {line.strip() for line in after.split("\n")} - {
            ""
        }


def test_short_lines_are_counted() -> None:
    made = applied(RemoveRepeatedLines(short=5), documents(["abcd\n\nabcde\nab", "", "  abcd  "]))
    assert made["short_lines_left"].to_pylist() == [pytest.approx(2 / 3), 0, 1]


def test_a_document_of_very_many_lines() -> None:
    assert text_after("\n".join(map(str, range(30_000))) + "\n" + "a\n" * 60_000).count("a") == 60_000


def test_bad_settings() -> None:
    for wrong in ({"min_characters": 0}, {"block": 1}):
        with pytest.raises(InputError, match="at least"):
            RemoveRepeatedLines(**wrong)
