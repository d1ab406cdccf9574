"""Training a mixture of experts: the losses that keep its experts in use, and the numbers that tell whether they are.

The balance loss counts over the whole global batch, on all devices and in all accumulated parts: over a few documents
experts may differ in their load, which is what makes them specialists (Qiu et al. 2025, arXiv:2501.11873).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.grouped import Implementation
from qwen_jax.moe.router import Routing
from train.files import read_records, to_json, write_file

EXPERTS = "experts.jsonl"


@dataclasses.dataclass(frozen=True)
class MoETraining:
    """How experts are trained. A dense model has no use for it.

    Attributes:
      balance_loss: coefficient of `balance_loss`; by default the model's `router_aux_loss_coef`.
      router_z_loss: coefficient of the mean squared logarithm of the router's softmax denominator (Zoph et al. 2022,
        arXiv:2202.08906, equation 5), which keeps its logits small.
      count_ahead: where a batch is worked off in several parts, count the experts' loads of all of them first, at the
        price of one more forward pass: only then is the gradient that of the whole batch. Otherwise a part is balanced
        against the loads of the parts so far.
      capacity_factor: 0 loses no token; see `qwen_jax.model.Options`. Evaluation loses none in any case.
      grouped: which kernel multiplies the rows of experts; see `qwen_jax.kernels.matmul.grouped`.

    Raises:
      InputError: a coefficient or factor that is negative or not finite.
    """

    balance_loss: float | None = None
    router_z_loss: float = 0.0
    count_ahead: bool = True
    capacity_factor: float = 0.0
    grouped: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("balance_loss", "router_z_loss", "capacity_factor"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be at least 0, got {value}.")

    def coefficient(self, model: ModelConfig) -> float:
        """Of the balance loss."""
        assert model.moe is not None
        return model.moe.router_aux_loss_coef if self.balance_loss is None else self.balance_loss


def balance_loss(
    load_LE: jax.Array, probability_LE: jax.Array, tokens: jax.Array, load_tokens: jax.Array | None = None
) -> jax.Array:
    """The load-balancing loss of Switch Transformers (Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6).

    Args:
      load_LE: tokens that took each expert, of each layer. They get no gradient.
      probability_LE: summed router probabilities.
      tokens: how many tokens there were.
      load_tokens: how many the loads were counted over, if not those.

    Returns:
      E x sum over experts of (load / tokens) x (probability / tokens), mean over layers. As in transformers a token
      counts for each of its k experts, so that even loads give k.
    """
    share_LE = jax.lax.stop_gradient(load_LE) / (tokens if load_tokens is None else load_tokens)
    return load_LE.shape[1] * jnp.mean((share_LE * probability_LE / tokens).sum(1))


def auxiliary(
    config: MoETraining,
    model: ModelConfig,
    routing: Routing,
    load_LE: jax.Array,
    load_tokens: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    """What a part of a batch adds to the mean loss of the whole batch.

    Args:
      config: coefficients.
      model: the architecture.
      routing: of the part, with an axis of layers in front.
      load_LE, load_tokens: loads [sparse layers, experts] that it is balanced against, and the number of tokens that
        they were counted over.
      tokens: number of tokens of the whole batch.

    Returns:
      Float32 scalar.
    """
    balance = balance_loss(load_LE, routing.probability_E, tokens, load_tokens)
    return config.coefficient(model) * balance + config.router_z_loss * routing.z.mean() / tokens


def routing_metrics(model: ModelConfig, routing: Routing) -> dict[str, jax.Array]:
    """Numbers of a step.

    Args:
      model: the architecture.
      routing: of the whole batch.

    Returns:
      Float32 scalars: `balance_loss` (k when loads are even), `router_z_loss` (both without coefficient),
      `router_entropy` (of a token's probabilities, in nats), `load_entropy` (of the loads of a layer, over the largest
      there could be), `load_max` (of the busiest expert of any layer, over the mean), `dropped` (fraction of
      assignments), `router_not_finite` (number of the first layer whose router gave a NaN or infinity, counted from 1;
      0 if none did); and `expert_load` [sparse layers, experts], over the mean.
    """
    assert model.moe is not None
    E, k = model.moe.num_experts, model.moe.num_experts_per_tok
    tokens = jnp.maximum(routing.tokens[0], 1.0)
    share_LE = routing.load_E / (tokens * k)
    entropy_L = -(share_LE * jnp.log(jnp.maximum(share_LE, 1e-30))).sum(1)
    bad_L = ~jnp.isfinite(routing.z)
    layers_L = jnp.array(model.sparse_layers, jnp.float32) + 1
    return {
        "balance_loss": balance_loss(routing.load_E, routing.probability_E, tokens),
        "router_z_loss": routing.z.mean() / tokens,
        "router_entropy": routing.entropy.mean() / tokens,
        "load_entropy": entropy_L.mean() / max(math.log(E), 1e-30),
        "load_max": share_LE.max() * E,
        "dropped": routing.dropped.mean() / (tokens * k),
        "router_not_finite": jnp.where(bad_L.any(), layers_L[jnp.argmax(bad_L)], 0.0),
        "expert_load": share_LE * E,
    }


class LoadLog:
    """`experts.jsonl`: at about two hundred steps of a run, the load of every expert over the mean."""

    def __init__(self, path: Path, layers: Sequence[int], steps: int, resume_step: int = 0):
        """Opens the log; lines after `resume_step` are taken away, for their steps are run again.

        Args:
          path: of the file, which is made when there is something to write.
          layers: numbers of the layers that have experts.
          steps: of the whole run.
          resume_step: steps already taken.
        """
        self._path, self._layers, self._every = path, list(layers), max(steps // 200, 1)
        if path.exists():
            kept = [record for record in read_records(path, "step") if record["step"] <= resume_step]
            write_file(path, "".join(to_json(record) + "\n" for record in kept).encode())

    def write(self, step: int, load_LE: np.ndarray) -> None:
        """Appends a line, if it is this step's turn."""
        if step % self._every == 0 or step == 1:
            record = {"step": step, "layers": self._layers, "load": np.round(load_LE.astype(float), 4).tolist()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")


def read_loads(path: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Steps [n], the loads at them [n, sparse layers, experts], and the numbers of these layers."""
    records = read_records(path, "load")
    layers = records[-1]["layers"] if records else []
    # A load that is not finite is null in the file, and NaN here.
    return np.array([r["step"] for r in records]), np.array([r["load"] for r in records], float), layers
