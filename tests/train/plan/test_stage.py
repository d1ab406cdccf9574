"""What a program costs, counted by hand and by `train.plan.programs`; topologies and their errors."""

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import train.plan.stage as plan_module
from experiments.moe import cycles
from qwen_jax.cli import main
from qwen_jax.config import ModelConfig, MoE
from qwen_jax.errors import InputError
from qwen_jax.moe.block import FURTHER_ROUNDS
from qwen_jax.parallel import sharding
from qwen_jax.parallel.sharding import AXES, Sharding, make_mesh
from qwen_jax.published import published
from train.config import RunConfig, Stage
from train.data.batch import Batch
from train.moe import MoETraining
from train.optimizer import OptimizerConfig, Schedule
from train.plan.programs import Collective, collectives, count_flops
from train.plan.stage import Plan, plan_step, search
from train.plan.topology import CHIPS, Target, mesh_of, target
from train.pretrain import NextToken, PretrainConfig
from train.state import abstract_state
from train.step import StepConfig, make_train_step

# The parts of an optimised module that matter: a loop of 28 rounds, begun at 1, with a gather in it (two pieces of one
# chain) and a sum of which each device keeps a part; sums and a scatter outside. Channels tell nothing.
_HLO = """
%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%gather_step (p: bf16[64,8]) -> bf16[64,128] {
  ROOT %all-gather.1 = bf16[64,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,16]<=[16], CHAIN
}

%gather_rest (p: bf16[64,8]) -> bf16[64,128] {
  ROOT %all-gather.2 = bf16[64,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,16]<=[16], CHAIN
}

%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[64,8] {
  %all-reduce.9 = bf16[64,128]{1,0} all-reduce(%p), channel_id=1, replica_groups={GROUPS}, to_apply=%add.1
  ROOT %part = bf16[64,16]{1,0} dynamic-slice(%all-reduce.9, %zero, %start)
}

%body (t: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %one = bf16[64,128]{1,0} fusion(%x), kind=kCustom, calls=%gather_step
  %two = bf16[64,128]{1,0} fusion(%x), kind=kCustom, calls=%gather_rest
  %three = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (t: (s32[], bf16[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(29)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[32]) -> f32[32] {
  %one = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(%one)
  %start = (s32[], bf16[64,8]) tuple(%copied, %x)
  %loop = (s32[], bf16[64,8]) while(%start), condition=%condition, body=%body
  %all-reduce.3 = (f32[8]{0}, f32[3,8]{1,0}) all-reduce(%p, %q), channel_id=1, replica_groups={GROUPS}, to_apply=%add.1
  %all-reduce.4 = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'a'}, to_apply=%add.1
  %send.1 = (f32[4,2]{1,0}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, HANDLER
  ROOT %reduce-scatter.4 = f32[2]{0} reduce-scatter(%p), channel_id=1, replica_groups=[1,16]<=[16], to_apply=%add.1
}
"""
_HLO = _HLO.replace("GROUPS", "{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}")
_HANDLER = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
_HLO = _HLO.replace("HANDLER", f"frontend_attributes={{{_HANDLER}}}")
_HLO = _HLO.replace("CHAIN", 'dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="5"}')


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)


def test_collectives_are_counted_once_a_run_and_as_often_as_their_loop() -> None:
    listed = collectives(_HLO, devices=16, num_slices=2)
    found = {(c.kind, c.shape): c for c in listed}
    assert len(listed) == len(found) == 6
    gather = found["all-gather", "bf16[64,128]"]
    assert (gather.bytes, gather.times, gather.result_bytes) == (64 * 128 * 2 * 15 / 16, 28, 64 * 128 * 2)
    assert gather.group == tuple(range(16))
    summed = found["reduce-scatter", "bf16[64,128]"]
    assert (summed.bytes, summed.times, summed.result_bytes) == (64 * 128 * 2 * 7 / 8, 28, 64 * 16 * 2)
    within = found["all-reduce", "f32[3,8]"]
    assert (within.bytes, within.times, within.crosses_slices) == (2 * 128 * 7 / 8, 1, False)
    across = found["all-reduce", "f32[16]"]
    assert (across.bytes, across.crosses_slices, across.group) == (2 * 64 / 2, True, (0, 8))
    by_hosts = found["all-reduce", "f32[4,2]"]
    assert (by_hosts.bytes, by_hosts.times, by_hosts.crosses_slices) == (2 * 32 / 2, 1, True)
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


