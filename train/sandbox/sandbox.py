"""Runs programs that nobody has read: source and tests in, verdicts out."""

import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from qwen_jax.errors import InputError
from train.sandbox.assertions import Assertions
from train.sandbox.bubblewrap import Bubblewrap
from train.sandbox.job import Job, Limits, Outcome, Run, Runner
from train.sandbox.languages import LANGUAGES, Language, Toolchain
from train.sandbox.probe import probe
from train.sandbox.runc import Runc
from train.sandbox.unconfined import Unconfined
from train.sandbox.verdict import difference

Isolation = Literal["bubblewrap", "runc", "none"]
"""What runs programs on this machine."""


@dataclasses.dataclass(frozen=True)
class Test:
    """A test of a program: either an input with the output that it must print, or assertions about its functions.

    Args:
      stdin: what the program reads.
      expected_stdout: what it must print, compared by lines without trailing white space.
      code: Python source that raises an exception if the program, which is in Python, is wrong. It can use the names
        that the program defines, or import them from `solution`.
    """

    # Not a class of tests for pytest.
    __test__ = False

    stdin: bytes | str = b""
    expected_stdout: bytes | str | None = None
    code: str | None = None

    def __post_init__(self) -> None:
        if (self.expected_stdout is None) == (self.code is None):
            raise InputError("A test has either an expected_stdout or code with assertions.")
        if self.code is not None and self.stdin:
            raise InputError("A test with assertions has no stdin.")


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program that is ready to run."""

    toolchain: Toolchain
    files: Mapping[str, bytes]
    archive: bytes | None


def make_runner(isolation: Isolation, workers: int, folders: Sequence[str | Path] = ()) -> Runner:
    """What runs jobs on this machine; see `Sandbox` for the arguments and errors."""
    if isolation == "none":
        return Unconfined()
    return Runc(workers, folders) if isolation == "runc" else Bubblewrap(workers, folders)


class _MachineError(Exception):
    """The machine failed before there was a program to run."""

    def __init__(self, run: Run):
        super().__init__(run.reason)
        self.run = run


class Sandbox:
    """Runs programs in isolation, several at a time. Use it as a context manager, or close it.

    Args:
      limits: of each program.
      workers: programs at one time.
      isolation: "bubblewrap"; "runc", containers, for root alone; or "none" to run programs with the rights of this
        process. `description` records it.
      folders: folders of the machine with tool chains outside /usr, such as /opt/go, which programs may read.
      languages: the table of languages.
      runner: runs the jobs instead of bubblewrap: gVisor, a cluster. It is probed like bubblewrap.

    Raises:
      InputError: a program is missing, or the probe finds that something of the isolation does not hold here.
    """

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008
        workers: int = 8,
        isolation: Isolation = "bubblewrap",
        *,
        folders: Sequence[str | Path] = (),
        languages: Mapping[str, Language] = LANGUAGES,
        runner: Runner | None = None,
    ):
        if isolation not in get_args(Isolation):
            raise InputError(f"isolation must be one of {', '.join(get_args(Isolation))}, not {isolation!r}.")
        self.limits = limits
        self.workers = workers
        self._languages = languages
        if runner is not None:
            self._runner = runner
        else:
            self._runner = make_runner(isolation, workers, folders)
        self._assertions = Assertions(self._runner)
        self._isolated = runner is not None or isolation != "none"
        if self._isolated:
            failed = [check for check in probe(self._runner) if not check.holds]
            if failed:
                raise InputError(
                    "The sandbox does not isolate here: "
                    + "; ".join(f"{check.name} ({check.detail})" for check in failed)
                    + ". `qwen-jax sandbox check` shows all that was tried. Programs are run without isolation only if "
                    "that is asked for: isolation='none'."
                )
        self._toolchains: dict[str, Toolchain | None] = {}
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="sandbox")

    @property
    def description(self) -> dict[str, Any]:
        """How programs are isolated and limited, as JSON values, for the record of a run."""
        return {**self._runner.description, "workers": self.workers, "limits": dataclasses.asdict(self.limits)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the programs that run, and takes no more."""
        self._pool.shutdown()

    # --- languages

    def language(self, name: str) -> Language:
        """The row of a language, by its name, another of its names, or in any case of letters. Raises InputError."""
        wanted = name.lower()
        for row in self._languages.values():
            if wanted in (row.name, *row.others):
                return row
        raise InputError(f"There is no language {name!r} in the sandbox. There are {', '.join(self._languages)}.")

    def version(self, language: str) -> str | None:
        """The first line that the language's tool chain says about its version, or None if it is not installed."""
        try:
            toolchain = self._toolchain(self.language(language))
        except _MachineError as error:
            raise InputError(f"Whether {language} is installed cannot be found out: {error.run.reason}.") from None
        if toolchain is None:
            return None
        run = self._submit(functools.partial(self._version, toolchain)).result()
        lines = (run.stdout + b"\n" + run.stderr).decode(errors="replace").strip().splitlines()
        return lines[0] if lines else ""

    def _version(self, toolchain: Toolchain) -> Run:
        limits = self.limits.of_compiler()
        return self._runner.execute(
            Job(toolchain.version, limits, environment=toolchain.environment, folders=toolchain.folders)
        )

    def _toolchain(self, language: Language) -> Toolchain | None:
        """The first tool chain that is there and starts. Looked for once."""
        with self._lock:
            if language.name not in self._toolchains:
                found = None
                for toolchain in language.toolchains:
                    if all(self._runner.find(program) for program in toolchain.programs):
                        run = self._version(toolchain)
                        if run.outcome is Outcome.ERROR:
                            raise _MachineError(run)
                        if run.outcome is Outcome.PASS:
                            found = toolchain
                            break
                self._toolchains[language.name] = found
            return self._toolchains[language.name]

    # --- programs

    def run(self, language: str, source: str, stdin: bytes = b"", files: Mapping[str, bytes] | None = None) -> Run:
        """Runs a program once.

        Args:
          language: a name in the table.
          source: of the program.
          stdin: what it reads.
          files: further files beside it, by relative path.

        Returns:
          PASS if the program compiled and ended by itself with status 0. That says nothing about what it did: any
          program can end with status 0.

        Raises:
          InputError: the language is unknown or not installed, or a file has no usable name.
        """
        try:
            row, toolchain, files = self._prepared(language, files)
        except _MachineError as error:
            return error.run
        return self._submit(lambda: self._run(self._build(row, toolchain, source, files), stdin)).result()

    def run_tests(
        self,
        language: str,
        source: str,
        tests: Sequence[Test],
        files: Mapping[str, bytes] | None = None,
    ) -> list[Run]:
        """Checks and compiles a program once, then runs each test in a sandbox of its own.

        Args:
          language: a name in the table; "python" for tests with assertions.
          source: of the program.
          tests: to run.
          files: further files beside the program, by relative path.

        Returns:
          A run for each test. PASS: the output is the expected one and the status is 0, or all assertions hold. FAIL:
          the program is wrong, does not compile, or met a limit. ERROR: the machine failed, so nothing is known.

        Raises:
          InputError: as `run`; or a test of another language has assertions.
        """
        try:
            row, toolchain, files = self._prepared(language, files)
        except _MachineError as error:
            return [error.run] * len(tests)
        if row.name != "python" and any(test.code is not None for test in tests):
            raise InputError(
                f"Tests with assertions are for python, not for {row.name}. Give stdin and expected_stdout."
            )
        if not tests:
            return []
        # A single test with assertions compiles the program as the check of its syntax does, and before it runs
        # anything of it. The check is then needed only to say why a program has not come to its end.
        late = len(tests) == 1 and tests[0].code is not None
        program = self._submit(lambda: self._build(row, toolchain, source, files, check=not late)).result()
        if isinstance(program, Run):
            return [program] * len(tests)
        futures = [self._submit(functools.partial(self._test, program, test)) for test in tests]
        runs = [future.result() for future in futures]
        if late and runs[0].outcome is not Outcome.PASS and runs[0].exit_status != 0:
            program = self._submit(lambda: self._build(row, toolchain, source, files)).result()
        return [program] if isinstance(program, Run) else runs

    def _submit(self, work: "Callable[[], Any]") -> "concurrent.futures.Future[Any]":
        try:
            return self._pool.submit(work)
        except RuntimeError:
            raise InputError("The sandbox is closed. Use it inside its `with` block.") from None

    def _prepared(
        self, language: str, files: Mapping[str, bytes] | None
    ) -> tuple[Language, Toolchain, Mapping[str, bytes]]:
        row = self.language(language)
        toolchain = self._toolchain(row)
        if toolchain is None:
            needed = " or ".join(" and ".join(each.programs) for each in row.toolchains)
            raise InputError(
                f"{row.name} is not installed where the sandbox can use it: it needs {needed} in /usr (Debian: "
                f"{row.install}), or in a folder given with `folders`. `qwen-jax sandbox check` lists what is there."
            )
        files = dict(files or {})
        if row.file in files:
            raise InputError(f"A file cannot be named {row.file}: that is the program.")
        # Checks the names and sizes before anything runs.
        Job((), self.limits, files)
        return row, toolchain, files

    def _build(
        self,
        language: Language,
        toolchain: Toolchain,
        source: str,
        files: Mapping[str, bytes],
        check: bool = True,
    ) -> "_Program | Run":
        """Checks and compiles a program. Returns a Run that has not passed if it cannot be run.

        Args:
          language, toolchain, source, files: the program.
          check: whether the syntax of a program that is not compiled is checked.
        """
        problem = static_problem(source, self.limits)
        if problem is not None:
            return Run(Outcome.FAIL, None, b"", b"", 0.0, None, problem)
        files = {**files, language.file: source.encode()}
        limits = self.limits.of_compiler()
        command, what = toolchain.compile, "compilation"
        if command is None:
            command, what = toolchain.check if check else None, "the check of the syntax"
        if command is None:
            return _Program(toolchain, files, None)
        command = toolchain.filled(command, limits)
        if toolchain.compile is not None:
            # Its output is an archive of what it has made, which is unpacked in the sandbox of each run.
            pack = '"$@" >&2 </dev/null && exec tar -cf - ' + " ".join(toolchain.products)
            command = ("/bin/sh", "-c", pack, "sh", *command)
        run = self._runner.execute(
            Job(command, limits, files, environment=toolchain.environment, folders=toolchain.folders)
        )
        if run.outcome is not Outcome.PASS:
            # What a killed compiler wrote is a part of an archive.
            stdout = b"" if toolchain.compile is not None else run.stdout
            return dataclasses.replace(run, stdout=stdout, reason=f"{what}: {run.reason}")
        if toolchain.compile is None:
            return _Program(toolchain, files, None)
        others = {name: content for name, content in files.items() if name != language.file}
        return _Program(toolchain, others, run.stdout)

    def _job(self, program: _Program, stdin: bytes) -> Job:
        toolchain = program.toolchain
        space = toolchain.address_space
        return Job(
            command=toolchain.filled(toolchain.run, self.limits),
            limits=self.limits,
            files=program.files,
            archive=program.archive,
            stdin=stdin,
            address_space=None if space is None else int(space * self.limits.memory_bytes),
            environment=toolchain.environment,
            folders=toolchain.folders,
        )

    def _run(self, program: "_Program | Run", stdin: bytes) -> Run:
        return program if isinstance(program, Run) else self._runner.execute(self._job(program, stdin))

    def _test(self, program: _Program, test: Test) -> Run:
        if test.code is not None:
            python = program.toolchain.run[0]
            return self._assertions.check(self._job(program, b""), test.code, python)
        stdin, expected = (
            text.encode() if isinstance(text, str) else text for text in (test.stdin, test.expected_stdout or b"")
        )
        run = self._run(program, stdin)
        if run.outcome is not Outcome.PASS:
            return run
        wrong = difference(run.stdout, expected)
        return run if wrong is None else dataclasses.replace(run, outcome=Outcome.FAIL, reason=f"the output: {wrong}")


def static_problem(source: str, limits: Limits) -> str | None:
    """Why a source cannot be a program, found without running anything; None if it can."""
    if not isinstance(source, str):
        return f"the source is no text but a {type(source).__name__}"
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        return f"the source is no text: {error.reason} at character {error.start}"
    if "\0" in source:
        return f"the source has a NUL at character {source.index(chr(0))}"
    if size > limits.source_bytes:
        return f"the source has {size} bytes, more than {limits.source_bytes}"
    return None if source.strip() else "the source is empty"
