"""Prompts that hide something in a long context, of an exact length in tokens: passkey and needles.

The templates, numbers and answer lengths are those of RULER (Hsieh et al. 2024, arXiv:2404.06654), and for the passkey
those of Mohtashami & Jaggi 2023 (arXiv:2305.16300). Words and keys come from lists of our own, so scores are
comparable between models that were measured here, and only roughly with published ones. `train.evaluate.ruler` has all
tasks of RULER.
"""

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from qwen_jax.errors import InputError
from train.evaluate.score import Metric
from train.evaluate.text import Encoder, Filler, Haystack
from train.evaluate.words import pairs

if TYPE_CHECKING:
    from train.evaluate.questions import Questions

Ids = np.ndarray


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its expected answer.

    Attributes:
      prompt: int32 ids, `length - new_tokens` of them.
      references: what the answer should contain.
      new_tokens: tokens to generate.
      metric: how the answer is scored.
      place: where the first token of what is asked for is in the prompt; None if it is in many places.
    """

    prompt: Ids
    references: tuple[str, ...]
    new_tokens: int
    metric: Metric
    place: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What prompts are made of.

    Attributes:
      encoder: of the model's tokenizer.
      noise: the haystack of noise sentences.
      haystack: of the user's text, or that of noise sentences too.
      questions: with their documents, by the name of the task that asks them.
    """

    encoder: Encoder
    noise: Haystack
    haystack: Haystack
    questions: Mapping[str, "Questions"] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        text: str | None = None,
        name: str = "The haystack",
        questions: Mapping[str, "Questions"] | None = None,
    ) -> "Source":
        """The parts of prompts.

        Args:
          encoder: of the model's tokenizer.
          text: to hide things in; by default noise sentences.
          name: of the text's file, for errors.
          questions: by the name of the task that asks them.

        Raises:
          InputError: the text is empty.
        """
        noise = Haystack(encoder)
        return cls(encoder, noise, noise if text is None else Haystack(encoder, text, name), questions or {})


Task = Callable[[Source, int, float, np.random.Generator], Sample]
"""Makes a sample from a source, a length in tokens (prompt and answer), a depth in percent, and random numbers."""


