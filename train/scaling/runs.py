"""Tables of training runs that laws are fitted to: CSV or Parquet, columns mapped by name, rows checked."""

import csv
import dataclasses
import gzip
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import why_unusable

Array: TypeAlias = np.ndarray

# What a table may say of a run, each with its meaning.
COLUMNS: dict[str, str] = {
    "params": "model size N",
    "tokens": "training tokens D",
    "flops": "training compute C in FLOPs, 6 N D",
    "loss": "final loss in nats a token",
    "learning_rate": "peak learning rate",
    "batch_tokens": "tokens of a step",
    "active_params": "parameters that a token uses, of a mixture of experts",
    "total_params": "all parameters of a mixture of experts",
    "experts": "number of experts; 0 or 1 is a dense model",
    "granularity": "width of a dense layer by that of an expert",
    "status": "ok or diverged",
}
# FLOPs of a token for each parameter, forward and backward.
FLOPS_PER_PARAM = 6.0
# The definition of compute in all laws; law.json states it.
COMPUTE = "C = 6 N D, N as counted; of a mixture of experts, its active parameters"
# A table whose FLOPs are further from it, relatively, is warned of.
_OTHER_COMPUTE = 0.01
# A warning of fitted laws.
UNSTATED = (
    "It is not stated how parameters are counted: give --counting. Small models move a lot between the ways to count."
)
_ZERO_ALLOWED = ("experts",)
_GAPS_ALLOWED = ("granularity", "experts")


def compute(params: Any, tokens: Any) -> Any:
    """Training compute C = 6 N D in FLOPs, of numbers or arrays: see `COMPUTE`."""
    return FLOPS_PER_PARAM * params * tokens


def check_compute(law: Mapping[str, Any], name: str = "The law") -> None:
    """Checks that a fitted law has our definition of compute.

    Args:
      law: the content of a law.json.
      name: of the law, for the error.

    Raises:
      InputError: another definition, or none.
    """
    if law.get("compute") != COMPUTE:
        stated = (
            f"states compute as {law['compute']!r}" if "compute" in law else "does not state how compute is defined"
        )
        raise InputError(
            f"{name} {stated}; expected {COMPUTE!r}. Fit it again to its table of runs: qwen-jax scaling fit."
        )


@dataclasses.dataclass(frozen=True)
class RunTable:
    """Runs with finite losses, a row each.

    Attributes:
      columns: values by our names (`COLUMNS`), float64, all of one length.
      rows: number of each run's row in the file, counted from 1 without the header.
      source: path, sha256 and the names of the columns in the file.
      warnings: what was left out or derived, a sentence each.
    """

    columns: Mapping[str, Array]
    rows: Array
    source: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def select(self, mask: Array, *warnings: str) -> "RunTable":
        """The runs of a mask or of indices, with further warnings."""
        columns = {name: values[mask] for name, values in self.columns.items()}
        return dataclasses.replace(
            self, columns=columns, rows=self.rows[mask], warnings=tuple(dict.fromkeys((*self.warnings, *warnings)))
        )


