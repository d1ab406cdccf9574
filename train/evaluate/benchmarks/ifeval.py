"""IFEval: prompts with instructions that a program checks (Zhou et al. 2023, arXiv:2311.07911).

The checks are those of `train.rewards.instructions`, but for eight kinds that it takes stricter or laxer than the
published program, which are checked as published. Four numbers: the share of prompts with all instructions followed,
and of instructions followed, each strict and loose.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.tables import read_rows
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict
from train.rewards.instructions import check_instruction, variants

FILE = DataFile(
    "ifeval/input_data.jsonl",
    source="https://github.com/google-research/google-research/tree/master/instruction_following_eval",
    licence="Apache-2.0",
)


def share(items: Sequence[Sequence[bool]]) -> float:
    """The share of instructions that are followed, over all items together."""
    return sum(map(sum, items)) / sum(map(len, items))


# --- kinds that the published program checks in another way than the reward ---


def _has_keywords(given: Mapping[str, Any], text: str) -> bool:
    """Keywords may be parts of words."""
    return all(_count(keyword, text) for keyword in given["keywords"])


def _has_frequency(given: Mapping[str, Any], text: str) -> bool:
    found = _count(given["keyword"], text)
    return bool(found < given["frequency"] if given["relation"] == "less than" else found >= given["frequency"])


def _has_postscript(given: Mapping[str, Any], text: str) -> bool:
    """The marker in any case, with its full stops; P.P.S and P.S. may have spaces between their letters."""
    forms = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = given["postscript_marker"]
    return re.search(forms.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _has_sections(given: Mapping[str, Any], text: str) -> bool:
    """The word for a section, as it is spelt, before a number."""
    marks = re.findall(rf"{re.escape(given['section_spliter'])}\s?\d+", text)
    return bool(len(marks) >= given["num_sections"])


def _is_constrained(given: Mapping[str, Any], text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


def _first_word(given: Mapping[str, Any], text: str) -> bool:
    """Two line ends separate paragraphs. Empty ones do not count, but keep their place; a word ends at a mark."""
    paragraphs = text.split("\n\n")
    count, place = sum(bool(one.strip()) for one in paragraphs), given["nth_paragraph"]
    if not 1 <= place <= count or count != given["num_paragraphs"] or not paragraphs[place - 1].strip():
        return False
    word = paragraphs[place - 1].split()[0].lstrip("'").lstrip('"')
    return bool(re.split(r"[.,?!'\"]", word)[0].lower() == given["first_word"].lower())


def _two_responses(given: Mapping[str, Any], text: str) -> bool:
    """An empty part may stand at either end; more asterisks are six and a part of what follows."""
    parts = [part.strip() for part in text.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _repeats(given: Mapping[str, Any], text: str) -> bool:
    """The prompt comes first; an answer after it is not looked for."""
    return bool(text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower()))


def _count(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


_PUBLISHED: dict[str, Callable[[Mapping[str, Any], str], bool]] = {
    "keywords:existence": _has_keywords,
    "keywords:frequency": _has_frequency,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:constrained_response": _is_constrained,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
}


def follows(kind: str, given: Mapping[str, Any], text: str, loose: bool) -> bool:
    """Whether a response follows an instruction, as the published program has it.

    Args:
      kind: of the instruction.
      given: its arguments, which are right.
      text: the response. An empty one follows nothing.
      loose: whether one of the eight variants of the response is enough.
    """
    rule = _PUBLISHED.get(kind)
    if rule is None:
        return check_instruction(kind, given, text, loose)
    return any(bool(one.strip()) and rule(given, one) for one in (variants(text) if loose else (text,)))


class IFEval(Task):
    """One message for each prompt; the whole answer counts."""

    name = "ifeval_chat"
    version = 2
    citation = "arXiv:2311.07911"
    files = (FILE,)
    metrics = (
        Metric("prompt_strict"),
        Metric("instruction_strict", aggregate=share, of_details=True),
        Metric("prompt_loose"),
        Metric("instruction_loose", aggregate=share, of_details=True),
    )

    def template(self) -> str:
        """See `Task.template`."""
        return "{prompt}\n---\nthe whole answer counts; loose: without first line, last line, asterisks"

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`."""
        found = []
        for row in read_rows(files[FILE.path]):
            fields: dict[str, Any] = {
                name: row.values.get(name) for name in ("key", "prompt", "instruction_id_list", "kwargs")
            }
            kinds, given = fields["instruction_id_list"], fields["kwargs"]
            lists = isinstance(kinds, list) and isinstance(given, list) and 0 < len(kinds) == len(given)
            if (
                not lists
                or not isinstance(fields["prompt"], str)
                or not isinstance(fields["key"], (int, str))
                or not all(isinstance(kind, str) for kind in kinds)
                or not all(isinstance(one, Mapping) for one in given)
            ):
                raise InputError(
                    f"{row.where}: expected key, the text prompt, the list of texts instruction_id_list, and as many "
                    f"objects kwargs; found {', '.join(map(str, row.values))}."
                )
            # Wrong instructions are found before the model is asked.
            for kind, one in zip(kinds, given, strict=True):
                try:
                    check_instruction(kind, one, "")
                except InputError as error:
                    raise InputError(f"{row.where}: {error}") from None
            found.append(Item(str(fields.pop("key")), fields))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Generate]:
        """See `Task.requests`."""
        if rounds:
            return ()
        return (Generate(({"role": "user", "content": item.fields["prompt"]},), 2048),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`."""
        verdicts = []
        for item, ((response,),) in zip(items, responses, strict=True):
            asked = list(zip(item.fields["instruction_id_list"], item.fields["kwargs"], strict=True))
            scores: dict[str, float | None] = {}
            details: dict[str, Any] = {"instructions": [kind for kind, _ in asked], "cut": response.finish == "length"}
            for form, loose in (("strict", False), ("loose", True)):
                followed = [follows(kind, given, response.text, loose) for kind, given in asked]
                scores[f"prompt_{form}"] = float(all(followed))
                scores[f"instruction_{form}"] = sum(followed) / len(followed)
                details[f"instruction_{form}"] = followed
            verdicts.append(Verdict(scores, details))
        return verdicts


TASKS = (IFEval(),)
