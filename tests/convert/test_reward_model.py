"""Reward models of transformers and of Qwen load with the same scores, and are written byte for byte."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from transformers import Qwen2ForSequenceClassification

import convert
from convert.huggingface import export
from convert.verify import CouldNotCompareError, verify
from qwen_jax.cli import main
from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.inference import Engine
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import abstract_params, init_params, with_fresh_score_head
from qwen_jax.published import PUBLISHED, published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.reward import edit_config, make_reward_checkpoint, tensors_of

KINDS = ("linear", "mlp")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_byte_identical_and_tells_the_heads_apart(
    kind: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through Orbax, and to Hugging Face again; only the unused output head of Qwen's model is left out, said aloud."""
    make_reward_checkpoint(tmp_path / "a", kind, dtype=dtype)
    with caplog.at_level(logging.WARNING, "convert"):
        convert.convert(tmp_path / "a", tmp_path / "b")
    assert ("lm_head.weight, which a reward model does not use" in caplog.text) == (kind == "mlp")
    convert.convert(tmp_path / "b", tmp_path / "c")
    expected = tensors_of(tmp_path / "a")
    expected.pop("lm_head.weight", None)
    assert tensors_of(tmp_path / "c") == expected
    assert (tmp_path / "c/config.json").read_bytes() == (tmp_path / "a/config.json").read_bytes()
    assert load_config(tmp_path / "b").score == kind
    assert convert.open_source(tmp_path / "c").config.score == kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_decide_which_head_it_is(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    """A config.json that names another class, and names without the leading "model.", do not mislead."""
    make_reward_checkpoint(tmp_path / "a", kind, lm_head=False)
    edit_config(tmp_path / "a", architectures=None)
    config, params = convert.load(tmp_path / "a", mesh)
    assert config.score == kind
    assert ("weight" in params["score"]) == (kind == "linear")
    # A new folder says what it is.
    convert.convert(tmp_path / "a", tmp_path / "b", to="hf")
    assert load_config(tmp_path / "b").score == kind
    assert tensors_of(tmp_path / "b") == tensors_of(tmp_path / "a")


def test_verify_compares_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        make_reward_checkpoint(tmp_path / kind, kind)
        for against in ("transformers", "numpy"):
            report = verify(tmp_path / kind, against=against)  # type: ignore[arg-type]
            assert report.passed
            assert report.max_relative < 1e-5
    # The other head on the same weights is not the same model.
    make_reward_checkpoint(tmp_path / "other", "linear", seed=1)
    assert not verify(tmp_path / "linear", tmp_path / "other").passed
    make_hf_checkpoint(tmp_path / "language")
    with pytest.raises(CouldNotCompareError, match="is a reward model, the other one a language model"):
        verify(tmp_path / "linear", tmp_path / "language")
    # `info` counts the head.
    for kind, count in (("linear", 64), ("mlp", 64 * 64 + 64 + 64 + 1)):
        assert main(["info", str(tmp_path / kind)]) == 0
        assert f"{count:,}, a {kind} score head" in capsys.readouterr().out
        config = load_config(tmp_path / kind)
        sizes = [x.size for x in jax.tree.leaves(abstract_params(config))]
        assert config.num_params()["total"] == sum(sizes)


def test_a_written_linear_model_is_read_by_transformers(tmp_path: Path) -> None:
    """Weights in memory become a folder of transformers' class, with one label and the padding that batches need."""
    model = make_hf_checkpoint(tmp_path / "language", tie=False)
    (tmp_path / "language/generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 3}')
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    config, params = convert.load(tmp_path / "language", mesh)
    rewarded, params = with_fresh_score_head(params, config, jax.random.key(1))
    export(params, rewarded, tmp_path / "reward", extra_files_from=tmp_path / "language")
    theirs = Qwen2ForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert (theirs.config.num_labels, theirs.config.pad_token_id) == (1, 3)
    np.testing.assert_array_equal(theirs.score.weight.detach().numpy(), params["score"]["weight"])
    # As where a run writes its model: nothing but the tokenizer says what padding is.
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    tokenizer.save(tmp_path / "tokenizer")
    export(params, rewarded, tmp_path / "run", extra_files_from=tmp_path / "tokenizer")
    assert read_json(tmp_path / "run" / "config.json")["pad_token_id"] == tokenizer.pad_id
    for name, x in model.model.state_dict().items():
        assert torch.equal(theirs.model.state_dict()[name], x), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_is_the_same_on_every_mesh_and_has_the_right_spread(kind: Any, mesh: Mesh) -> None:
    model = published("tiny-untied")
    found = []
    for axes in ({}, {"fsdp": 2, "tensor": 2}, {"context": 2}):
        other = make_mesh(axes)
        with jax.set_mesh(other):
            params = init_params(model, jax.random.key(0), other)
        config, params = with_fresh_score_head(params, model, jax.random.key(7), kind)
        assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))
        assert "lm_head" not in params
        found.append(jax.tree.map(np.asarray, params["score"]))
    D = model.hidden_size
    for leaf, *others in zip(*map(jax.tree.leaves, found), strict=True):
        for other in others:
            np.testing.assert_array_equal(other, leaf)
        if leaf.ndim == 2:
            assert abs(leaf.std() * (D + 1) ** 0.5 - 1) < 4 / leaf.size**0.5
        else:
            assert not leaf.any()
    # As at the start of training from random weights.
    with jax.set_mesh(mesh):
        started = init_params(config, jax.random.key(0), mesh)
    assert jax.tree.structure(started) == jax.tree.structure(params)


