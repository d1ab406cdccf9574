"""Attention and matrix-product kernels for GPUs and TPUs, and the functions through which they are called.

| implementation | where      | masks     | dtypes                     | head_dim       | lse | gradient | caches |
|----------------|------------|-----------|----------------------------|----------------|-----|----------|--------|
| gpu            | Hopper GPU | intervals | bfloat16, float16          | 64, 128        | yes | yes      | yes    |
| cudnn          | GPU        | causal    | bfloat16, float16          | 8, 16, ... 256 | no  | yes      | no     |
| tpu            | TPU        | intervals | bfloat16, float32          | 64, 128        | yes | yes      | yes    |
| xla            | anywhere   | intervals | float32, bfloat16, float16 | any            | no  | yes      | no     |
| reference      | anywhere   | intervals | float32, bfloat16, float16 | any            | yes | yes      | yes    |

The table is for attention. Masks: "causal" is a plain causal mask that is known while tracing; "intervals" is any
`Mask`. lse: whether the log-sum-exp is available. caches: `decode_attention`, `paged_attention` and
`quantized_attention`, which have a gradient only in the reference. Any number of query heads may share a key/value
head.

`sparse_attention` and `column_attention` visit a part of the keys of a cache. They have the implementations gpu, tpu
and reference, with the dtypes and head_dims of the table, and a gradient only in the reference.
`qwen_jax.attention.pooled_blocks.block_scores` has the implementations gpu and xla.

`implementation="auto"` selects the first of gpu, cudnn, tpu and reference that supports the call. xla
(`jax.nn.dot_product_attention`, compiled by XLA) is used only by name. `select.select` makes every such choice: it logs
the outcome once, warns if "auto" selects the reference on an accelerator, and raises `InputError` if the implementation
asked for cannot do the call. `tests/qwen_jax/kernels/test_coverage.py` checks this table against the code.

Families: `attention/` for training and prefill, `decode/` for attention over caches and for whole layers of a decode
step, `matmul/` for grouped products and products of few rows. `gpu/` and `tpu/` hold what they share on each device.

Kernels run on local arrays. On a mesh, call them inside `jax.shard_map`.
"""

from qwen_jax.kernels.attention import attention, attention_gradient
from qwen_jax.kernels.attention.coverage import COVERAGE, Coverage, Implementation, is_pallas, select_attention
from qwen_jax.kernels.attention.lists import KeyLists
from qwen_jax.kernels.attention.sparse import column_attention, sparse_attention
from qwen_jax.kernels.decode import (
    decode_attention,
    decode_step,
    paged_attention,
    paged_decode_step,
    quantized_attention,
    supports_decode_step,
    supports_quantized_step,
)
from qwen_jax.kernels.decode.quantized import QuantizedRows
from qwen_jax.kernels.mask import Mask, cache_mask, causal_mask, packed_mask
from qwen_jax.kernels.select import log_once
from qwen_jax.kernels.softmax import merge

__all__ = [
    "COVERAGE",
    "Coverage",
    "Implementation",
    "KeyLists",
    "Mask",
    "QuantizedRows",
    "attention",
    "attention_gradient",
    "cache_mask",
    "causal_mask",
    "column_attention",
    "decode_attention",
    "decode_step",
    "is_pallas",
    "log_once",
    "merge",
    "packed_mask",
    "paged_attention",
    "paged_decode_step",
    "quantized_attention",
    "select_attention",
    "sparse_attention",
    "supports_decode_step",
    "supports_quantized_step",
]
