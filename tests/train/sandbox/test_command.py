"""`qwen-jax sandbox`: output and exit status of run and check, and bad input."""

import json
from pathlib import Path

import pytest

from qwen_jax.cli import main
from tests.helpers.sandboxes import ISOLATIONS, needs_bwrap
from train.sandbox import LANGUAGES


@needs_bwrap
def test_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, data = tmp_path / "program.py", tmp_path / "data"
    file.write_text("import sys\nprint(input()[::-1])\nprint('log', file=sys.stderr)\nsys.exit(len(sys.stdin.read()))")
    data.write_text("abc\n")
    assert main(["sandbox", "run", str(file), "--input", str(data)]) == 0
    assert capfd.readouterr() == ("cba\n", "log\n")
    data.write_text("abc\nrest")
    assert main(["sandbox", "run", str(file), "--input", str(data)]) == 1
    out, err = capfd.readouterr()
    assert out == "cba\n"
    assert err.startswith("log\nfail: ended with status 4")
    assert main(["sandbox", "run", str(file), "--input", str(data), "--json"]) == 1
    record = json.loads(capfd.readouterr().out)
    assert record["outcome"] == "fail"
    assert (record["stdout"], record["exit_status"], record["killed_by"]) == ("cba\n", 4, None)


@needs_bwrap
def test_run_tests(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, tests = tmp_path / "program.txt", tmp_path / "tests.jsonl"
    file.write_text("def f(x): return x + 1\nif __name__ == '__main__': print(f(int(input())))")
    rows = [
        {"stdin": "1", "expected_stdout": "2"},
        {"stdin": "1", "expected_stdout": "3"},
        {"code": "assert f(1) == 2"},
    ]
    tests.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main(["sandbox", "run", str(file), "--language", "python", "--tests", str(tests)]) == 1
    lines = [line.partition(" (")[0] for line in capfd.readouterr().out.splitlines()]
    assert lines == ["test 1: pass", "test 2: fail: the output: line 1 differs", "test 3: pass"]


@needs_bwrap
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_check(isolation: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sandbox", "check", "--isolation", isolation, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["runner"]["isolation"] == isolation
    assert record["holds"]
    assert all(check["holds"] for check in record["checks"])
    assert record["languages"].keys() == LANGUAGES.keys()
    assert record["languages"]["bash"]
    assert main(["sandbox", "check", "--isolation", isolation]) == 0
    out = capfd.readouterr().out
    for name in LANGUAGES:
        assert f"\n{name} " in out
    assert "FAILS" not in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "missing.py"], "cannot be read"),
        (["run", "program.xyz"], "--language"),
        (["run", "program.py", "--tests", "tests.jsonl"], "line 2"),
        (["run", "program.py", "--tests", "empty.jsonl"], "no tests"),
        (["run", "program.py", "--tests", "empty.jsonl", "--input", "empty.jsonl"], "not both"),
        (["run", "latin.py"], "not UTF-8"),
        (["run", "program.py", "--seconds", "0"], "seconds"),
    ],
)
def test_bad_input(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "program.py": b"print(1)",
        "program.xyz": b"x",
        "tests.jsonl": b'{"stdin": "", "expected_stdout": ""}\n{"stdin": 1}\n',
        "empty.jsonl": b"\n",
        "latin.py": b"\xe9",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert main(["sandbox", *arguments]) == 1
    assert problem in capsys.readouterr().err


def test_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["sandbox", "check"]) == 1
    assert "apt-get install bubblewrap" in capsys.readouterr().err
