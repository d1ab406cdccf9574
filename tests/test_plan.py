"""What a program costs, counted by hand and by `train.programs`; topologies and their errors."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.cli import main
from qwen_jax.config import published
from qwen_jax.errors import InputError
from qwen_jax.sharding import Sharding, make_mesh
from train.data.batch import Batch
from train.optimizer import OptimizerConfig, Schedule
from train.plan import Plan, plan_step
from train.pretrain import PretrainConfig, abstract_state, make_train_step
from train.programs import collectives, count_flops
from train.topology import CHIPS, mesh_of, target

# The parts of an optimised module that matter: a loop of 28 with a gather in it (two pieces of one channel), two sums
# and a scatter outside.
_HLO = """
%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%gather_step (p: bf16[64,8]) -> bf16[64,128] {
  ROOT %all-gather.1 = bf16[64,128]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,16]<=[16], dimensions={1}
}

%gather_rest (p: bf16[64,8]) -> bf16[64,128] {
  ROOT %all-gather.2 = bf16[64,128]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,16]<=[16], dimensions={1}
}

%body (t: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %one = bf16[64,128]{1,0} fusion(%x), kind=kCustom, calls=%gather_step
  %two = bf16[64,128]{1,0} fusion(%x), kind=kCustom, calls=%gather_rest
}

