"""Bit masks of the tokens that a text may have next: by its grammar, and without end ids while it is too short."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference.active import Active
from qwen_jax.inference.matching import Matcher, Together, thread_count
from qwen_jax.inference.runner_types import Masks

# Masks that took longer in the step before are made in threads; for less, waking a thread costs as much.
_WORTH_THREADS = 0.001


def is_masked(active: Active) -> bool:
    """Whether some tokens are not allowed."""
    return active.matcher is not None or len(active.row.tokens) < active.request.min_tokens


class NextMasks:
    """Makes the masks of steps, in one array for all rows of a step."""

    def __init__(self, rows: int, words: int) -> None:
        """
        Args:
          rows: the most rows of a step.
          words: of a mask; bit i of word j is the token 32 j + i.
        """
        # In turns: when a step's masks are made, the step before may not have been read, but all older ones have.
        self._arrays = [np.empty((rows, words), np.int32) for _ in range(2)]

    def make(self, rows: Sequence[Active | None], steps: Sequence[int]) -> Masks | None:
        """Masks for the next token of the rows that have one, or None if all may have any token.

        All steps but the last one must have been read.

        Args:
          rows: requests; a missing one has no mask.
          steps: how many tokens each text has before it.
        """
        masked = [i for i, active in enumerate(rows) if active is not None and is_masked(active)]
        if not masked:
            return None
        self._arrays.reverse()
        masks = self._arrays[0]
        # Those whose masks one native call makes come first, so that it writes the beginning of the array.
        groups: tuple[list[int], list[int]] = [], []
        for i in masked:
            groups[not _goes_along(rows[i])].append(i)
        along, alone = groups if len(groups[0]) > 1 else ([], masked)
        if along:
            _fill_together([rows[i] for i in along], masks[: len(along)], [steps[i] for i in along])
        if alone:
            _fill_alone([rows[i] for i in alone], masks[len(along) : len(masked)], [steps[i] for i in alone])
        return Masks([*along, *alone], masks)


def _goes_along(active: Active | None) -> bool:
    """Whether the masks of a text may be made with those of others."""
    return (
        active is not None and active.matcher is not None and not active.row.finish_reason and not active.matcher.timed
    )


def _fill_together(rows: Sequence[Active | None], masks_MW: np.ndarray, steps: Sequence[int]) -> None:
    """Writes the masks of texts that have a matcher."""
    both = [(active, active.matcher) for active in rows if active is not None and active.matcher is not None]
    errors = _together().fill([matcher for _, matcher in both], masks_MW)
    for i, ((active, matcher), error) in enumerate(zip(both, errors, strict=True)):
        if error is not None:
            active.fail(error)
        else:
            if steps[i] < active.request.min_tokens:
                _take_ends(masks_MW[i], active, matcher)
            active.end_with_grammar()
        if active.row.finish_reason:
            masks_MW[i] = -1


def _fill_alone(rows: Sequence[Active | None], masks_MW: np.ndarray, steps: Sequence[int]) -> None:
    """Writes the masks of any texts."""
    masks_MW[:] = -1

    def fill(some: Sequence[int]) -> None:
        for i in some:
            active, mask_W = rows[i], masks_MW[i]
            if active is not None and not active.row.finish_reason:
                with active.failing():
                    _fill(mask_W, active, active.matcher, steps[i])
                # Some grammars know only now that nothing may follow.
                active.end_with_grammar()
                if active.row.finish_reason:
                    mask_W[:] = -1

    seconds = [_last_seconds(active) for active in rows]
    if len(rows) > 1 and sum(seconds) > _WORTH_THREADS:
        # The largest first, so that each thread gets about as much. llguidance works without Python's lock.
        order, count = sorted(range(len(rows)), key=seconds.__getitem__, reverse=True), thread_count()
        list(_threads().map(fill, [order[k::count] for k in range(count)]))
    else:
        fill(range(len(rows)))


def accept_next(taken: Sequence[tuple[Active, int]]) -> None:
    """Has the grammars of texts go on with the tokens that they took, and ends those that nothing may follow.

    Args:
      taken: texts that have a matcher and have not ended, and the id of the last token of each.
    """
    along = [(active, active.matcher, token) for active, token in taken if active.matcher and _goes_along(active)]
    if len(along) > 1:
        errors = _together().accept([matcher for _, matcher, _ in along], [token for *_, token in along])
        for (active, *_), error in zip(along, errors, strict=True):
            if error is not None:
                active.fail(error)
            else:
                active.end_with_grammar()
        if len(along) == len(taken):
            return
        taken = [(active, token) for active, token in taken if all(active is not one for one, *_ in along)]
    for active, token in taken:
        active.accept(token)


def _last_seconds(active: Active | None) -> float:
    return 0.0 if active is None or active.matcher is None else active.matcher.last_seconds


@functools.cache
def _together() -> Together:
    return Together(thread_count())


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_count(), "qwen_jax-masks")


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
    if step < active.request.min_tokens:
        _take_ends(mask_W, active, matcher)


def _take_ends(mask_W: np.ndarray, active: Active, matcher: Matcher | None) -> None:
    """Takes the ids that end a text from its mask. A text that its grammar has completed ends, whatever its length."""
    if matcher is not None and matcher.ended:
        return
    words, ends = mask_W.view(np.uint32), active.request.ending.eos_token_ids
    before = words.copy()
    for token in ends if matcher is None else ends.union(matcher.end_ids):
        words[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
    if matcher is not None and not words.any():
        words[:] = before
