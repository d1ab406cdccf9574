"""Code is taken from the last block of a finished response, and a sandbox that fails is no signal."""

import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from train.rewards import code, load_reward


class Outcome(enum.Enum):
    PASS, FAIL, ERROR = "pass", "fail", "error"


@dataclasses.dataclass(frozen=True)
class Run:
    outcome: Outcome
    killed_by: str | None = None


@dataclasses.dataclass(frozen=True)
class Test:
    __test__ = False
    stdin: str = ""
    expected_stdout: str | None = None
    code: str | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    seconds: float = 1.0


class Sandbox:
    """Passes a test whose expected output is the source; "machine" in a test is an error of the machine, and "slow" a
    program that takes too long."""

    def __init__(self, limits: Limits = Limits(), workers: int = 8, isolation: str = "bubblewrap"):
        self.limits, self.workers, self.isolation, self.closed = limits, workers, isolation, False
        self.seen: list[tuple[str, str]] = []

    def run_tests(self, language: str, source: str, tests: Sequence[Test]) -> list[Run]:
        self.seen.append((language, source))
        wanted = [test.expected_stdout or test.code for test in tests]
        return [
            Run(
                Outcome.ERROR if x == "machine" else Outcome.PASS if x == source.strip() else Outcome.FAIL,
                "time" if x == "slow" else None,
            )
            for x in wanted
        ]

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    for replacement in (Sandbox, Test, Limits):
        monkeypatch.setattr(code, replacement.__name__, replacement)


def prints(*outputs: str) -> list[dict[str, Any]]:
    return [{"stdin": "", "expected_stdout": x, "code": None} for x in outputs]


CASES = [
    # Response, finished, tests, reward of all, share.
    ("```python\na\n```", True, prints("a", "a"), 1.0, 1.0),
    ("```python\na\n```", True, prints("a", "b"), 0.0, 0.5),
    ("```python\na\n```", False, prints("a"), 0.0, 0.0),
    ("a", True, prints("a"), 0.0, 0.0),
    ("```python\na\n```\n```python\nb\n```", True, prints("a"), 0.0, 0.0),
    ("```python\na\n```\n```python\nb", True, prints("a"), 0.0, 0.0),
    ("```\n\n```", True, prints(""), 0.0, 0.0),
    ("```python\na\n```", True, [{"code": "a"}], 1.0, 1.0),
    ("```python\na\n```", True, '[{"expected_stdout": "a"}]', 1.0, 1.0),
    # The machine failed: not a zero, unless another test says so.
    ("```python\na\n```", True, prints("a", "machine"), None, None),
    ("```python\na\n```", True, prints("b", "machine"), 0.0, None),
    ("```python\na\n```", True, [], None, None),
    ("```python\na\n```", True, None, None, None),
]


@pytest.mark.parametrize("partial", [False, True])
def test_rewards_of_code(partial: bool) -> None:
    completions, finished, tests, whole, share = map(list, zip(*CASES, strict=True))
    box = Sandbox()
    reward = load_reward("code", sandbox=box, partial=partial)
    assert reward(completions, finished, tests=tests) == (share if partial else whole)
    reward.close()  # type: ignore[attr-defined]
    assert not box.closed


def test_equal_programs_with_equal_tests_are_run_once() -> None:
    """Also in later calls, unless the machine failed or a limit was met; equal programs in two languages are two."""
    box = Sandbox()
    reward: Any = load_reward("code", sandbox=box, language_column="language")
    programs = ["a", "a", "b", "a", "a"]
    tests = [prints("a"), prints("a"), prints("a"), prints("a", "slow"), prints("machine")]
    for times in (1, 2):
        given: dict[str, Any] = {"tests": tests * 2, "language": ["python"] * 5 + ["c"] * 5}
        found = reward([f"```\n{text}\n```" for text in programs * 2], [True] * 10, **given)
        assert found == [1.0, 1.0, 0.0, 0.0, None] * 2
        # "a" and "b" with the first test once each; the other two "a" in each call.
        for language in ("python", "c"):
            assert [box.seen.count((language, f"{text}\n")) for text in "ab"] == [1 + 2 * times, 1]
    reward.close()


def test_verdicts_are_kept_for_a_later_process(tmp_path: Path) -> None:
    """With a file that was cut by a crash, too; under other limits the verdict may be another, and a share of the
    tests is another verdict than all of them."""
    file, programs = tmp_path / "run" / "verdicts.jsonl", ["a", "b", "c"]
    tests = [prints("a", "a"), prints("b", "x"), prints("machine")]

    def rewards(seconds: float = 1.0, **settings: Any) -> tuple[list[float | None], list[str]]:
        box = Sandbox(Limits(seconds))
        reward = load_reward("code", sandbox=box, verdicts=str(file), **settings)
        found = reward([f"```\n{text}\n```" for text in programs], [True] * 3, tests=tests)
        return found, sorted(source.strip() for _, source in box.seen)

    assert rewards() == ([1.0, 0.0, None], ["a", "b", "c"])
    # What is uncertain is run again.
    assert rewards() == ([1.0, 0.0, None], ["c"])
    assert rewards(seconds=2.0) == ([1.0, 0.0, None], ["a", "b", "c"])
    assert rewards(partial=True) == ([1.0, 0.5, None], ["a", "b", "c"])
    assert rewards(partial=True) == ([1.0, 0.5, None], ["c"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert rewards(partial=True) == ([1.0, 0.5, None], ["b", "c"])
    assert rewards() == ([1.0, 0.0, None], ["c"])
    assert rewards(partial=True) == ([1.0, 0.5, None], ["c"])


def test_the_sandbox_that_is_made() -> None:
    reward: Any = load_reward("code", language_column="language", workers=3, isolation="none", seconds=2.0)
    box = reward._sandbox
    assert (box.limits.seconds, box.workers, box.isolation) == (2.0, 3, "none")
    assert reward(["```\nx\n```"] * 2, [True] * 2, tests=[prints("x")] * 2, language=["c", "go"]) == [1.0, 1.0]
    assert sorted(box.seen) == [("c", "x\n"), ("go", "x\n")]
    reward.close()
    assert box.closed


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no limit megabytes"):
        load_reward("code", megabytes=3)
    with pytest.raises(InputError, match="setting workers is of a sandbox that is made"):
        load_reward("code", sandbox=Sandbox(), workers=3)
    reward = load_reward("code", sandbox=Sandbox())
    for tests in ("{", [{"stdin": "a"}], [{"code": 3}], 5, [{"code": "a", "stdin": "b"}]):
        with pytest.raises(InputError, match="completion 0: expected"):
            reward(["```\na\n```"], [True], tests=[tests])
    with pytest.raises(InputError, match="column tests"):
        reward([""], [True])
