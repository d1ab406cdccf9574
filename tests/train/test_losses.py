"""Losses of chosen tokens: those of weight 0 never reach the head, and nothing as large as all logits exists."""

import functools
import math
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from train.losses import (
    at_segments,
    chunked_cross_entropy,
    chunked_cross_entropy_and_predictions,
    chunked_log_probs,
    chunked_log_probs_and_entropy,
    segment_sums,
)
from train.token_loss import chunked_token_loss

B, T, D, V = 4, 12, 16, 32
MESHES = [{}, {"fsdp": 2, "tensor": 2}, {"data": 2, "context": 2}]


def generator() -> np.random.Generator:
    """Fresh inputs; the seed is printed with a failure."""
    seed = int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def sharding_on(mesh: Mesh) -> Sharding:
    return Sharding.for_training(published("tiny"), mesh)


def model_of(head: Any, sharding: Sharding) -> Any:
    """What losses need of a model."""
    return SimpleNamespace(
        config=SimpleNamespace(tie_word_embeddings=False), lm_head=SimpleNamespace(weight=head), sharding=sharding
    )


def inputs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Hidden states, head, targets, and weights: all 0 in the first row, and all but one in the last."""
    weights = np.where(rng.random((B, T)) < 0.4, rng.random((B, T)) + 0.1, 0.0).astype(np.float32)
    weights[0] = 0
    weights[-1] = np.arange(T) == 3
    hidden, head = (rng.normal(size=size).astype(np.float32) for size in ((B, T, D), (V, D)))
    return hidden, head, rng.integers(0, V, (B, T)).astype(np.int32), weights


def placed(arrays: tuple[Any, ...], mesh: Mesh) -> list[jax.Array]:
    s = sharding_on(mesh)
    specs = (s.hidden, s.vocab, *(s.tokens,) * (len(arrays) - 2))
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def log_probs_of(hidden: Any, head: Any, targets: Any) -> Any:
    """The plain formula."""
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), jnp.asarray(targets)[..., None], -1)[..., 0]


def close(got: np.ndarray, want: np.ndarray) -> None:
    """Equal up to float32 sums in another order, whose error is that of the largest terms."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5 * max(float(np.abs(want).max()), 1.0))


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("chunk", [5, 100])
def test_compact_cross_entropy_is_the_dense_one(axes: dict[str, int], chunk: int) -> None:
    """Also where hidden states of weight 0 are NaN: they are not read."""
    mesh = make_mesh(axes)
    s, (hidden, head, targets, weights) = sharding_on(mesh), inputs(generator())

    def loss(hidden: Any, head: Any, targets: Any, weights: Any, compact: bool) -> Any:
        sums = chunked_cross_entropy(model_of(head, s), hidden, targets, weights, chunk, 0.1, compact)
        return 3.0 * sums.loss, sums

    with jax.set_mesh(mesh):
        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=4)
        expected = jax.device_get(compute(*placed((hidden, head, targets, weights), mesh), False))
        spoiled = np.where(weights[..., None] == 0, np.nan, hidden)
        got = jax.device_get(compute(*placed((spoiled, head, targets, weights), mesh), True))
        # Nothing counts.
        nothing = jax.device_get(compute(*placed((hidden, head, targets, np.zeros_like(weights)), mesh), True))
    # float32 sums in another order.
    jax.tree.map(close, got, expected)
    assert not got[1][0][weights == 0].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize(("axes", "compact"), list(zip(MESHES, (True, True, False), strict=True)), ids=str)
