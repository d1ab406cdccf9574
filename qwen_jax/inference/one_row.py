"""A decode step of one sequence on Hopper GPUs, with two kernels a layer, or nine where weights are quantised.

The cache is contiguous or in pages, in bfloat16 or in 8 bits. To a cache in 8 bits, the new key and value are written
by XLA's kernels, before a kernel that attends: more kernels a layer, for half the bytes.

On a tensor axis each device runs its heads and its part of the feed-forward layer, with four kernels and two float32
all-reduces of [D] a layer: attention, the output projection, all-reduce, the feed-forward layer, all-reduce, and the
next layer's q, k and v. Where weights are quantised, the same all-reduces stand among nine kernels, each behind a sum
of partial results.

`qwen_jax.model` computes the same with ten kernels a layer, or thirteen; at batch 1 the gaps between kernels cost more
than a tenth of the time. The numerics are the same (Hugging Face's order of casts, products accumulated in float32),
with two exceptions: the inner vector of a feed-forward layer is rounded once, after the nonlinearity and the expert's
weight, and the sum over routed experts is rounded once instead of for each expert.
"""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import dual_chunk
from qwen_jax.attention.cache import ContiguousCache, ContiguousLayer
from qwen_jax.attention.paged_cache import PagedCache, PagedLayer
from qwen_jax.attention.rope import Table, rope_table, rotate
from qwen_jax.config import ModelConfig
from qwen_jax.inference.vocabulary import Vocabulary
from qwen_jax.kernels.decode import layer as layer_kernels
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params

COMPILER_OPTIONS = {"xla_gpu_graph_min_graph_size": 1 << 30}
"""No CUDA graphs. In a graph a kernel starts when the kernel before it has ended. Launched one by one, these kernels
overlap: each begins to read its weights while the kernel before it still runs."""
_SMALL_LAYER = 32e6
"""Bytes of a quantised layer below which the device is done before the host has launched the nine kernels of the next
one. That takes the host of an H200 41 us a layer. In CUDA graphs a layer of 0.5B (7 MB) takes 35 us, and without them
one of 7B (117 MB) 64 us. The value between them is an estimate."""

_Cache = TypeVar("_Cache", ContiguousCache, PagedCache)


def supports(
    config: ModelConfig, sharding: Sharding, options: Options, rows: int, cache: ContiguousCache | PagedCache
) -> bool:
    """Whether `step` can be used: one row, Hopper GPUs on a tensor axis, the inference layout in bfloat16, plain
    attention.

    Args:
      config: the architecture.
      sharding: of the current mesh.
      options: layout and dtypes of the parameters.
      rows: of the batch.
      cache: of the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    plain = not options.capacity_factor and options.fused and options.dtype == "bfloat16"
    plain = plain and not options.lora and not options.adapter_ranks
    tensor = sharding.tensor
    if rows != 1 or mesh.size != tensor or not plain or dual_chunk.is_needed(config, cache.slots):
        return False
    heads = config.num_heads // tensor, sharding.kv_heads // tensor
    dtype = jnp.dtype(options.dtype)
    table = cache.pages_BM if isinstance(cache, PagedCache) else None
    if isinstance(cache.keys[0], kernels.QuantizedRows):
        attends = kernels.supports_quantized_step(options.attention, dtype, *heads, cache.keys[0], table)
    else:
        attends = kernels.supports_decode_step(options.attention, dtype, 1, *heads, cache.keys[0], table)
    if not attends:
        return False
    return layer_kernels.supports(config, tensor)


def compiler_options(config: ModelConfig, sharding: Sharding) -> dict[str, Any] | None:
    """The compiler options of a program that uses `step`: `COMPILER_OPTIONS` on one device.

    On a tensor axis there are all-reduces between the kernels, so that few of them could overlap. Small quantised
    layers are over before the host has launched their kernels one by one.
    """
    small = False
    if config.quantization is not None:
        bits = 4 if config.quantization.scheme.codes == "int4" else 8
        small = config.num_params()["layers"] / config.num_layers * bits / 8 < _SMALL_LAYER
    return COMPILER_OPTIONS if sharding.tensor == 1 and not small else None


def prepare(params: Params, token: jax.Array) -> tuple[Params, jax.Array]:
    """The parameters in the form that `step` needs, made once for many steps.

    Args:
      params: in the fused layout.
      token: int32 [1], of the first step.

    Returns:
      The parameters, with the router and the shared expert's gate of each layer in one matrix; and the token.
    """
    from qwen_jax.kernels.decode import layer_gpu_moe

    joined = [
        layer_gpu_moe.router_and_gate(layer["moe"]["router"]["weight"], layer["moe"]["shared_gate"]["weight"])
        if "moe" in layer
        else None
        for layer in params["layers"]
    ]
    # A layer's kernel may read weights while the kernel before it still runs, which must not be what produces them.
    joined, token = jax.lax.optimization_barrier((joined, token))
    layers = [
        layer if both is None else {**layer, "moe": {**layer["moe"], "router_and_gate": both}}
        for layer, both in zip(params["layers"], joined, strict=True)
    ]
    return {**params, "layers": layers}, token


def step(
    params: Params, config: ModelConfig, sharding: Sharding, token: jax.Array, cache: _Cache, counter: jax.Array
) -> tuple[jax.Array, _Cache, jax.Array]:
    """Runs the model on one token.

    Args:
      params: from `prepare`.
      config: the architecture.
      sharding: of the current mesh.
      token: int32 [1].
      cache: of one row, whose next slot is where the token goes.
      counter: int32 [1], zero for the first step, then the one that was returned.

    Returns:
      Float32 logits [1, V] in the sharding of the output head, the cache with the token in it, the counter.
    """

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)

    args = params, token, cache, counter
    run = jax.shard_map(
        functools.partial(_step, config, sharding),
        in_specs=tuple(map(specs, args)),
        # What is written alone: whatever else leaves the shard_map would be copied in every step.
        out_specs=(P(None, "tensor"), specs(_written(cache)), P()),
        check_vma=False,
    )
    logits, (keys, values), counter = run(*args)
    if isinstance(keys[0], kernels.QuantizedRows):
        channels = [old.channels_Kd for old in cache.keys]
        keys = tuple(dataclasses.replace(new, channels_Kd=x) for new, x in zip(keys, channels, strict=True))
    return logits, dataclasses.replace(cache, keys=keys, values=values), counter


def _written(cache: ContiguousCache | PagedCache) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The keys and values of a cache, without the factors of channels, which stay as they are."""

    def without(buffer: Any) -> Any:
        return dataclasses.replace(buffer, channels_Kd=None) if isinstance(buffer, kernels.QuantizedRows) else buffer

    return tuple(map(without, cache.keys)), tuple(map(without, cache.values))


