"""The pre-training loss and loop: documents are independent, chunks and splits have no effect, one compilation."""

import dataclasses
import functools
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qwen_jax.errors import InputError
from qwen_jax.output_head import statistics_of
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import bind, init_params
from qwen_jax.published import published
from train.data.batch import place
from train.data.loader import batches, whole_batches
from train.data.packing import pack
from train.loop import ByStep, LoopConfig, Monitor, fit, held_out_sums
from train.losses import chunked_cross_entropy, next_token_targets
from train.observe.display import Display
from train.observe.metrics import MetricsLog, bits_per_byte, flops_per_token, mfu, read_log, scored_bytes
from train.optimizer import OptimizerConfig, Schedule, make_schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import Guard, TrainState, init_state
from train.step import StepConfig, eval_step, make_eval_step, make_train_step

TINY = dataclasses.replace(published("tiny"), vocab_size=128)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a step is made from."""

    objective: NextToken
    optimizer: OptimizerConfig
    step: StepConfig


SCHEDULE = Schedule(10, 1e-3)


def pretrain(model=TINY, schedule=SCHEDULE, loss_chunk=8, z_loss=0.0, **kwargs):
    """Next-token training in float32, without recomputation unless `kwargs`, of `StepConfig`, say otherwise."""
    objective = NextToken(model, PretrainConfig(loss_chunk, z_loss))
    step = StepConfig(**{"dtype": "float32", "remat": "none", **kwargs})
    return Training(objective, OptimizerConfig(schedule), step)


def train_step_of(training, mesh):
    return make_train_step(training.objective, training.optimizer, training.step, mesh)


def loss_sums(training, sharding, params, batch):
    return eval_step(training.objective, training.step, sharding, params, batch)[0]


def random_rows(seed, lengths, length=32, vocab=128):
    rng = np.random.default_rng(seed)
    return pack([rng.integers(0, vocab, n) for n in lengths], length)


@functools.cache
def one_device():
    return make_mesh({}, jax.devices()[:1])


@functools.cache
def initial_params(model):
    with jax.set_mesh(one_device()):
        return init_params(model, jax.random.key(0), one_device())


@functools.cache
def compiled_step(training):
    return train_step_of(training, one_device())


@functools.cache
def _state(training):
    with jax.set_mesh(one_device()):
        return init_state(training.objective.model, training.optimizer, 0, one_device())


def fresh_state(training):
    """A copy of `init_state`, which is compiled once for all tests: a step donates its argument."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), _state(training))


@functools.cache
def random_params(model):
    """Initial weights with noise, so that biases and norms matter."""
    rng = np.random.default_rng(0)

    def noisy(x):
        return jax.device_put(np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32), x.sharding)

    return jax.tree.map(noisy, initial_params(model))


@functools.cache
def loss_and_gradients(config, sharding):
    def loss(params, batch):
        sums = loss_sums(config, sharding, params, batch)
        return sums.loss, sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def grads_and_sums(config, mesh, params, batch):
    compute = loss_and_gradients(config, Sharding.for_inference(config.objective.model, mesh))
    (_, sums), gradients = compute(params, place(batch, mesh))
    return jax.device_get(gradients), jax.device_get(sums)


def test_targets_are_the_next_token_of_the_same_document_with_its_weight():
    rows = pack([[5, 6, 7], [8, 9]], 6)
    rows = dataclasses.replace(rows, loss_weights=np.array([[9, 1, 2, 9, 3, 9]], np.float32))
    targets, weights = jax.device_get(next_token_targets(jax.tree.map(jnp.asarray, rows)))
    # 5->6, 6->7, then 8->9: never across documents, never from or to padding.
    np.testing.assert_array_equal(weights, [[1, 2, 0, 3, 0, 0]])
    np.testing.assert_array_equal(targets[0][[0, 1, 3]], [6, 7, 9])


def test_a_target_equal_to_the_padding_id_counts(mesh):
    # Packing pads with id 0; a trained token 0 must keep its weight.
    rows = pack([[3, 0, 0, 4, 0]], 8)
    with jax.set_mesh(mesh):
        sums, _ = make_eval_step(pretrain().objective, pretrain().step, mesh)(random_params(TINY), place(rows, mesh))
    assert float(sums.weight) == 4


