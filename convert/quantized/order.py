"""The group of each input, where groups are not consecutive inputs."""

import numpy as np

from qwen_jax.errors import InputError


def sorted_by_group(g_idx: np.ndarray, group: int, name: str, hint: str) -> np.ndarray:
    """Which input each place holds when the inputs are sorted by group, and keep their order in it.

    Args:
      g_idx: int32 [I]: the group of each input.
      group: inputs of a group; the last one may be shorter.
      name: of the tensor, for messages.
      hint: what to check.

    Returns:
      int32 [I].

    Raises:
      InputError: groups that do not exist, or have another size.
    """
    sizes = np.bincount(np.arange(len(g_idx)) // group)
    if g_idx.min() < 0 or g_idx.max() >= len(sizes):
        raise InputError(
            f"{name}: expected groups 0 to {len(sizes) - 1} ({len(g_idx)} inputs in groups of {group}), got "
            f"{g_idx.min()} to {g_idx.max()}. {hint}"
        )
    found = np.bincount(g_idx, minlength=len(sizes))
    if not np.array_equal(found, sizes):
        raise InputError(
            f"{name}: expected groups of {group} inputs (the last may be shorter), got groups of {found.min()} to "
            f"{found.max()}. {hint}"
        )
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def groups_of(order: np.ndarray | None, inputs: int, group: int) -> np.ndarray:
    """The group of each input, int32 [I]: the inverse of `sorted_by_group`; without an order input // group."""
    g_idx = (np.arange(inputs) // group).astype(np.int32)
    if order is not None:
        g_idx[order] = g_idx.copy()
    return g_idx
