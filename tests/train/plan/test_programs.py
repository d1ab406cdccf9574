"""FLOPs and collectives that are read from a program equal those counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.platforms import as_if_on
from tests.helpers.steps import abstract_step
from train.plan.programs import collectives, count_flops, is_8_bit

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


def test_kernels_count_by_the_dtype_of_their_result() -> None:
    """A kernel of attention is not of 8 bits, whatever the projections are."""

    def kernel(dtype: jax.typing.DTypeLike) -> float:
        call = pl.pallas_call(
            lambda x, y: None,
            out_shape=jax.ShapeDtypeStruct((8, 128), dtype),
            cost_estimate=pl.CostEstimate(flops=1000, transcendentals=0, bytes_accessed=0),
        )
        traced = jax.jit(call).trace(jax.ShapeDtypeStruct((8, 128), jnp.bfloat16))
        assert count_flops(traced.jaxpr) == 1000
        return count_flops(traced.jaxpr, is_8_bit)

    assert kernel(jnp.bfloat16) == 0
    assert kernel(jnp.float8_e4m3fn) == kernel(jnp.int8) == 1000


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("full", 4)])
def test_flops_of_a_step_are_those_of_the_formula(remat: str, passes: int) -> None:
    """Forward, and twice that backward; with full recomputation the layers once more."""
    config, mesh, step, state, batch = abstract_step({"fsdp": 4}, remat)
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


@pytest.mark.parametrize(("axes", "remat"), [({"fsdp": 2, "tensor": 2}, "dots"), ({"data": 2, "context": 2}, "none")])
def test_flops_of_8_bits_are_those_of_projections(axes: dict[str, int], remat: str) -> None:
    """Forward, and twice that backward; "dots" traces the forward products again, which nothing uses.

    No other product has such operands. In blocks none has; with int8 the gradients of weights have not.
    """
    for products, passes in (("fp8", 3), ("fp8-blocks", 0), ("int8", 2)):
        config, mesh, step, state, batch = abstract_step(axes, remat, products=products, num_layers=2)
        with jax.set_mesh(mesh), as_if_on("GPU"):
            found = count_flops(step.trace(state, batch).jaxpr, is_8_bit)
        model = config.model
        layer = model.num_params()["layers"] / model.num_layers
        biases_and_norms = 2 * model.hidden_size + (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        assert found == passes * 2 * 8 * 64 * (layer - biases_and_norms) * model.num_layers
