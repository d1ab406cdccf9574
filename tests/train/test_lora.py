"""LoRA beside frozen weights: the gradients are those of the whole model, only the update is trained, on every mesh."""

import dataclasses
import functools
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from qwen_jax.config import ModelConfig, MoE
from qwen_jax.errors import InputError
from qwen_jax.lora import TARGETS, LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, abstract_params, param_specs, union, without
from qwen_jax.published import published
from qwen_jax.stack import unstack
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.forward import logits
from tests.helpers.runs import assert_same_weights, stop_after
from tests.train.test_objective import Silent
from train.data.batch import Batch, place
from train.data.packing import pack
from train.launch import Job, Phase, launch
from train.loop import CheckpointConfig
from train.objective import Metrics
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.pretrain import NextToken
from train.state import TrainState, abstract_state, init_state
from train.step import EvalStep, StepConfig, batch_gradient, make_eval_step, make_train_step

DENSE = dataclasses.replace(
    published("tiny"), vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8, num_layers=2
)
EXPERTS = dataclasses.replace(DENSE, moe=MoE(4, 2, 16, 32, mlp_only_layers=(0,)))
MODELS = {"dense": DENSE, "experts": EXPERTS}
WIDE = LoRA(rank=5, alpha=20.0, rank_stabilised=True)
OPTIMIZER = OptimizerConfig(Schedule(12, 1e-2, warmup_steps=2), AdamW(weight_decay=0.0))
STEP = StepConfig(dtype="float32")
SEED = random.SystemRandom().randrange(2**32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    print("seed", SEED)  # Shown where a test fails.


def rows(step: int = 0) -> Batch:
    rng = np.random.default_rng([SEED, step])
    batch = pack([rng.integers(0, 64, n) for n in rng.integers(4, 30, 30)], 16)
    return jax.tree.map(lambda x: x[:8], batch)


def draw(model: ModelConfig, mesh: Mesh, lora: LoRA | None) -> Params:
    """All parameters, random: B is not 0, and biases and norms are not what they begin with."""
    sharding, options, rng = Sharding.for_training(model, mesh), Options(lora=lora), np.random.default_rng(SEED)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct, spec: jax.P) -> jax.Array:
        one = 1.0 if any("norm" in str(key) for key in path) else 0.0
        return jax.device_put(np.asarray(one + rng.normal(0, 0.1, shape.shape), np.float32), NamedSharding(mesh, spec))

    shapes = abstract_params(model, sharding, options, jnp.float32)
    return jax.tree_util.tree_map_with_path(leaf, shapes, param_specs(model, sharding, options))


def lora_names(params: Params) -> list[str]:
    """Paths of the arrays of LoRA."""
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(params)]
    return [path for path in paths if "lora_" in path]


