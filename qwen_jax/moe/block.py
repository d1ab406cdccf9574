"""The MoE feed-forward layer of `Qwen2MoeForCausalLM`: a router, routed experts, and one shared expert.

The cost of a token is that of the experts it uses. Rows are sorted by expert, sent to the devices of their experts,
multiplied in groups, and returned: `dispatch`, two products, `combine`.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.linear import Weight, initializers
from qwen_jax.moe.capacity import dispatch_with_capacity
from qwen_jax.moe.dispatch import (
    Dispatched,
    DispatchInfo,
    DroplessInfo,
    dispatch_dropless,
    multiply_down,
    multiply_up,
)
from qwen_jax.moe.exchange import select_exchange
from qwen_jax.moe.experts import Experts, MoEWeights, sum_partial_results, weighted_swiglu
from qwen_jax.moe.further_rounds import add_further_rounds
from qwen_jax.moe.gathered import GatheredInfo, dispatch_gathered
from qwen_jax.moe.router import MoEContext, RouterOutput, RouterStats, route_tokens, router_stats
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.remat import recompute


class SharedExpert(Protocol):
    """The interface of the shared expert: a SwiGLU module, such as `qwen_jax.model.MLP`."""

    def gate_and_up(self, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        """The gate and up products."""

    def down_swiglu(self, *gate_up: jax.Array) -> jax.Array:
        """The SwiGLU nonlinearity and the down product, [B, T, D]."""


class MoE(nnx.Module):
    """The routed experts and the shared expert of a layer.

    The routed part starts at the norm before the router, so that the backward pass need not keep its normalised input.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Options, shared: SharedExpert):
        assert config.moe is not None
        self.config, self.sharding, self.options = config, sharding, options
        E, F, D = config.moe.num_experts, config.moe.intermediate_size, config.hidden_size
        normal, residual = initializers(config)
        self.router = Weight(normal(rngs.params(), (E, D)), sharding.router)
        gate_up, down = normal(rngs.params(), (E, 2, F, D)), residual(rngs.params(), (E, D, F))
        self.experts = Experts(gate_up, down, sharding, config.quantization)
        self.shared = shared
        self.shared_gate = Weight(normal(rngs.params(), (1, D)), sharding.router)

    def apply_shared_gate(self, h_BTD: jax.Array, shared_BTD: jax.Array) -> jax.Array:
        """Multiplies the shared expert's output by the sigmoid of its gate.

        Args:
          h_BTD: the normalised input of the layer, from which the gate is computed.
          shared_BTD: output of the shared expert.
        """
        weight = jax.reshard(self.shared_gate.weight[...].astype(h_BTD.dtype), P(None, None))
        gate = jnp.einsum("BTD,XD->BTX", h_BTD, weight)
        return jax.nn.sigmoid(gate) * shared_BTD

    def routed(
        self,
        x_BTD: jax.Array,
        norm_D: jax.Array,
        valid_BT: jax.Array | None,
        shared_BTD: jax.Array,
        keep_dots: bool = False,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Adds the output of the routed experts to that of the shared expert.

        Only the final sum needs both, so a compiler can schedule the products of the shared expert during the exchanges
        of rows.

        Args:
          x_BTD: the residual stream, before the norm.
          norm_D: weight of the norm.
          valid_BT: bool, which tokens are not padding. Padding is sent to no expert. None: all tokens are valid, and no
            statistics are computed.
          shared_BTD: output of the shared expert, gated.
          keep_dots: the backward pass keeps the results of matrix products and recomputes everything else.

        Returns:
          [B, T, D], and the router's statistics if `valid_BT` is given.
        """
        spec, options, moe = self.sharding, self.options, self.config.moe
        assert moe is not None
        # Adapters are trained with gradients with respect to activations, which kernels for codes do not have.
        quantized = "plain" if options.lora is not None else "auto"
        rounded = (self.experts.activations(name, x_BTD.shape[0] * x_BTD.shape[1]) for name in ("gate_up", "down"))
        context = MoEContext(
            moe, spec, self.config.rms_norm_eps, options.capacity_factor, options.grouped, keep_dots, quantized,
            options.expert_exchange, *rounded,
        )  # fmt: skip
        dtype = x_BTD.dtype
        (gate_up, gate_up_specs), (down, down_specs) = (
            self.experts.arrays(name, dtype) for name in ("gate_up", "down")
        )
        weights = MoEWeights(norm_D, self.router.weight[...].astype(dtype), gate_up, down)
        specs: tuple[Any, ...] = spec.norm, spec.router, gate_up_specs, down_specs
        run = jax.shard_map(
            functools.partial(_routed_on_device, context),
            in_specs=(spec.hidden, MoEWeights(*specs), None if valid_BT is None else spec.tokens, spec.hidden),
            out_specs=(spec.hidden, P()),
            check_vma=False,
        )
        with jax.named_scope("experts"):
            result: tuple[jax.Array, RouterStats | None] = run(x_BTD, weights, valid_BT, shared_BTD)
        return result


def _routed_on_device(
    context: MoEContext,
    x_btD: jax.Array,
    weights: MoEWeights,
    valid_bt: jax.Array | None,
    shared_btD: jax.Array,
) -> tuple[jax.Array, RouterStats | None]:
    """`MoE.routed` for one device's tokens."""
    up = functools.partial(_route_and_multiply_up, context)
    down = functools.partial(_multiply_down_and_combine, context)
    if context.keep_dots:
        # The experts are chosen once, outside of what is recomputed. A second choice could differ by a rounding error,
        # and its rows would then be in another order than the kept products.
        ids_Nk = route_tokens(context, *lax.stop_gradient((weights, x_btD)), None).ids_Nk
        gate_up, row_weights, info, stats = recompute(up, weights, x_btD, constants=(valid_bt, ids_Nk))
        out_ND = recompute(down, weights, gate_up, row_weights, constants=(info,))
    else:
        gate_up, row_weights, info, stats = up(weights, x_btD, valid_bt, None)
        out_ND = down(weights, gate_up, row_weights, info)
    # Add the shared expert before the further rounds. The TPU compiler moves nothing that is first needed after these
    # rounds into the exchanges, so a later sum would lose the overlap.
    out_ND = sum_partial_results(context.sharding, out_ND) + shared_btD.reshape(out_ND.shape)
    if isinstance(info, (DroplessInfo, GatheredInfo)):
        out_ND = add_further_rounds(context, out_ND, x_btD, weights, info)
    return out_ND.astype(x_btD.dtype).reshape(x_btD.shape), stats


def _route_and_multiply_up(
    context: MoEContext, weights: MoEWeights, x_btD: jax.Array, valid_bt: jax.Array | None, ids_Nk: jax.Array | None
) -> tuple[jax.Array, jax.Array, DispatchInfo, RouterStats | None]:
    """Everything up to the first product: the product, the router's weight of each row, and where the rows are."""
    routed = route_tokens(context, weights, x_btD, valid_bt, ids_Nk)
    gate_up_eFD = weights.gathered_gate_up()
    # Sort the rows by expert and send them to the devices of their experts.
    rows, row_weights, dropped, info = _dispatch(context, routed)
    # Multiply.
    gate_up = multiply_up(context, info, rows, gate_up_eFD)
    return gate_up, row_weights, info, router_stats(context, routed, dropped)


def _dispatch(context: MoEContext, routed: RouterOutput) -> Dispatched:
    """Dispatch with a capacity, or dropless by the exchange that `select_exchange` chooses."""
    if context.capacity_factor:
        return dispatch_with_capacity(context, routed)
    axis, k = context.sharding.expert, context.config.num_experts_per_tok
    if context.sharding.exchanges and select_exchange(context.expert_exchange, axis, k) == "gathered":
        return dispatch_gathered(context, routed)
    return dispatch_dropless(context, routed)


def _multiply_down_and_combine(
    context: MoEContext, weights: MoEWeights, gate_up: jax.Array, row_weights: jax.Array, info: DispatchInfo
) -> jax.Array:
    """Everything from the first product to the sum of each token's rows, float32 [N, D]."""
    down_eDF = weights.gathered_down()
    # Multiply.
    y = multiply_down(context, info, weighted_swiglu(gate_up, row_weights), down_eDF)
    # Return.
    return info.combine(context, y)
