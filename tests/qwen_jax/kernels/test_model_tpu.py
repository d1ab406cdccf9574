"""The model with the kernels for TPUs, in TPU interpret mode: on meshes and with a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.sequence import zigzag_shard
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import bind, init_params
from qwen_jax.published import published
from tests.helpers.platforms import as_if_on

CONFIG = dataclasses.replace(published("tiny"), hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, num_layers=2)


@pytest.fixture(autouse=True)
def interpreted():
    with as_if_on("TPU"):
        yield


def gradients(axes: dict[str, int], attention: str, ring: bool = False):
    """Loss and gradients of two packed rows on a mesh."""
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    sharding = (Sharding.for_training if "context" in axes else Sharding.for_inference)(CONFIG, mesh)
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(0, CONFIG.vocab_size, (2, 96), dtype=np.int32)
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 24, axis=1).astype(np.int32)
    place = np.arange(96) % 24

    @jax.jit
    def run(params, *batch):
        mask = kernels.packed_mask(batch[1])
        tokens, positions, start, end = (
            zigzag_shard(x, sharding) for x in (batch[0], batch[2], mask.k_start_BT, mask.k_end_BT)
        )

        def loss(params):
            model = bind(CONFIG, params, sharding, Options(dtype="float32", attention=attention, ring=ring))
            logits = model.logits(model(tokens, positions, kernels.Mask(start, end)).hidden)
            return jnp.mean(jax.nn.logsumexp(logits, -1))

        return jax.value_and_grad(loss)(params)

    with jax.set_mesh(mesh):
        params = init_params(CONFIG, jax.random.key(0), mesh)
        rows = jax.NamedSharding(mesh, jax.P(*sharding.rows, None))
        arrays = (
            jax.device_put(x, rows) for x in (tokens, segments, np.broadcast_to(place, tokens.shape).astype(np.int32))
        )
        return jax.device_get(run(params, *arrays))


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("axes", "ring"),
    [({"data": 1}, False), ({"data": 2, "tensor": 2}, False), ({"context": 2}, False), ({"context": 2}, True)],
    ids=str,
)
def test_gradients_on_a_mesh_equal_the_reference(axes, ring) -> None:
    """Heads over tensor, rows over data, tokens over context, where keys are gathered or go round: the same kernel
    within shard_map, the same numbers."""
    got, want = gradients(axes, "tpu", ring), gradients({"data": 1}, "reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_chunked_prefill_and_decoding_equal_one_pass() -> None:
    """Chunks at an offset of a cache, then single tokens, each row from its own first slot."""
    mesh = make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_inference(CONFIG, mesh)
    options = Options(dtype="float32", attention="tpu", stacked=False)
    T, slots = 14, 32
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, T), dtype=np.int32)
    with jax.set_mesh(mesh):
        params = init_params(CONFIG, jax.random.key(0), mesh)

        @jax.jit
        def whole(params, tokens, positions):
            model = bind(CONFIG, params, sharding, Options(dtype="float32", attention="reference"))
            return model(tokens, positions, kernels.causal_mask(2, T)).hidden

        def place(x):
            return jax.device_put(np.asarray(x), jax.NamedSharding(mesh, sharding.tokens))

        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
        want = np.asarray(whole(params, place(tokens), place(positions)))
        layers = params["layers"]
        params = {**params, "layers": [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(CONFIG.num_layers)]}
        lengths = jnp.full((2,), 6, jnp.int32, out_sharding=sharding.rows)
        cache, got = ContiguousCache.for_prompts(CONFIG, sharding, lengths, slots, jnp.dtype("float32")), []
        # The first chunk attends to the cache too.
        cache = cache.advanced(0)

        @jax.jit
        def part(params, tokens, cache):
            model, size = bind(CONFIG, params, sharding, options), tokens.shape[1]
            output = model(tokens, cache.positions(size), cache.mask(size), cache=cache)
            return output.hidden, output.cache.advanced(size)

        first = 0
        for size in (6, 5, 1, 1, 1):
            x, cache = part(params, place(tokens[:, first : first + size]), cache)
            got.append(np.asarray(x))
            first += size
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=1e-3, atol=1e-4)
