"""Where texts are in their grammars: the masks of what may come next, and the processor time that this may take."""

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from qwen_jax.errors import InputError

BURST_SECONDS, TOKEN_SECONDS = 1.0, 0.01
"""Processor time that the grammar of one text may take: a number at once, and one more for each of its tokens.

Usual schemas take 0.1 ms a token."""
# After a call for several texts that took long, each is timed by itself for twice as many tokens, and then four times.
_TIMED = 8
# Every so many words of a mask tell that it allows a token, nearly always.
_SAMPLED = 16
# With two threads llguidance takes 0.9 ms for 64 masks at once, and 0.8 ms for one after the other.
_WORTH_EXECUTOR = 4
# Of the pool that makes masks.
_MOST_THREADS = 8
_PLACE = re.compile(r"(?:at \d+\(\d+\): )?")


@functools.cache
def thread_count() -> int:
    """How many threads make masks."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def lexer_count() -> int:
    """How many lexers of a grammar are worth it: one for each thread that makes masks."""
    return thread_count() if thread_count() >= _WORTH_EXECUTOR else 1


class Work:
    """The processor time that the grammar of one text has taken. Copies of a matcher share it.

    Args:
      limited: whether there is a budget.
    """

    def __init__(self, limited: bool = True) -> None:
        self.seconds, self.tokens, self._limited = 0.0, 0, limited
        self._slow = self._timed_until = 0

    def time_next(self) -> None:
        """Has the next tokens timed, each time for twice as many: see `Together`."""
        self._slow += 1
        self._timed_until = self.tokens + (_TIMED << min(self._slow, 32))

    @property
    def timed(self) -> bool:
        """Whether the text's next mask or token must be timed."""
        return self.tokens < self._timed_until

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what the thread does. Raises InputError at the end of work that exceeds the budget."""
        # Time of the processor: other threads, and a machine that is busy, cost a text nothing.
        start = time.thread_time()
        try:
            yield
        finally:
            self.seconds += time.thread_time() - start
        budget = BURST_SECONDS + TOKEN_SECONDS * self.tokens
        if self._limited and self.seconds > budget:
            raise InputError(
                f"The grammar is too much work: {self.seconds:.1f} s after {self.tokens} tokens, and at most "
                f"{budget:.1f} s are allowed. Make it less ambiguous, so that a text is read in one way only."
            )


class Matcher:
    """Where a text is in its grammar. One thread at a time may use it.

    Attributes:
      end_ids: allowed where the text may end.
      last_seconds: processor time of the last mask.
      lexer: a number of what llguidance locks while the matcher works: matchers with the same one wait for one another.
    """

    def __init__(
        self,
        matcher: Any,
        allowed_W: np.ndarray,
        end_ids: tuple[int, ...] = (),
        work: Work | None = None,
        lexer: int = 0,
    ) -> None:
        self._matcher, self._allowed_W, self._work, self.lexer = matcher, allowed_W, work or Work(), lexer
        self.end_ids, self.last_seconds = end_ids, 0.0

    def fill(self, mask_W: np.ndarray) -> None:
        """Writes which ids may come next.

        After the text is complete these are the end ids; if the engine has none, nothing is allowed.

        Args:
          mask_W: int32 [words], contiguous: bit i of word j is the id 32 j + i.

        Raises:
          InputError: the grammar became too complex to go on, took too much time, or no token goes on.
        """
        if mask_W.shape != self._allowed_W.shape or mask_W.dtype != np.int32 or not mask_W.flags.c_contiguous:
            raise ValueError(
                f"Expected a contiguous int32 mask of {self._allowed_W.shape}, got {mask_W.dtype} {mask_W.shape}."
            )
        if not mask_W.flags.writeable:
            raise ValueError("The mask is read-only.")
        before = self._work.seconds
        with self._work.counted():
            if not self._matcher.is_error():
                self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        self.last_seconds = self._work.seconds - before
        np.bitwise_and(mask_W, self._allowed_W, out=mask_W)
        self._check_filled(bool(mask_W.any()))

    def _check_filled(self, some: bool) -> None:
        """Raises InputError if no token goes on. `some`: whether the mask allows any."""
        self._check()
        if not (some or self.ended):
            raise InputError("The grammar allows no token here: what it asks for cannot be written.")

    def accept(self, token: int) -> None:
        """Appends a token.

        Raises:
          InputError: it is not allowed, and the matcher cannot be used any more; or the grammar took too much time.
        """
        self._work.tokens += 1
        with self._work.counted():
            accepted = self._matcher.consume_token(token)
        if not accepted:
            self._check()

    @property
    def timed(self) -> bool:
        """Whether it must go on by itself, not by `Together`, because grammars that it was with took long."""
        return self._work.timed

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing but an end id may follow, or one has followed.

        In rare grammars this is known only after `fill`.
        """
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    def copy(self) -> "Matcher":
        """A matcher at the same place, which goes on by itself."""
        return Matcher(self._matcher.deep_copy(), self._allowed_W, self.end_ids, self._work, self.lexer)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"The text cannot go on in its grammar: {readable(self._matcher.get_error())}.")