def _step(
    axes: dict[str, int], remat: str, devices: Any = None, dtype: str = "bfloat16", length: int = 64, **sizes: Any
) -> Any:
    model = dataclasses.replace(published("tiny"), **{"num_layers": 3, "vocab_size": 512, **sizes})
    mesh = make_mesh(axes, devices)
    objective, optimizer = NextToken(model), OptimizerConfig(Schedule(10))
    config = StepConfig(dtype, remat)  # type: ignore[arg-type]
    tokens = NamedSharding(mesh, Sharding.tokens)
    ints, floats = (jax.ShapeDtypeStruct((8, length), dtype, sharding=tokens) for dtype in (jnp.int32, jnp.float32))
    state = abstract_state(model, optimizer, mesh)
    step = make_train_step(objective, optimizer, config, mesh)
    return objective, mesh, step, state, Batch(ints, ints, ints, floats)


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("full", 4)])
def test_flops_of_a_step_are_those_of_the_formula(remat: str, passes: int) -> None:
    """Forward, and twice that backward; with full recomputation the layers once more."""
    config, mesh, step, state, batch = _step({"fsdp": 4}, remat)
    with jax.set_mesh(mesh):
        flops = count_flops(step.trace(state, batch).jaxpr)
    model = config.model
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


def _check_collectives(found: list[Collective], model: ModelConfig, mesh: Mesh, itemsize: int) -> None:
    """Weights stay split: what is gathered is one matrix of the layer at hand, or the head once; sums are scattered.

    And nothing as wide as the vocabulary goes over the tensor axis.
    """
    tensor, fsdp, layers = mesh.shape["tensor"], mesh.shape["fsdp"], model.num_layers
    D, F, d = model.hidden_size, model.intermediate_size, model.head_dim
    # One device's part, gathered over fsdp: q and o, k and v, gate and up and down.
    matrices = {D * model.num_heads * d: 2, D * model.num_kv_heads * d: 2, D * F: 3}
    sizes = {size // tensor * itemsize for size in matrices}
    head = model.vocab_size * D // tensor

    def over(c: Collective, axis: str) -> bool:
        where = np.unravel_index(c.group, mesh.devices.shape)[AXES.index(axis)]
        return len(set(where.tolist())) > 1

    gathers = [c for c in found if c.kind == "all-gather" and not c.shape.startswith("s32")]
    assert gathers
    for gather in (c for c in gathers if not over(c, "context")):
        assert over(gather, "fsdp"), gather
        assert not over(gather, "tensor"), gather
        if gather.times % layers:
            assert (gather.times, gather.result_bytes) == (1, head * itemsize), gather
        else:
            assert gather.result_bytes in sizes, gather
    for c in found:
        if c.kind == "all-reduce" and over(c, "fsdp"):
            # Norms, biases and scalars, and no matrix.
            assert c.result_bytes < min(sizes), c
        if over(c, "tensor"):
            assert not re.search(rf"\b({model.vocab_size}|{model.vocab_size // tensor})\b", c.shape), c
    # Everything that was gathered is scattered, once, whole.
    scattered = sum(c.result_bytes * c.times for c in found if c.kind == "reduce-scatter" and over(c, "fsdp")) * fsdp
    whole = sum(size * count for size, count in matrices.items()) // tensor * layers * itemsize + head * 4
    assert whole <= scattered <= 1.2 * whole


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "fsdp": 4}],
    ids=str,
)
def test_weights_are_gathered_in_their_layer_and_their_gradients_scattered(axes: dict[str, int], tied: bool) -> None:
    sizes = {"num_layers": 3, "vocab_size": 640, "tie_word_embeddings": tied}
    config, mesh, step, state, batch = _step(axes, "full", dtype="float32", **sizes)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile({"xla_backend_optimization_level": "0"})
    _check_collectives(collectives(compiled.as_text(), 8), config.model, mesh, 4)


