"""The built-in kinds of instructions in words: drawn arguments, a text that asks for them, a right and a wrong answer.

`train.rewards.instruction_kinds` checks them exactly, without a model. "detectable_format:constrained_response" is left
out: it fits questions of yes or no only.
"""

import dataclasses
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

_WORDS = (
    "garden", "river", "bridge", "music", "winter", "window", "journey", "teacher", "market", "island", "forest",
    "letter", "kitchen", "machine", "mountain", "history", "weather", "picture", "village", "ocean",
)  # fmt: skip
_FIRST_WORDS = ("today", "first", "people", "every", "there", "once", "perhaps", "many")
_ENDINGS = (
    "Is there anything else I can help with?",
    "That is all.",
    "I hope this helps.",
    "Let me know what you think.",
)
_LANGUAGES = {
    "de": ("German", "Das ist eine kurze Antwort, und sie ist nicht auf Englisch, weil die Frage das so will."),
    "fr": ("French", "C'est une réponse courte, et elle n'est pas en anglais, parce que la question le veut ainsi."),
    "es": ("Spanish", "Esta es una respuesta corta, y no está en inglés, porque la pregunta lo quiere así para todos."),
    "it": ("Italian", "Questa è una risposta breve, e non è in inglese, perché la domanda lo vuole così per tutti."),
}
_ENGLISH = "This is a short answer, and it is in English, because that is what they all wanted from us."

