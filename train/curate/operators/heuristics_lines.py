"""Counts of lines and paragraphs of a document, and the rules of C4 for lines."""

import re
from typing import NamedTuple

from train.curate.operators.heuristics_table import SPACE, TERMINALS

_PARAGRAPHS = re.compile(r"\n{2,}")
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_SPACES = re.compile(r"(\s+)")
_TERMINALS = tuple(sorted(TERMINALS))
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")
_ENDS = (".", "?", "!", '"', "'")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

FORBIDDEN = (None, "lorem ipsum", "curly bracket")
"""What no page of C4 has; `LineCounts.forbidden` is an index."""


class LineCounts(NamedTuple):
    """Numbers of one document.

    Attributes:
      characters: of the text.
      newlines: line feeds.
      hashes: characters "#".
      ellipses: "..." and "…".
      all_lines: lines, empty ones too, that any of Unicode's line boundaries ends.
      bullet_lines: of them, begin with a bullet point.
      ellipsis_lines: of them, end with an ellipsis.
      lines: runs without a line feed; one that is empty counts at both ends of the text.
      duplicate_lines: of them, equal an earlier one.
      duplicate_line_characters: in these.
      paragraphs: parts between two line feeds or more.
      duplicate_paragraphs: of them, equal an earlier one.
      duplicate_paragraph_characters: in these.
      filled_lines: lines with a character that is not white space.
      punctuated_lines: of them, end with a terminal punctuation mark.
      short_lines: of them, are short.
      duplicate_filled_characters: in filled lines that equal an earlier one.
    """

    characters: int
    newlines: int
    hashes: int
    ellipses: int
    all_lines: int
    bullet_lines: int
    ellipsis_lines: int
    lines: int
    duplicate_lines: int
    duplicate_line_characters: int
    paragraphs: int
    duplicate_paragraphs: int
    duplicate_paragraph_characters: int
    filled_lines: int
    punctuated_lines: int
    short_lines: int
    duplicate_filled_characters: int


def count_lines(text: str, short: int) -> LineCounts:
    """Counts the lines of a document.

    Args:
      text: any.
      short: a short line has at most so many characters.
    """
    newlines = text.count("\n")
    ellipses = text.count("...") + text.count("…")

    # Gopher's quality rules.
    all_lines = text.splitlines()
    bullets = ends = 0
    if "-" in text or "•" in text:
        bullets = sum(line.lstrip().startswith(_BULLETS) for line in all_lines)
    if ellipses:
        ends = sum(line.rstrip().endswith(_ELLIPSES) for line in all_lines)

    # Gopher's repetition rules.
    parts = text.split("\n") if text else [""]
    lines = [line for line in parts if line]
    different = set(lines)
    characters = len(text) - newlines - sum(map(len, different))
    # Splitting at runs of line feeds leaves an empty part at an end that has some.
    empty = (text[:1] == "\n") + (text[-1:] == "\n") if text else 1
    repeated = len(lines) - len(different) + (empty == 2)
    paragraphs = _PARAGRAPHS.split(text.strip())
    first = set(paragraphs)
    paragraph_characters = sum(map(len, paragraphs)) - sum(map(len, first)) if len(first) < len(paragraphs) else 0

    # FineWeb's rules.
    filled = [line for line in lines if not line.isspace()]
    filled_characters = characters
    if len(filled) < len(lines):
        filled_characters = sum(map(len, filled)) - sum(map(len, set(filled)))
    return LineCounts(
        characters=len(text),
        newlines=newlines,
        hashes=text.count("#"),
        ellipses=ellipses,
        all_lines=len(all_lines),
        bullet_lines=bullets,
        ellipsis_lines=ends,
        lines=len(lines) + empty,
        duplicate_lines=repeated,
        duplicate_line_characters=characters,
        paragraphs=len(paragraphs),
        duplicate_paragraphs=len(paragraphs) - len(first),
        duplicate_paragraph_characters=paragraph_characters,
        filled_lines=len(filled),
        punctuated_lines=sum(line[-1] in TERMINALS for line in filled),
        short_lines=sum(len(line) <= short for line in filled),
        duplicate_filled_characters=filled_characters,
    )


def c4_lines(text: str, min_words: int, max_word_length: int) -> tuple[list[str], list[list[str]], int]:
    """The lines that C4 keeps (Raffel et al. 2020, section 2.2, and its published code).

    They end in a terminal mark or a quote but not in an ellipsis, have enough words and none that is too long, and do
    not name JavaScript or a policy on cookies, privacy or use. Citations such as "[2]" are removed from them.

    Args:
      text: any.
      min_words: of a line, split at white space.
      max_word_length: in characters.

    Returns:
      The lines, the runs between spaces of each, and what the first line has that forbids the page: an index of
      `FORBIDDEN`. `SPACE` stands among the runs for white space that is not one blank.
    """
    kept: list[str] = []
    runs: list[list[str]] = []
    forbidden = 0
    lower = text.lower()
    lorem, javascript = "lorem ipsum" in lower, "javascript" in lower
    policy = any(phrase in lower for phrase in _POLICIES)
    for line in text.splitlines():
        line = line.strip()
        citations = line[-1:] == "]" or "[" in line
        if not (citations or line.endswith(_ENDS)):
            continue
        words = line.split()
        if len(words) < min_words or (len(line) > max_word_length and max(map(len, words)) > max_word_length):
            continue
        if citations:
            line = _CITATION.sub("", line)
        if not line.endswith(_ENDS) or line.endswith("..."):
            continue
        if lorem or javascript or policy or "{" in line:
            lower = line.lower()
            if lorem and "lorem ipsum" in lower:
                forbidden = forbidden or 1
                continue
            if javascript and "javascript" in lower:
                continue
            if "{" in line:
                forbidden = forbidden or 2
                continue
            if policy and any(phrase in lower for phrase in _POLICIES):
                continue
        kept.append(line)
        if " ".join(words) != line:
            words = [run if not run.isspace() else SPACE for run in _SPACES.split(line) if run and run != " "]
        runs.append(words)
    return kept, runs, forbidden
