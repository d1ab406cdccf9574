"""The host's side of generation: growing completions, end ids and stop strings."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen_jax.inference.sampling import NOT_FINITE
from qwen_jax.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """The completion of one prompt.

    Attributes:
      prompt_token_ids: the prompt as the model read it.
      token_ids: the new tokens, including the end-of-text token if one ended the text.
      text: the new tokens as text, without special tokens and without the stop string; None if the engine has no
        tokenizer.
      finish_reason: "stop" (an end-of-text token or a stop string), "length", or "error".
      logprobs: log-probability of each new token, if asked for.
      error: why there are no further tokens, if `finish_reason` is "error"; otherwise None.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[float] | None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a streamed text, made of whole characters. The last piece has the completion."""

    text: str
    completion: Completion | None = None


@dataclasses.dataclass(frozen=True)
class Ending:
    """What ends a completion.

    Attributes:
      eos_token_ids: ids that end it.
      stop: strings that end it and are cut off.
      max_new_tokens: at most this many tokens.
      include_stop: the string or id that ends it stays in the text. Special tokens are left out as ever.
    """

    eos_token_ids: frozenset[int]
    stop: tuple[str, ...]
    max_new_tokens: int
    include_stop: bool = False


class Row:
    """The growing completion of one prompt.

    Args:
      prompt: token ids.
      ending: what ends it.
      tokenizer: for text, or None.
      logprobs: whether log-probabilities are kept.
      incremental: decode the text token by token, to stream it. Stop strings need that too.
      dtype: compute dtype, for error messages.
      min_tokens: stop strings in the text of the first so many tokens do not end it, as in vLLM.
    """

    def __init__(
        self,
        prompt: list[int],
        ending: Ending,
        tokenizer: Tokenizer | None,
        *,
        logprobs: bool,
        incremental: bool,
        dtype: str,
        min_tokens: int = 0,
    ):
        self.prompt, self.tokenizer, self._dtype, self._min_tokens = prompt, tokenizer, dtype, min_tokens
        self._eos_token_ids, self._max_new_tokens = ending.eos_token_ids, ending.max_new_tokens
        self._include_stop = ending.include_stop
        self.tokens: list[int] = []
        self.logprobs: list[float] | None = [] if logprobs else None
        self.finish_reason = ""
        self.stopped_by: str | int | None = None
        self.error: str | None = None
        self._text: _GrowingText | _UnstoppedText | None = None
        if tokenizer is not None and ending.stop:
            self._text = _GrowingText(tokenizer, ending.stop, ending.include_stop)
        elif tokenizer is not None and incremental:
            self._text = _UnstoppedText(tokenizer)
        self._given = 0

    def add(self, tokens: np.ndarray, logprobs: np.ndarray | None) -> None:
        """Appends new tokens, up to the one that ends the completion."""
        for n, token in enumerate(tokens.tolist()):
            self.push(token, None if logprobs is None else float(logprobs[n]))

    def push(self, token: int, logprob: float | None = None) -> None:
        """Appends a new token, unless the completion has ended.

        Args:
          token: its id, or `NOT_FINITE`.
          logprob: its log-probability, if the completion keeps them.
        """
        if self.finish_reason:
            return
        if token == NOT_FINITE:
            self.finish_reason, self.error = "error", self._not_finite()
            return
        self.tokens.append(token)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
        ended = token in self._eos_token_ids
        early = len(self.tokens) <= self._min_tokens
        hidden = ended and not self._include_stop
        stopped = self._text is not None and self._text.push(token, hidden=hidden, early=early)
        if ended or stopped:
            self.finish_reason = "stop"
            self.stopped_by = token if ended or self._text is None else self._text.stopped_by
        elif len(self.tokens) == self._max_new_tokens:
            self.finish_reason = "length"

    def _not_finite(self) -> str:
        if self._dtype == "float16":
            advice = "A number overflowed float16, which ends at 65,504: use bfloat16 (--dtype bfloat16) or float32."
        else:
            advice = "The weights hold NaN, infinity or values that overflow: check the checkpoint (qwen-jax verify)."
        return f"The model's logits after {len(self.tokens)} new tokens are not finite. {advice}"

    def new_text(self) -> str:
        """Text that no later token can change, and that was not returned before."""
        if self._text is None:
            return ""
        text = self._text.new()
        self._given += len(text)
        return text

    def rest(self, text: str | None) -> str:
        """What `new_text` has not returned of the finished completion's text."""
        return (text or "")[self._given :]

    def completion(self) -> Completion:
        """Returns the finished completion."""
        text: str | None = None
        if self._text is not None:
            text = self._text.finish()
        elif self.tokenizer is not None:
            hidden = not self._include_stop and self.tokens[-1:] and self.tokens[-1] in self._eos_token_ids
            text = self.tokenizer.decode(self.tokens[:-1] if hidden else self.tokens, skip_special_tokens=True)
        return Completion(self.prompt, self.tokens, text, self.finish_reason, self.logprobs, self.error)


