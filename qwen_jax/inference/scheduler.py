"""Continuous batching: which sequences the next step reads or extends, and which pages of the cache they use.

The host plans a step, the device runs it, and the sampled tokens are read one step later. So a sequence has tokens that
are known, and tokens that are pending: a dispatched step samples them, but the host has not read them. The device runs
steps in the order of the plans. Pages that were released may therefore be given away at once, although a step in flight
still reads them.
"""

import bisect
import itertools
from collections import Counter, abc, deque

from qwen_jax.errors import InputError
from qwen_jax.inference.pages import PagePool
from qwen_jax.inference.sequences import Decode, Prefill, PrefillRow, Sequence, by_arrival, by_start

__all__ = ["Decode", "Prefill", "PrefillRow", "Scheduler", "Sequence"]


class Scheduler:
    """Plans steps: first come, first served, but requests that continue a text start first. Not thread-safe.

    What continues a text finds it in the prefix cache only before others take its pages; see `Request.continues`.

    Prefill and decode steps alternate while both have work, so decoding waits for at most one chunk of
    `max_batched_tokens` tokens. When pages run out, the newest sequences give up theirs (they are preempted) and are
    read again later. A sequence that fits all pages alone therefore always finishes.

    Args:
      pool: the pages. They are used by this scheduler alone.
      max_seqs: the most sequences that run at a time.
      max_batched_tokens: the most tokens that a prefill step reads.
      max_length: the most tokens of a sequence, with its prompt.
      max_chunks: the most rows of a prefill step.
      max_slots: the most slots of pages that the rows of a prefill step use together, at least `max_length`.
      prefix_cache: whether prompts use pages of earlier sequences with the same beginning.
      headroom: a waiting sequence starts when there are pages for its tokens and for this many new ones of each running
        sequence, so that it is not preempted soon after it was read.

    Attributes:
      preemptions: sequences that were preempted.
      wants_read: after `plan` returned None, whether reading the steps in flight gives it something to do.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_seqs: int,
        max_batched_tokens: int,
        max_length: int,
        max_chunks: int,
        max_slots: int,
        prefix_cache: bool = True,
        headroom: int = 32,
    ) -> None:
        if min(max_seqs, max_batched_tokens, max_chunks) < 1 or max_slots < max_length:
            raise ValueError("Expected max_seqs, max_batched_tokens and max_chunks of 1, and max_slots of max_length.")
        self.preemptions = 0
        self.wants_read = False
        self._pool, self._prefix_cache = pool, prefix_cache
        self._max_seqs, self._max_batched_tokens, self._max_length = max_seqs, max_batched_tokens, max_length
        self._max_chunks, self._max_pages, self._headroom = max_chunks, -(-max_slots // pool.page_size), headroom
        # In the order in which they start, and in the order of arrival.
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._slots = list(range(max_seqs - 1, -1, -1))
        self._added = 0
        self._decode_next = False
        # The sequence at the front of the queue, and the free pages that it needs, if it did not find them.
        self._blocked: tuple[Sequence, int] | None = None

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences without a slot, in the order in which they will be read."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with a slot, the oldest first."""
        return tuple(self._running)

    @property
    def blocked(self) -> bool:
        """Whether the first sequence in the queue waits for pages. May be read by any thread."""
        blocked = self._blocked
        return blocked is not None and blocked[0].slot is None and not blocked[0].finished

    # --- what the engine reports ---

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue.

        Raises:
          InputError: it can never fit.
          ValueError: it was added before, or is finished.
        """
        if sequence.order >= 0 or sequence.finished:
            raise ValueError(f"Sequence {sequence.id} was added before, or is finished.")
        new = sequence.limit - sequence.prompt_length
        asked = f"A prompt of {sequence.prompt_length} tokens and max_new_tokens={new} need {sequence.limit} slots"
        if sequence.limit > self._max_length:
            raise InputError(
                f"{asked}; a sequence may have {self._max_length}. Shorten the prompt, lower max_new_tokens, or start "
                "the engine with a larger max_length."
            )
        slots = self._pool.num_pages * self._pool.page_size
        if sequence.limit > slots:
            raise InputError(
                f"{asked}; the cache has {slots} ({self._pool.num_pages} pages of {self._pool.page_size}). Shorten "
                "the prompt, lower max_new_tokens, or give the cache more memory."
            )
        sequence.order = self._added
        self._added += 1
        self._enqueue(sequence)

    def read(self, sequence: Sequence, token_ids: abc.Iterable[int]) -> None:
        """Appends tokens that a dispatched step has sampled. Tokens of a finished sequence are ignored.

        Raises:
          ValueError: more tokens than are pending, or tokens of a speculating step, which `accept` takes.
        """
        if sequence.finished:
            return
        tokens = list(token_ids)
        if sequence.speculated or len(tokens) > sequence.pending:
            raise ValueError(
                f"Sequence {sequence.id} has {sequence.pending} pending tokens, of which {sequence.speculated} are "
                f"speculated; {len(tokens)} were read."
            )
        sequence.tokens.extend(tokens)
        sequence.pending -= len(tokens)
        self._register(sequence)

    def read_token(self, sequence: Sequence, token: int) -> None:
        """As `read`, for one token."""
        if sequence.finished:
            return
        if sequence.speculated or not sequence.pending:
            self.read(sequence, (token,))  # Which raises the error.
        sequence.tokens.append(token)
        sequence.pending -= 1
        self._register(sequence)

    def accept(self, sequence: Sequence, token_ids: abc.Iterable[int]) -> None:
        """Appends the tokens that a step with speculation gave: the accepted proposals and the model's own token.

        The slots of rejected proposals will be written again. Without a speculating step this is `read`.

        Raises:
          ValueError: no token, or more tokens than the step can give.
        """
        if sequence.finished:
            return
        if not sequence.speculated:
            self.read(sequence, token_ids)
            return
        tokens = list(token_ids)
        if not 1 <= len(tokens) <= sequence.pending:
            raise ValueError(
                f"Expected 1 to {sequence.pending} tokens of a step with speculation, got {len(tokens)} for sequence "
                f"{sequence.id}."
            )
        sequence.tokens.extend(tokens)
        sequence.pending = sequence.speculated = 0
        sequence.written = len(sequence.tokens) - 1
        self._register(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended or was cancelled, at any time. Its pages and slot are free at once."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.slot is not None:
            self._stop(sequence)
        elif sequence.order >= 0:
            self._waiting.remove(sequence)

    # --- planning ---

    def plan(self, *, extra: int = 0) -> Prefill | Decode | None:
        """Returns the next step, which the caller dispatches; None if there is nothing to do, see `wants_read`.

        Args:
          extra: tokens to speculate for each row of a decode step. Such rows have no pending tokens: proposals follow
            from the known ones. The plan has `extra` = 0 where pages for it would be missing.
        """
        self.wants_read = False
        plan: Prefill | Decode | None = None
        for decode in (self._decode_next, not self._decode_next):
            plan = self._plan_decode(extra) if decode else self._plan_prefill()
            if plan is not None:
                self._decode_next = not decode
                return plan
            if self.wants_read:
                return None
        self.wants_read = any(sequence.pending for sequence in self._running)
        return None

    def _plan_decode(self, extra: int) -> Decode | None:
        # This runs between any two steps of the device: it may cost a little for each row, but not for each page.
        rows = [s for s in self._running if s.decoding and not s.speculated and len(s.tokens) + s.pending < s.limit]
        if extra:
            rows = [s for s in rows if not s.pending]
        size = self._pool.page_size
        needy = [s for s in rows if s.written + extra >= len(s.pages) * size and self._missing(s, extra)]
        if extra and sum(self._missing(s, extra) for s in needy) > self._pool.num_free:
            extra, needy = 0, [s for s in needy if self._missing(s, 0)]
        # Without speculation, each of these needs one page.
        while len(needy) > self._pool.num_free and not extra:
            # Steps in flight may end sequences, which is better than to preempt one.
            if any(s.pending for s in self._running):
                self.wants_read = True
                return None
            victim = next(s for s in reversed(self._running) if not s.exhausted)
            self._preempt(victim)
            rows, needy = ([s for s in group if s is not victim] for group in (rows, needy))
        for s in needy:
            s.pages += self._allocate(self._missing(s, extra))
        for s in rows:
            s.written += 1 + extra
            s.pending += 1 + extra
            s.speculated = extra
        return Decode(tuple(rows), extra) if rows else None

    def _missing(self, sequence: Sequence, extra: int) -> int:
        """The pages that a sequence needs for its next 1 + extra tokens. Slots beyond max_length are never read."""
        slots = min(sequence.written + 1 + extra, self._max_length)
        return max(0, -(-slots // self._pool.page_size) - len(sequence.pages))

    def _allocate(self, count: int) -> list[int]:
        pages = self._pool.allocate(count)
        assert pages is not None, f"{count} pages were planned, {self._pool.num_free} are free"
        return pages

    def _plan_prefill(self) -> Prefill | None:
        rows: list[PrefillRow] = []
        # Pages that this step fills. They are registered, but other rows of the same step must not read them.
        fresh: set[int] = set()
        for sequence in [s for s in self._running if not s.decoding]:
            if not self._room(rows, sequence.written):
                break
            self._add_row(rows, sequence, fresh)
        if self._waiting and self._slots:
            self._admit_waiting(rows, fresh)
        return Prefill(tuple(rows)) if rows else None

    def _admit_waiting(self, rows: list[PrefillRow], fresh: set[int]) -> None:
        """Gives slots and pages to waiting sequences and adds rows for them, until something runs out.

        A sequence that would find pages that this very step fills is postponed to the next prefill step, and what it
        needs is kept for it. So of many equal prompts that arrive together, one is read.
        """
        pool, size = self._pool, self._pool.page_size
        # Pages that must stay free.
        kept = sum(max(0, self._soon(s) - len(s.pages)) for s in self._running)
        postponed: list[Sequence] = []
        while self._waiting and len(postponed) < min(len(self._slots), self._max_chunks) and self._room(rows, 0):
            sequence = self._waiting[0]
            if self._blocked is not None and self._blocked[0] is sequence and self._blocked[1] + kept > pool.num_free:
                break
            cached = self._find(sequence)
            total = -(-len(sequence.tokens) // size)
            if not fresh.isdisjoint(cached):
                kept += self._soon(sequence) - len(cached)
                postponed.append(self._waiting.popleft())
                continue
            if not self._room(rows, len(cached) * size):
                break
            soon = self._soon(sequence)
            needed = soon - sum(pool.users(page) > 0 for page in cached)
            if needed + kept > pool.num_free:
                self._blocked = sequence, needed
                break
            kept += soon - total
            self._start(sequence, cached, total)
            self._add_row(rows, sequence, fresh)
        self._waiting.extendleft(reversed(postponed))

    def _soon(self, sequence: Sequence) -> int:
        """The pages that a sequence has when it has grown by the headroom."""
        slots = min(len(sequence.tokens) + sequence.pending + self._headroom, sequence.limit)
        return -(-slots // self._pool.page_size)

    def _find(self, sequence: Sequence) -> list[int]:
        """Returns the registered pages that hold the beginning of a waiting sequence, without its last token."""
        if not self._looks_up(sequence):
            return []
        pool, size, tokens = self._pool, self._pool.page_size, sequence.tokens
        if sequence.version != pool.version:
            sequence.version, sequence.chain = pool.version, []
        pages, chain = list[int](), sequence.chain
        for i in range((len(tokens) - 1) // size):
            if i == len(chain):
                parent = chain[-1] if chain else self._salt(sequence)
                chain.append(pool.key(parent, tokens[i * size : (i + 1) * size]))
            page = pool.find(chain[i])
            if page is None:
                break
            pages.append(page)
        return pages

    def _salt(self, sequence: Sequence) -> bytes:
        """The root of the keys of its pages."""
        return self._pool.salt(sequence.request.adapter, sequence.request.cache_salt)

    def _looks_up(self, sequence: Sequence) -> bool:
        return self._prefix_cache and not sequence.request.prompt_logprobs

    def _start(self, sequence: Sequence, cached: list[int], total: int) -> None:
        """Moves the first waiting sequence to a slot, with pages for all its tokens: its prefill never lacks pages."""
        self._waiting.popleft()
        self._pool.take(cached)
        sequence.pages = cached + self._allocate(total - len(cached))
        sequence.keys = sequence.chain[: len(cached)]
        sequence.written = len(cached) * self._pool.page_size
        sequence.version = self._pool.version
        sequence.slot = self._slots.pop()
        bisect.insort(self._running, sequence, key=by_arrival)
        # What it finds of its own after a preemption is no hit.
        if self._looks_up(sequence) and not sequence.preemptions:
            sequence.cached_tokens = sequence.written
            self._pool.count(sequence.written, len(sequence.tokens))

    def _room(self, rows: list[PrefillRow], start: int) -> int:
        """The tokens that one more row may have beside these, after `start` tokens of its text; 0 if it has no room."""
        if len(rows) == self._max_chunks:
            return 0
        size = self._pool.page_size
        pages = self._max_pages - sum(-(-(row.start + row.count) // size) for row in rows)
        tokens = self._max_batched_tokens - sum(row.count for row in rows)
        return max(0, min(tokens, pages * size - start))

    def _add_row(self, rows: list[PrefillRow], sequence: Sequence, fresh: set[int]) -> None:
        start, registered = sequence.written, len(sequence.keys)
        count = min(self._room(rows, start), len(sequence.tokens) - start)
        sequence.written += count
        sequence.decoding = sequence.written == len(sequence.tokens)
        sequence.pending += sequence.decoding
        rows.append(PrefillRow(sequence, start, count, last=sequence.decoding))
        self._register(sequence)
        fresh.update(sequence.pages[registered : len(sequence.keys)])

    # --- pages of a sequence ---

    def _register(self, sequence: Sequence) -> None:
        """Registers the pages that have become full of known tokens."""
        size = self._pool.page_size
        known = min(sequence.written, len(sequence.tokens))
        if (len(sequence.keys) + 1) * size > known or not self._prefix_cache:
            return
        # Keys and values of older weights, or that follow from them, are of use to this sequence alone.
        if sequence.version != self._pool.version:
            return
        for i in range(len(sequence.keys), known // size):
            parent = sequence.keys[-1] if i else self._salt(sequence)
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.keys.append(self._pool.register(sequence.pages[i], parent, tokens))

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue before those that start after it."""
        if not self._waiting or by_start(self._waiting[-1]) < by_start(sequence):
            self._waiting.append(sequence)
        else:
            earlier = sum(1 for _ in itertools.takewhile(lambda s: by_start(s) < by_start(sequence), self._waiting))
            self._waiting.insert(earlier, sequence)

    def preempt_all(self) -> None:
        """Takes the pages of all running sequences, which are read again. No step may be in flight."""
        for sequence in reversed(self._running[:]):
            assert not sequence.pending, sequence
            self._preempt(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Takes pages and slot of a running sequence."""
        assert sequence.slot is not None, sequence
        self._running.remove(sequence)
        self._slots.append(sequence.slot)
        self._pool.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.slot = [], [], None
        sequence.written = sequence.pending = sequence.speculated = 0
        sequence.decoding = False

    # --- invariants ---

    def check(self) -> None:
        """Raises AssertionError unless all invariants hold; for tests."""
        pool, size = self._pool, self._pool.page_size
        pool.check()
        for group, place in ((self._waiting, by_start), (self._running, by_arrival)):
            assert [place(s) for s in group] == sorted({place(s) for s in group}), "not in order"
            assert not any(s.finished for s in group), "a finished sequence was kept"
        for s in self._waiting:
            assert s.slot is None, f"a waiting sequence has a slot: {s}"
            state = s.pages, s.keys, s.written, s.pending, s.speculated, s.decoding
            assert not any(state), f"a waiting sequence has state: {s}"
        slots = [-1 if s.slot is None else s.slot for s in self._running]
        assert sorted([*slots, *self._slots]) == list(range(self._max_seqs)), "a slot is lost, or used twice"
        users = Counter(page for s in self._running for page in s.pages)
        assert all(users[page] == pool.users(page) for page in range(pool.num_pages)), "references are wrong"
        for s in self._running:
            assert len(set(s.pages)) == len(s.pages), f"a page is twice in a sequence: {s}"
            assert min(s.written, self._max_length) <= len(s.pages) * size, f"a slot has no page: {s}"
            if s.decoding:
                assert s.written == len(s.tokens) + s.pending - 1, f"the newest token alone is not written: {s}"
            else:
                assert s.written < len(s.tokens), f"nothing is left to read: {s}"
                assert not s.pending, f"tokens are sampled before the prompt is read: {s}"
            # Pages that will be written belong to one sequence and are not known to others.
            known = min(s.written, len(s.tokens)) // size
            for page in s.pages[known:]:
                assert pool.users(page) == 1, f"page {page} will be written and is shared: {s}"
                assert not pool.is_registered(page), f"page {page} will be written and is registered: {s}"
            current = self._prefix_cache and s.version == pool.version
            assert len(s.keys) <= known, f"a page is registered before it is full: {s}"
            # A page that the newest token fills is registered with the next read.
            if current:
                assert len(s.keys) >= min(s.written, len(s.tokens) - 1) // size, f"a full page is not registered: {s}"
            parent = self._salt(s)
            for i, key in enumerate(s.keys if current else ()):
                parent = pool.key(parent, s.tokens[i * size : (i + 1) * size])
                assert key == parent, f"page {i} is registered with other tokens: {s}"
                if pool.is_registered(s.pages[i]):
                    assert pool.find(key) == s.pages[i], f"page {i} is registered under another key: {s}"
