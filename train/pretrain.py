"""Next-token pre-training on packed rows: the loss, the step, the evaluation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.attention.sequence import spread
from qwen_jax.config import DTYPES, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels import COVERAGE, Implementation, packed_mask
from qwen_jax.moe.router import RouterStats
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, abstract_params, bind, init_params, param_specs
from qwen_jax.remat import Remat
from qwen_jax.stack import restack, unstack
from train.data.batch import Batch
from train.losses import Sums, chunked_cross_entropy, next_token_targets
from train.moe import MoETraining, auxiliary, routing_metrics
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.state import Guard, TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Batch], Sums]

# A norm is judged by the running mean of about this many steps before it, and not before there are as many.
_GUARD_STEPS = 50


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """What is trained, and how.

    Attributes:
      model: the architecture.
      optimizer: AdamW and its schedule.
      dtype: compute dtype. Weights, moments, softmax, norms and losses are float32 whatever it is.
      remat: what the backward pass recomputes; see `Qwen2.__call__`.
      accumulation: parts that a batch is worked off in, one after the other; the loss does not depend on it.
      loss_chunk: tokens of one device whose logits exist at one time.
      z_loss: coefficient; see `chunked_cross_entropy`.
      spike_factor: a step whose gradient norm is more than this many times the running mean is skipped; 0 skips none
        but those whose loss or gradient is not finite.
      scan_layers: the layers are one loop; otherwise they follow one another: faster on a GPU, longer to compile.
      attention: which kernel; see `kernels.attention`.
      ring: on a context axis, keys and values go round the devices instead of being gathered; see
        `qwen_jax.attention.sequence`.
      moe: for a model with experts.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    dtype: str = "bfloat16"
    remat: Remat = "none"
    accumulation: int = 1
    loss_chunk: int = 2048
    z_loss: float = 0.0
    spike_factor: float = 0.0
    scan_layers: bool = True
    attention: Implementation = "auto"
    ring: bool = False
    moe: MoETraining = MoETraining()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        for name in ("loss_chunk", "accumulation"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        mergeable = ("auto", *(name for name, of in COVERAGE.items() if of.log_sum_exp))
        if self.ring and self.attention not in mergeable:
            raise InputError(
                f"ring puts parts of the keys together by their log-sum-exps, which attention={self.attention!r} does "
                f"not give. Use attention={' or '.join(map(repr, mergeable))}, or ring=False."
            )
        if self.z_loss < 0:
            raise InputError(f"z_loss must be at least 0, got {self.z_loss}.")
        if self.spike_factor != 0 and not self.spike_factor > 1:
            raise InputError(f"spike_factor must be above 1, or 0 to skip no spikes; got {self.spike_factor}.")


def loss_sums(config: PretrainConfig, sharding: Sharding, params: Params, batch: Batch) -> Sums:
    """Summed next-token loss of a batch, and the sum of its weights. No expert loses a token.

    Args:
      config: model, compute dtype, remat and chunk.
      sharding: of the current mesh.
      params: of `init_params`, or with their layers apart where they are no loop; see `_apart`.
      batch: packed rows on the mesh.
    """
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity_factor=0.0))
    model, hidden_BTD, targets, weights, _ = _forward(config, sharding, params, batch, count=False)
    return chunked_cross_entropy(model, hidden_BTD, targets, weights, config.loss_chunk, config.z_loss)


def _forward(config: PretrainConfig, sharding: Sharding, params: Params, batch: Batch, count: bool) -> Any:
    """The model, its hidden states, targets and their weights, and if `count` its routing."""
    params = _apart(config, params)
    options = Options(
        config.scan_layers,
        dtype=config.dtype,
        attention=config.attention,
        ring=config.ring,
        grouped=config.moe.grouped,
        capacity_factor=config.moe.capacity_factor,
    )
    model = bind(config.model, params, sharding, options)
    # Who follows whom, and who sees whom, is decided while rows are whole.
    valid = batch.segment_ids > 0 if count else None
    arrays = batch.tokens, batch.positions, packed_mask(batch.segment_ids), valid, *next_token_targets(batch)
    tokens, positions, mask, valid, targets, weights = jax.tree.map(lambda x: spread(x, sharding), arrays)
    output = model(tokens, positions, mask, remat=config.remat, valid_BT=valid)
    return model, output.hidden, targets, weights, output.routing


