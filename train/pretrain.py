"""Next-token pre-training on packed rows: the objective, for dense and MoE models."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.moe.router import RouterStats
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from train.data.batch import Batch
from train.fields import at_least
from train.losses import chunked_cross_entropy, next_token_targets
from train.moe import (
    MoETraining,
    WholeBatch,
    auxiliary,
    count_whole_batch,
    exchange_options,
    explain_router,
    routing_metrics,
    zero_routing,
)
from train.objective import BatchContext, BoundModel, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of the next-token objective.

    Attributes:
      loss_chunk: tokens of one device whose logits exist at one time.
      z_loss: coefficient; see `train.losses.chunked_cross_entropy`.
      moe: for a model with experts.

    Raises:
      InputError: a value out of range.
    """

    loss_chunk: int = 2048
    z_loss: float = 0.0
    moe: MoETraining = MoETraining()

    def __post_init__(self) -> None:
        at_least(self, loss_chunk=1)
        if not (self.z_loss >= 0 and math.isfinite(self.z_loss)):
            raise InputError(f"z_loss must be at least 0, got {self.z_loss}.")


@dataclasses.dataclass(frozen=True)
class NextToken(Objective[Batch, RouterStats | None, WholeBatch | None]):
    """Cross-entropy of the next token of the same document; with experts, their balance and router z-loss too.

    Attributes:
      model: the architecture.
      config: settings.
    """

    model: ModelConfig
    config: PretrainConfig = PretrainConfig()

    def denominator(self, batch: Batch) -> jax.Array:
        """The summed weight of all targets."""
        return next_token_targets(batch)[1].sum()

    def prepare(self, model: BoundModel, batch: Batch, micro_batches: Batch | None) -> WholeBatch | None:
        """What the balance loss needs of the whole batch; None for a dense model."""
        if self.model.moe is None:
            return None
        return count_whole_batch(self.config.moe, model, batch, micro_batches)

    def sums(
        self, model: BoundModel, batch: Batch, context: BatchContext[RouterStats | None, WholeBatch | None] | None
    ) -> tuple[Sums, RouterStats | None]:
        """Summed cross-entropy, and the routing of an MoE model in training."""
        whole = context.prepared if context else None
        hidden_BTD, routing = model.hidden(batch, count_routing=whole is not None)
        targets, weights = (model.in_model_order(x) for x in next_token_targets(batch))
        sums = chunked_cross_entropy(
            model.module, hidden_BTD, targets, weights, self.config.loss_chunk, self.config.z_loss
        )
        if context is not None and whole is not None and routing is not None:
            added = auxiliary(self.config.moe, self.model, routing, whole, context.so_far)
            sums = dataclasses.replace(sums, regulariser=added)
        return sums, routing

    def zero_statistics(self) -> RouterStats | None:
        """Statistics of no token; None for a dense model."""
        return None if self.model.moe is None else zero_routing(self.model)

    def metrics(self, statistics: RouterStats | None, denominator: jax.Array) -> Metrics:
        """With experts: `train.moe.routing_metrics`."""
        return {} if statistics is None else routing_metrics(self.model, statistics)

    def for_evaluation(self) -> "NextToken":
        """Without z-loss, and dropless."""
        moe = dataclasses.replace(self.config.moe, capacity_factor=0.0)
        return NextToken(self.model, dataclasses.replace(self.config, z_loss=0.0, moe=moe))

    def options(self, options: Options) -> Options:
        """With the experts' kernel and capacity."""
        moe = self.config.moe
        return dataclasses.replace(options, grouped=moe.grouped, capacity_factor=moe.capacity_factor)

    def compiler_options(self, sharding: Sharding, platform: str) -> dict[str, bool]:
        """Asynchronous exchange of tokens between the devices of an expert axis, on TPUs."""
        return exchange_options(self.config.moe, sharding, platform)

    def explain(self, numbers: Mapping[str, float]) -> str:
        """Names the router that gave logits that are not finite, if one did."""
        return explain_router(numbers)
