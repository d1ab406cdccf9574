"""GPTQ files are read and written by their published formulas, bit for bit, and wrong ones are refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.quantized import gptq
from convert.quantized.gptq import Gptq
from qwen_jax.errors import InputError
from tests.convert.quantized import scalar
from tests.helpers.runs import print_seed

WHERE = Path("model/config.json")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def zero_words(z: scalar.Matrix, info: Gptq) -> np.ndarray:
    """qzeros of zero points [G, O]: as they are, or less 1 in each code, or less 1 in each code of whole words."""
    bits, mask = info.bits, (1 << info.bits) - 1
    if info.version == "gptq_v2":
        return scalar.words(z, bits)
    if not info.in_words:
        return scalar.words([[(value - 1) & mask for value in row] for row in z], bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    packed = [[(int(value) - ones) % (1 << 32) for value in row] for row in scalar.words(z, bits)]
    return np.array(packed, np.uint32).view(np.int32)


def make_file(
    rng: np.random.Generator, info: Gptq, outputs: int, inputs: int, scales: str = "float16"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a random matrix and the values that they stand for, by the published formula."""
    group = info.group or inputs
    groups = -(-inputs // group)
    q = scalar.integers(rng, outputs, inputs, info.bits)
    z = scalar.integers(rng, groups, outputs, info.bits)
    if info.offset == "none":
        z = [[1 << (info.bits - 1)] * outputs] * groups
    g_idx = np.arange(inputs) // group
    if info.ordered:
        g_idx = rng.permutation(g_idx)
    s = scalar.floats(rng, (groups, outputs), scales)
    tensors = {
        "qweight": np.ascontiguousarray(scalar.words(q, info.bits).T),
        "qzeros": zero_words(z, info),
        "scales": s,
        "g_idx": g_idx.astype(np.int32),
    }
    values = scalar.published(
        outputs, inputs, lambda o, i: q[o][i] - z[g_idx[i]][o], lambda o, i: float(s[g_idx[i], o])
    )
    return tensors, values


@st.composite
def configurations(draw: st.DrawFn) -> Gptq:
    """Every form of a GPTQ file."""
    return Gptq(
        codes=draw(st.sampled_from(["int4", "int8"])),
        group=draw(st.sampled_from([0, 1, 3, 4, 8, 16])),
        offset=draw(st.sampled_from(["none", "zero"])),
        desc_act=draw(st.booleans()),
        static_groups=draw(st.booleans()),
        version=draw(st.sampled_from(["gptq", "gptq_v2"])),
        quantizer=draw(st.sampled_from([(), ("gptqmodel:2.0.0",), ("optimum:1.2", "auto_gptq:0.7")])),
    )


@settings(deadline=None, max_examples=150)
@given(
    configurations(),
    st.integers(1, 19),
    st.integers(1, 41),
    st.sampled_from(list(scalar.DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_files_are_read_and_written_by_the_published_formula(
    info: Gptq, outputs: int, inputs: int, scales: str, seed: int
) -> None:
    """Values, bytes after writing, and the names that are asked for, over all forms and odd sizes."""
    tensors, values = make_file(np.random.default_rng(seed), info, outputs, inputs, scales)
    codes = gptq.unpack(tensors, info, shape=(outputs, inputs))
    scalar.assert_same_values(codes, values)
    assert codes.group == info.group_of(inputs)
    assert (codes.order is not None, codes.zeros is not None) == (info.ordered, info.offset == "zero")
    scalar.assert_same_bytes(gptq.pack(codes, info), tensors)
    # Finer groups stand for the same values and the same file.
    finer = codes.regrouped(1)
    scalar.assert_same_values(finer, values)
    scalar.assert_same_bytes(gptq.pack(finer, info), tensors)
    expected = gptq.tensor_names(Q_PROJ, (outputs, inputs), info)
    assert set(expected) == {f"{Q_PROJ}.{name}" for name in tensors}
    scalar.assert_asked_for(expected, Q_PROJ, tensors)


@pytest.mark.parametrize(
    ("codes", "version", "word"),
    [
        ("int4", "gptq", 0x77777777),
        ("int8", "gptq", 0x7F7F7F7F),
        ("int4", "gptq_v2", 0x88888888),
        ("int8", "gptq_v2", 0x80808080),
    ],
)
def test_zero_points_of_symmetric_files_are_the_words_that_qwen_publishes(codes: Any, version: Any, word: int) -> None:
    """Reading and writing agree with the constant words of Qwen's files."""
    info = Gptq(codes=codes, group=8, version=version)
    tensors, values = make_file(print_seed(), info, 16, 24)
    assert set(tensors["qzeros"].view(np.uint32).flat) == {word}
    scalar.assert_same_values(gptq.unpack(tensors, info), values)
    # A file of the other version is recognised.
    other = dataclasses.replace(info, version="gptq_v2" if version == "gptq" else "gptq")
    with pytest.raises(InputError, match=f"sym=true.*checkpoint_format should be {version!r}"):
        gptq.unpack(tensors, other)


def test_the_one_of_version_1_wraps_by_codes_or_by_words() -> None:
    """Zero point 0 is stored as -1: 0xF alone, or with a borrow from the code above, as GPTQModel subtracts words."""
    info = Gptq(codes="int4", group=8, offset="zero")
    tensors, _ = make_file(print_seed(), info, 8, 8)
    z = [[0, 5, 0, 15, 1, 0, 0, 9]]
    for quantizer, stored in (((), 0x8FF0EF4F), (("gptqmodel:1.9",), 0x7EF0DF3F)):
        info = dataclasses.replace(info, quantizer=quantizer)
        tensors["qzeros"] = np.array([[stored]], np.uint32).view(np.int32)
        zeros = gptq.unpack(tensors, info).zeros
        assert zeros is not None
        assert zeros.astype(int).T.tolist() == [[value - 8 for value in z[0]]]


def test_modules_follow_the_rules_of_the_configuration() -> None:
    """dynamic, modules_in_block_to_quantize and lm_head decide which modules are quantised, and how."""
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": True,
        "lm_head": True,
        "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]],
        "dynamic": {
            r"-:model\.layers\.1\..*q_proj": {},
            r"+:.*\.2\.mlp\.down_proj": {"bits": 8, "group_size": 32, "sym": False, "damp_percent": 0.1},
            r"model\.layers\.3\.": {"desc_act": False, "group_size": -1},
            r"model\.layers\.4\.": False,
            "lm_head": {"bits": 8},
        },
    }
    info = gptq.read_config(WHERE, config)
    base = Gptq(codes="int4", group=128, desc_act=True, lm_head=True)
    layer = "model.layers"
    for module, expected in {
        f"{layer}.0.self_attn.q_proj": base,
        f"{layer}.0.self_attn.v_proj": None,
        f"{layer}.0.mlp.down_proj": base,
        f"{layer}.1.self_attn.q_proj": None,
        f"{layer}.1.self_attn.k_proj": base,
        f"{layer}.2.mlp.down_proj": dataclasses.replace(base, codes="int8", group=32, offset="zero"),
        f"{layer}.3.self_attn.k_proj": dataclasses.replace(base, desc_act=False, group=0),
        f"{layer}.4.self_attn.k_proj": None,
        "lm_head": dataclasses.replace(base, codes="int8"),
        "model.embed_tokens": None,
        "model.norm": None,
    }.items():
        assert info.of(module) == expected, module
        if expected is not None:
            assert expected.of(module) == expected
    assert gptq.read_config(WHERE, gptq.write_config(info)) == info
    moe = Gptq(codes="int4", group=128)
    assert [
        name
        for name in ("experts.7.up_proj", "shared_expert.up_proj", "gate", "shared_expert_gate", "gate_proj")
        if moe.of(f"model.layers.0.mlp.{name}") is None
    ] == ["gate", "shared_expert_gate"]
    assert moe.of("lm_head") is None


@settings(deadline=None, max_examples=50)
@given(configurations(), st.booleans())
def test_a_configuration_is_read_as_it_was_written(info: Gptq, lm_head: bool) -> None:
    info = dataclasses.replace(info, lm_head=lm_head)
    assert gptq.read_config(WHERE, gptq.write_config(info)) == info


def test_configurations_of_autogptq_and_gptqmodel_are_read() -> None:
    """The files that Qwen, AutoGPTQ and GPTQModel write, with their extra keys."""
    qwen = {
        "batch_size": 1,
        "bits": 4,
        "block_name_to_quantize": None,
        "cache_block_outputs": True,
        "damp_percent": 0.01,
        "dataset": None,
        "desc_act": False,
        "exllama_config": {"version": 1},
        "group_size": 128,
        "modules_in_block_to_quantize": None,
        "quant_method": "gptq",
        "sym": True,
        "true_sequential": True,
    }
    assert gptq.read_config(WHERE, qwen) == Gptq(codes="int4", group=128)
    autogptq = {
        "bits": 8,
        "group_size": -1,
        "damp_percent": 0.01,
        "desc_act": True,
        "static_groups": True,
        "sym": False,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    assert gptq.read_config(WHERE, autogptq) == Gptq(codes="int8", offset="zero", desc_act=True, static_groups=True)
    gptqmodel = {
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "lm_head": False,
        "method": "gptq",
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "sym": False,
        "meta": {"quantizer": ["gptqmodel:7.7.0"], "uri": "https://x", "static_groups": False, "damp_percent": 0.05},
    }
    found = gptq.read_config(WHERE, gptqmodel)
    assert found == Gptq(codes="int4", group=32, offset="zero", desc_act=True, quantizer=("gptqmodel:7.7.0",))
    assert found.in_words
    assert found.ordered


BASE = {"bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": None}, "an integer as bits"),
        ({"bits": True}, "an integer as bits"),
        ({"bits": 3}, "3 bits are not supported.*4 or 8 bits"),
        ({"group_size": None}, "an integer as group_size"),
        ({"group_size": 0}, "positive group_size, or -1"),
        ({"desc_act": "no"}, "true or false as desc_act"),
        ({"sym": 1}, "true or false as sym"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not supported"),
        ({"format": "gptq_p"}, "'gptq_p' is not supported"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "contradict"),
        ({"is_marlin_format": True}, "repacked for Marlin"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"meta": "x"}, "an object as meta"),
        ({"dynamic": {"a(": {}}}, "not a regular expression"),
        ({"dynamic": ["a"]}, "an object of objects as dynamic"),
        ({"dynamic": {"a": {"bits": 2}}}, "2 bits are not supported"),
        ({"dynamic": {"a": {"format": "marlin"}}}, "changes format"),
        ({"modules_in_block_to_quantize": "q_proj"}, "lists of names"),
    ],
)
def test_wrong_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**BASE, **change}.items() if value is not None}
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        gptq.read_config(WHERE, config)


