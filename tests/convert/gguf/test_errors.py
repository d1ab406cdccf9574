"""Damaged GGUF files, and models that do not fit the format, are refused with a reason; nothing is left behind."""

import contextlib
import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import convert
from convert.gguf import GGUFSource
from convert.gguf.metadata import write_config
from convert.gguf.writer import encode
from convert.names import leaves
from qwen_jax.cli import main
from qwen_jax.config import DualChunk, ModelConfig, MoE, load_config
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import TYPES, read_header
from qwen_jax.published import published
from qwen_jax.tokenizer import load_tokenizer
from tests.convert.gguf.files import edited, make_gguf
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file."""
    return make_gguf(tmp_path_factory.mktemp("good"), "q8_0", hidden_size=64, intermediate_size=64, num_hidden_layers=1)


def refused(file: Path, words: str) -> None:
    with pytest.raises(InputError, match=words):
        convert.open_source(file)


# --- The header --------------------------------------------------------------------------------------------------


def at(position: int, form: str, value: Any) -> Callable[[bytes], bytes]:
    """Overwrites a number of the file."""
    packed = value if isinstance(value, bytes) else struct.pack(form, value)
    return lambda data: data[:position] + packed + data[position + len(packed) :]


def around(text: bytes, shift: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Overwrites a number behind a text, such as the type of a value behind its key."""
    return lambda data: at(data.index(text) + len(text) + shift, form, value)(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "begins with b''"),
        (lambda data: b"PK\x03\x04" + data[4:], "no GGUF file: it begins with b'PK"),
        (lambda data: data[:10], "ends within its header"),
        (at(4, ">I", 3), "big-endian"),
        (at(4, "<I", 1), "version 1 of GGUF"),
        (at(4, "<I", 9), "version 9"),
        (at(8, "<Q", 2**60), "ends within its header|twice|type|dimensions|UTF-8"),
        (at(16, "<Q", 2**60), "ends within its header|twice|type|UTF-8"),
        (at(24, "<Q", 2**62), "ends within its header"),
        (at(32, "", b"\xff\xfe"), "is not UTF-8"),
        (around(b"general.name", 0, "<I", 99), "'general.name' has the unknown type 99"),
        (around(b"tokenizer.ggml.tokens", 4, "<I", 9), "is an array of type 9"),
        (around(b"tokenizer.ggml.tokens", 8, "<Q", 2**61), "ends within its header"),
        (around(b"tokenizer.ggml.tokens", 16, "<Q", 2**61), "ends within its header"),
        (around(b"tokenizer.ggml.token_type", 8, "<Q", 2**61), "ends within its header"),
        (around(b"token_embd.weight", 0, "<I", 5), "has 5 dimensions"),
        (around(b"token_embd.weight", 4, "<Q", 33), "multiple of 32 values"),
        (around(b"token_embd.weight", 12, "<Q", 2**60), "ends too early"),
        (around(b"token_embd.weight", 12, "<Q", 0), "positive multiple"),
        (around(b"token_embd.weight", 20, "<I", 77), "unknown type 77"),
        (around(b"token_embd.weight", 24, "<Q", 1), "not aligned"),
        (around(b"output_norm.weight", 16, "<Q", 0), "overlap"),
        (lambda data: data[:-64], "ends too early"),
    ],
)
def test_damaged_headers_are_refused(change: Callable[[bytes], bytes], words: str, good: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(change(good.read_bytes()))
    refused(tmp_path / "bad.gguf", words)


def test_no_damage_of_a_header_is_anything_but_an_input_error(good: Path, tmp_path: Path) -> None:
    """Random bytes overwritten, and files cut anywhere in the header: a reason, or a file that can be read."""
    rng, data = print_seed(), good.read_bytes()
    end = min(info.offset for info in read_header(good).tensors.values())
    file = tmp_path / "bad.gguf"
    for i in range(60):
        bad = bytearray(data)
        for place in rng.integers(0, end, 3):
            bad[place] = rng.integers(256)
        file.write_bytes(bytes(bad[: int(rng.integers(end))]) if i % 3 == 0 else bytes(bad))
        for read in (GGUFSource, load_tokenizer):
            with contextlib.suppress(InputError):
                read(file)


# --- Metadata and tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"general.architecture": "llama"}, {}, "architecture 'llama'; expected"),
        ({"general.architecture": "qwen3"}, {}, "architecture 'qwen3'"),
        ({"general.type": "adapter"}, {}, "holds 'adapter'"),
        ({"qwen2.block_count": None}, {}, "lacks qwen2.block_count"),
        ({"qwen2.block_count": "many"}, {}, "block_count='many'"),
        ({"qwen2.block_count": 2}, {}, "lacks 12 of the tensors"),
        ({"qwen2.rope.freq_base": float("nan")}, {}, "freq_base=nan"),
        ({"qwen2.attention.head_count_kv": [2, 2]}, {}, "head_count_kv=array"),
        ({"qwen2.attention.causal": False}, {}, "not causal"),
        ({"qwen2.attention.clamp_kqv": 1.0}, {}, "not known here: attention.clamp_kqv"),
        ({"qwen2.rope.dimension_count": 8}, {}, "only equal ones"),
        ({"qwen2.rope.scaling.type": "longrope"}, {}, "type 'longrope'"),
        ({"qwen2.embedding_length": 128}, {}, "has shape"),
        ({"tokenizer.ggml.eos_token_id": 5000}, {}, "eos_token_id=5000"),
        ({"general.alignment": 48}, {}, "general.alignment=48"),
        ({}, {"token_embd.weight": None}, "lacks the tensors token_embd.weight"),
        ({}, {"blk.0.attn_q.weight": None}, "lacks 1 of the tensors"),
        ({}, {"blk.0.attn_q.scale": (np.ones(4, np.float32), F32)}, "has unknown 1 of the tensors"),
        ({}, {"blk.0.attn_q.weight": (np.ones((64, 32), np.float32), F32)}, "has shape"),
        ({}, {"blk.0.attn_norm.weight": (np.zeros((68,), np.uint8), Q8_0)}, "vectors are not read from"),
        ({}, {"blk.0.attn_q.weight": (np.ones((64, 64), np.int8), gguf.GGMLQuantizationType.I8)}, "type I8"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    metadata: dict[str, Any], tensors: dict[str, Any], words: str, good: Path, tmp_path: Path
) -> None:
    refused(edited(good, tmp_path / "bad.gguf", metadata, tensors), words)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(value: float, good: Path, tmp_path: Path) -> None:
    data = next(x for x in gguf.GGUFReader(good).tensors if x.name == "blk.0.ffn_up.weight").data.copy()
    data[3, :2] = np.float16([value]).view(np.uint8)
    data[3, 2:34] = 1
    source = GGUFSource(edited(good, tmp_path / "bad.gguf", {}, {"blk.0.ffn_up.weight": (data, Q8_0)}))
    leaf = next(leaf for leaf in leaves(source.config) if leaf.path[-2:] == ("up", "weight"))
    with pytest.raises(InputError, match=r"ffn_up.weight of type Q8_0 has a scale that is not a finite number"):
        source.read(leaf, slice(0, 1), slice(0, 8))
    with pytest.raises(InputError, match="not a finite number"):
        source.codes("model.layers.0.mlp.up_proj.weight")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="not a finite number"):
        convert.convert(tmp_path / "bad.gguf", tmp_path / "out", dtype="float32")
    assert sorted(tmp_path.iterdir()) == before


