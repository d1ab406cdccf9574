"""Dropless dispatch: rows are sorted by expert, sent to the devices of their experts, and returned.

A row is a copy of a token for one of its experts; there are A = N k of them. No row is dropped. `dispatch_dropless`
returns the rows, and an info object that multiplies them with the experts' matrices and combines the results.
`qwen_jax.moe.capacity` has the same interface.
"""

import dataclasses
import functools
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.matmul import quantized_grouped
from qwen_jax.kernels.matmul.grouped import grouped_matmul
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

    def multiply(self, context: MoEContext, rows: jax.Array, matrices: Matrices) -> jax.Array:
        """Multiplies each row with the transposed matrix of its expert.

        Args:
          context: static settings.
          rows: as dispatched, or the result of an earlier product; K wide.
          matrices: [N, K], one for each expert of this device.

        Returns:
          Rows in the same layout, N wide, in the dtype of `rows`.
        """

    def combine(self, context: MoEContext, rows: jax.Array) -> jax.Array:
        """Returns the results to the devices of their tokens and sums those of each token, float32 [N, D]."""


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
    y = info.multiply(context, codes, matrices)
    # A row of dispatch may give several rows of the result, which follow each other.
    return (y * jnp.repeat(scales, y.shape[0] // scales.shape[0], axis=0)).astype(y.dtype)


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
      order_A: the assignment at each position of the sorted order.
      inverse_A: the position of each assignment in the sorted order.
    """

    order_A: jax.Array
    inverse_A: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_rows(x_ND: jax.Array, order: RowOrder, k: int) -> jax.Array:
    """Copies the token of each assignment, in sorted order. The gradient is a gather too, not a scatter."""
    return x_ND[order.order_A // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_assignments(y_AD: jax.Array, order: RowOrder, k: int) -> jax.Array:
    """Sums the rows of each token in float32; the transpose of `gather_rows`."""
    return y_AD[order.inverse_A].reshape(-1, k, y_AD.shape[-1]).astype(jnp.float32).sum(1)


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


permute.defvjp(lambda x, order: (x[order.order_A], order), lambda order, dy: (dy[order.inverse_A], None))


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

    def multiply(self, context: MoEContext, rows: jax.Array, matrices: Matrices) -> jax.Array:
        """Grouped product of rows sorted by expert. What follows the last expert's rows is never read."""
        if isinstance(matrices, QuantizedMatrices):
            if rows.shape[0] <= quantized_grouped.MAX_ROWS:
                return grouped_quantized_matmul(rows, matrices, self.sizes_e, implementation=context.quantized)
            matrices = matrices.values(rows.dtype)
        # Without an exchange, padding and the rows of experts on other devices come last; their results must be zero.
        return grouped_matmul(
            rows, matrices, self.sizes_e, expected=self.ids_Nk.size, fill=self.plan is None,
            implementation=context.grouped,
        )  # fmt: skip

    def combine(self, context: MoEContext, rows: jax.Array) -> jax.Array:
        """Returns the rows and sums those of each token. Rows that are left to further rounds count as zero."""
        if self.plan is not None:
            rows = send_back(rows, self.plan.window(0, rows.shape[0]), self.ids_Nk.size)
        return sum_assignments(rows, self.order, context.config.num_experts_per_tok)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FewRowsInfo:
    """Rows that are too few to sort: each is multiplied on its own; implements `DispatchInfo`.

    Attributes:
      ids_A: the expert of each assignment.
    """

    ids_A: jax.Array

    def multiply(self, context: MoEContext, rows: jax.Array, matrices: Matrices) -> jax.Array:
        """Products of single rows: one row per token in the first product, one per assignment in the second."""
        A = self.ids_A.shape[0]
        if isinstance(matrices, QuantizedMatrices):
            rows = jnp.repeat(rows, A // rows.shape[0], axis=0)
            return selected_quantized_matmul(rows, matrices, self.ids_A, implementation=context.quantized)
        products = [_multiply_row(matrices, self.ids_A[a], rows[a * rows.shape[0] // A]) for a in range(A)]
        return jnp.stack(products)

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
    sharding, E, k = context.sharding, context.config.num_experts, context.config.num_experts_per_tok
    A, n = routed.ids_Nk.size, sharding.expert
    e = E // n
    # Few rows: nothing to sort or send. This path has no mask for padding, so it needs all tokens to be valid.
    if A <= _FEW_ROWS and n == 1 and routed.valid_N is None:
        return Dispatched(routed.x_ND, routed.weights_Nk.reshape(-1), 0.0, FewRowsInfo(routed.ids_Nk.reshape(-1)))

    # Sort: by expert. Padding, and rows of experts that other devices compute, come last.
    expert_A = routed.masked_ids_Nk.reshape(-1)
    if n > 1 and not sharding.exchanges:
        expert_A = expert_A - lax.axis_index(AXIS) * e
        expert_A = jnp.where((expert_A >= 0) & (expert_A < e), expert_A, e)
    order_A = jnp.argsort(expert_A, stable=True)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(A, dtype=order_A.dtype), unique_indices=True)
    sizes = (expert_A[:, None] == jnp.arange(E if sharding.exchanges else e)).sum(0, dtype=jnp.int32)
    order = RowOrder(order_A, inverse_A)
    rows = gather_rows(routed.x_ND, order, k)
    weights = permute(routed.weights_Nk.reshape(-1), order)

    # Send: to the devices of the experts, as many rows as these have room for.
    plan = None
    if sharding.exchanges:
        plan, (room, _) = plan_exchange(sizes, n), exchange_room(context, routed.x_ND.shape[0])
        first = plan.window(0, room)
        rows, weights, sizes = send(rows, first, room), send_scalars(weights, first, room), first.sizes_e
    return Dispatched(rows, weights, 0.0, DroplessInfo(order, sizes, plan, routed.ids_Nk))


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