def mean_gradient(
    config: PretrainConfig, sharding: Sharding, params: Params, batch: Batch
) -> tuple[Params, Sums, jax.Array, RouterStats | None]:
    """The gradient of the mean loss of a batch, whatever it is split into.

    Args:
      config: of the run.
      sharding: of the current mesh.
      params: of `init_params`.
      batch: the whole global batch.

    Returns:
      The gradient, its layers apart where they are no loop; `Sums` that are already divided by the weight of the whole
      batch, and whose loss has what experts add; that weight; the routing of the whole batch, if there are experts.

    Raises:
      InputError: the batch does not divide into the parts and the shards of the mesh.
    """
    n, shards = config.accumulation, sharding.batch_shards
    if batch.shape[0] % (n * shards):
        raise InputError(
            f"A batch of {batch.shape[0]} rows does not divide into {n} accumulated parts over {shards} shards of "
            f"rows (data x fsdp x expert). Choose a batch that is a multiple of {n * shards}."
        )
    params = _apart(config, params)
    weight = next_token_targets(batch)[1].sum()
    # A batch without any target has loss 0, not NaN.
    denominator = jnp.maximum(weight, 1e-8)

    sparse = config.model.moe is not None
    tokens = jnp.maximum((batch.segment_ids > 0).sum(dtype=jnp.float32), 1.0)

    def share_of_mean(params: Params, part: Batch, loads: Any) -> tuple[jax.Array, tuple[Sums, RouterStats | None]]:
        model, hidden, targets, weights, routing = _forward(config, sharding, params, part, count=sparse)
        sums = chunked_cross_entropy(model, hidden, targets, weights, config.loss_chunk, config.z_loss)
        sums = jax.tree.map(lambda x: x / denominator, sums)
        if routing is not None:
            load_LE, counted = loads if ahead else (loads[0] + routing.load_E, loads[1] + routing.tokens[0])
            counted = jnp.maximum(counted, 1.0)
            added = auxiliary(config.moe, config.model, routing, load_LE, counted, tokens)
            sums = dataclasses.replace(sums, loss=sums.loss + added)
        return sums.loss, (sums, routing)

    differentiate = jax.value_and_grad(share_of_mean, has_aux=True)
    ahead = sparse and n > 1 and config.moe.count_ahead and config.moe.coefficient(config.model) > 0
    zero = jnp.zeros((), jnp.float32)
    loads: Any = None
    if sparse and config.model.moe is not None:
        loads = jnp.zeros((len(config.model.sparse_layers), config.model.moe.num_experts), jnp.float32), zero
    if n == 1:
        (_, (means, routing)), gradient = differentiate(params, batch, loads)
        return gradient, means, weight, routing

    def parts(x_BT: jax.Array) -> jax.Array:
        # Part j is rows j, n + j, ...: each shard has its own rows of every part.
        x = x_BT.reshape(-1, n, x_BT.shape[1], out_sharding=P(sharding.rows[0], None, None))
        return jnp.moveaxis(x, 1, 0)

    each = jax.tree.map(parts, batch)
    if ahead:

        def count(total: Any, part: Batch) -> tuple[Any, None]:
            routing = _forward(config, sharding, params, part, count=True)[-1]
            return (total[0] + routing.load_E, total[1] + routing.tokens[0]), None

        with jax.named_scope("counting"):
            loads, _ = jax.lax.scan(count, loads, each)

    def body(total: Any, part: Batch) -> tuple[Any, None]:
        so_far = total[1][1]
        against = loads if ahead or not sparse else (so_far.load_E, so_far.tokens[0])
        (_, found), gradient = differentiate(params, part, against)
        return jax.tree.map(jnp.add, total, (gradient, found)), None

    none: Any = None
    if loads is not None:
        layers = jnp.zeros(loads[0].shape[:1], jnp.float32)
        none = RouterStats(jnp.zeros_like(loads[0]), jnp.zeros_like(loads[0]), layers, layers, layers, layers)
    start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params), (Sums(zero, zero, zero), none)
    with jax.named_scope("accumulation"):
        (gradient, (means, routing)), _ = jax.lax.scan(body, start, each)
    return gradient, means, weight, routing


def _apart(config: PretrainConfig, params: Params) -> Params:
    """Each layer's weights in the compute dtype, unless the layers are one loop.

    A gradient by such weights is rounded to that dtype, as those of products always are, and takes half the memory
    until the optimiser reads it.
    """
    if config.scan_layers or isinstance(params["layers"], list):
        return params
    return {**params, "layers": unstack(params["layers"], config.dtype, config.model.sparse_layers)}


def init_state(config: PretrainConfig, seed: int, mesh: Mesh) -> TrainState:
    """Fresh weights and zero moments, born on their shards.

    Args:
      config: of the run.
      seed: of the weights.
      mesh: the current mesh, from `make_mesh`.
    """
    return fresh_state(config, init_params(config.model, jax.random.key(seed), mesh), mesh)


