"""Sequence parallelism: the context axis shards the tokens of a row, with an equal share of causal work on each device.

The order is zigzag. A row is cut into 2n chunks for n devices; device i has chunks i and 2n - 1 - i, an early one and a
late one. Positions and mask intervals are sharded like the tokens, so that only attention depends on the order. There
are two ways to attend:

- Gather: every device gathers the keys and values of whole rows, in the order of the row, which mask intervals count.
- Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel around the devices, and partial results are
  merged by their log-sum-exp. A device holds at most two shards of keys and values, and copies overlap with kernels.
  Gradients travel in float32, which costs more bytes, and kernels are called 2n times, each for 1/2n of the keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.errors import InputError
from qwen_jax.parallel.collectives import all_gather_weight
from qwen_jax.parallel.sharding import Sharding

# Logits that exist at one time without a kernel: 512 MiB in float32.
_MAX_LOGITS = 2**27


def check_length(length: int, n: int, where: str = "") -> None:
    """Checks that rows can be sharded over the context axis.

    Args:
      length: tokens in a row.
      n: size of the context axis.
      where: begins the message, such as "Stage 1: ".

    Raises:
      InputError: the length is not a multiple of 2n, and n is above 1.
    """
    if n > 1 and length % (2 * n):
        raise InputError(
            f"{where}Rows of {length} tokens do not divide into {2 * n} chunks, two for each device of the context "
            f"axis. Choose a length that is a multiple of {2 * n}."
        )


def zigzag_shard(x_BT: jax.Array, sharding: Sharding) -> jax.Array:
    """Shards rows over the context axis in zigzag order.

    Args:
      x_BT: token ids, or any other array with one number for each token; not sharded over the context axis.
      sharding: of the current mesh.

    Returns:
      [B, T] in `Sharding.tokens`.

    Raises:
      InputError: T is not a multiple of 2n.
    """
    n, (B, T) = sharding.context, x_BT.shape
    check_length(T, n)
    if n > 1:
        early_BnC = x_BT[:, : T // 2].reshape(B, n, -1)
        late_BnC = jnp.flip(x_BT[:, T // 2 :].reshape(B, n, -1), axis=1)
        x_BT = jnp.stack([early_BnC, late_BnC], axis=2).reshape(B, T)
    return jax.reshard(x_BT, sharding.tokens)


def zigzag_unshard(x_BT: jax.Array, sharding: Sharding) -> jax.Array:
    """Puts rows in zigzag order back into their own order: the inverse of `zigzag_shard`.

    Args:
      x_BT: in `Sharding.tokens`.
      sharding: of the current mesh.

    Returns:
      [B, T], not sharded over the context axis.
    """
    n, B = sharding.context, x_BT.shape[0]
    x_BT = jax.reshard(x_BT, P(sharding.rows[0], None))
    if n > 1:
        x_Bn2C = x_BT.reshape(B, n, 2, -1)
        early_BT, late_BT = x_Bn2C[:, :, 0].reshape(B, -1), jnp.flip(x_Bn2C[:, :, 1], axis=1).reshape(B, -1)
        x_BT = jnp.concatenate([early_BT, late_BT], axis=1)
    return x_BT


def _zigzag_gather(x_BtKd: jax.Array, n: int) -> jax.Array:
    """All-gathers keys or values over the context axis, into the order of the row."""
    x_BTKd = all_gather_weight(x_BtKd, 1, "context")
    B, T, *rest = x_BTKd.shape
    x = x_BTKd.reshape(B, n, 2, T // (2 * n), *rest)
    early, late = x[:, :, 0], jnp.flip(x[:, :, 1], axis=1)
    return jnp.concatenate([early, late], axis=1).reshape(B, T, *rest)


# Size of the axis, scale and implementation are static.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _ring(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, n: int, scale: float,
    implementation: kernels.Implementation,
) -> jax.Array:  # fmt: skip
    """Ring attention of a device's own queries; arguments as for `attention`."""
    return _ring_forward(q, k, v, start, end, n, scale, implementation)[0]


def _next(x: jax.Array, n: int) -> jax.Array:
    """Sends each device's shard to the next device."""
    return lax.ppermute(x, "context", [(i, (i + 1) % n) for i in range(n)])


def _halves(start: jax.Array, end: jax.Array, step: jax.Array, chunk: int, n: int) -> list[tuple[slice, kernels.Mask]]:
    """The two chunks of the shard that is here after `step` sends: slices, and masks of our queries over them."""
    owner = lax.rem(lax.axis_index("context") - step + n, n)
    parts = []
    for half, index in enumerate((owner, 2 * n - 1 - owner)):
        low, high = (jnp.clip(x - index * chunk, 0, chunk) for x in (start, end))
        parts.append((slice(half * chunk, (half + 1) * chunk), kernels.Mask(low, high)))
    return parts


