"""Checkpoints that transformers loads are loaded with the same logits; others are refused with the right reason.

Each case changes one checkpoint of transformers the way some other tool writes it.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM, Qwen2Model

import convert
from convert.verify import verify
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from tests.helpers.forward import logits
from tests.helpers.hf import hf_logits, make_hf_checkpoint

Tensors = dict[str, torch.Tensor]
Index = dict[str, str]
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied and an untied model, and the tied one in bfloat16; random weights that differ from run to run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    seed = int.from_bytes(os.urandom(4), "little")
    make_hf_checkpoint(folder / "tied", seed=seed)
    make_hf_checkpoint(folder / "untied", tie=False, seed=seed)
    make_hf_checkpoint(folder / "bfloat16", dtype="bfloat16", seed=seed)
    make_hf_checkpoint(folder / "moe", moe=True, seed=seed)
    return folder


def change(edit: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    """Rewrites the tensors of a folder."""

    def write(folder: Path) -> None:
        held = load_file(folder / FILE)
        held = edit(held) or held
        save_file({name: x.contiguous() for name, x in held.items()}, folder / FILE, metadata={"format": "pt"})

    return write


def rename(new_name: Callable[[str], str]) -> Callable[[Path], None]:
    return change(lambda held: {new_name(name): x for name, x in held.items()})


def set_config(**values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return write


def write_index(folder: Path, file: str = FILE, names: list[str] | None = None) -> None:
    found = names or list(load_file(folder / file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(found, file)}))


def in_shards(edit: Callable[[Index, dict[str, Tensors]], Any]) -> Callable[[Path], None]:
    """Splits a folder's weights into two files with an index, and changes both."""

    def write(folder: Path) -> None:
        held = load_file(folder / FILE)
        (folder / FILE).unlink()
        names = sorted(held)
        files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
        shards = {file: {name: held[name] for name in part} for file, part in files.items()}
        index = {name: file for file, part in files.items() for name in part}
        edit(index, shards)
        for file, part in shards.items():
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return write


def add_head(shards: dict[str, Tensors], *files: str) -> None:
    for file in files:
        shards[file][HEAD] = shards["a.safetensors"][EMBED].clone()


def save_as_base_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).model
    assert isinstance(model, Qwen2Model)
    model.save_pretrained(folder)


def save_with_safetensors(folder: Path) -> None:
    """`save_model` keeps one of the names of a shared tensor, the last in the alphabet: that of the head."""
    save_model(AutoModelForCausalLM.from_pretrained(folder), str(folder / FILE))
    assert HEAD in load_file(folder / FILE)
    assert EMBED not in load_file(folder / FILE)


def bool_mask(held: Tensors) -> None:
    held["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    held["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e4)


LOADED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tied, only the head": ("tied", save_with_safetensors),
    "tied, only the head, bare prefix": (
        "tied",
        change(lambda w: {**{k.removeprefix("model."): x for k, x in w.items() if k != EMBED}, HEAD: w[EMBED]}),
    ),
    "tied, both names": ("tied", change(lambda w: w.update({HEAD: w[EMBED].clone()}))),
    "tied, the head in float32": ("bfloat16", change(lambda w: w.update({HEAD: w[EMBED].float()}))),
    "an index of the single file": ("tied", write_index),
    "an index that lists the tied head": ("tied", lambda f: write_index(f, names=[HEAD, *load_file(f / FILE)])),
    "a shard with the tied head that the index does not list": (
        "tied",
        in_shards(lambda index, shards: add_head(shards, "b.safetensors")),
    ),
    "the tied head in both shards": (
        "tied",
        in_shards(lambda index, shards: add_head(shards, "a.safetensors", "b.safetensors")),
    ),
    "an index that puts the tied head into the wrong shard": (
        "tied",
        in_shards(lambda index, shards: (index.update({HEAD: "b.safetensors"}), add_head(shards, "a.safetensors"))),
    ),
    "one norm in float32": ("bfloat16", change(lambda w: w.update({NORM: w[NORM].float()}))),
    "one norm in float16": ("bfloat16", change(lambda w: w.update({NORM: w[NORM].half()}))),
    "all norms in float32": (
        "bfloat16",
        change(lambda w: w.update({k: x.float() for k, x in w.items() if "norm" in k})),
    ),
    "one matrix in float32": (
        "bfloat16",
        change(lambda w: w.update({k: x.float() for k, x in w.items() if "layers.0.mlp.up" in k})),
    ),
    "one norm in float64": ("tied", change(lambda w: w.update({NORM: w[NORM].double()}))),
    "bare prefix": ("tied", rename(lambda name: name.removeprefix("model."))),
    "bare prefix, untied": ("untied", rename(lambda name: name.removeprefix("model."))),
    "a base model": ("tied", save_as_base_model),
    "buffers in float64": (
        "tied",
        change(
            lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64)})
        ),
    ),
    "one buffer for all layers": ("tied", change(lambda w: w.update({"model.rotary_emb.inv_freq": torch.ones(8)}))),
    "attention masks": ("tied", change(bool_mask)),
    "a tensor without elements": ("tied", change(lambda w: w.update({"model.extra": torch.zeros(0, 3)}))),
    "experts, bare prefix": ("moe", rename(lambda name: name.removeprefix("model."))),
}


