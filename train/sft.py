"""Supervised fine-tuning on packed rows: next-token cross-entropy of trained tokens, and how good predictions are."""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.moe.router import RouterStats
from train.data.batch import Batch
from train.losses import Predictions, chunked_cross_entropy_and_predictions, next_token_targets
from train.moe import MoETraining, RoutedObjective, WholeBatch, routing_metrics
from train.objective import BatchContext, BoundModel, Metrics, Sums
from train.pretrain import PretrainConfig

Statistics = tuple[Predictions, RouterStats | None]
"""Sums over the trained tokens, and the routing of an MoE model in training."""


@dataclasses.dataclass(frozen=True)
class Sft(RoutedObjective[Batch, Statistics]):
    """The loss of `train.pretrain.NextToken` with `compact_loss`; the log has the accuracy and the entropy of tokens.

    Both come from the pass over the logits that computes the loss.

    Attributes:
      model: the architecture.
      config: settings; the loss is compact whatever they say.
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
        self, model: BoundModel, batch: Batch, context: BatchContext[Statistics, WholeBatch | None] | None
    ) -> tuple[Sums, Statistics]:
        """Summed cross-entropy, and the statistics of predictions and routing."""
        hidden_BTD, routing = self.hidden(model, batch, context)
        targets, weights = (model.in_model_order(x) for x in next_token_targets(batch))
        config = self.config
        sums, predictions = chunked_cross_entropy_and_predictions(
            model.module, hidden_BTD, targets, weights, config.loss_chunk, config.z_loss, compact=True
        )
        added = self.regulariser(routing, context, context.so_far[1] if context else None)
        return dataclasses.replace(sums, regulariser=added), (predictions, routing)

    def zero_statistics(self) -> Statistics:
        """Statistics of no token."""
        zero = jnp.zeros((), jnp.float32)
        return Predictions(zero, zero), self.zero_routing()

    def metrics(self, statistics: Statistics, denominator: jax.Array) -> Metrics:
        """`token_accuracy`, the part of trained tokens that were the likeliest, and `entropy`, the mean one in nats.

        With experts, `train.moe.routing_metrics` too.
        """
        predictions, routing = statistics
        found = {"token_accuracy": predictions.correct / denominator, "entropy": predictions.entropy / denominator}
        return found if routing is None else {**found, **routing_metrics(self.model, routing)}

    def for_evaluation(self) -> "Sft":
        """Without z-loss, and dropless."""
        return Sft(self.model, dataclasses.replace(self.config, z_loss=0.0, moe=self.moe.dropless()))
