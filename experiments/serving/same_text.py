"""Does a model on a tensor axis of two devices give the texts that it gives on one?

    python -m experiments.serving.same_text --folder results
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python -m experiments.serving.same_text --model tiny-untied --max-length 128

Two engines with the same random weights get the same requests, half of them greedy, half sampled. The last JSON line
says how many texts are equal, how far log-probabilities are apart before texts part, and how far those of two greedy
tokens are apart where they part: rounding decides only between tokens that are nearly as likely. In float32, with full
precision of products, the status is 1 if more than a quarter of the texts part, or if greedy ones part by more than
`NEAR`. In bfloat16, which is only reported, more texts part.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.decode.benchmark import random_params, say
from experiments.serving.models import random_prompts
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.outputs import Finished
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published

NEAR = 1e-3
"""Natural logarithms of probabilities that float32 may confuse, after the layers of 7B."""


def texts(args: argparse.Namespace, devices: int) -> list[Finished]:
    """The texts of all requests on a tensor axis of so many devices: one half greedy, the other sampled."""
    begin = time.monotonic()
    mesh = make_mesh({"tensor": devices}, jax.devices()[:devices])
    config = published(args.model)
    lengths = np.random.default_rng(args.seed).integers(1, args.max_length // 2, args.requests).tolist()
    settings: dict[str, Any] = {"dtype": args.dtype, "max_seqs": args.requests, "max_length": args.max_length}
    with ContinuousEngine(config, random_params(config, mesh), mesh, eos_token_ids=[], **settings) as engine:
        ending = Ending(frozenset(), (), args.max_length // 2)
        requests = [
            Request(ids, ending, SamplingParams(temperature=float(i % 2), seed=i))
            for i, ids in enumerate(random_prompts(engine, lengths, seed=args.seed))
        ]
        found = list(engine.generate(requests))
    say(devices=devices, card=jax.devices()[0].device_kind, seconds=time.monotonic() - begin)
    return found


def compare(one: list[Finished], other: list[Finished]) -> dict[str, Any]:
    """How many texts are equal, and how far log-probabilities are apart; those with an even index are greedy."""
    equal, until_parted, greedy_parted = 0, [0.0], [0.0]
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        apart = [abs(x.logprob - y.logprob) for x, y in zip(a.tokens, b.tokens, strict=True)]
        first = next((t for t, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y), None)
        equal += first is None
        until_parted += apart[:first]
        if first is not None and i % 2 == 0:
            greedy_parted.append(apart[first])
    return {
        "texts": len(one),
        "equal": equal,
        "tokens_compared": len(until_parted) - 1,
        "most_apart": max(until_parted),
        "greedy_parted_by": max(greedy_parted),
        "ok": 4 * equal >= 3 * len(one) and max(greedy_parted) <= NEAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512, help="of a prompt and its text; half of it is new")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--folder", help="gets the last line, as same_text.json")
    args = parser.parse_args()
    if args.dtype == "float32":
        # GPUs would round float32 to TF32 in products.
        jax.config.update("jax_default_matmul_precision", "highest")
    one = texts(args, 1)
    # The first engine's memory is free before the second one takes its own.
    gc.collect()
    found = compare(one, texts(args, args.devices))
    result = {"jax": jax.__version__, "command": sys.argv[1:], "dtype": args.dtype, **found}
    print(json.dumps(result), flush=True)
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
        (Path(args.folder) / "same_text.json").write_text(json.dumps(result) + "\n")
    sys.exit(args.dtype == "float32" and not found["ok"])


if __name__ == "__main__":
    main()