def drop(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(make(tensors[name]))})


def put_at(place: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("qweight"), "has no m.qweight"),
        (drop("qzeros"), "has no m.qzeros"),
        (drop("scales"), "has no m.scales"),
        (drop("g_idx"), "has no m.g_idx"),
        (put("qweight", lambda x: x[:-1]), r"m.qweight: expected int32 \[3, 16\], got int32 \[2, 16\]"),
        (put("qweight", lambda x: np.concatenate([x, x])), r"m.qweight.*got int32 \[6, 16\]"),
        (put("qweight", lambda x: x.astype(np.int64)), "m.qweight: expected int32"),
        (put("qweight", lambda x: x[0]), "m.qweight: expected two axes"),
        (put("qzeros", lambda x: x[:, :1]), "m.qzeros: expected"),
        (put("scales", lambda x: x[:1]), "m.scales: expected"),
        (put("scales", lambda x: x.astype(np.float64)), "m.scales: expected float16"),
        (put("scales", put_at((0, 3), np.nan)), "m.scales holds 1 values that are infinite or not a number, of 48"),
        (put("scales", put_at((2, 1), np.inf)), "m.scales holds 1 values"),
        (put("g_idx", lambda x: x[:-1]), "m is .16, 23. .outputs, inputs., the model needs"),
        (put("g_idx", put_at(0, 3)), "m.g_idx: expected groups 0 to 2 .* got 0 to 3"),
        (put("g_idx", put_at(0, -1)), "m.g_idx: expected groups 0 to 2 .* got -1 to 2"),
        (put("g_idx", np.zeros_like), "m.g_idx: expected groups of 8 inputs .* got groups of 0 to 24"),
        (lambda tensors: tensors.update({"extra": tensors["scales"]}), "does not: m.extra"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit: Callable[[dict[str, np.ndarray]], Any], message: str) -> None:
    """Each message names the tensor, what was expected and what came."""
    info = Gptq(codes="int4", group=8, offset="zero", desc_act=True)
    tensors, _ = make_file(print_seed(), info, 16, 24)
    edit(tensors)
    with pytest.raises(InputError, match=message):
        gptq.unpack({f"m.{name}": tensor for name, tensor in tensors.items()}, info, "m", (16, 24))


