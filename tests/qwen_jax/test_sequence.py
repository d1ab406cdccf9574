"""Rows split over the context axis: attention is that of whole rows, work is even, and memory does not square."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import sequence as context
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import abstract_state
from train.step import StepConfig, make_train_step

TINY = published("tiny")


def on_context(mesh, sharding, q, k, v, mask, ring=False):
    """Attention of rows that are spread first and gathered after, on a mesh."""

    def run(q, k, v, start, end):
        # `zigzag_shard` moves one number a token: the tokens' own numbers say where the rest goes.
        numbers = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
        order = np.asarray(context.zigzag_shard(numbers, sharding))[0]
        back = np.argsort(order)
        spec = P(None, "context", None, None)
        attend = jax.shard_map(
            lambda q, k, v, mask: context.attention(
                q, k, v, mask, sharding.context, scale=0.3, implementation="reference", ring=ring
            ),
            in_specs=(spec, spec, spec, jax.tree.map(lambda _: P(None, "context"), mask)),
            out_specs=spec,
            check_vma=not ring,
        )

        def loss(q, k, v):
            parts = (jax.reshard(x[:, order], spec) for x in (q, k, v))
            ends = (jax.reshard(x[:, order], P(None, "context")) for x in (start, end))
            out = jax.reshard(attend(*parts, kernels.Mask(*ends)), P())[:, back]
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    with jax.set_mesh(mesh):
        return run(q, k, v, mask.k_start_BT, mask.k_end_BT)


@pytest.mark.parametrize(
    ("n", "logits", "ring"),
    [(2, 2**27, False), (4, 2**27, False), (4, 2 * 4 * 2 * 64, False), (2, 2**27, True), (4, 2**27, True)],
)
def test_attention_is_that_of_whole_rows(monkeypatch, n, logits, ring):
    """Values and gradients, over documents of unequal length; gathered, in several blocks of queries, and as a ring."""
    monkeypatch.setattr(context, "_MAX_LOGITS", logits)
    rng = np.random.default_rng(n)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 64, h, 8)), jnp.float32) for h in (4, 2, 2))
    segments = np.sort(rng.integers(1, 6, (2, 64)), axis=1).astype(np.int32)
    segments[1, 50:] = 0
    mask = kernels.packed_mask(jnp.asarray(segments))

    def whole(q, k, v):
        out = kernels.attention(q, k, v, mask, scale=0.3, implementation="reference")
        return jnp.sum(jnp.sin(out)), out

    expected = jax.value_and_grad(whole, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    mesh = make_mesh({"context": n})
    got = on_context(mesh, Sharding.for_training(TINY, mesh), q, k, v, mask, ring)
    # float32 sums in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def compiled(ring, length):
    """The gradient of attention alone on four devices."""
    mesh = make_mesh({"context": 4})
    spec, rows = P(None, "context", None, None), P(None, "context")
    attend = jax.shard_map(
        functools.partial(context.attention, n=4, scale=0.3, implementation="reference", ring=ring),
        in_specs=(spec, spec, spec, kernels.Mask(rows, rows)),
        out_specs=spec,
        check_vma=not ring,
    )

    def like(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    q = like((1, length, 16, 64), jnp.float32, spec)
    ends = kernels.Mask(*[like((1, length), jnp.int32, rows)] * 2)
    with jax.set_mesh(mesh):
        f = jax.jit(jax.grad(lambda q, k, v, mask: attend(q, k, v, mask).sum(), (0, 1, 2)))
        return f.lower(q, q, q, ends).compile()


def test_a_ring_gathers_nothing():
    """Keys, values and their gradients move from device to device; gathered, there is an array of whole rows."""
    gathered, ring = (compiled(x, 256).as_text() for x in (False, True))
    assert "all-gather" in gathered
    assert "collective-permute" not in gathered
    assert "all-gather" not in ring
    assert "collective-permute" in ring
    assert "f32[1,256,16,64]" in gathered
    assert "f32[1,256,16,64]" not in ring


def test_a_ring_refuses_what_gives_no_log_sum_exp():
    x = jnp.ones((1, 8, 2, 8))
    mask = kernels.causal_mask(1, 8)
    with pytest.raises(InputError, match=r"xla needs return_lse=False.*Use implementation='reference'"):
        context.attention(x, x, x, mask, 2, scale=1.0, implementation="xla", ring=True)
    with pytest.raises(InputError, match="which attention='cudnn' does not return"):
        StepConfig(attention="cudnn", ring=True)


def test_gradients_of_many_blocks_of_queries_add_up_in_float32(monkeypatch):
    """In bfloat16, 64 blocks are as near to float32 as one is, on one device too."""
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 64, h, 8)), jnp.bfloat16) for h in (4, 2, 2))
    # All queries see all keys, and what comes back has one sign: rounded sums would stop growing.
    mask = kernels.Mask(jnp.zeros((1, 64), jnp.int32), jnp.full((1, 64), 64, jnp.int32))

    def gradient(dtype):
        def loss(v):
            out = context.attention(q.astype(dtype), k.astype(dtype), v, mask, 1, scale=0.3, implementation="reference")
            return jnp.sum(out.astype(jnp.float32))

        return np.asarray(jax.jit(jax.grad(loss))(v.astype(dtype)), np.float64)

    exact, at_once = gradient(jnp.float32), gradient(jnp.bfloat16)
    monkeypatch.setattr(context, "_MAX_LOGITS", 4 * 64)
    in_blocks = gradient(jnp.bfloat16)
    assert np.abs(in_blocks - exact).max() < 1.5 * np.abs(at_once - exact).max() + 1e-3


@pytest.mark.parametrize("n", [2, 4, 8])
def test_each_device_has_a_like_share_of_causal_work(n):
    mesh = make_mesh({"context": n})
    with jax.set_mesh(mesh):
        seen = jnp.arange(1, 65)[None]  # How many keys each token sees.
        places = context.zigzag_shard(seen, Sharding.for_training(TINY, mesh))
        shares = [int(np.asarray(shard.data).sum()) for shard in places.addressable_shards]
    assert sorted(np.asarray(places)[0]) == list(range(1, 65))
    assert len(shares) == n
    assert max(shares) - min(shares) == 0


def test_a_length_that_does_not_divide_and_a_model_that_does_not_split_are_refused():
    mesh = make_mesh({"context": 4})
    with jax.set_mesh(mesh), pytest.raises(InputError, match="Rows of 20 tokens do not divide into 8 chunks"):
        context.zigzag_shard(jnp.zeros((1, 20), jnp.int32), Sharding.for_training(TINY, mesh))
    with pytest.raises(InputError, match="Only training uses the context axis; it is 4"):
        Sharding.for_inference(TINY, mesh)


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    from train.data.batch import place
    from train.data.packing import pack

    monkeypatch.setattr(context, "_MAX_LOGITS", 2**16)
    model = dataclasses.replace(TINY, num_layers=1)
    objective, optimizer = NextToken(model, PretrainConfig(loss_chunk=64)), OptimizerConfig(Schedule(9))
    config = StepConfig("float32", "full")
    mesh = make_mesh({"context": 2})

    def temporary_bytes(length):
        rows = pack([np.arange(length) % 7], length)
        with jax.set_mesh(mesh):
            step = make_train_step(objective, optimizer, config, mesh).lower(
                abstract_state(model, optimizer, mesh), place(rows, mesh)
            )
            return step.compile({"xla_backend_optimization_level": "0"}).memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) < 2.2 * temporary_bytes(1024)
