"""Direct preference optimisation on packed pairs: the objective, and the pass of the reference model.

One forward pass serves chosen and rejected answers, which are neighbouring segments of packed rows. Log-probabilities
under the reference come with the batch: `make_reference_pass` computes them once, before training.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.moe.router import RouterStats
from qwen_jax.params import Params
from train.data.batch import Batch
from train.data.pairs import PairBatch
from train.fields import at_least
from train.losses import chunked_log_probs, next_token_targets, segment_sums
from train.moe import MoETraining, RoutedObjective, WholeBatch, routing_metrics
from train.objective import BatchContext, BoundModel, Metrics, Sums
from train.preference import dpo_loss
from train.step import StepConfig, make_forward

_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "nll_loss",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Settings of DPO; see `train.preference.dpo_loss`.

    Attributes:
      beta: strength of the bond to the reference.
      loss: "sigmoid" or "ipo".
      label_smoothing: probability that a label is wrong; of "sigmoid" only.
      length_normalised: divide log-probabilities by the number of trained tokens of the answer, those of the reference
        too. TRL's IPO does so; for "sigmoid" it is Lambert et al. 2024, arXiv:2411.15124.
      nll_weight: coefficient of the chosen answer's mean cross-entropy per token, which is added to the loss of each
        pair (Pang et al. 2024, arXiv:2404.19733, equation 1).
      max_segments: of a row; an even number, two for each pair.
      loss_chunk: tokens of one device whose logits exist at one time.
      moe: for a model with experts.

    Raises:
      InputError: a value out of range.
    """

    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    nll_weight: float = 0.0
    max_segments: int = 128
    loss_chunk: int = 2048
    moe: MoETraining = MoETraining()

    def __post_init__(self) -> None:
        at_least(self, loss_chunk=1, max_segments=2)
        if self.loss not in ("sigmoid", "ipo"):
            raise InputError(f"loss must be sigmoid or ipo, got {self.loss!r}.")
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise InputError(f"beta must be positive, got {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}.")
        if self.label_smoothing and self.loss != "sigmoid":
            raise InputError(f"label_smoothing belongs to loss 'sigmoid'; make it 0 for {self.loss!r}.")
        if not (self.nll_weight >= 0 and math.isfinite(self.nll_weight)):
            raise InputError(f"nll_weight must be at least 0, got {self.nll_weight}.")
        if self.max_segments % 2:
            raise InputError(f"max_segments must be even, two for each pair; got {self.max_segments}.")


Statistics = tuple[dict[str, jax.Array], RouterStats | None]
"""Sums over pairs by the names of the metrics, and the routing of an MoE model in training."""