class Together:
    """Matchers of many texts that make their masks, or go on, in one call of llguidance, in threads of its own.

    One after the other with few threads, or if all wait for the same lexer: that takes less than waking threads.

    No text's time is known then. None takes longer than all: if the call took less than half of `TOKEN_SECONDS`, mask
    and token of each text are within what a token adds to its budget. Otherwise all texts of the call must go on by
    themselves for a while, where their time is counted, and each time for twice as many tokens. So a grammar that takes
    long now and then escapes the count only as often as the logarithm of its tokens.

    Args:
      threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @functools.cached_property
    def _executor(self) -> Any:
        return llguidance_module().LLExecutor(self._threads)

    def _in_threads(self, matchers: Sequence[Matcher]) -> list[int] | None:
        """The order in which threads take the matchers, or None if they are not worth it."""
        if self._threads < _WORTH_EXECUTOR:
            return None
        lexers = [matcher.lexer for matcher in matchers]
        if len(set(lexers)) == 1:
            return None
        # Each thread begins with a part of the list: those with the same lexer are together.
        return sorted(range(len(lexers)), key=lexers.__getitem__)

    def fill(self, matchers: Sequence[Matcher], masks_MW: np.ndarray) -> list[InputError | None]:
        """Writes which ids may come next in each text, and returns what `Matcher.fill` raises, in order.

        Args:
          matchers: of different texts, none of them `timed`.
          masks_MW: int32, contiguous, a row for each.
        """
        allowed_W = matchers[0]._allowed_W
        if masks_MW.shape != (len(matchers), *allowed_W.shape) or masks_MW.dtype != np.int32:
            raise ValueError(f"Expected an int32 mask for each of {len(matchers)} texts, got {masks_MW.shape}.")
        if not (masks_MW.flags.c_contiguous and masks_MW.flags.writeable):
            raise ValueError("The masks must be contiguous and writeable.")
        order, address, size = self._in_threads(matchers), masks_MW.ctypes.data, masks_MW[0].nbytes
        with _timing(matchers):
            if order is None:
                for i, matcher in enumerate(matchers):
                    matcher._matcher.unsafe_compute_mask_ptr(address + i * size, size)
            else:
                places = [(matchers[i]._matcher, i) for i in order]
                self._executor.unsafe_compute_mask_ptr(places, address, size, len(masks_MW))
        if all(matcher._allowed_W is allowed_W for matcher in matchers):
            np.bitwise_and(masks_MW, allowed_W, out=masks_MW)
        else:
            for matcher, mask_W in zip(matchers, masks_MW, strict=True):
                np.bitwise_and(mask_W, matcher._allowed_W, out=mask_W)
        # Nearly all masks have many tokens: a sample of the words tells.
        some_M: Any = masks_MW[:, ::_SAMPLED].any(axis=1).tolist()
        errors: list[InputError | None] = []
        for matcher, mask_W, some in zip(matchers, masks_MW, some_M, strict=True):
            fine = (some or mask_W.any()) and not matcher._matcher.is_error()
            errors.append(None if fine else _error(matcher._check_filled, bool(mask_W.any())))
        return errors

    def accept(self, matchers: Sequence[Matcher], tokens: Sequence[int]) -> list[InputError | None]:
        """Appends a token to each text, and returns what `Matcher.accept` raises, in order.

        Args:
          matchers: of different texts, none of them `timed`.
          tokens: ids.
        """
        for matcher in matchers:
            matcher._work.tokens += 1
        order = self._in_threads(matchers)
        pairs = [(matchers[i]._matcher, tokens[i]) for i in order or range(len(matchers))]
        with _timing(matchers):
            if order is None:
                accepted = [one.consume_token(token) for one, token in pairs]
            else:
                accepted = self._executor.consume_token_par(pairs)
        errors: list[InputError | None] = [None] * len(matchers)
        for i, ok in zip(order or range(len(matchers)), accepted, strict=True):
            if not ok:
                errors[i] = _error(matchers[i]._check)
        return errors


@contextlib.contextmanager
def _timing(matchers: Sequence[Matcher]) -> Iterator[None]:
    """Has each matcher timed by itself from now on if they take long together."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    # Neither is less than the processor time of one text. The first one is short if there are many threads, the second
    # one if other processes take the processor meanwhile.
    if min(time.perf_counter() - wall, time.process_time() - processor) > TOKEN_SECONDS / 2:
        for matcher in matchers:
            matcher._work.time_next()


def _error(check: Callable[..., None], *args: object) -> InputError | None:
    """What a check raises."""
    try:
        check(*args)
    except InputError as error:
        return error
    return None


def llguidance_module() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise InputError(
            "Structured output needs llguidance, which is not installed: pip install 'qwen-jax[serve]'"
        ) from None
    return llguidance


def readable(problem: str) -> str:
    """An error of llguidance on one line, without its inner state."""
    lines = [line.strip() for line in problem.replace("<non-verbose/>", "").splitlines() if line.strip()]
    first = lines[0] if lines else "unknown reason"
    if first.startswith("NoExtension"):
        return "no text matches it"
    if first.startswith("panic"):
        return "it is too large"
    # Regular expressions: the reason is below a picture of the place.
    for reason in (line.removeprefix("error: ") for line in lines if line.startswith("error: ")):
        first = f"{_PLACE.match(first)[0]}invalid regular expression: {reason}"  # type: ignore[index]
    # One line of the user's was put behind "start:".
    first = re.sub(r"^at 1\(8\): |failed to compile JSON schema: ", "", first)
    return first[:300].rstrip(".")
