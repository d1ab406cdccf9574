"""The engine's steps: what the scheduler plans is started on the device, and its results are read one step later."""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwen_jax.inference.active import Active, Times
from qwen_jax.inference.masks import NextMasks, accept_next, speculated_masks
from qwen_jax.inference.outputs import TokenInfo
from qwen_jax.inference.pages import PagePool
from qwen_jax.inference.proposers import Proposer
from qwen_jax.inference.runner import Masks, PrefillInput, RowInput, Runner, SampleRow
from qwen_jax.inference.scheduler import Decode, Prefill, Scheduler
from qwen_jax.inference.scheduler import Sequence as Scheduled
from qwen_jax.inference.stream import Readers


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """A step whose tokens the host has not read. `proposed`: whether it has several places for each row."""

    rows: Sequence[Active | None]
    """In the order of the results; None for those that were not sampled."""
    sampled: Any
    proposed: bool


class Steps:
    """Runs requests, a step at a time. Not safe for several threads.

    A step is started before the one before it is read, so that the device never waits for the host: the newest tokens
    stay on the device. A request that turns out to have ended has run for one step too many, which is thrown away. Two
    kinds of steps need to know the tokens before them: those with a grammar read them before sampling, in a second
    thread while the first one starts the model; those with proposals read them first.

    Attributes:
      active: requests that wait or run, by number.
      readers: those that have got something; they are woken together when a step was read.
      prompt_tokens, output_tokens, count: tokens of the prompts that were begun, tokens generated, and steps.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        pool: PagePool,
        *,
        proposer: Proposer | None = None,
        on_finished: Callable[[Times], None] = lambda _: None,
    ) -> None:
        """
        Args:
          runner: the device's side.
          scheduler: the host's, and `pool` its pages.
          proposer: for speculative decoding; None for none.
          on_finished: called when a request ends.
        """
        self._runner, self._scheduler, self._on_finished = runner, scheduler, on_finished
        self._pool, self._words = pool, runner.static.words
        most = max([*runner.buckets.rows, *(chunks for chunks, _ in runner.buckets.prefill)])
        self._masks = NextMasks(most, self._words)
        # Its thread starts with the first text that has a grammar.
        self._second = concurrent.futures.ThreadPoolExecutor(1, "qwen_jax-reader")
        self._max_length = runner.settings.max_length
        self._proposer = proposer
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self.active: dict[int, Active] = {}
        self.readers = Readers()
        # The numbers of requests that may have masks.
        self._constrained: set[int] = set()
        self.prompt_tokens = self.output_tokens = self.count = 0
        # The last prompt that was read whole, and its log-probabilities: several choices of a request ask for them.
        self.last_read: tuple[tuple[list[int], int], Any] | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.active and not self._in_flight

    def add(self, active: Active) -> None:
        """Queues a request. If it cannot run, its stream alone gets the error."""
        request = active.request
        try:
            if request.prompt_logprobs:
                active.prompt_logprobs = self.prompt_logprobs(
                    list(request.prompt), request.top_logprobs, active.adapter
                )
            if request.grammar is not None:
                active.matcher = request.grammar.matcher()
            self._scheduler.add(active.scheduled)
        except Exception as error:
            active.stream.fail(error)
            return
        self.active[active.scheduled.id] = active
        if active.is_constrained:
            self._constrained.add(active.scheduled.id)

    def abort(self, number: int) -> None:
        """Ends a request, unless it has ended."""
        active = self.active.get(number)
        if active is not None:
            active.row.finish_reason = "abort"
            self._end(active)

    def run(self) -> None:
        """Starts the next step and reads the one before it."""
        extra = self._proposals()
        if extra:
            self.read_all()
        plan = self._scheduler.plan(extra=extra)
        if isinstance(plan, Prefill):
            self._prefill(plan)
        elif isinstance(plan, Decode):
            self._decode(plan)
        # One step stays ahead of what was read; without a plan, there is nothing to stay ahead of.
        while len(self._in_flight) > (1 if plan is not None else 0):
            self._read()
        self.readers.wake()

    def _proposals(self) -> int:
        """How many tokens to propose for each row in the next step."""
        running, proposer = self._scheduler.running, self._proposer
        if proposer is None or not 0 < len(running) <= proposer.rows:
            return 0
        # All places of a step need slots, also those whose tokens turn out to be wrong.
        fits = all(len(s.tokens) + 1 + proposer.count <= self._max_length for s in running)
        return proposer.count if fits else 0

    def read_all(self) -> None:
        """Waits for all steps that were started."""
        while self._in_flight:
            self._read()

    def prompt_logprobs(self, ids: list[int], top: int, adapter: int) -> list[TokenInfo | None]:
        """Log-probabilities of a prompt's tokens, and `top` of the most likely ones; None for the first token."""
        if self.last_read is None or self.last_read[0] != (ids, adapter):
            self.last_read = (ids, adapter), self._runner.prompt_logprobs(ids, adapter)
        logprobs, top_ids, top_logprobs = self.last_read[1]
        infos: list[TokenInfo | None] = [None]
        for n, token in enumerate(ids[1:]):
            best = zip(top_ids[n, :top].tolist(), top_logprobs[n, :top].tolist(), strict=True)
            infos.append(TokenInfo(token, float(logprobs[n]), tuple(best)))
        return infos

    # --- starting ---

    def _prefill(self, plan: Prefill) -> None:
        """Reads chunks of prompts, and samples the next token of each prompt that is complete."""
        rows = [self.active[row.sequence.id] for row in plan.rows]
        inputs, steps = [], []
        for row, active in zip(plan.rows, rows, strict=True):
            if active.cached_tokens is None:
                active.cached_tokens, active.started = row.start, time.monotonic()
                self.prompt_tokens += len(active.request.prompt)
            if row.last and active.has_rules:
                # What the penalties count: after a preemption, the text so far, too.
                output = active.scheduled.tokens[active.scheduled.prompt_length :]
                self._runner.set_rules(active.slot, active.request.prompt, output, active.request.logit_bias)
            if row.last:
                self._runner.slots.place(self._sample_row(active, 0), active.scheduled.pages, active.adapter)
            steps.append(_sampled_before(active.scheduled) if row.last else 0)
            tokens = active.scheduled.tokens[row.start : row.start + row.count]
            scheduled = active.scheduled
            whole = len(scheduled.tokens)
            inputs.append(PrefillInput(active.slot, tokens, row.start, scheduled.pages, whole, active.adapter))
        logits = self._runner.prefill(inputs)
        self.count += 1
        if any(row.last for row in plan.rows):
            self._sample(logits, [a if row.last else None for a, row in zip(rows, plan.rows, strict=True)], steps)

    def _decode(self, plan: Decode) -> None:
        """Makes the next token of each running text; with proposals, as many of them as are right and one more."""
        rows, extra = [self.active[scheduled.id] for scheduled in plan.rows], plan.extra
        self.count += 1
        if extra and self._proposer is not None:
            self._verify(rows, extra, self._proposer)
            return
        # `written` counts the slots that this step writes.
        slots, lengths = [a.slot for a in rows], [scheduled.written - 1 for scheduled in plan.rows]
        pages, steps = [scheduled.pages for scheduled in plan.rows], [_sampled_before(s) for s in plan.rows]
        if not any(active.matcher is not None for active in rows):
            self._sample(self._runner.decode_slots(slots, lengths, pages), rows, steps)
            return
        # Starting a program with many kernels takes about as long as reading tokens and making masks, and holds no lock
        # of Python. What the program needs is packed before the tokens change anything.
        masked: list[concurrent.futures.Future[Any]] = []

        def begin() -> None:
            masked.append(self._second.submit(self._next_masks, rows, steps))

        try:
            logits = self._runner.decode_slots(slots, lengths, pages, packed=begin)
        finally:
            self._join(masked)
        self._sample_masked(logits, steps, *masked[0].result())

    def _verify(self, rows: Sequence[Active], extra: int, proposer: Proposer) -> None:
        """Checks proposed tokens. There are few rows."""
        inputs = [RowInput(a.slot, a.scheduled.written - 1 - extra, a.scheduled.pages, a.adapter) for a in rows]
        proposals = proposer.propose(rows)
        logits = self._runner.verify(inputs, proposals)
        masks = speculated_masks(rows, proposals, self._words)
        wanted = [self._sample_row(active, len(active.row.tokens)) for active in rows]
        sampled = self._runner.sample_verified(logits, wanted, proposals, masks)
        self._end_those_that_ended(rows)
        self._in_flight.append(_InFlight(rows, sampled, proposed=True))
        self.read_all()

    def _sample(self, logits: jax.Array, rows: Sequence[Active | None], steps: Sequence[int]) -> None:
        """Samples one token for each row that is there. `steps`: tokens that were sampled before, by row."""
        masks: Masks | None = None
        if self._constrained:
            rows, masks = self._next_masks(rows, steps)
        self._sample_masked(logits, steps, rows, masks)

    @staticmethod
    def _join(futures: Sequence[concurrent.futures.Future[Any]]) -> None:
        """Waits for the second thread."""
        concurrent.futures.wait(futures)

    def _next_masks(
        self, rows: Sequence[Active | None], steps: Sequence[int]
    ) -> tuple[Sequence[Active | None], Masks | None]:
        """The rows that go on, and the masks of their next tokens.

        A mask depends on the token before it, which is read here for rows with a grammar.
        """
        if any(active is not None and active.matcher is not None for active in rows):
            self.read_all()
            rows = _going_on(rows)
        masks = self._masks.make(rows, steps)
        self._end_those_that_ended(rows)
        return _going_on(rows), masks

    def _sample_masked(
        self, logits: jax.Array, steps: Sequence[int], rows: Sequence[Active | None], masks: Masks | None
    ) -> None:
        slots = [None if active is None else active.slot for active in rows]
        sampled = self._runner.sample_slots(logits, slots, steps, masks)
        self._in_flight.append(_InFlight(rows, sampled, proposed=False))

    def _sample_row(self, active: Active, step: int) -> SampleRow:
        """How to sample the next token of a text that has `step` tokens."""
        request = active.request
        return SampleRow(
            slot=active.slot,
            sampling=request.sampling,
            step=step,
            logprob_temperature=request.logprob_temperature,
            presence=request.presence_penalty,
            frequency=request.frequency_penalty,
            rules=active.has_rules,
            top=request.top_logprobs > 0,
        )

    # --- reading ---

    def _read(self) -> None:
        """Waits for the oldest step, and gives its tokens to their requests."""
        record = self._in_flight.popleft()
        found = record.sampled.read()
        ids, logprobs = found.token_ids.tolist(), found.logprobs.tolist()
        constrained: list[tuple[Active, int]] = []
        for i, active in enumerate(record.rows):
            # A request that ended while this step ran has no use for it.
            if active is None or active.row.finish_reason:
                continue
            if record.proposed:
                self._take_several(active, ids[i][: int(found.counts[i])], logprobs[i], self._top(active, found, i))
            elif active.take(ids[i], logprobs[i], self._top(active, found, i)):
                self.output_tokens += 1
                if not active.row.finish_reason:
                    if active.matcher is not None:
                        constrained.append((active, ids[i]))
                        continue
                    self._scheduler.read_token(active.scheduled, ids[i])
            self._give(active)
        if constrained:
            accept_next(constrained)
            for active, token in constrained:
                if not active.row.finish_reason:
                    self._scheduler.read_token(active.scheduled, token)
                self._give(active)
        self.readers.wake()

    def _give(self, active: Active) -> None:
        """Gives a request's reader what is new, or its end."""
        if active.row.finish_reason:
            self._end(active)
        else:
            active.give()

    def _take_several(
        self, active: Active, ids: list[int], logprobs: list[float], top_TK: tuple[np.ndarray, np.ndarray] | None
    ) -> None:
        """Gives a request the tokens of a step with proposals, up to the one that ends its text."""
        taken = []
        for n, token in enumerate(ids):
            if active.take(token, logprobs[n], None if top_TK is None else (top_TK[0][n], top_TK[1][n])):
                taken.append(token)
                active.accept(token)
            if active.row.finish_reason:
                break
        self.output_tokens += len(taken)
        if not active.row.finish_reason:
            self._scheduler.accept(active.scheduled, taken)

    @staticmethod
    def _top(active: Active, found: Any, i: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The most likely tokens at the places of a row, and their log-probabilities, if it asked for them."""
        return None if active.tops is None else (found.top_ids[i], found.top_logprobs[i])

    def _end_those_that_ended(self, rows: Sequence[Active | None]) -> None:
        """Ends requests whose grammar has said so while their masks were made."""
        for active in rows:
            if active is not None and active.row.finish_reason:
                self._end(active)

    def _end(self, active: Active) -> None:
        """Frees what a request has, and gives its reader the last step."""
        if active.row.finish_reason == "error" or (active.row.finish_reason == "abort" and active.first_token is None):
            # What is not finite, or not known to be, must not stay in pages that others get.
            self._runner.clear_pages(self._pool.forget(active.scheduled.pages))
        self._scheduler.finish(active.scheduled)
        if self._proposer is not None:
            self._proposer.forget(active)
        self.active.pop(active.scheduled.id, None)
        self._constrained.discard(active.scheduled.id)
        self._on_finished(active.end())


def _going_on(rows: Sequence[Active | None]) -> list[Active | None]:
    """The rows without those whose text has ended."""
    return [None if active is None or active.row.finish_reason else active for active in rows]


def _sampled_before(scheduled: Scheduled) -> int:
    """Tokens of the text before the one that a planned step without proposals samples."""
    return scheduled.written - scheduled.prompt_length
