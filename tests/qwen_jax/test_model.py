"""Laws of the model: documents in a row never see each other, padding changes nothing, layouts agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from qwen_jax import kernels
from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, abstract_params, bind, init_params, param_specs
from qwen_jax.published import published
from qwen_jax.remat import Remat

CONFIG = published("tiny-untied")


def random_params(mesh: Mesh, config: ModelConfig = CONFIG, seed: int = 0) -> Params:
    """Initial parameters with everything moved away from zero and one, so that no term can hide."""
    params = init_params(config, jax.random.key(seed), mesh)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    with jax.set_mesh(mesh):
        noisy = [
            leaf + jax.reshard(0.05 * jax.random.normal(key, leaf.shape), jax.typeof(leaf).sharding.spec)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
    return jax.tree.unflatten(treedef, noisy)


def unstack(params: Params) -> Params:
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)]}


def placed(mesh: Mesh, sharding: Sharding, *arrays: Any) -> list[jax.Array]:
    return [jax.device_put(np.asarray(x), jax.NamedSharding(mesh, sharding.tokens)) for x in arrays]


def packed_logits(params: Params, tokens: Any, segments: Any, positions: Any, mesh: Mesh, **options: Any) -> jax.Array:
    sharding = Sharding.for_inference(CONFIG, mesh)
    model = bind(CONFIG, params, sharding, Options(**options))
    logits = model.logits(model(tokens, positions, kernels.packed_mask(segments)).hidden)
    # Whole rows, so that a test may slice the vocabulary.
    return jax.reshard(logits, jax.P(*sharding.rows, None, None))


def two_documents(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row with document A (20 tokens), document B (30 tokens) and padding (14)."""
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (1, 64), dtype=np.int32)
    segments = np.array([[1] * 20 + [2] * 30 + [0] * 14], np.int32)
    positions = np.array([[*range(20), *range(30), *[0] * 14]], np.int32)
    return tokens, segments, positions


def test_document_b_is_bitwise_blind_to_document_a_and_to_padding(mesh: Mesh) -> None:
    """Logits of B, and the gradients of B's loss, are the same bits whatever stands in A and in the padding."""
    tokens, segments, positions = two_documents()
    other = tokens.copy()
    other[:, :20] = two_documents(1)[0][:, :20]
    other[:, 50:] = two_documents(2)[0][:, 50:]
    params = random_params(mesh)
    sharding = Sharding.for_inference(CONFIG, mesh)

    @jax.jit
    def run(params: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> tuple[jax.Array, jax.Array]:
            logits = packed_logits(params, *batch, mesh)[:, 20:50]
            return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 7]), logits

        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, grads

    with jax.set_mesh(mesh):
        first = run(params, *placed(mesh, sharding, tokens, segments, positions))
        second = run(params, *placed(mesh, sharding, other, segments, positions))
    assert np.asarray(first[0]).any()
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_packed_document_equals_the_document_alone(mesh: Mesh) -> None:
    """Within float32 noise of differently grouped sums: 1e-5 of the largest logit."""
    tokens, segments, positions = two_documents()
    sharding = Sharding.for_inference(CONFIG, mesh)
    params = random_params(mesh)
    with jax.set_mesh(mesh):
        packed = packed_logits(params, *placed(mesh, sharding, tokens, segments, positions), mesh)
        b = slice(20, 50)
        alone = placed(mesh, sharding, tokens[:, b], np.ones((1, 30), np.int32), np.arange(30, dtype=np.int32)[None])
        expected = np.asarray(packed_logits(params, *alone, mesh))
    np.testing.assert_allclose(np.asarray(packed)[:, b], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mesh: Mesh, side: str) -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, CONFIG.vocab_size, (1, 24), dtype=np.int32)
    junk = rng.integers(0, CONFIG.vocab_size, (1, 16), dtype=np.int32)
    parts = [(junk, 0), (tokens, 1)] if side == "left" else [(tokens, 1), (junk, 0)]
    row = np.concatenate([part for part, _ in parts], 1)
    segments = np.concatenate([np.full_like(part, number) for part, number in parts], 1)
    positions = np.concatenate([np.arange(part.shape[1], dtype=np.int32)[None] * number for part, number in parts], 1)
    sharding = Sharding.for_inference(CONFIG, mesh)
    params = random_params(mesh)
    with jax.set_mesh(mesh):
        got = np.asarray(packed_logits(params, *placed(mesh, sharding, row, segments, positions), mesh))
        plain = placed(mesh, sharding, tokens, np.ones_like(tokens), np.arange(24, dtype=np.int32)[None])
        expected = np.asarray(packed_logits(params, *plain, mesh))
    np.testing.assert_allclose(got[segments == 1], expected[0], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scan_unrolled_and_remat_agree(mesh: Mesh, remat: Remat, stacked: bool) -> None:
    tokens, segments, positions = two_documents(5)
    sharding = Sharding.for_inference(CONFIG, mesh)
    params = random_params(mesh)

    def loss(params: Params, batch: list[jax.Array], stacked: bool, remat: Remat) -> jax.Array:
        model = bind(CONFIG, params, sharding, Options(stacked=stacked))
        mask = kernels.packed_mask(batch[1])
        hidden = model(batch[0], batch[2], mask, remat=remat).hidden
        return jnp.mean(jax.nn.logsumexp(model.logits(hidden), -1))

    with jax.set_mesh(mesh):
        batch = placed(mesh, sharding, tokens, segments, positions)
        own = params if stacked else unstack(params)
        value, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, stacked, remat)))(own)
        expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, False, "none")))(unstack(params))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    grads = unstack(grads) if stacked else grads
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)


