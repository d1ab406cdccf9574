"""The shipped recipes load through the command line, and what it prints of them loads again."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.cli import main
from train.config import RunConfig
from train.grpo_config import GrpoRunConfig
from train.tune_config import TuneConfig

ROOT = Path(__file__).parents[2]
PRETRAIN, POST = "experiments.pretrain.qwen2_5", "experiments.post.qwen2_5"
CONFIGS = {"RunConfig": RunConfig, "TuneConfig": TuneConfig, "GrpoRunConfig": GrpoRunConfig}
_TUNED = "--held-out h --output o --lora".split()
# Runs that are unlike the recipes.
PLAIN = {
    "pretrain": ["--config", str(ROOT / "experiments" / "learning" / "small.py")],
    "grpo": ["--model", "m", "--prompts", "a", "--reward", "math", "length", *_TUNED],
    **{method: ["--model", "m", "--data", "a", *_TUNED] for method in ("sft", "reward", "dpo")},
}


def recipes() -> list[tuple[str, str]]:
    """The command and the --config of each: all public functions of the files of the report's recipes, and more."""
    found = [("pretrain", "experiments/learning/small.py"), ("pretrain", "experiments/data/mixture.py:config")]
    for name in (PRETRAIN, POST):
        module = importlib.import_module(name)
        for function in vars(module).values():
            if not inspect.isfunction(function) or function.__module__ != name or function.__name__.startswith("_"):
                continue
            config = function()
            assert isinstance(config, CONFIGS[function.__annotations__["return"].__name__])
            command = {RunConfig: "pretrain", GrpoRunConfig: "grpo"}.get(type(config)) or config.method
            found.append((command, f"{name.replace('.', '/')}.py:{function.__name__}"))
    return found


RECIPES = recipes()


def shown(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> dict[str, Any]:
    """What `qwen-jax train` prints as the configuration."""
    status = main(["train", command, *arguments, "--print-config"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    result: dict[str, Any] = json.loads(captured.out)
    return result


def test_every_command_has_a_recipe() -> None:
    assert {command for command, _ in RECIPES} == {"pretrain", "sft", "reward", "dpo", "grpo"}
    names = {config.partition(":")[2] for command, config in RECIPES if command != "pretrain"}
    assert names == {"sft", "sft_long", "reward", "dpo", "grpo"}


@pytest.mark.parametrize(("command", "config"), RECIPES)
def test_what_is_printed_of_a_recipe_loads_again(command: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By --set, field by field, also over another configuration."""
    recipe = shown(capsys, command, "--config", str(ROOT / config))
    changes = [f"{field}={json.dumps(value)}" for field, value in recipe.items()]
    assert shown(capsys, command, "--config", str(ROOT / config), "--set", *changes) == recipe
    assert shown(capsys, command, *PLAIN[command], "--set", *changes) == recipe
    if config != "experiments/learning/small.py":
        assert shown(capsys, command, *PLAIN[command]) != recipe


def test_what_is_printed_of_merging_without_a_limit_loads_again(capsys: pytest.CaptureFixture[str]) -> None:
    plain = "--model m --data a --output o --set base=b".split()
    found = shown(capsys, "dpo", *plain, "merging={}")
    assert found["merging"]["clip"] is None
    assert shown(capsys, "dpo", *plain, f"merging={json.dumps(found['merging'])}") == found


@pytest.mark.parametrize(("command", "config"), RECIPES)
def test_a_recipe_is_of_one_command(command: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"sft": "dpo", "dpo": "reward"}.get(command, "sft")
    assert main(["train", other, "--config", str(ROOT / config), "--print-config"]) == 1
    tuned = command in ("sft", "reward", "dpo")
    wanted = f"is one of `qwen-jax train {command}`" if tuned else "must return a train.tune_config.TuneConfig"
    assert wanted in capsys.readouterr().err
