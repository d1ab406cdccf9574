"""Moments of Adam that are stored in fewer bits: what a step computes from them, and what is kept of the new ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from tests.helpers.runs import print_seed
from train.moments import MOMENTS, pack, store_moments
from train.optimizer import AdamW, OptimizerConfig, Schedule, make_optimizer
from train.state import abstract_state


def adam_state(state):
    return next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))


def test_moments_in_bfloat16_are_those_of_a_step_from_them_rounded():
    """Each update is AdamW's from the stored moments, bit for bit, and what is stored is the new ones, rounded once."""
    rng = print_seed()
    schedule = Schedule(10, 0.1, schedule="wsd")
    narrow, wide = (make_optimizer(OptimizerConfig(schedule, AdamW(moments=m))) for m in ("bfloat16", "float32"))
    params = {
        "embed": {"weight": rng.normal(size=(3, 5)).astype(np.float32)},
        "norm": {"weight": np.ones(5, np.float32)},
    }
    state = narrow.init(params)
    assert {x.dtype.name for x in jax.tree.leaves((adam_state(state).mu, adam_state(state).nu))} == {"bfloat16"}
    for step in range(4):
        gradient = jax.tree.map(lambda x: (rng.normal(size=x.shape) * 1e-3).astype(np.float32), params)
        more = {"step": step, "norm": optax.tree.norm(gradient)}
        stored = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        expected, after = wide.update(gradient, stored, params, **more)
        updates, state = narrow.update(gradient, state, params, **more)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        for name in ("mu", "nu"):
            rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), getattr(adam_state(after), name))
            jax.tree.map(np.testing.assert_array_equal, getattr(adam_state(state), name), rounded)


def test_moments_in_bfloat16_decay_with_every_beta_that_is_allowed():
    """A second moment goes to 0 without gradients, from any value, and stays where it is with a larger beta2."""
    rng = print_seed()
    start = np.exp(rng.uniform(-50, 50, 1000)).astype(np.float32)

    def after(beta2, steps):
        nu = jnp.asarray(start, jnp.bfloat16)
        for _ in range(steps):
            nu = (beta2 * nu.astype(jnp.float32)).astype(jnp.bfloat16)
        return np.asarray(nu, np.float32)

    assert (after(0.99, 1) < np.asarray(jnp.asarray(start, jnp.bfloat16), np.float32)).all()
    assert (after(0.999, 1) == np.asarray(jnp.asarray(start, jnp.bfloat16), np.float32)).all()
    for betas in ({"beta2": 0.999}, {"beta1": 0.995}):
        with pytest.raises(InputError, match=r"at most 0\.99, got .* use moments='float32'"):
            AdamW(moments="bfloat16", **betas)
    with pytest.raises(InputError, match="moments must be one of float32, bfloat16, 8bit, got 'int4'"):
        AdamW(moments="int4")


def test_moments_take_a_half_and_a_quarter_of_the_memory_on_every_device():
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    sizes = {}
    for moments in MOMENTS:
        state = abstract_state(published("tiny"), OptimizerConfig(Schedule(10), AdamW(moments=moments)), mesh)
        arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        sizes[moments] = [np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays]
    assert sizes["float32"] == [2 * size for size in sizes["bfloat16"]] == [4 * size for size in sizes["8bit"]]


def moments(rng: np.random.Generator, shape: tuple[int, ...], largest: float) -> tuple[jax.Array, jax.Array]:
    """First and second moments as AdamW makes them: of all magnitudes, the first at most 1.2 roots of the second."""
    root = largest * np.exp2(rng.uniform(-31.5, 0, shape))
    return jnp.asarray(root * rng.uniform(-1.2, 1.2, shape), jnp.float32), jnp.asarray(root**2, jnp.float32)


