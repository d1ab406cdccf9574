"""Command lines of tuning: options add up where they are given again, and arguments that contradict each other."""

import json
from typing import Any

import pytest

from qwen_jax.errors import InputError
from train import grpo_command, tune_command

TUNE = ["--model", "m", "--data", "a.jsonl", "--output", "o"]
GRPO = ["--model", "m", "--prompts", "a.jsonl", "--reward", "math", "--output", "o"]


def shown(method: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that a command prints."""
    formats: Any = None
    given = [*arguments, "--print-config"]
    assert (grpo_command.main(given, formats) if method == "grpo" else tune_command.main(method, given, formats)) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("again", [False, True], ids=["in one", "again"])
def test_an_option_that_is_given_again_adds_its_values(again: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def option(name: str, *values: str) -> list[str]:
        return [text for value in values for text in (name, value)] if again else [name, *values]

    held = option("--held-out", "x.jsonl", "y.jsonl")
    arguments = ["--model", "m", *option("--data", "a.jsonl", "b.jsonl"), "--output", "o", *held]
    found = shown("sft", arguments, capsys)
    assert found["data"] == {"a": "a.jsonl", "b": "b.jsonl"}
    assert found["held_out"] == {"x": "x.jsonl", "y": "y.jsonl"}
    prompts = option("--prompts", "a.jsonl", "b.jsonl")
    arguments = ["--model", "m", *prompts, *option("--reward", "math", "my.py:short"), "--output", "o", *held]
    found = shown("grpo", [*arguments, *option("--set", "queries=4", "rewards.1.weight=0.1")], capsys)
    assert found["prompts"] == {"a": "a.jsonl", "b": "b.jsonl"}
    assert found["held_out"] == {"x": "x.jsonl", "y": "y.jsonl"}
    assert [(reward["spec"], reward["weight"]) for reward in found["rewards"]] == [("math", 1), ("my.py:short", 0.1)]
    assert found["queries"] == 4


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("dpo", TUNE[2:], "^--model is missing. Give --model, --data and --output, or --config"),
        ("reward", ["--held-out", "x"], "^--model and --data and --output is missing"),
        ("grpo", GRPO[:4], "^--reward and --output is missing. Give --model, --prompts, --reward and --output, or"),
        ("sft", ["--config", "c.py", *TUNE, "--held-out", "x"], "Leave out --model, --data, --output, --held-out, or"),
        (
            "grpo",
            ["--config", "c.py", "--held-out", "x", "--order", "s"],
            "Leave out --held-out, --order, or use --set",
        ),
        ("sft", ["--config", "c.py", "--lora"], "Leave out --lora, or use --set"),
    ],
)
def test_a_run_is_described_once_and_whole(
    method: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message):
        shown(method, arguments, capsys)
