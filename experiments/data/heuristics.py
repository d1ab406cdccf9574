"""Compares the heuristics of curation with datatrove's: decisions of each rule, and speed of one core.

    python3 -m venv /tmp/datatrove && /tmp/datatrove/bin/pip install 'datatrove[processing]' lxml_html_clean
    python -m experiments.data.heuristics --documents FOLDER... --oracle-python /tmp/datatrove/bin/python

Documents are the .py, .md, .rst, .txt and METADATA files below the folders, manual pages (.gz), the text of .html
pages, and the docstrings of other .py files: of each kind as many as are asked for, in the order of a hash of their
paths.
`--golden FILE` writes datatrove's decisions on the texts of `tests/train/curate/operators/heuristics_golden.json`.
"""

import argparse
import ast
import gzip
import hashlib
import json
import os
import subprocess
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from train.curate.operators.heuristics import C4, FineWeb, GopherQuality, GopherRepetition, Statistics
from train.curate.operators.heuristics_words import split_words
from train.data.documents import optional_library

FILTERS = (GopherQuality(), GopherRepetition(), FineWeb(), C4())
ORACLE = Path(__file__).with_name("heuristics_oracle.py")
# datatrove's names of the rules; in the others, "_" takes the place of blanks.
RULES = {
    "gopher_short_doc": "too few words",
    "gopher_long_doc": "too many words",
    "gopher_below_avg_threshold": "short words",
    "gopher_above_avg_threshold": "long words",
    "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet points",
    "gopher_too_many_end_ellipsis": "lines that end in ellipses",
    "gopher_below_alpha_threshold": "few alphabetic words",
    "gopher_enough_stop_words": "few stop words",
    "empty": "no text",
    "dup_para_frac": "duplicate paragraphs",
    "dup_para_char_frac": "duplicate paragraph characters",
    "dup_line_frac": "duplicate lines",
    "dup_line_char_frac": "duplicate line characters",
    "line_punct_ratio": "few lines that end in punctuation",
    "short_line_ratio": "short lines",
    "char_dup_ratio": "duplicate characters",
    "list_ratio": "many line feeds",
    **{f"duplicated_{n}_n_grams": f"duplicate {n} grams" for n in range(5, 11)},
}


def documents(folders: Sequence[Path], count: int, largest: int) -> Iterator[tuple[str, str]]:
    """Yields the kind and the text of documents, of the first so many of each kind those that are not too large."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for place, _, names in os.walk(folder, followlinks=True):
            for name in names:
                kind = name.rpartition(".")[2]
                if kind in ("py", "md", "rst", "txt", "html", "METADATA", "gz"):
                    found.setdefault(kind, []).append(Path(place, name))
    for kind, paths in sorted(found.items()):
        paths.sort(key=lambda path: hashlib.sha1(str(path).encode()).digest())
        for path in paths[:count]:
            yield from _document(kind, path, largest)
        if kind == "py":
            for path in paths[count : 2 * count]:
                yield from _document("docstrings", path, largest)


def _document(kind: str, path: Path, largest: int) -> Iterator[tuple[str, str]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if kind == "gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return
    if kind == "html":
        extract = optional_library("resiliparse.extract.html2text", "HTML pages")
        text = extract.extract_plain_text(text, main_content=True)
    elif kind == "docstrings":
        try:
            with warnings.catch_warnings(action="ignore"):
                nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError):
            return
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        text = "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))))
    if text and len(text) <= largest:
        yield kind, text


def oracle(python: str, texts: Iterable[str], *options: str) -> tuple[list[Any], dict[str, Any]]:
    """What the oracle writes for each text, and its last line."""
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    done = subprocess.run([python, ORACLE, *options], input=lines, stdout=subprocess.PIPE, text=True, check=True)
    *results, last = map(json.loads, done.stdout.splitlines())
    return results, last


def ours(texts: Sequence[str]) -> tuple[list[list[str | None]], float]:
    """Our decisions on each text, and seconds of processor time, from Arrow strings to decisions."""
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    compute = Statistics().start()
    compute(pa.table({"text": pa.array(["Loads the word splitter."], pa.large_string())}))
    begin = time.process_time()
    statistics = compute(table)
    decisions = [one.start()(statistics).column(0) for one in FILTERS]
    seconds = time.process_time() - begin
    return list(map(list, zip(*(column.to_pylist() for column in decisions), strict=True))), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the heuristics of curation with datatrove's.")
    parser.add_argument("--documents", nargs="+", type=Path, default=[], help="folders with documents")
    parser.add_argument("--count", type=int, default=1500, help="most documents of a kind")
    parser.add_argument("--largest", type=int, default=400_000, help="most characters of a document")
    parser.add_argument("--oracle-python", required=True, help="Python of an environment with datatrove")
    parser.add_argument("--golden", type=Path, help="write decisions on the texts of this file into it, and stop")
    parser.add_argument("--differences", type=int, default=0, help="print so many differing documents")
    args = parser.parse_args()
    if args.golden:
        golden = json.loads(args.golden.read_text())
        decisions, last = oracle(args.oracle_python, golden["texts"])
        golden.update(versions=last["versions"], decisions=[_translated(row) for row in decisions])
        args.golden.write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n")
        return

    kinds, texts = zip(*documents(args.documents, args.count, args.largest), strict=True)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB: {dict(Counter(kinds))}")
    mine, seconds = ours(texts)
    print(f"ours: {seconds:.1f} s, {size / seconds:.2f} MB/s")
    theirs, last = oracle(args.oracle_python, texts)
    total = sum(last["seconds"].values())
    print(f"datatrove: {total:.1f} s, {size / total:.3f} MB/s; {last}; {total / seconds:.1f} times our time")
    mine_again, seconds = ours(texts)
    assert mine_again == mine
    print(f"ours again: {seconds:.1f} s, {size / seconds:.2f} MB/s; {total / seconds:.1f} times as fast")

    # Differences, and whether the words of these documents differ.
    theirs = [_translated(row) for row in theirs]
    differing = [number for number in range(len(texts)) if mine[number] != theirs[number]]
    words, _ = oracle(args.oracle_python, [texts[number] for number in differing], "--words")
    other_words = {
        number
        for number, theirs_words in zip(differing, words, strict=True)
        if list(split_words(texts[number])) != theirs_words
    }
    for place, one in enumerate(FILTERS):
        name = one.makes.names[0]
        both = [(my[place], their[place]) for my, their in zip(mine, theirs, strict=True)]
        kept = sum(my is None and their is None for my, their in both)
        other = sum((my is None) != (their is None) for my, their in both)
        print(f"\n{name}: kept by both {kept}, by one {other}")
        for rule in [rule.name for rule in one.rules]:
            differ = [n for n, (my, their) in enumerate(both) if my != their and rule in (my, their)]
            print(
                f"| {rule} | {sum(rule == their for _, their in both)} | {sum(rule == my for my, _ in both)} "
                f"| {len(differ)} | {len(other_words.intersection(differ))} |"
            )
    for number in differing[: args.differences]:
        print(number, kinds[number], mine[number], theirs[number], number in other_words, repr(texts[number][:100]))


def _translated(decisions: Sequence[str | None]) -> list[str | None]:
    """Our names of datatrove's rules."""
    return [None if name is None else RULES.get(name, name.replace("_", " ")) for name in decisions]


if __name__ == "__main__":
    main()
