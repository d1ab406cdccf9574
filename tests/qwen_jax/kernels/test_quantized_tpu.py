"""Quantised products on TPUs: numerics in TPU interpret mode, and the TPU compiler for every generation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import quantized, quantized_tpu, quantized_tpu_grouped
from qwen_jax.kernels.tpu import device
from qwen_jax.kernels.tpu.device import Core
from tests.helpers.runs import print_seed
from tests.helpers.tpu_compiler import TOPOLOGIES, compile_for, needs_libtpu

INT4, INT8, FLOAT8 = quantized_tpu.CODES
MiB = 1 << 20
CORES = {
    "v5e": Core(128 * MiB, 128),
    "v5p": Core(64 * MiB, 128),
    "v6e": Core(128 * MiB, 256),
    "7x": Core(64 * MiB, 256),
}


def drawn(M: int, N: int, K: int, group: int, codes: Any, offset: str = "none", scales: Any = jnp.float16) -> list[Any]:
    """Rows, codes, scales, zero points and minima."""
    numbers, G = print_seed(), K // (group or K)
    top = 8 if codes == INT4 else 128

    def of_codes(shape: tuple[int, int]) -> jax.Array:
        if codes == FLOAT8:
            # Any but NaN, -0 included.
            bits = numbers.integers(0, 254, shape)
            return jnp.asarray((bits + (bits > 126)).astype(np.uint8).view(codes))
        return jnp.asarray(numbers.integers(-top, top, shape)).astype(codes)

    x = jnp.asarray(numbers.standard_normal((M, K)), jnp.bfloat16)
    zeros = of_codes((N, G)) if offset in ("zero", "both") else None
    mins = jnp.asarray(numbers.standard_normal((N, G)), jnp.float32) if offset in ("min", "both") else None
    return [x, of_codes((N, K)), jnp.asarray(numbers.uniform(0.01, 0.1, (N, G)), scales), zeros, mins]


def interpreted(*arguments: Any) -> np.ndarray:
    """The kernel in the interpreter, where memory holds NaN until it is written."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return np.asarray(jax.device_get(quantized_tpu.matmul(*arguments)))


def check(arguments: list[Any]) -> None:
    """Float32 sums differ by about 1e-7 of the sum of their absolute terms."""
    x, *matrix = arguments
    w = quantized.dequantize(*matrix)
    if len(x) > quantized_tpu.FEW_ROWS:
        w = w.astype(jnp.bfloat16)
    rows, values = np.asarray(x, np.float64), np.asarray(w, np.float64)
    got = interpreted(*arguments)
    assert got.dtype == np.float32
    assert got.shape == (len(rows), len(values))
    # The parts of a value, code and offset, may be larger than the value itself.
    parts = np.abs(values) + np.abs(np.asarray(quantized.dequantize(*matrix[:2]), np.float64))
    assert (np.abs(got - rows @ values.T) <= 4e-6 * (np.abs(rows) @ parts.T)).all()


