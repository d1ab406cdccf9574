"""One token through a layer on Hopper GPUs: everything between two attention steps, in one kernel.

At batch 1 a decode step reads every weight once and computes almost nothing, so time is lost only while no weight is
being read. One thread block on every multiprocessor goes through four products: the output projection of attention,
gate and up, down, and q, k and v of the next layer, or the output head. A second warpgroup only copies: it reads the
block's share of all four matrices as one stream, about 180 KB ahead, while the first warpgroup adds residuals,
normalises, and waits at the grid barriers between the products.

The weights are the N side of wgmma, in tiles of any multiple of 8 rows, so that every block gets nearly the same share.
All 64 rows of the M side are the same token: the tensor cores have time to spare.
"""

import functools
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.decode.layer_gpu_products import (
    CHUNK,
    Memory,
    Product,
    add_and_norm,
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
)
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS
from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, wait_for_previous_kernel
from qwen_jax.kernels.types import Ref


def supports(hidden: int, width: int, heads: int, qkv: int, vocab: int) -> bool:
    """Whether the kernel supports the sizes of a model.

    Args:
      hidden, width: hidden size and feed-forward size.
      heads, qkv: query heads x head_dim, and all of q, k and v.
      vocab: vocabulary size.
    """
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
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    blocks: int = MULTIPROCESSORS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the output of the heads of one layer to the raw q, k and v of the next one, or to the logits.

    All thread blocks must run at once, one on each multiprocessor: `blocks` must not exceed the multiprocessors of the
    device. The kernel may begin to read weights while the kernel launched before it still runs, so that one must not
    write them.

    Args:
      heads_I: bfloat16, the output of all heads, concatenated.
      stream_D: bfloat16, the residual stream before the output of attention is added.
      w_o_DI, w_gate_up_2FD, w_down_DF: bfloat16.
      mid_norm_D: weight of the norm before the feed-forward layer.
      next_norm_D, w_next_ND: the norm and the matrix that follow: q, k and v of the next layer, or the output head.
      counter_1: int32 of the grid barriers: zero at first, then the counter that the previous call returned.
      eps: of the norms.
      out_dtype: of the last product; float32 for logits.
      blocks: multiprocessors of the device.

    Returns:
      The residual stream after the layer [D], w_next times its norm [N], and the counter.

    Raises:
      InputError: shapes or dtypes that are not supported.
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
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    blocks: int = MULTIPROCESSORS,
) -> jax.Array:
    """w times the norm of the stream, [N], such as q, k and v of the first layer; arguments as in `layer_tail`."""
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
    out_dtype: jax.typing.DTypeLike,
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
        divide_product(w.shape[1], w.shape[2], w.shape[0], i in (0, 2) and i != last, blocks)
        for i, w in enumerate(weights)
    ]
    # What blocks exchange: the partial results of o and down, and the inner vector of the feed-forward layer.
    between = [result_of(p) for p in products[:last]]
    outs = jax.ShapeDtypeStruct((products[last].outputs,), out_dtype), jax.ShapeDtypeStruct((D,), jnp.bfloat16)

    def body(stream_ref: Ref, *refs: Ref, **scratch: Ref) -> None:
        memory = Memory(**scratch)
        counter_ref, heads_ref = (None, None) if heads_I is None else refs[:2]
        refs = refs if heads_I is None else refs[2:]
        w_refs, norm_refs = refs[: last + 1], refs[last + 1 : last + 1 + len(norms)]
        out_ref, stream_out_ref, *between_refs = refs[last + 1 + len(norms) :]
        role = lax.axis_index("role")

        @pl.when(role == 1)
        def copy_weights() -> None:
            if heads_I is None:
                # The first kernel of a step: the previous kernel may be the one that writes the weights.
                wait_for_previous_kernel()
            n = jnp.int32(0)
            for product, w_ref in zip(products, w_refs, strict=True):
                n = fetch(product, share(product, blocks), w_ref, n, memory)

        @pl.when(role == 0)
        def multiply_weights() -> None:
            outs = [*between_refs, out_ref]
            _multiply(
                products, memory, counter_ref, stream_ref, heads_ref, norm_refs, outs, stream_out_ref,
                blocks=blocks, eps=eps,
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
    products: Sequence[Product], memory: Memory, counter_ref: Ref | None, stream_ref: Ref, heads_ref: Ref | None,
    norm_refs: Sequence[Ref], out_refs: Sequence[Ref], stream_out_ref: Ref, *, blocks: int, eps: float,
) -> None:  # fmt: skip
    """All products in order. Every block computes the whole input of each product for itself."""
    x_smem, stream_smem = memory.x_smem, memory.stream_smem
    n, last = jnp.int32(0), len(products) - 1
    row_layout = strided(stream_ref.shape[0])
    round_smem, whole = round_memory(x_smem), pl.ds(0, stream_ref.shape[0])
    # The weights are already being copied.
    wait_for_previous_kernel()
    allow_next_kernel()
    if last:
        record_round(counter_ref, round_smem)

    for index, product in enumerate(products):
        own = share(product, blocks)
        shift = jnp.int32(0)  # of the columns in x_smem
        # Read what does not depend on other blocks before the barrier.
        if index == last or index == 1:
            norm = load(norm_refs[-1 if index == last else 0], row_layout)
            stream = load(stream_smem if last and index == last else stream_ref, row_layout)
        if index:
            grid_barrier(counter_ref, round_smem)
        # The input of the product.
        if last == 0:
            x_smem[whole] = add_and_norm(stream, norm, eps)[1]
        elif index == 1:
            added = total(out_refs[0], products[0].splits, row_layout)
            stream_smem[...], x_smem[whole] = add_and_norm(stream, norm, eps, added)
        elif index == last:
            added = total(out_refs[2], products[2].splits, row_layout)
            stream, x_smem[whole] = add_and_norm(stream, norm, eps, added)

            @pl.when(lax.axis_index("block") == 0)
            def write_stream(stream: jax.Array = stream) -> None:
                stream_out_ref[...] = stream
        else:
            start, size = own[1](jnp.int32(0))[2], product.longest
            shift = lax.min(start * CHUNK, jnp.int32(product.inputs - size))
            source = heads_ref if index == 0 else out_refs[1]
            assert source is not None
            x_smem[pl.ds(0, size)] = load(source.at[pl.ds(pl.multiple_of(shift, CHUNK), size)], strided(size))
        n = multiply(product, own, out_refs[index], n, memory, shift)
