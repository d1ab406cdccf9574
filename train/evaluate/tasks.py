"""Prompts that hide something in a long context, of an exact length in tokens: passkey, needles, and RULER's six tasks
that need no text.

The templates, numbers and answer lengths are those of RULER (Hsieh et al. 2024, arXiv:2404.06654), and for the passkey
those of Mohtashami & Jaggi 2023 (arXiv:2305.16300). Words and keys come from lists of our own, so scores are
comparable between models that were measured here, and only roughly with published ones.
"""

import dataclasses
import itertools
import string
import uuid
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from qwen_jax.errors import InputError
from train.evaluate.score import Metric
from train.evaluate.text import Encoder, Filler, Haystack
from train.evaluate.words import pairs, words

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
      haystack: that of passkey and needle; RULER's tasks have their own.
    """

    encoder: Encoder
    noise: Haystack
    haystack: Haystack

    @classmethod
    def of(cls, encoder: Encoder, text: str | None = None, name: str = "The haystack") -> "Source":
        """The parts of prompts.

        Args:
          encoder: of the model's tokenizer.
          text: to hide things in; by default noise sentences.
          name: of the text's file, for errors.

        Raises:
          InputError: the text is empty.
        """
        noise = Haystack(encoder)
        return cls(encoder, noise, noise if text is None else Haystack(encoder, text, name))


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
    key = _absent(source.haystack, lambda: str(rng.integers(10_000, 100_000)))
    frame = source.encoder.frame(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information there.\n",
        "\nWhat is the pass key?",
        " The pass key is",
    )
    needle = source.encoder.ids(f" The pass key is {key}. Remember it. {key} is the pass key.")
    new_tokens = 16
    room = _room("passkey", length, new_tokens, frame, len(needle))
    context, (place,) = source.haystack.filler(rng, room).insert([(depth, needle)])
    return _sample(frame, context, (key,), new_tokens, "number", place)


@dataclasses.dataclass(frozen=True)
class Needles:
    """Keys with values, hidden in a text; the values of some keys are asked for.

    Attributes:
      haystack: "text" (the source's), "noise", or "needles": other keys with values.
      kind: of keys and values: words and numbers of seven digits, or both UUIDs.
      needles: keys in the text.
      asked: how many of them are asked for. The first is at the depth that is asked for, the others anywhere.
      new_tokens: tokens to generate; for several keys, for each.
      name: for errors.

    Raises:
      InputError: more keys asked for than there are.

    Source: RULER (arXiv:2404.06654), section 3.1; `niah_single_1`, `niah_multikey_2` and `niah_multikey_3`.
    """

    haystack: Literal["text", "noise", "needles"] = "text"
    kind: Literal["number", "uuid"] = "number"
    needles: int = 1
    asked: int = 1
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
        values = self._values(rng, self.needles, text)
        frame = encoder.frame(*self._template(keys[: self.asked]))
        needles = [self._needle(encoder, *pair) for pair in zip(keys, values, strict=True)]
        room = _room(self.name, length, self.new_tokens, frame, sum(map(len, needles)))
        if self.haystack == "needles":
            filler = self._others(source, room, {*keys}, {*values}, rng)
        else:
            filler = text.filler(rng, room)
        depths = [depth, *rng.uniform(0, 100, self.needles - 1).tolist()]
        context, places = filler.insert(list(zip(depths, needles, strict=True)))
        return _sample(frame, context, tuple(values[: self.asked]), self.new_tokens, "contained", places[0])

    def _template(self, keys: Sequence[str]) -> tuple[str, str, str]:
        kind = self.kind
        if len(keys) == 1:
            return (
                f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz "
                f"you about the {kind} afterwards.\n",
                f"\nWhat is the special magic {kind} for {keys[0]} mentioned in the provided text?",
                f" The special magic {kind} for {keys[0]} mentioned in the provided text is",
            )
        listed = ", ".join(keys[:-1]) + f", and {keys[-1]}"
        return (
            f"Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz "
            f"you about the {kind}s afterwards.\n",
            f"\nWhat are all the special magic {kind}s for {listed} mentioned in the provided text?",
            f" The special magic {kind}s for {listed} mentioned in the provided text are",
        )

    def _needle(self, encoder: Encoder, key: str, value: str) -> Ids:
        return encoder.ids(f" One of the special magic {self.kind}s for {key} is: {value}.")

    def _keys(self, rng: np.random.Generator, count: int) -> list[str]:
        return pairs(rng, count) if self.kind == "number" else [_uuid(rng) for _ in range(count)]

    def _values(self, rng: np.random.Generator, count: int, text: Haystack) -> list[str]:
        values: dict[str, None] = {}
        while len(values) < count:
            draw = (lambda: _uuid(rng)) if self.kind == "uuid" else (lambda: str(rng.integers(10**6, 10**7)))
            values[_absent(text, draw)] = None
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
                    return _joined(source, rng, lines, room - size)
                lines.append(line)
                keys.add(key)
                values.add(value)
                size += len(line)


def variable_tracking(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A chain of five assignments in noise; all variables of one value are asked for. The depth has no effect.

    The arguments and errors are those of `passkey`.

    Source: RULER (arXiv:2404.06654), section 3.2, `vt`: one chain, four hops, one example before the question.
    """
    encoder, count = source.encoder, 5
    names = _distinct(10, lambda: "".join(rng.choice(list(string.ascii_uppercase), 5)))
    # The value in the example is another one.
    shown, value = (str(x) for x in rng.choice(np.arange(10_000, 100_000), 2, replace=False))

    def lines(names: Sequence[str], value: str) -> list[str]:
        return [f" VAR {name} = {f'VAR {names[i - 1]}' if i else value}." for i, name in enumerate(names)]

    def template(value: str) -> tuple[str, str, str]:
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            f" Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
            f"assigned the value {value}, they are:",
        )

    # One example with its answer, in little noise.
    example = "".join(f"{line}{source.noise.text}" for line in lines(names[count:], shown))
    before, question, answer = template(shown)
    solved = f"{before}{example}{question}{answer} {' '.join(names[count:])}\n\n"
    # The task itself.
    before, question, answer = template(value)
    frame = encoder.frame(solved + before, question, answer)
    needles = [encoder.ids(line) for line in lines(names[:count], value)]
    new_tokens = 30
    room = _room("vt", length, new_tokens, frame, sum(map(len, needles)))
    depths = np.sort(rng.uniform(0, 100, count)).tolist()
    context, _ = source.noise.filler(rng, room).insert(list(zip(depths, needles, strict=True)))
    return _sample(frame, context, tuple(names[:count]), new_tokens, "contained")


