"""Packing whole examples: each exactly once per epoch and intact, the same batches after resume and on any hosts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.conversations import chat_tokenizer
from train.data.batch import Batch
from train.data.example_batches import PackedExamples, PackedPairs, PackedSequences, RowConfig
from train.data.example_store import ExampleStore, open_store
from train.data.feed import Feed
from train.data.packing import best_fit
from train.data.pairs import PairBatch

SEED = int(np.random.SeedSequence().generate_state(1)[0])
LENGTH = 64
NUM = 120


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExampleStore]:
    """Examples with long and short texts, all different, so that an example is known by its tokens."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    tokenizer, folder = chat_tokenizer(), tmp_path_factory.mktemp("data")

    def text(most: int) -> str:
        return "".join(rng.choice(list("abcdefghijklm \n"), rng.integers(1, most)).tolist())

    records: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": f"{n}: ", "completion": text(70)} for n in range(NUM)],
        "pairs": [
            {"prompt": f"{n}: ", "chosen": "+" + text(30), "rejected": "-" + text(30), "margin": n / 8}
            for n in range(NUM)
        ],
    }
    result = {}
    for kind, lines in records.items():
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        result[kind] = open_store([path], tokenizer, folder / "stores")
    return result


def packed(store: ExampleStore, **options: Any) -> PackedExamples[Any]:
    config = RowConfig(**{"length": LENGTH, "batch_size": 4, "seed": 3, **options})
    return PackedPairs(store, config) if store.kind == "pairs" else PackedSequences(store, config)


def rows_of(batch: Any) -> Batch:
    return batch.batch if isinstance(batch, PairBatch) else batch


