"""Configurations: published facts, both dialects of config.json, and refusal of what would compute something else."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen2Config, Qwen2MoeConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import qwen_jax
from qwen_jax.attention.rope import inverse_frequencies
from qwen_jax.config import DualChunk, ModelConfig, Yarn, load_config
from qwen_jax.errors import InputError
from qwen_jax.published import PUBLISHED, published
from tests.helpers import transformers4

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
    assert long.context_length == 1_010_000


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
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, "Qwen2ForProcessRewardModel"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' is not supported.*Set it to 'default'"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 8.0}}, "two RoPE types"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscales": 1.0}}, "mscales"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "2"}}, "factor='2' in YaRN"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "beta_fast='x'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' in the RoPE parameters"),
        ({"use_sliding_window": True}, "sliding window of 4096 tokens in layers 28 to 29"),
        ({"use_sliding_window": True, "sliding_window": 64}, "layers 28 to 29"),
        ({"use_sliding_window": "false"}, "expected true or false"),
        ({"tie_word_embeddings": "false"}, "expected true or false"),
        ({"sliding_window": "4096"}, "expected an integer"),
        ({"bos_token_id": "<s>"}, "expected an integer"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"is_causal": False}, "is_causal=False"),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config"),
        ({"temperature": 0.7}, "temperature=0.7, a setting of text generation.*generation_config.json"),
        ({"some_new_key": 1}, "not known here: some_new_key"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "two RoPE bases"),
        ({"hidden_act": "gelu"}, "gelu"),
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
    hf = {**published("tiny").to_hf(), "num_hidden_layers": 30}
    if "max_window_layers" in str(change) or "layer_types" in change:
        hf["num_hidden_layers"] = 2
    del hf["sliding_window"]
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf({**hf, **change})


# Keys that other tools and other versions of transformers write; they change nothing at inference.
INERT: dict[str, Any] = {
    "tokenizer_class": "Qwen2Tokenizer",
    "torchscript": False,
    "is_decoder": True,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "task_specific_params": {},
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM"},
    "_attn_implementation": "sdpa",
    "num_labels": 2,
    "model_max_length": 512,
    "attention_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "embd_pdrop": 0.0,
    "pretraining_tp": 1,
    "gradient_checkpointing": True,
    "use_bfloat16": False,
    "cross_attention_hidden_size": None,
    "finetuning_task": None,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "hidden_act": "swish",
    "architectures": ["Qwen2Model"],
    "some_unknown_key": None,
}


@pytest.mark.parametrize("key", INERT)
def test_keys_that_change_nothing_at_inference_pass(key: str) -> None:
    hf = published("tiny").to_hf()
    assert ModelConfig.from_hf({**hf, key: INERT[key]}) == ModelConfig.from_hf(hf)


BASE_CONFIG_IN_TRANSFORMERS_4 = (
    "import json; from transformers import Qwen2Config as C; print(json.dumps(C().to_dict()))"
)


@pytest.mark.parametrize("version", ["4", "5"])
def test_every_key_of_the_base_config_of_transformers_passes_at_its_default_and_at_null(version: str) -> None:
    """Tools that write `to_dict()` of a config, not the difference from its defaults, write all of them."""
    theirs = Qwen2Config().to_dict()
    if version == "4":
        command = [sys.executable, "-c", BASE_CONFIG_IN_TRANSFORMERS_4]
        run = subprocess.run(command, env=transformers4.environment(), check=True, capture_output=True)
        theirs = json.loads(run.stdout)
        assert {"torchscript", "pruned_heads", "num_beams", "transformers_version"} <= theirs.keys()
    hf = published("tiny").to_hf()
    added = {
        key: value
        for key, value in theirs.items()
        if key not in hf and key not in ("layer_types", "rope_parameters", "dtype")
    }
    expected = ModelConfig.from_hf(hf)
    assert dataclasses.replace(ModelConfig.from_hf({**added, **hf}), max_window_layers=None) == expected
    for key in added:
        assert ModelConfig.from_hf({**hf, key: None}) == expected, key


@pytest.mark.parametrize("key", sorted(set(published("tiny").to_hf()) - {"model_type", "rope_theta"}))
def test_null_is_the_default(key: str) -> None:
    """As if the key were not there; where there is no default, both are refused with the same words."""
    hf = published("tiny").to_hf()

    def outcome(content: dict[str, Any]) -> Any:
        try:
            return ModelConfig.from_hf(content)
        except InputError as error:
            return str(error)

    assert outcome({**hf, key: None}) == outcome({k: v for k, v in hf.items() if k != key})


def test_generation_settings_in_config_json_pass_where_nobody_reads_them(tmp_path: Path) -> None:
    """transformers reads them if there is no generation_config.json: then they would be lost in silence."""
    (tmp_path / "config.json").write_text(json.dumps({**published("tiny").to_hf(), "top_p": 0.5}))
    with pytest.raises(InputError, match=r"top_p=0\.5.*generation_config\.json"):
        load_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_config(tmp_path) == published("tiny")


def yarn_of_transformers(hf: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Inverse frequencies and the factor on cos and sin, as transformers computes them."""
    model = Qwen2RotaryEmbedding(Qwen2Config(**hf))
    return model.inv_freq.numpy(), model.attention_scaling


@pytest.mark.parametrize(
    "extra",
    [
        {"attention_factor": None, "beta_fast": None, "beta_slow": None},
        {"mscale": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 1.5},
        {"mscale": 0, "mscale_all_dim": 1.0},
        {"truncate": True, "finetuned": True},
        {"beta_fast": 16.0, "beta_slow": 2.0},
    ],
    ids=str,
)
def test_yarn_keys_mean_what_they_mean_to_transformers(extra: dict[str, Any]) -> None:
    hf = published("tiny").to_hf()
    hf["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **extra}
    config = ModelConfig.from_hf(hf)
    assert config.yarn is not None
    frequencies, scale = yarn_of_transformers(hf)
    assert config.yarn.scale == pytest.approx(scale, rel=1e-6)
    np.testing.assert_allclose(inverse_frequencies(config), frequencies, rtol=1e-5)


def test_linear_interpolation_by_one_is_none() -> None:
    hf = published("tiny").to_hf()
    for rope in ({"type": "linear", "factor": 1.0}, {"rope_type": None, "factor": None}, {}, None):
        assert ModelConfig.from_hf({**hf, "rope_scaling": rope}) == published("tiny")
    nested = {"full_attention": {"rope_type": "default", "rope_theta": hf["rope_theta"]}}
    assert ModelConfig.from_hf({**hf, "rope_parameters": nested}) == published("tiny")


def test_layer_types_override_the_window_settings() -> None:
    """As in transformers 5: a list of full attention leaves no layer to the window."""
    hf = {**published("tiny").to_hf(), "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    assert ModelConfig.from_hf({**hf, "layer_types": ["full_attention"] * 2}).use_sliding_window is False


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
    """A config field that no code reads is a bug."""
    root = Path(qwen_jax.__file__).parent
    nodes = [node for path in root.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    # config.json is written from the fields by name.
    for node in ast.walk(ast.parse((root / "hf_config.py").read_text())):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "fields":
            read.add(ast.literal_eval(node.slice))
    for cls in (ModelConfig, Yarn, DualChunk):
        # The original length of dual-chunk attention is kept for other tools (asdict), like the window fields.
        unread = {field.name for field in dataclasses.fields(cls)} - read
        assert not unread, f"{cls.__name__}: {unread}"
