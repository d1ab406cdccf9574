"""Plans of tuning runs: each objective, LoRA, online merging, and where the architecture comes from."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest

from qwen_jax.cli import main
from qwen_jax.errors import InputError
from qwen_jax.lora import LoRA
from qwen_jax.published import published
from tests.helpers.tpu_compiler import needs_libtpu
from train.data.batch import Batch
from train.data.pairs import PairBatch
from train.dpo import Dpo, DpoConfig
from train.merging import Merging
from train.plan.of_run import stages_of
from train.plan.stage import Plan, describe, plan_stage
from train.plan.topology import mesh_of, target
from train.pretrain import NextToken, PretrainConfig
from train.reward import Reward, RewardConfig
from train.step import StepConfig
from train.tune_config import ObjectiveConfig, TuneConfig, TuneStage

_MODEL = dataclasses.replace(published("tiny"), num_layers=2, vocab_size=4096)
_SFT = TuneConfig("out", "model", {"chats": "none.jsonl"}, PretrainConfig(), (TuneStage(length=128, batch_size=8),))
_RUNS = {
    "sft": _SFT,
    "lora": dataclasses.replace(_SFT, step=StepConfig(lora=LoRA(rank=2))),
    "dpo": dataclasses.replace(_SFT, objective=DpoConfig()),
    "merging": dataclasses.replace(_SFT, objective=DpoConfig(), merging=Merging.released(), base="base"),
    "reward lora": dataclasses.replace(_SFT, objective=RewardConfig(), step=StepConfig(lora=LoRA(rank=2))),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    where = target("v5e:2x2")
    return {name: plan_stage(stages_of(run, _MODEL)[0], where) for name, run in _RUNS.items()}


@needs_libtpu
def test_memory_has_a_part_for_what_is_trained_and_one_for_what_is_frozen(plans: dict[str, Plan]) -> None:
    full, lora, dpo, merging = (plans[name] for name in ("sft", "lora", "dpo", "merging"))
    weights = _MODEL.num_params()["total"]
    assert all(plan.fits for plan in plans.values())
    # Float32 weights and two moments, over four devices; norms and biases are on each.
    for plan in (full, dpo):
        assert weights <= plan.weights_bytes < 1.05 * weights
        assert (plan.moments_bytes - 4) == 2 * plan.weights_bytes
        assert plan.frozen_bytes == 0
    # Tau is as large as the weights.
    assert merging.weights_bytes == dpo.weights_bytes
    assert dpo.weights_bytes <= merging.moments_bytes - dpo.moments_bytes <= dpo.weights_bytes + 4
    # All weights in bfloat16, and the moments of the adapter alone.
    for plan in (lora, plans["reward lora"]):
        assert 2 * plan.frozen_bytes == full.weights_bytes
        assert plan.moments_bytes < 0.1 * full.moments_bytes
    assert lora.hbm_bytes < full.hbm_bytes
    assert lora.flops_per_step < full.flops_per_step
    assert "frozen weights" in describe(lora)
    assert "frozen weights" not in describe(full)


@needs_libtpu
def test_a_loss_that_skips_tokens_is_counted_as_if_all_were_trained(plans: dict[str, Plan]) -> None:
    """Head and layers, without recomputation of the head: at least the model's formula, and not far above it."""
    for name in ("sft", "dpo"):
        plan = plans[name]
        assert 1.0 <= plan.flops_per_step / plan.model_flops_per_step < 1.6, name
    # The loss of the reward model has no head of the vocabulary's size.
    assert plans["reward lora"].flops_per_step < 0.5 * plans["lora"].flops_per_step


@pytest.mark.parametrize(
    ("config", "objective", "batch"),
    [(PretrainConfig(), NextToken, Batch), (DpoConfig(), Dpo, PairBatch), (RewardConfig(), Reward, PairBatch)],
)
def test_a_stage_has_the_objective_and_the_batch_of_the_run(
    config: ObjectiveConfig, objective: type, batch: type
) -> None:
    mesh = mesh_of(target("v5e:2x2"), {"fsdp": 4})
    (stage,) = stages_of(dataclasses.replace(_SFT, objective=config), _MODEL)
    assert isinstance(stage.objective, objective)
    assert isinstance(stage.batch(mesh), batch)
    if objective is NextToken:
        assert stage.objective.config.compact_loss  # type: ignore[attr-defined]
    else:
        assert stage.objective.config.max_segments == 128  # type: ignore[attr-defined]
    assert (stage.objective.model.score is not None) == (objective is Reward)
    with pytest.raises(InputError, match="is a reward model") if objective is not Reward else contextlib.nullcontext():
        stages_of(dataclasses.replace(_SFT, objective=config), dataclasses.replace(_MODEL, score="linear"))


_FILE = """
from train.pretrain import PretrainConfig
from train.tune_config import TuneConfig, TuneStage


def config() -> TuneConfig:
    return TuneConfig("out", {model!r}, {{"a": "none"}}, PretrainConfig(), (TuneStage(length=64, batch_size=8),) * 2)
"""


@needs_libtpu
def test_the_command_reads_only_the_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "model", tmp_path / "run.py"
    file.write_text(_FILE.format(model=str(folder)))
    command = ["plan", "--config", str(file), "--topology", "v5e:2x2", "--json"]
    assert main(command) == 1
    assert "--model SIZE" in capsys.readouterr().err
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_MODEL.to_hf()))
    assert main(command) == 0
    (from_folder,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert os.listdir(folder) == ["config.json"]
    file.write_text(_FILE.format(model="nowhere/else"))
    assert main([*command, "--model", "tiny"]) == 0
    (from_name,) = map(json.loads, capsys.readouterr().out.splitlines())
    # The vocabulary is 512 instead of 4,096.
    assert from_name["weights_bytes"] < from_folder["weights_bytes"]
    assert from_name["options"] == from_folder["options"]
