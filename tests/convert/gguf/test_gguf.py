"""Models in GGUF files compute what they compute elsewhere, and files are the same after being read and written."""

import collections
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers.modeling_utils
from jax.sharding import Mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
from convert.gguf import RECIPES, GGUFSource, QuantizedGGUF, export
from convert.gguf.names import has_head, place, tensors
from convert.gguf.quantized import scheme
from convert.gguf.recipes import type_of
from convert.names import leaves
from convert.source import Source
from convert.verify import _run as verify_run
from qwen_jax.cli import main
from qwen_jax.cli.checkpoints import GGUFType
from qwen_jax.config import MoE, Yarn, load_config
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import TYPES, read_header
from qwen_jax.options import Options
from qwen_jax.published import published
from qwen_jax.tokenizer import load_tokenizer
from tests.convert.gguf.files import edited, make_gguf, make_model
from tests.convert.test_convert import random_tokens, relative
from tests.helpers.forward import logits
from tests.helpers.hf import hf_logits
from tests.helpers.runs import print_seed
from tests.helpers.scripted import END_OF_TEXT, A, B, C, make_scripted


def values(source: Source) -> dict[str, np.ndarray]:
    """Every tensor in float32, by Hugging Face's name."""
    found = {}
    for leaf in leaves(source.config):
        data = source.read(leaf, slice(0, len(leaf.names)), slice(0, leaf.shape[0]))
        found.update(zip(leaf.names, data.astype(np.float32), strict=True))
    return found


def assert_same(a: Source, b: Source) -> None:
    ours, theirs = values(a), values(b)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.tobytes() == theirs[name].tobytes(), name


# --- Against transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "case"),
    [
        ("q4_k_m", {"tie": True}),
        ("q8_0", {"moe": True, "tie": False}),
    ],
    ids=["tied, Q4_K and Q6_K", "experts, Q8_0"],
)
def test_logits_are_those_of_transformers(recipe: str, case: dict[str, Any], tmp_path: Path, mesh: Mesh) -> None:
    """transformers reads the file with its own names, and dequantises with the package gguf."""
    model = make_model(tmp_path / "model", num_hidden_layers=1, **case)
    file = tmp_path / "model.gguf"
    convert.convert(tmp_path / "model", file, recipe=recipe)
    # It asks for accelerate, which it does not use on one CPU.
    with mock.patch.object(transformers.modeling_utils, "is_accelerate_available", return_value=True):
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, config=model.config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    config, params = convert.load(file, mesh, "float32", Options())
    tokens = random_tokens(config)
    # Both compute in float32 with the same weights.
    assert relative(logits(config, params, mesh, tokens), hf_logits(theirs, tokens)) < 1e-4
    # The tokenizer, too.
    text = "The cat<|im_end|> sat 42 你好"
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)(text).input_ids
    assert load_tokenizer(file).encode(text) == expected


def test_names_are_those_of_llama_cpp() -> None:
    """The package's own map from Hugging Face's names."""
    moe = MoE(4, 2, 32, 64)
    for arch, config in (
        (gguf.MODEL_ARCH.QWEN2, dataclasses.replace(published("Qwen2.5-7B"), num_layers=3)),
        (gguf.MODEL_ARCH.QWEN2MOE, dataclasses.replace(published("Qwen2.5-7B"), num_layers=3, moe=moe)),
    ):
        table = gguf.get_tensor_name_map(arch, config.num_layers)
        names = [name for leaf in leaves(config) for name in leaf.names]
        for name in names:
            ours, expert = place(name), ".experts." in name
            merged = re.sub(r"experts\.\d+", "experts", name)
            assert ours.name == table.get_name(merged, try_suffixes=(".weight", ".bias"))
            assert (ours.expert is not None) == expert


# --- Which types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ("Qwen2.5-0.5B", {"F32": 121, "Q5_0": 132, "Q8_0": 13, "Q4_K": 12, "Q6_K": 12}),
        ("Qwen2.5-3B", {"F32": 181, "Q4_K": 216, "Q6_K": 37}),
        ("Qwen2.5-7B", {"F32": 141, "Q4_K": 169, "Q6_K": 29}),
    ],
)
def test_q4_k_m_is_the_mix_that_is_published(model: str, counts: dict[str, int]) -> None:
    """The counts that llama.cpp prints when it loads the published q4_k_m files of these models."""
    config = published(model)
    kinds = [type_of(RECIPES["q4_k_m"], tensor, config).name for tensor in tensors(config, has_head(config))]
    assert collections.Counter(kinds) == counts


def test_odd_shapes_get_types_that_fit() -> None:
    config = dataclasses.replace(published("Qwen2.5-7B"), hidden_size=320, intermediate_size=100, num_layers=1)
    kinds = {x.name: type_of(RECIPES["q4_k_m"], x, config).name for x in tensors(config)}
    assert kinds["blk.0.ffn_up.weight"] == "Q5_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["output.weight"] == "Q8_0"


def test_the_command_line_has_every_recipe() -> None:
    assert set(GGUFType.__args__) == set(RECIPES)


