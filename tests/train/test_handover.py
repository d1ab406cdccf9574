"""The hand-over of weights: the inference layout of every mesh, and no drift between sampler and trainer."""

import dataclasses
import functools
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference.weights import fuse
from qwen_jax.lora import LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import init_params, param_specs
from qwen_jax.stack import unstack
from tests.helpers.rollouts import DENSE, EXPERTS, FLOAT32, engine_of, gaps, random_prompts, same, weights
from tests.helpers.runs import print_seed
from train.handover import InferenceLayout, make_handover, split_mesh
from train.sampler import Sampler, SamplingConfig
from train.step import StepConfig

UNTIED = dataclasses.replace(DENSE, tie_word_embeddings=not DENSE.tie_word_embeddings)
FEW_HEADS = dataclasses.replace(UNTIED, num_kv_heads=1)
# 1,040 columns on each of two devices: an engine fills them up to 1,152.
PADDED = dataclasses.replace(DENSE, num_layers=1, intermediate_size=2080)


def forbid_host_copies(patch: pytest.MonkeyPatch) -> None:
    """Reading the value of an array on the host raises, also inside JAX."""

    def value(_: Any) -> None:
        raise AssertionError("an array is copied to the host")

    patch.setattr(type(jax.numpy.zeros(1)), "_value", property(value))


