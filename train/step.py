"""The training step: gradient accumulation, global denominators, the guard against bad gradients, and the optimiser.

It serves any `train.objective.Objective`, and knows none of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_jax.config import DTYPES
from qwen_jax.errors import InputError
from qwen_jax.kernels import COVERAGE, Implementation
from qwen_jax.kernels.matmul import low_precision
from qwen_jax.lora import LoRA, with_dropout
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind, union
from qwen_jax.remat import Remat
from qwen_jax.stack import restack, unstack
from train.fields import at_least
from train.objective import BatchContext, BoundModel, Metrics, Objective, Sums, join_statistics, mean, zero_sums
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule, read_rates
from train.state import Guard, TrainState

B = TypeVar("B")
S = TypeVar("S")
C = TypeVar("C")
T = TypeVar("T")

TrainStep = Callable[[TrainState, B], tuple[TrainState, Metrics]]
"""A jitted `train_step`; it also takes frozen parameters as a third argument or `frozen=`, and `rates=`."""
EvalStep = Callable[[Params, B], tuple[Sums, Any]]
"""A jitted `eval_step`; it also takes frozen parameters as a third argument or `frozen=`."""

# Spikes are judged only after this many accepted steps; the running mean then covers about as many.
_GUARD_STEPS = 50


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a training step is computed, whatever it minimises.

    Attributes:
      dtype: compute dtype. Weights, softmax, norms and losses are float32 in any case.
      remat: what the backward pass recomputes; see `qwen_jax.remat`.
      accumulation: micro-batches per step, computed one after the other; the loss does not depend on it.
      scan_layers: run the layers in a loop. Unrolled layers are faster on a GPU and take longer to compile.
      attention: which kernel; see `qwen_jax.kernels.attention`.
      ring: on a context axis, pass keys and values around the devices instead of gathering them; see
        `qwen_jax.attention.sequence`.
      spike_factor: skip a step whose gradient norm is more than this many times the running mean; 0 skips only those
        whose loss or gradient is not finite.
      lora: the model has LoRA, whose parameters are trained beside frozen ones; see `qwen_jax.lora`.
      products: how the projections of attention, of feed-forward layers and of shared experts are multiplied:
        "bfloat16", in the compute dtype; or "fp8", "fp8-blocks" and "int8", with operands rounded to 8 bits, in
        training and evaluation. See `qwen_jax.kernels.matmul.low_precision`.

    Raises:
      InputError: an unknown dtype or way to multiply, a value out of range, products of 8 bits in float16 or with LoRA,
        or a kernel that cannot be used with `ring`.
    """

    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    remat: Remat = "dots"
    accumulation: int = 1
    scan_layers: bool = True
    attention: Implementation = "auto"
    ring: bool = False
    spike_factor: float = 0.0
    lora: LoRA | None = None
    products: low_precision.Products = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.products not in get_args(low_precision.Products):
            raise InputError(
                f"products must be one of {', '.join(get_args(low_precision.Products))}, got {self.products!r}."
            )
        if self.products != "bfloat16" and self.dtype == "float16":
            raise InputError(f"products={self.products!r} may overflow in float16. Use dtype='bfloat16'.")
        if self.products != "bfloat16" and self.lora is not None:
            raise InputError(
                f"products={self.products!r} are for training whole weights, and LoRA keeps the products of its base. "
                "Use products='bfloat16', or lora=None."
            )
        at_least(self, accumulation=1)
        mergeable = ("auto", *(name for name, coverage in COVERAGE.items() if coverage.log_sum_exp))
        if self.ring and self.attention not in mergeable:
            raise InputError(
                f"ring merges partial attention by log-sum-exp, which attention={self.attention!r} does not return. "
                f"Use attention={' or '.join(map(repr, mergeable))}, or ring=False."
            )
        if self.spike_factor != 0 and not (self.spike_factor > 1 and math.isfinite(self.spike_factor)):
            raise InputError(f"spike_factor must be above 1, or 0 to skip no spikes; got {self.spike_factor}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchGradient(Generic[S]):
    """The gradient of the mean loss of a whole batch, and what was computed with it.

    Attributes:
      gradient: in the tree of the parameters; where layers are not scanned, `layers` is a list of them.
      means: sums over the batch, divided by the denominator, with the regulariser in `loss`.
      denominator: float32 scalar, as the objective gave it.
      statistics: of the objective, over the whole batch.
    """

    gradient: Params
    means: Sums
    denominator: jax.Array
    statistics: S


def batch_gradient(
    objective: Objective[B, S, C],
    config: StepConfig,
    sharding: Sharding,
    params: Params,
    batch: B,
    frozen: Params | None = None,
    step: jax.Array | None = None,
) -> BatchGradient[S]:
    """Differentiates the mean loss of a batch, which does not depend on the number of micro-batches.

    Args:
      objective: what to minimise.
      config: of the step.
      sharding: of the current mesh.
      params: of `init_params`; what the loss is differentiated with respect to.
      batch: the whole global batch.
      frozen: the other parameters; as for `train_step`.
      step: int32, number of the step, for dropout.

    Raises:
      ValueError: dropout without `step`.
      InputError: the batch does not divide into the micro-batches and the shards of the mesh.
    """
    n, shards = config.accumulation, sharding.batch_shards
    check_divides(_rows(batch), n, shards)
    params = _layers_for_compute(objective, config, params)
    frozen = None if frozen is None else _layers_for_compute(objective, config, frozen)

    lora = config.lora if config.lora is not None and config.lora.dropout else None
    if lora is not None and step is None:
        raise ValueError("Dropout needs the number of the step.")

    def bound(params: Params, part: jax.Array | None = None) -> BoundModel:
        """The model; with dropout, if there is any, in a micro-batch."""
        params = union(params, frozen)
        if lora is None or part is None:
            return _bind(objective, config, sharding, params)
        assert step is not None
        return _bind(objective, config, sharding, with_dropout(params, lora, step, part), dropout=True)

    # The denominator is that of the whole batch, over all devices and micro-batches.
    whole = objective.denominator(batch)
    # A batch without any target has loss 0, not NaN.
    denominator = jnp.maximum(whole, 1e-8)

    def share_of_mean(
        params: Params, micro_batch: B, context: BatchContext[S, C], part: jax.Array
    ) -> tuple[jax.Array, tuple[Sums, S]]:
        sums, statistics = objective.sums(bound(params, part), micro_batch, context)
        share = mean(sums, denominator)
        return share.loss, (share, statistics)

    differentiate = jax.value_and_grad(share_of_mean, has_aux=True)
    micro_batches = split_rows(batch, n, sharding) if n > 1 else None
    prepared = objective.prepare(bound(params), batch, micro_batches)
    zero_statistics = objective.zero_statistics()
    if micro_batches is None:
        whole_context = BatchContext(prepared, zero_statistics)
        (_, (means, statistics)), gradient = differentiate(params, batch, whole_context, jnp.int32(0))
        return BatchGradient(gradient, means, whole, statistics)

    # Gradients, shares of the mean and statistics of the micro-batches add up in float32.
    def accumulate(
        total: tuple[Params, tuple[Sums, S]], one: tuple[B, jax.Array]
    ) -> tuple[tuple[Params, tuple[Sums, S]], None]:
        micro_batch, part = one
        context = BatchContext(prepared, total[1][1])
        (_, (share, statistics)), gradient = differentiate(params, micro_batch, context, part)
        summed, shares = jax.tree.map(jnp.add, (total[0], total[1][0]), (gradient, share))
        return (summed, (shares, join_statistics(total[1][1], statistics))), None

    start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params), (zero_sums(), zero_statistics)
    with jax.named_scope("accumulation"):
        (gradient, (means, statistics)), _ = jax.lax.scan(accumulate, start, (micro_batches, jnp.arange(n)))
    return BatchGradient(gradient, means, whole, statistics)