def test_accuracy_and_entropy_of_predictions_are_those_of_the_plain_formulas(
    axes: dict[str, int], compact: bool
) -> None:
    """Half of the targets are the likeliest tokens. The loss and its gradients are those without the statistics."""
    mesh, rng = make_mesh(axes), generator()
    s, (hidden, head, targets, weights) = sharding_on(mesh), inputs(rng)
    likeliest = (hidden @ head.T).argmax(-1).astype(np.int32)
    targets = np.where(rng.random((B, T)) < 0.5, likeliest, targets)
    log_probs = jax.nn.log_softmax(hidden @ head.T)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)

    def both(hidden: Any, head: Any, *rest: Any) -> Any:
        sums, predictions = chunked_cross_entropy_and_predictions(model_of(head, s), hidden, *rest, 5, 0.1, compact)
        return sums.loss + predictions.entropy, (sums, predictions)

    def alone(hidden: Any, head: Any, *rest: Any) -> Any:
        sums = chunked_cross_entropy(model_of(head, s), hidden, *rest, 5, 0.1, compact)
        return sums.loss, sums

    with jax.set_mesh(mesh):
        arrays = placed((hidden, head, targets, weights), mesh)
        (_, (sums, predictions)), gradients = jax.jit(jax.value_and_grad(both, (0, 1), has_aux=True))(*arrays)
        (_, want), without = jax.jit(jax.value_and_grad(alone, (0, 1), has_aux=True))(*arrays)
    np.testing.assert_allclose(predictions.correct, ((targets == likeliest) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(predictions.entropy, (entropy * weights).sum(), rtol=1e-4)
    # The entropy carries no gradient. The fused passes may round differently.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), (sums, gradients), (want, without)
    )


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_log_probs_and_their_gradients_are_those_of_the_plain_formula(axes: dict[str, int]) -> None:
    mesh, rng = make_mesh(axes), generator()
    s, (hidden, head, targets, weights) = sharding_on(mesh), inputs(rng)
    coefficients = rng.normal(size=(B, T)).astype(np.float32)

    def plain(hidden: Any, head: Any) -> Any:
        found = jnp.where(weights != 0, log_probs_of(hidden, head, targets), 0.0)
        return (found * coefficients).sum(), found

    def chunked(hidden: Any, head: Any, targets: Any, weights: Any, coefficients: Any) -> Any:
        found = chunked_log_probs(model_of(head, s), hidden, targets, weights, 5)
        return (found * coefficients).sum(), found

    expected = jax.device_get(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(hidden, head))
    with jax.set_mesh(mesh):
        compute = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))
        spoiled = np.where(weights[..., None] == 0, np.nan, hidden)
        got = jax.device_get(compute(*placed((spoiled, head, targets, weights, coefficients), mesh)))
    # float32 sums in another order.
    jax.tree.map(close, got, expected)


def test_gradients_of_log_probs_are_finite_differences_in_float64(mesh: Mesh) -> None:
    rng, s = generator(), sharding_on(mesh)
    hidden, head, targets, weights = inputs(rng)
    coefficients = rng.normal(size=(B, T))

    def exact(hidden: np.ndarray, head: np.ndarray) -> float:
        logits = hidden @ head.T
        log_totals = np.log(np.exp(logits).sum(-1))
        picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return float((np.where(weights != 0, picked - log_totals, 0.0) * coefficients).sum())

    def chunked(hidden: Any, head: Any, *rest: Any) -> Any:
        return (chunked_log_probs(model_of(head, s), hidden, *rest, 7) * coefficients.astype(np.float32)).sum()

    with jax.set_mesh(mesh):
        arrays = placed((hidden, head, targets, weights), mesh)
        gradients = jax.device_get(jax.jit(jax.grad(chunked, argnums=(0, 1)))(*arrays))
    for _ in range(5):
        directions = rng.normal(size=hidden.shape), rng.normal(size=head.shape)
        step = 1e-5
        above, below = (exact(*(x + sign * step * d for x, d in zip((hidden, head), directions, strict=True)))
                        for sign in (1, -1))  # fmt: skip
        along = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose(along, (above - below) / (2 * step), rtol=1e-4, atol=1e-3)


