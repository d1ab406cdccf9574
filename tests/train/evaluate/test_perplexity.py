"""Loss by position: equal to float64, independent of chunks and batches, and comparable between lengths."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

import convert
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed
from train.evaluate import perplexity

VOCAB = 160


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_hf_checkpoint(folder, tie=False, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def engine(checkpoint: tuple[Path, Any]) -> Engine:
    return make_engine(checkpoint[0], make_mesh({}, jax.devices()[:1]))


def make_engine(folder: Path, mesh: Mesh) -> Engine:
    config, params = convert.load(folder, mesh, "float32")
    return Engine(config, params, mesh, dtype="float32")


def exact(model: Any, rows: np.ndarray) -> np.ndarray:
    """Losses [rows, length - 1] of transformers' model in float64."""
    with torch.no_grad():
        logits = model.double()(torch.as_tensor(rows, dtype=torch.long)).logits
    log_p = torch.log_softmax(logits[:, :-1], -1).numpy()
    return -np.take_along_axis(log_p, rows[:, 1:, None].astype(np.int64), -1)[..., 0]


def test_losses_are_those_of_float64_whatever_the_chunks_and_batches(
    checkpoint: tuple[Path, Any], engine: Engine
) -> None:
    """Tolerance: float32 rounding of logits of size 10, through two layers."""
    rows = print_seed().integers(0, VOCAB, (5, 67)).astype(np.int32)
    expected = exact(checkpoint[1], rows)
    for batch, chunk in ((1, 2048), (2, 7), (5, 64), (9, 1)):
        measured = perplexity.position_losses(engine, rows, batch, chunk)
        np.testing.assert_allclose(measured.losses_WT, expected, atol=2e-4, rtol=2e-5)
    np.testing.assert_allclose(measured.mean(), expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(measured.last(10), expected[:, -10:].mean(), rtol=1e-5)
    np.testing.assert_allclose(measured.last(10**6), expected.mean(), rtol=1e-5)


def test_losses_on_a_mesh_are_those_of_one_device(checkpoint: tuple[Path, Any], engine: Engine) -> None:
    """Rows and vocabulary are split over devices; the number of rows is no multiple of the shards."""
    rows = print_seed().integers(0, VOCAB, (3, 32)).astype(np.int32)
    split = make_engine(checkpoint[0], make_mesh({"data": 2, "tensor": 2}))
    expected = perplexity.position_losses(engine, rows).losses_WT
    np.testing.assert_allclose(perplexity.position_losses(split, rows).losses_WT, expected, atol=1e-4)


def test_windows_of_all_lengths_end_at_the_same_places() -> None:
    tokens = print_seed().integers(0, 1000, 530)
    made = perplexity.windows(tokens, [100, 10], 99)
    assert {n: rows.shape for n, rows in made.items()} == {100: (5, 100), 10: (5, 10)}
    assert np.array_equal(made[100][:, -10:], made[10])
    assert np.array_equal(made[100].ravel(), tokens[:500])
    assert len(perplexity.windows(tokens, [100], 2)[100]) == 2
    with pytest.raises(InputError, match="The text has 530 tokens, and a window 600"):
        perplexity.windows(tokens, [600], 1)
    with pytest.raises(InputError, match="at least 2"):
        perplexity.windows(tokens, [1], 1)


@pytest.mark.parametrize("width", [None, 1, 5, 1000])
def test_buckets_hold_every_token_once(width: int | None) -> None:
    rng = print_seed()
    losses = perplexity.PositionLosses(38, rng.random((4, 37)).astype(np.float32))
    (summary,) = perplexity.summarise([losses], 8, width)
    buckets = summary["buckets"]
    assert [b["from"] for b in buckets] == [1, *(b["to"] + 1 for b in buckets[:-1])]
    assert buckets[-1]["to"] == 37
    assert sum(b["tokens"] for b in buckets) == 4 * 37
    mean = sum(b["tokens"] * b["loss"] for b in buckets) / (4 * 37)
    np.testing.assert_allclose([mean, summary["loss"]], losses.losses_WT.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(summary["last"]["loss"], losses.losses_WT[:, -8:].mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(summary["perplexity"], np.exp(summary["loss"]))


def test_a_window_beyond_the_context_is_an_error(engine: Engine) -> None:
    with pytest.raises(InputError, match="exceeds the model's context of 512"):
        perplexity.position_losses(engine, np.zeros((1, 513), np.int32))
