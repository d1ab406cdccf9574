"""Flores: the corpus numbers are sacrebleu's, and files that do not fit are named."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, verdicts_of
from tests.helpers.evaluated import MadeModel
from tests.helpers.runs import print_seed
from train.evaluate import run as benchmarks
from train.evaluate.benchmarks.flores import PIECES, TASKS, CorpusMetric, Flores
from train.evaluate.run import values_of
from train.evaluate.task import Response


def test_the_numbers_are_those_of_sacrebleu(tmp_path: Path) -> None:
    library = pytest.importorskip("sacrebleu")
    task = next(one for one in TASKS if one.name == "flores_chat_deu_eng")
    source, target = tmp_path / "deu", tmp_path / "eng"
    references = ["The old river runs through a green valley.", "Two {stones} lie on the quiet road today."]
    source.write_text("Ein alter Fluss.\nZwei {Steine}.\n")
    target.write_text("\n".join(references) + "\n")
    items = items_of(task, source, target)
    (request,) = task.requests(items[1], ())
    message: Any = request.prompt[0]
    assert message["content"].startswith("Translate this German text into English.")
    assert message["content"].endswith("\n\nZwei {Steine}.")
    answers = ["The old river runs\nthrough a valley.", references[1]]
    verdicts = verdicts_of(task, items, lambda item, number, request: answers[int(item.id)])
    clean = [" ".join(text.split()) for text in answers]
    chrf, bleu = (metric.aggregate(values_of(metric, list(verdicts.values()))) for metric in task.metrics)
    assert chrf == pytest.approx(library.CHRF(word_order=2).corpus_score(clean, [references]).score)
    assert bleu == pytest.approx(library.BLEU().corpus_score(clean, [references]).score)
    assert verdicts["1"].scores["chrf++"] == pytest.approx(100)
    assert 0 < chrf < 100
    target.write_text(references[0])
    with pytest.raises(InputError, match="found 2 and 1"):
        items_of(task, source, target)


WORDS = "the old river runs through a green valley and two stones lie on quiet road today".split()


def drawn(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Some translations and their references; one translation is empty."""
    references = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) + "." for _ in range(8)]
    texts = [" ".join(w if rng.random() < 0.7 else str(rng.choice(WORDS)) for w in one.split()) for one in references]
    texts[int(rng.integers(8))] = ""
    return texts, references


@pytest.mark.parametrize("kind", ["chrf++", "bleu"])
def test_statistics_of_sentences_give_the_corpus_score_of_any_resample(kind: Any) -> None:
    """The statistics add up: of sentences drawn with replacement, as in a bootstrap, the score is sacrebleu's."""
    library = pytest.importorskip("sacrebleu")
    rng = print_seed()
    texts, references = drawn(rng)
    metric = CorpusMetric(kind)
    reference = library.CHRF(word_order=2) if kind == "chrf++" else library.BLEU()
    statistics = [metric.statistics(*pair) for pair in zip(texts, references, strict=True)]
    assert json.loads(json.dumps(statistics)) == statistics
    for _ in range(5):
        rows = rng.integers(0, 8, 8).tolist()
        want = reference.corpus_score([texts[i] for i in rows], [[references[i] for i in rows]]).score
        assert metric([statistics[i] for i in rows]) == pytest.approx(want, abs=1e-9)
    assert metric.signature() == str(reference.get_signature())
    assert f"version:{library.__version__}" in metric.signature()


def test_spbleu_is_bleu_over_the_pieces_of_a_given_model(tmp_path: Path) -> None:
    """The model is a file of the task; its sha256 is in the signature that the summary has, and decides the score."""
    library = pytest.importorskip("sacrebleu")
    rng = print_seed()
    texts, references = drawn(rng)
    task = Flores("deu", "eng", pieces=True)
    assert task.name in {one.name for one in TASKS}
    root = tmp_path / "flores"
    root.mkdir()
    (root / "deu.devtest").write_text("\n".join(["Ein Satz."] * 8) + "\n")
    (root / "eng.devtest").write_text("\n".join(references) + "\n")
    (root / "corpus.txt").write_text("\n".join(" ".join(rng.permutation(WORDS)) + "." for _ in range(60)))
    for size in (30, 45):
        prefix = tmp_path / f"model-{size}"
        sentencepiece.SentencePieceTrainer.train(
            input=str(root / "corpus.txt"), model_prefix=str(prefix), vocab_size=size, model_type="bpe", minloglevel=2
        )
        shutil.copy(f"{prefix}.model", tmp_path / PIECES.path)
        model = MadeModel(lambda request: Response("unused"))
        items = items_of(task, *(tmp_path / file.path for file in task.files))
        verdicts = verdicts_of(task, items, lambda item, *_: texts[int(item.id)])
        pieces = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
        cut = [[" ".join(pieces.encode(text, out_type=str)) for text in side] for side in (texts, references)]
        found = task.measures["spbleu"](values_of(task.metrics[1], list(verdicts.values())))
        want = library.BLEU(tokenize="none").corpus_score(cut[0], [cut[1]]).score
        assert found == pytest.approx(want, abs=1e-9)
        # The summary of a run.
        summary = benchmarks.run(model, [task], tmp_path / f"results-{size}", benchmarks.RunOptions(tmp_path))
        of_task = summary["tasks"][task.name]
        digest = hashlib.sha256((tmp_path / PIECES.path).read_bytes()).hexdigest()
        assert of_task["metrics"]["spbleu"]["signature"].endswith(f"|spm:{digest}")
        assert {"path": PIECES.path, "sha256": digest}.items() <= next(
            file for file in of_task["files"] if file["path"] == PIECES.path
        ).items()
    (tmp_path / PIECES.path).write_bytes(b"no model")
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        items_of(task, *(tmp_path / file.path for file in task.files))


def test_languages_without_spaces_have_their_own_tokens() -> None:
    """A translation that differs in one character of a long sentence is not worth nothing."""
    pytest.importorskip("sacrebleu")
    pair = "河流穿过绿色的山谷", "河流穿过红色的山谷"
    measures = {one.name: one.measures["bleu"] for one in TASKS if not one.pieces}
    values = {name: measure([measure.statistics(*pair)]) for name, measure in measures.items()}
    assert values["flores_chat_eng_zho_simpl"] > 30
    assert values["flores_chat_eng_jpn"] == values["flores_chat_eng_tha"] > 30
    assert values["flores_chat_zho_simpl_eng"] < 1