@needs_libtpu
def test_compiled_for_a_pod_gradients_are_scattered_not_summed_everywhere() -> None:
    """The step of a small model for 16 chips of v5e: it fits, and no gradient of a matrix is reduced whole."""
    where = target("v5e:4x4")
    # fsdp is one ring of the torus here: around more than one the compiler sums everywhere, on all links at once.
    sizes = {"vocab_size": 5120, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 8, "num_kv_heads": 4}
    config, mesh, step, state, batch = _step({"fsdp": 4, "tensor": 4}, "full", where.devices, **sizes)
    plan = plan_step(where, mesh, step, state, batch, model_flops=1.0)
    assert plan.fits
    assert plan.hbm_limit_bytes == CHIPS["v5e"].hbm_bytes
    assert 0 < plan.weights_bytes < plan.hbm_bytes
    assert plan.moments_bytes >= 2 * plan.weights_bytes
    assert plan.estimated_step_seconds > 0
    assert plan.collective_bytes["reduce-scatter"] > 0
    assert plan.gathered_bytes == 5120 * 1024 * 2 / 4
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["gathers"]
    assert isinstance(plan, Plan)
    with jax.set_mesh(mesh):
        compiled = step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()
    _check_collectives(collectives(compiled.as_text(), 16), config.model, mesh, 2)


def _meanwhile(hlo: str) -> list[set[str]]:
    """For each exchange of rows or weights in the forward pass, the shared expert's products from start to end of it.

    Args:
      hlo: text of the optimised module, in the order in which it runs.
    """
    found: list[set[str]] = []
    under_way: dict[str, set[str]] = {}
    for line in hlo.splitlines():
        if match := re.search(r"%([\w.\-]+) = .* (?:ragged-)?all-to-all-start\(.*op_name=\"(.*?)\"", line):
            if "moe/experts" in match[2] and "transpose" not in match[2] and FURTHER_ROUNDS not in match[2]:
                under_way[match[1]] = set()
                found.append(under_way[match[1]])
        elif match := re.search(r"all-to-all-done\(%([\w.\-]+)\)", line):
            under_way.pop(match[1], None)
        elif match := re.search(r"op_name=\".*moe/shard_map/(\S+)/dot_general\"", line):
            for products in under_way.values():
                products.add(match[1])
    return found


@needs_libtpu
@pytest.mark.parametrize("capacity_factor", [0.0, 1.25])
def test_compiled_for_a_pod_the_shared_expert_works_while_rows_travel(capacity_factor: float) -> None:
    """The forward pass of a small mixture for 4 chips of v5p: each exchange of rows has a product to itself."""
    where = target("v5p:2x2x1")
    sizes = {"hidden_size": 512, "num_heads": 4, "head_dim": 128, "moe": MoE(8, 2, 256, 1024)}
    objective, mesh, _, state, batch = _step({"fsdp": 2, "expert": 2}, "full", where.devices, length=1024, **sizes)
    objective = NextToken(objective.model, PretrainConfig(moe=MoETraining(capacity_factor=capacity_factor)))
    with jax.set_mesh(mesh):
        step = make_train_step(objective, OptimizerConfig(Schedule(10)), StepConfig(remat="full"), mesh)
        traced = step.trace(state, batch)  # type: ignore[attr-defined]
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    to, *_, back = _meanwhile(text)
    assert to == {"BTD,FD->BTF"}
    assert back == {"BTF,DF->BTD"}
    # What arrives comes into buffers that are there for it, and nothing is copied into them beforehand.
    buffers = set(re.findall(r" ragged-all-to-all(?:-start)?\(%[\w.\-]+, %(\w+)", text))
    assert buffers == (set() if capacity_factor else {"empty"})


