"""Adapters and the PEFT package: each loads what the other has written, with the same logits; the rest is refused."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import convert
from convert.adapter import adapter_params, load_factors, read_adapter, write_adapter
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.inference.scorer import Scorer
from qwen_jax.lora import LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, init_params, param_specs, union
from tests.helpers.forward import logits
from tests.helpers.hf import hf_logits, make_hf_checkpoint
from tests.helpers.runs import print_seed

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose head is their embedding, or is not; and with experts."""
    folder, seed = tmp_path_factory.mktemp("bases"), int(print_seed().integers(2**31))
    for name in ("tied", "untied", "experts"):
        make_hf_checkpoint(folder / name, tie=name == "tied", moe=name == "experts", seed=seed)
    return {name: folder / name for name in ("tied", "untied", "experts")}


def load(folder: Path, kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **settings).eval()


def save(base: Any, folder: Path, seed: int, config: peft.PeftConfig) -> Any:
    """Saves an adapter of PEFT in which everything that is trained is random. Returns the model with it."""
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.named_parameters():
        # Some kinds do not train B: it is named, too.
        if x.requires_grad or "lora_B" in name:
            x.data = ("norm" in name) + 0.1 * torch.randn(x.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def assert_same(got: np.ndarray, want: np.ndarray, without: np.ndarray) -> None:
    """Within 1e-5 of the largest logit: float32 sums in another order. The adapter does something."""
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)
    assert np.abs(want - without).max() > 1e-2 * scale


READ: dict[str, tuple[str, dict[str, Any]]] = {
    "PEFT's own choice": ("tied", {}),
    "attention": ("untied", {"target_modules": ATTENTION}),
    "feed-forward": ("tied", {"target_modules": MLP}),
    "all linear": ("untied", {"target_modules": "all-linear"}),
    "a pattern": ("tied", {"target_modules": r".*\.(q_proj|down_proj)"}),
    "full names": ("tied", {"target_modules": ["model.layers.0.mlp.up_proj", "self_attn.o_proj"]}),
    "layer 0 alone": ("tied", {"target_modules": ATTENTION, "layers_to_transform": 0}),
    "a list of layers": ("tied", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "all but one": ("tied", {"target_modules": ATTENTION, "exclude_modules": ["k_proj"]}),
    "orthogonal at first": ("tied", {"r": 4, "init_lora_weights": "orthogonal"}),
    "minor components": ("tied", {"target_modules": ["v_proj"], "init_lora_weights": "mica"}),
    "whole parts": ("untied", {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}),
    "whole modules of layers": ("untied", {"target_modules": ["o_proj"], "modules_to_save": ["norm", "mlp", "q_proj"]}),
    "a tied embedding": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "beside experts": ("experts", {"target_modules": ATTENTION}),
    "the shared expert": ("experts", {"target_modules": [*ATTENTION, *(f"shared_expert.{name}" for name in MLP)]}),
}


@pytest.mark.parametrize("name", READ)
def test_what_peft_writes_gives_its_logits(name: str, bases: dict[str, Path], tmp_path: Path, mesh: Mesh) -> None:
    base, settings = bases[READ[name][0]], READ[name][1]
    rng = print_seed()
    drawn = {"r": int(rng.integers(1, 9)), "lora_alpha": float(rng.uniform(1, 16)), "use_rslora": bool(rng.integers(2))}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**drawn, **settings})
    model = save(load(base), tmp_path / "adapter", int(rng.integers(2**31)), config)
    tokens = rng.integers(0, 160, (2, 12))
    ours, params = convert.load(base, mesh, "float32", adapter=tmp_path / "adapter")
    got = logits(ours, params, mesh, tokens, Options(stacked=False))
    assert_same(got, hf_logits(model, tokens), hf_logits(load(base), tokens))


WRITTEN = {
    "tied": LoRA(4, 8.0, whole=("embed", "norm")),
    "untied": LoRA(3, 2.5, ("q", "down"), rank_stabilised=True, whole=("lm_head",), dropout=0.1),
    "experts": LoRA(5, 7.0),
}


def draw(config: Any, lora: LoRA, frozen: Params, mesh: Mesh, rng: np.random.Generator) -> Params:
    """What a run with LoRA trains, random, on the mesh."""

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.device_put(np.float32("norm" in name) + rng.normal(0, 0.1, x.shape).astype(np.float32), x.sharding)

    with jax.set_mesh(mesh):
        trained = init_params(config, jax.random.key(0), mesh, lora=lora, frozen=frozen)
    return jax.tree_util.tree_map_with_path(leaf, trained)


