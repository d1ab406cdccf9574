"""One token through a layer with experts on Hopper GPUs: everything between two attentions in one kernel.

`layer_gpu` tells how: blocks that share products and meet between them, and in each a warpgroup that fetches weights
ahead. Here the router is a product more, and the meeting after it is one at which nobody waits. A block says that its
part of the router's logits is written and goes on with the shared expert, whose weights are on their way already; the
fetching warpgroup waits for everybody's, chooses the experts, and lets their weights follow without a gap.
"""

import functools
import itertools
from typing import Any

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
    Product,
    check,
    come,
    fetch,
    launch,
    meet,
    multiply,
    normed,
    note_round,
    place_of_round,
    plan,
    result_of,
    share,
    strided,
    total,
    wait_for_all,
)
from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, wait_for_previous_kernel

_LATE = 4.0
"""Microseconds that a block waits for the choice of experts if it has nothing of the shared one to do."""
_ROUTED = 3, 5
"""Of the seven products those of the chosen experts: gate and up, and down."""
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
"""Registers of a warpgroup of which every warp holds the whole vector: sums over it need no shared memory."""


@functools.cache
def plan_two(
    shared: tuple[int, int], experts: tuple[int, int], gates: int, chosen: int, blocks: int
) -> tuple[Product, Product]:
    """Divides a product of the shared expert and that of the chosen ones, dealt out together, the shared one first.

    Args:
      shared, experts: rows and columns of a matrix of each.
      gates: 2, or 1, whose results may be partial.
      chosen: experts of a token.
      blocks: that share it.

    Raises:
      InputError: sizes that cannot be run.
    """
    for outputs, inputs in (shared, experts):
        plan(outputs, inputs, gates, False, blocks)  # says whether the sizes can be run
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
    """Whether the kernel can do a model of these sizes; see `layer_gpu.supports`."""
    widths = moe.intermediate_size, moe.shared_intermediate_size
    # Every thread holds a quarter of the router's logits.
    return moe.num_experts < 256 and all(layer_gpu.supports(hidden, F, heads, qkv, vocab) for F in widths)


def router_and_gate(router_ED: jax.Array, gate_1D: jax.Array) -> jax.Array:
    """The router's weight and that of the shared expert's gate, as `layer_tail` wants them: [R, D], R in eights."""
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
    out_dtype: Any = jnp.bfloat16,
    blocks: int = 132,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`layer_gpu.layer_tail` of a layer with experts.

    Args:
      heads_I, stream_D, w_o_DI, mid_norm_D, next_norm_D, w_next_ND, counter_1, eps, out_dtype, blocks: see there.
      w_router_RD: from `router_and_gate`.
      w_shared_gate_up_2SD, w_shared_down_DS: the shared expert's.
      w_gate_up_E2FD, w_down_EDF: the routed ones'.
      moe: the architecture.

    Returns:
      The stream after the layer; w_next times its norm [N]; the counter.

    Raises:
      InputError: shapes or dtypes that it cannot do.
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
        plan(D, heads_I.size, 1, True, blocks),
        plan(R, D, 1, True, blocks),
        *plan_two((S, D), (F, D), 2, chosen, blocks),
        *plan_two((D, S), (D, F), 1, chosen, blocks),
        plan(w_next_ND.shape[0], D, 1, False, blocks),
    )
    notes = -(-(chosen + 1) // 8) * 8

    def body(stream_ref: Any, counter_ref: Any, heads_ref: Any, *refs: Any, x_smem: Any, **scratch: Any) -> None:
        w_refs, norm_refs, (out_ref, stream_out_ref, *between_refs) = refs[:7], refs[7:9], refs[9:]
        end = x_smem.shape[0]
        of_both = dict(
            products=products, counter_ref=counter_ref, round_smem=place_of_round(x_smem),
            notes_smem=x_smem.at[pl.ds(end - 8 - notes, notes)], blocks=blocks,
        )  # fmt: skip
        stream_smem = scratch.pop("stream_smem")
        role = lax.axis_index("role")

        @pl.when(role == 1)
        def _() -> None:
            choose = functools.partial(_choose, between_refs[1], products[1].splits, moe)
            _fetch(w_refs, choose, **of_both, **scratch)

        @pl.when(role == 0)
        def _() -> None:
            _multiply(
                stream_ref, heads_ref, norm_refs, [*between_refs, out_ref], stream_out_ref, eps=eps, x_smem=x_smem,
                stream_smem=stream_smem, **of_both, **scratch,
            )  # fmt: skip

    outs = jax.ShapeDtypeStruct((w_next_ND.shape[0],), out_dtype), jax.ShapeDtypeStruct((D,), jnp.bfloat16)
    kernel = launch(
        body, products, D, (*outs, *map(result_of, products[:-1])), blocks, "layer_tail_moe", notes,
        asked=plgpu.Barrier(), answered=plgpu.Barrier(),
    )  # fmt: skip
    counter = jax.new_ref(counter_1)
    out, stream_D, *_ = kernel(stream_D, counter, heads_I, *(w.reshape(-1, w.shape[-1]) for w in weights), *norms)
    return stream_D, out, jax.freeze(counter)


def _choose(logits_ref: Any, parts: int, moe: MoE) -> tuple[list[jax.Array], list[jax.Array]]:
    """What `qwen_jax.moe.router.route` does: the experts, and in bfloat16 their weights and that of the shared one."""
    E = moe.num_experts
    logits = total(logits_ref, parts, _COLUMNS).astype(jnp.float32)
    index = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=_COLUMNS)
    gate = jnp.sum(jnp.where(index == E, logits, 0.0))
    logits = jnp.where(index < E, logits, -jnp.inf)
    p = jnp.exp(logits - jnp.max(logits))
    p = p / jnp.sum(p)
    ids, top = [], []
    for _ in range(moe.num_experts_per_tok):
        top.append(jnp.max(p))
        # Of equal ones, the first.
        ids.append(jnp.min(jnp.where(p == top[-1], index, E - 1)))
        p = jnp.where(index == ids[-1], -1.0, p)
    if moe.norm_topk_prob:
        sum_of_top = functools.reduce(jnp.add, top)
        top = [x / sum_of_top for x in top]
    return ids, [x.astype(jnp.bfloat16) for x in (*top, 1 / (1 + jnp.exp(-gate)))]


