# Chinese punctuation is meant.
# ruff: noqa: RUF001
"""LV-Eval: questions on long documents with confusing facts, at five lengths up to 256 thousand words.

Each data set and length is a task of its own, such as `lv_eval_loogle_SD_mixup_16k`. It has two numbers: `score`, the
published metric in two stages, and `keyword_recall`, its first stage alone, which the Qwen2.5 report gives
(arXiv:2412.15115, section 5.2.4). Prompts, lengths of answers, lists of words and thresholds are those of the
repository infinigence/LVEval (Yuan et al. 2024, arXiv:2402.05136). Prompts are not truncated: one that is longer than
the model's context has no score.
"""

import collections
import importlib
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.tables import read_rows
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict

LENGTHS = ("16k", "32k", "64k", "128k", "256k")

_ONLY = "Only give me the answer and do not output any other explanation and evidence."


def _english(where: str) -> str:
    one = f"Questions and answers are only relevant to {where}. {_ONLY}"
    start = "Answer the question" if where == "some passages" else "Please answer the following question"
    return (
        f"{start} based on the given passages. {one}\n\nArticle: {{context}}\n\n"
        f"Please answer the following question based on the above passages. {one}\n\nQuestion: {{input}}\nAnswer:"
    )


def _chinese(now: str) -> str:
    return (
        "请根据下面给定的文章回答问题，问题和答案只与其中一篇文章有关。\n\n文章：{context}\n\n"
        f"{now}基于上述文章回答下面的问题，问题和答案只与其中一篇文章有关。\n\n问题：{{input}}\n回答："
    )


_FIELD_ZH = "问题和答案只与其中一篇文章有关。只需要直接给出问题的答案，不要输出其他任何解释和证据。"
PROMPTS: Mapping[str, str] = {
    "hotpotwikiqa_mixup": _english("some passages"),
    "loogle_SD_mixup": _english("one passage"),
    "loogle_CR_mixup": _english("one passage"),
    "loogle_MIR_mixup": _english("one passage"),
    "multifieldqa_en_mixup": _english("one passage"),
    "multifieldqa_zh_mixup": (
        f"请阅读以下文章并用中文回答问题，{_FIELD_ZH}\n\n文章：{{context}}\n\n"
        f"请基于上面的文章回答下面的问题，{_FIELD_ZH}\n\n问题：{{input}}\n回答："
    ),
    "factrecall_en": (
        "Please answer the following questions based on the given article.\n\nArticle: {context}\n\n"
        "Please answer the following questions based on the above article.\n\nQuestion: {input}\nAnswer:"
    ),
    "factrecall_zh": (
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n现在请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："
    ),
    "cmrc_mixup": _chinese("现在请"),
    "lic_mixup": _chinese("请现在"),
    "dureader_mixup": _chinese("现在请"),
}
"""The data sets and their prompts."""

_CHINESE = ("multifieldqa_zh_mixup", "factrecall_zh", "cmrc_mixup", "lic_mixup", "dureader_mixup")
# Words that count neither as keywords that were found, nor, for dureader, at all.
_WORDS_EN = frozenset(
    """and to of in her was with for it from is that his he by she they or at because be on are their what as had were
    about being this who but have has when which does""".split()
)
_WORDS_ZH = frozenset(
    """的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指 法 会 元 主要 以及
    通过 首先 对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 用于 但 使用 让 具有 并 亿元 万元
    上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 带 度""".split()
)
_MARKS_ZH = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    + "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
# The least recall of keywords that lets an answer count.
_LEAST_EN, _LEAST_ZH = 0.2, 0.4


