"""Products of few rows with quantised experts: parity with dequantised matrices, what is read, selection, lowering."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import quantized_gpu
from qwen_jax.kernels.matmul.quantized_gpu_few import choose_tiling
from qwen_jax.kernels.matmul.quantized_grouped import (
    QuantizedMatrices,
    grouped_quantized_matmul,
    select_grouped_quantized,
    selected_quantized_matmul,
)
from tests.helpers.gpu_quantized import CAN_INTERPRET, interpreted
from tests.helpers.platforms import as_if_on
from tests.qwen_jax.kernels.test_quantized_gpu import FLOAT8, INT4, INT8, Case, arrays, print_seed


def matrices_of(experts: int, case: Case, numbers: np.random.Generator) -> QuantizedMatrices:
    """Random matrices, one for each expert; the case's rows are not used."""
    each = [arrays(case, numbers)[1:] for _ in range(experts)]
    return QuantizedMatrices(*(None if some[0] is None else jnp.stack(some) for some in zip(*each, strict=True)))


def sizes_of(experts: int, rows: int, numbers: np.random.Generator) -> jax.Array:
    """Rows of each expert, uneven and some of them zero; three of the rows are of no expert."""
    popular = numbers.dirichlet(np.full(experts, 0.5))
    return jnp.asarray(numbers.multinomial(max(rows - 3, 1), popular), jnp.int32)


def error(got: jax.Array, x: jax.Array, matrices: QuantizedMatrices, group: np.ndarray) -> float:
    """The relative error against matrices that are not rounded."""
    w = np.asarray(matrices.values(jnp.float32), np.float64)
    x64 = np.asarray(x.astype(jnp.float32), np.float64)
    want = np.stack([w[g] @ row for g, row in zip(group, x64, strict=False)])
    return float(np.linalg.norm(np.asarray(got.astype(jnp.float32))[: len(group)] - want) / np.linalg.norm(want))


def check(experts: int, rows: int, case: Case, implementation: str) -> None:
    """Sorted and selected rows are the products of their experts' matrices; rows of no expert are zero."""
    numbers = print_seed()
    matrices, sizes = matrices_of(experts, case, numbers), sizes_of(experts, rows, numbers)
    x = jnp.asarray(numbers.standard_normal((rows, case[2])), jnp.bfloat16)
    group = np.repeat(np.arange(experts), sizes)
    got = grouped_quantized_matmul(x, matrices, sizes, implementation=implementation)
    # Matrices ("plain") and results are rounded to bfloat16, 2^-9 at most each.
    assert error(got, x, matrices, group) < 4e-3
    assert not np.asarray(got[len(group) :]).any()
    chosen = jnp.asarray(numbers.integers(0, experts, min(rows, 16)), jnp.int32)
    got = selected_quantized_matmul(x[: len(chosen)], matrices, chosen, implementation=implementation)
    assert error(got, x, matrices, np.asarray(chosen)) < 4e-3


CASES: list[tuple[int, int, Case]] = [
    (5, 37, (1, 64, 128, 32, INT4, jnp.float16, "zero")),
    (3, 150, (1, 64, 64, 32, INT8, jnp.float32, "min")),
    (8, 4, (1, 64, 64, 64, FLOAT8, jnp.float32, "none")),
]


@pytest.mark.parametrize(("experts", "rows", "case"), CASES, ids=str)
def test_plain_is_the_product_of_the_dequantised_matrices(experts: int, rows: int, case: Case) -> None:
    check(experts, rows, case, "plain")


@pytest.mark.parametrize("codes", [INT4, INT8, FLOAT8], ids=str)
def test_numerics_on_a_tpu(codes: Any) -> None:
    """In the interpreter; groups, sizes and offsets are drawn, and some experts have no rows or several bundles."""
    numbers = print_seed()
    group = int(numbers.choice([32, 64, 128, 0]))
    K = 128 * int(numbers.integers(1, 4))
    offset = "none" if codes == FLOAT8 else str(numbers.choice(["none", "zero", "min"]))
    matrix = 16 * int(numbers.integers(1, 12)), K, group or K, codes, jnp.float16, offset
    experts, rows = int(numbers.integers(2, 7)), int(numbers.integers(1, 90))
    print(experts, rows, matrix)
    with as_if_on("TPU"):
        check(experts, rows, (1, *matrix), "tpu")


