"""The layer kernel: lowering and use in decoding anywhere, numerics where there is a GPU."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.attention.quantized_cache import KVDtype
from qwen_jax.errors import InputError
from qwen_jax.inference import one_row
from qwen_jax.kernels.decode import layer, layer_gpu
from qwen_jax.kernels.decode.layer_gpu import feed_forward, layer_tail, norm_product, output_product
from qwen_jax.kernels.decode.layer_gpu_products import CHUNK, MAX_TILE, divide_product
from qwen_jax.kernels.gpu.device import multiprocessors
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh, padded_width
from qwen_jax.published import published
from tests.helpers.layer_cases import (
    EPS,
    ON_HOPPER,
    check_texts,
    error,
    generate,
    logits_of_both,
    one_layer_cache,
    plain_kernels,
    plain_product,
    plain_tail,
)

_MODELS = [f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")]


def _sizes(name: str) -> tuple[int, int, int, int, int]:
    """Hidden size, feed-forward size, query heads x head_dim, all of q, k and v, and vocabulary size."""
    c = published(name)
    heads = c.num_heads * c.head_dim
    return c.hidden_size, c.intermediate_size, heads, heads + 2 * c.num_kv_heads * c.head_dim, c.vocab_size


def _shapes(name: str, head: bool) -> list[jax.ShapeDtypeStruct]:
    D, F, I, R, V = _sizes(name)
    sizes = (I,), (D,), (D, I), (D,), (2, F, D), (D, F), (D,), (V if head else R, D)
    return [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes] + [jax.ShapeDtypeStruct((1,), jnp.int32)]


@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("blocks", [132, 114, 78])
def test_a_divided_product_covers_every_row_and_is_balanced(name: str, blocks: int) -> None:
    """Tiles cover the matrix, and on a whole chip no block has 30% more bytes than an equal share."""
    D, F, I, R, V = _sizes(name)
    assert layer_gpu.supports(D, F, I, R, V)
    for n, k, gates, may_split in (
        (D, I, 1, True),
        (F, D, 2, False),
        (D, F, 1, True),
        (R, D, 1, False),
        (V, D, 1, False),
    ):
        p = divide_product(n, k, gates, may_split, blocks)
        assert p.tile % 8 == 0
        assert 8 <= p.tile <= min(n, MAX_TILE)
        assert p.items // p.splits * p.tile >= n
        assert p.splits == 1 or (may_split and p.items <= blocks)
        longest = -(-p.items // blocks) * p.tile * -(-(k // CHUNK) // p.splits) * CHUNK
        if D >= 3584 and blocks == 132:
            assert longest * blocks <= 1.3 * n * k, (p, longest * blocks / n / k)


@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("head", [False, True])
def test_lowers_for_hopper_to_one_kernel_without_copies_of_weights(name: str, head: bool) -> None:
    """It fits on a multiprocessor, the counter is updated in place, and nothing of the size of a weight is created."""
    step = jax.jit(functools.partial(layer_tail, eps=EPS, out_dtype=jnp.float32 if head else jnp.bfloat16))
    text = step.trace(*_shapes(name, head)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert len(re.findall(r"output_tuple_indices = \[\d+\],\s*operand_index = 1\b", text)) == 1
    done = set(re.findall(r"stablehlo\.(\w+)", text))
    assert done <= {"custom_call", "output_operand_alias", "reshape"}, done


@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("head", [False, True])
def test_the_first_product_fits_in_shared_memory(name: str, head: bool) -> None:
    """For every published model, with tiles of any size: buffers, their alignment and barriers."""
    _, stream, *_, norm, w, _ = _shapes(name, head)
    step = jax.jit(functools.partial(norm_product, eps=EPS, out_dtype=jnp.float32 if head else jnp.bfloat16))
    assert step.trace(stream, norm, w).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def _shard_arguments(name: str, shards: int) -> dict[str, tuple[Any, list[jax.ShapeDtypeStruct]]]:
    """The kernels of a tensor shard, and the shapes of their arguments."""
    D, F, I, R, V = _sizes(name)
    f, i = padded_width(F, shards, quantized=False) // shards, I // shards

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    stream, added, counter = array(D), array(D, dtype=jnp.float32), array(1, dtype=jnp.int32)
    return {
        "output": (output_product, [array(i), array(D, i)]),
        "feed forward": (
            functools.partial(feed_forward, eps=EPS),
            [stream, added, stream, array(2, f, D), array(D, f), counter],
        ),
        "qkv": (functools.partial(norm_product, eps=EPS), [stream, stream, array(R // shards, D), added]),
        "head": (
            functools.partial(norm_product, eps=EPS, out_dtype=jnp.float32),
            [stream, stream, array(V // shards, D), added],
        ),
    }


@pytest.mark.parametrize(("name", "shards"), [(f"qwen2.5-{size}", n) for size in ("7b", "32b", "72b") for n in (2, 4)])
@pytest.mark.parametrize("kernel", ["output", "feed forward", "qkv", "head"])
@pytest.mark.draw(6)
def test_kernels_of_a_tensor_shard_lower_for_hopper(name: str, shards: int, kernel: str) -> None:
    """Each is one kernel, and nothing of the size of a weight is created beside it."""
    assert layer.supports(published(name), shards)
    function, shapes = _shard_arguments(name, shards)[kernel]
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    done = set(re.findall(r"stablehlo\.(\w+)", text))
    assert done <= {"custom_call", "output_operand_alias", "reshape", "reduce", "constant", "add", "return"}, done


def test_sizes_of_a_shard_decide_about_its_kernels() -> None:
    """0.5B has 7 heads of 64 on each of two devices; the experts of an MoE model are not cut."""
    assert not layer.supports(published("qwen2.5-0.5b"), 2)
    assert not layer.supports(published("qwen1.5-moe-a2.7b"), 2)


def test_unsupported_arguments_are_refused() -> None:
    def zeros(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.zeros(shape, dtype)

    good = [zeros(*s.shape, dtype=s.dtype) for s in _shapes("qwen2.5-0.5b", head=False)]
    for index, bad in ((0, zeros(128)), (2, good[2].astype(jnp.float32)), (4, zeros(2, 4864, 768)), (6, zeros(1, 896))):
        with pytest.raises(InputError, match="one model's sizes"):
            layer_tail(*good[:index], bad, *good[index + 1 :], eps=EPS)
    with pytest.raises(InputError, match="multiple of 128"):
        norm_product(zeros(320), zeros(320), zeros(64, 320), eps=EPS)
    assert not layer_gpu.supports(896, 4864, 896, 1152, 151_937)
    assert not layer_gpu.supports(896, 4800, 896, 1152, 151_936)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves are tested there")
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "tiny-untied"], ids=["tied", "untied"])
def test_a_step_with_the_kernels_equals_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the right weights, norms, positions and slots: with plain functions in their place, the decode
    loop gives the text of the model, and a step its logits."""
    config = dataclasses.replace(published(name), num_layers=2, vocab_size=512)
    expected = generate(config)
    calls = plain_kernels(monkeypatch)
    got = generate(config)
    assert calls == ["first", "attention", "tail", "attention", "tail"]
    check_texts(got, expected)
    by_kernels, by_model = logits_of_both(config, count=3)
    assert error(by_kernels, by_model) < 2e-2


