"""Budgets that are tuned on a text keep the recall of every head, on the command line, too."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.attention.sparse import VerticalSlash
from qwen_jax.cli import main
from qwen_jax.config import Yarn
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine
from qwen_jax.inference.sparsity import Round, tune
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.forward import random_unstacked
from tests.helpers.hf import make_hf_checkpoint

CONFIG = dataclasses.replace(
    published("tiny"), vocab_size=96, num_layers=1, eos_token_ids=(), max_position_embeddings=512
)


@pytest.fixture
def engine() -> Engine:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    mesh = make_mesh({}, jax.devices()[:1])
    params = random_unstacked(CONFIG, mesh, np.random.default_rng(seed), 0.3)
    return Engine(CONFIG, params, mesh, dtype="float32", prefill_chunk=128)


def test_budgets_grow_until_every_head_has_its_recall(engine: Engine) -> None:
    """Recall does not fall from round to round, only heads below the threshold grow, and the last round holds it."""
    rounds: list[Round] = []
    tokens = np.random.default_rng(1).integers(0, 96, 400).tolist()
    few = ((4,) * CONFIG.num_heads,) * CONFIG.num_layers
    last = tune(
        engine, tokens, VerticalSlash(few, few), threshold=0.95, rounds=12, step=48,
        report=lambda number, result: rounds.append(result),
    )  # fmt: skip
    assert 1 < len(rounds) < 12
    assert rounds[0].recall_LH.min() < 0.95 <= last.recall_LH.min()
    for before, after in itertools.pairwise(rounds):
        grown = np.asarray(after.pattern.columns) > np.asarray(before.pattern.columns)
        np.testing.assert_array_equal(grown, before.recall_LH < 0.95)
        assert (after.recall_LH >= before.recall_LH - 1e-5).all()
        assert after.density >= before.density - 1e-6
    np.testing.assert_allclose(last.pattern.scores, last.recall_LH)
    with pytest.raises(InputError, match="threshold"):
        tune(engine, tokens, VerticalSlash(few, few), threshold=0.0)


def test_the_command_writes_a_file_that_generate_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON line a round; the file serves the same model and is refused for another; nothing is overwritten."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    make_hf_checkpoint(folder, num_hidden_layers=1, vocab_size=320, max_position_embeddings=512)
    train_bpe(["hello world, hello there"] * 4, 300).save(folder)
    text.write_text("hello there world " * 80)
    output = tmp_path / "budgets.json"
    options = ["--text", str(text), "--length", "200", "--prefill-chunk", "128", "--output", str(output)]
    tune_it = ["sparsity", "tune", str(folder), *options, "--rounds", "1", "--json"]
    assert main(tune_it) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[0])
    assert 0 < record["recall_min"] <= record["recall_mean"] <= 1
    assert main(tune_it) == 1
    assert "exists" in capsys.readouterr().err
    sparse = ["--attention", "vertical-slash", "--sparsity-file", str(output), "--sparse-from", "1"]
    ask = ["--prompt", "hello", "--max-new-tokens", "2", "--prefill-chunk", "128"]
    assert main(["generate", str(folder), *ask, *sparse]) == 0
    two = json.loads(output.read_text()) * 2
    output.write_text(json.dumps(two))
    assert main(["generate", str(folder), *ask, *sparse]) == 1
    assert "another model" in capsys.readouterr().err
    for wrong, words in (
        (["--sparsity-file", str(output)], "needs --attention vertical-slash"),
        (["--attention", "pooled", "--prefill-chunk", "100"], "multiple of 128"),
        (["--attention", "pooled", "--sparse-from", "-1"], "at least 0, got -1"),
        (["--sparse-from", "200"], "needs --attention vertical-slash or pooled"),
        (["--dual-chunk", "--rope-scaling", "yarn:2"], "together are not defined"),
        (["--trained-length", "64"], "needs --rope-scaling or --dual-chunk"),
    ):
        assert main(["generate", str(folder), "--prompt", "hello", *wrong]) == 1
        assert words in capsys.readouterr().err


def test_what_cannot_be_tuned_is_found_before_the_weights_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is missing would cost all rounds."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("convert.load", load)
    folder, text, empty = tmp_path / "model", tmp_path / "text.txt", tmp_path / "empty.txt"
    make_hf_checkpoint(folder, num_hidden_layers=1, vocab_size=320)
    train_bpe(["hello world, hello there"] * 4, 300).save(folder)
    text.write_text("hello there world " * 8)
    empty.touch()
    for options, words in (
        (["--output", str(tmp_path / "missing" / "budgets.json")], "does not exist. Make it first"),
        (["--text", str(tmp_path)], "is a folder"),
        (["--text", str(empty)], "is empty"),
        (["--attention", "pooled"], "Leave out --attention"),
        (["--sparse-from", "5"], "--sparse-from"),
        (["--threshold", "2"], "got 2.0"),
    ):
        given = ["--text", str(text), "--output", str(tmp_path / "budgets.json"), *options]
        assert main(["sparsity", "tune", str(folder), *given]) == 1
        assert words in capsys.readouterr().err


def test_budgets_reach_to_the_end_of_a_context_that_yarn_extends() -> None:
    """`max_position_embeddings` may be that before the extension."""
    trained = dataclasses.replace(CONFIG, yarn=Yarn(4.0, 512))
    assert trained.context_length == 2048
    pattern = VerticalSlash.default(trained)
    assert (pattern.columns[0][0], pattern.slashes[0][0]) == (1000, 2048)
    pattern.check(trained)
    with pytest.raises(InputError, match="expected 1 to 2048"):
        VerticalSlash(pattern.columns, ((2049,) * CONFIG.num_heads,)).check(trained)
    mesh = make_mesh({}, jax.devices()[:1])
    engine = Engine(
        trained,
        random_unstacked(trained, mesh, np.random.default_rng(0), 0.3),
        mesh,
        dtype="float32",
        prefill_chunk=128,
    )
    few = VerticalSlash(((4,) * CONFIG.num_heads,), ((4,) * CONFIG.num_heads,))
    tokens = np.random.default_rng(1).integers(0, 96, 400).tolist()
    last = tune(engine, tokens, few, threshold=1.0, rounds=2, step=600)
    assert max(max(last.pattern.slashes)) == 604
