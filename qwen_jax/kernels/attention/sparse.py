"""Attention over parts of the keys that differ by query head: listed pieces of a cache, and gathered columns."""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from qwen_jax import platform
from qwen_jax.errors import InputError
from qwen_jax.kernels import reference_sparse
from qwen_jax.kernels.attention.coverage import Implementation, check_arguments, check_arrays
from qwen_jax.kernels.attention.lists import NOWHERE, KeyLists
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.kernels.without_gradient import without_gradient

_NO_GRADIENT = "Sparse attention by a kernel has no gradient. Use implementation='reference'."


def sparse_attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    mask: Mask,
    lists: KeyLists,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention over a head-major cache, where each tile of queries sees only listed pieces of the keys.

    A query sees a key if the mask lets it and the key lies in a listed piece. So a piece may reach beyond the mask, and
    beyond the end of the cache. Runs on local arrays.

    Args:
      q_BTHd: queries.
      k_BKSd, v_BKSd: the cache. All its slots must be finite.
      mask: intervals over the S cache slots.
      lists: pieces for each row, query head and tile of queries.
      scale: multiplies the logits; positive.
      implementation: "auto", "gpu", "tpu" or "reference". The kernels have no gradient.

    Returns:
      [B, T, H, d] in the dtype of q, and the log-sum-exp of the logits, float32 [B, H, T]. A row that sees nothing
      gives zeros and minus infinity.

    Raises:
      InputError: shapes that do not match, invalid intervals or lists, or an implementation that does not support the
        call.
    """
    scale = check_arguments(q_BTHd, k_BKSd, v_BKSd, mask, scale, "[B, K, S, d]")
    B, T, H, _ = q_BTHd.shape
    lists.check(B, T, H)
    chosen = _select(implementation, "sparse attention", q_BTHd, lists.rows, lists.size)
    start, end = jnp.maximum(mask.k_start_BT, 0), jnp.minimum(mask.k_end_BT, k_BKSd.shape[2])
    args = q_BTHd, k_BKSd, v_BKSd, start, end, lists
    if chosen == "gpu":
        from qwen_jax.kernels.attention import sparse_gpu

        lists.check_multiple(8)
        return without_gradient(lambda *args: sparse_gpu.attention(*args, scale), args, _NO_GRADIENT)
    if chosen == "tpu":
        from qwen_jax.kernels.attention import sparse_tpu

        lists.check_multiple(lists.size)
        return without_gradient(functools.partial(sparse_tpu.attention, scale=scale), args, _NO_GRADIENT)
    return reference_sparse.sparse_attention(*args, scale=scale)


def column_attention(
    q_BTHd: jax.Array,
    k_BJCd: jax.Array,
    v_BJCd: jax.Array,
    mask: Mask,
    places_BHNC: jax.Array,
    *,
    scale: float,
    bias: float = 0.0,
    rows: int = 128,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention over gathered keys, each of which counts as a key at a place that is given for each tile of queries.

    A query sees a column if the mask lets it see a key at the place of the column. This serves single keys that were
    gathered from a cache, and means of blocks of keys. Runs on local arrays.

    Args:
      q_BTHd: queries.
      k_BJCd, v_BJCd: gathered keys and values. H must be a multiple of J: own columns for each query head, or columns
        that the query heads of a key/value head share.
      mask: intervals over places.
      places_BHNC: int32, for each row, query head and tile of queries the place of each column; N is
        ceil(T / rows). 2**30 switches a column off for the tile.
      scale: multiplies the logits; positive.
      bias: is added to the logits after the multiplication, in natural units.
      rows: queries of a tile.
      implementation: "auto", "gpu", "tpu" or "reference". The kernels have no gradient.

    Returns:
      As `sparse_attention`.

    Raises:
      InputError: as `sparse_attention`.
    """
    scale = check_arrays(q_BTHd, k_BJCd, v_BJCd, mask, scale, "[B, J, C, d]")
    mask.check(NOWHERE)
    B, T, H, _ = q_BTHd.shape
    expected = B, H, -(-T // max(rows, 1)), k_BJCd.shape[2]
    if rows < 1 or places_BHNC.shape != expected or places_BHNC.dtype != jnp.int32:
        raise InputError(
            f"Expected int32 places {expected}, one for each row, query head, tile of {rows} queries and column; got "
            f"{places_BHNC.dtype} {places_BHNC.shape}."
        )
    if isinstance(bias, jax.core.Tracer):
        raise InputError(f"Expected a number as the bias of column attention, known while tracing; got {bias}.")
    chosen = _select(implementation, "column attention", q_BTHd, rows)
    # An end beyond every place must not switch on what is switched off.
    start, end, bias = jnp.maximum(mask.k_start_BT, 0), jnp.minimum(mask.k_end_BT, NOWHERE), float(bias)
    args = q_BTHd, k_BJCd, v_BJCd, start, end, places_BHNC
    if chosen == "gpu":
        from qwen_jax.kernels.attention import sparse_gpu

        return without_gradient(lambda *args: sparse_gpu.columns(*args, scale, bias, rows), args, _NO_GRADIENT)
    if chosen == "tpu":
        from qwen_jax.kernels.attention import sparse_tpu

        return without_gradient(
            functools.partial(sparse_tpu.columns, scale=scale, bias=bias, rows=rows), args, _NO_GRADIENT
        )
    return reference_sparse.column_attention(*args, scale=scale, bias=bias, rows=rows)


def _select(asked: str, what: str, q: jax.Array, rows: int, size: int = 128) -> str:
    """The implementation that runs.

    Args:
      asked: "auto" or a name.
      what: the operation, for messages.
      q: queries.
      rows, size: queries of a tile and keys of a piece.
    """
    d, dtype = q.shape[3], q.dtype.name
    candidates = [
        Candidate(
            "gpu",
            unmet({
                "a Hopper GPU": platform.on_hopper(),
                "bfloat16 or float16": dtype in ("bfloat16", "float16"),
                "head_dim 64 or 128": d in (64, 128),
                "tiles of 128 queries": rows == 128,
                "pieces of 64 or 128 keys": size in (64, 128),
            }),
        ),
        Candidate(
            "tpu",
            unmet({
                "a TPU": platform.platform() == "tpu",
                "its kernel, which this version does not have": _has_tpu_kernel(),
                "bfloat16 or float32": dtype in ("bfloat16", "float32"),
                "head_dim 64 or 128": d in (64, 128),
                "tiles of 128, 256 or 512 queries": rows in (128, 256, 512),
                "pieces of 128 keys": size == 128,
            }),
        ),
        Candidate("reference", slow=True),
    ]  # fmt: skip
    return select(candidates, asked, what, f"{q.dtype}, head_dim {d}, tiles of {rows} queries, pieces of {size} keys")


def _has_tpu_kernel() -> bool:
    return importlib.util.find_spec("qwen_jax.kernels.attention.sparse_tpu") is not None
