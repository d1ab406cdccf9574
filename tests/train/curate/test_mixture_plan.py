"""Sampling plans: conservation of tokens, caps, proportions; sampling by hash; and what the trainer reads of them."""

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_jax.cli import main
from qwen_jax.errors import InputError
from tests.helpers.data_sets import make_rows
from tests.helpers.runs import print_seed
from tests.train.curate.curations import Repair
from train.curate.curation import Curation, Input, Map, Select
from train.curate.mix import NOT_PLANNED, SAMPLED_OUT, Mix
from train.curate.mixture_plan import Plan, make_plan, plan_text, read_mixture, read_plan, water_fill, write_plan
from train.curate.mixture_plot import plan_html, plan_png
from train.curate.mixture_table import SCHEMA, UNSCORED, Cell, CellTable, Columns, cell_table, read_attributes
from train.curate.operators.unicode import RepairUnicode
from train.curate.run import RunOptions, run
from train.data.mixture import Mixture, MixtureStage
from train.data.rows import PackedRows


def corpus(rng: np.random.Generator, count: int, domains: tuple[str, ...] = ("code", "math", "web")) -> pa.Table:
    """Attributes of documents: domains of other sizes and scores, some without a score."""
    which = rng.choice(len(domains), count, p=rng.dirichlet(np.ones(len(domains)) * 3))
    scores = [None if rng.random() < 0.05 else float(s) for s in rng.normal(which, 1.0)]
    tokens = rng.lognormal(5, 1, count).round() + 1
    return pa.table([[f"d{i}" for i in range(count)], [domains[i] for i in which], scores, tokens], schema=SCHEMA)


def table_of(rng: np.random.Generator, buckets: int = 4) -> CellTable:
    """A table with random numbers of tokens."""
    cells = tuple(
        Cell(domain, bucket, 10, int(rng.integers(0, 10 ** rng.integers(3, 7))))
        for domain in ("code", "math", "web", "wiki")
        for bucket in range(UNSCORED, buckets)
    )
    return CellTable(cells, {d: tuple(range(buckets - 1)) for d in ("code", "math", "web", "wiki")}, "score")