def common_words(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A numbered list of words; the ten most common are asked for. The depth has no effect.

    The arguments and errors are those of `passkey`. Common words occur 30 times and the others 3 times; 6 times and
    once below 4,096 tokens, or where the tokenizer makes the former too long.

    Source: RULER (arXiv:2404.06654), section 3.3, `cwe`: one example before the question.
    """
    encoder, top, new_tokens = source.encoder, 10, 120
    before = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    question = "\nQuestion: What are the 10 most common words in the above list?"
    answer = " Answer: The top 10 words that appear most often in the list are:"
    # Words of the example, of the answer, and others: more than fit, as an entry has at least three tokens.
    pool = words(rng, 2 * top + 20 + length // (9 if length >= 4096 else 3))
    example, common, others = pool[: top + 20], pool[top + 20 : 2 * top + 20], pool[2 * top + 20 :]
    shown = [word for i, word in enumerate(example) for _ in range(3 if i < top else 1)]
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(rng.permutation(shown).tolist(), 1))
    solved = f"{before}{listed}{question}{answer} {' '.join(example[:top])}\n\n"
    frame = encoder.frame(solved + before, question, answer)
    # Nothing that is asked for may be a part of another word.
    others = [word for word in others if not any(key in word for key in common)]
    sizes = np.array([len(encoder.ids(f" {word}")) for word in [*common, *others]])
    # numbers[n] is the tokens of the first n numbers; there are as many as could fit.
    numbers, shortest, room = [0], int(sizes.min()), length - new_tokens - sum(map(len, frame))
    while numbers[-1] + shortest * len(numbers) <= room or len(numbers) <= 33 * top:
        numbers.append(numbers[-1] + len(encoder.ids(f" {len(numbers)}.")))

    def size(often: int, seldom: int, count: int) -> int:
        """Tokens of a list with some of the other words."""
        entries = top * often + count * seldom
        return int(numbers[entries] + often * sizes[:top].sum() + seldom * sizes[top : top + count].sum())

    # At least as many other words as common ones.
    often, seldom = (30, 3) if length >= 4096 and size(30, 3, top) <= room else (6, 1)
    _room("cwe", length, new_tokens, frame, size(often, seldom, top))
    most = min(len(others), (len(numbers) - 1 - top * often) // seldom)
    count = _largest(most, lambda count: size(often, seldom, count) <= room)
    # The list, in random order.
    entries = rng.permutation([*common * often, *others[:count] * seldom]).tolist()
    parts = [encoder.ids(part) for i, word in enumerate(entries, 1) for part in (f" {i}.", f" {word}")]
    context = _joined(source, rng, parts, room - size(often, seldom, count)).ids
    return _sample(frame, context, tuple(common), new_tokens, "contained")


def frequent_words(source: Source, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """Coded words whose frequencies fall with the square of their rank; the first three are asked for.

    The arguments and errors are those of `passkey`; the depth has no effect. The most frequent of all is "...".

    Source: RULER (arXiv:2404.06654), section 3.3, `fwe`: six letters, alpha 2.
    """
    encoder, new_tokens = source.encoder, 50
    frame = encoder.frame(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words.",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    )
    vocabulary = _distinct(max(length // 50, 8), lambda: "".join(rng.choice(list(string.ascii_lowercase), 6)))
    parts = [encoder.ids(f" {word}") for word in ["...", *vocabulary]]
    sizes = np.array(list(map(len, parts)))
    # Shares of a zeta distribution: those of the first N ranks sum to less than 1.
    share = 6 / np.pi**2 / np.arange(1, len(parts) + 1) ** 2

    def counts(total: int) -> np.ndarray:
        return np.floor(total * share).astype(int)

    def clear(total: int) -> bool:
        """Whether the three can be told apart: each occurs more often than the next."""
        occurs = counts(total)
        return bool(occurs[3] and (np.diff(occurs[1:5]) < 0).all())

    fewest = next(total for total in itertools.count(1) if clear(total))
    room = _room("fwe", length, new_tokens, frame, int(counts(fewest) @ sizes)) + int(counts(fewest) @ sizes)
    total = _largest(2 * room, lambda total: int(counts(total) @ sizes) <= room)
    while not clear(total):
        total -= 1
    occurs = counts(total)
    order = rng.permutation(np.repeat(np.arange(len(parts)), occurs)).tolist()
    context = _joined(source, rng, [parts[i] for i in order], room - int(occurs @ sizes)).ids
    return _sample(frame, context, tuple(vocabulary[:3]), new_tokens, "contained")


RULER: dict[str, Task] = {
    "niah_single_1": Needles("noise", name="niah_single_1"),
    "niah_multikey_2": Needles("needles", name="niah_multikey_2"),
    "niah_multikey_3": Needles("needles", "uuid", name="niah_multikey_3"),
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
}
"""RULER's tasks that need no text."""

WITH_DEPTH = ("passkey", "needle", "niah_single_1", "niah_multikey_2", "niah_multikey_3")
"""Tasks that hide what is asked for at a depth."""


def _sample(
    frame: tuple[Ids, Ids],
    context: Ids,
    references: tuple[str, ...],
    new: int,
    metric: Metric,
    place: int | None = None,
) -> Sample:
    before, after = frame
    return Sample(
        np.concatenate([before, context, after]),
        references,
        new,
        metric,
        None if place is None else len(before) + place,
    )


def _room(task: str, length: int, new_tokens: int, frame: tuple[Ids, Ids], needles: int) -> int:
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


def _joined(source: Source, rng: np.random.Generator, parts: list[Ids], missing: int) -> Filler:
    """Parts as a filler, with noise before them that makes the length exact."""
    pad = source.noise.filler(rng, missing).ids
    starts = np.cumsum([len(pad), *map(len, parts)])
    return Filler(np.concatenate([pad, *parts]), starts)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to `most` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _absent(text: Haystack, draw: Callable[[], str]) -> str:
    """A random value that the text does not contain."""
    return next(value for value in iter(draw, None) if value not in text.text)


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
