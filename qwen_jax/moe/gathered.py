"""Dropless dispatch by gathering: every device of the expert axis gets all tokens, and the sums travel back.

With few devices on the axis, most tokens have an expert on most devices. Copies of rows then take no fewer bytes than
all tokens (`qwen_jax.moe.traffic`), and an all-gather needs neither sorting before it nor pieces of unequal size:

1. All-gathers bring the N tokens of each of the n devices to all of them, M = n N in all, with their expert ids and the
   router's weights.
2. Each device sorts the M k assignments, its own experts' first, and multiplies the rows of its own experts.
3. Each device sums its rows of every token in float32 and rounds the sum to the dtype of the tokens. One all-to-all
   brings these partial sums to the token's device, which adds them in float32. It sends as many bytes as a
   reduce-scatter of that dtype, which would round after each addition.

The gradient of the gathering is the exchange of sums, and the other way round. Rows that find no room come in further
rounds (`qwen_jax.moe.further_rounds`), as in the exchange of rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.moe.dispatch import (
    Dispatched,
    RowOrder,
    exchange_room,
    gather_rows,
    multiply_sorted,
    own_experts,
    permute,
    sort_by_expert,
    sum_assignments,
)
from qwen_jax.moe.exchange import AXIS
from qwen_jax.moe.experts import Matrices
from qwen_jax.moe.router import MoEContext, RouterOutput


@jax.custom_vjp
def gather_tokens(x_N: jax.Array) -> jax.Array:
    """Gathers the tokens [N, ...] of all devices of the expert axis, [M, ...]. The gradient is `exchange_sums`."""
    return lax.all_gather(x_N, AXIS, tiled=True)


@jax.custom_vjp
def exchange_sums(partial_M: jax.Array) -> jax.Array:
    """Brings the partial sums of each token to its device and adds them in float32; the transpose of `gather_tokens`.

    Args:
      partial_M: [M, ...], this device's partial sums of all tokens, in the dtype in which they travel.

    Returns:
      Float32 [N, ...], the sums of this device's tokens.
    """
    n = jax.sharding.get_abstract_mesh().shape[AXIS]
    parts = partial_M.reshape(n, partial_M.shape[0] // n, *partial_M.shape[1:])
    return lax.all_to_all(parts, AXIS, 0, 0).astype(jnp.float32).sum(0)


gather_tokens.defvjp(
    lambda x: (gather_tokens(x), None),
    lambda _, dy: (exchange_sums(dy).astype(dy.dtype),),
)
exchange_sums.defvjp(
    # The backward pass needs the dtype of the partial sums; an empty slice carries it.
    lambda partial: (exchange_sums(partial), partial[:0]),
    lambda empty, dout: (gather_tokens(dout.astype(empty.dtype)),),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatheredInfo:
    """Where the rows of one round are; implements `qwen_jax.moe.dispatch.ExchangeInfo`.

    Attributes:
      order: the sorted order of the assignments of all tokens of the axis. Those of this device's experts come first.
      sizes_e: int32, number of rows of all rounds for each expert of this device.
      begin: int32 scalar, the position of the first row of this round.
      ids_Nk: the experts of each token of this device.
    """

    order: RowOrder
    sizes_e: jax.Array
    begin: jax.Array
    ids_Nk: jax.Array

    def multiply(
        self, context: MoEContext, rows: jax.Array, matrices: Matrices, scales: jax.Array | None = None
    ) -> jax.Array:
        """Grouped product of the rows of this round. What follows the last expert's rows is never read."""
        ends_e = jnp.cumsum(self.sizes_e, dtype=jnp.int32)
        begin, end = self.begin, self.begin + rows.shape[0]
        sizes_e = jnp.clip(ends_e, begin, end) - jnp.clip(ends_e - self.sizes_e, begin, end)
        return multiply_sorted(context, rows, matrices, sizes_e, self.ids_Nk.size, False, scales)

    def combine(self, context: MoEContext, rows: jax.Array) -> jax.Array:
        """Sums the rows of each token here, exchanges these sums and adds them; rows of other rounds count as zero."""
        window = self._window(rows.shape[0])
        partial_MD = sum_assignments(rows, window, context.config.num_experts_per_tok)
        return exchange_sums(partial_MD.astype(rows.dtype))

    def num_rows(self) -> jax.Array:
        """Number of rows for the experts of this device."""
        return self.sizes_e.sum()

    def sources(self, context: MoEContext, routed: RouterOutput) -> tuple[jax.Array, jax.Array]:
        """The tokens of all devices of the axis [M, D], and the router's weights of their assignments [M k]."""
        return gather_tokens(routed.x_ND), gather_tokens(routed.weights_Nk).reshape(-1)

    def round(self, context: MoEContext, i: int | jax.Array, room: int) -> "GatheredInfo":
        """The rows from position i room on."""
        return dataclasses.replace(self, begin=jnp.asarray(i * room, jnp.int32))

    def receive(
        self, context: MoEContext, rows: jax.Array, weights: jax.Array, room: int
    ) -> tuple[jax.Array, jax.Array]:
        """Copies the token of each row of this round. Rows after the last expert's are of other tokens."""
        window = self._window(room)
        return gather_rows(rows, window, context.config.num_experts_per_tok), permute(weights, window)

    def _window(self, room: int) -> RowOrder:
        """The positions of this round; assignments of other rounds, and of other devices' experts, are missing."""
        # Past the end there are positions without an assignment. No expert has them, so any assignment serves.
        order_R = self.order.order_A.at[self.begin + jnp.arange(room)].get(mode="clip")
        within_A = self.order.inverse_A - self.begin
        is_here = (within_A >= 0) & (within_A < jnp.minimum(room, self.num_rows() - self.begin))
        return RowOrder(order_R, jnp.where(is_here, within_A, room), partial=True)


def dispatch_gathered(context: MoEContext, routed: RouterOutput) -> Dispatched:
    """Gathers the tokens of the expert axis and sorts the rows of this device's experts to the front.

    If there are more of them than a device has room for, those beyond are left out; see
    `qwen_jax.moe.further_rounds`.

    Args:
      context: static settings.
      routed: the router's decisions for this device's tokens.
    """
    room, _ = exchange_room(context, routed.x_ND.shape[0])
    # Sort: this device's rows by expert, then all others and padding.
    expert_A = own_experts(context, lax.all_gather(routed.masked_ids_Nk, AXIS, tiled=True).reshape(-1))
    order, sizes_e = sort_by_expert(expert_A, context.config.num_experts // context.sharding.expert)
    info = GatheredInfo(order, sizes_e, jnp.zeros((), jnp.int32), routed.ids_Nk)
    # Gather.
    rows, weights = info.receive(context, *info.sources(context, routed), room)
    return Dispatched(rows, weights, 0.0, info)
