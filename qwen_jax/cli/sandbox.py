"""`qwen-jax sandbox`: runs untrusted programs in isolation, and shows what isolates them on this machine."""

import base64
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import sibling, utf8
from qwen_jax.cli.lines import read_lines
from qwen_jax.errors import InputError

_Folders = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")]


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a program in the sandbox: no network, no files of this machine but /usr, limits of time, memory and output.

    Its output is printed as it is. The exit status is 0 if it ended with status 0 or passed all tests, otherwise 1.

    Example: qwen-jax sandbox run solution.py --tests tests.jsonl
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The source."""
    language: str | None = None
    """By default by the extension of the file."""
    input: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """What the program reads; - for standard input of this command."""
    tests: Annotated[str | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Tests, one JSON object a line: stdin and expected_stdout, or code with assertions about a Python program."""
    seconds: float = 10.0
    """Limit of wall-clock time."""
    memory_mib: int = 1024
    """Limit of the memory of all processes, in MiB."""
    folder: _Folders = ()
    """A folder with a tool chain outside /usr, such as /opt/go, that the program may read."""
    isolation: Literal["bubblewrap", "runc", "none"] = "bubblewrap"
    """runc: in a container, for root. none: run the program with your rights. Only for programs that you trust."""
    json: bool = False
    """Print one JSON object for each run instead; outputs are in base64 where they are not UTF-8."""

    def run(self) -> int:
        source = utf8(_read(self.file), self.file)
        sandbox = sibling("train.sandbox")
        language = self.language or _language(sandbox, self.file)
        if self.tests is not None and self.input is not None:
            raise InputError("Give --input or --tests, not both: a test has its own stdin.")
        tests = None if self.tests is None else _tests(sandbox, self.tests)
        stdin = b""
        if self.input is not None:
            stdin = sys.stdin.buffer.read() if self.input == "-" else _read(self.input)
        limits = dataclasses.replace(sandbox.Limits(), seconds=self.seconds, memory_bytes=self.memory_mib << 20)
        with sandbox.Sandbox(limits, isolation=self.isolation, folders=self.folder) as box:
            if tests is None:
                runs = [box.run(language, source, stdin)]
            else:
                runs = box.run_tests(language, source, tests)
        for number, run in enumerate(runs, 1):
            if self.json:
                print(json.dumps(_record(run)))
            elif tests is None:
                sys.stdout.flush()
                sys.stdout.buffer.write(run.stdout)
                sys.stderr.flush()
                sys.stderr.buffer.write(run.stderr)
                if run.reason:
                    print(f"{run.outcome.value}: {run.reason} ({run.seconds:.2f} s)", file=sys.stderr)
            else:
                print(f"test {number}: {run.outcome.value}{': ' * bool(run.reason)}{run.reason} ({run.seconds:.2f} s)")
        return 0 if all(run.outcome is sandbox.Outcome.PASS for run in runs) else 1


@dataclasses.dataclass(frozen=True)
class Check:
    """Try whether the sandbox isolates on this machine, and list the languages that it can run. The exit status is 1 if
    something does not hold.
    """

    folder: _Folders = ()
    """A folder with a tool chain outside /usr."""
    isolation: Literal["bubblewrap", "runc"] = "bubblewrap"
    """runc: containers, for root."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        sandbox, probe = sibling("train.sandbox"), sibling("train.sandbox.probe")
        runner = sibling("train.sandbox.sandbox").make_runner(self.isolation, 8, self.folder)
        checks = probe.probe(runner)
        holds = all(check.holds for check in checks)
        versions: dict[str, str | None] = {}
        if holds:
            with sandbox.Sandbox(runner=runner) as box:
                versions = {name: box.version(name) for name in sandbox.LANGUAGES}
        if self.json:
            record = {
                "holds": holds,
                "runner": dict(runner.description),
                "checks": [dataclasses.asdict(check) for check in checks],
                "languages": versions,
            }
            print(json.dumps(record))
            return 0 if holds else 1
        for name, value in runner.description.items():
            print(f"{name}: {value}")
        print()
        for check in checks:
            print(f"{'holds' if check.holds else 'FAILS':6s} {check.name}: {check.detail}")
        if holds:
            print()
        for name, version in versions.items():
            missing = f"not installed (Debian: {sandbox.LANGUAGES[name].install})"
            print(f"{name:12s} {missing if version is None else version}")
        return 0 if holds else 1


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}. Give an existing file.") from None


def _language(sandbox: Any, file: str) -> str:
    extension = Path(file).suffix
    for row in sandbox.LANGUAGES.values():
        if extension in row.extensions:
            return str(row.name)
    raise InputError(
        f"The language of {file} is not known by its extension {extension!r}. Give --language, one of "
        f"{', '.join(sandbox.LANGUAGES)}."
    )


def _tests(sandbox: Any, file: str) -> list[Any]:
    """The tests in a file of JSON lines."""
    tests = []
    keys = {field.name for field in dataclasses.fields(sandbox.Test)}
    for number, line in enumerate(read_lines(_read(file).splitlines(keepends=True), file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if (
            not isinstance(record, dict)
            or not record.keys() <= keys
            or not all(isinstance(value, str) for value in record.values())
        ):
            raise InputError(
                f"{file}, line {number}: expected a JSON object of texts: stdin and expected_stdout, or code."
            )
        try:
            tests.append(sandbox.Test(**record))
        except InputError as error:
            raise InputError(f"{file}, line {number}: {error}") from None
    if not tests:
        raise InputError(f"{file} has no tests.")
    return tests


def _record(run: Any) -> dict[str, Any]:
    record = dataclasses.asdict(run) | {"outcome": run.outcome.value}
    for name in ("stdout", "stderr"):
        try:
            record[name] = getattr(run, name).decode()
        except UnicodeDecodeError:
            record[name] = {"base64": base64.b64encode(getattr(run, name)).decode()}
    return record
