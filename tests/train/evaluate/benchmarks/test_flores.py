"""Flores: the corpus numbers are sacrebleu's, and files that do not fit are named."""

from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, verdicts_of
from train.evaluate.benchmarks.flores import TASKS
from train.evaluate.run import values_of


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


def test_languages_without_spaces_have_their_own_tokens() -> None:
    """A translation that differs in one character of a long sentence is not worth nothing."""
    pytest.importorskip("sacrebleu")
    pair = [["河流穿过绿色的山谷", "河流穿过红色的山谷"]]
    values = {one.name: one.metrics[1].aggregate(pair) for one in TASKS}
    assert values["flores_chat_eng_zho_simpl"] > 30
    assert values["flores_chat_eng_jpn"] == values["flores_chat_eng_tha"] > 30
    assert values["flores_chat_zho_simpl_eng"] < 1
