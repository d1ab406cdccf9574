"""Exact top-k and compaction of long rows on the device, without a sort.

All functions have static shapes and work on several rows at once: R rows of S elements. They read [R, S] arrays a few
times and otherwise work on arrays that are 32 or 128 times shorter, because S is up to a million for every head, layer
and chunk of a prompt.
"""

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK, _GROUP = 128, 8


def order_keys(scores_RS: jax.Array, allowed_RS: jax.Array) -> jax.Array:
    """Integers that order scores: the bits of a float that is not negative grow with it.

    Args:
      scores_RS: float32, at least 0; infinity is allowed.
      allowed_RS: bool, the elements that may be chosen.

    Returns:
      uint32 [R, S], 0 where an element may not be chosen and at least 1 elsewhere.
    """
    return jnp.where(allowed_RS, lax.bitcast_convert_type(scores_RS, jnp.uint32) + 1, jnp.uint32(0))


def top_mask(keys_RS: jax.Array, count_R: jax.Array, *, by_groups: bool = False) -> jax.Array:
    """The elements of each row with the greatest keys. Of equal keys, those at the lower places are chosen.

    Args:
      keys_RS: of `order_keys`.
      count_R: int32, how many to choose: at most the elements of the row that may be chosen.
      by_groups: where each row chooses at most one in 64 elements, the thresholds are found in a quarter of the
        memory: the greatest keys of groups of eight, and the groups where these are greatest. Needs a fast gather.

    Returns:
      bool [R, S] with exactly count_R true elements in a row.
    """
    few = keys_RS.shape[1] // _GROUP**2
    if by_groups and few:
        threshold_R = lax.cond(
            (count_R <= few).all(),
            lambda: _threshold(_greatest_groups(keys_RS, count_R, few), count_R),
            lambda: _threshold(keys_RS, count_R),
        )[:, None]
    else:
        threshold_R = _threshold(keys_RS, count_R)[:, None]
    above_RS, equal_RS = keys_RS > threshold_R, keys_RS == threshold_R
    last_R = _nth_place(equal_RS, count_R - _count(above_RS))
    return above_RS | (equal_RS & (jnp.arange(keys_RS.shape[1], dtype=jnp.int32) <= last_R[:, None]))


def places(mask_RS: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The places of the true elements of each row, ascending.

    Args:
      mask_RS: bool.
      capacity: C, how many places are returned; further ones are left out.

    Returns:
      int32 [R, C], S from the count of the row on; and int32 [R], the true elements, also where they exceed C.
    """
    R, S = mask_RS.shape
    words_RW = pack_bits(mask_RS)
    counts_RW = lax.population_count(words_RW).astype(jnp.int32)
    ends_RW = jnp.cumsum(counts_RW, axis=1)
    # How many true elements come before each element: in the words before its own, and in its own.
    lower = (jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)) - 1
    inside_RW32 = lax.population_count(words_RW[:, :, None] & lower).astype(jnp.int32)
    rank_RS = ((ends_RW - counts_RW)[:, :, None] + inside_RW32).reshape(R, -1)[:, :S]
    # Every true element has a target of its own. The others have targets behind the end, where they are dropped; these
    # differ, too, because a scatter with equal targets is much more expensive: XLA sorts them first.
    row_R1, place_S = jnp.arange(R, dtype=jnp.int32)[:, None], jnp.arange(S, dtype=jnp.int32)
    kept_RS = mask_RS & (rank_RS < capacity)
    target_RS = jnp.where(kept_RS, row_R1 * capacity + rank_RS, R * capacity + row_R1 * S + place_S)
    place_RS = jnp.broadcast_to(place_S, (R, S))
    found = varying(jnp.full(R * capacity, S, jnp.int32), mask_RS)
    found = found.at[target_RS.reshape(-1)].set(place_RS.reshape(-1), mode="drop", unique_indices=True)
    return found.reshape(R, capacity), ends_RW[:, -1]


def count_below(sorted_RL: jax.Array, values_RC: jax.Array) -> jax.Array:
    """How many elements of each ascending row are below each value, int32 [R, C]. One row of values serves all."""
    values_RC = jnp.broadcast_to(values_RC, (len(sorted_RL), values_RC.shape[1]))
    find = jax.vmap(lambda row, values: jnp.searchsorted(row, values, side="left", method="scan_unrolled"))
    return find(sorted_RL, values_RC).astype(jnp.int32)


def pack_bits(mask_RS: jax.Array) -> jax.Array:
    """Element j of a row as bit j % 32 of its word j // 32, uint32 [R, ceil(S / 32)]."""
    R, S = mask_RS.shape
    padded = jnp.pad(mask_RS, ((0, 0), (0, -S % 32))).reshape(R, -1, 32)
    return jnp.sum(padded.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), axis=2, dtype=jnp.uint32)


