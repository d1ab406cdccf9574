"""Texts of requests as token ids, by the rules of lm-eval's `hf` backend, whose scores they reproduce.

A context that is too long for the model loses its first tokens. A text without a context begins with the token that
the tokenizer puts before texts, and where there is none, as for Qwen2.5, with the end-of-text token.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

# Qwen2's tokenizer splits a text before a space between letters, so that both sides may be encoded on their own.
_CUT = re.compile(r"\n\n[^\n]*?[A-Za-z](?= [A-Za-z])")
# How many characters of pieces are remembered.
_MOST_KNOWN = 50_000_000


class RequestEncoder:
    """Encodes contexts and continuations, and remembers their pieces: few-shot prompts have most of them in common.

    Attributes:
      tokenizer: as given.
      prefix: the token that stands for an empty context.
      truncated: how many requests have lost a part of their context so far.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, prefix: int | None = None):
        """
        Args:
          tokenizer: of the model.
          context_length: tokens that the model reads.
          prefix: token that stands for an empty context; by default the first one that the tokenizer puts before a
            text, or the end-of-text token.
        """
        self.tokenizer, self.context_length, self.truncated = tokenizer, context_length, 0
        self.prefix = (*tokenizer.prefix, tokenizer.eos_id)[0] if prefix is None else prefix
        self._prefix_text = tokenizer.decode([self.prefix])
        spaces = any(" " in token or "\n" in token for token in tokenizer.control_ids)
        self._cuts = bool(getattr(tokenizer, "splits_as_qwen2", False)) and not spaces
        # Whether the tokenizer puts something before texts.
        self._adds = len(tokenizer.encode("")) > 0
        self._known: dict[str, list[int]] = {}
        self._characters = 0
        # The context of the pair before, in two parts: the answers to a question come one after the other.
        self._last: tuple[str, list[int], str, list[int]] = ("", [], "", [])

    def text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. What the tokenizer puts before texts is not put there twice."""
        special = add_special_tokens and not text.startswith(self._prefix_text)
        if not self._cuts or (special and self._adds):
            return self.tokenizer.encode(text, add_special_tokens=special)
        return [token for piece in _pieces(text) for token in self._piece(piece)]

    def _piece(self, text: str) -> list[int]:
        if text not in self._known:
            self._remember([text])
        return self._known[text]

    def _remember(self, pieces: Sequence[str]) -> None:
        """Encodes pieces, which are not known, on all cores."""
        if self._characters > _MOST_KNOWN:
            self._known, self._characters = {}, 0
        encoded = self.tokenizer.encode_batch(pieces, add_special_tokens=False)
        self._known.update(zip(pieces, encoded, strict=True))
        self._characters += sum(map(len, pieces))

    def prepare(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Encodes what `pair` will need for contexts and continuations, on all cores: `pair` is faster then."""
        if not self._cuts or self._adds:
            return
        wanted: dict[str, None] = {}
        last, tail = "", ""
        for given, after in pairs:
            context, continuation = _without_end_spaces(given, after)
            if context and context != last:
                cut = self._last_cut(context)
                last, tail = context, context[cut:]
                wanted |= dict.fromkeys(_pieces(context[:cut])) if cut else {}
                wanted |= dict.fromkeys(_pieces(tail))
            wanted |= dict.fromkeys(_pieces(tail + continuation if context else continuation))
        with contextlib.suppress(InputError):  # `pair` says which text it is that cannot be encoded.
            self._remember([piece for piece in wanted if piece not in self._known])

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and a continuation.

        White space at the end of the context counts as the beginning of the continuation. Both are encoded as one text,
        and the continuation has what comes after as many tokens as the context alone has.

        Raises:
          InputError: the continuation has no token, or more than the model's context.
        """
        context, continuation = _without_end_spaces(context, continuation)
        if context:
            if context != self._last[0]:
                cut = self._last_cut(context)
                head = self.text(context[:cut]) if cut else []
                self._last = context, head, context[cut:], self.text(context[cut:])
            _, head, tail, end = self._last
            ids = head + end, self.text(tail + continuation)[len(end) :]
        else:
            after = self.text(continuation, add_special_tokens=False)
            ids = ([self.prefix], after) if after[:1] != [self.prefix] else (after[:1], after[1:])
        if not 0 < len(ids[1]) <= self.context_length:
            raise InputError(
                f"The continuation {continuation[:60]!r} has {len(ids[1])} tokens; expected 1 to "
                f"{self.context_length}, the model's context."
            )
        # The last token of a continuation is not read.
        room = self.context_length + 1 - len(ids[1])
        self.truncated += len(ids[0]) > room
        return ids[0][-room:], ids[1]

    def _last_cut(self, context: str) -> int:
        """Where the last part of a context begins, which is encoded with each continuation; 0 if that is all of it."""
        if not self._cuts or self._adds:
            return 0
        at = context.rfind(" ", 0, len(context) - 1)
        while at > 0:
            around = context[at - 1] + context[at + 1]
            if around.isascii() and around.isalpha():
                return at
            at = context.rfind(" ", 0, at)
        return 0

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text in windows of the model's context, each token of it in one continuation.

        The first window begins with the prefix token. Every later one is filled up with what comes before it, so that
        the last one has a whole context too.
        """
        ids, length = self.text(text), self.context_length
        found = []
        for begin in range(0, len(ids), length):
            end = min(begin + length, len(ids))
            before = ids[max(end - 1 - length, 0) : begin]
            found.append((before if begin else [self.prefix], ids[begin:end]))
        return found

    def prompt(self, text: str, max_tokens: int) -> list[int]:
        """The ids of a prompt, without the first ones where they leave no room for the answer.

        Raises:
          InputError: the answer alone has no room, or the prompt is empty.
        """
        if max_tokens >= self.context_length:
            raise InputError(
                f"An answer of {max_tokens} tokens leaves no room for a prompt in the model's context of "
                f"{self.context_length}. The task needs a model with a longer context (a task of lm-eval: or a smaller "
                "max_gen_toks in its YAML)."
            )
        ids = self.text(text)
        room = self.context_length - max_tokens
        self.truncated += len(ids) > room
        if not ids:
            raise InputError("A prompt is empty. Expected at least one token.")
        return ids[-room:]


def _without_end_spaces(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of the context goes to the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _pieces(text: str) -> Iterator[str]:
    """The parts of a text that Qwen2's tokenizer encodes alike alone and together."""
    begin = 0
    for match in _CUT.finditer(text):
        yield text[begin : match.end()]
        begin = match.end()
    yield text[begin:]


def stop_cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some stop strings."""
    for end in stop:
        if end:
            text = text.split(end)[0]
    return text
