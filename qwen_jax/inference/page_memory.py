"""How many pages of the cache there is memory for."""

import jax
import jax.numpy as jnp

from qwen_jax.attention.quantized_cache import cache_dtype, in_8_bits, kv_bytes_per_token
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.buckets import RunnerConfig, prefill_capacity
from qwen_jax.kernels.decode import GATHERED_SLOTS
from qwen_jax.parallel.sharding import Sharding


def pages_that_fit(
    config: ModelConfig, settings: RunnerConfig, sharding: Sharding, device: jax.Device, dtype: str, fraction: float
) -> int:
    """How many pages fit beside the weights, which are on the device already, and what a runner needs besides.

    Where the device does not report its memory, as the CPU, there is room for four texts of the full length.

    Args:
      config: the architecture.
      settings: sizes and the dtype of pages; its `num_pages` is not used.
      sharding: of the mesh.
      device: one of the mesh.
      dtype: compute dtype.
      fraction: of the device's memory that may be used.

    Raises:
      InputError: not even one text of the full length fits.
    """
    per_text = -(-settings.max_length // settings.page_size)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return 4 * per_text
    copies = sharding.kv_heads // config.num_kv_heads
    a_page = (
        kv_bytes_per_token(config, cache_dtype(settings.kv_dtype, dtype))
        * copies
        * settings.page_size
        // sharding.tensor
    )
    free = stats["bytes_limit"] * fraction - stats["bytes_in_use"] - _other_bytes(config, settings, sharding, dtype)
    pages = int(free // a_page)
    if pages < per_text:
        raise InputError(
            f"The cache of one text of {settings.max_length} tokens needs {per_text * a_page / 2**30:.1f} GiB on each "
            f"device; {max(free, 0) / 2**30:.1f} GiB are free of {fraction:.0%} of its memory. Lower max_length "
            "(--max-model-len) or max_batched_tokens, raise memory_fraction (--gpu-memory-utilization), "
            "take a cache in 8 bits (--kv-dtype), or use a larger tensor axis."
        )
    return min(pages, per_text * settings.max_seqs)


def _other_bytes(config: ModelConfig, settings: RunnerConfig, sharding: Sharding, dtype: str) -> int:
    """An estimate of what each device needs besides weights and pages: state of sequences, logits, activations."""
    V, t, size = config.vocab_size, sharding.tensor, jnp.dtype(dtype).itemsize
    # Penalties and biases of each sequence for a shard of the vocabulary, and bit masks for all of it.
    positions = 1 + settings.speculate
    state = (settings.max_seqs + 1) * V * 7 // t + (settings.max_seqs + 1) * positions * V // 8
    # Float32 logits of the largest step, and two arrays like them in sampling.
    logits = 3 * settings.max_seqs * positions * V * 4 // t
    # Activations of a prefill step, and one layer's keys and values of its texts, gathered from pages.
    tokens = max(settings.max_batched_tokens, settings.max_seqs)
    activations = tokens * (8 * config.hidden_size + 4 * config.intermediate_size // t) * size
    slots = prefill_capacity(settings)
    if in_8_bits(cache_dtype(settings.kv_dtype, dtype)):
        # Decode steps for which no kernel reads pages in 8 bits gather them, too, and convert them.
        slots, size = max(slots, GATHERED_SLOTS), size + 1
    gathered = 4 * slots * sharding.kv_heads // t * config.head_dim * size
    return state + logits + activations + gathered
