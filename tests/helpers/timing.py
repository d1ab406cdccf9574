"""Rates of work, measured on a machine that others use."""

import time
from collections.abc import Callable


def best_rate(count: int, work: Callable[[int], object], enough: float, attempts: int = 3) -> float:
    """Units of work a second of this process's CPU time: the best of some attempts, ending with one that is enough.

    A program on the other half of the same core halves a rate, so a single attempt would measure the neighbours.

    Args:
      count: units of work that one attempt does.
      work: does them, given the number of the attempt.
      enough: no further attempt is made above this rate.
    """
    best = 0.0
    for attempt in range(attempts):
        began = time.process_time()
        work(attempt)
        best = max(best, count / (time.process_time() - began))
        if best > enough:
            break
    print(f"{best:.0f} a second of CPU time")
    return best
