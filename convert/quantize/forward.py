"""A layer in parts: the activations that each of its projections multiplies, for a batch of calibration rows.

The parts are those of `qwen_jax.model.Block`, in float32 on one device.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from convert.quantize.layer import Layer
from convert.quantize.statistics import chosen_rows
from qwen_jax import kernels
from qwen_jax.attention.dual_chunk import rope_and_masks
from qwen_jax.config import ModelConfig
from qwen_jax.model import Block
from qwen_jax.moe.experts import weighted_swiglu
from qwen_jax.moe.router import route
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import param_specs

_OPTIONS = Options(stacked=False)


class Forward:
    """Runs the parts of layers of one model."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        """
        Args:
          config: the architecture.
          mesh: of one device.
        """
        self.config, self.mesh = config, mesh
        self.sharding = Sharding.for_inference(config, mesh)
        self._plain = SingleDeviceSharding(mesh.devices.item())
        self._specs = param_specs(config, self.sharding, _OPTIONS)["layers"]

    def bind(self, layer: Layer) -> "BoundLayer":
        """A layer with its parameters on the device, as they are now."""
        specs = self._specs[layer.number]
        with jax.set_mesh(self.mesh):

            def put(x: np.ndarray, spec: jax.P) -> jax.Array:
                # A copy: the array of the host may be changed later.
                return jax.device_put(x, NamedSharding(self.mesh, spec), may_alias=False)

            params = jax.tree.map(put, layer.tree(), specs)
        kind = "moe" if layer.number in self.config.sparse_layers else "mlp"
        return BoundLayer(self, kind, params)

    def run(self, part: Callable[..., Any], kind: str, params: Any, x_BTD: np.ndarray) -> Any:
        """Runs a part of a layer; the results are arrays without a mesh."""
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("highest"):
            x = jax.device_put(x_BTD, NamedSharding(self.mesh, self.sharding.hidden))
            return jax.device_put(_run(part, self.config, self.sharding, kind, params, x), self._plain)


class BoundLayer:
    """The parts of one layer. All take the residual stream float32 [B, T, D], before the layer or after attention."""

    def __init__(self, forward: Forward, kind: str, params: dict[str, Any]) -> None:
        self._run: Callable[..., Any] = lambda part, x: forward.run(part, kind, params, x)
        self._forward, self._params, self.has_experts = forward, params, kind == "moe"

    def inputs(self, stage: str, x_BTD: np.ndarray) -> jax.Array:
        """Activations that a stage multiplies, [B T, I]: of "qkv" and "o" from before the layer, others from after it.

        Args:
          stage: "qkv", "o", "gate_up" or "down".
          x_BTD: the residual stream.
        """
        x: jax.Array = self._run(_PARTS[stage], x_BTD)
        return x.reshape(x.shape[0] * x.shape[1], -1)

    def after_attention(self, x_BTD: np.ndarray) -> np.ndarray:
        """The residual stream after attention."""
        return np.asarray(self._run(_after_attention, x_BTD))

    def output(self, x_BTD: np.ndarray) -> np.ndarray:
        """The residual stream after the layer, from that after attention."""
        return np.asarray(self._run(_output, x_BTD))

    def routed(self, h_ND: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Whether each token is sent to each expert, bool [N, E], and its weight there, float32 [N, E].

        Args:
          h_ND: the inputs of "gate_up".
        """
        moe = self._forward.config.moe
        assert moe is not None
        router = jnp.asarray(np.asarray(self._params["moe"]["router"]["weight"]))
        with jax.default_matmul_precision("highest"):
            weights_Nk, ids_Nk, _ = route(h_ND, router, moe)
        chosen, weight = (np.zeros((len(h_ND), moe.num_experts), dtype) for dtype in (bool, np.float32))
        np.put_along_axis(chosen, np.asarray(ids_Nk), True, 1)
        np.put_along_axis(weight, np.asarray(ids_Nk), np.asarray(weights_Nk), 1)
        return chosen, weight

    def expert_inputs(
        self, stage: str, h_ND: jax.Array, everything: frozenset[int] = frozenset()
    ) -> Iterator[tuple[int, jax.Array, int]]:
        """The rows of each expert that has any.

        Args:
          stage: "gate_up" or "down". The inputs of down are multiplied by the router's weight, as they are in the
            model.
          h_ND: the inputs of "gate_up".
          everything: experts that are given all tokens, with the weight 1.

        Yields:
          The expert, its inputs [n, I], and how many of its rows count; the others are zero.
        """
        chosen_NE, weight_NE = self.routed(h_ND)
        gate_up = self._params["moe"]["experts"]["gate_up"]
        for expert in range(chosen_NE.shape[1]):
            all_of_them = expert in everything
            rows, count = chosen_rows(np.ones(len(h_ND), bool) if all_of_them else chosen_NE[:, expert])
            if not count:
                continue
            weights = (np.arange(len(rows)) < count).astype(np.float32)
            if stage == "gate_up":
                yield expert, _rows(h_ND, rows, weights), count
                continue
            weights *= 1 if all_of_them else weight_NE[rows, expert]
            own = jnp.asarray(np.asarray(gate_up[expert]))
            yield expert, _expert_hidden(h_ND, rows, weights, own), count


