"""The attention step of decoding: lowering and use in the model anywhere, numerics where there is a GPU."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.errors import InputError
from qwen_jax.inference.programs import StaticArgs, decode, prefill
from qwen_jax.inference.sampling import SamplingParams, SamplingValues
from qwen_jax.kernels.decode import step_gpu
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import abstract_params, param_specs
from qwen_jax.published import published
from tests.helpers import decode_cases
from tests.helpers.decode_cases import CASES, Case

_ON_HOPPER = jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability.startswith("9.")
_TINY = dataclasses.replace(published("tiny"), num_layers=2, vocab_size=160)


def _error(out: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - truth) / np.linalg.norm(truth))


def _check(step: Any, case: Case, within: float, new_within: float) -> None:
    args = decode_cases.inputs(case)
    truth, k, v = decode_cases.expected(args, case.d**-0.5)
    before = [np.asarray(x).view(np.uint16) for x in args[4:6]]
    out, keys, values = step(*args, scale=case.d**-0.5)
    assert _error(out, truth) < within
    for new, old, cache in zip((k, v), before, (np.asarray(keys), np.asarray(values)), strict=True):
        assert _error(cache[:, :, case.slot], new) < new_within
        untouched = np.arange(case.S) != case.slot
        np.testing.assert_array_equal(cache.view(np.uint16)[:, :, untouched], old[:, :, untouched])


@pytest.mark.parametrize("case", [c for c in CASES if c.B * c.S <= 1300], ids=str)
def test_the_reference_path_equals_the_float64_result(case: Case) -> None:
    """So a kernel that equals the float64 result equals the reference path."""
    # Each bfloat16 rounding is a root mean square error of 1.1e-3 to 1.7e-3. Here RoPE rounds its products too.
    _check(jax.jit(decode_cases.plain, static_argnames="scale"), case, within=8e-3, new_within=4e-3)


def test_shares_fill_the_chip_and_each_can_have_a_tile() -> None:
    """At most as many blocks as run at once, unless heads are more; whole clusters; only long caches are split."""
    for rows in range(1, 513):
        for slots in (64, 128, 640, 4096, 32768, 131072, 1_000_064):
            clusters, blocks = step_gpu.shares(rows, slots)
            assert blocks in (1, 2, 4, 8)
            assert clusters * blocks <= slots // step_gpu.TILE
            assert clusters == 1 or blocks == 2
            assert clusters * blocks == 1 or rows * clusters * blocks <= 132
    for rows in (1, 2, 4, 8):  # one row of 7B with a long cache, on fewer or more devices
        for slots in (32768, 1_000_064):
            clusters, blocks = step_gpu.shares(rows, slots)
            assert rows * clusters * blocks >= 0.95 * 132


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 5, 6, 7, 9, 15, 18)], ids=str)
def test_lowers_for_hopper_to_one_kernel_that_updates_the_cache_in_place(case: Case) -> None:
    """The kernel passes the layout inference of Mosaic GPU, and both caches are aliased to its outputs."""
    shapes = jax.eval_shape(lambda: decode_cases.inputs(Case(1, 1, 1, 64, 64, 1, 0)))
    c, R = case, case.H + 2 * case.K
    sizes = (c.B, R, c.d), (R, c.d), (c.B, c.d // 2), (c.B, c.d // 2), *((c.B, c.K, c.S, c.d),) * 2, (c.B,), ()
    args = [jax.ShapeDtypeStruct(size, like.dtype) for size, like in zip(sizes, shapes, strict=True)]
    step = jax.jit(lambda *a: step_gpu.decode_step(*a, scale=1.0))
    text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    outputs = len(jax.tree.leaves(jax.eval_shape(step, *args))) - 2 + (step_gpu.shares(c.B * c.K, c.S)[0] > 1)
    aliases = re.findall(r"output_tuple_indices = \[(\d+)\],\s*operand_index = (\d+)", text)
    assert sorted(aliases) == [(str(outputs), "6"), (str(outputs + 1), "7")]


def test_unsupported_arguments_are_refused() -> None:
    args = list(decode_cases.inputs(Case(1, 4, 2, 64, 96, 5)))  # a cache of one tile and a half
    with pytest.raises(InputError, match="multiple of 64"):
        step_gpu.decode_step(*args, scale=1.0)
    args = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in decode_cases.inputs(CASES[11])]
    with pytest.raises(InputError, match="bfloat16"):
        step_gpu.decode_step(*args, scale=1.0)
    assert not step_gpu.supports(num_heads=18, num_kv_heads=2, head_dim=64, slots=64)
    assert not step_gpu.supports(num_heads=8, num_kv_heads=1, head_dim=96, slots=64)


@pytest.fixture
def as_if_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets cached decoding use the kernel, with the plain step in place of the kernel, and counts its calls."""
    calls: list[int] = []

    def step(*args: jax.Array, scale: float) -> Any:
        calls.append(1)
        return decode_cases.plain(*args, scale=scale)

    monkeypatch.setattr(kernels, "supports_decode_step", lambda implementation, *_: implementation == "auto")
    monkeypatch.setattr(kernels, "decode_step", step)
    return calls


