"""Bytes that the exchanges of an MoE layer send, by formula.

All numbers are bytes that one device of the expert axis sends, of one layer, for even loads and without further rounds.
`least` is a bound from below for any exchange of whole tokens: a token goes once to each other device that has one of
its experts, and one sum comes back from each of these.
"""

import dataclasses
import math

from qwen_jax.config import MoE
from qwen_jax.moe import dispatch


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends for one layer.

    Attributes:
      forward: in the forward pass.
      recomputed: in the backward pass, to have the rows again with `remat="dots"`. It is 0 if all activations are kept.
        `remat="full"` also exchanges the router's weights and ids again, which are few bytes.
      backward: in the backward pass, for gradients.
    """

    forward: float
    recomputed: float
    backward: float

    @property
    def total(self) -> float:
        """All of them: a forward and a backward pass that recomputes activations."""
        return self.forward + self.recomputed + self.backward


_ID = 4  # Expert ids and numbers of rows are int32.


def rows(moe: MoE, axis: int, tokens: int, hidden: int, itemsize: int) -> Traffic:
    """The exchange of rows (`qwen_jax.moe.exchange`): each row goes to the device of its expert, and back.

    Args:
      moe: the MoE part of the architecture.
      axis: size of the expert axis.
      tokens: of one device.
      hidden: width of a token.
      itemsize: bytes of an element of a token.
    """
    num_rows = tokens * moe.num_experts_per_tok
    one_way = num_rows * (axis - 1) / axis * hidden * itemsize
    weights, counts = (axis - 1) * num_rows * itemsize, (axis - 1) * moe.num_experts * _ID
    # The gradients with respect to the weights are gathered from all places that rows have room in.
    room = min(
        math.ceil(dispatch.ROOM * num_rows), axis * tokens * min(moe.num_experts_per_tok, moe.num_experts // axis)
    )
    return Traffic(2 * one_way + weights + counts, one_way, 2 * one_way + (axis - 1) * room * itemsize)


def gathered(moe: MoE, axis: int, tokens: int, hidden: int, itemsize: int) -> Traffic:
    """The exchange by gathering (`qwen_jax.moe.gathered`): all tokens go to all devices; partial sums come back.

    Args:
      moe, axis, tokens, hidden, itemsize: as `rows` takes them.
    """
    one_way = (axis - 1) * tokens * hidden * itemsize
    weights, ids = ((axis - 1) * tokens * moe.num_experts_per_tok * size for size in (itemsize, _ID))
    return Traffic(2 * one_way + weights + ids, one_way, 2 * one_way + weights)


def least(moe: MoE, axis: int, tokens: int, hidden: int, itemsize: int) -> Traffic:
    """The fewest bytes if the experts of a token are drawn at random; rows are kept and not sent again.

    Args:
      moe, axis, tokens, hidden, itemsize: as `rows` takes them.
    """
    E, k = moe.num_experts, moe.num_experts_per_tok
    without = math.comb(E - E // axis, k) / math.comb(E, k)
    one_way = (axis - 1) * (1 - without) * tokens * hidden * itemsize
    return Traffic(2 * one_way, 0.0, 2 * one_way)