def fresh_state(config: PretrainConfig, params: Params, mesh: Mesh) -> TrainState:
    """The state before the first step, from given weights.

    Args:
      config: of the run.
      params: float32, on the mesh.
      mesh: the current mesh, from `make_mesh`.
    """

    def scalar(dtype: Any) -> jax.Array:
        # Each has a buffer of its own: the state is donated.
        return jax.device_put(jnp.zeros((), dtype), NamedSharding(mesh, P()))

    opt_state = jax.jit(make_optimizer(config.optimizer).init)(params)
    guard = Guard(scalar(jnp.float32), scalar(jnp.int32), scalar(jnp.int32))
    return TrainState(scalar(jnp.int32), params, opt_state, guard)


def abstract_state(config: PretrainConfig, mesh: Mesh) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with shardings: what to restore a checkpoint like.

    Args:
      config: of the run.
      mesh: from `make_mesh`.
    """
    sharding = Sharding.for_model(config.model, mesh, split_rows=True)

    def struct(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    specs = param_specs(config.model, sharding)
    params = jax.tree.map(struct, abstract_params(config.model, sharding, dtype=jnp.float32), specs)
    optimizer = make_optimizer(config.optimizer)
    opt_state = optax.tree.map_params(
        optimizer,
        struct,
        jax.eval_shape(optimizer.init, params),
        specs,
        transform_non_params=lambda leaf: struct(leaf, P()),
    )
    scalars: list[Any] = [struct(jnp.zeros((), dtype), P()) for dtype in (jnp.int32, jnp.float32, jnp.int32, jnp.int32)]
    return TrainState(scalars[0], params, opt_state, Guard(*scalars[1:]))


def train_step(
    config: PretrainConfig, sharding: Sharding, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One optimiser step. Pure.

    A step whose loss or gradient is not finite, or whose gradient spikes, is skipped: only its number counts.

    Args:
      config: of the run.
      sharding: of the current mesh.
      state: before the step.
      batch: the whole global batch.

    Returns:
      The state after the step, and float32 scalars: `loss` (mean cross-entropy in nats, before the step),
      `grad_norm` (before clipping), `learning_rate`, `weight` (sum of loss weights), `skipped` (1 if this step was);
      with experts those of `routing_metrics`, of which `expert_load` is an array.
    """
    gradient, means, weight, routing = mean_gradient(config, sharding, state.params, batch)
    with jax.named_scope("optimizer"):
        # Before the layers are put together: XLA is slow to sum what it puts together on the way.
        norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))
        if not config.scan_layers:
            gradient = {**gradient, "layers": restack(gradient["layers"], jnp.float32)}
        good, guard = _judge(config, state.guard, means.loss, norm)
        optimizer = make_optimizer(config.optimizer)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, step=state.step, norm=norm)
        after = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), after, (state.params, state.opt_state)
        )
    metrics = {
        "loss": means.cross_entropy,
        "grad_norm": norm,
        "learning_rate": make_schedule(config.optimizer)(state.step),
        "weight": weight,
        "skipped": jnp.where(good, 0.0, 1.0),
    }
    if routing is not None:
        metrics |= routing_metrics(config.model, routing)
    return TrainState(state.step + 1, params, opt_state, guard), metrics


def _judge(config: PretrainConfig, guard: Guard, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, Guard]:
    """Whether a step counts, and the guard after it."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike_factor:
        good &= (guard.accepted < _GUARD_STEPS) | (norm <= config.spike_factor * guard.mean_norm)
    # A plain mean of the first steps, an exponential one after them.
    share = 1.0 / jnp.minimum(guard.accepted + 1, _GUARD_STEPS).astype(jnp.float32)
    mean = guard.mean_norm + share * (norm - guard.mean_norm)
    counts = guard.accepted + good, guard.skipped + ~good
    return good, Guard(jnp.where(good, mean, guard.mean_norm), *counts)


def make_train_step(config: PretrainConfig, mesh: Mesh) -> TrainStep:
    """`train_step`, compiled at its first call; the state given to it is donated and must not be used again.

    Raises:
      InputError: a dimension of the model that the mesh does not divide.
    """
    sharding = Sharding.for_model(config.model, mesh, split_rows=True)
    # While rows travel to their experts, the shared one has something to do.
    asynchronous = sharding.exchanges and mesh.devices.flat[0].platform == "tpu"
    kind = "all_to_all" if config.moe.capacity_factor else "ragged_all_to_all"
    options: Any = {f"xla_tpu_enable_async_{kind}": True} if asynchronous else None
    return jax.jit(functools.partial(train_step, config, sharding), donate_argnums=0, compiler_options=options)


def make_eval_step(config: PretrainConfig, mesh: Mesh) -> EvalStep:
    """`loss_sums` without z-loss, compiled at its first call."""
    config = dataclasses.replace(config, z_loss=0.0)
    return jax.jit(functools.partial(loss_sums, config, Sharding.for_model(config.model, mesh, split_rows=True)))
