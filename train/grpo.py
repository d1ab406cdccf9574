"""GRPO on packed rollouts: the objective, and the pass that computes log-probabilities under given weights.

One objective serves GRPO, Dr. GRPO, DAPO and GSPO; `train.policy.GrpoConfig` tells which. All denominators are those of
the global batch. Log-probabilities of the sampler come with the batch, and so do those under other weights, which
`make_log_prob_pass` computes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.moe.router import RouterStats
from train.data.batch import Batch
from train.data.rollouts import RolloutBatch
from train.losses import (
    at_segments,
    chunked_log_probs,
    chunked_log_probs_and_entropy,
    following,
    next_token_targets,
    segment_sums,
)
from train.moe import MoETraining, RoutedObjective, WholeBatch, routing_metrics
from train.objective import BatchContext, BoundModel, Maximum, Metrics, Sums
from train.policy import KL, Clipped, GrpoConfig, clipped_policy_loss, kl_estimates, kl_loss
from train.step import StepConfig, make_forward, split_rows
from train.token_loss import chunked_token_loss

_TOKEN_MEANS = "entropy", "ratio/mean", "clip/low", "clip/high", "clip/dual", "sampler_gap/mean"
_KL_MEANS = "kl/k1", "kl/k3"
_IMPORTANCE_MEANS = "importance/mean", "importance/capped"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrpoStats:
    """Statistics of rollouts, over the tokens that are trained.

    Attributes:
      tokens: their number.
      sequences: number of sequences.
      masked: sequences that `importance_mask` masks.
      signed_gap: summed log-probability of the trainer less that of the sampler.
      gaps: of each rollout of the step, the summed absolute difference of the log-probabilities of sampler and trainer;
        [`Grpo.rollouts`].
      sums: over tokens, by the names of the metrics.
      largest: over tokens, by the names of the metrics; of "ratio/min" the negative.
      routing: of an MoE model in training; otherwise None.
    """

    tokens: jax.Array
    sequences: jax.Array
    masked: jax.Array
    signed_gap: jax.Array
    gaps: jax.Array
    sums: dict[str, jax.Array]
    largest: dict[str, Maximum]
    routing: RouterStats | None


class _Parts(NamedTuple):
    """What a loss is made of, without gradient, in its shape; `log_ratio` is that of what is clipped."""

    log_ratio: jax.Array
    clipped: Clipped
    kl: KL | None
    log_weight: jax.Array
    weight: jax.Array


def _losses(config: GrpoConfig, log_probs: jax.Array, given: Mapping[str, jax.Array]) -> tuple[jax.Array, _Parts]:
    """The weighted loss of each token, as `train.policy.GrpoConfig` defines it.

    Args:
      config: settings.
      log_probs: of the policy.
      given: further numbers, in the same shape: "weights" of aggregation, "advantages", log-probabilities of the
        "sampler", of the "old" policy unless it is the current one, and of the "reference" if the KL term has a weight;
        and those of sequences, if they are needed: "sequence_ratio", the log of the mean ratio, and "kept", 1 or 0.
    """
    stop = jax.lax.stop_gradient
    old = given.get("old", stop(log_probs))
    token_ratio = log_probs - old
    log_ratio = token_ratio
    if config.ratio == "sequence":
        # The gradient of a sequence's ratio is spread over its tokens (GSPO-token, Zheng et al. 2025).
        log_ratio = given["sequence_ratio"] + token_ratio - stop(token_ratio)
    losses, clipped = clipped_policy_loss(
        log_ratio, given["advantages"], config.clip_low, config.clip_high, config.dual_clip
    )

    kl = None
    if config.needs_reference:
        kl = kl_estimates(log_probs, given["reference"])
        losses += config.kl_weight * kl_loss(kl, token_ratio, config.kl)

    # Rollouts that older weights sampled.
    log_weight = stop(old) - given["sampler"]
    weight = jnp.ones_like(log_weight)
    if config.importance_cap is not None:
        weight = jnp.exp(jnp.minimum(log_weight, math.log(config.importance_cap)))
        losses *= weight
    if config.importance_mask is not None:
        losses = jnp.where(given["kept"] > 0, losses, 0.0)
    parts: _Parts = jax.tree.map(stop, _Parts(log_ratio, clipped, kl, log_weight, weight))
    return losses * given["weights"], parts


@dataclasses.dataclass(frozen=True)
class Grpo(RoutedObjective[RolloutBatch, GrpoStats]):
    """The loss of `train.policy.GrpoConfig` on packed rollouts; with experts, their balance and router z-loss too.

    Attributes:
      model: the architecture.
      config: settings.
      rollouts: of a step, whose `rollout_gaps` are among the metrics; 0 leaves them out.
    """

    model: ModelConfig
    config: GrpoConfig = GrpoConfig()
    rollouts: int = 0

    @property
    def moe(self) -> MoETraining:
        """How experts are trained."""
        return self.config.moe

    def rows(self, batch: RolloutBatch) -> Batch:
        """The packed rows."""
        return batch.batch

    def denominator(self, batch: RolloutBatch) -> jax.Array:
        """The number of trained tokens, or of sequences, or that times `GrpoConfig.constant`, as the aggregation is."""
        if self.config.aggregation == "token-mean":
            return (batch.batch.loss_weights != 0).sum(dtype=jnp.float32)
        sequences = batch.ends_BT.sum()
        return sequences if self.config.constant is None else sequences * self.config.constant

    def sums(
        self, model: BoundModel, batch: RolloutBatch, context: BatchContext[GrpoStats, WholeBatch | None] | None
    ) -> tuple[Sums, GrpoStats]:
        """Summed loss of the trained tokens, and their statistics.

        The loss is NaN, and the step skipped, if a row has more than `max_segments` sequences and the settings need to
        tell them apart.
        """
        config, rows, stop = self.config, batch.batch, jax.lax.stop_gradient

        # What belongs to a target goes to the token that predicts it.
        targets_BT, weights_BT = map(model.in_model_order, next_token_targets(rows))
        trained_BT = weights_BT != 0

        def of_targets(x_BT: jax.Array) -> jax.Array:
            return model.in_model_order(following(x_BT))

        given = {"weights": weights_BT}
        given |= {"advantages": of_targets(batch.advantages_BT), "sampler": of_targets(batch.sampler_BT)}
        if config.old != "current":
            given["old"] = given["sampler"] if config.old == "sampler" else of_targets(batch.old_BT)
        if config.needs_reference:
            given["reference"] = of_targets(batch.reference_BT)
        given = {name: jnp.where(trained_BT, x_BT, 0.0) for name, x_BT in given.items()}

        # The loss. Where it takes a token alone, its gradient needs the logits only once.
        hidden_BTD, routing = self.hidden(model, batch, context)
        arguments = model.module, hidden_BTD, targets_BT, weights_BT
        if not config.by_sequence:
            loss, log_probs_BT, entropy_BT = chunked_token_loss(
                *arguments, lambda x, given: _losses(config, x, given)[0], given, config.loss_chunk, config.temperature
            )
            _, parts = _losses(config, log_probs_BT, given)
        else:
            log_probs_BT, entropy_BT = chunked_log_probs_and_entropy(*arguments, config.loss_chunk, config.temperature)
            segments_BT, sharding = of_targets(rows.segment_ids), model.module.sharding

            def over_sequence(x_BT: jax.Array) -> jax.Array:
                """The sum over a sequence at each of its tokens, without gradient."""
                sums_BS = segment_sums(stop(x_BT), segments_BT, config.max_segments, sharding)
                return at_segments(sums_BS, segments_BT, sharding)

            old_BT = given.get("old", log_probs_BT)
            if config.ratio == "sequence":
                tokens_BT = jnp.maximum(over_sequence(trained_BT.astype(jnp.float32)), 1.0)
                given["sequence_ratio"] = over_sequence(log_probs_BT - old_BT) / tokens_BT
            if config.importance_mask is not None:
                product_BT = over_sequence(old_BT - given["sampler"])
                given["kept"] = (product_BT <= math.log(config.importance_mask)).astype(jnp.float32)
            losses_BT, parts = _losses(config, log_probs_BT, given)
            # Sequences that cannot be told apart.
            malformed = (rows.segment_ids > config.max_segments).any()
            loss = jnp.where(malformed, jnp.nan, losses_BT.sum())

        # The statistics.
        trainer_BT = given["old"] if config.old == "trainer" else log_probs_BT
        gap_BT = trainer_BT - given["sampler"]
        ratio_BT = jnp.exp(parts.log_ratio)
        summed = {"entropy": entropy_BT, "ratio/mean": ratio_BT, "sampler_gap/mean": jnp.abs(gap_BT)}
        summed |= {f"clip/{side}": x_BT for side, x_BT in parts.clipped._asdict().items()}
        if parts.kl is not None:
            summed |= {"kl/k1": parts.kl.k1, "kl/k3": parts.kl.k3}
        if config.importance_cap is not None:
            summed["importance/mean"] = parts.weight
            summed["importance/capped"] = parts.log_weight > math.log(config.importance_cap)
        largest = {"ratio/min": -ratio_BT, "ratio/max": ratio_BT, "sampler_gap/max": jnp.abs(gap_BT)}
        ends_BT = of_targets(batch.ends_BT)
        statistics = GrpoStats(
            tokens=trained_BT.sum(dtype=jnp.float32),
            sequences=ends_BT.sum(),
            masked=(ends_BT * (1 - given["kept"])).sum() if "kept" in given else jnp.zeros((), jnp.float32),
            signed_gap=gap_BT.sum(),
            gaps=self._by_rollout(model, jnp.where(trained_BT, jnp.abs(gap_BT), 0.0), batch),
            sums={name: jnp.where(trained_BT, x_BT, 0.0).sum() for name, x_BT in summed.items()},
            largest={name: Maximum(jnp.where(trained_BT, x_BT, -jnp.inf).max()) for name, x_BT in largest.items()},
            routing=routing,
        )
        added = self.regulariser(routing, context, context.so_far.routing if context else None)
        return Sums(loss, self.denominator(batch), stop(loss), added), statistics

    def zero_statistics(self) -> GrpoStats:
        """Statistics of no token."""
        zero, lowest = jnp.zeros((), jnp.float32), Maximum(jnp.array(-jnp.inf, jnp.float32))
        names = "ratio/min", "ratio/max", "sampler_gap/max"
        sums = dict.fromkeys(self._means, zero)
        gaps = jnp.zeros(self.rollouts, jnp.float32)
        return GrpoStats(zero, zero, zero, zero, gaps, sums, dict.fromkeys(names, lowest), self.zero_routing())

    def metrics(self, statistics: GrpoStats, denominator: jax.Array) -> Metrics:
        """Means over the trained tokens of the global batch, and largest and smallest numbers.

        `entropy` of the policy, in nats, at the sampling temperature; `kl/k1` and `kl/k3` from the reference, if there
        is one; `ratio/mean`, `ratio/min` and `ratio/max` of what is clipped; fractions of tokens whose gradient is
        clipped, `clip/low`, `clip/high` and `clip/dual`; `sampler_gap/mean` and `sampler_gap/max`, the absolute
        difference of log-probabilities of sampler and trainer, and `sampler_gap/perplexity_ratio`, of the trainer's
        perplexity to the sampler's; with importance weights, their mean `importance/mean`, the fraction of tokens
        at the cap `importance/capped`, and the fraction of sequences that are masked `importance/masked`;
        `trained_tokens` and `trained_sequences`; `rollout_gaps`, see `GrpoStats.gaps`; with experts,
        `train.moe.routing_metrics`.
        """
        tokens = jnp.maximum(statistics.tokens, 1.0)
        found = {name: value / tokens for name, value in statistics.sums.items()}
        for name, largest in statistics.largest.items():
            found[name] = jnp.where(statistics.tokens > 0, largest.value, 0.0)
        found["ratio/min"] = -found["ratio/min"]
        found["sampler_gap/perplexity_ratio"] = jnp.exp(-statistics.signed_gap / tokens)
        if self.config.importance_mask is not None:
            found["importance/masked"] = statistics.masked / jnp.maximum(statistics.sequences, 1.0)
        found |= {"trained_tokens": statistics.tokens, "trained_sequences": statistics.sequences}
        if self.rollouts:
            found["rollout_gaps"] = statistics.gaps
        return found if statistics.routing is None else found | routing_metrics(self.model, statistics.routing)

    def for_evaluation(self) -> "Grpo":
        """Dropless."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, moe=self.moe.dropless()))

    def explain(self, numbers: Mapping[str, float]) -> str:
        """Names the router that gave logits that are not finite, or else what makes the loss NaN."""
        found = super().explain(numbers)
        if found or math.isfinite(numbers.get("loss", 0.0)):
            return found
        largest = numbers.get("sampler_gap/max", 0.0)
        return (
            f"The log-probabilities of sampler and trainer differ by up to {largest:.3g}. The loss of GRPO is NaN also "
            f"where a row has more than max_segments ({self.config.max_segments}) sequences."
        )

    def _by_rollout(self, model: BoundModel, x_BT: jax.Array, batch: RolloutBatch) -> jax.Array:
        """Sums of numbers of targets, in the order of the model, over each rollout of the step: [rollouts]."""
        if not self.rollouts:
            return jnp.zeros(0, jnp.float32)
        sharding, rows = model.module.sharding, model.module.sharding.tokens[0]
        segments_BT, places_BT = (
            model.in_model_order(following(x)) for x in (batch.batch.segment_ids, batch.places_BT)
        )
        sums_BS, places_BS = (
            segment_sums(x, segments_BT, self.config.max_segments, sharding) for x in (x_BT, places_BT)
        )

        @jax.shard_map(in_specs=(P(rows, None), P(rows, None)), out_specs=P())
        def scattered(sums_BS: jax.Array, places_BS: jax.Array) -> jax.Array:
            # Place 0 is no rollout.
            found = jnp.zeros(1 + self.rollouts, jnp.float32).at[places_BS.astype(jnp.int32)].add(sums_BS)[1:]
            return jax.lax.psum(found, rows)

        found: jax.Array = scattered(sums_BS, places_BS)
        return found

    @property
    def _means(self) -> tuple[str, ...]:
        """Names of the sums over tokens."""
        kl = _KL_MEANS if self.config.needs_reference else ()
        return *_TOKEN_MEANS, *kl, *(_IMPORTANCE_MEANS if self.config.importance_cap is not None else ())