def window_any(mask_RS: jax.Array, length: int) -> jax.Array:
    """Whether an element or any of the `length` - 1 before it is true, bool [R, S]."""
    return window_max(mask_RS.astype(jnp.int32), length) > 0


def window_max(x_RS: jax.Array, length: int) -> jax.Array:
    """The greatest of an element and the `length` - 1 before it; 0 where there are none."""
    pads = ((0, 0), (length - 1, 0))
    return lax.reduce_window(x_RS, jnp.zeros((), x_RS.dtype), lax.max, (1, length), (1, 1), pads)


def varying(x: jax.Array, *like: jax.Array) -> jax.Array:
    """The same value, typed as one that differs between devices if one of the others does.

    Inside `jax.shard_map` what a loop starts with must have the type of what it computes.
    """
    # A zero that depends on the others, so that it has their type; the compiler removes it.
    for y in like:
        first = y[(0,) * y.ndim]
        x = x + jnp.where(first == first, 0, 0).astype(x.dtype)
    return x


def _count(mask_RS: jax.Array) -> jax.Array:
    return jnp.sum(mask_RS, axis=1, dtype=jnp.int32)


def _threshold(keys_RS: jax.Array, count_R: jax.Array) -> jax.Array:
    """The count-th greatest key of each row, uint32 [R]; the greatest integer where the count is 0."""

    # From the highest four bits to the lowest. All fifteen counts of a step come from the same reading of the keys.
    def digit(i: jax.Array, threshold_R: jax.Array) -> jax.Array:
        shift = (28 - 4 * i).astype(jnp.uint32)
        candidates = [threshold_R + (jnp.uint32(k) << shift) for k in range(1, 16)]
        reached = [_count(keys_RS >= c[:, None]) >= count_R for c in candidates]
        return threshold_R + (sum(r.astype(jnp.uint32) for r in reached) << shift)

    zeros_R = varying(jnp.zeros(len(keys_RS), jnp.uint32), keys_RS, count_R)
    return lax.fori_loop(0, 8, digit, zeros_R)


def _greatest_groups(keys_RS: jax.Array, count_R: jax.Array, capacity: int) -> jax.Array:
    """The keys of as many groups of eight neighbours as elements are to be chosen, uint32 [R, 8 capacity].

    The groups are those with the greatest maxima, and the first of equal ones. They contain all elements to choose: an
    element of another group comes after the maximum of each of them.
    """
    R, S = keys_RS.shape
    groups_RG8 = jnp.pad(keys_RS, ((0, 0), (0, -S % _GROUP))).reshape(R, -1, _GROUP)
    place_RC, _ = places(top_mask(groups_RG8.max(axis=2), count_R), capacity)
    G = groups_RG8.shape[1]
    found_RC8 = jnp.take_along_axis(groups_RG8, jnp.minimum(place_RC, G - 1)[..., None], axis=1)
    return jnp.where(place_RC[..., None] < G, found_RC8, 0).reshape(R, -1)


def _nth_place(mask_RS: jax.Array, n_R: jax.Array) -> jax.Array:
    """The place of the n-th true element of each row, counted from 1; -1 where n is 0."""
    R, S = mask_RS.shape
    blocks = jnp.pad(mask_RS, ((0, 0), (0, -S % _BLOCK))).reshape(R, -1, _BLOCK)
    ends = jnp.cumsum(jnp.sum(blocks, axis=2, dtype=jnp.int32), axis=1)
    block_R = jnp.minimum(_count(ends < n_R[:, None]), ends.shape[1] - 1)
    inside = jnp.take_along_axis(blocks, block_R[:, None, None], axis=1)[:, 0]
    # The true elements up to the end of the block, less those of the block itself, come before it.
    before = jnp.take_along_axis(ends, block_R[:, None], axis=1) - _count(inside)[:, None]
    place_R = block_R * _BLOCK + _count(jnp.cumsum(inside, axis=1, dtype=jnp.int32) + before < n_R[:, None])
    return jnp.where(n_R > 0, place_R, -1)
