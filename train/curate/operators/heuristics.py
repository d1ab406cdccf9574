"""Filters for web text by counting: Gopher's quality and repetition rules, C4's and FineWeb's.

`Statistics` computes what all of them look at, in one pass over words that are split once. `GopherQuality`,
`GopherRepetition`, `C4` and `FineWeb` compare its columns with thresholds; each makes one column that names the first
rule that a document breaks, or is null. Other thresholds need no second look at the text.

The rules are those of the papers in the form that datatrove 0.10 gives them, with its order and its limits:
Rae et al. 2021, "Scaling language models: methods, analysis & insights from training Gopher", table A1; Raffel et al.
2020, "Exploring the limits of transfer learning with a unified text-to-text transformer", section 2.2; Penedo et al.
2024, "The FineWeb datasets", section 3.6.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwen_jax.errors import InputError
from train.curate.operator import Compute, Operator
from train.curate.operators.heuristics_grams import DUPLICATE, TOP, count_grams
from train.curate.operators.heuristics_lines import FORBIDDEN, LineCounts, c4_lines, count_lines
from train.curate.operators.heuristics_table import WordTable, count_sentences, sums

STATISTICS = pa.schema(
    [
        *(pa.field(name, pa.int64()) for name in ("characters", "words", "words_and_marks", "stop_words")),
        *(
            pa.field(name, pa.float64())
            for name in (
                "mean_word_length",
                "hash_ratio",
                "ellipsis_ratio",
                "bullet_lines",
                "ellipsis_lines",
                "alphabetic_words",
                "duplicate_lines",
                "duplicate_line_characters",
                "duplicate_paragraphs",
                "duplicate_paragraph_characters",
                *(f"top_{n}_gram" for n in TOP),
                *(f"duplicate_{n}_grams" for n in DUPLICATE),
            )
        ),
        *(pa.field(name, pa.int64()) for name in ("c4_lines", "c4_sentences")),
        pa.field("c4_forbidden", pa.string()),
        pa.field("filled_lines", pa.int64()),
        *(
            pa.field(name, pa.float64())
            for name in ("punctuated_lines", "short_lines", "duplicate_characters", "newline_ratio")
        ),
    ]
)
"""Columns of `Statistics`.

Numbers: characters of the text; words with a character that is neither a punctuation mark nor a control character;
words_and_marks, all of them; stop_words, how many different ones occur; c4_lines and c4_sentences, kept by C4's rules
for lines; c4_forbidden, what the first line has that C4 forbids, "lorem ipsum" or "curly bracket", or null;
filled_lines, with a character that is not white space.

