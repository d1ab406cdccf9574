"""Training of MoE models: the losses that keep all experts in use, and the numbers that tell whether they are.

The balance loss counts over the whole global batch, on all devices and in all micro-batches: over a few documents
experts may differ in their load, which is what makes them specialise (Qiu et al. 2025, arXiv:2501.11873).
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.kernels.matmul.grouped import Implementation
from qwen_jax.moe.exchange import ExpertExchange
from qwen_jax.moe.router import RouterStats
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from train.data.batch import Batch
from train.files import read_records, write_file
from train.objective import BatchContext, BoundModel, Objective

EXPERTS = "experts.jsonl"

B = TypeVar("B")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class MoETraining:
    """How experts are trained. A dense model does not use it.

    Attributes:
      balance_loss: coefficient of `balance_loss`; by default the model's `router_aux_loss_coef`.
      router_z_loss: coefficient of the mean squared log of the router's softmax denominator (Zoph et al. 2022,
        arXiv:2202.08906, equation 5), which keeps its logits small.
      count_ahead: with several micro-batches per step, count the experts' loads of all of them first, at the cost of
        one more forward pass: only then is the gradient that of the whole batch. Otherwise a micro-batch is balanced
        against the loads of the micro-batches so far.
      capacity_factor: 0 is dropless; see `qwen_jax.options.Options`. Evaluation is dropless in any case.
      grouped: which kernel multiplies the rows of experts; see `qwen_jax.kernels.matmul.grouped`.
      expert_exchange: how tokens reach the devices of their experts on an expert axis, without a capacity: "auto",
        "rows" or "gathered"; see `qwen_jax.options.Options`.

    Raises:
      InputError: a coefficient or factor that is negative or not finite.
    """

    balance_loss: float | None = None
    router_z_loss: float = 0.0
    count_ahead: bool = True
    capacity_factor: float = 0.0
    grouped: Implementation = "auto"
    expert_exchange: ExpertExchange = "auto"

    def __post_init__(self) -> None:
        for name in ("balance_loss", "router_z_loss", "capacity_factor"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be at least 0, got {value}.")

    def coefficient(self, model: ModelConfig) -> float:
        """The coefficient of the balance loss of an MoE model."""
        assert model.moe is not None
        return model.moe.router_aux_loss_coef if self.balance_loss is None else self.balance_loss

    def dropless(self) -> "MoETraining":
        """The same without a limit of the experts' capacity, for evaluation."""
        return dataclasses.replace(self, capacity_factor=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """What the losses of a micro-batch need of its whole batch.

    Attributes:
      tokens: float32 scalar, number of tokens, at least 1.
      loads: experts' loads [sparse layers, experts], and over how many tokens they were counted, if they were counted
        ahead; None where each micro-batch is balanced against the loads so far.
    """

    tokens: jax.Array
    loads: tuple[jax.Array, jax.Array] | None


def count_whole_batch(config: MoETraining, model: BoundModel, batch: Batch, micro_batches: Batch | None) -> WholeBatch:
    """Counts the tokens of a batch, and its experts' loads by a forward pass over all micro-batches if that is needed.

    Args:
      config: says whether loads are counted ahead.
      model: with the current weights.
      batch: the whole global batch.
      micro_batches: the same, each array [micro-batches, rows, length]; None if the batch is not split.
    """
    tokens = jnp.maximum((batch.segment_ids > 0).sum(dtype=jnp.float32), 1.0)
    architecture = model.module.config
    if micro_batches is None or not config.count_ahead or config.coefficient(architecture) == 0:
        return WholeBatch(tokens, None)
    zero = zero_routing(architecture)

    def count(total: tuple[jax.Array, jax.Array], micro_batch: Batch) -> tuple[tuple[jax.Array, jax.Array], None]:
        _, routing = model.hidden(micro_batch, count_routing=True)
        assert routing is not None
        return (total[0] + routing.load_E, total[1] + routing.tokens[0]), None

    with jax.named_scope("counting"):
        loads, _ = jax.lax.scan(count, (zero.load_E, jnp.zeros((), jnp.float32)), micro_batches)
    return WholeBatch(tokens, loads)


def zero_routing(model: ModelConfig) -> RouterStats:
    """The routing of no token, with a leading axis of sparse layers."""
    assert model.moe is not None
    layers_L = jnp.zeros(len(model.sparse_layers), jnp.float32)
    experts_LE = jnp.zeros((len(model.sparse_layers), model.moe.num_experts), jnp.float32)
    return RouterStats(experts_LE, experts_LE, layers_L, layers_L, layers_L, layers_L)


def balance_loss(
    load_LE: jax.Array, probability_LE: jax.Array, tokens: jax.Array, load_tokens: jax.Array | None = None
) -> jax.Array:
    """The load-balancing loss of Switch Transformers (Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6).

    Args:
      load_LE: tokens that each expert of each layer got. They get no gradient.
      probability_LE: summed router probabilities.
      tokens: number of tokens.
      load_tokens: number of tokens that the loads were counted over; by default `tokens`.

    Returns:
      E x sum over experts of (load / tokens) x (probability / tokens), averaged over layers. As in transformers,
      a token counts for each of its k experts, so that even loads give k.
    """
    share_LE = jax.lax.stop_gradient(load_LE) / (tokens if load_tokens is None else load_tokens)
    return load_LE.shape[1] * jnp.mean((share_LE * probability_LE / tokens).sum(1))


def auxiliary(
    config: MoETraining, model: ModelConfig, routing: RouterStats, whole: WholeBatch, so_far: RouterStats | None
) -> jax.Array:
    """What the routing of a micro-batch adds to the mean loss of the whole batch: balance loss and router z-loss.

    Args:
      config: coefficients.
      model: the architecture.
      routing: of the micro-batch, with a leading axis of sparse layers.
      whole: what is known of the whole batch.
      so_far: routing of the micro-batches before this one, added up.

    Returns:
      Float32 scalar.
    """
    if whole.loads is not None:
        load_LE, counted = whole.loads
    else:
        assert so_far is not None
        load_LE, counted = so_far.load_E + routing.load_E, so_far.tokens[0] + routing.tokens[0]
    balance = balance_loss(load_LE, routing.probability_E, whole.tokens, jnp.maximum(counted, 1.0))
    return config.coefficient(model) * balance + config.router_z_loss * routing.z.mean() / whole.tokens


def routing_metrics(model: ModelConfig, routing: RouterStats) -> dict[str, jax.Array]:
    """Metrics of the routers in a step.

    Args:
      model: the architecture.
      routing: of the whole batch.

    Returns:
      Float32 scalars: `balance_loss` (k when loads are even) and `router_z_loss`, both without coefficient;
      `router_entropy` of a token's probabilities, in nats; `load_entropy` of the loads of a layer, as a fraction of the
      largest possible; `load_max`, the load of the busiest expert of any layer over the mean; `dropped`, a fraction of
      assignments; `router_not_finite`, the first layer whose router gave a NaN or infinity, counted from 1, or 0. And
      `expert_load` [sparse layers, experts], each expert's load over the mean.
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


def explain_router(numbers: Mapping[str, float]) -> str:
    """Names the first router that gave logits that are not finite, or returns "".

    Args:
      numbers: `routing_metrics` of a step.
    """
    layer = int(numbers.get("router_not_finite", 0))
    if not layer:
        return ""
    return (
        f"The router of layer {layer} (counted from 1) gives logits that are not finite: its input or its weight is "
        "not. A router_z_loss keeps logits small."
    )


def exchange_options(config: MoETraining, sharding: Sharding, platform: str) -> dict[str, bool]:
    """Options of XLA under which an expert axis exchanges tokens while the shared expert computes.

    Args:
      config: says which collective is used.
      sharding: of the mesh.
      platform: of its devices; the options are those of TPUs.
    """
    if not sharding.exchanges or platform != "tpu":
        return {}
    pieces = config.capacity_factor or config.expert_exchange == "gathered"
    kind = "all_to_all" if pieces else "ragged_all_to_all"
    return {f"xla_tpu_enable_async_{kind}": True}


class RoutedObjective(Objective[B, S, WholeBatch | None]):
    """What objectives on hidden states share: with experts, a balance loss and a router z-loss are added to each."""

    @property
    @abc.abstractmethod
    def moe(self) -> MoETraining:
        """How experts are trained."""

    @abc.abstractmethod
    def rows(self, batch: B) -> Batch:
        """The packed rows of a batch."""

    def hidden(
        self, model: BoundModel, batch: B, context: BatchContext[S, WholeBatch | None] | None
    ) -> tuple[jax.Array, RouterStats | None]:
        """Final hidden states [B, T, D] of a micro-batch, and the routing of an MoE model in training.

        Args:
          model, batch, context: as `sums` gets them.
        """
        counted = context is not None and context.prepared is not None
        return model.hidden(self.rows(batch), count_routing=counted)

    def regulariser(
        self,
        routing: RouterStats | None,
        context: BatchContext[S, WholeBatch | None] | None,
        so_far: RouterStats | None,
    ) -> jax.Array | None:
        """`Sums.regulariser`: the losses of the routers, or None without experts and in evaluation.

        Args:
          routing: of the micro-batch.
          context: as `sums` gets it.
          so_far: the routing in `context.so_far`.
        """
        if context is None or context.prepared is None or routing is None:
            return None
        return auxiliary(self.moe, self.model, routing, context.prepared, so_far)

    def prepare(self, model: BoundModel, batch: B, micro_batches: B | None) -> WholeBatch | None:
        """What the balance loss needs of the whole batch; None for a dense model."""
        if self.model.moe is None:
            return None
        parts = None if micro_batches is None else self.rows(micro_batches)
        return count_whole_batch(self.moe, model, self.rows(batch), parts)

    def zero_routing(self) -> RouterStats | None:
        """The routing of no token; None for a dense model."""
        return None if self.model.moe is None else zero_routing(self.model)

    def options(self, options: Options) -> Options:
        """With the experts' kernel, capacity and exchange."""
        moe = self.moe
        return dataclasses.replace(
            options, grouped=moe.grouped, capacity_factor=moe.capacity_factor, expert_exchange=moe.expert_exchange
        )

    def compiler_options(self, sharding: Sharding, platform: str) -> dict[str, bool]:
        """Asynchronous exchange of tokens between the devices of an expert axis, on TPUs."""
        return exchange_options(self.moe, sharding, platform)

    def explain(self, numbers: Mapping[str, float]) -> str:
        """Names the router that gave logits that are not finite, if one did."""
        return explain_router(numbers)


class LoadLog:
    """The file `experts.jsonl`: at about two hundred steps of a run, each expert's load over the mean."""

    def __init__(self, path: Path, layers: Sequence[int], steps: int, resume_step: int = 0):
        """Opens the log and removes the lines after `resume_step`, whose steps are run again.

        Args:
          path: of the file, which is created at the first write.
          layers: indices of the layers that have experts.
          steps: of the whole run.
          resume_step: steps already taken.
        """
        self._path, self._layers, self._every = path, list(layers), max(steps // 200, 1)
        if path.exists():
            kept = [record for record in read_records(path, "step") if record["step"] <= resume_step]
            write_file(path, "".join(to_json(record) + "\n" for record in kept).encode())

    def write(self, step: int, name: str, value: np.ndarray) -> None:
        """Appends a line if a line is due at this step; a hook for `Monitor.arrays`.

        Args:
          step: its number.
          name: of a metric; all but `expert_load` are ignored.
          value: of the metric, [sparse layers, experts].
        """
        if name == "expert_load" and (step % self._every == 0 or step == 1):
            record = {"step": step, "layers": self._layers, "load": np.round(value.astype(float), 4).tolist()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")


def read_loads(path: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Reads `experts.jsonl`.

    Args:
      path: of the file.

    Returns:
      Steps [n], loads at these steps [n, sparse layers, experts], and the indices of the sparse layers.
    """
    records = read_records(path, "load")
    layers = records[-1]["layers"] if records else []
    # A load that is not finite is null in the file, and NaN here.
    return np.array([r["step"] for r in records]), np.array([r["load"] for r in records], float), layers
