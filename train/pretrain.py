"""Next-token pre-training on packed rows: the objective, for dense and MoE models."""

import dataclasses
import math

import jax

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.moe.router import RouterStats
from train.data.batch import Batch
from train.fields import at_least
from train.losses import chunked_cross_entropy, next_token_targets
from train.moe import MoETraining, RoutedObjective, WholeBatch, routing_metrics
from train.objective import BatchContext, BoundModel, Metrics, Sums


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of the next-token objective.

    Attributes:
      loss_chunk: tokens of one device whose logits exist at one time.
      z_loss: coefficient; see `train.losses.chunked_cross_entropy`.
      moe: for a model with experts.
      compact_loss: compute logits only where the target has a weight, as in fine-tuning on answers.

    Raises:
      InputError: a value out of range.
    """

    loss_chunk: int = 2048
    z_loss: float = 0.0
    moe: MoETraining = MoETraining()
    compact_loss: bool = False

    def __post_init__(self) -> None:
        at_least(self, loss_chunk=1)
        if not (self.z_loss >= 0 and math.isfinite(self.z_loss)):
            raise InputError(f"z_loss must be at least 0, got {self.z_loss}.")


@dataclasses.dataclass(frozen=True)
class NextToken(RoutedObjective[Batch, RouterStats | None]):
    """Cross-entropy of the next token of the same document; with experts, their balance and router z-loss too.

    Attributes:
      model: the architecture.
      config: settings.
    """

    model: ModelConfig
    config: PretrainConfig = PretrainConfig()

    @property
    def moe(self) -> MoETraining:
        """How experts are trained."""
        return self.config.moe

    def rows(self, batch: Batch) -> Batch:
        """The batch itself."""
        return batch

    def denominator(self, batch: Batch) -> jax.Array:
        """The summed weight of all targets."""
        return next_token_targets(batch)[1].sum()

    def sums(
        self, model: BoundModel, batch: Batch, context: BatchContext[RouterStats | None, WholeBatch | None] | None
    ) -> tuple[Sums, RouterStats | None]:
        """Summed cross-entropy, and the routing of an MoE model in training."""
        hidden_BTD, routing = self.hidden(model, batch, context)
        targets, weights = (model.in_model_order(x) for x in next_token_targets(batch))
        config = self.config
        sums = chunked_cross_entropy(
            model.module, hidden_BTD, targets, weights, config.loss_chunk, config.z_loss, config.compact_loss
        )
        added = self.regulariser(routing, context, context.so_far if context else None)
        return dataclasses.replace(sums, regulariser=added), routing

    def zero_statistics(self) -> RouterStats | None:
        """Statistics of no token; None for a dense model."""
        return self.zero_routing()

    def metrics(self, statistics: RouterStats | None, denominator: jax.Array) -> Metrics:
        """With experts: `train.moe.routing_metrics`."""
        return {} if statistics is None else routing_metrics(self.model, statistics)

    def for_evaluation(self) -> "NextToken":
        """Without z-loss, and dropless."""
        return NextToken(self.model, dataclasses.replace(self.config, z_loss=0.0, moe=self.moe.dropless()))
