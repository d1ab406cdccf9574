"""Loads a folder twice and prints, in bytes, how much more memory than before each needs at most.

The first time arrays leave the host as soon as they are made, as with an accelerator; the second time they stay.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import jax

import convert
from convert import placement
from qwen_jax.parallel.sharding import make_mesh


def status(key: str) -> int:
    """A number of bytes that the kernel knows of this process."""
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024


def needed(folder: str) -> int:
    """The most memory while a folder is loaded, less that before."""
    gc.collect()
    before = status("VmRSS")
    params = convert.load(folder, make_mesh({}, jax.devices()[:1]), "bfloat16")[1]
    jax.block_until_ready([x for x in jax.tree.leaves(params) if not x.is_deleted()])
    return status("VmHWM") - before


if __name__ == "__main__":
    small, large = sys.argv[1:]
    needed(small)  # What is imported and compiled counts for no folder.
    put = placement._put

    def leave(tree: Any, path: tuple[str, ...], value: jax.Array) -> None:
        value.delete()
        put(tree, path, value)

    placement._put = leave
    first = needed(large)
    placement._put = put
    print(first, needed(large))
