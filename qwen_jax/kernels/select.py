"""How every implementation of an operation is selected.

`select` picks by what the caller asks for, by the platform and by the arguments. It logs each distinct outcome once and
raises where the requested implementation cannot do what is asked: nothing falls back silently. It runs while a program
is traced, never on the device.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence

from qwen_jax import platform
from qwen_jax.errors import InputError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An implementation of an operation.

    Attributes:
      name: what the caller passes as `implementation`.
      missing: what it needs and does not have here, each a noun phrase such as "a Hopper GPU". Empty if it can run.
      automatic: whether "auto" may select it.
      slow: whether it is the fall-back for accelerators. "auto" warns when it selects it anywhere but on a CPU.
    """

    name: str
    missing: tuple[str, ...] = ()
    automatic: bool = True
    slow: bool = False


def unmet(needs: Mapping[str, bool]) -> tuple[str, ...]:
    """The needs that are not met.

    Args:
      needs: for each need, a noun phrase, whether it is met.
    """
    return tuple(need for need, met in needs.items() if not met)


@functools.cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """Logs a message the first time it occurs in this process."""
    _log.log(level, message)


def select(candidates: Sequence[Candidate], asked: str, what: str, arguments: str) -> str:
    """Returns the name of the implementation that runs, and logs it once.

    Args:
      candidates: in the order in which "auto" tries them.
      asked: "auto", or the name of a candidate.
      what: the operation in the singular, such as "attention"; for messages.
      arguments: what the choice depends on, such as dtype and sizes; for messages.

    Raises:
      InputError: the name is unknown, or the implementation cannot do what is asked.
    """
    able = [c.name for c in candidates if not c.missing and c.automatic]
    by_name = {c.name: c for c in candidates}
    got = f"{arguments} on {platform.platform()}"
    if asked == "auto":
        if not able:
            raise InputError(f"No implementation of {what} can do {got}: {_reasons(candidates)}.")
        chosen = by_name[able[0]]
    elif asked not in by_name:
        raise InputError(f"Unknown {what} implementation {asked!r}: use auto, {', '.join(by_name)}.")
    else:
        chosen = by_name[asked]
        if chosen.missing:
            use = f" Use implementation={' or '.join(map(repr, able))}." if able else ""
            what = what[0].upper() + what[1:]
            raise InputError(f"{what} by {asked} needs {' and '.join(chosen.missing)}; got {got}.{use}")
    message = f"{what}, {got}: {chosen.name}"
    if asked == "auto" and chosen.slow and platform.platform() != "cpu":
        log_once(f"{message}, which is slow here ({_reasons(candidates)})", logging.WARNING)
    else:
        log_once(message)
    return chosen.name


def _reasons(candidates: Sequence[Candidate]) -> str:
    return "; ".join(f"{c.name} needs {' and '.join(c.missing)}" for c in candidates if c.missing)
