"""One token through a layer on Hopper GPUs: everything between two attention steps, in one kernel.

At batch 1 a decode step reads every weight once and computes almost nothing, so time is lost only while no weight is
being read. One thread block on every multiprocessor goes through four products: the output projection of attention,
gate and up, down, and q, k and v of the next layer, or the output head. A second warpgroup only copies: it reads the
block's share of all four matrices as one stream, about 180 KB ahead, while the first warpgroup adds residuals,
normalises, and waits at the grid barriers between the products.

The weights are the N side of wgmma, in tiles of any multiple of 8 rows, so that every block gets nearly the same share.
All 64 rows of the M side are the same token: the tensor cores have time to spare.

On a tensor axis the results of the output projection and of down are sums over devices. There the same code makes three
kernels, with an all-reduce after the first and after the second: `output_product`, `feed_forward`, `norm_product`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

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
    sources: tuple[Source, ...] = ("vector", "stream", "inner", "stream")
    norms = mid_norm_D, next_norm_D
    found = _run(sources, weights, norms, eps, out_dtype, blocks, stream_D, heads_I, counter_1=counter_1)
    out, stream_D, counter_1 = found
    return stream_D, out, counter_1


@functools.partial(jax.jit, static_argnames=("eps", "out_dtype", "blocks"))
def norm_product(
    stream_D: jax.Array,
    norm_D: jax.Array,
    w_ND: jax.Array,
    added_D: jax.Array | None = None,
    *,
    eps: float,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    blocks: int = MULTIPROCESSORS,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """w times the norm of the stream, [N], such as q, k and v of the first layer; arguments as in `layer_tail`.

    Args:
      stream_D, norm_D, w_ND, eps, out_dtype, blocks: as in `layer_tail`.
      added_D: float32, a product that is rounded and added to the stream first.

    Returns:
      The product; with `added_D`, the new stream and the product.
    """
    found = _run(("stream",), (_one(w_ND),), (norm_D,), eps, out_dtype, blocks, stream_D, added_D=added_D)
    return found[0] if added_D is None else (found[1], found[0])


@functools.partial(jax.jit, static_argnames=("blocks",))
def output_product(heads_I: jax.Array, w_o_DI: jax.Array, *, blocks: int = MULTIPROCESSORS) -> jax.Array:
    """A tensor shard's part of the output projection, float32 [D], to be added over the shards.

    Args:
      heads_I: bfloat16, the output of the shard's heads, concatenated.
      w_o_DI: bfloat16, of these heads. The kernel may begin to read it while the kernel before it still runs.
      blocks: multiprocessors of the device.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    parts = _run(("vector",), (_one(w_o_DI),), (), 0.0, jnp.float32, blocks, heads_I=heads_I)[0]
    return parts.reshape(-1, w_o_DI.shape[0]).sum(axis=0)


