"""Logits and weights of a checkpoint are the same here, in transformers, and after any conversion."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import convert
from convert import huggingface, orbax
from convert.names import leaves
from convert.safetensors import read_folder
from qwen_jax.config import ModelConfig, load_config
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, abstract_params, init_params, param_specs
from qwen_jax.published import published
from tests.helpers import transformers4
from tests.helpers.forward import logits, loss_gradients
from tests.helpers.hf import hf_logits, hf_loss_gradients, make_hf_checkpoint, randomise, to_dialect_4

# Every value of every axis of the grid is in at least one row. The vocabularies are 151936 / 128 and 152064 / 256.
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
GRID: dict[str, dict[str, Any]] = {
    "0.5B-like": {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "1.5B-like": {"head_dim": 128, "vocab_size": 1187, "dtype": "bfloat16", "dialect": "4"},
    "7B-like": {"tie": False, "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 594, "max_shard_size": "60KB"},
    "14B-like": {"tie": False, "rms_norm_eps": 1e-5, "dtype": "float16", "max_shard_size": "60KB", "dialect": "4"},
    "Math-like": {"rope_theta": 1e4, "dtype": "float16"},
    "1M-like": {"tie": False, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "dtype": "bfloat16"},
    "heads wider than the stream": {"head_dim": 64, "num_key_value_heads": 1, "dialect": "4"},
    "YaRN, rope_type": {"rope_scaling": {"rope_type": "yarn", **YARN}, "max_position_embeddings": 128},
    "YaRN, type": {"rope_scaling": {"type": "yarn", **YARN}, "max_position_embeddings": 128, "dialect": "4"},
}


def random_tokens(config: ModelConfig, batch: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng().integers(0, config.vocab_size, (batch, length))


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """A stacked float32 tree of NumPy arrays."""
    random = np.random.default_rng(seed)
    shapes = abstract_params(config, dtype="float32")
    return jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32), shapes)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder, read by the reference implementation of the format."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in load_file(file).items():
            found[name] = str(x.dtype), x.shape, x.tobytes()
    return found


@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_logits_and_gradients_are_those_of_transformers(case: dict[str, Any], tmp_path: Path, mesh: Mesh) -> None:
    model = make_hf_checkpoint(tmp_path, **case)
    config, params = convert.load(tmp_path, mesh, "float32", Options())
    tokens = random_tokens(config)
    # 1e-4 of the largest logit is the promise; float32 rounding alone stays below 1e-5.
    assert relative(logits(config, params, mesh, tokens), hf_logits(model, tokens)) < 1e-4
    expected = hf_loss_gradients(model, tokens)
    gradients = loss_gradients(config, params, mesh, tokens)
    largest = max(np.abs(g).max() for g in expected.values())
    for leaf in leaves(config):
        got: Any = gradients
        for key in leaf.path:
            got = got[key]
        for i, name in enumerate(leaf.names):
            mine = (got[i] if leaf.layers else got).reshape(leaf.hf_shape)
            # Some gradients nearly vanish (that of a key bias would, without RoPE): compare these with the largest one.
            scale = max(np.abs(expected[name]).max(), 1e-2 * largest)
            assert np.abs(mine - expected[name]).max() / scale < 1e-4, name


@pytest.mark.slow
def test_logits_at_the_true_shape_of_the_half_billion_model(tmp_path: Path, mesh: Mesh) -> None:
    config = published("qwen2.5-0.5b")
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**{**config.to_hf(), "attn_implementation": "eager"}))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    randomise(model)
    model.model.rotary_emb.__init__(model.config)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tokens = random_tokens(config, 1, 8)
    expected = hf_logits(model.float().eval(), tokens)
    del model
    loaded, params = convert.load(tmp_path, mesh, "float32", Options())
    assert loaded.num_params()["total"] == 494_032_768
    assert relative(logits(loaded, params, mesh, tokens), expected) < 1e-4


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tie", "max_shard_size"), [(True, "5GB"), (False, "60KB")])
def test_a_round_trip_through_orbax_is_byte_identical(
    dtype: str, tie: bool, max_shard_size: str, tmp_path: Path
) -> None:
    make_hf_checkpoint(tmp_path / "a", tie=tie, dtype=dtype, max_shard_size=max_shard_size, dialect="4")
    (tmp_path / "a/tokenizer.json").write_text('{"some": "tokenizer"}')
    (tmp_path / "a/additional_chat_templates").mkdir()
    (tmp_path / "a/additional_chat_templates/tool_use.jinja").write_text("T")
    (tmp_path / "a/modeling_qwen.py").write_text("raise SystemExit")
    convert.convert(tmp_path / "a", tmp_path / "b")
    assert convert.detect(tmp_path / "b") == "orbax"
    convert.convert(tmp_path / "b", tmp_path / "c")
    assert convert.detect(tmp_path / "c") == "hf"
    assert tensors(tmp_path / "c") == tensors(tmp_path / "a")
    for name in (
        *("config.json", "generation_config.json", "tokenizer.json"),
        "additional_chat_templates/tool_use.jinja",
    ):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert not (tmp_path / "c/modeling_qwen.py").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("in_kernel", [True, False])
def test_any_split_into_blocks_gives_the_same_result(
    in_kernel: bool, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code paths of large models: several blocks per tensor, also uneven ones, and stacks filled layer by layer."""
    if not in_kernel:
        monkeypatch.setattr("sys.platform", "other")
    make_hf_checkpoint(tmp_path / "a", tie=False, dtype="bfloat16", vocab_size=1187, max_shard_size="100KB")
    whole = convert.load(tmp_path / "a", mesh, options=Options())[1]
    monkeypatch.setattr("convert.source.BLOCK_BYTES", 1000)
    monkeypatch.setattr("convert.placement.BLOCK_BYTES", 1000)
    monkeypatch.setattr("convert.orbax.BLOCK_BYTES", 1000)
    monkeypatch.setattr("convert.placement._on_host", lambda sharding: False)
    convert.convert(tmp_path / "a", tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c")
    assert tensors(tmp_path / "c") == tensors(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "wide", dtype="float32")
    convert.convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16")
    assert tensors(tmp_path / "narrow") == tensors(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "b"):
        for axes in ({}, {"fsdp": 2, "tensor": 1}):
            loaded = convert.load(folder, make_mesh(axes), options=Options())[1]
            assert_same_tree(loaded, whole)


def assert_same_tree(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


LOGITS_IN_TRANSFORMERS_4 = """
import sys, numpy, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__ == "4.57.1", transformers.__version__
tokens = torch.tensor(numpy.load(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        numpy.save(folder + ".npy", model(input_ids=tokens).logits.numpy())
"""


def test_our_output_loads_in_both_versions_of_transformers(tmp_path: Path) -> None:
    yarn = {"rope_scaling": {"rope_type": "yarn", **YARN}, "rope_theta": 1e7}
    tokens, expected = np.random.default_rng().integers(0, 160, (2, 40)), {}
    for rope in ({}, yarn):
        for dialect in ("4", "5"):
            name = f"{tmp_path}/{dialect}{len(rope)}"
            model = make_hf_checkpoint(name, tie=False, dtype="bfloat16", dialect=dialect, head_dim=32, **rope)
            convert.convert(name, f"{name}-orbax")
            convert.convert(f"{name}-orbax", f"{name}-hf")
            expected[f"{name}-hf"] = hf_logits(model, tokens)
            again = Qwen2ForCausalLM.from_pretrained(f"{name}-hf", dtype=torch.float32, attn_implementation="eager")
            np.testing.assert_array_equal(hf_logits(again.eval(), tokens), expected[f"{name}-hf"])
    np.save(tmp_path / "tokens.npy", tokens)
    command = [sys.executable, "-c", LOGITS_IN_TRANSFORMERS_4, str(tmp_path / "tokens.npy"), *expected]
    subprocess.run(command, env=transformers4.environment(), check=True)
    for folder, ours in expected.items():
        # Two versions may order an addition differently; another base or epsilon would be off by far more.
        assert relative(np.load(f"{folder}.npy"), ours) < 1e-5, folder


def test_casting_rounds_to_nearest_and_updates_the_config(tmp_path: Path) -> None:
    model = make_hf_checkpoint(tmp_path / "a", tie=False)
    for dtype in ("bfloat16", "float16"):
        convert.convert(tmp_path / "a", tmp_path / dtype, to="hf", dtype=dtype)
        assert load_config(tmp_path / dtype).dtype == dtype
        held = Qwen2ForCausalLM.from_pretrained(tmp_path / dtype).state_dict()
        for name, weight in model.state_dict().items():
            assert held[name].dtype == getattr(torch, dtype)
            assert torch.equal(held[name], weight.to(getattr(torch, dtype))), name


def test_index_and_shards_are_as_transformers_writes_them(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "a", tie=False, max_shard_size="60KB")
    source = convert.open_source(tmp_path / "a")
    huggingface.export(source, source.config, tmp_path / "b", max_shard_bytes=60_000)
    theirs, mine = (json.loads((tmp_path / x / "model.safetensors.index.json").read_text()) for x in "ab")
    assert mine["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert set(mine["weight_map"]) == set(theirs["weight_map"])
    files = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(mine["weight_map"].values()) == set(files)
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    read_folder(tmp_path / "b")  # Our own checks pass too.


# --- meshes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"tensor": 4}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("stacked", [True, False])
def test_sharded_loading_uses_the_shardings_of_the_model_and_the_same_bytes(
    axes: dict[str, int], stacked: bool, tmp_path: Path, mesh: Mesh
) -> None:
    """Also if the tensor axis (4) is larger than the number of key/value heads (2)."""
    make_hf_checkpoint(tmp_path / "hf", tie=False, dtype="bfloat16")
    convert.convert(tmp_path / "hf", tmp_path / "orbax")
    options, many = Options(stacked=stacked), make_mesh(axes)
    config, one = convert.load(tmp_path / "hf", mesh, options=options)
    sharding = Sharding.for_inference(config, many)
    specs = jax.tree.leaves(param_specs(config, sharding, options), is_leaf=lambda x: isinstance(x, P))
    for folder in ("hf", "orbax"):
        loaded = convert.load(tmp_path / folder, many, options=options)[1]
        assert_same_tree(loaded, one)
        assert [x.sharding for x in jax.tree.leaves(loaded)] == [NamedSharding(many, spec) for spec in specs]
    expected = abstract_params(config, sharding, options)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    assert [x.shape for x in jax.tree.leaves(loaded)] == [x.shape for x in jax.tree.leaves(expected)]


def test_eight_devices_compute_what_one_does(tmp_path: Path, mesh: Mesh) -> None:
    make_hf_checkpoint(tmp_path, tie=False)
    config, one = convert.load(tmp_path, mesh, options=Options())
    tokens = random_tokens(config, 4)
    many = make_mesh({"fsdp": 2, "tensor": 4})
    sharded = convert.load(tmp_path, many, options=Options())[1]
    # Only the order of additions differs.
    assert relative(logits(config, sharded, many, tokens), logits(config, one, mesh, tokens)) < 1e-5


@pytest.mark.parametrize("stacked", [True, False])
def test_sharded_parameters_are_exported_unchanged(stacked: bool, tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "a", tie=False, dtype="bfloat16", dialect="4")
    (tmp_path / "a/vocab.json").write_text("{}")
    many = make_mesh({"fsdp": 2, "tensor": 4})
    config, params = convert.load(tmp_path / "a", many, options=Options(stacked=stacked))
    huggingface.export(params, config, tmp_path / "b", extra_files_from=tmp_path / "a")
    assert tensors(tmp_path / "b") == tensors(tmp_path / "a")
    assert (tmp_path / "b/vocab.json").exists()
    orbax.save(params, config, tmp_path / "c")
    convert.convert(tmp_path / "c", tmp_path / "d")
    assert tensors(tmp_path / "d") == tensors(tmp_path / "a")


def test_the_exported_config_has_the_dtype_of_the_parameters(tmp_path: Path, mesh: Mesh) -> None:
    config = published("tiny")
    params = random_params(config)
    huggingface.export(params, config, tmp_path / "a", dtype="bfloat16")
    assert load_config(tmp_path / "a").dtype == "bfloat16"
    huggingface.export(params, config, tmp_path / "b")
    assert load_config(tmp_path / "b") == config
    assert_same_tree(convert.load(tmp_path / "b", mesh, options=Options())[1], params)


# --- Orbax ---------------------------------------------------------------------------------------------------------


def test_plain_orbax_restores_our_checkpoints(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "a", tie=False, dtype="bfloat16")
    convert.convert(tmp_path / "a", tmp_path / "b")
    many = make_mesh({"fsdp": 2, "tensor": 4})
    params = convert.load(tmp_path / "a", many, options=Options())[1]
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same_tree(checkpointer.restore(tmp_path / "b/params"), params)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        restored = checkpointer.restore(tmp_path / "b/params", abstract)
    assert_same_tree(restored, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, params)))


def test_checkpoints_in_the_default_layout_of_orbax_are_read(tmp_path: Path, mesh: Mesh) -> None:
    """Orbax's own default layout differs from ours: OCDBT, compressed, one chunk for each shard."""
    config = published("tiny-untied")
    params = jax.tree.map(jnp.asarray, random_params(config))
    for tree, folder in ((params, tmp_path / "a"), ({"params": params, "step": np.asarray(3)}, tmp_path / "b")):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.to_hf()))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", tree)
        assert_same_tree(convert.load(folder, mesh, options=Options())[1], params)
        convert.convert(folder, tmp_path / f"{folder.name}-hf")
        assert_same_tree(convert.load(tmp_path / f"{folder.name}-hf", mesh, options=Options())[1], params)
        layers = convert.load(folder, mesh)[1]["layers"]
        taken = [jax.tree.map(lambda x, i=i: np.asarray(x)[i], params["layers"]) for i in range(config.num_layers)]
        assert_same_tree(layers, taken)


