"""Several processes train the runs of a sweep, and share out what is compiled."""

import dataclasses
from pathlib import Path

import pytest

from tests.helpers.runs import MODEL
from tests.train.scaling.fake_runs import FakeTrainer, base, sweep
from train.scaling.run_sweep import read_results, run_sweep
from train.workers import _Queue


def test_two_workers_train_all_runs_once_and_go_on_in_the_next_round(tmp_path: Path) -> None:
    """The table is that of one process; a run that cannot start, or a signal, ends the sweep."""
    asked = sweep(design="sequential", sizes={"one": MODEL}, tokens=(32_000,), learning_rates=(5e-4, 1e-3, 2e-3))
    said: list[str] = []
    run_sweep(asked, tmp_path / "two", FakeTrainer(), workers=2, say=said.append)
    whole = FakeTrainer()
    run_sweep(asked, tmp_path / "one", whole)
    assert sorted(line.split(":")[0] for line in said) == sorted(whole.trained)
    assert read_results(tmp_path / "two") == read_results(tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").glob("worker-*.txt")} == {"worker-0.txt", "worker-1.txt"}
    with pytest.raises(SystemExit) as stopped:
        run_sweep(asked, tmp_path / "stopped", FakeTrainer(stop_after=2), workers=2)
    assert stopped.value.code == 128 + 15


def test_runs_of_one_shape_go_to_one_worker_until_others_are_idle() -> None:
    """No shape is compiled twice while another one is left that nobody has compiled; every run is given once."""
    configs = [
        dataclasses.replace(run, output=f"{width}-{rows}-{number}")
        for width in (1, 2)
        for rows in (4, 8)
        for number in range(3)
        for run in [base(model=dataclasses.replace(MODEL, num_layers=width))]
        for run in [dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], batch_size=rows),))]
    ]
    queue, first, second = _Queue(configs, {}), object(), object()
    taken: dict[object, list[str]] = {first: [], second: []}
    while queue:
        for worker in (first, second):
            if config := queue.take(worker):  # type: ignore[arg-type]
                taken[worker].append(config.output)
    assert sorted(taken[first] + taken[second]) == sorted(config.output for config in configs)
    shapes = [{name.rsplit("-", 1)[0] for name in names} for names in taken.values()]
    assert not shapes[0] & shapes[1]
    # The longest shape is first.
    assert taken[first][0].startswith("2-")
