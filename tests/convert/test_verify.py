"""`verify` passes equal models, fails different ones, and reports when it cannot compare."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert import verify as module
from convert.verify import EXACT, ROUNDED, CouldNotCompareError, compare, verify
from qwen_jax.errors import InputError
from tests.helpers.hf import make_hf_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_hf_checkpoint(folder / "hf", tie=False)
    convert.convert(folder / "hf", folder / "orbax")
    return folder


def changed(checkpoints: Path, folder: Path, name: str, scale: float) -> Path:
    shutil.copytree(checkpoints / "hf", folder)
    held = load_file(folder / "model.safetensors")
    held[name] = held[name] * np.float32(scale)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_conversion_passes_with_no_difference(checkpoints: Path) -> None:
    report = verify(checkpoints / "hf", checkpoints / "orbax")
    assert report.passed
    assert report.exit_code == 0
    assert report.max_abs == report.mean_kl == 0.0
    assert report.top1_agreement == 1.0
    assert report.tolerance == EXACT
    assert json.loads(report.to_json())["passed"] is True
    assert str(report).startswith("PASS")


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_transformers_agrees(kind: str, checkpoints: Path) -> None:
    report = verify(checkpoints / kind, against="transformers")
    assert report.passed
    assert report.max_relative < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_pass_with_the_coarser_tolerance(dtype: str, checkpoints: Path, tmp_path: Path) -> None:
    convert.convert(checkpoints / "hf", tmp_path / "b", dtype=dtype)
    report = verify(checkpoints / "hf", tmp_path / "b")
    assert report.passed
    assert report.tolerance == ROUNDED[dtype]
    assert report.dtypes == ("float32", dtype)
    assert report.max_relative > EXACT.max_relative, "Rounding must be visible, or nothing was rounded."


@pytest.mark.parametrize(
    ("name", "scale"),
    [("model.layers.1.self_attn.v_proj.bias", 1.01), ("model.norm.weight", 1.001), ("lm_head.weight", -1.0)],
)
def test_a_small_change_of_one_tensor_fails(name: str, scale: float, checkpoints: Path, tmp_path: Path) -> None:
    report = verify(checkpoints / "hf", changed(checkpoints, tmp_path / "b", name, scale))
    assert not report.passed
    assert report.exit_code == 1
    assert str(report).startswith("FAIL")


@pytest.mark.parametrize("edit", [{"rms_norm_eps": 1e-2}, {"rope_parameters": {"rope_theta": 1e4}}])
def test_another_setting_fails(edit: dict[str, Any], checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "hf", tmp_path / "b")
    path = tmp_path / "b/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    assert not verify(checkpoints / "hf", tmp_path / "b").passed


def test_weights_that_are_not_finite_fail_and_the_report_is_json(checkpoints: Path, tmp_path: Path) -> None:
    bad = changed(checkpoints, tmp_path / "b", "model.norm.weight", np.nan)
    for report in (verify(checkpoints / "hf", bad), verify(bad, bad)):
        assert not report.passed
        assert json.loads(report.to_json())["max_abs"] is None
        assert "NaN" not in report.to_json()


def test_the_figures_match_their_definitions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    a, b = np.log(p)[None, None].astype(np.float32), np.log(q)[None, None].astype(np.float32) + 3
    report = compare(a, b, ("float32", "float32"))
    assert report.mean_kl == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert report.max_abs == pytest.approx(3 + np.log(2), rel=1e-5)
    assert report.max_relative == pytest.approx((3 + np.log(2)) / np.log(4), rel=1e-5)
    assert report.top1_agreement == 0.0
    assert report.positions == 1


def test_two_checkpoints_of_one_architecture_are_compiled_once(checkpoints: Path, tmp_path: Path) -> None:
    """Compiling is most of the time of a small comparison. Ids that end a text and stored dtypes do not matter."""
    make_hf_checkpoint(tmp_path, tie=False, eos_token_id=3, dtype="bfloat16")
    module._logits.clear_cache()
    verify(checkpoints / "orbax", tmp_path)
    assert module._logits._cache_size() == 1


def test_given_tokens_are_used(checkpoints: Path) -> None:
    assert verify(checkpoints / "hf", checkpoints / "orbax", tokens_BT=np.zeros((3, 5), int)).positions == 15


def test_other_vocabularies_cannot_be_compared(checkpoints: Path, tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path, tie=False, vocab_size=161)
    with pytest.raises(CouldNotCompareError, match=r"vocabulary of 160.*of 161"):
        verify(checkpoints / "hf", tmp_path)


def test_missing_checkpoints_and_invalid_arguments_are_input_errors(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        verify(checkpoints / "hf", tmp_path / "nothing")
    with pytest.raises(InputError, match="one of the two"):
        verify(checkpoints / "hf")
    with pytest.raises(InputError, match="one of the two"):
        verify(checkpoints / "hf", checkpoints / "hf", against="transformers")


def test_without_transformers_the_message_says_what_to_install(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CouldNotCompareError, match="pip install transformers"):
        verify(checkpoints / "hf", against="transformers")


def test_the_numpy_model_agrees_with_and_without_dual_chunk_attention(checkpoints: Path, tmp_path: Path) -> None:
    """Plain attention, and several chunks of dual-chunk attention; a wrong model of it would be seen."""
    report = verify(checkpoints / "hf", against="numpy")
    assert report.passed
    assert report.max_relative < 1e-5
    folder = tmp_path / "long"
    shutil.copytree(checkpoints / "hf", folder)
    file = folder / "config.json"
    chunks = {"chunk_size": 512, "local_size": 16, "original_max_position_embeddings": 512}
    # What other tools keep beside these keys concerns sparse attention alone.
    config = json.loads(file.read_text()) | {
        "dual_chunk_attention_config": {**chunks, "sparse_attention_enabled": True}
    }
    file.write_text(json.dumps(config))
    report = verify(folder, against="numpy")
    assert report.passed
    assert report.max_relative < 1e-5
    # Short chunks change the logits: the two runs above compared different attention.
    source = convert.open_source(folder)
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (1, 64))
    dual, _ = module._run_numpy(source, tokens)
    plain, _ = module._run_numpy(convert.open_source(checkpoints / "hf"), tokens)
    assert np.abs(dual - plain).max() > 1e-3 * np.abs(plain).max()


def test_the_numpy_model_says_what_it_has_not(tmp_path: Path) -> None:
    """Experts and YaRN are not compared, which is no failed comparison."""
    make_hf_checkpoint(tmp_path / "moe", moe=True)
    with pytest.raises(CouldNotCompareError, match="has experts"):
        verify(tmp_path / "moe", against="numpy")