@functools.partial(jax.jit, static_argnames=("eps", "blocks"))
def feed_forward(
    stream_D: jax.Array,
    added_D: jax.Array,
    norm_D: jax.Array,
    w_gate_up_2FD: jax.Array,
    w_down_DF: jax.Array,
    counter_1: jax.Array,
    *,
    eps: float,
    blocks: int = MULTIPROCESSORS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A tensor shard's part of the feed-forward layer.

    Args:
      stream_D: bfloat16, the residual stream before the output of attention is added.
      added_D: float32, the output of attention, of all shards.
      norm_D: weight of the norm before the feed-forward layer.
      w_gate_up_2FD, w_down_DF: bfloat16, of the shard.
      counter_1, eps, blocks: as in `layer_tail`.

    Returns:
      The residual stream with the output of attention [D]; float32 [D], to be added over the shards; the counter.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    sources: tuple[Source, ...] = ("stream", "inner")
    weights = w_gate_up_2FD, _one(w_down_DF)
    how: dict[str, Any] = {"stream_D": stream_D, "added_D": added_D, "counter_1": counter_1}
    parts, stream_D, counter_1 = _run(sources, weights, (norm_D,), eps, jnp.float32, blocks, **how)
    return stream_D, parts.reshape(-1, len(stream_D)).sum(axis=0), counter_1


Source = Literal["vector", "stream", "inner"]
"""The input of a product: a vector that the kernel is given; the norm of the residual stream, with the result of the
product before it added; or that result itself."""


def _one(w: jax.Array) -> jax.Array:
    return w.reshape(1, *w.shape)


def _run(
    sources: tuple[Source, ...],
    weights: Sequence[jax.Array],
    norms: Sequence[jax.Array],
    eps: float,
    out_dtype: jax.typing.DTypeLike,
    blocks: int,
    stream_D: jax.Array | None = None,
    heads_I: jax.Array | None = None,
    added_D: jax.Array | None = None,
    counter_1: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """A kernel of several products.

    Args:
      sources: the input of each product.
      weights: the matrices of each product, [1 or 2, N, K].
      norms: for each "stream" among the sources.
      eps, out_dtype, blocks: as in `layer_tail`.
      stream_D: for "stream".
      heads_I: for "vector", the first source.
      added_D: float32, added to the stream where it is the first source.
      counter_1: for several products.

    Returns:
      Partial results of the last product, one after another; the stream and the counter if there are any.
    """
    last = len(weights) - 1
    D = weights[0].shape[1] if stream_D is None else stream_D.size
    vectors = [x for x in (stream_D, *norms, heads_I) if x is not None]
    # Each product has the outputs of the one before as its inputs; gate and up, and what follows the stream, have D.
    sizes = {"vector": 0 if heads_I is None else heads_I.size, "stream": D}
    fits = all(x.ndim == 1 for x in vectors) and all(x.shape == (D,) for x in norms)
    for i, (source, w) in enumerate(zip(sources, weights, strict=True)):
        expected = weights[i - 1].shape[1] if source == "inner" else sizes[source]
        gates = 2 if i < last and sources[i + 1] == "inner" else 1
        # What is added to the stream has its size.
        adds = source in ("vector", "inner")
        fits = fits and w.shape[0] == gates and w.shape[2] == expected and (not adds or w.shape[1] == D)
    check(fits, (*vectors, *weights))
    products = [
        divide_product(w.shape[1], w.shape[2], w.shape[0], source in ("vector", "inner"), blocks)
        for source, w in zip(sources, weights, strict=True)
    ]
    # What blocks exchange: the partial results of o and down, and the inner vector of the feed-forward layer.
    between = [result_of(p) for p in products[:last]]
    of_stream = [] if stream_D is None else [jax.ShapeDtypeStruct((D,), jnp.bfloat16)]
    outs = [jax.ShapeDtypeStruct(result_of(products[last]).shape, out_dtype), *of_stream, *between]

    def body(*refs: Ref, **scratch: Ref) -> None:
        memory, left = Memory(**scratch), list(refs)
        stream_ref, counter_ref, heads_ref, added_ref = (
            None if x is None else left.pop(0) for x in (stream_D, counter_1, heads_I, added_D)
        )
        w_refs, norm_refs, out_refs = left[: last + 1], left[last + 1 : last + 1 + len(norms)], left[-len(outs) :]
        stream_out_ref = None if stream_D is None else out_refs[1]
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
            results = [*out_refs[1 + len(of_stream) :], out_refs[0]]
            _multiply(
                sources, products, memory, counter_ref, stream_ref, heads_ref, added_ref, norm_refs, results,
                stream_out_ref, blocks=blocks, eps=eps,
            )  # fmt: skip

    name = {4: "layer_tail", 2: "feed_forward"}.get(len(sources), "norm_product" if norms else "output_product")
    kernel = launch(body, products, D, tuple(outs), blocks, name)
    flat = [w.reshape(-1, w.shape[-1]) for w in weights]
    counter = None if counter_1 is None else jax.new_ref(counter_1)
    given = (x for x in (stream_D, counter, heads_I, added_D) if x is not None)
    found = kernel(*given, *flat, *norms)
    return (*found[: 1 + len(of_stream)], *(() if counter is None else (jax.freeze(counter),)))


def _multiply(
    sources: tuple[Source, ...], products: Sequence[Product], memory: Memory, counter_ref: Ref | None,
    stream_ref: Ref | None, heads_ref: Ref | None, added_ref: Ref | None, norm_refs: Sequence[Ref],
    out_refs: Sequence[Ref], stream_out_ref: Ref | None, *, blocks: int, eps: float,
) -> None:  # fmt: skip
    """All products in order. Every block computes the whole input of each product for itself."""
    x_smem, stream_smem = memory.x_smem, memory.stream_smem
    n, norm_at = jnp.int32(0), [i for i, source in enumerate(sources) if source == "stream"]
    D = stream_smem.shape[0]
    row_layout, round_smem, whole = strided(D), round_memory(x_smem), pl.ds(0, D)
    # The weights are already being copied.
    wait_for_previous_kernel()
    allow_next_kernel()
    if counter_ref is not None:
        record_round(counter_ref, round_smem)

    for index, (source, product) in enumerate(zip(sources, products, strict=True)):
        own = share(product, blocks)
        shift = jnp.int32(0)  # of the columns in x_smem
        # Read what does not depend on other blocks before the barrier.
        if source == "stream":
            norm = load(norm_refs[norm_at.index(index)], row_layout)
            here = stream_ref if index == norm_at[0] else stream_smem
            assert here is not None
            stream = load(here, row_layout)
        if index:
            grid_barrier(counter_ref, round_smem)
        # The input of the product.
        if source == "stream":
            added = None
            if index:
                added = total(out_refs[index - 1], products[index - 1].splits, row_layout)
            elif added_ref is not None:
                added = total(added_ref, 1, row_layout)
            stream, x = add_and_norm(stream, norm, eps, added)
            if index != norm_at[-1]:  # Another product needs it.
                stream_smem[...] = stream
            x_smem[whole] = x
            if index == norm_at[-1] and added is not None:

                @pl.when(lax.axis_index("block") == 0)
                def write_stream(stream: jax.Array = stream) -> None:
                    assert stream_out_ref is not None
                    stream_out_ref[...] = stream
        else:
            start, size = own[1](jnp.int32(0))[2], product.longest
            shift = lax.min(start * CHUNK, jnp.int32(product.inputs - size))
            vector_ref = heads_ref if source == "vector" else out_refs[index - 1]
            assert vector_ref is not None
            x_smem[pl.ds(0, size)] = load(vector_ref.at[pl.ds(pl.multiple_of(shift, CHUNK), size)], strided(size))
        n = multiply(product, own, out_refs[index], n, memory, shift)