def test_a_change_in_one_document_leaves_the_others_loss_and_gradients_bitwise_unchanged(mesh):
    rows = pack([np.arange(1, 12), np.arange(20, 36), np.arange(40, 45)], 32)
    in_b = rows.segment_ids == 2
    rows = dataclasses.replace(rows, loss_weights=in_b.astype(np.float32))
    rng = np.random.default_rng(0)
    other = dataclasses.replace(rows, tokens=np.where(in_b, rows.tokens, rng.integers(50, 128, rows.shape)))
    with jax.set_mesh(mesh):
        params = random_params(TINY)
        gradients, sums = grads_and_sums(pretrain(), mesh, params, rows)
        other_gradients, other_sums = grads_and_sums(pretrain(), mesh, params, other)
        alone_gradients, alone = grads_and_sums(pretrain(), mesh, params, pack([np.arange(20, 36)], 32))
    assert sums.weight == 15
    assert sums.loss == other_sums.loss
    jax.tree.map(np.testing.assert_array_equal, gradients, other_gradients)
    # It also equals the loss of the document alone, up to float32 sums in another order.
    np.testing.assert_allclose(sums.loss, alone.loss, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), gradients, alone_gradients)


@pytest.mark.parametrize("name", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_chunked_loss_equals_the_loss_of_full_logits(mesh, name, chunk):
    config = dataclasses.replace(published(name), vocab_size=96)
    sharding = Sharding.for_inference(config, mesh)
    rng = np.random.default_rng(chunk)
    hidden = rng.normal(size=(2, 19, 64)).astype(np.float32)
    targets = rng.integers(0, 96, (2, 19))
    weights = rng.random((2, 19)).astype(np.float32)

    def full(params, hidden):
        logits = bind(config, params, sharding).logits(hidden)
        one_hot = jax.nn.one_hot(targets, 96)
        losses = -jnp.sum(jax.nn.log_softmax(logits) * one_hot, axis=-1)
        return jnp.sum(losses * weights)

    def chunked(params, hidden):
        arrays = (jax.reshard(jnp.asarray(x), sharding.tokens) for x in (targets, weights))
        sums = chunked_cross_entropy(bind(config, params, sharding), hidden, *arrays, chunk)
        return sums.loss

    with jax.set_mesh(mesh):
        params = random_params(config)
        hidden = jax.device_put(hidden, jax.NamedSharding(mesh, sharding.hidden))
        expected = jax.jit(jax.value_and_grad(full, argnums=(0, 1)))(params, hidden)
        got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(params, hidden)
    # float32 sums in another order; values are of order 1 to 100.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e30])
def test_statistics_of_logits_of_any_size(scale):
    """Compared with float64. A logit of NaN or infinity gives a loss of NaN, so that the step is skipped."""
    logits = (np.random.default_rng().normal(size=(7, 1003)) * scale).astype(np.float32)
    target = np.arange(1003) == np.arange(7)[:, None]
    top, total, picked = jax.jit(statistics_of)(logits, target)
    exact = logits.astype(np.float64)
    np.testing.assert_array_equal(top, logits.max(axis=-1))
    np.testing.assert_array_equal(picked, np.diag(logits))
    np.testing.assert_allclose(total, np.exp(exact - exact.max(axis=-1, keepdims=True)).sum(axis=-1), rtol=1e-5)
    for bad in (np.nan, np.inf):
        logits[:, 500] = bad
        assert np.isnan(jax.jit(statistics_of)(logits, target)[1]).all()


def test_z_loss_is_the_squared_logarithm_of_the_denominator(mesh):
    """It changes what is minimised, not the reported cross-entropy."""
    sharding = Sharding.for_inference(TINY, mesh)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 9, 64)).astype(np.float32)
    targets, weights = rng.integers(0, 128, (2, 9)), rng.random((2, 9)).astype(np.float32)

    def full(params, hidden):
        logits = bind(TINY, params, sharding).logits(hidden)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        cross_entropy = log_total - jnp.sum(logits * jax.nn.one_hot(targets, 128), axis=-1)
        return jnp.sum((cross_entropy + 0.1 * log_total**2) * weights), jnp.sum(cross_entropy * weights)

    def chunked(params, hidden):
        arrays = (jax.reshard(jnp.asarray(x), sharding.tokens) for x in (targets, weights))
        sums = chunked_cross_entropy(bind(TINY, params, sharding), hidden, *arrays, 4, z_loss=0.1)
        return sums.loss, sums.reported

    with jax.set_mesh(mesh):
        params = random_params(TINY)
        hidden = jax.device_put(hidden, jax.NamedSharding(mesh, sharding.hidden))
        expected = jax.jit(jax.value_and_grad(full, argnums=(0, 1), has_aux=True))(params, hidden)
        got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(params, hidden)
    # float32 sums in another order; values are of order 1 to 100.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


