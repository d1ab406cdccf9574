"""Answers are those of transformers on each document alone, whatever its company, the mesh and the rows."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

import convert
from qwen_jax.cli.formats import CheckpointFormats
from qwen_jax.errors import InputError
from qwen_jax.inference.scorer import Scorer
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import load_tokenizer
from tests.helpers.runs import print_seed
from tests.helpers.scoring import OPTIONS, RATINGS, TOPIC, documents, make_instruct, make_reward, options
from train.curate.scoring import model as scoring_model
from train.curate.scoring.model import DocumentReader, NotFiniteError, ScoringOptions
from train.curate.scoring.questions import QUESTIONS, Choice, Question, Rating, Reward, check_questions, questions_of
from train.curate.scoring.scorers import DECIMALS, ModelScorer, probabilities, table_of
from train.rewards.reward_model import conversation_ids

QUESTIONS_OF_ALL = (*RATINGS, TOPIC)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    seed = int(print_seed().integers(1 << 16))
    folder = tmp_path_factory.mktemp("instruct") / "model"
    return folder, make_instruct(folder, seed)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    make_reward(folder, int(print_seed().integers(1 << 16)))
    return folder


def reader(
    folder: Path,
    mesh: Mesh,
    questions: tuple[Question, ...] = QUESTIONS_OF_ALL,
    given: ScoringOptions = OPTIONS,
) -> DocumentReader:
    config, params = convert.load(folder, mesh, "float32")
    return DocumentReader(config, params, mesh, load_tokenizer(folder), questions, given)


def test_ratings_and_classes_are_those_of_transformers(instruct: tuple[Path, Any], mesh: Mesh) -> None:
    """Within 1e-4 of the conversation with one question, computed alone; several questions share a document here."""
    folder, theirs = instruct
    ours, texts = reader(folder, mesh), documents(print_seed(), 6)
    # One document is cut for sure, and one is not.
    texts[:2] = [" ".join(texts * 20), texts[1][:5]]
    answers = ours.read(texts)
    cut = ours.prompt.documents(texts)
    assert answers.cut.any()
    assert not answers.cut.all()
    assert answers.tokens.tolist() == [len(document.ids) for document in cut]
    assert max(answers.tokens) <= OPTIONS.max_tokens
    for q, question in enumerate(QUESTIONS_OF_ALL):
        ids = [load_tokenizer(folder).encode(text)[0] for text in question.answers]
        for i, document in enumerate(cut):
            whole = torch.as_tensor(ours.prompt.whole(document.ids, q), dtype=torch.long)[None]
            with torch.no_grad():
                expected = theirs(whole).logits[0, -1].double().log_softmax(0)[ids].numpy()
            np.testing.assert_allclose(answers.values[q][i], expected, atol=1e-4)
            if isinstance(question, Rating):
                p = np.exp(expected) / np.exp(expected).sum()
                rating = (p * np.arange(question.lowest, question.highest + 1)).sum()
                found = table_of(QUESTIONS_OF_ALL, answers)[question.name][i].as_py()
                assert abs(found - rating) < 1e-4 + 0.5 * 10**-DECIMALS
    assert 0 < answers.work.mass / len(texts) < 1


def test_scores_do_not_depend_on_company_order_or_rows(instruct: tuple[Path, Any], mesh: Mesh) -> None:
    """Within 1e-5: one document or many, in any order, in other rows, one question or several; no text, no score."""
    folder, _ = instruct
    rng = print_seed()
    texts: list[str | None] = [*documents(rng, 25), None, "", " \n"]
    first = reader(folder, mesh)
    all_at_once = first.read(texts)
    order = rng.permutation(len(texts))
    shuffled = first.read([texts[i] for i in order])
    other_rows = reader(folder, mesh, given=options(row_tokens=320, batch_tokens=320)).read(texts)
    one_question = reader(folder, mesh, QUESTIONS_OF_ALL[:1]).read(texts).values[0]
    np.testing.assert_allclose(one_question, all_at_once.values[0], atol=1e-5)
    for q in range(3):
        values = all_at_once.values[q]
        assert np.isnan(values[25:]).all()
        alone = np.concatenate([first.read(texts[i : i + 1]).values[q] for i in range(2)])
        np.testing.assert_allclose(alone, values[:2], atol=1e-5)
        np.testing.assert_allclose(other_rows.values[q], values, atol=1e-5)
        np.testing.assert_allclose(shuffled.values[q], values[order], atol=1e-5)
    # Rounded, nearly all of them are the same bytes.
    a, b = (table_of(QUESTIONS_OF_ALL, x)["good"].to_numpy() for x in (all_at_once, other_rows))
    assert np.nanmax(np.abs(a - b)) <= 10**-DECIMALS * 1.01
    assert (a[:25] == b[:25]).mean() > 0.9


def test_other_documents_are_not_seen(instruct: tuple[Path, Any], mesh: Mesh) -> None:
    """Bit for bit: changing one document of a row, without its length, changes no other one."""
    ours, texts = reader(instruct[0], mesh), documents(print_seed(), 6, longest=20)
    before = ours.read(texts)
    words = texts[2].split()
    changed = ours.read([*texts[:2], " ".join("river" if word == "stone" else "stone" for word in words), *texts[3:]])
    for a, b in zip(before.values, changed.values, strict=True):
        others = [0, 1, 3, 4, 5]
        if (before.tokens == changed.tokens).all():
            np.testing.assert_array_equal(a[others], b[others])
        else:
            np.testing.assert_allclose(a[others], b[others], atol=1e-5)
        assert np.abs(a[2] - b[2]).max() > 1e-4


def test_every_mesh_gives_the_same_and_bfloat16_nearly(instruct: tuple[Path, Any], mesh: Mesh) -> None:
    folder, _ = instruct
    texts = documents(print_seed(), 20)
    expected = reader(folder, mesh).read(texts)
    sharded = reader(folder, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})).read(texts)
    rounded = reader(folder, mesh, given=options(dtype="bfloat16")).read(texts)
    for a, b, c in zip(expected.values, sharded.values, rounded.values, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)
        # Logits of this model have a deviation of about 1; bfloat16 has 8 bits.
        np.testing.assert_allclose(c, a, atol=0.25)


def test_nothing_is_compiled_after_warming_up(instruct: tuple[Path, Any], mesh: Mesh) -> None:
    """Few shapes for all lengths and numbers of documents."""
    ours, rng = reader(instruct[0], mesh, given=options(batch_tokens=512)), print_seed()
    programs = ours.warm_up()
    assert programs == 2  # Batches of one row and of two.
    before = scoring_model._answer._cache_size()  # type: ignore[attr-defined]
    for count in (1, 3, 40):
        ours.read(documents(rng, count, longest=int(rng.integers(2, 200))))
    assert scoring_model._answer._cache_size() == before  # type: ignore[attr-defined]


def test_rewards_are_those_of_qwen_jax_score(reward: Path, mesh: Mesh) -> None:
    """The document is the answer of a conversation, scored at its end."""
    texts = documents(print_seed(), 8, longest=40)
    question = Reward()
    found = reader(reward, mesh, (question,)).read(texts).values[0][:, 0]
    config, params = convert.load(reward, mesh, "float32")
    user = [{"role": "user", "content": question.request}]
    ids = [conversation_ids(load_tokenizer(reward), user, text) for text in texts]
    np.testing.assert_allclose(found, Scorer(config, params, mesh, dtype="float32").score(ids), atol=1e-5)


def test_models_that_cannot_answer_are_refused(
    instruct: tuple[Path, Any], reward: Path, mesh: Mesh, tmp_path: Path
) -> None:
    formats = CheckpointFormats()
    for folder, questions, message in (
        (reward, RATINGS, "This is a reward model"),
        (instruct[0], (Reward(),), "language model, which has no score head"),
        (instruct[0], (), "Expected questions with different names, got none"),
        (instruct[0], (RATINGS[0], RATINGS[0]), "different names, got good, good"),
    ):
        with pytest.raises(InputError, match=message):
            ModelScorer(str(folder), questions, formats, mesh, OPTIONS)
    with pytest.raises(InputError, match="answers one question"):
        check_questions((*RATINGS, Reward()))
    with pytest.raises(InputError, match=r"no question 'taste'\. Expected some of education"):
        questions_of(["taste"])
    # An embedding model has no output head.
    embedding = tmp_path / "embedding"
    shutil.copytree(instruct[0], embedding)
    settings = json.loads((embedding / "config.json").read_text())
    (embedding / "config.json").write_text(json.dumps({**settings, "architectures": ["Qwen2Model"]}))
    with pytest.raises(InputError, match="Qwen2Model"):
        ModelScorer(str(embedding), RATINGS, formats, mesh, OPTIONS)
    # An answer of two tokens.
    config, params = convert.load(instruct[0], mesh, "float32")
    with pytest.raises(InputError, match=r"The answer .* to odd is \d+ tokens of this tokenizer, expected one"):
        DocumentReader(config, params, mesh, load_tokenizer(instruct[0]), (_Odd("odd", "x"),), OPTIONS)
    for changes, message in (
        ({"row_tokens": 64}, "Rows of 64 tokens do not hold a document"),
        ({"max_tokens": 1024}, "the context of the model is 1024"),
        ({"max_tokens": 3}, "max_tokens must be at least"),
    ):
        with pytest.raises(InputError, match=message):
            reader(instruct[0], mesh, given=options(**changes))


class _Odd(Rating):
    answers = ("no digit", "1")  # type: ignore[assignment]


def test_scores_that_are_not_finite_name_their_document(tmp_path: Path, mesh: Mesh) -> None:
    """Also in a row with others, to which NaN spreads: the embedding of one word is broken."""
    make_instruct(tmp_path, tie=False)
    config, params = convert.load(tmp_path, mesh, "float32")
    tokenizer, weight = load_tokenizer(tmp_path), params["embed"]["weight"]
    (word,) = tokenizer.encode(" quiet")
    broken = np.where(np.arange(weight.shape[0])[:, None] == word, np.nan, np.asarray(weight))
    params["embed"]["weight"] = jax.device_put(broken, weight.sharding)
    ours = DocumentReader(config, params, mesh, tokenizer, QUESTIONS_OF_ALL, OPTIONS)
    assert np.isfinite(ours.read(["stone", "river"]).values[0]).all()
    with pytest.raises(NotFiniteError, match="The scores of document 2 are not finite") as caught:
        ours.read(["stone", "river", "a quiet walk", "green", "light"])
    assert caught.value.document == 2


def test_probabilities_and_built_in_questions() -> None:
    values = np.log(np.array([[0.1, 0.3], [0.2, 0.2]]))
    np.testing.assert_allclose(probabilities(values), [[0.25, 0.75], [0.5, 0.5]])
    assert np.isnan(probabilities(np.full((1, 2), np.nan))).all()
    assert all(len(question.answers) <= 26 for question in QUESTIONS.values())
    for wrong in (lambda: Rating("Name", "x"), lambda: Rating("x", "x", 5, 5), lambda: Rating("x", "x", 1, 10)):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="Expected 2 to 26 different classes of x, got a"):
        Choice("x", "x", (("a", "a"),))
