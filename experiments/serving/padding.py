"""How much of the steps of part (a) is padding, counted without a device that computes.

    JAX_PLATFORMS=cpu python -m experiments.serving.padding --max-batched-tokens 2048

The real scheduler plans the 512 requests of the file of lengths, all there from the beginning, and the real runner
chooses the programs; they compute nothing (`host_cost.replace_programs`). The line says how many tokens the prefill
programs read for each token of a prompt, and how many rows the decode programs have for each row of a request.
"""

import argparse
import dataclasses
import json
from typing import Any

from experiments.serving import lengths, load
from experiments.serving.host_cost import replace_programs
from experiments.serving.models import make_engine, random_prompts
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.published import published


def count(max_batched_tokens: int, max_seqs: int, requests: int = 512) -> dict[str, Any]:
    """Rows and tokens of all steps, and those that are padding.

    Args:
      max_batched_tokens, max_seqs: of the engine.
      requests: of the file of lengths.
    """
    both = lengths.read()
    config = dataclasses.replace(published("tiny"), max_position_embeddings=2048)
    settings: dict[str, Any] = {"max_seqs": max_seqs, "max_length": 2048, "max_batched_tokens": max_batched_tokens}
    padded = {"prefill": 0, "decode": 0}
    steps = {"prefill": 0, "decode": 0}
    rows = [0]
    with make_engine(config, dtype="float32", num_pages=64 * max_seqs, **settings) as engine:
        replace_programs(engine)
        runner = engine._runner
        run, decode = runner._run, runner.decode_slots

        def counted(program: Program, *args: Any) -> Any:
            if program.kind in padded:
                padded[program.kind] += program.tokens or program.rows
                steps[program.kind] += 1
            return run(program, *args)

        def counted_decode(slots: Any, *args: Any) -> Any:
            rows[0] += len(slots)
            return decode(slots, *args)

        def install() -> None:
            runner._run, runner.decode_slots = counted, counted_decode  # type: ignore[method-assign, assignment]

        engine.call(install)
        prompts = random_prompts(engine, both.input[:requests])
        found = load.make_requests(prompts, both.output[:requests])
        engine.generate(found)
        read, preempted = engine.stats().prompt_tokens, engine.stats().preemptions
    return {
        "max_batched_tokens": max_batched_tokens,
        "prefill_steps": steps["prefill"],
        "prompt_tokens": read,
        "padded_prompt_tokens": padded["prefill"],
        "prompt_tokens_of_a_step": read / steps["prefill"],
        "prefill_padding": padded["prefill"] / read,
        "decode_steps": steps["decode"],
        "mean_decode_rows": rows[0] / steps["decode"],
        "decode_padding": padded["decode"] / rows[0],
        "preemptions": preempted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-batched-tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--max-seqs", type=int, default=256)
    args = parser.parse_args()
    for tokens in args.max_batched_tokens:
        print(json.dumps(count(tokens, args.max_seqs)), flush=True)


if __name__ == "__main__":
    main()
