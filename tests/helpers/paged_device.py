"""A scheduler's fake device: it remembers what each slot of each page holds, and runs plans in order."""

import random
import zlib
from collections import deque
from collections.abc import Iterable
from typing import Any

from qwen_jax.inference.completion import Ending
from qwen_jax.inference.pages import PagePool
from qwen_jax.inference.request import Request
from qwen_jax.inference.scheduler import Decode, Prefill, PrefillRow, Scheduler, Sequence

END = 0
"""The fake model's end id."""


def make(prompt: Iterable[int], new: int = 8, id: int = 0, **options: Any) -> Sequence:
    """A sequence that ends at END or after `new` tokens."""
    return Sequence(Request(tuple(prompt), Ending(frozenset([END]), (), new), **options), id)


def make_scheduler(
    pages: int = 64, size: int = 4, *, seqs: int = 4, batched: int = 16, length: int = 1000, **options: Any
) -> Scheduler:
    pool = PagePool(pages, size)
    options = {"max_chunks": 8, "max_slots": 4 * length} | options
    return Scheduler(pool, max_seqs=seqs, max_batched_tokens=batched, max_length=length, **options)


def root(sequence: Sequence) -> int:
    """The state before the first token. Unlike `hash` of a text, it is the same in each process."""
    return zlib.crc32(str(sequence.request.adapter).encode())


def next_token(state: int) -> int:
    """The fake model's next token after a text, of a small vocabulary so that proposals are often right."""
    return END if state % 41 == 0 else 1 + state % 2


def extend(state: int, token: int, version: int) -> int:
    """Keys and values of a token: they depend on all tokens before it and on the weights."""
    return hash((state, token, version))


