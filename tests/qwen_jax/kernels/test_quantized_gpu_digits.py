"""Products of integer codes with a vector as digits of 8 bits: order and operands anywhere, numerics interpreted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels.decode.layer_gpu_quantized import Matrix, Vector, in_order, product
from qwen_jax.kernels.matmul import quantized_gpu_digits as digits
from tests.helpers.gpu_quantized import CAN_INTERPRET, interpreted
from tests.qwen_jax.kernels.test_flash_decode_int8_gpu import held


def print_seed() -> np.random.Generator:
    """A generator with a fresh seed, which pytest shows if the test fails."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def matrix(rng: np.random.Generator, N: int, K: int, codes: Any, group: int, zeros: bool) -> Matrix:
    """A random matrix."""
    info = jnp.iinfo(codes)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(int(info.min), int(info.max) + 1, shape), jnp.int32).astype(codes)

    scales = jnp.asarray(rng.uniform(0.5, 1.5, (N, K // group)) * K**-0.5, jnp.float16)
    return Matrix(drawn(N, K), scales, drawn(N, K // group) if zeros else None)


def values(vector: Vector) -> np.ndarray:
    """What digits stand for, in the order of the codes."""
    whole = np.tensordot(256.0 ** np.arange(4), np.asarray(vector.x, np.float64), 1)
    assert vector.factors is not None
    return whole * np.repeat(np.asarray(vector.factors, np.float64), 128)


def test_neighbours_of_a_register_go_side_by_side() -> None:
    """Each input goes to the place where `permuted` has it; of two to eight neighbours, every second one follows."""
    n = np.arange(256)
    unit, order = digits.ORDER
    place = n // unit * unit + sum(n // here % size * there for size, here, there in order)
    want = np.asarray(digits.permuted(jnp.arange(256), jnp.int4))
    np.testing.assert_array_equal(want[place], n)
    for count in (2, 4, 8):
        of_register = place.reshape(-1, count // 2, 2)
        np.testing.assert_array_equal(
            of_register - of_register[:, :1], np.arange(count // 2)[None, :, None] + 0 * of_register
        )


def test_int4_codes_become_operands_in_the_order_of_the_digits() -> None:
    """Of the codes that a thread holds, those at even and at odd places of its words are the operands of two units."""
    from jax.experimental.mosaic.gpu import fragmented_array

    tile = np.arange(64 * 128).reshape(64, 128)
    # Registers count units of 32 inputs and within them two rows; in operands, units of 16 and two rows.
    own = held(fragmented_array.WGMMA_LAYOUT_UPCAST_4X, tile).reshape(4, 32, 4, 2, 4, 2).transpose(0, 1, 2, 5, 3, 4)
    operand = np.empty(tile.size, int)
    operand[held(fragmented_array.WGMMA_LAYOUT_8BIT, tile).reshape(-1)] = own.reshape(-1)
    want = np.asarray(digits.permuted(jnp.asarray(tile), jnp.int4))
    np.testing.assert_array_equal(operand.reshape(64, 128), want)


def test_half_bytes_are_sixteen_times_their_codes() -> None:
    """What `operand` does to a word of eight codes."""
    codes = print_seed().integers(-8, 8, (1000, 8))
    word = ((codes & 15) << np.arange(0, 32, 4)).sum(axis=1).astype(np.uint32)
    for p, upper in enumerate((word << np.uint32(4), word)):
        got = (upper & np.uint32(0xF0F0F0F0)).view(np.int8).reshape(-1, 4)
        np.testing.assert_array_equal(got, 16 * codes[:, p::2])


if CAN_INTERPRET:

    @pytest.mark.parametrize("codes", [jnp.int4, jnp.int8], ids=lambda x: x.__name__)
    def test_digits_are_the_vector_in_the_interpreter(codes: Any) -> None:
        """Each component is off by less than 2^-29 of the largest of its block, and one that is not finite is seen."""
        rng = print_seed()
        x = rng.standard_normal(1536) * 2.0 ** rng.integers(-40, 40, 1536)
        x[512:1024] = 0
        rounded = jnp.asarray(x, jnp.bfloat16)
        w = matrix(rng, 64, 1536, codes, 128, False)
        with interpreted(1):
            got = values(in_order(rounded, w))
        want = np.asarray(digits.permuted(rounded.astype(jnp.float32), codes), np.float64)
        # A block has 512 components here.
        error, largest = (np.abs(a).reshape(3, -1).max(axis=1) for a in (got - want, want))
        assert (error <= 2.0**-29 * largest).all()
        for bad in (np.inf, -np.inf, np.nan):
            with interpreted(1):
                vector = in_order(rounded.at[int(rng.integers(1024, 1536))].set(bad), w)
            np.testing.assert_array_equal(np.isnan(np.asarray(vector.factors)), np.arange(12) >= 8)

    @pytest.mark.parametrize("zeros", [False, True])
    @pytest.mark.parametrize(
        ("multiprocessors", "N", "K", "codes", "group"),
        [(4, 192, 1664, jnp.int4, 128), (1, 64, 640, jnp.int4, 640), (3, 192, 896, jnp.int8, 128)],
    )
    def test_products_are_sums_in_float32_in_the_interpreter(
        multiprocessors: int, N: int, K: int, codes: Any, group: int, zeros: bool
    ) -> None:
        """Several tiles of a block, several blocks of a tile, and ends in the middle of a step."""
        rng = print_seed()
        w = matrix(rng, N, K, codes, group, zeros)
        x = jnp.asarray(rng.standard_normal(K), jnp.bfloat16)
        with interpreted(multiprocessors):
            got = np.asarray(product(in_order(x, w), w), np.float64).sum(axis=0)
            whole = np.asarray(product(in_order(x, w), w, whole=True)[0])
        code = np.asarray(w.weight.astype(jnp.float32), np.float64).reshape(N, K // group, group)
        zero = 0 if w.zeros is None else np.asarray(w.zeros.astype(jnp.float32), np.float64)[..., None]
        scale = np.asarray(w.scales, np.float64)[..., None]
        x64 = np.asarray(x, np.float64).reshape(-1, group)
        want = ((code - zero) * scale * x64).sum(axis=(1, 2))
        # Of each block of 128 inputs a sum of codes and one of zero points, which are exact in units of a digit, are
        # rounded, scaled and added; then blocks, digits and parts. Digits are off by 2^-29 of the largest component.
        magnitude = ((np.abs(code) + np.abs(zero)) * scale * np.abs(x64)).sum(axis=(1, 2))
        most = ((np.abs(code) + np.abs(zero)) * scale).sum(axis=(1, 2)) * np.abs(x64).max()
        bound = (K // 128 + 16) * 2.0**-24 * (2 * magnitude + most) + 2.0**-29 * most
        assert (np.abs(got - want) <= bound).all()
        np.testing.assert_allclose(whole.astype(np.float64), want, rtol=2.0**-8, atol=float(bound.max()))
