"""Quantising to Q4_K, Q5_K and Q6_K: 256 weights with a float16 scale, groups of them with small integer scales.

The scale of a group (and its minimum) is the one of a few candidates with the least squared error, where large weights
count more; each candidate is refitted by least squares to the codes that it gives. No importance matrix is used.
"""

import numpy as np

_BLOCK = 256
_STEPS = 20


def quantize_q6_k(rows: np.ndarray) -> np.ndarray:
    """Quantises rows to Q6_K: groups of 16, codes -32 to 31, scales of 8 bits.

    Args:
      rows: float32 [rows, columns], columns a multiple of 256.

    Returns:
      uint8 [rows, bytes of a row].
    """
    x = rows.reshape(-1, _BLOCK // 16, 16).astype(np.float32, copy=False)
    scales = _symmetric_scales(x)
    # The scales in units of d, which is chosen so that the largest of them is -128.
    largest = np.take_along_axis(scales, np.abs(scales).argmax(1, keepdims=True), 1)
    d = (largest / np.float32(-128)).astype(np.float16)
    steps = np.clip(np.rint(_ratio(scales, d.astype(np.float32))), -128, 127)
    unit = d.astype(np.float32) * steps
    q = (np.clip(np.rint(_ratio(x, unit[..., None])), -32, 31) + 32).astype(np.uint8)

    # Halves of 128 codes: 4 low bits of codes i and i + 64 in a byte, 2 high bits of i, i + 32, i + 64 and i + 96.
    halves = q.reshape(-1, 2, 4, 32)
    low = halves & 15
    low = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=-1)
    high = halves >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    fields = low.reshape(-1, 128), high.reshape(-1, 64), steps.astype(np.int8).view(np.uint8), d.view(np.uint8)
    return np.concatenate(fields, axis=1).reshape(len(rows), -1)


def quantize_q4_k(rows: np.ndarray) -> np.ndarray:
    """Quantises rows to Q4_K: groups of 32, codes 0 to 15, scales and minima of 6 bits.

    Args:
      rows: float32 [rows, columns], columns a multiple of 256.

    Returns:
      uint8 [rows, bytes of a row].
    """
    q, header = _affine(rows, 15)
    return np.concatenate([header, _nibbles(q)], axis=1).reshape(len(rows), -1)


def quantize_q5_k(rows: np.ndarray) -> np.ndarray:
    """Quantises rows to Q5_K, which is Q4_K with codes 0 to 31; as `quantize_q4_k`."""
    q, header = _affine(rows, 31)
    # Bit i of a byte is the fifth one of group i.
    high = np.packbits(q >> 4, axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([header, high, _nibbles(q & 15)], axis=1).reshape(len(rows), -1)


QUANTIZE = {"Q4_K": quantize_q4_k, "Q5_K": quantize_q5_k, "Q6_K": quantize_q6_k}
"""By the name of the type."""


def _nibbles(q: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, two groups in 32 bytes: [blocks, 128]."""
    pairs = q.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _affine(rows: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [blocks, 8, 32], 0 to `highest`; and the first 16 bytes of each block, its scales and minima."""
    x = rows.reshape(-1, _BLOCK // 32, 32).astype(np.float32, copy=False)
    scales, mins = _scales_and_minima(x, highest)
    d, dmin = ((part.max(1, keepdims=True) / np.float32(63)).astype(np.float16) for part in (scales, mins))
    units = d.astype(np.float32), dmin.astype(np.float32)
    steps, min_steps = (
        np.clip(np.rint(_ratio(part, unit)), 0, 63).astype(np.uint8)
        for part, unit in zip((scales, mins), units, strict=True)
    )
    q = _codes(x + (units[1] * min_steps)[..., None], units[0] * steps, 0, highest).astype(np.uint8)

    # 6 bits of 4 scales and 4 minima in 8 bytes; the other 8 numbers have 4 bits in 4 bytes, and 2 on top of the first.
    first = [part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (steps, min_steps)]
    packed = np.concatenate([*first, steps[:, 4:] & 15 | (min_steps[:, 4:] & 15) << 4], axis=1)
    return q, np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed], axis=1)


def _ratio(x: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """x / unit, and 0 where the unit is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(unit == 0, np.float32(0), x / unit)


def _codes(x: np.ndarray, unit: np.ndarray, low: int, high: int) -> np.ndarray:
    """The nearest codes to x in units of each group: float32 [blocks, groups, values]."""
    q = x * _ratio(np.ones_like(unit), unit)[..., None]
    return np.clip(np.rint(q, out=q), low, high, out=q)


def _sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums of products over the values of each group."""
    return np.einsum("bgv,bgv->bg", x, y)


def _symmetric_scales(x: np.ndarray) -> np.ndarray:
    """Scales of groups for codes -32 to 31: [blocks, groups] of x [blocks, groups, values]."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)[..., 0]
    weight, best, best_gain = x * x, np.zeros_like(extreme), np.full_like(extreme, -1)
    weighted_x = weight * x
    for step in range(-_STEPS // 2, _STEPS // 2):
        # The extreme value gets about -32, the code that has no counterpart.
        q = _codes(x, extreme / np.float32(-32 - 0.1 * step), -32, 31)
        # With these codes, the best scale is xq / qq, and it lowers the error by xq^2 / qq.
        xq, qq = _sum(weighted_x, q), _sum(weight, np.square(q))
        scale = _ratio(xq, qq)
        gain = scale * xq
        better = gain > best_gain
        best, best_gain = np.where(better, scale, best), np.where(better, gain, best_gain)
    return best


def _scales_and_minima(x: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of groups for codes 0 to `highest`, both at least 0: value = scale * code - minimum."""
    # A weight counts by its size; the mean keeps groups of small weights from counting nothing.
    weight = np.sqrt((x * x).mean(-1, keepdims=True)) + np.abs(x)
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    total, weighted_x, above = weight.sum(-1), weight * x, x - low[..., None]
    sum_x = weighted_x.sum(-1)
    best = (high - low) / np.float32(highest), -low
    best_error = np.full_like(low, np.inf)
    for step in range(_STEPS + 1):
        # Candidates: a few more or fewer steps between lowest and highest value.
        q = _codes(above, (high - low) / np.float32(highest - 1 + 0.1 * step), 0, highest)
        sum_q, sum_xq, sum_qq = _sum(weight, q), _sum(weighted_x, q), _sum(weight, np.square(q))
        # The line through the codes by least squares; its minimum may not lie above 0.
        determinant = total * sum_qq - sum_q * sum_q
        scale = _ratio(total * sum_xq - sum_x * sum_q, determinant)
        minimum = -_ratio(sum_qq * sum_x - sum_q * sum_xq, determinant)
        scale = np.where(minimum < 0, _ratio(sum_xq, sum_qq), scale)
        minimum = np.maximum(minimum, 0)
        # The weighted squared error, less that of zeros.
        error = scale * (scale * sum_qq - 2 * sum_xq) + minimum * (minimum * total + 2 * (sum_x - scale * sum_q))
        # All codes of a group may be equal; then there is no line through them.
        better = (error < best_error) & (determinant > 1e-5 * total * sum_qq) & (scale >= 0)
        best = np.where(better, scale, best[0]), np.where(better, minimum, best[1])
        best_error = np.where(better, error, best_error)
    return best
