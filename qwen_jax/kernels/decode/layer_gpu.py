"""One token through a layer on Hopper GPUs: everything between two attentions in one kernel.

At batch 1 a decode step reads every weight once and computes almost nothing, so the only cost that matters is a moment
in which no weight is on its way. Here one thread block on every multiprocessor goes through four products (attention's
output, gate and up, down, the next layer's q, k and v, or the head). A second warpgroup does nothing but fetch: it runs
through the block's share of all four matrices as one stream, some 180 KB ahead, while the first adds residuals,
normalises, and waits at the meetings of all blocks that stand between two products.

The weights are the N side of wgmma, in tiles of any multiple of 8 rows, so that every block gets nearly the same share.
All 64 rows of the M side are the same token: tensor cores have time to spare.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.decode.layer_gpu_products import (
    CHUNK,
    Product,
    check,
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
)
from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, wait_for_previous_kernel


def blocks() -> int:
    """Multiprocessors of the device, or of an H100 or H200 SXM where there is none."""
    return int(getattr(jax.local_devices()[0], "core_count", None) or 132)


def supports(hidden: int, width: int, heads: int, qkv: int, vocab: int) -> bool:
    """Whether the kernel can do a model of these sizes; `heads` and `qkv` are counted in numbers, not in heads."""
    return not any(n % CHUNK for n in (hidden, width, heads)) and not any(n % 8 for n in (qkv, vocab))


@functools.partial(jax.jit, static_argnames=("eps", "out_dtype", "blocks"))
def layer_tail(
    heads_I: jax.Array,
    stream_D: jax.Array,
    w_o_DI: jax.Array,
    mid_norm_D: jax.Array,
    w_gate_up_2FD: jax.Array,
    w_down_DF: jax.Array,
    next_norm_D: jax.Array,
    w_next_ND: jax.Array,
    counter_1: jax.Array,
    *,
    eps: float,
    out_dtype: Any = jnp.bfloat16,
    blocks: int = 132,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the heads' outputs of one layer to the raw q, k and v of the next one, or to the logits.

    Every block must run at once: `blocks` must not exceed the multiprocessors of the device, of which each takes one.
    The kernel may begin to read weights while the one launched just before it still runs: that one must not write them.

    Args:
      heads_I: bfloat16, the attention's output, all heads in a row.
      stream_D: bfloat16, the residual stream before it is added.
      w_o_DI, w_gate_up_2FD, w_down_DF: bfloat16.
      mid_norm_D: weight of the norm before the feed-forward layer.
      next_norm_D, w_next_ND: the norm and the matrix that follow: the next layer's q, k and v, or the output head.
      counter_1: int32, zero at first; give it the one that came back from the call before.
      eps: of the norms.
      out_dtype: of the last product; float32 for logits.
      blocks: multiprocessors of the device.

    Returns:
      The stream after the layer; w_next times its norm [N]; the counter.

    Raises:
      InputError: shapes or dtypes that it cannot do.
    """
    weights = _one(w_o_DI), w_gate_up_2FD, _one(w_down_DF), _one(w_next_ND)
    return _run(stream_D, heads_I, weights, (mid_norm_D, next_norm_D), counter_1, eps, out_dtype, blocks)


@functools.partial(jax.jit, static_argnames=("eps", "out_dtype", "blocks"))
def norm_product(
    stream_D: jax.Array,
    norm_D: jax.Array,
    w_ND: jax.Array,
    *,
    eps: float,
    out_dtype: Any = jnp.bfloat16,
    blocks: int = 132,
) -> jax.Array:
    """w times the norm of the stream, [N], such as the first layer's q, k and v. See `layer_tail`."""
    return _run(stream_D, None, (_one(w_ND),), (norm_D,), jnp.zeros((1,), jnp.int32), eps, out_dtype, blocks)[1]


def _one(w: jax.Array) -> jax.Array:
    return w.reshape(1, *w.shape)


