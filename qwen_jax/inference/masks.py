"""Bit masks of the tokens that a text may have next: by its grammar, and without end ids while it is too short."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference.active import Active
from qwen_jax.inference.runner_types import Masks
from qwen_jax.inference.structured import Matcher

# Masks that took longer in the step before are made in threads; for less, waking a thread costs as much.
_WORTH_THREADS = 0.001


def is_masked(active: Active) -> bool:
    """Whether some tokens are not allowed."""
    return active.matcher is not None or len(active.row.tokens) < active.request.min_tokens


def next_masks(rows: Sequence[Active | None], steps: Sequence[int], words: int) -> Masks | None:
    """Masks for the next token of the rows that have one, or None if all may have any token.

    Args:
      rows: requests; a missing one has no mask.
      steps: how many tokens each text has before it.
      words: of a mask; bit i of word j is the token 32 j + i.
    """
    masked = [i for i, active in enumerate(rows) if active is not None and is_masked(active)]
    if not masked:
        return None
    masks, place = np.full((len(masked), words), -1, np.int32), {row: i for i, row in enumerate(masked)}

    def fill(some: Sequence[int]) -> None:
        for i in some:
            active, mask_W = rows[i], masks[place[i]]
            if active is not None and not active.row.finish_reason:
                with active.failing():
                    _fill(mask_W, active, active.matcher, steps[i])
                # Some grammars know only now that nothing may follow.
                active.end_with_grammar()
                if active.row.finish_reason:
                    mask_W[:] = -1

    seconds = {i: _last_seconds(rows[i]) for i in masked}
    if len(masked) > 1 and sum(seconds.values()) > _WORTH_THREADS:
        # The largest first, so that each thread gets about as much. llguidance works without Python's lock.
        order, threads = sorted(masked, key=seconds.__getitem__, reverse=True), _threads()
        list(threads.map(fill, [order[k :: _count()] for k in range(_count())]))
    else:
        fill(masked)
    return Masks(masked, masks)


def _last_seconds(active: Active | None) -> float:
    return 0.0 if active is None or active.matcher is None else active.matcher.last_seconds


@functools.cache
def _count() -> int:
    return min(8, len(os.sched_getaffinity(0)))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_count(), "qwen_jax-masks")


def speculated_masks(rows: Sequence[Active], proposals: np.ndarray, words: int) -> Masks | None:
    """Masks at each of several places, after none, one, two ... proposed tokens, of the rows that have one.

    Args:
      rows: requests.
      proposals: int32 [rows, places - 1]. Those after which there is no mask become -1, which is never accepted: no
        place after them is sampled.
      words: as for `next_masks`.
    """
    masked = [i for i, active in enumerate(rows) if is_masked(active)]
    if not masked:
        return None
    places = proposals.shape[1] + 1
    masks = np.full((len(masked), places, words), -1, np.int32)
    for i, mask_TW in zip(masked, masks, strict=True):
        active = rows[i]
        matcher = None if active.matcher is None else active.matcher.copy()
        for place in range(places):
            if place == 0:
                with active.failing():
                    _fill(mask_TW[place], active, matcher, len(active.row.tokens))
                active.end_with_grammar()
            elif not _fill_after(mask_TW[place], active, matcher, place):
                mask_TW[place] = -1
                proposals[i, place - 1 :] = -1
                break
            proposal = int(proposals[i, place]) if place < places - 1 else -1
            if active.row.finish_reason or proposal < 0:
                break
            if not mask_TW[place, proposal // 32] >> (proposal % 32) & 1:
                break  # It cannot be sampled, so no place after it counts.
            if matcher is not None and not _accepts(matcher, proposal):
                proposals[i, place:] = -1
                break
    return Masks(masked, masks)


def _fill_after(mask_W: np.ndarray, active: Active, matcher: Matcher | None, place: int) -> bool:
    """Writes the mask of a later place; returns False where there is none, so that no place from here on counts."""
    try:
        _fill(mask_W, active, matcher, len(active.row.tokens) + place)
    except InputError:
        return False
    return matcher is None or not matcher.ended


def _accepts(matcher: Matcher, token: int) -> bool:
    """Goes on after a proposal; returns False if nothing may follow it, or a limit is reached."""
    try:
        matcher.accept(token)
    except InputError:
        return False
    return not matcher.ended


def _fill(mask_W: np.ndarray, active: Active, matcher: Matcher | None, step: int) -> None:
    if matcher is not None:
        matcher.fill(mask_W)
    # A text that its grammar has completed ends, whatever its length.
    if step < active.request.min_tokens and not (matcher is not None and matcher.ended):
        words, ends = mask_W.view(np.uint32), active.request.ending.eos_token_ids
        before = words.copy()
        for token in ends if matcher is None else ends.union(matcher.end_ids):
            words[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
        if matcher is not None and not words.any():
            words[:] = before
