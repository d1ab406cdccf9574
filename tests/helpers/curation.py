"""Documents for operators of curation, and the laws that all operators keep."""

import itertools
import json
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from train.curate.operator import DOCUMENT, Operator, ShardOperator


def documents(texts: Sequence[str | None], **columns: Sequence[Any]) -> pa.Table:
    """Documents with these texts; other columns are made up or null.

    Args:
      texts: one for each document.
      columns: of `DOCUMENT`, by name.
    """
    made: dict[str, Sequence[Any]] = {
        "id": [str(number) for number in range(len(texts))],
        "domain": ["test"] * len(texts),
        "source": [f"test.jsonl:{number + 1}" for number in range(len(texts))],
        "text": texts,
    }
    arrays = [(made | columns).get(field.name, [None] * len(texts)) for field in DOCUMENT]
    return pa.table([pa.array(values, field.type) for values, field in zip(arrays, DOCUMENT, strict=True)], DOCUMENT)


def warc_record(url: str, body: bytes, kind: str = "response", content: str = "text/html", status: int = 200) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content}; charset=latin-1\r\nContent-Length: {len(body)}\r\n\r\n"
    http = head.encode() + body
    fields = {
        "WARC-Type": kind,
        "WARC-Target-URI": url,
        "WARC-Date": "2026-01-01T00:00:00Z",
        "WARC-Record-ID": f"<urn:uuid:{len(url)}>",
        "Content-Type": f"application/http; msgtype={kind}",
        "Content-Length": str(len(http)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"WARC/1.0\r\n{lines}\r\n".encode() + http + b"\r\n\r\n"


def applied(operator: Operator, table: pa.Table) -> pa.Table:
    """What the operator makes of documents, from the columns that it reads."""
    return operator.start()(table.select(list(operator.reads)))


def with_columns(table: pa.Table, made: pa.Table) -> pa.Table:
    """Documents with what an operator has made."""
    for name in made.column_names:
        at = table.column_names.index(name) if name in table.column_names else None
        field = made.schema.field(name)
        table = table.append_column(field, made[name]) if at is None else table.set_column(at, field, made[name])
    return table


def check_laws(operator: Operator, table: pa.Table, rng: np.random.Generator) -> pa.Table:
    """Columns and rows are those that the operator promises; the same again, after pickling, and in other batches.

    Returns what it makes.
    """
    made = applied(operator, table)
    assert made.schema.equals(operator.makes)
    assert made.num_rows == table.num_rows
    made.validate(full=True)
    again: Operator = pickle.loads(pickle.dumps(operator))
    assert again == operator
    assert json.loads(json.dumps(dict(again.settings())))["name"] == type(operator).__name__
    assert applied(again, table).equals(made)
    assert applied(operator, table.slice(0, 0)).schema.equals(operator.makes)
    # Rows in other chunks are the same rows.
    cuts = sorted({0, table.num_rows, *rng.integers(0, table.num_rows + 1, 3).tolist()})
    parts = [table.slice(begin, end - begin) for begin, end in itertools.pairwise(cuts)]
    assert applied(operator, pa.concat_tables(parts)).equals(made)
    if not isinstance(operator, ShardOperator):
        compute = operator.start()
        batches = [compute(part.select(list(operator.reads))) for part in parts]
        assert pa.concat_tables(batches).combine_chunks().equals(made.combine_chunks())
    if "text" in made.column_names:
        # What is repaired needs no repair.
        rest = with_columns(table, made).filter(made["text"].is_valid())
        assert applied(operator, rest)["text"].to_pylist() == rest["text"].to_pylist()
    return made
