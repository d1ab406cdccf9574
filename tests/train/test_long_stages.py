"""The recipes for long contexts at small size: stages of growing length, the longest on a context axis."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.config import MoE, load_config
from qwen_jax.tokenizer import load_tokenizer
from tests.helpers.data_sets import make_rows
from tests.helpers.runs import MODEL, print_seed
from train import run
from train.config import RunConfig, load
from train.observe.metrics import read_log
from train.optimizer import Schedule
from train.step import StepConfig

RECIPES = Path(__file__).parents[2] / "experiments" / "pretrain" / "qwen2_5.py"
MODELS = {"turbo": MODEL, "million": dataclasses.replace(MODEL, moe=MoE(4, 2, 64, 128, norm_topk_prob=True))}


def shrunk(name: str, material: Path, folder: Path) -> RunConfig:
    """A recipe with its stages, bases and mixtures: lengths over 1,024, rows and devices over 8, and two steps each."""
    recipe, rng = load(f"{RECIPES}:{name}"), print_seed()
    tokenizer = load_tokenizer(material / "tokenizer").fingerprint()
    for data_set in recipe.data:
        make_rows(folder / data_set, rng, 24, int(data_set.split("-")[1]) // 1024, tokenizer=tokenizer)
    stages = tuple(
        dataclasses.replace(
            stage,
            schedule=Schedule(2, 1e-3, schedule="wsd"),
            length=stage.length // 1024,
            batch_size=stage.batch_size // 8,
            mesh={axis: n // 8 if axis == "fsdp" else n for axis, n in (stage.mesh or {}).items()},
        )
        for stage in recipe.stages
    )
    return dataclasses.replace(
        recipe,
        output=str(folder / "run"),
        model=MODELS[name],
        tokenizer=str(material / "tokenizer"),
        data={data_set: str(folder / data_set) for data_set in recipe.data},
        initial=None,
        stages=stages,
        step=StepConfig(dtype="float32", remat="full"),
    )


@pytest.mark.draw(1)
@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_runs_to_its_end(name: str, material: Path, tmp_path: Path) -> None:
    """That a mesh gives the losses of one device is tested with other layouts; here, that stages follow one another."""
    config = shrunk(name, material, tmp_path)
    assert config.stages[-1].mesh == {"fsdp": 2, "context": 4}
    assert not run.pretrain(config)
    steps = [r for r in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 2 * len(config.stages) + 1))
    # Random tokens, weights at their initial size: the loss of guessing.
    np.testing.assert_allclose([r["loss"] for r in steps], math.log(MODEL.vocab_size), atol=0.3)
    # All tokens but the first of each document; the last row of a data set may be nearly empty.
    lengths = [stage.length for stage in config.stages for _ in range(2)]
    assert all(0.8 * (512 - n) < r["weight"] < 512 for r, n in zip(steps, lengths, strict=True))
    assert load_config(tmp_path / "run" / "checkpoints" / str(len(steps))).rope_theta == 1e7
