"""A raw corpus with known faults: real documents of a Python installation, among planted junk, duplicates and leaks.

    python -m experiments.data.corpus --folder corpus --megabytes 40

Three inputs, as crawls have them: `web.warc.gz` (pages with menus around the text), `docs.jsonl.gz` and `code.parquet`.
45% of their bytes are clean documents. The others are

- junk: spam, shuffled words, repeated lines, tables of numbers, encoded bytes, broken encodings, menus;
- duplicates: exact copies, and copies of which one word in 60 is changed, below a new first line;
- leaks: test items, word for word or with one word in twenty changed, inside documents.

`truth.jsonl` says of each document what it is and of which other one it is a copy; nothing else reads it. `tests.jsonl`
holds the test items. `held-out.jsonl` holds clean documents; neither they nor copies of them are in the corpus.
"""

import argparse
import base64
import dataclasses
import gzip
import html
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.learning.data import find_text
from train.files import write_file

_HELD_OUT, _HELD_OUT_MOST = 0.08, 600_000
# Shares of the corpus in bytes; the rest is clean.
_SHARES = {"junk": 0.30, "exact": 0.12, "near": 0.13}
_SPAM = (
    "buy cheap best price discount casino bonus free shipping click here now winner jackpot loan credit viagra replica "
    "watches deal offer limited guarantee subscribe win cash prize online order today".split()
)
_MENU = (
    "Home", "About us", "Products", "Contact", "Login", "Register", "Privacy policy", "Terms of use", "Sitemap", "Help",
    "Search", "Cart (0)", "Share on social media", "Follow us", "Newsletter", "Cookie settings", "Next", "Previous",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Document:
    """One of the raw corpus.

    Attributes:
      id: unique.
      kind: "clean", "exact", "near", "leak", or a kind of junk.
      text: of the document.
      of: id of the document that it is a copy of, or of the leaked test item.
      code: whether it is source code.
    """

    id: str
    kind: str
    text: str
    of: str | None = None
    code: bool = False


def make(folder: Path, megabytes: float, seed: int = 0, folders: list[str] | None = None) -> dict:
    """Writes the corpus.

    Args:
      folder: for its files.
      megabytes: of all documents together, about.
      seed: of all that is random.
      folders: where the real documents are, by default the standard library and the installed packages.

    Returns:
      Numbers of documents by kind.
    """
    rng = random.Random(seed)
    size = int(megabytes * 1e6)
    clean_share = 1 - sum(_SHARES.values())
    texts = [t for t in find_text(int(size * (clean_share + _HELD_OUT) * 1.1), seed, folders) if 400 < len(t) < 60_000]
    # Copies of a package in two places would leak from one side to the other: a text is known by its beginning.
    texts = list({re.sub(r"\W+", " ", text[:2000]).casefold()[:300]: text for text in texts}.values())
    held_out, budget = [], min(_HELD_OUT * size, _HELD_OUT_MOST)
    while texts and budget > 0:
        held_out.append(texts.pop())
        budget -= len(held_out[-1])
    # Test items that are planted, 300 in 40 MB.
    documents = list(_documents(texts, size, rng, max(int(7.5 * megabytes), 1)))
    rng.shuffle(documents)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, documents)
    lines = (json.dumps({"id": f"held-out-{n}", "text": text}) + "\n" for n, text in enumerate(held_out))
    write_file(folder / "held-out.jsonl", "".join(lines).encode())
    counts: dict[str, int] = {}
    for document in documents:
        counts[document.kind] = counts.get(document.kind, 0) + 1
    return {"documents": len(documents), "bytes": sum(len(d.text.encode()) for d in documents), **counts}


