"""Decontamination: recall on noisy copies of test items, false positives on unrelated documents, speed and memory.

    python -m experiments.data.decontaminate [--items 200000] [--documents 500] [--copies 150] [--json out.json]

Items of three kinds are made: word problems from phrases, multiple choice from sentences of documentation, and
functions with their docstrings, as HumanEval has them. They come from Python's library and from one half of the
installed packages; documents of 4,096 words come from the other half, docstrings and source code in turn. A document is
unrelated if it shares no run of 13 words with any item, which is counted by Python sets of words, independently of the
code that is measured.

Copies of items, with 0 to 30% of their words replaced by words of documents, are planted in unrelated documents.
Expected: recall of at least 0.99 for each kind up to 10%, no unrelated document, and 8 MB/s a core.

Paraphrases, made by a table of synonyms and by reordering of sentences, show what the rule cannot find.
"""

import argparse
import ast
import importlib.util
import json
import random
import re
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.curate.contamination import Finder, make_finder
from train.curate.decontaminate_file import Cleaner, Settings
from train.curate.decontaminate_parts import locate, pieces_of
from train.curate.evaluation_sets import GRAM, Items, find_sets, read_items
from train.data.text import standard_library
from train.data.words import words

LEVELS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
# Files of each package of documents that are read, evenly spaced.
_FILES = 200
KINDS = ("word problems", "multiple choice", "code")
_ITEM_PACKAGES = ("numpy", "scipy", "sklearn", "networkx", "sympy", "mpmath", "hypothesis", "pandas")
_DOCUMENT_PACKAGES = ("torch", "transformers", "jax", "matplotlib", "ray", "flax", "optax", "mypy", "fontTools", "daft")

_NAMES = "Ana Ben Carla Deng Elif Farid Greta Hugo Ines Jonas Keiko Lars Mina Noor Omar Priya Quinn Rosa Samir".split()
_THINGS = "apples pencils tickets stamps coins marbles books eggs flowers cards shells bottles chairs candles".split()
_PLACES = ("at the market", "in the garden", "from a neighbour", "at school", "on the way home", "by the river")
_OPENINGS = (
    "{a} has {n} {x} and buys {m} more {p}.",
    "A shop sells {x} in boxes of {n}, and {a} takes {m} boxes {p}.",
    "{a} and {b} collected {n} {x} together {p}, of which {m} belong to {b}.",
    "Every morning {a} carries {n} {x} to a shed {p} and drops {m} of them.",
    "There were {n} {x} {p} before {a} counted {m} that were broken.",
    "{a} needs {n} minutes to paint {m} {x} {p}.",
    "For a party {p}, {a} ordered {n} {x} and {b} brought {m} in a basket.",
    "{b} pays {n} cents for each of the {m} {x} that {a} found {p}.",
)
_MIDDLES = (
    "Then {b} gives away {k} of the {y}, half of which were old.",
    "On the next day twice as many {y} arrive, but {k} get lost.",
    "After lunch {a} trades {k} {y} for a hat that costs {m} dollars.",
    "{b}, who is {k} years old, keeps a third of the {y} in a drawer.",
    "Because of the rain only {k} percent of the {y} can be used.",
    "A cousin sends a parcel with {k} {y} and a letter every week.",
    "Later they divide the {y} equally among {k} children of the village.",
)
_ENDINGS = (
    "How many {x} does {a} have in the end?",
    "How much money does {b} need for all of the {y}?",
    "What is the difference between the {x} and the {y} that are left?",
    "How many weeks pass until {a} has a thousand {x}?",
    "What share of the {y} is left for {b}, in percent?",
    "How many hours do {a} and {b} work together?",
)
_ASKED = (
    "Which of the following is true of {x}?",
    "According to its documentation, what does {x} do?",
    "What is said about {x}?",
    "Which statement describes {x} correctly?",
)
_SYNONYMS = dict(
    pair.split("=")
    for pair in (
        "buys=purchases has=owns more=additional takes=picks together=jointly carries=brings found=discovered "
        "gives=hands away=out half=50% old=ancient arrive=come lost=misplaced costs=is keeps=stores third=part "
        "rain=storm percent=% used=employed sends=mails parcel=package letter=note divide=split equally=evenly "
        "among=between children=kids village=town how=what many=number end=finally much=amount money=cash need=require "
        "left=remaining weeks=sevenday pass=elapse share=fraction work=labour boxes=crates sells=offers shop=store "
        "collected=gathered belong=go every=each counted=tallied broken=damaged minutes=mins paint=colour pays=gives "
        "cents=pennies returns=gives return=yield the=this a=one if=when is=equals array=tensor value=number "
        "function=routine given=supplied list=sequence number=count object=thing string=text all=every"
    ).split()
)