def read_runs(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
) -> RunTable:
    """Reads a table of runs.

    Runs with the status "diverged" or a loss that is not finite are left out, and copies of a run count once; the
    warnings say so. Where a law needs tokens and the table has none, they are C / (6 N). Compute is always 6 N D; of
    other FLOPs in a table a warning tells.

    Args:
      path: a .csv, .csv.gz or .parquet file with a row for each run.
      required: columns that must be there, by our names (`COLUMNS`).
      optional: columns that are read if they are there.
      columns: our name -> name in the file, with an optional factor behind a star, such as "D*1e9". A column that is
        not mapped has our name.
      where: column in the file -> value; other rows are not read.

    Raises:
      InputError: the file cannot be read, lacks a column, or a value cannot be used; the error names it.
    """
    columns, where = dict(columns or {}), dict(where or {})
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise InputError(f"Unknown columns {', '.join(unknown)}. Those that can be mapped: {', '.join(COLUMNS)}.")
    content = _content(path)
    table = _parse(path, content)
    length = len(next(iter(table.values()), []))
    kept = np.ones(length, bool)
    for name, value in where.items():
        if name not in table:
            raise InputError(f"{path} has no column {name!r}; it has {', '.join(table)}.")
        kept &= np.array([_same(item, value) for item in table[name]], bool)
    if not kept.any():
        asked = ", ".join(f"{name}={value}" for name, value in where.items())
        raise InputError(f"{path} has no rows{' with ' + asked if asked else ''}. Expected a row for each run.")
    rows = np.flatnonzero(kept)

    # The columns, and what can be derived from others.
    wanted = tuple(dict.fromkeys((*required, *optional, *columns)))
    names, values = {}, {}
    for name in wanted:
        found = _column(path, table, name, columns)
        if found is not None and name != "status":
            names[name] = columns.get(name, name)
            values[name] = _numbers(path, found[0], found[1], rows, name)
    warnings = []
    if "tokens" in required and "tokens" not in values and "params" in values:
        flops = values.get("flops", _optional(path, table, "flops", columns, rows))
        if flops is not None:
            values["tokens"] = flops / (FLOPS_PER_PARAM * values["params"])
            names["tokens"] = "flops / (6 params)"
            warnings.append("The table has no tokens: they are flops / (6 params).")
    if "flops" in wanted and {"params", "tokens"} <= set(values):
        flops = compute(values["params"], values["tokens"])
        stated = values.get("flops", flops)
        known = (stated > 0) & (flops > 0)
        ratio = stated[known] / flops[known]
        if (np.abs(ratio - 1) > _OTHER_COMPUTE).any():
            warnings.append(
                f"The table's FLOPs are {ratio.min():.3g} to {ratio.max():.3g} times 6 N D. Laws take C = 6 N D."
            )
        values["flops"], names["flops"] = flops, "6 params tokens"
    if lacking := [name for name in required if name not in values]:
        raise InputError(
            f"{path} has no column for {', '.join(f'{name} ({COLUMNS[name]})' for name in lacking)}; it has "
            f"{', '.join(table)}. Name the columns, such as --columns {lacking[0]}=NAME."
        )
    source = {"path": str(path), "sha256": hashlib.sha256(content).hexdigest(), "columns": names, "where": where}
    read = RunTable(values, rows + 1, source, tuple(warnings))
    status = _column(path, table, "status", columns)
    return _usable(read, None if status is None else [status[0][row] for row in rows], path)


def _usable(table: RunTable, status: Sequence[object] | None, path: Path) -> RunTable:
    """Leaves out diverged and unfinished runs and copies."""
    for name, values in table.columns.items():
        if name == "loss":
            continue
        bad = ~np.isfinite(values) & ~((name in _GAPS_ALLOWED) & np.isnan(values))
        bad |= values < 0 if name in _ZERO_ALLOWED else values <= 0
        if bad.any():
            row = table.rows[bad][0]
            raise InputError(
                f"{path}, row {row}: {name} must be a positive number, got {values[bad][0]:g} "
                f"({int(bad.sum())} such rows). Correct or remove them."
            )
    if status is not None:
        words = [str(item or "").strip().lower() for item in status]
        if other := sorted({word for word in words if word not in ("", "ok", "diverged")}):
            raise InputError(f"{path}: status must be ok or diverged, got {', '.join(map(repr, other[:5]))}.")
        diverged = np.array([word == "diverged" for word in words])
        if diverged.any():
            table = table.select(~diverged, f"{_count(diverged.sum(), 'diverged run')} left out.")
    if "loss" in table:
        bad = ~np.isfinite(table["loss"])
        if bad.any():
            table = table.select(
                ~bad, f"{_count(bad.sum(), 'run')} without a finite loss left out: {_rows(table.rows[bad])}."
            )
        if len(table) and (table["loss"] <= 0).any():
            row = table.rows[table["loss"] <= 0][0]
            raise InputError(f"{path}, row {row}: loss must be positive, got {table['loss'].min():g}.")
    if not len(table):
        raise InputError(f"{path} has no run that ended with a finite loss. {' '.join(table.warnings)}")
    # Copies: the same in all columns, such as a run that was logged twice.
    key = np.nan_to_num(np.stack(list(table.columns.values()), axis=1), nan=-1.0)
    _, first = np.unique(key, axis=0, return_index=True)
    if len(first) < len(table):
        copies = np.ones(len(table), bool)
        copies[first] = False
        table = table.select(
            ~copies, f"{_count(copies.sum(), 'copy', 'copies')} of other runs left out: {_rows(table.rows[copies])}."
        )
    return table


def best_of_cells(table: RunTable) -> RunTable:
    """Of runs with the same params and tokens the one with the lowest loss: what a tuned run reaches."""
    _, cell = np.unique(np.stack([table["params"], table["tokens"]], 1), axis=0, return_inverse=True)
    order = np.lexsort((table["loss"], cell.ravel()))
    _, first = np.unique(cell.ravel()[order], return_index=True)
    chosen = np.sort(order[first])
    return table.select(chosen, f"The best run of each of {len(chosen)} cells of size and tokens counts.")


