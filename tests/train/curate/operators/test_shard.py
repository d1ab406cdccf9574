"""Repetitions between the documents of a shard: what is removed is what a simple search removes; the first stays."""

import re
from collections.abc import Sequence

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.curation import applied, check_laws, documents
from tests.helpers.runs import print_seed
from train.curate.operators.shard import RemoveSharedLines, RemoveSharedRuns

_WORD = re.compile("[\u3000-\u9fff\uac00-\ud7ff\u0e00-\u0eff]|[^\\s\u3000-\u9fff\uac00-\ud7ff\u0e00-\u0eff]+")


def simple_lines(texts: Sequence[str | None], min_words: int, min_documents: int) -> list[str | None]:
    """The same by a dictionary."""
    where: dict[str, set[int]] = {}
    for row, text in enumerate(texts):
        for line in (text or "").split("\n"):
            where.setdefault(line.strip(), set()).add(row)

    def stays(line: str, row: int) -> bool:
        rows = where[line.strip()]
        return len(line.split()) < min_words or len(rows) < min_documents or row == min(rows)

    return [
        text if text is None else "\n".join(line for line in text.split("\n") if stays(line, row))
        for row, text in enumerate(texts)
    ]


def simple_runs(texts: Sequence[str | None], length: int) -> list[str | None]:
    """The same by a dictionary of tuples of words."""
    while True:
        words = [(row, match) for row, text in enumerate(texts) for match in _WORD.finditer(text or "")]
        first: dict[tuple[str, ...], int] = {}
        covered = set()
        for at in range(len(words) - length + 1):
            if words[at][0] != words[at + length - 1][0]:
                continue
            run = tuple(match[0] for _, match in words[at : at + length])
            if at - first.setdefault(run, at) >= length:
                covered.update(range(at, at + length))
        if not covered:
            return list(texts)
        result = [None if text is None else list(text) for text in texts]
        for at in covered:
            row, match = words[at]
            characters = result[row]
            assert characters is not None
            next_one = words[at + 1] if at + 1 < len(words) and words[at + 1][0] == row else None
            end = next_one[1].start() if next_one else len(characters)
            characters[match.start() : end] = [""] * (end - match.start())
        texts = [None if characters is None else "".join(characters) for characters in result]


def random_texts(rng: np.random.Generator, count: int, vocabulary: Sequence[str]) -> list[str | None]:
    """Words with spaces and line ends, pieces of which come again; also null and empty texts."""
    shared = [list(rng.choice(vocabulary, int(rng.integers(3, 12)))) for _ in range(6)]
    texts: list[str | None] = []
    for _ in range(count):
        words: list[str] = []
        for _ in range(int(rng.integers(0, 8))):
            words += shared[int(rng.integers(6))] if rng.random() < 0.5 else list(rng.choice(vocabulary, 4))
        spaces = rng.choice([" ", "\n", "  ", " \n\n", "\t"], len(words), p=[0.7, 0.15, 0.05, 0.05, 0.05])
        text = "".join(word + str(space) for word, space in zip(words, spaces, strict=True))
        texts.append(None if rng.random() < 0.05 else text)
    return texts


VOCABULARY = ["a", "b", "word", "é", "漢字の", "x=1;", "한국", "ไทย", "🎉", "longer-word", "\xa0"]


def test_lines_are_those_of_a_simple_search() -> None:
    rng = print_seed()
    for _ in range(5):
        lines = [f"{' '.join(rng.choice(VOCABULARY[:4], int(rng.integers(1, 5))))}" for _ in range(40)]
        texts = ["\n".join(f" {line}" for line in rng.choice(lines, int(rng.integers(0, 9)))) for _ in range(30)]
        table = documents([*texts[:15], None, *texts[15:]])
        made = check_laws(RemoveSharedLines(3, 2), table, rng)
        expected = simple_lines(table["text"].to_pylist(), 3, 2)
        assert made["text"].to_pylist() == expected
        for before, after, count, reason in zip(
            table["text"].to_pylist(),
            expected,
            *(made[name].to_pylist() for name in made.column_names[1:]),
            strict=True,
        ):
            assert (count is None) == (before is None)
            if before is not None and after is not None:
                removed = before.count("\n") - after.count("\n")
                # What has lost all of its lines is empty, which is the text of one line.
                assert count in ((removed, removed + 1) if after == "" else (removed,))
                assert reason == ("nothing but repetitions" if before and count and not after.strip() else None)


def test_runs_are_those_of_a_simple_search() -> None:
    rng = print_seed()
    for length in (2, 3, 5, 8):
        texts = random_texts(rng, 30, VOCABULARY[:10])
        made = check_laws(RemoveSharedRuns(length), documents(texts), rng)
        expected = simple_runs(texts, length)
        assert made["text"].to_pylist() == expected
        for before, after, count in zip(texts, expected, made["shared_words_removed"].to_pylist(), strict=True):
            if before is None or after is None:
                assert count is None
            else:
                assert count == len(_WORD.findall(before)) - len(_WORD.findall(after))


def test_planted_runs_are_found_and_the_first_stays() -> None:
    rng = print_seed()

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(10**9, size=count))

    long, short = words(50), words(49)
    texts = [f"{words(30)}\n{part}\n{words(30)}" for part in (long, short, long, short, long + " " + long)]
    made = check_laws(RemoveSharedRuns(), documents(texts), rng)
    expected = [*texts[:2], texts[2].replace(long + "\n", ""), texts[3], texts[4].replace(f"{long} {long}\n", "")]
    assert made["text"].to_pylist() == expected
    assert made["shared_words_removed"].to_pylist() == [0, 0, 50, 0, 100]
    whole = applied(RemoveSharedRuns(), documents([long, f" {long}\n", long + " more"]))
    assert whole["text"].to_pylist() == [long, " ", "more"]
    assert whole["reason"].to_pylist() == [None, "nothing but repetitions", None]


def test_one_long_repetition_keeps_its_beginning() -> None:
    made = applied(RemoveSharedRuns(10), documents(["a " * 1000, "b " * 15 + "a " * 500]))
    kept = [text.split() for text in made["text"].to_pylist()]
    assert kept == [["a"] * 10, ["b"] * 15]


def test_shared_lines_of_chinese_count_by_characters() -> None:
    made = applied(
        RemoveSharedLines(),
        documents(["委员会再次开会\n一", "委员会再次开会\n二", "委员会再次开会\n三\n会", "会", "会"]),
    )
    assert made["text"].to_pylist() == ["委员会再次开会\n一", "二", "三\n会", "会", "会"]


def test_empty_shards_and_bad_settings() -> None:
    for operator in (RemoveSharedLines(), RemoveSharedRuns()):
        for texts in ([], [None], [""], [None, "", None]):
            made = applied(operator, documents(texts))
            assert made["text"].to_pylist() == texts
    for bad in (lambda: RemoveSharedLines(min_documents=1), lambda: RemoveSharedLines(0), lambda: RemoveSharedRuns(1)):
        with pytest.raises(InputError, match="at least"):
            bad()