@dataclasses.dataclass(frozen=True)
class Dpo(RoutedObjective[PairBatch, Statistics]):
    """DPO against log-probabilities of the reference that are part of the batch; the mean is over pairs.

    Attributes:
      model: the architecture.
      config: settings.
    """

    model: ModelConfig
    config: DpoConfig = DpoConfig()

    @property
    def moe(self) -> MoETraining:
        """How experts are trained."""
        return self.config.moe

    def rows(self, batch: PairBatch) -> Batch:
        """The packed rows."""
        return batch.batch

    def denominator(self, batch: PairBatch) -> jax.Array:
        """The number of pairs."""
        return (batch.batch.segment_ids.max(1) // 2).sum().astype(jnp.float32)

    def sums(
        self, model: BoundModel, batch: PairBatch, context: BatchContext[Statistics, WholeBatch | None] | None
    ) -> tuple[Sums, Statistics]:
        """Summed losses of pairs, and the sums of the metrics.

        The loss is NaN, and the step skipped, if a row has more than `max_segments` segments or an odd number of them;
        `check_pairs` finds such rows.
        """
        config, beta = self.config, self.config.beta
        hidden_BTD, routing = self.hidden(model, batch, context)
        log_probs_BS, tokens_BS = answer_log_probs(config, model, batch.batch, hidden_BTD)
        reference_BS = _sums_by_segment(config, model, batch.batch, batch.reference_BT)

        # Which pairs there are.
        segments_B = batch.batch.segment_ids.max(1)
        exists_BP = jnp.arange(config.max_segments // 2) < (segments_B // 2)[:, None]
        malformed = ((segments_B > config.max_segments) | (segments_B % 2 == 1)).any()

        # The losses.
        per_token_BS = log_probs_BS / jnp.maximum(tokens_BS, 1.0)
        policy_BS = log_probs_BS
        if config.length_normalised:
            policy_BS, reference_BS = per_token_BS, reference_BS / jnp.maximum(tokens_BS, 1.0)
        (chosen, rejected), (reference_chosen, reference_rejected) = map(_pairs, (policy_BS, reference_BS))
        losses_BP = dpo_loss(
            chosen, rejected, reference_chosen, reference_rejected, beta, config.loss, config.label_smoothing
        )
        nll_BP = -_pairs(per_token_BS)[0]
        if config.nll_weight:
            losses_BP += config.nll_weight * nll_BP

        def total(x_BP: jax.Array) -> jax.Array:
            return jnp.where(exists_BP, x_BP, 0.0).sum()

        loss = jnp.where(malformed, jnp.nan, total(losses_BP))

        # The metrics.
        reward_chosen, reward_rejected = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
        metrics = {
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).astype(jnp.float32),
            "rewards/margins": reward_chosen - reward_rejected,
            "logps/chosen": _pairs(log_probs_BS)[0],
            "logps/rejected": _pairs(log_probs_BS)[1],
            "nll_loss": nll_BP,
        }
        totals = {name: jax.lax.stop_gradient(total(metrics[name])) for name in self._metric_names}
        added = self.regulariser(routing, context, context.so_far[1] if context else None)
        pairs = exists_BP.sum(dtype=jnp.float32)
        return Sums(loss, pairs, jax.lax.stop_gradient(loss), added), (totals, routing)

    def zero_statistics(self) -> Statistics:
        """Statistics of no pair."""
        return {name: jnp.zeros((), jnp.float32) for name in self._metric_names}, self.zero_routing()

    def metrics(self, statistics: Statistics, denominator: jax.Array) -> Metrics:
        """Means over the pairs of the global batch, by TRL's names; with experts, `train.moe.routing_metrics` too.

        Rewards are beta times the log-ratio of policy to reference that the loss uses, `rewards/accuracies` is the
        fraction of pairs whose chosen reward is the larger, and `logps` are sums over answers. `nll_loss` is there if
        it is part of the loss.
        """
        totals, routing = statistics
        means = {name: value / denominator for name, value in totals.items()}
        return means if routing is None else {**means, **routing_metrics(self.model, routing)}

    def for_evaluation(self) -> "Dpo":
        """Dropless."""
        return Dpo(self.model, dataclasses.replace(self.config, moe=self.moe.dropless()))

    def explain(self, numbers: Mapping[str, float]) -> str:
        """Names the router that gave logits that are not finite, or else what makes the loss NaN."""
        found = super().explain(numbers)
        if found or not math.isnan(numbers.get("loss", 0.0)):
            return found
        return (
            f"The loss of DPO is NaN also where a row has more than max_segments ({self.config.max_segments}) segments "
            "or an odd number of them; check_pairs finds such rows."
        )

    @property
    def _metric_names(self) -> tuple[str, ...]:
        return _METRICS if self.config.nll_weight else _METRICS[:-1]


def answer_log_probs(
    config: DpoConfig, model: BoundModel, batch: Batch, hidden_BTD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the answers of packed rows.

    Args:
      config: `max_segments` and `loss_chunk` of it.
      model: that gave the hidden states.
      batch: the rows, whose `loss_weights` are not 0 on answers.
      hidden_BTD: from `BoundModel.hidden`.

    Returns:
      Float32 [B, max_segments]: of each segment the summed log-probability of its trained tokens, and their number.
    """
    targets_BT, weights_BT = next_token_targets(batch)
    log_probs_BT = chunked_log_probs(
        model.module, hidden_BTD, model.in_model_order(targets_BT), model.in_model_order(weights_BT), config.loss_chunk
    )
    ids_BT = model.in_model_order(batch.segment_ids)
    log_probs_BS = segment_sums(log_probs_BT, ids_BT, config.max_segments, model.module.sharding)
    return log_probs_BS, _sums_by_segment(config, model, batch, (weights_BT != 0).astype(jnp.float32))


def _sums_by_segment(config: DpoConfig, model: BoundModel, batch: Batch, x_BT: jax.Array) -> jax.Array:
    """`segment_sums` of an array in the order of the rows."""
    x_BT, ids_BT = model.in_model_order(x_BT), model.in_model_order(batch.segment_ids)
    return segment_sums(x_BT, ids_BT, config.max_segments, model.module.sharding)


def _pairs(x_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is of chosen and of rejected answers, each [B, pairs], from what is of segments."""
    x_BP2 = x_BS.reshape(x_BS.shape[0], -1, 2)
    return x_BP2[:, :, 0], x_BP2[:, :, 1]


def make_reference_pass(objective: Dpo, config: StepConfig, mesh: Mesh) -> Callable[[Params, PairBatch], PairBatch]:
    """Jits the pass of the reference model: a batch with `reference_BT` filled in.

    It runs the model as the training step does. So DPO begins at ln 2 up to rounding where weights are the reference.

    Args:
      objective: of the training; its model may be another one for the reference.
      config: of the step; `accumulation` has no effect.
      mesh: from `make_mesh`.

    Returns:
      A function of the reference's parameters and a batch on the mesh; its own `reference_BT` is ignored.

    Raises:
      InputError: a dimension of the model that the mesh does not divide.
    """

    def reference_pass(model: BoundModel, batch: PairBatch) -> PairBatch:
        rows = batch.batch
        hidden_BTD, _ = model.hidden(rows)
        log_probs_BS, _ = answer_log_probs(objective.config, model, rows, hidden_BTD)
        # Each sum goes to the last token of its segment.
        ids_BT = rows.segment_ids
        last_BT = ids_BT != jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1)))
        here_BTS = (ids_BT[:, :, None] == jnp.arange(1, objective.config.max_segments + 1)) & last_BT[:, :, None]
        reference_BT = jnp.where(here_BTS, log_probs_BS[:, None, :], 0.0).sum(2)
        return dataclasses.replace(batch, reference_BT=reference_BT)

    return make_forward(objective, reference_pass, config, mesh)


def check_pairs(batch: PairBatch, max_segments: int) -> None:
    """Checks on the host that rows are made of pairs.

    Args:
      batch: of NumPy arrays.
      max_segments: of `DpoConfig`.

    Raises:
      InputError: a row with an odd number of segments, or more than `max_segments`, or a segment without trained token.
    """
    ids, weights = np.asarray(batch.batch.segment_ids), np.asarray(batch.batch.loss_weights)
    first = np.diff(ids, axis=1, prepend=0) != 0
    for row, (ids_T, trained_T) in enumerate(zip(ids, (weights != 0) & ~first, strict=True)):
        count = int(ids_T.max(initial=0))
        if count % 2:
            raise InputError(f"Row {row} has {count} segments; expected two for each pair, chosen and rejected.")
        if count > max_segments:
            raise InputError(
                f"Row {row} has {count} segments; max_segments is {max_segments}. Raise it, or pack fewer."
            )
        empty = set(range(1, count + 1)) - set(ids_T[trained_T].tolist())
        if empty:
            raise InputError(
                f"Segment {min(empty)} of row {row} has no trained token; expected loss weights on each answer."
            )