def check_divides(rows: int, accumulation: int, shards: int, where: str = "") -> None:
    """Checks that a batch can be split into micro-batches and over the devices.

    Args:
      rows: in the global batch.
      accumulation: micro-batches per step.
      shards: parts that the mesh splits rows into.
      where: begins the message, such as "Stage 1: ".

    Raises:
      InputError: it cannot.
    """
    if rows % (accumulation * shards):
        raise InputError(
            f"{where}a batch of {rows} rows does not divide into {accumulation} micro-batches over {shards} shards of "
            f"rows (data x fsdp x expert). Choose a multiple of {accumulation * shards} rows."
        )


def _rows(batch: object) -> int:
    """Rows of a batch, whose leaves are all [rows, length]."""
    rows: int = jax.tree.leaves(batch)[0].shape[0]
    return rows


def split_rows(batch: B, n: int, sharding: Sharding) -> B:
    """The micro-batches of a batch.

    Args:
      batch: of arrays [rows, length].
      n: number of micro-batches.
      sharding: of the current mesh.

    Returns:
      Each array [n, rows / n, length].
    """

    def split(x_BT: jax.Array) -> jax.Array:
        # Micro-batch j has the rows j, n + j, ...: every shard of rows keeps its own part of each micro-batch.
        x = x_BT.reshape(-1, n, x_BT.shape[1], out_sharding=P(sharding.rows[0], None, None))
        return jnp.moveaxis(x, 1, 0)

    micro_batches: B = jax.tree.map(split, batch)
    return micro_batches