def sources(packages: tuple[str, ...], most: int = 10**6) -> list[Path]:
    """The Python files of installed packages, sorted, without tests."""
    found: list[Path] = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            files = [p for p in sorted(folder.rglob("*.py")) if "test" not in str(p.relative_to(folder)).lower()]
            found += files[:: -(-len(files) // most)]
    return found


def definitions(files: list[Path]) -> Iterator[tuple[str, str, str]]:
    """Name, docstring and source of each function and class of files."""
    for path in files:
        text = path.read_text(errors="replace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name, ast.get_docstring(node) or "", "\n".join(lines[node.lineno - 1 : node.end_lineno])


def word_problems(rng: random.Random, count: int) -> list[dict[str, Any]]:
    made: dict[str, None] = {}
    while len(made) < count:
        a, b = rng.sample(_NAMES, 2)
        x, y = rng.sample(_THINGS, 2)
        numbers = {key: rng.randrange(2, 200) for key in "nmk"}
        middles = rng.sample(_MIDDLES, rng.randrange(1, 3))
        text = " ".join((rng.choice(_OPENINGS), *middles, rng.choice(_ENDINGS)))
        made[text.format(a=a, b=b, x=x, y=y, p=rng.choice(_PLACES), **numbers)] = None
    return [{"question": text, "answer": str(rng.randrange(1000))} for text in made]


def multiple_choice(rng: random.Random, found: list[tuple[str, str, str]], count: int) -> list[dict[str, Any]]:
    sentences = []
    for name, text, _ in found:
        for sentence in re.split(r"(?<=[.])\s+", " ".join(text.split()))[:6]:
            if 8 <= len(sentence.split()) <= 30:
                sentences.append((name, sentence))
    sentences = sorted(set(sentences))
    rng.shuffle(sentences)
    rows = []
    for name, right in sentences * (count // max(len(sentences), 1) + 1):
        choices = [right, *(sentence for _, sentence in rng.sample(sentences, 3))]
        rng.shuffle(choices)
        rows.append({"question": rng.choice(_ASKED).format(x=name), "choices": choices, "answer": choices.index(right)})
        if len(rows) == count:
            break
    return rows


def code(rng: random.Random, found: list[tuple[str, str, str]], count: int) -> list[dict[str, Any]]:
    # Short methods without one, such as __eq__, have most of their words in common with those of other classes.
    texts = sorted({source for _, text, source in found if len(words(text)) >= 10 and len(words(source)) <= 250})
    rng.shuffle(texts)
    while len(texts) < count:
        texts += [f"{a}\n{b}" for a, b in zip(texts, reversed(texts), strict=True)]
    return [{"prompt": text, "task_id": number} for number, text in enumerate(texts[:count])]


def make_documents(rng: random.Random, found: list[tuple[str, str, str]], count: int) -> list[str]:
    """Documents of 4,096 words: prose and source code in turn."""
    prose, source = [text for _, text, _ in found if text], [text for _, _, text in found]
    documents = []
    for number in range(count):
        pool = source if number % 2 else prose
        text = ""
        while True:
            text += rng.choice(pool) + "\n\n"
            spans = list(re.finditer(r"[^\W_]+", text))
            if len(spans) >= 4096:
                documents.append(text[: spans[4095].end()])
                break
    return documents


def noisy(rng: random.Random, text: str, level: float, vocabulary: list[str]) -> str:
    """The text with this share of its words replaced, rounded to whole words at random."""
    spans = list(re.finditer(r"[^\W_]+", text))
    changed = set(rng.sample(range(len(spans)), int(level * len(spans) + rng.random())))
    parts: list[str] = []
    last = 0
    for number, span in enumerate(spans):
        parts += text[last : span.start()], rng.choice(vocabulary) if number in changed else span.group()
        last = span.end()
    return "".join((*parts, text[last:]))


def paraphrased(rng: random.Random, text: str) -> str:
    sentences = re.split(r"(?<=[.?])\s+", text)
    if len(sentences) > 2:
        first = sentences[:-1]
        rng.shuffle(first)
        sentences = [*first, sentences[-1]]
    return re.sub(r"[A-Za-z]+", lambda m: _SYNONYMS.get(m.group().lower(), m.group()), " ".join(sentences))


def shown(row: dict[str, Any]) -> str:
    """An item as a document would have it."""
    return "\n".join([row.get("question") or row["prompt"], *row.get("choices", [])])


def grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + GRAM]) for i in range(len(found) - GRAM + 1)}


def measure(finder: Finder, documents: list[str]) -> tuple[float, int]:
    """MB/s of one core, and the matches."""
    begin, found = time.process_time(), 0
    for at in range(0, len(documents), 16):
        found += len(finder.find(documents[at : at + 16])[1])
    return sum(len(text.encode()) for text in documents) / 1e6 / (time.process_time() - begin), found


def measure_files(finder: Finder, owner: list[int], documents: list[str], folder: Path) -> float:
    """MB/s of JSON lines of one core, from a file to a file."""
    path, work = folder / "documents.jsonl", folder / "work"
    work.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    clean = Cleaner(Settings(folder, work, "drop", "", None, 10**8, 0, 0), finder, owner, lambda count: None)
    begin = time.process_time()
    for number in range(3):
        clean(number, pieces_of(locate(path), 1 << 60)[0], "clean.jsonl", "")
    return 3 * path.stat().st_size / 1e6 / (time.process_time() - begin)


def make_items(rng: random.Random, count: int) -> dict[str, list[dict[str, Any]]]:
    """Items of each kind, about a third of all each."""
    found = list(definitions([*standard_library(), *sources(_ITEM_PACKAGES)]))
    share = count // 3
    return {
        KINDS[0]: word_problems(rng, share),
        KINDS[1]: multiple_choice(rng, found, share),
        KINDS[2]: code(rng, found, count - 2 * share),
    }


def make_index(made: dict[str, list[dict[str, Any]]], folder: Path) -> tuple[Items, Finder, dict[str, Any]]:
    """Writes and reads the items, and indexes them; with time and memory."""
    sets = []
    for kind, rows in made.items():
        path = folder / f"{kind.replace(' ', '_')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets.append(f"{kind}={path}")
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    items = read_items(find_sets(sets))
    read = time.process_time() - begin
    finder = make_finder(items)
    return (
        items,
        finder,
        {
            "items": len(items.owner),
            "sequences": len(items.sequences),
            "words": sum(map(len, items.sequences)),
            "fewer than 13 words": len(items.questions),
            "index MB": finder.num_bytes / 1e6,
            "seconds to read": read,
            "seconds to index": time.process_time() - begin - read,
            "peak MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3,
        },
    )


def unrelated(
    rng: random.Random, made: dict[str, list[dict[str, Any]]], count: int
) -> tuple[list[str], tuple[int, int]]:
    """Documents that share no run of 13 words with an item; and how many of how many share one."""
    documents = make_documents(rng, list(definitions(sources(_DOCUMENT_PACKAGES, _FILES))), 5 * count // 4)
    wanted = [grams(text) for text in documents]
    known = set().union(*wanted)
    shared: set[tuple[str, ...]] = set()
    for rows in made.values():
        for row in rows:
            shared |= known & grams(shown(row))
    clean = [text for text, own in zip(documents, wanted, strict=True) if shared.isdisjoint(own)]
    return clean[:count], (len(documents) - len(clean), len(documents))


def plant(rng: random.Random, row: dict[str, Any], text: str, level: float | str, vocabulary: list[str]) -> str:
    """A document with a copy of an item, noisy or paraphrased, at a random place."""
    copy = shown(row)
    copy = paraphrased(rng, copy) if isinstance(level, str) else noisy(rng, copy, level, vocabulary)
    at = rng.choice([0, *(m.end() for m in re.finditer(r"\s", text)), len(text)])
    return f"{text[:at]}\n{copy}\n{text[at:]}"


def recall(
    rng: random.Random, finder: Finder, made: dict[str, list[dict[str, Any]]], clean: list[str], copies: int
) -> dict[str, Any]:
    """Share of documents with a copy that are found, and of those in which the item itself is."""
    vocabulary = sorted({word for text in clean[:100] for word in words(text)})
    result: dict[str, Any] = {"recall": {}, "recall of the item itself": {}}
    for level in (*LEVELS, "paraphrased"):
        first = 0
        for kind, rows in made.items():
            chosen = rng.sample([i for i, row in enumerate(rows) if len(words(shown(row))) >= GRAM], copies)
            texts = [plant(rng, rows[i], rng.choice(clean), level, vocabulary) for i in chosen]
            hits = [{m.item for m in finder.find([text])[1]} for text in texts]
            exact = sum(first + i in found for i, found in zip(chosen, hits, strict=True))
            for name, count in (("recall", sum(map(bool, hits))), ("recall of the item itself", exact)):
                result[name].setdefault(str(level), {})[kind] = count / copies
            first += len(rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--copies", type=int, default=150, help="planted items of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/decontaminate"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)

    made = make_items(rng, options.items)
    print(", ".join(f"{len(rows):,} {kind}" for kind, rows in made.items()), flush=True)
    items, finder, result = make_index(made, options.work)
    print(json.dumps(result), flush=True)

    clean, related = unrelated(rng, made, options.documents)
    rates = [measure(finder, clean) for _ in range(3)]
    result |= {
        "documents": len(clean),
        "MB of documents": sum(len(text.encode()) for text in clean) / 1e6,
        "documents that share 13 words with an item, of all made": related,
        "MB/s a core": max(rate for rate, _ in rates),
        "MB/s a core, JSON lines read and written": measure_files(finder, items.owner, clean, options.work),
    }
    wrong = []
    for text in clean:
        for match in finder.find([text])[1][:1]:
            span = " ".join(words(text)[match.begin : match.end])
            wrong.append([items.names[items.owner[match.item]], match.common, match.words, span])
            print(json.dumps([*wrong[-1], items.texts[match.item]]), flush=True)
    result["false positives"] = len(wrong)
    print(json.dumps(result), flush=True)

    result |= recall(rng, finder, made, clean, options.copies)
    whole = [shown(row) for rows in made.values() for row in rng.sample(rows, min(2000, len(rows)))]
    whole = [text for text in whole if len(words(text)) >= GRAM]
    result["self-match"] = sum(bool(finder.find([text])[1]) for text in whole) / len(whole)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
