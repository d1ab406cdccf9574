"""Repetition and needle tasks on bare token ids: batches to train small models on, and tests for them.

No tokenizer is needed. A needle is the marker, a key and values; a question is another marker and a key, whose values
follow. What lies around them is noise: random ids, or any tokens that the caller gives, such as the bytes of a text.
"""

import dataclasses

import numpy as np

from qwen_jax.errors import InputError
from train.evaluate.tasks import Sample

VALUES = 3
"""Values of a key."""
_RECORD = 2 + VALUES
_MARKERS = 2


@dataclasses.dataclass(frozen=True)
class IdLayout:
    """Which ids play which role: markers, then values, keys and noise.

    Attributes:
      first: the first id; those below belong to others, such as the bytes of a text.
      end: the first id that is too large, such as the size of the vocabulary.

    Raises:
      InputError: too few ids.
    """

    first: int
    end: int

    def __post_init__(self) -> None:
        if self.first < 0 or self.end - self.first < 32:
            raise InputError(
                f"Tasks on token ids need at least 32 ids, got those from {self.first} to {self.end - 1}. Use a lower "
                "first id (--first-id), or a model with a larger vocabulary."
            )

    @property
    def needle(self) -> int:
        """The marker before a key and its values."""
        return self.first

    @property
    def question(self) -> int:
        """The marker before a key that is asked for."""
        return self.first + 1

    @property
    def values(self) -> np.ndarray:
        """Ids of values: a quarter of all, at most 64."""
        begin = self.first + _MARKERS
        return np.arange(begin, begin + min((self.end - begin) // 4, 64))

    @property
    def keys(self) -> np.ndarray:
        """Ids of keys: half of the rest."""
        begin = int(self.values[-1]) + 1
        return np.arange(begin, begin + (self.end - begin) // 2)

    @property
    def noise(self) -> np.ndarray:
        """Ids of noise: the other half."""
        return np.arange(int(self.keys[-1]) + 1, self.end)

    @property
    def content(self) -> np.ndarray:
        """All ids but the markers."""
        return np.arange(self.first + _MARKERS, self.end)


Rows = tuple[np.ndarray, np.ndarray]
"""Tokens, int32 [rows, length], and loss weights, float32 [rows, length]."""


def repeated_rows(
    rng: np.random.Generator, rows: int, length: int, layout: IdLayout, shortest: int = 8, longest: int | None = None
) -> Rows:
    """Rows that repeat a sequence of random ids from their beginning to their end.

    The sequences have ids of all kinds but markers: a model that learns to repeat them also learns to look up keys.
    Their lengths are log-uniform, so that short ones, which are learned first, are as likely as long ones.

    Args:
      rng: random numbers.
      rows: how many.
      length: tokens of a row.
      layout: the ids.
      shortest, longest: lengths of sequences; the longest is by default half a row.

    Returns:
      Tokens, and weights that are 1 on the repetitions, otherwise 0.

    Raises:
      InputError: sequences that do not fit twice.
    """
    longest = length // 2 if longest is None else longest
    if not 1 <= shortest <= longest <= length // 2:
        raise InputError(
            f"Sequences of {shortest} to {longest} ids cannot be repeated in rows of {length} tokens. Expected lengths "
            f"in order, from 1 to {length // 2}."
        )
    periods = np.exp(rng.uniform(np.log(shortest), np.log(longest), rows)).round().astype(int)
    sequences = rng.choice(layout.content, (rows, longest))
    columns = np.arange(length)
    tokens = sequences[np.arange(rows)[:, None], columns % periods[:, None]].astype(np.int32)
    return tokens, (columns >= periods[:, None]).astype(np.float32)


def needle_rows(
    rng: np.random.Generator,
    rows: int,
    length: int,
    layout: IdLayout,
    needles: int = 4,
    questions: int = 1,
    depths: np.ndarray | None = None,
    noise: np.ndarray | None = None,
) -> Rows:
    """Rows with needles in noise, and questions with their answers at the end.

    Args:
      rng: random numbers.
      rows: how many.
      length: tokens of a row.
      layout: the ids.
      needles: keys in a row, all different.
      questions: how many keys are asked for, each once.
      depths: [rows], where the needle of the last question is, in percent of the row before the questions; by default
        anywhere.
      noise: int32 [rows, length], the tokens that needles and questions replace; by default random ids.

    Returns:
      Tokens, and weights that are 1 on the values of answers, otherwise 0.

    Raises:
      InputError: needles and questions do not fit.
    """
    body = length - _RECORD * questions
    places = body // _RECORD
    if not 1 <= questions <= needles <= min(places, len(layout.keys)):
        raise InputError(
            f"{needles} needles and {questions} questions of {_RECORD} tokens do not fit into {length} tokens with "
            f"{len(layout.keys)} keys. Expected 1 to as many questions as needles, and a length of at least "
            f"{_RECORD * (needles + questions)}."
        )
    tokens = (rng.choice(layout.noise, (rows, length)) if noise is None else np.array(noise)).astype(np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        # The last needle is that of the last question; it takes its depth's place.
        where = rng.permutation(places)[:needles]
        if depths is not None:
            wanted = round(float(depths[row]) / 100 * (places - 1))
            where = np.append(where[where != wanted][: needles - 1], wanted)
        # Records of one grid do not overlap; the grid begins anywhere.
        where = where * _RECORD + (rng.integers(body % _RECORD + 1) if depths is None else 0)
        keys = rng.permutation(layout.keys)[:needles]
        values = rng.choice(layout.values, (needles, VALUES))
        for key, value, at in zip(keys, values, where, strict=True):
            tokens[row, at : at + _RECORD] = [layout.needle, key, *value]
        for i in range(questions):
            j, at = needles - questions + i, body + _RECORD * i
            tokens[row, at : at + _RECORD] = [layout.question, keys[j], *values[j]]
            weights[row, at + 2 : at + _RECORD] = 1
    return tokens, weights


def needle_sample(
    rng: np.random.Generator,
    length: int,
    depth: float,
    layout: IdLayout,
    needles: int = 1,
    noise: np.ndarray | None = None,
) -> Sample:
    """A test: a prompt with needles and one question, and the values that must follow.

    Args:
      rng: random numbers.
      length: tokens of prompt and answer together.
      depth: where the needle that is asked for is, in percent of what stands before the question.
      layout: the ids.
      needles: keys in the prompt.
      noise: int32 [length], the tokens around; by default random ids.

    Raises:
      InputError: the needles do not fit.
    """
    wide = None if noise is None else noise[None]
    (tokens,), _ = needle_rows(rng, 1, length, layout, needles, 1, np.array([depth]), wide)
    prompt, answer = tokens[:-VALUES], tokens[-VALUES:]
    places = np.flatnonzero((prompt[:-2] == layout.needle) & (prompt[1:-1] == prompt[-1]))
    return Sample(prompt, (" ".join(map(str, answer.tolist())),), VALUES, "ids", int(places[0]))
