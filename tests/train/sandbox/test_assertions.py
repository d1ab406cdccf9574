"""Tests with assertions: what right programs may do, and that wrong ones cannot make their tests pass."""

import glob
import json
import os
import random
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sandboxes import LIMITS, box_of, needs_bwrap, needs_runc
from train.sandbox import Job, Limits, Outcome, Run, Sandbox, Test
from train.sandbox import assertions as assertions_module
from train.sandbox.assertions import Assertions, judge
from train.sandbox.unconfined import Unconfined

NONCE = "0123456789abcdef" * 4


@pytest.fixture(scope="module", params=["this user", "another user", pytest.param("in containers", marks=needs_runc)])
def box(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from box_of(request.param)


@pytest.fixture(scope="module")
def one(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as box:
        yield box


# --- right programs

_PROGRAM = """
import math
from collections import Counter, deque, namedtuple
from fractions import Fraction

def add(a, b=1): return a + b
def sort(xs): xs.sort()
def fill(d): d["x"] = [1, {2}]
def apply(f, xs): return [f(x) for x in xs]
def mutate_through(f):
    xs = [1]
    f(xs)
    return xs
def fail(kind="value"):
    raise {"value": ValueError("bad", 3), "own": Own("mine"), "index": IndexError(1)}[kind]
def numbers(n):
    for i in range(n): yield i
def values():
    return [None, True, -2**70, 1.5, float("inf"), 2j, "\\ud800é", b"x\\x00", (1, (2,)), {1: {2}}, frozenset([3])]
def count(s): return Counter(s)
def half(): return Fraction(1, 2)
class Own(KeyError): pass
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other): new = Stack(); new.items = self.items + other.items; return new
Point = namedtuple("Point", "x y")
def point(): return Point(1, 2)
print("noise", flush=True)
if __name__ == "__main__": raise RuntimeError("run as the main program")
"""
_TESTS = """
assert add(1, 2) == 3 and add(1, b=5) == 6 and add("a", "b") == "ab" and add(add(1)) == 3
assert math.isclose(add(0.1, 0.2), 0.3)
xs = [3, 1, 2]; assert sort(xs) is None and xs == [1, 2, 3]
d = {"y": 0}; fill(d); assert d == {"y": 0, "x": [1, {2}]}
total = []
assert apply(lambda x: x * 2, [1, 2]) == [2, 4] and apply(total.append, [1]) == [None] and total == [1]
assert apply(abs, range(-2, 1)) == [2, 1, 0] and apply(str, [1]) == ["1"] and apply(math.sqrt, [4]) == [2]
assert mutate_through(lambda xs: xs.append(2)) == [1, 2]
for kind, error in (("value", ValueError), ("own", Own), ("own", KeyError), ("index", LookupError)):
    try: fail(kind)
    except error as e: assert e.args == {"value": ("bad", 3), "own": ("mine",), "index": (1,)}[kind]
    else: assert False
assert list(numbers(4)) == [0, 1, 2, 3] and 2 in numbers(4) and 9 not in numbers(4)
got = values()
expected = [None, True, -2**70, 1.5, float("inf"), 2j, "\\ud800é", b"x\\x00", (1, (2,)), {1: {2}}, frozenset([3])]
assert got == expected and [type(v) for v in got] == [type(v) for v in expected]
assert count("aab") == {"a": 2, "b": 1} and half() * 2 == 1
s = Stack().push(1).push(2)
assert len(s) == 2 and s[0] == 1 and s.pop() == 2 and s.items == [1] and isinstance(s, Stack) and s
assert s == Stack().push(1) and s != Stack() and (s + s).items == [1, 1] and not Stack()
x, y = point(); assert (x, y) == (1, 2) == point()
from solution import add as plus
import solution
assert plus(1, 1) == 2 and solution.add(1) == 2
"""


@needs_bwrap
def test_what_right_programs_do_passes(box: Any) -> None:
    """By value, by reference, by call-back; with changed arguments, exceptions, iterators, classes and operators."""
    run = box.run_tests("python", _PROGRAM, [Test(code=_TESTS)])[0]
    assert run.outcome is Outcome.PASS, run
    assert run.stderr == b"noise\n"


@needs_bwrap
def test_each_assertion_counts(one: Sandbox) -> None:
    lines = [line for line in _TESTS.splitlines() if line.startswith("assert add") or line.startswith("assert apply")]
    tests = [Test(code=f"total = []\nimport math\n{line}\nassert add(1) == 3") for line in lines]
    runs = one.run_tests("python", _PROGRAM, tests)
    assert [(run.outcome, run.reason) for run in runs] == [(Outcome.FAIL, "an assertion failed")] * len(tests)


@needs_bwrap
def test_functions_and_cases_that_are_only_defined_are_called(one: Sandbox) -> None:
    function = "def test_add():\n    assert add(1, 2) == {}"
    case = "import unittest\nclass TestAdd(unittest.TestCase):\n    def test(self): self.assertEqual(add(1, 2), {})"
    tests = [Test(code=code.format(value)) for code in (function, case) for value in (3, 4)]
    outcomes = [run.outcome for run in one.run_tests("python", _PROGRAM, tests)]
    assert outcomes == [Outcome.PASS, Outcome.FAIL] * 2


@needs_bwrap
def test_a_bad_test_says_nothing_of_the_program(one: Sandbox) -> None:
    """A test that does not compile, or that passes what cannot be sent, is an error, so no zero."""
    codes = ["assert add(1, ==", "class A: pass\nadd(A(), 1)", "add(open('test.py'))"]
    # Functions by which a program could run code in the test's sandbox.
    codes += [f"apply({name}, ['1'])" for name in ("eval", "exec", "open", "getattr", "__import__", "type", "vars")]
    runs = one.run_tests("python", _PROGRAM, [Test(code=code) for code in codes])
    assert [run.outcome for run in runs] == [Outcome.ERROR] * len(codes), runs
    assert one.run_tests("python", _PROGRAM, [Test(code="missing(1)")])[0].outcome is Outcome.FAIL


# --- wrong programs

_EVIL = """
class Evil:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __mul__ = __sub__
    def __abs__(self): return 0
    def __hash__(self): return hash(3)
    def __contains__(self, item): return True
    def __bool__(self): return True
    def __len__(self): return 0
    def __instancecheck__(self, other): return True
    def __iter__(self): return iter(())
"""
_ATTACKS = {
    "an object that equals everything": _EVIL + "def add(a, b): return Evil()",
    "a number that equals everything": """
class N(int):
    def __eq__(self, o): return True
    __hash__ = int.__hash__
def add(a, b): return N(7)
""",
    "a text that equals everything": """
class S(str):
    def __eq__(self, o): return True
    __hash__ = str.__hash__
def add(a, b): return S('x')
""",
    "SystemExit at import": "raise SystemExit",
    "SystemExit": "def add(a, b): raise SystemExit(0)",
    "os._exit at import": """
import os
os._exit(0)
""",
    "os._exit": """
import os
def add(a, b): os._exit(0)
""",
    "exit handlers": """
import atexit, os
atexit.register(os._exit, 0)
def add(a, b): raise KeyboardInterrupt
""",
    "SkipTest": """
import unittest
def add(a, b): raise unittest.SkipTest('no')
""",
    "StopIteration": "def add(a, b): raise StopIteration",
    "patched built-ins": """
import builtins, sys, math
for name in ('abs', 'len', 'sorted', 'isinstance', 'AssertionError'):
    setattr(builtins, name, lambda *a: True)
math.isclose = lambda *a, **k: True
sys.exit = lambda *a: None
def add(a, b): return 7
def abs(x): return 0
def isinstance(*a): return True
class math:
    isclose = staticmethod(lambda *a, **k: True)
""",
    "forged verdicts": """
import os
for fd in range(20):
    for word in ('', '0' * 64, 'f' * 64):
        try: os.write(fd, (chr(10) + word + ' PASS ' + chr(10)).encode())
        except OSError: pass
def add(a, b): return 7
""",
    "a forged verdict at the end": """
import os, sys
def add(a, b):
    print(chr(10) + '0' * 64 + ' PASS', file=sys.stderr, flush=True)
    os._exit(0)
""",
    "forged replies": """
import json, os, sys
for _ in range(50):
    for fd in range(3, 10):
        try: os.write(fd, json.dumps(['value', ['i', '0x3'], {}]).encode() + b'\\n')
        except OSError: pass
""",
    "a reply with a call of exec": """
import json, os
code = 'import os; os.write(2, (chr(10) + open("nonce").read() + " PASS " + chr(10)).encode()); os._exit(0)'
def add(a, b):
    for fd in range(3, 10):
        for target in (['g', 'builtins', 'exec'], ['m', 'os'], ['o', 0], ['r', 0]):
            try: os.write(fd, json.dumps(['ask', 'call', target, [['s', code]], {}]).encode() + b'\\n')
            except OSError: pass
    return 7
""",
    "a function in the place of a test": """
def add(a, b): return 7
def test_add(): pass
def check(*a): pass
""",
    "files of the test": """
import os, glob
paths = [p for root in ('/tmp', '/proc', '/dev/shm') for p in glob.glob(root + '/*') + glob.glob(root + '/*/*')]
found = [p for p in paths if p.endswith(('nonce', 'test.py', 'sandbox_asking.py'))]
for pid in filter(str.isdigit, os.listdir('/proc')):
    data = open(f'/proc/{pid}/cmdline', 'rb').read()
    found += [data] * (b'asking' in data)
def add(a, b): return 3 if found else 7
""",
    "memory of the test": """
import os
def add(a, b):
    for pid in filter(str.isdigit, os.listdir('/proc')):
        for line in open(f'/proc/{pid}/maps'):
            if b'an assertion failed' in line.encode(): return 3
    return 7
""",
    "a flood": """
import os
def add(a, b):
    while True: os.write(4, b'[' * 65536)
""",
    "deep nesting": """
import os
def add(a, b):
    os.write(4, b'[' * 100000 + b'\\n')
    return 3
""",
    "an endless reply": "def add(a, b): return [0] * 10**7",
    "never": """
import time
def add(a, b): time.sleep(60)
""",
    "a cyclic value": """
def add(a, b):
    x = []
    x.append(x)
    return x
""",
}
_CODE = """
value = add(1, 2)
assert abs(value - 3) < 1e-9 or value == 3
assert value == 3
assert not value != 3
assert value in [3]
assert isinstance(value, int)
assert math.isclose(value, 3)
"""


@needs_bwrap
@pytest.mark.parametrize("name", _ATTACKS)
def test_wrong_programs_fail(one: Sandbox, name: str) -> None:
    run = one.run_tests("python", _ATTACKS[name] + "\n", [Test(code="import math\n" + _CODE)])[0]
    assert run.outcome is Outcome.FAIL, run


@needs_bwrap
def test_wrong_programs_fail_for_another_user(box: Any) -> None:
    for name in ("an object that equals everything", "a reply with a call of exec", "files of the test"):
        assert box.run_tests("python", _ATTACKS[name] + "\n", [Test(code=_CODE)])[0].outcome is Outcome.FAIL, name


@needs_bwrap
@pytest.mark.parametrize(
    "code",
    [
        "assert abs(add(1, 2) - 3) < 1e-9",
        "assert add(1, 2) == 3",
        "assert 3 == add(1, 2)",
        "assert add(1, 2) in (3, 4)",
        "assert 3 in add(1, 2)",
        "assert isinstance(add(1, 2), int)",
        "assert not add(1, 2) != 3",
        "assert add(1, 2) <= 3",
        "assert {3: 1}[add(1, 2)] == 1",
        "assert sorted([add(1, 2), 3]) == [3, 3]",
        "assert add(1, 2) + 1 == 4",
        "try:\n    assert add(1, 2) == 3\nexcept ValueError: pass",
        "assert add(1, 2) * 0 == 0 and add(1, 2) - 3 == 0",
    ],
)
def test_an_object_that_equals_everything_passes_no_form_of_a_test(one: Sandbox, code: str) -> None:
    assert one.run_tests("python", _EVIL + "def add(a, b): return Evil()", [Test(code=code)])[0].outcome is Outcome.FAIL


@needs_bwrap
def test_the_end_of_the_program_is_not_an_expected_exception(one: Sandbox) -> None:
    """`except Exception: pass` around the call does not take the end of the program for an error of it."""
    code = "try:\n    add(1, 2)\nexcept Exception:\n    pass\nexcept BaseException:\n    pass"
    for source in ("import os\ndef add(a, b): os._exit(0)", "import os\ndef add(a, b): os.write(4, b'nonsense\\n')"):
        assert one.run_tests("python", source, [Test(code=code)])[0].outcome is Outcome.FAIL
    assert one.run_tests("python", "def add(a, b): raise ValueError", [Test(code=code)])[0].outcome is Outcome.PASS


@needs_bwrap
def test_limits_are_those_of_the_program(one: Sandbox) -> None:
    run = one.run_tests("python", "def f(): return 1\nbytearray(10**10)", [Test(code="assert f() == 1")])[0]
    assert run.outcome is Outcome.FAIL
    run = one.run_tests("python", "def f():\n    while True: print('x' * 1000)", [Test(code="assert f() == 1")])[0]
    assert (run.outcome, run.killed_by) == (Outcome.FAIL, "output")


# --- the verdict, without bubblewrap


def _run(
    outcome: Outcome = Outcome.PASS,
    stderr: bytes = b"",
    killed_by: str | None = None,
    reason: str = "",
    stdout: bytes = b"",
) -> Run:
    return Run(outcome, 0, stdout, stderr, 0.1, killed_by, reason)


@pytest.mark.parametrize(
    ("stderr", "outcome"),
    [
        (f"noise\n{NONCE} PASS \n", Outcome.PASS),
        (f"{NONCE} PASS\n", Outcome.PASS),
        (f"{NONCE} FAIL an assertion failed\n", Outcome.FAIL),
        (f"{NONCE} ERROR the test does not compile\n", Outcome.ERROR),
        (f"{NONCE} PASSED\n", Outcome.ERROR),
        (f"{NONCE} PASS\nand more\n", Outcome.FAIL),
        (f"x{NONCE} PASS\n", Outcome.FAIL),
        (f"{NONCE[:-1]} PASS\n", Outcome.FAIL),
        (f"{NONCE[::-1]} PASS\n", Outcome.FAIL),
        (" PASS\n", Outcome.FAIL),
        ("PASS\n", Outcome.FAIL),
        # What a test may print for a program, with status 0.
        ("RuntimeError: Bad magic number in .pyc file\n", Outcome.FAIL),
        ("", Outcome.FAIL),
    ],
)
def test_only_the_nonce_passes(stderr: str, outcome: Outcome) -> None:
    assert judge(NONCE, _run(stderr=stderr.encode()), _run(killed_by="stop")).outcome is outcome


def test_a_verdict_needs_both_sandboxes() -> None:
    """An infrastructure error of either is one of the test; a limit that the program met is its failure."""
    passed, error = _run(stderr=f"{NONCE} PASS\n".encode()), _run(Outcome.ERROR, reason="broken")
    assert judge(NONCE, passed, error).outcome is Outcome.ERROR
    assert judge(NONCE, error, _run(killed_by="stop")).outcome is Outcome.ERROR
    for killed_by in ("time", "cpu", "memory", "output", "files"):
        judged = judge(NONCE, passed, _run(Outcome.FAIL, killed_by=killed_by, reason="too much"))
        assert (judged.outcome, judged.killed_by) == (Outcome.FAIL, killed_by)
        assert judge(NONCE, _run(Outcome.FAIL, killed_by=killed_by), _run(killed_by="stop")).outcome is Outcome.FAIL


class Recorder:
    """A runner that keeps the jobs of conversations, in which every test passes. What it compiles is random bytes."""

    def __init__(self) -> None:
        self.description: dict[str, Any] = {}
        self.jobs: list[tuple[Job, Job]] = []
        self.compiled = [random.randbytes(9) for _ in range(3)]

    def converse(self, asking: Job, answering: Job) -> tuple[Run, Run]:
        self.jobs.append((asking, answering))
        return _run(stderr=asking.files["nonce"] + b" PASS"), _run()

    def execute(self, job: Job) -> Run:
        return _run(stdout="\n".join(code.hex() for code in self.compiled).encode())

    def find(self, program: str) -> str | None:
        raise AssertionError("not used")


def test_the_program_is_given_neither_nonce_nor_test() -> None:
    """What the program's sandbox contains does not depend on the test, and the nonce is new each time."""
    recorder = Recorder()
    assertions = Assertions(recorder)
    program = Job(("python3", "main.py"), Limits(), {"main.py": b"def f(): pass"})
    for code in ("assert f() == 41", "assert f() == 41", "assert f() == 42"):
        assertions.check(program, code, "python3")
    trial, first, second, third = recorder.jobs
    assert first[1] == second[1] == third[1]
    nonces = {asking.files["nonce"] for asking, _ in recorder.jobs}
    assert len(nonces) == 4
    for asking, answering in (first, second, third):
        assert asking.files["test.py"].startswith(b"assert f()")
        assert "main.py" not in asking.files
        everything = b"".join(answering.files.values()) + repr(answering).encode()
        assert asking.files["nonce"] not in everything
        assert b"41" not in b"".join(content for name, content in answering.files.items() if name == "main.py")
        # All get the same scripts.
        for here, there in ((asking, trial[0]), (answering, trial[1])):
            assert {n: x for n, x in here.files.items() if n.endswith(".pyc")} == {
                n: x for n, x in there.files.items() if n.endswith(".pyc")
            }


# --- the scripts inside


@needs_bwrap
def test_scripts_are_compiled_by_the_interpreter_that_runs_them(one: Sandbox) -> None:
    """The bytecode has the magic number of the interpreter inside, whatever that of this process is."""
    source = "import importlib.util; print(importlib.util.MAGIC_NUMBER.hex())"
    magic = bytes.fromhex(one.run("python", source).stdout.decode())
    assert one.run_tests("python", "x = 1", [Test(code="assert x == 1")])[0].outcome is Outcome.PASS
    (compiled,) = one._assertions._compiled.values()
    assert sorted(compiled) == ["sandbox_answering", "sandbox_asking", "sandbox_wire"]
    assert all(code.startswith(magic) for code in compiled.values())


# What overwrites the scripts that it finds, in every place where Python looks for them.
_VANDAL = """
import glob, os, sys
for name in ("sandbox_wire", "sandbox_asking", "sandbox_answering"):
    for file in (f"{name}.py", f"{name}.pyc", f"__pycache__/{name}.{sys.implementation.cache_tag}.pyc"):
        os.makedirs("__pycache__", exist_ok=True)
        with open(file, "wb") as opened: opened.write(b"import os; os._exit(0)")
for name in list(sys.modules["sandbox_wire"].__dict__): delattr(sys.modules["sandbox_wire"], name)
"""


@needs_bwrap
def test_a_program_cannot_change_the_scripts_of_the_next(one: Sandbox) -> None:
    right, wrong = "def f(x): return x", "def f(x): return 0"
    test = [Test(code=f"assert f({random.randrange(1, 100)}) > 0")]
    before = {}
    for _ in range(2):
        assert one.run_tests("python", right, test)[0].outcome is Outcome.PASS
        before = before or dict(one._assertions._compiled)
        assert one.run_tests("python", wrong, test)[0].outcome is Outcome.FAIL
        assert one.run_tests("python", _VANDAL + right, test)[0].outcome is not Outcome.ERROR
        assert one._assertions._compiled == before


# Version 3.7 is the first that has `from __future__ import annotations`.
_PYTHONS = sorted(
    {
        os.path.realpath(path)
        for folder in ("/usr/bin", "/usr/local/bin", f"{Path.home()}/.pyenv/versions/*/bin")
        for path in [sys.executable, *glob.glob(f"{folder}/python3.*")]
        if re.search(r"python3\.([7-9]|\d\d)$", os.path.realpath(path))
    }
)


@pytest.mark.parametrize("python", _PYTHONS)
def test_scripts_run_on_each_python_that_is_here(python: str) -> None:
    """Both sides of a conversation, all tags of values, wrong programs and bad tests, from Python 3.7 on."""
    assertions = Assertions(Unconfined())
    job = Job((python, "main.py"), Limits(), {"main.py": _PROGRAM.encode()})
    # What is in the standard library is known from 3.10 on.
    tests = "\n".join(line for line in _TESTS.splitlines() if "math." not in line)
    run = assertions.check(job, tests, python)
    assert run.outcome is Outcome.PASS, run
    for code, outcome in (
        ("assert add(1, 2) == 4", Outcome.FAIL),
        ("assert add(1, 2) ==", Outcome.ERROR),
        ("add(eval)", Outcome.ERROR),
        ("fail()", Outcome.FAIL),
    ):
        assert assertions.check(job, code, python).outcome is outcome


@needs_bwrap
def test_bytecode_of_another_version_is_an_error() -> None:
    """If the interpreter changes while the supervisor lives, no verdict is given."""
    with Sandbox(LIMITS, workers=1) as box:
        test = [Test(code="assert x == 1")]
        assert box.run_tests("python", "x = 1", test)[0].outcome is Outcome.PASS
        compiled = box._assertions._compiled
        for python, scripts in compiled.items():
            compiled[python] = {name: bytes([code[0] ^ 1]) + code[1:] for name, code in scripts.items()}
        run = box.run_tests("python", "x = 1", test)[0]
        assert (run.outcome, "interpreter" in run.reason) == (Outcome.ERROR, True)


@pytest.mark.parametrize("what", ["status", "output", "lines", "trial", "machine"])
def test_scripts_that_cannot_be_compiled_are_an_error(what: str) -> None:
    """Whatever keeps the scripts from running on an interpreter is the machine's error, and is tried anew each time."""

    class Broken(Recorder):
        broken = True

        def execute(self, job: Job) -> Run:
            if self.broken and what in ("status", "machine"):
                return _run(Outcome.FAIL if what == "status" else Outcome.ERROR, reason="why")
            if self.broken and what == "output":
                return _run(stdout=b"no bytecode\n" * 3)
            if self.broken and what == "lines":
                return _run(stdout=b"00\n00\n")
            return super().execute(job)

        def converse(self, asking: Job, answering: Job) -> tuple[Run, Run]:
            return (_run(), _run()) if self.broken and what == "trial" else super().converse(asking, answering)

    runner = Broken()
    assertions = Assertions(runner)
    program = Job(("python3", "main.py"), Limits(), {"main.py": b"x = 1"})
    for _ in range(2):
        assert assertions.check(program, "assert x == 1", "python3").outcome is Outcome.ERROR
    runner.broken = False
    assert assertions.check(program, "assert x == 1", "python3").outcome is Outcome.PASS


_WIRE_SCRIPT = Path(assertions_module.__file__).parent / "inside" / "sandbox_wire.py"


def _message(depth: int) -> Any:
    kinds = [
        lambda: random.random() < 0.5,
        lambda: random.getrandbits(random.randrange(1, 80)) - 5,
        lambda: "".join(chr(random.randrange(0x110000)) for _ in range(random.randrange(4))),
        lambda: None,
    ]
    if depth:
        kinds += [
            lambda: [_message(depth - 1) for _ in range(random.randrange(4))],
            lambda: {str(random.random()): _message(depth - 1) for _ in range(random.randrange(4))},
        ]
    return random.choice(kinds)()


def test_the_wire_is_json() -> None:
    """Messages are written and read as `json` does it, and what `json` refuses is refused."""
    wire = runpy.run_path(str(_WIRE_SCRIPT))
    for _ in range(300):
        message = [_message(4)]
        text = wire["dumps"](message)
        assert text == json.dumps(message)
        assert wire["loads"](text.encode() + b"\n") == message
        # One character more, less or another.
        place = random.randrange(len(text))
        bad = text[:place] + random.choice(["", *'[]{}",:1ntx\\']) + text[place + random.randrange(2) :]
        try:
            expected = json.loads(bad)
        except ValueError:
            with pytest.raises(ValueError):  # noqa: PT011
                wire["loads"](bad.encode() + b"\n")
        else:
            assert repr(wire["loads"](bad.encode() + b"\n")) == repr(expected)


# --- the check of the syntax


@needs_bwrap
def test_one_test_has_the_verdict_of_two(one: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single test is run before the check of the syntax, two after it: verdict, reason and limit are the same."""
    checks: list[Job] = []
    execute = one._runner.execute
    monkeypatch.setattr(one._runner, "execute", lambda job: checks.append(job) or execute(job))
    right, number = "def f(x): return x", random.randrange(2, 100)
    programs = [
        right,
        "def f(x): return 1",
        "def f(x) return x",
        "x = 1 / 0",
        "import sys; sys.exit(0)",
        "def f(x):\n    while True: pass",
    ]
    for program in programs:
        for code in (f"assert f({number}) == {number}", "assert True", "assert f("):
            (first,) = one.run_tests("python", program, [Test(code=code)])
            second, third = one.run_tests("python", program, [Test(code=code)] * 2)
            for other in (second, third):
                assert first.outcome == other.outcome
                limits = {first.killed_by, other.killed_by}
                # Which limit an endless program meets first depends on what else the machine does.
                assert len(limits) == 1 or limits == {"cpu", "time"}
                if len(limits) == 1:
                    # How the end of the pipe was noticed depends on the moment.
                    assert first.reason.split(": [Errno")[0] == other.reason.split(": [Errno")[0]
    # A program that passes needs no check.
    checks.clear()
    assert one.run_tests("python", right, [Test(code=f"assert f({number}) == {number}")])[0].outcome is Outcome.PASS
    assert not checks
