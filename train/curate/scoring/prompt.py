"""Documents and questions as token ids: the document first, then each question, then the opening of an answer."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.text import unused_characters
from train.curate.scoring.questions import Question, Reward

_SYSTEM = "You rate documents. You are strict and consistent."
_OPENING = "Here is a document, or its beginning and its end.\n<document>\n"
_CLOSING = "\n</document>\n"
_GAP = "\n\n[the middle of the document is left out]\n\n"
# Characters that are tokenised for each token that is kept, on either side of what is left out. Few texts have longer
# tokens, and of those less is kept.
_CHARACTERS = 8


@dataclasses.dataclass(frozen=True)
class Cut:
    """The token ids of a document, cut to a budget.

    Attributes:
      ids: int32, not empty.
      cut: whether the middle of the document is left out.
    """

    ids: np.ndarray
    cut: bool


class Prompt:
    """Turns documents into what a model reads.

    The chat template is rendered once, around the places of the document and of the question. Control tokens that a
    document spells are plain text.

    Attributes:
      head: ids before the document.
      closing: ids after the document, before a question.
      questions: ids of each question, with the opening of the answer.
      answers: ids of each question's answers, one token each.
      max_tokens: of a document.
    """

    def __init__(self, tokenizer: Tokenizer, questions: Sequence[Question], max_tokens: int):
        """
        Args:
          tokenizer: with a chat template.
          questions: as from `check_questions`.
          max_tokens: tokens of a document that are read; of a longer one, as many from its beginning as from its end.

        Raises:
          InputError: no chat template, too few tokens, or an answer that is not one token.
        """
        self._tokenizer, self.max_tokens = tokenizer, max_tokens
        self._gap = self._encode(_GAP)
        if max_tokens < len(self._gap) + 2:
            raise InputError(f"max_tokens must be at least {len(self._gap) + 2}, got {max_tokens}.")
        rendered = [self._render(question) for question in questions]
        self.head, self.closing = (np.array(self._encode(text, True), np.int32) for text in rendered[0][:2])
        self.questions = tuple(np.array(self._encode(parts[2], True), np.int32) for parts in rendered)
        self.answers = tuple(tuple(self._answer(question, text) for text in question.answers) for question in questions)

    @property
    def longest(self) -> int:
        """Tokens that a document and all questions take at most."""
        return self.max_tokens + len(self.head) + len(self.closing) + sum(map(len, self.questions))

    @property
    def longest_text(self) -> int:
        """Tokens that a document and one question take at most: the last position that the model sees."""
        return self.max_tokens + len(self.head) + len(self.closing) + max(map(len, self.questions))

    def documents(self, texts: Sequence[str]) -> list[Cut]:
        """The ids of documents that are not empty.

        A document that is much longer than the budget is cut before it is tokenised.

        Raises:
          InputError: a text with lone surrogates.
        """
        side = _CHARACTERS * self.max_tokens // 2
        parts = [(text,) if len(text) <= 2 * side else (text[:side], text[-side:]) for text in texts]
        encoded = iter(
            self._tokenizer.encode_batch(
                [part for pair in parts for part in pair], parse_special=False, add_special_tokens=False
            )
        )
        return [self._cut(*(next(encoded) for _ in pair)) for pair in parts]

    def whole(self, document: np.ndarray, question: int) -> np.ndarray:
        """The ids of a conversation with one question, as a model reads it by itself.

        Args:
          document: ids.
          question: its index.
        """
        return np.concatenate([self.head, document, self.closing, self.questions[question]])

    def _cut(self, first: list[int], last: list[int] | None = None) -> Cut:
        if last is None:
            if len(first) <= self.max_tokens:
                return Cut(np.array(first, np.int32), False)
            last = first
        kept = self.max_tokens - len(self._gap)
        ids = [*first[: kept - kept // 2], *self._gap, *last[-(kept // 2) :]]
        return Cut(np.array(ids, np.int32), True)

    def _render(self, question: Question) -> tuple[str, str, str]:
        """The text before a document, after it, and with a question."""
        template = self._tokenizer.chat_template
        text = question.request if isinstance(question, Reward) else question.text
        place, after = unused_characters(2, text + template.source())
        if isinstance(question, Reward):
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": place}]
            rendered = template.render(messages, add_generation_prompt=False)
            rendered = rendered.replace(place, place + after)
        else:
            content = f"{_OPENING}{place}{_CLOSING}{after}{text}"
            messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
            rendered = template.render(messages, add_generation_prompt=True)
        if rendered.count(place) != 1 or rendered.count(after) != 1:
            raise InputError("The chat template does not show a message once, as it is. Use that of Qwen2.5.")
        head, _, rest = rendered.partition(place)
        closing, _, end = rest.partition(after)
        return head, closing, end

    def _encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self._tokenizer.encode(text, parse_special=parse_special, add_special_tokens=False) if text else []

    def _answer(self, question: Question, text: str) -> int:
        ids = self._encode(text)
        if len(ids) != 1:
            raise InputError(
                f"The answer {text!r} to {question.name} is {len(ids)} tokens of this tokenizer, expected one. Give a "
                "model whose tokenizer has it, such as Qwen2.5-0.5B-Instruct, or ask for other answers."
            )
        return ids[0]
