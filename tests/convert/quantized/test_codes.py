"""The form that all quantised formats share: its values, its groups, and what it refuses."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.quantized import words
from convert.quantized.codes import Codes, joined
from qwen_jax.errors import InputError
from tests.convert.quantized import scalar
from tests.convert.quantized.test_compressed import random_float8
from tests.helpers.runs import print_seed


def random_codes(
    rng: np.random.Generator, dtype: str, outputs: int, groups: int, group: int, scales: str, **parts: bool
) -> Codes:
    """A random matrix with the parts that are asked for: zeros, mins, order."""
    inputs = groups * group

    def integers(*shape: int) -> np.ndarray:
        low = -8 if dtype == "int4" else -128
        return rng.integers(low, -low, shape).astype(ml_dtypes.int4 if dtype == "int4" else np.int8)

    return Codes(
        random_float8(rng, outputs, inputs) if dtype == "float8" else integers(outputs, inputs),
        scalar.floats(rng, (outputs, groups), scales),
        integers(outputs, groups) if parts.get("zeros") else None,
        scalar.floats(rng, (outputs, groups), "float32") if parts.get("mins") else None,
        rng.permutation(inputs).astype(np.int32) if parts.get("order") else None,
    )


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["int4", "int8", "float8"]),
    st.sampled_from(list(scalar.DTYPES)),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([1, 2, 6, 8]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_values_follow_the_definition_and_outlast_smaller_groups(
    dtype: str, scales: str, outputs: int, groups: int, group: int, zeros: bool, mins: bool, order: bool, seed: int
) -> None:
    """`dequantize` is the definition in float32, and cutting groups changes no bit of the values."""
    rng = np.random.default_rng(seed)
    parts = {"zeros": zeros and dtype != "float8", "mins": mins, "order": order}
    codes = random_codes(rng, dtype, outputs, groups, group, scales, **parts)
    values = scalar.canonical(codes)
    np.testing.assert_array_equal(codes.dequantize(), values)
    for size in [size for size in range(1, group + 1) if group % size == 0]:
        finer = codes.regrouped(size)
        assert finer.group == size
        np.testing.assert_array_equal(scalar.canonical(finer), values)
        np.testing.assert_array_equal(finer.dequantize(), values)
        again = joined(finer.scales, groups * group, group, "scales")
        assert again.tobytes() == codes.scales.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_survives_packing_and_keeps_its_sign(bits: int) -> None:
    """Words of all codes, against the definition, for lengths that do and do not fill words."""
    rng = print_seed()
    dtype = ml_dtypes.int4 if bits == 4 else np.int8
    low = -(1 << (bits - 1))
    for length in range(1, 20):
        values = rng.integers(low, -low, (3, length))
        packed = words.pack(values.astype(dtype))
        np.testing.assert_array_equal(packed, scalar.words((values - low).tolist(), bits))
        assert packed.shape[1] == words.count(length, bits)
        found = words.unpack(packed, bits, length)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(int), values)
    every = np.arange(low, -low)
    np.testing.assert_array_equal(words.unpack(words.pack(every.astype(dtype)[None]), bits, len(every))[0], every)


def test_int4_has_four_bits_whatever_the_others_are() -> None:
    """An int4 of ml_dtypes lies in a byte whose upper bits mean nothing; packing and values do not depend on them."""
    rng = print_seed()
    values = rng.integers(-8, 8, (5, 16)).astype(np.int8)
    clean, dirty = values.astype(ml_dtypes.int4), values.view(ml_dtypes.int4)
    assert clean.tobytes() != dirty.tobytes()
    scales = np.ones((5, 2), np.float16)
    assert words.pack(clean).tobytes() == words.pack(dirty).tobytes()
    np.testing.assert_array_equal(Codes(dirty, scales).dequantize(), values)
    np.testing.assert_array_equal(words.integers(dirty), values)
    zeros = np.stack([dirty[:, 0], clean[:, 0]], 1)
    assert joined(zeros, 16, 16, "zero points").shape == (5, 1)


def test_transposes_are_exact_over_the_edges_of_blocks() -> None:
    rng = print_seed()
    for shape in ((1, 1), (3, 255), (5, 256), (7, 257), (2, 600)):
        matrix = rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
        found = words.transposed(matrix)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, matrix.T)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_matrices_are_worked_on_in_parts_without_a_trace(dtype: str) -> None:
    """Packing, unpacking and values of many outputs are those of few outputs beside each other."""
    codes = random_codes(print_seed(), dtype, 517, 3, 7, "float16", zeros=True, mins=True, order=True)
    packed = words.pack_columns(codes.codes, codes.order)
    bits = 4 if dtype == "int4" else 8
    found = words.unpack_columns(packed, bits, 21, codes.order)
    np.testing.assert_array_equal(words.integers(found), words.integers(codes.codes))
    np.testing.assert_array_equal(packed, words.pack(codes.in_own_order()).T)
    names = ("codes", "scales", "zeros", "mins")
    rows = [
        dataclasses.replace(codes, **{name: getattr(codes, name)[start : start + 11] for name in names})
        for start in range(0, 517, 11)
    ]
    np.testing.assert_array_equal(codes.dequantize(), np.concatenate([part.dequantize() for part in rows]))
    np.testing.assert_array_equal(words.unpack_columns(packed[:, 500:], bits, 21, codes.order), found[500:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.zeros((4, 6), np.uint8)}, "codes int4, int8 or float8"),
        ({"codes": np.zeros(6, np.int8)}, "codes int4, int8 or float8"),
        ({"scales": np.ones((4, 3), np.float64)}, "scales float16, bfloat16 or float32"),
        ({"scales": np.ones((4, 4), np.float32)}, "a divisor of 6"),
        ({"scales": np.ones((3, 3), np.float32)}, "scales .*got float32 .3, 3."),
        ({"scales": np.ones((4, 0), np.float32)}, "a divisor of 6"),
        ({"zeros": np.zeros((4, 3), ml_dtypes.int4)}, "zero points int8 .4, 3., got int4"),
        ({"zeros": np.zeros((4, 1), np.int8)}, "zero points int8 .4, 3., got int8 .4, 1."),
        ({"mins": np.zeros((4, 3), np.float16)}, "minima float32"),
        ({"order": np.arange(6)}, "an order int32 .6., got int64"),
        ({"order": np.zeros(6, np.int32)}, "each of 0 to 5 once"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arrays = {"codes": np.zeros((4, 6), np.int8), "scales": np.ones((4, 3), np.float32), **change}
    with pytest.raises(InputError, match=message):
        Codes(**arrays)


def test_groups_that_do_not_fit_are_refused() -> None:
    """Groups are cut into divisors only, and joined only where their values are the same; float8 has no zero points."""
    codes = random_codes(print_seed(), "int8", 4, 3, 8, "float16")
    for group in (0, 3, 16):
        with pytest.raises(InputError, match="cut into groups of a divisor"):
            codes.regrouped(group)
    with pytest.raises(InputError, match="scales of groups of 8 inputs differ within groups of 24"):
        joined(codes.scales, 24, 24, "scales")
    zeros = np.zeros((4, 1), ml_dtypes.float8_e4m3fn)
    with pytest.raises(InputError, match="float8 codes have no zero points"):
        Codes(zeros, np.ones((4, 1), np.float32), zeros)
    assert dataclasses.replace(codes, scales=np.ones((4, 1), np.float32)).group == 24
