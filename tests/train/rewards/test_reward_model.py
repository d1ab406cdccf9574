"""The reward of a reward model is the score that `qwen-jax score` prints; one of another tokenizer is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from qwen_jax.cli import main
from qwen_jax.cli.train import _Formats
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.reward import make_reward_checkpoint
from tests.helpers.runs import print_seed
from train.rewards import load_reward, score


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    make_reward_checkpoint(folder, "linear", vocab_size=320, eos_token_id=256, max_position_embeddings=2048)
    train_bpe(["abc"], 278).save(folder)
    return folder


def made(folder: Path, mesh: Mesh, tokenizer: Tokenizer | None = None, **settings: Any) -> Any:
    policy = tokenizer or load_tokenizer(folder)
    return load_reward(
        "reward_model", model=str(folder), formats=_Formats(), mesh=mesh, policy_tokenizer=policy, **settings
    )


def test_scores_are_those_of_the_command(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    """Messages, also with tools, and plain texts; not those that were cut, nor those beyond the context."""
    rng = print_seed()
    schema = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    prompts: list[Any] = [[{"role": "user", "content": "abc" * int(n)}] for n in rng.integers(1, 9, 3)]
    prompts += ["plain " * int(n) for n in rng.integers(1, 9, 2)]
    completions = ["ok", "", "no no", "a b c", "d <|im_end|> e"]
    file, scores = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tools = [None, [schema], None, None, None]
    records = [
        {"prompt": p, "completion": c if isinstance(p, str) else [{"role": "assistant", "content": c}], "tools": t}
        for p, c, t in zip(prompts, completions, tools, strict=True)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["score", str(folder), "--input", str(file), "--output", str(scores)]) == 0
    expected = [json.loads(line)["score"] for line in scores.read_text().splitlines()]

    reward = made(folder, mesh)
    found = score({"rm": reward}, prompts, completions, [True] * 5, {"tools": tools})
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    without = score({"rm": reward}, prompts, completions, [True] * 5, {})
    np.testing.assert_array_equal(abs(without - found)[:, 0] > 1e-5, [False, True, False, False, False])
    # One that was cut, and one that is too long, get no signal and change no other.
    found = score({"rm": reward}, [*prompts, "x"], [*completions, "y" * 3000], [True, False, *[True] * 4], {})
    assert np.isnan(found[[1, 5], 0]).all()
    np.testing.assert_allclose(found[[0, 2, 3, 4], 0], np.delete(expected, 1), atol=1e-5)
    # A policy may write a call that it does not close.
    found = score({"rm": reward}, prompts[:2], ["<tool_call>{", "a</tool_call>"], [True] * 2, {})
    assert np.isfinite(found).all()
    assert made(folder, mesh, unfinished=-2.0)(prompts[:1], ["a"], [False]) == [-2.0]


def test_other_models_are_refused_before_their_weights_are_read(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another tokenizer"):
        made(folder, mesh, train_bpe(["xyz xyz"], 280))
    make_hf_checkpoint(tmp_path / "lm", vocab_size=320)
    train_bpe(["abc"], 278).save(tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="language model"):
        made(tmp_path / "lm", mesh)
