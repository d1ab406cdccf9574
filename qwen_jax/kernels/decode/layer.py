"""Which models the kernels for one row can decode: two kernels per layer (`step_gpu`, `layer_gpu`, `layer_gpu_moe`)."""

from qwen_jax.config import ModelConfig
from qwen_jax.kernels.select import Candidate, select, unmet


def supports(config: ModelConfig) -> bool:
    """Whether the layer kernels support the sizes of a model. Logs the outcome once.

    Call it where `supports_decode_step` holds: it does not look at device and dtype.

    Args:
      config: the architecture, dense or MoE.
    """
    from qwen_jax.kernels.decode import layer_gpu, layer_gpu_moe

    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    sizes = heads, qkv, config.vocab_size
    all_sparse = len(config.sparse_layers) == config.num_layers
    needs = {
        "dense layers whose sizes are multiples of 128": all_sparse
        or layer_gpu.supports(config.hidden_size, config.intermediate_size, *sizes),
        "MoE layers with fewer than 256 experts whose sizes are multiples of 128": config.moe is None
        or layer_gpu_moe.supports(config.hidden_size, config.moe, *sizes),
    }
    fused, separate = Candidate("two kernels per layer", unmet(needs)), Candidate("many kernels per layer")
    arguments = f"hidden size {config.hidden_size}, {config.num_layers} layers"
    return select([fused, separate], "auto", "decoding of one row", arguments) == fused.name
