"""One token through an MoE layer on Hopper GPUs: everything between two attention steps, in one kernel.

It works as `layer_gpu`: thread blocks share products, with grid barriers between them, and in each block one warpgroup
copies weights ahead. The router is one more product, and at the barrier after it no block waits: a block signals that
its part of the router logits is written and goes on with the shared expert, whose weights are already being copied. The
copying warpgroup waits for the logits of all blocks, selects the experts, and goes on with their weights without a gap.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.config import MoE
from qwen_jax.kernels.decode import layer_gpu
from qwen_jax.kernels.decode.layer_gpu_products import (
    CHUNK,
    MAX_TILE,
    Memory,
    Product,
    add_and_norm,
    arrive,
    check,
    divide_product,
    fetch,
    grid_barrier,
    launch,
    multiply,
    record_round,
    result_of,
    round_memory,
    share,
    strided,
    total,
    wait_for_all_blocks,
)
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS
from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, wait_for_previous_kernel
from qwen_jax.kernels.gpu.tiles import PER_COLUMN
from qwen_jax.kernels.types import Ref

_LATE = 4.0
"""Microseconds that a block without a share of the shared expert waits for the selection of experts."""
_ROUTED = 3, 5
"""Which of the seven products are those of the selected experts: gate and up, and down."""


@functools.cache
def divide_two_products(
    shared: tuple[int, int], experts: tuple[int, int], gates: int, chosen: int, blocks: int
) -> tuple[Product, Product]:
    """Divides a product of the shared expert and one of the selected experts, distributed together, the shared first.

    Args:
      shared, experts: rows and columns of a matrix of each.
      gates: 2; or 1, where partial results are allowed.
      chosen: number of experts of a token.
      blocks: thread blocks that share the products.

    Raises:
      InputError: sizes that are not supported.
    """
    for outputs, inputs in (shared, experts):
        divide_product(outputs, inputs, gates, False, blocks)  # raises for sizes that are not supported
    # Of all pairs of tilings, the one whose slowest block finishes first.
    block, best = np.arange(blocks), None
    ways = [
        [
            Product(outputs, inputs, gates, tile, splits, n)
            for tile in range(8, min(MAX_TILE, outputs) + 1, 8)
            for splits in ((1, 2, 4, 8) if gates == 1 else (1,))
            if splits <= inputs // CHUNK
        ]
        for (outputs, inputs), n in ((shared, 1), (experts, chosen))
    ]
    for first, second in itertools.product(*ways):
        counts = [-(-(first.items - block) // blocks), -(-(second.items - (block - first.items) % blocks) // blocks)]
        time = counts[0] * first.microseconds + counts[1] * second.microseconds
        if gates == 2:
            time = time + (counts[0] == 0) * _LATE
            parts = 0
        else:
            parts = first.splits + second.splits * chosen
        cost = float(time.max()) + parts * shared[0] * 4 / 60e3
        if best is None or cost < best[0]:
            best = cost, (first, second)
    assert best is not None
    first, second = best[1]
    return first, Product(*experts, gates, second.tile, second.splits, chosen, first.items)


def supports(hidden: int, moe: MoE, heads: int, qkv: int, vocab: int) -> bool:
    """Whether the kernel supports the sizes of a model; see `layer_gpu.supports`."""
    widths = moe.intermediate_size, moe.shared_intermediate_size
    # Every thread holds a quarter of the router logits.
    return moe.num_experts < 256 and all(layer_gpu.supports(hidden, F, heads, qkv, vocab) for F in widths)


def router_and_gate(router_ED: jax.Array, gate_1D: jax.Array) -> jax.Array:
    """The weights of the router and of the shared expert's gate as one matrix [R, D], R a multiple of 8."""
    E = router_ED.shape[0]
    return jnp.pad(jnp.concatenate([router_ED, gate_1D]), ((0, -(E + 1) % 8), (0, 0)))


