"""How long a message of an engine takes from process 0 to another process, for page tables of some sizes.

Start it twice, on one machine or on two:

    python -m experiments.serving.messages 127.0.0.1:9000 0
    python -m experiments.serving.messages 127.0.0.1:9000 1
"""

import argparse
import time

import numpy as np

from qwen_jax.parallel.broadcast import Broadcast
from train.distributed import join

ROWS, CHANGES, MESSAGES = 256, 512, 256


def milliseconds(pages: int, like: str) -> float:
    """Of each message: a table whose rows move up by one, and of which some numbers change, between two messages."""
    broadcast, rng = Broadcast(), np.random.default_rng(0)
    table = rng.integers(0, 8000, (ROWS, 3 + pages)).astype(np.int32)
    table[:, 0] = rng.permutation(ROWS)
    begin = time.perf_counter()
    for _ in range(MESSAGES):
        if broadcast.sends:
            table = np.roll(table, -1, axis=0)
            table[rng.integers(0, ROWS, CHANGES), rng.integers(1, 3 + pages, CHANGES)] += 1
            broadcast.send({"program": ["decode", ROWS, 0, 32 * pages, "plain"]}, [table], like, column=0)
        else:
            broadcast.receive()
    return (time.perf_counter() - begin) / MESSAGES * 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coordinator", help="HOST:PORT of process 0")
    parser.add_argument("process", type=int, choices=(0, 1))
    args = parser.parse_args()
    join(args.coordinator, 2, args.process)
    for pages in (1, 32, 128, 1024):
        whole, changed = milliseconds(pages, ""), milliseconds(pages, "table")
        size = ROWS * (3 + pages) * 4 / 1e3
        print(f"{pages} pages a row, {size:,.0f} kB: {changed:.1f} ms; sent whole: {whole:.1f} ms")