def filled(total: float, weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """Water-filling by another method: bisection of the level."""
    low, high = 0.0, 1e30
    for _ in range(500):
        level = math.sqrt(low * high) if low > 0 else high / 1e3 if high > 1e-12 else 0.0
        if np.minimum(level * weights, caps).sum() < total:
            low = level
        else:
            high = level
    return np.minimum(high * weights, caps)


def test_water_filling_conserves_the_total_and_is_the_level_that_bisection_finds() -> None:
    rng = print_seed()
    for _ in range(200):
        count = int(rng.integers(1, 9))
        weights, caps = rng.integers(0, 20, count), rng.integers(0, 10**6, count)
        total = int(rng.integers(1, 2 * 10**6))
        result = water_fill(total, [Fraction(int(w)) for w in weights], caps.tolist())
        usable = int(caps[weights > 0].sum())
        assert sum(result) == min(total, usable)
        assert all(0 <= r <= c for r, c in zip(result, caps, strict=True))
        expected = filled(min(total, usable), weights.astype(float), caps.astype(float))
        np.testing.assert_allclose(result, expected, atol=1.5, rtol=1e-9)


def test_a_plan_conserves_its_budget_and_keeps_shares_weights_and_caps() -> None:
    rng = print_seed()
    capped = short = 0
    for _ in range(100):
        table = table_of(rng)
        shares = dict(zip(table.domains, rng.dirichlet(np.ones(4)), strict=True))
        weights = [0.0, *rng.uniform(0.1, 5, 3)]
        caps = dict(zip(table.domains, rng.uniform(0.5, 6, 4), strict=True))
        budget = int(10 ** rng.uniform(3, 7.5))
        plan = make_plan(table, budget, shares, weights=weights, max_epochs=caps)
        # Conservation, and caps of cells; bucket 0 and documents without a score have no weight.
        assert plan.tokens + plan.missing == budget
        assert plan.missing >= 0
        assert sum(one.tokens for one in plan.domains) == plan.tokens
        for one in plan.cells:
            assert one.tokens <= caps[one.cell.domain] * one.cell.tokens
            assert one.tokens == 0 or one.cell.bucket > 0
        # Tokens are missing only where everything is at its cap, and the notes say how many.
        if plan.missing:
            short += 1
            assert all(one.tokens == one.cap for one in plan.domains if one.asked)
            assert f"{plan.missing:,} less than the budget" in " ".join(plan.notes())
        # Domains below their caps have their tokens in the proportion of their shares; capped ones have less.
        below = [one for one in plan.domains if one.tokens < one.cap]
        # The largest one tells the level best: tokens are within 1 of the exact solution.
        level = max((one.asked, one.tokens / one.asked) for one in below)[1] if below else math.inf
        for one in plan.domains:
            slack = 1 + one.asked / max((one.asked for one in below), default=1)
            if one.tokens < one.cap:
                assert abs(one.tokens - level * one.asked) <= slack
            elif below:
                capped += 1
                assert one.tokens <= level * one.asked + slack
        told = [note for note in plan.notes() if "asked for" in note]
        less = [one for one in plan.domains if one.cap == one.tokens < round(one.asked * budget)]
        assert len(told) == len(less)
        # Within a domain, epochs are in the proportion of the weights, but for capped buckets.
        for name in plan.asked:
            mine = [one for one in plan.cells if one.cell.domain == name and one.weight and one.tokens < one.cap]
            parts = [one.weight * one.cell.tokens for one in mine]
            most = max(parts, default=1.0)
            for one, part in zip(mine, parts, strict=True):
                assert abs(one.tokens - mine[parts.index(most)].tokens * part / most) <= 1 + part / most
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert capped > 10
    assert short > 10


def test_temperature_goes_from_proportional_to_uniform() -> None:
    rng = print_seed()
    table = table_of(rng)
    sizes = {d: sum(c.tokens for c in table.cells if c.domain == d and c.bucket >= 0) for d in table.domains}
    asked = make_plan(table, 10).asked
    assert asked == pytest.approx({d: size / sum(sizes.values()) for d, size in sizes.items()})
    assert make_plan(table, 10, temperature=math.inf).asked == pytest.approx(dict.fromkeys(sizes, 0.25))
    half = make_plan(table, 10, temperature=2.0).asked
    assert half["code"] / half["web"] == pytest.approx(math.sqrt(sizes["code"] / sizes["web"]))


def test_quantiles_divide_tokens_and_do_not_depend_on_order() -> None:
    rng = print_seed()
    table = corpus(rng, 4000)
    made = cell_table(lambda: iter([table.slice(0, 1000), table.slice(1000)]), "score", 4)
    order = rng.permutation(len(table))
    assert cell_table(lambda: iter([table.take(order)]), "score", 4) == made
    tokens = table["tokens"].to_numpy()
    assert sum(cell.tokens for cell in made.cells) == pytest.approx(tokens.sum(), abs=16)
    assert sum(cell.documents for cell in made.cells) == len(table)
    unscored = table["quality"].is_null().to_numpy()
    assert sum(cell.documents for cell in made.cells if cell.bucket == UNSCORED) == unscored.sum()
    for domain in made.domains:
        mine = [cell.tokens for cell in made.cells if cell.domain == domain and cell.bucket >= 0]
        # Within the longest document, on either side.
        assert len(mine) == 4
        np.testing.assert_allclose(mine, np.mean(mine), atol=2 * tokens.max())
    # Equal scores are in one bucket.
    same = table.set_column(2, "quality", pa.array([3.0] * len(table)))
    assert {cell.bucket for cell in cell_table(lambda: iter([same]), "score", 4).cells} == {3}


def test_sampling_is_nested_deterministic_and_as_frequent_as_planned() -> None:
    rng = print_seed()
    table = corpus(rng, 6000)
    cells = cell_table(lambda: iter([table]), "score", 2)
    documents = table.rename_columns(["id", "domain", "score", "tokens"])
    before = np.zeros(len(table), int)
    for budget in (1e4, 1e5, 5e5, 1e6, 4e6):
        plan = make_plan(cells, int(budget), weights=[1, 3], temperature=2.0)
        mix = Mix.of(plan)
        assert mix.reads == ("id", "domain", "score")
        json.dumps(mix.settings())
        made = mix.start()(documents)
        assert made.schema == mix.makes
        counts = made["repetitions"].to_numpy()
        # A larger plan has all that a smaller one has; other batches give the same.
        assert (counts >= before).all()
        before = counts
        parts = [mix.start()(documents.slice(i, 700)) for i in range(0, len(table), 700)]
        assert pa.concat_tables(parts) == made
        # A document is read floor(epochs) or ceil(epochs) times; the mean is epochs, within five deviations.
        names = np.array(made["cell"].to_pylist())
        reasons = np.array(made["reason"].to_pylist(), object)
        for one in plan.cells:
            mine = names == one.cell.name
            assert mine.sum() == one.cell.documents
            assert set(counts[mine]) <= {math.floor(one.epochs), math.ceil(one.epochs)}
            part = one.epochs % 1
            slack = 5 * math.sqrt(part * (1 - part) / one.cell.documents) + 1e-9
            assert abs(counts[mine].mean() - one.epochs) <= slack
            out = {SAMPLED_OUT} if one.tokens else {NOT_PLANNED}
            assert set(reasons[mine & (counts == 0)]) <= out
        assert all(reason is None for reason in reasons[counts > 0])
    assert Mix.of(plan, "other").start()(documents)["repetitions"] != pa.chunked_array([pa.array(before, pa.int32())])


def test_the_trainer_reads_each_cell_as_often_as_planned(tmp_path: Path) -> None:
    rng = print_seed()
    rows = {"code": 40, "math": 25, "web": 160}
    (tmp_path / "data").mkdir()
    for name, count in rows.items():
        make_rows(tmp_path / "data" / name, rng, count, 16)
    sets = {name: PackedRows(tmp_path / "data" / name) for name in rows}
    cells = tuple(Cell(name, 0, count, sets[name].manifest.tokens, False) for name, count in rows.items())
    plan = make_plan(CellTable(cells, {}), 4000, {"code": 0.5, "math": 0.4, "web": 0.1})
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    data, weights = read_mixture(tmp_path / "plan.json", str(tmp_path / "data"))
    steps = plan.steps(4, 16)
    mixture = Mixture([MixtureStage(steps, 4, 16, weights)], {name: PackedRows(f) for name, f in data.items()}, 0)
    planned = {one.cell.name: one.epochs for one in plan.cells}
    for name, epochs in mixture.epochs().items():
        # Steps are whole, and so are rows. The last row of a cell is padded: it has fewer tokens than its rows hold.
        tokens = planned[name] * sets[name].manifest.tokens * steps * 4 * 16 / plan.tokens
        assert epochs * rows[name] == pytest.approx(tokens / 16, abs=1)
    assert planned["math"] == pytest.approx(4.0)
    assert sum(weights.values()) <= 1 << 16


def test_a_folder_of_a_curation_is_read_with_the_columns_of_its_stages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    texts = {"00000": ["aa", "bbbb", "c" * 8], "00001": ["d" * 12, "é" * 4]}
    new = {"00000": ["a", None, "c" * 4], "00001": ["d" * 6, "é" * 4]}
    reasons = {"00000": [None, "no text", None], "00001": [None, None]}
    for shard, values in texts.items():
        ids = [f"{shard}-{i}" for i in range(len(values))]
        columns: dict[str, Any] = {
            "documents": {"id": ids, "domain": ["web"] * len(ids), "text": pa.array(values, pa.large_string())},
            "1-clean": {"text": pa.array(new[shard], pa.large_string()), "reason": reasons[shard]},
            "2-score": {"score": [float(len(v)) for v in values]},
            # An earlier plan decides nothing.
            "3-mix": {"reason": ["sampled out"] * len(ids), "repetitions": [0] * len(ids)},
        }
        for stage, what in columns.items():
            (run / stage).mkdir(parents=True, exist_ok=True)
            (run / stage / "manifest.json").write_text("{}")
            pq.write_table(pa.table(what), run / stage / f"{shard}.parquet")
    read = pa.concat_tables(read_attributes([run], Columns("score", bytes_per_token=2.0)))
    assert read.to_pydict() == {
        "id": ["00000-0", "00000-2", "00001-0", "00001-1"], "domain": ["web"] * 4,
        "quality": [2.0, 8.0, 12.0, 4.0], "tokens": [0.5, 2.0, 3.0, 4.0],
    }  # fmt: skip
    named = pa.concat_tables(read_attributes([run], Columns("2-score.score", bytes_per_token=2.0)))
    assert named == read
    with pytest.raises(InputError, match="has no column missing"):
        list(read_attributes([run], Columns("missing")))
    (run / "4-score").mkdir()
    (run / "4-score" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"4-score of .* has no 00000"):
        list(read_attributes([run], Columns("score")))
    for shard in texts:
        pq.write_table(pa.table({"score": [1.0]}), run / "4-score" / f"{shard}.parquet")
    with pytest.raises(InputError, match="make the column score: 2-score, 4-score"):
        list(read_attributes([run], Columns("score")))
    with pytest.raises(InputError, match="has 1 rows"):
        list(read_attributes([run], Columns("4-score.score")))
    # One Parquet file has all columns.
    pq.write_table(read.append_column("n", pa.array([1, 2, 3, 4])), tmp_path / "a.parquet")
    file = pa.concat_tables(read_attributes([tmp_path / "a.parquet"], Columns("quality", tokens="n")))
    assert file["tokens"].to_pylist() == [1, 2, 3, 4]


def test_the_folder_of_a_curation_counts_as_it_ended(tmp_path: Path) -> None:
    """The text is the newest one, also where a stage left it; a stage that was taken out removes nothing more."""
    texts = [f"{'cat ' * n}a\u200bb" for n in [1, *print_seed().integers(1, 9, 20).tolist()]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, "plain text"]))
    source, folder = Input("web", str(tmp_path / "a.jsonl")), tmp_path / "run"
    repair, select = Map("repair", [RepairUnicode()]), Select("length(text) > 12")
    again = Map("again", [Repair("none")])
    for stages in [[repair, select, again], [repair, again]]:
        run(Curation([source], stages), folder, RunOptions(workers=1))
        written = [len(text) - 1 for text in texts if select not in stages or len(text) > 13]
        assert select not in stages or len(written) < len(texts)
        plain = 0 if select in stages else len("plain text")
        cells = cell_table(lambda: read_attributes([folder], Columns(bytes_per_token=1))).cells
        assert [cell.tokens for cell in cells] == [sum(written) + plain]