def test_tpus_take_the_kernel_for_few_rows_and_say_what_it_lacks() -> None:
    matrices = shapes(6, (1, 192, 128, 64, INT4, jnp.float16, "zero"))
    narrow = shapes(6, (1, 192, 128, 16, INT4, jnp.float16, "zero"))
    with as_if_on("TPU"):
        assert select_grouped_quantized("auto", 256, jnp.bfloat16, matrices) == "tpu"
        assert select_grouped_quantized("auto", 2048, jnp.bfloat16, matrices) == "plain"
        assert select_grouped_quantized("auto", 256, jnp.bfloat16, narrow) == "plain"
        with pytest.raises(InputError, match="groups of at least 32 inputs"):
            select_grouped_quantized("tpu", 256, jnp.bfloat16, narrow)
        x = jnp.zeros((4, 128), jnp.bfloat16)
        sizes = jnp.asarray([4, 0, 0, 0, 0, 0], jnp.int32)
        real = matrices_of(6, (1, 192, 128, 64, INT4, jnp.float16, "zero"), np.random.default_rng())
        with pytest.raises(InputError, match="by tpu have no gradient"):
            jax.grad(lambda x: grouped_quantized_matmul(x, real, sizes).astype(jnp.float32).sum())(x)


def test_an_order_of_inputs_and_the_gradient_are_those_of_dequantised_matrices() -> None:
    """With one order for gate and one for up of each expert; the gradient is that with respect to the rows."""
    numbers = print_seed()
    E, F, K, rows = 3, 8, 32, 20
    codes = jnp.asarray(numbers.integers(-8, 8, (E, 2, F, K)), jnp.int8)
    order = jnp.asarray(np.stack([[numbers.permutation(K) for _ in range(2)] for _ in range(E)]), jnp.int32)
    scales = jnp.asarray(numbers.uniform(0.5, 1.5, (E, 2, F, 4)), jnp.float32)
    matrices, sizes = QuantizedMatrices(codes, scales, order=order), jnp.asarray([9, 0, 11], jnp.int32)
    x = jnp.asarray(numbers.standard_normal((rows, K)), jnp.float32)
    w = matrices.values(jnp.float32)[np.repeat(np.arange(E), sizes)]
    for e, side in ((0, 0), (2, 1)):
        own = (codes[e, side].reshape(F, 4, -1) * scales[e, side][..., None]).reshape(F, K)
        np.testing.assert_allclose(matrices.value(jnp.int32(e), jnp.float32)[side * F :][:F, order[e, side]], own)
    want, pull = jax.vjp(lambda x: jnp.einsum("mk,mnk->mn", x, w, precision="highest"), x)
    with jax.default_matmul_precision("highest"):
        got, own_pull = jax.vjp(lambda x: grouped_quantized_matmul(x, matrices, sizes, implementation="plain"), x)
        gradient = own_pull(want)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(gradient, pull(want)[0], rtol=1e-4, atol=1e-1)


def shapes(experts: int, case: Case) -> QuantizedMatrices:
    return jax.eval_shape(lambda: matrices_of(experts, case, np.random.default_rng(0)))