def test_the_newest_checkpoint_of_a_run_is_loaded(tmp_path: Path, mesh: Mesh) -> None:
    config = published("tiny")
    for step, seed in ((9, 0), (10, 1)):
        orbax.save(random_params(config, seed), config, tmp_path / str(step))
    (tmp_path / "11").mkdir()  # Still being written.
    (tmp_path / "run.json").write_text("{}")
    params = convert.load(tmp_path, mesh, options=Options())[1]
    assert_same_tree(params, random_params(config, 1))


def test_nothing_is_logged_and_logger_levels_are_restored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_hf_checkpoint(tmp_path / "a")
    capfd.readouterr()
    level = logging.getLogger("absl").level
    convert.convert(tmp_path / "a", tmp_path / "b", progress=True)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("absl").level == level


def test_both_dialects_give_the_same_config(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path, rope_theta=1e4)
    config = load_config(tmp_path)
    to_dialect_4(tmp_path / "config.json")
    assert "rope_parameters" not in (tmp_path / "config.json").read_text()
    assert load_config(tmp_path) == config


def test_files_may_come_from_a_folder_of_another_architecture(tmp_path: Path, mesh: Mesh) -> None:
    """A model that is trained from scratch may have the tokenizer of any model: its config.json does not count."""
    other, config = tmp_path / "other", published("tiny")
    other.mkdir()
    foreign = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 2}
    (other / "config.json").write_text(json.dumps(foreign))
    (other / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    with jax.set_mesh(mesh):
        params = init_params(config, jax.random.key(0), mesh)
    huggingface.export(params, config, tmp_path / "out", extra_files_from=other)
    assert load_config(tmp_path / "out") == config