def test_published_models_have_no_score_head() -> None:
    assert all(published(name).score is None and published(name).num_params()["score"] == 0 for name in PUBLISHED)


@pytest.mark.parametrize("name", ["tiny", "qwen1.5-moe-a2.7b"])
@pytest.mark.parametrize("kind", KINDS)
def test_configs_round_trip(name: str, kind: Any) -> None:
    config = dataclasses.replace(published(name), score=kind)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_other_heads_are_refused(tmp_path: Path, mesh: Mesh) -> None:
    make_reward_checkpoint(tmp_path / "three", "linear", num_labels=3)
    with pytest.raises(InputError, match=r"with 3 labels .*Expected one label"):
        load_config(tmp_path / "three")
    # transformers writes no number of labels where it is two: the tensor tells.
    make_reward_checkpoint(tmp_path / "two", "linear", num_labels=2)
    with pytest.raises(InputError, match="score head of 2 labels; expected one"):
        convert.open_source(tmp_path / "two")
    edit_config(tmp_path / "two", architectures=["Qwen2ForProcessRewardModel"])
    with pytest.raises(
        InputError, match=r"Qwen2ForRewardModel of a reward model, got \['Qwen2ForProcessRewardModel'\]"
    ):
        load_config(tmp_path / "two")
    # A language model that says it is a reward model.
    make_hf_checkpoint(tmp_path / "language")
    edit_config(tmp_path / "language", architectures=["Qwen2ForSequenceClassification"], id2label={"0": "x"})
    with pytest.raises(InputError, match="has no score head"):
        convert.open_source(tmp_path / "language")
    # A reward model where a language model was asked for, and the other head.
    make_reward_checkpoint(tmp_path / "mlp", "mlp")
    config = load_config(tmp_path / "mlp")
    for score, expected in ((None, "a language model"), ("linear", "linear")):
        asked = dataclasses.replace(config, score=score)
        with pytest.raises(InputError, match=rf"has an mlp score head .*expected {expected}"):
            convert.load_params(tmp_path / "mlp", asked, mesh)
    with pytest.raises(InputError, match="score must be linear, mlp or null"):
        dataclasses.replace(config, score="cubic")  # type: ignore[arg-type]


def test_a_reward_model_generates_nothing(tmp_path: Path, mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> None:
    make_reward_checkpoint(tmp_path / "rm", "linear")
    for command in (["generate", str(tmp_path / "rm"), "--prompt-ids", "1,2"], ["chat", str(tmp_path / "rm")]):
        assert main(command) == 1
        assert "reward model" in capsys.readouterr().err
    config, params = convert.load(tmp_path / "rm", mesh)
    with pytest.raises(InputError, match="generates no text"):
        Engine(config, params, mesh)


def test_a_name_of_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_reward_checkpoint(tmp_path / "a", "linear")
    tensors = load_file(tmp_path / "a/model.safetensors")
    save_file({**tensors, "score.bias": torch.zeros(1)}, tmp_path / "a/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"unknown 1 of the tensors.*score.bias"):
        convert.open_source(tmp_path / "a")
    assert json.loads((tmp_path / "a/config.json").read_text())["architectures"] == ["Qwen2ForSequenceClassification"]


def test_unstacked_and_stacked_layouts_hold_the_same_head(tmp_path: Path, mesh: Mesh) -> None:
    make_reward_checkpoint(tmp_path / "a", "mlp")
    heads = [
        convert.load(tmp_path / "a", mesh, options=Options(stacked=stacked))[1]["score"] for stacked in (True, False)
    ]
    jax.tree.map(np.testing.assert_array_equal, *heads)