@pytest.mark.parametrize("case", LOADED)
def test_what_transformers_loads_is_loaded_with_the_same_logits(
    case: str, checkpoints: Path, tmp_path: Path, mesh: Mesh
) -> None:
    kind, edit = LOADED[case]
    shutil.copytree(checkpoints / kind, tmp_path / "a")
    edit(tmp_path / "a")
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"], "the oracle itself must be whole"
    tokens = np.random.default_rng().integers(0, 160, (2, 24))
    expected = hf_logits(model.eval(), tokens)
    config, params = convert.load(tmp_path / "a", mesh, "float32", Options())
    got = logits(config, params, mesh, tokens)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    # And through our own formats.
    dtype = "float32" if "float64" in case and "buffer" not in case else None
    convert.convert(tmp_path / "a", tmp_path / "orbax", dtype=dtype)
    convert.convert(tmp_path / "orbax", tmp_path / "hf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    np.testing.assert_array_equal(hf_logits(back.eval(), tokens), expected)


def test_an_adapter_config_beside_a_model_changes_nothing(checkpoints: Path, tmp_path: Path, mesh: Mesh) -> None:
    """transformers loads such a folder only without PEFT, so the folder without the file is the oracle."""
    shutil.copytree(checkpoints / "tied", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    tokens = np.random.default_rng().integers(0, 160, (2, 24))
    got, expected = (
        logits(*convert.load(folder, mesh, "float32", Options()), mesh, tokens)
        for folder in (tmp_path / "a", checkpoints / "tied")
    )
    np.testing.assert_array_equal(got, expected)


def test_verify_reads_them_too(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "tied", tmp_path / "a")
    save_with_safetensors(tmp_path / "a")
    change(lambda w: w.update({NORM: w[NORM].double()}))(tmp_path / "a")
    report = verify(checkpoints / "tied", tmp_path / "a")
    assert report.passed
    assert report.max_abs == 0


def test_a_leaf_of_several_dtypes_is_widened_aloud(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(checkpoints / "bfloat16", tmp_path / "a")
    change(lambda w: w.update({NORM: w[NORM].float()}))(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", to="hf")
    assert f"stores {NORM} in float32, which differs from other layers" in caplog.text
    before, after = (load_file(tmp_path / x / FILE) for x in "ab")
    for name, x in before.items():
        assert after[name].dtype == (torch.float32 if name.endswith("input_layernorm.weight") else torch.bfloat16)
        assert torch.equal(after[name].float(), x.float()), name
    convert.convert(tmp_path / "a", tmp_path / "c", to="hf", dtype="bfloat16")
    assert {x.dtype for x in load_file(tmp_path / "c" / FILE).values()} == {torch.bfloat16}


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/gone")


def make_adapter(keep_config: bool) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / FILE).rename(folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-7B"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        if not keep_config:
            (folder / "config.json").unlink()

    return write


def add_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(folder / FILE, folder / "adapter_model.safetensors")


LORA_NAME = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "_orig_mod.": (rename(lambda x: f"_orig_mod.{x}"), r"begin with '_orig_mod\.', which torch\.compile adds"),
    "module.": (rename(lambda x: f"module.{x}"), r"begin with 'module\.', which DistributedDataParallel or DeepSpeed"),
    "base_model.model.": (rename(lambda x: f"base_model.model.{x}"), r"'base_model\.model\.', which PEFT adds"),
    "another prefix": (rename(lambda x: f"language_model.{x}"), r"begin with 'language_model\.': found language_model"),
    "another prefix without model.": (
        rename(lambda x: x.replace("model.", "transformer.")),
        r"begin with 'transformer\.': found transformer\.layers\.0",
    ),
    "LoRA in the weights": (
        change(lambda w: w.update({LORA_NAME: torch.zeros(8, 64)})),
        "tensors of a LoRA adapter that is not merged.*merge_and_unload",
    ),
    "a LoRA folder": (make_adapter(False), "LORA adapter.*base model is Qwen/Qwen2.5-7B.*merge_and_unload"),
    "a LoRA folder with config.json": (make_adapter(True), "LORA adapter.*base model is Qwen/Qwen2.5-7B"),
    "an adapter beside a model": (add_adapter, "an adapter beside it, which would not be applied"),
    "an LFS pointer": (lambda f: (f / FILE).write_bytes(LFS_POINTER), "Git LFS pointer.*git lfs pull"),
    "config.json is an LFS pointer": (lambda f: (f / "config.json").write_bytes(LFS_POINTER), "Git LFS pointer"),
    "tokenizer.json is an LFS pointer": (lambda f: (f / "tokenizer.json").write_bytes(LFS_POINTER), "Git LFS pointer"),
    "a dangling link": (lambda f: dangle(f / FILE), "symbolic link to ../../blobs/gone, which does not exist"),
    "config.json is a dangling link": (lambda f: dangle(f / "config.json"), "config.json is a symbolic link"),
    "generation_config.json is a dangling link": (lambda f: dangle(f / "generation_config.json"), "is a symbolic link"),
    "the index is a dangling link": (lambda f: (f / INDEX).symlink_to("gone"), "symbolic link to gone"),
    "a shard is a dangling link": (
        lambda f: (write_index(f), (f / FILE).rename(f / "x"), (f / FILE).symlink_to("gone")),
        "symbolic link to gone",
    ),
    "a weight without elements": (
        change(lambda w: w.update({EMBED: torch.zeros(0)})),
        "1 tensors without elements.*embed_tokens.*ZeRO-3",
    ),
    "one norm in float64, as stored": (
        change(lambda w: w.update({NORM: w[NORM].double()})),
        "input_layernorm.weight.* in float64.*--dtype float32",
    ),
    "a weight of integers": (
        change(lambda w: w.update({NORM: w[NORM].to(torch.int8)})),
        "layers.1.input_layernorm.weight has dtype 'I8'.*quantised",
    ),
    "a weight in float8": (
        change(lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})),
        "dtype 'F8_E4M3'.*quantised",
    ),
    "an index of other files beside a single file": (
        lambda f: (write_index(f), (f / INDEX).write_text((f / INDEX).read_text().replace(FILE, "other.safetensors"))),
        "has both .* which names other files",
    ),
    "a tied head that differs": (
        change(lambda w: w.update({HEAD: w[EMBED] * 2})),
        "differs from model.embed_tokens.weight: transformers 4 .* transformers 5",
    ),
    "a tied head of another shape": (
        change(lambda w: w.update({HEAD: torch.zeros(150, 64)})),
        r"lm_head.weight has shape \[150, 64\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(case: str, checkpoints: Path, tmp_path: Path) -> None:
    edit, words = REFUSED[case]
    shutil.copytree(checkpoints / "tied", tmp_path / "a")
    edit(tmp_path / "a")
    with pytest.raises(InputError, match=words):
        convert.convert(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_of_250_letters(checkpoints: Path, tmp_path: Path) -> None:
    """The temporary folder's name must fit too; what does not fit at all is refused before any work."""
    for letters in ("n" * 250, "é" * 125, "n" * 255):
        convert.convert(checkpoints / "tied", tmp_path / letters)
        shutil.rmtree(tmp_path / letters)
    assert not list(tmp_path.iterdir())
    for name in ("n" * 256, "é" * 128):
        with pytest.raises(InputError, match="cannot be created: File name too long"):
            convert.convert(tmp_path / "no-source-needed", tmp_path / name)
        with pytest.raises(InputError, match="cannot be read: File name too long"):
            convert.convert(tmp_path / name, tmp_path / "b")