class _UnstoppedText:
    """The text of a growing sequence of tokens without special tokens, where there are no stop strings."""

    stopped_by = ""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._pieces: list[str] = []
        self._given = 0

    def push(self, token: int, hidden: bool, early: bool = False) -> bool:
        """As `_GrowingText.push`."""
        if not hidden:
            self._pieces.append(self._decoder.push((token,)))
        return False

    def new(self) -> str:
        """As `_GrowingText.new`."""
        first, self._given = self._given, len(self._pieces)
        return "".join(self._pieces[first:])

    def finish(self) -> str:
        """As `_GrowingText.finish`."""
        return "".join(self._pieces) + self._decoder.flush()


class _GrowingText:
    """The text of a growing sequence of tokens, cut at the first stop string.

    The text has no special tokens. A stop string that contains one is searched in the text with special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], include: bool):
        special = [tokenizer.id_to_token(i) for i in sorted(tokenizer.special_ids)]
        with_special = [text for text in stop if any(token in text for token in special)]
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._text = ""
        self._given = 0
        self._cut = False
        self._include = include
        self.stopped_by = ""
        self._stop = [text for text in stop if text not in with_special]
        # The text with special tokens, and the lengths of both texts before each token.
        self._raw_decoder = StreamDecoder(tokenizer) if with_special else None
        self._raw = ""
        self._raw_stop = with_special
        self._raw_lengths: list[int] = []
        self._lengths: list[int] = []

    def push(self, token: int, hidden: bool, early: bool = False) -> bool:
        """Appends a token; returns whether the text now ends with a stop string, which is cut off.

        Args:
          token: its id.
          hidden: it is an end-of-text token, which the text leaves out.
          early: no stop string is looked for.
        """
        before, raw_before = len(self._text), len(self._raw)
        if not hidden:
            self._text += self._decoder.push([token])
        cuts = [] if early else _find(self._text, self._stop, before)
        if self._raw_decoder is not None:
            self._raw_lengths.append(raw_before)
            self._lengths.append(before)
            self._raw += self._raw_decoder.push([token])
        if self._raw_decoder is not None and not early:
            raw_cuts = _find(self._raw, self._raw_stop, raw_before)
            cuts += [(self._visible(at), self._visible(end), text) for at, end, text in raw_cuts]
        if cuts:
            at, end, self.stopped_by = min(cuts)
            self._text, self._cut = self._text[: end if self._include else at], True
        return self._cut

    def _visible(self, at: int) -> int:
        """Position in the text without special tokens, of a position in the text with them."""
        i = bisect.bisect_right(self._raw_lengths, at) - 1
        after = self._lengths[i + 1] if i + 1 < len(self._lengths) else len(self._text)
        return min(self._lengths[i] + at - self._raw_lengths[i], after)

    def new(self) -> str:
        """The text since the last call, without an end that may become a stop string and be cut off."""
        ready = len(self._text) if self._include else _beginning(self._text, self._stop)
        if self._raw_stop and self._raw and not self._include:
            ready = min(ready, self._visible(_beginning(self._raw, self._raw_stop)))
        first, self._given = self._given, max(ready, self._given)
        return self._text[first : self._given]

    def finish(self) -> str:
        """The whole text, with U+FFFD for an unfinished last character."""
        return self._text if self._cut else self._text + self._decoder.flush()


def _find(text: str, stop: Sequence[str], before: int) -> list[tuple[int, int, str]]:
    """Where stop strings begin and end that end after the first `before` characters."""
    found = [(text.find(one, max(0, before - len(one) + 1)), one) for one in stop]
    return [(at, at + len(one), one) for at, one in found if at >= 0]


def _beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the text up to an end that is the beginning of a stop string."""
    held = 0
    for one in stop:
        sizes = range(min(len(one) - 1, len(text)), 0, -1)
        held = max(held, next((size for size in sizes if text.endswith(one[:size])), 0))
    return len(text) - held
