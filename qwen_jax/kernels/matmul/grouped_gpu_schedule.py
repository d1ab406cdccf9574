"""Dynamic schedule of the tiles of a grouped product: a block claims the next tile from a counter of all blocks.

With a static schedule, tiles of different length let blocks drift apart, until what one block reads has left L2 before
the next one needs it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.hopper import run_on_one_thread
from qwen_jax.kernels.gpu.tiles import rem
from qwen_jax.kernels.types import Ref

Carry = TypeVar("Carry")


class TileQueue(NamedTuple):
    """How the copying warpgroup of a block tells the multiplying ones the next tile: of this turn and of the next one.

    Attributes:
      taken_smem: the claimed tiles of two turns.
      told, heard: barriers: the tile of a turn is written, and read by all.
    """

    taken_smem: Ref
    told: Ref
    heard: Ref


def queue_scratch(listeners: int) -> dict[str, object]:
    """The shared memory and barriers of a `TileQueue`.

    Args:
      listeners: warpgroups that multiply.
    """
    return {
        "taken_smem": plgpu.SMEM((2,), jnp.int32),
        "told": plgpu.Barrier(num_barriers=2),
        "heard": plgpu.Barrier(num_arrivals=listeners, num_barriers=2),
    }


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def _count_up(_: Any, counter_ref: Any, before_smem: Any) -> None:
    """Adds one to the counter and stores its previous value."""
    count = ".reg .u32 before; atom.relaxed.gpu.global.add.u32 before, [$0], 1; st.shared.u32 [$1], before;"
    run_on_one_thread(count, counter_ref, before_smem)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def _set_to_zero(_: Any, counter_ref: Any) -> None:
    run_on_one_thread("st.relaxed.gpu.global.u32 [$0], 0;", counter_ref)


def _claim(turn: jax.Array, counter_ref: Ref, taken_smem: Ref) -> jax.Array:
    """Claims the next tile, for this turn of this block."""
    slot = rem(turn, 2)
    _count_up(counter_ref, taken_smem.at[pl.ds(slot, 1)])
    return taken_smem[slot]


def claim_tiles(
    tiles: jax.Array,
    feed: Callable[[jax.Array, Carry], Carry],
    finish: Callable[[Carry], None],
    carry: Carry,
    counter_ref: Ref,
    queue: TileQueue,
) -> None:
    """Claims tiles while there are any, tells them to the warpgroups that multiply, and feeds those.

    Args:
      tiles: number of tiles.
      feed: copies what a tile needs; from the tile and the carry it returns the next carry.
      finish: gets the last carry, and does what the multiplying warpgroups still wait for.
      carry: the first one.
      counter_ref: int32 [1], zero, shared by all blocks, and zero again when all are done. It is part of an operand: a
        mutable array of its own would not work in a scan that is differentiated. XLA may give two kernels the same
        counter, if their operands are equal, so they must not run at the same time. XLA runs the kernels of a device
        one after the other, unless its command buffers are configured to be concurrent.
      queue: to the multiplying warpgroups.
    """

    def claim(turn: jax.Array) -> jax.Array:
        slot = rem(turn, 2)
        pl.when(turn >= 2)(lambda: plgpu.barrier_wait(queue.heard.at[slot]))
        n = _claim(turn, counter_ref, queue.taken_smem)
        plgpu.barrier_arrive(queue.told.at[slot])
        return n

    def one(state: tuple[jax.Array, jax.Array, Carry]) -> tuple[jax.Array, jax.Array, Carry]:
        turn, n, carry = state
        carry = feed(n, carry)
        return turn + 1, claim(turn + 1), carry

    # The multiplying warpgroups also receive the first index that is not a tile, and stop.
    begin = jnp.int32(0), claim(jnp.int32(0)), carry
    last, beyond, carry = lax.while_loop(lambda state: state[1] < tiles, one, begin)
    # Each block claims one index beyond the tiles. The block with the last of these resets the counter.
    pl.when(beyond == tiles + (lax.axis_size("block") - 1))(lambda: _set_to_zero(counter_ref))
    finish(carry)
    lax.fori_loop(jnp.maximum(last - 1, 0), last + 1, lambda i, _: plgpu.barrier_wait(queue.heard.at[rem(i, 2)]), None)


def receive_tile(turn: jax.Array, queue: TileQueue) -> jax.Array:
    """The tile that was claimed for a turn. Call it once for every turn, in order."""
    slot = rem(turn, 2)
    plgpu.barrier_wait(queue.told.at[slot])
    n = queue.taken_smem[slot]
    plgpu.barrier_arrive(queue.heard.at[slot])
    return n
