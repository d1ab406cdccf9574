"""GGUF files for the tests: a tiny model with its own tokenizer, and edited copies of a file."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

import convert
from qwen_jax.gguf.header import read_header
from qwen_jax.tokenizer.bpe import ByteLevelBPE, train_bpe
from tests.helpers.hf import make_hf_checkpoint

TEXTS = ["The cat sat on the mat, it's 42 years old.\n" * 4, "你好世界。" * 4]


def tokenizer() -> ByteLevelBPE:
    return train_bpe(TEXTS, 310)


def make_model(folder: Path, **overrides: Any) -> Any:
    """A tiny checkpoint with a tokenizer, whose rows are one block of the K types; gives transformers' model back."""
    tok = tokenizer()
    ids = {"bos_token_id": tok.pad_id, "eos_token_id": [tok.eos_id, tok.pad_id + 1], "vocab_size": 320}
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    if overrides.get("moe"):
        sizes |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 4}
    model = make_hf_checkpoint(folder, **{**sizes, **ids, **overrides})
    tok.save(folder)
    return model


def make_gguf(folder: Path, recipe: str = "q8_0", **overrides: Any) -> Path:
    """The GGUF file of such a checkpoint, which is beside it."""
    make_model(folder / "model", **overrides)
    convert.convert(folder / "model", folder / "model.gguf", recipe=recipe)
    return folder / "model.gguf"


def edited(
    file: Path,
    out: Path,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    **writer_options: Any,
) -> Path:
    """Copies a GGUF file by the `gguf` package alone.

    Args:
      file: the original.
      out: the copy.
      metadata: values that replace others; None removes a key.
      tensors: (data, type) by name, which replace others or are new; None removes a tensor.
      writer_options: of GGUFWriter.
    """
    header, reader = read_header(file), gguf.GGUFReader(file)
    values = {**header.metadata, **(metadata or {})}
    writer = gguf.GGUFWriter(out, values.pop("general.architecture"), **writer_options)
    kinds = gguf.GGUFValueType
    by_type = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    for key, value in values.items():
        if value is not None:
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_key_value(key, plain, by_type[type(plain)])
    found = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors} | (tensors or {})
    for name, tensor in found.items():
        if tensor is not None:
            data, kind = tensor
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