def passkey(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A number of five digits, said twice in one place.

    Args:
      source: what the prompt is made of.
      length: tokens of prompt and answer together.
      depth: where the number is, in percent of the haystack.
      rng: random numbers.

    Raises:
      InputError: a length that cannot hold the task.

    Source: Mohtashami & Jaggi 2023 (arXiv:2305.16300), section 4.3.
    """
    key = absent(source.haystack, lambda: str(rng.integers(10_000, 100_000)))
    frame = source.encoder.frame(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information there.\n",
        "\nWhat is the pass key?",
        " The pass key is",
    )
    needle = source.encoder.ids(f" The pass key is {key}. Remember it. {key} is the pass key.")
    new_tokens = 16
    room = room_left("passkey", length, new_tokens, frame, len(needle))
    context, (place,) = source.haystack.filler(rng, room).insert([(depth, needle)])
    return make_sample(frame, context, (key,), new_tokens, "number", place)


@dataclasses.dataclass(frozen=True)
class Needles:
    """Keys with values, hidden in a text; the values of some keys are asked for.

    Attributes:
      haystack: "text" (the source's), "noise", or "needles": other keys with values.
      kind: of values: numbers of seven digits, or UUIDs.
      keys: what keys are.
      needles: keys in the text.
      asked: how many of them are asked for. The first is at the depth that is asked for, the others anywhere.
      values: of each key. All values of the keys that are asked for are expected.
      new_tokens: tokens to generate.
      name: for errors.

    Raises:
      InputError: more keys asked for than there are.

    Source: RULER (arXiv:2404.06654), section 3.1; the tasks `niah_*`.
    """

    haystack: Literal["text", "noise", "needles"] = "text"
    kind: Literal["number", "uuid"] = "number"
    keys: Literal["word", "uuid"] = "word"
    needles: int = 1
    asked: int = 1
    values: int = 1
    new_tokens: int = 128
    name: str = "needle"

    def __post_init__(self) -> None:
        if not 1 <= self.asked <= self.needles:
            raise InputError(
                f"Expected 1 to {self.needles} keys to ask for, of {self.needles} in the text; got {self.asked}."
            )

    def __call__(self, source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
        """Makes a sample; the arguments are those of `passkey`."""
        encoder, text = source.encoder, source.haystack if self.haystack == "text" else source.noise
        keys = self._keys(rng, self.needles)
        values = self._values(rng, self.needles * self.values, text)
        frame = encoder.frame(*self._template(keys[: self.asked]))
        # The values of a key follow each other.
        of_values = [key for key in keys for _ in range(self.values)]
        needles = [self._needle(encoder, *pair) for pair in zip(of_values, values, strict=True)]
        room = room_left(self.name, length, self.new_tokens, frame, sum(map(len, needles)))
        if self.haystack == "needles":
            filler = self._others(source, room, {*keys}, {*values}, rng)
        else:
            filler = text.filler(rng, room)
        depths = [depth, *rng.uniform(0, 100, len(needles) - 1).tolist()]
        context, places = filler.insert(list(zip(depths, needles, strict=True)))
        return make_sample(
            frame, context, tuple(values[: self.asked * self.values]), self.new_tokens, "contained", places[0]
        )

    def _template(self, keys: Sequence[str]) -> tuple[str, str, str]:
        kind = self.kind
        if len(keys) * self.values == 1:
            return (
                f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz "
                f"you about the {kind} afterwards.\n",
                f"\nWhat is the special magic {kind} for {keys[0]} mentioned in the provided text?",
                f" The special magic {kind} for {keys[0]} mentioned in the provided text is",
            )
        listed = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
        return (
            f"Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz "
            f"you about the {kind}s afterwards.\n",
            f"\nWhat are all the special magic {kind}s for {listed} mentioned in the provided text?",
            f" The special magic {kind}s for {listed} mentioned in the provided text are",
        )

    def _needle(self, encoder: Encoder, key: str, value: str) -> Ids:
        return encoder.ids(f" One of the special magic {self.kind}s for {key} is: {value}.")

    def _keys(self, rng: np.random.Generator, count: int) -> list[str]:
        return pairs(rng, count) if self.keys == "word" else [_uuid(rng) for _ in range(count)]

    def _values(self, rng: np.random.Generator, count: int, text: Haystack) -> list[str]:
        values: dict[str, None] = {}
        while len(values) < count:
            draw = (lambda: _uuid(rng)) if self.kind == "uuid" else (lambda: str(rng.integers(10**6, 10**7)))
            values[absent(text, draw)] = None
        return list(values)

    def _others(self, source: Source, room: int, keys: set[str], values: set[str], rng: np.random.Generator) -> Filler:
        """Keys and values that are not asked for, after less than a sentence of noise that makes the length exact."""
        lines: list[Ids] = []
        size = 0
        while True:
            # Keys must differ from each other, too: they are drawn together, about as many as fit.
            count = (room - size) // (len(lines[-1]) if lines else 24) + 8
            new = [key for key in self._keys(rng, min(count + len(keys), 200_000)) if key not in keys]
            for key, value in zip(new, self._values(rng, len(new), source.noise), strict=True):
                if value in values:
                    continue
                line = self._needle(source.encoder, key, value)
                if size + len(line) > room:
                    return joined(source, rng, lines, room - size)
                lines.append(line)
                keys.add(key)
                values.add(value)
                size += len(line)


def make_sample(
    frame: tuple[Ids, Ids],
    context: Ids,
    references: tuple[str, ...],
    new: int,
    metric: Metric,
    place: int | None = None,
) -> Sample:
    """A sample of a context between a frame; `place` is in the context."""
    before, after = frame
    return Sample(
        np.concatenate([before, context, after]),
        references,
        new,
        metric,
        None if place is None else len(before) + place,
    )


def room_left(task: str, length: int, new_tokens: int, frame: tuple[Ids, Ids], needles: int) -> int:
    """Tokens left for the haystack.

    Raises:
      InputError: none are left.
    """
    needed = sum(map(len, frame)) + needles + new_tokens
    if length < needed:
        raise InputError(
            f"The task {task} needs at least {needed:,} tokens with this tokenizer ({new_tokens} of them for the "
            f"answer), got a length of {length:,}. Give greater --lengths."
        )
    return length - needed


def joined(source: Source, rng: np.random.Generator, parts: list[Ids], missing: int) -> Filler:
    """Parts as a filler, with noise before them that makes the length exact."""
    pad = source.noise.filler(rng, missing).ids
    starts = np.cumsum([len(pad), *map(len, parts)])
    return Filler(np.concatenate([pad, *parts]), starts)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to `most` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def absent(text: Haystack, draw: Callable[[], str]) -> str:
    """A random value that the text does not contain."""
    return next(value for value in iter(draw, None) if value not in text.text)


def distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """Distinct random texts, in the order in which they were drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