def is_tuned(table: RunTable) -> bool:
    """Learning rate or batch size vary among runs with the same params and tokens."""
    _, cell = np.unique(np.stack([table["params"], table["tokens"]], 1), axis=0, return_inverse=True)
    cells = int(cell.max()) + 1
    pairs = (np.stack([cell.ravel(), table[name]], 1) for name in ("learning_rate", "batch_tokens") if name in table)
    return any(len(np.unique(pair, axis=0)) > cells for pair in pairs)


def drop_highest(table: RunTable, count: int) -> RunTable:
    """Leaves out runs with the highest losses. Raises InputError if none is left."""
    if not 0 <= count < len(table):
        raise InputError(
            f"drop_highest must be from 0 to {len(table) - 1}, the table has {len(table)} runs; got {count}."
        )
    if count == 0:
        return table
    order = np.argsort(table["loss"], kind="stable")
    return table.select(np.sort(order[:-count]), f"The {_count(count, 'run')} with the highest losses left out.")


def parse_columns(given: Sequence[str], option: str = "columns") -> dict[str, str]:
    """Parses NAME=COLUMN options. Raises InputError for other forms, and for a name that is given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, _, column = text.partition("=")
        if not name or not column or name in found:
            raise InputError(f"--{option} expects NAME=VALUE, each name once; got {text!r}.")
        found[name] = column
    return found


def _content(path: Path) -> bytes:
    problem = why_unusable(path)
    if problem is not None:
        raise InputError(problem)
    return path.read_bytes()


def _parse(path: Path, content: bytes) -> dict[str, list[Any]]:
    """All columns of a file, by name."""
    if path.name.endswith(".parquet"):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise InputError("Parquet needs pyarrow: pip install 'qwen-jax[data]'. Or give a CSV file.") from None
        try:
            table = pq.read_table(io.BytesIO(content))
        except pa.ArrowException as error:
            why = str(error).partition("\n")[0].rstrip(".")
            raise InputError(f"{path} is not a Parquet file: {why}. Give an intact one, or a CSV file.") from None
        return dict(zip(table.column_names, (column.to_pylist() for column in table.columns), strict=True))
    if not path.name.endswith((".csv", ".csv.gz")):
        raise InputError(f"{path}: expected a .csv, .csv.gz or .parquet file.")
    try:
        text = (gzip.decompress(content) if path.name.endswith(".gz") else content).decode("utf-8-sig")
        lines = [line for line in csv.reader(io.StringIO(text)) if line]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}. Give such a file, or Parquet.") from None
    if not lines:
        raise InputError(f"{path} is empty. Expected a line of names and a row for each run.")
    header = [name.strip() for name in lines[0]]
    # A column without a name is an index that pandas has written. It may occur once.
    if len(set(header)) < len(header):
        raise InputError(f"{path} has two columns of one name: {', '.join(header)}.")
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(header):
            raise InputError(f"{path}, row {number}: expected {len(header)} values as in the header, got {len(line)}.")
    return {name: [line[i] for line in lines[1:]] for i, name in enumerate(header)}


def _column(
    path: Path, table: Mapping[str, list[Any]], name: str, columns: Mapping[str, str]
) -> tuple[list[Any], float] | None:
    """A column and the factor it is multiplied with; None if it is not there and was not asked for by name."""
    asked = columns.get(name, name)
    if asked in table:
        return table[asked], 1.0
    if name not in columns:
        return None
    column, star, factor = asked.rpartition("*")
    try:
        if star and column in table:
            return table[column], float(factor)
    except ValueError:
        pass
    raise InputError(f"{path} has no column {asked!r} for {name}; it has {', '.join(table)}.")


def _optional(
    path: Path, table: Mapping[str, list[Any]], name: str, columns: Mapping[str, str], rows: Array
) -> Array | None:
    found = _column(path, table, name, columns)
    return None if found is None else _numbers(path, found[0], found[1], rows, name)


def _numbers(path: Path, column: Sequence[Any], factor: float, rows: Array, name: str) -> Array:
    """Numbers of the rows; an empty cell is NaN."""
    numbers = []
    for row in rows:
        item = column[row]
        try:
            numbers.append(math.nan if item is None or item == "" else float(item) * factor)
        except (TypeError, ValueError):
            raise InputError(f"{path}, row {row + 1}: {name} must be a number, got {item!r}.") from None
    return np.array(numbers, float)


def _same(item: object, value: str) -> bool:
    """A cell has a value, as text or as a number."""
    if str(item) == value:
        return True
    try:
        return float(str(item)) == float(value)
    except ValueError:
        return False


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"


def _rows(rows: Array) -> str:
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"