def segments(batch: Batch) -> list[list[tuple[list[int], list[float], list[int]]]]:
    """The segments of each row, read back: ids, weights and positions."""
    result = []
    for ids, weights, positions, numbers in zip(
        batch.tokens, batch.loss_weights, batch.positions, batch.segment_ids, strict=True
    ):
        row = [
            (ids[numbers == n].tolist(), weights[numbers == n].tolist(), positions[numbers == n].tolist())
            for n in range(1, numbers.max() + 1)
        ]
        padding = numbers == 0
        assert not ids[padding].any()
        assert not weights[padding].any()
        assert not positions[padding].any()
        lengths = [len(s[0]) for s in row]
        assert numbers.tolist() == [n for n, size in enumerate(lengths, 1) for _ in range(size)] + [0] * padding.sum()
        result.append(row)
    return result


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def joined(*parts: Any) -> Any:
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@pytest.mark.parametrize("kind", ["sft", "pairs"])
@pytest.mark.parametrize("limit", [None, 4])
def test_every_example_comes_once_in_an_epoch_and_intact(
    stores: dict[str, ExampleStore], kind: str, limit: int | None
) -> None:
    """Read back from the batches: every example that fits, whole, once per epoch; of a pair, both in order."""
    store = stores[kind]
    batches = packed(store, epochs=2, max_segments=limit)
    expected: dict[tuple[int, ...], tuple[int, int]] = {}
    for i in batches.selection.units.tolist():
        for side, answer in enumerate(store.answers(i)):
            expected[tuple(answer.ids.tolist())] = i, side
    assert len(expected) == batches.selection.lengths.size > NUM // 2
    found = []
    for step in range(len(batches)):
        for row in segments(rows_of(batches[step])):
            assert len(row) <= (limit or NUM)
            assert len(row) <= batches.max_segments
            names = []
            for ids, weights, positions in row:
                i, side = expected[tuple(ids)]
                answer = store.answers(i)[side]
                assert weights == [0.0, *answer.trained[1:].astype(float).tolist()]
                assert positions == list(range(len(ids)))
                names.append((i, side))
            if kind == "pairs":
                assert [side for _, side in names] == [0, 1] * (len(row) // 2)
                assert [i for i, _ in names[::2]] == [i for i, _ in names[1::2]]
            found += names
    once = sorted(expected.values())
    assert sorted(found) == sorted(once * 2)
    assert sorted(found[: len(once)]) == once  # Every example of the first epoch comes before the second one.
    assert max(len(row) for row in batches.rows(0)) * (2 if kind == "pairs" else 1) == batches.max_segments


def test_epochs_differ_and_have_as_many_rows(stores: dict[str, ExampleStore]) -> None:
    batches = packed(stores["sft"])
    first, second = batches.rows(0), batches.rows(1)
    assert len(first) == len(second) == batches.rows_per_epoch
    assert first != second
    assert {frozenset(row) for row in first} != {frozenset(row) for row in second}
    assert packed(stores["sft"], seed=4).rows(0) != first
    assert packed(stores["sft"]).rows(0) == first


def first_fit(lengths: list[int], length: int) -> int:
    rooms: list[int] = []
    for size in lengths:
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            rooms.append(length - size)
        else:
            rooms[at] -= size
    return len(rooms)


def test_best_fit_is_at_least_as_full_as_first_fit() -> None:
    """Against first-fit, on many mixtures of lengths; and near the bound that no packing passes."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(60):
        most = int(rng.integers(10, 100))
        lengths = np.minimum(rng.geometric(1 / rng.integers(2, most), 300), 100).tolist()
        rows = best_fit(lengths, 100)
        assert sorted(i for row in rows for i in row) == list(range(300))
        assert max(sum(lengths[i] for i in row) for row in rows) <= 100
        assert len(rows) <= first_fit(lengths, 100)
        lower = max(-(-sum(lengths) // 100), sum(x > 50 for x in lengths))
        assert len(rows) <= 11 / 9 * lower + 1
        limited = best_fit(lengths, 100, 3)
        assert max(map(len, limited)) <= 3
        assert sorted(i for row in limited for i in row) == list(range(300))


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    """A direct check of the rule by a slow search."""
    rng = np.random.default_rng(SEED)
    for _ in range(20):
        lengths = rng.integers(1, 40, 60).tolist()
        rows: list[list[int]] = []
        for item in sorted(range(60), key=lambda i: -lengths[i]):
            rooms = [40 - sum(lengths[i] for i in row) for row in rows]
            fitting = [room for room in rooms if room >= lengths[item]]
            if fitting:
                rows[rooms.index(min(fitting))].append(item)
            else:
                rows.append([item])
        # Which of several rows with the same room is taken is open.
        totals = sorted(sum(lengths[i] for i in row) for row in rows)
        assert totals == sorted(sum(lengths[i] for i in row) for row in best_fit(lengths, 40))


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_batches_do_not_depend_on_hosts_or_on_where_a_run_resumed(stores: dict[str, ExampleStore], kind: str) -> None:
    batches = packed(stores[kind])
    whole = [batches[step] for step in range(40)]  # More than one epoch.
    assert batches.rows_per_epoch < 40 * 4
    for count in (1, 2, 4):
        for step in (0, 17, 39):
            parts = [packed(stores[kind]).batch(step, i, count) for i in range(count)]
            assert equal(joined(*parts), whole[step])
    for start in (0, 1, 23):
        again = packed(stores[kind])
        read = again.loader(start, 0, 1, threads=2)
        assert all(equal(batch, whole[start + n]) for n, batch in zip(range(8), read, strict=False))
    with pytest.raises(InputError, match="does not divide by 3 processes"):
        batches.batch(0, 0, 3)


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_feed_places_batches_on_a_mesh(stores: dict[str, ExampleStore], kind: str) -> None:
    """The loop's source of batches, over eight devices."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    batches = packed(stores[kind])
    feed = Feed(batches, 5, mesh)
    for step in (5, 6):
        placed = feed[step]
        assert isinstance(jax.tree.leaves(placed)[0], jax.Array)
        assert equal(jax.device_get(placed), batches[step])
    with pytest.raises(ValueError, match="the next step is 7"):
        feed[9]


def test_pairs_carry_references_and_margins_at_last_tokens(stores: dict[str, ExampleStore]) -> None:
    """What stands at the last token of a segment is the pair's own; everywhere else is 0."""
    store = stores["pairs"]
    rng = np.random.default_rng(SEED)
    references = rng.normal(size=(len(store), 2)).astype(np.float32)
    batches = PackedPairs(store, RowConfig(LENGTH, 4, seed=3, epochs=1), references=references)
    known = {tuple(a.ids.tolist()): (i, side) for i in range(len(store)) for side, a in enumerate(store.answers(i))}
    for step in range(len(batches)):
        batch = batches[step]
        reference_BT, margin_BT = np.zeros((2, 4, LENGTH), np.float32)
        for b, row in enumerate(segments(batch.batch)):
            end = 0
            for ids, _, _ in row:
                end += len(ids)
                i, side = known[tuple(ids)]
                reference_BT[b, end - 1] = references[i, side]
                margin_BT[b, end - 1] = store.margins[i] * (side == 0)
        np.testing.assert_array_equal(batch.reference_BT, reference_BT)
        np.testing.assert_array_equal(batch.margin_BT, margin_BT)
        assert batch.margin_BT.dtype == batch.reference_BT.dtype == np.float32
    assert not PackedPairs(store, RowConfig(LENGTH, 4))[0].reference_BT.any()


def test_truncated_examples_are_beginnings(stores: dict[str, ExampleStore]) -> None:
    batches = packed(stores["sft"], length=24, epochs=1, too_long="truncate")
    assert batches.selection.truncated
    beginnings = {tuple(stores["sft"].answers(i)[0].ids[:24].tolist()) for i in batches.selection.units.tolist()}
    found = [tuple(ids) for step in range(len(batches)) for row in segments(batches[step]) for ids, _, _ in row]
    assert sorted(found) == sorted(beginnings)


def test_the_last_batch_is_filled_with_empty_rows(stores: dict[str, ExampleStore]) -> None:
    batches = packed(stores["sft"], epochs=1, batch_size=7)
    assert len(batches) == -(-batches.rows_per_epoch // 7)
    last = batches[len(batches) - 1]
    used = batches.rows_per_epoch - 7 * (len(batches) - 1)
    assert (last.segment_ids.max(axis=1) > 0).tolist() == [True] * used + [False] * (7 - used)
    with pytest.raises(InputError, match="without end"):
        len(packed(stores["sft"]))


def test_resume_is_refused_where_batches_would_differ(stores: dict[str, ExampleStore]) -> None:
    """A record survives JSON; anything that changes past batches is named; more epochs are welcome."""
    batches = packed(stores["sft"], epochs=1)
    saved = json.loads(json.dumps(batches.record()))
    batches.check_resume(saved, 3)
    assert batches.fingerprint() == packed(stores["sft"], epochs=1).fingerprint() != packed(stores["sft"]).fingerprint()
    packed(stores["sft"], epochs=2).check_resume(saved, 3)
    packed(stores["sft"], epochs=2).check_resume({**saved, "epochs": 2}, len(batches) + 1)
    for change, name in (
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"length": 60}, "length was 64 and is now 60"),
        ({"batch_size": 2}, "batch_size was 4"),
        ({"max_segments": 3}, "max_segments was None"),
        ({"too_long": "truncate"}, "too_long was 'drop'"),
    ):
        other = packed(stores["sft"], epochs=1, **change)
        other.check_resume(saved, 0)
        with pytest.raises(InputError, match=name):
            other.check_resume(saved, 3)
    with pytest.raises(InputError, match="the fingerprint of files"):
        packed(stores["sft"], epochs=1).check_resume({**saved, "store": "x"}, 3)
    with pytest.raises(InputError, match="epochs was 2 and is now 1"):
        batches.check_resume({**saved, "epochs": 2}, len(batches) + 1)


def test_bad_settings(stores: dict[str, ExampleStore]) -> None:
    with pytest.raises(InputError, match="expected data of the kind pairs, got sft"):
        PackedPairs(stores["sft"], RowConfig(LENGTH, 4))
    with pytest.raises(InputError, match="max_segments must be at least 2"):
        PackedPairs(stores["pairs"], RowConfig(LENGTH, 4, max_segments=1))
    for name, value in (("length", 1), ("batch_size", 0), ("seed", -1), ("epochs", 0), ("max_segments", 0)):
        with pytest.raises(InputError, match=f"{name} must be at least"):
            dataclasses.replace(RowConfig(LENGTH, 4), **{name: value})
    with pytest.raises(InputError, match="the example has"):
        packed(stores["sft"], length=24, too_long="error")


def test_description(stores: dict[str, ExampleStore]) -> None:
    text = packed(stores["pairs"], length=40).describe()
    assert f"{NUM} pairs of" in text
    assert "are left out because they are longer than the row" in text
    assert "% full" in text
    assert Path(stores["pairs"].info.files[0]).name in text
