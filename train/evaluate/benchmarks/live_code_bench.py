"""LiveCodeBench: problems of programming contests by date, with tests on standard input or of a method."""

import base64
import binascii
import datetime
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.benchmarks.lines import Ids, check
from train.evaluate.benchmarks.passes import ProgramTask, Sampling, Trial, sampling_text
from train.evaluate.task import DataFile, Item, Message
from train.rewards.text import last_code_block
from train.sandbox import Outcome, Run, Test

# Tests that run before a program that has failed one is given up.
_BATCH = 8
_FILES = ("test.jsonl", *(f"test{n}.jsonl" for n in range(2, 7)))
PRELUDE = """import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random
import re, statistics, string, sys
from bisect import *
from collections import *
from copy import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from string import *
from typing import *
from builtins import *
sys.setrecursionlimit(50000)
"""
"""What a program may use without importing it, as in the benchmark. The last import undoes what hides built-in ones."""
# The operations in a pickle of one text. Nothing else is read, and nothing is unpickled.
_TEXT_PICKLE = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


class LiveCodeBench(ProgramTask):
    """Problems of a release in a window of dates. A program passes if it passes all public and private tests."""

    citation = "Jain et al. 2024, LiveCodeBench, arXiv:2403.07974"
    max_tokens = 4096
    _ask = "Solve this problem of a programming contest in Python.\n\n{question}\n\n{form}"
    _stdin_form = (
        "Read the input from standard input and write the answer to standard output. Give the whole program in one "
        "Markdown code block."
    )
    _method_form = (
        "Complete this class. Give the whole class, with all imports that it needs, in one Markdown code block.\n\n"
        "```python\n{starter}\n```"
    )

    def __init__(
        self,
        name: str,
        release: int = 6,
        start: str = "",
        end: str = "",
        sampling: Sampling = Sampling(),  # noqa: B008
    ):
        """
        Args:
          name: of the task.
          release: its number, 1 to 6; release n has the first n files.
          start: the first date of a contest, such as "2023-05-01"; "" for no bound.
          end: the date after the last one, in the same form.
          sampling: of the answers.

        Raises:
          InputError: a release that there is not, or a date that is none.
        """
        super().__init__(name, True, sampling)
        if not 1 <= release <= len(_FILES):
            raise InputError(f"LiveCodeBench has the releases 1 to {len(_FILES)}, not {release}.")
        for date in (start, end):
            if date and date_of(date) != date:
                raise InputError(f"A date is such as 2024-08-01, got {date!r}.")
        self.files = tuple(
            DataFile(f"live_code_bench/{file}", source=f"livecodebench/code_generation_lite: {file}", licence="CC")
            for file in _FILES[:release]
        )
        self._start, self._end, self._release = start, end, release
        self._paths: dict[str, Path] = {}

    def template(self) -> str:
        return (
            f"{self._ask}\n---\n{self._stdin_form}\n---\n{self._method_form}\n---\n"
            f"release {self._release}, contests from {self._start or 'the first'} up to but not including "
            f"{self._end or 'none'}\nmax_tokens: {self.max_tokens}, {sampling_text(self.sampling)}\n"
            "program: the last fenced code block of the answer; none if that is not closed\n"
            "standard output: line by line without white space around, as texts or as numbers; results of methods: "
            f"equal as JSON, tuples as lists\nbefore a program: {PRELUDE!r}"
        )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        ids = Ids()
        found = []
        for file in self.files:
            self._paths[file.path] = files[file.path]
            for where, offset, record in _lines(files[file.path]):
                item = self._item(where, record, file.path, offset)
                ids.new(where, item.id)
                if (not self._start or item.fields["date"] >= self._start) and (
                    not self._end or item.fields["date"] < self._end
                ):
                    found.append(item)
        if not found:
            raise InputError(
                f"{self.name}: no problem of release {self._release} lies between {self._start or 'the first'} and "
                f"{self._end or 'the last'}. Choose other dates."
            )
        return found

    def prompt(self, item: Item) -> str | tuple[Message, ...]:
        fields = item.fields
        form = self._method_form.replace("{starter}", fields["starter"]) if fields["starter"] else self._stdin_form
        content = self._ask.replace("{form}", form).replace("{question}", fields["question"])
        return ({"role": "user", "content": content},)

    def program(self, item: Item, answer: str) -> str | None:
        block = last_code_block(answer)
        if block is None or not block[1].strip():
            return None
        return f"{PRELUDE}\n{block[1]}"

    def trial(self, item: Item, program: str, sandbox: Any) -> Trial:
        return passes_tests(self._tests(item), item.fields["method"], program, sandbox)

    def _item(self, where: str, record: Mapping[str, Any], file: str, offset: int) -> Item:
        texts = ("question_content", "question_id", "contest_date", "starter_code", "public_test_cases", "metadata")
        for name in texts:
            check(where, record, name, str)
        check(where, record, "private_test_cases", str)
        date = date_of(record["contest_date"])
        if date is None:
            raise InputError(f"{where}: contest_date must begin with a date, found {record['contest_date']!r:.40}.")
        try:
            method = json.loads(record["metadata"] or "{}").get("func_name", "")
        except (ValueError, AttributeError):
            raise InputError(f"{where}: metadata must be the text of a JSON object.") from None
        if record["starter_code"].strip() and not (isinstance(method, str) and method.isidentifier()):
            raise InputError(
                f"{where}: a problem with starter_code needs a func_name in metadata, found {method!r:.40}."
            )
        method = method if record["starter_code"].strip() else ""
        # Tests are many megabytes: an item says where they are.
        fields = {
            "question": record["question_content"].strip(),
            "starter": record["starter_code"].rstrip() if method else "",
            "method": method,
            "date": date,
            "file": file,
            "offset": offset,
        }
        groups = {"month": date[:7], "form": "method" if method else "stdin"}
        groups |= {key: record[key] for key in ("difficulty", "platform") if isinstance(record.get(key), str)}
        return Item(record["question_id"], fields, groups)

    def _tests(self, item: Item) -> list[dict[str, str]]:
        """The tests of an item, read again from its file."""
        file = item.fields["file"]
        if file not in self._paths:
            raise InputError(f"The tests of {item.id} are in {file}, which has not been read: call `items` first.")
        with self._paths[file].open("rb") as stream:
            stream.seek(item.fields["offset"])
            record = json.loads(stream.readline())
        where = f"{self._paths[file]}, problem {item.id}"
        tests = [
            *decoded_tests(where, record["public_test_cases"]),
            *decoded_tests(where, record["private_test_cases"]),
        ]
        if not tests:
            raise InputError(f"{where}: the problem has no tests.")
        return tests