# --- Reading and writing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and one with experts."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "dense", tie=False, num_hidden_layers=3)
    make_model(folder / "moe", moe=True)
    return folder


@pytest.mark.parametrize(
    ("kind", "recipe"), [*(("dense", recipe) for recipe in RECIPES), ("moe", "bf16"), ("moe", "q4_k_m")]
)
def test_write_read_write_gives_the_same_bytes(kind: str, recipe: str, models: Path, tmp_path: Path) -> None:
    """With the types as stored, and with the recipe again: nothing is quantised twice."""
    first, second, third = (tmp_path / f"{name}.gguf" for name in "abc")
    convert.convert(models / kind, first, recipe=recipe)
    convert.convert(first, second)
    convert.convert(first, third, recipe=recipe)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.gguf", "b.gguf", "c.gguf"]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_float_files_hold_the_weights_exactly(kind: str, models: Path, tmp_path: Path) -> None:
    """The config, too; and so after the way back to Hugging Face's layout and to Orbax."""
    file = tmp_path / "model.gguf"
    convert.convert(models / kind, file)
    source, original = convert.open_source(file), convert.open_source(models / kind)
    if kind == "dense":
        assert_same(source, original)
    else:  # llama.cpp needs a head beside experts: the file has the embedding twice.
        assert not source.config.tie_word_embeddings
        both = values(source)
        assert both.pop("lm_head.weight").tobytes() == both["model.embed_tokens.weight"].tobytes()
    for to in ("hf", "orbax"):
        convert.convert(file, tmp_path / to, to=to)  # type: ignore[arg-type]
        assert_same(source, convert.open_source(tmp_path / to))
        assert load_tokenizer(tmp_path / to).fingerprint() == load_tokenizer(models / kind).fingerprint()
        assert load_config(tmp_path / to) == dataclasses.replace(source.config, max_window_layers=None)


