"""The reward of code that passes tests, run in the sandbox."""

import dataclasses
import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.files import append_record, read_records
from train.rewards.text import column_of, last_code_block
from train.sandbox import Limits, Sandbox, Test

_TEST_KEYS = ({"stdin", "expected_stdout"}, {"expected_stdout"}, {"code"})
# Verdicts that are remembered.
_KEPT = 1 << 16


class CodeReward:
    """1 for a finished response whose last fenced code block passes all tests of its prompt, otherwise 0.

    Nothing else of the response is run, and a response without a closed block gets 0. A test that the sandbox could not
    run gives no signal, unless another test has failed already.

    Equal programs with equal tests and limits are run once, as long as their verdict is remembered. A program that met
    a limit of the sandbox, or that the machine failed to run, is run again at the next call.

    The prompt file has a list of tests for each prompt, or its JSON text: {"stdin": ..., "expected_stdout": ...}, or
    {"code": ...} with assertions. See `train.sandbox`.
    """

    def __init__(
        self,
        column: str = "tests",
        language: str = "python",
        language_column: str | None = None,
        partial: bool = False,
        verdicts: str | Path | None = None,
        sandbox: Any = None,
        **sandbox_settings: Any,
    ):
        """
        Args:
          column: of the prompt file, with the tests.
          language: of the code; see `train.sandbox.LANGUAGES`.
          language_column: of the prompt file, with the language of each prompt instead.
          partial: the reward is the share of passed tests.
          verdicts: a file that verdicts are kept in, so that a later process knows them; a run of GRPO has one in its
            output. By default they are remembered in memory alone.
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
        self._known: OrderedDict[str, float] = OrderedDict()
        self._file = None if verdicts is None else Path(verdicts)
        if self._file is not None and self._file.exists():
            kept = read_records(self._file, "key")[-_KEPT:]
            self._known.update((x["key"], x["reward"]) for x in kept if isinstance(x.get("reward"), float))

    def __call__(self, completions: Sequence[str], finished: Sequence[bool], **columns: Any) -> list[float | None]:
        """The rewards, 0 to 1, or None for no signal."""
        tests = [_tests(x, i) for i, x in enumerate(column_of(columns, self._column, "tests"))]
        if self._language_column is None:
            languages: Sequence[Any] = [self._language] * len(completions)
        else:
            languages = column_of(columns, self._language_column, "languages")
        found: list[float | None] = [None] * len(completions)
        # The places of each program with its tests.
        places = dict[str, list[int]]()
        programs = dict[str, tuple[str, str, list[dict[str, str]]]]()
        # The same program is worth something else if a part of the tests counts, or under other limits.
        settings = self._partial, dataclasses.asdict(self._sandbox.limits)
        for i, (text, ended) in enumerate(zip(completions, finished, strict=True)):
            block = last_code_block(text) if ended else None
            if not tests[i]:
                continue
            if block is None or not block[1].strip():
                found[i] = 0.0
                continue
            program = languages[i], block[1], tests[i]
            text = to_json([*program, *settings])
            key = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
            places.setdefault(key, []).append(i)
            programs[key] = program
        rewards: dict[str, float | None] = {key: self._known[key] for key in programs if key in self._known}
        new = [key for key in programs if key not in rewards]
        judged = self._threads.map(self._reward, *zip(*(programs[key] for key in new), strict=True)) if new else ()
        for key, (reward, certain) in zip(new, judged, strict=True):
            rewards[key] = reward
            if certain and reward is not None:
                self._known[key] = reward
                if self._file is not None:
                    self._file.parent.mkdir(parents=True, exist_ok=True)
                    append_record(self._file, {"key": key, "reward": reward})
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        for key, where in places.items():
            for i in where:
                found[i] = rewards[key]
        return found

    def close(self) -> None:
        """Ends the sandbox, if it was made here."""
        self._threads.shutdown()
        if self._owned:
            self._sandbox.close()

    def _reward(self, language: str, source: str, tests: list[dict[str, str]]) -> tuple[float | None, bool]:
        """The reward of a program, and whether it would be the same again: no limit of the sandbox was met."""
        runs = self._sandbox.run_tests(language, source, [Test(**test) for test in tests])
        if len(runs) != len(tests):
            return None, False
        outcomes = [run.outcome.name for run in runs]
        certain = "ERROR" not in outcomes and all(run.killed_by is None for run in runs)
        if not self._partial and "FAIL" in outcomes:
            return 0.0, certain
        return None if "ERROR" in outcomes else outcomes.count("PASS") / len(outcomes), certain


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
