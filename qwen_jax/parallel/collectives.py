"""Collectives for sharded weights, written out, for use inside `jax.shard_map`.

A weight that is sharded over `fsdp` is gathered where it is used, and its gradient is reduce-scattered: half the bytes
of an all-reduce that keeps a part of its result. A compiler may still choose the all-reduce; `qwen-jax plan` says what
it chose (docs/plan.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import platform
from qwen_jax.parallel.sharding import Sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather_weight(x: jax.Array, axis: int, name: str = "fsdp") -> jax.Array:
    """All-gather along an axis of x over a mesh axis; the gradient is reduce-scattered."""
    return lax.all_gather(x, name, axis=axis, tiled=True)


def _gather_forward(x: jax.Array, axis: int, name: str) -> tuple[jax.Array, None]:
    return all_gather_weight(x, axis, name), None


def _gather_backward(axis: int, name: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (scatter_gradient(gradient, axis, name),)


all_gather_weight.defvjp(_gather_forward, _gather_backward)


def scatter_gradient(gradient: jax.Array, axis: int, name: str = "fsdp") -> jax.Array:
    """This device's shard of the gradient with respect to a gathered weight, summed over a mesh axis.

    Args:
      gradient: with respect to the whole weight.
      axis: of the gradient, along which the weight is sharded.
      name: of the mesh axis.
    """
    # Shards in a leading axis: the TPU compiler forms no reduce-scatter along an axis whose shards do not fill tiles.
    return reduce_scatter(_parts(gradient, axis, name), 0, name).squeeze(0)


def reduce_scatter(x: jax.Array, axis: int, name: str = "fsdp") -> jax.Array:
    """This device's shard, along an axis of x, of the sum over a mesh axis."""
    if platform.platform() != "cpu" or not jax.distributed.is_initialized():
        return lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
    # Processes on CPUs use Gloo. Its reduce-scatter may overwrite data that it has yet to send, which silently gives
    # wrong results at times (jaxlib 0.10.2 and 0.12.0.dev; https://github.com/jax-ml/jax/issues/40830).
    return lax.all_to_all(_parts(x, axis, name), name, 0, 0).sum(0)


def _parts(x: jax.Array, axis: int, name: str) -> jax.Array:
    """[n, ...]: x cut into the shards of a mesh axis, along an axis of x."""
    n = jax.sharding.get_abstract_mesh().shape[name]
    return jnp.moveaxis(x.reshape(*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :]), axis, 0)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, sharding: Sharding) -> jax.Array:
    """Rows of a sharded embedding table. Call it outside `shard_map`.

    The table is not gathered: each device looks up its shard of every row for the tokens of all `fsdp` shards, and the
    shards are exchanged. The gradient is accumulated in the table's own dtype.

    Args:
      table_VD: sharded over `tensor` and `fsdp`.
      tokens_BT: int32 ids.
      dtype: of the result.
      sharding: of the current mesh.

    Returns:
      [B, T, D] in `Sharding.hidden`.
    """

    @jax.shard_map(in_specs=(sharding.vocab, sharding.tokens), out_specs=sharding.hidden)
    def local(table_vd: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        ids = lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True) - lax.axis_index("tensor") * table_vd.shape[0]
        here = (ids >= 0) & (ids < table_vd.shape[0])
        # Rows of other shards are left out of the sum and of the gradient.
        found = jnp.where(here[..., None], table_vd[jnp.where(here, ids, 0)], 0).astype(dtype)
        return lax.all_to_all(lax.psum(found, "tensor"), "fsdp", split_axis=0, concat_axis=2, tiled=True)

    x_BTD: jax.Array = local(table_VD, tokens_BT)
    return x_BTD
