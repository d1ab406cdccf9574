"""Files of compressed-tensors are read and written by their formulas, bit for bit, and wrong ones are refused."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.quantized import compressed
from convert.quantized.compressed import Compressed
from qwen_jax.errors import InputError
from tests.convert.quantized import scalar
from tests.helpers.runs import print_seed

WHERE = Path("model/config.json")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def random_float8(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """All finite float8 numbers."""
    codes = rng.integers(0, 254, (rows, columns), dtype=np.uint8)
    return np.where(codes >= 127, codes + np.uint8(1), codes).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)


def make_file(
    rng: np.random.Generator, info: Compressed, outputs: int, inputs: int, scales: str = "bfloat16"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a random matrix and the values that they stand for, by the formula of the format."""
    group = info.block[1] if info.block else info.group or inputs
    rows = info.block[0] if info.block else outputs if info.strategy == "tensor" else 1
    shape = (-(-outputs // rows), -(-inputs // group))
    g_idx = np.arange(inputs) // group
    if info.act_order:
        g_idx = rng.permutation(g_idx)
    # Codes with a sign; a packed file adds 2^(bits - 1).
    middle = 1 << (info.bits - 1)
    tensors: dict[str, np.ndarray] = {}
    q: Any
    if info.codes == "float8_e4m3fn":
        tensors["weight"] = random_float8(rng, outputs, inputs)
        q = tensors["weight"].astype(np.float64).tolist()
    else:
        packed = scalar.integers(rng, outputs, inputs, info.bits)
        q = [[value - middle for value in row] for row in packed]
        if info.format == "pack-quantized":
            tensors["weight_packed"] = scalar.words(packed, info.bits)
            tensors["weight_shape"] = np.array([outputs, inputs], np.int64)
        else:
            tensors["weight"] = np.array(q, np.int8)
    s = scalar.floats(rng, shape, scales)
    tensors["weight_scale"] = s.reshape(1) if info.strategy == "tensor" else s
    z: Any = [[0] * shape[1]] * shape[0]
    if info.offset == "zero":
        packed = scalar.integers(rng, *shape, info.bits)
        z = [[value - middle for value in row] for row in packed]
        if info.format == "pack-quantized" and info.strategy in ("group", "channel"):
            tensors["weight_zero_point"] = np.ascontiguousarray(scalar.words(scalar.transpose(packed), info.bits).T)
        else:
            tensors["weight_zero_point"] = np.array(z, np.int8).reshape(tensors["weight_scale"].shape)
    if info.act_order:
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    values = scalar.published(
        outputs,
        inputs,
        lambda o, i: q[o][i] - z[o // rows][g_idx[i]],
        lambda o, i: float(s[o // rows, g_idx[i]]),
    )
    return tensors, values


@st.composite
def configurations(draw: st.DrawFn) -> Compressed:
    """Every form of a file."""
    stored: Any = draw(st.sampled_from(["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"]))
    integers = stored in ("pack-quantized", "int-quantized") or (stored == "naive-quantized" and draw(st.booleans()))
    strategy: Any = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    codes = draw(st.sampled_from(["int4", "int8"])) if integers else "float8_e4m3fn"
    return Compressed(
        codes=codes,
        group=draw(st.sampled_from([1, 3, 4, 8, 16])) if strategy == "group" else 0,
        offset=draw(st.sampled_from(["none", "zero"])) if integers else "none",
        activations=draw(st.sampled_from(["none", codes])) if codes != "int4" else "none",
        format=stored,
        strategy=strategy,
        block=draw(st.sampled_from([(1, 8), (4, 3), (16, 16)])) if strategy == "block" else None,
        act_order=integers and strategy == "group" and draw(st.booleans()),
        ignore=draw(st.sampled_from([(), ("lm_head", "re:.*gate$")])),
    )


@settings(deadline=None, max_examples=150)
@given(
    configurations(),
    st.integers(1, 19),
    st.integers(1, 41),
    st.sampled_from(list(scalar.DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_files_are_read_and_written_by_the_formula(
    info: Compressed, outputs: int, inputs: int, scales: str, seed: int
) -> None:
    """Values, bytes after writing, names that are asked for, and the configuration, over all forms and odd sizes."""
    shape = (outputs, inputs)
    tensors, values = make_file(np.random.default_rng(seed), info, *shape, scales)
    codes = compressed.unpack(tensors, info, shape=shape)
    scalar.assert_same_values(codes, values)
    assert codes.group == info.group_of(inputs)
    assert (codes.order is not None, codes.zeros is not None) == (info.ordered, info.offset == "zero")
    scalar.assert_same_bytes(compressed.pack(codes, info), tensors)
    scalar.assert_same_bytes(compressed.pack(codes.regrouped(1), info), tensors)
    scalar.assert_asked_for(compressed.tensor_names(Q_PROJ, shape, info), Q_PROJ, tensors)
    assert compressed.read_config(WHERE, compressed.write_config(info)) == info


def test_known_words() -> None:
    """-8 to -1 of int4 are stored as 0 to 7 from the low bits on, zero points likewise along the outputs."""
    info = Compressed(codes="int4", offset="zero", format="pack-quantized", strategy="channel")
    tensors = {
        "weight_packed": np.tile(np.array([[0x76543210]], np.int32), (8, 1)),
        "weight_shape": np.array([8, 8], np.int64),
        "weight_scale": np.ones((8, 1), np.float32),
        "weight_zero_point": np.array([[0x01234567]], np.int32),
    }
    codes = compressed.unpack(tensors, info)
    assert codes.zeros is not None
    assert codes.codes.astype(int).tolist() == [list(range(-8, 0))] * 8
    assert codes.zeros.astype(int).ravel().tolist() == list(range(-1, -9, -1))


W4A16 = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 128,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": 1.5,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def group(changes: dict[str, Any], /, **rest: Any) -> dict[str, Any]:
    """A configuration with one group whose weights are changed."""
    base: Any = W4A16["config_groups"]
    changed = {**base["group_0"], "weights": {**base["group_0"]["weights"], **changes}, **rest}
    return {**W4A16, "config_groups": {"group_0": changed}}


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def test_configurations_of_llm_compressor_are_read(caplog: pytest.LogCaptureFixture) -> None:
    """W4A16, W8A8 and FP8 as LLM Compressor writes them."""
    found = compressed.read_config(WHERE, W4A16)
    assert found == Compressed(codes="int4", group=128, format="pack-quantized", strategy="group", ignore=("lm_head",))
    assert found.of("lm_head") is None
    assert found.of("model.layers.0.mlp.gate") is None
    assert found.of(Q_PROJ) == dataclasses.replace(found, ignore=())
    int8 = group({"num_bits": 8, "strategy": "channel", "group_size": None}, input_activations=TOKEN)
    found = compressed.read_config(WHERE, {**int8, "format": "int-quantized"})
    assert found == Compressed(
        codes="int8", activations="int8", format="int-quantized", strategy="channel", ignore=("lm_head",)
    )
    float8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None}
    static = {**TOKEN, "type": "float", "strategy": "tensor", "dynamic": False}
    with caplog.at_level(logging.WARNING):
        found = compressed.read_config(WHERE, {**group(float8, input_activations=static), "format": "float-quantized"})
    assert "static scales of activations" in caplog.text
    assert (found.codes, found.activations, found.strategy) == ("float8_e4m3fn", "float8_e4m3fn", "tensor")
    # Activations that the weights' codes do not go with are kept, and this is said.
    with caplog.at_level(logging.WARNING):
        assert compressed.read_config(WHERE, group({}, input_activations=TOKEN)).activations == "none"
    assert "they are kept in bfloat16" in caplog.text
    # Without a strategy or a format, the sizes and types tell.
    bare = group({"strategy": None, "group_size": -1, "num_bits": 8, "actorder": "weight"}, input_activations=TOKEN)
    found = compressed.read_config(WHERE, {**bare, "format": None})
    assert (found.format, found.strategy, found.ordered) == ("int-quantized", "channel", False)
    assert compressed.read_config(WHERE, group({"actorder": "group"})).ordered


def test_modules_follow_targets_and_ignored_names() -> None:
    """A whole name counts before an expression, and that before the class of the module; ignored names count most."""
    base: Any = W4A16["config_groups"]
    weights = base["group_0"]["weights"]
    eight = {**weights, "num_bits": 8}
    channel = {**eight, "strategy": "channel", "group_size": None, "type": "float"}
    config = {
        **W4A16,
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"},
            "group_1": {"targets": [r"re:.*down_proj$"], "weights": eight, "format": "pack-quantized"},
            "group_2": {
                "targets": ["model.layers.3.mlp.down_proj"],
                "weights": channel,
                "format": "float-quantized",
            },
        },
        "ignore": ["lm_head", r"re:.*layers\.[45]\..*", "model.layers.1.mlp.up_proj"],
    }
    info = compressed.read_config(WHERE, config)
    layer = "model.layers"
    for module, codes in {
        f"{layer}.0.mlp.up_proj": "int4",
        f"{layer}.0.mlp.down_proj": "int8",
        f"{layer}.3.mlp.down_proj": "float8_e4m3fn",
        f"{layer}.5.mlp.down_proj": None,
        f"{layer}.1.mlp.up_proj": None,
        "lm_head": None,
        "model.embed_tokens": None,
    }.items():
        found = info.of(module)
        assert (found and found.codes) == codes, module
        assert found is None or found.of(module) == found
    assert compressed.read_config(WHERE, compressed.write_config(info)) == info
    unnamed = dataclasses.replace(info, groups=info.groups[1:], ignore=())
    assert unnamed.of(f"{layer}.0.mlp.up_proj") is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**W4A16, "config_groups": {}}, "expected config_groups"),
        ({**W4A16, "config_groups": {"W4A16": ["Linear"]}}, "an object as W4A16"),
        ({**W4A16, "format": "marlin-24"}, "'marlin-24' for int weights"),
        ({**W4A16, "format": "float-quantized"}, "'float-quantized' for int weights"),
        ({**W4A16, "quantization_status": "frozen"}, "'compressed', got 'frozen'"),
        ({**W4A16, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**W4A16, "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({**W4A16, "ignore": "lm_head"}, "a list of names as ignore"),
        (group({"num_bits": 3}), "'int' with 3 bits"),
        (group({"type": "float"}), "'float' with 4 bits"),
        (group({"strategy": "tensor_group"}), "'tensor_group' of weights"),
        (group({"strategy": "channel"}), "'channel' and group_size 128 .* contradict"),
        (group({"group_size": None}), "'group' and group_size None .* contradict"),
        (group({"strategy": "block", "group_size": None}), "block_structure of two sizes"),
        (group({"symmetric": None}, targets=[]), "no targets"),
        (group({"actorder": "other"}), "actorder 'group', 'weight' or null"),
        (group({"actorder": "group", "strategy": "channel", "group_size": None}), "needs the strategy 'group'"),
        (group({}, weights=None), "does not say how weights are quantised"),
    ],
)
def test_wrong_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        compressed.read_config(WHERE, config)


def test_float8_with_zero_points_is_refused() -> None:
    config = group({"type": "float", "num_bits": 8, "symmetric": False})
    with pytest.raises(InputError, match="float8 weights with zero points"):
        compressed.read_config(WHERE, {**config, "format": "float-quantized"})


PACKED = Compressed(codes="int4", group=8, offset="zero", format="pack-quantized", strategy="group", act_order=True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("weight_packed"), "has no m.weight_packed"),
        (lambda t: t.pop("weight_shape"), "needs m.weight_shape"),
        (lambda t: t.pop("weight_scale"), "has no m.weight_scale"),
        (lambda t: t.pop("weight_zero_point"), "has no m.weight_zero_point"),
        (lambda t: t.pop("weight_g_idx"), "has no m.weight_g_idx"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]), r"says \[16, 24\], but .* \[16, 2\] with 4"),
        (lambda t: t.update(weight_shape=np.array([16, 8])), "m.weight_shape says .16, 8."),
        (lambda t: t.update(weight_scale=t["weight_scale"][:, :2]), "m.weight_scale: expected"),
        (lambda t: t.update(weight_scale=t["weight_scale"] * np.float32(np.nan)), "m.weight_scale"),
        (lambda t: t.update(weight_zero_point=t["weight_zero_point"][:1]), "m.weight_zero_point: expected"),
        (lambda t: t["weight_g_idx"].__setitem__(0, 3), "m.weight_g_idx: expected groups 0 to 2"),
        (lambda t: t["weight_g_idx"].fill(0), "m.weight_g_idx: expected groups of 8 inputs"),
    ],
)
def test_packed_tensors_that_do_not_fit_are_refused(edit: Callable[[dict[str, np.ndarray]], Any], message: str) -> None:
    tensors, _ = make_file(print_seed(), PACKED, 16, 24, "float32")
    edit(tensors)
    with pytest.raises(InputError, match=message):
        compressed.unpack({f"m.{name}": tensor for name, tensor in tensors.items()}, PACKED, "m", (16, 24))


