"""Which texts are read together, so that what they begin with is read once."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax.inference.row_packing import power_of_two

# Sharing below this part of all tokens is not worth a second part of attention.
_WORTH = 0.05


@dataclasses.dataclass(frozen=True)
class Block:
    """Texts that share what they begin with.

    Attributes:
      prefix: how many tokens they share; 0 for a text alone.
      texts: their indices.
      size: tokens that are read: the prefix once, and the rest of each text.
    """

    prefix: int
    texts: list[int]
    size: int


def blocks(texts: Sequence[np.ndarray], row: int) -> list[Block]:
    """Divides texts into blocks, so that few tokens are read.

    Texts whose first tokens are equal are neighbours in alphabetical order, and what all of some neighbours share is
    a node of the tree of their beginnings. A node saves its depth for each of its texts but the first; the best set
    of nodes that are not within one another is found from the leaves up.

    Args:
      texts: int32 ids of each, all different.
      row: tokens that a block may have; one with a longer text has the next power of two.

    Returns:
      Blocks that hold each text once.
    """
    alone = [Block(0, [i], len(text)) for i, text in enumerate(texts)]
    if len(texts) < 2:
        return alone
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">u4").tobytes())
    ordered = [texts[i] for i in order]
    found: list[Block] = []
    rest = set(range(len(texts)))
    for node in _chosen(_tree(ordered, row)):
        members = [order[i] for i in range(node.first, node.last + 1)]
        found += _split(texts, members, node.depth, _room(ordered[node.first : node.last + 1], row))
        rest.difference_update(members)
    found += [alone[i] for i in sorted(rest)]
    total = sum(map(len, texts))
    return found if total - sum(block.size for block in found) > _WORTH * total else alone


@dataclasses.dataclass
class _Node:
    depth: int
    first: int
    last: int = -1
    children: "list[_Node]" = dataclasses.field(default_factory=list)
    saved: int = 0
    chosen: bool = False


def _tree(ordered: Sequence[np.ndarray], row: int) -> _Node:
    """The root of the tree of common beginnings. The last node that is closed is the root, whose depth may be 0."""
    lengths = np.asarray(list(map(len, ordered)))
    ends = np.concatenate([[0], lengths.cumsum()])
    root = _Node(0, 0)
    stack = [root]

    def close(node: _Node, last: int) -> None:
        node.last = last
        count = last - node.first + 1
        own = int(ends[last + 1] - ends[node.first]) - count * node.depth
        # A block is divided where it is longer than a row, and each part reads the prefix.
        room = power_of_two(int(lengths[node.first : last + 1].max()), row) - node.depth
        parts = -(-own // room) if room > 0 else count
        saved, below = (count - parts) * node.depth, sum(child.saved for child in node.children)
        node.chosen = saved > below
        node.saved = max(saved, below)

    for i in range(1, len(ordered) + 1):
        depth = _common(ordered[i - 1], ordered[i]) if i < len(ordered) else -1
        first, child = i - 1, None
        while stack and stack[-1].depth > depth:
            child = stack.pop()
            close(child, i - 1)
            first = child.first
            if stack and stack[-1].depth >= depth:
                stack[-1].children.append(child)
                child = None
        if depth >= 0 and stack[-1].depth < depth:
            stack.append(_Node(depth, first, children=[child] if child is not None else []))
    return root


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def _chosen(node: _Node) -> Iterator[_Node]:
    """The nodes to share, none within another."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node.chosen:
            yield node
        else:
            stack += node.children


def _room(texts: Sequence[np.ndarray], row: int) -> int:
    return power_of_two(max(map(len, texts)), row)


def _split(texts: Sequence[np.ndarray], members: Sequence[int], prefix: int, room: int) -> Iterator[Block]:
    """Blocks of at most `room` tokens of texts that share a prefix."""
    part: list[int] = []
    size = prefix
    for i in members:
        own = len(texts[i]) - prefix
        if part and size + own > room:
            yield _block(part, prefix, size)
            part, size = [], prefix
        part.append(i)
        size += own
    yield _block(part, prefix, size)


def _block(texts: list[int], prefix: int, size: int) -> Block:
    return Block(prefix if len(texts) > 1 else 0, texts, size)
