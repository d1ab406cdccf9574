"""A gate for the form of a response: a wrong form makes the whole reward 0, a right one earns nothing by itself."""

import re
from collections.abc import Sequence

from qwen_jax.errors import InputError
from train.rewards.text import last_box


class FormatGate:
    """1 for a finished response of the right form, otherwise 0. `train.rewards.combine` multiplies by it.

    All conditions that are set must hold.
    """

    gate = True

    def __init__(self, tags: Sequence[str] = (), boxed: bool = False, pattern: str = ""):
        """
        Args:
          tags: such as ("think", "answer"): the response is `<think>...</think><answer>...</answer>` with white space
            only between and around, each tag once, with something in it.
          boxed: the response has exactly one `\\boxed{...}`, with something in it.
          pattern: a regular expression that the whole response matches; a dot matches a line break too. It runs in this
            process: one that backtracks without end stops the run.

        Raises:
          InputError: no condition, a wrong tag, or a pattern that is no regular expression.
        """
        if isinstance(tags, str):
            tags = (tags,)
        if not (tags or boxed or pattern):
            raise InputError("The reward format needs one of its settings tags, boxed and pattern.")
        for tag in tags:
            if not re.fullmatch(r"[\w-]+", tag):
                raise InputError(f"A tag is a name such as think, got {tag!r}.")
        if len(set(tags)) < len(tags):
            raise InputError(f"The tags {', '.join(tags)} are not all different.")
        self._tags, self._boxed = tuple(tags), boxed
        try:
            self._pattern = re.compile(pattern, re.DOTALL) if pattern else None
        except re.error as error:
            raise InputError(f"The pattern {pattern!r} is no regular expression: {error}.") from None

    def __call__(self, completions: Sequence[str], finished: Sequence[bool]) -> list[float | None]:
        """The gates: 1 or 0."""
        return [float(ended and self._is_right(text)) for text, ended in zip(completions, finished, strict=True)]

    def _is_right(self, text: str) -> bool:
        if self._tags and not self._in_tags(text):
            return False
        if self._boxed:
            box = last_box(text)
            if box is None or text.count(r"\boxed{") != 1 or not box[1].strip():
                return False
        return self._pattern is None or self._pattern.fullmatch(text) is not None

    def _in_tags(self, text: str) -> bool:
        """Whether the tags follow one another and cover the text. No search backtracks."""
        at = 0
        for tag in self._tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return False
            start, end = text.find(opening), text.find(closing)
            if start < at or end < start or text[at:start].strip() or not text[start + len(opening) : end].strip():
                return False
            at = end + len(closing)
        return not text[at:].strip()
