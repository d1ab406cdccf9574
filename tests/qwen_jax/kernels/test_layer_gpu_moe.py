"""The layer kernel for MoE: shares, lowering, refusals and use anywhere, numerics where something can run it."""

import contextlib
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.decode.benchmark import abstract_weights, step_bytes
from experiments.kernels import layer
from experiments.kernels.layer import program
from experiments.kernels.layer import shapes as shapes_and_bytes
from qwen_jax.config import ModelConfig, MoE
from qwen_jax.errors import InputError
from qwen_jax.inference import one_row
from qwen_jax.kernels.decode import layer_gpu_moe, layer_gpu_products
from qwen_jax.kernels.decode.layer_gpu_moe import divide_two_products, layer_tail, router_and_gate
from qwen_jax.kernels.decode.layer_gpu_products import CHUNK, MAX_TILE, divide_product, share
from qwen_jax.kernels.gpu.device import multiprocessors
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from tests.helpers.layer_cases import (
    EPS,
    ON_HOPPER,
    check_texts,
    error,
    generate,
    logits_of_both,
    one_layer_cache,
    plain_experts_tail,
    plain_kernels,
)

_MODELS = ["qwen1.5-moe-a2.7b", "qwen2-57b-a14b"]
# As many experts as a token selects, and a last tile of the head that overlaps, among others.
_SMALL = [MoE(8, 2, 128, 256), MoE(60, 4, 128, 384, norm_topk_prob=True), MoE(7, 7, 256, 128), MoE(3, 1, 256, 128)]


