"""Finds what a response gives as its answer: the final answer span, the last code block, words, columns of a prompt."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError

_BOX = r"\boxed{"


def last_box(text: str) -> tuple[int, str] | None:
    """The place and the content of the last `\\boxed{...}` that lies in no other one.

    Returns:
      None if there is none, or if the last one is not closed: an earlier box is not the final answer then.
    """
    found = None
    at = text.find(_BOX)
    while at >= 0:
        end = _closing(text, at + len(_BOX))
        if end is None:
            return None
        found = at, text[at + len(_BOX) : end]
        at = text.find(_BOX, end)
    return found


def _closing(text: str, at: int) -> int | None:
    """The place of the brace that closes one opened before `at`; braces behind a backslash do not count."""
    depth = 1
    while at < len(text):
        character = text[at]
        if character == "\\":
            at += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if not depth:
                return at
        at += 1
    return None


def answer_span(text: str, markers: Sequence[str] = (), after: str = "") -> str | None:
    """The final answer of a response: the content of the last box, or what follows the last marker.

    The rest of the response is never searched. A box after the last marker is the answer of that marker.

    Args:
      text: of the response.
      markers: texts such as "The answer is" or "####", in either case. An answer ends with the line or the sentence.
      after: only what follows the last occurrence of this text is read, such as "</think>".

    Returns:
      The span without surrounding white space, dollar signs and full stop; None if there is none.
    """
    if after:
        _, found, text = text.rpartition(after)
        if not found:
            return None
    start = -1
    for marker in markers:
        for match in re.finditer(re.escape(marker), text, re.IGNORECASE):
            start = max(start, match.end())
    box = last_box(text)
    if box is None and text.rfind(_BOX) >= max(start, 0):
        # The last box is not closed.
        return None
    if box is not None and box[0] >= start:
        span = box[1]
        # A box around a box is one answer; a box beside other text in a box is none.
        while _BOX in span:
            inner = last_box(span)
            if inner is None or span.strip() != _BOX + inner[1] + "}":
                return None
            span = inner[1]
    elif start >= 0:
        line = text[start:].lstrip(" \t:*").partition("\n")[0]
        span = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0]
        span = span.strip().strip("*")
    else:
        return None
    span = span.strip().removesuffix(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(span) > len(left + right) and span.startswith(left) and span.endswith(right):
            span = span[len(left) : -len(right)].strip()
    return span or None


def last_code_block(text: str) -> tuple[str, str] | None:
    """The language tag and the content of the last fenced code block.

    Returns:
      None if there is none, or if the last one is not closed.
    """
    blocks, is_open = code_blocks(text)
    return blocks[-1] if blocks and not is_open else None


def code_blocks(text: str) -> tuple[list[tuple[str, str]], bool]:
    """The language tags and the contents of the closed fenced code blocks, and whether one is left open after them."""
    found: list[tuple[str, str]] = []
    opened: tuple[str, str, list[str]] | None = None
    for line in text.split("\n"):
        stripped = line.strip()
        if opened is None:
            if match := re.match(r"(`{3,})\s*([^\s`]*)[^`]*$", stripped):
                opened = match[1], match[2].lower(), []
        elif stripped.startswith(opened[0]) and not stripped.strip("`"):
            found.append((opened[1], "\n".join([*opened[2], ""])))
            opened = None
        else:
            opened[2].append(line)
    return found, opened is not None


def count_words(text: str) -> int:
    """The number of runs of letters, digits and underscores, as IFEval counts words."""
    return len(re.findall(r"\w+", text))


def column_of(columns: Mapping[str, Sequence[Any]], name: str, what: str) -> Sequence[Any]:
    """A column of the prompt file.

    Args:
      columns: that there are, and what rewards get from the run beside them.
      name: of the wanted one.
      what: it holds, for the message.

    Raises:
      InputError: there is no such column.
    """
    if name not in columns:
        there = ", ".join(sorted(columns.keys() - {"prompts", "completion_ids"})) or "none"
        raise InputError(
            f"expected {what} in the column {name} of the prompt file, whose columns are: {there}. Add it, or set "
            "`column` to the one that holds it."
        )
    return columns[name]