def test_a_plan_is_shown_as_a_table_and_as_pictures() -> None:
    plan = make_plan(table_of(print_seed()), 10**7, weights=[0, 1, 2, 4])
    text = plan_text(plan)
    assert all(one.cell.name in text for one in plan.cells)
    assert plan_png(plan).startswith(b"\x89PNG")
    assert "data:image/png;base64," in plan_html(plan)
    bare = make_plan(CellTable((Cell("web", 0, 1, 100, False),), {}), 1000)
    assert bare.missing == 600
    assert bare.mixture() == {"web": 1}
    assert plan_png(bare)


TABLE = CellTable((Cell("a", 0, 1, 10), Cell("a", 1, 1, 10), Cell("b", 1, 1, 5)), {"a": (1.0,), "b": (1.0,)}, "score")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget": 0}, "budget"),
        ({"shares": {"a": 0.5, "b": 0.6}}, "add up to 1.1"),
        ({"shares": {"a": 1.0}}, "'b' is missing"),
        ({"shares": {"a": 0.5, "c": 0.5}}, "no domain 'c'"),
        ({"shares": {"a": 1.5, "b": -0.5}}, "b=-0.5"),
        ({"shares": {"a": math.nan, "b": 0.5}}, "a=nan"),
        ({"weights": [1.0]}, "Expected 2 weights"),
        ({"weights": [0.0, 0.0]}, "one above 0"),
        ({"weights": [-1.0, 1.0]}, "at least 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_epochs": 0.0}, "max_epochs"),
        ({"max_epochs": {"a": 1.0}}, "'b' is missing"),
    ],
)
def test_wrong_wishes_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_plan(TABLE, **{"budget": 10, **change})