@pytest.mark.parametrize("name", WRITTEN)
def test_peft_loads_what_training_writes(name: str, bases: dict[str, Path], tmp_path: Path, mesh: Mesh) -> None:
    base, lora, rng = bases[name], WRITTEN[name], print_seed()
    config = convert.open_source(base).config
    stored = convert.load_params(base, config, mesh, "float32")
    frozen = {part: value for part, value in stored.items() if part not in lora.whole}
    trained = draw(config, lora, frozen, mesh, rng)
    write_adapter(tmp_path / "adapter", trained, config, lora, str(base))
    # The forward pass of training, and PEFT's.
    options, tokens = Options(lora=lora), rng.integers(0, 160, (2, 12))
    specs = param_specs(config, Sharding.for_inference(config, mesh), options)
    both = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), union(trained, frozen), specs)
    model = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    assert_same(logits(config, both, mesh, tokens, options), hf_logits(model, tokens), hf_logits(load(base), tokens))
    # Training goes on from the same parameters.
    again = adapter_params(read_adapter(tmp_path / "adapter", config))
    jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_a_reward_model_s_adapter_goes_both_ways(bases: dict[str, Path], tmp_path: Path, mesh: Mesh) -> None:
    """The adapter has the score head, and its base is a language model; a merged folder is a model of transformers."""
    base, rng = bases["tied"], print_seed()
    texts = [rng.integers(0, 160, n).tolist() for n in (5, 11)]
    classifier = functools.partial(load, base, AutoModelForSequenceClassification, num_labels=1)

    def theirs(model: Any) -> np.ndarray:
        return np.asarray([hf_logits(model, [ids])[0, 0] for ids in texts])

    without = theirs(classifier())
    # From PEFT, loaded and merged.
    model = save(classifier(), tmp_path / "a", 0, peft.LoraConfig(task_type="SEQ_CLS", target_modules=MLP))
    config, params = convert.load(base, mesh, "float32", adapter=tmp_path / "a")
    assert config.score == "linear"
    assert_same(Scorer(config, params, mesh, dtype="float32").score(texts), theirs(model), without)
    convert.convert(base, tmp_path / "merged", adapter=tmp_path / "a")
    merged = load(tmp_path / "merged", AutoModelForSequenceClassification)
    assert_same(theirs(merged), theirs(model), without)
    # To PEFT.
    lora = LoRA(4, 8.0, whole=("score",))
    stored = convert.load_params(base, convert.open_source(base).config, mesh, "float32")
    trained = draw(config, lora, stored, mesh, rng)
    write_adapter(tmp_path / "b", trained, config, lora, str(base))
    config, params = convert.load(base, mesh, "float32", adapter=tmp_path / "b")
    got = Scorer(config, params, mesh, dtype="float32").score(texts)
    assert_same(got, theirs(peft.PeftModel.from_pretrained(classifier(), tmp_path / "b").eval()), without)
    # Scoring has no --adapter: the folder itself is no model, and only merging is advised.
    with pytest.raises(InputError, match=r"not a model; its base model is .*\. Merge the two first"):
        load_config(tmp_path / "b")


VARIANTS: dict[str, tuple[str, peft.PeftConfig | dict[str, Any], str]] = {
    "DoRA": ("tied", {"use_dora": True}, "use_dora=True.*merge_and_unload"),
    "all biases": ("tied", {"bias": "all"}, "bias='all'"),
    "biases of the adapted": ("tied", {"bias": "lora_only"}, "bias='lora_only'"),
    "biases of B": ("tied", {"lora_bias": True}, "lora_bias=True"),
    "ranks by module": ("tied", {"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "alphas by module": ("tied", {"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "some tokens": ("tied", {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "activated by tokens": ("tied", {"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "PiSSA": ("tied", {"init_lora_weights": "pissa"}, "changed the base weights"),
    "OLoRA": ("tied", {"init_lora_weights": "olora"}, "changed the base weights"),
    "KaSA": ("tied", {"kasa_config": KasaConfig()}, "kasa_config"),
    "VeLoRA": ("tied", {"velora_config": VeloraConfig()}, "velora_config"),
    "MonteCLoRA": ("tied", {"monteclora_config": MontecloraConfig()}, "monteclora_config"),
    "blocks": ("tied", {"use_bdlora": BdLoraConfig(ATTENTION, nblocks=2)}, "use_bdlora"),
    "the embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*merge_and_unload"),
    "the head": ("untied", {"target_modules": ["q_proj", "lm_head"]}, "lm_head.*merge_and_unload"),
    "an untied embedding": ("tied", {"modules_to_save": ["embed_tokens"]}, "replaces the embedding.*ensure_weight"),
    "an untied head": ("tied", {"modules_to_save": ["lm_head"]}, "replaces the head.*ensure_weight_tying"),
    "a parameter": ("experts", {"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "the gate of the shared expert": ("experts", {"target_modules": "all-linear"}, "shared_expert_gate"),
    "LoKr": ("tied", peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "peft_type 'LOKR'"),
    "IA3": ("tied", peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]), "'IA3'"),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_other_kinds_are_refused_by_name(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, settings, message = VARIANTS[name]
    if isinstance(settings, dict):
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ATTENTION, **settings})
    save(load(bases[base]), tmp_path / "adapter", 0, settings)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "adapter", convert.open_source(bases[base]).config)


def test_whole_modules_are_merged_only(bases: dict[str, Path], tmp_path: Path) -> None:
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], modules_to_save=["input_layernorm"])
    save(load(bases["untied"]), tmp_path / "adapter", 0, settings)
    config = convert.open_source(bases["untied"]).config
    with pytest.raises(InputError, match=r"input_layernorm.*can be merged, but not trained further"):
        adapter_params(read_adapter(tmp_path / "adapter", config))
    with pytest.raises(InputError, match=r"input_layernorm.*Merge it instead"):
        load_factors(tmp_path / "adapter", config)


def test_a_head_that_the_model_lacks_cannot_be_written(bases: dict[str, Path], tmp_path: Path) -> None:
    config = convert.open_source(bases["tied"]).config
    with pytest.raises(InputError, match="its head is its embedding; name embed"):
        write_adapter(tmp_path / "adapter", {}, config, LoRA(whole=("lm_head",)))
    with pytest.raises(InputError, match="only a reward model has"):
        write_adapter(tmp_path / "adapter", {}, config, LoRA(whole=("score",)))
