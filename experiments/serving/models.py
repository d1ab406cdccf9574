"""Models with random weights, and engines of them."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode.benchmark import random_params
from qwen_jax.config import ModelConfig
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer


def cyclic(config: ModelConfig, params: Params, period: int) -> Params:
    """Weights whose greedy text repeats itself: after token i comes i + 1, and after the last of a cycle the first.

    The output weight of a token is the embedding of the one before it, and what layers add to the embedding is a
    hundredth of what random weights add. All products are still made, with numbers that are not zero.

    Args:
      config: a model whose output head is not its embedding.
      params: random ones; consumed.
      period: tokens in a cycle; ids [0, period), [period, 2 * period) and so on are cycles.
    """
    if config.tie_word_embeddings:
        raise ValueError("A model that repeats itself needs an output head of its own.")

    @jax.jit
    def scaled(weight: jax.Array) -> jax.Array:
        return weight * jnp.asarray(0.01, weight.dtype)

    @jax.jit
    def shifted(embed_VD: jax.Array) -> jax.Array:
        V = len(embed_VD)
        ids = jnp.arange(V)
        first = ids // period * period
        size = jnp.minimum(period, V - first)
        return embed_VD.at[first + (ids - first - 1) % size].get(out_sharding=jax.typeof(embed_VD).sharding)

    layers = []
    for layer in params["layers"]:
        attention, mlp = layer["attention"], layer["mlp"]
        layers.append(
            {
                **layer,
                "attention": {**attention, "o": {"weight": scaled(attention["o"]["weight"])}},
                "mlp": {**mlp, "down": {"weight": scaled(mlp["down"]["weight"])}},
            }
        )
    head = shifted(params["embed"]["weight"])
    norm = jnp.ones_like(params["norm"]["weight"])
    return {**params, "layers": layers, "lm_head": {"weight": head}, "norm": {"weight": norm}}


def make_engine(
    config: ModelConfig, *, period: int = 0, speculate: int = 0, tokenizer: Tokenizer | None = None, **settings: Any
) -> ContinuousEngine:
    """An engine on the first device, with random weights and without end ids.

    Args:
      config: the architecture.
      period: of the text; see `cyclic`. 0: weights that are random throughout.
      speculate: tokens that are proposed by looking up the text's end; 0 for none.
      tokenizer: for text and grammars.
      **settings: of the engine.
    """
    mesh = make_mesh({}, jax.devices()[:1])
    params = random_params(config, mesh)
    if period:
        with jax.set_mesh(mesh):
            params = cyclic(config, params, period)
    if speculate:
        settings |= proposals(speculate)
    # The engine consumes the weights: nothing here may keep them.
    return ContinuousEngine(config, params, mesh, tokenizer=tokenizer, eos_token_ids=[], **settings)


def proposals(count: int, rows: int = 8) -> dict[str, Any]:
    """The engine's settings for proposals by prompt look-up, of either of its interfaces."""
    if "proposer" in inspect.signature(ContinuousEngine).parameters:
        return {"proposer": importlib.import_module("qwen_jax.inference.proposers").Ngrams(count, rows=rows)}
    return {"speculate": count, "speculate_rows": rows}


def random_prompts(
    engine: ContinuousEngine, lengths: Sequence[int], shared: int = 0, seed: int = 0
) -> list[tuple[int, ...]]:
    """Token ids of prompts, each id equally likely.

    Args:
      engine: whose ids they are.
      lengths: of each, in tokens.
      shared: tokens at the beginning that all have in common.
      seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    common = rng.integers(0, engine.vocab_limit, shared).tolist()
    own = (rng.integers(0, engine.vocab_limit, max(length - shared, 0)).tolist() for length in lengths)
    return [tuple([*common, *ids][:length]) for ids, length in zip(own, lengths, strict=True)]
