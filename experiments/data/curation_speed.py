"""What the core of a curation costs: reading, a condition, writing; CPU seconds of one process.

    python -m experiments.data.curation_speed [--megabytes 50]

The documents are pieces of Python's standard library, 500 to 8,500 characters each. Operators come on top.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.curate.corpus import View
from train.curate.curation import Input, Output, Select
from train.curate.jobs import computing, reading, writing
from train.curate.sources import find_units
from train.data.text import standard_library


def make_input(path: Path, size: int) -> None:
    """Writes JSON lines with so many bytes of text."""
    text = "".join(file.read_text("utf-8", "replace") for file in standard_library())
    at = number = 0
    with path.open("w") as file:
        while size > 0:
            piece = text[at : at + 500 + number * 37 % 8000]
            at, number = (at + 4999) % (len(text) - 10_000), number + 1
            size -= len(piece.encode())
            file.write(json.dumps({"text": piece, "number": number}) + "\n")


def main() -> None:
    """Prints the rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50)
    size = int(parser.parse_args().megabytes * 1e6)
    folder = Path(tempfile.mkdtemp(prefix="qwen-jax-curation-"))
    rates: dict[str, float] = {}

    def measure(name: str, function: Callable[[Any], Any], job: Any) -> None:
        began = time.process_time()
        function(job)
        rates[name] = size / 1e6 / (time.process_time() - began)

    try:
        make_input(folder / "a.jsonl", size)
        (unit,) = find_units(Input("a", str(folder / "a.jsonl")), 10 * size, folder / "run").units
        parts = [part.to_json() for part in unit.parts]
        job = {"name": unit.name, "key": "", "input": dataclasses.asdict(unit.input), "parts": parts}
        measure("read", reading(folder / "run", 10 * size), job)
        select, view = Select("length(text) > 1000 and length(text) < 8000"), View(folder / "run")
        measure("select", computing(view, select), ["a-00000-000", ""])
        for output in (Output(), Output("parquet")):
            measure(f"write {output.format}", writing(view, output, False), ["a-00000-000", ""])
        print(json.dumps({name: round(rate, 1) for name, rate in rates.items()}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