def items(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Test items that nobody has seen: word problems with made-up numbers and names."""
    names = "Amara Bilal Chiara Dmitri Elif Farid Greta Hiro Ines Jonas Kofi Leila Mateo Nadia Omar Priya".split()
    things = "lanterns teapots compasses violins ledgers barrels kites candles saddles mirrors anvils quilts".split()
    places = "the harbour market,the night bazaar,an old mill,the hill station,a river barge,the glass works".split(",")
    made = []
    for number in range(count):
        a, b, c = rng.randint(12, 97), rng.randint(3, 19), rng.randint(2, 9)
        who, other = rng.sample(names, 2)
        thing, place = rng.choice(things), rng.choice(places)
        question = (
            f"{who} carries {a} {thing} to {place} and sells {b} of them before noon. In the afternoon {other} brings "
            f"{c} times as many {thing} as {who} has left, and both of them share the lot equally. How many {thing} "
            f"does each of them take home from {place} in the evening?"
        )
        made.append({"id": f"item-{number}", "question": question, "answer": str((a - b) * (c + 1) / 2)})
    return made


def _documents(texts: Sequence[str], size: int, rng: random.Random, leaks: int) -> Iterator[Document]:
    """All documents of the corpus; the file of test items is written by the caller from the same random numbers."""
    clean: list[Document] = []
    for number, text in enumerate(texts):
        code = "\nimport " in text or "\ndef " in text or "\nclass " in text
        clean.append(Document(f"clean-{number}", "clean", text, code=code))
    yield from clean
    for kind in ("exact", "near"):
        left = _SHARES[kind] * size
        while left > 0:
            of = rng.choice(clean)
            text = of.text if kind == "exact" else _edited(of.text, rng, 1 / 60)
            yield Document(f"{kind}-{int(left)}", kind, text, of.id, of.code)
            left -= len(text)
    left, number = _SHARES["junk"] * size, 0
    makers = {name[6:]: maker for name, maker in globals().items() if name.startswith("_junk_")}
    while left > 0:
        kind = rng.choice(sorted(makers))
        text = makers[kind](rng, rng.choice(clean).text)
        yield Document(f"junk-{number}", f"junk: {kind}", text)
        left, number = left - len(text), number + 1
    for item in items(random.Random(f"items {leaks}"), leaks):
        of = rng.choice(clean)
        paragraphs = of.text.split("\n\n")
        leaked = f"{item['question']} {item['answer']}"
        paragraphs.insert(rng.randint(0, len(paragraphs)), leaked if rng.random() < 0.5 else _edited(leaked, rng, 0.05))
        yield Document(f"leak-{item['id']}", "leak", "\n\n".join(paragraphs), item["id"], of.code)


def _edited(text: str, rng: random.Random, share: float) -> str:
    """A copy with a share of its words replaced by other words of it, and with a new first line if it is long."""
    parts = re.split(r"(\s+)", text)
    words = [part for part in parts if part.strip()]
    changed = [rng.choice(words) if part.strip() and rng.random() < share else part for part in parts]
    first = f"Copy number {rng.randint(1, 10**6)} of {rng.randint(1, 10**6)}\n" if len(words) > 200 else ""
    return first + "".join(changed)


def _junk_spam(rng: random.Random, text: str) -> str:
    return " ".join(rng.choice(_SPAM) for _ in range(rng.randint(200, 1500)))


def _junk_shuffled(rng: random.Random, text: str) -> str:
    """Words of a document without their order and without marks."""
    words = re.findall(r"\w+", text)[:1500]
    rng.shuffle(words)
    return " ".join(words)


def _junk_repeated(rng: random.Random, text: str) -> str:
    lines = [line for line in text.splitlines() if len(line) > 30][:3] or ["nothing to see here, move along please now"]
    return "\n".join(rng.choice(lines) for _ in range(rng.randint(80, 300)))


def _junk_numbers(rng: random.Random, text: str) -> str:
    rows = rng.randint(60, 300)
    return "\n".join(" | ".join(f"{rng.uniform(-1e3, 1e3):.4f}" for _ in range(8)) for _ in range(rows))


def _junk_encoded(rng: random.Random, text: str) -> str:
    return base64.b64encode(rng.randbytes(rng.randint(2000, 12_000))).decode()


def _junk_mojibake(rng: random.Random, text: str) -> str:
    """Bytes that were read in a wrong encoding, beyond repair."""
    return rng.randbytes(rng.randint(1500, 8000)).decode("latin-1").replace("\0", "")


def _junk_menu(rng: random.Random, text: str) -> str:
    return "\n".join(rng.choice(_MENU) for _ in range(rng.randint(150, 500)))


def _write(folder: Path, documents: Sequence[Document]) -> None:
    """The three inputs. Half of the prose stands in pages, half in JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    leaked = sum(d.kind == "leak" for d in documents)
    tests = items(random.Random(f"items {leaked}"), leaked)
    write_file(folder / "tests.jsonl", "".join(json.dumps(item) + "\n" for item in tests).encode())
    truth = ({"id": d.id, "kind": d.kind, "of": d.of} for d in documents)
    write_file(folder / "truth.jsonl", "".join(json.dumps(line) + "\n" for line in truth).encode())
    code = [d for d in documents if d.code]
    prose = [d for d in documents if not d.code]
    columns: dict[str, list[Any]] = {"id": [d.id for d in code], "text": [d.text for d in code]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=500)
    write_file(folder / "code.parquet", buffer.getvalue())
    lines = "".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in prose[::2])
    write_file(folder / "docs.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
    write_file(folder / "web.warc.gz", b"".join(_record(d) for d in prose[1::2]))


def _record(document: Document) -> bytes:
    """A response record of a WARC file, compressed by itself (ISO 28500)."""
    body = "".join(f"<p>{html.escape(part)}</p>\n" for part in document.text.split("\n\n") if part.strip())
    menu = "".join(f'<li><a href="/{n}">{name}</a></li>' for n, name in enumerate(_MENU))
    page = (
        f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{document.id}</title></head><body><nav><ul>{menu}"
        f"</ul></nav><main><article>\n{body}</article></main><footer><p>All rights reserved</p></footer></body></html>"
    ).encode()
    response = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
    header = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/{document.id}\r\n"
        f"WARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:example:{document.id}>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(response)}\r\n\r\n"
    ).encode()
    return gzip.compress(header + response + b"\r\n\r\n", mtime=0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("corpus"))
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(make(args.folder, args.megabytes, args.seed), indent=2))


if __name__ == "__main__":
    main()