def passes_tests(tests: Sequence[Mapping[str, str]], method: str, program: str, sandbox: Any) -> Trial:
    """Runs a program on tests until one fails.

    Args:
      tests: each with the texts `input` and `output`.
      method: of the class `Solution` that is called; "" if the program reads standard input.
      program: in Python.
      sandbox: that runs it.
    """
    for at in range(0, len(tests), _BATCH):
        part = tests[at : at + _BATCH]
        runs: list[Run] = sandbox.run_tests("python", program, [_test(method, test) for test in part])
        outcomes = [_outcome(run, test) for run, test in zip(runs, part, strict=True)]
        for number, (run, outcome) in enumerate(zip(runs, outcomes, strict=True), at + 1):
            if outcome is Outcome.FAIL:
                return Trial({"pass": False}, f"test {number} of {len(tests)}: {run.reason}")
        if Outcome.ERROR in outcomes:
            return Trial({"pass": None}, runs[outcomes.index(Outcome.ERROR)].reason)
    return Trial({"pass": True})


def same_output(found: str, expected: str) -> bool:
    """Whether two outputs are equal: line by line, without white space around, as texts or as lists of numbers."""
    left, right = (text.strip().split("\n") for text in (found, expected))
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        if a.strip() != b.strip():
            numbers = _decimals(a), _decimals(b)
            if None in numbers or numbers[0] != numbers[1]:
                return False
    return True