def _step(
    config: ModelConfig, sharding: Sharding, params: Params, token: jax.Array, cache: _Cache, counter: jax.Array
) -> tuple[jax.Array, tuple[tuple[Any, ...], tuple[Any, ...]], jax.Array]:
    """`step` on each device; of the cache, the new keys and values."""
    from qwen_jax.kernels.decode import layer_gpu, layer_gpu_moe, layer_gpu_quantized
    from qwen_jax.kernels.gpu.device import multiprocessors

    eps, dtype = config.rms_norm_eps, jnp.bfloat16
    vocabulary, d = Vocabulary(sharding.tensor), config.head_dim
    blocks = multiprocessors()

    def matrix(weight: jax.Array) -> jax.Array:
        return weight.reshape(-1, weight.shape[-1])

    def matrices(mlp: Params) -> tuple[jax.Array, ...]:
        return mlp["gate_up"]["weight"][0], mlp["down"]["weight"]

    # Embedding and rotary tables.
    table = params["embed"]["weight"]
    with jax.named_scope("embed"):
        place = vocabulary.places(token[0], len(table))
        x_D = vocabulary.sum(table.at[place].get(mode="fill", fill_value=0))
    rope = rope_table(config, cache.positions(1), jnp.dtype(dtype))
    layers, cache_layers, written = params["layers"], cache.layers, []
    head = table if config.tie_word_embeddings else params["lm_head"]["weight"]
    quantized = config.quantization is not None
    # The norm and the matrix before each attention, and those after the last layer.
    following: list[tuple[jax.Array, Any]] = []
    for layer in layers:
        projection = layer["attention"]["qkv"]
        w = layer_gpu_quantized.Matrix.of(projection, len(x_D)) if quantized else matrix(projection["weight"])
        following.append((layer["input_norm"]["weight"], w))
    following.append((params["norm"]["weight"], head))
    experts_tail = functools.partial(layer_gpu_moe.layer_tail, moe=config.moe)
    with jax.named_scope("qkv"):
        if quantized:
            qkv = layer_gpu_quantized.norm_product(x_D, *following[0], eps=eps)
        else:
            qkv = layer_gpu.norm_product(x_D, *following[0], eps=eps, blocks=blocks)
    for i, layer in enumerate(layers):
        with jax.named_scope(f"layer{i}"):
            attention, moe = layer["attention"], layer.get("moe")
            bias = attention["qkv"]["bias"][0]
            # Bias, RoPE, cache and attention.
            out, kv = _attended(cache_layers[i], qkv.reshape(1, -1, d), bias, rope, cache)
            written.append(kv)
            heads_I, goes_on = out.reshape(-1), i + 1 < len(layers)
            if quantized:
                x_D, qkv = _quantized_tail(layer, heads_I, x_D, *following[i + 1], eps, goes_on, sharding.tensor > 1)
                continue
            if sharding.tensor > 1:
                x_D, qkv, counter = _sharded_tail(layer, heads_I, x_D, *following[i + 1], counter, eps, goes_on, blocks)
                continue
            # Everything up to the projections of the next layer, or to the logits, in the other kernel.
            if moe is None:
                tail: Any = layer_gpu.layer_tail
                feed_forward = matrices(layer["mlp"])
            else:
                tail, experts = experts_tail, moe["experts"]
                gate_up, down = matrices(moe["shared"])
                feed_forward = moe["router_and_gate"], gate_up, experts["gate_up"], down, experts["down"]
            x_D, qkv, counter = tail(
                heads_I,
                x_D,
                attention["o"]["weight"].reshape(-1, heads_I.size),
                layer["post_attention_norm"]["weight"],
                *feed_forward,
                *following[i + 1],
                counter,
                eps=eps,
                out_dtype=dtype if goes_on else jnp.float32,
                blocks=blocks,
            )
    if quantized:
        with jax.named_scope("logits"):
            qkv = layer_gpu.norm_product(x_D, *following[-1], eps=eps, out_dtype=jnp.float32, blocks=blocks)
    return qkv[None], _written(cache.with_layers(written)), counter