def test_gradients_have_the_dtypes_of_what_is_differentiated(mesh: Mesh) -> None:
    """A head in bfloat16, as frozen weights may be, beside hidden states in bfloat16."""
    s, (hidden, head, targets, weights) = sharding_on(mesh), inputs(generator())
    low = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)

    def losses(hidden: Any, head: Any, *rest: Any) -> Any:
        model = model_of(head, s)
        return chunked_cross_entropy(model, hidden, *rest, 5).loss - chunked_log_probs(model, hidden, *rest, 5).sum()

    with jax.set_mesh(mesh):
        compute = jax.jit(jax.grad(losses, argnums=(0, 1)))
        exact = compute(*placed((hidden, head, targets, weights), mesh))
        rounded = compute(*placed((*low, targets, weights), mesh))
    assert {x.dtype for x in rounded} == {jnp.dtype(jnp.bfloat16)}
    for got, want in zip(rounded, exact, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 0.02  # bfloat16 has 8 bits.


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "context": 2}, {"tensor": 2, "context": 4}], ids=str)
def test_segment_sums(axes: dict[str, int]) -> None:
    """In any order of tokens; the gradient of a sum is 1 at the tokens of its segment, and 0 at padding."""
    mesh, rng = make_mesh(axes), generator()
    s, x = sharding_on(mesh), rng.normal(size=(B, 16)).astype(np.float32)
    ids = rng.integers(0, 7, (B, 16)).astype(np.int32)
    coefficients = rng.normal(size=(B, 6)).astype(np.float32)
    expected = np.stack([(x * (ids == s + 1)).sum(1) for s in range(6)], 1)

    def total(x: Any, ids: Any) -> Any:
        sums = segment_sums(x, ids, 6, s)
        return (sums * coefficients).sum(), sums

    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, NamedSharding(mesh, s.tokens)) for a in (x, ids)]
        (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(*arrays)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
    padded = np.pad(coefficients, ((0, 0), (1, 0)))
    np.testing.assert_array_equal(gradient, np.take_along_axis(padded, ids, 1))


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("which", ["dense", "compact", "log-probabilities", "token loss"])
def test_a_frozen_head_costs_no_product(axes: dict[str, int], which: str) -> None:
    """Without a gradient with respect to the head, as with adapters, the compiled program has one product less."""
    mesh = make_mesh(axes)
    s, arrays = sharding_on(mesh), inputs(generator())

    def loss(hidden: Any, head: Any, *rest: Any) -> Any:
        if which == "log-probabilities":
            return chunked_log_probs(model_of(head, s), hidden, *rest, 5).sum()
        if which == "token loss":
            return chunked_token_loss(model_of(head, s), hidden, *rest, lambda x, _: x**2, {}, 5)[0]
        return chunked_cross_entropy(model_of(head, s), hidden, *rest, 5, compact=which == "compact").loss

    def products(differentiated: tuple[int, ...]) -> int:
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss, argnums=differentiated)).lower(*placed(arrays, mesh))
            return lowered.compile({"xla_backend_optimization_level": "0"}).as_text().count(" dot(")

    both = products((0, 1))
    assert both == (4 if which == "log-probabilities" else 3)
    assert products((0,)) == both - 1


