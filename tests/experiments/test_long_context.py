"""The whole path of `train_and_extend` at toy size: training, readings, resume, table."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.long_context import train_and_extend as experiment
from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed

TOY = experiment.Setup(
    length=64,
    layers=1,
    hidden=64,
    steps=3,
    batch=8,
    megabytes=1.0,
    ratios=(1, 2),
    samples=1,
    depths=(0, 100),
    windows=2,
)


@pytest.fixture
def texts(tmp_path):
    """A folder with a few documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Document {i} says that {i} is a number. " * 20)
    return [str(folder)]


@pytest.mark.slow
def test_the_whole_path(tmp_path, texts, capsys):
    folder = tmp_path / "run"
    experiment.run(TOY, [0], ["rope", "yarn"], "dense", folder, texts)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(r["scheme"], r["length"]) for r in records] == [("rope", 64), ("rope", 128), ("yarn", 64), ("yarn", 128)]
    for record in records:
        assert 0 <= record["passkey"] <= 1
        assert sum(bucket["tokens"] for bucket in record["buckets"]) == 2 * (record["length"] - 1)
    # At the trained length YaRN is nothing else; beyond it, it is.
    same = [{k: v for k, v in r.items() if k != "scheme"} for r in records]
    assert same[0] == same[2]
    assert same[1]["loss"] != same[3]["loss"]
    # The same command has nothing to do.
    before = (folder / "results.jsonl").read_bytes()
    experiment.run(TOY, [0], ["rope", "yarn"], "dense", folder, texts)
    assert (folder / "results.jsonl").read_bytes() == before
    assert "| rope, dense | " in capsys.readouterr().out
    with pytest.raises(InputError, match="steps was 3, is 4"):
        experiment.run(dataclasses.replace(TOY, steps=4), [0], ["rope"], "dense", folder, texts)


def test_a_batch_is_a_function_of_seed_and_step():
    """Half text; copies and needles weigh half as much a row."""
    rng = print_seed()
    text = rng.integers(0, 256, 5000).astype(np.uint8)
    seed = int(rng.integers(2**31))
    a, b = (experiment.Mixture(TOY, text, seed)[5] for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert not np.array_equal(a.tokens, experiment.Mixture(TOY, text, seed)[6].tokens)
    assert a.tokens.shape == (8, 64)
    np.testing.assert_allclose(a.loss_weights.sum(axis=1), [32] * 4 + [64] * 4, rtol=1e-6)
    assert (a.tokens[4:] < 256).all()


@pytest.mark.parametrize("length", [1024, 8192])
def test_schemes(length):
    setup = experiment.Setup()
    model = setup.model()
    assert 10e6 < model.num_params()["total"] < 60e6
    rope, yarn, dca, scaled = (experiment.extended(model, name, 1024, length) for name in experiment.SCHEMES)
    assert rope.context_length == yarn.context_length == length
    assert (yarn.yarn is None) == (length == 1024)
    assert dca.dual_chunk.chunk_size == scaled.dual_chunk.chunk_size == 1024
    assert dca.dual_chunk.local_size == 32
    assert dca.dual_chunk.original_max_position_embeddings > 2**20
    assert scaled.dual_chunk.original_max_position_embeddings == 1024


def test_the_table_has_means_over_seeds():
    base = {"scheme": "dca", "attention": "dense", "ratio": 4}
    records = [
        {**base, "seed": s, "passkey": p, "needle": 1.0, "loss": 2.0, "last_loss": 1.5} for s, p in ((0, 0.5), (1, 1))
    ]
    refused = {**base, "seed": 0, "scheme": "rope", "refused": "too long"}
    shown = experiment.table([*records, refused]).splitlines()
    assert shown[2].startswith("| dca, dense | 0.75 ± 0.35 | 1.00 ± 0.00 | 2.000 ± 0.000 |")
    assert shown[3].startswith("| rope, dense | refused |")
