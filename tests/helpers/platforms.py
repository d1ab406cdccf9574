"""Lets kernels be selected as on a device that this machine does not have."""

import contextlib
from collections.abc import Iterator

import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen_jax import platform


@contextlib.contextmanager
def as_if_on(where: str) -> Iterator[None]:
    """Selects kernels as on "GPU", "Hopper GPU", "TPU" or, for anything else, a CPU.

    TPU kernels run in the interpreter. GPU kernels can be traced and lowered, not run.
    """
    names = {"GPU": "gpu", "Hopper GPU": "gpu", "TPU": "tpu"}
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(platform, "platform", lambda: names.get(where, "cpu"))
        patch.setattr(platform, "on_hopper", lambda: where == "Hopper GPU")
        if where == "TPU":
            stack.enter_context(pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()))
        yield
