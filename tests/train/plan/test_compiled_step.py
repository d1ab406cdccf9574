"""Laws of the compiled training step: what is gathered, scattered and overlapped, on CPUs and for TPUs."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments.train import cycles
from qwen_jax.config import ModelConfig, MoE
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.low_precision import Products
from qwen_jax.moe.further_rounds import FURTHER_ROUNDS
from qwen_jax.parallel.sharding import AXES
from tests.helpers.steps import abstract_step
from tests.helpers.tpu_compiler import needs_libtpu
from train.moe import MoETraining
from train.optimizer import OptimizerConfig, Schedule
from train.plan.programs import Collective, collectives
from train.plan.stage import Plan, plan_step
from train.plan.topology import CHIPS, mesh_of, target
from train.pretrain import NextToken, PretrainConfig
from train.step import StepConfig, make_train_step


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


@pytest.mark.draw(2)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "fsdp": 4}],
    ids=str,
)
def test_weights_are_gathered_in_their_layer_and_their_gradients_scattered(axes: dict[str, int], tied: bool) -> None:
    sizes = {"num_layers": 3, "vocab_size": 640, "tie_word_embeddings": tied}
    config, mesh, step, state, batch = abstract_step(axes, "full", dtype="float32", **sizes)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile({"xla_backend_optimization_level": "0"})
    _check_collectives(collectives(compiled.as_text(), 8), config.model, mesh, 4)


@needs_libtpu
def test_compiled_for_a_pod_gradients_are_scattered_not_summed_everywhere() -> None:
    """The step of a small model for 16 chips of v5e: it fits, and no gradient of a matrix is reduced whole."""
    where = target("v5e:4x4")
    # fsdp is one ring of the torus here: around more than one the compiler sums everywhere, on all links at once.
    sizes = {"vocab_size": 5120, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 8, "num_kv_heads": 4}
    config, mesh, step, state, batch = abstract_step({"fsdp": 4, "tensor": 4}, "full", where.devices, **sizes)
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


@pytest.mark.draw(1)
@needs_libtpu
@pytest.mark.parametrize("capacity_factor", [0.0, 1.25])
def test_compiled_for_a_pod_the_shared_expert_works_while_rows_travel(capacity_factor: float) -> None:
    """The forward pass of a small MoE model for 4 chips of v5p: each exchange of rows has a product to itself."""
    where = target("v5p:2x2x1")
    sizes = {"hidden_size": 512, "num_heads": 4, "head_dim": 128, "moe": MoE(8, 2, 256, 1024)}
    objective, mesh, _, state, batch = abstract_step(
        {"fsdp": 2, "expert": 2}, "full", where.devices, length=1024, **sizes
    )
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


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices", "products", "x", "dy"),
    [("v5e:2x2", 4, "int8", "s8", "s8"), ("7x:2x2x1", 8, "fp8", "f8e4m3fn", "f8e5m2")],
)
def test_compiled_for_tpus_projections_multiply_8_bits(
    topology: str, devices: int, products: Products, x: str, dy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All products of projections, but for the gradient of a weight with int8, which multiplies codes by bfloat16."""
    small = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    monkeypatch.setattr(cycles, "published", lambda name: small)
    text = cycles.program("small", topology, {"fsdp": devices}, devices, 512, products)
    dtypes = {match[1]: match[2] for match in re.finditer(r"(%[\w.\-]+) = (\w+)\[", text)}
    found = {
        (dtypes[match[1]], dtypes[match[2]])
        for match in re.finditer(r" convolution\((%[\w.\-]+), (%[\w.\-]+)\).*?op_name=\"(.*?)\"", text)
        if re.search("/(qkv|o|mlp)/", match[3])
    }
    assert found == {(x, x), (dy, x), ("bf16" if products == "int8" else dy, x)}


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
    model, _, step, state, batch = abstract_step({"data": 2, "fsdp": 4}, "full", where.devices, **sizes)
    plan = plan_step(where, mesh, step, state, batch, model_flops=1.0)
    assert plan.fits
    # Of two slices each sends its sum once.
    counts = model.model.num_params()
    expected = (2 * counts["layers"] + 4 * (counts["total"] - counts["layers"])) / 4
    assert expected <= plan.dcn_bytes < 1.05 * expected
