"""System prompts that code makes: a role, a style, and rules of which some can be checked."""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.instruction_kinds import follows

ROLES = (
    "a helpful assistant", "a patient teacher", "an experienced editor", "a travel guide", "a librarian",
    "a software engineer", "a cook", "a history enthusiast", "a customer service agent of a furniture shop",
    "a scientist who writes for the public", "a project manager", "a careful analyst", "a museum guide",
    "a coach for job interviews", "a gardener", "a data analyst", "a journalist", "a moderator of a book club",
)  # fmt: skip
STYLES = (
    "Be friendly and warm.", "Be brief and factual.", "Be formal.", "Use simple words that a child understands.",
    "Explain the reasons for what you say.", "Give an example where one helps.", "Be enthusiastic.",
    "Say so when you are not sure.", "Get to the point at once.", "Use a calm tone.",
)  # fmt: skip
_LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "en": "English"}
_FORBIDDEN = ("very", "basically", "obviously", "actually", "literally")
_ENDINGS = ("Is there anything else?", "Have a good day.", "That is all.", "I hope this helps.")


@dataclasses.dataclass(frozen=True)
class SystemPrompt:
    """A system prompt with the rules that code can check.

    Attributes:
      text: of the prompt.
      rules: kinds of `train.rewards.instruction_kinds` with their arguments.
    """

    text: str
    rules: tuple[tuple[str, Mapping[str, Any]], ...]


def make_system_prompt(rng: random.Random) -> SystemPrompt:
    """A random system prompt with at most three rules that do not contradict one another."""
    rules = [rule for rule in rng.sample(_RULES, len(_RULES))][: rng.randint(0, 3)]
    parts = [f"You are {rng.choice(ROLES)}."]
    if rng.random() < 0.7:
        parts.append(rng.choice(STYLES))
    made = []
    for rule in rules:
        text, kind, arguments = rule(rng)
        parts.append(text)
        made.append((kind, arguments))
    return SystemPrompt(" ".join(parts), tuple(made))


def general_system_prompts(count: int, seed: int) -> list[str]:
    """Different system prompts of a role, and most of them of a style: nothing in them changes what a right answer is.

    Args:
      count: how many.
      seed: of the draw; the first ones of a larger number are those of a smaller one.

    Raises:
      InputError: there are not so many.
    """
    made = [" ".join([f"You are {role}.", style]).strip() for role in ROLES for style in (*STYLES, "")]
    if not 0 <= count <= len(made):
        raise InputError(f"There are {len(made)} general system prompts, got {count}. Give a file of others.")
    random.Random(f"{seed} general").shuffle(made)
    return made[:count]


def broken_rule(rules: Any, response: str) -> str | None:
    """The first rule that a response does not follow; None if it follows all."""
    return next((kind for kind, arguments in rules if not follows(kind, arguments, response)), None)


def _language(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    code = rng.choice(sorted(_LANGUAGES))
    return f"Always answer in {_LANGUAGES[code]}.", "language:response_language", {"language": code}


def _forbidden(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    words = rng.sample(_FORBIDDEN, 2)
    text = f'Never use the words "{words[0]}" and "{words[1]}".'
    return text, "keywords:forbidden_words", {"forbidden_words": words}


def _words(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    count = rng.choice((60, 80, 100, 150))
    arguments = {"num_words": count, "relation": "less than"}
    return f"Answers have fewer than {count} words.", "length_constraints:number_words", arguments


def _ending(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    phrase = rng.choice(_ENDINGS)
    text = f'End each answer with exactly these words: "{phrase}"'
    return text, "startend:end_checker", {"end_phrase": phrase}


def _no_comma(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    return "Do not use commas.", "punctuation:no_comma", {}


def _title(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    return "Begin with a title in double angular brackets, such as <<Title>>.", "detectable_format:title", {}


_RULES = (_language, _forbidden, _words, _ending, _no_comma, _title)
