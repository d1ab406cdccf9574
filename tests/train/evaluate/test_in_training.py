"""Benchmarks in training: they change nothing that is learned, end in time, and are those of the checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

import convert
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine
from qwen_jax.inference.likelihood import LikelihoodScorer
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import init_params
from qwen_jax.tokenizer import load_tokenizer
from tests.helpers.runs import assert_same_weights, configuration, numbers, print_seed, stop_after
from tests.helpers.small_tasks import Choice, Judged, Written, measured, write_lines
from train import run
from train.evaluate import in_training, registry
from train.evaluate import run as benchmarks
from train.evaluate.encoding import RequestEncoder
from train.evaluate.in_training import TaskEvaluation
from train.evaluate.token_model import TokenModel
from train.observe.plots import plot_folder
from train.observe.trackers import tags


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {task.name: task for task in (Choice(), Written(), Judged())}
    monkeypatch.setattr(registry, "tasks", lambda: found)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_lines(tmp_path, print_seed())
    return tmp_path


def test_a_run_learns_the_same_and_its_scores_are_those_of_its_checkpoint(
    material: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, watched = data / "plain", data / "watched"
    tasks = TaskEvaluation(("choice", "written"), every=4, limit=8, items_at_a_time=3, data_root=str(data), max_seqs=4)
    plain_config = configuration(material, plain, mesh={"data": 2})
    plain_config = dataclasses.replace(plain_config, stages=plain_config.stages[:1])
    config = dataclasses.replace(plain_config, output=str(watched), tasks=tasks)
    assert not run.pretrain(plain_config)
    # It is also interrupted.
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert run.pretrain(config)
    assert not run.pretrain(config)
    assert numbers(watched) == numbers(plain)
    assert_same_weights(watched, plain, 6)
    # Before the first step, every four, and at the end, each once.
    found = measured(watched)
    assert sorted(found) == [0, 4, 6]
    assert all(one["task/choice/items"] == one["task/written/items"] == 8 for one in found.values())
    assert found[0]["task/choice/logprob"] != found[6]["task/choice/logprob"]
    # The checkpoint, evaluated by itself.
    mesh, tokenizer = make_mesh(), load_tokenizer(material / "tokenizer")
    folder = watched / "checkpoints" / "6"
    model, params = convert.load(folder, mesh, "float32", Options(stacked=False))
    scorer = LikelihoodScorer(model, convert.load(folder, mesh, "float32")[1], mesh, dtype="float32")
    with ContinuousEngine(
        model, params, mesh, tokenizer=tokenizer, dtype="float32", max_seqs=4, num_pages=64
    ) as engine:
        checkpoint = TokenModel("checkpoint", RequestEncoder(tokenizer, model.context_length), scorer, engine)
        summary: dict[str, Any] = benchmarks.run(
            checkpoint, [Choice(), Written()], data / "results", benchmarks.RunOptions(data, limit=8)
        )
    for name, metric in (("choice", "accuracy"), ("choice", "logprob"), ("written", "vowels")):
        want = summary["tasks"][name]["metrics"][metric]["value"]
        assert found[6][f"task/{name}/{metric}"] == pytest.approx(want, rel=1e-5)
    # Curves beside the loss.
    assert tags({"step": 3, "task/choice/accuracy": 0.5}) == {"task/choice/accuracy": 0.5}
    assert plot_folder(watched).is_file()
    assert json.loads((watched / "launches.jsonl").read_text().splitlines()[0])["config"]["tasks"]["every"] == 4


def test_a_measurement_ends_in_its_time_and_says_how_many_items_it_did(
    material: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which every three items of a task take 10 seconds."""
    now = [0.0]
    monkeypatch.setattr(in_training.time, "monotonic", lambda: now[0])
    asked = in_training.ask

    def slow(*arguments: Any, **named: Any) -> Any:
        now[0] += 10
        return asked(*arguments, **named)

    monkeypatch.setattr(in_training, "ask", slow)
    tokenizer = load_tokenizer(material / "tokenizer")
    config = configuration(material, data / "run")
    mesh = make_mesh({"fsdp": 2, "data": 2})
    with jax.set_mesh(mesh):
        weights = init_params(config.model, jax.random.key(0), mesh)
    for seconds, want in ((1.0, 3), (35.0, 9), (100.0, 12)):
        tasks = TaskEvaluation(("choice",), every=1, seconds=seconds, items_at_a_time=3, data_root=str(data))
        opened = in_training.OpenedTasks(tasks, tokenizer)
        measure = opened.measure_on(config.model, config.step, mesh, print)
        begin = now[0]
        assert measure(weights)["task/choice/items"] == want
        assert now[0] - begin <= max(seconds, 10)


def test_scores_do_not_depend_on_the_mesh(material: Path, data: Path) -> None:
    """On a context axis too, whose devices score different texts."""
    tokenizer, config = load_tokenizer(material / "tokenizer"), configuration(material, data / "run")
    opened = in_training.OpenedTasks(TaskEvaluation(("choice", "written"), every=1, data_root=str(data)), tokenizer)
    found = []
    for axes in ({}, {"fsdp": 2, "context": 2}):
        mesh = make_mesh(axes)
        with jax.set_mesh(mesh):
            weights = init_params(config.model, jax.random.key(0), mesh)
        found.append(opened.measure_on(config.model, config.step, mesh, print)(weights))
    opened.close()
    assert found[0].keys() == found[1].keys()
    for name in ("task/choice/logprob", "task/written/vowels", "task/written/items"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)


def test_what_cannot_be_measured_is_an_error_before_training(material: Path, data: Path) -> None:
    for change, message in (
        ({"tasks": ("choise",)}, "no task 'choise'. Similar ones: choice"),
        ({"tasks": ("judged",)}, "needs a judge"),
        ({"data_root": str(data / "nowhere")}, "cannot be run"),
        ({"data_root": None}, "Say below which folder"),
    ):
        tasks = dataclasses.replace(TaskEvaluation(("choice",), every=4, data_root=str(data)), **change)
        with pytest.raises(InputError, match=message):
            run.pretrain(configuration(material, data / "run", tasks=tasks))
    assert not (data / "run" / "checkpoints").exists()
    for wrong in ({"every": 0}, {"limit": 0}, {"seconds": 0.0}, {"seconds": float("nan")}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            TaskEvaluation(("choice",), **{"every": 1, **wrong})  # type: ignore[arg-type]
