"""What is decayed, and the learning rate of each step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax.errors import InputError
from qwen_jax.params import abstract_params
from qwen_jax.published import published
from train.optimizer import AdamW, OptimizerConfig, Schedule, decay_mask, make_optimizer, make_schedule


@pytest.mark.parametrize("name", ["tiny", "tiny-untied"])
def test_norms_and_biases_alone_are_not_decayed(name):
    mask = decay_mask(abstract_params(published(name)))
    decayed = {jax.tree_util.keystr(path, simple=True, separator="."): m for path, m in jax.tree.leaves_with_path(mask)}
    free = {path for path, decays in decayed.items() if not decays}
    layer = {"input_norm.weight", "post_attention_norm.weight", *(f"attention.{p}.bias" for p in "qkv")}
    assert free == {"norm.weight", *(f"layers.{leaf}" for leaf in layer)}


def test_weight_decay_is_decoupled():
    # With a zero gradient Adam moves nothing; what is left is weight x (1 - rate x decay).
    params = {"embed": {"weight": jnp.full((3,), 2.0)}, "norm": {"weight": jnp.full((3,), 2.0)}}
    optimizer = make_optimizer(OptimizerConfig(Schedule(10, 0.1, schedule="wsd"), AdamW(weight_decay=0.5)))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params, step=0, norm=jnp.float32(0))
    np.testing.assert_allclose(updates["embed"]["weight"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["weight"], 0.0)


def test_a_long_gradient_is_clipped_to_the_norm():
    # Adam's first update is the sign of the gradient whatever its size; its second moment keeps the clipped size.
    params = {"embed": {"weight": jnp.zeros((4,))}}
    optimizer = make_optimizer(OptimizerConfig(Schedule(10), AdamW(clip_norm=0.5, beta2=0.9)))
    gradient = {"embed": {"weight": jnp.full((4,), 100.0)}}
    _, state = optimizer.update(gradient, optimizer.init(params), params, step=0, norm=optax.tree.norm(gradient))
    nu = next(s.nu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))
    np.testing.assert_allclose(nu["embed"]["weight"].sum(), 0.1 * 0.5**2, rtol=1e-5)


def rates(**kwargs):
    config = OptimizerConfig(Schedule(100, 2.0, final_fraction=0.1, **kwargs))
    return np.array([make_schedule(config)(step) for step in range(101)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_warm_up_rises_linearly_to_the_peak(schedule):
    # float32 arithmetic in Optax.
    rate = rates(schedule=schedule, warmup_steps=10, decay_steps=20 if schedule == "wsd" else 0)
    np.testing.assert_allclose(rate[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(rate[10], 2.0, rtol=1e-5)
    np.testing.assert_allclose(rate[100], 0.2, rtol=1e-5)
    assert np.all(np.diff(rate[10:]) <= 1e-6)


def test_each_schedule_at_its_middle():
    np.testing.assert_allclose(rates(schedule="cosine")[50], 2.0 * (0.1 + 0.9 / 2), rtol=1e-5)
    np.testing.assert_allclose(rates(schedule="cosine")[25], 2.0 * (0.1 + 0.9 * (1 + np.sqrt(0.5)) / 2), rtol=1e-5)
    np.testing.assert_allclose(rates(schedule="linear")[50], 1.1, rtol=1e-5)
    wsd = rates(schedule="wsd", decay_steps=20)
    np.testing.assert_allclose(wsd[:81], 2.0, rtol=1e-5)
    np.testing.assert_allclose(wsd[90], 1.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "step"}, "cosine, linear or wsd"),
        ({"warmup_steps": 100}, "must fit into"),
        ({"decay_steps": 5}, "belongs to schedule 'wsd'"),
        ({"learning_rate": 0.0}, "must be positive"),
    ],
)
def test_bad_schedules_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        Schedule(steps=100, **kwargs)


@pytest.mark.parametrize("kwargs", [{"clip_norm": -1.0}, {"beta2": 1.0}, {"eps": 0.0}, {"weight_decay": -0.1}])
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(InputError, match=next(iter(kwargs))):
        AdamW(**kwargs)


def test_an_optimizer_needs_a_schedule():
    with pytest.raises(InputError, match="at least one Schedule"):
        OptimizerConfig(())


def test_schedules_follow_one_another_each_as_if_it_were_alone():
    first = Schedule(20, 1.0, warmup_steps=5, final_fraction=0.5)
    second = Schedule(10, 0.5, schedule="wsd")
    third = Schedule(30, 2.0, warmup_steps=10, schedule="wsd", decay_steps=10)
    joined = make_schedule(OptimizerConfig((first, second, third)))
    alone = [make_schedule(OptimizerConfig(part))(i) for part in (first, second, third) for i in range(part.steps)]
    np.testing.assert_allclose([joined(i) for i in range(60)], alone, rtol=1e-6)
    np.testing.assert_allclose(alone[20:30], 0.5)
