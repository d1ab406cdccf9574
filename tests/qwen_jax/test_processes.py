"""The harness of several processes: they form one cluster, and a failure of one ends all and tells why."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.parallel.broadcast import Broadcast, Exchange
from tests.helpers.processes import ProcessError, run
from tests.helpers.runs import print_seed


def total(start: float) -> tuple[int, int, float]:
    """A sum over every device of the cluster."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from qwen_jax.parallel.sharding import make_mesh

    sharding = NamedSharding(make_mesh({"data": jax.device_count()}), P("data"))
    values = start + np.arange(jax.device_count(), dtype=np.float32)
    x = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    return jax.process_index(), jax.local_device_count(), float(jax.jit(jnp.sum)(x))


def test_processes_are_one_cluster() -> None:
    assert run(total, 1.0, processes=2, devices=2) == [(0, 2, 10.0), (1, 2, 10.0)]


def messages(seed: int) -> list[tuple[Any, list[np.ndarray]]]:
    """Random messages: each is unlike the one before it, or its arrays have other shapes, or differ little or
    much, or in the order of their rows."""
    rng, found = np.random.default_rng(seed), list[tuple[Any, list[np.ndarray]]]()
    arrays: list[np.ndarray] = []
    column = None
    for i in range(200):
        if not arrays or rng.random() < 0.05:
            column = None if rng.random() < 0.5 else 0
            shapes = [rng.integers(0, 80, rng.integers(0, 3)) for _ in range(rng.integers(5))]
            arrays = [
                (rng.integers(0, 2**15, shape) * (rng.random(shape) < 0.9)).astype(rng.choice(["i4", "u2", "f4", "?"]))
                for shape in shapes
            ]
        if rng.random() < 0.5:
            arrays = [rng.permutation(x) if x.ndim else x for x in arrays]
        arrays = [
            np.where(rng.random(x.shape) < rng.choice([0.01, 0.02, 0.9]), x + 1, x).astype(x.dtype) for x in arrays
        ]
        if rng.random() < 0.5:  # Other bits of equal values.
            arrays = [np.where(x == 0, -x, x) if x.dtype == "f4" else x for x in arrays]
        found.append(({"i": i, "text": "\ud83d", "like": ["", "a", "b"][rng.integers(3)], "column": column}, arrays))
    return found


def exchange(seed: int) -> int:
    """In one of several processes: messages of process 0 and of all come as they were sent. The number of processes."""
    broadcast, everybody, sent = Broadcast(), Exchange(), messages(seed)
    for message, arrays in sent:
        got, found = message, arrays
        if broadcast.sends:
            if message["i"] == 100:
                with pytest.raises(TypeError, match="not JSON serializable"):
                    broadcast.send(object())
            broadcast.send(message, arrays, message["like"], message["column"])
        else:
            got, found = broadcast.receive()
        assert got == message
        assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in arrays]
        assert all(x.tobytes() == y.tobytes() for x, y in zip(found, arrays, strict=True))
    here = jax.process_index()
    for i in range(5):
        shared = everybody.share("This", lambda i=i: ([i, here], [np.full(here, i)]))  # type: ignore[misc]
        assert [(message, x.tolist()) for message, (x,) in shared] == [([i, 0], []), ([i, 1], [i])]

    def fail_in_one() -> Any:
        if here == 1:
            raise ZeroDivisionError
        return None, []

    with pytest.raises((InputError, ZeroDivisionError), match="That failed in process 1" if here == 0 else ""):
        everybody.share("That", fail_in_one)
    return len(everybody.share("At last", lambda: (None, [])))


def test_messages_between_processes_arrive_as_they_were_sent() -> None:
    rng = print_seed()
    assert run(exchange, int(rng.integers(2**31))) == [2, 2]


def fail_in_one() -> None:
    import jax

    if jax.process_index() == 1:
        raise ValueError("the reason")
    time.sleep(600)


def test_failure_of_one_ends_all_and_is_told() -> None:
    start = time.monotonic()
    with pytest.raises(ProcessError, match="ValueError: the reason"):
        run(fail_in_one)
    assert time.monotonic() - start < 60


def test_too_much_time_ends_all() -> None:
    with pytest.raises(ProcessError, match="Not done within 1 second"):
        run(time.sleep, 600, processes=1, timeout=1)


def test_scripts_run_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys, jax\n"
        "open(sys.argv[1] + str(jax.process_index()), 'w').write(str(jax.device_count()))\n"
        "sys.exit(0)\n"
    )
    assert run(tmp_path / "script.py", f"{tmp_path}/out-", devices=3) == [None, None]
    assert [(tmp_path / f"out-{i}").read_text() for i in range(2)] == ["6", "6"]
