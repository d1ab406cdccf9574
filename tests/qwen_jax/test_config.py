"""Configurations: published facts, both dialects of config.json, and refusal of what would compute something else."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2MoeConfig

import qwen_jax
from qwen_jax.config import DualChunk, ModelConfig, Yarn, load_config
from qwen_jax.errors import InputError
from qwen_jax.published import PUBLISHED, published

# Exact counts of the published checkpoints: total, and without embedding and head.
PARAMS = {
    "0.5b": (494_032_768, 357_898_112),
    "1.5b": (1_543_714_304, 1_310_340_608),
    "3b": (3_085_938_688, 2_774_773_760),
    "7b": (7_615_616_512, 6_525_621_760),
    "14b": (14_770_033_664, 13_212_898_304),
    "32b": (32_763_876_352, 31_206_740_992),
    "72b": (72_706_203_648, 70_214_787_072),
}
KV_KIB = {"0.5b": 12, "1.5b": 28, "3b": 36, "7b": 56, "14b": 192, "32b": 256, "72b": 320}


@pytest.mark.parametrize("size", PARAMS)
def test_parameter_and_cache_sizes_are_the_published_ones(size: str) -> None:
    for suffix in ("", "-instruct"):
        config = published(f"Qwen/Qwen2.5-{size.upper()}{suffix}")
        assert (config.num_params()["total"], config.num_params()["non_embedding"]) == PARAMS[size]
        assert config.kv_bytes_per_token() == KV_KIB[size] * 1024


def test_base_and_instruct_differ_where_the_published_files_do() -> None:
    for size in ("14b", "32b", "72b"):
        assert published(f"qwen2.5-{size}").rms_norm_eps == 1e-5
        assert published(f"qwen2.5-{size}-instruct").rms_norm_eps == 1e-6
    assert published("qwen2.5-7b").eos_token_ids == (151643,)
    assert published("qwen2.5-7b-instruct").eos_token_ids == (151645,)
    assert published("qwen2.5-7b").max_position_embeddings == 131072
    assert published("qwen2.5-3b").max_position_embeddings == 32768
    assert published("qwen2.5-7b-instruct").max_position_embeddings == 32768
    assert published("qwen2.5-math-7b").rope_theta == 10_000
    long = published("qwen2.5-7b-instruct-1m")
    assert (long.rope_theta, long.rms_norm_eps, long.max_position_embeddings) == (1e7, 1e-5, 1_010_000)
    assert long.context_length == 262144 - 8192, "plain attention is exact up to one chunk only"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_config_json_round_trip(name: str) -> None:
    config = published(name)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"qwen2.5-7b-instruct-1m", "qwen2.5-14b-instruct-1m"}))
def test_transformers_5_reads_what_we_write_and_writes_what_we_read(name: str) -> None:
    config = published(name)
    kind = Qwen2Config if config.moe is None else Qwen2MoeConfig
    theirs = kind(**config.to_hf())
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.num_key_value_heads == config.num_kv_heads
    architectures = config.to_hf()["architectures"]
    back = ModelConfig.from_hf({"architectures": architectures, **json.loads(theirs.to_json_string())})
    # Version 5 drops a window that is switched off, and fills in a first layer for it; what computes survives.
    window = back.sliding_window
    assert not window
    assert back == dataclasses.replace(config, sliding_window=window, max_window_layers=back.max_window_layers)


def test_yarn_in_every_spelling() -> None:
    base = published("tiny").to_hf()
    scaling = {"factor": 4.0, "original_max_position_embeddings": 128}
    expected = Yarn(4.0, 128)
    for rope in (
        {"rope_scaling": {"type": "yarn", **scaling}},
        {"rope_scaling": {"rope_type": "yarn", **scaling}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": base["rope_theta"], **scaling}, "rope_theta": None},
    ):
        config = ModelConfig.from_hf({**base, **rope})
        assert config.yarn == expected
        assert config.context_length == 512
        assert ModelConfig.from_hf(config.to_hf()) == config


def test_old_yarn_files_take_the_original_length_from_the_context() -> None:
    config = ModelConfig.from_hf({**published("tiny").to_hf(), "rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert config.yarn == Yarn(2.0, 512)


def test_rope_theta_inside_rope_parameters_is_not_ignored() -> None:
    hf = published("qwen2.5-7b").to_hf()
    theta = hf.pop("rope_theta")
    assert ModelConfig.from_hf({**hf, "rope_parameters": {"rope_theta": theta}}).rope_theta == theta
    with pytest.raises(InputError, match="rope_theta"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "Qwen2ForRewardModel"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 8.0}}, "two RoPE types"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "two RoPE bases"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 66}, "head_dim"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"dual_chunk_attention_config": {"chunk": 1}}, "dual_chunk"),
        ({"vocab_size": "abc"}, "vocab_size='abc'; expected a positive integer"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_scaling": "yarn"}, "expected an object"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": 512}, "eos_token_id=512 with a vocabulary of 512"),
        ({"eos_token_id": [0, 600]}, "or null if texts end by their length"),
        ({"layer_types": 5}, "expected a list"),
    ],
    ids=str,
)
def test_what_would_compute_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf({**published("tiny").to_hf(), **change})


def test_window_that_no_layer_uses_is_accepted() -> None:
    """As in QwQ-32B: use_sliding_window is true, but max_window_layers leaves no layer to it."""
    hf = {**published("tiny").to_hf(), "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
    config = ModelConfig.from_hf(hf)
    assert config.to_hf()["use_sliding_window"] is True


@pytest.mark.parametrize("eos", [None, []])
def test_no_end_of_text_id_is_written_as_null(eos: Any) -> None:
    """transformers 5 fails on an empty list in generation_config.json; null is what it takes for none."""
    config = ModelConfig.from_hf({**published("tiny").to_hf(), "eos_token_id": eos})
    assert config.eos_token_ids == ()
    assert config.to_hf()["eos_token_id"] is None


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"qwen2\.5-0\.5b"):
        published("qwen2.5-8b")


def test_load_config_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        load_config(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="object"):
        load_config(tmp_path)


def test_every_config_field_is_read_by_some_code() -> None:
    """A field that nothing reads is a promise that nothing keeps."""
    root = Path(qwen_jax.__file__).parent
    nodes = [node for path in root.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    # config.json is written from the fields by name.
    for node in ast.walk(ast.parse((root / "hf_config.py").read_text())):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "fields":
            read.add(ast.literal_eval(node.slice))
    for cls in (ModelConfig, Yarn, DualChunk):
        # The original length of dual-chunk attention is carried for other tools (asdict), like the window fields.
        unread = {field.name for field in dataclasses.fields(cls)} - read
        assert not unread, f"{cls.__name__}: {unread}"
