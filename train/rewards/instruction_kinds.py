"""The 25 kinds of instructions of IFEval, each a function of the response that says whether it is followed.

Source: Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models", arXiv:2311.07911, table 1, and
the names of the arguments in its data. The code is our own. Where the published description leaves room, the stricter
reading is taken, so that a response cannot earn the reward by accident; docs/rewards.md lists where that differs.
"""

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.rewards.languages import is_english, language_of
from train.rewards.text import count_words

Relation = Literal["less than", "at least"]


def follows(kind: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether a response follows an instruction.

    Args:
      kind: the id of the instruction, such as "keywords:existence".
      arguments: of the instruction; None stands for an argument that it does not have.
      response: the text, which is not empty.

    Raises:
      InputError: an unknown id, or arguments that are not those of the kind.
    """
    if kind not in KINDS:
        raise InputError(f"There is no instruction {kind!r}. Expected one of {', '.join(KINDS)}.")
    check = KINDS[kind]
    return check(response, **_arguments(kind, check, arguments))


def _arguments(kind: str, check: Callable[..., bool], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a check, of the right types."""
    wanted = {name: p.annotation for name, p in list(inspect.signature(check).parameters.items())[1:]}
    # Tables with a column for each argument hold None where an instruction has no such argument.
    found = {name: value for name, value in given.items() if value is not None}
    if set(found) != set(wanted):
        raise InputError(
            f"The instruction {kind} has the arguments {', '.join(sorted(found)) or 'none'}; expected "
            f"{', '.join(wanted) or 'none'}."
        )
    for name, type_ in wanted.items():
        value = found[name]
        # A column with None may have turned integers into floats.
        if type_ is int and isinstance(value, float) and value.is_integer():
            found[name] = value = int(value)
        if type_ is int:
            right, what = isinstance(value, int) and not isinstance(value, bool) and value >= 0, "an integer from 0"
        elif type_ is str:
            right, what = isinstance(value, str) and bool(value.strip()), "a text"
        elif type_ == list[str]:
            texts = isinstance(value, (list, tuple)) and all(isinstance(x, str) and x.strip() for x in value)
            right, what = texts and bool(value), "a list of texts"
        else:
            right, what = value in typing.get_args(type_), " or ".join(map(repr, typing.get_args(type_)))
        if not right:
            raise InputError(f"The argument {name} of the instruction {kind} is {value!r}; expected {what}.")
    return found


def _compare(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


# Keywords.


def _occurrences(word: str, text: str) -> int:
    """How often a word or phrase stands in a text, in either case, not inside a longer word."""
    return len(re.findall(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE))


def _existence(response: str, keywords: list[str]) -> bool:
    return all(_occurrences(word, response) for word in keywords)


def _frequency(response: str, keyword: str, frequency: int, relation: Relation) -> bool:
    return _compare(_occurrences(keyword, response), relation, frequency)


def _forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(_occurrences(word, response) for word in forbidden_words)


def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _compare(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


# Language.


def _response_language(response: str, language: str) -> bool:
    # zh-cn and the like.
    return language_of(response) == language.strip().lower().partition("-")[0]


# Length.

# A full stop behind these ends no sentence.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof sr jr st vs etc e.g i.e cf no vol fig approx inc ltd co u.s u.k a.m p.m".split()
)
# The beginning of a line, and what is no word in it. It stays in the line: otherwise empty lines take quadratic time.
_BEGIN = r"^(?:[^\w\n]|_)*"
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[」』”’）]*")  # noqa: RUF001


def count_sentences(text: str) -> int:
    """The number of sentences: they end with `.`, `!`, `?`, `…` or `。` before white space, and with a paragraph.

    Abbreviations such as `Dr.`, initials and the numbers of a list end none.
    """
    count = 0
    for paragraph in re.split(r"\n\s*\n", text):
        at = 0
        for match in _SENTENCE_END.finditer(paragraph):
            before = paragraph[at : match.start()]
            word = before.split()[-1].lower().lstrip("(\"'“") if before.split() else ""
            only_stop = match[0].startswith(".") and not match[0].startswith("..")
            is_initial = len(word) == 1 and word.isalpha() and word not in "ia"
            is_list_number = word.isdigit() and not before.partition(word)[0].strip("#*- \t\n")
            if only_stop and (word in _ABBREVIATIONS or is_initial or is_list_number) and match.end() < len(paragraph):
                continue
            if re.search(r"\w", before):
                count += 1
            at = match.end()
        # What follows the last mark is a sentence without one.
        count += bool(re.search(r"\w", paragraph[at:]))
    return count


def _number_sentences(response: str, num_sentences: int, relation: Relation) -> bool:
    return _compare(count_sentences(response), relation, num_sentences)


def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by the markdown divider `***`."""
    parts = [part.strip() for part in re.split(r"(?<!\*)\*{3}(?!\*)", response)]
    # A divider at either end separates nothing.
    parts = parts[not parts[0] :]
    parts = parts[: len(parts) - (bool(parts) and not parts[-1])]
    return all(parts) and len(parts) == num_paragraphs


def _number_words(response: str, num_words: int, relation: Relation) -> bool:
    return _compare(count_words(response), relation, num_words)


def _nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by blank lines."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", response) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    found = re.match(r"[^\w]*([\w'\u2019-]+)", parts[nth_paragraph - 1])
    return found is not None and found[1].strip("'\u2019-").lower() == first_word.strip().lower()


# Detectable content.


def _number_placeholders(response: str, num_placeholders: int) -> bool:
    """Placeholders stand in square brackets, such as [address]."""
    return len(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    """A line that begins with the marker, with or without spaces and the last full stop, and says something."""
    letters = [re.escape(part) for part in postscript_marker.strip().rstrip(".").split(".") if part.strip()]
    marker = r"\.\s?".join(letters)
    return bool(re.search(rf"{_BEGIN}{marker}(?!\w|\.\s?\w\.)\W*\w", response, re.IGNORECASE | re.MULTILINE))


# Detectable format.


def _number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Bullets are lines that begin with `*` or `-` and a space."""
    return len(re.findall(r"^[ \t]*[*-][ \t]+(?=.*\w)\S", response, re.MULTILINE)) == num_bullets


def _constrained_response(response: str) -> bool:
    """Exactly one of the three options."""
    options = "My answer is yes.", "My answer is no.", "My answer is maybe."
    return sum(option in response for option in options) == 1


def _number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """Sections between single or double asterisks, on one line."""
    return len(re.findall(r"(?<!\*)(\*{1,2})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)", response)) >= num_highlights


def _multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """Sections begin with a line such as `Section 1`; each number counts once."""
    heading = rf"{_BEGIN}{re.escape(section_spliter.strip())}\s*(\d+)"
    return len(set(re.findall(heading, response, re.MULTILINE | re.IGNORECASE))) >= num_sections


def _json_format(response: str) -> bool:
    """All of it is JSON, perhaps in a markdown fence."""
    text = response.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*\n(.*)```", text, re.DOTALL | re.IGNORECASE):
        text = fenced[1]
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _title(response: str) -> bool:
    """A title in double angular brackets, such as <<poem of joy>>."""
    return bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", response))


# Combinations.


def _two_responses(response: str) -> bool:
    """Two different responses, separated by six asterisks."""
    parts = [part.strip() for part in re.split(r"(?<!\*)\*{6}(?!\*)", response)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The prompt first, word for word, in either case; then an answer."""
    text, prompt = response.strip().lower(), prompt_to_repeat.strip().lower()
    return text.startswith(prompt) and bool(text[len(prompt) :].strip())


# Beginning and end.


def _end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').rstrip().lower().endswith(end_phrase.strip().lower())


def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 2 and text.startswith('"') and text.endswith('"')


# Case.


def _capital_word_frequency(response: str, capital_frequency: int, capital_relation: Relation) -> bool:
    """Words in capitals only; a word with a hyphen or an apostrophe is one."""
    words = re.findall(r"\w+(?:[-'\u2019.&]\w+)*", response)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _english_capital(response: str) -> bool:
    return response.isupper() and is_english(response)


def _english_lowercase(response: str) -> bool:
    return response.islower() and is_english(response)


# Punctuation.


def _no_comma(response: str) -> bool:
    return "," not in response


KINDS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