@functools.partial(jax.jit, static_argnames=("moe", "eps", "out_dtype", "blocks"))
def layer_tail(
    heads_I: jax.Array,
    stream_D: jax.Array,
    w_o_DI: jax.Array,
    mid_norm_D: jax.Array,
    w_router_RD: jax.Array,
    w_shared_gate_up_2SD: jax.Array,
    w_gate_up_E2FD: jax.Array,
    w_shared_down_DS: jax.Array,
    w_down_EDF: jax.Array,
    next_norm_D: jax.Array,
    w_next_ND: jax.Array,
    counter_1: jax.Array,
    *,
    moe: MoE,
    eps: float,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    blocks: int = MULTIPROCESSORS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`layer_gpu.layer_tail` for an MoE layer.

    Args:
      heads_I, stream_D, w_o_DI, mid_norm_D, next_norm_D, w_next_ND, counter_1, eps, out_dtype, blocks: as in
        `layer_gpu.layer_tail`.
      w_router_RD: from `router_and_gate`.
      w_shared_gate_up_2SD, w_shared_down_DS: weights of the shared expert.
      w_gate_up_E2FD, w_down_EDF: weights of the routed experts.
      moe: the architecture.

    Returns:
      The residual stream after the layer [D], w_next times its norm [N], and the counter.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    (D,), (S,) = stream_D.shape, w_shared_down_DS.shape[1:]
    E, F, chosen = moe.num_experts, moe.intermediate_size, moe.num_experts_per_tok
    R = -(-(E + 1) // 8) * 8
    weights = w_o_DI, w_router_RD, w_shared_gate_up_2SD, w_gate_up_E2FD, w_shared_down_DS, w_down_EDF, w_next_ND
    norms = mid_norm_D, next_norm_D
    expected = [(D, heads_I.size), (R, D), (2, S, D), (E, 2, F, D), (D, S), (E, D, F), (w_next_ND.shape[0], D)]
    vectors = stream_D, heads_I, *norms
    fits = [w.shape for w in weights] == expected and [x.shape for x in vectors] == [(D,), (heads_I.size,), (D,), (D,)]
    check(fits, (*vectors, *weights))
    products = (
        divide_product(D, heads_I.size, 1, True, blocks),
        divide_product(R, D, 1, True, blocks),
        *divide_two_products((S, D), (F, D), 2, chosen, blocks),
        *divide_two_products((D, S), (D, F), 1, chosen, blocks),
        divide_product(w_next_ND.shape[0], D, 1, False, blocks),
    )
    notes = -(-(chosen + 1) // 8) * 8

    def body(stream_ref: Ref, counter_ref: Ref, heads_ref: Ref, *refs: Ref, **scratch: Ref) -> None:
        w_refs, norm_refs, (out_ref, stream_out_ref, *between_refs) = refs[:7], refs[7:9], refs[9:]
        memory = Memory(**scratch)
        end = memory.x_smem.shape[0]
        notes_smem = memory.x_smem.at[pl.ds(end - 8 - notes, notes)]
        context = _Context(products, memory, counter_ref, round_memory(memory.x_smem), notes_smem, blocks)
        role = lax.axis_index("role")

        @pl.when(role == 1)
        def copy_weights() -> None:
            select = functools.partial(_select_experts, between_refs[1], products[1].splits, moe)
            _fetch(context, w_refs, select)

        @pl.when(role == 0)
        def multiply_weights() -> None:
            outs = [*between_refs, out_ref]
            _multiply(context, stream_ref, heads_ref, norm_refs, outs, stream_out_ref, eps=eps)

    outs = jax.ShapeDtypeStruct((w_next_ND.shape[0],), out_dtype), jax.ShapeDtypeStruct((D,), jnp.bfloat16)
    kernel = launch(
        body, products, D, (*outs, *map(result_of, products[:-1])), blocks, "layer_tail_moe", notes,
        asked=plgpu.Barrier(), answered=plgpu.Barrier(),
    )  # fmt: skip
    counter = jax.new_ref(counter_1)
    out, stream_D, *_ = kernel(stream_D, counter, heads_I, *(w.reshape(-1, w.shape[-1]) for w in weights), *norms)
    return stream_D, out, jax.freeze(counter)


class _Context(NamedTuple):
    """What both warpgroups of a thread block work with.

    Attributes:
      products: the seven products of the layer.
      memory: shared memory and barriers.
      counter, round_smem: of the grid barriers.
      notes: shared memory for the weights of the selected experts and the gate of the shared one.
      blocks: number of thread blocks.
    """

    products: Sequence[Product]
    memory: Memory
    counter: Ref
    round_smem: Ref
    notes: Ref
    blocks: int


def _select_experts(logits_ref: Ref, parts: int, moe: MoE) -> tuple[list[jax.Array], list[jax.Array]]:
    """Routing as in `qwen_jax.moe.router`, from partial sums of the router logits.

    Returns:
      The ids of the selected experts; and in bfloat16 their weights, followed by the gate of the shared expert.
    """
    E = moe.num_experts
    logits = total(logits_ref, parts, PER_COLUMN).astype(jnp.float32)
    index = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=PER_COLUMN)
    gate = jnp.sum(jnp.where(index == E, logits, 0.0))
    logits = jnp.where(index < E, logits, -jnp.inf)
    p = jnp.exp(logits - jnp.max(logits))
    p = p / jnp.sum(p)
    ids, top = [], []
    for _ in range(moe.num_experts_per_tok):
        top.append(jnp.max(p))
        # Of equal ones, the first is selected.
        ids.append(jnp.min(jnp.where(p == top[-1], index, E - 1)))
        p = jnp.where(index == ids[-1], -1.0, p)
    if moe.norm_topk_prob:
        sum_of_top = functools.reduce(jnp.add, top)
        top = [x / sum_of_top for x in top]
    return ids, [x.astype(jnp.bfloat16) for x in (*top, 1 / (1 + jnp.exp(-gate)))]


def _fetch(
    context: _Context, w_refs: Sequence[Ref], select: Callable[[], tuple[list[jax.Array], list[jax.Array]]]
) -> None:
    """The program of the copying warpgroup: the stream of weights, and the selection of experts in between."""
    products, memory, n = context.products, context.memory, jnp.int32(0)
    asked, answered = memory.asked, memory.answered
    assert asked is not None
    assert answered is not None
    ids: list[jax.Array] = []

    def first_row_of(product: Product, part: jax.Array) -> jax.Array:
        expert, id = lax.div(part, jnp.int32(product.splits)), ids[0]
        for i in range(1, product.experts):
            id = jnp.where(expert == i, ids[i], id)
        return id * (product.gates * product.outputs)

    for index, (product, w_ref) in enumerate(zip(products, w_refs, strict=True)):
        if index == _ROUTED[0]:
            # The first product that needs the experts: this block has arrived, wait for the logits of all blocks.
            plgpu.barrier_wait(asked)
            wait_for_all_blocks(context.counter, context.round_smem)
            ids, weights = select()
            for i, weight in enumerate(weights):
                context.notes[i] = weight
            plgpu.barrier_arrive(answered)

        first_row = functools.partial(first_row_of, product) if index in _ROUTED else None
        n = fetch(product, share(product, context.blocks), w_ref, n, memory, first_row)


def _multiply(
    context: _Context, stream_ref: Ref, heads_ref: Ref, norm_refs: Sequence[Ref], out_refs: Sequence[Ref],
    stream_out_ref: Ref, *, eps: float,
) -> None:  # fmt: skip
    """The program of the multiplying warpgroup: all products in order. Every block computes their inputs for itself."""
    products, memory, counter_ref, round_smem, notes_smem, blocks = context
    x_smem, stream_smem, asked, answered = memory.x_smem, memory.stream_smem, memory.asked, memory.answered
    assert asked is not None
    assert answered is not None
    chosen, f32, row_layout = products[_ROUTED[0]].experts, jnp.float32, strided(stream_ref.shape[0])
    # The weights are already being copied.
    wait_for_previous_kernel()
    allow_next_kernel()
    record_round(counter_ref, round_smem)
    n = jnp.int32(0)

    def run(
        index: int, n: jax.Array, source_ref: Ref | None = None, scale: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """One product of the input in `x_smem`, or of the input that each item loads from `source_ref`."""
        product = products[index]
        size = product.longest

        def load_input(part: jax.Array, start: jax.Array) -> jax.Array:
            begin = lax.min(start, jnp.int32(product.inputs - size))
            expert = lax.div(part, jnp.int32(product.splits))
            at = pl.multiple_of(expert * product.inputs + begin, CHUNK)
            assert source_ref is not None
            x_smem[pl.ds(0, size)] = load(source_ref.at[pl.ds(at, size)], strided(size))
            return begin

        shift = jnp.int32(0) if source_ref is None else load_input
        own = share(product, blocks)
        return multiply(product, own, out_refs[index], n, memory, shift, scale)

    # Attention's output projection, residual and norm. What does not depend on other blocks is read before a barrier.
    n = run(0, n, heads_ref)
    norm, stream = load(norm_refs[0], row_layout), load(stream_ref, row_layout)
    grid_barrier(counter_ref, round_smem)
    added = total(out_refs[0], products[0].splits, row_layout)
    whole = pl.ds(0, stream_ref.shape[0])
    stream_smem[...], x_smem[whole] = add_and_norm(stream, norm, eps, added)
    # The router: arrive at the barrier, ask the copying warpgroup for the experts, and do not wait.
    n = run(1, n)
    arrive(counter_ref, round_smem)
    plgpu.barrier_arrive(asked)
    # Gate and up: of the shared expert, then of the selected experts, times their weights.
    n = run(2, n)
    plgpu.barrier_wait(answered)
    n = run(3, n, scale=lambda part: notes_smem[part].astype(f32))
    grid_barrier(counter_ref, round_smem)
    # Down: of the shared expert, then of the selected experts.
    n = run(4, n, out_refs[2])
    n = run(5, n, out_refs[3])
    norm, stream = load(norm_refs[1], row_layout), load(stream_smem, row_layout)
    grid_barrier(counter_ref, round_smem)
    # The sum of all experts, residual and norm.
    shared = total(out_refs[4], products[4].splits, row_layout)
    routed = total(out_refs[5], products[5].splits * chosen, row_layout)
    gated = (notes_smem[chosen].astype(f32) * shared.astype(f32)).astype(jnp.bfloat16)
    added = (routed.astype(f32) + gated.astype(f32)).astype(jnp.bfloat16)
    stream, x_smem[whole] = add_and_norm(stream, norm, eps, added)

    @pl.when(lax.axis_index("block") == 0)
    def write_stream() -> None:
        stream_out_ref[...] = stream

    # q, k and v of the next layer, or the output head.
    run(6, n)
