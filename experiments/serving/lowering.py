"""How long an engine's start takes before XLA is asked: all programs traced and lowered, or read from disk.

    python -m experiments.serving.lowering --model qwen2.5-7b

The programs are those of part h of `benchmark.py`, lowered for an H200 that need not be there, with the weights' shapes
alone. It needs `jax[cuda13]` and no GPU; nothing is compiled or run. The first pass writes the lowered programs to a
folder that is removed at the end, the second reads them. Prints a JSON line for each pass.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax

from experiments.serving.memory import PAGE, arguments
from experiments.train.fp8_products import described_mesh
from qwen_jax.inference.buckets import Buckets, RunnerConfig
from qwen_jax.inference.runner_lowering import all_programs, prepare
from qwen_jax.published import published


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--max-seqs", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--tensor", type=int, default=1, help="GPUs")
    args = parser.parse_args()
    mesh = described_mesh(tensor=args.tensor)
    settings = RunnerConfig(args.max_seqs, args.max_length, PAGE, 16_384, max_batched_tokens=2048)
    params, static = arguments(published(args.model), settings, mesh)
    programs = all_programs(settings, Buckets.of(settings))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what in ("traced, lowered and written", "read"):
            processor, wall, longest = time.process_time(), time.perf_counter(), (0.0, "")
            for program in programs:
                start = time.perf_counter()
                prepare(program, static, mesh, params, folder)
                longest = max(longest, (time.perf_counter() - start, program.name))
            line = {
                "what": what,
                "programs": len(programs),
                "seconds": round(time.perf_counter() - wall, 2),
                "cpu_seconds": round(time.process_time() - processor, 2),
                "longest": f"{longest[1]}, {longest[0]:.2f} s",
                "mb": round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6, 1),
            }
            print(json.dumps({**line, "jax": jax.__version__, **vars(args)}), flush=True)


if __name__ == "__main__":
    main()
