"""What moving elementwise work into products could save."""

from pathlib import Path

import numpy as np

from experiments.train.fusions import fusions, report
from qwen_jax.published import published

README = Path(__file__).parents[2] / "experiments/train/README.md"


def test_savings_are_those_of_a_step() -> None:
    """Bytes and FLOPs are proportional to tokens; products are no more than a forward and a backward pass have."""
    rng = np.random.default_rng()
    tokens, times = (int(x) for x in rng.integers(1, 1000, 2))
    for name in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"):
        model = published(name)
        few, many = fusions(model, tokens), fusions(model, times * tokens)
        assert [one.nbytes * times for one in few] == [one.nbytes for one in many]
        assert [one.flops * times for one in few] == [one.flops for one in many]
        # Gate and up, read in bfloat16, and the logits, read once in float32.
        by_hand = 2 * model.num_layers * model.intermediate_size * 2 * tokens, model.vocab_size * 4 * tokens
        assert (few[0].nbytes, few[-1].nbytes) == by_hand
        whole = 2 * tokens * sum(np.prod(shape) for shape in _products(model))
        assert all(one.flops <= 3 * whole for one in few)


def _products(model):
    D, F, d = model.hidden_size, model.intermediate_size, model.head_dim
    layer = [(D, F)] * 3 + [(D, d * model.num_heads)] * 2 + [(D, d * model.num_kv_heads)] * 2
    return [*layer * model.num_layers, (D, model.vocab_size)]


def test_the_page_shows_what_is_counted() -> None:
    page = README.read_text()
    for name, tokens in (("0.5b", 32768), ("1.5b", 32768), ("7b", 8192)):
        assert report(published(f"qwen2.5-{name}"), tokens, 4.15e12, 680e12) in page