def _bind(
    objective: Objective[B, S, C], config: StepConfig, sharding: Sharding, params: Params, dropout: bool = False
) -> BoundModel:
    options = Options(
        stacked=config.scan_layers,
        dtype=config.dtype,
        products=config.products,
        attention=config.attention,
        ring=config.ring,
        lora=config.lora,
        lora_dropout=dropout,
    )
    return BoundModel(bind(objective.model, params, sharding, objective.options(options)), config.remat)


def _layers_for_compute(objective: Objective[B, S, C], config: StepConfig, params: Params) -> Params:
    """The parameters with a list of layers in the compute dtype, unless the layers are scanned.

    The gradient with respect to such weights is rounded to that dtype, as gradients of matrix products always are, and
    takes half the memory until the optimiser reads it. A list of layers is returned as it is.
    """
    if config.scan_layers or not isinstance(params.get("layers"), dict):
        return params
    return {**params, "layers": unstack(params["layers"], config.dtype, objective.model.sparse_layers)}


def train_step(
    objective: Objective[B, S, C],
    optimizer: OptimizerConfig,
    config: StepConfig,
    sharding: Sharding,
    state: TrainState,
    batch: B,
    frozen: Params | None = None,
    rates: jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimiser step. Pure.

    A step is skipped if its loss or gradient is not finite or its gradient spikes: it only counts as a step then.

    Args:
      objective: what to minimise.
      optimizer: AdamW and its schedule.
      config: of the step.
      sharding: of the current mesh.
      state: before the step.
      batch: the whole global batch.
      frozen: the parameters that are not trained, on the mesh, in any dtype; together with `state.params` they are all
        of the model's. They get no gradient. Where layers are not scanned, `layers` is better a list of layers in the
        compute dtype: stacked layers are then copied in each step. None if all parameters are trained.
      rates: float32 [steps], the learning rate of each step, in place of the optimizer's schedule: with an argument,
        runs that differ in their schedules share a program. See `train.optimizer.rate_table`.

    Returns:
      The state after the step, and metrics. Float32 scalars: `loss` (mean of `Sums.reported`, before the step),
      `grad_norm` (before clipping), `learning_rate`, `weight` (the denominator), `skipped` (1 if this step was); and
      the objective's own, which may be arrays.
    """
    found = batch_gradient(objective, config, sharding, state.params, batch, frozen, state.step)
    with jax.named_scope("optimizer"):
        # Before the layers are stacked: XLA is slow to sum what it stacks on the way.
        norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), found.gradient))
        gradient = found.gradient
        if isinstance(gradient.get("layers"), list):
            gradient = {**gradient, "layers": restack(gradient["layers"], jnp.float32)}
        good, guard = _judge(config, state.guard, found.means.loss, norm)
        rate = make_schedule(optimizer) if rates is None else read_rates(rates)
        transformation = make_optimizer(optimizer, rate=rate)
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params, step=state.step, norm=norm)
        after = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), after, (state.params, state.opt_state)
        )
    metrics = {
        "loss": found.means.reported,
        "grad_norm": norm,
        "learning_rate": rate(state.step),
        "weight": found.denominator,
        "skipped": jnp.where(good, 0.0, 1.0),
        **objective.metrics(found.statistics, jnp.maximum(found.denominator, 1e-8)),
    }
    return TrainState(state.step + 1, params, opt_state, guard), metrics


def _judge(config: StepConfig, guard: Guard, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, Guard]:
    """Whether a step is accepted, and the guard after it."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike_factor:
        good &= (guard.accepted < _GUARD_STEPS) | (norm <= config.spike_factor * guard.mean_norm)
    # A plain mean over the first steps, an exponential one after them.
    share = 1.0 / jnp.minimum(guard.accepted + 1, _GUARD_STEPS).astype(jnp.float32)
    mean_norm = guard.mean_norm + share * (norm - guard.mean_norm)
    counts = guard.accepted + good, guard.skipped + ~good
    return good, Guard(jnp.where(good, mean_norm, guard.mean_norm), *counts)


def eval_step(
    objective: Objective[B, S, C],
    config: StepConfig,
    sharding: Sharding,
    params: Params,
    batch: B,
    frozen: Params | None = None,
) -> tuple[Sums, S]:
    """Sums and statistics of an objective over a batch, in one piece, without what only helps training. Pure.

    Args:
      objective: as in training; its `for_evaluation` is evaluated.
      config: of the step; `accumulation` has no effect.
      sharding: of the current mesh.
      params: of `init_params`, or with a list of layers in the compute dtype where they are not scanned.
      batch: on the mesh.
      frozen: as for `train_step`.
    """
    objective = objective.for_evaluation()
    return objective.sums(_bind_for_evaluation(objective, config, sharding, params, frozen), batch, None)


def _bind_for_evaluation(
    objective: Objective[B, S, C], config: StepConfig, sharding: Sharding, params: Params, frozen: Params | None
) -> BoundModel:
    params = _layers_for_compute(objective, config, params)
    if frozen is not None:
        params = union(params, _layers_for_compute(objective, config, frozen))
    return _bind(objective, config, sharding, params)


def make_train_step(
    objective: Objective[B, S, C], optimizer: OptimizerConfig, config: StepConfig, mesh: Mesh
) -> TrainStep[B]:
    """Jits `train_step`; the state given to it is donated and must not be used again; frozen parameters are not.

    Args:
      objective: what to minimise.
      optimizer: AdamW and its schedule.
      config: of the step.
      mesh: from `make_mesh`.

    Raises:
      InputError: a dimension of the model that the mesh does not divide, or products that its devices do not have.
    """
    sharding = Sharding.for_training(objective.model, mesh)
    options = {
        **objective.compiler_options(sharding, mesh.devices.flat[0].platform),
        **_compiler_options(config, mesh),
    }
    step = functools.partial(train_step, objective, optimizer, config, sharding)
    return jax.jit(step, donate_argnums=0, compiler_options=options or None)


def _compiler_options(config: StepConfig, mesh: Mesh) -> dict[str, bool]:
    """Options of XLA that the products of a configuration need, after a check that the devices have these products."""
    low_precision.check_devices(config.products, mesh)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    return low_precision.COMPILER_OPTIONS if config.products == "fp8" and on_gpu else {}


def make_eval_step(objective: Objective[B, S, C], config: StepConfig, mesh: Mesh) -> EvalStep[B]:
    """Jits `eval_step`.

    Args:
      objective: as in training.
      config: of the step.
      mesh: from `make_mesh`.

    Raises:
      InputError: a dimension of the model that the mesh does not divide.
    """
    sharding = Sharding.for_training(objective.model, mesh)
    options = _compiler_options(config, mesh) or None
    return jax.jit(functools.partial(eval_step, objective, config, sharding), compiler_options=options)


def make_forward(
    objective: Objective[B, S, C], function: Callable[[BoundModel, B], T], config: StepConfig, mesh: Mesh
) -> Callable[..., T]:
    """Jits a function of the model, run as the objective runs it in evaluation, and a batch.

    Args:
      objective: says how the model is run.
      function: of the bound model and a batch; it is not differentiated.
      config: of the step; `accumulation` has no effect.
      mesh: from `make_mesh`.

    Returns:
      A function of parameters, a batch on the mesh, and frozen parameters or None, as for `eval_step`.

    Raises:
      InputError: a dimension of the model that the mesh does not divide.
    """
    sharding, evaluated = Sharding.for_training(objective.model, mesh), objective.for_evaluation()

    def run(params: Params, batch: B, frozen: Params | None = None) -> T:
        return function(_bind_for_evaluation(evaluated, config, sharding, params, frozen), batch)

    return jax.jit(run, compiler_options=_compiler_options(config, mesh) or None)


def make_loss_check(
    objective: Objective[B, S, C], config: StepConfig, mesh: Mesh
) -> Callable[[Params, B, Params | None], jax.Array]:
    """Jits a check whether the loss of the first micro-batch is finite: of parameters, a global batch, and frozen ones.

    Args:
      objective: as in training.
      config: of the step.
      mesh: from `make_mesh`.
    """
    sharding = Sharding.for_training(objective.model, mesh)

    def check(params: Params, batch: B, frozen: Params | None) -> jax.Array:
        if config.accumulation > 1:
            batch = jax.tree.map(lambda x: x[0], split_rows(batch, config.accumulation, sharding))
        return jnp.isfinite(eval_step(objective, config, sharding, params, batch, frozen)[0].loss)

    return jax.jit(check, compiler_options=_compiler_options(config, mesh) or None)
