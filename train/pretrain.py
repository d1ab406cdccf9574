"""Next-token pre-training on packed rows: the loss, the step, the evaluation."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import DTYPES, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels import packed_mask
from qwen_jax.model import Options, Params, Qwen2, Remat, bind, init_params
from qwen_jax.sharding import Sharding
from train.data.batch import Batch
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Batch], "Sums"]


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """What is trained, and how.

    Attributes:
      model: the architecture.
      optimizer: AdamW and its schedule.
      dtype: compute dtype. Weights, moments, softmax, norms and losses are float32 whatever it is.
      remat: what the backward pass recomputes; see `Qwen2.__call__`.
      loss_chunk: positions of each row whose logits exist at one time.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    dtype: str = "bfloat16"
    remat: Remat = "none"
    loss_chunk: int = 512

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.loss_chunk < 1:
            raise InputError(f"loss_chunk must be at least 1, got {self.loss_chunk}.")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("loss", "weight"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Sums:
    """Numerator and denominator of a mean loss. Add them over parts of a batch, then divide once.

    Attributes:
      loss: float32 scalar, sum of weight x cross-entropy in nats.
      weight: float32 scalar, sum of weights.
    """

    loss: jax.Array
    weight: jax.Array


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each position predicts: the next token of the same document, with that token's weight.

    Args:
      batch: packed rows [B, T].

    Returns:
      Target ids int32 [B, T], and weights float32 [B, T] that are 0 on padding and at the end of a segment.
    """

    def following(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))

    same = (following(batch.segment_ids) == batch.segment_ids) & (batch.segment_ids > 0)
    return following(batch.tokens), jnp.where(same, following(batch.loss_weights), 0.0)


def chunked_cross_entropy(
    model: Qwen2, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk: int
) -> Sums:
    """Weighted cross-entropy whose logits are made, and made again for the gradient, a chunk of positions at a time.

    Args:
      model: for its output head.
      hidden_BTD: normalised hidden states.
      targets_BT: int32 ids.
      weights_BT: float32.
      chunk: positions of each row in one chunk.
    """
    T, spec = hidden_BTD.shape[1], model.sharding
    n = -(-T // chunk)
    c = -(-T // n)

    def chunks(x: jax.Array) -> jax.Array:
        # Chunk j is positions j, n + j, 2n + j, ...: each shard of the context axis has its part of every chunk.
        x = jnp.pad(x, ((0, 0), (0, n * c - T), *((0, 0),) * (x.ndim - 2)))
        rest = (None,) * (x.ndim - 2)
        x = x.reshape(x.shape[0], c, n, *x.shape[2:], out_sharding=P(*spec.tokens, None, *rest))
        return jnp.moveaxis(x, 2, 0)

    def body(sums: Sums, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, None]:
        hidden_BcD, targets_Bc, weights_Bc = inputs
        logits_BcV = model.logits(hidden_BcD)
        # A sum over a one-hot, not a look-up: it needs no gather where the vocabulary is split over devices.
        is_target = jnp.arange(logits_BcV.shape[-1]) == targets_Bc[..., None]
        picked_Bc = jnp.where(is_target, logits_BcV, 0.0).sum(axis=-1)
        losses_Bc = jax.nn.logsumexp(logits_BcV, axis=-1) - picked_Bc
        return Sums(sums.loss + (losses_Bc * weights_Bc).sum(), sums.weight + weights_Bc.sum()), None

    zero = Sums(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    inputs = (chunks(hidden_BTD), chunks(targets_BT), chunks(weights_BT))
    with jax.named_scope("cross_entropy"):
        sums, _ = jax.lax.scan(jax.checkpoint(body), zero, inputs)
    return sums


def loss_sums(config: PretrainConfig, sharding: Sharding, params: Params, batch: Batch) -> Sums:
    """Summed next-token loss of a batch, and the sum of its weights.

    Args:
      config: model, compute dtype, remat and chunk.
      sharding: of the current mesh.
      params: of `init_params`.
      batch: packed rows on the mesh.
    """
    model = bind(config.model, params, sharding, Options(dtype=config.dtype))
    hidden_BTD, _ = model(batch.tokens, batch.positions, packed_mask(batch.segment_ids), remat=config.remat)
    return chunked_cross_entropy(model, hidden_BTD, *next_token_targets(batch), config.loss_chunk)


def init_state(config: PretrainConfig, seed: int, mesh: Mesh) -> TrainState:
    """Fresh weights and zero moments, born on their shards.

    Args:
      config: of the run.
      seed: of the weights.
      mesh: the current mesh, from `make_mesh`.
    """
    params = init_params(config.model, jax.random.key(seed), mesh)
    optimizer = make_optimizer(config.optimizer)
    return TrainState(
        jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P())), params, jax.jit(optimizer.init)(params)
    )


def train_step(
    config: PretrainConfig, sharding: Sharding, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One optimiser step. Pure.

    Args:
      config: of the run.
      sharding: of the current mesh.
      state: before the step.
      batch: the whole global batch.

    Returns:
      The state after the step, and float32 scalars: `loss` (nats per unit of weight, before the step), `grad_norm`
      (before clipping), `learning_rate`, `weight` (the sum of loss weights).
    """

    def mean_loss(params: Params) -> tuple[jax.Array, Sums]:
        sums = loss_sums(config, sharding, params, batch)
        # A batch without any target has loss 0, not NaN.
        return sums.loss / jnp.maximum(sums.weight, 1e-8), sums

    (loss, sums), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    with jax.named_scope("optimizer"):
        updates, opt_state = make_optimizer(config.optimizer).update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(gradients),
        "learning_rate": jnp.asarray(make_schedule(config.optimizer)(state.step), jnp.float32),
        "weight": sums.weight,
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def make_train_step(config: PretrainConfig, mesh: Mesh) -> TrainStep:
    """`train_step`, compiled at its first call; the state given to it is donated and must not be used again.

    Raises:
      InputError: a dimension of the model that the mesh does not divide.
    """
    sharding = Sharding.for_model(config.model, mesh)
    return jax.jit(functools.partial(train_step, config, sharding), donate_argnums=0)


def make_eval_step(config: PretrainConfig, mesh: Mesh) -> EvalStep:
    """`loss_sums`, compiled at its first call."""
    return jax.jit(functools.partial(loss_sums, config, Sharding.for_model(config.model, mesh)))
