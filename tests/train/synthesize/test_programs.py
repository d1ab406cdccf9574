"""Programs and their tests in the shared sandbox: one run for all tests says what a run for each would say."""

import concurrent.futures
import shutil
from typing import Any

import pytest

from train.sandbox import Outcome, Test
from train.synthesize.programs import Judged, Programs, static_fault

ISOLATION: Any = "bubblewrap" if shutil.which("bwrap") else "none"


@pytest.mark.draw(4)
@pytest.mark.parametrize(
    ("language", "source", "outcome"),
    [
        ("bash", 'read n; echo "$n"', [True, True, True]),
        ("bash", 'read n; [ "$n" = 2 ] && sleep 9; echo "$n"', [True, False, True]),
        ("bash", 'read n; [ "$n" = 2 ] && exit 1; echo "$n"', [True, False, True]),
        ("bash", 'read n; echo "$n"; echo extra', [False, False, False]),
        ("bash", "for i in 0 1 2; do echo 7 >in/$i; done; read n; echo $n", [False, False, False]),
        ("bash", "rm -r in; read n; echo $n", [True, False, False]),
        ("bash", "echo 0 2; echo 1; echo 0 2; echo 2; echo 0 2; echo 3", [False, False, False]),
        ("bash", "((", [False, False, False]),
        ("python", "print(input())", [True, True, True]),
        ("python", "while True: print(1)", [False, False, False]),
        ("python", "print(", [False, False, False]),
    ],
)
def test_a_program_can_spoil_its_own_tests_only(language: str, source: str, outcome: list[bool]) -> None:
    """One run for all tests says what a run for each says; forged frames are output, and so are other inputs."""
    programs = Programs(seconds=0.7, isolation=ISOLATION)
    tests = [{"stdin": f"{n}\n", "expected_stdout": f"{n}\n"} for n in (1, 2, 3)]
    judged = programs.judge(language, source, tests)
    assert judged is not None
    assert list(judged.passed) == outcome


@pytest.mark.parametrize("isolation", ["none", "bubblewrap"])
def test_programs_that_run_at_the_same_time_do_not_mix(isolation: Any) -> None:
    """Also without isolation, where they share the machine's folders."""
    if isolation == "bubblewrap" and ISOLATION == "none":
        pytest.skip("needs bubblewrap")
    programs = Programs(seconds=5, workers=4, isolation=isolation)

    def judge(number: int) -> Judged | None:
        tests = [{"stdin": f"{n}\n", "expected_stdout": f"{n + number}\n"} for n in range(4)]
        return programs.judge("bash", f"read n; echo $((n + {number}))", tests)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(judge, range(12))) == [Judged(None, (True,) * 4)] * 12


def test_assertions_are_judged_one_by_one() -> None:
    programs = Programs(seconds=2, isolation=ISOLATION)
    tests = [{"code": f"assert twice({n}) == {2 * n}"} for n in range(4)]
    for source, passed in (
        ("def twice(x): return 2 * x", [True] * 4),
        ("def twice(x): return 2 * x if x != 2 else 1 / 0", [True, True, False, True]),
        ("class Any:\n    __eq__ = lambda *_: True\ndef twice(x): return Any()", [False] * 4),
        ("import os\ndef twice(x): os._exit(0)", [False] * 4),
        ("def twice(", [False] * 4),
    ):
        judged = programs.judge("python", source, tests)
        assert judged is not None
        assert list(judged.passed) == passed, source
    assert judged.fault == "it does not compile"


def test_a_machine_that_fails_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(seconds=1, isolation="none")
    tests = [{"stdin": "1\n", "expected_stdout": "1\n"}]
    execute = programs.box._runner.execute

    def fail(job: Any) -> Any:
        return type(execute(job))(Outcome.ERROR, None, b"", b"", 0.0, None, "no process")

    assert programs.judge("bash", "read n; echo $n", tests) is not None
    monkeypatch.setattr(programs.box._runner, "execute", fail)
    assert programs.judge("bash", "read n; echo $n", tests) is None
    assert programs.measures()["outcomes"] == {"error": 1, "pass": 1}


def test_a_closed_sandbox_is_made_anew() -> None:
    programs = Programs(seconds=5, isolation=ISOLATION)
    programs.close()
    assert programs.measures() == {"programs": 0}
    tests = [{"stdin": "1\n", "expected_stdout": "1\n"}]
    for count in (1, 2):
        assert programs.judge("bash", "read n; echo $n", tests) == Judged(None, (True,))
        box = programs.box
        programs.close()
        assert programs.measures()["programs"] == count
        assert box is not programs.box