%condition (t: (s32[], bf16[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[32]) -> f32[32] {
  %loop = (s32[], bf16[64,8]) while(%start), condition=%condition, body=%body
  %all-reduce.3 = f32[32]{0} all-reduce(%p), channel_id=7, replica_groups={GROUPS}, to_apply=%add.1
  %all-reduce.4 = f32[16]{0} all-reduce(%p), channel_id=9, replica_groups=mesh['a'=2,'b'=8] {'a'}, to_apply=%add.1
  ROOT %reduce-scatter.4 = f32[2]{0} reduce-scatter(%p), channel_id=8, replica_groups=[1,16]<=[16], to_apply=%add.1
}
""".replace("GROUPS", "{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)


def test_collectives_are_counted_once_a_run_and_as_often_as_their_loop() -> None:
    found = {(c.kind, c.shape): c for c in collectives(_HLO, devices=16, num_slices=2)}
    assert len(found) == 4
    gather = found["all-gather", "bf16[64,128]"]
    assert (gather.bytes, gather.times) == (64 * 128 * 2 * 15 / 16, 28)
    within = found["all-reduce", "f32[32]"]
    assert (within.bytes, within.times, within.crosses_slices) == (2 * 128 * 7 / 8, 1, False)
    across = found["all-reduce", "f32[16]"]
    assert (across.bytes, across.crosses_slices) == (2 * 64 / 2, True)
    scatter = found["reduce-scatter", "f32[2]"]
    assert (scatter.bytes, scatter.crosses_slices) == (8 * 15, True)


def test_flops_of_loops_branches_and_shards() -> None:
    """2 m n k for a product; as often as a scan runs; of the dearest branch; of all shards together."""
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert count_flops(jax.jit(scanned).trace(x, w).jaxpr) == 5 * 2 * 8 * 16 * 16

    def branched(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x.T, lambda x: (x @ x.T) @ (x @ x.T), x)

    assert count_flops(jax.jit(branched).trace(x).jaxpr) == 2 * 2 * 8 * 8 * 16 + 2 * 8**3
    mesh = make_mesh({"data": 4})
    with jax.set_mesh(mesh):
        split = jax.shard_map(lambda x: x @ x.T, in_specs=P("data", None), out_specs=P("data", None))
        x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))
        assert count_flops(jax.jit(split).trace(x).jaxpr) == 4 * 2 * 2 * 2 * 16


def _step(axes: dict[str, int], remat: str, devices: object = None) -> tuple[object, ...]:
    model = dataclasses.replace(published("tiny"), num_layers=3, vocab_size=512)
    mesh = make_mesh(axes, devices)  # type: ignore[arg-type]
    config = PretrainConfig(model, OptimizerConfig(Schedule(10)), remat=remat)  # type: ignore[arg-type]
    tokens = NamedSharding(mesh, Sharding.for_model(model, mesh).tokens)
    ints, floats = (jax.ShapeDtypeStruct((8, 64), dtype, sharding=tokens) for dtype in (jnp.int32, jnp.float32))
    state = abstract_state(config, mesh)
    return config, mesh, make_train_step(config, mesh), state, Batch(ints, ints, ints, floats)


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("full", 4)])
def test_flops_of_a_step_are_those_of_the_formula(remat: str, passes: int) -> None:
    """Forward, and twice that backward; with full recomputation the layers once more."""
    config, mesh, step, state, batch = _step({"fsdp": 4}, remat)
    with jax.set_mesh(mesh):  # type: ignore[arg-type]
        flops = count_flops(step.trace(state, batch).jaxpr)  # type: ignore[attr-defined]
    model = config.model  # type: ignore[attr-defined]
    B, T = 8, 64
    layer = model.num_params()["layers"] / model.num_layers
    biases_and_norms = 2 * model.hidden_size + (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    products = 2 * B * T * (layer - biases_and_norms)
    attention = 4 * B * T * T * model.num_heads * model.head_dim  # the reference multiplies masked parts too
    head = 2 * B * T * model.vocab_size * model.hidden_size
    # Nobody needs the last product of a layer again.
    unneeded = (passes - 3) * 2 * B * T * model.hidden_size * model.intermediate_size
    expected = model.num_layers * (passes * (products + attention) - unneeded) + 3 * head
    assert flops == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v9:4x4", 1, "v5p:4x4x4"),
        ("v5p", 1, "v5p:4x4x4"),
        ("v5p:4xx4", 1, "v5p:4x4x4"),
        ("v6e:4x4", 0, "at least one slice"),
        ("gpu", 1, "no GPU on this machine"),
    ],
)
def test_what_is_no_topology_is_refused(topology: str, slices: int, message: str) -> None:
    if topology == "gpu" and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(InputError, match=message):
        target(topology, slices)


@needs_libtpu
def test_compiled_for_a_pod_gradients_are_scattered_not_summed_everywhere() -> None:
    """The step of a small model for 16 chips of v5e: it fits, and no gradient of a matrix is reduced whole."""
    where = target("v5e:4x4")
    _, mesh, step, state, batch = _step({"fsdp": 8, "tensor": 2}, "full", where.devices)
    plan = plan_step(where, mesh, step, state, batch, model_flops=1.0)  # type: ignore[arg-type]
    assert plan.fits
    assert plan.hbm_limit_bytes == CHIPS["v5e"].hbm_bytes
    assert 0 < plan.weights_bytes < plan.hbm_bytes
    assert plan.moments_bytes >= 2 * plan.weights_bytes
    assert plan.collective_bytes["all-gather"] > 0
    assert plan.estimated_step_seconds > 0
    json.dumps(dataclasses.asdict(plan))
    assert isinstance(plan, Plan)


_CONFIG = """
from train.config import RunConfig, Stage
from train.optimizer import Schedule
from qwen_jax.config import published
import dataclasses


def main() -> RunConfig:
    model = dataclasses.replace(published("tiny"), num_layers=2, vocab_size=512)
    stages = tuple(Stage(Schedule(10), length=n, batch_size=8, mixture={"web": 1}) for n in (64, 64, 128))
    return RunConfig("out", model, "tokenizer", {"web": "data"}, stages)
"""


@needs_libtpu
def test_command_plans_each_kind_of_stage_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.py").write_text(_CONFIG)
    command = ["plan", "--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2"]
    assert main([*command, "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["options"]["stage"], second["options"]["stage"]) == (0, 2)
    assert first["mesh"] == {"fsdp": 4}
    assert first["fits"]
    needed = {"hbm_bytes", "hbm_limit_bytes", "flops_per_step", "collective_bytes", "estimated_step_seconds"}
    assert needed <= first.keys()
    assert second["flops_per_step"] > first["flops_per_step"]
    assert main([*command, "--mesh", "fsdp=2,tensor=2"]) == 0
    assert "compiled for v5e:2x2" in capsys.readouterr().out
    assert main([*command, "--mesh", "fsdp=2"]) == 1
    assert "4 devices" in capsys.readouterr().err


@needs_libtpu
def test_search_ranks_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.py").write_text(_CONFIG.replace("(64, 64, 128)", "(64,)"))
    assert main(["plan", "--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2", "--search", "--json"]) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({(str(p["mesh"]), p["options"]["remat"]) for p in plans}) == len(plans) > 3
    fitting = [p["estimated_step_seconds"] for p in plans if p["fits"]]
    assert fitting == sorted(fitting)


@needs_libtpu
def test_slices_are_joined_by_the_data_axis() -> None:
    where = target("v5e:2x2", num_slices=2)
    mesh = mesh_of(where, {"data": 2, "fsdp": 4})
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="multiple of the 2 slices"):
        mesh_of(where, {"fsdp": 8})
