"""What a training step could save if elementwise work moved into the kernels of matrix products: bytes, counted.

    python -m experiments.train.fusions

A product's kernel that also does the elementwise work beside it saves readings and writings of activations. It must
then be nearly as fast as the library's product: `slower` is by how much it may be slower before the saving is gone.
Results are in README.md.
"""

import argparse
import dataclasses

from qwen_jax.config import ModelConfig
from qwen_jax.published import published

# bfloat16 activations; the loss has float32 logits.
_ACTIVATION, _LOGIT = 2, 4


@dataclasses.dataclass(frozen=True)
class Fusion:
    """One fusion in a whole step.

    Attributes:
      what: is done in the kernel.
      nbytes: that are neither read nor written then.
      flops: of the products whose kernels change.
    """

    what: str
    nbytes: float
    flops: float


def fusions(model: ModelConfig, tokens: int) -> list[Fusion]:
    """The fusions of a step with activations kept as by remat `dots`.

    Args:
      model: a dense one.
      tokens: of the step.
    """
    D, F, L, V = model.hidden_size, model.intermediate_size, model.num_layers, model.vocab_size
    wide, hidden = tokens * F * _ACTIVATION, tokens * D * _ACTIVATION
    up_or_down = 2 * tokens * D * F
    queries = 2 * tokens * D * model.head_dim * model.num_heads
    keys_and_values = 2 * queries * model.num_kv_heads // model.num_heads
    return [
        # The backward pass needs gate and up, so that they are written all the same.
        Fusion("SwiGLU in the product of gate and up", L * 2 * wide, L * 2 * up_or_down),
        Fusion("gradient of SwiGLU in the product with down", L * 2 * wide, L * up_or_down),
        # Statistics of rows come from the kernel before; forward and backward, two norms a layer.
        Fusion(
            "norms in the products after them",
            L * 2 * 2 * 2 * hidden,
            L * 2 * (queries + keys_and_values + 2 * up_or_down),
        ),
        Fusion("residual sums in the products before them", L * 2 * 2 * hidden, L * (queries + up_or_down)),
        Fusion("maximum and sum of logits in the head's product", tokens * V * _LOGIT, 2 * tokens * D * V),
    ]


def report(model: ModelConfig, tokens: int, bandwidth: float, rate: float) -> str:
    """A line for each fusion, and one for all.

    Args:
      model, tokens: as for `fusions`.
      bandwidth: bytes per second.
      rate: of products, FLOP per second.
    """
    found = fusions(model, tokens)
    lines = []
    for one in found:
        saved = one.nbytes / bandwidth
        lines.append(f"| {one.what} | {1e3 * saved:.1f} | {100 * saved / (one.flops / rate):.0f}% |")
    lines.append(f"| all | {1e3 * sum(one.nbytes for one in found) / bandwidth:.1f} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs=3, default=[32768, 32768, 8192], help="of a step, for each size")
    parser.add_argument("--bandwidth", type=float, default=4.15e12, help="bytes per second")
    parser.add_argument("--rate", type=float, default=680e12, help="of products, FLOP per second")
    args = parser.parse_args()
    for name, tokens in zip(("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"), args.tokens, strict=True):
        print(f"| {name}, {tokens:,} tokens | ms | slower |\n|---|---|---|")
        print(report(published(name), tokens, args.bandwidth, args.rate), end="\n\n")


if __name__ == "__main__":
    main()
