"""Grouped products of rounded rows: parity with float64, invariances, selection, and the TPU compiler."""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.grouped_codes import grouped_code_matmul, select_grouped_codes
from qwen_jax.kernels.matmul.quantized import rounded_rows
from qwen_jax.kernels.matmul.quantized_grouped import QuantizedMatrices, grouped_quantized_matmul
from qwen_jax.kernels.select import log_once
from qwen_jax.moe.dispatch import multiply_sorted, times_scales
from qwen_jax.moe.router import MoEContext
from tests.helpers.platforms import as_if_on
from tests.helpers.tpu_compiler import TOPOLOGIES, compile_for, needs_libtpu
from tests.qwen_jax.kernels.test_quantized_gpu import print_seed

DTYPES = ["int8", "float8_e4m3fn"]


def drawn(rng: np.random.Generator, dtype: Any, G: int, N: int, K: int, M: int) -> tuple[Any, ...]:
    """Rounded rows of lengths that differ, their scales, matrices, and sizes of groups, some of them empty.

    At least the last row is of no group; the scales of such rows are NaN.
    """
    x = jnp.asarray(rng.normal(size=(M, K)) * rng.lognormal(size=(M, 1)), jnp.float32)
    codes, scales = rounded_rows(x, dtype)
    w = rng.integers(-127, 128, (G, N, K)) if dtype == "int8" else rng.normal(size=(G, N, K)).clip(-4, 4) * 100
    matrices = QuantizedMatrices(
        jnp.asarray(w, jnp.float32).astype(dtype), jnp.asarray(rng.uniform(0.5, 1.5, (G, N, 1)) / 100, jnp.float32)
    )
    sizes = rng.multinomial(rng.integers(M), rng.dirichlet(np.full(G, 0.5))).astype(np.int32)
    return codes.astype(dtype), scales.at[int(sizes.sum()) :].set(jnp.nan), matrices, sizes


def run(codes: Any, scales: Any, matrices: Any, sizes: Any, implementation: str = "tiles", **how: Any) -> np.ndarray:
    how.setdefault("dtype", jnp.float32)
    y = grouped_code_matmul(codes, scales, matrices, jnp.asarray(sizes), implementation=implementation, **how)
    return np.asarray(y, np.float64)