@needs_libtpu
def test_cycles_of_a_layer_are_those_of_its_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for 4 chips of v5p: a loop over layers forward and one backward, which is the longer one."""
    small = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=128,
        tie_word_embeddings=False, moe=MoE(8, 2, 128, 256),
    )  # fmt: skip
    monkeypatch.setattr(cycles, "published", lambda name: small)
    text = cycles.program("small", "v5p:2x2x1", {"fsdp": 2, "expert": 2}, 4, 512)
    found = {(loop["loop"], loop["pass"]): loop["million_cycles"] for loop in cycles.loops(text, least=1.0)}
    assert 0 < found["layers", "forward"] < found["layers", "backward"]


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
def test_search_keeps_a_given_mesh_and_ranks_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.py").write_text(_CONFIG.replace("(64, 64, 128)", "(64,)"))
    command = ["plan", "--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2", "--search", "--json"]
    assert main([*command, "--mesh", "fsdp=2,tensor=2"]) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["mesh"] for p in plans] == [{"fsdp": 2, "tensor": 2}] * 3
    assert {p["options"]["remat"] for p in plans} == {"none", "dots", "full"}
    fitting = [p["estimated_step_seconds"] for p in plans if p["fits"]]
    assert len(fitting) == 3
    assert fitting == sorted(fitting)
    assert main([*command, "--mesh", "fsdp=2,tensor=4"]) == 1
    assert "v5e:2x2 has 4 devices in 1 slices" in capsys.readouterr().err


def _run(length: int, batch_size: int, **sizes: Any) -> RunConfig:
    model = dataclasses.replace(published("tiny"), **{"num_layers": 2, "vocab_size": 512, **sizes})
    stage = Stage(Schedule(10), length=length, batch_size=batch_size, mixture={"web": 1})
    return RunConfig("out", model, "tokenizer", {"web": "data"}, (stage,))


def test_search_tries_the_meshes_that_divide_and_splits_only_long_rows() -> None:
    where = Target("eight", tuple(jax.devices()), CHIPS["v5e"], 1)

    def tried(config: RunConfig) -> list[tuple[int, int, int]]:
        return [(m["fsdp"], m["context"], m["tensor"]) for m in plan_module._meshes(config, 0, where)]

    # Four heads: a tensor axis of eight does not divide them.
    assert tried(_run(64, 8)) == [(8, 1, 1), (4, 1, 2), (2, 1, 4)]
    # Four rows: fsdp is at most four.
    assert tried(_run(32_768, 4)) == [
        (4, 1, 2),
        (2, 1, 4),
        (4, 2, 1),
        (2, 2, 2),
        (1, 2, 4),
        (2, 4, 1),
        (1, 4, 2),
        (1, 8, 1),
    ]


def test_what_a_candidate_is_wrong_about_besides_its_mesh_is_not_hidden() -> None:
    """A search passes over meshes that do not divide, and over nothing else."""
    where = Target("eight", tuple(jax.devices()), CHIPS["v5e"], 1)
    with pytest.raises(InputError, match="Rows of 66 tokens do not divide into 4 chunks"):
        search(_run(66, 4), 0, where, {"fsdp": 4, "context": 2})
    with pytest.raises(InputError, match=r"num_heads \(4\) is not divisible"):
        search(_run(64, 8), 0, where, {"tensor": 8})


def test_what_cannot_fit_by_its_arrays_alone_is_not_compiled_in_a_search() -> None:
    small = dataclasses.replace(CHIPS["v5e"], hbm_bytes=100_000)
    plans = search(_run(64, 8), 0, Target("eight", tuple(jax.devices()), small, 1), {"fsdp": 8})
    # Each policy, with 1 part only: 8 rows on 8 devices.
    assert [(p.fits, p.options["accumulation"]) for p in plans] == [(False, 1)] * 3
    for p in plans:
        assert p.hbm_bytes == p.weights_bytes + p.moments_bytes + p.activations_bytes > 100_000
        assert "not compiled" in p.why_not


@needs_libtpu
def test_what_does_not_fit_says_how_much_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6.4 billion parameters, 12 bytes each on four chips of v5e: refused by the compiler itself."""
    wide = _CONFIG.replace("vocab_size=512", "vocab_size=512, hidden_size=8192, intermediate_size=2**18")
    (tmp_path / "run.py").write_text(wide.replace("num_layers=2", "num_layers=1").replace("(64, 64, 128)", "(64,)"))
    command = ["plan", "--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2"]
    assert main([*command, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False
    # All that is there at once: weights, moments, and the gradient of each weight.
    assert 1.3 * (plan["weights_bytes"] + plan["moments_bytes"]) < plan["hbm_bytes"] < 2**36
    assert f"{plan['hbm_limit_bytes'] / 2**30:.2f}G" in plan["why_not"]
    assert main(command) == 1
    assert "DOES NOT FIT in 15.75 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.5G of 15.75G hbm. Exceeded by 4.75G.",
            20.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes.", 0),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_words_of_a_compiler(message: str, needed: float | None) -> None:
    assert plan_module._asked_for(message) == needed


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_there_is_a_topology_of_every_chip(chip: str) -> None:
    """A device of a v4 is a chip, of a 7x half of one."""
    where = target(f"{chip}:2x2" + "x1" * (chip in ("v4", "v5p", "7x")))
    assert mesh_of(where, {"fsdp": len(where.devices)}).size == (8 if chip == "7x" else 4)
    assert where.chip.hbm_bytes == CHIPS[chip].hbm_bytes // (2 if chip == "7x" else 1)


@needs_libtpu
def test_slices_are_joined_by_the_data_axis() -> None:
    """In a step for two slices only gradients leave a slice, already scattered within it; layers' in bfloat16."""
    where = target("v5e:2x2", num_slices=2)
    mesh = mesh_of(where, {"data": 2, "fsdp": 4})
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="multiple of the 2 slices"):
        mesh_of(where, {"fsdp": 8})
    # Wide enough to fill the tiles that are sent.
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "tie_word_embeddings": False}
    model, _, step, state, batch = _step({"data": 2, "fsdp": 4}, "full", where.devices, **sizes)
    plan = plan_step(where, mesh, step, state, batch, model_flops=1.0)
    assert plan.fits
    # Of two slices each sends its sum once.
    counts = model.model.num_params()
    expected = (2 * counts["layers"] + 4 * (counts["total"] - counts["layers"])) / 4
    assert expected <= plan.dcn_bytes < 1.05 * expected