def test_full_logits_never_exist(mesh):
    model, rows = dataclasses.replace(TINY, vocab_size=8192), random_rows(0, [16 * 32])

    def temporary_bytes(chunk):
        config, sharding = pretrain(model, loss_chunk=chunk), Sharding.for_inference(model, mesh)
        step = jax.jit(jax.grad(lambda p, b: loss_sums(config, sharding, p, b).loss))
        return step.lower(params, place(rows, mesh)).compile().memory_analysis().temp_size_in_bytes

    with jax.set_mesh(mesh):
        params = initial_params(model)
        full_logits = 16 * 32 * 8192 * 4
        assert temporary_bytes(chunk=512) > full_logits > temporary_bytes(chunk=32)


def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_split(mesh):
    rows = random_rows(1, [40, 3, 60, 5, 5, 70, 30])
    rng = np.random.default_rng(0)
    rows = dataclasses.replace(rows, loss_weights=(rng.random(rows.shape) < 0.5).astype(np.float32))
    with jax.set_mesh(mesh):
        params = random_params(TINY)
        whole_gradients, whole = grads_and_sums(pretrain(), mesh, params, rows)
        parts = [grads_and_sums(pretrain(), mesh, params, part) for part in whole_batches(rows, 4)]
    weights = [float(sums.weight) for _, sums in parts]
    assert len(set(weights)) > 1  # Unequal parts: a mean of means would be wrong.
    assert sum(weights) == whole.weight
    np.testing.assert_allclose(sum(sums.loss for _, sums in parts), whole.loss, rtol=1e-5)
    total = jax.tree.map(lambda *leaves: sum(leaves), *(gradients for gradients, _ in parts))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), total, whole_gradients)


def test_a_mesh_trains_as_one_device_does(mesh):
    config, data = pretrain(), batches(random_rows(2, [90] * 20), 8, seed=0)

    def metrics(mesh, state, step):
        result = []
        for i in range(3):
            state, numbers = step(state, place(data[i], mesh))
            result.append(jax.device_get(numbers))
        return result

    with jax.set_mesh(mesh):
        expected = metrics(mesh, fresh_state(config), compiled_step(config))
    eight = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(eight):
        state = init_state(config.objective.model, config.optimizer, 0, eight)
        got = metrics(eight, state, train_step_of(config, eight))
    # float32 sums in another order; Adam divides by gradients that may be small.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4), got, expected)


@pytest.mark.parametrize("cause", ["not finite", "spike"])
def test_a_bad_gradient_moves_nothing_but_the_count_of_steps(mesh, cause):
    config = pretrain(spike_factor=4.0)
    rows = random_rows(3, [256])
    with jax.set_mesh(mesh):
        step, state = compiled_step(config), fresh_state(config)
        for _ in range(3):
            state, metrics = step(state, place(rows, mesh))
        assert float(metrics["skipped"]) == 0
        norm = float(metrics["grad_norm"])
        usual = Guard(jnp.float32(norm), jnp.int32(50), state.guard.skipped)
        unusual = Guard(jnp.float32(norm / 8), jnp.int32(50), state.guard.skipped)
        guard = unusual if cause == "spike" else usual
        state = dataclasses.replace(state, guard=jax.device_put(guard, state.guard.skipped.sharding))
        before = jax.device_get(state)
        # One weight at infinity makes every loss NaN.
        bad = dataclasses.replace(rows, loss_weights=rows.loss_weights * (np.inf if cause == "not finite" else 1))
        state, metrics = step(state, place(bad, mesh))
        after = jax.device_get(state)
        assert float(metrics["skipped"]) == 1
        assert (after.step, after.guard.skipped) == (before.step + 1, 1)
        jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
        assert (after.guard.mean_norm, after.guard.accepted) == (before.guard.mean_norm, before.guard.accepted)
        # The same gradient is accepted where it is usual.
        state = dataclasses.replace(state, guard=jax.device_put(usual, state.guard.skipped.sharding))
        state, metrics = step(state, place(rows, mesh))
        assert float(metrics["skipped"]) == 0
        assert not np.array_equal(jax.device_get(state.params)["norm"]["weight"], before.params["norm"]["weight"])


