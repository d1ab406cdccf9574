"""A generator that makes known mistakes, at random but always the same ones for the same requests."""

import random
from collections.abc import Callable, Mapping

from train.synthesize.generator import Answer, Request

GERMAN = "Wir rechnen das nicht aus, weil die Aufgabe für uns noch nicht so einfach ist, und das war es auch schon."
# What is wrong with an answer whatever it is about.
FORMAL: Mapping[str, Callable[[str], str | Answer]] = {
    "cut": lambda text: Answer(text[: len(text) // 2], finish="length"),
    "empty": lambda text: "",
    "refusal": lambda text: "I'm sorry, but I cannot help with that.",
    "garbage": lambda text: "tick tock " * 60,
    "german": lambda text: GERMAN,
    "refused": lambda text: Answer("", refused="too long"),
}


def drawn(request: Request, *salt: object) -> random.Random:
    """Random numbers that depend on a request, or on the salt of one, alone."""
    return random.Random(request.key("") + repr(salt))


def nonsense(request: Request) -> str:
    """Random words, as a tiny model without training writes them."""
    rng = drawn(request)
    words = "the of blue 7 runs { } answer score step 12 because not [ ] while box , . : yes no apple".split()
    return " ".join(rng.choice(words) for _ in range(rng.randrange(1, 60)))