def _fakes(groups: Sequence[Any], per_group: int, platform: str) -> list[Any]:
    """Devices of slices, in an order that mixes them; of processes where the group is None."""
    fakes = [
        SimpleNamespace(
            platform=platform,
            device_kind="fake",
            process_index=i,
            number=n,
            **({} if g is None else {"slice_index": g}),
        )
        for n in range(per_group)
        for i, g in enumerate(groups)
    ]
    for identity, fake in enumerate(fakes):
        fake.id = identity
    return fakes


@pytest.mark.parametrize(
    ("groups", "platform", "sizes", "between"),
    [
        ((0, 1), "cpu", {"data": 2, "fsdp": 4}, [{0}, {1}]),
        ((0, 1), "cpu", {"data": 4, "fsdp": 2}, [{0}, {0}, {1}, {1}]),
        ((1, 0), "gpu", {"data": 2, "tensor": 4}, [{0}, {1}]),
        # Processes are nodes where GPUs do not say what they are joined by.
        ((None, None), "gpu", {"data": 2, "fsdp": 4}, [{0}, {1}]),
        # Nodes beyond the data axis are joined by fsdp: its first half is one node.
        ((0, 1), "gpu", {"fsdp": 8}, [{0, 1}]),
        ((0, 1, 2, 3), "gpu", {"data": 2, "fsdp": 4, "tensor": 2}, [{0, 1}, {2, 3}]),
    ],
)
def test_what_joins_slices_and_nodes_is_outermost(
    groups: Any, platform: str, sizes: dict[str, int], between: list[set[int]]
) -> None:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = _fakes(groups, math.prod(shape) // len(groups), platform)
    mesh = sharding._arranged(shape, devices)
    key = "process_index" if groups[0] is None else "slice_index"
    assert mesh.shape == shape
    assert [{getattr(d, key) for d in row.flat} for row in mesh] == between
    assert {d.id for d in mesh.flat} == {d.id for d in devices}
    # A row of fsdp, context and tensor stays in one slice or node, but for the parts of fsdp that join nodes.
    for row in mesh.reshape(-1, len(devices) // len(groups)):
        assert len({getattr(d, key) for d in row}) == 1


@pytest.mark.parametrize(
    ("groups", "platform", "sizes", "message"),
    [
        ((0, 1), "cpu", {"fsdp": 8}, "data axis must be a multiple of the 2 slices"),
        ((0, 1, 2), "cpu", {"data": 2, "fsdp": 3}, "data axis must be a multiple of the 3 slices"),
        ((0, 1), "gpu", {"tensor": 8}, "data x fsdp, must be a multiple of the 2 nodes"),
        ((0, 1, 1), "cpu", {"data": 3}, "unequal parts of the 2 slices"),
    ],
)
def test_meshes_that_slices_cannot_make_are_refused(
    groups: Any, platform: str, sizes: dict[str, int], message: str
) -> None:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    with pytest.raises(InputError, match=message):
        sharding._arranged(shape, _fakes(groups, math.prod(shape) // len(groups), platform))
