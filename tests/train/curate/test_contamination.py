"""Test items are found in documents where the rule says so, and not elsewhere."""

import json
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.train.curate.test_lcs import tables
from train.curate.contamination import Finder, Mode, make_finder
from train.curate.evaluation_sets import find_sets, read_items
from train.data.words import words

# Small enough that unrelated texts share words, and short runs now and then.
_VOCABULARY = [f"w{i}" for i in range(400)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_words(rng: random.Random, count: int, vocabulary: list[str] = _VOCABULARY) -> list[str]:
    return [rng.choice(vocabulary) for _ in range(count)]


def finder_of(path: Path, rows: list[dict[str, Any]], mode: Mode = "windowed") -> Finder:
    return make_finder(read_items(find_sets([f"set={write(path, rows)}"])), mode)


def found(finder: Finder, texts: list[str], rows: list[int] | None = None) -> set[tuple[int, int]]:
    return {(match.text, match.item) for match in finder.find(texts, rows)[1]}


def noisy(rng: random.Random, text: list[str], level: float) -> list[str]:
    changed = rng.sample(range(len(text)), round(level * len(text)))
    return [rng.choice(_VOCABULARY) if i in changed else word for i, word in enumerate(text)]


def disguised(rng: random.Random, text: list[str]) -> str:
    """The same words with other cases, punctuation and spaces."""
    return "".join(
        (word.upper() if rng.random() < 0.3 else word) + rng.choice([" ", "\n\n", ", ", "_", " (", "\u3000"])
        for word in text
    )


def test_noisy_copies_in_long_documents_are_found_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    items = [some_words(rng, rng.randrange(20, 120)) for _ in range(300)]
    finder = finder_of(tmp_path / "e.jsonl", [{"question": " ".join(item)} for item in items])
    documents = [some_words(rng, 3000) for _ in range(40)]
    assert not found(finder, [" ".join(document) for document in documents])
    for level in (0.0, 0.05, 0.1):
        planted = rng.sample(range(300), 40)
        texts = []
        for document, item in zip(documents, planted, strict=True):
            at = rng.choice([0, 3000, rng.randrange(3000)])
            texts.append(disguised(rng, document[:at] + noisy(rng, items[item], level) + document[at:]))
        split, matches = finder.find(texts)
        assert {(m.text, m.item) for m in matches} == set(enumerate(planted))
        for match in matches:
            # The match is the copy: its words are nearly those of the item.
            item = items[match.item]
            begin, end = split.place(match.text, texts[match.text], match.begin, match.end)
            span = words(texts[match.text][begin:end])
            assert match.common >= (1 - level) * len(item) - 1
            # Changed words near its ends may be left out, and with them as many words that lie farther out.
            changed = math.ceil(level * len(item))
            assert len(item) - 2 * changed - 2 <= len(span) <= len(item) + max(2, 0.15 * len(item))


def test_insertions_deletions_and_excerpts_follow_the_rule(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    item = some_words(rng, 60)
    finder = finder_of(tmp_path / "e.jsonl", [{"question": " ".join(item)}])
    before, after = some_words(rng, 500), some_words(rng, 500)
    longer = [word for i, word in enumerate(item) for word in ([word] if i % 7 else [word, "inserted"])]
    for text, expected in (
        (before + longer + after, True),
        (before + [word for i, word in enumerate(item) if i % 7] + after, True),
        (before + item[:40] + after, True),  # 40 of 60 words are enough,
        (before + item[:25] + after, False),  # 25 are not,
        (item[5:30], True),  # but they are where the text has no others.
        (item[:12], False),  # Fewer than 13 never are.
        (before + list(reversed(item)) + after, False),
    ):
        assert bool(found(finder, [" ".join(text)])) is expected, text
    # What two texts have together is in neither.
    assert not found(finder, [" ".join(before + item[:30]), " ".join(item[30:] + after)])


@pytest.mark.parametrize("mode", ["contiguous", "document"])
def test_other_modes_are_those_of_all_comparisons(mode: Mode, tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    few = _VOCABULARY[: 40 if mode == "document" else 400]
    items = [some_words(rng, rng.randrange(13, 40), few) for _ in range(20)]
    finder = finder_of(tmp_path / "e.jsonl", [{"question": " ".join(item)} for item in items], mode)
    positive = 0
    for _ in range(40):
        item = rng.choice(items)
        part = item[: rng.randrange(8, len(item) + 1)]
        text = some_words(rng, rng.randrange(40), few) + part + some_words(rng, rng.randrange(40), few)
        expected = set()
        for number, other in enumerate(items):
            common = tables([hash(w) for w in other], [hash(w) for w in text])[mode == "contiguous"]
            if common >= 13 and 5 * common >= 3 * min(len(other), len(text)):
                expected.add((0, number))
        assert found(finder, [" ".join(text)]) == expected
        positive += bool(expected)
    assert 0 < positive < 40


def test_the_literal_rule_is_refused_for_long_documents(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    rows = [{"question": " ".join(some_words(rng, 40))} for _ in range(9)]
    finder = finder_of(tmp_path / "e.jsonl", rows, "document")
    with pytest.raises(InputError, match=r"page 7 has 1,000 words, 25 times .* --mode windowed"):
        finder.find([" ".join(some_words(rng, 1000))], names=["page 7"])


def test_many_items_from_one_template_are_found(tmp_path: Path) -> None:
    """Runs that most items share are left out of the index, but no item becomes invisible."""
    rng = random.Random(int(print_seed().integers(1 << 30)))
    template = some_words(rng, 30)
    items = [[*template[:10], str(i), *template[10:20], str(3 * i), *template[20:]] for i in range(200)]
    finder = finder_of(tmp_path / "e.jsonl", [{"question": " ".join(item)} for item in items])
    for number in rng.sample(range(200), 10):
        assert (0, number) in found(finder, [" ".join(items[number])])
        copy = noisy(rng, items[number], 0.1)
        # The item's own runs of five words have one of its two numbers. A candidate needs two that noise left whole.
        own = [i for at in (10, 21) for i in range(at - 4, at + 1)]
        whole = sum(copy[i : i + 5] == items[number][i : i + 5] for i in own)
        if whole >= 2:
            assert found(finder, [" ".join(some_words(rng, 300) + copy + some_words(rng, 300))])


def test_tables_of_zeros_take_no_time_and_hide_nothing(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    items = [["0"] * 40, *([*some_words(rng, 20), *(["0"] * 30), *some_words(rng, 20)] for _ in range(50))]
    finder = finder_of(tmp_path / "e.jsonl", [{"question": " ".join(item)} for item in items])
    began = time.process_time()
    assert found(finder, ["0 " * 200_000]) == {(0, 0)}
    assert (0, 7) in found(finder, [" ".join(["0"] * 100_000 + items[7] + ["0"] * 100_000)])
    assert time.process_time() - began < 5


def test_what_is_found_in_a_text_does_not_depend_on_its_company(tmp_path: Path) -> None:
    """A page that was copied a hundred times is found each time, also behind texts that repeat parts of a test item."""
    rng = random.Random(int(print_seed().integers(1 << 30)))
    items = [some_words(rng, 30) for _ in range(3)]
    finder = finder_of(tmp_path / "set.jsonl", [{"question": " ".join(item)} for item in items])
    texts = [" ".join([*some_words(rng, 20), *items[0], *some_words(rng, 20)]) for _ in range(100)]
    parts = [" ".join(items[1][begin : begin + 5]) for begin in range(26) for _ in range(40)]
    texts += [" ".join(parts), " ".join(items[1])]
    alone = {(number, item) for number, text in enumerate(texts) for _, item in found(finder, [text])}
    assert {*((number, 0) for number in range(100)), (101, 1)} <= alone
    assert found(finder, texts) == alone
    assert {(len(texts) - 1 - number, item) for number, item in found(finder, texts[::-1])} == alone


def test_short_questions_need_every_word_and_the_answer(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "What is the capital city of France?", "answer": "Paris"},
        {"question": "Say hello.", "answer": None},
        {"question": "How many are seven times six?", "choices": ["41", "42"], "answer": 1},
        {"question": "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f", "answer": "\u5df4\u9ece"},
        {"question": "Who wrote it?", "answer": "A", "options": ["Jane", "Joe"]},
    ]
    finder = finder_of(tmp_path / "e.jsonl", rows)
    long = "Some words before it. " * 20
    for texts, expected in (
        ([f"{long} What is the capital city of FRANCE? It is Paris. {long}"], {0}),
        ([f"{long} What is the capital city of France? It is Rome. {long}"], set()),
        ([f"{long} What is the big capital city of France? It is Paris. {long}"], set()),
        (["What is the capital city of France?", "Paris, of course."], {0}),
        (["What is the capital city of France?", "Rome, of course."], set()),
        ([f"{long} Say hello. {long}"], set()),
        (["SAY HELLO!", "Good evening."], {1}),
        ([f"{long} How many are seven times six? 41 or 42? {long}"], {2}),
        ([f"{long} How many are seven times six? 4 2 {long}"], set()),
        (["\u95ee\uff1a\u6cd5\u56fd\u7684 \u9996\u90fd\u662f\u54ea\u91cc?\u7b54\uff1a\u5df4\u9ece\u3002"], {3}),
        (["who wrote it", "Jane did"], {4}),
        (["who wrote it", "Joe did"], set()),
    ):
        assert {item for _, item in found(finder, texts, [0] * len(texts))} == expected, texts
    # The answer must be in the same row.
    assert not found(finder, ["What is the capital city of France?", "Paris, of course."], [0, 1])


def test_chinese_copies_are_found(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    characters = [chr(code) for code in range(0x4E00, 0x4F00)]
    item = some_words(rng, 40, characters)
    finder = finder_of(tmp_path / "e.jsonl", [{"problem": "".join(item)}])
    text = some_words(rng, 400, characters)
    assert not found(finder, ["".join(text)])
    copy = [rng.choice(characters) if i % 10 == 3 else c for i, c in enumerate(item)]
    assert found(finder, ["".join(text[:200]) + "\uff0c".join(copy) + "".join(text[200:])])


def test_a_saved_finder_finds_the_same(tmp_path: Path) -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    items = [some_words(rng, rng.randrange(1, 60)) for _ in range(50)]
    finder = finder_of(tmp_path / "e.jsonl", [{"question": " ".join(item)} for item in items])
    finder.save(tmp_path / "index")
    texts = [" ".join(noisy(rng, item, 0.05)) for item in items]
    assert Finder.load(tmp_path / "index").find(texts)[1] == finder.find(texts)[1] != []


def test_evaluation_sets_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a new process: the library is imported when its first file is read.
    monkeypatch.delitem(sys.modules, "zstandard", raising=False)
    (tmp_path / "broken.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd and no more")
    (tmp_path / "empty.jsonl").write_text('{"question": " ... "}\n')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00nothing")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    write(tmp_path / "other.jsonl", [{"a": "one", "b": "two"}])
    for given, says in (
        ("name=", "NAME=FILE"),
        ("=file", "NAME=FILE"),
        ("name=/no/such.jsonl", "such"),
        (str(tmp_path / "empty.jsonl"), "no record with words"),
        (str(tmp_path / "none.jsonl"), "no record with words"),
        (str(tmp_path / "broken.jsonl.gz"), "broken.jsonl.gz cannot be read"),
        (str(tmp_path / "broken.jsonl.zst"), "broken.jsonl.zst cannot be read"),
        (str(tmp_path / "latin.jsonl"), "latin.jsonl, line 1: .*UTF-8"),
        (str(tmp_path / "other.jsonl"), r"other.jsonl, line 1 has no question.*got a, b.*--question"),
    ):
        with pytest.raises(InputError, match=says):
            read_items(find_sets([given]))
    items = read_items(find_sets([str(tmp_path / "other.jsonl")]), ["b"], ["a"])
    assert (items.names, items.texts) == (["other"], ["two\none"])


def test_the_parts_of_a_record(tmp_path: Path) -> None:
    """The question, alone and with its choices, and a long answer that is no choice; of a chat the last message."""
    q, c, a = (" ".join(f"{name}{i}" for i in range(20)) for name in "qca")
    rows = [
        {"question": q, "choices": [c, "x"], "answer": "A"},
        {"messages": [{"role": "system", "content": c}, {"role": "user", "content": q}], "answer": a, "url": c},
        {"prompt": "short question", "options": {"A": c, "B": "x"}, "target": "B"},
        {"prompt": "short question", "solution": a},
    ]
    items = read_items(find_sets([write(tmp_path / "e.jsonl", rows)]))
    sizes: dict[int, list[int]] = {}
    for sequence, item in zip(items.sequences, items.sequence_items, strict=True):
        sizes.setdefault(item, []).append(len(sequence))
    assert sizes == {0: [20, 41], 1: [20, 20], 2: [23], 3: [20, 22]}
    assert not items.questions
    assert re.search(r"e\.jsonl, line 3$", items.places[2])