@pytest.mark.parametrize("which", ["cross-entropy", "predictions", "log-probabilities", "token loss"])
def test_no_array_as_large_as_all_logits_exists(mesh: Mesh, which: str) -> None:
    """32,768 tokens of a vocabulary of 152,064, from the compiled program of loss and gradients."""
    tokens, vocab, width, chunk, s = 32_768, 152_064, 64, 2048, sharding_on(mesh)

    def loss(hidden: Any, head: Any, *rest: Any) -> Any:
        if which == "cross-entropy":
            return chunked_cross_entropy(model_of(head, s), hidden, *rest, chunk, compact=True).loss
        if which == "predictions":
            sums, found = chunked_cross_entropy_and_predictions(model_of(head, s), hidden, *rest, chunk, compact=True)
            return sums.loss + found.entropy + found.correct
        if which == "token loss":
            return chunked_token_loss(model_of(head, s), hidden, *rest, lambda x, _: x**2, {}, chunk)[0]
        return chunked_log_probs(model_of(head, s), hidden, *rest, chunk).sum()

    def abstract(shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        lowered = compute.lower(
            abstract((1, tokens, width), jnp.bfloat16, s.hidden),
            abstract((vocab, width), jnp.float32, s.vocab),
            abstract((1, tokens), jnp.int32, s.tokens),
            abstract((1, tokens), jnp.float32, s.tokens),
        )
        text = lowered.compile({"xla_backend_optimization_level": "0"}).as_text()
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)}
    assert chunk * vocab in sizes  # The logits of a chunk are there,
    assert max(sizes) == chunk * vocab  # and nothing is larger.


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_temperature_and_entropy_are_those_of_the_plain_formula(axes: dict[str, int]) -> None:
    """Temperature divides logits; entropies come from the same pass, also of logits that are far apart."""
    mesh, rng = make_mesh(axes), generator()
    s, (hidden, head, targets, weights) = sharding_on(mesh), inputs(rng)
    hidden[1] *= 10
    coefficients, temperature = rng.normal(size=(B, T)).astype(np.float32), 0.6

    def plain(hidden: Any, head: Any) -> Any:
        every = jax.nn.log_softmax(hidden @ head.T / temperature)
        picked = jnp.take_along_axis(every, jnp.asarray(targets)[..., None], -1)[..., 0]
        found, entropy = (jnp.where(weights != 0, x, 0.0) for x in (picked, -(jnp.exp(every) * every).sum(-1)))
        return (found * coefficients).sum() + 3.0 * jax.lax.stop_gradient(entropy.sum()), (found, entropy)

    def chunked(hidden: Any, head: Any, targets: Any, weights: Any, coefficients: Any) -> Any:
        arguments = model_of(head, s), hidden, targets, weights, 5, temperature
        found, entropy = chunked_log_probs_and_entropy(*arguments)
        # The entropy carries no gradient.
        return (found * coefficients).sum() + 3.0 * entropy.sum(), ((found, entropy), chunked_log_probs(*arguments))

    expected = jax.device_get(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(hidden, head))
    with jax.set_mesh(mesh):
        compute = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))
        (value, (found, alone)), gradients = jax.device_get(
            compute(*placed((hidden, head, targets, weights, coefficients), mesh))
        )
    # A logit is a float32 sum in another order: its error, a few units in its last place, is the relative error of its
    # probability, and with it of the gradients.
    unit = float(np.finfo(np.float32).eps * np.abs(hidden @ head.T / temperature).max())
    for got, want in zip(jax.tree.leaves(((value, found), gradients)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * unit * max(float(np.abs(want).max()), 1.0))
    np.testing.assert_array_equal(alone, found[0])
    # Far apart, entropies are small and not negative beyond rounding.
    assert (found[1] > -8 * unit).all()


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_token_loss_is_the_function_of_log_probs(axes: dict[str, int]) -> None:
    """One pass gives the loss and the gradients that log-probabilities and a function of them give in two."""
    mesh, rng = make_mesh(axes), generator()
    s, arrays = sharding_on(mesh), inputs(rng)
    old, scale = rng.normal(size=(2, B, T)).astype(np.float32)

    def function(log_probs: Any, given: Any) -> Any:
        # Neither 0 nor without a slope for the zeros that a chunk is padded with.
        return given["scale"] * jnp.exp(0.3 * log_probs - given["old"]) + jnp.square(log_probs + 1.0)

    def in_two(hidden: Any, head: Any, targets: Any, weights: Any, old: Any, scale: Any) -> Any:
        found = chunked_log_probs_and_entropy(model_of(head, s), hidden, targets, weights, 5, 0.8)
        losses = jnp.where(weights != 0, function(found[0], {"old": old, "scale": scale}), 0.0)
        return 3.0 * losses.sum(), found

    def in_one(hidden: Any, head: Any, targets: Any, weights: Any, old: Any, scale: Any) -> Any:
        given = {"old": old, "scale": scale}
        loss, *found = chunked_token_loss(model_of(head, s), hidden, targets, weights, function, given, 5, 0.8)
        return 3.0 * loss, tuple(found)

    with jax.set_mesh(mesh):
        two, one = (
            jax.device_get(jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(
                *placed((*arrays, old, scale), mesh)
            ))
            for f in (in_two, in_one)
        )  # fmt: skip
        evaluated = jax.device_get(jax.jit(in_one)(*placed((*arrays, old, scale), mesh)))
    jax.tree.map(close, one, two)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), evaluated, one[0])


@pytest.mark.parametrize("axes", MESHES[::2], ids=str)
def test_each_token_gets_the_sum_of_its_segment(axes: dict[str, int]) -> None:
    mesh, rng = make_mesh(axes), generator()
    s, x = sharding_on(mesh), rng.normal(size=(B, T)).astype(np.float32)
    ids = rng.integers(0, 5, (B, T)).astype(np.int32)
    sums = np.array([[x_T[ids_T == i].sum() for i in range(5)] for x_T, ids_T in zip(x, ids, strict=True)])
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, NamedSharding(mesh, s.tokens)) for a in (x, ids)]
        got = jax.jit(lambda x, ids: at_segments(segment_sums(x, ids, 3, s), ids, s))(*arrays)
    # Neither padding nor segments beyond the most have one.
    want = np.where((ids > 0) & (ids < 4), np.take_along_axis(sums, ids, 1), 0.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
