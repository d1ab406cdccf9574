"""Several processes train the runs of a sweep, and share out what is compiled, and the GPUs."""

import dataclasses
import os
from pathlib import Path

import pytest

from tests.helpers.runs import MODEL
from tests.train.scaling.fake_runs import FakeTrainer, base, sweep
from train.config import RunConfig
from train.scaling.run_sweep import read_results, run_sweep
from train.workers import _Queue, gpus, variables


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


@pytest.mark.parametrize("memory", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", None])
@pytest.mark.parametrize("cards", [0, 1, 2, 3])
def test_workers_share_out_the_gpus_and_their_memory(
    memory: str | None, cards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has one GPU; no GPU has many more than another; those of a GPU reserve no more than one process would."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    if memory:
        monkeypatch.setenv(memory, "0.7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ", ".join(f"GPU-{i}" for i in range(cards)))
    found = gpus()
    assert found == [f"GPU-{i}" for i in range(cards)]
    for count in range(2, 9):
        each = [variables(number, count, found) for number in range(count)]
        used = [values.pop("CUDA_VISIBLE_DEVICES", "all") for values in each]
        numbers = [used.count(gpu) for gpu in (found if cards > 1 else ["all"])]
        assert sum(numbers) == count
        assert max(numbers) - min(numbers) <= 1
        # JAX does not start with both variables.
        assert all(list(values) == [memory or "XLA_CLIENT_MEM_FRACTION"] for values in each)
        share = {float(value) for values in each for value in values.values()}
        assert len(share) == 1
        assert (
            (0.7 if memory else 0.9) * 0.8 / max(numbers)
            < share.pop()
            <= (0.7 if memory else 0.9) / max(numbers) + 1e-3
        )


def test_gpus_are_counted_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia3", "nvidia7", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr("train.workers.Path", lambda _: tmp_path)
    assert gpus() == ["0", "1"]


class SeenDevices(FakeTrainer):
    """Writes which GPUs the process of a run may use."""

    def __call__(self, config: RunConfig) -> int:
        stopped = super().__call__(config)
        (Path(config.output) / "devices.txt").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return stopped


@pytest.mark.parametrize("mesh", [{}, {"data": 2}], ids=["one device a run", "two devices a run"])
def test_a_worker_has_one_gpu_unless_its_runs_need_more(
    mesh: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the environment of this process stays as it was."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    before = dict(os.environ)
    run_sweep(sweep(base=base(mesh=mesh), sizes={"one": MODEL}), tmp_path, SeenDevices(), workers=2)
    assert dict(os.environ) == before
    seen = {path.read_text() for path in tmp_path.rglob("devices.txt")}
    assert seen == ({"4,6"} if mesh else {"4", "6"})