def test_only_one_row_on_one_device_is_supported() -> None:
    config, options = published("qwen2.5-0.5b"), Options(stacked=False, fused=True, dtype="bfloat16")
    cache = one_layer_cache(config)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])) as _:
        sharding = Sharding(kv_heads=config.num_kv_heads)
        assert one_row.supports(config, sharding, options, 1, cache) == ON_HOPPER
        assert not one_row.supports(config, sharding, options, 2, cache)
        assert not one_row.supports(config, sharding, dataclasses.replace(options, dtype="float32"), 1, cache)
        assert not one_row.supports(config, sharding, dataclasses.replace(options, fused=False), 1, cache)


if ON_HOPPER:

    def drawn(name: str, head: bool) -> list[jax.Array]:
        """Random bfloat16 arguments of `layer_tail`, without the counter."""
        keys = iter(jax.random.split(jax.random.key(0), 16))
        scales = 1.0, 1.0, 0.02, 0.1, 0.02, 0.02, 0.1, 0.02
        args = [
            (scale * jax.random.normal(next(keys), s.shape)).astype(jnp.bfloat16)
            for s, scale in zip(_shapes(name, head), scales, strict=False)
        ]
        args[3], args[6] = 1 + args[3], 1 + args[6]
        return args

    @pytest.mark.parametrize("name", _MODELS[:5])
    @pytest.mark.parametrize("head", [False, True])
    def test_the_kernel_is_correct_every_time(name: str, head: bool) -> None:
        """Against float32 products with the same roundings; 100 runs with one counter are bit-identical."""
        args = drawn(name, head)
        dtype = jnp.float32 if head else jnp.bfloat16
        run = functools.partial(layer_tail, *args, eps=EPS, out_dtype=dtype, blocks=multiprocessors())
        stream, out, counter = run(jnp.zeros((1,), jnp.int32))
        truth = jax.jit(functools.partial(plain_tail, out_dtype=dtype))(*args, counter)
        assert int(counter[0]) == 3 * 1024
        # A bfloat16 rounding is an error of 1.7e-3 and there are several; a different rounding changes what follows.
        assert error(stream, truth[0]) < 8e-3
        assert error(out, truth[1]) < 8e-3
        for _ in range(100):
            again, out_again, counter = run(counter)
            np.testing.assert_array_equal(np.asarray(again), np.asarray(stream))
            np.testing.assert_array_equal(np.asarray(out_again), np.asarray(out))
        first = norm_product(args[1], args[6], args[7], eps=EPS, out_dtype=dtype, blocks=multiprocessors())
        assert error(first, plain_product(args[1], args[6], args[7], out_dtype=dtype)) < 4e-3

    @pytest.mark.parametrize(("name", "shards"), [("qwen2.5-7b", 2), ("qwen2.5-14b", 4)])
    def test_the_kernels_of_tensor_shards_add_up_to_the_layer(name: str, shards: int) -> None:
        """Against float32 products with the same roundings, shard after shard on one device; 100 runs are identical."""
        args = drawn(name, False)
        heads, stream, w_o, mid, w_gate_up, w_down, norm, w_next = args
        zero, how = jnp.zeros((1,), jnp.int32), {"eps": EPS, "blocks": multiprocessors()}

        def run(counter: jax.Array) -> list[Any]:
            parts = zip(*(jnp.split(x, shards, 0 if x is heads else 1) for x in (heads, w_o)), strict=True)
            attended = sum(output_product(*part, blocks=multiprocessors()) for part in parts)
            inner = zip(*(jnp.split(x, shards, axis=1) for x in (w_gate_up, w_down)), strict=True)
            found = [feed_forward(stream, attended, mid, *part, counter, **how) for part in inner]
            after = found[0][0], norm, w_next, sum(out for _, out, _ in found)
            return [found[0][2], *norm_product(*after, **how)]

        counter, *got = run(zero)
        assert int(counter[0]) == 1024
        want = jax.jit(plain_tail)(*args, zero)
        for a, b in zip(got, want, strict=False):
            assert error(a, b) < 8e-3
        for _ in range(100):
            for a, b in zip(run(counter)[1:], got, strict=True):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    def test_counter_wraps_around() -> None:
        """2^32 is a whole number of rounds: at the end of its range the counter continues from zero."""
        shapes = _shapes("qwen2.5-0.5b", head=False)
        args = [jnp.ones(s.shape, jnp.bfloat16) * 0.01 for s in shapes[:-1]]
        run = functools.partial(layer_tail, *args, eps=EPS, blocks=multiprocessors())
        *expected, _ = run(jnp.zeros((1,), jnp.int32))
        *got, counter = run(jnp.full((1,), -2048, jnp.int32))
        assert int(counter[0]) == 1024
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    @pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
    def test_decoding_with_the_kernels_equals_the_model(kv_dtype: KVDtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole loop, with overlapping launches, compared with the code for larger batches."""
        config = dataclasses.replace(published("qwen2.5-0.5b"), num_layers=3, vocab_size=4096)
        got = generate(config, kv_dtype)
        np.testing.assert_array_equal(got, generate(config, kv_dtype))
        jax.clear_caches()
        monkeypatch.setattr(one_row, "supports", lambda *_: False)
        check_texts(got, generate(config, kv_dtype), 4)
