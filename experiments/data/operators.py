"""Speed of the operators of curation on real documents, on one core.

    python -m experiments.data.operators [--megabytes 20] [--pages FOLDER...] [--only NAME...] [--trafilatura PYTHON]

Documents are the files of the Python installation, .py, .rst, .md, .txt and .h; pages the .html files in the folders.
Every operator of `train/curate/operators` that needs no setting is measured, and with --only any MODULE:CLASS. Seconds
are processor time, also of processes that an operator starts. The megabytes are those of the text, or of the pages for
an operator that makes text from them. Memory is how much the largest resident size grows, in a process of its own.

--trafilatura is the Python of another environment that has trafilatura, which extracts the same pages.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import os
import pkgutil
import platform
import random
import resource
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

import train.curate.operators
from qwen_jax.errors import InputError
from train.curate.operator import DOCUMENT, REASON, Operator, ShardOperator

_SUFFIXES = (".py", ".rst", ".md", ".txt", ".h")
# Rows that an operator is given at a time; whole shards are one batch.
_BATCH = 500
_TRAFILATURA = """
import json, sys, time
import trafilatura
pages = [open(path, "rb").read() for path in json.load(sys.stdin)]
begin = time.process_time()
texts = [trafilatura.extract(page) for page in pages]
print(json.dumps([time.process_time() - begin, trafilatura.__version__, texts]))
"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one operator takes.

    Attributes:
      name: of the operator.
      megabytes: of its input.
      documents: of its input.
      seconds: of processor time.
      memory: bytes for each byte of input, of which the table of results is a part.
      changed: documents whose text is another, or None if it makes no text.
      removed: documents that get a reason.
    """

    name: str
    megabytes: float
    documents: int
    seconds: float
    memory: float
    changed: int | None
    removed: int


def operators(only: Sequence[str]) -> Iterator[Operator]:
    """The operators to measure, with their default settings.

    Args:
      only: MODULE:CLASS each; all that need no setting if it is empty.

    Raises:
      InputError: no such class.
    """
    for name in only:
        module, _, attribute = name.partition(":")
        found = getattr(importlib.import_module(module), attribute, None)
        if not (inspect.isclass(found) and issubclass(found, Operator)):
            raise InputError(f"Expected MODULE:CLASS of an operator, got {name!r}.")
        yield found()
    if only:
        return
    for info in pkgutil.iter_modules(train.curate.operators.__path__):
        module_of = importlib.import_module(f"train.curate.operators.{info.name}")
        for kind in vars(module_of).values():
            if not (inspect.isclass(kind) and issubclass(kind, Operator) and kind.__module__ == module_of.__name__):
                continue
            if not inspect.isabstract(kind) and not kind.__name__.startswith("_") and _needs_nothing(kind):
                yield kind()


def _needs_nothing(kind: type[Operator]) -> bool:
    nothing = (dataclasses.MISSING, dataclasses.MISSING)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return all((field.default, field.default_factory) != nothing for field in fields)


def find(folders: Iterable[Path], suffixes: tuple[str, ...], megabytes: float) -> list[Path]:
    """Files in a random order that is always the same, so many bytes of them; none below 200 bytes or above 1 MB."""
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)
    random.Random(0).shuffle(paths)
    found, total = [], 0
    for path in paths:
        if not path.is_file() or not 200 <= path.stat().st_size <= 1_000_000:
            continue
        found.append(path)
        total += path.stat().st_size
        if total >= megabytes * 1e6:
            break
    return found


def table_of(files: Sequence[Path], pages: Sequence[Path]) -> pa.Table:
    """Documents with a text or with a page. Files that are not UTF-8 are left out."""
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        rows.append({"source": str(path), "text": text})
    rows += [{"source": str(path), "html": path.read_bytes()} for path in pages]
    rows = [{"id": str(number), "domain": "test", **row} for number, row in enumerate(rows)]
    return pa.Table.from_pylist(rows, DOCUMENT)


def measure(operator: Operator, files: Sequence[Path], pages: Sequence[Path]) -> Measured:
    """Runs an operator over all documents, or all pages if it makes text from them. Call it in a process of its own."""
    from_pages = "html" in operator.reads and "text" in operator.makes.names
    table = table_of([] if from_pages else files, pages if from_pages else [])
    column = table["html" if from_pages else "text"]
    size = sum(value.as_buffer().size for value in column if value.is_valid)
    compute = operator.start()
    rows = table.num_rows if isinstance(operator, ShardOperator) else _BATCH
    small = table.select(list(operator.reads))
    compute(small.slice(0, 1))

    peak, begin = _peak(), sum(os.times()[:4])
    made = [compute(small.slice(first, rows)) for first in range(0, table.num_rows, rows)]
    del compute  # Ends the processes of the operator, whose time counts when they have ended.
    seconds = sum(os.times()[:4]) - begin
    result = pa.concat_tables(made)
    changed = None
    if "text" in operator.makes.names:
        pairs = zip(table["text"].to_pylist(), result["text"].to_pylist(), strict=True)
        changed = sum(before != after for before, after in pairs)
    removed = table.num_rows - result[REASON].null_count if REASON in operator.makes.names else 0
    memory = (_peak() - peak) / size
    return Measured(operator.name, size / 1e6, table.num_rows, seconds, memory, changed, removed)


def _peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(python: str, pages: Sequence[Path]) -> dict[str, Any]:
    """Trafilatura's time on the pages, and how its texts differ from ours."""
    from train.curate.operators.html import ExtractText

    done = subprocess.run(
        [python, "-c", _TRAFILATURA],
        input=json.dumps(list(map(str, pages))),
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, version, theirs = json.loads(done.stdout)
    table = table_of([], pages)
    ours = ExtractText().start()(table.select(["html", "text"]))["text"].to_pylist()
    shared = [_shared(a or "", b or "") for a, b in zip(ours, theirs, strict=True)]
    return {
        "version": version,
        "ms": 1000 * seconds / len(pages),
        "empty, ours and theirs": [sum(not text for text in texts) for texts in (ours, theirs)],
        "characters, ours and theirs": [sum(len(text or "") for text in texts) for texts in (ours, theirs)],
        "of their words in ours, of ours in theirs": [sum(part) / len(shared) for part in zip(*shared, strict=True)],
    }


def _shared(ours: str, theirs: str) -> tuple[float, float]:
    mine, other = set(ours.split()), set(theirs.split())
    both = len(mine & other)
    return both / max(len(other), 1), both / max(len(mine), 1)


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--pages", type=Path, nargs="*", default=[Path(sysconfig.get_path("purelib"))])
    parser.add_argument("--only", nargs="*", default=[], help="MODULE:CLASS of operators")
    parser.add_argument("--trafilatura", help="Python of an environment that has trafilatura")
    options = parser.parse_args()
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = find(folders, _SUFFIXES, options.megabytes)
    pages = find(options.pages, (".html",), options.megabytes)

    names = ("numpy", "pyarrow", "resiliparse", "ftfy", "cld3-py")
    print(f"python {platform.python_version()}", *(f"{name} {importlib.metadata.version(name)}" for name in names))
    print(
        "\n| operator | MB | MB/s | ms a document | memory, bytes a byte | texts changed | removed |\n"
        + "|---" * 7
        + "|"
    )
    for operator in operators(options.only):
        # A process for each, whose largest size is that of the operator.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row = pool.submit(measure, operator, files, pages).result()
        changed = "" if row.changed is None else f"{row.changed / max(row.documents, 1):.1%}"
        print(
            f"| {row.name} | {row.megabytes:.1f} | {row.megabytes / row.seconds:.1f} | "
            f"{1000 * row.seconds / max(row.documents, 1):.2f} | {row.memory:.1f} | {changed} | {row.removed} |",
            flush=True,
        )
    if options.trafilatura:
        print(json.dumps(compare(options.trafilatura, pages), indent=2))


if __name__ == "__main__":
    main()
