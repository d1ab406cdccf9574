"""What a training step minimises: the interface between an objective and the step, which serves any objective.

An objective says what a batch costs. `train.step` owns everything else: gradient accumulation, global denominators, the
guard against bad gradients and the optimiser. A new objective is a frozen dataclass that derives from `Objective`;
step, loop and launcher need no change. Run it with `train.launch`; `qwen-jax train pretrain` runs only `NextToken`.
`train.pretrain` is the example to read.

A batch is any registered dataclass whose leaves are all [batch, length] arrays: `train.data.batch.Batch`, or one that
holds a `Batch` and further arrays, such as advantages or the log-probabilities of a frozen reference model, which the
`Data` of `train.loop` may compute. The same code then splits and shards all of them.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from qwen_jax.attention.sequence import zigzag_shard, zigzag_unshard
from qwen_jax.config import ModelConfig
from qwen_jax.kernels import packed_mask
from qwen_jax.model import Qwen2
from qwen_jax.moe.router import RouterStats
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.remat import Remat
from train.data.batch import Batch

Metrics = dict[str, jax.Array]

B = TypeVar("B")
"""A batch."""
S = TypeVar("S")
"""Statistics: a tree of float32 arrays that are added up over micro-batches, or `Maximum` to keep the largest."""
C = TypeVar("C")
"""What an objective computes of a whole batch before the first of its micro-batches."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Numerators and denominator of a mean loss. Add them up over the parts of a batch, then divide once.

    Attributes:
      loss: float32 scalar, what is minimised: the weighted sum of the losses.
      weight: float32 scalar, the sum of the weights: this part's share of `Objective.denominator`.
      reported: float32 scalar, what the log shows as the loss: `loss` without terms such as the z-loss. It carries no
        gradient.
      regulariser: float32 scalar that is added to the mean loss, not to the sum: the objective has normalised it over
        the whole batch already. None for none.
    """

    loss: jax.Array
    weight: jax.Array
    reported: jax.Array
    regulariser: jax.Array | None = None

    def mean_loss(self) -> float:
        """The loss of an evaluation, on the host."""
        return float(self.loss) / max(float(self.weight), 1e-8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchContext(Generic[S, C]):
    """What a micro-batch knows of the batch that it is a part of.

    Attributes:
      prepared: what `Objective.prepare` returned.
      so_far: statistics of the micro-batches before this one, added up.
    """

    prepared: C
    so_far: S


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """The model with the current weights, run as the training step runs it.

    Attributes:
      module: the bound `Qwen2`, for its output head; `hidden` runs it.
      remat: what the backward pass recomputes.
    """

    module: Qwen2
    remat: Remat

    def hidden(self, batch: Batch, count_routing: bool = False) -> tuple[jax.Array, RouterStats | None]:
        """Final hidden states of packed rows.

        Args:
          batch: packed rows [B, T], on the mesh.
          count_routing: also sum up what the routers of an MoE model did; padding is left out.

        Returns:
          Normalised hidden states [B, T, D], whose tokens have the order of `in_model_order`, and the routing, summed
          over the batch, with a leading axis of sparse layers; None if it is not counted.
        """
        # Masks and segments are computed while rows are whole.
        valid = batch.segment_ids > 0 if count_routing else None
        arrays = batch.tokens, batch.positions, packed_mask(batch.segment_ids), valid
        tokens, positions, mask, valid = jax.tree.map(self.in_model_order, arrays)
        output = self.module(tokens, positions, mask, remat=self.remat, valid_BT=valid)
        return output.hidden, output.routing

    def in_model_order(self, x_BT: jax.Array) -> jax.Array:
        """Puts one number a token, such as a target or a weight, where the token's hidden state is.

        On a mesh with a context axis, a row is split over devices in an order of its own.

        Args:
          x_BT: in the order of the rows.
        """
        return zigzag_shard(x_BT, self.module.sharding)

    def in_row_order(self, x_BT: jax.Array) -> jax.Array:
        """The inverse of `in_model_order`.

        Args:
          x_BT: one number a token, where the token's hidden state is.
        """
        return zigzag_unshard(x_BT, self.module.sharding)


class Objective(abc.ABC, Generic[B, S, C]):
    """What a batch costs. Derive a frozen dataclass from it: jitted steps are cached by its value.

    `denominator` and `sums` must be given; all else has a default that suits an objective without statistics.

    Attributes:
      model: the architecture.
    """

    model: ModelConfig

    @abc.abstractmethod
    def denominator(self, batch: B) -> jax.Array:
        """What the summed loss of a whole global batch is divided by, such as the number of its targets.

        Args:
          batch: the whole global batch.

        Returns:
          Float32 scalar without gradient. Where it is 0, the loss is 0.
        """

    @abc.abstractmethod
    def sums(self, model: BoundModel, batch: B, context: BatchContext[S, C] | None) -> tuple[Sums, S]:
        """The summed loss of a micro-batch, and statistics of it.

        Args:
          model: with the current weights.
          batch: the micro-batch.
          context: what is known of the whole batch; None in an evaluation.

        Returns:
          Sums, of which `loss` and `regulariser` are differentiated; and statistics, in the tree of `zero_statistics`.
        """

    def prepare(self, model: BoundModel, batch: B, micro_batches: B | None) -> C:
        """A pass over a whole batch before its micro-batches are differentiated.

        Args:
          model: with the current weights.
          batch: the whole global batch.
          micro_batches: the same, each array [micro-batches, rows, length]; None if the batch is not split.

        Returns:
          Anything that `sums` needs: it gets it as `context.prepared`. By default None.
        """
        return None  # type: ignore[return-value]

    def zero_statistics(self) -> S:
        """Zeros in the tree of the statistics that `sums` returns; by default the empty dict."""
        return {}  # type: ignore[return-value]

    def metrics(self, statistics: S, denominator: jax.Array) -> Metrics:
        """Numbers of a step for the log, besides those that each step has (`train.step.train_step`).

        Args:
          statistics: of the whole batch.
          denominator: of the whole batch, at least 1e-8.

        Returns:
          By default, where the statistics are a dict: each divided by the denominator. A scalar goes to the log, any
          other array to `Monitor.arrays`.
        """
        assert isinstance(statistics, dict)
        return {name: value / denominator for name, value in statistics.items()}

    def for_evaluation(self) -> "Objective[B, S, C]":
        """The objective whose loss is reported on held-out data: without terms that only help training."""
        return self

    def options(self, options: Options) -> Options:
        """How the model is run; by default as the step's configuration says.

        Args:
          options: made of `StepConfig`.
        """
        return options

    def compiler_options(self, sharding: Sharding, platform: str) -> dict[str, bool]:
        """Options of XLA that the compiled step gets.

        Args:
          sharding: of the mesh.
          platform: of its devices, such as "tpu".
        """
        return {}

    def explain(self, numbers: Mapping[str, float]) -> str:
        """A sentence on what went wrong in a step that was skipped, if its numbers tell.

        Args:
          numbers: the step's metrics.

        Returns:
          Such a sentence, or "".
        """
        return ""


def mean(sums: Sums, denominator: jax.Array) -> Sums:
    """A part's share of the mean loss of its batch: its sums over the batch's denominator, and its regulariser.

    Args:
      sums: of the part.
      denominator: of the whole batch.
    """
    loss, weight, reported = (x / denominator for x in (sums.loss, sums.weight, sums.reported))
    return Sums(loss if sums.regulariser is None else loss + sums.regulariser, weight, reported)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Maximum:
    """A number among statistics of which the parts of a batch keep the largest; that of no part is -inf.

    Attributes:
      value: float32.
    """

    value: jax.Array


def join_statistics(*parts: S) -> S:
    """Statistics of a whole from those of its parts: sums, and the largest of each `Maximum`.

    Args:
      *parts: at least one, in JAX or NumPy.
    """

    def join(a: Any, b: Any) -> Any:
        return Maximum(jnp.maximum(a.value, b.value)) if isinstance(a, Maximum) else a + b

    def join_two(a: S, b: S) -> S:
        joined: S = jax.tree.map(join, a, b, is_leaf=lambda x: isinstance(x, Maximum))
        return joined

    return functools.reduce(join_two, parts)


def zero_sums() -> Sums:
    """Sums of nothing."""
    zero = jnp.zeros((), jnp.float32)
    return Sums(zero, zero, zero)
