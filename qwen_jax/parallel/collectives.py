"""Products with weights that lie split over a mesh, with the collectives written out.

A weight split over `fsdp` is gathered where it is used, and its gradient is scattered as it is summed: half the bytes
of summing it everywhere and keeping a part. A compiler may still choose otherwise, and `qwen-jax plan` says what it
made of it (docs/plan.md: when it sums everywhere instead on TPUs).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.parallel.sharding import Sharding
from qwen_jax.platform import platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, axis: int, name: str = "fsdp") -> jax.Array:
    """A whole from its parts over the mesh axis of that name, which lie along an axis of x. In a `shard_map`."""
    return lax.all_gather(x, name, axis=axis, tiled=True)


def _gather_forward(x: jax.Array, axis: int, name: str) -> tuple[jax.Array, None]:
    return gather(x, axis, name), None


def _gather_backward(axis: int, name: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Parts in front: the TPU compiler makes no reduce-scatter along an axis whose parts do not fill whole tiles.
    return (reduce_scatter(_parts(gradient, axis, name), 0, name).squeeze(0),)


gather.defvjp(_gather_forward, _gather_backward)


def reduce_scatter(x: jax.Array, axis: int, name: str = "fsdp") -> jax.Array:
    """A device's part, along an axis, of the sum of x over the mesh axis of that name. In a `shard_map`."""
    if platform() != "cpu" or not jax.distributed.is_initialized():
        return lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
    # Processes on CPUs use Gloo, whose reduce-scatter may overwrite what it has yet to send: at times a part is wrong
    # and nothing says so (jaxlib 0.10.2 and 0.12.0.dev; https://github.com/jax-ml/jax/issues/40830).
    return lax.all_to_all(_parts(x, axis, name), name, 0, 0).sum(0)


def _parts(x: jax.Array, axis: int, name: str) -> jax.Array:
    """[n, ...]: what each device of a mesh axis gets of x, along an axis."""
    n = jax.sharding.get_abstract_mesh().shape[name]
    return jnp.moveaxis(x.reshape(*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :]), axis, 0)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, sharding: Sharding) -> jax.Array:
    """Rows of the embedding table.

    The table stays where it lies: each device looks up its part of every row for the tokens of all `fsdp` shards, and
    the parts are exchanged. The gradient adds up in the table's own dtype.

    Args:
      table_VD: split over `tensor` and `fsdp`.
      tokens_BT: int32 ids.
      dtype: of the result.
      sharding: of the current mesh.

    Returns:
      [B, T, D], laid out as `sharding.hidden`.
    """

    def local(table_vd: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        ids = lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True) - lax.axis_index("tensor") * table_vd.shape[0]
        here = (ids >= 0) & (ids < table_vd.shape[0])
        # A row that another shard has is left out of the sum, and of the gradient.
        found = jnp.where(here[..., None], table_vd[jnp.where(here, ids, 0)], 0).astype(dtype)
        return lax.all_to_all(lax.psum(found, "tensor"), "fsdp", split_axis=0, concat_axis=2, tiled=True)

    run = jax.shard_map(local, in_specs=(sharding.vocab, sharding.tokens), out_specs=sharding.hidden)
    result: jax.Array = run(table_VD, tokens_BT)
    return result
