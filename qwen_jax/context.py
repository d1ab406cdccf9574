"""The context axis: the tokens of a row split over devices, each with a like share of causal work.

A row is cut into 2n chunks for n devices; device i has chunks i and 2n - 1 - i, an early one and a late one. Positions
and mask intervals travel with the tokens, so only attention must know: it gathers keys and values and puts them back
into the order of the row, which is what intervals count.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import kernels
from qwen_jax.errors import InputError
from qwen_jax.sharding import Sharding

# Logits of one block of queries: 512 MiB in float32.
_LOGITS = 2**27


def spread(x_BT: jax.Array, sharding: Sharding) -> jax.Array:
    """Puts rows where the model wants them, in the order described above.

    Args:
      x_BT: tokens, or anything else that is one number for each of them; rows are whole on each device.
      sharding: of the current mesh.

    Returns:
      [B, T], laid out as `sharding.tokens`.

    Raises:
      InputError: T does not divide into 2n chunks.
    """
    n, (B, T) = sharding.context, x_BT.shape
    if n > 1:
        if T % (2 * n):
            raise InputError(
                f"Rows of {T} tokens do not divide into {2 * n} chunks, two for each device of the context axis. "
                f"Choose a length that is a multiple of {2 * n}."
            )
        early_BnC = x_BT[:, : T // 2].reshape(B, n, -1)
        late_BnC = jnp.flip(x_BT[:, T // 2 :].reshape(B, n, -1), axis=1)
        x_BT = jnp.stack([early_BnC, late_BnC], axis=2).reshape(B, T)
    return jax.reshard(x_BT, sharding.tokens)


def _whole(x_BtKd: jax.Array, n: int) -> jax.Array:
    """Keys or values of whole rows, in order, from each device's part."""
    x_BTKd = lax.all_gather(x_BtKd, "context", axis=1, tiled=True)
    B, T, *rest = x_BTKd.shape
    x = x_BTKd.reshape(B, n, 2, T // (2 * n), *rest)
    early, late = x[:, :, 0], jnp.flip(x[:, :, 1], axis=1)
    return jnp.concatenate([early, late], axis=1).reshape(B, T, *rest)


def attention(
    q_BtHd: jax.Array,
    k_BtKd: jax.Array,
    v_BtKd: jax.Array,
    mask: kernels.Mask,
    n: int,
    *,
    scale: float,
    implementation: kernels.Implementation,
    recompute: bool = False,
) -> jax.Array:
    """Attention of a device's own queries over the keys of whole rows. Runs on local arrays, inside `jax.shard_map`.

    Where the logits would be large, queries go a block at a time, and the backward pass makes the logits of a block
    again: memory grows with the length and not with its square.

    Args:
      q_BtHd: queries.
      k_BtKd, v_BtKd: keys and values, in the places that `spread` gave their tokens.
      mask: of these queries; intervals over the keys in the order of the row.
      n: size of the context axis.
      scale, implementation, recompute: see `kernels.attention`.

    Returns:
      [B, t, H, d] in the dtype of q.
    """
    B, t, H, d = q_BtHd.shape
    k_BTKd, v_BTKd = (x if n == 1 else _whole(x, n) for x in (k_BtKd, v_BtKd))
    # Of a part of a row no mask is known to be causal.
    mask = mask if n == 1 else kernels.Mask(mask.k_start_BT, mask.k_end_BT)
    blocks = 1
    if kernels.choose(implementation, q_BtHd, mask) == "reference":
        while t % (2 * blocks) == 0 and B * H * (t // blocks) * k_BTKd.shape[1] > _LOGITS:
            blocks *= 2
    if blocks == 1:
        return kernels.attention(
            q_BtHd, k_BTKd, v_BTKd, mask, scale=scale, implementation=implementation, recompute=recompute or n > 1
        )
    # Every block adds to the gradients of keys and values: they must add up in float32.
    wide_k, wide_v = k_BTKd.astype(jnp.float32), v_BTKd.astype(jnp.float32)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, blocks, t // blocks, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, start, end = inputs
        k, v = wide_k.astype(k_BTKd.dtype), wide_v.astype(v_BTKd.dtype)
        return kernels.attention(q, k, v, kernels.Mask(start, end), scale=scale, implementation=implementation)

    out = lax.map(one, (cut(q_BtHd), cut(mask.k_start_BT), cut(mask.k_end_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, t, H, d)