@pytest.mark.parametrize("M", [1, 11, 75])
@pytest.mark.parametrize("codes", [INT4, INT8, FLOAT8], ids=str)
def test_the_kernel_is_the_product_of_the_dequantised_weights(M: int, codes: Any) -> None:
    """Parity, for few and many rows; groups, sizes and offsets are drawn. Inputs may end inside a chunk."""
    numbers = print_seed()
    group = int(numbers.choice([0, 16, 32, 64, 128, 256]))
    K = int(numbers.integers(1, 4)) * 256 if group in (0, 128, 256) else group * int(numbers.integers(128 // group, 20))
    offset = str(numbers.choice(["none", "zero", "min", "both"]))
    scales = numbers.choice([jnp.float16, jnp.bfloat16, jnp.float32])
    case = (M, 16 * int(numbers.integers(1, 20)), K, group, codes, offset, scales)
    print(case)
    check(drawn(*case))


@pytest.mark.parametrize("M", [11, 75])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_both_conversions_of_float8_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, M: int, group: int) -> None:
    """v5 and v6 convert codes in one way, v4 and 7x in another one; they differ by a power of two until it is scaled.
    Outputs need not fill the registers of codes."""
    arguments, results = drawn(M, 16 * int(print_seed().integers(1, 20)), 384, group, FLOAT8), []
    for unpacks in (False, True):
        monkeypatch.setattr(device, "unpacks_e4m3b11", lambda unpacks=unpacks: unpacks)
        jax.clear_caches()
        check(arguments)
        results.append(interpreted(*arguments))
    np.testing.assert_array_equal(*results)
    jax.clear_caches()


def test_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of outputs and of rows, the last of which are not whole; chunks in a loop and after it."""
    monkeypatch.setattr(quantized_tpu, "_UNROLLED", 2)
    for M, few in ((5, True), (150, False)):
        tiles = quantized_tpu.Tiling(8 if few else 64, 128, 128, few, 0)
        monkeypatch.setattr(quantized_tpu, "choose_tiling", lambda *_, tiles=tiles: tiles)
        for group in (64, 128, 0):
            jax.clear_caches()
            check(drawn(M, 320, 640 + 64 * (group == 64), group, INT4, "zero"))
    jax.clear_caches()


def test_other_rows_change_no_bit() -> None:
    """A row of NaN changes no bit of the others, also where rows are there once for each group."""
    for M in (9, 70):
        x, *matrix = drawn(M, 128, 256, 32, INT8, "zero")
        first, second = interpreted(x, *matrix), interpreted(x.at[3].set(jnp.nan), *matrix)
        np.testing.assert_array_equal(np.delete(first, 3, 0), np.delete(second, 3, 0))
        assert np.isnan(second[3]).all()


def test_what_the_kernel_does_not_support_is_refused() -> None:
    for case in ((2, 100, 256, 128), (2, 128, 264, 0), (2, 128, 384, 48), (2, 128, 64, 0)):
        with pytest.raises(InputError, match=r"multiple of|one group"):
            quantized_tpu.matmul(*drawn(*case, INT8))
    with pytest.raises(InputError, match="a TPU"):
        quantized.quantized_matmul(*drawn(2, 128, 256, 128, INT8), implementation="tpu")


# Outputs and inputs: 0.5B, 7B, 72B and its padded form; those of a shard of 8.
SHAPES = [(4864, 896), (896, 4864), (128, 896), (18944, 3584), (3584, 18944), (512, 3584), (3584, 2368), (2368, 3584)]
SHAPES += [(29568, 8192), (8192, 29568), (8192, 29696), (3712, 8192), (8192, 3712), (8192, 3696), (1280, 8192)]


def test_tiles_of_all_models_fit() -> None:
    """A tile is at most three quarters of VMEM, and a multiple of the lanes unless it is the whole matrix."""
    for core in CORES.values():
        for N, K in SHAPES:
            for M in (1, 16, 64, 512, 8192):
                for G in (1, K // (16 if K % 64 else 64)):
                    for bits in (4, 8):
                        tiles = quantized_tpu.choose_tiling(M, N, K, G, bits, core, 1 << 20)
                        assert tiles.vmem_bytes <= core.vmem_bytes * 3 // 4
                        assert tiles.outputs % 128 == 0 or tiles.outputs == N


@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_compiler_accepts_the_kernels(chip: str) -> None:
    """Few and many rows; the program reads codes as they are: nothing as large as half the matrix is temporary."""
    for M, N, K, group, codes, offset in (
        (1, 3584, 3584, 128, INT4, "zero"),
        (128, 896, 896, 128, FLOAT8, "none"),
        (8, 304, 3584, 128, FLOAT8, "none"),
        (16, 512, 3712, 32, INT8, "none"),
    ):
        G = K // group
        shapes = [((M, K), jnp.bfloat16), ((N, K), codes), ((N, G), jnp.float16)]
        shapes += [((N, G), codes)] * (offset == "zero")
        memory = compile_for(chip, quantized_tpu.matmul, *(jax.ShapeDtypeStruct(*s) for s in shapes)).memory_analysis()
        assert memory.temp_size_in_bytes < N * K * (1 if codes == INT4 else 2) // 4


@needs_libtpu
@pytest.mark.draw(2)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_compiler_accepts_the_kernel_of_experts(chip: str) -> None:
    """Sizes of A2.7B; the program reads codes as they are, and no copy of all matrices is temporary."""
    E, T, C, group = 8, 12, 8, 128
    for N, K in ((2816, 2048), (2048, 1408)):
        G = K // group
        shapes = [((T, C, K), jnp.bfloat16), ((T,), jnp.int32), ((), jnp.int32), ((E, N, K), INT4)]
        shapes += [((E, N, G), jnp.float16), ((E, N, G), INT4)]
        run = quantized_tpu_grouped.grouped_matmul
        memory = compile_for(chip, run, *(jax.ShapeDtypeStruct(*s) for s in shapes)).memory_analysis()
        assert memory.temp_size_in_bytes < E * N * K // 4