def base_of(params: Params) -> Params:
    """The parameters without those of LoRA."""
    return {
        name: base_of(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if name not in ("lora_a", "lora_b")
    }


def merged(params: Params, lora: LoRA) -> Params:
    """The plain model: each weight with its update added in float64 by NumPy."""
    found = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found[name] = merged(value, lora)
    if "lora_a" in params:
        w, a, b = (np.asarray(params[name], np.float64) for name in ("weight", "lora_a", "lora_b"))
        layers, rank = a.shape[0], a.shape[1]
        outputs = b.reshape(layers, -1, rank) @ a.reshape(layers, rank, -1)
        found["weight"] = np.asarray(w + lora.scale * outputs.reshape(w.shape), np.float32)
    return {**{name: value for name, value in base_of(params).items() if name not in found}, **found}


@pytest.mark.draw(1)
@pytest.mark.parametrize(("name", "axes"), [("dense", {"fsdp": 2, "tensor": 4}), ("experts", {})], ids=str)
def test_unmerged_equals_merged(name: str, axes: dict[str, int]) -> None:
    model, mesh = MODELS[name], make_mesh(axes)
    params, tokens = draw(model, mesh, WIDE), np.random.default_rng(SEED).integers(0, 64, (4, 12))
    got = logits(model, params, mesh, tokens, Options(lora=WIDE))
    plain = jax.device_put(merged(params, WIDE), jax.tree.map(lambda x: x.sharding, base_of(params)))
    want = logits(model, plain, mesh, tokens)
    # float32 sums in another order.
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert np.abs(got - logits(model, base_of(params), mesh, tokens)).max() > 0.01 * np.abs(want).max()


def test_new_lora_changes_nothing_and_a_has_pefts_range() -> None:
    mesh = make_mesh({})
    with jax.set_mesh(mesh):
        state = init_state(EXPERTS, OPTIMIZER, SEED % 2**31, mesh, WIDE, draw(EXPERTS, mesh, None))
    names = lora_names(state.params)
    # Attention has 4 targets, the MLP of layer 0 and the shared expert of layer 1 have 3 each: an A and a B.
    assert len(names) == len(jax.tree.leaves(state.params)) == 2 * (4 + 3 + 3)
    attention = state.params["layers"]["attention"]
    assert attention["q"]["lora_a"].shape == (2, 5, 32)
    assert attention["o"]["lora_a"].shape == (2, 5, EXPERTS.num_heads, 8)
    assert not any(
        np.any(np.asarray(x)) for path, x in jax.tree.leaves_with_path(state.params) if "lora_b" in str(path)
    )
    for part in ("q", "o"):
        a = np.asarray(attention[part]["lora_a"]).ravel()
        bound = (32 if part == "q" else EXPERTS.num_heads * 8) ** -0.5
        assert 0.97 * bound < np.abs(a).max() <= bound
        assert abs(np.abs(a).mean() - bound / 2) < 0.1 * bound


@pytest.mark.draw(1)
@pytest.mark.parametrize(("name", "scan"), [("dense", False), ("experts", True)], ids=str)
def test_gradients_are_those_of_the_whole_model(name: str, scan: bool) -> None:
    """What is frozen has no gradient; the rest has the gradient that it has where everything is trained."""
    model, mesh = MODELS[name], make_mesh({"fsdp": 2, "tensor": 2})
    sharding, config = Sharding.for_training(model, mesh), dataclasses.replace(STEP, lora=WIDE, scan_layers=scan)
    everything = draw(model, mesh, WIDE)
    frozen = base_of(everything)
    trained = without(everything, frozen)
    assert jax.tree.structure(union(trained, frozen)) == jax.tree.structure(everything)
    gradient = jax.jit(functools.partial(batch_gradient, NextToken(model), config, sharding))
    with jax.set_mesh(mesh):
        batch = place(rows(), mesh)
        whole = gradient(everything, batch).gradient
        if not scan:  # Frozen layers may be listed already.
            frozen["layers"] = unstack(frozen["layers"], jnp.float32, model.sparse_layers)
        some = gradient(trained, batch, frozen=frozen).gradient
    assert len(jax.tree.leaves(some)) == len(lora_names(some))
    paths = dict(jax.tree.leaves_with_path(whole))
    for path, got in jax.tree.leaves_with_path(some):
        np.testing.assert_allclose(got, paths[path], rtol=1e-4, atol=1e-7, err_msg=str(path))


@functools.cache
def trained(
    axes: tuple[tuple[str, int], ...], name: str = "dense", **changes: Any
) -> tuple[list[float], list[float], Params]:
    """Loss and gradient norm of four steps, and the trained parameters after them."""
    model, mesh = MODELS[name], make_mesh(dict(axes))
    config = dataclasses.replace(STEP, lora=WIDE, **changes)
    with jax.set_mesh(mesh):
        everything = draw(model, mesh, WIDE)
        frozen = base_of(everything)
        before = jax.tree.map(np.asarray, frozen)
        state = init_state(model, OPTIMIZER, 3, mesh, WIDE, frozen)
        step = functools.partial(make_train_step(NextToken(model), OPTIMIZER, config, mesh), frozen=frozen)
        seen: list[Metrics] = []
        for i in range(4):
            state, metrics = step(state, place(rows(i % 2), mesh))
            seen.append(metrics)
        jax.tree.map(np.testing.assert_array_equal, frozen, before)  # Neither changed nor donated.
        held_out, _ = make_eval_step(NextToken(model), config, mesh)(state.params, place(rows(0), mesh), frozen)
    assert float(held_out.loss / held_out.weight) < float(seen[0]["loss"])
    return (
        [float(m["loss"]) for m in seen],
        [float(m["grad_norm"]) for m in seen],
        jax.tree.map(np.asarray, state.params),
    )


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("axes", "name", "changes"),
    [
        ({"fsdp": 2, "tensor": 2, "context": 2}, "dense", {"accumulation": 2, "remat": "full"}),
        ({}, "dense", {"scan_layers": False, "remat": "none"}),
    ],
    ids=str,
)
def test_training_depends_neither_on_the_mesh_nor_on_how_it_is_run(
    axes: dict[str, int], name: str, changes: dict[str, Any]
) -> None:
    got, want = trained(tuple(axes.items()), name, **changes), trained((), name)
    # float32 sums in another order; Adam magnifies the rounding of small gradients.
    np.testing.assert_allclose(got[:2], want[:2], rtol=2e-3)
    for a, b in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.draw(1)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_frozen_weights_cost_no_gradient_and_are_arguments(scan: bool) -> None:
    """The compiled step: fewer operations and less memory than full training, and no weights inside the program."""
    model = dataclasses.replace(DENSE, hidden_size=128, intermediate_size=512, num_layers=2, vocab_size=4096)
    mesh, lora = make_mesh({}), LoRA(rank=2)
    sharding = Sharding.for_training(model, mesh)
    place_at = NamedSharding(mesh, Sharding.tokens)
    ints, floats = (jax.ShapeDtypeStruct((1, 16), dtype, sharding=place_at) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ints, ints, ints, floats)

    def compiled(lora: LoRA | None) -> tuple[float, int, int]:
        config = StepConfig(dtype="float32", lora=lora, scan_layers=scan)
        frozen = None
        if lora is not None:
            options = Options(stacked=scan)
            frozen = jax.tree.map(
                lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
                abstract_params(model, sharding, options, jnp.float32),
                param_specs(model, sharding, options),
            )
        state = abstract_state(model, OPTIMIZER, mesh, lora, frozen)
        with jax.set_mesh(mesh):
            step: Any = make_train_step(NextToken(model), OPTIMIZER, config, mesh)
            program = step.lower(state, batch, frozen=frozen).compile()
        memory = program.memory_analysis()
        return program.cost_analysis()["flops"], memory.temp_size_in_bytes, memory.alias_size_in_bytes

    full, some = compiled(None), compiled(lora)
    weights = sum(x.size for x in jax.tree.leaves(abstract_params(model, sharding)))
    # Of three products with each weight, forward and two backward, one is not needed.
    assert some[0] < 0.8 * full[0]
    # The float32 gradient of the weights, the head's among them, is not held.
    assert some[1] < full[1] - 3 * weights
    # Only the state is donated: parameters of LoRA and two moments.
    assert some[2] < 0.2 * 12 * weights


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text of no importance " * 9], 300)


