"""Attention of new tokens over a cache, contiguous or paged, and one whole attention step of decoding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import platform
from qwen_jax.errors import InputError
from qwen_jax.kernels import reference
from qwen_jax.kernels.attention.coverage import Implementation, check_arguments, select_attention
from qwen_jax.kernels.decode.quantized import QuantizedRows
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.kernels.without_gradient import without_gradient

GATHERED_SLOTS = 2**18
"""Slots of pages in 8 bits that are gathered at a time, unless one row has more: 256 MiB of keys and as much of values
for a 7B model, converted to bfloat16."""


def decode_attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention of new tokens over a head-major cache: one token per row, a few, or a chunk of a prompt.

    Few query rows use a kernel that splits the keys over the whole chip, many query rows the kernel of `attention`.
    Runs on local arrays.

    Args:
      q_BTHd: queries.
      k_BKSd, v_BKSd: the cache. All its slots must be finite.
      mask: intervals over the S cache slots: lengths, left padding, windows, chunks at an offset (see `cache_mask`).
      scale: multiplies the logits; positive.
      implementation: see the table in `qwen_jax.kernels`.

    Returns:
      [B, T, H, d] in the dtype of q, and the log-sum-exp as from `attention`.

    Raises:
      InputError: as `attention`.
    """
    scale = check_arguments(q_BTHd, k_BKSd, v_BKSd, mask, scale, "[B, K, S, d]")
    (_, T, H, d), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    chosen = select_attention(implementation, q_BTHd, mask, return_lse=True, cache=True)
    args = q_BTHd, k_BKSd, v_BKSd, mask.k_start_BT, mask.k_end_BT
    if chosen == "gpu":
        from qwen_jax.kernels.attention import flash_gpu
        from qwen_jax.kernels.decode import flash_decode_gpu

        if _splits_keys(flash_decode_gpu.supports(q_BTHd.dtype, T, H, K, d, S), T, f"{H}/{K} heads, {S} slots"):
            return _run(flash_decode_gpu.attention, args, scale)
        return flash_gpu.attention(*args, scale, head_major=True)
    if chosen == "tpu":
        from qwen_jax.kernels.attention import flash_tpu
        from qwen_jax.kernels.decode import flash_decode_tpu

        if _splits_keys(flash_decode_tpu.supports(q_BTHd.dtype, T, H, K, d), T, f"{H}/{K} heads, {S} slots"):
            return _run(flash_decode_tpu.attention, args, scale)
        return flash_tpu.attention(*args, scale)
    return reference.attention(*args, scale=scale)


def _splits_keys(supported: bool, tokens: int, sizes: str) -> bool:
    """Whether the kernel that splits the keys runs, and not the one for many queries, which is slow for one token.

    Args:
      supported: whether it supports the call.
      tokens: new tokens per row.
      sizes: heads and slots, for messages.
    """
    few = Candidate("flash_decode", () if supported else ("few query rows and a cache of whole tiles",))
    many = Candidate("flash", slow=tokens == 1)
    return select([few, many], "auto", "attention kernel for a cache", f"{tokens} new tokens, {sizes}") == few.name


