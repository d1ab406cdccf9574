"""LV-Eval: the published metric in two stages, and its file form."""

import json
import sys
import types
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from train.evaluate.benchmarks import lv_eval
from train.evaluate.task import Response, Tools


def task(name: str) -> lv_eval.LVEval:
    return next(one for one in lv_eval.TASKS if one.name == name)


def test_there_is_a_task_for_each_data_set_and_length() -> None:
    assert len(lv_eval.TASKS) == len({one.name for one in lv_eval.TASKS}) == 55
    assert task("lv_eval_loogle_CR_mixup_128k").files[0].path.endswith("loogle_CR_mixup_128k.jsonl")


@pytest.mark.parametrize(
    ("prediction", "answer", "keywords", "score", "recall"),
    [
        # Articles and punctuation do not count; precision 2/3, recall 1.
        ("The red fox, runs.", "red fox", "fox", 0.8, 1.0),
        # One of ten keywords is below 0.2: nothing counts. One of five is not.
        ("red", "red fox", "red b c d e f g h i j", 0.0, 0.1),
        ("red", "red fox", "red b c d e", 2 / 3, 0.2),
        # A common word among the keywords is never found.
        ("of mice", "of mice", "of mice", 1.0, 0.5),
        # Without keywords: F1 alone.
        ("red", "red fox x y z v w q r s", None, 2 * 0.1 / 1.1, 0.1),
        ("", "red", "red", 0.0, 0.0),
    ],
)
def test_english_scores(prediction: str, answer: str, keywords: str | None, score: float, recall: float) -> None:
    found = lv_eval.scores("hotpotwikiqa_mixup", prediction, answer, keywords)
    assert found == pytest.approx({"score": score, "keyword_recall": recall})


def test_fact_recall_has_one_stage() -> None:
    found = lv_eval.scores("factrecall_en", "red", "red fox", "a b c d e f g h i red")
    assert found["score"] == pytest.approx(2 / 3)


def test_chinese_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are those of jieba; here each character is one. Keywords that are missing are the answer."""
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(cut=list))
    found = lv_eval.scores("cmrc_mixup", "红狐。", "红狐跑", None)
    assert found == pytest.approx({"score": 0.8, "keyword_recall": 2 / 3})
    assert lv_eval.scores("cmrc_mixup", "红", "红狐跑", None)["score"] == 0.0
    # ROUGE-L of the longest common subsequence, in order.
    assert lv_eval.scores("dureader_mixup", "狐红跑", "红狐跑", None)["score"] == pytest.approx(2 / 3)
    monkeypatch.setitem(sys.modules, "jieba", None)
    # Before the model is asked, too.
    task = next(task for task in lv_eval.TASKS if task.dataset == "cmrc_mixup")
    with pytest.raises(InputError, match="pip install jieba"):
        task.items({})
    with pytest.raises(InputError, match="pip install jieba"):
        lv_eval.scores("lic_mixup", "红", "红", None)


def test_a_file_becomes_requests_and_verdicts(tmp_path: Path) -> None:
    one = task("lv_eval_multifieldqa_en_mixup_16k")
    row = {"input": "Who {context}?", "context": "A {input} long text.", "answers": ["red fox"], "answer_keywords": ""}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "answer_keywords": "fox"}) + "\n")
    items = one.items({one.files[0].path: path})
    (request,) = one.requests(items[0], ())
    assert request.max_tokens == 64
    prompt = request.prompt[0]["content"]
    assert prompt.count("Article: A {input} long text.\n\n") == 1
    assert prompt.endswith("\n\nQuestion: Who {context}?\nAnswer:")
    assert one.requests(items[0], [[Response("x")]]) == ()
    answers = [[[Response("red fox")]], [[Response(error="a prompt that is too long")]]]
    right, failed = one.score(items, answers, Tools())
    assert right.scores == {"score": 1.0, "keyword_recall": 1.0}
    assert failed.scores == {"score": None, "keyword_recall": None}
    assert failed.problem == "a prompt that is too long"
    # A model that reads the end of a prompt alone has not read what is asked about.
    (cut,) = one.score(items[:1], [[[Response("red fox", prompt_cut=True)]]], Tools())
    assert cut.scores == {"score": None, "keyword_recall": None}
    assert "longer than the model's context" in str(cut.problem)
    path.write_text(json.dumps({"input": "a", "answers": ["b"]}))
    with pytest.raises(InputError, match=r"data\.jsonl, line 1: expected the texts input and context"):
        one.items({one.files[0].path: path})
