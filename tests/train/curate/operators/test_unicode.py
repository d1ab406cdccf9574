"""Unicode: damage is repaired, the result is that of ftfy, and what needs nothing stays as it is."""

# ruff: noqa: RUF001

import random
import re
import unicodedata
from pathlib import Path

import ftfy
import numpy as np
import pytest
from ftfy.badness import BADNESS_RE, is_bad

from tests.helpers.curation import applied, check_laws, documents
from tests.helpers.runs import print_seed
from tests.helpers.timing import best_rate
from train.curate.operators.unicode import _PAIR, RepairUnicode
from train.data.text import standard_library

CLEAN = [
    "",
    "Plain text.\n\tWith tabs, and\fform feeds.\n",
    "Il s’agit d’un été à Nîmes – “déjà vu” … naïveté, Ångström, œuvre.",
    "Обычный текст на русском языке. Ελληνικό κείμενο. 这是中文，标点不变。日本語のテキスト「です」。한국어 문장.",
    "می‌خواهم (a zero-width non-joiner) and 👩‍👩‍👧 (a joiner); नमस्ते दुनिया; สวัสดีชาวโลก",
    "&amp; stays, ﬁ stays, ＦＵＬＬ stays, 10³ µm stays.",
]


def repaired(*texts: str) -> list[str]:
    made: list[str] = applied(RepairUnicode(), documents(texts))["text"].to_pylist()
    return made


def test_clean_text_is_unchanged() -> None:
    made = check_laws(RepairUnicode(), documents(CLEAN), print_seed())
    assert made["text"].to_pylist() == CLEAN
    assert made["unicode_repaired"].to_pylist() == [False] * len(CLEAN)


@pytest.mark.parametrize("encoding", ["windows-1252", "latin-1"])
def test_mojibake_is_undone(encoding: str) -> None:
    sentences = ["Il s’agit d’un été à Nîmes.", "Größe und Übung – schön!", "señor, ¿qué tal? “Bien”", "Обычный текст."]
    broken = []
    for text in sentences:
        try:
            broken.append((text, text.encode().decode(encoding)))
        except UnicodeDecodeError:  # Not every byte is a character.
            continue
    assert len(broken) >= 2
    assert repaired(*(wrong for _, wrong in broken)) == [right for right, _ in broken]


def test_each_kind_of_damage() -> None:
    cases = {
        "one\r\ntwo\rthree\u2028four\u2029five": "one\ntwo\nthree\nfour\nfive",
        "\ufeffmark": "mark",
        "zero\u200bwidth\u2060and soft\xad hyphen": "zerowidthand soft hyphen",
        "be\x07ll \x00and \x1b[31mred\x1b[0m": "bell and red",
        "e\u0301te\u0301": "été",
        "e\u200b\u0301": "é",
        "it\x92s": "it’s",
        "l\ufffd": "l\ufffd",
    }
    assert repaired(*cases) == list(cases.values())


def test_it_equals_ftfy_on_real_and_damaged_text() -> None:
    rng = print_seed()
    files = rng.choice(np.array([str(path) for path in standard_library()]), 20, replace=False)
    texts = [Path(file).read_bytes()[:15_000].decode("utf-8", "ignore").replace("\r", "") for file in files]
    # Pieces of damage at random places, not of kinds that ftfy leaves.
    damage = ["Ã©", "â€™", "\x07", "e\u0301", "\x85", "\ufeff", "Ð¿Ñ€Ð¸", "é", "漢", "\x1b[1m", "Â ", "ï»¿"]
    for number, text in enumerate(texts):
        for _ in range(int(rng.integers(0, 6))):
            at = int(rng.integers(0, len(text) + 1))
            text = text[:at] + str(rng.choice(damage)) + text[at:]
        texts[number] = text
    config = ftfy.TextFixerConfig(
        unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, explain=False
    )
    made = check_laws(RepairUnicode(), documents(texts), rng)
    for text, result, changed in zip(texts, *(made[name].to_pylist() for name in made.column_names), strict=True):
        expected = ftfy.fix_text(text, config).translate(dict.fromkeys(map(ord, "\u200b\u2060\xad\u180e")))
        assert result == expected
        assert changed == (result != text)
        assert unicodedata.is_normalized("NFC", result)


def test_random_characters_reach_a_fixed_point() -> None:
    rng = print_seed()
    pool = [*map(chr, range(0x250)), *"\u200b\u0301\u2028\ufeff\u2019\u20ac漢к🎉\u1100\u1161"]
    texts = ["".join(rng.choice(pool, rng.integers(0, 60))) for _ in range(80)]
    check_laws(RepairUnicode(), documents(texts), rng)


NAMED = re.sub(r"\\s|\\w|[\s\[\]|^-]", "", BADNESS_RE.pattern.replace("#", "\0"))


def test_each_line_is_repaired_as_if_it_were_alone() -> None:
    """Also one that begins with damage that is only seen at the beginning of a text."""
    rng = print_seed()
    pools = [sorted({c for c in NAMED if not c.isascii()}), list("aZ .é"), ["\xc2 ", "\xc3 ", "Ã©", "â€™", "œ"]]
    for _ in range(300):
        lines = ["".join(rng.choice(pools[rng.integers(3)]) for _ in range(rng.integers(0, 5))) for _ in range(4)]
        assert repaired("\n".join(lines)) == ["\n".join(repaired(*lines))], ascii(lines)
    assert repaired("one\n\n\xc2 two\n") == ["one\n\n\xa0two\n"]


def test_the_fast_check_for_mojibake_misses_nothing() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    pool = sorted({*map(chr, range(0x20, 0x530)), *map(chr, range(0x2000, 0x2600)), *NAMED, *"漢字かなกخ🎉ﬁ\uf8ff"})
    rare = sorted({c for c in NAMED if not c.isascii()})
    letters = list("aZ .  ")
    bad = 0
    for _ in range(6_000):
        parts = (pool, rare, letters)[: rng.randint(1, 3)]
        drawn = [rng.choice(part) for part in parts for _ in range(2)]
        rng.shuffle(drawn)
        text = "".join(drawn)
        if is_bad(text) and not re.search("[\x80-\x9f]", text):
            bad += 1
            assert _PAIR.search(text), ascii(text)
    assert bad > 100


def test_clean_text_is_fast() -> None:
    text = "".join(path.read_text("utf-8", "ignore") for path in standard_library()[:20])
    table = documents([text.encode("ascii", "ignore").decode().replace("\r", "")] * 5)
    compute = RepairUnicode().start()
    # Bytes a second. ftfy reads 7e6, a check alone more than 1e8.
    assert best_rate(table["text"].nbytes, lambda _: compute(table.select(["text"])), 2e7) > 2e7
