"""Files of float8 weights are read and written by their formula, bit for bit, and wrong ones are refused."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.quantized import fp8
from convert.quantized.fp8 import Fp8
from qwen_jax.errors import InputError
from tests.convert.quantized import scalar
from tests.convert.quantized.test_compressed import random_float8
from tests.helpers.runs import print_seed

WHERE = Path("model/config.json")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def make_file(
    rng: np.random.Generator, info: Fp8, outputs: int, inputs: int, scales: str = "float32"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a random matrix and the values that they stand for, by the formula of the format."""
    rows, columns = info.block or (outputs if info.strategy == "tensor" else 1, inputs)
    s = scalar.floats(rng, (-(-outputs // rows), -(-inputs // columns)), scales)
    tensors = {
        "weight": random_float8(rng, outputs, inputs),
        info.scale_name: s.reshape(1) if info.strategy == "tensor" else s,
    }
    q = tensors["weight"].astype(np.float64)
    return tensors, scalar.published(
        outputs, inputs, lambda o, i: q[o, i], lambda o, i: float(s[o // rows, i // columns])
    )


@st.composite
def configurations(draw: st.DrawFn) -> Fp8:
    strategy: Any = draw(st.sampled_from(["tensor", "channel", "block"]))
    return Fp8(
        codes="float8_e4m3fn",
        activations="float8_e4m3fn",
        strategy=strategy,
        block=draw(st.sampled_from([(1, 8), (4, 3), (16, 16)])) if strategy == "block" else None,
        scale_name="weight_scale_inv" if strategy == "block" else "weight_scale",
        skipped=draw(st.sampled_from([(), ("lm_head",)])),
    )


@settings(deadline=None, max_examples=80)
@given(
    configurations(),
    st.integers(1, 19),
    st.integers(1, 41),
    st.sampled_from(list(scalar.DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_files_are_read_and_written_by_the_formula(
    info: Fp8, outputs: int, inputs: int, scales: str, seed: int
) -> None:
    """Values, bytes after writing, names that are asked for, and the configuration, over all forms and odd sizes."""
    shape = (outputs, inputs)
    tensors, values = make_file(np.random.default_rng(seed), info, *shape, scales)
    codes = fp8.unpack(tensors, info, shape=shape)
    scalar.assert_same_values(codes, values)
    assert codes.group == info.group_of(inputs)
    scalar.assert_same_bytes(fp8.pack(codes, info), tensors)
    scalar.assert_same_bytes(fp8.pack(codes.regrouped(1), info), tensors)
    scalar.assert_asked_for(fp8.tensor_names(Q_PROJ, shape, info), Q_PROJ, tensors)
    assert fp8.read_config(WHERE, fp8.write_config(info)) == info


def test_scales_of_all_shapes_are_read() -> None:
    """A number, a vector and a column, by either name; scales of activations are accepted and not used."""
    info = Fp8(codes="float8_e4m3fn")
    tensors, values = make_file(print_seed(), info, 5, 7)
    for scale in (tensors["weight_scale"].reshape(()), tensors["weight_scale"].reshape(1, 1)):
        found = fp8.unpack({"weight": tensors["weight"], "weight_scale_inv": scale}, info)
        scalar.assert_same_values(found, values)
    static = {**tensors, "input_scale": np.ones((), np.float32)}
    scalar.assert_same_values(fp8.unpack(static, info), values)
    tensors, values = make_file(print_seed(), dataclasses.replace(info, strategy="channel"), 5, 7)
    for scale in (tensors["weight_scale"], tensors["weight_scale"].reshape(5)):
        scalar.assert_same_values(fp8.unpack({"weight": tensors["weight"], "weight_scale": scale}, info), values)


def test_configurations_and_modules(caplog: pytest.LogCaptureFixture) -> None:
    """The configurations of transformers, AutoFP8 and FBGEMM."""
    float8: Any = {"codes": "float8_e4m3fn", "activations": "float8_e4m3fn"}
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    assert fp8.read_config(WHERE, blocks) == Fp8(
        **float8, strategy="block", block=(128, 128), scale_name="weight_scale_inv"
    )
    autofp8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", "mlp.gate"]}
    with caplog.at_level(logging.WARNING):
        info = fp8.read_config(WHERE, autofp8)
    assert "static scales of activations are not used" in caplog.text
    assert info == Fp8(**float8, skipped=("lm_head", "mlp.gate"))
    assert info.of("lm_head") is None
    assert info.of("model.layers.0.mlp.gate") is None
    assert info.of("model.layers.0.mlp.gate_proj") == Fp8(**float8)
    fbgemm = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    assert fp8.read_config(WHERE, fbgemm) == Fp8(**float8, strategy="channel", skipped=("lm_head",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        ({"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({"activation_scheme": "other"}, "'dynamic' or 'static', got 'other'"),
        ({"weight_block_size": [128]}, "two positive sizes"),
        ({"weight_block_size": [128, 0]}, "two positive sizes"),
        ({"ignored_layers": "lm_head"}, "a list of names as ignored_layers"),
    ],
)
def test_wrong_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        fp8.read_config(WHERE, config)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("weight"), "has no m.weight"),
        (lambda t: t.pop("weight_scale_inv"), "weight_scale or weight_scale_inv, and has 0"),
        (lambda t: t.update(weight_scale=t["weight_scale_inv"]), "weight_scale or weight_scale_inv, and has 2"),
        (lambda t: t.update(weight=t["weight"].view(np.uint8)), "m.weight: expected float8_e4m3fn"),
        (lambda t: t.update(weight=t["weight"][:-1]), "m is .15, 24.*the model needs .16, 24"),
        (lambda t: t.update(weight_scale_inv=t["weight_scale_inv"][:1]), "m.weight_scale_inv: expected .* .2, 3."),
        (lambda t: t["weight_scale_inv"].fill(np.inf), "m.weight_scale_inv holds 6 values"),
        (lambda t: t["weight"].view(np.uint8)[3:5].fill(0x7F), "m.weight holds 48 values that are not a number"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit: Callable[[dict[str, np.ndarray]], Any], message: str) -> None:
    info = Fp8(codes="float8_e4m3fn", strategy="block", block=(8, 8), scale_name="weight_scale_inv")
    tensors, _ = make_file(print_seed(), info, 16, 24)
    edit(tensors)
    with pytest.raises(InputError, match=message):
        fp8.unpack({f"m.{name}": tensor for name, tensor in tensors.items()}, info, "m", (16, 24))