@pytest.mark.parametrize("implementation", ["plain", "gpu"])
def test_no_values_of_all_experts_exist(implementation: str) -> None:
    """No array of floats is as large as the matrices of all experts; the kernel's program has none of one expert."""
    E, N, K = 6, 192, 128
    args = jax.ShapeDtypeStruct((20, K), jnp.bfloat16), shapes(E, (1, N, K, 64, INT4, jnp.float16, "zero"))

    def run(x: jax.Array, matrices: QuantizedMatrices, sizes: jax.Array) -> jax.Array:
        return grouped_quantized_matmul(x, matrices, sizes, implementation=implementation)

    with as_if_on("Hopper GPU"):
        traced = jax.jit(run).trace(*args, jax.ShapeDtypeStruct((E,), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == (implementation == "gpu")
    assert not re.search(rf"tensor<{E}x{N}x(2x64|{K})x(f32|bf16)>", text)
    if implementation == "gpu":
        assert not re.search(rf"tensor<(1x)?{N}x(2x64|{K})x(f32|bf16)>", text)


def test_hopper_takes_the_kernel_for_few_rows_and_says_what_it_lacks() -> None:
    case: Case = (1, 192, 128, 64, INT4, jnp.float16, "zero")
    matrices = shapes(6, case)
    ordered = QuantizedMatrices(matrices.weight, matrices.scales, order=jax.ShapeDtypeStruct((6, 128), jnp.int32))
    with as_if_on("Hopper GPU"):
        assert select_grouped_quantized("auto", 256, jnp.bfloat16, matrices) == "gpu"
        assert select_grouped_quantized("auto", 256, jnp.float32, matrices) == "plain"
        assert select_grouped_quantized("auto", 256, jnp.bfloat16, ordered) == "plain"
        with pytest.raises(InputError, match="desc_act"):
            select_grouped_quantized("gpu", 256, jnp.bfloat16, ordered)
        with pytest.raises(InputError, match="at most 1024 rows"):
            select_grouped_quantized("gpu", 2048, jnp.bfloat16, matrices)
    with as_if_on("CPU"), pytest.raises(InputError, match="a Hopper GPU"):
        select_grouped_quantized("gpu", 4, jnp.bfloat16, matrices)


@pytest.mark.parametrize("least", [1, 4, 32])
def test_no_tile_has_more_parts_than_the_tiling_says(least: int) -> None:
    """For any number of bundles from the least one on, as the kernel computes the share of a block."""
    for n, k, at_once in ((2816, 2048, 128), (2048, 1408, 128), (2048, 1408, 32), (192, 128, 64)):
        p = choose_tiling(7, n, k, 4, at_once, least)
        tiles, steps = -(-n // (64 * p.high)), -(-k // (p.chunk * p.wide))
        for used in (least, least + 1, 3 * least, 92):
            unit = steps if p.parts == 1 else 1
            share = max(p.share, -(-used * tiles * steps // (p.blocks * unit)) * unit)
            assert share * p.blocks >= used * tiles * steps
            ends = ((t * steps, t * steps + steps - 1) for t in range(used * tiles))
            assert max(last // share - first // share + 1 for first, last in ends) <= p.parts


# With minima, the interpreter needs more threads than a machine of two cores has.
if CAN_INTERPRET:

    @pytest.mark.parametrize(
        ("multiprocessors", "experts", "rows", "case"),
        [
            (4, 3, 12, (1, 192, 640, 128, INT4, jnp.float16, "zero")),
            (2, 4, 5, (1, 128, 256, 256, FLOAT8, jnp.bfloat16, "none")),
        ],
        ids=str,
    )
    def test_numerics_in_the_interpreter(multiprocessors: int, experts: int, rows: int, case: Case) -> None:
        with as_if_on("Hopper GPU"), interpreted(multiprocessors):
            check(experts, rows, case, "gpu")


if jax.default_backend() == "gpu":

    @pytest.mark.parametrize(("experts", "rows"), [(60, 4), (60, 32), (60, 256), (8, 1024), (4, 700)])
    @pytest.mark.parametrize(
        "matrix",
        [
            (2816, 2048, 128, INT4, jnp.float16, "none"),
            (2048, 1408, 128, INT4, jnp.float16, "zero"),
            (2048, 1408, 32, INT4, jnp.float32, "min"),
            (2048, 1408, 128, INT8, jnp.bfloat16, "zero"),
            (320, 1088, 1088, FLOAT8, jnp.float32, "none"),
        ],
        ids=str,
    )
    def test_numerics_on_the_gpu(experts: int, rows: int, matrix: tuple[Any, ...]) -> None:
        check(experts, rows, (1, *matrix), "gpu")


def test_arguments_that_do_not_match_are_refused() -> None:
    matrices = shapes(6, (1, 192, 128, 64, INT4, jnp.float16, "none"))
    i = (
        jax.ShapeDtypeStruct((3,), jnp.int32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    x = jax.ShapeDtypeStruct((3, 8, 128), jnp.bfloat16)

    def run(x: jax.Array, *bundles: jax.Array) -> jax.Array:
        def product(x: jax.Array, w: jax.Array, s: jax.Array, *b: jax.Array) -> jax.Array:
            which = quantized_gpu.Bundles(*b)
            out: jax.Array = quantized_gpu.grouped_matmul(x, which, w, s, rows=1, least=1)
            return out

        return jax.eval_shape(product, x, matrices.weight, matrices.scales, *bundles)

    assert run(x, *i).shape == (3, 8, 192)
    for wrong in (jax.ShapeDtypeStruct((3, 16, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4, 8, 128), jnp.bfloat16)):
        with pytest.raises(InputError, match="counts \\[T\\]"):
            run(wrong, *i)
