"""The reward of a right mathematical answer, compared by math-verify in processes of its own."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.text import answer_span, column_of
from train.rewards.workers import WorkerPool

# Numbers beside one another, which math-verify adds as if they were mixed: 41 42 would be 83. A fraction may follow,
# and groups of three digits are one number.
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?: |\\[,;: ]|~)\d{3})+(?!\d)")
_GAP = r"(?:[\s~$]|\\[,;:! ]|\\(?:q?quad|(?:thin|med|thick)?space)\b|\{\}|\\(?:text|mathrm|mbox)\{\s*\})"
_BESIDE = re.compile(
    rf"\d{_GAP}+\d+(?![\d\s]*/)"
    # In braces that are no arguments of a command and no exponent.
    rf"|(?<![A-Za-z\]}}^_{{])\{{+\s*\d+\s*\}}+{_GAP}*\{{*\s*\d|(?<![A-Za-z\d_^])\d+{_GAP}*\{{+\s*\d"
)
# Words such as units, which math-verify drops.
_WORDS = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox)\{([^{}]*)\}")


class MathReward:
    """1 for a finished response whose final answer equals that of the prompt file, 0 for another one.

    The final answer is the content of the last `\\boxed{...}`, or what follows the last marker; nothing else is read,
    and a response without one gets 0. The answer of the prompt file is read in the same way where it has a box or a
    marker, and taken whole otherwise. A comparison that fails or takes too long is no signal, nor is an answer of the
    prompt file that cannot be read.

    Equal is what math-verify says: numbers to six decimals, expressions by their value, sets without order, a per cent
    sign with or without. Answers with two numbers beside one another are wrong.
    """

    def __init__(
        self,
        column: str = "answer",
        markers: Sequence[str] = (),
        after: str = "",
        workers: int = 4,
        seconds: float = 10.0,
        recycle: int = 200,
        memory_bytes: int = 2 << 30,
        longest: int = 1000,
    ):
        """
        Args:
          column: of the prompt file, with the right answer, a text or a number.
          markers: texts that announce an answer, such as "The answer is" or "####"; by default only a box does.
          after: only what follows the last occurrence of this text is read, such as "</think>".
          workers: processes that compare.
          seconds: of a comparison.
          recycle: comparisons after which a process is replaced.
          memory_bytes: address space of a process.
          longest: characters of an answer; a longer one is wrong.

        Raises:
          InputError: math-verify is not installed, or a value out of range.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise InputError("The reward math needs the package math-verify. Install it: pip install 'qwen-jax[post]'.")
        sizes = {"workers": workers, "recycle": recycle, "longest": longest, "memory_bytes": memory_bytes}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if not 0 < seconds < 3600:
            raise InputError(f"seconds must lie between 0 and 3600, got {seconds}.")
        if isinstance(markers, str):
            markers = (markers,)
        if not all(markers):
            raise InputError("markers has an empty text. Give texts such as 'The answer is'.")
        self._column, self._markers, self._after, self._longest = column, tuple(markers), after, longest
        script = Path(__file__).with_name("math_worker.py")
        limits = str(int(seconds) + 1), str(memory_bytes)
        self._pool = WorkerPool(script, limits, workers, seconds, recycle)

    def __call__(self, completions: Sequence[str], finished: Sequence[bool], **columns: Any) -> list[float | None]:
        """The rewards: 1, 0, or None for no signal."""
        answers = column_of(columns, self._column, "the right answers")
        rewards: list[float | None] = []
        asked: dict[tuple[str, str], list[int]] = {}
        for i, (text, ended, answer) in enumerate(zip(completions, finished, answers, strict=True)):
            gold = self._gold(answer, i)
            span = answer_span(text, self._markers, self._after) if ended else None
            if gold is None or span is None:
                rewards.append(None if gold is None else 0.0)
            elif span == gold:
                rewards.append(1.0)
            else:
                plain = _plain(span)
                rewards.append(0.0)
                if len(span) <= self._longest and plain is not None:
                    asked.setdefault((_plain(gold) or gold, plain), []).append(i)
        # Each pair once: the responses to a prompt often agree.
        replies = self._pool.ask([{"gold": gold, "answer": span} for gold, span in asked])
        for reply, places in zip(replies, asked.values(), strict=True):
            equal = reply.get("equal") if isinstance(reply, dict) else None
            for i in places:
                rewards[i] = float(equal) if isinstance(equal, bool) else None
        return rewards

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def processes(self) -> list[int]:
        """The ids of the processes that are alive."""
        return self._pool.processes()

    def _gold(self, answer: Any, index: int) -> str | None:
        """The right answer as a text; None if there is none."""
        if answer is None:
            return None
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            raise InputError(
                f"the column {self._column} has {answer!r} for completion {index}; expected a text or a number."
            )
        if not isinstance(answer, str):
            return repr(answer)
        found = answer_span(answer, self._markers)
        if found is None and r"\boxed{" not in answer:
            found = answer.strip().removesuffix(".").strip()
        return found or None


def _plain(span: str) -> str | None:
    """A span with grouped digits joined; None for one that is no answer, because it has two numbers."""
    joined = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), span)
    words, rest = "".join(_WORDS.findall(joined)), _WORDS.sub("", joined)
    in_both = re.search(r"\d", words) and re.search(r"\d", rest)
    return None if in_both or _BESIDE.search(joined) else joined
