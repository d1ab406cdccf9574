"""Upcycling: what the new model computes, where the experts' weights come from, and that it is reproducible."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file
from transformers import Qwen2MoeForCausalLM

from convert import load, open_source
from convert.upcycle import Recipe, Upcycled, upcycle
from qwen_jax.cli import main
from qwen_jax.config import MoE
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from tests.helpers import forward
from tests.helpers.hf import TINY, make_hf_checkpoint

F = TINY["intermediate_size"]  # 96
MIXTURE = MoE(16, 4, F // 4, F, norm_topk_prob=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_hf_checkpoint(folder)
    return folder


def logits(folder: Path, mesh: Mesh) -> np.ndarray:
    config, params = load(folder, mesh, options=Options(stacked=True))
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 24))
    return forward.logits(config, params, mesh, tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 8},
        {"num_experts": 4},
        {"shared_intermediate_size": F + 32},
        {"shared_intermediate_size": 32},
        {"intermediate_size": F, "num_experts_per_tok": 1},
        {"intermediate_size": F, "num_experts_per_tok": 2, "mlp_only_layers": (0,)},
    ],
    ids=str,
)
def test_without_reinitialisation_the_model_computes_the_same(
    changes: dict[str, Any], dense: Path, tmp_path: Path, mesh: Mesh
) -> None:
    """A token is routed to whole replicas: the logits of the dense model, within float32 rounding."""
    made = upcycle(dense, tmp_path / "moe", Recipe(dataclasses.replace(MIXTURE, **changes), reinit=0.0, seed=3))
    assert made.preserves
    want = logits(dense, mesh)
    np.testing.assert_allclose(logits(tmp_path / "moe", mesh), want, atol=2e-5 * np.abs(want).max())
    Qwen2MoeForCausalLM.from_pretrained(tmp_path / "moe")


@pytest.mark.parametrize(
    ("changes", "reinit"),
    [({}, 0.5), ({"num_experts_per_tok": 3}, 0.0), ({"norm_topk_prob": False}, 0.0), ({"intermediate_size": 40}, 0.0)],
    ids=str,
)
def test_what_does_not_preserve_says_so(
    changes: dict[str, Any], reinit: float, dense: Path, tmp_path: Path, mesh: Mesh
) -> None:
    made = upcycle(dense, tmp_path / "moe", Recipe(dataclasses.replace(MIXTURE, **changes), reinit=reinit))
    assert not made.preserves
    got, want = logits(tmp_path / "moe", mesh), logits(dense, mesh)
    assert np.isfinite(got).all()
    assert 1e-3 < np.abs(got - want).max() / np.abs(want).max() < 2


@pytest.mark.parametrize("top_k", [3, 4])
def test_rounding_of_scaled_weights_in_bfloat16_is_reported(top_k: int, tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "dense", dtype="bfloat16")
    recipe = Recipe(MoE(2 * top_k, top_k, F // top_k, F, norm_topk_prob=True), reinit=0.0)
    made = upcycle(tmp_path / "dense", tmp_path / "moe", recipe)
    assert made.preserves
    assert made.rounds == (top_k == 3)
    old = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    new = load_file(tmp_path / "moe" / "model.safetensors")["model.layers.0.mlp.experts.0.down_proj.weight"]
    columns = {(column.astype(np.float32) * (top_k / 2)).tobytes() for column in old.T}
    assert all((column.astype(np.float32).tobytes() in columns) == (top_k == 4) for column in new.T)


@pytest.mark.parametrize(("num_experts", "top_k", "width"), [(16, 4, F // 4), (15, 4, 40)])
def test_without_normalised_weights_experts_are_as_strong_as_the_dense_layer(
    num_experts: int, top_k: int, width: int, tmp_path: Path
) -> None:
    """In a wide model, where a router with the usual standard deviation would prefer some experts from the start."""
    make_hf_checkpoint(tmp_path / "dense", hidden_size=1024, num_hidden_layers=1)
    recipe = Recipe(MoE(num_experts, top_k, width, F, norm_topk_prob=False), reinit=0.0)
    config = upcycle(tmp_path / "dense", tmp_path / "moe", recipe).config
    router = load_file(tmp_path / "moe" / "model.safetensors")["model.layers.0.mlp.gate.weight"]
    logits = np.random.default_rng(0).normal(size=(1000, config.hidden_size)) @ router.T
    chosen = np.sort(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 1)[:, -top_k:].sum(1)
    np.testing.assert_allclose(chosen, top_k / num_experts, rtol=0.06)


def test_each_replica_has_every_neuron_once_and_half_of_each_expert_is_new(dense: Path, tmp_path: Path) -> None:
    old = load_file(dense / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    row_of = {row.tobytes(): i for i, row in enumerate(old)}
    for reinit, kept in ((0.0, F // 4), (0.5, F // 8), (1.0, 0)):
        folder = tmp_path / str(reinit)
        upcycle(dense, folder, Recipe(MIXTURE, reinit))
        new = load_file(folder / "model.safetensors")
        experts = [new[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"] for e in range(16)]
        found = [[row_of[row.tobytes()] for row in expert if row.tobytes() in row_of] for expert in experts]
        assert [len(rows) for rows in found] == [kept] * 16
        if reinit == 0:
            for replica in range(4):
                assert sorted(n for rows in found[4 * replica : 4 * replica + 4] for n in rows) == list(range(F))
            assert found[0] != found[4]
        else:
            drawn = np.concatenate([[r for r in e if r.tobytes() not in row_of] for e in experts])
            np.testing.assert_allclose(drawn.std(), old.std(), rtol=0.05)
    router = new["model.layers.1.mlp.gate.weight"]
    assert len({row.tobytes() for row in router}) == 4, "one row for each replica"


def test_the_same_seed_is_the_same_bytes_however_it_is_read(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(MIXTURE, seed=7)
    upcycle(dense, tmp_path / "a", recipe)
    upcycle(dense, tmp_path / "orbax", recipe, to="orbax")
    upcycle(dense, tmp_path / "b", recipe)
    upcycle(dense, tmp_path / "c", dataclasses.replace(recipe, seed=8))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    by_rows = Upcycled(open_source(dense), recipe)
    whole = open_source(tmp_path / "orbax")
    from convert.names import leaves

    for leaf in leaves(by_rows.config):
        last = len(leaf.names) - 1
        rows = slice(leaf.shape[0] // 3, leaf.shape[0])
        got = by_rows.read(leaf, slice(last, last + 1), rows)
        assert got.tobytes() == whole.read(leaf, slice(last, last + 1), rows).tobytes()


def test_the_command_says_whether_the_function_is_preserved_and_refuses_what_does_not_fit(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["upcycle", str(dense), str(tmp_path / "moe"), "--num-experts", "8", "--top-k", "4"]
    assert main([*arguments, "--reinit", "0"]) == 0
    assert "it computes what the dense model does" in capsys.readouterr().out
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["num_experts"] == 8
    assert main(["verify", str(dense), str(tmp_path / "moe")]) == 0
    capsys.readouterr()
    for extra, says in (
        (["--reinit", "2"], "reinit must be a fraction"),
        (["--top-k", "7"], "not divisible by the 7 experts of a token"),
        (["--top-k", "9", "--width", "8"], r"num_experts_per_tok (9) is more than num_experts (8)"),
    ):
        refused = [*arguments[:2], str(tmp_path / "never"), *arguments[3:], *extra]
        assert main(refused) != 0
        assert says in capsys.readouterr().err
    assert main(["upcycle", str(tmp_path / "moe"), str(tmp_path / "never")]) != 0
    assert "Expected a dense checkpoint, got one with 8 experts" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_reinit_and_seed_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"seed must be at least 0, got -1"):
        Recipe(MIXTURE, seed=-1)
    with pytest.raises(InputError, match=r"reinit must be a fraction from 0 to 1, got 1\.5"):
        Recipe(MIXTURE, 1.5)