def test_static_checks() -> None:
    assert static_fault("python", "import math, socket\n") == "a forbidden import"
    assert static_fault("python", "from urllib.request import urlopen") == "a forbidden import"
    assert static_fault("python", "import os\nos.system('ls')") == "a forbidden import"
    assert static_fault("python", "signal = 1\nimport math\nprint('import socket')") is None
    assert static_fault("javascript", "require('child_process')") == "a forbidden import"
    assert static_fault("javascript", "console.log('the net')") is None
    assert static_fault("c", "#include <sys/socket.h>\n") == "a forbidden import"
    assert static_fault("python", "def g(x): pass", "f") == "not the asked function"
    assert static_fault("python", "def f(x): pass", "f") is None
    assert static_fault("python", " \n") == "an empty program"


@pytest.mark.draw(7)
@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("bash", "read n; echo $((n * n))"),
        ("bash", 'read n; [ "$n" -gt 1 ] && echo $((n * n))'),
        ("bash", 'read n; echo "$((n * n))  "; echo; exit $((n == 2))'),
        ("bash", "read n; printf %s $((n + n))"),
        ("bash", "read n; echo $((n * n)) >&2"),
        ("bash", "if"),
        *(
            ("python", source)
            for source in (
                "print(int(input()) ** 2)",
                "import sys\nn = int(sys.stdin.buffer.read())\nprint(n * n, end='')\nsys.exit(n == 2)",
                "import atexit\nn = int(input())\natexit.register(lambda: print(n * n))\nassert n != 1",
                "import threading\nn = int(input())\nthreading.Thread(target=lambda: print(n * n)).start()",
                "import os\nn = int(input())\nprint(n * n)\nif n == 1: os._exit(0)\nif n == 2: os.kill(os.getpid(), 9)",
                "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: 'int'\n"
                "if __name__ == '__main__':\n    print(A(int(input())).n ** 2)",
                "import pickle\nclass A: pass\nn = int(input())\npickle.loads(pickle.dumps(A()))\nprint(n * n)",
                "import sys, os, time\nn = int(input())\nif os.fork() == 0:\n    time.sleep(9)\nprint(n * n)",
                "n = int(input())\nwhile n == 2: pass\nprint(n * n)",
                "import sys\nprint(int(input()) ** 2)\nsys.stdout.close()",
                "raise SystemExit('nothing')",
                "print(",
            )
        ),
    ],
)
def test_tests_in_one_run_have_the_verdicts_of_tests_in_runs_of_their_own(language: str, source: str) -> None:
    programs = Programs(seconds=1, isolation=ISOLATION)
    tests = [{"stdin": f"{n}\n", "expected_stdout": f"{n * n}\n"} for n in (0, 1, 2, 3)]
    judged = programs.judge(language, source, tests)
    runs = programs.box.run_tests(language, source, [Test(**test) for test in tests])
    assert judged is not None
    assert list(judged.passed) == [run.outcome is Outcome.PASS for run in runs]


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("javascript", "const n = +require('fs').readFileSync(0, 'utf8');\nconsole.log(n + 1);\n"),
        ("c", '#include <stdio.h>\nint main() { int n; scanf("%d", &n); printf("%d\\n", n + 1); }\n'),
        ("cpp", "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n + 1; }\n"),
        (
            "java",
            "class Main { public static void main(String[] a) {\n"
            "System.out.println(new java.util.Scanner(System.in).nextInt() + 1); } }\n",
        ),
        ("perl", "my $n = <STDIN>;\nprint $n + 1;\n"),
        ("php", "<?php $n = (int) trim(fgets(STDIN));\necho $n + 1;\n"),
        ("r", 'n <- as.integer(readLines(file("stdin")))\ncat(n + 1)\n'),
    ],
)
def test_every_language_takes_many_tests_in_one_run(language: str, source: str) -> None:
    programs = Programs(seconds=10, isolation=ISOLATION)
    if programs.box.version(language) is None:
        pytest.skip(f"{language} is not installed")
    tests = [{"stdin": f"{n}\n", "expected_stdout": str(n + 1 + (n == 3))} for n in range(5)]
    judged = programs.judge(language, source, tests)
    assert judged == Judged(None, (True, True, True, False, True))
    assert static_fault(language, source) is None
    broken = programs.judge(language, source.replace("n", "((", 1), tests)
    assert broken is not None
    assert not any(broken.passed)