@pytest.mark.parametrize("recipe", ["q4_k_m", "q5_1"])
def test_values_and_codes_are_those_of_the_library(recipe: str, models: Path, tmp_path: Path) -> None:
    """Every tensor, expert by expert; and the codes of a matrix stand for its values."""
    file = tmp_path / "model.gguf"
    convert.convert(models / "moe", file, recipe=recipe)
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert found[tensor.name].shape == tuple(tensor.shape)[::-1]
    source = GGUFSource(file)
    for name, x in values(source).items():
        where = place(name)
        expected = found[where.name] if where.expert is None else found[where.name][where.expert]
        assert x.tobytes() == expected.tobytes(), name
        codes = source.codes(name)
        if codes is not None:
            assert np.allclose(codes.dequantize().ravel(), x.ravel(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_model_runs_with_the_codes(kind: str, models: Path, tmp_path: Path) -> None:
    """Logits of the codes are those of their values; layers may have different types, and one that has no codes."""
    file = tmp_path / "model.gguf"
    convert.convert(models / kind, file, recipe="q4_k_m")
    data = print_seed().integers(0, 256, (256, 136), np.uint8)
    data[:, :2] = np.full((256, 1), 0.0005, np.float16).view(np.uint8)
    changed = {"blk.0.attn_q.weight": (data, gguf.GGMLQuantizationType.IQ4_XS)}
    source = convert.open_source(edited(file, tmp_path / "mixed.gguf", {}, changed))
    assert isinstance(source, QuantizedGGUF)
    quantization = source.config.quantization
    assert quantization is not None
    assert quantization.of("layers.0.attention.q") is None
    assert quantization.of("layers.1.attention.q") == scheme(TYPES["Q4_K"])
    tokens = random_tokens(source.config, 1, 16)
    ours = verify_run(source, tokens)
    assert relative(ours, verify_run(source.full_precision(), tokens)) < 1e-5


class _OtherFormat:
    """A quantised `Source` that is not in a GGUF file."""

    def __init__(self, source: QuantizedGGUF) -> None:
        self.config, self.workers, self.folder = source.config, source.workers, None
        self.dtype, self.spans, self.read = source.dtype, source.spans, source.read


@pytest.mark.parametrize("recipe", ["q8_0", "q4_0"])
def test_codes_of_other_formats_are_kept(recipe: str, models: Path, tmp_path: Path) -> None:
    """Symmetric int4 and int8 codes are written as they are; others are refused without a type."""
    file, again = tmp_path / "model.gguf", tmp_path / "again.gguf"
    convert.convert(models / "moe", file, recipe=recipe)
    source = QuantizedGGUF(file)
    export(_OtherFormat(source), again)  # type: ignore[arg-type]
    assert_same(GGUFSource(again), source.full_precision())
    kinds = collections.Counter(x.type.name for name, x in read_header(again).tensors.items() if "blk" in name)
    assert kinds == collections.Counter(x.type.name for name, x in source.header.tensors.items() if "blk" in name)
    export(_OtherFormat(source), tmp_path / "other.gguf", "f16")  # type: ignore[arg-type]
    convert.convert(models / "moe", tmp_path / "min.gguf", recipe="q4_1")
    with pytest.raises(InputError, match="no type for zero points, minima"):
        export(_OtherFormat(QuantizedGGUF(tmp_path / "min.gguf")), tmp_path / "b.gguf")  # type: ignore[arg-type]


def test_blocks_of_rows_are_parts_of_the_whole(models: Path, tmp_path: Path) -> None:
    """Any range of rows, of heads and of experts, in either dtype."""
    rng, file = print_seed(), tmp_path / "model.gguf"
    convert.convert(models / "moe", file, recipe="q4_0")
    for source in (GGUFSource(file), GGUFSource(file, dtype="bfloat16")):
        for leaf in leaves(source.config):
            whole = source.read(leaf, slice(0, len(leaf.names)), slice(0, leaf.shape[0]))
            i, row = int(rng.integers(len(leaf.names))), int(rng.integers(leaf.shape[0]))
            part = source.read(leaf, slice(i, i + 1), slice(row, leaf.shape[0]))
            assert part.tobytes() == whole[i : i + 1, row:].tobytes()
            assert source.dtype(leaf).name in ("float32", source._quantized.name)


def test_config_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    """YaRN, heads wider than the stream, and another base; in metadata a float has 32 bits."""
    extended = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 24.0}
    other = {"head_dim": 96, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "rope_scaling": extended}
    make_model(tmp_path / "m", tie=False, dtype="bfloat16", **other)
    convert.convert(tmp_path / "m", tmp_path / "m.gguf")
    config = load_config(tmp_path / "m.gguf")
    assert config == dataclasses.replace(load_config(tmp_path / "m"), max_window_layers=None)
    assert config.yarn == Yarn(4.0, 128, beta_fast=24.0)
    assert config.dtype == "bfloat16"
    assert len(config.eos_token_ids) == 2


def test_split_files_are_one_model(tmp_path: Path) -> None:
    """As the package splits them; any of the files may be given."""
    file = make_gguf(tmp_path, "q4_0")
    edited(file, tmp_path / "split.gguf", split_max_tensors=5)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        assert_same(convert.open_source(part), convert.open_source(file))
    assert load_tokenizer(parts[-1]).encode("The cat") == load_tokenizer(file).encode("The cat")


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    """Types without a writer here, no sizes of experts in the metadata, a matrix for the gate, and more notes."""
    file = make_gguf(tmp_path, "f32", moe=True)
    reader, rng = gguf.GGUFReader(file), print_seed()
    data = rng.integers(0, 256, (256, 136), np.uint8)
    data[:, :2] = np.full((256, 1), 0.01, np.float16).view(np.uint8)
    gate = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_gate_inp_shexp.weight")
    other = edited(
        file,
        tmp_path / "other.gguf",
        {
            "qwen2moe.expert_feed_forward_length": None,
            "qwen2moe.expert_shared_feed_forward_length": None,
            "qwen2moe.vocab_size": None,
            "general.author": "somebody",
        },
        {
            "blk.0.attn_q.weight": (data, gguf.GGMLQuantizationType.IQ4_XS),
            "blk.0.ffn_gate_inp_shexp.weight": (gate.data[None], gguf.GGMLQuantizationType.F32),
        },
    )
    source, original = GGUFSource(other), GGUFSource(file)
    assert source.config == dataclasses.replace(original.config, dtype="bfloat16")
    got, expected = values(source), values(original)
    name = "model.layers.0.self_attn.q_proj.weight"
    q = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.IQ4_XS)
    assert got.pop(name).reshape(q.shape).tobytes() == q.tobytes()
    assert source.codes(name) is None
    del expected[name]
    assert all(got[key].tobytes() == x.tobytes() for key, x in expected.items())
    # What it says about itself is kept.
    convert.convert(other, tmp_path / "again.gguf")
    assert read_header(tmp_path / "again.gguf").metadata["general.author"] == "somebody"


# --- From the command line ---------------------------------------------------------------------------------------


def test_a_file_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shape, ids and texts without any other file, as of the folder that it came from."""
    folder, file = tmp_path / "model", tmp_path / "new" / "model.gguf"
    make_scripted(folder, {A: B, B: C, C: END_OF_TEXT})

    def run(*argv: object) -> str:
        assert main(list(map(str, argv))) == 0
        return capsys.readouterr().out

    run("convert", folder, file, "--type", "f32")
    *shape, types = run("info", file).splitlines()[1:]
    assert shape == run("info", folder).splitlines()[1:]
    assert types.startswith("  tensors ")
    assert "15 F32" in types
    assert "PASS" in run("verify", file, folder)
    shutil.rmtree(folder)
    assert run("generate", file, "--prompt", "a", "--max-new-tokens", "5") == "bc\n"


@pytest.mark.parametrize("recipe", ["q8_0", "q4_0", "bf16"])
def test_the_config_of_a_file_loads_its_weights(recipe: str, tmp_path: Path, mesh: Mesh) -> None:
    """As training does, which knows the config before it loads: codes stay codes."""
    file = make_gguf(tmp_path, recipe)
    config, want = convert.load(file, mesh, options=Options())
    got = convert.load_params(file, convert.open_source(file).config, mesh)
    assert (config.quantization is None) == (recipe == "bf16")
    jax.tree.map(np.testing.assert_array_equal, got, want)
