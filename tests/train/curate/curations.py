"""A small curation, also as a process that a test kills: `python -m tests.train.curate.curations INPUT RUN WORKERS`."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from train.curate.corpus import ROW, SHARD, Corpus
from train.curate.curation import Curation, GlobalStage, Input, Map, Output, Select
from train.curate.operator import REASON, Compute, Operator
from train.curate.run import RunOptions, run
from train.curate.stage import REPETITIONS

WORDS = ("cat", "dog", "mat", "sat", "the", "über", "猫")


@dataclasses.dataclass(frozen=True)
class Repair(Operator):
    """Replaces a word; documents that begin with one are removed."""

    begin: str = "cat"
    makes: ClassVar[pa.Schema] = pa.schema([pa.field("text", pa.large_string()), pa.field(REASON, pa.string())])

    def start(self) -> Compute:
        def compute(table: pa.Table) -> pa.Table:
            bad = pc.starts_with(table["text"], self.begin)
            return pa.table(
                {
                    "text": pc.replace_substring(table["text"], "dog ", "hound "),
                    REASON: pc.if_else(bad, f"begins with {self.begin}", None),
                },
                schema=self.makes,
            )

        return compute


@dataclasses.dataclass(frozen=True)
class Words(Operator):
    """Counts words. It fails on a document with the text `fail_on`, or ends the process."""

    fail_on: str = ""
    die_on: str = ""
    makes: ClassVar[pa.Schema] = pa.schema([pa.field("words", pa.int32())])

    def start(self) -> Compute:
        log = os.environ.get("CURATE_LOG")

        def compute(table: pa.Table) -> pa.Table:
            texts = table["text"].to_pylist()
            if self.fail_on and self.fail_on in texts:
                raise ZeroDivisionError(f"cannot count {self.fail_on}")
            if self.die_on and self.die_on in texts:
                os._exit(9)
            if log:
                with open(log, "a") as file:
                    file.write(f"{len(texts)}\n")
                time.sleep(0.02)
            return pa.table({"words": pa.array([len(text.split()) for text in texts], pa.int32())})

        return compute


@dataclasses.dataclass(frozen=True)
class Lose(Operator):
    """Gives null texts without a reason to documents with a word, and a reason of its own where it comes first."""

    word: str = "mat"
    makes: ClassVar[pa.Schema] = pa.schema([pa.field("text", pa.large_string()), pa.field(REASON, pa.string())])

    def start(self) -> Compute:
        def compute(table: pa.Table) -> pa.Table:
            lost = pc.match_substring(table["text"], self.word)
            own = pc.starts_with(table["text"], self.word)
            texts = pc.if_else(lost, pa.scalar(None, pa.large_string()), table["text"])
            return pa.table({"text": texts, REASON: pc.if_else(own, "its own", None)}, schema=self.makes)

        return compute


@dataclasses.dataclass(frozen=True)
class Repeat(Operator):
    """Repeats a document as often as its number of words says, modulo 3."""

    makes: ClassVar[pa.Schema] = pa.schema([pa.field(REPETITIONS, pa.int32())])

    def start(self) -> Compute:
        def compute(table: pa.Table) -> pa.Table:
            counts = [len(text.split()) % 3 for text in table["text"].to_pylist()]
            return pa.table({REPETITIONS: pa.array(counts, pa.int32())})

        return compute


@dataclasses.dataclass(frozen=True)
class FirstOfLength(GlobalStage):
    """Keeps the first document of each number of words up to `most`; longer ones are written twice."""

    most: int = 20
    name: str = "lengths"

    @property
    def reads(self) -> tuple[str, ...]:
        return ("words",)

    @property
    def makes(self) -> pa.Schema:
        return pa.schema([pa.field(REASON, pa.string()), pa.field(REPETITIONS, pa.int32())])

    def run(self, corpus: Corpus) -> Mapping[str, Any]:
        table = corpus.narrow(["words"]).to_arrow().sort_by([(SHARD, "ascending"), (ROW, "ascending")])
        first: dict[int, int] = {}
        for i, words in enumerate(table["words"].to_pylist()):
            first.setdefault(words, i)
        places = np.arange(table.num_rows)
        later = pa.array(places != np.array([first[words] for words in table["words"].to_pylist()]))
        short = pc.less_equal(table["words"], self.most)
        reason = pc.if_else(pc.and_(short, later), "a length that was there", None)
        made = table.drop_columns(["words"]).append_column(REASON, reason)
        made = made.append_column(REPETITIONS, pc.if_else(short, 1, 2).cast(pa.int32()))
        corpus.write_all(made)
        return {"lengths": len(first)}


def curation(folder: Path, least: int = 5, most: int = 20, begin: str = "cat", **changes: Any) -> Curation:
    """Reads `folder`, in shards of 20 kB."""
    return Curation(
        [Input("web", str(folder / "web"), id="key"), Input("books", str(folder / "books"))],
        [
            Map("features", [Repair(begin), Words()]),
            Select(f"words >= {least} and words * 2 < 150"),
            FirstOfLength(most),
        ],
        **{"output": Output(columns=("words",)), "shard_megabytes": 0.02, **changes},
    )


def documents(rng: np.random.Generator, count: int, words: int = 80) -> list[str]:
    """Random documents."""
    return [" ".join(rng.choice(WORDS, rng.integers(1, words)).tolist()) for _ in range(count)]


def make_input(folder: Path, rng: np.random.Generator, count: int = 300) -> Path:
    """Input of `curation`: JSON lines with ids, a few used twice, and Parquet."""
    import pyarrow.parquet as pq

    (folder / "web").mkdir(parents=True)
    (folder / "books").mkdir()
    texts = documents(rng, 2 * count)
    ids = [str(i) for i in range(count)]
    for i in rng.integers(1, count, 5):
        ids[i] = ids[0]
    lines = [
        json.dumps({"key": key, "text": text, "n": i}) for i, (key, text) in enumerate(zip(ids, texts, strict=False))
    ]
    half = count // 2
    (folder / "web" / "a.jsonl").write_text("\n".join(lines[:half]) + "\n")
    (folder / "web" / "b.jsonl").write_text("\n".join(lines[half:]) + "\n")
    table = pa.table({"text": texts[count:], "rank": pa.array(range(count), pa.int8() if count < 128 else pa.int32())})
    pq.write_table(table, folder / "books" / "c.parquet", row_group_size=max(count // 5, 1))
    return folder


def made(folder: Path) -> dict[str, bytes]:
    """All files of a run but its summary and page, which say how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("summary.json", "report.html")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    run(curation(Path(sys.argv[1])), Path(sys.argv[2]), RunOptions(sys.argv[4], int(sys.argv[3])))  # type: ignore[arg-type]
