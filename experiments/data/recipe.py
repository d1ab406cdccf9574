"""How a raw corpus of web pages, documentation and code is curated: what `experiments.data.end_to_end` measures.

    qwen-jax data curate --config experiments/data/recipe.py --corpus corpus --output run

`raw` extracts text and does nothing else.
"""

from pathlib import Path

from train.curate.curation import Curation, Input, Map, Select
from train.curate.deduplicate_stage import Deduplicate
from train.curate.operators.decontaminate import Decontaminate
from train.curate.operators.fingerprint import Fingerprint
from train.curate.operators.heuristics import FineWeb, GopherQuality, GopherRepetition, Statistics
from train.curate.operators.html import ExtractText
from train.curate.operators.language import Language
from train.curate.operators.unicode import RepairUnicode


def inputs(corpus: str) -> tuple[Input, ...]:
    """The three domains of `experiments.data.corpus`."""
    folder = Path(corpus)
    return (
        Input("web", str(folder / "web.warc.gz")),
        Input("docs", str(folder / "docs.jsonl.gz"), id="id"),
        Input("code", str(folder / "code.parquet"), id="id"),
    )


def raw(corpus: str) -> Curation:
    """The text as it is.

    Args:
      corpus: folder of `experiments.data.corpus`.
    """
    return Curation(inputs(corpus), [Map("extract", [ExtractText()])], name="raw")


def curation(corpus: str) -> Curation:
    """Filters, then leaks, then duplicates.

    Args:
      corpus: folder of `experiments.data.corpus`.
    """
    # Technical documentation has more marks, longer words and more lists than the web pages of the papers.
    quality = GopherQuality(min_words=30, max_mean_word_length=12, min_alphabetic_words=0.2, max_symbol_ratio=0.3)
    repetition = GopherRepetition(
        duplicate_5_grams=0.5,
        duplicate_6_grams=0.5,
        duplicate_7_grams=0.5,
        duplicate_8_grams=0.5,
        duplicate_9_grams=0.5,
        duplicate_10_grams=0.5,
    )
    lines = FineWeb(
        min_punctuated_lines=0.005, max_short_lines=None, max_newline_ratio=None, max_duplicate_characters=0.3
    )
    stages = [
        Map("text", [ExtractText(), RepairUnicode()]),
        Map("features", [Language(), Statistics(), quality, repetition, lines]),
        # Source code is judged by its parser, not by rules for prose.
        Select("domain == 'code' or gopher_quality is None", "quality"),
        Select("domain == 'code' or gopher_repetition is None", "repetition"),
        Select("domain == 'code' or fineweb is None", "lines"),
        # Before duplicates: else the one that is kept of a group may be the one with the leak.
        Map("decontaminate", [Decontaminate((f"items={Path(corpus) / 'tests.jsonl'}",))]),
        Map("fingerprints", [Fingerprint()]),
        Deduplicate(),
    ]
    return Curation(inputs(corpus), stages, name="curated")