def test_cached_decoding_equals_the_full_pass_token_by_token_and_in_chunks(mesh: Mesh) -> None:
    """Prefill, then a chunk at an offset, then single tokens: the same hidden states as one pass over everything."""
    sharding = Sharding.for_inference(CONFIG, mesh)
    params = unstack(random_params(mesh))
    T, slots = 30, 48
    tokens = np.random.default_rng(4).integers(0, CONFIG.vocab_size, (2, T), dtype=np.int32)

    @jax.jit
    def run(params: Params, tokens: jax.Array, cache: ContiguousCache | None) -> tuple[jax.Array, Any]:
        model, (B, T) = bind(CONFIG, params, sharding, Options(stacked=False)), tokens.shape
        if cache is None:
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
            return model(tokens, positions, kernels.causal_mask(B, T)).hidden, None
        output = model(tokens, cache.positions(T), cache.mask(T), cache=cache)
        return output.hidden, output.cache.advanced(T)

    with jax.set_mesh(mesh):
        expected, _ = run(params, *placed(mesh, sharding, tokens), None)
        lengths = jnp.full((2,), 11, jnp.int32, out_sharding=sharding.rows)
        cache = ContiguousCache.for_prompts(CONFIG, sharding, lengths, slots, jnp.dtype("float32"))
        got = []
        for start, stop in [(0, 11), (11, 20), *((t, t + 1) for t in range(20, T))]:
            x, cache = run(params, *placed(mesh, sharding, tokens[:, start:stop]), cache)
            got.append(np.asarray(x))
    np.testing.assert_allclose(np.concatenate(got, 1), np.asarray(expected), atol=2e-5)