def text_of_pickle(content: bytes) -> str:
    """The text in a pickle of one text, read without unpickling.

    Raises:
      ValueError: the pickle holds something else.
    """
    found = None
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE") and found is None:
            found = argument
        elif operation.name not in _TEXT_PICKLE:
            raise ValueError(f"expected a pickle of one text, found the operation {operation.name}")
    if not isinstance(found, str):
        raise ValueError("expected a pickle of one text, found none")
    return found


def _lines(path: Path) -> Any:
    """Where each record of a file of JSON lines is, its place in bytes, and the record."""
    try:
        with path.open("rb") as stream:
            offset = 0
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{where}: expected JSON: {error}.") from None
                    if not isinstance(record, dict):
                        raise InputError(f"{where}: expected a JSON object, found {record!r:.80}.")
                    yield where, offset, record
                offset += len(line)
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error}.") from None


def decoded_tests(where: str, text: str) -> list[dict[str, str]]:
    """Tests from JSON, or from a compressed pickle of it in base 64, as private tests are published.

    Args:
      where: for messages.
      text: of the tests.

    Returns:
      Tests with the texts `input` and `output`.

    Raises:
      InputError: the text is no list of tests.
    """
    try:
        if not text.lstrip().startswith("["):
            text = text_of_pickle(zlib.decompress(base64.b64decode(text, validate=True)))
        tests = json.loads(text)
    except (ValueError, binascii.Error, zlib.error, RecursionError) as error:
        raise InputError(f"{where}: the tests cannot be read: {error}.") from None
    for test in tests if isinstance(tests, list) else [tests]:
        if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
            raise InputError(f"{where}: a test must have the texts input and output, found {test!r:.80}.")
    return list(tests)


def _test(method: str, test: Mapping[str, str]) -> Test:
    if not method:
        return Test(stdin=test["input"], expected_stdout=test["output"])
    code = (
        "import json\n"
        "def _plain(value):\n"
        "    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value\n"
        f"_arguments = [json.loads(line) for line in {test['input']!r}.split('\\n') if line.strip()]\n"
        f"_found = Solution().{method}(*_arguments)\n"
        f"assert _plain(_found) == json.loads({test['output']!r}), 'a wrong result'\n"
    )
    return Test(code=code)


def _outcome(run: Run, test: Mapping[str, str]) -> Outcome:
    """The verdict on a run. An output that the sandbox finds different may have the same numbers."""
    other = run.outcome is Outcome.FAIL and run.exit_status == 0 and run.killed_by is None and run.stdout
    if other and same_output(run.stdout.decode(errors="replace"), test["output"]):
        return Outcome.PASS
    return run.outcome


def _decimals(line: str) -> list[Decimal] | None:
    """The numbers of a line; None if it has something else. Those that are not finite are not compared as numbers."""
    try:
        found = [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
    return found if all(number.is_finite() for number in found) else None


def date_of(text: str) -> str | None:
    """The date at the beginning of a text; None if there is none."""
    try:
        return datetime.date.fromisoformat(text[:10]).isoformat()
    except ValueError:
        return None


TASKS: tuple[ProgramTask, ...] = (
    LiveCodeBench("live_code_bench"),
    # The window of the Qwen2.5 report.
    LiveCodeBench("live_code_bench_2305_2409", release=4, start="2023-05-01", end="2024-10-01"),
    LiveCodeBench("live_code_bench_sampled", sampling=Sampling(samples=10, ks=(1, 5), temperature=0.2, top_p=0.95)),
)