def _shapes(config: ModelConfig, head: bool) -> list[jax.ShapeDtypeStruct]:
    D, I, moe = config.hidden_size, config.num_heads * config.head_dim, config.moe
    assert moe is not None
    E, F, S, R = (
        moe.num_experts,
        moe.intermediate_size,
        moe.shared_intermediate_size,
        -(-(moe.num_experts + 1) // 8) * 8,
    )
    N = config.vocab_size if head else I + 2 * config.num_kv_heads * config.head_dim
    weights = (R, D), (2, S, D), (E, 2, F, D), (D, S), (E, D, F)
    sizes: tuple[tuple[int, ...], ...] = ((I,), (D,), (D, I), (D,), *weights, (D,), (N, D))
    return [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes] + [jax.ShapeDtypeStruct((1,), jnp.int32)]


def _drawn(config: ModelConfig, head: bool = False, ties: bool = False) -> list[jax.Array]:
    """Arguments of `layer_tail`; with ties, every second expert has the router weights of the previous one."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    scales = 1.0, 1.0, 0.02, 0.1, 0.05, 0.02, 0.02, 0.02, 0.02, 0.1, 0.02
    args = [
        (scale * jax.random.normal(next(keys), s.shape)).astype(jnp.bfloat16)
        for s, scale in zip(_shapes(config, head), scales, strict=False)
    ]
    args[3], args[9] = 1 + args[3], 1 + args[9]
    if ties:
        assert config.moe is not None
        pairs = np.arange(config.moe.num_experts) // 2 * 2
        args[4] = args[4].at[: len(pairs)].set(args[4][pairs])
    return args


def _small(moe: MoE, vocab: int = 264) -> ModelConfig:
    return dataclasses.replace(
        published("tiny-untied"), hidden_size=256, num_heads=3, num_kv_heads=1, head_dim=128, vocab_size=vocab, moe=moe,
        intermediate_size=512,
    )  # fmt: skip


@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("blocks", [132, 114, 78, 3])
def test_two_products_are_distributed_together(name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of every expert and split belongs to a block; on a whole chip none has 10% more than an equal share."""
    monkeypatch.setattr(pl, "multiple_of", lambda x, _: x)  # vmap does not support it
    config = published(name)
    D, moe = config.hidden_size, config.moe
    assert moe is not None
    F, S, k = moe.intermediate_size, moe.shared_intermediate_size, moe.num_experts_per_tok
    for shared, experts, gates in (((S, D), (F, D), 2), ((D, S), (D, F), 1)):
        products = divide_two_products(shared, experts, gates, k, blocks)
        load = np.zeros(blocks)
        for product, n in zip(products, (1, k), strict=True):
            assert product.experts == n
            assert product.tile % 8 == 0
            assert product.tile <= MAX_TILE
            done = np.zeros((n, product.outputs, product.inputs // CHUNK), bool)
            for block in range(blocks):
                monkeypatch.setattr(jax.lax, "axis_index", lambda _, block=block: jnp.int32(block))
                count, item = share(product, blocks)
                for row, part, start, steps in np.stack(jax.vmap(item)(jnp.arange(int(count))), 1):
                    done[part // product.splits, row : row + product.tile, start : start + steps] = True
                    load[block] += gates * product.tile * steps
            assert done.all()
        even = gates * (shared[0] * shared[1] + k * experts[0] * experts[1]) / CHUNK / blocks
        if blocks == 132:
            assert load.max() <= 1.1 * even


@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("head", [False, True])
def test_lowers_for_hopper_to_one_kernel_without_copies_of_weights(name: str, head: bool) -> None:
    """It fits on a multiprocessor, the counter is updated in place, and nothing of the size of a weight is created."""
    config = published(name)
    step = functools.partial(layer_tail, moe=config.moe, eps=EPS, out_dtype=jnp.float32 if head else jnp.bfloat16)
    text = jax.jit(step).trace(*_shapes(config, head)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert len(re.findall(r"output_tuple_indices = \[\d+\],\s*operand_index = 1\b", text)) == 1
    done = set(re.findall(r"stablehlo\.(\w+)", text))
    assert done <= {"custom_call", "output_operand_alias", "reshape"}, done


@pytest.mark.parametrize("name", layer.MODELS)
def test_the_benchmark_counts_the_bytes_of_a_decode_step(name: str) -> None:
    config, mesh = published(name), make_mesh({}, jax.devices()[:1])
    matrices = shapes_and_bytes(config)[1] * config.num_layers + 2 * config.vocab_size * config.hidden_size
    read = step_bytes(abstract_weights(config, mesh), config, Sharding.for_inference(config, mesh), 1, 0)
    assert read == pytest.approx(matrices, rel=2e-4)  # biases and norms


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", *_MODELS])
def test_the_benchmarks_loop_lowers_to_one_kernel(name: str) -> None:
    config = published(name)
    sizes, I = shapes_and_bytes(config)[0], config.num_heads * config.head_dim
    if config.moe is not None:
        sizes[2] = -(-sizes[2][0] // 8) * 8, config.hidden_size
    heads, stream, *weights = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((I,), (config.hidden_size,), *sizes))
    traced = program(config, 132).trace(heads, stream, jax.ShapeDtypeStruct((1,), jnp.int32), [weights] * 2)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def test_unsupported_arguments_are_refused() -> None:
    moe = _SMALL[0]
    good = [jnp.zeros(s.shape, s.dtype) for s in _shapes(_small(moe), head=False)]
    bad = {0: (128,), 1: (128,), 4: (8, 256), 5: (2, 256, 128), 6: (8, 2, 256, 256), 8: (7, 256, 128), 10: (8, 128)}
    for index, shape in bad.items():
        with pytest.raises(InputError, match="one model's sizes"):
            layer_tail(*good[:index], jnp.zeros(shape, jnp.bfloat16), *good[index + 1 :], moe=moe, eps=EPS)
    with pytest.raises(InputError, match="one model's sizes"):
        layer_tail(*good[:6], good[6].astype(jnp.float32), *good[7:], moe=moe, eps=EPS)
    with pytest.raises(InputError, match="multiple of 128"):
        divide_two_products((192, 192), (128, 192), 2, 4, 132)
    sizes = 384, 640, 264
    assert layer_gpu_moe.supports(256, moe, *sizes)
    for wrong in ({"intermediate_size": 192}, {"shared_intermediate_size": 64}, {"num_experts": 256}):
        assert not layer_gpu_moe.supports(256, dataclasses.replace(moe, **wrong), *sizes)


def test_one_row_of_an_moe_model_is_supported_where_the_kernel_is() -> None:
    options = Options(stacked=False, fused=True, dtype="bfloat16")

    def takes(config: ModelConfig, options: Options = options) -> bool:
        with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
            return one_row.supports(config, Sharding(kv_heads=config.num_kv_heads), options, 1, one_layer_cache(config))

    a27b = published("qwen1.5-moe-a2.7b")
    assert a27b.moe is not None
    mixed = dataclasses.replace(a27b, intermediate_size=11264, moe=dataclasses.replace(a27b.moe, mlp_only_layers=(0,)))
    for config in (a27b, published("qwen2-57b-a14b"), mixed):
        assert takes(config) == ON_HOPPER
        assert not takes(config, dataclasses.replace(options, capacity_factor=1.0))
    for change in ({"num_experts": 256}, {"intermediate_size": 192}, {"shared_intermediate_size": 192}):
        assert not takes(dataclasses.replace(a27b, moe=dataclasses.replace(a27b.moe, **change)))


def test_router_and_gate_are_one_matrix_padded_to_eight_rows() -> None:
    for E in (3, 7, 8, 60):
        both = router_and_gate(jnp.ones((E, 16)), jnp.full((1, 16), 2.0))
        assert both.shape == (-(-(E + 1) // 8) * 8, 16)
        np.testing.assert_array_equal(both[:, 0], [1.0] * E + [2.0] + [0.0] * (both.shape[0] - E - 1))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves are tested there")
@pytest.mark.parametrize("dense", [(), (1,)], ids=["all sparse", "mixed"])
def test_a_step_with_the_kernels_equals_the_model(dense: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the right weights: with plain functions in their place, the decode loop gives the result of the
    model."""
    moe = MoE(8, 2, 32, 64, norm_topk_prob=bool(dense), mlp_only_layers=dense)
    config = dataclasses.replace(published("tiny-untied"), num_layers=3, vocab_size=512, moe=moe)
    expected = generate(config)
    calls = plain_kernels(monkeypatch)
    got = generate(config)
    tails = ["tail" if i in dense else "experts" for i in range(3)]
    assert calls == ["first", *(x for tail in tails for x in ("attention", tail))]
    check_texts(got, expected)


def _check_steps(config: ModelConfig) -> None:
    got, expected = logits_of_both(config)
    errors = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.sort(errors)[len(errors) * 3 // 4] < 0.02, errors


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves are tested there")
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_logits_of_a_step_equal_those_of_the_model(norm_topk_prob: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU below, with plain functions in place of the kernels."""
    plain_kernels(monkeypatch)
    moe = MoE(8, 2, 256, 512, norm_topk_prob=norm_topk_prob, mlp_only_layers=(1,))
    _check_steps(dataclasses.replace(_small(moe, 512), num_layers=3))


def _check(config: ModelConfig, args: list[jax.Array], blocks: int) -> None:
    """Against float32 products with the same roundings."""
    truth = jax.jit(functools.partial(plain_experts_tail, moe=config.moe))(*args, jnp.zeros((1,), jnp.int32))
    got = layer_tail(*args, jnp.zeros((1,), jnp.int32), moe=config.moe, eps=EPS, blocks=blocks)
    # A bfloat16 rounding is an error of 1.7e-3 and there are several; a different rounding changes what follows.
    assert error(got[0], truth[0]) < 8e-3
    assert error(got[1], truth[1]) < 8e-3


if jax.__version_info__ >= (0, 11) and jax.default_backend() == "cpu":
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
    from jax._src.pallas.mosaic_gpu.interpret import params as interpret_params

    def _imitate(monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces what the interpreter cannot run: blocks are a cluster, whose barriers stand for the counter; the
        input of a product goes through shared memory; the last free slots need not be waited for."""
        mesh, wgmma, launch = plgpu.Mesh, plgpu.wgmma, layer_gpu_products.launch
        staging: list[Any] = []

        def launch_cluster(body: Any, *args: Any, **more: Any) -> Any:
            def with_stand_ins(*refs: Any, staged: Any, barriers: Any, **scratch: Any) -> None:
                staging[:] = [staged]
                nth = iter(range(4))

                def arrive(*_: Any) -> Any:
                    here = barriers.at[next(nth)]
                    plgpu.barrier_arrive(here)
                    return here

                monkeypatch.setattr(layer_gpu_moe, "arrive", arrive)
                wait = lambda *_: plgpu.barrier_wait(barriers.at[1])  # noqa: E731
                monkeypatch.setattr(layer_gpu_moe, "wait_for_all_blocks", wait)
                monkeypatch.setattr(layer_gpu_moe, "grid_barrier", lambda *_: plgpu.barrier_wait(arrive()))
                body(*refs, **scratch)

            cluster_barriers = plgpu.ClusterBarrier(collective_axes=("block",), num_barriers=4)
            staged = plgpu.SMEM((64, CHUNK), jnp.bfloat16)
            return launch(with_stand_ins, *args, staged=staged, barriers=cluster_barriers, **more)

        def wgmma_from_memory(acc: Any, x: jax.Array, w: Any) -> None:
            staging[0][...] = x
            wgmma(acc, staging[0], w)

        def store_first_row(ref: Any, rows: jax.Array) -> None:
            ref[...] = rows[0].astype(ref.dtype)

        def deallocate(barrier: Any) -> None:
            with barrier.cv:
                barrier.ref_count -= 1

        def mesh_of_cluster(grid: Any, grid_names: Any, **more: Any) -> Any:
            return mesh(grid=(), grid_names=(), cluster=grid, cluster_names=grid_names, **more)

        monkeypatch.setattr(plgpu, "Mesh", mesh_of_cluster)
        monkeypatch.setattr(plgpu, "wgmma", wgmma_from_memory)
        monkeypatch.setattr(layer_gpu_moe, "launch", launch_cluster)
        monkeypatch.setattr(layer_gpu_products, "_store_first_row", store_first_row)
        monkeypatch.setattr(shared_memory.Barrier, "deallocate", deallocate)
        for name in ("wait_for_previous_kernel", "allow_next_kernel"):
            monkeypatch.setattr(layer_gpu_moe, name, lambda: None)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("moe", "blocks", "ties"),
        [
            (_SMALL[0], 1, False),
            (_SMALL[1], 3, False),
            (_SMALL[1], 1, True),
            (_SMALL[2], 2, False),
            (_SMALL[3], 2, True),
        ],
    )
    def test_numerics_and_races_in_the_interpreter(
        moe: MoE, blocks: int, ties: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With memory that starts as NaN. Tiles have eight rows, so that none overlap: rows that two blocks write with
        the same result would count as a race."""
        _imitate(monkeypatch)
        for module in (layer_gpu_products, layer_gpu_moe):
            monkeypatch.setattr(module, "MAX_TILE", 8)
        how = interpret_params.InterpretGPUParams(
            out_of_bounds_reads="uninitialized", inline_mgpu="ignore", detect_races=True
        )
        config = _small(moe)
        with contextlib.ExitStack() as stack:
            for clear in (layer_tail.clear_cache, divide_product.cache_clear, divide_two_products.cache_clear):
                clear()
                stack.callback(clear)
            stack.enter_context(interpret_params.force_gpu_interpret_mode(how))
            _check(config, _drawn(config, ties=ties), blocks)
            assert not gpu_callbacks.get_races().races_found


if ON_HOPPER:

    @pytest.mark.parametrize("moe", [*_SMALL, *(published(name).moe for name in _MODELS)])
    @pytest.mark.parametrize("ties", [False, True])
    def test_the_kernel_is_correct_every_time(moe: MoE, ties: bool) -> None:
        """100 runs with one counter are bit-identical; of experts that are equally likely, the first is selected."""
        config = next((published(name) for name in _MODELS if published(name).moe == moe), _small(moe))
        args = _drawn(config, ties=ties)
        blocks = multiprocessors()
        _check(config, args, blocks)
        run = functools.partial(layer_tail, *args, moe=moe, eps=EPS, blocks=blocks)
        *expected, counter = run(jnp.zeros((1,), jnp.int32))
        assert int(counter[0]) == 4 * 1024
        for _ in range(100):
            *got, counter = run(counter)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    @pytest.mark.parametrize("dense", [(), (1,)], ids=["all sparse", "mixed"])
    @pytest.mark.parametrize("norm_topk_prob", [False, True])
    def test_decoding_with_the_kernels_equals_the_model(
        dense: tuple[int, ...], norm_topk_prob: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A step against the path of larger batches. A rounding may give a token another expert, so most tokens count.

        The whole loop, whose launches overlap, gives the same text every time.
        """
        moe = MoE(8, 2, 256, 512, norm_topk_prob=norm_topk_prob, mlp_only_layers=dense)
        config = dataclasses.replace(_small(moe, 4096), num_layers=3)
        _check_steps(config)
        taken, takes = [], one_row.supports
        monkeypatch.setattr(one_row, "supports", lambda *args: taken.append(takes(*args)) or taken[-1])
        first, again = generate(config), generate(config)
        assert taken
        assert all(taken)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
