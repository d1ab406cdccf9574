"""What a program of the forward kernels for TPUs does with one tile of keys: a running softmax over a tile of queries.

Two bodies with the same interface. `KeysDown` holds the logits transposed, with keys as rows; `KeysAcross` has queries
as rows. `flash_tpu` explains when each is faster. The kernels differ in where their key tiles come from: `flash_tpu`
walks over a range of keys, `sparse_tpu` over a list.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.softmax import LOW, LOWEST
from qwen_jax.kernels.tpu.device import LANES, PACKED_ROWS, SUBLANES
from qwen_jax.kernels.tpu.tiles import product
from qwen_jax.kernels.types import Ref

_LN2 = math.log(2)

Hide: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, int, int], jax.Array]
"""`hide(s, low, high, at, axis)`: the logits s with `LOWEST` where a pair is masked. They are of the keys from `at` on
of a tile, along `axis`, and of queries with the intervals low to high, along the other axis."""


class QueryTile(NamedTuple):
    """References to the queries of a program, their intervals, and its results.

    Attributes:
      q, out: [queries, d].
      start, end: as the body's `ends` lays them out.
      lse: [1, queries].
    """

    q: Ref
    start: Ref
    end: Ref
    out: Ref
    lse: Ref


class KeysDown:
    """A running softmax with transposed logits: keys are rows and queries are columns.

    The queries form n columns of `lanes`; n is at least 2. The tile of a column goes through three stages: logits,
    softmax, and the product with the values. To keep both the matrix unit and the vector unit busy, a step runs the
    first stage of one column beside the second stage of the one `lag` columns back and the third stage of the one
    before that. At the first columns this reaches back into the previous step, and the last columns are finished after
    the last step.
    """

    class Memory(NamedTuple):
        """Scratch in VMEM: the running softmax, and what goes from stage to stage for each column of queries.

        Attributes:
          acc, top, total: accumulator, maximum and sum of all columns.
          logits, tops: logits of the last tile and their maxima, one for each column.
          probs, shrink: probabilities, and the factor that rescales the accumulator; two buffers.
          values: transposed values of a tile; two buffers.
        """

        acc: Ref
        top: Ref
        total: Ref
        logits: Ref
        tops: Ref
        probs: Ref
        shrink: Ref
        values: Ref

    @staticmethod
    def scratch(queries: int, keys: int, lanes: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, "pl.MemoryRef"]:
        """The scratch of a program, by the names of `Memory`."""
        f32, n = jnp.float32, queries // lanes
        return dict(
            acc=pltpu.VMEM((d, queries), f32),
            top=pltpu.VMEM((SUBLANES, queries), f32),
            total=pltpu.VMEM((SUBLANES, queries), f32),
            logits=pltpu.VMEM((n, keys, lanes), f32),
            tops=pltpu.VMEM((n, SUBLANES, lanes), f32),
            probs=pltpu.VMEM((2, keys, lanes), dtype),
            shrink=pltpu.VMEM((2, SUBLANES, lanes), f32),
            values=pltpu.VMEM((2, d, keys), dtype),
        )

    @staticmethod
    def ends(start_BT: jax.Array, end_BT: jax.Array) -> list[jax.Array]:
        """The intervals as this body compares them, [B, 1, T]."""
        return [start_BT[:, None], end_BT[:, None]]

    @staticmethod
    def ends_spec(queries: int) -> pl.BlockSpec:
        """The block of `ends` of a query tile; the first and third axis of the grid are rows and query tiles."""
        return pl.BlockSpec((None, 1, queries), lambda b, h, i, *_: (b, 0, i))

    def __init__(self, tile: QueryTile, scratch: dict[str, Ref], factor: float) -> None:
        self.tile, self.memory, self.factor = tile, self.Memory(**scratch), factor
        self.n, _, lanes = self.memory.logits.shape
        self.lag = max(self.n // 2, 1)
        self.columns = [slice(r * lanes, (r + 1) * lanes) for r in range(self.n)]

    def begin(self) -> None:
        """Before the first step."""
        acc, top, total, logits, tops, probs, shrink, values = self.memory
        top[...] = jnp.full_like(top, LOW)
        logits[...], tops[...] = jnp.full_like(logits, LOWEST), jnp.full_like(tops, LOWEST)
        for ref in (acc, total, probs, shrink, values):
            ref[...] = jnp.zeros_like(ref)

    def step(self, i: jax.Array, k: Ref, v: Ref, hide: Hide | None) -> None:
        """Adds a tile of keys.

        Args:
          i: index of the step; it grows by one from step to step.
          k, v: [keys, d].
          hide: the mask, or None if every pair is visible.
        """
        n, lag = self.n, self.lag
        self.memory.values[lax.rem(i, 2)] = v[...].T
        for r in range(n):
            self._compute_logits(r, k, hide)
            self._update_softmax((r - lag) % n)
            self._accumulate((r - lag - 1) % n, i if r > lag else i + 1)

    def finish(self, last: jax.Array) -> None:
        """After step `last` - 1, the last one: the stages that lag behind it, and the results."""
        acc, top, total = self.memory[:3]
        for r in range(self.n - self.lag, self.n):
            self._update_softmax(r)
            self._accumulate(r - 1, last + 1)
        self._accumulate(self.n - 1, last + 1)
        sums = total[...].sum(axis=0, keepdims=True)
        sees = sums > 0
        self.tile.out[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).T.astype(self.tile.out.dtype)
        self.tile.lse[...] = jnp.where(sees, top[:1] * _LN2 + jnp.log(sums), -jnp.inf)

    def _compute_logits(self, r: int, k: Ref, hide: Hide | None) -> None:
        (q, start, end, *_), here = self.tile, self.columns[r]
        s = product(k[...], q[here, :], transposed=True) * self.factor
        if hide is not None:
            s = hide(s, start[:, here], end[:, here], 0, 0)
        self.memory.logits[r] = s
        self.memory.tops[r] = s.reshape(-1, SUBLANES, s.shape[1]).max(axis=0)

    def _update_softmax(self, r: int) -> None:
        _, top, total, logits, tops, probs, shrink, _ = self.memory
        here, (_, keys, lanes) = self.columns[r], logits.shape
        packed = PACKED_ROWS * 2 // probs.dtype.itemsize
        new_top = jnp.maximum(top[:, here], tops[r].max(axis=0, keepdims=True))
        alpha = jnp.exp2(top[:, here] - new_top)
        sums = total[:, here] * alpha
        for at in range(0, keys, packed):
            p = jnp.exp2(logits[r, at : at + packed] - new_top[:1])
            sums += p.reshape(-1, SUBLANES, lanes).sum(axis=0)
            probs[r % 2, at : at + packed] = p.astype(probs.dtype)
        top[:, here], total[:, here], shrink[r % 2] = new_top, sums, alpha

    def _accumulate(self, r: int, i: jax.Array) -> None:
        acc, *_, probs, shrink, values = self.memory
        old = acc[:, self.columns[r]] * shrink[r % 2, :1]
        acc[:, self.columns[r]] = old + product(values[lax.rem(i, 2)], probs[r % 2])


class KeysAcross:
    """A running softmax with logits [queries, keys], for a head_dim that fills the matrix unit.

    There the kernel is bound by the matrix unit, and it is enough to compute the logits of the next rows beside the
    softmax of these rows. Each lane keeps its own sum until the end. The interface is that of `KeysDown`.
    """

    class Memory(NamedTuple):
        """Scratch in VMEM: accumulator, maximum and sum of the running softmax."""

        acc: Ref
        top: Ref
        total: Ref

    @staticmethod
    def scratch(queries: int, d: int) -> dict[str, "pl.MemoryRef"]:
        """The scratch of a program, by the names of `Memory`."""
        return {
            name: pltpu.VMEM((queries, n), jnp.float32) for name, n in (("acc", d), ("top", LANES), ("total", LANES))
        }

    @staticmethod
    def ends(start_BT: jax.Array, end_BT: jax.Array) -> list[jax.Array]:
        """The intervals in every lane, where they are compared: [B, T, 128].

        One number in a row would take as much space.
        """
        return [jnp.broadcast_to(x[:, :, None], (*x.shape, LANES)) for x in (start_BT, end_BT)]

    @staticmethod
    def ends_spec(queries: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, queries, LANES), lambda b, h, i, *_: (b, i, 0))

    def __init__(self, tile: QueryTile, scratch: dict[str, Ref], factor: float, height: int) -> None:
        """`height`: queries of one product."""
        self.tile, self.memory, self.factor = tile, self.Memory(**scratch), factor
        self.rows = [slice(r, r + height) for r in range(0, tile.q.shape[0], height)]

    def begin(self) -> None:
        acc, top, total = self.memory
        top[...] = jnp.full_like(top, LOW)
        acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)

    def step(self, i: jax.Array, k: Ref, v: Ref, hide: Hide | None) -> None:
        (q, start, end, *_), (acc, top, total), rows = self.tile, self.memory, self.rows
        keys, d = k.shape

        def logits(r: int) -> jax.Array:
            return product(q[rows[r], :], k[...], transposed=True) * self.factor

        s = logits(0)
        for r, here in enumerate(rows):
            following = logits(r + 1) if r + 1 < len(rows) else s
            parts = [s[:, at : at + LANES] for at in range(0, keys, LANES)]
            if hide is not None:
                parts = [hide(part, start[here, :], end[here, :], c * LANES, 1) for c, part in enumerate(parts)]
            highest = functools.reduce(jnp.maximum, parts).max(axis=1, keepdims=True)
            new_top = jnp.maximum(top[here, :], highest)
            alpha = jnp.exp2(top[here, :] - new_top)
            p = [jnp.exp2(part - new_top) for part in parts]
            total[here, :] = total[here, :] * alpha + functools.reduce(jnp.add, p)
            top[here, :] = new_top
            values = product(jnp.concatenate(p, axis=1).astype(v.dtype), v[...])
            acc[here, :] = acc[here, :] * alpha[:, :d] + values
            s = following

    def finish(self, last: jax.Array) -> None:
        acc, top, total = self.memory
        sums = total[...].sum(axis=1, keepdims=True)
        sees = sums > 0
        self.tile.out[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).astype(self.tile.out.dtype)
        self.tile.lse[...] = jnp.where(sees, top[...] * _LN2 + jnp.log(sums), -jnp.inf).T[:1]
