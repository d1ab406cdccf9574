"""Six tasks with one right answer, and a question that may be answered tersely or padded with courtesies."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and its right answer."""

    prompt: str
    answer: str


def _word(rng: np.random.Generator, syllables: int) -> str:
    return "".join("bdfgklmnprstvz"[rng.integers(14)] + "aeiou"[rng.integers(5)] for _ in range(syllables))


def random_words(rng: np.random.Generator, least: int, most: int) -> list[str]:
    return [_word(rng, int(rng.integers(1, 4))) for _ in range(rng.integers(least, most + 1))]


def _add(rng: np.random.Generator, short: bool) -> Item:
    a, b = rng.integers(0, 10 if short else 1000, 2)
    return Item(f"What is {a} + {b}?", str(a + b))


def _reverse(rng: np.random.Generator, short: bool) -> Item:
    size = int(rng.integers(2, 4) if short else rng.integers(4, 9))
    text = "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in rng.integers(0, 26, size))
    return Item(f"Reverse: {text}", text[::-1])


def _upper(rng: np.random.Generator, short: bool) -> Item:
    text = " ".join(random_words(rng, 1, 1) if short else random_words(rng, 2, 4))
    return Item(f"In capitals: {text}", text.upper())


def _last(rng: np.random.Generator, short: bool) -> Item:
    words = random_words(rng, 2, 2) if short else random_words(rng, 3, 8)
    return Item(f"Last word of: {' '.join(words)}", words[-1])


def _json(rng: np.random.Generator, short: bool) -> Item:
    names = ("name", "city", "colour", "number", "age", "job")
    keys = [names[i] for i in rng.permutation(len(names))[: 2 if short else int(rng.integers(3, 6))]]
    record = {k: int(rng.integers(1, 100)) if k in ("number", "age") else _word(rng, 2) for k in keys}
    key = keys[rng.integers(len(keys))]
    return Item(f"Give {key} of {json.dumps(record)}", str(record[key]))


def _format(rng: np.random.Generator, short: bool) -> Item:
    words = random_words(rng, 2, 2) if short else random_words(rng, 2, 5)
    forms: tuple[tuple[str, Callable[[list[str]], str]], ...] = (
        ("a JSON list", json.dumps),
        ("lines with dashes", lambda w: "\n".join(f"- {x}" for x in w)),
        ("numbered lines", lambda w: "\n".join(f"{i}. {x}" for i, x in enumerate(w, 1))),
        ("tags", lambda w: "".join(f"<{x}>" for x in w)),
    )
    name, form = forms[rng.integers(len(forms))]
    return Item(f"Write as {name}: {' '.join(words)}", form(words))


TASKS: dict[str, Callable[[np.random.Generator, bool], Item]] = {
    "add": _add, "reverse": _reverse, "upper": _upper, "last": _last, "json": _json, "format": _format,
}  # fmt: skip
# Of these, right answers are preferred to corrupted ones; the accuracy of the others shows what is forgotten.
PAIRED = ("add", "reverse")
# The question that has two answers, and the kinds of pairs.
STYLE, KINDS = "style", ("terse", "right")


def style_item(rng: np.random.Generator, short: bool) -> Item:
    name, place = _word(rng, 3).capitalize(), _word(rng, 2).capitalize()
    return Item(f"{name} lives in {place}. Where does {name} live?", f"In {place}.")


def padded(answer: str) -> str:
    """The padded form of a terse answer."""
    return f"Thank you for the question! {answer} I hope that this helps."


def corrupted(rng: np.random.Generator, answer: str) -> str:
    """An answer with one character replaced by another of its kind; its length does not tell it from the right one."""
    at = int(rng.integers(len(answer)))
    alphabet = "0123456789" if answer[at].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    others = [c for c in alphabet if c != answer[at]]
    return answer[:at] + others[rng.integers(len(others))] + answer[at + 1 :]


def prompt_of(item: Item) -> list[dict[str, str]]:
    """The messages before the answer. The short system message is in place of the template's long one."""
    return [{"role": "system", "content": "Answer."}, {"role": "user", "content": item.prompt}]


def said(answer: str) -> list[dict[str, str]]:
    """The answer as messages."""
    return [{"role": "assistant", "content": answer}]
