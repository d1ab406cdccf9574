"""Which models the kernels for one row can decode: two per layer (`step_gpu`, `layer_gpu`, `layer_gpu_moe`), or nine
where weights are quantised (`layer_gpu_quantized`); on a tensor axis dense models, with four, or nine."""

import functools

from qwen_jax.config import ModelConfig
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.parallel.sharding import padded_width
from qwen_jax.quantization import Quantization, Scheme, unified

# The projections of a dense layer in the inference layout, and those that each of them joins.
_PROJECTIONS = {
    "qkv": ("attention.q", "attention.k", "attention.v"),
    "o": ("attention.o",),
    "gate_up": ("mlp.gate", "mlp.up"),
    "down": ("mlp.down",),
}


def supports(config: ModelConfig, shards: int = 1) -> bool:
    """Whether the layer kernels support the sizes of a model. Logs the outcome once.

    Call it where `supports_decode_step` holds: it does not look at device and dtype.

    Args:
      config: the architecture, dense or MoE; weights in full precision or quantised.
      shards: size of the tensor axis.
    """
    if config.quantization is not None:
        return _supports_quantized(config, config.quantization, shards)
    if shards > 1:
        return _supports_shards(config, shards)
    from qwen_jax.kernels.decode import layer_gpu, layer_gpu_moe

    D, F, *sizes = _sizes_of_shard(config, 1)
    all_sparse = len(config.sparse_layers) == config.num_layers
    needs = {
        "dense layers whose sizes are multiples of 128": all_sparse or layer_gpu.supports(D, F, *sizes),
        "MoE layers with fewer than 256 experts whose sizes are multiples of 128": config.moe is None
        or layer_gpu_moe.supports(D, config.moe, *sizes),
    }
    fused, separate = Candidate("two kernels per layer", unmet(needs)), Candidate("many kernels per layer")
    arguments = f"hidden size {D}, {config.num_layers} layers"
    return select([fused, separate], "auto", "decoding of one row", arguments) == fused.name


def _supports_shards(config: ModelConfig, shards: int) -> bool:
    from qwen_jax.kernels.decode import layer_gpu

    D, F, heads, qkv, V = _sizes_of_shard(config, shards)
    needs = {
        "dense layers": config.moe is None,
        f"a hidden size, and a shard's feed-forward size ({F}) and heads x head_dim ({heads}), of multiples of 128": (
            layer_gpu.supports(D, F, heads, qkv, V)
        ),
    }
    fused = Candidate("four kernels per layer", unmet(needs))
    separate = Candidate("many kernels per layer", slow=True)
    what = f"hidden size {D}, {config.num_layers} layers, {shards} tensor shards"
    return select([fused, separate], "auto", "decoding of one row", what) == fused.name


def _sizes_of_shard(config: ModelConfig, shards: int) -> tuple[int, int, int, int, int]:
    """Hidden size; and a shard's feed-forward size, heads x head_dim, outputs of q, k and v, and vocabulary."""
    F = padded_width(config.intermediate_size, shards, config.quantization is not None) // shards
    heads = config.num_heads // shards * config.head_dim
    qkv = heads + 2 * max(config.num_kv_heads // shards, 1) * config.head_dim
    return config.hidden_size, F, heads, qkv, config.vocab_size // shards


def _supports_quantized(config: ModelConfig, quantization: Quantization, shards: int) -> bool:
    from qwen_jax.kernels.decode import layer_gpu, layer_gpu_quantized

    D, F, heads, qkv, V = _sizes_of_shard(config, shards)
    # Outputs, inputs, and the shards that the inputs are split into.
    sizes = {"qkv": (qkv, D, 1), "o": (D, heads, shards), "gate_up": (2 * F, D, 1), "down": (D, F, shards)}
    layers = [quantization.of_layer(i, config.num_layers) for i in range(config.num_layers)]
    schemes = {
        (name, functools.reduce(unified, map(layer.of, parts)))
        for layer in layers
        for name, parts in _PROJECTIONS.items()
    }
    known = all(x is not None and not x.ordered and x.offset != "min" for _, x in schemes)

    def of_shard(name: str, scheme: Scheme) -> dict[str, tuple[int, int, int]]:
        outputs, inputs, split = sizes[name]
        return {name: (outputs, inputs, scheme.groups(split * inputs, split) // split)}

    fits = known and all(
        layer_gpu_quantized.supports(of_shard(name, x), x.codes, x.scales) for name, x in schemes if x is not None
    )
    needs = {
        "dense layers": config.moe is None,
        "activations that are not rounded": quantization.rounds(1) == "none",
        "quantised projections without minima and without an order of their inputs": known,
        "sizes that are multiples of 128, and groups of a multiple of 32 inputs": fits,
        "a head that the layer kernel supports": layer_gpu.supports(D, F, heads, qkv, V),
    }
    fused = Candidate("nine kernels per layer", unmet(needs))
    separate = Candidate("many kernels per layer")
    what = f"{quantization.scheme.codes}, hidden size {D}, {config.num_layers} layers, {shards} tensor shards"
    return select([fused, separate], "auto", "decoding of one row with quantised weights", what) == fused.name
