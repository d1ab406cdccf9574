"""Blocks of GGUF are taken apart and put together as the `gguf` package does it, bit for bit."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from convert.gguf import blocks, kquants
from convert.gguf.quantized import scheme
from convert.quantized.codes import Codes
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import TYPES
from tests.helpers.runs import print_seed

# Where the float16 numbers of a block are, in bytes.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
COMPUTED = sorted(set(TYPES) - {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0"})


def random_rows(name: str, rng: np.random.Generator, rows: int = 40, per_row: int = 3) -> np.ndarray:
    """Random bytes, with scales that are finite numbers of every size and sign that weights have."""
    kind = TYPES[name]
    data = rng.integers(0, 256, (rows, per_row, kind.nbytes), np.uint8)
    for start in HALVES.get(name, []):
        halves = (rng.standard_normal((rows, per_row, 1)) * 2.0 ** rng.integers(-14, 3, (rows, per_row, 1))).astype(
            "<f2"
        )
        data[..., start : start + 2] = halves.view(np.uint8)
    return data.reshape(rows, -1)


def reference(data: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def test_types_have_the_sizes_of_the_library() -> None:
    known = {(kind.name, int(kind)): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {(kind.name, kind.number): (kind.block, kind.nbytes) for kind in TYPES.values()}
    assert {key: ours[key] for key in known if key in ours} == {key: known[key] for key in known if key in ours}
    assert known.keys() >= ours.keys()


@pytest.mark.parametrize("name", COMPUTED)
def test_values_are_those_of_the_library_bit_for_bit(name: str) -> None:
    """All types, on random bytes: NaN scales too, which must be NaN in both."""
    rng = print_seed()
    for data in (random_rows(name, rng), rng.integers(0, 256, (40, 2 * TYPES[name].nbytes), np.uint8)):
        got, expected = blocks.dequantize(data, TYPES[name]), reference(data, name)
        numbers = ~np.isnan(expected)
        assert np.array_equal(np.isnan(got), ~numbers)
        assert got[numbers].tobytes() == expected[numbers].tobytes()


@pytest.mark.parametrize("name", sorted(HALVES))
def test_codes_have_the_values_of_the_file(name: str) -> None:
    """Bit for bit; where codes are shifted by 8, within a unit in the last place of the largest term."""
    data = random_rows(name, print_seed())
    codes, expected = blocks.unpack(data, TYPES[name]), reference(data, name)
    fields = scheme(TYPES[name])
    assert fields is not None
    assert codes.codes.dtype == np.dtype({"int4": ml_dtypes.int4, "int8": np.int8}[fields.codes])
    assert (codes.scales.dtype.name, codes.group) == (fields.scales, fields.group)
    assert (codes.mins is not None) == (fields.offset == "min")
    assert codes.codes.shape == expected.shape
    got = codes.dequantize()
    if name in ("Q4_1", "Q4_K"):
        assert codes.mins is not None
        terms = 8 * np.abs(codes.scales.astype(np.float32)) + np.abs(codes.mins)
        assert (np.abs(got - expected) <= np.repeat(np.spacing(terms), fields.group, axis=1)).all()
    else:
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_codes_are_written_without_rounding(name: str) -> None:
    """Taking apart and packing give the same bytes; wider groups repeat their scale."""
    rng = print_seed()
    data = random_rows(name, rng)
    kind, packed = blocks.pack(blocks.unpack(data, TYPES[name]))
    assert kind.name == name
    assert packed.tobytes() == data.tobytes()

    codes = rng.integers(-8, 8, (6, 256)).astype(ml_dtypes.int4 if name == "Q4_0" else np.int8)
    scales = rng.random((6, 2)).astype(np.float16)
    kind, packed = blocks.pack(Codes(codes, scales, zeros=np.zeros((6, 2), codes.dtype)))
    assert np.array_equal(blocks.dequantize(packed, kind), Codes(codes, scales).dequantize())


def test_codes_without_a_type_are_refused() -> None:
    codes, scales = np.ones((2, 64), np.int8), np.ones((2, 2), np.float32)
    for changed, words in (
        ({"codes": codes.astype(ml_dtypes.float8_e4m3fn)}, "codes of float8_e4m3fn"),
        ({"zeros": np.ones((2, 2), np.int8)}, "zero points"),
        ({"mins": np.ones((2, 2), np.float32)}, "minima"),
        ({"order": np.arange(64, dtype=np.int32)}, "order"),
        ({"scales": np.ones((2, 4), np.float32)}, "groups of 16 inputs"),
        ({"scales": np.full((2, 2), 1 + 2**-20, np.float32)}, "float16 does not hold"),
        ({"scales": np.full((2, 2), np.nan, np.float32)}, "float16 does not hold"),
    ):
        with pytest.raises(InputError, match=words):
            blocks.pack(Codes(**{"codes": codes, "scales": scales, **changed}))
    with pytest.raises(InputError, match="IQ4_NL has no scales of groups"):
        blocks.unpack(np.zeros((1, 18), np.uint8), TYPES["IQ4_NL"])


def test_the_line_of_types_says_what_happens_to_each() -> None:
    line = blocks.describe([TYPES[name] for name in ("F32", "Q4_K", "Q6_K", "Q5_0", "IQ4_XS")])
    assert line == "Q4_K, Q6_K: kept as they are; Q5_0: repacked without a change of values; IQ4_XS: dequantised"
    assert blocks.describe([TYPES["F32"], TYPES["BF16"]]) == "not quantised"


# --- The K types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "simpler"), [("Q4_K", "Q4_1"), ("Q5_K", "Q5_1"), ("Q6_K", "Q5_1")])
def test_k_types_lose_less_than_simpler_ones_of_more_bits(name: str, simpler: str) -> None:
    """Squared errors on weights with outliers. Q4_K has 4.5 bits a weight and Q4_1 has 5; Q6_K has half the steps."""
    x = print_seed().standard_t(5, (64, 512)).astype(np.float32) * np.float32(0.02)

    def error(data: np.ndarray, kind: str) -> float:
        return float(np.square(reference(data, kind) - x).sum())

    theirs = error(gguf.quants.quantize(x, gguf.GGMLQuantizationType[simpler]), simpler)
    assert error(kquants.QUANTIZE[name](x), name) < theirs * (0.4 if name == "Q6_K" else 1)


@pytest.mark.parametrize("name", sorted(kquants.QUANTIZE))
def test_k_types_hold_simple_rows_exactly(name: str) -> None:
    """Zeros, and a ramp of as many steps as there are codes."""
    highest, group = {"Q4_K": (15, 32), "Q5_K": (31, 32), "Q6_K": (31, 16)}[name]
    ramp = np.resize(np.arange(group) % (highest + 1) - (16 if name == "Q6_K" else 0), (2, 256)).astype(np.float32)
    assert not reference(kquants.QUANTIZE[name](np.zeros((2, 256), np.float32)), name).any()
    got = reference(kquants.QUANTIZE[name](ramp), name)
    # The scale of scales is a float16: one unit in its last place is 2^-11.
    assert np.abs(got - ramp).max() <= np.abs(ramp).max() * 2**-11


@pytest.mark.parametrize("name", sorted(kquants.QUANTIZE))
def test_rows_are_quantised_independently(name: str) -> None:
    x = print_seed().standard_normal((5, 512)).astype(np.float32)
    whole = kquants.QUANTIZE[name](x)
    assert whole.tobytes() == b"".join(kquants.QUANTIZE[name](row[None]).tobytes() for row in x)
