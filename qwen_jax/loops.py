"""Loops whose number of iterations depends on data: their largest number, as part of the program's names."""

import re

_AT_MOST = re.compile(r"at_most_(\d+)_times")


def at_most(times: int) -> str:
    """Name of the scope of a loop that runs at most so often; plans count it so often."""
    return f"at_most_{times}_times"


def most_times(names: str) -> int | None:
    """The largest number of iterations of a loop, from the names of its scopes; None if they do not say."""
    found = _AT_MOST.findall(names)
    return int(found[-1]) if found else None
