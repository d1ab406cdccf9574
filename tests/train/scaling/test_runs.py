"""Tables of runs: formats and column names do not matter, and what cannot be used is named with its row."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.scaling.runs import best_of_cells, is_tuned, parse_columns, read_runs

NEEDED = ("params", "tokens", "loss")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_formats_and_names_give_the_same_table(tmp_path: Path) -> None:
    """CSV, compressed CSV and Parquet; our names, others by mapping, and other units by a factor."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    generator = print_seed()
    params, tokens, loss = generator.uniform(1, 2, (3, 5)) * [[1e8], [1e9], [1]]
    rows = "".join(f"{i},{params[i]!r},{tokens[i] / 1e9!r},{loss[i]!r}\n" for i in range(5)).replace("np.float64", "")
    rows = rows.replace("(", "").replace(")", "")
    text = ",N,D (B),final loss\n" + rows
    csv = write(tmp_path / "runs.csv", "\ufeff" + text)
    (tmp_path / "runs.csv.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.table({"params": params, "tokens": tokens, "loss": loss}), tmp_path / "runs.parquet")
    columns = parse_columns(["params=N", "tokens=D (B)*1e9", "loss=final loss"])
    tables = [read_runs(path, NEEDED, ("flops",), columns) for path in (csv, tmp_path / "runs.csv.gz")]
    tables.append(read_runs(tmp_path / "runs.parquet", NEEDED, ("flops",)))
    for table in tables:
        np.testing.assert_allclose(table["params"], params)
        np.testing.assert_allclose(table["tokens"], tokens)
        np.testing.assert_allclose(table["flops"], 6 * params * tokens)
        np.testing.assert_array_equal(table.rows, np.arange(1, 6))
    assert tables[0].source["columns"]["tokens"] == "D (B)*1e9"


def test_tokens_come_from_flops(tmp_path: Path) -> None:
    """Where only C is known, D = C / (6 N), and it is said."""
    table = read_runs(write(tmp_path / "a.csv", "N,C,loss\n100,6000,2\n"), NEEDED, (), {"params": "N", "flops": "C"})
    assert table["tokens"] == [10]
    assert any("flops / (6 params)" in text for text in table.warnings)


def test_compute_is_6_n_d_whatever_the_table_says(tmp_path: Path) -> None:
    """FLOPs of another definition are warned of, with their ratio to 6 N D; rounded ones are not."""
    rng = print_seed()
    params, tokens = rng.uniform(1e6, 1e9, 5), rng.uniform(1e9, 1e12, 5)
    for factor, warned in ((1.0, False), (1.004, False), (0.5, True), (1.3, True)):
        rows = [f"{n!r},{d!r},2,{6 * n * d * factor!r}" for n, d in zip(params.tolist(), tokens.tolist(), strict=True)]
        path = write(tmp_path / "a.csv", "\n".join(["params,tokens,loss,flops", *rows]))
        table = read_runs(path, NEEDED, ("flops",))
        np.testing.assert_allclose(table["flops"], 6 * table["params"] * table["tokens"], rtol=1e-12)
        assert any(f"{factor:g} times 6 N D" in text for text in table.warnings) == warned


def test_diverged_unfinished_and_copied_runs_are_left_out_and_named(tmp_path: Path) -> None:
    """Rows are named by their number in the file, also where others are not selected."""
    path = write(
        tmp_path / "a.csv",
        "data,params,tokens,loss,status\nx,1,2,3,ok\ny,1,2,3,ok\nx,1,2,3,ok\nx,2,2,nan,diverged\nx,3,2,nan,ok\n"
        "x,4,2,,\nx,5,5,1,ok\n",
    )
    table = read_runs(path, NEEDED, (), None, {"data": "x"})
    np.testing.assert_array_equal(table["params"], [1, 5])
    np.testing.assert_array_equal(table.rows, [1, 7])
    text = " ".join(table.warnings)
    assert "1 diverged run left out" in text
    assert "2 runs without a finite loss left out: rows 5, 6" in text
    assert "1 copy of other runs left out: row 3" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("params,tokens,loss\n", "has no rows"),
        ("params,tokens\n1,2\n", "no column for loss"),
        ("params,params,loss\n1,2,3\n", "two columns of one name"),
        ("params,tokens,loss\n1,2\n", "row 1: expected 3 values"),
        ("params,tokens,loss\n1,2,3\n1,two,3\n", "row 2: tokens must be a number, got 'two'"),
        ("params,tokens,loss\n1,2,3\n-1,2,3\n", "row 2: params must be a positive number"),
        ("params,tokens,loss\n1,nan,3\n", "row 1: tokens must be a positive number"),
        ("params,tokens,loss\n1,2,-3\n", "row 1: loss must be positive"),
        ("params,tokens,loss,status\n1,2,3,killed\n", "status must be ok or diverged, got 'killed'"),
        ("params,tokens,loss,status\n1,2,3,diverged\n", "no run that ended with a finite loss"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """The error names the row, the column and what was found."""
    with pytest.raises(InputError) as caught:
        read_runs(write(tmp_path / "a.csv", text), NEEDED)
    assert message in str(caught.value)


def test_unusable_options_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "params,tokens,loss\n1,2,3\n")
    with pytest.raises(InputError, match="Unknown columns size"):
        read_runs(path, NEEDED, (), {"size": "params"})
    with pytest.raises(InputError, match="no column 'N' for params"):
        read_runs(path, NEEDED, (), {"params": "N"})
    with pytest.raises(InputError, match="no column 'data'"):
        read_runs(path, NEEDED, (), None, {"data": "x"})
    with pytest.raises(InputError, match="does not exist"):
        read_runs(tmp_path / "b.csv", NEEDED)
    with pytest.raises(InputError, match="expected a"):
        read_runs(write(tmp_path / "a.pkl", "x"), NEEDED)
    with pytest.raises(InputError, match="not a Parquet file"):
        read_runs(write(tmp_path / "a.parquet", "x"), NEEDED)
    for given in (["params"], ["params=N", "params=M"], ["=N"]):
        with pytest.raises(InputError, match="--columns expects NAME=VALUE"):
            parse_columns(given)


def test_the_best_run_of_a_cell_counts(tmp_path: Path) -> None:
    """In a sweep over learning rates, the lowest loss of each size and number of tokens."""
    path = write(tmp_path / "a.csv", "params,tokens,loss,learning_rate\n1,2,3,1e-3\n1,2,2.5,2e-3\n2,2,2.4,1e-3\n")
    table = read_runs(path, NEEDED, ("learning_rate",))
    assert is_tuned(table)
    best = best_of_cells(table)
    np.testing.assert_array_equal(best["loss"], [2.5, 2.4])
    assert not is_tuned(best)