def test_wrong_tables_are_named(tmp_path: Path) -> None:
    one = pa.table([["x"], ["web"], pa.array([None], pa.float64()), [1.0]], schema=SCHEMA)
    for says, change in {
        "no documents": {"batches": lambda: iter([])},
        "need scores": {"buckets": 2},
        "no quantiles": {"quality": "score", "buckets": 2},
        "ascend": {"quality": "score", "thresholds": (2.0, 1.0)},
    }.items():
        with pytest.raises(InputError, match=says):
            cell_table(**{"batches": lambda: iter([one]), **change})  # type: ignore[arg-type]
    two = pa.table([["x", "y"], ["a/b", "a b"], [1.0, 1.0], [1.0, 1.0]], schema=SCHEMA)
    with pytest.raises(InputError, match="names of domains"):
        cell_table(lambda: iter([two]))
    with pytest.raises(InputError, match="no cell other"):
        Mix({"web": 1.0}).start()(pa.table({"id": ["x"], "domain": ["other"]}))
    (tmp_path / "bad.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match="cannot be read"):
        list(read_attributes([tmp_path / "bad.parquet"], Columns()))
    with pytest.raises(InputError, match="neither"):
        list(read_attributes([tmp_path], Columns()))
    pq.write_table(
        pa.table({"id": ["x"], "domain": ["a"], "n": [None]}).cast(
            pa.schema([("id", pa.string()), ("domain", pa.string()), ("n", pa.int64())])
        ),
        tmp_path / "null.parquet",
    )
    with pytest.raises(InputError, match="no length"):
        list(read_attributes([tmp_path / "null.parquet"], Columns(tokens="n")))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="not a plan"):
        read_plan(tmp_path / "plan.json")
    assert dataclasses.replace(TABLE, quality=None).buckets == 2


def test_the_command_writes_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(corpus(print_seed(), 500), tmp_path / "a.parquet")
    capsys.readouterr()
    words = f"data mixture plan --input {tmp_path}/a.parquet --output {tmp_path}/out --quality quality --tokens tokens"
    options = "--budget 1e5 --buckets 2 --weights 1 2 --share code=0.5 math=0.25 web=0.25 --most web=1".split()
    assert main([*words.split(), *options, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    plan = read_plan(tmp_path / "out" / "plan.json")
    assert shown == plan.to_json()
    assert plan.max_epochs == {"code": 4, "math": 4, "web": 1}
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words.split(), *options]) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "plan.txt").read_text()
    assert main([*words.split(), "--budget", "10", "--share", "code"]) == 1
    assert "--share expects NAME=NUMBER" in capsys.readouterr().err
    assert main(["data", "mixture", "--help"]) == 0
    assert "regress" in capsys.readouterr().out
    assert main(["data", "mixture", "other"]) == 2