def test_contradictions_of_a_file_and_its_configuration_are_refused() -> None:
    """Bits, groups, the order and symmetry of a file are those of its configuration; a file of another model is not."""
    rng = print_seed()
    info = Gptq(codes="int4", group=8, offset="zero", desc_act=True)
    tensors, _ = make_file(rng, info, 16, 24)
    for wrong, message in (
        (dataclasses.replace(info, codes="int8"), "qweight: expected int32 .6, 16., got int32 .3, 16."),
        (dataclasses.replace(info, group=16), "qzeros: expected int32 .2, 2., got int32 .3, 2."),
        (dataclasses.replace(info, desc_act=False), "g_idx is not input // 8.*desc_act=false"),
        (dataclasses.replace(info, static_groups=True), "g_idx is not input // 8.*static_groups=true"),
        (dataclasses.replace(info, offset="none"), "sym=true.*sym=false"),
    ):
        with pytest.raises(InputError, match=message):
            gptq.unpack(tensors, wrong)
    with pytest.raises(InputError, match=r"is \[16, 24\].*the model needs \[24, 16\]"):
        gptq.unpack(tensors, info, shape=(24, 16))
    with pytest.raises(InputError, match="is not quantised by the configuration"):
        gptq.unpack(tensors, info, "lm_head")


