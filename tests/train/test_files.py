"""Files of a run: whole or not at all, strict JSON, names of any length."""

import json
import logging
import math
import os
from pathlib import Path

import pytest

from qwen_jax.files import to_json
from train.files import append_record, read_records, temporary_name, write_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["a", "x" * 255, "ü" * 127, "🙂" * 63])
def test_a_temporary_name_fits_wherever_the_name_does(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert temporary_name(tmp_path / name).name.startswith(".")
    assert len(os.fsencode(temporary_name(tmp_path / name).name)) <= 255


def test_json_has_no_numbers_that_are_not_finite() -> None:
    value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": "NaN"}, "e": None, "f": True, "g": 10**30}
    expected = {"a": [None, [None, 1.5]], "b": {"c": None, "d": "NaN"}, "e": None, "f": True, "g": 10**30}
    assert json.loads(to_json(value)) == expected
    assert json.loads(to_json(value, indent=2)) == expected
    assert to_json({"a": 0.1}) == '{"a": 0.1}'


def test_a_record_gets_a_line_of_its_own_behind_a_cut_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    append_record(path, {"step": 1})
    append_record(path, {"step": 2})
    path.write_bytes(path.read_bytes()[:-4] + bytes(20))
    append_record(path, {"step": 3, "loss": math.nan})
    with caplog.at_level(logging.WARNING):
        assert read_records(path, "step") == [{"step": 1}, {"step": 3, "loss": None}]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"{path}: skipped a damaged line (2).")
    caplog.clear()
    read_records(path, "step", warn=False)
    assert not caplog.records