def _generate(axes: dict[str, int], implementation: kernels.Implementation) -> np.ndarray:
    """Log-probabilities [2, 6] of the greedy continuation of two prompts of different length."""
    mesh, sampling = make_mesh(axes), SamplingParams(logprobs=True)
    sharding, options = (
        Sharding.for_inference(_TINY, mesh),
        Options(stacked=False, fused=True, attention=implementation),
    )
    shapes, specs = (f(_TINY, sharding, options) for f in (abstract_params, param_specs))
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct, spec: jax.P) -> jax.Array:
        values = 0.2 * rng.standard_normal(shape.shape, np.float32)
        return jax.device_put(values, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        params = jax.tree.map(draw, shapes, specs)
        static = StaticArgs(_TINY, sharding, options, sampling.mode, slots=64, vocab_limit=_TINY.vocab_size)
        tokens = jax.reshard(jnp.asarray(rng.integers(0, _TINY.vocab_size, (2, 8)), jnp.int32), sharding.tokens)
        lengths, seeds = (jax.reshard(x, sharding.rows) for x in (jnp.array([8, 5]), jnp.zeros(2, jnp.uint32)))
        state, _, _ = prefill(params, tokens, lengths, seeds, SamplingValues.of(sampling), static=static)
        _, _, logprobs = decode(params, state, SamplingValues.of(sampling), static=static, steps=6)
        return np.asarray(logprobs)


@pytest.mark.parametrize("axes", [{}, {"tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_the_model_passes_the_right_arguments_to_the_kernel(as_if_on_hopper: list[int], axes: dict[str, int]) -> None:
    """Projection, bias, tables, slots and first slots are in order on every shard: the result does not change."""
    if jax.device_count() < math.prod(axes.values()):
        pytest.skip(f"Needs {math.prod(axes.values())} devices.")
    expected = _generate(axes, "reference")
    assert not as_if_on_hopper
    got = _generate(axes, "auto")
    # Layers of one kind are traced once.
    assert len(as_if_on_hopper) == 1
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_used_only_where_it_can_run() -> None:
    cache = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.bfloat16)
    assert kernels.supports_decode_step("auto", jnp.bfloat16, 1, 14, 2, cache) == _ON_HOPPER
    assert not kernels.supports_decode_step("reference", jnp.bfloat16, 1, 14, 2, cache)
    assert not kernels.supports_decode_step("auto", jnp.bfloat16, 2, 14, 2, cache)
    assert not kernels.supports_decode_step("auto", jnp.float32, 1, 14, 2, cache)
    assert not kernels.supports_decode_step("auto", jnp.bfloat16, 1, 18, 2, cache)


if _ON_HOPPER:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_kernel_is_correct_and_writes_one_slot(case: Case) -> None:
        """For every published shape; NaN in the slots that no row may see would spread."""
        # The output and each weight are rounded; the new token differs only where float32 and float64 differ at a tie.
        _check(step_gpu.decode_step, case, within=4e-3, new_within=1e-4)

    @pytest.mark.parametrize("case", [CASES[6], CASES[7], CASES[18]], ids=str)
    def test_many_steps_in_a_device_loop_equal_the_reference_path(case: Case) -> None:
        """32 tokens across the end of a tile, each step reading what the previous ones wrote."""
        args, steps = decode_cases.inputs(dataclasses.replace(case, slot=case.slot - 40)), 32

        def run(step: Any) -> np.ndarray:
            def body(carry: Any, _: None) -> Any:
                qkv, keys, values, slot = carry
                out, keys, values = step(qkv, *args[1:4], keys, values, args[6], slot, scale=case.d**-0.5)
                qkv = jnp.roll(qkv, 1, axis=1) + 0.1 * jnp.mean(out)
                return (qkv, keys, values, slot + 1), out

            return np.asarray(jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[1])((args[0], *args[4:6], args[7])))

        out, truth = run(step_gpu.decode_step), run(decode_cases.plain)
        assert _error(out, np.asarray(truth, np.float64)) < 8e-3
