"""Decode steps of the runner by fused kernels: they get the right weights, positions, pages and counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention.quantized_cache import KVDtype
from qwen_jax.config import ModelConfig
from qwen_jax.inference import one_row, runner_lowering
from qwen_jax.inference.buckets import RunnerConfig
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.inference.runner_programs import Pages, StaticArgs, decode, decode_options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers import decode_cases
from tests.helpers.layer_cases import drawn, error, in_dtype, logits_of_both, plain_kernels

SETTINGS = RunnerConfig(max_seqs=4, max_length=64, page_size=16, num_pages=20, max_batched_tokens=16)


def decoded(
    config: ModelConfig,
    rows: int,
    seed: int,
    axes: dict[str, int] | None = None,
    padding: int = 0,
    kv_dtype: KVDtype = "auto",
) -> tuple[np.ndarray, Pages, StaticArgs, Any]:
    """Logits and pages after a decode step of rows with random texts, of which the last one of several is padding.

    Each row has four pages, and `padding` more entries in its table.
    """
    rng, axes = np.random.default_rng(seed), axes or {}
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values()), dtype=int))])
    options, sharding, params = drawn(config, mesh, rng)
    static = StaticArgs(config, sharding, options, config.vocab_size, SETTINGS)
    table = rng.permutation(SETTINGS.num_pages)[: rows * 4].reshape(rows, 4)
    table = np.pad(table, ((0, 0), (0, padding)), "edge")
    packed = np.concatenate([table, np.arange(rows)[:, None], rng.integers(0, 64, (rows, 1)), np.ones((rows, 1))], 1)
    if rows > 1:
        packed[-1, -3:] = SETTINGS.max_seqs, 0, 0
    with jax.set_mesh(mesh):
        shape = SETTINGS.num_pages, sharding.kv_heads, SETTINGS.page_size, config.head_dim
        where = jax.NamedSharding(mesh, sharding.cache)
        pages = Pages(*(
            tuple(
                in_dtype(jax.device_put(jnp.bfloat16(rng.standard_normal(shape)), where), kv_dtype, key, rng)
                for _ in range(2)
            )
            for key in (True, False)
        ))  # fmt: skip
        tokens = jnp.asarray(rng.integers(0, config.vocab_size, SETTINGS.max_seqs + 1), jnp.int32)
        run = jax.jit(lambda *args: decode(static, *args, proposed=0))
        logits, pages = run(params, pages, tokens, jnp.asarray(packed, jnp.int32))
    return np.asarray(logits, np.float64), pages, static, params


def check_same(got: Any, want: Any, rows: int) -> None:
    real = slice(0, max(rows - 1, 1))
    # The inner vector of a feed-forward layer is rounded at another place: an error of 2e-3 in each layer.
    assert error(got[0][real], want[0][real]) < 2e-2
    for x, y in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert error(x, y) < 5e-3
        # At most the new tokens' keys and values differ by rounding.
        assert (x != y).any(axis=(1, 3)).sum() <= rows


@pytest.mark.parametrize("rows", [1, 3])
def test_a_longer_page_table_changes_nothing(rows: int) -> None:
    """On a GPU, XLA passes a kernel the slice of one row's table without a copy once it has 256 bytes, as here."""
    config = dataclasses.replace(published("qwen2.5-0.5b"), num_layers=2, vocab_size=256)
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    check_same(decoded(config, rows, seed, padding=60), decoded(config, rows, seed), rows)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves run there")
@pytest.mark.parametrize("axes", [{}, {"tensor": 2}], ids=str)
def test_the_model_passes_the_right_arguments_to_the_paged_step(
    axes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if jax.device_count() < np.prod(list(axes.values()), dtype=int):
        pytest.skip("Needs 2 devices.")
    config = dataclasses.replace(published("tiny"), num_layers=2, vocab_size=160)
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    want, calls = decoded(config, 3, seed, axes), []

    def step(*args: jax.Array, scale: float) -> Any:
        calls.append(1)
        return decode_cases.paged_plain(*args, scale=scale)

    monkeypatch.setattr(kernels, "supports_decode_step", lambda *_: True)
    monkeypatch.setattr(kernels, "paged_decode_step", step)
    check_same(decoded(config, 3, seed, axes), want, 3)
    assert calls


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves run there")
@pytest.mark.parametrize("scheme", [None, Scheme("int4", 16, "bfloat16", "zero"), Scheme("int8")], ids=str)
@pytest.mark.parametrize("name", ["tiny", "tiny-untied"])
def test_one_row_on_a_tensor_axis_equals_the_model(
    name: str, scheme: Scheme | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device has its heads, its part of the feed-forward layer and of the vocabulary; their results are added."""
    if jax.device_count() < 4:
        pytest.skip("Needs 4 devices.")
    quantization = None if scheme is None else Quantization(scheme)
    config = dataclasses.replace(published(name), num_layers=2, vocab_size=160, quantization=quantization)
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    # Four shards have more key/value heads than the model.
    axes = {"tensor": 2 if name == "tiny" else 4}
    want = decoded(config, 1, seed, axes)
    calls = plain_kernels(monkeypatch)
    got = decoded(config, 1, seed, axes)
    if scheme is None:
        assert calls == ["first", *["attention", "output", "feed forward", "first"] * 2]
    else:
        assert calls == ["quantised first", *["attention", "quantised"] * 2, "first"]
    check_same(got, want, 1)
    monkeypatch.setattr(kernels, "supports_decode_step", lambda *_: True)
    _, pages, static, _ = got
    with jax.set_mesh(make_mesh(axes, jax.devices()[: axes["tensor"]])):
        assert decode_options(static, pages, 1, 64) is None


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves run there")
@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_one_row_by_two_kernels_a_layer_equals_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its program is compiled with the options of these kernels, unlike those of more rows or with adapters."""
    config = dataclasses.replace(published(name), num_layers=2, vocab_size=160)
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    want = decoded(config, 1, seed)
    supports = one_row.supports
    calls = plain_kernels(monkeypatch)
    got = decoded(config, 1, seed)
    assert calls[:2] == ["first", "attention"]
    assert len(calls) == 1 + 2 * config.num_layers
    check_same(got, want, 1)

    monkeypatch.setattr(one_row, "supports", supports)
    monkeypatch.setattr(kernels, "supports_decode_step", lambda *_: True)
    monkeypatch.setattr(one_row.layer_kernels, "supports", lambda *_: True)
    used: list[Any] = []
    jit = jax.jit

    def recorded(*args: Any, compiler_options: Any = None, **kwargs: Any) -> Any:
        used.append(compiler_options)
        return jit(*args, **kwargs)

    _, pages, static, params = got
    adapters = dataclasses.replace(static, options=dataclasses.replace(static.options, adapter_ranks=(("o", 8),)))
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        assert decode_options(adapters, pages, 1, 64) is None
        assert decode_options(static, pages, 1, 64) is not None
    monkeypatch.setattr(runner_lowering.jax, "jit", recorded)
    for program in (Program("decode", 1, slots=64), Program("decode", 3, slots=64), Program("clear")):
        used.clear()
        runner_lowering.prepare(program, static, make_mesh({}, jax.devices()[:1]), params)
        assert used[0] == (one_row.COMPILER_OPTIONS if program.rows == 1 and program.kind == "decode" else None)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves run there")
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("scheme", [None, Scheme("int4", 16, "bfloat16", "zero")], ids=str)
def test_one_row_with_a_cache_in_8_bits_equals_the_model(
    scheme: Scheme | None, kv_dtype: KVDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pages and without: the logits, the new token's codes and scales, and nothing else that has changed."""
    quantization = None if scheme is None else Quantization(scheme)
    config = dataclasses.replace(published("tiny"), num_layers=2, vocab_size=160, quantization=quantization)
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    want = decoded(config, 1, seed, kv_dtype=kv_dtype)
    calls = plain_kernels(monkeypatch)
    got = decoded(config, 1, seed, kv_dtype=kv_dtype)
    assert calls == (["first", "tail", "tail"] if scheme is None else ["quantised first", *["quantised"] * 2, "first"])
    assert error(got[0], want[0]) < 2e-2
    for mine, models in zip((*got[1].keys, *got[1].values), (*want[1].keys, *want[1].values), strict=True):
        x, y = (np.asarray(rows.dequantized(jnp.float32)) for rows in (mine, models))
        assert error(x, y) < 2e-2
        assert (np.asarray(mine.scales_BKS) != np.asarray(models.scales_BKS)).any(axis=1).sum() <= 1
        assert (x != y).any(axis=(1, 3)).sum() <= 1
        np.testing.assert_array_equal(mine.channels_Kd, models.channels_Kd) if mine.channels_Kd is not None else None
    by_kernels, by_model = logits_of_both(config, count=3, kv_dtype=kv_dtype)
    assert error(by_kernels, by_model) < 2e-2


@pytest.mark.parametrize(
    ("model", "codes", "shards", "one_by_one"),
    [
        ("qwen2.5-0.5b", None, 1, True),
        ("qwen2.5-0.5b", "int4", 1, False),
        ("qwen2.5-7b", "int4", 1, True),
        ("qwen2.5-7b", "int8", 2, False),
    ],
)
def test_small_quantised_layers_run_in_cuda_graphs(model: str, codes: Any, shards: int, one_by_one: bool) -> None:
    """Others are launched one by one on one device."""
    config, mesh = published(model), make_mesh({"tensor": shards}, jax.devices()[:shards])
    if codes is not None:
        config = dataclasses.replace(config, quantization=Quantization(Scheme(codes, 128)))
    options = one_row.compiler_options(config, Sharding.for_inference(config, mesh))
    assert options == (one_row.COMPILER_OPTIONS if one_by_one else None)
