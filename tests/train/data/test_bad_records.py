"""Lists of bad records: on the disk as they are found, in order, and complete or not there."""

import json
import tracemalloc
from pathlib import Path

from tests.helpers.runs import print_seed
from train.data.bad_records import BadRecords, join


def peak_of(path: Path, count: int) -> int:
    tracemalloc.start()
    with BadRecords(path) as bad:
        for i in range(count):
            bad.add({"line": i, "reason": "a" * 1000})
        bad.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    """A list of 10 MB needs less memory than a hundredth of it beyond that of one entry."""
    one = peak_of(tmp_path / "one.jsonl", 1)
    assert peak_of(tmp_path / "many.jsonl", 10_000) < one + 100_000
    assert (tmp_path / "many.jsonl").stat().st_size > 10_000_000


def test_lists_of_units_become_one(tmp_path: Path) -> None:
    """All entries in the order of units, the first three for the error message; units without a list have none."""
    rng = print_seed()
    expected = []
    for unit in range(6):
        with BadRecords(tmp_path / f"{unit}.jsonl") as bad:
            for i in range(int(rng.integers(0, 3))):
                bad.add([i, "ré\n"])
                expected.append({"unit": unit, "at": [i, "ré\n"]})
            bad.finish()
    parts = ((tmp_path / f"{unit}.jsonl", lambda entry, unit=unit: {"unit": unit, "at": entry}) for unit in range(6))
    assert join(tmp_path / "all.jsonl", parts) == expected[:3]
    found = (tmp_path / "all.jsonl").read_text().splitlines() if expected else []
    assert [json.loads(line) for line in found] == expected


def test_a_list_that_is_not_complete_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("an earlier one")
    with BadRecords(path) as bad:
        bad.add([1])
    assert [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]
    assert path.read_text() == "an earlier one"
    # Without an entry there is no list, and none of an earlier run.
    with BadRecords(path) as bad:
        bad.finish()
    assert not list(tmp_path.iterdir())