def test_values_that_cannot_be_are_refused() -> None:
    """Zero points of symmetric files, codes of more bits than the configuration says, NaN, and other shapes."""
    rng = print_seed()
    int8 = Compressed(codes="int8", format="int-quantized", strategy="channel")
    tensors, values = make_file(rng, int8, 4, 6)
    # Old versions write zero points of 0.
    zeros = np.zeros((4, 1), np.int8)
    scalar.assert_same_values(compressed.unpack({**tensors, "weight_zero_point": zeros}, int8), values)
    # Scales of activations that calibration found are accepted and not used.
    static = np.ones(1, np.float32)
    scalar.assert_same_values(compressed.unpack({**tensors, "input_scale": static}, int8), values)
    with pytest.raises(InputError, match="weight_zero_point is not 0, but the config says symmetric=true"):
        compressed.unpack({**tensors, "weight_zero_point": zeros + np.int8(1)}, int8)
    with pytest.raises(InputError, match="values of 4 bits, -8 to 7, got -128 to 127"):
        compressed.unpack(tensors, dataclasses.replace(int8, codes="int4"))
    with pytest.raises(InputError, match=r"is \[4, 6\].*the model needs \[6, 4\]"):
        compressed.unpack(tensors, int8, shape=(6, 4))
    float8 = Compressed(codes="float8_e4m3fn", format="float-quantized", strategy="channel")
    tensors, _ = make_file(rng, float8, 4, 6)
    tensors["weight"].view(np.uint8)[1, 2] = 0xFF
    with pytest.raises(InputError, match="weight holds 1 values that are not a number"):
        compressed.unpack(tensors, float8)


def test_what_the_format_cannot_hold_is_not_written() -> None:
    """An order, zero points, and scales that differ where the file has one."""
    rng = print_seed()
    codes = compressed.unpack(make_file(rng, PACKED, 16, 24)[0], PACKED)
    float8 = Compressed(codes="float8_e4m3fn", format="float-quantized", strategy="channel")
    block = dataclasses.replace(float8, strategy="block", block=(2, 8))
    rows = compressed.unpack(make_file(rng, float8, 16, 24)[0], float8)
    for wrong, form, message in (
        (codes, dataclasses.replace(PACKED, act_order=False), "sorted by group"),
        (codes, dataclasses.replace(PACKED, offset="none"), "it has zero points"),
        (codes, float8, "codes are int4, not float8_e4m3fn"),
        (rows, dataclasses.replace(float8, strategy="tensor"), "scales differ between outputs .*tensor"),
        (rows.regrouped(8), block, "scales differ between outputs .*block"),
    ):
        with pytest.raises(InputError, match=message):
            compressed.pack(wrong, form)