Fractions, 0 where there is nothing to divide by: mean_word_length, characters of words; hash_ratio and ellipsis_ratio,
"#" and "..." or "…" for each word or mark; bullet_lines and ellipsis_lines, of the lines that begin with a bullet point
and end with an ellipsis; alphabetic_words, of words and marks that have a letter; duplicate lines and paragraphs that
equal an earlier one, of their number and of the characters of the text; top_n_gram, characters of the text in the most
frequent n-gram; duplicate_n_grams, in n-grams that repeat an earlier one; punctuated_lines and short_lines, of filled
ones; duplicate_characters, of those but line feeds, in filled lines that equal an earlier one; newline_ratio, line
feeds for each word or mark.
"""

# Characters that are looked at together: enough to pay for arrays, few enough to keep them small.
_BATCH = 1 << 20
# Characters of different runs after which a table is begun anew; it takes some 15 bytes for each.
_TABLE = 1 << 24


@dataclasses.dataclass(frozen=True)
class Statistics(Operator):
    """Counts what the filters of this module look at; makes the columns `STATISTICS`.

    Attributes:
      stop_words: at most 64, as they are written.
      short_line: most characters of a short line.
      c4_min_words: fewest words, split at white space, of a line that C4 keeps.
      c4_max_word_length: most characters of these.
    """

    makes = STATISTICS

    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    short_line: int = 30
    c4_min_words: int = 3
    c4_max_word_length: int = 1000

    def __post_init__(self) -> None:
        if len(self.stop_words) > 64:
            raise InputError(f"Expected at most 64 stop words, got {len(self.stop_words)}. Leave some out.")

    def start(self) -> Compute:
        """See `Operator.start`."""
        table = WordTable(self.stop_words)

        def compute(batch: pa.Table) -> pa.Table:
            nonlocal table
            parts = []
            for texts in _parts(batch["text"]):
                if table.characters > _TABLE:
                    table = WordTable(self.stop_words)
                parts.append(self._count(texts, table))
            return pa.Table.from_batches(parts, STATISTICS)

        return compute

    def _count(self, texts: Sequence[str], table: WordTable) -> pa.RecordBatch:
        """Counts some documents."""
        rows: list[LineCounts] = []
        runs: list[str] = []
        kept: list[str] = []
        forbidden = []
        # Where each document begins in `runs`, each line in `kept`, and each document among these lines.
        run_bounds, line_bounds, document_lines = [0], [0], [0]
        for text in texts:
            rows.append(count_lines(text, self.short_line))
            runs += text.split()
            run_bounds.append(len(runs))
            _, lines, found = c4_lines(text, self.c4_min_words, self.c4_max_word_length)
            for line in lines:
                kept += line
                line_bounds.append(len(kept))
            document_lines.append(len(line_bounds) - 1)
            forbidden.append(FORBIDDEN[found])
        fields = LineCounts._fields
        count = dict(zip(fields, np.array(rows, np.int64).reshape(-1, len(fields)).T, strict=True))

        # Words. Numbers of new words need their facts, so that the kept lines are looked up first.
        numbers, kept_numbers = table.numbers(runs), table.numbers(kept)
        words, bounds = table.words(numbers, np.array(run_bounds))
        kept_words, kept_bounds = table.words(kept_numbers, np.array(line_bounds))
        facts = table.facts()
        lengths, proper = facts.length[words], facts.proper[words]
        words_and_marks, number = np.diff(bounds), sums(proper, bounds)
        sentences = count_sentences(facts.kind[kept_words], kept_bounds)
        grams = count_grams(words, bounds, lengths)
        columns = {
            "characters": count["characters"],
            "words": number,
            "words_and_marks": words_and_marks,
            "stop_words": _different(facts.stop[words], bounds),
            "mean_word_length": _ratio(sums(lengths * proper, bounds), number),
            "hash_ratio": _ratio(count["hashes"], words_and_marks),
            "ellipsis_ratio": _ratio(count["ellipses"], words_and_marks),
            "bullet_lines": _ratio(count["bullet_lines"], count["all_lines"]),
            "ellipsis_lines": _ratio(count["ellipsis_lines"], count["all_lines"]),
            "alphabetic_words": _ratio(sums(facts.alphabetic[words], bounds), words_and_marks),
            "duplicate_lines": _ratio(count["duplicate_lines"], count["lines"]),
            "duplicate_line_characters": _ratio(count["duplicate_line_characters"], count["characters"]),
            "duplicate_paragraphs": _ratio(count["duplicate_paragraphs"], count["paragraphs"]),
            "duplicate_paragraph_characters": _ratio(count["duplicate_paragraph_characters"], count["characters"]),
            **{f"top_{n}_gram": _ratio(grams.top[n], count["characters"]) for n in TOP},
            **{f"duplicate_{n}_grams": _ratio(grams.duplicate[n], count["characters"]) for n in DUPLICATE},
            "c4_lines": np.diff(document_lines),
            "c4_sentences": sums(sentences, np.array(document_lines)),
            "c4_forbidden": forbidden,
            "filled_lines": count["filled_lines"],
            "punctuated_lines": _ratio(count["punctuated_lines"], count["filled_lines"]),
            "short_lines": _ratio(count["short_lines"], count["filled_lines"]),
            "duplicate_characters": _ratio(
                count["duplicate_filled_characters"], count["characters"] - count["newlines"]
            ),
            "newline_ratio": _ratio(count["newlines"], words_and_marks),
        }
        return pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in STATISTICS], schema=STATISTICS)


@dataclasses.dataclass(frozen=True)
class C4Lines(Operator):
    """Keeps the lines of a text that C4 keeps, without citations; makes "text".

    It changes the text, so that it comes after the operators that decide about the whole document.

    Attributes:
      min_words: fewest words, split at white space, of a line.
      max_word_length: most characters of these.
    """

    makes = pa.schema([pa.field("text", pa.large_string())])

    min_words: int = 3
    max_word_length: int = 1000

    def start(self) -> Compute:
        """See `Operator.start`."""

        def compute(batch: pa.Table) -> pa.Table:
            texts = (text.as_py() for text in batch["text"])
            kept = ["\n".join(c4_lines(text, self.min_words, self.max_word_length)[0]).strip() for text in texts]
            return pa.table([pa.array(kept, pa.large_string())], schema=self.makes)

        return compute


class Rule(NamedTuple):
    """A document breaks it if a column is below ("<") or above (">") a threshold, or equal to it ("=").

    Attributes:
      name: for reports.
      column: of `STATISTICS`.
      sign: how the column is compared.
      threshold: name of the filter's field, or for "=" the value.
    """

    name: str
    column: str
    sign: str
    threshold: str


_COMPARE = {"<": pc.less, ">": pc.greater, "=": pc.equal}


class Filter(Operator):
    """Compares columns of `Statistics` with its fields; makes a column with the name of the first rule that is broken.

    A rule is left out if its field is None.

    Attributes:
      rules: in their order.
    """

    rules: ClassVar[tuple[Rule, ...]]

    def start(self) -> Compute:
        """See `Operator.start`."""
        rules = [rule for rule in self.rules if rule.sign == "=" or getattr(self, rule.threshold) is not None]

        def compute(batch: pa.Table) -> pa.Table:
            broken = []
            for rule in rules:
                threshold = rule.threshold if rule.sign == "=" else getattr(self, rule.threshold)
                broken.append(pc.fill_null(_COMPARE[rule.sign](batch[rule.column], threshold), False))
            if not broken:
                return pa.table([pa.nulls(batch.num_rows, pa.string())], schema=self.makes)
            cases = pc.case_when(pc.make_struct(*broken), *(pa.scalar(rule.name) for rule in rules))
            return pa.table([cases], schema=self.makes)

        return compute


def _columns(rules: Iterable[Rule]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.column for rule in rules))


def _decision(name: str) -> pa.Schema:
    return pa.schema([pa.field(name, pa.string())])


@dataclasses.dataclass(frozen=True)
class GopherQuality(Filter):
    """Gopher's quality rules; makes "gopher_quality".

    Attributes:
      min_words: fewest words.
      max_words: most words.
      min_mean_word_length: in characters.
      max_mean_word_length: in characters.
      max_symbol_ratio: most "#", and most ellipses, for each word.
      max_bullet_lines: of all lines.
      max_ellipsis_lines: of all lines.
      min_alphabetic_words: of all words.
      min_stop_words: different ones that must occur.
    """

    makes = _decision("gopher_quality")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("too few words", "words", "<", "min_words"),
        Rule("too many words", "words", ">", "max_words"),
        Rule("short words", "mean_word_length", "<", "min_mean_word_length"),
        Rule("long words", "mean_word_length", ">", "max_mean_word_length"),
        Rule("hashes", "hash_ratio", ">", "max_symbol_ratio"),
        Rule("ellipses", "ellipsis_ratio", ">", "max_symbol_ratio"),
        Rule("bullet points", "bullet_lines", ">", "max_bullet_lines"),
        Rule("lines that end in ellipses", "ellipsis_lines", ">", "max_ellipsis_lines"),
        Rule("few alphabetic words", "alphabetic_words", "<", "min_alphabetic_words"),
        Rule("few stop words", "stop_words", "<", "min_stop_words"),
    )
    reads: ClassVar[tuple[str, ...]] = _columns(rules)

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_symbol_ratio: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2


@dataclasses.dataclass(frozen=True)
class GopherRepetition(Filter):
    """Gopher's repetition rules; makes "gopher_repetition".

    Its fields are the largest allowed values of the columns of the same names.
    """

    makes = _decision("gopher_repetition")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("no text", "characters", "<", "min_characters"),
        *(
            Rule(name.replace("_", " "), name, ">", name)
            for name in (
                "duplicate_paragraphs",
                "duplicate_paragraph_characters",
                "duplicate_lines",
                "duplicate_line_characters",
                *(f"top_{n}_gram" for n in TOP),
                *(f"duplicate_{n}_grams" for n in DUPLICATE),
            )
        ),
    )
    reads: ClassVar[tuple[str, ...]] = _columns(rules)

    min_characters: int | None = 1
    duplicate_paragraphs: float | None = 0.30
    duplicate_paragraph_characters: float | None = 0.20
    duplicate_lines: float | None = 0.30
    duplicate_line_characters: float | None = 0.20
    top_2_gram: float | None = 0.20
    top_3_gram: float | None = 0.18
    top_4_gram: float | None = 0.16
    duplicate_5_grams: float | None = 0.15
    duplicate_6_grams: float | None = 0.14
    duplicate_7_grams: float | None = 0.13
    duplicate_8_grams: float | None = 0.12
    duplicate_9_grams: float | None = 0.11
    duplicate_10_grams: float | None = 0.10


@dataclasses.dataclass(frozen=True)
class C4(Filter):
    """C4's rules for documents, after its rules for lines; makes "c4".

    Attributes:
      min_sentences: fewest sentences in the lines that are kept.
    """

    makes = _decision("c4")
    rules: ClassVar[tuple[Rule, ...]] = (
        *(Rule(name, "c4_forbidden", "=", name) for name in FORBIDDEN if name),
        Rule("too few sentences", "c4_sentences", "<", "min_sentences"),
    )
    reads: ClassVar[tuple[str, ...]] = _columns(rules)

    min_sentences: int | None = 5


@dataclasses.dataclass(frozen=True)
class FineWeb(Filter):
    """FineWeb's own rules; makes "fineweb".

    Attributes:
      min_filled_lines: fewest lines that are not only white space.
      min_punctuated_lines: of these lines.
      max_short_lines: of these lines.
      max_duplicate_characters: of the characters but line feeds.
      max_newline_ratio: line feeds for each word.
    """

    makes = _decision("fineweb")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("no text", "filled_lines", "<", "min_filled_lines"),
        Rule("few lines that end in punctuation", "punctuated_lines", "<", "min_punctuated_lines"),
        Rule("short lines", "short_lines", ">", "max_short_lines"),
        Rule("duplicate characters", "duplicate_characters", ">", "max_duplicate_characters"),
        Rule("many line feeds", "newline_ratio", ">", "max_newline_ratio"),
    )
    reads: ClassVar[tuple[str, ...]] = _columns(rules)

    min_filled_lines: int | None = 1
    min_punctuated_lines: float | None = 0.12
    max_short_lines: float | None = 0.67
    max_duplicate_characters: float | None = 0.01
    max_newline_ratio: float | None = 0.3


def _parts(texts: pa.ChunkedArray) -> Iterator[list[str]]:
    """Documents, together as many characters as are to be looked at together, or a single one."""
    part: list[str] = []
    size = 0
    for text in texts:
        value = text.as_py()
        part.append(value)
        size += len(value)
        if size >= _BATCH:
            yield part
            part, size = [], 0
    if part:
        yield part


def _ratio(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The quotients; 0 where there is nothing to divide by."""
    return np.divide(count, total, out=np.zeros(len(count)), where=total > 0)


def _different(bits: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many different bits the words of each document have."""
    filled = np.flatnonzero(np.diff(bounds))
    result = np.zeros(len(bounds) - 1, np.int64)
    if len(filled):
        result[filled] = np.bitwise_count(np.bitwise_or.reduceat(bits, bounds[filled]))
    return result
