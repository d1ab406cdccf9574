"""Runs of an MoE model: exact resume, another mesh in each stage, and a start from a dense model."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import convert
from convert.upcycle import Recipe, upcycle
from qwen_jax.config import MoE, load_config
from qwen_jax.errors import InputError
from tests.helpers.runs import MODEL, assert_same_weights, configuration, numbers, stop_after
from train import run
from train.config import RunConfig, set_fields
from train.moe import read_loads
from train.observe.metrics import read_log

EXPERTS = MoE(4, 2, 64, 128, norm_topk_prob=True, mlp_only_layers=(0,))
SPARSE = dataclasses.replace(MODEL, num_layers=2, moe=EXPERTS)


def sparse(material: Path, output: Path, **changes: Any) -> RunConfig:
    return configuration(material, output, model=SPARSE, **changes)


@pytest.fixture(scope="module")
def straight(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert not run.pretrain(sparse(material, output))
    return output


def stopped(config: RunConfig, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        assert run.pretrain(config)


def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(
    material: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, config = tmp_path / "run", sparse(material, tmp_path / "run")
    stopped(config, 4, monkeypatch)
    assert not run.pretrain(config)
    assert numbers(output) == numbers(straight)
    assert_same_weights(output, straight)
    for a, b in zip(read_loads(output / "experts.jsonl"), read_loads(straight / "experts.jsonl"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_leaves_loads_a_picture_and_a_model(straight: Path, tmp_path: Path) -> None:
    steps, loads, layers = read_loads(straight / "experts.jsonl")
    assert steps.tolist() == list(range(1, 11))
    assert loads.shape == (10, 1, 4)
    assert layers == [1]
    assert (straight / "experts.png").is_file()
    records = [r for r in read_log(straight / "metrics.jsonl") if "loss" in r]
    assert all({"balance_loss", "load_max", "router_entropy", "dropped"} <= r.keys() for r in records)
    assert not any("expert_load" in r for r in records)
    convert(straight / "checkpoints", tmp_path / "hf", to="hf")
    assert load_config(tmp_path / "hf").moe == EXPERTS


def test_it_resumes_with_experts_on_several_devices_and_on_one_again(
    material: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, config = tmp_path / "run", sparse(material, tmp_path / "run")
    stopped(config, 4, monkeypatch)
    run.pretrain(set_fields(config, "mesh.expert=4", "stages.1.accumulation=1", "stages.1.mesh.expert=2"))
    # float32 sums in another order.
    for a, b in zip(numbers(output), numbers(straight), strict=True):
        np.testing.assert_allclose([x or 0 for x in a], [x or 0 for x in b], rtol=1e-3)


def test_a_run_begins_with_an_upcycled_model_and_not_with_a_dense_one(material: Path, tmp_path: Path) -> None:
    dense = configuration(material, tmp_path / "dense", model=dataclasses.replace(SPARSE, moe=None))
    run.pretrain(dense)
    trained = tmp_path / "dense" / "checkpoints" / "10"
    with pytest.raises(InputError, match=r"moe is None there.*`qwen-jax upcycle` makes an MoE model"):
        run.pretrain(sparse(material, tmp_path / "run", initial=str(trained)))
    assert not (tmp_path / "run").exists()
    made = upcycle(trained, tmp_path / "start", Recipe(EXPERTS, reinit=0.0), to="orbax")
    assert made.preserves
    # With the RoPE base that the dense run ended with.
    stages = tuple(dataclasses.replace(stage, rope_theta=1e6) for stage in dense.stages)
    run.pretrain(sparse(material, tmp_path / "run", initial=str(tmp_path / "start"), stages=stages))
    held_out = [r["held_out_loss"] for r in read_log(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in r]
    before = [r["held_out_loss"] for r in read_log(tmp_path / "dense" / "metrics.jsonl") if "held_out_loss" in r]
    np.testing.assert_allclose(held_out[0], before[-1], rtol=1e-5)
    with pytest.raises(InputError, match="do not fit the model of this run: moe is"):
        run.pretrain(configuration(material, tmp_path / "no", model=dense.model, initial=str(tmp_path / "start")))
