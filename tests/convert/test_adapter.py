"""Adapters in PEFT's format: merged weights give the logits of PyTorch with LoRA, and what is written reads back."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from safetensors.torch import load_file, save_file

import convert
from convert.adapter import adapter_folders, adapter_params, read_adapter, write_adapter
from qwen_jax.cli import main
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.lora import LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import param_specs, union
from tests.helpers.forward import logits
from tests.helpers.hf import make_hf_checkpoint

SEED = random.SystemRandom().randrange(2**31)
RANK, ALPHA = 3, 24
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "someone/base",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": list(NAMES),
    "modules_to_save": None,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_dropout": 0.05,
    "inference_mode": True,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    print("seed", SEED)  # Shown where a test fails.


def adapted(name: str) -> bool:
    return name.endswith(NAMES) and ".experts." not in name


def write_pefts(folder: Path, model: torch.nn.Module, **changes: Any) -> dict[str, torch.Tensor]:
    """Writes what PEFT would save for a model, random. Returns the tensors."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and adapted(name):
            out, inputs = module.weight.shape
            draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.05  # noqa: E731
            tensors[f"base_model.model.{name}.lora_A.weight"] = draw(RANK, inputs)
            tensors[f"base_model.model.{name}.lora_B.weight"] = draw(out, RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **changes}))
    return tensors


