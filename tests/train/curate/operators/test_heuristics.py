"""Statistics and decisions of the heuristics against plain references, at their limits, and against datatrove's."""
# ruff: noqa: RUF001 (marks of many scripts)

import json
import pickle
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.curate.operators import heuristics
from train.curate.operators.heuristics import (
    C4,
    STATISTICS,
    C4Lines,
    Filter,
    FineWeb,
    GopherQuality,
    GopherRepetition,
    Statistics,
)
from train.curate.operators.heuristics_grams import _group
from train.curate.operators.heuristics_words import split_words

FILTERS = (GopherQuality(), GopherRepetition(), FineWeb(), C4())
GOLDEN = Path(__file__).with_name("heuristics_golden.json")


def table(texts: Sequence[str]) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.large_string())})


def statistics(texts: Sequence[str], **fields: Any) -> pa.Table:
    return Statistics(**fields).start()(table(texts))


def decide(rules: Filter, texts: Sequence[str]) -> list[str | None]:
    return rules.start()(statistics(texts)).column(0).to_pylist()


# The published definitions, word by word and line by line.


def repeated(parts: Sequence[Any]) -> list[Any]:
    return [part for at, part in enumerate(parts) if part in parts[:at]]


def top_gram(words: list[str], n: int) -> int:
    grams = [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]
    if not grams:
        return 0
    most = max(Counter(grams).values())
    return most * len(next(gram for gram in grams if grams.count(gram) == most))


def duplicate_grams(words: list[str], n: int) -> int:
    seen: list[tuple[str, ...]] = []
    characters = at = 0
    while at + n <= len(words):
        gram = tuple(words[at : at + n])
        if gram in seen:
            characters += len("".join(gram))
            at += n
        else:
            seen.append(gram)
            at += 1
    return characters


def sentences(line: str) -> int:
    count, ended = 1, False
    # White space other than a blank counts as a word here.
    runs = [run for run in re.split(r"(\s+)", line) if run not in ("", " ")]
    for word in (word for run in runs for word in (split_words(run) if run.strip() else ["x"])):
        if word in (".", "!", "?", "。", "！", "？"):
            ended = True
        elif ended and any(char.isalnum() or char in "+$<>=|~^`→©" for char in word):
            count, ended = count + 1, False
    return count


def kept_lines(text: str) -> tuple[list[str], str | None]:
    kept: list[str] = []
    forbidden = None
    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        for citation in ("[]", "[1]", "[23]", "[edit]", "[citation needed]"):
            line = line.replace(citation, "")
        lower = line.lower()
        if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."):
            continue
        if len(words) < 3 or any(len(word) > 1000 for word in words):
            continue
        if "lorem ipsum" in lower:
            forbidden = forbidden or "lorem ipsum"
        elif "javascript" in lower:
            continue
        elif "{" in line:
            forbidden = forbidden or "curly bracket"
        elif not any(phrase in lower for phrase in ("terms of use", "privacy policy", "use cookies")):
            kept.append(line)
    return kept, forbidden


def reference(text: str) -> dict[str, Any]:
    """What `STATISTICS` says, for texts of the characters that `random_text` makes."""
    words = list(split_words(text))
    proper = [word for word in words if any(char.isalnum() or char in "•→©" for char in word)]
    lines = text.splitlines()
    filled = [line for line in text.split("\n") if line.strip()]
    gopher_lines = [line for line in text.split("\n") if line]
    gopher_lines += [""] * (text.startswith("\n") + text.endswith("\n") if text else 1)
    paragraphs = [""]
    previous = False
    for line in text.strip().split("\n"):
        if line:
            if previous:
                paragraphs.append(line)
            else:
                paragraphs[-1] += ("\n" if paragraphs[-1] else "") + line
            previous = False
        else:
            previous = True
    kept, forbidden = kept_lines(text)

    def ratio(count: float, total: float) -> float:
        return count / total if total else 0.0

    return {
        "characters": len(text),
        "words": len(proper),
        "words_and_marks": len(words),
        "stop_words": len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(words)),
        "mean_word_length": ratio(sum(map(len, proper)), len(proper)),
        "hash_ratio": ratio(text.count("#"), len(words)),
        "ellipsis_ratio": ratio(text.count("...") + text.count("…"), len(words)),
        "bullet_lines": ratio(sum(line.lstrip()[:1] in ("•", "-") for line in lines), len(lines)),
        "ellipsis_lines": ratio(sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)),
        "alphabetic_words": ratio(sum(any(char.isalpha() for char in word) for word in words), len(words)),
        "duplicate_lines": ratio(len(repeated(gopher_lines)), len(gopher_lines)),
        "duplicate_line_characters": ratio(sum(map(len, repeated(gopher_lines))), len(text)),
        "duplicate_paragraphs": ratio(len(repeated(paragraphs)), len(paragraphs)),
        "duplicate_paragraph_characters": ratio(sum(map(len, repeated(paragraphs))), len(text)),
        **{f"top_{n}_gram": ratio(top_gram(words, n), len(text)) for n in (2, 3, 4)},
        **{f"duplicate_{n}_grams": ratio(duplicate_grams(words, n), len(text)) for n in range(5, 11)},
        "c4_lines": len(kept),
        "c4_sentences": sum(map(sentences, kept)),
        "c4_forbidden": forbidden,
        "filled_lines": len(filled),
        "punctuated_lines": ratio(
            sum(line.endswith((".", "!", "?", "。", "！", "？")) for line in filled), len(filled)
        ),
        "short_lines": ratio(sum(len(line) <= 30 for line in filled), len(filled)),
        "duplicate_characters": ratio(sum(map(len, repeated(filled))), len(text.replace("\n", ""))),
        "newline_ratio": ratio(text.count("\n"), len(words)),
    }


