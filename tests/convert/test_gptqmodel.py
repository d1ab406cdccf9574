"""GPTQModel and we read what the other writes. It is not among the packages of the tests: it pins a torch."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from qwen_jax.cli import main
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import train_bpe
from tests.helpers.forward import logits
from tests.helpers.hf import make_hf_checkpoint

# By default it has one for each core, and wants two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")
gptqmodel = pytest.importorskip("gptqmodel")
torch = pytest.importorskip("torch")

# Of logits, in bfloat16; rounding the weights themselves to 4 bits moves them by 0.2.
_ROUNDING = 0.02


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose projections have several groups of 128."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    of_experts = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256} if request.param else {}
    make_hf_checkpoint(folder, tie=False, vocab_size=512, moe=request.param, **sizes, **of_experts)
    train_bpe([Path(__file__).read_text()] * 3, 400).save(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "gptq"),
        ("--method", "gptq", "--desc-act"),
        ("--method", "gptq", "--asym"),
        ("--method", "gptq", "--bits", "8"),
        ("--method", "awq"),
    ],
    ids=" ".join,
)
def test_logits_are_those_of_our_model(base: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    folder = tmp_path / "quantised"
    calibration = "--calibration", __file__, "--calibration-length", "64", "--calibration-rows", "8"
    assert main(["quantize", str(base), str(folder), *options, *calibration]) == 0
    check_same_logits(folder, f"{options[1]}_torch")


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"sym": False}], ids=str)
def test_what_it_writes_is_read(
    base: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Where it writes logs.
    settings = gptqmodel.QuantizeConfig(**{"bits": 4, "group_size": 128, "desc_act": False, **options}, device="cpu")
    model = gptqmodel.GPTQModel.load(str(base), settings)
    text = Path(__file__).read_text()
    model.quantize([text[i : i + 300] for i in range(0, 2400, 300)], batch_size=1)
    model.save(str(tmp_path / "quantised"))
    check_same_logits(tmp_path / "quantised", "gptq_torch")


def check_same_logits(folder: Path, backend: str) -> None:
    """GPTQModel and our model, whose weights are those of the folder, have the same logits but for rounding."""
    mesh, ids = make_mesh({}), np.random.default_rng().integers(0, 512, (1, 48))
    config, params = convert.load(folder, mesh, "float32")
    ours = logits(config, params, mesh, ids, Options(stacked=False))[0]
    how = {"device": "cpu", "backend": gptqmodel.BACKEND(backend), "dtype": torch.bfloat16}
    model = gptqmodel.GPTQModel.load(str(folder), **how)
    with torch.no_grad():
        theirs = model.model(torch.from_numpy(ids)).logits[0].float().numpy()
    # In bfloat16 a token near a tie may be sent to another expert.
    apart = np.linalg.norm(theirs - ours, axis=-1) / np.linalg.norm(ours, axis=-1)
    assert np.median(apart) < _ROUNDING
