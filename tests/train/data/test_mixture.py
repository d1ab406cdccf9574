"""Mixtures: exact shares, each row once in a pass, the past unmoved by the future, the same for any number of hosts."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from tests.helpers.data_sets import make_rows
from train.data.mixture import Mixture, MixtureStage
from train.data.rows import PackedRows


def stage(steps: int, batch: int, weights: dict, length: int = 8) -> MixtureStage:
    return MixtureStage(steps, batch, length, weights)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedRows]:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng()
    sizes = {"web": (11, 3), "code": (7, 2), "math": (5, 1), "books": (4, 3)}
    data = {name: make_rows(folder / name, rng, rows, 8, shards) for name, (rows, shards) in sizes.items()}
    return {
        **data,
        "long": make_rows(folder / "long", rng, 6, 32),
        "large": make_rows(folder / "large", rng, 3000, 8),
    }


def drawn(mixture: Mixture, first: int = 0, last: int | None = None) -> list[tuple[str, int]]:
    """(data set, row) of every row of these steps."""
    steps = range(first, len(mixture) if last is None else last)
    return [(mixture.names[d], row) for step in steps for d, row in mixture.rows(step).tolist()]


def assert_exact(names: list[str], shares: dict[str, Fraction]) -> None:
    """After n rows each has been drawn n x share times, to within less than one."""
    n = np.arange(1, len(names) + 1)
    for name, share in shares.items():
        had = np.cumsum([other == name for other in names])
        assert np.all(np.abs(had * share.denominator - n * share.numerator) < share.denominator), name


# --- shares ---


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"web": 1, "code": 2}, {"web": Fraction(1, 3), "code": Fraction(2, 3)}),
        ({"web": "1/3", "code": "2/3"}, {"web": Fraction(1, 3), "code": Fraction(2, 3)}),
        ({"web": 1 / 3, "code": 2 / 3}, {"web": Fraction(1, 3), "code": Fraction(2, 3)}),
        ({"web": 0.4, "code": 0.6}, {"web": Fraction(2, 5), "code": Fraction(3, 5)}),
        ({"web": 0.7, "code": 0.2, "math": 0.1}, dict(web=Fraction(7, 10), code=Fraction(1, 5), math=Fraction(1, 10))),
        ({"web": 0.123456, "code": 0.876544}, {"web": Fraction(1929, 15625), "code": Fraction(13696, 15625)}),
        ({"web": 5, "code": 0}, {"web": Fraction(1)}),
        ({"web": Fraction(1, 7), "math": 1, "code": 1.5, "books": "0.25"}, None),
    ],
)  # fmt: skip
def test_shares_are_exact_at_every_row(data, weights, shares):
    made = stage(50, 7, weights)
    assert sum(made.shares().values()) == 1
    assert shares is None or made.shares() == shares
    mixture = Mixture([made], data, 0)
    names = [name for name, _ in drawn(mixture)]
    assert_exact(names, made.shares())
    assert set(names) == set(made.shares())
    for step in (0, 1, 17, 50):
        assert mixture.draws(step) == {name: names[: 7 * step].count(name) for name in data}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_shares_of_any_weights_are_exact(data, weights):
    # Many of one weight and one of another are what simpler rules fail at.
    some = data["large"]  # Grain shuffles few rows slowly.
    names = [f"{i}" for i in range(len(weights))]
    made = stage(1, 3 * sum(weights), dict(zip(names, weights, strict=True)))
    mixture = Mixture([made], dict.fromkeys(names, some), 0)
    assert_exact([name for name, _ in drawn(mixture)], made.shares())


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({}, "add up to nothing"),
        ({"web": 0, "code": 0.0}, "add up to nothing"),
        ({"web": -0.5, "code": 1}, "weight of 'web' must be a number of at least 0.* got -0.5"),
        ({"web": float("nan")}, "got nan"),
        ({"web": float("inf")}, "got inf"),
        ({"web": "much"}, "got 'much'"),
        ({"web": "1/0"}, "got '1/0'"),
        ({"web": None}, "got None"),
        ({"web": 0.123456789, "code": 0.5}, "repeat only after"),
    ],
)
def test_impossible_weights_are_refused(weights, match):
    with pytest.raises(InputError, match=match):
        stage(1, 1, weights)


# --- passes ---


def passes(mixture: Mixture, data: dict[str, PackedRows]) -> None:
    """Every pass of every data set has each row once, and passes differ."""
    everything = drawn(mixture)
    for name in mixture.names:
        rows = [row for other, row in everything if other == name]
        size = len(data[name])
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        for chunk in chunks[:-1]:
            assert sorted(chunk) == list(range(size))
        assert len(set(chunks[-1] if chunks else [])) == len(chunks[-1] if chunks else [])
        assert len(chunks) < 3 or len({tuple(chunk) for chunk in chunks[:-1]}) > 1


def test_each_row_comes_once_in_a_pass_also_across_stages(data):
    schedule = [
        stage(13, 5, {"web": 0.5, "code": 0.3, "math": 0.2}),
        stage(7, 3, {"web": 1, "math": 2}),
        stage(3, 2, {"long": 1}, 32),
        stage(20, 8, {"code": 1 / 3, "web": 2 / 3}),
        stage(40, 3, {"long": 1}, 32),
    ]
    mixture = Mixture(schedule, data, 5)
    assert len(mixture) == 83
    passes(mixture, data)
    assert mixture.draws()["long"] == 3 * 2 + 40 * 3
    # And without any stage change, three data sets of one row each are no exception.
    passes(Mixture([stage(100, 7, {"math": 1, "books": 1})], data, 0), data)


def test_seeds_and_data_sets_have_orders_of_their_own(data):
    one = {"a": data["web"], "b": data["web"]}
    size = len(data["web"])
    mixture = Mixture([stage(2 * size, 1, {"a": 1, "b": 1})], one, 0)
    rows = drawn(mixture)
    assert [row for name, row in rows if name == "a"] != [row for name, row in rows if name == "b"]
    assert rows != drawn(Mixture([stage(2 * size, 1, {"a": 1, "b": 1})], one, 1))


def test_a_batch_is_a_pure_function_of_seed_and_step(data):
    schedule = [stage(9, 4, {"web": 2, "code": 1}), stage(9, 4, {"math": 1})]
    first, again = Mixture(schedule, data, 3), Mixture(schedule, dict(reversed(list(data.items()))), 3)
    for step in (17, 0, 9, 8, 0):
        jax.tree.map(np.testing.assert_array_equal, first[step], again.batch(step))
        assert first.batch_hash(step) == again.batch_hash(step)
    assert first.batch_hash(0) != first.batch_hash(1)


def test_batches_hold_the_rows_that_they_name(data):
    mixture = Mixture([stage(6, 9, {"web": 0.5, "code": 0.3, "books": 0.2})], data, 1)
    for step in range(6):
        batch = mixture[step]
        for i, (d, row) in enumerate(mixture.rows(step).tolist()):
            one = data[mixture.names[d]].take([row])
            jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[0]), batch, one)


def test_a_data_set_that_is_read_more_than_four_times_is_named(data):
    """Epochs are rows read over rows there are, in all stages; data sets that are not read are left out."""
    mixture = Mixture([stage(9, 5, {"web": 1}), stage(30, 4, {"web": 1, "large": 3})], data, 0)
    assert mixture.epochs() == {"web": (45 + 30) / len(data["web"]), "large": 90 / len(data["large"])}
    few, many = len(data["code"]) * 4, len(data["code"]) * 4 + 1
    assert mixture.describe_epochs().startswith("epochs of each data set: large 0.03, web 2.3")
    assert "more than" not in Mixture([stage(few, 1, {"code": 1, "web": 0})], data, 0).describe_epochs()
    warned = Mixture([stage(many, 2, {"code": 1, "large": 1})], data, 0).describe_epochs()
    assert "(more than 4 of code: more data" in warned
    assert ": code 500 (" in Mixture([stage(500, len(data["code"]), {"code": 1})], data, 0).describe_epochs()


# --- the past does not depend on the future ---


SCHEDULE = (stage(10, 4, {"web": 2, "code": 1}), stage(10, 6, {"web": 1, "math": 3}), stage(10, 2, {"long": 1}, 32))


@pytest.mark.parametrize("step", [0, 3, 10, 14, 20, 29])
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[:2],
        lambda s: (*s, stage(99, 1, {"books": 1})),
        lambda s: (s[0], stage(10, 6, {"books": 1}), *s[2:]),
        lambda s: (s[0], dataclasses.replace(s[1], steps=15), s[2]),
        lambda s: (s[0], dataclasses.replace(s[1], batch_size=8), s[2]),
        lambda s: (dataclasses.replace(s[0], weights={"web": 3, "code": 1}), *s[1:]),
    ],
)
def test_what_comes_later_changes_nothing_before(data, change, step):
    before, after = Mixture(SCHEDULE, data, 0), Mixture(change(SCHEDULE), data, 0)

    # The first step at which the two schedules say something else.
    def at(mixture, i):
        if i >= len(mixture):
            return None
        this = mixture.stages[mixture.stage(i)]
        return this.batch_size, this.length, this.shares()

    split = next((i for i in range(30) if at(before, i) != at(after, i)), 30)
    for i in range(min(split, len(after))):
        np.testing.assert_array_equal(before.rows(i), after.rows(i))
    saved = json.loads(json.dumps(before.record()))
    if step <= split:
        after.check_resume(saved, step) if step <= len(after) else None
        assert before.fingerprint(step) == after.fingerprint(step)
    else:
        with pytest.raises(InputError, match=rf"taken {step} steps"):
            after.check_resume(saved, step)
        assert before.fingerprint(step) != after.fingerprint(step) or step > len(after)


def test_resuming_with_another_past_says_what_differs(data, tmp_path):
    saved = json.loads(json.dumps(Mixture(SCHEDULE, data, 0).record()))
    rng = np.random.default_rng()
    other = {**data, "web": make_rows(tmp_path / "web", rng, 11, 8)}
    Mixture(SCHEDULE, data, 0).check_resume(saved, 30)
    with pytest.raises(InputError, match=r"the content of 'web' has changed"):
        Mixture(SCHEDULE, other, 0).check_resume(saved, 1)
    Mixture(SCHEDULE, {**data, "math": other["web"]}, 0).check_resume(saved, 10)  # Not seen yet.
    with pytest.raises(InputError, match=r"seed was 0 and is now 1"):
        Mixture(SCHEDULE, data, 1).check_resume(saved, 5)
    with pytest.raises(InputError, match=r"Grain shuffles in another order"):
        Mixture(SCHEDULE, data, 0).check_resume({**saved, "order": "x"}, 5)
    with pytest.raises(InputError, match=r"stage 1: batch_size was 4 and is now 8"):
        Mixture([stage(10, 8, {"web": 2, "code": 1})], data, 0).check_resume(saved, 5)
    with pytest.raises(InputError, match=r"stage 1: shares was .*'1/3'.* and is now .*'1/4'"):
        Mixture([stage(10, 4, {"web": 3, "code": 1})], data, 0).check_resume(saved, 5)
    with pytest.raises(InputError, match=r"the schedule has 10. Append stages"):
        Mixture(SCHEDULE[:1], data, 0).check_resume({**saved, "stages": saved["stages"][:1]}, 11)
    names = ["web", "code"]
    foreign = {name: make_rows(tmp_path / f"{name}2", rng, 9, 8, tokenizer="u") for name in names}
    with pytest.raises(InputError, match=r"tokenizer was 't' and is now 'u'"):
        Mixture(SCHEDULE[:1], foreign, 0).check_resume(saved, 5)
    with pytest.raises(InputError, match="different tokenizers"):
        Mixture(SCHEDULE, {**data, "web": foreign["web"]}, 0)
    Mixture(SCHEDULE, data, 0).check_tokenizer("t")
    with pytest.raises(InputError, match="Build the data with the model's tokenizer"):
        Mixture(SCHEDULE, data, 0).check_tokenizer("u")


# --- hosts, and reading ahead ---


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_hosts_has_the_same_global_batches(data, count):
    mixture = Mixture([stage(5, 8, {"web": 0.4, "code": 0.6}), stage(3, 4, {"math": 1, "books": 2})], data, 0)
    loaders = [iter(mixture.loader(0, i, count)) for i in range(count)]
    for step in range(8):
        parts = [next(loader) for loader in loaders]
        whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        jax.tree.map(np.testing.assert_array_equal, whole, mixture[step])
    for loader in loaders:
        with pytest.raises(StopIteration):
            next(loader)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 4, 5, 11])
def test_the_loader_begins_at_any_step(data, threads, start):
    mixture = Mixture([stage(5, 8, {"web": 1}), stage(7, 2, {"long": 1}, 32)], data, 0)
    got = list(mixture.loader(start, threads=threads))
    assert [batch.shape for batch in got] == [(8, 8)] * max(5 - start, 0) + [(2, 32)] * min(7, 12 - start)
    for step, batch in enumerate(got, start):
        jax.tree.map(np.testing.assert_array_equal, batch, mixture[step])


def test_hosts_that_do_not_divide_a_batch_are_refused(data):
    mixture = Mixture([stage(5, 8, {"web": 1})], data, 0)
    for ask in (mixture.rows, mixture.batch, mixture.loader):
        with pytest.raises(InputError, match=r"8 rows in a batch, which does not divide by 3 processes"):
            ask(0, 0, 3)


# --- what does not fit ---


def test_schedules_that_do_not_fit_the_data_are_refused(data):
    for stages, match in (
        ([], "at least one stage"),
        (
            [stage(1, 1, {"web": 1}), stage(1, 1, {"wiki": 1})],
            r"Stage 2 names the data set 'wiki'.*there are 'books', 'code', 'large'",
        ),
        ([stage(1, 1, {"web": 1, "long": 1})], r"rows of 8 tokens, the data set 'long' has rows of 32.*--length 8"),
    ):
        with pytest.raises(InputError, match=match):
            Mixture(stages, data, 0)
    for change in ({"steps": 0}, {"batch_size": 0}, {"length": 1}):
        with pytest.raises(InputError, match=next(iter(change))):
            dataclasses.replace(SCHEDULE[0], **change)
    mixture = Mixture(SCHEDULE, data, 0)
    for step in (-1, 30):
        with pytest.raises(IndexError):
            mixture.rows(step)
    with pytest.raises(IndexError):
        data["web"].take([len(data["web"])])


def test_more_shards_than_are_mapped_at_a_time(tmp_path: Path):
    rows = make_rows(tmp_path / "many", np.random.default_rng(), 1, 8, shards=250)
    order = np.random.default_rng().permutation(250)
    taken = rows.take(order)
    flat = [np.fromfile(tmp_path / "many" / f"shard-{i:05d}.tokens", "<u4") for i in order]
    np.testing.assert_array_equal(taken.tokens, flat)