MESHES = [{"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.draw(2)
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_mesh_gives_the_same_logits_and_gradients(axes: dict[str, int]) -> None:
    """CONFIG has two key/value heads, so tensor=4 replicates them."""

    def run(axes: dict[str, int]) -> tuple[np.ndarray, Params]:
        mesh = make_mesh(axes)
        sharding = Sharding.for_inference(CONFIG, mesh)
        params = random_params(mesh)
        rows = [np.concatenate([x] * 8) for x in two_documents(6)]
        rows[0] = np.random.default_rng(7).integers(0, CONFIG.vocab_size, rows[0].shape, dtype=np.int32)

        @jax.jit
        def loss(params: Params, *batch: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = packed_logits(params, *batch, mesh)
            return jnp.mean(jnp.square(logits)), logits

        with jax.set_mesh(mesh):
            batch = placed(mesh, sharding, *rows)
            (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *batch)
            return jax.device_get(logits), jax.device_get(grads)

    logits, grads = run(axes)
    expected, expected_grads = run({})
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-9)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 3}, "num_heads"),
        ({"tensor": 8}, "num_heads"),
        ({"fsdp": 3}, "hidden_size"),
        ({"context": 2}, "context"),
    ],
    ids=str,
)
def test_mesh_that_does_not_divide_is_refused(axes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sharding.for_inference(CONFIG, make_mesh(axes))


def test_initial_parameters_are_ready_for_pretraining(mesh: Mesh) -> None:
    """Deviations as documented, residual branches smaller, zero biases, unit norms, layers not copies of each other."""
    config = published("tiny")
    params = init_params(config, jax.random.key(0), mesh)
    layers = params["layers"]
    assert np.std(params["embed"]["weight"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(layers["attention"]["q"]["weight"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(layers["mlp"]["down"]["weight"]) == pytest.approx(0.02 / 2, rel=0.05), "0.02 / sqrt(2 * 2 layers)"
    assert np.std(layers["attention"]["o"]["weight"]) == pytest.approx(0.02 / 2, rel=0.05)
    assert not np.asarray(layers["attention"]["k"]["bias"]).any()
    assert (np.asarray(layers["input_norm"]["weight"]) == 1).all()
    q = np.asarray(layers["attention"]["q"]["weight"])
    assert not np.array_equal(q[0], q[1])


@pytest.mark.parametrize("options", [Options(), Options(stacked=False), Options(stacked=False, fused=True)], ids=str)
def test_specs_match_the_parameter_tree(options: Options) -> None:
    for name in ("tiny", "tiny-untied"):
        config = published(name)
        sharding = Sharding.for_inference(config, make_mesh({"tensor": 4}))
        shapes = abstract_params(config, sharding, options)
        specs = param_specs(config, sharding, options)
        flat_shapes, flat_specs = (
            jax.tree.leaves(shapes),
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P)),
        )
        assert jax.tree.structure(shapes) == jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, jax.P))
        assert all(len(spec) <= len(shape.shape) for spec, shape in zip(flat_specs, flat_shapes, strict=True))


def test_works_in_both_modes_of_nnx(mesh: Mesh) -> None:
    """Graph mode and tree mode give the same logits."""
    tokens, segments, positions = two_documents()
    sharding = Sharding.for_inference(CONFIG, mesh)
    outputs = []
    for graph in (True, False):
        with nnx.set_graph_mode(graph), jax.set_mesh(mesh):
            params = init_params(CONFIG, jax.random.key(0), mesh)
            outputs.append(packed_logits(params, *placed(mesh, sharding, tokens, segments, positions), mesh))
    np.testing.assert_array_equal(*map(np.asarray, outputs))


def test_attention_refuses_shapes_that_do_not_fit() -> None:
    q, k = jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 4, 2, 8))
    with pytest.raises(InputError, match="multiple of K"):
        kernels.attention(q, jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 3, 8)), kernels.causal_mask(1, 4), scale=1.0)
    with pytest.raises(InputError, match="mask"):
        kernels.attention(q, k, k, kernels.causal_mask(1, 5), scale=1.0)
    with pytest.raises(InputError, match="cudnn needs a GPU"):
        kernels.attention(q, k, k, kernels.causal_mask(1, 4), scale=1.0, implementation="cudnn")


def test_row_that_sees_nothing_is_zero() -> None:
    q, k = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 3, 1, 8))
    mask = kernels.Mask(jnp.array([[1, 2]], jnp.int32), jnp.array([[3, 2]], jnp.int32))
    out = kernels.attention(q, k, k, mask, scale=1.0)
    assert (np.asarray(out)[0, 0] == 1).all()
    assert (np.asarray(out)[0, 1] == 0).all()
