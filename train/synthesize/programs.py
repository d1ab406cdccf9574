"""Programs and their tests in a sandbox that all items share: static checks, and all tests of a program in one run."""

import dataclasses
import re
import shlex
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.sandbox import LANGUAGES, Language, Limits, Outcome, Run, Sandbox, Test
from train.sandbox.languages import Toolchain
from train.sandbox.verdict import difference

# Bytes of one output; more is a failed test.
_MOST_OUTPUT = 1 << 16
# All tests of a program may take this many times the limit of one.
_SLOW_TESTS = 3
# Runs the tests of one program after another, and frames their outputs: a line with the status and the number of bytes,
# then the bytes. All of it is the program's word about itself: what is expected stays outside.
_EACH = f"""
eval "$1" >&2 </dev/null || {{ echo refused; exit 0; }}
echo checked; seconds=$2; shift 2; i=0
while [ -e "in/$i" ]; do
  timeout -s KILL "$seconds" "$@" <"in/$i" >.out 2>/dev/null; status=$?
  bytes=$(wc -c <.out)
  if [ "$bytes" -gt {_MOST_OUTPUT} ]; then status=999; bytes=0; : >.out; fi
  echo "$status $bytes"; cat .out; i=$((i + 1))
done
"""
# The same for Python in one interpreter, which compiles the program once: each test is a fork of it, which ends as any
# program does. A test that takes too long is killed with all that it started.
_EACH_PYTHON = f"""
import os, signal, sys, types
try:
    with open("main.py", "rb") as _file:
        _code = compile(_file.read(), "main.py", "exec", dont_inherit=True)
except BaseException:
    print("refused")
    sys.exit(0)
print("checked", flush=True)
_child, _number = -1, 0
def _kill(*_):
    try:
        os.killpg(_child, signal.SIGKILL)
    except OSError:
        pass
signal.signal(signal.SIGALRM, _kill)
while os.path.exists(f"in/{{_number}}"):
    _child = os.fork()
    if _child == 0:
        break
    try:
        os.setpgid(_child, _child)
    except OSError:
        pass
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
    _status = os.waitstatus_to_exitcode(os.waitpid(_child, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
    _kill()
    with open(".out", "rb") as _file:
        _bytes = _file.read({_MOST_OUTPUT + 1})
    if len(_bytes) > {_MOST_OUTPUT}:
        _status, _bytes = 999, b""
    sys.stdout.buffer.write(b"%d %d\\n" % (_status if _status >= 0 else 128 - _status, len(_bytes)) + _bytes)
    sys.stdout.flush()
    _number += 1
else:
    os._exit(0)
os.setpgid(0, 0)
signal.signal(signal.SIGALRM, signal.SIG_DFL)
os.dup2(os.open(f"in/{{_number}}", os.O_RDONLY), 0)
os.dup2(os.open(".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
sys.argv, _main = ["main.py"], types.ModuleType("__main__")
_main.__file__ = "main.py"
sys.modules["__main__"] = _main
exec(_code, vars(_main))
"""
# Runs assertions one by one, and names those that fail. A program that has ended fails all.
_TOGETHER = """
_failed = []
for _number, _source in enumerate({sources!r}):
    try:
        exec(_source)
    except BaseException as _error:
        if type(_error).__name__ == "Broken":
            raise
        _failed.append(_number)
assert not _failed, " ".join(map(str, _failed))
"""

