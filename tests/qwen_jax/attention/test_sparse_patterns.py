"""Sparsity files are read and written as published, and a file that does not fit a model is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.attention.sparse_patterns import PooledBlocks, VerticalSlash, refine
from qwen_jax.errors import InputError
from qwen_jax.published import published

CONFIG = dataclasses.replace(published("tiny"), num_layers=2, max_position_embeddings=32768)
L, H = CONFIG.num_layers, CONFIG.num_heads


def layers() -> list[dict[str, list[Any]]]:
    """The content of a file with random budgets."""
    rng = np.random.default_rng()
    return [
        {
            str(h): ["vertical_and_slash", int(rng.integers(1, 9999)), int(rng.integers(1, 9999)), float(rng.random())]
            for h in range(H)
        }
        for _ in range(L)
    ]


def test_round_trip(tmp_path: Path) -> None:
    """A published file is read into budgets, and written again byte for byte."""
    content = layers()
    text = json.dumps(content)
    (tmp_path / "in.json").write_text(text)
    pattern = VerticalSlash.from_file(tmp_path / "in.json", CONFIG)
    for i in range(L):
        assert pattern.budgets(i).tolist() == [content[i][str(h)][1:3] for h in range(H)]
    pattern.to_file(tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == text
    assert VerticalSlash.from_file(tmp_path / "out.json", CONFIG) == pattern


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(), f"another model: it has {L - 1} layers, this model has {L}"),
        (lambda x: x[1].pop(str(H - 1)), f"another model: layer 1 has {H - 1} query heads, this model has {H}"),
        (lambda x: x[0].pop("0"), "expected the names 0 to"),
        (lambda x: x[0]["1"].__setitem__(0, "stream_llm"), "layer 0, head 1 has the pattern 'stream_llm'"),
        (lambda x: x[0]["0"].__setitem__(1, 0), "0 columns"),
        (lambda x: x[1]["0"].__setitem__(2, 32769), "expected 1 to 32768 of each"),
        (lambda x: x[1]["0"].__setitem__(2, 1.5), "whole numbers"),
        (lambda x: x[1]["0"].pop(), "expected .pattern, columns, slashes, score."),
        (lambda x: x.__setitem__(0, 3), "a JSON list with an object for each layer"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    """The error says where the file is wrong and what was expected."""
    content = layers()
    change(content)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        VerticalSlash.from_file(tmp_path / "x.json", CONFIG)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A missing file and one that is no JSON."""
    with pytest.raises(InputError, match="does not exist"):
        VerticalSlash.from_file(tmp_path / "none.json", CONFIG)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        VerticalSlash.from_file(tmp_path / "x.json", CONFIG)


def test_default_and_settings() -> None:
    """The default has MInference's budgets for every head and fits its model; wrong settings are refused."""
    pattern = VerticalSlash.default(CONFIG)
    pattern.check(CONFIG)
    assert (pattern.budgets(0) == np.array([1000, 6096])).all()
    assert pattern.most_columns == 1000
    assert VerticalSlash(((30, 7),), ((1, 1),)).most_columns == 130
    VerticalSlash.default(dataclasses.replace(CONFIG, max_position_embeddings=512)).check(
        dataclasses.replace(CONFIG, max_position_embeddings=512)
    )
    with pytest.raises(InputError, match="threshold"):
        PooledBlocks(threshold=1.5)
    with pytest.raises(InputError, match="window"):
        PooledBlocks(window=0)
    with pytest.raises(InputError, match="stride"):
        PooledBlocks(stride=3)
    with pytest.raises(InputError, match="slashes"):
        VerticalSlash(((1, 2),), ((1,),))


def test_refine_raises_where_recall_is_low() -> None:
    """Both budgets of heads below the threshold grow by a step, up to the longest; others stay. Budgets never fall."""
    pattern = VerticalSlash(((100, 30),), ((200, 9000),))
    new = refine(np.array([[0.5, 0.95]]), pattern, 0.9, step=64)
    assert (new.columns, new.slashes, new.scores) == (((164, 30),), ((264, 9000),), ((0.5, 0.95),))
    bounded = refine(np.array([[0.5, 0.5]]), pattern, 0.9, step=64, longest=210)
    assert (bounded.columns, bounded.slashes) == (((164, 94),), ((210, 9000),))
    with pytest.raises(InputError, match="recall for 1 layers of 2 heads"):
        refine(np.array([[0.5]]), pattern, 0.9)
