"""Attention and its gradients in float64, with which every kernel is compared."""

from typing import Any, NamedTuple

import numpy as np


class Exact(NamedTuple):
    """Results in float64: output [B, T, H, d], log-sum-exp [B, H, T], and gradients if requested."""

    out: np.ndarray
    lse: np.ndarray
    dq: Any = None
    dk: Any = None
    dv: Any = None


def attention(q: Any, k: Any, v: Any, start: Any, end: Any, scale: float, dout: Any = None, dlse: Any = None) -> Exact:
    """Attention over interval masks.

    Args:
      q: [B, T, H, d].
      k, v: [B, S, K, d].
      start, end: [B, T].
      scale: of the logits.
      dout, dlse: gradients with respect to the output, and to the log-sum-exp of rows that see something.
    """
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    start, end = np.asarray(start), np.asarray(end)
    (B, H, _, d), (K, S) = q.shape, k.shape[1:3]
    wide_k, wide_v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
    j = np.arange(S)
    seen = ((start[..., None] <= j) & (j < end[..., None]))[:, None]
    logits = np.where(seen, q @ wide_k.swapaxes(2, 3) * scale, -np.inf)
    top = np.where(seen.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    p = weights / np.where(total == 0, 1, total)
    out = (p @ wide_v).swapaxes(1, 2)
    if dout is None:
        return Exact(out, lse)
    dout = np.asarray(dout, np.float64).swapaxes(1, 2)
    dp = dout @ wide_v.swapaxes(2, 3)
    taken = (p * dp).sum(-1, keepdims=True)
    if dlse is not None:
        taken = taken - np.asarray(dlse, np.float64)[..., None]
    slopes = p * (dp - taken) * scale

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(B, K, H // K, S, d).sum(2).swapaxes(1, 2)

    dk, dv = slopes.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
    return Exact(out, lse, (slopes @ wide_k).swapaxes(1, 2), grouped(dk), grouped(dv))


def relative(got: Any, want: Any) -> float:
    """Norm of the difference over the norm of the expected value; infinite if something is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6))