def job(folder: Path, tokenizer: Tokenizer, report: Silent, lora: LoRA = WIDE) -> Job[Batch]:
    """Two phases on two meshes."""

    class Data:
        def batch(self, step: int, state: TrainState) -> Batch:
            return rows(step)

    def evaluate(state: TrainState, eval_step: EvalStep[Batch]) -> dict[str, float]:
        sums, _ = eval_step(state.params, place(rows(99), state.step.sharding.mesh))  # type: ignore[attr-defined]
        return {"loss": float(sums.loss) / float(sums.weight)}

    step = dataclasses.replace(STEP, lora=lora)
    phases = tuple(
        Phase(end, NextToken(DENSE), step, mesh, lambda step: Data(), evaluate)
        for end, mesh in ((3, make_mesh({}, jax.devices()[:1])), (6, make_mesh({"fsdp": 2, "tensor": 2})))
    )
    return Job(
        folder, DENSE, tokenizer, OPTIMIZER, phases, lambda step: report, checkpoints=CheckpointConfig(every=2),
        frozen=lambda mesh: draw(DENSE, mesh, None),
    )  # fmt: skip


def test_a_job_resumes_exactly_and_saves_only_what_is_trained(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, first, second = Silent(), Silent(), Silent()
    outcome = launch(job(tmp_path / "straight" / "checkpoints", tokenizer, straight))
    assert len(jax.tree.leaves(outcome.state.params)) == len(lora_names(outcome.state.params)) == 14
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        launch(job(tmp_path / "run" / "checkpoints", tokenizer, first))
    assert launch(job(tmp_path / "run" / "checkpoints", tokenizer, second)).steps_taken == 2
    numbers = [
        [r["loss"] for s in group for r in s.log.records if "loss" in r] for group in ([straight], [first, second])
    ]
    assert numbers[0] == numbers[1]
    assert_same_weights(tmp_path / "run", tmp_path / "straight", step=6)
    saved = json.loads((tmp_path / "run" / "checkpoints" / "6" / "params" / "_METADATA").read_bytes())
    assert len(saved["tree_metadata"]) == 14
    with pytest.raises(InputError, match="'rank': 5"):
        launch(job(tmp_path / "run" / "checkpoints", tokenizer, Silent(), LoRA(rank=4)))
    with pytest.raises(ValueError, match="norm whole"):
        launch(job(tmp_path / "whole", tokenizer, Silent(), LoRA(whole=("norm",))))
    alone = dataclasses.replace(job(tmp_path / "new", tokenizer, Silent()), frozen=None)
    with pytest.raises(InputError, match="has none"):
        launch(alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"targets": ()},
        {"targets": ("q", "q")},
        {"targets": ("experts",)},
        {"whole": ("x",)},
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="LoRA"):
        LoRA(**settings)


def test_the_settings() -> None:
    assert LoRA().scale == 2.0
    assert LoRA(rank_stabilised=True).scale == 8.0
    assert LoRA().targets == TARGETS
    with pytest.raises(ValueError, match="Merge"):
        Options(fused=True, stacked=False, lora=LoRA())