def quantized_attention(
    q_BTHd: jax.Array,
    keys: QuantizedRows,
    values: QuantizedRows,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` over a head-major cache in 8 bits.

    A kernel reads the 8 bits for few query rows. Otherwise, such as for a chunk of a prompt, keys and values of this
    layer are converted to the dtype of q first: 2 GiB for one layer of a 7B model with a million tokens, while the
    chunk's attention takes much longer than that copy.

    Args:
      q_BTHd: queries.
      keys, values: [B, K, S, d] of the same dtype, and a scale for each slot and head. All scales must be finite.
      mask: intervals over the S cache slots.
      scale: multiplies the logits; positive.
      implementation: see the table in `qwen_jax.kernels`.

    Returns:
      As `decode_attention`.

    Raises:
      InputError: as `attention`.
    """
    scales = keys.scales_BKS.shape, values.scales_BKS.shape
    fits = scales == (keys.shape[:-1], values.shape[:-1]) and keys.dtype == values.dtype
    if not fits or values.channels_Kd is not None:
        raise InputError(
            "An 8-bit cache needs one dtype, a scale for each vector, and factors of channels for keys only; got "
            f"{keys.dtype} {keys.shape} and {values.dtype} {values.shape} with scales {scales[0]} and {scales[1]}"
            f"{'' if values.channels_Kd is None else ', and factors for values'}."
        )
    k, v = (jax.ShapeDtypeStruct(x.shape, q_BTHd.dtype) for x in (keys, values))
    scale = check_arguments(q_BTHd, k, v, mask, scale, "[B, K, S, d]")
    (_, T, H, d), (K, S) = q_BTHd.shape, keys.shape[1:3]
    chosen = select_attention(implementation, q_BTHd, mask, return_lse=True, cache=True)
    cache, dtype = _arrays(keys, values), keys.dtype
    args = _times_channels(q_BTHd, keys.channels_Kd), *cache, mask.k_start_BT, mask.k_end_BT
    sizes = f"{dtype}, {H}/{K} heads, {S} slots"
    if chosen == "gpu":
        from qwen_jax.kernels.decode import flash_decode_int8_gpu

        if _reads_8_bits(flash_decode_int8_gpu.supports(q_BTHd.dtype, T, H, K, d, S), T, sizes):
            kernel = functools.partial(flash_decode_int8_gpu.attention, disjoint=mask.is_disjoint)
            return _run(kernel, args, scale)
    if chosen == "tpu":
        from qwen_jax.kernels.decode import flash_decode_tpu

        if _reads_8_bits(flash_decode_tpu.supports(q_BTHd.dtype, T, H, K, d), T, sizes):
            return _run(flash_decode_tpu.quantized_attention, args, scale)
    wide = keys.dequantized(q_BTHd.dtype), values.dequantized(q_BTHd.dtype)
    return decode_attention(q_BTHd, *wide, mask, scale=scale, implementation=_named(chosen))


def _arrays(keys: QuantizedRows, values: QuantizedRows) -> tuple[jax.Array, ...]:
    """What the kernels for 8 bits get of a cache."""
    return keys.values_BKSd, keys.scales_BKS, values.values_BKSd, values.scales_BKS


def _reads_8_bits(supported: bool, tokens: int, sizes: str) -> bool:
    """Whether a kernel reads the 8 bits, and not a converted copy of the cache.

    Args:
      supported: whether the kernel supports the call.
      tokens: new tokens per row.
      sizes: dtype, heads and slots, for messages.
    """
    needs = {"few query rows and a cache of whole tiles": supported}
    direct, copied = Candidate("8 bits", unmet(needs)), Candidate("converted copy", slow=tokens == 1)
    what = "attention over an 8-bit cache"
    return select([direct, copied], "auto", what, f"{tokens} new tokens, {sizes}") == direct.name


def _times_channels(q_BTHd: jax.Array, channels_Kd: jax.Array | None) -> jax.Array:
    """Queries times the factors of the keys' channels. The factors are powers of two, so that nothing is rounded."""
    if channels_Kd is None:
        return q_BTHd
    channels_Hd = jnp.repeat(channels_Kd, q_BTHd.shape[2] // channels_Kd.shape[0], axis=0)
    return (q_BTHd * channels_Hd).astype(q_BTHd.dtype)


def paged_attention(
    q_BTHd: jax.Array,
    k_NKPd: jax.Array | QuantizedRows,
    v_NKPd: jax.Array | QuantizedRows,
    pages_BM: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` over a paged cache: slot j of row b is slot j % P of page pages[b, j // P].

    The kernels read pages for few query rows: in the compute dtype, of a multiple of 16 slots, and in 8 bits, of a
    multiple of 32 slots. Otherwise the pages are gathered into a contiguous cache first, which costs a copy of all
    pages in the table; pages in 8 bits are copied as they are, for some rows at a time.

    Args:
      q_BTHd: queries.
      k_NKPd, v_NKPd: pages of P slots.
      pages_BM: int32 page table. Entries for slots that no row sees may have any value.
      mask: intervals over the M P slots of the table.
      scale: multiplies the logits; positive.
      implementation: see the table in `qwen_jax.kernels`.

    Returns:
      As `decode_attention`.

    Raises:
      InputError: as `attention`.
    """
    fits = q_BTHd.ndim == len(k_NKPd.shape) == 4 and pages_BM.ndim == 2 and k_NKPd.shape == v_NKPd.shape
    if not fits or pages_BM.shape[0] != q_BTHd.shape[0] or not jnp.issubdtype(pages_BM.dtype, jnp.integer):
        raise InputError(
            f"Paged attention needs q [B, T, H, d], keys and values [N, K, P, d] and an integer page table [B, M]; got "
            f"q {q_BTHd.shape}, {k_NKPd.shape}, {v_NKPd.shape} and {pages_BM.dtype} {pages_BM.shape}."
        )
    (B, T, H, d), (K, P), M = q_BTHd.shape, k_NKPd.shape[1:3], pages_BM.shape[1]
    quantized = isinstance(k_NKPd, QuantizedRows)
    if quantized != isinstance(v_NKPd, QuantizedRows):
        raise InputError("Paged attention needs keys and values that are both in 8 bits, or both not.")
    held = (q_BTHd.dtype, q_BTHd.dtype) if quantized else (k_NKPd.dtype, v_NKPd.dtype)
    k, v = (jax.ShapeDtypeStruct((B, K, M * P, k_NKPd.shape[3]), dtype) for dtype in held)
    scale = check_arguments(q_BTHd, k, v, mask, scale, "[B, K, S, d]")
    chosen = select_attention(implementation, q_BTHd, mask, return_lse=True, cache=True)
    keys: Any = k_NKPd
    values: Any = v_NKPd
    # The kernels get arrays only.
    table = pages_BM, mask.k_start_BT, mask.k_end_BT
    args: tuple[Any, ...] = q_BTHd, keys, values, *table
    sizes = f"{k_NKPd.dtype}, {H}/{K} heads, {M} pages of {P} slots"
    if chosen == "gpu":
        from qwen_jax.kernels.decode import flash_decode_gpu, flash_decode_int8_gpu

        kernel: Any = flash_decode_int8_gpu if quantized else flash_decode_gpu
        supported = kernel.supports(q_BTHd.dtype, T, H, K, d, M * P, P)
        if _reads_pages(supported, kernel.PAGE, T, sizes):
            if quantized:
                args = _times_channels(q_BTHd, keys.channels_Kd), *_arrays(keys, values), *table
            return _run(kernel.paged_attention, args, scale)
    if chosen == "tpu":
        from qwen_jax.kernels.decode import flash_decode_tpu

        supported = flash_decode_tpu.supports(q_BTHd.dtype, T, H, K, d, P, pages_BM.size)
        if quantized and _reads_pages(supported and P % 32 == 0, 32, T, sizes):
            scales = tuple(_gathered(x.scales_BKS, pages_BM) for x in (keys, values))
            q = _times_channels(q_BTHd, keys.channels_Kd)

            def paged_8_bits(*args: Any) -> tuple[jax.Array, jax.Array]:
                q, k, v, pages, start, end, k_scales, v_scales, scale = args
                return flash_decode_tpu.paged_attention(q, k, v, pages, start, end, scale, (k_scales, v_scales))

            return _run(paged_8_bits, (q, keys.values_BKSd, values.values_BKSd, *table, *scales), scale)
        if not quantized and _reads_pages(supported, 16, T, sizes):
            return _run(flash_decode_tpu.paged_attention, args, scale)
    how: Any = {"scale": scale, "implementation": _named(chosen)}
    if not quantized:
        return decode_attention(q_BTHd, _gathered(keys, pages_BM), _gathered(values, pages_BM), mask, **how)

    def attend(q_bTHd: jax.Array, pages_bM: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
        return quantized_attention(
            q_bTHd, _gathered_rows(keys, pages_bM), _gathered_rows(values, pages_bM), mask, **how
        )

    rows = max(i for i in range(1, B + 1) if B % i == 0 and (i == 1 or i * M * P <= GATHERED_SLOTS))
    if rows == B:
        return attend(q_BTHd, pages_BM, mask)
    parts = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), (q_BTHd, pages_BM, mask))
    found = jax.lax.map(lambda part: attend(*part), parts)
    out, lse = (x.reshape(B, *x.shape[2:]) for x in found)
    return out, lse


def _gathered(x_NKPd: jax.Array, pages_BM: jax.Array) -> jax.Array:
    """Pages, or their scales [N, K, P], as rows of one contiguous array each: [B, K, M P, d]."""
    (N, K, P), (B, M) = x_NKPd.shape[:3], pages_BM.shape
    x_BMKPd = x_NKPd[jnp.clip(pages_BM, 0, N - 1)]
    return x_BMKPd.swapaxes(1, 2).reshape(B, K, M * P, *x_NKPd.shape[3:])


def _gathered_rows(pages: QuantizedRows, pages_BM: jax.Array) -> QuantizedRows:
    values, scales = (_gathered(x, pages_BM) for x in (pages.values_BKSd, pages.scales_BKS))
    return QuantizedRows(values, scales, pages.channels_Kd)


def _reads_pages(supported: bool, multiple: int, tokens: int, sizes: str) -> bool:
    """Whether a kernel reads the pages where they are, and not a gathered copy of them.

    Args:
      supported: whether the kernel supports the sizes.
      multiple: what the slots of a page must be a multiple of.
      tokens: new tokens per row.
      sizes: dtype, heads and pages, for messages.
    """
    needs = {f"few query rows and pages of a multiple of {multiple} slots": supported}
    direct, copied = Candidate("pages", unmet(needs)), Candidate("gathered copy", slow=tokens == 1)
    return select([direct, copied], "auto", "paged attention", f"{tokens} new tokens, {sizes}") == direct.name


def _named(chosen: str) -> Implementation:
    named: Implementation = chosen  # type: ignore[assignment]  # one of its names
    return named


def supports_decode_step(
    implementation: Implementation,
    dtype: jax.typing.DTypeLike,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    cache: jax.Array | QuantizedRows,
    pages_BM: jax.Array | None = None,
) -> bool:
    """Whether `decode_step` or `paged_decode_step` is used for the next tokens. Logs the outcome once.

    Args:
      implementation: only "auto" selects it.
      dtype: of the activations.
      length: new tokens per row.
      num_heads, num_kv_heads: on one device.
      cache: keys or values of a layer, [B, K, S, d], or pages [N, K, P, d].
      pages_BM: page table, if there are pages.
    """
    if length != 1:
        return False
    size, d = cache.shape[2:]
    slots, page = (size, 0) if pages_BM is None else (size * pages_BM.shape[1], size)
    needs = {
        "a Hopper GPU": platform.on_hopper(),
        "bfloat16": jnp.dtype(dtype) == cache.dtype == jnp.bfloat16,
    }
    if all(needs.values()):
        # Imported only where it can run, because importing Pallas takes seconds.
        from qwen_jax.kernels.decode import step_gpu

        needs["sizes that the kernel supports"] = step_gpu.supports(num_heads, num_kv_heads, d, slots, page)
    fused, separate = Candidate("fused", unmet(needs)), Candidate("separate kernels")
    asked = "auto" if implementation == "auto" else separate.name
    sizes = f"{jnp.dtype(dtype)}, {num_heads}/{num_kv_heads} heads of {d}, {slots} slots"
    sizes += f" in pages of {page}" if page else ""
    return select([fused, separate], asked, "attention step of decoding", sizes) == fused.name


def supports_quantized_step(
    implementation: Implementation,
    dtype: jax.typing.DTypeLike,
    num_heads: int,
    num_kv_heads: int,
    cache: QuantizedRows,
    pages_BM: jax.Array | None = None,
) -> bool:
    """Whether a kernel for Hopper GPUs attends to a cache in 8 bits as it is, for one new token a row.

    Args:
      implementation, dtype, num_heads, num_kv_heads, cache, pages_BM: as for `supports_decode_step`.
    """
    if implementation != "auto" or not platform.on_hopper():
        return False
    from qwen_jax.kernels.decode import flash_decode_int8_gpu

    size, d = cache.shape[2:]
    slots, page = (size, 0) if pages_BM is None else (size * pages_BM.shape[1], size)
    return flash_decode_int8_gpu.supports(dtype, 1, num_heads, num_kv_heads, d, slots, page)


def decode_step(*args: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bias, RoPE, cache update and attention of one new token per row; see `step_gpu.decode_step`."""
    from qwen_jax.kernels.decode import step_gpu

    result: tuple[jax.Array, jax.Array, jax.Array] = step_gpu.decode_step(*args, scale=scale)
    return result


def paged_decode_step(*args: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`decode_step` over pages; see `step_gpu.paged_decode_step`."""
    from qwen_jax.kernels.decode import step_gpu

    result: tuple[jax.Array, jax.Array, jax.Array] = step_gpu.paged_decode_step(*args, scale=scale)
    return result


def _run(
    kernel: Callable[..., tuple[jax.Array, jax.Array]], arrays: tuple[jax.Array, ...], scale: float
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel that has no gradient."""
    message = "Decode attention by a kernel has no gradient. Use implementation='reference', or attention."
    return without_gradient(lambda *arrays: kernel(*arrays, scale), arrays, message)
