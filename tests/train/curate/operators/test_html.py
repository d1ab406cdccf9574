"""Pages: their main text is found in any encoding, and no page hangs, crashes or fills the memory."""

import random
import time

import numpy as np
import pyarrow as pa
import pytest

from qwen_jax.errors import InputError
from tests.helpers.curation import applied, check_laws, documents
from tests.helpers.runs import print_seed
from train.curate.operators.html import ExtractText

MENU = '<nav class="menu"><ul>' + "".join(f'<li><a href="/{i}">Section {i}</a></li>' for i in range(9)) + "</ul></nav>"
FOOTER = '<footer class="footer"><p>Copyright. All rights reserved. <a href="/privacy">Privacy policy</a></p></footer>'


def page_of(body: str, charset: str = "utf-8", title: str = "A title") -> str:
    return (
        f'<!DOCTYPE html><html><head><meta charset="{charset}"><title>{title}</title><style>p {{ color: red }}</style>'
        f'<script>var hidden = "a < b";</script></head><body>{MENU}<div id="content">{body}</div>{FOOTER}</body></html>'
    )


def extracted(pages: list[bytes | None], **fields: object) -> list[tuple[str | None, str | None]]:
    made = applied(ExtractText(**fields), documents([None] * len(pages), html=pages))  # type: ignore[arg-type]
    return list(zip(made["text"].to_pylist(), made["reason"].to_pylist(), strict=True))


def some_pages(rng: np.random.Generator, count: int) -> tuple[list[bytes], list[list[str]]]:
    """Pages with paragraphs of made-up words, which come back."""
    words = ["".join(rng.choice(list("abcdeghilmnorstuäßéñ"), rng.integers(2, 9))) for _ in range(300)]
    contents = [
        [" ".join(rng.choice(words, rng.integers(20, 60))).capitalize() + "." for _ in range(rng.integers(1, 6))]
        for _ in range(count)
    ]
    bodies = ("".join(f"<p>{text}</p>\n" for text in content) for content in contents)
    return [page_of(body).encode() for body in bodies], contents


def test_the_text_of_a_page_comes_back_without_what_is_around_it() -> None:
    rng = print_seed()
    pages, contents = some_pages(rng, 25)
    html = [*pages, None, None]
    table = documents([None] * 25 + ["has a text", None], html=html)
    made = check_laws(ExtractText(), table, rng)
    texts = made["text"].to_pylist()
    assert [text.split("\n\n") for text in texts[:25]] == contents
    assert texts[25:] == ["has a text", None]
    assert made["reason"].to_pylist() == [None] * 26 + ["neither page nor text"]


def test_options() -> None:
    page = page_of("<p>Some words of the text, which are enough for a paragraph.</p>").encode()
    text = "Some words of the text, which are enough for a paragraph."
    assert extracted([page], title=True) == [(f"A title\n\n{text}", None)]
    everything = extracted([page], main_content=False)[0][0]
    assert everything is not None
    assert text in everything
    assert "Section 3" in everything
    for wrong in ({"max_bytes": 0}, {"max_seconds": 0}):
        with pytest.raises(InputError, match="at least 1"):
            ExtractText(**wrong)


@pytest.mark.parametrize(
    ("encoding", "declared", "text"),
    [
        ("utf-8", "utf-8", "Привет 漢字 é"),
        ("utf-8", "iso-8859-1", "Привет 漢字 é"),
        ("utf-8", "unicode_escape", "C:\\new 漢字 \\u0041"),
        ("utf-8-sig", "iso-8859-1", "Привет 漢字 é"),
        ("utf-16", "utf-8", "Привет 漢字 é"),
        ("cp1251", "windows-1251", "Обычный текст на русском языке, который написан сегодня."),
        ("cp1251", "utf-8", "Обычный текст на русском языке, который написан сегодня."),
        ("shift_jis", "shift_jis", "これは普通の日本語の文章です。"),
        ("gbk", "gb2312", "这是一个普通的中文网页。"),
        ("euc-kr", "euc-kr", "안녕하세요 여러분"),
        ("latin-1", "no-such-charset", "Où est la bibliothèque déjà préparée à l'été?"),
    ],
)
def test_encodings(encoding: str, declared: str, text: str) -> None:
    assert extracted([page_of(f"<p>{text}</p>", declared).encode(encoding)]) == [(text, None)]


def test_what_is_no_page_is_named() -> None:
    noise = bytes(random.Random(int(print_seed().integers(1 << 30))).randbytes(5000))
    cases = {
        b"": "not HTML",
        b"only some words": "not HTML",
        b"%PDF-1.7 <p>": "not HTML",
        b"\x89PNG\r\n\x1a\n<p>": "not HTML",
        b"\x1f\x8b\x08\0" + noise: "not HTML",
        noise: "not HTML",
        b"\0" * 3000: "not HTML",
        b"<html><body><script>x</script></body></html>": "no text in the page",
        b"<p>" + b"x" * 200: "larger than 200 bytes",
    }
    found = extracted(list(cases), max_bytes=len(noise) + 10)
    assert [reason for _, reason in found[:-1]] == list(cases.values())[:-1]
    assert extracted([list(cases)[-1]], max_bytes=200) == [(None, "larger than 200 bytes")]
    assert all(text is None for text, reason in found if reason)
    assert extracted([b"<p>some\0 words \0of a page</p>"]) == [("some words of a page", None)]


def test_hostile_pages_are_refused_in_time_and_others_go_on() -> None:
    good = page_of("<p>A page of an honest size, that comes after a hostile one.</p>" * 1500).encode()
    hostile = [
        b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000,
        b"<div>" * 600 + b"<p>Some <code>text</code> of <a href=x>a page</a>.</p>\n" * 12_000,
        b"<p " + b" ".join(b"a%d=1" % i for i in range(80_000)) + b">text</p>",
    ]
    begin = time.perf_counter()
    found = extracted([hostile[0], good, hostile[1], hostile[2], good, b"<p>" + b"x" * 50_000_000], max_seconds=1)
    assert time.perf_counter() - begin < 300  # Of processor time it takes 3 s; without limits an hour.
    deep, slow = "elements are nested too deeply", "takes longer than 1 s"
    assert [reason for _, reason in found] == [deep, None, deep, slow, None, "larger than 4000000 bytes"]
    assert found[1] == found[4]
    assert (found[1][0] or "").count("honest") == 1500


def test_a_page_is_the_same_in_this_process_and_apart() -> None:
    rng = print_seed()
    pages, contents = some_pages(rng, 3)
    padded = [page + b"<!--" + b"x" * 70_000 + b"-->" for page in pages]
    assert extracted([*padded]) == extracted([*pages]) == [("\n\n".join(content), None) for content in contents]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.curate.operators.html._MEMORY", 150_000_000)
    monkeypatch.setattr("train.curate.operators.html._MEMORY_PER_BYTE", 0)
    table = documents([None], html=[b"<p>x</p>" * 200_000])
    made = ExtractText().start()(pa.table({"html": table["html"], "text": table["text"]}))
    assert made.to_pylist() == [{"text": None, "reason": "needs too much memory"}]
