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

    A tile forms units: its keys form parts, and for each part the queries form columns of `lanes`. The number of units
    is even. A unit goes through three stages: logits, softmax, and the product with the values. To keep both the matrix
    unit and the vector unit busy, a step runs the first stage of one unit beside the second stage of the one `lag`
    units back and the third stage of the one before that. At the first units this reaches back into the previous step,
    and the last units are finished after the last step.
    """

    class Memory(NamedTuple):
        """Scratch in VMEM: the running softmax, and what goes from stage to stage for each unit.

        Attributes:
          acc, top, total: accumulator, maximum and sum of all columns.
          logits, tops: logits of the last tile and their maxima, one for each unit.
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
    def scratch(
        queries: int, keys: int, lanes: int, d: int, dtype: jnp.dtype, parts: int = 1
    ) -> dict[str, "pl.MemoryRef"]:
        """The scratch of a program, by the names of `Memory`."""
        f32, units, size = jnp.float32, parts * queries // lanes, keys // parts
        return dict(
            acc=pltpu.VMEM((d, queries), f32),
            top=pltpu.VMEM((SUBLANES, queries), f32),
            total=pltpu.VMEM((SUBLANES, queries), f32),
            logits=pltpu.VMEM((units, size, lanes), f32),
            tops=pltpu.VMEM((units, SUBLANES, lanes), f32),
            probs=pltpu.VMEM((2, size, lanes), dtype),
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
        units, size, lanes = self.memory.logits.shape
        self.lag = units // 2
        # The queries and the keys of each unit.
        columns = [slice(r, r + lanes) for r in range(0, tile.q.shape[0], lanes)]
        parts = [slice(c, c + size) for c in range(0, self.memory.values.shape[2], size)]
        self.units = [(column, part) for part in parts for column in columns]

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
        units, lag = len(self.units), self.lag
        self.memory.values[lax.rem(i, 2)] = v[...].T
        for u in range(units):
            self._compute_logits(u, k, hide)
            self._update_softmax((u - lag) % units)
            self._accumulate((u - lag - 1) % units, i if u > lag else i + 1)

    def finish(self, last: jax.Array) -> None:
        """After step `last` - 1, the last one: the stages that lag behind it, and the results."""
        acc, top, total = self.memory[:3]
        units = len(self.units)
        for u in range(units - self.lag, units):
            self._update_softmax(u)
            self._accumulate(u - 1, last + 1)
        self._accumulate(units - 1, last + 1)
        sums = total[...].sum(axis=0, keepdims=True)
        sees = sums > 0
        self.tile.out[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).T.astype(self.tile.out.dtype)
        self.tile.lse[...] = jnp.where(sees, top[:1] * _LN2 + jnp.log(sums), -jnp.inf)

    def _compute_logits(self, u: int, k: Ref, hide: Hide | None) -> None:
        (q, start, end, *_), (here, part) = self.tile, self.units[u]
        s = product(k[part, :], q[here, :], transposed=True) * self.factor
        if hide is not None:
            s = hide(s, start[:, here], end[:, here], part.start, 0)
        self.memory.logits[u] = s
        self.memory.tops[u] = s.reshape(-1, SUBLANES, s.shape[1]).max(axis=0)

    def _update_softmax(self, u: int) -> None:
        _, top, total, logits, tops, probs, shrink, _ = self.memory
        (here, _), (_, size, lanes) = self.units[u], logits.shape
        packed = PACKED_ROWS * 2 // probs.dtype.itemsize
        new_top = jnp.maximum(top[:, here], tops[u].max(axis=0, keepdims=True))
        alpha = jnp.exp2(top[:, here] - new_top)
        sums = total[:, here] * alpha
        for at in range(0, size, packed):
            p = jnp.exp2(logits[u, at : at + packed] - new_top[:1])
            sums += p.reshape(-1, SUBLANES, lanes).sum(axis=0)
            probs[u % 2, at : at + packed] = p.astype(probs.dtype)
        top[:, here], total[:, here], shrink[u % 2] = new_top, sums, alpha

    def _accumulate(self, u: int, i: jax.Array) -> None:
        (acc, *_, probs, shrink, values), (here, part) = self.memory, self.units[u]
        acc[:, here] = acc[:, here] * shrink[u % 2, :1] + product(values[lax.rem(i, 2), :, part], probs[u % 2])


class KeysAcross:
    """A running softmax with logits [queries, keys], for a head_dim that fills the matrix unit.

    There the kernel is bound by the matrix unit, and it is enough to compute the logits of the next unit beside the
    softmax of this one. Each lane keeps its own sum until the end. The interface is that of `KeysDown`.
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

    def __init__(self, tile: QueryTile, scratch: dict[str, Ref], factor: float, height: int, parts: int = 1) -> None:
        """`height`: queries of one product; `parts`: into which the keys of a tile are divided."""
        self.tile, self.memory, self.factor, self.parts = tile, self.Memory(**scratch), factor, parts
        self.rows = [slice(r, r + height) for r in range(0, tile.q.shape[0], height)]

    def begin(self) -> None:
        acc, top, total = self.memory
        top[...] = jnp.full_like(top, LOW)
        acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)

    def step(self, i: jax.Array, k: Ref, v: Ref, hide: Hide | None) -> None:
        (q, start, end, *_), (acc, top, total) = self.tile, self.memory
        (keys, d), size = k.shape, k.shape[0] // self.parts
        units = [(here, slice(at, at + size)) for at in range(0, keys, size) for here in self.rows]

        def logits(u: int) -> jax.Array:
            here, part = units[u]
            return product(q[here, :], k[part, :], transposed=True) * self.factor

        s = logits(0)
        for u, (here, part) in enumerate(units):
            following = logits(u + 1) if u + 1 < len(units) else s
            strips = [s[:, at : at + LANES] for at in range(0, size, LANES)]
            if hide is not None:
                first = part.start
                strips = [hide(x, start[here, :], end[here, :], first + c * LANES, 1) for c, x in enumerate(strips)]
            highest = functools.reduce(jnp.maximum, strips).max(axis=1, keepdims=True)
            new_top = jnp.maximum(top[here, :], highest)
            alpha = jnp.exp2(top[here, :] - new_top)
            p = [jnp.exp2(x - new_top) for x in strips]
            total[here, :] = total[here, :] * alpha + functools.reduce(jnp.add, p)
            top[here, :] = new_top
            values = product(jnp.concatenate(p, axis=1).astype(v.dtype), v[part, :])
            acc[here, :] = acc[here, :] * alpha[:, :d] + values
            s = following

    def finish(self, last: jax.Array) -> None:
        acc, top, total = self.memory
        sums = total[...].sum(axis=1, keepdims=True)
        sees = sums > 0
        self.tile.out[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).astype(self.tile.out.dtype)
        self.tile.lse[...] = jnp.where(sees, top[...] * _LN2 + jnp.log(sums), -jnp.inf).T[:1]