PIECES = [
    *"the be to of and that have with a horse runs home quickly Quickly don't I'm e.g. x=y well-known end.Next".split(),
    *"12 3.5km (a ) , . . . ! ? ... … # ## - -- • → © : ): 汉字。 汉字 слово. ελληνικά $5 {x} javascript.".split(),
    *"[1] [edit] word[23]. \"Yes.\" 'no' f(x): /usr/bin http://a.org/b?c=d foo@bar.org __init__ *args".split(),
    *("terms\u00a0of", "", "lorem ipsum", "use cookies", "privacy policy."),
]
BREAKS = ["\n", "\n\n", "\n\n\n", ".\n", "...\n", "\r\n", "\u2028", "  \n", "\n- ", "\n• ", "\n\n ", "\t", "  "]


def random_text(rng: np.random.Generator, words: int) -> str:
    """Words of a vocabulary that may be small, with line breaks that may be rare."""
    vocabulary = rng.choice(len(PIECES), rng.integers(1, len(PIECES)), replace=False)
    few = float(rng.choice([0.02, 0.1, 0.4]))
    parts = []
    for _ in range(words):
        parts.append(PIECES[rng.choice(vocabulary)])
        parts.append(BREAKS[rng.integers(len(BREAKS))] if rng.random() < few else " ")
    if rng.random() < 0.5:
        # A part that comes again, also as whole lines.
        begin, end = sorted(rng.integers(0, len(parts) + 1, 2))
        parts += ["\n"] * int(rng.integers(0, 3)) + parts[begin:end]
    return "".join(parts)


def test_statistics_are_the_published_ones() -> None:
    """Each column equals a slow reference, on texts of all lengths with and without repetitions."""
    rng = print_seed()
    texts = [random_text(rng, int(rng.choice([1, 2, 3, 5, 9, 10, 20, 60, 200]))) for _ in range(150)]
    found = statistics(texts).to_pylist()
    assert statistics(texts).schema == STATISTICS
    for text, row in zip(texts, found, strict=True):
        assert row == reference(text), repr(text)


