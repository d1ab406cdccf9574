"""MoE models: parity with transformers, checkpoints, configurations, routing, capacity and balance."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from convert import convert, load_params
from convert.huggingface import export
from qwen_jax import kernels
from qwen_jax.config import ModelConfig, MoE, load_config
from qwen_jax.errors import InputError
from qwen_jax.inference.engine import Engine
from qwen_jax.model import Qwen2
from qwen_jax.moe.router import RouterStats, route
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind, init_params, param_specs
from qwen_jax.published import published
from qwen_jax.stack import index_of
from tests.helpers import forward
from tests.helpers.hf import TINY, hf_logits, hf_loss_gradients, make_hf_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalised": {"norm_topk_prob": True},
    "sparse-steps": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "mlp-only": {"mlp_only_layers": [1], "num_hidden_layers": 4},
    "one-expert-per-token": {"num_experts_per_tok": 1},
    "all-experts-per-token": {"num_experts_per_tok": 8},
}


def tokens(seed: int = 0, shape: tuple[int, int] = (2, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], shape)


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_hf_checkpoint(folder, moe=True, tie=request.param == "plain", **VARIANTS[request.param])


# --- parity ----------------------------------------------------------------------------------------------------------


def test_logits_and_gradients_are_those_of_transformers(checkpoint: tuple[Path, Any], mesh: Mesh) -> None:
    """Within float32 rounding: 1e-5 of the largest logit, 1e-4 of the largest gradient of each tensor."""
    folder, model = checkpoint
    config = load_config(folder)
    params = load_params(folder, config, mesh)
    want = hf_logits(model, tokens())
    np.testing.assert_allclose(forward.logits(config, params, mesh, tokens()), want, atol=1e-5 * np.abs(want).max())

    got, want = forward.loss_gradients(config, params, mesh, tokens()), hf_loss_gradients(model, tokens())
    for at, i in enumerate(config.sparse_layers):
        name, layer = f"model.layers.{i}.mlp", got["layers"]["moe"]
        pairs = [
            (layer["router"]["weight"][at], want[f"{name}.gate.weight"]),
            (layer["experts"]["down"][at], want[f"{name}.experts.down_proj"]),
            (layer["experts"]["gate_up"][at].reshape(8, -1, 64), want[f"{name}.experts.gate_up_proj"]),
            (layer["shared"]["up"]["weight"][at], want[f"{name}.shared_expert.up_proj.weight"]),
            (layer["shared_gate"]["weight"][at], want[f"{name}.shared_expert_gate.weight"]),
        ]
        for mine, theirs in pairs:
            assert np.abs(theirs).max() > 0 or config.moe.num_experts_per_tok == 8  # type: ignore[union-attr]
            np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(theirs).max() + 1e-9)
    dense = [i for i in range(config.num_layers) if i not in config.sparse_layers]
    for at, i in enumerate(dense):
        mine, theirs = got["layers"]["mlp"]["up"]["weight"][at], want[f"model.layers.{i}.mlp.up_proj.weight"]
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(theirs).max())


def test_text_is_that_of_transformers(checkpoint: tuple[Path, Any], mesh: Mesh) -> None:
    """Greedy decoding: the prompt takes the path of sorted rows, later tokens that of few rows."""
    folder, model = checkpoint
    config = load_config(folder)
    prompts = [list(map(int, row[:n])) for row, n in zip(tokens(1), (30, 7), strict=True)]
    engine = Engine(config, load_params(folder, config, mesh, options=Options(stacked=False)), mesh, dtype="float32")
    for prompt in prompts:
        want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        got = engine.generate([prompt], max_new_tokens=12, eos_token_ids=[])[0]
        assert got.token_ids == want[0, len(prompt) :].tolist()


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    "axes", [{"expert": 4}, {"expert": 2, "tensor": 2}, {"data": 2, "expert": 2, "fsdp": 2}], ids=str
)
def test_text_is_the_same_on_a_mesh(axes: dict[str, int], tmp_path: Path, mesh: Mesh) -> None:
    make_hf_checkpoint(tmp_path, moe=True)
    config = load_config(tmp_path)
    prompts = [list(map(int, row[:n])) for row, n in zip(tokens(2, (4, 20)), (20, 3, 11, 8), strict=True)]
    texts = []
    for where in (mesh, make_mesh(axes)):
        params = load_params(tmp_path, config, where, options=Options(stacked=False))
        engine = Engine(config, params, where, dtype="float32")
        completions = engine.generate(prompts, max_new_tokens=8, eos_token_ids=[])
        texts.append([completion.token_ids for completion in completions])
    assert texts[0] == texts[1]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: x.view(torch.uint8).numpy().tobytes() for f in files for name, x in load_file(f).items()}


def test_round_trips_keep_every_byte(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = checkpoint
    convert(folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)
    assert load_config(tmp_path / "back") == load_config(folder)
    reloaded = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "back")
    assert set(reloaded.state_dict()) == set(Qwen2MoeForCausalLM.from_pretrained(folder).state_dict())


def test_experts_of_a_layer_may_be_one_tensor(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = checkpoint
    shutil.copytree(folder, tmp_path / "fused")
    (tmp_path / "fused" / "model.safetensors").unlink()
    state = {name: x.clone() for name, x in model.state_dict().items() if name != "lm_head.weight" or not _tied(folder)}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "fused", tmp_path / "apart", to="hf")
    assert content(tmp_path / "apart") == content(folder)


def _tied(folder: Path) -> bool:
    return load_config(folder).tie_word_embeddings


@pytest.mark.parametrize("stacked", [True, False])
def test_weights_are_sharded_and_exported_unchanged(
    checkpoint: tuple[Path, Any], tmp_path: Path, stacked: bool
) -> None:
    folder, _ = checkpoint
    config = load_config(folder)
    where = make_mesh({"expert": 2, "tensor": 2, "fsdp": 2})
    options = Options(stacked=stacked)
    params = load_params(folder, config, where, options=options)
    specs = param_specs(config, Sharding.for_inference(config, where), options)
    for x, spec in zip(
        jax.tree.leaves(params), jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, jax.P)), strict=True
    ):
        assert x.sharding.spec == spec
    export(params, config, tmp_path / "out", extra_files_from=folder)
    assert content(tmp_path / "out") == content(folder)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "a", moe=True)
    state = load_file(tmp_path / "a" / "model.safetensors")
    state.pop("model.layers.1.mlp.experts.5.up_proj.weight")
    save_file(state, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of .* 8 experts in 2 of them.*layers\.1\.mlp\.experts\.5\.up_proj"):
        convert(tmp_path / "a", tmp_path / "b")
    make_hf_checkpoint(tmp_path / "dense")
    moe_config = json.loads((tmp_path / "a" / "config.json").read_text())
    dense_config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(moe_config))
    with pytest.raises(InputError, match=r"lacks .*experts.*config.json belongs"):
        convert(tmp_path / "dense", tmp_path / "c")
    make_hf_checkpoint(tmp_path / "m", moe=True)
    (tmp_path / "m" / "config.json").write_text(json.dumps(dense_config))
    with pytest.raises(InputError, match=r"lacks .*mlp\.down_proj.*config.json belongs"):
        convert(tmp_path / "m", tmp_path / "d")
    assert not (tmp_path / "b").exists()
    for name, other in (("a", moe_config), ("b", dense_config)):
        make_hf_checkpoint(tmp_path / "whole" / name, moe=name == "b")
        convert(tmp_path / "whole" / name, tmp_path / "orbax" / name)
        (tmp_path / "orbax" / name / "config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"lacks .* 8 experts .*: .*layers\.moe\.experts\.down.*config.json belongs"):
        convert(tmp_path / "orbax" / "a", tmp_path / "e")
    with pytest.raises(InputError, match=r"lacks .*: .*layers\.mlp\.down\.weight.*config.json belongs"):
        convert(tmp_path / "orbax" / "b", tmp_path / "e")


# --- configurations --------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """Totals and active parameters of the two open models."""
    small, large = published("Qwen/Qwen1.5-MoE-A2.7B"), published("Qwen/Qwen2-57B-A14B")
    assert small.num_params()["total"] == 14_315_784_192
    assert large.num_params()["total"] == 57_408_658_944
    assert round(small.num_params()["active"] / 1e9, 3) == 2.378
    assert round(large.num_params()["active"] / 1e9, 2) == 13.70


@pytest.mark.parametrize("name", ["tiny-moe", "qwen1.5-moe-a2.7b", "fine-3b-a0.6b", "fine-91b-a4.9b"])
def test_parameter_counts_match_the_arrays(name: str) -> None:
    config = published(name)
    from qwen_jax.params import abstract_params

    sizes = jax.tree.map(lambda x: x.size, abstract_params(config))
    assert sum(jax.tree.leaves(sizes)) == config.num_params()["total"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) is more than num_experts \(8\)"),
        ({"num_experts": 0}, "num_experts of a mixture of experts must be a positive integer"),
        ({"mlp_only_layers": (7,)}, r"mlp_only_layers names layers \[7\]; there are layers 0 to 1"),
        ({"mlp_only_layers": (0, 1)}, "No layer has experts"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be at least 0"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], says: str) -> None:
    tiny = published("tiny-moe")
    with pytest.raises(InputError, match=says):
        dataclasses.replace(tiny, moe=dataclasses.replace(tiny.moe, **changes))  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_experts", None, "lacks num_experts"),
        ("norm_topk_prob", "yes", "expected true or false"),
        ("mlp_only_layers", 3, "expected a list of layer numbers"),
        ("num_experts_per_tok", 9, "is more than num_experts"),
        ("router_aux_loss_coef", "x", "expected a number"),
        ("use_sliding_window", True, "not supported with experts"),
        ("qkv_bias", False, "qkv_bias=False"),
    ],
)
def test_invalid_config_files_are_refused(key: str, value: Any, says: str) -> None:
    hf = published("tiny-moe").to_hf()
    with pytest.raises(InputError, match=says):
        ModelConfig.from_hf({**hf, key: value})


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ({"expert": 3}, r"num_experts \(8\) is not divisible by the expert axis \(3\)"),
        ({"tensor": 8}, "not divisible by the tensor axis"),
    ],
)
def test_meshes_that_do_not_divide_are_refused(axes: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Sharding.for_inference(published("tiny-moe"), make_mesh(axes))


def test_a_dense_model_has_no_expert_axis() -> None:
    with pytest.raises(InputError, match="dense model does not use the expert axis"):
        Sharding.for_inference(published("tiny"), make_mesh({"expert": 2}))


# --- routing ---------------------------------------------------------------------------------------------------------

TINY_MOE = dataclasses.replace(published("tiny-moe"), hidden_size=32, head_dim=8, vocab_size=64, moe=MoE(8, 3, 24, 40))


def hidden(
    config: ModelConfig, params: Params, where: Mesh, ids: np.ndarray, valid: np.ndarray | None = None, **options: Any
) -> tuple[np.ndarray, RouterStats | None]:
    """Hidden states and router statistics, in the layout of training."""
    sharding = Sharding.for_training(config, where)
    specs = param_specs(config, sharding)
    params = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), jax.NamedSharding(where, s)), params, specs)

    @jax.jit
    def run(params: Params, ids: jax.Array, valid: Any) -> Any:
        model = bind(config, params, sharding, Options(**options))
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        output = model(ids, positions, kernels.causal_mask(*ids.shape), valid_BT=valid)
        return jax.reshard(output.hidden, jax.P(None, None, None)), output.routing

    with jax.set_mesh(where):
        put = lambda x: None if x is None else jax.device_put(x, jax.NamedSharding(where, sharding.tokens))  # noqa: E731
        got: tuple[np.ndarray, RouterStats | None] = jax.device_get(
            run(params, put(np.asarray(ids, np.int32)), put(valid))
        )
        return got


def skewed(params: Params, expert: int | None) -> Params:
    """The parameters with routers whose first choice is the same expert for every token."""
    if expert is None:
        return params
    embed, router = (np.array(x) for x in (params["embed"]["weight"], params["layers"]["moe"]["router"]["weight"]))
    # The first component of the stream is the same for all tokens, and the router reads no other.
    embed[:, 0], router[..., 0] = 5.0, 0.0
    router[:, expert, 0] = 50.0
    moe = {**params["layers"]["moe"], "router": {"weight": router}}
    return {**params, "embed": {"weight": embed}, "layers": {**params["layers"], "moe": moe}}


@pytest.mark.draw(3)
@pytest.mark.parametrize("expert", [None, 0, 7])
@pytest.mark.parametrize(
    "axes", [{"expert": 2}, {"expert": 8}, {"expert": 2, "tensor": 2}, {"data": 2, "expert": 4}], ids=str
)
def test_dropless_layouts_agree_with_one_device(axes: dict[str, int], expert: int | None, mesh: Mesh) -> None:
    """Loads may be even or all tokens may choose one expert: hidden states agree, and every assignment counts once."""
    params = skewed(init_params(TINY_MOE, jax.random.key(0), mesh), expert)
    ids = np.random.default_rng(3).integers(0, 64, (8, 16))
    valid = np.ones(ids.shape, bool)
    want, routing = hidden(TINY_MOE, params, mesh, ids, valid)
    target = make_mesh(axes)
    got, sharded = hidden(TINY_MOE, params, target, ids, valid)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert routing is not None
    assert sharded is not None
    np.testing.assert_array_equal(sharded.load_E, routing.load_E)
    np.testing.assert_array_equal(routing.load_E.sum(1), [ids.size * 3] * 2)
    if expert is not None:
        np.testing.assert_array_equal(routing.load_E[:, expert], [ids.size] * 2)
    np.testing.assert_allclose(sharded.probability_E, routing.probability_E, rtol=1e-5)
    np.testing.assert_allclose(sharded.z, routing.z, rtol=1e-5)


@pytest.mark.parametrize("mlp_only", [(), (0, 2)])
def test_weights_are_initialised_only_for_layers_that_have_them(mlp_only: tuple[int, ...], mesh: Mesh) -> None:
    """Stacked layers get the same numbers as single ones, and a layer without a part gets no weights for it."""
    assert TINY_MOE.moe is not None
    moe = dataclasses.replace(TINY_MOE.moe, mlp_only_layers=mlp_only)
    config = dataclasses.replace(TINY_MOE, num_layers=4, moe=moe)
    sharding = Sharding.for_training(config, mesh)

    def initialised(key: jax.Array, stacked: bool) -> Any:
        return nnx.to_pure_dict(nnx.split(Qwen2(config, sharding, nnx.Rngs(params=key), Options(stacked=stacked)))[1])

    with jax.set_mesh(mesh):
        stacked, single = (initialised(jax.random.key(3), x) for x in (True, False))
        traced = jax.make_jaxpr(lambda key: initialised(key, True))(jax.random.key(3))
    for i in range(4):
        for name, part in single["layers"][i].items():
            at = index_of(name, i, config.sparse_layers)
            jax.tree.map(lambda a, b, at=at: np.testing.assert_array_equal(a[at], b), stacked["layers"][name], part)
    experts = stacked["layers"]["moe"]["experts"]["gate_up"].shape
    assert experts[0] == 4 - len(mlp_only)
    assert str(experts)[1:-1].replace(" ", "") in str(traced)
    assert str((4, *experts[1:]))[1:-1].replace(" ", "") not in str(traced) or not mlp_only


def test_a_single_token(mesh: Mesh) -> None:
    params = init_params(TINY_MOE, jax.random.key(0), mesh)
    ids = np.array([[5]])
    many = hidden(TINY_MOE, params, mesh, np.repeat(ids, 20, 0))[0]
    one, routing = hidden(TINY_MOE, params, mesh, ids, np.ones((1, 1), bool))
    for got in (one, hidden(TINY_MOE, params, mesh, ids)[0]):  # As in training, and as in inference.
        np.testing.assert_allclose(got[0], many[7], atol=1e-6)
    assert routing is not None
    assert routing.load_E.sum() == 6


def test_rows_do_not_depend_on_their_order_in_the_batch(mesh: Mesh) -> None:
    params = init_params(TINY_MOE, jax.random.key(0), mesh)
    ids = np.random.default_rng(4).integers(0, 64, (6, 9))
    order = np.random.default_rng(5).permutation(6)
    want, routing = hidden(TINY_MOE, params, mesh, ids, np.ones(ids.shape, bool))
    got, reordered = hidden(TINY_MOE, params, mesh, ids[order], np.ones(ids.shape, bool))
    np.testing.assert_array_equal(got, want[order])
    np.testing.assert_array_equal(reordered.load_E, routing.load_E)  # type: ignore[union-attr]


def test_padding_is_sent_to_no_expert(mesh: Mesh) -> None:
    params = init_params(TINY_MOE, jax.random.key(0), mesh)
    ids = np.random.default_rng(6).integers(0, 64, (2, 12))
    valid = np.ones(ids.shape, bool)
    valid[0, 7:] = False
    for options in ({}, {"capacity_factor": 1.0}):
        short, routing = hidden(TINY_MOE, params, mesh, ids, valid, **options)
        assert routing is not None
        np.testing.assert_array_equal(routing.load_E.sum(1), [valid.sum() * 3] * 2)
        np.testing.assert_array_equal(routing.tokens, [valid.sum()] * 2)
        changed = ids.copy()
        changed[0, 7:] = 3
        other, other_routing = hidden(TINY_MOE, params, mesh, changed, valid, **options)
        np.testing.assert_array_equal(short[valid], other[valid])
        np.testing.assert_array_equal(routing.probability_E, other_routing.probability_E)  # type: ignore[union-attr]


def test_ids_are_in_range_for_ties_and_logits_that_are_not_finite() -> None:
    """`top_k` of NaN still returns ids of existing experts, so nothing is read out of bounds."""
    x = jnp.array([[jnp.nan] * 4, [jnp.inf] * 4, [0.0] * 4])
    weights, ids, _ = route(x, jnp.ones((8, 4)), MoE(8, 3, 8, 8))
    assert ids.min() >= 0
    assert ids.max() < 8
    assert not np.isfinite(weights[0]).any()
    assert np.isfinite(weights[2]).all()


def test_given_expert_ids_are_used() -> None:
    """Even if others are more probable now: recomputation must use the rows that were kept for the backward pass."""
    rng = np.random.default_rng(1)
    x, router = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 4), (8, 4)))
    for norm in (False, True):
        moe = MoE(8, 3, 8, 8, norm_topk_prob=norm)
        weights, ids, logits = route(x, router, moe)
        np.testing.assert_allclose(route(x, router, moe, ids)[0], weights, rtol=1e-6)
        other = (ids + 1) % 8
        got, same, _ = route(x, router, moe, other)
        np.testing.assert_array_equal(same, other)
        want = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(other), 1)
        np.testing.assert_allclose(got, want / want.sum(1, keepdims=True) if norm else want, rtol=1e-5)


# --- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [{}, {"expert": 4}, {"expert": 2, "tensor": 2}], ids=str)
def test_a_capacity_for_all_rows_is_dropless(axes: dict[str, int], mesh: Mesh) -> None:
    params = init_params(TINY_MOE, jax.random.key(0), mesh)
    ids = np.random.default_rng(7).integers(0, 64, (8, 16))
    valid = np.ones(ids.shape, bool)
    want, _ = hidden(TINY_MOE, params, mesh, ids, valid)
    where = make_mesh(axes, jax.devices()[: int(np.prod([*axes.values()]))])
    got, routing = hidden(TINY_MOE, params, where, ids, valid, capacity_factor=8 / 3)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert routing is not None
    assert not routing.dropped.any()


def test_overflowing_tokens_are_counted_and_the_first_ones_kept(mesh: Mesh) -> None:
    params = skewed(init_params(TINY_MOE, jax.random.key(0), mesh), 2)
    ids = np.random.default_rng(8).integers(0, 64, (1, 32))
    valid = np.ones(ids.shape, bool)
    want, _ = hidden(TINY_MOE, params, mesh, ids, valid)
    got, routing = hidden(TINY_MOE, params, mesh, ids, valid, capacity_factor=1.0)
    assert routing is not None
    room = 12  # 1.0 x 32 x 3 / 8
    np.testing.assert_array_equal(routing.dropped[0], np.maximum(routing.load_E[0] - room, 0).sum())
    np.testing.assert_allclose(got[0, 0], want[0, 0], atol=1e-5)
    assert np.abs(got[0, -1] - want[0, -1]).max() > 5e-4


# --- balance ---------------------------------------------------------------------------------------------------------


def test_statistics_give_the_balance_loss_of_transformers(tmp_path: Path, mesh: Mesh) -> None:
    """Pooled over layers, as in transformers, without padding."""
    model = make_hf_checkpoint(tmp_path, moe=True)
    config = load_config(tmp_path)
    ids = tokens(9)
    valid = np.ones(ids.shape, bool)
    valid[1, 25:] = False
    with torch.no_grad():
        logits = model(
            torch.as_tensor(ids), attention_mask=torch.as_tensor(valid), output_router_logits=True
        ).router_logits
    want = load_balancing_loss_func(logits, 8, 3, torch.as_tensor(valid))
    _, routing = hidden(config, load_params(tmp_path, config, mesh), mesh, ids, valid)
    assert routing is not None
    load, probability = (x.sum(0) / routing.tokens.sum() for x in (routing.load_E, routing.probability_E))
    np.testing.assert_allclose(8 * (load * probability).sum(), float(want), rtol=1e-5)
    z = np.mean([torch.logsumexp(layer[valid.reshape(-1)], -1).square().mean() for layer in logits])
    np.testing.assert_allclose((routing.z / routing.tokens).mean(), z, rtol=1e-5)
