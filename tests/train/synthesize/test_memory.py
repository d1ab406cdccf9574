"""The memory of a run does not grow with the number of items."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# 18,000 more items have 54 MB of texts; each is held several times while it is worked on.
MOST_GROWTH_MB = 10


def peak(folder: Path, items: int) -> float:
    """The peak of the memory of a process with so many items, in MB."""
    command = [sys.executable, "-m", "tests.train.synthesize.memory_run", str(folder), str(items)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def test_memory_does_not_grow_with_the_items(tmp_path: Path) -> None:
    few, many = peak(tmp_path / "few", 2_000), peak(tmp_path / "many", 20_000)
    print(f"peak: {few:.0f} MB with 2,000 items, {many:.0f} MB with 20,000")
    assert many - few < MOST_GROWTH_MB
    assert len((tmp_path / "many" / "sft.jsonl").read_bytes().splitlines()) == 15_000