def _attended(
    layer: ContiguousLayer | PagedLayer, qkv_1Rd: jax.Array, bias_Rd: jax.Array, rope: Table, cache: _Cache
) -> tuple[jax.Array, Any]:
    """Attention of the new token: the heads' output [1, H, d], and the layer of the cache with its key and value.

    Args:
      layer: of the cache.
      qkv_1Rd: the raw queries, keys and values of a device's heads.
      bias_Rd: to be added to them.
      rope: cosines and sines of the token's position.
      cache: with the lengths of all layers.
    """
    scale = qkv_1Rd.shape[-1] ** -0.5
    if not isinstance(cache.keys[0], kernels.QuantizedRows):
        result: tuple[jax.Array, Any] = layer.step(
            qkv_1Rd, bias_Rd, (rope[0][:, 0, 0], rope[1][:, 0, 0]), cache.start_B, scale=scale
        )
        return result
    kv_heads = cache.keys[0].shape[1]
    heads = len(bias_Rd) - 2 * kv_heads
    qkv_1TRd = (qkv_1Rd + bias_Rd.astype(qkv_1Rd.dtype))[:, None]
    q, k, v = jnp.split(qkv_1TRd, [heads, heads + kv_heads], axis=2)
    written = layer.write(rotate(k, rope), v)
    out, _ = written.attend(rotate(q, rope), cache.mask(1), scale=scale, implementation="auto")
    return out[:, 0], written


def _sharded_tail(
    layer: Params, heads_I: jax.Array, x_D: jax.Array, norm_D: jax.Array, w_ND: jax.Array, counter: jax.Array,
    eps: float, goes_on: bool, blocks: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Everything from the heads' output up to the projections of the next layer, or to the logits, on a tensor shard.

    Args:
      layer: its parameters, dense.
      heads_I: the output of the shard's heads.
      x_D: the residual stream, the same on all shards.
      norm_D, w_ND: the norm and the matrix that follow.
      counter: of the grid barriers.
      eps: of the norms.
      goes_on: whether a layer follows, and not the head.
      blocks: multiprocessors of the device.

    Returns:
      The residual stream, the product, and the counter.
    """
    from qwen_jax.kernels.decode import layer_gpu

    mlp, norm_of_mlp_D = layer["mlp"], layer["post_attention_norm"]["weight"]
    attended_D = layer_gpu.output_product(
        heads_I, layer["attention"]["o"]["weight"].reshape(-1, heads_I.size), blocks=blocks
    )
    x_D, out_D, counter = layer_gpu.feed_forward(
        x_D,
        jax.lax.psum(attended_D, "tensor"),
        norm_of_mlp_D,
        mlp["gate_up"]["weight"][0],
        mlp["down"]["weight"],
        counter,
        eps=eps,
        blocks=blocks,
    )
    dtype = x_D.dtype if goes_on else jnp.float32
    x_D, y_N = layer_gpu.norm_product(
        x_D, norm_D, w_ND, jax.lax.psum(out_D, "tensor"), eps=eps, out_dtype=dtype, blocks=blocks
    )
    return x_D, y_N, counter


def _quantized_tail(
    layer: Params, heads_I: jax.Array, x_D: jax.Array, norm_D: jax.Array, w: Any, eps: float, goes_on: bool,
    sharded: bool,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Everything from the heads' output up to the projections of the next layer, with quantised weights.

    Args:
      layer: its parameters.
      heads_I: the output of attention.
      x_D: the residual stream.
      norm_D, w: the norm and the matrix that follow.
      eps: of the norms.
      goes_on: whether a layer follows, and not the head, which is not quantised.
      sharded: whether this is a tensor shard.
    """
    from qwen_jax.kernels.decode import layer_gpu_quantized

    matrix, (D,), mlp = layer_gpu_quantized.Matrix.of, x_D.shape, layer["mlp"]
    F = mlp["down"]["weight"].shape[-1]
    result: tuple[jax.Array, jax.Array | None] = layer_gpu_quantized.layer_tail(
        heads_I,
        x_D,
        matrix(layer["attention"]["o"], heads_I.size),
        layer["post_attention_norm"]["weight"],
        matrix(mlp["gate_up"], D),
        matrix(mlp["down"], F),
        norm_D,
        w if goes_on else None,
        eps=eps,
        axis="tensor" if sharded else None,
    )
    return result
