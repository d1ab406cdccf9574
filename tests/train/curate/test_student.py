"""A student keeps the order of its teacher's scores on new documents, and is stored without pickles."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.curate.operator import Operator
from train.curate.scoring.operators import StudentScores
from train.curate.scoring.ranks import spearman
from train.curate.scoring.student import DESCRIPTION, WEIGHTS, StudentConfig, features, load_student, train_student

SMALL = StudentConfig(buckets=1 << 12, width=16, hidden=16, words=64, epochs=10)
GOOD = "theorem proof because therefore define measure example result explain cause".split()
BAD = "click buy login cookie subscribe banner share popup deal cheap".split()
OTHER = [f"word{i}" for i in range(200)]


def planted(rng: np.random.Generator, count: int) -> tuple[list[str], np.ndarray]:
    """Documents and their levels, from 0 to 1: the share of good words among good and bad ones."""
    levels = rng.random(count)
    texts = []
    for level in levels:
        n = int(rng.integers(20, 60))
        kinds = rng.random((n, 2))
        lists = [OTHER if a < 0.5 else GOOD if b < level else BAD for a, b in kinds]
        texts.append(
            " ".join(words[i % len(words)] for words, i in zip(lists, rng.integers(1000, size=n), strict=True))
        )
    return texts, levels


def test_a_student_keeps_the_order_of_new_documents(tmp_path: Path) -> None:
    """Rank correlation of at least 0.8 with planted levels, which a document of forty words shows with noise."""
    rng = print_seed()
    texts, levels = planted(rng, 500)
    scores = {"quality": 1 + 4 * levels.astype(np.float32), "noise": -(levels.astype(np.float32) ** 3)}
    scores["quality"][:3] = np.nan
    student = train_student([*texts[:-1], None], scores, SMALL, {"model": "x"})
    new, expected = planted(rng, 200)
    found = student.score([*new, "", None])
    assert spearman(found[:200, 0], expected) > 0.8
    assert spearman(found[:200, 1], expected) < -0.8
    assert np.isnan(found[200:]).all()
    assert student.validation["trained"] + student.validation["held_out"] == 496
    assert student.validation["spearman"]["quality"] > 0.7
    # Company and order do not matter.
    np.testing.assert_allclose(student.score(new[::-1])[::-1], found[:200], atol=1e-5)
    # On the disk.
    student.save(tmp_path / "s")
    assert set(load_file(tmp_path / "s" / WEIGHTS)) >= {"embedding", "hidden", "output"}
    back = load_student(tmp_path / "s")
    np.testing.assert_array_equal(back.score(new), found[:200])
    assert (back.columns, back.validation, back.teacher) == (student.columns, student.validation, student.teacher)
    # As an operator.
    operator: Operator = StudentScores(str(tmp_path / "s"))
    import pyarrow as pa

    table = operator.start()(pa.table({"text": pa.array([*new, " "], pa.large_string())}))
    assert table.schema == operator.makes
    assert table["quality"].null_count == 1
    np.testing.assert_allclose(table["quality"].to_numpy()[:200], found[:200, 0], atol=6e-4)
    settings = operator.settings()
    # Damaged students.
    described = json.loads((tmp_path / "s" / DESCRIPTION).read_text())
    for change, message in (
        ({"format": 2}, "has the format 2, expected 1"),
        ({"columns": ["a"]}, "holds the arrays"),
        ({"config": {"depth": 1}}, "damaged student"),
    ):
        (tmp_path / "s" / DESCRIPTION).write_text(json.dumps({**described, **change}))
        with pytest.raises(InputError, match=message):
            load_student(tmp_path / "s")
    assert operator.settings() != settings
    (tmp_path / "s" / DESCRIPTION).write_text(json.dumps(described))
    (tmp_path / "s" / WEIGHTS).write_bytes((tmp_path / "s" / WEIGHTS).read_bytes()[:100])
    with pytest.raises(InputError, match="damaged student"):
        load_student(tmp_path / "s")


def test_what_cannot_be_learned_is_refused() -> None:
    texts = [f"a {i}" for i in range(30)]
    for scores, message in (
        ({}, "Expected a score of each of the 30 documents, got none"),
        ({"x": np.zeros(29)}, r"got \{'x': \(29,\)\}"),
        ({"x": np.zeros(30)}, "All scores of x are equal"),
        ({"x": np.full(30, np.nan)}, "0 documents have text and all scores, expected at least 20"),
    ):
        with pytest.raises(InputError, match=message):
            train_student(texts, scores, SMALL)
    with pytest.raises(InputError, match="held_out must be from 0"):
        StudentConfig(held_out=1.0)


def test_features_are_words_pairs_and_length() -> None:
    """Neighbours' order counts; of long documents the middle is left out, and 100 MB take no longer."""
    a, b, c = features(["stone river", "river stone", "Stone  RIVER"], SMALL)
    assert set(a) != set(b)
    assert len(set(a[:3]) & set(b[:3])) == 3
    np.testing.assert_array_equal(a[1:], c[1:])
    assert (a > 0).sum() == 4
    (huge,) = features(["stone " * 10_000_000], SMALL)
    assert (huge > 0).all()


def test_spearman_is_that_of_ranks() -> None:
    """Equal values share the mean of their ranks; pairs with NaN are left out."""
    rng = print_seed()
    a, b = rng.normal(size=(2, 50))
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    # Ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4.
    assert spearman(np.array([7, 7, 8, 9]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert np.isnan(spearman(np.ones(5), b[:5]))
    assert spearman(np.array([1, np.nan, 2, 3]), np.array([1, 9, 2, 3])) == pytest.approx(1)
