"""Sparse prefill inside `jax.shard_map`: heads on two devices give what one device gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import sparse
from qwen_jax.attention.sparse import Part, PooledBlocks, VerticalSlash
from qwen_jax.parallel.sharding import make_mesh

B, H, K, T, S, D = 1, 4, 2, 256, 512, 16
LINES = VerticalSlash(((90,) * H,), ((90,) * H,))


@pytest.mark.parametrize("pattern", [LINES, PooledBlocks(0.0, 0, 1)], ids=["lines", "blocks"])
def test_heads_on_two_devices(pattern: Any) -> None:
    """Outputs and diagnostics are the same up to rounding, also where capacities are too small. Types of arrays in
    loops and branches agree, which `shard_map` checks."""
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((B, T, H, D), (B, K, S, D), (B, K, S, D)))
    budgets = jnp.asarray(rng.integers(50, 90, (H, 2)) * np.array([1, 3]), jnp.int32)
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(128), T)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, budgets: jax.Array, mask: kernels.Mask, slot: jax.Array) -> Any:
        return sparse.attend([Part(q, mask)], k, v, pattern, slot=slot, budgets_H2=budgets, scale=0.25, max_pieces=2)

    want = jax.jit(run)(q, k, v, budgets, mask, jnp.int32(128))
    assert np.asarray(want[2].pieces_cut_BH).sum() > 0
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    heads, kv, rows = P(None, None, "tensor"), P(None, "tensor"), P("tensor")
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((q, heads), (k, kv), (v, kv), (budgets, rows))]
        sharded = jax.shard_map(run, in_specs=(heads, kv, kv, rows, P(), P()), out_specs=(heads, kv, kv))
        got = jax.jit(sharded)(*arrays, mask, jnp.int32(128))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
