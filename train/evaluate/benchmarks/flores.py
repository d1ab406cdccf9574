"""Flores-101: translation, measured by chrF++ and BLEU over the corpus (Goyal et al. 2022, arXiv:2106.03193)."""

import functools
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_jax.errors import InputError
from train.evaluate.benchmarks.lines import read_text
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict

LANGUAGES = {
    "ara": "Arabic", "zho_simpl": "Chinese", "deu": "German", "fra": "French", "ind": "Indonesian", "ita": "Italian",
    "jpn": "Japanese", "kor": "Korean", "por": "Portuguese", "rus": "Russian", "spa": "Spanish", "tha": "Thai",
    "vie": "Vietnamese",
}  # fmt: skip
"""Codes of languages in Flores-101; each is translated from and to English."""

# How BLEU cuts languages that are written without spaces.
_TOKENS = {"zho_simpl": "zh", "jpn": "char", "tha": "char"}
PIECES = DataFile(
    "flores/sentencepiece.model",
    source="the SentencePiece model of spBLEU: that of sacrebleu's tokenizer flores101, flores200 or spm",
)
"""The model that spBLEU cuts texts by. Which one it is decides the score: its sha256 is in the signature."""

_ASK = "Translate this {source} text into {target}. Write only the translation.\n\n{text}"


class CorpusMetric:
    """A metric of sacrebleu that is computed from statistics of sentences, which add up over a corpus.

    So the bootstrap resamples sentences without cutting their texts again.

    Attributes:
      kind: "chrf++" (characters up to 6, words up to 2) or "bleu".
      tokens: how BLEU cuts texts, by sacrebleu's name.
    """

    def __init__(self, kind: Literal["chrf++", "bleu"], tokens: str = "13a"):
        self.kind, self.tokens = kind, tokens

    def statistics(self, text: str, reference: str) -> list[int]:
        """The statistics of a sentence: lengths and matches of n-grams."""
        (found,) = self._metric()._extract_corpus_statistics([text], [[reference]])
        return [int(number) for number in found]

    def __call__(self, sentences: Sequence[Sequence[int]]) -> float:
        """The score of a corpus, from 0 to 100, from the statistics of its sentences."""
        total = np.asarray(sentences, np.int64).sum(axis=0)
        return float(self._metric()._compute_score_from_stats(total.tolist()).score)

    def of_sentence(self, text: str, reference: str) -> float:
        """The score of a sentence alone; of BLEU by the orders that it has."""
        return float(self._metric(alone=True).sentence_score(text, [reference]).score)

    def signature(self) -> str:
        """Sacrebleu's, with its version."""
        metric = self._metric()
        metric.corpus_score(["a"], [["a"]])  # The signature says how many references there were.
        return str(metric.get_signature())

    def _metric(self, alone: bool = False) -> Any:
        return _metric(self.kind, self.tokens, alone)


@functools.cache
def _metric(kind: str, tokens: str, alone: bool) -> Any:
    metrics = sacrebleu().metrics
    if kind == "chrf++":
        return metrics.CHRF(word_order=2)
    return metrics.BLEU(tokenize=tokens, effective_order=alone)


def sacrebleu() -> Any:
    """The library.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module("sacrebleu")
    except ImportError:
        raise InputError("Flores needs sacrebleu, which is not installed: pip install 'qwen-jax[eval]'.") from None


class Flores(Task):
    """Sentences of one language, translated into another.

    Args:
      source, target: codes of the languages.
      pieces: whether BLEU is spBLEU: over the pieces of the SentencePiece model `PIECES`, which must lie there.
    """

    version = 2
    citation = "arXiv:2106.03193"

    def __init__(self, source: str, target: str, pieces: bool = False):
        self.name = f"flores{'_spbleu' * pieces}_chat_{source}_{target}"
        self.pieces = pieces
        bleu = CorpusMetric("bleu", "none" if pieces else _TOKENS.get(target, "13a"))
        self.measures = {"chrf++": CorpusMetric("chrf++"), "spbleu" if pieces else "bleu": bleu}
        self.metrics = tuple(
            Metric(name, scale=1.0, aggregate=measure, of_details=True) for name, measure in self.measures.items()
        )
        self.names = {"source": _name(source), "target": _name(target)}
        licence, where = "CC-BY-SA-4.0", "https://github.com/facebookresearch/flores"
        self.texts = tuple(
            DataFile(f"flores/{code}.devtest", source=where, licence=licence) for code in (source, target)
        )
        self.files = (*self.texts, PIECES) if pieces else self.texts
        # The model of pieces with its hash, once `items` has read it.
        self._model: tuple[Any, str] | None = None

    def signatures(self) -> Mapping[str, str]:
        """See `Task.signatures`."""
        found = {name: measure.signature() for name, measure in self.measures.items()}
        if self._model is not None:
            found["spbleu"] += f"|spm:{self._model[1]}"
        return found

    def template(self) -> str:
        """See `Task.template`."""
        return (
            _ASK.format(**self.names, text="{text}")
            + "\n---\nthe whole answer, white space as single spaces; BLEU over "
            + ("pieces of SentencePiece" if self.pieces else self.measures["bleu"].tokens)
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        sacrebleu()  # Found missing before the model is asked.
        paths = [files[file.path] for file in self.texts]
        if self.pieces:
            self._model = _pieces_of(files[PIECES.path])
        sources, targets = (read_text(path).rstrip("\n").split("\n") for path in paths)
        if len(sources) != len(targets):
            raise InputError(
                f"Expected as many lines in {paths[0]} as in {paths[1]}; found {len(sources)} and {len(targets)}."
            )
        found = []
        for i, (text, reference) in enumerate(zip(sources, targets, strict=True)):
            if not text.strip() or not reference.strip():
                raise InputError(f"{paths[bool(text.strip())]}, line {i + 1}: expected a sentence, found none.")
            found.append(Item(str(i), {"text": text.strip(), "reference": reference.strip()}))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Generate]:
        """See `Task.requests`."""
        if rounds:
            return ()
        prompt = _ASK.format(**self.names, text=item.fields["text"])
        return (Generate(({"role": "user", "content": prompt},), 512),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        verdicts = []
        for item, ((response,),) in zip(items, responses, strict=True):
            text, reference = " ".join(response.text.split()), item.fields["reference"]
            details: dict[str, Any] = {"translation": text, "cut": response.finish == "length"}
            scores = {}
            for name, measure in self.measures.items():
                pair = (self._cut(text), self._cut(reference)) if name == "spbleu" else (text, reference)
                scores[name], details[name] = measure.of_sentence(*pair), measure.statistics(*pair)
            verdicts.append(Verdict(scores, details))
        return verdicts

    def _cut(self, text: str) -> str:
        """The pieces of a text, with spaces between them."""
        if self._model is None:
            raise InputError(f"{self.name}: the model of pieces has not been read. Call `items` first.")
        return " ".join(self._model[0].encode(text, out_type=str))


def _pieces_of(path: Path) -> tuple[Any, str]:
    """A SentencePiece model and the sha256 of its file."""
    import sentencepiece

    content = path.read_bytes()
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise InputError(f"{path} is not a SentencePiece model: {error}. Give the model of spBLEU.") from None
    return model, hashlib.sha256(content).hexdigest()


def _name(code: str) -> str:
    return "English" if code == "eng" else LANGUAGES[code]


TASKS = tuple(
    Flores(*pair, pieces=pieces)
    for pieces in (False, True)
    for code in LANGUAGES
    for pair in (("eng", code), (code, "eng"))
)