def make_log_prob_pass(objective: Grpo, config: StepConfig, mesh: Mesh) -> Callable[..., jax.Array]:
    """Jits a pass over rollouts: log-probabilities of the trained tokens under given weights.

    It runs the model as the training step does, in the same micro-batches.

    Args:
      objective: of the training; its model may be another one for the reference.
      config: of the step; without `lora` for a reference without adapters.
      mesh: from `make_mesh`.

    Returns:
      A function of parameters, a batch on the mesh, and frozen parameters or None, as for `train.step.eval_step`. It
      returns float32 [batch, length], sharded over rows: each log-probability is at its token, as in
      `RolloutBatch.old_BT` and `RolloutBatch.reference_BT`, at the sampling temperature; 0 on tokens that are not
      trained.

    Raises:
      InputError: a dimension of the model that the mesh does not divide.
    """
    settings, n = objective.config, config.accumulation

    def of_rows(model: BoundModel, rows: Batch) -> jax.Array:
        hidden_BTD, _ = model.hidden(rows)
        targets_BT, weights_BT = map(model.in_model_order, next_token_targets(rows))
        found_BT = chunked_log_probs(
            model.module, hidden_BTD, targets_BT, weights_BT, settings.loss_chunk, settings.temperature
        )
        return jnp.pad(model.in_row_order(found_BT)[:, :-1], ((0, 0), (1, 0)))

    def log_prob_pass(model: BoundModel, batch: RolloutBatch) -> jax.Array:
        rows, sharding = batch.batch, model.module.sharding
        if n == 1:
            return of_rows(model, rows)
        found_nBT = jax.lax.map(functools.partial(of_rows, model), split_rows(rows, n, sharding))
        return jnp.moveaxis(found_nBT, 0, 1).reshape(rows.shape, out_sharding=P(sharding.rows[0], None))

    return make_forward(objective, log_prob_pass, config, mesh)