@pytest.mark.parametrize(
    ("model", "axes", "targets", "dtype"),
    [
        (DENSE, {}, lambda mesh: [mesh], "float32"),
        (EXPERTS, {"fsdp": 2, "tensor": 2}, lambda mesh: split_mesh(mesh, tensor=2), "bfloat16"),
        (FEW_HEADS, {"fsdp": 4}, lambda mesh: split_mesh(mesh, tensor=2), "float32"),
        (EXPERTS, {"expert": 2, "tensor": 2}, lambda _: [make_mesh({"expert": 2}, jax.devices()[4:])], "float32"),
        (UNTIED, {}, lambda _: [make_mesh({"tensor": 2}, jax.devices()[3:])], "float32"),
        (PADDED, {"fsdp": 2, "tensor": 2}, lambda mesh: split_mesh(mesh, tensor=2), "float32"),
        (EXPERTS, {"fsdp": 4}, lambda mesh: split_mesh(mesh, tensor=2, expert=2), "bfloat16"),
    ],
    ids=[
        "one device",
        "two replicas",
        "parts of another axis",
        "other devices",
        "more devices",
        "padded width",
        "one engine of all devices",
    ],
)
def test_the_layout_is_that_of_fuse(
    model: Any, axes: dict[str, int], targets: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, shapes, dtypes and shardings are those of weights that an engine fuses itself. The program is compiled
    once, and nothing goes through the host. The trainer's weights stay, and share no buffer with the results."""
    mesh = make_mesh(axes)
    params, meshes = weights(model, mesh), targets(mesh)
    layout = InferenceLayout(model, FLOAT32, mesh, meshes, dtype)
    with monkeypatch.context() as patch:
        forbid_host_copies(patch)
        if mesh.size > 1:  # Of one device, the host sees the memory.
            with pytest.raises(AssertionError, match="host"):
                np.asarray(params["embed"]["weight"])
        layout(params)
        found = layout(params)
    assert layout.program._cache_size() == 1
    ours = {s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(params) for s in x.addressable_shards}
    unstacked = jax.device_get({**params, "layers": None})
    with jax.set_mesh(mesh):
        unstacked["layers"] = jax.device_get(unstack(params["layers"], "float32", model.sparse_layers))
    for target, got in zip(meshes, found, strict=True):
        sharding = Sharding.for_inference(model, target)
        specs = param_specs(model, sharding, Options(stacked=False))
        put = jax.tree.map(
            lambda x, spec, target=target: jax.device_put(x.astype(dtype), jax.NamedSharding(target, spec)),
            unstacked,
            specs,
        )
        with jax.set_mesh(target):
            want = fuse(put, model, sharding)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert jax.typeof(x) == jax.typeof(y)
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
            assert not ours & {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_lora_is_merged(scan: bool) -> None:
    """Trained factors and frozen weights, stacked or as a list of layers in the compute dtype, as the step has them."""
    lora = LoRA(rank=2, whole=("norm",))
    mesh = make_mesh({})
    full = weights(EXPERTS, mesh)
    # What is trained whole is not among the frozen ones.
    frozen: Any = {name: value for name, value in full.items() if name != "norm"}
    with jax.set_mesh(mesh):
        trained = init_params(EXPERTS, jax.random.key(1), mesh, lora=lora, frozen=frozen)
        trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), trained)
        if not scan:
            frozen = {**frozen, "layers": unstack(frozen["layers"], "bfloat16", EXPERTS.sparse_layers)}
    step = StepConfig("float32", "none", scan_layers=scan, lora=lora)
    (got,) = InferenceLayout(EXPERTS, step, mesh, [mesh], "float32")(trained, frozen)

    # The same by hand, in float64.
    def layer(tree: Any, number: int) -> Any:
        rows = tree if isinstance(tree, list) else unstack(tree, "float32", EXPERTS.sparse_layers)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), rows[number])

    for number in range(EXPERTS.num_layers):
        with jax.set_mesh(mesh):
            base, factors = layer(frozen["layers"], number), layer(trained["layers"], number)
        q = base["attention"]["q"]["weight"]
        a, b = (factors["attention"]["q"][f"lora_{x}"] for x in "ab")
        q = q + lora.scale * np.tensordot(b, a, 1)
        fused = np.asarray(got["layers"][number]["attention"]["qkv"]["weight"])[0]
        np.testing.assert_allclose(fused[: len(q)], q, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(got["norm"]["weight"]), np.asarray(trained["norm"]["weight"]))


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("model", "axes", "count"),
    [(DENSE, {"fsdp": 2, "tensor": 2}, 2), (EXPERTS, {}, 1)],
    ids=["dense on a mesh", "experts"],
)
def test_no_drift_with_learning_rate_0(model: Any, axes: dict[str, int], count: int) -> None:
    """Over repeated hand-overs of the same weights, sampler and trainer give the same tokens log-probabilities that
    differ by float32 rounding alone: at most 1e-5. Replicas share the prompts, and the prefix cache is on."""
    rng, mesh = print_seed(), make_mesh(axes)
    params, targets = weights(model, mesh), split_mesh(mesh, tensor=mesh.size // count)
    engines = [engine_of(weights(model, mesh, seed=9), model, mesh, target, eos_token_ids=[7]) for target in targets]
    hand_over = make_handover(model, FLOAT32, mesh, engines)
    sampler = Sampler(engines, SamplingConfig(group_size=3, max_new_tokens=24, seed=int(rng.integers(1 << 31))))
    prompts, found = random_prompts(rng, 4), []
    try:
        for version in (1, 1, 2):
            hand_over(params)
            groups = sampler.sample(prompts, version)
            found.append(groups)
            differences = gaps(params, model, mesh, [rollout for group in groups for rollout in group])
            assert differences.max() < 1e-5, f"largest {differences.max()}, mean {differences.mean()}"
        for a, b in zip(*found[:2], strict=True):
            for x, y in zip(a, b, strict=True):
                same(x, y)
        assert found[1][0][0].ids != found[2][0][0].ids
    finally:
        for engine in engines:
            engine.close()


def test_after_an_update_an_engine_is_a_fresh_engine() -> None:
    """With the prefix cache on, nothing of the old weights is left; and the first weights come back exactly."""
    rng, mesh = print_seed(), make_mesh({}, jax.devices()[:1])
    first, second = (weights(DENSE, mesh, seed) for seed in (1, 2))
    prompts = [dataclasses.replace(p, ids=[*range(40), *p.ids]) for p in random_prompts(rng, 3)]
    config = SamplingConfig(group_size=2, max_new_tokens=8)
    fresh = []
    for params in (first, second):
        with engine_of(params, DENSE, mesh, mesh) as engine:
            fresh.append(Sampler(engine, config).sample(prompts, 1))
    with engine_of(first, DENSE, mesh, mesh) as engine:
        hand_over, sampler = make_handover(DENSE, FLOAT32, mesh, engine), Sampler(engine, config)
        for params, want in ((None, fresh[0]), (second, fresh[1]), (first, fresh[0])):
            if params is not None:
                hand_over(params)
            for a, b in zip(sampler.sample(prompts, 1), want, strict=True):
                for x, y in zip(a, b, strict=True):
                    same(x, y, atol=0)
            assert sampler.counts.cached_tokens > 0
        x, y = (np.asarray(sampled[0][0].log_probs) for sampled in fresh)
        assert x.shape != y.shape or not np.allclose(x, y, atol=1e-3)


def test_a_failed_hand_over_is_told_and_can_be_repeated(mesh: Any) -> None:
    params, prompts = weights(DENSE, mesh), random_prompts(print_seed(), 1)
    with engine_of(params, DENSE, mesh, mesh) as engine:
        hand_over = make_handover(DENSE, FLOAT32, mesh, engine)
        sampler = Sampler(engine, SamplingConfig(group_size=1, max_new_tokens=4))
        want = sampler.sample(prompts, 0)
        with pytest.raises(ValueError, match=r"structure|mismatch|norm"):
            hand_over({name: value for name, value in params.items() if name != "norm"})
        hand_over(params)
        same(sampler.sample(prompts, 0)[0][0], want[0][0])


@pytest.mark.parametrize("ended", [0, 1])
def test_no_engine_waits_for_one_that_has_ended(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-over fails with what that engine says, before a wait would be given up."""
    limit = 60
    monkeypatch.setattr("train.handover.threading.Barrier", functools.partial(threading.Barrier, timeout=limit))
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    engines = [engine_of(weights(DENSE, one), DENSE, one, one) for one in split_mesh(mesh)]
    try:
        hand_over, params = make_handover(DENSE, FLOAT32, mesh, engines), weights(DENSE, mesh)
        engines[ended].close()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"closed|stopped") as raised:
            hand_over(params)
        assert not isinstance(raised.value, threading.BrokenBarrierError)
        assert time.monotonic() - began < limit
    finally:
        for engine in engines:
            engine.close()


def test_what_does_not_fit_is_refused(mesh: Any) -> None:
    with pytest.raises(InputError, match="divide"):
        split_mesh(make_mesh({"fsdp": 4}), tensor=3)
    with pytest.raises(InputError, match="same axes"):
        InferenceLayout(DENSE, FLOAT32, mesh, [mesh, make_mesh({"tensor": 2})], "float32")
    with engine_of(weights(DENSE, mesh), DENSE, mesh, mesh) as engine:
        other = dataclasses.replace(DENSE, rope_theta=5e4)
        with pytest.raises(InputError, match="rope_theta"):
            make_handover(other, FLOAT32, mesh, engine)
