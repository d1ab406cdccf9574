"""Reward modelling on preference pairs: the Bradley-Terry objective, for dense and MoE models."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig, Score
from qwen_jax.errors import InputError
from qwen_jax.moe.router import RouterStats
from train.data.batch import Batch
from train.data.pairs import PairBatch
from train.fields import at_least
from train.losses import segment_sums
from train.moe import MoETraining, RoutedObjective, WholeBatch, routing_metrics
from train.objective import BatchContext, BoundModel, Metrics, Sums
from train.preference import bradley_terry


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Settings of the reward objective.

    Attributes:
      centering: coefficient of the mean squared sum of the two scores of a pair, which keeps scores around zero
        (Eisenstein et al. 2023, arXiv:2312.09244); 0.01 is usual.
      max_segments: the most segments of a row, two for each pair; as the rows are packed.
      head: the score head of the model; see `qwen_jax.score`.
      moe: for a model with experts.

    Raises:
      InputError: a value out of range.
    """

    centering: float = 0.0
    max_segments: int = 128
    head: Score = "linear"
    moe: MoETraining = MoETraining()

    def __post_init__(self) -> None:
        at_least(self, max_segments=2)
        if self.max_segments % 2:
            raise InputError(f"max_segments must be even, two for each pair; got {self.max_segments}.")
        if not (self.centering >= 0 and math.isfinite(self.centering)):
            raise InputError(f"centering must be at least 0, got {self.centering}.")
        if self.head not in ("linear", "mlp"):
            raise InputError(f"head must be linear or mlp, got {self.head!r}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardStats:
    """Sums over pairs, float32 scalars.

    Attributes:
      accuracy: pairs whose chosen answer has the higher score.
      margin: chosen minus rejected score.
      mean_reward: half of the sum of both scores.
      beyond: pairs that are not scored, because their row has more than `max_segments` segments.
      routing: of an MoE model in training; otherwise None.
    """

    accuracy: jax.Array
    margin: jax.Array
    mean_reward: jax.Array
    beyond: jax.Array
    routing: RouterStats | None


@dataclasses.dataclass(frozen=True)
class Reward(RoutedObjective[PairBatch, RewardStats]):
    """Bradley-Terry loss of a reward model, the mean over pairs; with experts, their balance and router z-loss too.

    The score of an answer is that at the last token of its segment, which `segment_ids` tell: token ids play no part.

    Attributes:
      model: the architecture, with a score head.
      config: settings.

    Raises:
      InputError: a model without the score head of the settings.
    """

    model: ModelConfig
    config: RewardConfig = RewardConfig()

    def __post_init__(self) -> None:
        if self.model.score != self.config.head:
            has = "no score head" if self.model.score is None else f"the score head {self.model.score!r}"
            raise InputError(
                f"The model has {has}, and the objective expects {self.config.head!r}. Set head (objective.head) to "
                "that of the model, or start from a language model with qwen_jax.params.with_fresh_score_head."
            )

    @property
    def moe(self) -> MoETraining:
        """How experts are trained."""
        return self.config.moe

    def rows(self, batch: PairBatch) -> Batch:
        """The packed rows."""
        return batch.batch

    def denominator(self, batch: PairBatch) -> jax.Array:
        """The number of pairs."""
        return _ends_pair(batch.batch).sum(dtype=jnp.float32)

    def sums(
        self, model: BoundModel, batch: PairBatch, context: BatchContext[RewardStats, WholeBatch | None] | None
    ) -> tuple[Sums, RewardStats]:
        """Summed loss, and the statistics of the pairs."""
        # Scores at every token, in the order of the model.
        hidden_BTD, routing = self.hidden(model, batch, context)
        scores_BT = model.module.scores(hidden_BTD)

        # One number for each segment, from its last token: chosen and rejected alternate.
        segments_BT, last_BT, margin_BT = map(
            model.in_model_order, (batch.batch.segment_ids, _is_last(batch.batch).astype(jnp.float32), batch.margin_BT)
        )

        def of_pairs(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            sums_BS = segment_sums(x_BT, segments_BT, self.config.max_segments, model.module.sharding)
            return sums_BS[:, 0::2], sums_BS[:, 1::2]

        chosen, rejected = of_pairs(jnp.where(last_BT > 0, scores_BT, 0.0))
        margin, _ = of_pairs(margin_BT)
        is_pair = of_pairs(last_BT)[1]

        # The loss. Pairs beyond max_segments would be left out in silence; a loss of NaN stops the run instead.
        count, pairs = is_pair.sum(), _ends_pair(batch.batch).sum(dtype=jnp.float32)
        reported = (bradley_terry(chosen, rejected, margin) * is_pair).sum()
        loss = (bradley_terry(chosen, rejected, margin, self.config.centering) * is_pair).sum()
        loss = jnp.where(count < pairs, jnp.nan, loss)
        added = self.regulariser(routing, context, context.so_far.routing if context else None)
        chosen, rejected = map(jax.lax.stop_gradient, (chosen, rejected))
        statistics = RewardStats(
            accuracy=((chosen > rejected) * is_pair).sum(),
            margin=((chosen - rejected) * is_pair).sum(),
            mean_reward=((chosen + rejected) * is_pair).sum() / 2,
            beyond=pairs - count,
            routing=routing,
        )
        return Sums(loss, count, jax.lax.stop_gradient(reported), added), statistics

    def zero_statistics(self) -> RewardStats:
        """Statistics of no pair."""
        zero = jnp.zeros((), jnp.float32)
        return RewardStats(zero, zero, zero, zero, self.zero_routing())

    def metrics(self, statistics: RewardStats, denominator: jax.Array) -> Metrics:
        """`accuracy`, `margin` and `mean_reward`, as TRL names them; `beyond`; with experts, `routing_metrics`."""
        names = "accuracy", "margin", "mean_reward"
        found = {name: getattr(statistics, name) / denominator for name in names}
        found["beyond"] = statistics.beyond
        return found if statistics.routing is None else found | routing_metrics(self.model, statistics.routing)

    def for_evaluation(self) -> "Reward":
        """Without centring, and dropless."""
        return Reward(self.model, dataclasses.replace(self.config, centering=0.0, moe=self.moe.dropless()))

    def explain(self, numbers: Mapping[str, float]) -> str:
        """Says that rows have too many segments, or names the router that gave logits that are not finite."""
        beyond = int(numbers.get("beyond", 0))
        if beyond:
            return (
                f"{beyond} pairs of the batch are in rows with more than max_segments={self.config.max_segments} "
                "segments, and would not be scored. Set max_segments to that of the packed rows."
            )
        return super().explain(numbers)


def _is_last(batch: Batch) -> jax.Array:
    """Where the last token of a segment is, bool [B, T]."""
    following = jnp.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1)))
    return (batch.segment_ids > 0) & (batch.segment_ids != following)


def _ends_pair(batch: Batch) -> jax.Array:
    """Where the last token of a rejected answer is, bool [B, T]."""
    return _is_last(batch) & (batch.segment_ids % 2 == 0)