def _run(
    stream_D: jax.Array,
    heads_I: jax.Array | None,
    weights: Sequence[jax.Array],
    norms: Sequence[jax.Array],
    counter_1: jax.Array,
    eps: float,
    out_dtype: Any,
    blocks: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    (D,), last = stream_D.shape, len(weights) - 1
    vectors = stream_D, *norms, *(() if heads_I is None else (heads_I,))
    fits = all(x.ndim == 1 for x in vectors) and all(x.shape == (D,) for x in norms) and weights[last].shape[2] == D
    if heads_I is not None:
        F = weights[1].shape[1]
        expected = [(1, D, heads_I.size), (2, F, D), (1, D, F), (1, weights[3].shape[1], D)]
        fits = fits and [w.shape for w in weights] == expected
    check(fits, (*vectors, *weights))
    products = [
        plan(w.shape[1], w.shape[2], w.shape[0], i in (0, 2) and i != last, blocks) for i, w in enumerate(weights)
    ]
    # The partial results of o and down, and the feed-forward layer's inner vector.
    between = [result_of(p) for p in products[:last]]
    outs = [jax.ShapeDtypeStruct((products[last].outputs,), out_dtype), jax.ShapeDtypeStruct((D,), jnp.bfloat16)]

    def body(stream_ref: Any, *refs: Any, **scratch: Any) -> None:
        counter_ref, heads_ref = (None, None) if heads_I is None else refs[:2]
        refs = refs if heads_I is None else refs[2:]
        w_refs, norm_refs = refs[: last + 1], refs[last + 1 : last + 1 + len(norms)]
        out_ref, stream_out_ref, *between_refs = refs[last + 1 + len(norms) :]
        role = lax.axis_index("role")

        @pl.when(role == 1)
        def _() -> None:
            if heads_I is None:
                # The first kernel of a step: whatever runs before it may have written anything.
                wait_for_previous_kernel()
            slots, n = [scratch[name] for name in ("w_smem", "full", "empty")], jnp.int32(0)
            for product, w_ref in zip(products, w_refs, strict=True):
                n = fetch(product, share(product, blocks), w_ref, n, *slots)

        @pl.when(role == 0)
        def _() -> None:
            _multiply(
                products, counter_ref, stream_ref, heads_ref, norm_refs, [*between_refs, out_ref], stream_out_ref,
                blocks=blocks, eps=eps, **scratch,
            )  # fmt: skip

    kernel = launch(body, products, D, (*outs, *between), blocks, "layer_tail" if last else "norm_product")
    flat = [w.reshape(-1, w.shape[-1]) for w in weights]
    if heads_I is None:
        out, stream_D, *_ = kernel(stream_D, *flat, *norms)
        return stream_D, out, counter_1
    counter = jax.new_ref(counter_1)
    out, stream_D, *_ = kernel(stream_D, counter, heads_I, *flat, *norms)
    return stream_D, out, jax.freeze(counter)


def _multiply(
    products: Sequence[Product], counter_ref: Any, stream_ref: Any, heads_ref: Any, norm_refs: Any, out_refs: Any,
    stream_out_ref: Any, *, blocks: int, eps: float, w_smem: Any, x_smem: Any, stream_smem: Any, full: Any, empty: Any,
) -> None:  # fmt: skip
    """The products, in order. Before each: its input, made by every block for itself."""
    n, last = jnp.int32(0), len(products) - 1
    row_layout = strided(stream_ref.shape[0])
    round_smem = place_of_round(x_smem)
    # The weights are on their way by now.
    wait_for_previous_kernel()
    allow_next_kernel()
    if last:
        note_round(counter_ref, round_smem)

    for index, product in enumerate(products):
        own = share(product, blocks)
        shift = jnp.int32(0)  # of the columns in x_smem
        # What was there before the meeting is read before it.
        if index == last or index == 1:
            norm = load(norm_refs[-1 if index == last else 0], row_layout)
            stream = load(stream_smem if last and index == last else stream_ref, row_layout)
        if index:
            meet(counter_ref, round_smem)
        if last == 0:
            normed(stream, norm, eps, x_smem)
        elif index == 1:
            added = total(out_refs[0], products[0].splits, row_layout)
            stream_smem[...] = normed(stream, norm, eps, x_smem, added)
        elif index == last:
            stream = normed(stream, norm, eps, x_smem, total(out_refs[2], products[2].splits, row_layout))

            @pl.when(lax.axis_index("block") == 0)
            def _(stream: jax.Array = stream) -> None:
                stream_out_ref[...] = stream
        else:
            start, size = own[1](jnp.int32(0))[2], product.longest
            shift = lax.min(start * CHUNK, jnp.int32(product.inputs - size))
            source = heads_ref if index == 0 else out_refs[1]
            x_smem[pl.ds(0, size)] = load(source.at[pl.ds(pl.multiple_of(shift, CHUNK), size)], strided(size))
        n = multiply(product, own, out_refs[index], n, w_smem, x_smem, full, empty, shift)
