"""Flores-101: translation, measured by chrF++ and BLEU over the corpus (Goyal et al. 2022, arXiv:2106.03193)."""

import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict

LANGUAGES = {
    "ara": "Arabic", "zho_simpl": "Chinese", "deu": "German", "fra": "French", "ind": "Indonesian", "ita": "Italian",
    "jpn": "Japanese", "kor": "Korean", "por": "Portuguese", "rus": "Russian", "spa": "Spanish", "tha": "Thai",
    "vie": "Vietnamese",
}  # fmt: skip
"""Codes of languages in Flores-101; each is translated from and to English."""

# How BLEU cuts languages that are written without spaces.
_TOKENS = {"zho_simpl": "zh", "jpn": "char", "tha": "char"}
_ASK = "Translate this {source} text into {target}. Write only the translation.\n\n{text}"


def chrf(pairs: Sequence[Sequence[str]]) -> float:
    """chrF++ of a corpus, from 0 to 100: characters up to 6, words up to 2.

    Args:
      pairs: translation and reference of each sentence.
    """
    score = sacrebleu().corpus_chrf([pair[0] for pair in pairs], [[pair[1] for pair in pairs]], word_order=2)
    return float(score.score)


def bleu(pairs: Sequence[Sequence[str]], tokens: str = "13a") -> float:
    """BLEU of a corpus, from 0 to 100.

    Args:
      pairs: translation and reference of each sentence.
      tokens: sacrebleu's name for how text is cut.
    """
    score = sacrebleu().corpus_bleu([pair[0] for pair in pairs], [[pair[1] for pair in pairs]], tokenize=tokens)
    return float(score.score)


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
    """

    citation = "arXiv:2106.03193"

    def __init__(self, source: str, target: str):
        self.name = f"flores_chat_{source}_{target}"
        self.tokens = _TOKENS.get(target, "13a")
        self.metrics = (
            Metric("chrf++", scale=1.0, aggregate=chrf, of_details=True),
            Metric("bleu", scale=1.0, aggregate=functools.partial(bleu, tokens=self.tokens), of_details=True),
        )
        self.names = {"source": _name(source), "target": _name(target)}
        self.files = tuple(
            DataFile(
                f"flores/{code}.devtest", source="https://github.com/facebookresearch/flores", licence="CC-BY-SA-4.0"
            )
            for code in (source, target)
        )

    def template(self) -> str:
        """See `Task.template`."""
        return (
            _ASK.format(**self.names, text="{text}")
            + "\n---\nthe whole answer, white space as single spaces; BLEU over "
            + self.tokens
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        sacrebleu()  # Found missing before the model is asked.
        paths = [files[file.path] for file in self.files]
        sources, targets = (path.read_text("utf-8").rstrip("\n").split("\n") for path in paths)
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
            pair = [" ".join(response.text.split()), item.fields["reference"]]
            library = sacrebleu()
            scores = {
                "chrf++": float(library.sentence_chrf(pair[0], [pair[1]], word_order=2).score),
                "bleu": float(library.sentence_bleu(pair[0], [pair[1]], tokenize=self.tokens).score),
            }
            verdicts.append(Verdict(scores, {"chrf++": pair, "bleu": pair, "cut": response.finish == "length"}))
        return verdicts


def _name(code: str) -> str:
    return "English" if code == "eng" else LANGUAGES[code]


TASKS = tuple(Flores(*pair) for code in LANGUAGES for pair in (("eng", code), (code, "eng")))