def test_the_learning_rate_follows_the_run_and_not_the_steps_that_counted(mesh):
    config = pretrain()
    rows = random_rows(3, [256])
    with jax.set_mesh(mesh):
        state = fresh_state(config)
        rates = []
        for i in range(4):
            weights = rows.loss_weights * (np.nan if i == 1 else 1)
            part = dataclasses.replace(rows, loss_weights=weights)
            state, metrics = compiled_step(config)(state, place(part, mesh))
            rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [make_schedule(config.optimizer)(i) for i in range(4)], rtol=1e-6)
    assert (int(state.step), int(state.guard.accepted), int(state.guard.skipped)) == (4, 3, 1)


def test_bfloat16_computes_close_to_float32_and_keeps_float32_gradients(mesh):
    rows = random_rows(3, [90, 35])
    with jax.set_mesh(mesh):
        _, exact = grads_and_sums(pretrain(), mesh, initial_params(TINY), rows)
        gradients, rounded = grads_and_sums(pretrain(dtype="bfloat16"), mesh, initial_params(TINY), rows)
    assert rounded.loss.dtype == np.float32
    assert rounded.loss != exact.loss
    np.testing.assert_allclose(rounded.loss, exact.loss, rtol=2e-3)  # bfloat16 has 8 bits.
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {np.dtype("float32")}


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(mesh, remat):
    rows = random_rows(4, [90, 35])
    with jax.set_mesh(mesh):
        params = random_params(TINY)
        expected, _ = grads_and_sums(pretrain(), mesh, params, rows)
        got, _ = grads_and_sums(pretrain(remat=remat), mesh, params, rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


def test_a_batch_without_targets_has_loss_zero_and_finite_weights(mesh):
    rows = jax.tree.map(np.zeros_like, random_rows(0, [256]))
    with jax.set_mesh(mesh):
        state, metrics = compiled_step(pretrain())(fresh_state(pretrain()), place(rows, mesh))
    assert float(metrics["loss"]) == 0.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))


def test_training_compiles_once_and_learns_a_repeated_text(mesh, tmp_path):
    text = b"the quick brown fox jumps over the lazy dog. " * 40
    rows = pack([list(text)], 32)
    config = pretrain(schedule=Schedule(60, 1e-2, warmup_steps=5), loss_chunk=16)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with jax.set_mesh(mesh):
        step, evaluation = train_step_of(config, mesh), make_eval_step(config.objective, config.step, mesh)
        held_out = whole_batches(rows, 16)

        def evaluate(state):
            return {"loss": held_out_sums(state.params, evaluation, held_out, mesh)[0].mean_loss()}

        state = fit(
            60,
            init_state(TINY, config.optimizer, 0, mesh),
            step,
            ByStep(batches(rows, 8, seed=0)),
            mesh=mesh,
            config=LoopConfig(evaluate_every=30),
            evaluate=evaluate,
            monitor=Monitor(log=log),
        )
    assert step._cache_size() == evaluation._cache_size() == 1
    assert int(state.step) == 60
    records = read_log(tmp_path / "metrics.jsonl")
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert sorted(losses) == list(range(1, 61))
    # A uniform guess over 128 ids costs 4.85 nats.
    assert abs(losses[1] - math.log(128)) < 0.3
    assert losses[60] < 0.5
    held = [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]
    assert [s for s, _ in held] == [0, 30, 60]
    assert held[0][1] > held[1][1] > held[2][1]


