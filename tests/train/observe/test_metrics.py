"""The log of a run: what it holds, strict JSON, and what a crash does to it."""

import json
import logging
import math
from pathlib import Path

import pytest

from train.data.rows import PackedRows
from train.observe.metrics import MetricsLog, read_log


def test_the_log_has_the_loss_of_each_held_out_data_set_and_of_all_tokens(watched, material):
    held_out = [r for r in read_log(watched.output / "metrics.jsonl") if "held_out_loss" in r]
    assert [r["step"] for r in held_out] == [0, 2, 4, 6, 8, 10, 12, 13]
    # Every token counts the same: code has more than twice the rows of web.
    weights = {}
    for name in ("web", "code"):
        rows = PackedRows(material / name)
        ids = rows.take(range(len(rows))).segment_ids
        weights[name] = int(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)).sum())
    for record in held_out:
        mean = sum(weights[n] * record[f"held_out_{n}_loss"] for n in weights) / sum(weights.values())
        assert record["held_out_loss"] == pytest.approx(mean, rel=1e-5)
    last = held_out[-1]
    line = f"step 13: held-out loss {last['held_out_loss']:.3f} (web {last['held_out_web_loss']:.3f}, code "
    assert line in watched.text


def test_a_resumed_log_drops_the_steps_that_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 5):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # A killed process.
    resumed = MetricsLog(path, resume_step=2)
    resumed.write({"step": 3, "loss": 30.0})
    resumed.close()
    assert [(r["step"], r["loss"]) for r in read_log(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 512, b'{"step": 2, "lo', b"hello", b"[2]", b'{"loss": 1.0}', b"\xff\xfe"]
)
def test_a_damaged_line_costs_nothing_else_and_one_sentence(tmp_path, caplog, damage):
    """In the middle and at the end, when the log is read and when a run resumes."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.5}\n' + damage + b'\n{"step": 3, "loss": 3.5}\n' + damage)
    with caplog.at_level(logging.WARNING):
        assert read_log(path) == [{"step": 1, "loss": 1.5}, {"step": 3, "loss": 3.5}]
    expected = f"{path}: skipped 2 damaged lines (2, 4). A crash may leave such lines."
    assert [record.getMessage() for record in caplog.records] == ([expected] if damage else [])
    caplog.clear()
    MetricsLog(path, 3).close()
    assert len(caplog.records) == bool(damage)
    caplog.clear()
    assert len(read_log(path)) == 2
    assert not caplog.records
    assert path.read_text() == '{"step": 1, "loss": 1.5}\n{"step": 3, "loss": 3.5}\n'


def test_a_record_behind_zero_bytes_is_read(tmp_path):
    """A machine that lost power leaves zero bytes, and the next launch of an older version wrote behind them."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(bytes(300) + b'{"step": 3}\n')
    assert read_log(path) == [{"step": 3}]


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def test_the_log_is_strict_json(tmp_path: Path) -> None:
    """Numbers that are not finite are null, and NaN for whoever reads the log; all others come back exactly."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1, "loss": 0.1 + 0.2, "grad_norm": 1e300})
    log.write({"step": 2, "loss": math.nan, "grad_norm": math.inf, "z": -math.inf})
    log.close()
    first, second = (json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines())
    assert first == {"step": 1, "loss": 0.1 + 0.2, "grad_norm": 1e300}
    assert second == {"step": 2, "loss": None, "grad_norm": None, "z": None}
    assert read_log(path)[0] == first
    assert all(math.isnan(value) for name, value in read_log(path)[1].items() if name != "step")
    # A log of an earlier version becomes strict when the run resumes.
    path.write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity}\n')
    MetricsLog(path, 1).close()
    assert json.loads(path.read_text(), parse_constant=_refuse) == {"step": 1, "loss": None, "grad_norm": None}