def exact(codes: Any, scales: Any, matrices: Any, sizes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the sum of the magnitudes of its terms."""
    x, w, a, b = (
        np.asarray(z.astype(jnp.float32), np.float64) for z in (codes, matrices.weight, scales, matrices.scales)
    )
    both = []
    for x_, w_ in ((x, w), (np.abs(x), np.abs(w))):
        y = np.zeros((len(x), w.shape[1]))
        for g, end in enumerate(np.cumsum(sizes)):
            own = slice(end - sizes[g], end)
            y[own] = x_[own] @ w_[g].T * a[own] * b[g, :, 0]
        both.append(y)
    return both[0], both[1]


def sizes_of_a_draw(rng: np.random.Generator) -> tuple[int, int, int, int]:
    return tuple(int(n) for n in rng.integers([1, 1, 1, 1], [9, 100, 700, 300]))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_float64(dtype: str) -> None:
    """Sums of int8 are exact: what remains is three roundings to float32. Rows of no group are zero."""
    rng = print_seed()
    for _ in range(3):
        args = drawn(rng, dtype, *sizes_of_a_draw(rng))
        got, (want, terms) = run(*args), exact(*args)
        K, used = args[0].shape[1], int(args[3].sum())
        bound = 4 * 2.0**-24 * np.abs(want) if dtype == "int8" else (K + 4) * 2.0**-24 * terms
        assert (np.abs(got - want) <= bound + 1e-37).all()
        assert (got[used:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_values_in_float32(dtype: str) -> None:
    """The dequantised matrix times the codes of the rows, whose sums are in float32, is the same up to that."""
    rng = print_seed()
    codes, scales, matrices, sizes = args = drawn(rng, dtype, *sizes_of_a_draw(rng))
    x = codes.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        wide = grouped_quantized_matmul(x, matrices, jnp.asarray(sizes), implementation="plain")
    used = int(sizes.sum())
    other = np.asarray(times_scales(wide, scales), np.float64)[:used]
    bound = 2 * (codes.shape[1] + 4) * 2.0**-24 * exact(*args)[1][:used]
    assert (np.abs(run(*args)[:used] - other) <= bound + 1e-37).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_experts_and_their_order_change_no_bit(dtype: str) -> None:
    """Experts in another order, more experts without rows, and other rows beside one's own."""
    rng = print_seed()
    codes, scales, matrices, sizes = args = drawn(rng, dtype, *sizes_of_a_draw(rng))
    first, G = run(*args), len(sizes)
    order = rng.permutation(G)
    starts = np.cumsum(sizes) - sizes
    own = [np.arange(starts[g], starts[g] + sizes[g]) for g in order]
    rows = np.concatenate([*own, np.arange(sizes.sum(), len(codes))]).astype(int)
    some = jax.tree.map(lambda x: x[order], matrices)
    np.testing.assert_array_equal(run(codes[rows], scales[rows], some, sizes[order]), first[rows])
    more = jax.tree.map(lambda x: jnp.concatenate([x[:1], x, x[:1]]), matrices)
    np.testing.assert_array_equal(run(codes, scales, more, np.concatenate([[0], sizes, [0]]).astype(np.int32)), first)
    # On an expert axis, a device has some of the experts and their rows.
    half, begin = G // 2, int(sizes[: G // 2].sum())
    mine = jax.tree.map(lambda x: x[half:], matrices)
    np.testing.assert_array_equal(run(codes[begin:], scales[begin:], mine, sizes[half:]), first[begin:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_the_inputs_add_up(dtype: str) -> None:
    """On a tensor axis each device has a part of the inputs, with the same scales; so up to roundings to float32."""
    rng = print_seed()
    codes, scales, matrices, sizes = args = drawn(rng, dtype, 4, 30, 256, 90)
    parts = [slice(0, 128), slice(128, 256)]
    shards = (QuantizedMatrices(matrices.weight[..., part], matrices.scales) for part in parts)
    got = sum(run(codes[:, part], scales, shard, sizes) for part, shard in zip(parts, shards, strict=True))
    _, terms = exact(*args)
    assert (np.abs(got - run(*args)) <= 2 * 260 * 2.0**-24 * terms + 1e-37).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numerics_on_a_tpu(dtype: str) -> None:
    """In the interpreter. Sums of int8 are exact, so that rows are bit-identical to the plain path's."""
    rng = print_seed()
    G, n, k, M = (int(i) for i in rng.integers([1, 1, 1, 1], [7, 4, 4, 900]))
    args = drawn(rng, dtype, G, 128 * n, 128 * k, M)
    used = int(args[-1].sum())
    for fill in (True, False):
        with as_if_on("TPU"):
            got = run(*args, "tpu", dtype=jnp.bfloat16, fill=fill)
        if dtype == "int8":
            np.testing.assert_array_equal(got[:used], run(*args, dtype=jnp.bfloat16)[:used])
        want, terms = exact(*args)
        bound = 2.0**-8 * np.abs(want) + 128 * k * 2.0**-24 * terms
        assert (np.abs(got - want) <= bound)[:used].all()
        assert not fill or (got[used:] == 0).all()


def abstract(codes: str, N: int = 256, K: int = 128, groups: int = 1, **more: Any) -> QuantizedMatrices:
    shape = jax.ShapeDtypeStruct
    return QuantizedMatrices(shape((6, N, K), codes), shape((6, N, groups), jnp.float32), **more)


@pytest.mark.parametrize(
    ("where", "rows", "dtype", "matrices", "chosen"),
    [
        ("CPU", 2048, "float32", abstract("int8", 10, 20), "tiles"),
        ("CPU", 20, "bfloat16", abstract("float8_e4m3fn"), "tiles"),
        ("CPU", 2048, "bfloat16", abstract("int8", groups=2), "wide"),
        ("CPU", 2048, "bfloat16", abstract("int4"), "wide"),
        ("CPU", 2048, "bfloat16", abstract("int8", order=jax.ShapeDtypeStruct((6, 128), "int32")), "wide"),
        ("GPU", 2048, "bfloat16", abstract("int8"), "wide"),
        ("Hopper GPU", 2048, "bfloat16", abstract("int8", 192), "gpu"),
        ("Hopper GPU", 2048, "bfloat16", abstract("float8_e4m3fn"), "gpu"),
        ("Hopper GPU", 2048, "float32", abstract("int8"), "wide"),
        ("Hopper GPU", 2048, "bfloat16", abstract("int8", 192, 192), "wide"),
        ("Hopper GPU", 1024, "bfloat16", abstract("int8"), "wide"),
        ("TPU", 2048, "bfloat16", abstract("int8"), "tpu"),
        ("TPU", 2048, "bfloat16", abstract("float8_e4m3fn"), "wide"),
        ("TPU", 2048, "bfloat16", abstract("int8", 192), "wide"),
        ("TPU", 1024, "bfloat16", abstract("int8"), "wide"),
    ],
)
def test_auto_selects_what_multiplies_codes(
    where: str, rows: int, dtype: str, matrices: QuantizedMatrices, chosen: str, caplog: Any
) -> None:
    log_once.cache_clear()
    with as_if_on(where), caplog.at_level(logging.INFO, "qwen_jax"):
        for _ in range(2):
            assert select_grouped_codes("auto", rows, dtype, matrices) == chosen
    (record,) = caplog.records
    assert record.message.startswith(f"grouped product of rounded rows, {rows} rows of {dtype}, 6 matrices")
    assert record.message.endswith(f": {chosen}")


def test_what_cannot_run_is_refused_with_its_needs() -> None:
    with as_if_on("Hopper GPU"):
        for codes in DTYPES:
            assert select_grouped_codes("gpu", 2048, "bfloat16", abstract(codes, 192)) == "gpu"
    with pytest.raises(InputError, match="by gpu needs a Hopper GPU and outputs that are multiples of 64, inputs of"):
        select_grouped_codes("gpu", 2048, "bfloat16", abstract("int8", 192, 192))
    with (
        as_if_on("TPU"),
        pytest.raises(InputError, match="needs a TPU that multiplies float8_e4m3fn and bfloat16 rows"),
    ):
        select_grouped_codes("tpu", 2048, "float32", abstract("float8_e4m3fn"))
    with pytest.raises(InputError, match="by tiles needs one scale for each output"):
        select_grouped_codes("tiles", 2048, "float32", abstract("int8", groups=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_multiply_codes_unless_a_gradient_is_needed(dtype: str) -> None:
    """Where adapters are trained, rows hold the same codes and their products have a gradient: that of the values."""
    rng = print_seed()
    codes, scales, matrices, sizes = args = drawn(rng, dtype, 4, 24, 40, 90)
    rows, used = codes.astype(jnp.float32), int(sizes.sum())

    def product(rows: jax.Array, quantized: str) -> jax.Array:
        context = MoEContext(None, None, 1e-6, 0.0, "auto", False, quantized)  # type: ignore[arg-type]
        return multiply_sorted(context, rows, matrices, jnp.asarray(sizes), 90, True, jnp.nan_to_num(scales))

    np.testing.assert_array_equal(product(rows, "auto"), run(*args))
    with jax.default_matmul_precision("highest"):
        y, pull = jax.vjp(lambda rows: product(rows, "plain"), rows)
        dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
        w = matrices.values(jnp.float32)[np.repeat(np.arange(4), sizes)]
        want = jnp.einsum("mn,mnk->mk", dy[:used] * scales[:used], w)
        np.testing.assert_allclose(pull(dy)[0][:used], want, rtol=0, atol=1e-5 * float(jnp.abs(want).max(initial=1)))
    with pytest.raises(InputError, match="by tiles have no gradient"):
        jax.grad(lambda rows: product(rows, "auto").sum())(rows)


# Chips that multiply codes faster than bfloat16. Others multiply them in bfloat16.
FASTER = {"v5e": "int8", "v5p": "int8", "v6e": "int8", "7x": "float8_e4m3fn"}


@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for_tpus(chip: str) -> None:
    """To one kernel whose operands are the codes. Neither rows nor sizes are multiples of a tile."""
    G, M, N, K = 60, 8191, 1408, 896
    chosen = {}

    def program(x: jax.Array, weight: jax.Array, scales: jax.Array, sizes: jax.Array) -> jax.Array:
        codes, of_rows = rounded_rows(x, weight.dtype)
        matrices = QuantizedMatrices(weight, scales)
        chosen[str(weight.dtype)] = how = select_grouped_codes("auto", M, x.dtype, matrices)
        if how == "wide":
            return x
        return grouped_code_matmul(codes, of_rows, matrices, sizes, dtype=x.dtype, implementation=how)

    shape = jax.ShapeDtypeStruct
    for dtype in DTYPES:
        arrays = shape((M, K), "bfloat16"), shape((G, N, K), dtype), shape((G, N, 1), "float32"), shape((G,), "int32")
        text = compile_for(chip, program, *arrays).as_text()
        assert chosen[dtype] == ("tpu" if FASTER.get(chip) == dtype else "wide")
        if chosen[dtype] == "tpu":
            code = "s8" if dtype == "int8" else "f8e4m3fn"
            (kernel,) = (line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line)
            assert f"{code}[{M},{K}]" in kernel
            assert f"{code}[{G},{N},{K}]" in kernel
            # No codes are stored in bfloat16.
            assert f"bf16[{G},{N},{K}]" not in text
            assert not re.search(rf"= bf16\[{M},{K}\]\S* (fusion|convert)\(", text[text.index("ENTRY") :])