def english_tokens(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def chinese_tokens(text: str) -> list[str]:
    """Words as jieba cuts them, in lower case, without punctuation and white space.

    Raises:
      InputError: jieba is not installed.
    """
    try:
        jieba = importlib.import_module("jieba")
    except ImportError:
        raise InputError(
            "LV-Eval cuts Chinese into words by jieba, which is not installed: pip install jieba. Or leave out "
            f"{', '.join(_CHINESE)}."
        ) from None
    cut = ("".join(c for c in "".join(word.lower().split()) if c not in _MARKS_ZH) for word in jieba.cut(text))
    return [word for word in cut if word]


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, which count as often as they occur."""
    same = sum((collections.Counter(prediction) & collections.Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def keyword_recall(prediction: Sequence[str], keywords: Sequence[str], common: frozenset[str]) -> float:
    """The share of the keywords that the prediction has. Common words among them are never found, as published."""
    found = collections.Counter(prediction) & collections.Counter(keywords)
    return sum(count for word, count in found.items() if word not in common) / len(keywords) if keywords else 0.0


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for one in first:
        before = 0
        for i, other in enumerate(second, 1):
            before, row[i] = row[i], before + 1 if one == other else max(row[i], row[i - 1])
    return row[-1]


def scores(dataset: str, prediction: str, answer: str, keywords: str | None) -> dict[str, float]:
    """The numbers of an answer, from 0 to 1.

    Args:
      dataset: its name.
      prediction: the model's answer.
      answer: the expected one, the first of the item.
      keywords: of the answer; None if the item has none.

    Returns:
      `score`: F1 over words, but 0 where the recall of keywords is below 0.2 (English) or 0.4 (Chinese, where the
      answer stands in for missing keywords); F1 alone for `factrecall_*`; ROUGE-L as balanced F1 of the longest common
      subsequence, without common words, for `dureader_mixup`. `keyword_recall`: of the keywords, or of the answer.
    """
    chinese = dataset in _CHINESE
    tokens, common, least = (
        (chinese_tokens, _WORDS_ZH, _LEAST_ZH) if chinese else (english_tokens, _WORDS_EN, _LEAST_EN)
    )
    predicted, expected = tokens(prediction), tokens(answer)
    recall = keyword_recall(predicted, tokens(keywords) if keywords else expected, common)
    if dataset == "dureader_mixup":
        first, second = ([word for word in of if word not in common] for of in (predicted, expected))
        same = longest_common(first, second)
        score = 2 * same / (len(first) + len(second)) if same else 0.0
    else:
        staged = not dataset.startswith("factrecall") and bool(keywords or chinese)
        score = 0.0 if staged and recall < least else f1(predicted, expected)
    return {"score": score, "keyword_recall": recall}


class LVEval(Task):
    """A data set of LV-Eval at one length.

    Args:
      dataset: of `PROMPTS`.
      length: of `LENGTHS`.
    """

    citation = "Yuan et al. 2024, arXiv:2402.05136; github.com/infinigence/LVEval"
    metrics = (Metric("score"), Metric("keyword_recall"))

    def __init__(self, dataset: str, length: str):
        self.dataset, self.length = dataset, length
        self.name = f"lv_eval_{dataset}_{length}"
        source = "huggingface.co/datasets/Infinigence/LVEval"
        self.files = (DataFile(f"lv_eval/{dataset}/{dataset}_{length}.jsonl", source=source, licence="MIT"),)

    def template(self) -> str:
        """See `Task.template`."""
        return f"{PROMPTS[self.dataset]}\n---\nthe whole answer counts; the first of the expected answers"

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        if self.dataset in _CHINESE:
            chinese_tokens("")  # Found missing before the model is asked.
        found = []
        for row in read_rows(files[self.files[0].path]):
            fields: dict[str, Any] = {name: row.values.get(name) for name in ("input", "context", "answers")}
            answers = fields["answers"]
            good = isinstance(answers, list) and answers and isinstance(answers[0], str)
            if not good or not all(isinstance(fields[name], str) for name in ("input", "context")):
                raise InputError(
                    f"{row.where}: expected the texts input and context, and a list of texts answers; found "
                    f"{', '.join(map(str, row.values))}."
                )
            fields["answer_keywords"] = row.values.get("answer_keywords")
            groups = {"dataset": self.dataset, "length": self.length}
            found.append(Item(f"{row.number}", fields, groups))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Generate]:
        """See `Task.requests`."""
        if rounds:
            return ()
        # The documents may have braces.
        prompt = PROMPTS[self.dataset].replace("{input}", item.fields["input"], 1)
        prompt = prompt.replace("{context}", item.fields["context"], 1)
        return [Generate(({"role": "user", "content": prompt},), 16 if "factrecall" in self.dataset else 64)]

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        found = []
        for item, ((response,),) in zip(items, responses, strict=True):
            problem = "the prompt is longer than the model's context" if response.prompt_cut else response.error
            if problem is not None:
                found.append(Verdict({"score": None, "keyword_recall": None}, problem=problem))
                continue
            fields = item.fields
            found.append(
                Verdict(scores(self.dataset, response.text, fields["answers"][0], fields["answer_keywords"] or None))
            )
        return found


TASKS = tuple(LVEval(dataset, length) for dataset in PROMPTS for length in LENGTHS)
