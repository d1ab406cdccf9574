"""Turns at the tiles of a grouped product: each block takes the next tile when it can feed it, from a counter of all.

Dealt out beforehand, tiles of unequal length let blocks drift apart, until what one reads has left L2 before the next
one wants it.
"""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.hopper import run_on_one_thread
from qwen_jax.kernels.gpu.tiles import rem


def turn_scratch(listeners: int) -> dict[str, Any]:
    """What the warpgroups of a block tell one another by which tile is next: of this turn, and of the one after.

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
    """Adds one to the counter, and notes what it was."""
    count = ".reg .u32 before; atom.relaxed.gpu.global.add.u32 before, [$0], 1; st.shared.u32 [$1], before;"
    run_on_one_thread(count, counter_ref, before_smem)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def _set_to_zero(_: Any, counter_ref: Any) -> None:
    run_on_one_thread("st.relaxed.gpu.global.u32 [$0], 0;", counter_ref)


def _take(turn: Any, counter_ref: Any, taken_smem: Any) -> Any:
    """The number of the next tile that no block has, which is this block's in that turn."""
    slot = rem(turn, 2)
    _count_up(counter_ref, taken_smem.at[pl.ds(slot, 1)])
    return taken_smem[slot]


def hand_out(
    tiles: Any, feed: Callable[..., Any], finish: Callable[..., None], carry: Any, counter_ref: Any, *,
    taken_smem: Any, told: Any, heard: Any,
) -> None:  # fmt: skip
    """Takes tiles as long as there are any, tells those that multiply, and feeds them.

    Args:
      tiles: how many there are.
      feed: is given the number of a tile and the carry, and gives the next one.
      finish: is given the last carry, and does what those that multiply still wait for.
      carry: the first one.
      counter_ref: int32 [1], zero, shared by all blocks; and zero again when all of them are done. It is part of an
        operand: it cannot be a mutable array of its own, which JAX does not take through a scan that is differentiated.
        Two kernels may get the same one, where XLA finds their operands equal, so they must not run at one time; and
        XLA runs those of a device one after the other, unless its command buffers are told to be concurrent.
      taken_smem, told, heard: of `turn_scratch`.
    """

    def take(turn: Any) -> Any:
        slot = rem(turn, 2)
        pl.when(turn >= 2)(lambda: plgpu.barrier_wait(heard.at[slot]))
        n = _take(turn, counter_ref, taken_smem)
        plgpu.barrier_arrive(told.at[slot])
        return n

    def one(state: Any) -> Any:
        turn, n, carry = state
        carry = feed(n, carry)
        return turn + 1, take(turn + 1), carry

    # Those that multiply hear of the one beyond the last, too.
    last, beyond, carry = lax.while_loop(lambda state: state[1] < tiles, one, (jnp.int32(0), take(jnp.int32(0)), carry))
    # Each block has taken one that is not there; nobody takes any after the last of these.
    pl.when(beyond == tiles + (lax.axis_size("block") - 1))(lambda: _set_to_zero(counter_ref))
    finish(carry)
    lax.fori_loop(jnp.maximum(last - 1, 0), last + 1, lambda i, _: plgpu.barrier_wait(heard.at[rem(i, 2)]), None)


def hear(turn: Any, taken_smem: Any, told: Any, heard: Any) -> Any:
    """What `hand_out` took for that turn; to be asked once for every turn, in order."""
    slot = rem(turn, 2)
    plgpu.barrier_wait(told.at[slot])
    n = taken_smem[slot]
    plgpu.barrier_arrive(heard.at[slot])
    return n
