"""What is wrong with an answer before its content is looked at: cut, empty, a refusal, garbage, another language."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from train.rewards.languages import language_of
from train.synthesize.generator import Answer

_REFUSAL = re.compile(
    r"(?:i(?:'|\u2019)?m (?:very |so |really )?sorry\b|i apologi[sz]e\b|(?:sorry, (?:but )?)?(?:as an ai\b|"
    r"i (?:can(?:no|'|\u2019)t|am (?:not able|unable)|won(?:'|\u2019)t)\b)|"
    r"(?:\u5bf9\u4e0d\u8d77|\u62b1\u6b49|\u5f88\u62b1\u6b49|\u4f5c\u4e3a(?:\u4e00\u4e2a)?(?:AI|\u4eba\u5de5\u667a\u80fd)))",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]|<\|(?:im_start|im_end|endoftext)\|>")
_TOOL_CALL = re.compile(r"</?tool_call>")
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
_FENCES = re.compile(r"[ \t]*(`{3,}|~{3,})([^`]*)$")
_SCORE = re.compile(r"(?:score|rating|\u8bc4\u5206)\W{0,6}(\d+(?:\.\d+)?)", re.IGNORECASE)
_REPEATED_WORDS, _MOST_REPEATED = 10, 0.3


def fault(answer: Answer, language: str | None = None, refusals: bool = True) -> str | None:
    """Why an answer cannot be used, in a few words that can be counted; None if nothing is wrong with its form.

    Args:
      answer: of a model.
      language: a code that `train.rewards.languages` knows, such as "en", that the answer must be in. A text whose
        language cannot be told (too short, mostly numbers or code) passes.
      refusals: whether an answer that begins by declining is a fault.
    """
    text = answer.text.strip()
    if answer.refused is not None:
        return "refused by the server"
    if answer.finish == "length":
        return "cut by the length"
    if not text:
        return "empty answer"
    if refusals and _REFUSAL.match(text):
        return "the model declines"
    if _CONTROL.search(text) or is_repetitive(text):
        return "garbage"
    # Training takes no such text.
    if (tags := _TOOL_CALL.findall(text)) and tags != ["<tool_call>", "</tool_call>"] * (len(tags) // 2):
        return "an open tool call"
    if language is not None and language_of(text) not in (None, language):
        return "another language"
    return None


def unbalanced_fences(text: str) -> bool:
    """Whether a block of code is not closed, or a fence closes none."""
    open_fence = ""
    for line in text.split("\n"):
        found = _FENCES.match(line)
        if found is None:
            continue
        fence, info = found[1], found[2].strip()
        if not open_fence:
            open_fence = fence
        elif fence.startswith(open_fence) and not info:
            open_fence = ""
    return bool(open_fence)


def is_repetitive(text: str) -> bool:
    """Whether a text goes round in circles: more than 30% of its runs of ten words are one and the same."""
    words = text.split()
    if len(words) < 3 * _REPEATED_WORDS:
        # Without spaces between words, characters tell.
        return len(text) > 200 and len(set(text)) < 8
    runs = Counter(tuple(words[i : i + _REPEATED_WORDS]) for i in range(len(words) - _REPEATED_WORDS + 1))
    # A cycle of several words has each of its turns as a run: the most frequent ones are counted together.
    often = sum(count for _, count in runs.items() if count > 2)
    return often > _MOST_REPEATED * sum(runs.values())


def json_of(text: str) -> Any | None:
    """The JSON value of an answer: all of it, or its only code block. None if there is none, or it is cut or null."""
    blocks = _FENCE.findall(text)
    try:
        return json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def object_of(answer: Answer) -> Mapping[str, Any]:
    """The JSON object in the last line of an answer, or in all of it; empty if there is none or it has a fault."""
    if fault(answer):
        return {}
    for text in (answer.text.rstrip().rpartition("\n")[2], answer.text):
        if isinstance(value := json_of(text), dict):
            return value
    return {}


def score_of(text: str, most: float = 10.0) -> float | None:
    """The number that a judge gives after "Score:" (the last one), from 0 to `most`; None if there is none."""
    found = _SCORE.findall(text)
    score = float(found[-1]) if found else None
    return score if score is not None and score <= most else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