def _fetch(
    w_refs: Any, choose: Any, products: Any, counter_ref: Any, round_smem: Any, notes_smem: Any, blocks: int,
    asked: Any, answered: Any, **slots: Any,
) -> None:  # fmt: skip
    """The stream of weights, and in its midst the choice of experts."""
    n = jnp.int32(0)
    ids: list[jax.Array] = []

    def of_expert(product: Product, part: jax.Array) -> jax.Array:
        expert, id = lax.div(part, jnp.int32(product.splits)), ids[0]
        for i in range(1, product.experts):
            id = jnp.where(expert == i, ids[i], id)
        return id * (product.gates * product.outputs)

    for index, (product, w_ref) in enumerate(zip(products, w_refs, strict=True)):
        if index == _ROUTED[0]:
            plgpu.barrier_wait(asked)
            wait_for_all(counter_ref, round_smem)
            ids, weights = choose()
            for i, weight in enumerate(weights):
                notes_smem[i] = weight
            plgpu.barrier_arrive(answered)

        first_row = functools.partial(of_expert, product) if index in _ROUTED else None
        n = fetch(product, share(product, blocks), w_ref, n, **slots, first_row=first_row)


def _multiply(
    stream_ref: Any, heads_ref: Any, norm_refs: Any, out_refs: Any, stream_out_ref: Any, *, eps: float, x_smem: Any,
    stream_smem: Any, products: Any, counter_ref: Any, round_smem: Any, notes_smem: Any, blocks: int, asked: Any,
    answered: Any, **slots: Any,
) -> None:  # fmt: skip
    """The products, in order. Before each: its input, made by every block for itself."""
    chosen, f32, row_layout = products[_ROUTED[0]].experts, jnp.float32, strided(stream_ref.shape[0])
    # The weights are on their way by now.
    wait_for_previous_kernel()
    allow_next_kernel()
    note_round(counter_ref, round_smem)
    n = jnp.int32(0)

    def run(index: int, n: jax.Array, source_ref: Any = None, scale: Any = None) -> jax.Array:
        """One product, of what is in `x_smem`, or else of what each item takes from elsewhere."""
        product = products[index]
        size = product.longest

        def bring(part: jax.Array, start: jax.Array) -> jax.Array:
            begin = lax.min(start, jnp.int32(product.inputs - size))
            expert = lax.div(part, jnp.int32(product.splits))
            at = pl.multiple_of(expert * product.inputs + begin, CHUNK)
            x_smem[pl.ds(0, size)] = load(source_ref.at[pl.ds(at, size)], strided(size))
            return begin

        shift = jnp.int32(0) if source_ref is None else bring
        own = share(product, blocks)
        return multiply(product, own, out_refs[index], n, x_smem=x_smem, shift=shift, scale=scale, **slots)

    n = run(0, n, heads_ref)
    # What was there before a meeting is read before it.
    norm, stream = load(norm_refs[0], row_layout), load(stream_ref, row_layout)
    meet(counter_ref, round_smem)
    added = total(out_refs[0], products[0].splits, row_layout)
    stream_smem[...] = normed(stream, norm, eps, x_smem, added)
    n = run(1, n)
    come(counter_ref, round_smem)
    plgpu.barrier_arrive(asked)
    n = run(2, n)
    plgpu.barrier_wait(answered)
    n = run(3, n, scale=lambda part: notes_smem[part].astype(f32))
    meet(counter_ref, round_smem)
    n = run(4, n, out_refs[2])
    n = run(5, n, out_refs[3])
    norm, stream = load(norm_refs[1], row_layout), load(stream_smem, row_layout)
    meet(counter_ref, round_smem)
    shared = total(out_refs[4], products[4].splits, row_layout)
    routed = total(out_refs[5], products[5].splits * chosen, row_layout)
    gated = (notes_smem[chosen].astype(f32) * shared.astype(f32)).astype(jnp.bfloat16)
    added = (routed.astype(f32) + gated.astype(f32)).astype(jnp.bfloat16)
    stream = normed(stream, norm, eps, x_smem, added)

    @pl.when(lax.axis_index("block") == 0)
    def _() -> None:
        stream_out_ref[...] = stream

    run(6, n)