def _ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, n: int, scale: float,
    implementation: kernels.Implementation,
) -> Any:  # fmt: skip
    how: Any = {"scale": scale, "implementation": implementation}
    chunk = k.shape[1] // 2

    def one_shard(carry: Any, step: jax.Array) -> tuple[Any, None]:
        merged, kv = carry
        # The next shard travels while this one is used.
        coming = _next(kv, n)
        parts = [
            kernels.attention(q, kv[0, :, at], kv[1, :, at], seen, return_lse=True, **how)
            for at, seen in _halves(start, end, step, chunk, n)
        ]
        return (kernels.merge([merged, *parts]), coming), None

    B, t, H, _ = q.shape
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((B, H, t), -jnp.inf, jnp.float32)
    ((out, lse), _), _ = lax.scan(one_shard, (nothing, jnp.stack([k, v])), jnp.arange(n, dtype=jnp.int32))
    out = out.astype(q.dtype)
    return out, (q, k, v, start, end, out, lse)


def _ring_backward(n: int, scale: float, implementation: kernels.Implementation, kept: Any, dout: jax.Array) -> Any:
    q, k, v, start, end, out, lse = kept
    how: Any = {"scale": scale, "implementation": implementation}
    chunk, f32 = k.shape[1] // 2, jnp.float32

    def one_shard(carry: Any, step: jax.Array) -> tuple[Any, None]:
        dq, dkv, kv = carry
        # The gradient of a shard follows it one step behind, and travels while this step is computed. The barrier
        # orders the two sends: devices that started them in different orders could deadlock.
        dkv, leaving = lax.optimization_barrier((_next(dkv, n), kv))
        coming = _next(leaving, n)
        for at, seen in _halves(start, end, step, chunk, n):
            own = kernels.attention_gradient(q, kv[0, :, at], kv[1, :, at], seen, out, lse, dout, **how)
            dq, dkv = dq + own[0], dkv.at[:, :, at].add(jnp.stack(own[1:]))
        return (dq, dkv, coming), None

    kv = jnp.stack([k, v])
    zeros = jnp.zeros(q.shape, f32), jnp.zeros(kv.shape, f32)
    (dq, dkv, _), _ = lax.scan(one_shard, (*zeros, kv), jnp.arange(n, dtype=jnp.int32))
    dk, dv = _next(dkv, n)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


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
    ring: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention of a device's own queries over the keys of whole rows. Runs on local arrays, inside `jax.shard_map`.

    Where no kernel is used and the logits would be large, queries are processed in blocks, and the backward pass
    recomputes the logits of a block: memory grows linearly with the length, not quadratically.

    Args:
      q_BtHd: queries.
      k_BtKd, v_BtKd: this device's keys and values, in zigzag order.
      mask: of these queries; intervals count keys in the order of the row.
      n: size of the context axis.
      scale, implementation, recompute: as for `kernels.attention`.
      ring: ring attention instead of gathering. Needs an implementation that returns the log-sum-exp, and a
        `shard_map` with check_vma=False.
      return_lse: also return the log-sum-exp [B, H, t]; not by ring attention.

    Returns:
      [B, t, H, d] in the dtype of q; with `return_lse` a pair.

    Raises:
      InputError: the log-sum-exp of ring attention.
    """
    # A mask over a shard of a row is not plain causal.
    mask = mask if n == 1 else kernels.Mask(mask.k_start_BT, mask.k_end_BT)
    if ring and n > 1 and return_lse:
        raise InputError("Ring attention gives no log-sum-exp, which dual-chunk attention needs. Use ring=False.")
    if ring and n > 1:
        chosen: Any = kernels.select_attention(implementation, q_BtHd, mask, return_lse=True)
        return _ring(q_BtHd, k_BtKd, v_BtKd, mask.k_start_BT, mask.k_end_BT, n, scale, chosen)
    B, t, H, d = q_BtHd.shape
    k_BTKd, v_BTKd = (x if n == 1 else _zigzag_gather(x, n) for x in (k_BtKd, v_BtKd))
    how: Any = {"scale": scale, "implementation": implementation, "return_lse": return_lse}
    blocks = 1
    if kernels.select_attention(implementation, q_BtHd, mask, return_lse=return_lse) == "reference":
        while t % (2 * blocks) == 0 and B * H * (t // blocks) * k_BTKd.shape[1] > _MAX_LOGITS:
            blocks *= 2
    if blocks == 1:
        return kernels.attention(q_BtHd, k_BTKd, v_BTKd, mask, recompute=recompute or n > 1, **how)
    # Every block adds to the gradients of keys and values, which must be accumulated in float32.
    wide_k, wide_v = k_BTKd.astype(jnp.float32), v_BTKd.astype(jnp.float32)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, blocks, t // blocks, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        q, start, end = inputs
        k, v = wide_k.astype(k_BTKd.dtype), wide_v.astype(v_BTKd.dtype)
        return kernels.attention(q, k, v, kernels.Mask(start, end), **how)

    result = lax.map(one_block, (cut(q_BtHd), cut(mask.k_start_BT), cut(mask.k_end_BT)))
    out = result[0] if return_lse else result
    out = jnp.moveaxis(out, 0, 1).reshape(B, t, H, d)
    return (out, jnp.moveaxis(result[1], 0, 2).reshape(B, H, t)) if return_lse else out
