"""The table of plans: what it calls unexpected, and that its results are those of its rows."""

import json
import math
from typing import Any

import pytest

from experiments.plans.table import ROWS, line, result_file, unexpected_gathers
from qwen_jax.published import published
from train.observe.metrics import flops_per_token


def _plan(*gathers: str, **mesh: int) -> dict[str, Any]:
    options = {"batch_size": 16, "accumulation": 2, "length": 4096}
    return {"mesh": mesh, "options": options, "gathers": dict.fromkeys(gathers, 1)}


def test_a_matrix_of_one_layer_and_the_head_are_expected_and_all_layers_together_are_not() -> None:
    model = published("qwen2.5-7b")
    fine = (
        "bf16[1,18944,3584]",
        "bf16[152064,3584]",
        "bf16[3584,28,128]",
        "bf16[4,128,3584]",
        "s32[2,8,4096]",
        "bf16[28,128]",
    )
    assert unexpected_gathers(_plan(*fine, fsdp=8), model) == []
    assert unexpected_gathers(_plan("bf16[9472,3584]", "bf16[76032,3584]", fsdp=4, tensor=2), model) == []
    # Keys of the rows of one device: 16 rows in 2 parts over 4.
    assert unexpected_gathers(_plan("bf16[2,4096,4,128]", fsdp=4, context=2), model) == []
    # The router of a layer, which a tensor axis does not split, and a quarter of its experts' matrices.
    experts = published("qwen2-57b-a14b")
    assert unexpected_gathers(_plan("bf16[1,64,3584]", "bf16[64,2,640,3584]", fsdp=8, tensor=4), experts) == []
    assert unexpected_gathers(_plan("bf16[28,64,3584]", fsdp=8, tensor=4), experts) == ["bf16[28,64,3584]"]
    # All layers; the head over the tensor axis too; logits of a row.
    wrong = ["bf16[28,18944,3584]", "bf16[152064,3584]", "f32[4096,152064]"]
    assert unexpected_gathers(_plan(*wrong, fsdp=4, tensor=2), model) == wrong


@pytest.mark.parametrize("name", ROWS)
def test_a_result_is_that_of_its_row(name: str) -> None:
    """Fits, gathers nothing unexpected, and was made from the row as it is."""
    if not result_file(name).exists():
        pytest.skip("not run yet")
    row, result = ROWS[name], json.loads(result_file(name).read_text())
    plan, stage = result["plan"], row.config.stages[row.stage]
    assert plan["fits"]
    assert 0 < plan["hbm_bytes"] <= plan["hbm_limit_bytes"]
    assert result["unexpected_gathers"] == unexpected_gathers(plan, row.config.model) == []
    # Seven matrices of each layer are gathered, forward and backward; a compiler may also write a gather as a sum.
    step = row.config.step_config(row.stage)
    assert sum(plan["gathers"].values()) >= 2 * 7 * row.config.model.num_layers * step.accumulation
    assert (plan["topology"], plan["num_slices"], plan["mesh"]) == (
        row.topology,
        row.num_slices,
        dict(row.config.mesh_axes(row.stage)),
    )
    options = {"stage": row.stage + 1, "batch_size": stage.batch_size, "length": stage.length}
    assert plan["options"] == {**options, "accumulation": step.accumulation, "remat": step.remat}
    tokens = stage.batch_size * stage.length
    assert math.isclose(plan["model_flops_per_step"], tokens * flops_per_token(row.config.model, stage.length))
    assert line(result) in (result_file(name).parents[1] / "README.md").read_text()
