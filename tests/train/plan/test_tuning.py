"""Plans of tuning runs: each objective, LoRA, online merging, and where the architecture comes from."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from qwen_jax.cli import main
from qwen_jax.cli.plan import Plan as PlanCommand
from qwen_jax.errors import InputError
from qwen_jax.lora import LoRA
from qwen_jax.published import published
from tests.helpers.tpu_compiler import needs_libtpu
from train.data.batch import Batch
from train.data.pairs import PairBatch
from train.dpo import Dpo, DpoConfig
from train.merging import Merging
from train.plan import of_run
from train.plan.of_run import stages_of
from train.plan.stage import Plan, describe, plan_stage
from train.plan.topology import mesh_of, target
from train.pretrain import PretrainConfig
from train.reward import Reward, RewardConfig
from train.sft import Sft
from train.step import StepConfig
from train.tune_config import ObjectiveConfig, TuneConfig, TuneStage

_MODEL = dataclasses.replace(published("tiny"), num_layers=2, vocab_size=4096)
_STAGES = (TuneStage(length=64, batch_size=8),)
_SFT = TuneConfig("out", "model", {"chats": "none.jsonl"}, PretrainConfig(), _STAGES, step=StepConfig(remat="full"))
_LORA = StepConfig(remat="full", lora=LoRA(rank=2))
_RUNS = {
    "sft": _SFT,
    "lora": dataclasses.replace(_SFT, step=_LORA),
    "dpo": dataclasses.replace(_SFT, objective=DpoConfig()),
    "merging": dataclasses.replace(_SFT, objective=DpoConfig(), merging=Merging.released(), base="base"),
    "reward lora": dataclasses.replace(_SFT, objective=RewardConfig(), step=_LORA),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Two of them are compiled. The others are only traced, as what cannot fit into the memory of their chip."""
    where = target("v5e:2x2")
    tiny = dataclasses.replace(where, chip=dataclasses.replace(where.chip, hbm_bytes=1))
    compiled = {"lora", "merging"}
    return {
        name: plan_stage(stages_of(run, _MODEL)[0], where if name in compiled else tiny, always_compile=False)
        for name, run in _RUNS.items()
    }


@needs_libtpu
def test_memory_has_a_part_for_what_is_trained_and_one_for_what_is_frozen(plans: dict[str, Plan]) -> None:
    full, lora, dpo, merging = (plans[name] for name in ("sft", "lora", "dpo", "merging"))
    weights = _MODEL.num_params()["total"]
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
    # What was compiled has them all, and gathers weights that are sharded.
    for plan in (lora, merging):
        assert plan.fits
        assert plan.hbm_bytes >= plan.weights_bytes + plan.moments_bytes + plan.frozen_bytes
        assert plan.collective_bytes["all-gather"] > 0
    assert lora.flops_per_step < full.flops_per_step
    assert "frozen weights" in describe(lora)
    assert "frozen weights" not in describe(full)


@needs_libtpu
def test_a_loss_that_skips_tokens_is_counted_as_if_all_were_trained(plans: dict[str, Plan]) -> None:
    """At least the model's formula. Layers are recomputed, and the head too in DPO."""
    for name in ("sft", "dpo"):
        plan = plans[name]
        assert 1.0 <= plan.flops_per_step / plan.model_flops_per_step < 1.6, name
    # The loss of the reward model has no head of the vocabulary's size.
    assert plans["reward lora"].flops_per_step < 0.5 * plans["lora"].flops_per_step


@needs_libtpu
@pytest.mark.parametrize(
    ("config", "objective", "batch"),
    [(PretrainConfig(), Sft, Batch), (DpoConfig(), Dpo, PairBatch), (RewardConfig(), Reward, PairBatch)],
)
def test_a_stage_has_the_objective_and_the_batch_of_the_run(
    config: ObjectiveConfig, objective: type, batch: type
) -> None:
    mesh = mesh_of(target("v5e:2x2"), {"fsdp": 4})
    (stage,) = stages_of(dataclasses.replace(_SFT, objective=config), _MODEL)
    assert isinstance(stage.objective, objective)
    assert isinstance(stage.batch(mesh), batch)
    if objective is Sft:
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
    # Both stages are of one kind.
    (plan,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert plan["fits"]
    assert plan["mesh"] == {"fsdp": 4}
    file.write_text(_FILE.format(model="nowhere/else"))
    options = PlanCommand(config=str(file), topology="v5e:2x2", model="Qwen2.5-7B")
    assert options._config(of_run)[1] == published("qwen2.5-7b")