# What a program may not use, by language: other processes, the network, and ways around these rules. The sandbox
# confines them all; the rule keeps such programs out of the data.
_FORBIDDEN = {
    language: re.compile(pattern, re.MULTILINE)
    for language, pattern in {
        "python": r"^[ \t]*(?:import|from)[ \t][^\n#]*\b(?:subprocess|socket|ctypes|multiprocessing|urllib|http|shutil|"
        r"requests|ftplib|smtplib|pty|importlib|signal)\b|\b__import__\b|"
        r"\bos\.(?:system|popen|fork|exec\w*|spawn\w*|kill)\b",
        "javascript": r"(?:\brequire\(|\bimport\(|\bfrom)\s*['\"`](?:node:)?(?:child_process|worker_threads|"
        r"cluster|dgram|https?|net|tls)['\"`]|\bfetch\(|\bprocess\.kill\b",
        "c": r"#\s*include\s*<(?:sys/(?:socket|ptrace)|netinet/|arpa/|netdb)|\b(?:system|popen|v?fork|exec[lv]p?e?)\(",
        "java": r"\bjava\.net\b|\bProcessBuilder\b|\bgetRuntime\(\)\s*\.\s*exec\b",
        "go": r"\"(?:net|net/\w+|os/exec|syscall|unsafe)\"",
        "rust": r"\bstd::(?:net|process::Command)\b",
        "csharp": r"\bSystem\.Net\b|\bDiagnostics\.Process\b|\bDllImport\b",
        "php": r"\b(?:exec|shell_exec|system|passthru|proc_open|popen|fsockopen|curl_init)\s*\(",
        "bash": r"\b(?:curl|wget|nc|ssh|kill(?:all)?|pkill)\b|/dev/(?:tcp|udp)/",
        "r": r"\b(?:system2?|download\.file|socketConnection)\s*\(",
        "perl": r"\b(?:system|exec|fork)\b|\bIO::Socket\b|\bqx\b",
    }.items()
}
_FORBIDDEN |= {"typescript": _FORBIDDEN["javascript"], "cpp": _FORBIDDEN["c"]}


