"""How the parameters of a model are laid out, and how it is run."""

import dataclasses

from qwen_jax import kernels
from qwen_jax.kernels.matmul.grouped import Implementation as Grouped
from qwen_jax.kernels.matmul.low_precision import Products
from qwen_jax.lora import LoRA
from qwen_jax.moe.exchange import ExpertExchange


@dataclasses.dataclass(frozen=True)
class Options:
    """How a set of parameters is laid out, and how the model is run.

    Attributes:
      stacked: layers are one tree with a leading layer axis, run by a scan (training); otherwise a list of trees, run
        one after the other (inference).
      fused: the inference layout of the projections; see `qwen_jax.inference.weights.fuse`.
      dtype: compute dtype.
      products: how projections are multiplied in training; see `qwen_jax.kernels.matmul.low_precision`.
      attention: attention kernel; see `kernels.attention`.
      ring: on a context axis, keys and values travel around the devices instead of being gathered; see
        `qwen_jax.attention.sequence`.
      grouped: kernel for the matrix products of experts; see `qwen_jax.kernels.matmul.grouped`.
      capacity_factor: 0 is dropless. Otherwise each expert has room for this many times the rows that a device would
        send it under even routing; overflowing tokens are dropped, and counted.
      expert_exchange: in training on an expert axis without a capacity, how tokens reach the devices of their experts:
        "rows" sends each row to its expert, "gathered" gathers all tokens. "auto" takes "gathered" on GPUs if the axis
        has at most as many devices as a token has experts, and "rows" elsewhere.
      lora: the projections have low-rank updates beside their weights; None for none. Not in the fused layout.
      lora_dropout: dropout of LoRA is on; parameters have the seeds of `qwen_jax.lora.with_dropout`.
      adapter_ranks: projections of the fused layout that have the low-rank updates of several adapters, and the sum of
        the ranks, such as (("qkv", 24), ("o", 8)). Each row uses those of one adapter; see
        `qwen_jax.inference.adapters`.
    """

    stacked: bool = True
    fused: bool = False
    dtype: str = "float32"
    products: Products = "bfloat16"
    attention: kernels.Implementation = "auto"
    ring: bool = False
    grouped: Grouped = "auto"
    capacity_factor: float = 0.0
    expert_exchange: ExpertExchange = "auto"
    lora: LoRA | None = None
    lora_dropout: bool = False
    adapter_ranks: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.fused and self.lora is not None:
            raise ValueError("The fused layout has no LoRA. Merge the adapter into the weights first.")
        if self.products != "bfloat16" and (self.fused or self.lora is not None):
            raise ValueError(
                "Products of 8 bits are for training whole weights: not for the fused layout, nor with LoRA."
            )
        if self.adapter_ranks and not self.fused:
            raise ValueError("Only the fused layout has adapters for each row.")
