"""Dropless dispatch: rows are sorted by expert, sent to the devices of their experts, and returned.

A row is a copy of a token for one of its experts; there are A = N k of them. No row is dropped. `dispatch_dropless`
returns the rows, and an info object that multiplies them with the experts' matrices and combines the results.
`qwen_jax.moe.capacity` has the same interface.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.matmul import quantized_grouped
from qwen_jax.kernels.matmul.grouped import grouped_matmul
from qwen_jax.kernels.matmul.grouped_codes import grouped_code_matmul, select_grouped_codes
from qwen_jax.kernels.matmul.quantized import rounded_rows
from qwen_jax.kernels.matmul.quantized_grouped import (
    QuantizedMatrices,
    grouped_quantized_matmul,
    selected_quantized_matmul,
)
from qwen_jax.moe.exchange import AXIS, ExchangePlan, plan_exchange, send, send_back, send_scalars
from qwen_jax.moe.experts import Matrices
from qwen_jax.moe.router import MoEContext, RouterOutput
from qwen_jax.quantization import Activations

ROOM = 1.5
"""Rows that a device has room for in one exchange, as a multiple of what it receives if the experts' loads are even.

Rows beyond that are exchanged in further rounds."""

# Products of so few rows are memory-bandwidth bound: each row reads the matrix of its expert, and no other is read.
_FEW_ROWS = 16


class DispatchInfo(Protocol):
    """What dispatch did with the rows; it computes the experts' products and combines their results."""

    def multiply(
        self, context: MoEContext, rows: jax.Array, matrices: Matrices, scales: jax.Array | None = None
    ) -> jax.Array:
        """Multiplies each row with the transposed matrix of its expert.

        Args:
          context: static settings.
          rows: as dispatched, or the result of an earlier product; K wide.
          matrices: [N, K], one for each expert of this device.
          scales: float32, of rows that were rounded and hold codes, one for each; their products are multiplied by it.

        Returns:
          Rows in the same layout, N wide, in the dtype of `rows`.
        """

    def combine(self, context: MoEContext, rows: jax.Array) -> jax.Array:
        """Returns the results to the devices of their tokens and sums those of each token, float32 [N, D]."""


class ExchangeInfo(DispatchInfo, Protocol):
    """The info of an exchange between the devices of the expert axis, which takes rounds if rows find no room."""

    @property
    def ids_Nk(self) -> jax.Array:
        """The experts of each token of this device."""

    def num_rows(self) -> jax.Array:
        """Number of rows that come to this device in all rounds together."""

    def sources(self, context: MoEContext, routed: RouterOutput) -> tuple[jax.Array, jax.Array]:
        """The arrays from which `receive` takes the rows and the router's weights of every round."""

    def round(self, context: MoEContext, i: int | jax.Array, room: int) -> "ExchangeInfo":
        """The info of round i alone.

        Args:
          context: static settings.
          i: number of the round, from 0.
          room: rows that a device has room for in a round.
        """

    def receive(
        self, context: MoEContext, rows: jax.Array, weights: jax.Array, room: int
    ) -> tuple[jax.Array, jax.Array]:
        """The rows of this round, sorted by expert, and the router's weight of each.

        Args:
          context: static settings.
          rows, weights: from `sources`.
          room: number of rows to return.
        """


def multiply_up(context: MoEContext, info: DispatchInfo, rows: jax.Array, gate_up_eFD: Matrices) -> jax.Array:
    """`info.multiply` with gate and up, after the rows were rounded if the model asks for it."""
    return _multiply(context, info, rows, gate_up_eFD, context.gate_up_activations, None)


def multiply_down(context: MoEContext, info: DispatchInfo, rows: jax.Array, down_eDF: Matrices) -> jax.Array:
    """`info.multiply` with down, whose inputs the tensor axis splits, after the rows were rounded likewise."""
    axis = "tensor" if context.sharding.tensor > 1 else None
    return _multiply(context, info, rows, down_eDF, context.down_activations, axis)


