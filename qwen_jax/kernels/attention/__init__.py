"""Attention for training and prefill: one function, and its gradient over a part of the keys."""

import functools
from typing import Literal, overload

import jax

from qwen_jax.errors import InputError
from qwen_jax.kernels import reference
from qwen_jax.kernels.attention.coverage import Implementation, check_arguments, select_attention
from qwen_jax.kernels.mask import Mask


@overload
def attention(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, mask: Mask, *, scale: float,
    implementation: Implementation = ..., recompute: bool = ..., return_lse: Literal[False] = ...,
) -> jax.Array: ...  # fmt: skip
@overload
def attention(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, mask: Mask, *, scale: float,
    implementation: Implementation = ..., recompute: bool = ..., return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip
def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
    recompute: bool = False,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Grouped-query attention over interval masks. Runs on local arrays: call it inside `jax.shard_map` on a mesh.

    Args:
      q_BTHd: queries.
      k_BSKd, v_BSKd: keys and values; H must be a multiple of K.
      mask: intervals over the S keys.
      scale: multiplies the logits; positive.
      implementation: see the table in `qwen_jax.kernels`.
      recompute: do not save [T, S] arrays for the backward pass but recompute them. Matters for the reference and xla;
        the other implementations never save them.
      return_lse: also return the log-sum-exp, with which `merge` combines outputs over parts of the keys.

    Returns:
      [B, T, H, d] in the dtype of q. A row that sees nothing gives zeros. With `return_lse` also the log-sum-exp of the
      logits, float32 [B, H, T], minus infinity where a row sees nothing.

    Raises:
      InputError: shapes that do not match, invalid intervals, or an implementation that does not support the call.
    """
    scale = check_arguments(q_BTHd, k_BSKd, v_BSKd, mask, scale, "[B, S, K, d]")
    chosen = select_attention(implementation, q_BTHd, mask, return_lse=return_lse)
    intervals = mask.k_start_BT, mask.k_end_BT
    # Kernels are imported where they are used, because importing Pallas takes seconds.
    if chosen == "gpu":
        from qwen_jax.kernels.attention import flash_gpu

        out, lse = flash_gpu.attention(q_BTHd, k_BSKd, v_BSKd, *intervals, scale)
    elif chosen == "tpu":
        from qwen_jax.kernels.attention import flash_tpu

        out, lse = flash_tpu.attention(q_BTHd, k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2), *intervals, scale)
    elif chosen == "cudnn":
        return jax.nn.dot_product_attention(q_BTHd, k_BSKd, v_BSKd, scale=scale, is_causal=True, implementation="cudnn")
    elif chosen == "xla":
        by_xla = functools.partial(reference.attention_by_xla, scale=scale)
        return (jax.checkpoint(by_xla) if recompute else by_xla)(q_BTHd, k_BSKd, v_BSKd, *intervals)
    else:
        plain = functools.partial(reference.attention, scale=scale)
        out, lse = (jax.checkpoint(plain) if recompute else plain)(
            q_BTHd, k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2), *intervals
        )
    return (out, lse) if return_lse else out


def attention_gradient(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask: Mask,
    out_BTHd: jax.Array,
    lse_BHT: jax.Array,
    dout_BTHd: jax.Array,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of attention with respect to the queries and to a part of the keys and values.

    `attention` has its own gradient. This function is for callers that hold the keys in parts, as ring attention does:
    given output and log-sum-exp over all keys, the contribution of a part needs nothing else of the other parts. Runs
    on local arrays.

    Args:
      q_BTHd: queries.
      k_BSKd, v_BSKd: a part of the keys and values.
      mask: intervals over the S keys of the part.
      out_BTHd, lse_BHT: attention over all keys, as from `merge`.
      dout_BTHd: the gradient with respect to the output.
      scale: multiplies the logits; positive.
      implementation: see the table in `qwen_jax.kernels`; one with a log-sum-exp.

    Returns:
      The contribution of the part to the gradient with respect to q, and the gradients with respect to k and v, each in
      the dtype of its argument.

    Raises:
      InputError: as `attention`.
    """
    scale = check_arguments(q_BTHd, k_BSKd, v_BSKd, mask, scale, "[B, S, K, d]")
    B, T, H, _ = q_BTHd.shape
    if (out_BTHd.shape, dout_BTHd.shape) != (q_BTHd.shape,) * 2 or lse_BHT.shape != (B, H, T):
        raise InputError(
            f"The gradient of attention with q {q_BTHd.shape} needs an output and a gradient of that shape and "
            f"a log-sum-exp {(B, H, T)}; got {out_BTHd.shape}, {dout_BTHd.shape} and {lse_BHT.shape}."
        )
    chosen = select_attention(implementation, q_BTHd, mask, return_lse=True)
    residuals = mask.k_start_BT, mask.k_end_BT, out_BTHd, lse_BHT, dout_BTHd
    if chosen == "gpu":
        from qwen_jax.kernels.attention import flash_gpu

        return flash_gpu.gradient(q_BTHd, k_BSKd, v_BSKd, *residuals, scale)
    k_BKSd, v_BKSd = k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2)
    if chosen == "tpu":
        from qwen_jax.kernels.attention import flash_tpu

        dq, dk, dv = flash_tpu.gradient(q_BTHd, k_BKSd, v_BKSd, *residuals, scale)
    else:
        dq, dk, dv = reference.gradient(q_BTHd, k_BKSd, v_BKSd, *residuals, scale=scale)
    return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2)