def test_documents_do_not_affect_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document has the same row alone, in any batch and order, and after the table of words was begun anew."""
    rng = print_seed()
    texts = [random_text(rng, int(rng.integers(0, 60))) for _ in range(60)]
    together = statistics(texts).to_pylist()
    compute = Statistics().start()
    assert [compute(table([text])).to_pylist()[0] for text in texts] == together
    monkeypatch.setattr(heuristics, "_BATCH", 300)
    monkeypatch.setattr(heuristics, "_TABLE", 500)
    order = rng.permutation(len(texts))
    shuffled = statistics([texts[at] for at in order]).to_pylist()
    assert shuffled == [together[at] for at in order]


def test_words_are_the_text() -> None:
    """Words and marks in a row are the text without white space, and none is empty or has white space."""
    rng = print_seed()
    ranges = [
        (0x21, 0x7F),
        (0xA1, 0x250),
        (0x370, 0x530),
        (0x590, 0x700),
        (0x900, 0xD80),
        (0x2000, 0x2C00),
        (0x3000, 0x3100),
    ]
    for _ in range(300):
        first, last = ranges[rng.integers(len(ranges))]
        text = "".join(map(chr, rng.integers(first, last, 40))) + " " + random_text(rng, 10)
        words = list(split_words(text))
        assert "".join(words) == "".join(text.split())
        assert all(word and word.split() == [word] for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(well,", "( well ,"),
        ("He doesn't, they've, it's; can't: I'm", "He does n't , they 've , it 's ; ca n't : I 'm"),
        ("don’t cannot", "do n’t can not"),
        ("Mr. Smith, e.g. in the U.S.A. at 3p.m. end.", "Mr. Smith , e.g. in the U.S.A. at 3 p.m. end ."),
        (
            "end.Next well-known x=y a/b and/or 1-2 3.5km 50% $5",
            "end . Next well - known x = y a / b and/or 1 - 2 3.5 km 50 % $ 5",
        ),
        ("https://a.org/b?c=d. foo@bar.org, os.path.join", "https://a.org/b?c=d . foo@bar.org , os.path.join"),
        ("f(x): :) __init__ *args, ...", "f(x ): :) _ _ init _ _ * args , ..."),
        ("«Да», сказал он. 汉字。", "« Да » , сказал он . 汉字 。"),
        ("wait... what?! 你好……", "wait ... what ? ! 你好 ……"),
    ],
)
def test_words(text: str, words: str) -> None:
    assert list(split_words(text)) == words.split()


def of_words(count: int, length: int = 4) -> str:
    """Different words with some stop words among them."""
    letters = str.maketrans("0123456789abcdef", "bcdfghjklmnpqrtw")
    words = [f"{at:x}".translate(letters).rjust(length, "z") for at in range(count)]
    return " ".join([*words[: count - 2], *["the", "of"][: max(0, count)]])


def test_limits_of_gopher_quality() -> None:
    """A value at a threshold is allowed, and the next one is not."""
    quality = GopherQuality()
    assert decide(quality, [of_words(50), of_words(49)]) == [None, "too few words"]
    assert quality.max_words == 100_000
    assert decide(GopherQuality(max_words=1000), [of_words(1000), of_words(1001)]) == [None, "too many words"]
    # Marks are not counted as words here.
    assert decide(quality, [of_words(49) + " , ; ! ?"]) == ["too few words"]
    three, ten = "the and abc " * 20, "the and " + "abcdefghijklmnopq " * 2 + "abcdefghij " * 56
    assert decide(quality, [three, three + "of"]) == [None, "short words"]
    assert decide(quality, [ten, ten + "abcdefghijk"]) == [None, "long words"]
    # 63 words and 7 hashes are 70.
    assert decide(quality, [of_words(63) + " #" * 7, of_words(62) + " #" * 7]) == [None, "hashes"]
    assert decide(quality, [of_words(62) + " ..." * 7 + " z", of_words(61) + " …" * 7 + " z"]) == [None, "ellipses"]
    assert decide(quality, [of_words(60) + "\n- a" * 9, of_words(60) + "\n • a" * 10]) == [None, "bullet points"]
    lines = (of_words(30) + "\n") * 7
    assert decide(quality, [lines + "a b...\n" * 3, lines + "a b…\n" * 4]) == [None, "lines that end in ellipses"]
    assert decide(quality, [of_words(80) + " 1" * 20, of_words(80) + " 12" * 21]) == [None, "few alphabetic words"]
    assert decide(quality, [of_words(60), of_words(60).replace("of", "off")]) == [None, "few stop words"]


def test_limits_of_gopher_repetition() -> None:
    """A value at a threshold is allowed, and the next one is not; an earlier rule names the document."""
    rng = print_seed()
    assert decide(GopherRepetition(), ["", " \n", "word"]) == ["no text", None, None]
    again = "\n\n".join(["one two three four five six seven eight nine ten eleven"] * 3)
    found = statistics([again, *(random_text(rng, 60) for _ in range(29))])
    off = dict.fromkeys(vars(GopherRepetition()))
    for rule in GopherRepetition.rules[1:]:
        value = max(found[rule.column].to_pylist())
        at_limit = GopherRepetition(**{**off, rule.threshold: value}).start()(found).column(0)
        assert at_limit.null_count == 30
        below = GopherRepetition(**{**off, rule.threshold: np.nextafter(value, 0)}).start()(found).column(0).to_pylist()
        assert [name for name in below if name] == [rule.name] * found[rule.column].to_pylist().count(value)
    lines = [f"line {'abcdefghijklmnop'[at]}" for at in range(7)]
    first = decide(GopherRepetition(), ["\n\n".join([*lines, *["x"] * 5]), "\n".join([*lines, *["x"] * 5])])
    assert first == ["duplicate paragraphs", "duplicate lines"]


def test_limits_of_c4_and_fineweb() -> None:
    lines = ["This is a line.", "So it is too!", 'She said "yes."', "Is this a question?"]
    assert decide(C4(), ["\n".join([*lines, "It has two. Sentences."])]) == [None]
    assert decide(C4(), ["\n".join(lines)]) == ["too few sentences"]
    assert decide(C4(), ["\n".join([*lines, "Two words."])]) == ["too few sentences"]
    assert decide(C4(), ["\n".join([*lines, "This one goes on..."])]) == ["too few sentences"]
    assert decide(C4(), ["\n".join([*lines, f"It has {'a' * 997}..."])]) == ["too few sentences"]
    assert decide(C4(), ["\n".join([*lines, f"It has {'a' * 999}."])]) == [None]
    assert decide(C4(), ["\n".join([*lines, f"It has {'a' * 1000}."])]) == ["too few sentences"]
    assert decide(C4(), ["Some { of it.\nThis is Lorem ipsum."]) == ["curly bracket"]
    assert decide(C4(), ["This is Lorem ipsum.\nSome { of it."]) == ["lorem ipsum"]
    # A bracket in a line that is dropped does not count.
    assert decide(C4(), ["\n".join([*lines, "{ unfinished", "This is the last one."])]) == [None]

    long = "a line of more than thirty characters"
    assert decide(FineWeb(), ["", " \n\t\n", "!"]) == ["no text", "no text", "short lines"]
    texts = ["\n".join([*(f"{long} {at}" for at in range(22)), *(f"{long} end {at}." for at in range(3))])]
    assert decide(FineWeb(), [*texts, f"{texts[0]}\n{long}"]) == [None, "few lines that end in punctuation"]
    exact = ["x" * 28 + f"{at:02d}" for at in range(67)]
    rest = [f"{long} {at}." for at in range(33)]
    fine = FineWeb(max_newline_ratio=None)
    assert decide(fine, ["\n".join([*exact, *rest])]) == [None]
    assert decide(fine, ["\n".join([*exact, "one more", *rest])]) == ["short lines"]
    body = "\n".join(f"{long} {at:04d}." for at in range(23))
    size = len(body) - 22
    for twice, expected in ((10, None), (11, "duplicate characters")):
        text = f"{body}\n{'z' * twice}\n{'z' * twice}"
        assert (twice / (size + 2 * twice) > 0.01) == (expected is not None)
        assert decide(FineWeb(), [text]) == [expected]
    assert decide(FineWeb(), ["a b c. " * 10 + "end." + "\n" * count for count in (9, 10)]) == [None, "many line feeds"]


def test_unusual_texts() -> None:
    """Nothing fails, all numbers are finite, and undefined fractions are 0."""
    texts = ["", "w", " \t\r\n\u3000", "!?.,;", "\x00\x01 \x7f", "\ufffe\uffff\U0010ffff \ue000", "\u200b", "a\x00b"]
    texts += [
        "ไม่มีช่องว่าง",
        "こんにちは。世界！",
        "مرحبا بالعالم؟",
        "नमस्ते दुनिया।",
        "👍🏽 👨‍👩‍👧",
        "e\u0301\u0301",
        "\ufeffword",
    ]
    found = statistics(texts).to_pylist()
    for row in found:
        assert all(value is None or isinstance(value, str) or np.isfinite(value) for value in row.values())
    assert set(found[0].values()) == {0, None}
    assert found[1]["words"] == found[1]["words_and_marks"] == 1
    assert found[3]["words"] == 0
    assert found[3]["words_and_marks"] == 5
    assert found[4]["words"] == 0
    assert found[9]["punctuated_lines"] == found[10]["punctuated_lines"] == found[11]["punctuated_lines"] == 1
    assert statistics([]).num_rows == 0
    for rules in FILTERS:
        assert rules.start()(statistics([])).num_rows == 0


@pytest.mark.parametrize(
    "piece", ["ab(c", "((((", "a" * 50, "a.b-", "word ", "汉", "...", "'s", "a).", ")..", "…)", "a@"]
)
def test_a_long_line_takes_linear_time(piece: str) -> None:
    """Ten times the text takes at most twenty-five times the time, also without a blank."""
    seconds = []
    for size in (20_000, 200_000):
        text = piece * (size // len(piece))
        begin = time.process_time()
        row = statistics([text]).to_pylist()[0]
        seconds.append(time.process_time() - begin)
        assert row["characters"] == len(text)
    assert seconds[1] < 25 * seconds[0] + 0.2


def test_ten_megabytes_in_a_line() -> None:
    row = statistics(["x" * 9_900_000 + "," * 100_000]).to_pylist()[0]
    assert row["words"] == 1
    assert row["words_and_marks"] == 100_001
    assert row["mean_word_length"] == 9_900_000


def test_thresholds_are_apart_from_statistics() -> None:
    """Filters with other thresholds, or without some, read the same columns; a null breaks no rule."""
    rng = print_seed()
    found = statistics([random_text(rng, 80) for _ in range(50)])
    for rules in FILTERS:
        none = type(rules)(**dict.fromkeys(vars(rules)))
        kept = none.start()(found).column(0)
        assert kept.null_count == 50 or isinstance(none, C4)
        names = {rule.name for rule in rules.rules}
        assert set(rules.start()(found).column(0).to_pylist()) <= {None, *names}
        assert set(rules.reads) <= set(STATISTICS.names)
        nulls = pa.table([pa.nulls(3, field.type) for field in STATISTICS], schema=STATISTICS)
        assert rules.start()(nulls).column(0).null_count == 3
        assert pickle.loads(pickle.dumps(rules)) == rules
        json.dumps(rules.settings())
    for operator in (Statistics(), C4Lines()):
        assert pickle.loads(pickle.dumps(operator)) == operator
        json.dumps(operator.settings())
    few = GopherQuality(min_words=10_000).start()(found).column(0).to_pylist()
    assert few == ["too few words"] * 50


def test_other_stop_words() -> None:
    text = "der Hund und die Katze"
    assert statistics([text], stop_words=("der", "und", "die", "das"))["stop_words"].to_pylist() == [3]
    many = tuple(f"w{at}" for at in range(64))
    assert statistics([" ".join(many)], stop_words=many)["stop_words"].to_pylist() == [64]
    with pytest.raises(InputError, match="at most 64 stop words"):
        Statistics(stop_words=(*many, "one"))


def test_c4_lines_keeps_what_is_counted() -> None:
    """The text is the kept lines; what is left is kept entirely by another pass."""
    rng = print_seed()
    texts = [random_text(rng, 100) for _ in range(100)]
    keep = C4Lines().start()
    texts_kept = keep(table(texts))["text"].to_pylist()
    assert texts_kept == ["\n".join(kept_lines(text)[0]).strip() for text in texts]
    counted = statistics(texts)["c4_lines"].to_pylist()
    assert [len(text.splitlines()) for text in texts_kept] == counted
    assert keep(table(["Click here\nIt is a fact.[1]\nIt is not [2]\nNo"]))["text"].to_pylist() == ["It is a fact."]


def test_decisions_are_those_of_datatrove() -> None:
    """On recorded texts; `experiments.data.heuristics --golden` makes the file again."""
    golden = json.loads(GOLDEN.read_text())
    found = [decide(rules, golden["texts"]) for rules in FILTERS]
    assert [list(row) for row in zip(*found, strict=True)] == golden["decisions"]
    # Every rule but that on too many words is broken by some text, and no filter removes all.
    broken = {(place, name) for row in golden["decisions"] for place, name in enumerate(row)}
    rules = {(place, rule.name) for place, one in enumerate(FILTERS) for rule in one.rules}
    assert {*rules, *((place, None) for place in range(len(FILTERS)))} - broken == {(0, "too many words")}


def test_groups_of_keys_of_any_size() -> None:
    """Keys that leave no room for their places are grouped like small ones."""
    rng = print_seed()
    for top in (10, 2**40, 2**62):
        pool = rng.integers(0, top, 50)
        key = rng.choice(pool, 300)
        groups, counts, first = _group(key)
        _, places, inverse, numbers = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        np.testing.assert_array_equal(groups, inverse)
        np.testing.assert_array_equal(counts, numbers)
        np.testing.assert_array_equal(first, places)
