"""The parts of a prompt as token ids: the frame around a context, and a haystack to hide things in.

A prompt is put together from token ids, never encoded as a whole, so that its length is exact. Every part is encoded on
its own and begins with a space: where a tokenizer splits at words first, as Qwen2.5's does, the ids are those of the
whole text, but for the end of the haystack, which may cut a sentence.
"""

import dataclasses
from typing import Literal

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

Form = Literal["completion", "chat"]
"""Plain text, or a user's message in the model's chat template. Both end in the beginning of the answer."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The noise of the passkey task (Mohtashami & Jaggi 2023, arXiv:2305.16300) and of RULER (arXiv:2404.06654)."""

# How many words an encoder remembers.
_MOST_KNOWN = 500_000
# Stands for the message where the chat template is rendered.
_MESSAGE = "QWENJAXMESSAGE"


class Encoder:
    """Encodes the parts of prompts, and remembers short ones.

    Args:
      tokenizer: of the model.
      form: how a prompt is presented.

    Raises:
      InputError: a chat template that does not show the user's message once.
    """

    def __init__(self, tokenizer: Tokenizer, form: Form = "completion"):
        self.tokenizer, self.form = tokenizer, form
        self._known: dict[str, np.ndarray] = {}
        nothing: np.ndarray = np.zeros(0, np.int32)
        self._begin, self._end = self._chat() if form == "chat" else (self._first_ids(), nothing)

    def ids(self, text: str) -> np.ndarray:
        """The int32 ids of a text; control tokens in it are plain text."""
        if (known := self._known.get(text)) is not None:
            return known
        encoded = self.tokenizer.encode(text, parse_special=False, add_special_tokens=False)
        ids = np.asarray(encoded, np.int32)
        # Words and numbers come again and again, also in other samples.
        if len(text) < 24 and len(self._known) < _MOST_KNOWN:
            self._known[text] = ids
        return ids

    def frame(self, before: str, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """What stands before and after the context.

        Args:
          before: text between the beginning and the context.
          question: text after the context.
          answer: the beginning of the answer, which the model goes on with.

        Returns:
          Two arrays of int32 ids.
        """
        begin = np.concatenate([self._begin, self.ids(before)])
        if self.form == "completion":
            return begin, self.ids(question + answer)
        return begin, np.concatenate([self.ids(question), self._end, self.ids(answer.lstrip())])

    def _first_ids(self) -> np.ndarray:
        """What the tokenizer puts before each text, such as a BOS token."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a")
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return np.asarray(whole[:at], np.int32)

    def _chat(self) -> tuple[np.ndarray, np.ndarray]:
        """The chat template's ids before and after the user's message."""
        messages = [{"role": "user", "content": _MESSAGE}]
        parts = self.tokenizer.chat_template.render(messages, add_generation_prompt=True).split(_MESSAGE)
        if len(parts) != 2:
            raise InputError(
                f"The chat template shows a user's message {len(parts) - 1} times, expected once. Use the completion "
                "form (--form completion)."
            )
        before, after = (self.tokenizer.encode(part, add_special_tokens=False) for part in parts)
        return np.asarray(before, np.int32), np.asarray(after, np.int32)


@dataclasses.dataclass(frozen=True)
class Filler:
    """A stretch of a haystack.

    Attributes:
      ids: int32 [n].
      joints: ascending places in `ids` where something may be put in: before sentences, and perhaps at the end.
    """

    ids: np.ndarray
    joints: np.ndarray

    def insert(self, needles: list[tuple[float, np.ndarray]]) -> tuple[np.ndarray, list[int]]:
        """Puts needles between sentences.

        Args:
          needles: each with its depth, in percent of the filler; those at one joint keep their order.

        Returns:
          int32 ids, and the place of each needle's first token in them.
        """
        cuts = [self._joint(depth / 100 * len(self.ids)) for depth, _ in needles]
        order = sorted(range(len(needles)), key=lambda i: cuts[i])
        parts: list[np.ndarray] = []
        places, last, size = [0] * len(needles), 0, 0
        for i in order:
            parts += [self.ids[last : cuts[i]], needles[i][1]]
            places[i] = size + cuts[i] - last
            size, last = places[i] + len(needles[i][1]), cuts[i]
        return np.concatenate([*parts, self.ids[last:]]), places

    def _joint(self, at: float) -> int:
        """The joint that is nearest to a place."""
        return int(self.joints[np.argmin(np.abs(self.joints - at))])


class Haystack:
    """A text to hide needles in, of any length: it is repeated where it is too short.

    Args:
      encoder: of the model.
      text: by default the noise sentences.
      name: of the text's file, for errors.

    Raises:
      InputError: the text is empty.
    """

    def __init__(self, encoder: Encoder, text: str | None = None, name: str = "The haystack"):
        self.text = " " + NOISE if text is None else text
        if not self.text.strip():
            raise InputError(f"{name} is empty. Give a file with text, or none for noise sentences.")
        self._ids = encoder.ids(self.text)
        self._joints = _joints(encoder.tokenizer, self._ids)
        self._random = text is not None

    def filler(self, rng: np.random.Generator, length: int) -> Filler:
        """A stretch of exactly some tokens. A real text begins at a random joint.

        Args:
          rng: random numbers.
          length: tokens.
        """
        size = len(self._ids)
        first = int(rng.choice(self._joints)) if self._random else 0
        ids = np.resize(np.roll(self._ids, -first), length)
        joints = np.sort((self._joints - first) % size)
        rounds = np.arange(-(-length // size) or 1)[:, None] * size
        every = (rounds + joints).ravel()
        return Filler(ids, every[every <= length])


def _joints(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Places between sentences, 0 among them; between words in a text that has hardly any sentences, such as code."""
    unique, inverse = np.unique(ids, return_inverse=True)
    pieces = [tokenizer.token_bytes(int(i)) for i in unique]
    begins = np.array([piece[:1].isspace() for piece in pieces])[inverse]
    ends = np.array([piece[-1:] in (b".", b"!", b"?") for piece in pieces])[inverse]
    sentences = np.flatnonzero(begins[1:] & ends[:-1]) + 1
    if len(sentences) < len(ids) / 200:
        sentences = np.flatnonzero(begins[1:]) + 1
    return np.concatenate([[0], sentences])
