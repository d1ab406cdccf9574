"""Training with products of float8: what is not finite skips the step, and a stopped run goes on exactly."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import abstract_params
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers.quantized import with_quantization
from tests.helpers.runs import MODEL, assert_same_weights, configuration, numbers, print_seed, stop_after
from train import run
from train.config import set_fields
from train.data.batch import Batch, place
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken
from train.state import TrainState, init_state
from train.step import StepConfig, make_train_step


def test_a_step_that_is_not_finite_is_skipped(mesh: Mesh) -> None:
    """One weight that is not finite skips the step, and changes nothing but the counts; without it the step learns."""
    rng = print_seed()
    optimizer = OptimizerConfig(Schedule(10, 1e-3))
    tokens = rng.integers(0, MODEL.vocab_size, (2, 16), dtype=np.int32)
    index = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, index, np.ones_like(tokens), np.ones(tokens.shape, np.float32))
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, int(rng.integers(2**31)), mesh)
        step = make_train_step(NextToken(MODEL), optimizer, StepConfig("float32", "dots", products="fp8"), mesh)

        def after(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
            # A step donates its argument.
            return step(jax.tree.map(lambda x: x.copy(), state), place(batch, mesh))

        good, numbers = after(state)
        assert np.isfinite(numbers["loss"])
        assert numbers["skipped"] == 0
        assert after(good)[1]["loss"] < numbers["loss"]
        down = state.params["layers"]["mlp"]["down"]["weight"]
        array = np.array(down)
        array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
        lost = jax.device_put(array, down.sharding)
        mlp = {**state.params["layers"]["mlp"], "down": {"weight": lost}}
        bad = dataclasses.replace(state, params={**state.params, "layers": {**state.params["layers"], "mlp": mlp}})
        skipped, numbers = after(bad)
        assert numbers["skipped"] == 1
        jax.tree.map(np.testing.assert_array_equal, skipped.params, bad.params)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    moments: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with moments in fewer bits too. Factors are those of the step's own operands: none are saved."""

    def config(name: str) -> Any:
        config = configuration(material, tmp_path / name)
        return set_fields(
            dataclasses.replace(config, stages=config.stages[:1]), "step.products=fp8", f"optimizer.moments={moments}"
        )

    assert not run.pretrain(config("straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run.pretrain(config("stopped"))
    with pytest.raises(InputError, match=f"moments was '{moments}' and is now the default"):
        run.pretrain(set_fields(config("stopped"), "optimizer.moments=float32"))
    if moments == "8bit":
        # They are stored in units of clip_norm.
        with pytest.raises(InputError, match=r"clip_norm, which was 1 and is now 4: .* scaled by 4"):
            run.pretrain(set_fields(config("stopped"), "optimizer.clip_norm=4"))
    assert not run.pretrain(config("stopped"))
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")
    assert_same_weights(tmp_path / "stopped", tmp_path / "straight", 6)


def test_quantised_weights_are_refused() -> None:
    config = with_quantization(published("tiny"), Quantization(Scheme("int8", 0)))
    with pytest.raises(InputError, match=r"products='fp8' needs weights that are not quantised\. Use.*convert"):
        abstract_params(config, Sharding(kv_heads=2), Options(products="fp8"))