def torch_logits(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], scale: float, tokens: np.ndarray
) -> np.ndarray:
    """Logits of the base model with `scale B(A(x))` added to each adapted module's output."""
    hooks = []
    for name, module in model.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in tensors:
            a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            add = lambda module, x, y, a=a, b=b: y + scale * (x[0] @ a.T) @ b.T  # noqa: E731
            hooks.append(module.register_forward_hook(add))
    with torch.no_grad():
        result: np.ndarray = model(torch.as_tensor(tokens)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return result


@pytest.fixture(scope="module", params=["dense", "experts"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("base")
    return folder, make_hf_checkpoint(folder, tie=request.param == "dense", moe=request.param == "experts", seed=SEED)


def test_an_adapter_is_downloaded(
    base: tuple[Path, Any], tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub id is the folder that it is downloaded to, for merging and for serving; nothing else is asked for."""
    folder, model = base
    write_pefts(tmp_path / "adapter", model)
    asked: list[tuple[str, list[str]]] = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "adapter")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    _, want = convert.load(folder, mesh, "float32", adapter=tmp_path / "adapter")
    _, got = convert.load(folder, mesh, "float32", adapter="someone/adapter")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert adapter_folders(["french=someone/adapter"]) == {"french": tmp_path / "adapter"}
    files = ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"]
    assert asked == [("someone/adapter", files)] * 2


def test_logits_are_pytorchs_merged_and_unmerged(base: tuple[Path, Any], tmp_path: Path, mesh: Mesh) -> None:
    folder, model = base
    tensors = write_pefts(tmp_path / "adapter", model, use_rslora=True)
    tokens = np.random.default_rng(SEED).integers(0, 160, (2, 24))
    want = torch_logits(model, tensors, ALPHA / RANK**0.5, tokens)
    # Merged as it is loaded.
    config, params = convert.load(folder, mesh, "float32", adapter=tmp_path / "adapter")
    scale = np.abs(want).max()
    np.testing.assert_allclose(logits(config, params, mesh, tokens, Options(stacked=False)), want, atol=1e-5 * scale)
    # A merged folder has the same weights.
    out = tmp_path / "merged"
    assert main(["convert", "--merge-adapter", str(tmp_path / "adapter"), str(folder), str(out)]) == 0
    _, again = convert.load(out, mesh, "float32")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # Unmerged, as in training.
    adapter = read_adapter(tmp_path / "adapter", config)
    both = union(adapter_params(adapter), convert.load_params(folder, config, mesh, "float32"))
    options = Options(lora=adapter.lora)
    specs = param_specs(config, Sharding.for_inference(config, mesh), options)
    both = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), both, specs)
    got = logits(config, both, mesh, tokens, options)
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)
    assert np.abs(want - torch_logits(model, {}, 1.0, tokens)).max() > 0.05 * scale


def test_what_is_written_is_what_was_read(base: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = base
    tensors = write_pefts(tmp_path / "adapter", model)
    extra = {"base_model.model.model.norm.weight": torch.rand(64)}
    save_file({**tensors, **extra}, tmp_path / "adapter" / "adapter_model.safetensors")
    config = convert.open_source(folder).config
    adapter = read_adapter(tmp_path / "adapter", config)
    assert adapter.lora == LoRA(RANK, float(ALPHA), whole=("norm",))
    write_adapter(tmp_path / "again", adapter_params(adapter), config, adapter.lora, "someone/base")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == {**tensors, **extra}.keys()
    assert all(torch.equal(again[name], x) for name, x in {**tensors, **extra}.items())
    settings = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {name: settings[name] for name in ("r", "lora_alpha", "bias", "use_rslora")} == {
        "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_rslora": False,
    }  # fmt: skip
    # PEFT adapts the modules that end with one of the targets: the same ones, and no routed expert.
    ends = tuple("." + target for target in settings["target_modules"])
    every = [name for name, x in model.named_modules() if name.endswith(ends)]
    assert {f"base_model.model.{name}.lora_A.weight" for name in every} == {n for n in tensors if "lora_A" in n}
    assert read_adapter(tmp_path / "again", config).lora == adapter.lora


def test_whole_modules_and_bfloat16(tmp_path: Path, mesh: Mesh) -> None:
    """A bfloat16 base: the sum is float32, rounded once; a whole tensor replaces the base's."""
    model = make_hf_checkpoint(tmp_path / "base", tie=False, dtype="bfloat16", seed=SEED)
    tensors = write_pefts(tmp_path / "adapter", model, modules_to_save=["lm_head"])
    head = torch.randn(160, 64)
    save_file({**tensors, "base_model.model.lm_head.weight": head}, tmp_path / "adapter" / "adapter_model.safetensors")
    convert.convert(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert torch.equal(after["lm_head.weight"], head.bfloat16())
    name = "model.layers.1.self_attn.o_proj.weight"
    a, b = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"].double() for part in "AB")
    exact = before[name].double() + ALPHA / RANK * b @ a
    # Half a unit in the last place of bfloat16, and float32's rounding before it.
    assert ((after[name].double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after[norm], before[norm])
    _, params = convert.load(tmp_path / "base", mesh, "float32", adapter=tmp_path / "adapter")
    got = np.asarray(params["layers"][1]["attention"]["o"]["weight"]).reshape(64, 64)
    np.testing.assert_allclose(got, exact.numpy(), rtol=1e-5, atol=1e-5)


EXPERT = "base_model.model.model.layers.0.mlp.experts.1.up_proj"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **changes})) and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return write


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (settings(use_dora=True), "use_dora=True.*merge_and_unload"),
    "biases": (settings(bias="all"), "bias='all'"),
    "another kind": (settings(peft_type="IA3"), "peft_type 'IA3'"),
    "ranks by module": (settings(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), "changed the base weights"),
    "no rank": (settings(r=0), "r=0"),
    "another rank": (settings(r=4), r"lora_A of model.layers.0.*shape \[3, .*\[4, "),
    "another shape": (
        weights(lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(128, 3)})),
        r"someone/base.*shape \[128, 3\].*need \[64, 3\].*another base model",
    ),
    "another layer": (
        weights(lambda t: t.update({Q.replace("0", "9") + ".lora_A.weight": torch.zeros(3, 64)})),
        "layers.9.*which has 2 layers",
    ),
    "another module": (
        weights(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 160)})),
        "embed_tokens.lora_embedding_A",
    ),
    "a routed expert": (
        weights(lambda t: t.update({f"{EXPERT}.lora_A.weight": torch.zeros(3, 64)})),
        "Routed experts cannot have LoRA",
    ),
    "B is missing": (weights(lambda t: t.pop(f"{Q}.lora_B.weight")), "lacks lora_B of model.layers.0"),
    "a module is missing": (
        weights(lambda t: [t.pop(f"{Q}.lora_{part}.weight") for part in "AB"]),
        "lacks the matrices of model.layers.0.self_attn.q_proj",
    ),
    "a truncated file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"123"), "not a valid safetensors file",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "does not exist"),
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "is not a folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("dense")
    return folder, make_hf_checkpoint(folder, seed=SEED)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_adapters_are_refused_before_anything_is_written(
    name: str, dense: tuple[Path, Any], tmp_path: Path
) -> None:
    damage, message = REFUSED[name]
    write_pefts(tmp_path / "adapter", dense[1])
    damage(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        convert.convert(dense[0], tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_generate_takes_an_adapter(dense: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pefts(tmp_path / "adapter", dense[1])
    convert.convert(dense[0], tmp_path / "merged", adapter=tmp_path / "adapter")
    arguments = ["--prompt-ids", "5,6,7,8", "--max-new-tokens", "6", "--json", "--temperature", "0", "--logprobs"]
    texts = []
    for model in ([str(dense[0]), "--adapter", str(tmp_path / "adapter")], [str(tmp_path / "merged")], [str(dense[0])]):
        assert main(["generate", *model, *arguments]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    adapted, merged, without = (text["logprobs"] for text in texts)
    assert texts[0]["token_ids"] == texts[1]["token_ids"]
    np.testing.assert_allclose(adapted, merged, atol=1e-5)
    # Tokens may be the same by chance, and a text may end early; the probability of the first token is not the same.
    assert abs(adapted[0] - without[0]) > 1e-5


def with_ends(dense: tuple[Path, Any], folder: Path, stated: Any, learned: list[int]) -> tuple[Path, Path]:
    """A base that ends texts at 3 by config.json, and at `stated` by generation_config.json; and an adapter for it."""
    base, peft = folder / "base", folder / "peft"
    shutil.copytree(dense[0], base)
    (base / "config.json").write_text(json.dumps({**read_json(base / "config.json"), "eos_token_id": 3}))
    (base / "generation_config.json").unlink(missing_ok=True)
    if stated is not None:
        (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "eos_token_id": stated}))
    write_pefts(peft, dense[1])
    config = load_config(base)
    adapter = read_adapter(peft, config)
    trained = jax.tree.map(jnp.asarray, adapter_params(adapter))
    write_adapter(folder / "adapter", trained, config, adapter.lora, str(base), learned)
    return base, folder / "adapter"


@pytest.mark.parametrize("stated", [None, 3, [3, 7], [3, 7, 9]])
def test_a_merged_folder_has_the_ends_that_the_adapter_learned(
    stated: Any, dense: tuple[Path, Any], tmp_path: Path, mesh: Mesh
) -> None:
    """In generation_config.json, which is kept if it lacks none; in config.json where there is no such file."""
    base, adapter = with_ends(dense, tmp_path, stated, [9, 3])
    merged, name = tmp_path / "merged", "generation_config.json"
    convert.convert(base, merged, adapter=adapter)
    ends = {3, 9, *(stated if isinstance(stated, list) else ())}
    assert read_json(merged / "config.json")["eos_token_id"] == ([9, 3] if stated is None else 3)
    assert (merged / name).exists() == (stated is not None)
    if stated is not None:
        written = read_json(merged / name)
        assert set(written["eos_token_id"]) == ends
        assert written["max_new_tokens"] == 5
        assert ((merged / name).read_bytes() == (base / name).read_bytes()) == (stated == [3, 7, 9])
    for folder, beside in ((base, adapter), (merged, None)):
        config, _ = convert.load(folder, mesh, "float32", adapter=beside)
        assert set(config.eos_token_ids) == ends


def test_texts_end_where_the_adapter_learned_to(
    dense: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first token of a text, if the adapter names it as an end, is its last one; without the file it is not."""
    base, adapter = with_ends(dense, tmp_path, [3], [])

    def said() -> list[int]:
        options = ["--prompt-ids", "5,6,7,8", "--max-new-tokens", "3", "--json", "--temperature", "0"]
        assert main(["generate", str(base), "--adapter", str(adapter), *options]) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return found

    assert not (adapter / "generation_config.json").exists()
    first = said()[0]
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    assert said() == [first]