def test_losses_that_are_not_finite_stop_the_run(mesh):
    data = ByStep(batches(random_rows(0, [300]), 8, seed=0))
    with jax.set_mesh(mesh):
        state = fresh_state(pretrain())
        broken = dataclasses.replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))
        with pytest.raises(InputError, match=r"4 steps up to step 4 .* loss of the last is nan"):
            fit(10, broken, compiled_step(pretrain()), data, mesh=mesh, config=LoopConfig(max_skipped=4))


def test_metrics_are_read_after_the_next_step_was_enqueued(mesh):
    events = []

    class Late:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            events.append(f"read {self.step}")
            return 1.0

    def step(state, batch):
        events.append(f"enqueue {state.step + 1}")
        return dataclasses.replace(state, step=state.step + 1), {"loss": Late(state.step + 1)}

    with jax.set_mesh(mesh):
        state = TrainState(step=0, params={}, opt_state=(), guard=Guard(0.0, 0, 0))
        fit(3, state, step, ByStep([random_rows(0, [64])] * 3), mesh=mesh)
    assert events == ["enqueue 1", "enqueue 2", "read 1", "enqueue 3", "read 2", "read 3"]


def test_bits_per_byte_is_the_entropy_of_a_uniform_guess():
    # 256 equally likely bytes: 8 bits each, however they are grouped into tokens.
    assert math.isclose(bits_per_byte(10 * math.log(256), 10), 8.0)
    assert math.isclose(bits_per_byte(5 * math.log(256**2), 10), 8.0)


def test_scored_bytes_counts_predicted_tokens_only():
    rows = pack([[1, 2, 3], [2, 2]], 4)  # Rows 1 2 3 | 2 and 2; the last begins a row.
    assert scored_bytes(rows, np.array([0, 10, 200, 3000])) == 200 + 3000
    silent = dataclasses.replace(rows, loss_weights=np.zeros_like(rows.loss_weights))
    assert scored_bytes(silent, np.array([0, 10, 200, 3000])) == 0


def test_flops_of_the_half_billion_model():
    config = published("qwen2.5-0.5b")
    counts = config.num_params()
    norms_and_biases = 24 * (2 * 896 + 14 * 64 + 2 * 2 * 64) + 896
    weights = counts["non_embedding"] - norms_and_biases + counts["embedding"]
    assert flops_per_token(config, 4096) == 6 * weights + 6 * 24 * 14 * 64 * 4096
    assert mfu(1e6, config, 4096, peak_flops=flops_per_token(config, 4096) * 2e6) == 0.5


def test_display_off_a_terminal_writes_plain_lines():
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=False), steps=40, lines=4) as display:
        for step in range(1, 41):
            display.step(step, 4.0, tokens=100, seconds=0.5)
        display.evaluation(40, {"held_out_bits_per_byte": 2.5}, seconds=1.0)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["step 10/40", "step 20/40", "step 30/40", "step 40/40"]
    assert lines[-1] == "step 40: held-out bits per byte 2.500"
    assert "\x1b" not in out.getvalue()


def test_display_on_a_terminal_shows_loss_speed_and_time_left():
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120), steps=3) as display:
        for step in range(1, 4):
            display.step(step, 1.25, tokens=100, seconds=0.5)
    text = out.getvalue()
    assert "3/3" in text
    assert "1.250" in text
    assert "tokens/s" in text
    assert "left" in text


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="dtype must be one of"):
        pretrain(dtype="float8")
    for wrong in ({"loss_chunk": 0}, {"accumulation": 0}, {"z_loss": -1.0}, {"spike_factor": 0.5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            pretrain(**wrong)


def test_a_batch_that_does_not_divide_is_refused(mesh):
    config = pretrain(accumulation=3)
    with jax.set_mesh(mesh), pytest.raises(InputError, match="batch of 8 rows does not divide into 3 micro-batches"):
        train_step_of(config, mesh)(fresh_state(config), place(random_rows(0, [256]), mesh))
