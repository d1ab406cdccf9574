"""Several processes train the runs of a sweep, and share out what is compiled."""

import dataclasses
from pathlib import Path

from tests.helpers.runs import MODEL, make_material
from tests.train.scaling.fake_runs import base, sweep
from train.scaling.run_sweep import read_results, run_sweep
from train.workers import _Queue


def test_two_workers_train_all_runs_also_one_that_diverges(tmp_path: Path) -> None:
    make_material(tmp_path / "m")
    asked = sweep(
        base=base(tmp_path / "m"), sizes={"one": MODEL}, tokens=(640,), learning_rates=(1e-3, 1e30), batches=(64,)
    )
    said: list[str] = []
    run_sweep(asked, tmp_path / "two", workers=2, say=said.append)
    rows = read_results(tmp_path / "two")
    assert [row["status"] for row in rows] == ["ok", "diverged"]
    assert 0 < rows[0]["loss"] < 10
    assert sorted(line.split(": ")[1].split()[0] for line in said) == ["diverged", "held"]
    assert (tmp_path / "two" / "worker-1.txt").exists()


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