def test_parts_of_a_split_model_must_be_there(good: Path, tmp_path: Path) -> None:
    edited(good, tmp_path / "m.gguf", split_max_tensors=6)
    parts = sorted(tmp_path.iterdir())
    moved = parts[1].rename(tmp_path / "kept")
    refused(parts[0], f"lacks 1 of them: {parts[1].name}")
    parts[1].write_bytes(parts[0].read_bytes())
    refused(parts[0], "says that it is part 0, counted from 0; expected 1")
    parts[0].rename(tmp_path / "alone.gguf")
    refused(tmp_path / "alone.gguf", "its name says 1")
    assert moved.exists()


def test_paths_that_are_no_files_are_refused(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "none.gguf", "does not exist")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(InputError, match=r"has no config.json"):
        load_config(tmp_path / "folder.gguf")
    refused(good.parent, "GGUF files, which are given by their own path")
    assert main(["info", str(tmp_path / "none.gguf")]) == 1
    assert "does not exist" in capsys.readouterr().err


# --- Writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": "linear"}, "reward model"),
        ({"dual_chunk": DualChunk(64, 16, 64)}, "dual-chunk attention"),
        ({"moe": MoE(4, 2, 32, 64, norm_topk_prob=True)}, "norm_topk_prob"),
        ({"moe": MoE(4, 2, 32, 64, decoder_sparse_step=2)}, "Only 14 of the 28 layers"),
        ({"eos_token_ids": (1, 2, 3, 4)}, "at most 3 ids"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_not_written(changes: dict[str, Any], words: str) -> None:
    config: ModelConfig = dataclasses.replace(published("Qwen2.5-7B"), **changes)
    with pytest.raises(InputError, match=words):
        write_config(config)


def test_options_are_checked_first(good: Path, tmp_path: Path) -> None:
    missing = tmp_path / "there is no such model"
    for arguments, words in (
        ({"dst": tmp_path / "a.gguf", "recipe": "q3"}, "Expected a type of f32"),
        ({"dst": tmp_path / "a.gguf", "dtype": "bfloat16"}, "a type in place of a dtype"),
        ({"dst": tmp_path / "a", "recipe": "q8_0"}, "whose name ends with .gguf"),
        ({"dst": tmp_path / "a", "to": "gguf"}, "ends with .gguf"),
        ({"dst": good}, "exists already"),
    ):
        with pytest.raises(InputError, match=words):
            convert.convert(missing, **arguments)  # type: ignore[arg-type]


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "model")
    before = sorted(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.gguf.writer.encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.convert(tmp_path / "model", tmp_path / "model.gguf", recipe="q8_0")
    assert sorted(tmp_path.iterdir()) == before


def test_weights_beyond_a_type_are_refused() -> None:
    for value in (1e6, np.nan):
        rows = np.full((1, 256), value, np.float32)
        for name in ("F16", "Q8_0", "Q4_K"):
            with pytest.raises(InputError, match=r"w has values that are not finite or beyond"):
                encode(rows, TYPES[name], "w")
        assert encode(rows, TYPES["F32"], "w").view(np.float32).tobytes() == rows.tobytes()
