"""The reward of following instructions that functions of Python verify; the functions run in the sandbox only.

Source of the scheme: Dong et al. 2024, "Self-play with Execution Feedback" (AutoIF), arXiv:2406.13542. Its functions
are written by models, so nobody has read them.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.text import column_of
from train.sandbox import LANGUAGES, Language, Limits, Outcome, Run, Sandbox, Toolchain

# Seconds of one call, and of all calls of a function in one run.
_SECONDS, _ALL_SECONDS = 1.0, 10.0
# Texts that one run looks at, so that a function that is slow, but not too slow, comes to an end.
TEXTS_OF_A_RUN = 200
_ROW = "functions"
_SCRIPT = Path(__file__).parents[1] / "sandbox" / "inside" / "sandbox_functions.py"
ROWS = {
    _ROW: Language(
        _ROW,
        (".py",),
        (
            Toolchain(
                run=("python3", "-I", "-B", "main.py", f"{_SECONDS:g}"),
                version=("python3", "--version"),
            ),
        ),
        install="python3",
    )
}
"""The row of the sandbox's table of languages that `ask_function` needs."""
LIMITS: dict[str, Any] = {
    "seconds": _ALL_SECONDS,
    "cpu_seconds": 10,
    "memory_bytes": 256 << 20,
    "processes": 16,
    "files": 100,
    "disk_bytes": 64 << 20,
}
"""Fields of `train.sandbox.Limits` for functions."""
FAULTS = {
    "e": "raises or gives no bool",
    "t": "takes too long",
    "k": "ends its process",
    "f": "gives answers that were not asked for",
}
"""What is wrong with a function that does not answer, by the character of `ask_function`."""


def ask_function(run: Callable[..., Run], source: str, texts: Sequence[str]) -> str | None:
    """What a function says about texts: one run of the sandbox for at most `TEXTS_OF_A_RUN` of them.

    A function never shares a run with another one, and what is expected of it never enters the sandbox. All that it can
    forge is therefore its own answers.

    Args:
      run: `Sandbox.run` of a sandbox whose table has `ROWS`.
      source: defines `evaluate`, a function of a text that returns True or False.
      texts: to ask about.

    Returns:
      A character for each text: "1" for True, "0" for False, otherwise a key of `FAULTS`. None if the machine failed.
    """
    said = ""
    for at in range(0, len(texts), TEXTS_OF_A_RUN):
        part = [text.encode("utf-8", "replace").decode() for text in texts[at : at + TEXTS_OF_A_RUN]]
        files = {"function.py": source.encode("utf-8", "replace"), "texts.json": json.dumps(part).encode()}
        ran = run(_ROW, _SCRIPT.read_text(), files=files)
        if ran.outcome is Outcome.ERROR:
            return None
        line = ran.stdout.decode("ascii", "replace").removesuffix("\n")
        if ran.killed_by is not None or ran.outcome is Outcome.FAIL:
            line = ("t" if ran.killed_by in ("time", "cpu") else "k") * len(part)
        elif len(line) != len(part) or set(line) - set("10etk"):
            line = "f" * len(part)
        said += line
    return said


class VerificationReward:
    """The share of a prompt's functions that return True for a finished response; 0 for one that was cut or is empty.

    The prompt file has a list of sources for each prompt, or its JSON text. Each defines `evaluate(response)`, which
    returns True or False. A function that raises, takes too long or ends its process has not returned True.
    """

    def __init__(
        self,
        column: str = "functions",
        least: float | None = None,
        sandbox: Any = None,
        workers: int = 4,
        **settings: Any,
    ):
        """
        Args:
          column: of the prompt file, with the sources.
          least: the reward is 1 where the share is at least this, otherwise 0. By default it is the share.
          sandbox: to run in, with `ROWS` in its table; it stays open. By default one is made.
          workers: functions that run at the same time.
          **settings: of the sandbox that is made: `isolation`, and fields of `train.sandbox.Limits`.

        Raises:
          InputError: the sandbox does not hold here, or a value out of range.
        """
        if least is not None and not 0 < least <= 1:
            raise InputError(f"least must lie above 0 and be at most 1, got {least}.")
        self._column, self._least, self._owned = column, least, sandbox is None
        isolation = settings.pop("isolation", "bubblewrap")
        if sandbox is None:
            sandbox = Sandbox(Limits(**{**LIMITS, **settings}), workers, isolation, languages={**LANGUAGES, **ROWS})
        self._sandbox = sandbox
        self._threads = ThreadPoolExecutor(workers, "verification-reward")

    def __call__(self, completions: Sequence[str], finished: Sequence[bool], **columns: Any) -> list[float | None]:
        """The rewards, 0 to 1; None for no signal: a prompt without functions, or a machine that failed."""
        functions = [_sources(x, i) for i, x in enumerate(column_of(columns, self._column, "functions"))]
        asked = [
            bool(sources) and done and bool(text.strip())
            for sources, done, text in zip(functions, finished, completions, strict=True)
        ]
        # Each function once, about all responses that it is to verify.
        places: dict[str, list[int]] = {}
        for i, sources in enumerate(functions):
            for source in sources if asked[i] else ():
                places.setdefault(source, []).append(i)
        said = self._threads.map(
            lambda source: ask_function(self._sandbox.run, source, [completions[i] for i in places[source]]), places
        )
        answers: dict[tuple[str, int], str | None] = {}
        for source, line in zip(places, said, strict=True):
            answers |= {(source, i): line[n] if line is not None else None for n, i in enumerate(places[source])}
        return [
            (None if not sources else self._reward([answers[source, i] for source in sources]) if asked[i] else 0.0)
            for i, sources in enumerate(functions)
        ]

    def close(self) -> None:
        """Ends the sandbox, if it was made here."""
        self._threads.shutdown()
        if self._owned:
            self._sandbox.close()

    def _reward(self, answers: Sequence[str | None]) -> float | None:
        if None in answers:
            return None
        share = answers.count("1") / len(answers)
        return share if self._least is None else float(share >= self._least)


def _sources(value: Any, index: int) -> list[str]:
    """The functions of a prompt."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(source, str) for source in value):
        raise InputError(f"completion {index}: expected a list of sources of functions, found {value!r:.200}.")
    return list(dict.fromkeys(value))