def _multiply(
    context: MoEContext,
    info: DispatchInfo,
    rows: jax.Array,
    matrices: Matrices,
    activations: Activations,
    axis: str | None,
) -> jax.Array:
    if activations == "none":
        return info.multiply(context, rows, matrices)
    codes, scales = rounded_rows(rows, activations, axis)
    return info.multiply(context, codes, matrices, scales)


def times_scales(y: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Products of rows times the scales of the rows, in float32, rounded to the dtype of the products."""
    return y if scales is None else (y * scales).astype(y.dtype)


class Dispatched(NamedTuple):
    """The result of dispatch.

    Attributes:
      rows: normalised tokens, in the layout that `info.multiply` expects.
      weights: the router's weight of each row.
      dropped: number of this device's rows that were dropped.
      info: where the rows are.
    """

    rows: jax.Array
    weights: jax.Array
    dropped: jax.Array | float
    info: DispatchInfo


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowOrder:
    """A permutation of the A assignments of tokens to experts; assignment a is expert a % k of token a // k.

    Attributes:
      order_A: the assignment at each position of the sorted order. If the order is partial, there may be fewer
        positions than assignments, and unused ones at the end.
      inverse_A: the position of each assignment in the sorted order.
      partial: assignments may be missing from the order: their position in `inverse_A` is out of range. Their rows
        count as zero.
    """

    order_A: jax.Array
    inverse_A: jax.Array
    partial: bool = dataclasses.field(default=False, metadata={"static": True})

    def rows_of_assignments(self, rows: jax.Array) -> jax.Array:
        """Puts sorted rows in the order of the assignments, [A, ...]; zeros for assignments that are missing."""
        if not self.partial:
            return rows[self.inverse_A]
        return rows.at[self.inverse_A].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_rows(x_ND: jax.Array, order: RowOrder, k: int) -> jax.Array:
    """Copies the token of each assignment, in sorted order. The gradient is a gather too, not a scatter."""
    return x_ND[order.order_A // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_assignments(y_AD: jax.Array, order: RowOrder, k: int) -> jax.Array:
    """Sums the rows of each token in float32; the transpose of `gather_rows`."""
    return order.rows_of_assignments(y_AD).reshape(-1, k, y_AD.shape[-1]).astype(jnp.float32).sum(1)


gather_rows.defvjp(
    lambda x, order, k: (gather_rows(x, order, k), order),
    lambda k, order, dy: (sum_assignments(dy, order, k).astype(dy.dtype), None),
)
sum_assignments.defvjp(
    # The backward pass needs the dtype of the rows; an empty slice carries it.
    lambda y, order, k: (sum_assignments(y, order, k), (order, y[:0])),
    lambda k, residuals, dout: (gather_rows(dout.astype(residuals[1].dtype), residuals[0], k), None),
)


@functools.partial(jax.custom_vjp)
def permute(x_A: jax.Array, order: RowOrder) -> jax.Array:
    """Puts one number for each assignment in sorted order. The gradient is the inverse permutation, a gather."""
    return x_A[order.order_A]


permute.defvjp(lambda x, order: (x[order.order_A], order), lambda order, dy: (order.rows_of_assignments(dy), None))


def sort_by_expert(expert_A: jax.Array, num_groups: int) -> tuple[RowOrder, jax.Array]:
    """Sorts assignments by expert; the order of those with the same expert stays.

    Args:
      expert_A: int32 expert of each assignment. Those of `num_groups` and above come last.
      num_groups: number of experts to count.

    Returns:
      The order, and the number of assignments to each of the experts, int32.
    """
    order_A = jnp.argsort(expert_A, stable=True)
    places_A = jnp.arange(order_A.shape[0], dtype=order_A.dtype)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(places_A, unique_indices=True)
    return RowOrder(order_A, inverse_A), (expert_A[:, None] == jnp.arange(num_groups)).sum(0, dtype=jnp.int32)


def own_experts(context: MoEContext, expert_A: jax.Array) -> jax.Array:
    """Numbers the e experts of this device from 0; all others, and the id of padding, become e."""
    e = context.config.num_experts // context.sharding.expert
    expert_A = expert_A - lax.axis_index(AXIS) * e
    return jnp.where((expert_A >= 0) & (expert_A < e), expert_A, e)


def multiply_sorted(
    context: MoEContext,
    rows: jax.Array,
    matrices: Matrices,
    sizes_e: jax.Array,
    expected: int,
    fill: bool,
    scales: jax.Array | None = None,
) -> jax.Array:
    """Grouped product of rows sorted by expert. What follows the last expert's rows is never read.

    Args:
      context: static settings.
      rows: [M, K], sorted by expert.
      matrices: [N, K], one for each expert of this device.
      sizes_e: int32, number of rows for each expert of this device.
      expected: about how many rows there will be.
      fill: the results of the rows after the last expert's are zero; otherwise they are undefined.
      scales: as for `DispatchInfo.multiply`.
    """
    if isinstance(matrices, QuantizedMatrices):
        if scales is not None:
            # Products of codes have no gradient.
            asked = "wide" if context.quantized == "plain" else "auto"
            chosen = select_grouped_codes(asked, rows.shape[0], rows.dtype, matrices)
            if chosen != "wide":
                how: Any = {"dtype": rows.dtype, "implementation": chosen, "expected": expected, "fill": fill}
                return grouped_code_matmul(rows, scales, matrices, sizes_e, **how)
        if rows.shape[0] <= quantized_grouped.MAX_ROWS:
            y = grouped_quantized_matmul(rows, matrices, sizes_e, implementation=context.quantized)
            return times_scales(y, scales)
        matrices = matrices.values(rows.dtype)
    y = grouped_matmul(rows, matrices, sizes_e, expected=expected, fill=fill, implementation=context.grouped)
    return times_scales(y, scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DroplessInfo:
    """Where dropless dispatch placed the rows; implements `DispatchInfo`.

    Attributes:
      order: the sorted order of this device's assignments.
      sizes_e: int32, number of rows here for each expert of this device.
      plan: of the exchange of all rows; None if rows are not exchanged.
      ids_Nk: the experts of each token.
    """

    order: RowOrder
    sizes_e: jax.Array
    plan: ExchangePlan | None
    ids_Nk: jax.Array

    def multiply(
        self, context: MoEContext, rows: jax.Array, matrices: Matrices, scales: jax.Array | None = None
    ) -> jax.Array:
        """Grouped product of rows sorted by expert. What follows the last expert's rows is never read."""
        # Without an exchange, padding and the rows of experts on other devices come last; their results must be zero.
        expected, fill = self.ids_Nk.size, self.plan is None
        return multiply_sorted(context, rows, matrices, self.sizes_e, expected, fill, scales)

    def combine(self, context: MoEContext, rows: jax.Array) -> jax.Array:
        """Returns the rows and sums those of each token. Rows that are left to further rounds count as zero."""
        if self.plan is not None:
            rows = send_back(rows, self.plan.window(0, rows.shape[0]), self.ids_Nk.size)
        return sum_assignments(rows, self.order, context.config.num_experts_per_tok)

    def sources(self, context: MoEContext, routed: RouterOutput) -> tuple[jax.Array, jax.Array]:
        """All rows of this device and their weights, sorted by expert."""
        rows = gather_rows(routed.x_ND, self.order, context.config.num_experts_per_tok)
        return rows, permute(routed.weights_Nk.reshape(-1), self.order)

    def num_rows(self) -> jax.Array:
        """Number of rows that come to this device."""
        assert self.plan is not None
        return self.plan.received_ne.sum()

    def round(self, context: MoEContext, i: int | jax.Array, room: int) -> "DroplessInfo":
        """Round i of an exchange with room for that many rows."""
        assert self.plan is not None
        window = self.plan.window(i * room, room)
        return dataclasses.replace(self, sizes_e=window.sizes_e, plan=window)

    def receive(
        self, context: MoEContext, rows: jax.Array, weights: jax.Array, room: int
    ) -> tuple[jax.Array, jax.Array]:
        """Sends the rows of this round to the devices of their experts."""
        assert self.plan is not None
        return send(rows, self.plan, room), send_scalars(weights, self.plan, room)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FewRowsInfo:
    """Rows that are too few to sort: each is multiplied on its own; implements `DispatchInfo`.

    Attributes:
      ids_A: the expert of each assignment.
    """

    ids_A: jax.Array

    def multiply(
        self, context: MoEContext, rows: jax.Array, matrices: Matrices, scales: jax.Array | None = None
    ) -> jax.Array:
        """Products of single rows: one row per token in the first product, one per assignment in the second."""
        A = self.ids_A.shape[0]
        if scales is not None:
            scales = jnp.repeat(scales, A // scales.shape[0], axis=0)
        if isinstance(matrices, QuantizedMatrices):
            rows = jnp.repeat(rows, A // rows.shape[0], axis=0)
            y = selected_quantized_matmul(rows, matrices, self.ids_A, implementation=context.quantized)
            return times_scales(y, scales)
        products = [_multiply_row(matrices, self.ids_A[a], rows[a * rows.shape[0] // A]) for a in range(A)]
        return times_scales(jnp.stack(products), scales)

    def combine(self, context: MoEContext, rows: jax.Array) -> jax.Array:
        """Sums the rows of each token; they are still in the tokens' order."""
        return rows.reshape(-1, context.config.num_experts_per_tok, rows.shape[-1]).astype(jnp.float32).sum(1)


def _multiply_row(w_ENK: jax.Array, expert: jax.Array, x_K: jax.Array) -> jax.Array:
    """One row times the transposed matrix of its expert."""
    w_NK = lax.dynamic_index_in_dim(w_ENK, expert, keepdims=False)
    return einsum_f32("nk,k->n", w_NK, x_K).astype(x_K.dtype)


def dispatch_dropless(context: MoEContext, routed: RouterOutput) -> Dispatched:
    """Sorts one device's rows by expert and sends them to the devices of their experts.

    Where all devices of the expert axis have the same rows, nothing is sent: each device sorts the rows of its own
    experts to the front. If the rows do not fit into the room of one exchange, those beyond are left out; see
    `qwen_jax.moe.further_rounds`.

    Args:
      context: static settings.
      routed: the router's decisions.
    """
    sharding, E = context.sharding, context.config.num_experts
    A, n = routed.ids_Nk.size, sharding.expert
    # Few rows: nothing to sort or send. This path has no mask for padding, so it needs all tokens to be valid.
    if A <= _FEW_ROWS and n == 1 and routed.valid_N is None:
        return Dispatched(routed.x_ND, routed.weights_Nk.reshape(-1), 0.0, FewRowsInfo(routed.ids_Nk.reshape(-1)))

    # Sort: by expert. Padding, and rows of experts that other devices compute, come last.
    expert_A = routed.masked_ids_Nk.reshape(-1)
    if n > 1 and not sharding.exchanges:
        expert_A = own_experts(context, expert_A)
    order, sizes = sort_by_expert(expert_A, E if sharding.exchanges else E // n)
    plan = plan_exchange(sizes, n) if sharding.exchanges else None
    info = DroplessInfo(order, sizes, plan, routed.ids_Nk)
    rows, weights = info.sources(context, routed)

    # Send: to the devices of the experts, as many rows as these have room for.
    if plan is not None:
        room, _ = exchange_room(context, routed.x_ND.shape[0])
        first = info.round(context, 0, room)
        rows, weights = first.receive(context, rows, weights, room)
        info = dataclasses.replace(info, sizes_e=first.sizes_e)
    return Dispatched(rows, weights, 0.0, info)


def exchange_room(context: MoEContext, num_tokens: int) -> tuple[int, int]:
    """Returns the rows that a device has room for in one exchange, and the most that it can receive at all.

    Args:
      context: static settings.
      num_tokens: of one device.
    """
    k, n = context.config.num_experts_per_tok, context.sharding.expert
    # The worst case: all tokens of all devices choose experts of one device.
    worst = n * num_tokens * min(k, context.config.num_experts // n)
    return min(math.ceil(ROOM * num_tokens * k), worst), worst
