"""Loss by position over long text: what a model gains from a longer context.

Windows of all lengths end at the same places of the text. So the loss of the last tokens of a window is that of the
same tokens, whatever the length: it falls with the length where the model uses the context, and rises where it breaks.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qwen_jax import kernels
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind
from train.losses import chunked_log_probs

LOSS_CHUNK = 2048
"""Tokens of one device whose logits exist at one time."""


@dataclasses.dataclass(frozen=True)
class PositionLosses:
    """Losses of the windows of one length.

    Attributes:
      length: tokens of a window.
      losses_WT: float32 [windows, length - 1], in nats; column t is the loss of token t + 1, from the t + 1 before it.
    """

    length: int
    losses_WT: np.ndarray

    def mean(self, first: int = 1, end: int | None = None) -> float:
        """The mean loss of the tokens at positions `first` to `end - 1`, in nats; by default of all but the first."""
        return float(self.losses_WT[:, first - 1 : self.length - 1 if end is None else end - 1].mean(dtype=np.float64))

    def last(self, tokens: int) -> float:
        """The mean loss of the last tokens of all windows, in nats."""
        return self.mean(max(self.length - tokens, 1))


def windows(tokens: np.ndarray, lengths: Sequence[int], count: int) -> dict[int, np.ndarray]:
    """Cuts a text into windows of each length, which end at the same places.

    Args:
      tokens: int32 [n], the text.
      lengths: in tokens, at least 2; each once.
      count: at most this many windows of each length.

    Returns:
      int32 [windows, length] by length.

    Raises:
      InputError: the text has no window of the greatest length, or lengths or count are too small.
    """
    longest = max(lengths, default=0)
    if min(lengths, default=0) < 2 or count < 1:
        raise InputError(f"--lengths must be at least 2 and --windows at least 1, got {[*lengths]} and {count}.")
    ends = np.arange(longest, len(tokens) + 1, longest)[:count]
    if not len(ends):
        raise InputError(
            f"The text has {len(tokens):,} tokens, and a window {longest:,}. Give more text, or smaller --lengths."
        )
    return {n: np.stack([tokens[end - n : end] for end in ends]) for n in lengths}


def position_losses(
    engine: Engine,
    rows: np.ndarray,
    batch_size: int = 1,
    chunk: int = LOSS_CHUNK,
    advance: Callable[[int], object] = lambda _: None,
) -> PositionLosses:
    """Losses of windows of one length, each read from its own beginning.

    Args:
      engine: the model.
      rows: int32 [windows, length].
      batch_size: windows that are read at once, on each shard of rows.
      chunk: tokens of one device whose logits exist at one time.
      advance: called with the number of windows done, after each batch.

    Raises:
      InputError: windows longer than the model's context, or a batch size below 1.
    """
    count, length = rows.shape
    check_context(engine.config, length)
    if batch_size < 1 or chunk < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}.")
    shards = engine.sharding.batch_shards
    size = min(batch_size, -(-count // shards)) * shards
    losses = np.zeros((count, length - 1), np.float32)
    static = _Static(engine.config, engine.sharding, engine.options, chunk)
    with jax.set_mesh(engine.mesh):
        for begin in range(0, count, size):
            part = rows[begin : begin + size]
            # The last batch is filled up with rows that nobody reads.
            tokens_BT = np.pad(part, ((0, size - len(part)), (0, 0))).astype(np.int32)
            placed = jax.device_put(tokens_BT, NamedSharding(engine.mesh, engine.sharding.tokens))
            losses[begin : begin + size] = np.asarray(_losses(engine.params, placed, static=static))[: len(part), :-1]
            advance(len(part))
    return PositionLosses(length, losses)


def check_context(config: ModelConfig, length: int) -> None:
    """Checks that a length fits the model.

    Args:
      config: of the model.
      length: in tokens.

    Raises:
      InputError: it is longer than the model's context.
    """
    if length > config.context_length:
        raise InputError(
            f"A length of {length:,} tokens exceeds the model's context of {config.context_length:,}. Give --lengths "
            f"up to {config.context_length:,}, or extend the context with --rope-scaling or --dual-chunk "
            "(docs/long_context.md)."
        )


@dataclasses.dataclass(frozen=True)
class _Static:
    config: ModelConfig
    sharding: Sharding
    options: Options
    chunk: int


@functools.partial(jax.jit, static_argnames=("static",))
def _losses(params: Params, tokens_BT: jax.Array, *, static: _Static) -> jax.Array:
    """Losses [B, T]; those of the last column are of no token."""
    B, T = tokens_BT.shape
    model = bind(static.config, params, static.sharding, static.options)
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    hidden_BTD = model(tokens_BT, positions_BT, kernels.causal_mask(B, T)).hidden
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    return -chunked_log_probs(model, hidden_BTD, targets_BT, None, static.chunk)


def edges(length: int, width: int | None = None) -> list[int]:
    """Where buckets of positions begin, and the end of the last.

    Args:
      length: tokens of a window.
      width: of a bucket; by default they double: 1, 2, 4 and so on.
    """
    if width is None:
        inner = [2**i for i in range((length - 1).bit_length()) if 2**i < length]
    else:
        if width < 1:
            raise InputError(f"--bucket must be at least 1 token, got {width}.")
        inner = [1, *range(width, length, width)] if width > 1 else list(range(1, length))
    return [*inner, length]


def summarise(measured: Sequence[PositionLosses], last: int, width: int | None = None) -> list[dict[str, Any]]:
    """Losses and perplexities of each length, over all tokens, over the last ones, and in buckets of positions.

    Args:
      measured: of each length.
      last: how many tokens count as the last of a window.
      width: see `edges`.
    """

    def figures(loss: float) -> dict[str, float]:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    result = []
    for losses in measured:
        marks = edges(losses.length, width)
        count = len(losses.losses_WT)
        buckets = [
            {"from": a, "to": b - 1, "tokens": count * (b - a), **figures(losses.mean(a, b))}
            for a, b in itertools.pairwise(marks)
        ]
        ends = {"tokens": min(last, losses.length - 1), **figures(losses.last(last))}
        overall = figures(losses.mean())
        result.append({"length": losses.length, "windows": count, **overall, "last": ends, "buckets": buckets})
    return result