Drawn = tuple[Mapping[str, Any], str, str, str]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a built-in kind.

    Attributes:
      kind: a key of `train.rewards.instruction_kinds.KINDS`.
      arguments: of the kind.
      text: what a user asks for.
      right: an answer that follows it.
      wrong: one that does not.
    """

    kind: str
    arguments: Mapping[str, Any]
    text: str
    right: str
    wrong: str


def draw(kind: str, rng: Random, query: str) -> Instruction:
    """Draws an instruction.

    Args:
      kind: a key of `TEXTS`.
      rng: draws its arguments.
      query: of the user, with which it is combined.
    """
    return Instruction(kind, *TEXTS[kind](rng, query))


def _existence(rng: Random, query: str) -> Drawn:
    a, b = rng.sample(_WORDS, 2)
    return {"keywords": [a, b]}, f'Use the words "{a}" and "{b}" in your answer.', f"A {a} and a {b}.", f"A {a}."


def _frequency(rng: Random, query: str) -> Drawn:
    word, count, least = rng.choice(_WORDS), rng.randint(2, 4), rng.random() < 0.7
    relation, some, none = "at least" if least else "less than", f"{word} " * count, f"No {word}."
    text = f'The word "{word}" must appear {relation} {count} times in your answer.'
    arguments = {"keyword": word, "frequency": count, "relation": relation}
    return arguments, text, *((some, none) if least else (none, some))


def _forbidden(rng: Random, query: str) -> Drawn:
    words = rng.sample(_WORDS, 3)
    text = f"Do not use any of these words in your answer: {', '.join(words)}."
    return {"forbidden_words": words}, text, "There are none of them here.", f"There is a {words[0]} here."


def _letters(rng: Random, query: str) -> Drawn:
    letter, count = rng.choice("bcdfghjkmpqvwxyz"), rng.randint(2, 6)
    text = f'The letter "{letter}" must appear at least {count} times in your answer, in either case.'
    arguments = {"letter": letter, "let_frequency": count, "let_relation": "at least"}
    return arguments, text, f"So: {letter * count}", "So: a."


def _language(rng: Random, query: str) -> Drawn:
    code = rng.choice(sorted(_LANGUAGES))
    name, right = _LANGUAGES[code]
    return {"language": code}, f"Write your whole answer in {name}, and use no other language.", right, _ENGLISH


def _sentence_count(rng: Random, query: str) -> Drawn:
    count, least = rng.randint(3, 8), rng.random() < 0.5
    many, one = "This is so. " * count, "This is so."
    relation = "at least" if least else "less than"
    text = f"Your answer must have {relation} {count} sentences."
    return {"num_sentences": count, "relation": relation}, text, *((many, one) if least else (one, many))


def _paragraphs(rng: Random, query: str) -> Drawn:
    count = rng.randint(2, 5)
    text = f"Write exactly {count} paragraphs, and separate them with the markdown divider ***"
    return {"num_paragraphs": count}, text, "\n***\n".join(["So."] * count), "So."


def _word_count(rng: Random, query: str) -> Drawn:
    least = rng.random() < 0.5
    count = rng.randrange(50, 300, 10)
    relation = "at least" if least else "less than"
    many, one = "word " * count, "A word."
    text = f"Answer with {relation} {count} words."
    return {"num_words": count, "relation": relation}, text, *((many, one) if least else (one, many))


def _first_word(rng: Random, query: str) -> Drawn:
    count = rng.randint(2, 4)
    nth, word = rng.randint(1, count), rng.choice(_FIRST_WORDS)
    text = (
        f"Write exactly {count} paragraphs, separated by blank lines. Paragraph {nth} must begin with the word "
        f'"{word}".'
    )
    parts = ["So it is."] * count
    parts[nth - 1] = f"{word.title()} it is."
    arguments = {"num_paragraphs": count, "nth_paragraph": nth, "first_word": word}
    return arguments, text, "\n\n".join(parts), "\n\n".join(["So it is."] * count)


def _placeholders(rng: Random, query: str) -> Drawn:
    count = rng.randint(1, 4)
    text = f"Use at least {count} placeholder{'s' * (count > 1)} in square brackets, such as [name]."
    return {"num_placeholders": count}, text, " ".join(f"[name {i}]" for i in range(count)), "No name."


def _postscript(rng: Random, query: str) -> Drawn:
    marker = rng.choice(("P.S.", "P.P.S"))
    text = f"At the end of your answer, add a postscript that begins with {marker}"
    return {"postscript_marker": marker}, text, f"So.\n\n{marker} And this.", "So."


def _bullets(rng: Random, query: str) -> Drawn:
    count = rng.randint(2, 6)
    text = f"Your answer must have exactly {count} bullet points in markdown, such as:\n* This is a point."
    return {"num_bullets": count}, text, "* A point.\n" * count, "* A point.\n" * (count + 1)


def _highlights(rng: Random, query: str) -> Drawn:
    count = rng.randint(1, 4)
    text = f"Highlight at least {count} part{'s' * (count > 1)} of your answer with asterisks, as in *highlighted*."
    return {"num_highlights": count}, text, "*So* it is. " * count, "So it is."


def _sections(rng: Random, query: str) -> Drawn:
    count, name = rng.randint(2, 5), rng.choice(("Section", "Part", "Chapter"))
    text = f"Divide your answer into {count} sections. Mark the beginning of each with {name} and its number: {name} 1"
    right = "\n".join(f"{name} {i + 1}\nSo it is." for i in range(count))
    return {"section_spliter": name, "num_sections": count}, text, right, f"{name} 1\nSo it is."


def _json(rng: Random, query: str) -> Drawn:
    return {}, "Write your whole answer as JSON, and nothing around it.", '{"answer": "So it is."}', "answer: So it is."


def _title(rng: Random, query: str) -> Drawn:
    text = "Give your answer a title in double angular brackets, such as <<A day at sea>>."
    return {}, text, "<<So it is>>\nIt is so.", "So it is\nIt is so."


def _two(rng: Random, query: str) -> Drawn:
    text = "Give two different answers, and only the answers. Separate them with six asterisks: ******"
    return {}, text, "So it is.\n******\nSo it is not.", "So it is."


def _repeat(rng: Random, query: str) -> Drawn:
    text = "First repeat the request above word for word, without this sentence, and then give your answer."
    return {"prompt_to_repeat": query}, text, f"{query}\nSo it is.", "So it is."


def _ending(rng: Random, query: str) -> Drawn:
    phrase = rng.choice(_ENDINGS)
    text = f'End your answer with exactly this phrase, and write nothing after it: "{phrase}"'
    return {"end_phrase": phrase}, text, f"So it is. {phrase}", f"{phrase} So it is."


def _quotation(rng: Random, query: str) -> Drawn:
    return {}, "Put your whole answer in double quotation marks.", '"So it is."', "So it is."


def _capital_words(rng: Random, query: str) -> Drawn:
    count, least = rng.randint(2, 6), rng.random() < 0.5
    relation, many, none = "at least" if least else "less than", "WORD " * count, "No such word."
    text = f"Words in capital letters only must appear {relation} {count} times in your answer."
    arguments = {"capital_frequency": count, "capital_relation": relation}
    return arguments, text, *((many, none) if least else (none, many))


def _capitals(rng: Random, query: str) -> Drawn:
    return {}, "Write your whole answer in English and in capital letters only.", _ENGLISH.upper(), _ENGLISH


def _lower_case(rng: Random, query: str) -> Drawn:
    return (
        {},
        "Write your whole answer in English and in lower case, without capital letters.",
        _ENGLISH.lower(),
        _ENGLISH,
    )


def _no_comma(rng: Random, query: str) -> Drawn:
    return {}, "Do not use any comma in your answer.", "So it is.", "So, it is."


TEXTS: Mapping[str, Callable[[Random, str], Drawn]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentence_count,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _word_count,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _ending,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capitals,
    "change_case:english_lowercase": _lower_case,
    "punctuation:no_comma": _no_comma,
}
"""How an instruction of each kind is drawn: arguments, text, a right answer, a wrong answer."""
