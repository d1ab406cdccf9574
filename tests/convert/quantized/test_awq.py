"""AWQ files are read and written by their published formula, bit for bit, and wrong ones are refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.quantized import awq
from convert.quantized.awq import Awq
from qwen_jax.errors import InputError
from tests.convert.quantized import scalar
from tests.helpers.runs import print_seed

WHERE = Path("model/config.json")
Q_PROJ = "model.layers.0.self_attn.q_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def make_file(
    rng: np.random.Generator, info: Awq, outputs: int, inputs: int, scales: str = "float16"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a random matrix and the values that they stand for, by the published formula."""
    group = info.group or inputs
    groups = -(-inputs // group)
    q = scalar.integers(rng, inputs, outputs, 4)
    z = scalar.integers(rng, groups, outputs, 4) if info.offset == "zero" else [[8] * outputs] * groups
    s = scalar.floats(rng, (groups, outputs), scales)
    tensors = {"qweight": scalar.words(q, 4, ORDER), "qzeros": scalar.words(z, 4, ORDER), "scales": s}
    return tensors, scalar.published(
        outputs, inputs, lambda o, i: q[i][o] - z[i // group][o], lambda o, i: float(s[i // group, o])
    )


@st.composite
def configurations(draw: st.DrawFn) -> Awq:
    offset = draw(st.sampled_from(["none", "zero"]))
    skipped = draw(st.sampled_from([(), ("lm_head", "mlp.gate")]))
    return Awq(codes="int4", group=draw(st.sampled_from([0, 1, 3, 8, 16])), offset=offset, skipped=skipped)


@settings(deadline=None, max_examples=80)
@given(
    configurations(),
    st.integers(1, 3),
    st.integers(1, 41),
    st.sampled_from(list(scalar.DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_files_are_read_and_written_by_the_published_formula(
    info: Awq, columns: int, inputs: int, scales: str, seed: int
) -> None:
    """Values, bytes after writing, the names that are asked for, and the configuration, over groups and odd sizes."""
    shape = (8 * columns, inputs)
    tensors, values = make_file(np.random.default_rng(seed), info, *shape, scales)
    codes = awq.unpack(tensors, info, shape=shape)
    scalar.assert_same_values(codes, values)
    assert codes.group == info.group_of(inputs)
    assert (codes.order, codes.zeros is not None) == (None, info.offset == "zero")
    scalar.assert_same_bytes(awq.pack(codes, info), tensors)
    scalar.assert_same_bytes(awq.pack(codes.regrouped(1), info), tensors)
    expected = awq.tensor_names(Q_PROJ, shape, info)
    assert set(expected) == {f"{Q_PROJ}.{name}" for name in tensors}
    scalar.assert_asked_for(expected, Q_PROJ, tensors)
    assert awq.read_config(WHERE, awq.write_config(info)) == info


def test_a_word_holds_the_outputs_in_their_published_order() -> None:
    """Column o holds the code o: bits 4 i to 4 i + 3 are those of output (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    info = Awq(codes="int4", group=1, offset="none")
    word = np.array([[0x75316420]], np.uint32).view(np.int32)
    tensors = {
        "qweight": word,
        "qzeros": np.array([[0x88888888]], np.uint32).view(np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    codes = awq.unpack(tensors, info)
    assert codes.codes.astype(int)[:, 0].tolist() == [o - 8 for o in range(8)]


def test_configurations_and_modules() -> None:
    """The configuration that Qwen publishes, and the modules that modules_to_not_convert leaves out."""
    qwen = {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    info = awq.read_config(WHERE, qwen)
    assert info == Awq(codes="int4", group=128, offset="zero")
    assert awq.write_config(info) == qwen
    assert awq.read_config(WHERE, {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}) == info
    # Lists hold whole names, their ends or parts, and expressions.
    skipping = awq.read_config(
        WHERE, {**qwen, "modules_to_not_convert": ["mlp.gate", "layers.1", "self_attn.o_proj", r".*\.5\.mlp"]}
    )
    layer = "model.layers"
    for module, quantized in {
        f"{layer}.0.mlp.gate_proj": True,
        f"{layer}.0.mlp.gate": False,
        f"{layer}.1.mlp.up_proj": False,
        f"{layer}.11.mlp.up_proj": True,
        f"{layer}.0.self_attn.o_proj": False,
        f"{layer}.5.mlp.down_proj": False,
        f"{layer}.5.self_attn.q_proj": True,
        "lm_head": False,
        "model.embed_tokens": False,
    }.items():
        assert skipping.of(module) == (info if quantized else None), module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "'gemv' is not supported.*gemm"),
        ({"version": None, "format": "gemv_fast"}, "'gemv_fast' is not supported"),
        ({"backend": "llm-awq"}, "'llm-awq' is not supported"),
        ({"bits": 8}, "8 bits are not supported"),
        ({"bits": None}, "an integer as w_bit"),
        ({"group_size": -2}, "positive group_size"),
        ({"zero_point": "yes"}, "true or false as zero_point"),
        ({"modules_to_not_convert": "lm_head"}, "a list of names"),
        ({"modules_to_not_convert": ["re:("]}, "not a regular expression"),
    ],
)
def test_wrong_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"bits": 4, "group_size": 128, "version": "gemm", **change}
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        awq.read_config(WHERE, {key: value for key, value in config.items() if value is not None})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("qweight"), "has no m.qweight"),
        (lambda t: t.pop("qzeros"), "has no m.qzeros"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"is \[16, 23\].*the model needs \[16, 24\]"),
        (lambda t: t.update(qweight=t["qweight"][:, :1]), "m.qzeros: expected int32 .3, 1., got int32 .3, 2."),
        (lambda t: t.update(scales=t["scales"][:2]), "m.scales: expected"),
        (lambda t: t.update(scales=t["scales"] * np.float16(np.inf)), "m.scales holds 48 values that are infinite"),
        (lambda t: t.update(g_idx=np.arange(24, dtype=np.int32)), "does not: m.g_idx"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit: Callable[[dict[str, np.ndarray]], Any], message: str) -> None:
    info = Awq(codes="int4", group=8, offset="zero")
    tensors, _ = make_file(print_seed(), info, 16, 24)
    edit(tensors)
    with pytest.raises(InputError, match=message):
        awq.unpack({f"m.{name}": tensor for name, tensor in tensors.items()}, info, "m", (16, 24))


def test_contradictions_are_refused() -> None:
    """Zero points of a file without them, and matrices that AWQ files cannot hold."""
    rng = print_seed()
    info = Awq(codes="int4", group=8, offset="zero")
    tensors, _ = make_file(rng, info, 16, 24)
    symmetric = dataclasses.replace(info, offset="none")
    with pytest.raises(InputError, match=r"zero_point=false.*zero_point=true"):
        awq.unpack(tensors, symmetric)
    codes = awq.unpack(tensors, info)
    assert codes.zeros is not None
    order = rng.permutation(24).astype(np.int32)
    narrow = dataclasses.replace(codes, **{name: getattr(codes, name)[:12] for name in ("codes", "scales", "zeros")})
    for wrong, form, message in (
        (codes, symmetric, "it has zero points"),
        (dataclasses.replace(codes, order=order), info, "sorted by group"),
        (narrow, info, "12 outputs; AWQ files hold multiples of 8"),
    ):
        with pytest.raises(InputError, match=message):
            awq.pack(wrong, form)