@jax.jit
def _rows(h_ND: jax.Array, rows_n: jax.Array, weights_n: jax.Array) -> jax.Array:
    return h_ND[rows_n] * weights_n[:, None]


@jax.jit
def _expert_hidden(h_ND: jax.Array, rows_n: jax.Array, weights_n: jax.Array, gate_up_2FD: jax.Array) -> jax.Array:
    weight = gate_up_2FD.reshape(-1, gate_up_2FD.shape[-1])
    return weighted_swiglu(jnp.matmul(h_ND[rows_n], weight.T, precision="highest"), weights_n)


@functools.partial(jax.jit, static_argnames=("part", "config", "sharding", "kind"))
def _run(
    part: Callable[..., jax.Array], config: ModelConfig, sharding: Sharding, kind: str, params: Any, x_BTD: jax.Array
) -> jax.Array:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(config, sharding, nnx.Rngs(0), _OPTIONS, (kind,))))
    treedef = jax.tree.structure(state)
    block = nnx.merge(graphdef, jax.tree.unflatten(treedef, jax.tree.leaves(params)))
    return part(block, x_BTD)


def _heads(block: Block, x_BTD: jax.Array) -> jax.Array:
    """Outputs of the heads, [B, T, H, d], of texts that each fill a row."""
    config, spec, (B, T, _) = block.attention.config, block.attention.sharding, x_BTD.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    positions, mask = jax.tree.map(lambda x: jax.reshard(x, spec.tokens), (positions, kernels.causal_mask(B, T)))
    rope, masks = rope_and_masks(config, positions, mask, T, None, x_BTD.dtype)
    projected = block.attention.queries_keys_values(block.input_norm(x_BTD), rope)
    return block.attention.attend(*projected, masks)[0]


def _after_attention(block: Block, x_BTD: jax.Array) -> jax.Array:
    return x_BTD + block.attention.output(_heads(block, x_BTD))


def _hidden(block: Block, x_BTD: jax.Array) -> jax.Array:
    """The hidden neurons of the MLP or of the shared expert, [B, T, F]."""
    mlp = block.moe.shared if hasattr(block, "moe") else block.mlp
    gate, up = mlp.gate_and_up(block.post_attention_norm(x_BTD))
    return jax.nn.silu(gate) * up


def _output(block: Block, x_BTD: jax.Array) -> jax.Array:
    h_BTD = block.post_attention_norm(x_BTD)
    if not hasattr(block, "moe"):
        return x_BTD + block.mlp(h_BTD)
    mlp = block.moe.shared
    shared = block.moe.apply_shared_gate(h_BTD, mlp.down_swiglu(*mlp.gate_and_up(h_BTD)))
    return x_BTD + block.moe.routed(x_BTD, block.post_attention_norm.weight[...], None, shared)[0]


_PARTS: dict[str, Callable[[Block, jax.Array], jax.Array]] = {
    "qkv": lambda block, x: block.input_norm(x),
    "o": _heads,
    "gate_up": lambda block, x: block.post_attention_norm(x),
    "down": _hidden,
}