def test_a_file_without_g_idx_has_consecutive_groups() -> None:
    """Unless its inputs are ordered; one group of all inputs needs no order."""
    assert not Gptq(codes="int4", group=0, desc_act=True).ordered
    info = Gptq(codes="int4", group=8)
    tensors, values = make_file(print_seed(), info, 16, 24)
    del tensors["g_idx"]
    scalar.assert_same_values(gptq.unpack(tensors, info), values)


def test_what_the_format_cannot_hold_is_not_written() -> None:
    """Codes with minima, another dtype, an order, zero points or groups that the configuration does not have."""
    rng = print_seed()
    info = Gptq(codes="int4", group=8, offset="zero", desc_act=True)
    codes = gptq.unpack(make_file(rng, info, 16, 24)[0], info)
    minima = np.zeros(codes.scales.shape, np.float32)
    differing = dataclasses.replace(codes, scales=scalar.floats(rng, (16, 3), "float16")).regrouped(4)
    differing.scales[5, 1] += 1
    for wrong, form, message in (
        (codes, dataclasses.replace(info, codes="int8"), "codes are int4, not int8"),
        (codes, dataclasses.replace(info, offset="none"), "it has zero points"),
        (dataclasses.replace(codes, zeros=None), info, "it has no zero points"),
        (dataclasses.replace(codes, mins=minima), info, "it has minima"),
        (codes, dataclasses.replace(info, desc_act=False), "sorted by group"),
        (codes, dataclasses.replace(info, group=4), "groups of 4 inputs or of a divisor, got"),
        (differing, info, "scales of groups of 4 inputs differ within groups of 8"),
    ):
        with pytest.raises(InputError, match=message):
            gptq.pack(wrong, form)