class Device:
    """Runs steps in order over a memory of pages, and checks that each row's slots hold its own text.

    Args:
      scheduler: whose plans are run.
      pool: its pages.
      max_seqs: slots of the newest tokens.
      rng: for proposals.
    """

    def __init__(self, scheduler: Scheduler, pool: PagePool, max_seqs: int, rng: random.Random):
        self.scheduler, self.pool, self.rng = scheduler, pool, rng
        self.memory: dict[tuple[int, int], int] = {}
        self.newest = [-1] * max_seqs
        # What the slots of each sequence must hold, since its last preemption.
        self.states: dict[tuple[Sequence, int], list[int]] = {}
        self.in_flight: deque[list[tuple[Sequence, list[int]]]] = deque()
        self.steps: list[Prefill | Decode] = []
        self.stalls = 0

    def run(self, plan: Prefill | Decode) -> None:
        """Dispatches a step."""
        self.steps.append(plan)
        if isinstance(plan, Prefill):
            # No row may read what another row of the same step writes.
            for row in plan.rows:
                self._check(row.sequence, row.start)
            self.in_flight.append([(row.sequence, self._prefill(row)) for row in plan.rows])
        else:
            assert len(set(plan.rows)) == len(plan.rows)
            for sequence in plan.rows:
                self._check(sequence, sequence.written - 1 - plan.extra)
            self.in_flight.append([(sequence, self._decode(sequence, plan.extra)) for sequence in plan.rows])

    def _check(self, sequence: Sequence, start: int) -> None:
        key = sequence, sequence.preemptions
        if key not in self.states:
            # Slots that were found in the prefix cache hold what the current weights make of these very tokens.
            state = root(sequence)
            self.states[key] = [state := extend(state, token, self.pool.version) for token in sequence.tokens[:start]]
        assert len(self.states[key]) == start, "a token is skipped or read twice"
        held = [
            self.memory.get((sequence.pages[j // self.pool.page_size], j % self.pool.page_size)) for j in range(start)
        ]
        assert held == self.states[key], f"{sequence.id} reads slots of another text"

    def _write(self, sequence: Sequence, token: int) -> int:
        """Writes one token after those of a sequence, and returns its state."""
        states = self.states[sequence, sequence.preemptions]
        before = states[-1] if states else root(sequence)
        states.append(extend(before, token, self.pool.version))
        page, slot = divmod(len(states) - 1, self.pool.page_size)
        if page < len(sequence.pages):
            self.memory[sequence.pages[page], slot] = states[-1]
        else:
            assert len(states) > self.scheduler._max_length, "a slot has no page"
        return states[-1]

    def _prefill(self, row: PrefillRow) -> list[int]:
        assert row.sequence.slot is not None
        for token in row.sequence.tokens[row.start : row.start + row.count]:
            state = self._write(row.sequence, token)
        assert row.last == (row.start + row.count == len(row.sequence.tokens))
        if not row.last:
            return []
        self.newest[row.sequence.slot] = next_token(state)
        return [next_token(state)]

    def _decode(self, sequence: Sequence, extra: int) -> list[int]:
        assert sequence.slot is not None
        token, given, right = self.newest[sequence.slot], list[int](), True
        for _ in range(1 + extra):
            sampled = next_token(self._write(sequence, token))
            if right:
                given.append(sampled)
            token = sampled if self.rng.random() < 0.7 else self.rng.randint(0, 2)
            right = right and token == sampled
        # Slots of rejected proposals hold what no text may read.
        states = self.states[sequence, sequence.preemptions]
        del states[len(states) - (1 + extra) + len(given) :]
        self.newest[sequence.slot] = given[-1]
        return given

    def read(self) -> None:
        """The host reads the oldest step in flight, and finishes sequences that have ended."""
        for sequence, tokens in self.in_flight.popleft():
            if sequence.finished:
                self.scheduler.read(sequence, [1])
                continue
            left = sequence.limit - len(sequence.tokens)
            tokens = tokens[: tokens.index(END) + 1 if END in tokens else left][:left]
            (self.scheduler.accept if sequence.speculated else self.scheduler.read)(sequence, tokens)
            if END in tokens or len(sequence.tokens) == sequence.limit:
                self.scheduler.finish(sequence)

    def step(self, extra: int = 0, ahead: int = 1) -> bool:
        """Plans and dispatches a step, and reads those that are more than `ahead` behind. Whether there was one."""
        decodable = [s for s in self.scheduler.running if s.decoding and not s.speculated and not s.exhausted]
        preemptions = {s: s.preemptions for s in decodable if not (extra and s.pending)}
        waiting = len(self.scheduler.waiting)
        plan = self.scheduler.plan(extra=extra)
        if plan is None:
            assert self.scheduler.wants_read == any(s.pending for s in self.scheduler.running)
            if not self.scheduler.wants_read:
                assert not waiting, "sequences wait and nothing runs"
                assert not self.scheduler.running
                return False
            while self.in_flight:
                self.read()
            return True
        if isinstance(plan, Prefill):
            # What planning itself has preempted cannot decode.
            kept = any(s.preemptions == before for s, before in preemptions.items())
            self.stalls = self.stalls + 1 if kept else 0
            assert self.stalls <= 1, "decoding waits for more than one chunk"
        else:
            self.stalls = 0
        self.run(plan)
        while len(self.in_flight) > ahead:
            self.read()
        return True

    def drain(self, most: int = 10_000, **options: Any) -> None:
        """Runs until all sequences have ended."""
        while self.step(**options):
            most -= 1
            assert most, "the scheduler makes no progress"
            self.scheduler.check()
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.pool.num_free == self.pool.num_pages, "pages are lost"


def make_device(seqs: int = 4, seed: int = 0, **options: Any) -> tuple[Scheduler, Device]:
    scheduler = make_scheduler(seqs=seqs, **options)
    return scheduler, Device(scheduler, scheduler._pool, seqs, random.Random(seed))


def text_alone(sequence: Sequence) -> list[int]:
    """What the fake model says if nothing else runs."""
    state, tokens = root(sequence), list(sequence.request.prompt)
    for token in tokens:
        state = extend(state, token, 0)
    while len(tokens) < sequence.limit:
        tokens.append(next_token(state))
        state = extend(state, tokens[-1], 0)
        if tokens[-1] == END:
            break
    return tokens
