"""The harness of several processes: they form one cluster, and a failure of one ends all and tells why."""

import time
from pathlib import Path

import pytest

from tests.helpers.processes import ProcessError, run


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
