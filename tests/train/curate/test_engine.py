"""Jobs in workers."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from train.curate.engine import Engine, Job

ROOT = Path(__file__).parents[3]


def squares(fail: tuple[int, ...] = ()) -> Job:
    """Squares a number, but for some."""

    def job(number: int) -> int:
        if number in fail:
            raise InputError(f"{number} is bad")
        return number * number

    return job


def nothing() -> Job:
    raise InputError("a library is missing")


def test_results_are_those_of_the_jobs() -> None:
    jobs = [(f"job {i}", i) for i in range(20)]
    for light in (True, False):
        found = dict(Engine(workers=1).map("squares", squares, jobs, light=light))
        assert found == {f"job {i}": i * i for i in range(20)}
    assert not list(Engine(workers=1).map("squares", squares, []))


@pytest.mark.parametrize(
    ("make", "message", "done"),
    [
        (functools.partial(squares, (3, 5)), r"squares, job 3: 3 is bad\nsquares, job 5: 5 is bad", 18),
        # Where most fail, the rest is not tried.
        (functools.partial(squares, tuple(range(20))), r"8 of 20 shards failed", 0),
        (nothing, r"squares, job \d+: a library is missing \(1 of 20", 0),
    ],
)
def test_failures_are_named_and_the_others_done(make: Callable[[], Job], message: str, done: int) -> None:
    found = []
    with pytest.raises(InputError, match=message):
        found.extend(Engine(workers=1).map("squares", make, [(f"job {i}", i) for i in range(20)]))
    assert len(found) == done


def test_an_engine_that_is_not_installed_says_what_to_do(tmp_path: Path) -> None:
    for name, kind, extra in (("daft", "native", r"data"), ("ray", "ray", "data,ray")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("raise ImportError")
        code = (
            f"from train.curate.engine import Engine\ntry: Engine({kind!r})\nexcept ValueError as error: print(error)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / name), str(ROOT)])}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert f"not installed: pip install 'qwen-jax[{extra}]'" in done.stdout
