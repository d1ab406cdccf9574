"""Vectors of texts, to compare what they mean."""

import base64
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from qwen_jax.errors import InputError


@runtime_checkable
class Embedder(Protocol):
    """What gives vectors of texts; `OpenAIGenerator` and `EngineGenerator` do. It is called from one event loop.

    Attributes:
      model: names the weights. Vectors of one model are never taken for another's.
      concurrency: requests that it answers well at the same time.
    """

    model: str
    concurrency: int

    async def embed(self, text: str) -> list[float] | None:
        """The vector of a text; None if it cannot have one, such as one that is too long.

        Raises:
          GeneratorDownError: nothing has answered for longer than it may.
        """
        ...


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """The cosine of the angle between two vectors, rounded to six decimals; 0 where one is zero.

    Raises:
      InputError: the vectors have different lengths.
    """
    if len(first) != len(second):
        raise InputError(
            f"Vectors of {len(first)} and {len(second)} numbers cannot be compared. Give one model, and a new folder."
        )
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return round(float(a @ b) / norms, 6) if norms else 0.0


def packed(vector: Sequence[float]) -> str:
    """A vector as text, in single precision."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def unpacked(text: str) -> list[float]:
    """The vector of `packed`."""
    found: list[float] = np.frombuffer(base64.b64decode(text), "<f4").tolist()
    return found