def static_fault(language: str, source: str, function: str | None = None) -> str | None:
    """Why a program is not even run: a forbidden import or call, or the asked function is missing. None if it may be.

    It is found by patterns in the text, so that a name in a comment or a string counts too.

    Args:
      language: name in `train.sandbox.LANGUAGES`.
      source: of the program.
      function: that a Python program must define.
    """
    if not source.strip():
        return "an empty program"
    if language in _FORBIDDEN and _FORBIDDEN[language].search(source):
        return "a forbidden import"
    if function is not None and not re.search(rf"^(?:(?:async )?def {function}\b|{function} *=)", source, re.MULTILINE):
        return "not the asked function"
    return None


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is known of a program.

    Attributes:
      fault: why it did not run: it does not compile. None if it ran.
      passed: whether it passed each test.
    """

    fault: str | None
    passed: tuple[bool, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; `Judged.from_json` reads it."""
        return {"fault": self.fault, "passed": list(self.passed)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Judged":
        """What `to_json` gave."""
        return cls(value["fault"], tuple(value["passed"]))


class Programs:
    """A sandbox that is made when it is first needed, and used by all items; methods may be called from many threads.

    All tests of one program run in one sandbox, one after another: a program can disturb nothing but its own tests, and
    what is expected is compared outside. Two programs never share one.
    """

    def __init__(
        self,
        seconds: float = 10.0,
        workers: int = 2,
        isolation: Literal["bubblewrap", "none"] = "bubblewrap",
        rows: Mapping[str, Language] | None = None,
        limits: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          seconds: of one test; the tests of a program may take three times as long together.
          workers: programs at one time.
          isolation: see `train.sandbox.Sandbox`.
          rows: further languages of the sandbox.
          limits: fields of `train.sandbox.Limits`, of one run.

        Raises:
          InputError: a limit out of range.
        """
        cpu = max(1, round(seconds))
        self.limits = Limits(
            **{"seconds": _SLOW_TESTS * seconds, "cpu_seconds": cpu, "output_bytes": 4 << 20, **(limits or {})}
        )
        self._seconds, self._workers, self._isolation = seconds, workers, isolation
        self._rows = {**LANGUAGES, **{f"{name} tests": _grouped(row, seconds) for name, row in LANGUAGES.items()}}
        self._rows |= rows or {}
        self._box: Sandbox | None = None
        self._finalizer: Callable[[], Any] | None = None
        self._description: Any = None
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._busy = 0.0

    @property
    def box(self) -> Sandbox:
        """The sandbox.

        Raises:
          InputError: it does not hold here.
        """
        with self._lock:
            if self._box is None:
                self._box = Sandbox(self.limits, self._workers, self._isolation, languages=self._rows)
                self._finalizer = weakref.finalize(self, self._box.close)
                self._description = self._box.description
            return self._box

    def close(self) -> None:
        """Waits for the programs that run, and ends the sandbox. It is made anew when it is needed again."""
        with self._lock:
            finalizer, self._box, self._finalizer = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    def require(self, languages: Sequence[str]) -> None:
        """Checks that programs of these languages can run here.

        Raises:
          InputError: one is not installed, or the sandbox does not hold.
        """
        for language in languages:
            if self.box.version(language) is None:
                raise InputError(
                    f"{language} is not installed where the sandbox can use it: it needs "
                    f"{self.box.language(language).install}. Install it, or leave the language out. "
                    "`qwen-jax sandbox check` lists what is there."
                )

    def judge(self, language: str, source: str, tests: Sequence[Mapping[str, str]]) -> Judged | None:
        """Checks or compiles a program, and runs its tests.

        Args:
          language: name in `train.sandbox.LANGUAGES`.
          source: of the program.
          tests: each {"stdin", "expected_stdout"}, or each {"code"} with one assertion for Python.

        Returns:
          None if the machine failed, so that nothing is known.
        """
        if not tests:
            raise InputError("A program is judged by at least one test.")
        if "code" in tests[0]:
            return self._assertions(source, [test["code"] for test in tests])
        files = {f"in/{i}": test.get("stdin", "").encode() for i, test in enumerate(tests)}
        run = self.run(f"{language} tests", source, files)
        expected = [test["expected_stdout"].encode() for test in tests]
        return None if run.outcome is Outcome.ERROR else _judged(run, expected)

    def run(self, language: str, source: str, files: Mapping[str, bytes] | None = None) -> Run:
        """Runs a program once, and counts it; see `Sandbox.run`."""
        box = self.box
        return self._counted(box.run(language, source, files=files))

    def measures(self) -> dict[str, Any]:
        """What ran since the start: for the record of a run, with how it was isolated."""
        with self._lock:
            if self._description is None:
                return {"programs": 0}
            count = sum(self._counts.values())
            rate = count * self._workers / self._busy if self._busy else 0.0
            return {
                "programs": count,
                "outcomes": dict(sorted(self._counts.items())),
                "programs_per_second": round(rate, 1),
                "sandbox": self._description,
            }

    def _assertions(self, source: str, codes: Sequence[str]) -> Judged | None:
        """Runs assertions in one conversation of two sandboxes."""
        (run,) = self.box.run_tests("python", source, [Test(code=_TOGETHER.format(sources=list(codes)))])
        self._counted(run)
        if run.outcome is Outcome.ERROR:
            return None
        if run.reason.startswith(("the check of the syntax", "the source")):
            return Judged("it does not compile", (False,) * len(codes))
        named = re.fullmatch(r"an assertion failed: ([\d ]+)", run.reason)
        failed = set(map(int, named[1].split())) if named else set(range(len(codes)))
        if run.outcome is Outcome.PASS:
            failed = set()
        return Judged(None, tuple(i not in failed for i in range(len(codes))))

    def _counted(self, run: Run) -> Run:
        with self._lock:
            self._counts[run.killed_by or run.outcome.value] += 1
            self._busy += run.seconds
        return run


def _grouped(language: Language, seconds: float) -> Language:
    """The row of a language whose programs read the inputs of many tests; their syntax is checked in the same run."""

    def command(one: Toolchain) -> tuple[str, ...]:
        if one.run == ("python3", "-B", "main.py"):
            return ("python3", "-B", "-c", _EACH_PYTHON, f"{seconds:g}")
        return ("sh", "-c", _EACH, "sh", shlex.join(one.check or ("true",)), f"{seconds:g}", *one.run)

    toolchains = [dataclasses.replace(one, run=command(one), check=None) for one in language.toolchains]
    return dataclasses.replace(language, name=f"{language.name} tests", others=(), toolchains=tuple(toolchains))


def _judged(run: Run, expected: Sequence[bytes]) -> Judged:
    """What the framed outputs of a program say."""
    began, _, rest = run.stdout.partition(b"\n")
    if began != b"checked":
        return Judged("it does not compile", (False,) * len(expected))
    passed = []
    for wanted in expected:
        frame, _, rest = rest.partition(b"\n")
        parts = frame.split()
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            break
        size = int(parts[1])
        passed.append(parts[0] == b"0" and len(rest) >= size and difference(rest[:size], wanted) is None)
        rest = rest[size:]
    # A program that was killed, or has spoiled its frames, has failed the other tests.
    return Judged(None, (*passed, *[False] * (len(expected) - len(passed))))