def unpacked(mu: jax.Array, nu: jax.Array, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Both moments in float64, by the definition of their codes."""
    root = np.where(np.asarray(nu) > 0, largest * np.exp2((np.asarray(nu, np.float64) - 255) / 8), 0.0)
    return np.asarray(mu, np.float64) * np.maximum(root, largest * 2 ** (-255 / 8)), root**2


def test_moments_in_8_bits_are_rounded_to_a_neighbour_on_either_side():
    """The root by less than one step of 9%, its ratio by less than the distance of two numbers of float8_e4m3fn."""
    rng = print_seed()
    largest = float(np.exp(rng.uniform(-3, 3)))
    mu, nu = moments(rng, (512, 256), largest)
    ratio, codes = pack(mu, nu, jax.random.key(rng.integers(2**31)), largest)
    assert ratio.dtype == jnp.float8_e4m3fn
    assert codes.dtype == jnp.uint8
    nu_8 = unpacked(ratio, codes, largest)[1]
    moved = 8 * np.log2(np.sqrt(nu_8) / np.sqrt(np.asarray(nu, np.float64)))
    assert (abs(moved) < 1 + 1e-3).all()
    # Of numbers that lie anywhere between two codes, 0.18 go down by more than 0.4 of the distance, and as many up.
    assert (moved < -0.4).mean() > 0.15
    assert (moved > 0.4).mean() > 0.15
    exact = np.asarray(mu, np.float64) / np.sqrt(nu_8)
    spacing = np.exp2(np.maximum(np.floor(np.log2(np.maximum(abs(exact), 1e-30))), -6) - 3)
    assert (abs(np.asarray(ratio, np.float64) - exact) < spacing * (1 + 1e-5)).all()
    # Zero stays zero.
    ratio, codes = pack(jnp.zeros(8), jnp.zeros(8), jax.random.key(0), largest)
    assert not np.asarray(ratio, np.float32).any()
    assert not np.asarray(codes).any()


def test_moments_in_8_bits_are_right_in_expectation():
    """Over many draws: the logarithm of the root, and the ratio, within five standard errors of the mean."""
    rng = print_seed()
    mu, nu = moments(rng, (40,), 1.0)
    draws = 4096
    keys = jax.random.split(jax.random.key(rng.integers(2**31)), draws)
    ratio, codes = jax.jit(jax.vmap(lambda key: pack(mu, nu, key, 1.0)))(keys)
    level = 255 + 8 * np.log2(np.sqrt(np.asarray(nu, np.float64)))
    # One of two codes next to each other has a standard deviation of at most a half.
    assert (abs(np.asarray(codes, np.float64).mean(0) - level) < 5 * 0.5 / draws**0.5 + 1e-3).all()
    exact = np.asarray(mu, np.float64) / np.sqrt(unpacked(ratio, codes, 1.0)[1])
    error = np.asarray(ratio, np.float64) - exact
    spacing = np.exp2(np.maximum(np.floor(np.log2(abs(exact))), -6) - 3)
    assert (abs((error / spacing).mean(0)) < 5 * 0.5 / draws**0.5 + 1e-3).all()


def test_a_step_from_moments_in_8_bits_is_adams_from_what_they_stand_for():
    """In weights that are updated whole, and in those of all layers, which are updated one after the other."""
    rng = print_seed()
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    stored = store_moments(adam, "8bit", 1.0)
    params = {
        "a": jnp.zeros((6, 8)),
        "b": jnp.zeros(5),
        "layers": {"c": jnp.zeros((3, 4, 5)), "norm": jnp.zeros((3, 4))},
    }
    state = stored.init(params)
    for _ in range(4):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 1e-3, jnp.float32), params)
        # What is stored, as float32.
        mu, nu = (
            jax.tree.map(lambda *both, i=i: jnp.asarray(unpacked(*both, 1.0)[i], jnp.float32), state.mu, state.nu)
            for i in (0, 1)
        )
        expected, after = adam.update(gradient, state._replace(mu=mu, nu=nu))
        updates, state = stored.update(gradient, state)
        # Updates are about 1; where a gradient cancels the first moment, rounding is what is left.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), updates, expected)
        for stored_nu, new_nu in zip(jax.tree.leaves(state.nu), jax.tree.leaves(after.nu), strict=True):
            codes = np.maximum(255 + 8 * np.log2(np.sqrt(np.asarray(new_nu, np.float64))), 0)
            assert (abs(np.asarray(stored_nu) - codes) < 1 + 1e-2).all()


def test_moments_in_8_bits_decay_with_every_beta():
    """A second moment goes down without gradients, by beta2 a step on average, where rounding to the nearest stays."""
    rng = print_seed()
    beta2, steps = rng.choice([0.95, 0.99, 0.999]), 400
    stored = store_moments(optax.scale_by_adam(b1=0.9, b2=beta2), "8bit", 1.0)
    params = {"a": jnp.zeros(2048)}
    state = stored.init(params)._replace(nu={"a": jnp.full(2048, rng.integers(150, 250), jnp.uint8)})
    before = int(state.nu["a"][0])
    update = jax.jit(lambda state: stored.update({"a": jnp.zeros(2048)}, state)[1])
    for _ in range(steps):
        state = update(state)
    # 8 codes an octave of the root, whose logarithm falls by half of nu's: each step goes down a code or none.
    down = 8 * 0.5 * np.log2(1 / beta2)
    deviation = np.sqrt(steps * down * (1 - down) / 2048)
    # A level of about 200 in float32 is wrong by less than 1e-4.
    fallen = before - np.asarray(state.nu["a"], np.float64).mean()
    assert abs(fallen - steps * down) < 8 * deviation + steps * 1e-4


def test_moments_in_8_bits_keep_the_size_of_updates():
    """After many steps of random gradients: stored roots scatter by less than a fifth, and updates have no bias."""
    rng = print_seed()
    scale, n, steps = float(np.exp(rng.uniform(-15, -3))), 4096, 300
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    stored, params = store_moments(adam, "8bit", 1.0), jnp.zeros(n)

    def step(states: Any, key: jax.Array) -> tuple[Any, Any]:
        gradient = scale * jax.random.normal(key, (n,))
        narrow, wide = stored.update(gradient, states[0]), adam.update(gradient, states[1])
        return (narrow[1], wide[1]), (narrow[0], wide[0])

    keys = jax.random.split(jax.random.key(rng.integers(2**31)), steps)
    run = jax.jit(lambda states: jax.lax.scan(step, states, keys))
    (narrow, wide), updates = run((stored.init(params), adam.init(params)))
    ratio = np.sqrt(np.asarray(wide.nu, np.float64) / unpacked(narrow.mu, narrow.nu, 1.0)[1])
    # Steps of 9% at random make a deviation of 0.11, so that a mean of 4,096 deviates by 0.002.
    assert 0.05 < ratio.std() < 0.2
    assert abs(ratio.mean() - 1) < 0.03
    new, exact = (np.asarray(x[steps // 2 :], np.float64) for x in updates)
    assert abs((new * exact).sum() / (exact**2).sum() - 1) < 0.03


def test_moments_in_8_bits_do_not_depend_on_the_mesh():
    rng = print_seed()
    optimizer = make_optimizer(OptimizerConfig(Schedule(10, 0.1, schedule="wsd"), AdamW(moments="8bit")))
    weights = {"layers": {"x": {"weight": rng.normal(size=(2, 8, 16)).astype(np.float32)}}}
    gradient = jax.tree.map(lambda x: (rng.normal(size=x.shape) * 1e-2).astype(np.float32), weights)

    def run(mesh: jax.sharding.Mesh, spec: P) -> Any:
        with jax.set_mesh(mesh):
            place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)  # noqa: E731
            params, given = place(weights), place(gradient)
            state = jax.jit(optimizer.init)(params)
            more = {"step": jnp.int32(0), "norm": jnp.float32(1.0)}
            updates, state = jax.jit(optimizer.update)(given, state, params, **more)
            return jax.tree.map(np.asarray, (updates, state))

    one = run(make_mesh({}, jax.devices()[:1]), P(None, None, None))
    four = run(make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4]), P(None, "fsdp", "tensor"))
    jax.tree.map(np.testing.assert_array_equal, one, four)


def test_moments_in_8_bits_need_a_bounded_ratio():
    with pytest.raises(InputError, match=r"beta1\^2 below beta2, got 0\.95 and 0\.9"):
        AdamW(moments="8bit", beta1=0.95, beta2=0.9)


def test_moments_in_8_bits_need_an_eps_that_covers_second_moments_stored_as_zero():
    """With the largest clip_norm that is allowed, an update is at most twice Adam's, also where gradients vanish."""
    rng = print_seed()
    eps, beta1, beta2 = float(np.exp(rng.uniform(-25, -7))), 0.9, rng.choice([0.9, 0.95, 0.999])
    most = eps * (1 - beta2) ** 0.5 * 2**31.75
    with pytest.raises(InputError, match=r"clip_norm of at most 2\^31\.75 eps sqrt\(1 - beta2\) = .*, got "):
        AdamW(moments="8bit", eps=eps, beta2=beta2, clip_norm=1.001 * most)
    AdamW(moments="8bit", eps=eps, beta2=beta2, clip_norm=0.999 * most)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps)
    stored = store_moments(adam, "8bit", most)
    # Of all magnitudes, most of all about the least root.
    gradient = {"a": jnp.asarray(eps * np.exp2(np.append(rng.uniform(-8, 31, 500), rng.uniform(-4, 2, 500))))}
    none = jax.tree.map(jnp.zeros_like, gradient)
    narrow, wide = stored.init(gradient), adam.init(gradient)
    for given in (gradient, none):
        updates, narrow = stored.update(given, narrow)
        expected, wide = adam.update(given, wide)
        # A ratio is rounded by less than 1/8 of it, or by 2^-9 where it is small.
        assert (abs(updates["a"]) <= 2 * abs(expected["a"]) + 0.02).all()
    assert (np.asarray(narrow.nu["a"]) == 0).any()
