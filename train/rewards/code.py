"""The reward of code that passes tests, run in the sandbox."""

import inspect
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.text import column_of, last_code_block
from train.sandbox import Limits, Sandbox, Test

_TEST_KEYS = ({"stdin", "expected_stdout"}, {"expected_stdout"}, {"code"})


class CodeReward:
    """1 for a finished response whose last fenced code block passes all tests of its prompt, otherwise 0.

    Nothing else of the response is run, and a response without a closed block gets 0. A test that the sandbox could not
    run gives no signal, unless another test has failed already.

    The prompt file has a list of tests for each prompt, or its JSON text: {"stdin": ..., "expected_stdout": ...}, or
    {"code": ...} with assertions. See `train.sandbox`.
    """

    def __init__(
        self,
        column: str = "tests",
        language: str = "python",
        language_column: str | None = None,
        partial: bool = False,
        sandbox: Any = None,
        **sandbox_settings: Any,
    ):
        """
        Args:
          column: of the prompt file, with the tests.
          language: of the code; see `train.sandbox.LANGUAGES`.
          language_column: of the prompt file, with the language of each prompt instead.
          partial: the reward is the share of passed tests.
          sandbox: to run in; it stays open. By default one is made.
          **sandbox_settings: of that one: `workers`, `isolation`, and the fields of `train.sandbox.Limits`.

        Raises:
          InputError: the sandbox does not hold here, or does not have a setting.
        """
        self._column, self._language, self._language_column = column, language, language_column
        self._partial, self._owned = partial, sandbox is None
        if sandbox is not None and sandbox_settings:
            raise InputError(f"The setting {min(sandbox_settings)} is of a sandbox that is made; one is given.")
        self._sandbox = _make_sandbox(sandbox_settings) if sandbox is None else sandbox
        workers = sandbox_settings.get("workers") or getattr(self._sandbox, "workers", None) or 8
        self._threads = ThreadPoolExecutor(int(workers), "code-reward")

    def __call__(self, completions: Sequence[str], finished: Sequence[bool], **columns: Any) -> list[float | None]:
        """The rewards, 0 to 1, or None for no signal."""
        tests = [_tests(x, i) for i, x in enumerate(column_of(columns, self._column, "tests"))]
        if self._language_column is None:
            languages: Sequence[Any] = [self._language] * len(completions)
        else:
            languages = column_of(columns, self._language_column, "languages")
        return list(self._threads.map(self._reward, completions, finished, tests, languages))

    def close(self) -> None:
        """Ends the sandbox, if it was made here."""
        self._threads.shutdown()
        if self._owned:
            self._sandbox.close()

    def _reward(self, text: str, ended: bool, tests: list[dict[str, str]], language: str) -> float | None:
        block = last_code_block(text) if ended else None
        if not tests:
            return None
        if block is None or not block[1].strip():
            return 0.0
        runs = self._sandbox.run_tests(language, block[1], [Test(**test) for test in tests])
        if len(runs) != len(tests):
            return None
        outcomes = [run.outcome.name for run in runs]
        if not self._partial and "FAIL" in outcomes:
            return 0.0
        return None if "ERROR" in outcomes else outcomes.count("PASS") / len(outcomes)


def _make_sandbox(settings: Mapping[str, Any]) -> Sandbox:
    own = {name: settings[name] for name in ("workers", "isolation") if name in settings}
    limits = {name: value for name, value in settings.items() if name not in own}
    known = inspect.signature(Limits).parameters
    if unknown := sorted(set(limits) - set(known)):
        raise InputError(f"The sandbox has no limit {unknown[0]}. It has: {', '.join(known)}.")
    return Sandbox(Limits(**limits), **own)


def _tests(value: Any, index: int) -> list[dict[str, str]]:
    """The tests of a prompt, without keys that are None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"completion {index}: expected a list of tests, found {value[:80]!r}.") from None
    if value is None:
        return []
    found = []
    for test in value if isinstance(value, (list, tuple)) else [value]:
        kept = {key: x for key, x in test.items() if x is not None} if isinstance(test, Mapping) else None
        if kept is None or set(kept) not in _TEST_KEYS or not all(isinstance(x, str) for x in kept.values()):
            raise InputError(
                f"completion {index}: expected tests with the texts stdin and expected_stdout, or with the text code; "
                f"found {test!r:.200}."
            )
        found.append(kept)
    return found
