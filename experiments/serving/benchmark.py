"""Speed of the engine of many requests on one GPU, with random weights. See README.md for what each part measures.

    python -m experiments.serving.benchmark a --folder results
    python -m experiments.serving.benchmark b c --folder results
    JAX_PLATFORMS=cpu python -m experiments.serving.benchmark a b c d e f g h --size tiny

Each case of a part is a process of its own, so that each has the whole memory. Every line of output is a JSON object:
first the measurements, then the comparisons with their targets. `--folder` gets the same lines, a file for each part.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.serving.sizes import SIZES

PARTS: dict[str, tuple[str, ...]] = {
    "a": ("a-engine", "a-loop", "a-transformers"),
    "b": ("b-engine",),
    "c": ("c-chunked", "c-whole"),
    "d": ("d-loop", "d-engine", "d-server"),
    "e": ("e-uncached", "e-cached"),
    "f": ("f-engine",),
    "g": ("g-plain", "g-speculated"),
    "h": ("h-cold", "h-cached"),
}
TARGETS: tuple[tuple[str, str, str, float], ...] = (
    # What it is, the two measurements as "case/what", of which the first is divided by the second, and the least ratio.
    ("a-engine/engine greedy", "a-loop/fixed-batch decode loop", "output_tokens_per_s", 0.8),
    ("a-engine/engine greedy", "a-transformers/transformers, continuous batching", "output_tokens_per_s", 2.0),
    ("d-engine/engine, one request", "d-loop/fixed-batch decode loop", "decode_tokens_per_s", 0.9),
    ("d-server/server, one request", "d-loop/fixed-batch decode loop", "decode_tokens_per_s", 0.9),
    ("e-cached/prompts of which 90% is shared, cache on", "e-uncached/prompts of which 90% is shared, cache off",
     "requests_per_s", 2.0),
    ("f-engine/engine, JSON schema", "f-engine/engine, free", "output_tokens_per_s", 0.95),
    ("g-speculated/repetitive text", "g-plain/repetitive text", "decode_tokens_per_s", 1.8),
)  # fmt: skip
STRETCH = 14_000
"""Output tokens per second of part (a)."""
READY = 30.0
"""Seconds from the start of a process to its first token, with cached programs."""

Record = dict[str, Any]


def header() -> Record:
    """What ran, on what: versions, card, date and command. JAX is not touched: the cases need the device."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "transformers", "torch", "llguidance"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    command = " ".join(["python -m experiments.serving.benchmark", *sys.argv[1:]])
    return {
        "python": platform.python_version(),
        **versions,
        **card(),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


def card() -> Record:
    """Name and driver of the GPU, or the processor where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"card": f"none ({platform.machine()} CPU)"}
    name, driver = done.stdout.splitlines()[0].split(", ")
    return {"card": name, "driver": driver}


def attempt(case: str, argv: list[str], seconds: float, cache: str) -> list[Record]:
    """The lines of one case, or the one that says why there are none."""
    environment = dict(os.environ)
    # Nothing else uses the GPU; the engine itself leaves a tenth of this. JAX takes only one of the two variables.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:
        environment.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if case == "a-transformers":
        environment["JAX_PLATFORMS"] = "cpu"
    begin = time.perf_counter()
    command = [sys.executable, "-m", "experiments.serving.benchmark", *argv, "--here", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired as error:
        lines = _lines(error.stdout or "")
        return [*lines, {"what": case, "error": f"not finished after {seconds:.0f} s"}]
    lines = _lines(done.stdout)
    if done.returncode:
        # The cause of a failure in the thread of an engine stands far above the last lines.
        tail = "\n".join(done.stderr.splitlines()[-120:])[-12000:]
        lines.append({"what": case, "error": f"status {done.returncode}: {tail}"})
    lines.append({"what": "process", "seconds": round(time.perf_counter() - begin, 1)})
    return lines


def _lines(text: str | bytes) -> list[Record]:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"') and line.endswith("}")]


class Results:
    """Prints lines, and appends them to a file for each part."""

    def __init__(self, folder: str | None, common: Record) -> None:
        self._folder, self._common = None if folder is None else Path(folder), common
        self.records: dict[str, list[Record]] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, case: str, record: Record) -> None:
        """A line; the file also has versions, card, date and command in each."""
        line = {"part": part, "case": case, **record}
        self.records.setdefault(case, []).append(record)
        print(json.dumps(line), flush=True)
        if self._folder is not None:
            with open(self._folder / f"serving-{part}.jsonl", "a") as file:
                file.write(json.dumps({**line, **self._common}) + "\n")

    def find_all(self, name: str) -> list[Record]:
        """The measurements of a case that are described as in "case/what", or else those that begin so."""
        case, what = name.split("/", 1)
        measured = [r for r in self.records.get(case, []) if "error" not in r]
        exact = [r for r in measured if r.get("what") == what]
        return exact or [r for r in measured if str(r.get("what", "")).startswith(what)]

    def find(self, name: str) -> Record | None:
        """The last one of `find_all`."""
        return found[-1] if (found := self.find_all(name)) else None


def run_part(part: str, args: argparse.Namespace, argv: list[str], results: Results) -> None:
    """Runs the cases of a part, one after the other, and compares them."""
    with tempfile.TemporaryDirectory() as fresh:
        for case in PARTS[part]:
            if (case == "a-transformers" and args.no_peer) or (args.cases and case not in args.cases):
                continue
            more = _loop_arguments(case, args, results)
            cache = fresh if part == "h" else args.cache
            for record in attempt(case, [*argv, *more], args.each, cache):
                results.add(part, case, record)
    for ours, other, key, target in TARGETS:
        if ours[0] == part:
            compare(part, ours, other, key, target, results)
    greedy, cached = results.find("a-engine/engine greedy"), results.find("h-cached/start")
    if part == "a" and greedy is not None:
        rate = greedy["output_tokens_per_s"]
        results.add(part, "compare", {"compare": "stretch", "value": rate, "target": STRETCH, "met": rate >= STRETCH})
    if part == "h" and cached is not None:
        ready = cached["ready_s"]
        results.add(part, "compare", {"compare": "ready", "value": ready, "target": READY, "met": ready <= READY})


def _loop_arguments(case: str, args: argparse.Namespace, results: Results) -> list[str]:
    """The fixed batch has as many rows, and as many tokens in its cache, as the engine had on average."""
    size = SIZES[args.size]
    if case == "d-loop":
        prompt, new = size.single
        return ["--rows", "1", "--live", str(prompt + new // 2)]
    ours = results.find("a-engine/engine greedy")
    if case != "a-loop" or ours is None:
        return []
    return ["--rows", str(max(math.floor(ours["mean_decode_rows"] + 0.5), 1)), "--live", str(ours["mean_live"])]


def compare(part: str, ours: str, other: str, key: str, target: float, results: Results) -> None:
    """Adds the ratios of two measurements at each concurrency, if there are both."""
    for first in results.find_all(ours):
        for second in results.find_all(other):
            # A loop of one row has one rate.
            above, below = (r.get(key, r.get("output_tokens_per_s")) for r in (first, second))
            if first.get("concurrency") != second.get("concurrency") or not above or not below:
                continue
            what = {"compare": f"{ours} / {other}", "of": key}
            if "concurrency" in first:
                what["concurrency"] = first["concurrency"]
            ratio = above / below
            results.add(part, "compare", {**what, "ratio": round(ratio, 4), "target": target, "met": ratio >= target})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--folder", help="gets the lines, a file for each part")
    parser.add_argument("--each", type=float, default=280, help="seconds that one process may take")
    parser.add_argument("--cases", nargs="+", help="only these cases of the parts")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--peer-tokens", type=int, help="tokens of a batch of transformers; by default its own choice")
    parser.add_argument(
        "--warm",
        choices=("start", "run"),
        default="start",
        help="compile all programs, or only those that the same requests use when they run before they are measured",
    )
    parser.add_argument("--max-seqs", type=int, help="requests that run at a time")
    parser.add_argument("--max-batched-tokens", type=int, help="prompt tokens of a step, but for part c")
    parser.add_argument("--max-length", type=int, default=8192, help="of part h; 0: the model's context")
    parser.add_argument("--rates", type=float, nargs="+", help="arrivals a second, of part c")
    parser.add_argument("--speculate", type=int, default=4, help="proposals of part g")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for parts d and f")
    parser.add_argument("--loop-steps", type=int, default=64, help="of the fixed batch")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "qwen_jax_serving_programs"))
    for name, kind in (("--here", str), ("--rows", int), ("--live", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.cases or ()) - {case for part in args.parts for case in PARTS[part]}
    if unknown:
        parser.error(f"no part of {args.parts} has the case {min(unknown)}")
    return args


def main() -> None:
    args = parse()
    if args.here == "a-transformers":
        from experiments.serving import transformers_peer

        return transformers_peer.run(args)
    if args.here:
        from experiments.serving import cases

        return cases.run(args.here, args)
    common = header()
    if "driver" in common:
        # Where there is a GPU that JAX cannot use, it would go on with the CPU.
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
    results = Results(args.folder, common)
    print(json.dumps(common), flush=True)
    for part in args.parts:
        run_part(part, args, sys.argv[1:], results)


if __name__ == "__main__":
    main()
