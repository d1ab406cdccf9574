"""The scheduler: a fake device proves that each row reads exactly its own tokens, whatever is planned around it."""

import random
import time
from typing import Any

import pytest

from qwen_jax.errors import InputError
from qwen_jax.inference.scheduler import Decode, Prefill, Scheduler, Sequence
from tests.helpers.paged_device import END, Device, make, make_device, make_scheduler, text_alone

# --- random workloads ---


def random_sequence(rng: random.Random, id: int, length: int, slots: int, continuing: float) -> Sequence:
    """A sequence that fits; many prompts begin alike, and a part of them is said to continue a text."""
    limit = rng.randint(2, min(length, slots))
    prompt = rng.randint(1, limit - 1)
    same = rng.choice([0, prompt // 2, prompt])
    tokens = [1] * same + [rng.randint(1, 2) for _ in range(prompt - same)]
    options: dict[str, Any] = {"adapter": rng.choice([None, None, "a"]), "cache_salt": rng.choice([None, None, "a"])}
    options |= {"prompt_logprobs": rng.random() < 0.1, "continues": rng.random() < continuing}
    return make(tokens, limit - prompt, id, **options)


@pytest.mark.parametrize("run", range(10))
def test_random_workloads(run: int) -> None:
    """Each text equals that of the sequence alone; no row reads a wrong slot; no page is lost; nothing starves."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    size, pages, seqs = rng.randint(1, 5), rng.randint(2, 24), rng.randint(1, 6)
    batched, length = rng.choice([2, 4, 16, 64]), rng.randint(2, 60)
    chunks, slots = rng.randint(1, 5), length + rng.randint(0, 40)
    cache, extra, updates = rng.random() < 0.7, rng.choice([0, 0, 1, 3]), rng.random() < 0.5
    continuing = rng.choice([0.0, 0.0, 0.3])
    scheduler, device = make_device(
        seqs,
        seed,
        pages=pages,
        size=size,
        batched=batched,
        length=length,
        max_chunks=chunks,
        max_slots=slots,
        prefix_cache=cache,
        headroom=rng.choice([0, 1, 4, 32]),
    )
    pool, added, cancelled = device.pool, list[Sequence](), set[Sequence]()
    for _ in range(1000):
        what = rng.random()
        if what < 0.2:
            added.append(random_sequence(rng, len(added), length, pages * size, continuing))
            scheduler.add(added[-1])
        elif what < 0.25 and added:
            sequence = rng.choice(added[-10:])
            if not sequence.finished:
                cancelled.add(sequence)
            scheduler.finish(sequence)
        elif what < 0.26 and updates:
            pool.clear()
        elif what < 0.35 and device.in_flight:
            device.read()
        else:
            device.step(rng.choice([0, extra]))
        scheduler.check()
        if device.steps and isinstance(plan := device.steps[-1], Prefill):
            counts = [row.count for row in plan.rows]
            assert min(counts) > 0
            assert sum(counts) <= batched
            assert len(counts) <= chunks
            assert sum(-(-(row.start + row.count) // size) for row in plan.rows) <= -(-slots // size)
        if not cache and not continuing and scheduler.running and scheduler.waiting:
            assert scheduler.running[-1].order < scheduler.waiting[0].order, "a sequence was passed"
    device.drain(extra=extra)
    for sequence in added:
        assert sequence.finished
        expected = text_alone(sequence)
        if updates:
            assert sequence in cancelled or len(sequence.tokens) == sequence.limit or sequence.tokens[-1] == END
        else:
            assert sequence.tokens == expected[: len(sequence.tokens) if sequence in cancelled else None]


# --- what can be added ---


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(pages=3, size=4, length=20)
    with pytest.raises(InputError, match=r"15 tokens and max_new_tokens=6 need 21 slots; a sequence may have 20"):
        scheduler.add(make([1] * 15, 6))
    with pytest.raises(
        InputError, match=r"10 tokens and max_new_tokens=3 need 13 slots; the cache has 12 \(3 pages of 4\)"
    ):
        scheduler.add(make([1] * 10, 3))
    assert not scheduler.waiting
    sequence = make([1] * 10, 2)
    scheduler.add(sequence)
    with pytest.raises(ValueError, match="added before"):
        scheduler.add(sequence)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("prompt", [1, 5, 11])
def test_a_sequence_that_fits_alone_finishes(prompt: int, extra: int) -> None:
    """Also where speculation would need more pages than there are."""
    for others in (0, 3):
        scheduler, device = make_device(pages=3, size=4)
        sequences = [make([2, *[1] * (prompt - 1)], 12 - prompt, i) for i in range(1 + others)]
        for sequence in sequences:
            scheduler.add(sequence)
        device.drain(extra=extra)
        assert [s.tokens for s in sequences] == [text_alone(s) for s in sequences]


# --- order of steps ---


def sizes(plan: Prefill | Decode | None) -> list[tuple[int, int, int]]:
    """Sequence, start and count of each row of a prefill step."""
    assert isinstance(plan, Prefill)
    return [(row.sequence.id, row.start, row.count) for row in plan.rows]


def test_short_prompts_share_a_step_as_far_as_its_program_has_chunks() -> None:
    scheduler = make_scheduler(seqs=8, batched=16, max_chunks=4)
    for i, prompt in enumerate((3, 4, 2, 4, 4, 1)):
        scheduler.add(make([i + 1] * prompt, id=i))
    assert sizes(scheduler.plan()) == [(0, 0, 3), (1, 0, 4), (2, 0, 2), (3, 0, 4)]
    assert isinstance(scheduler.plan(), Decode)
    assert sizes(scheduler.plan()) == [(4, 0, 4), (5, 0, 1)]


def test_a_step_reads_no_more_pages_than_its_program_holds() -> None:
    """Tokens that are in the cache count too: of a step's second text, only what the pages leave room for is read."""
    scheduler, device = make_device(size=4, seqs=4, batched=16, length=24, max_slots=32)
    run_alone(scheduler, device, make([1] * 16, 1))
    for i, prompt in enumerate(([1] * 16 + [2] * 2, [1] * 12 + [2] * 10, [2])):
        scheduler.add(make(prompt, 1, i))
    # Five of eight pages, and three: with 12 tokens in the cache, the second text has no room.
    assert sizes(scheduler.plan()) == [(0, 16, 2)]
    assert sizes(scheduler.plan()) == [(1, 12, 10), (2, 0, 1)]
    for sequence in scheduler.running:
        scheduler.read(sequence, [END] * sequence.pending)


def test_decoding_waits_for_one_chunk_of_a_long_prompt_at_a_time() -> None:
    scheduler = make_scheduler(batched=16)
    short, long = make([1] * 3, id=0), make([2] * 40, id=1)
    scheduler.add(short)
    assert sizes(scheduler.plan()) == [(0, 0, 3)]
    scheduler.add(long)
    plans = [scheduler.plan() for _ in range(6)]
    assert [sizes(p) for p in plans[1::2]] == [[(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8)]]
    assert [p.rows for p in plans[0::2] if isinstance(p, Decode)] == [(short,)] * 3
    plan = scheduler.plan()
    assert isinstance(plan, Decode)
    assert plan.rows == (short, long)


def test_a_long_prompt_beside_short_ones_starts_with_what_fits() -> None:
    """Its last chunk leaves room for the short ones behind it."""
    scheduler = make_scheduler(batched=16)
    for i, prompt in enumerate((3, 40, 3)):
        scheduler.add(make([i + 1] * prompt, id=i))
    plans = [scheduler.plan() for _ in range(5)]
    assert [sizes(p) for p in plans[::2]] == [[(0, 0, 3), (1, 0, 13)], [(1, 13, 16)], [(1, 29, 11), (2, 0, 3)]]


def test_first_come_first_served_with_as_many_as_there_are_slots() -> None:
    scheduler, device = make_device(seqs=2)
    sequences = [make([i + 1], 4, i) for i in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    device.step()
    assert scheduler.running == tuple(sequences[:2])
    assert scheduler.waiting == tuple(sequences[2:])
    device.drain()
    first = dict[int, int]()
    for n, plan in enumerate(device.steps):
        for row in plan.rows if isinstance(plan, Prefill) else ():
            first.setdefault(row.sequence.id, n)
    assert list(first) == [0, 1, 2, 3, 4]
    assert max(len(plan.rows) for plan in device.steps) == 2


def test_what_continues_a_text_starts_before_what_does_not() -> None:
    """In the order of arrival among themselves, and after what was preempted."""
    scheduler, device = make_device(seqs=1)
    sequences = [make([i + 1], 4, i, continues=i in (3, 5)) for i in range(6)]
    for sequence in sequences[:5]:
        scheduler.add(sequence)
        scheduler.check()
    assert [s.id for s in scheduler.waiting] == [3, 0, 1, 2, 4]
    device.step()
    device.read()
    scheduler.preempt_all()
    scheduler.add(sequences[5])
    assert [s.id for s in scheduler.waiting] == [3, 5, 0, 1, 2, 4]
    scheduler.check()
    device.drain()
    assert [s.tokens for s in sequences] == [text_alone(s) for s in sequences]


def test_a_long_sequence_is_not_passed_by_short_ones_that_would_fit() -> None:
    scheduler, device = make_device(pages=8, size=4)
    running, long, short = make([1] * 20, 4, 0), make([2] * 16, 4, 1), make([3], 1, 2)
    for sequence in (running, long, short):
        scheduler.add(sequence)
    device.step()
    device.step()
    assert scheduler.running == (running,)
    assert scheduler.waiting == (long, short)
    device.drain()


def test_a_sequence_gets_no_more_tokens_than_it_asked_for() -> None:
    """Whether or not the host reads them in time."""
    scheduler = make_scheduler()
    one, two = make([1], 1, 0), make([2], 2, 1)
    scheduler.add(one)
    scheduler.add(two)
    assert isinstance(scheduler.plan(), Prefill)
    plan = scheduler.plan()
    assert isinstance(plan, Decode)
    assert plan.rows == (two,)
    assert scheduler.plan() is None
    assert scheduler.wants_read
    assert (one.pending, two.pending) == (1, 2)
    scheduler.check()


@pytest.mark.parametrize("options", [{"max_chunks": 0}, {"max_slots": 999}], ids=str)
def test_a_program_takes_a_chunk_of_any_text(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_chunks of 1, and max_slots of max_length"):
        make_scheduler(**options)


def test_nothing_to_do_needs_no_read() -> None:
    scheduler = make_scheduler()
    assert scheduler.plan() is None
    assert not scheduler.wants_read


# --- the prefix cache ---


def run_alone(scheduler: Scheduler, device: Device, sequence: Sequence) -> list[tuple[int, int, int]]:
    """Runs a sequence to its end and returns its rows of prefill steps."""
    before = len(device.steps)
    scheduler.add(sequence)
    device.drain()
    return [row for plan in device.steps[before:] if isinstance(plan, Prefill) for row in sizes(plan)]


def test_a_cached_prompt_is_read_from_its_last_page() -> None:
    """At least the last token is computed, since the next one follows from it."""
    scheduler, device = make_device(size=4)
    for length, start in ((12, 0), (12, 8), (13, 12), (14, 12), (11, 8), (4, 0), (3, 0), (1, 0)):
        sequence = make([1, 2] * (length // 2) + [1] * (length % 2), 1)
        assert run_alone(scheduler, device, sequence) == [(0, start, length - start)]
        assert sequence.cached_tokens == start
    assert (device.pool.hits, device.pool.queries) == (8 + 12 + 12 + 8, 12 + 12 + 13 + 14 + 11 + 4 + 3 + 1)


def test_the_next_turn_of_a_conversation_finds_the_output_too() -> None:
    scheduler, device = make_device(size=2)
    prompts = ([1, 2, 1, *[2] * n] for n in range(100))
    first = next(s for s in (make(prompt, 8) for prompt in prompts) if len(text_alone(s)) > s.prompt_length + 4)
    run_alone(scheduler, device, first)
    # The newest token was never written.
    found = (len(first.tokens) - 1) // 2 * 2
    second = make([*first.tokens, 1, 1, 1], 1)
    assert run_alone(scheduler, device, second) == [(0, found, len(second.tokens) - 1 - found)]


def test_of_equal_prompts_that_arrive_together_one_is_read() -> None:
    """The others wait for a step and find its pages, while different prompts go ahead."""
    scheduler, device = make_device(size=4, seqs=8, batched=64)
    group = [make([1, 2] * 6, 4, i) for i in range(4)]
    other = make([2] * 12, 4, 4)
    for sequence in (*group, other):
        scheduler.add(sequence)
    device.step()
    assert sizes(device.steps[-1]) == [(0, 0, 12), (4, 0, 12)]
    assert scheduler.waiting == tuple(group[1:])
    device.drain()
    prefills = [plan for plan in device.steps if isinstance(plan, Prefill)]
    assert sizes(prefills[1]) == [(1, 8, 4), (2, 8, 4), (3, 8, 4)]


def test_a_postponed_prompt_keeps_its_place() -> None:
    """Neither its slot nor its pages go to those behind it."""
    scheduler, device = make_device(size=4, seqs=2, batched=64)
    sequences = [make([1] * 12, 4, 0), make([1] * 12, 4, 1), make([2] * 12, 4, 2)]
    for sequence in sequences:
        scheduler.add(sequence)
    device.step()
    device.step()
    device.step()
    assert scheduler.running == tuple(sequences[:2])
    device.drain()
    scheduler, device = make_device(pages=6, size=4, batched=64)
    sequences = [make([1] * 11, 1, 0), make([1] * 11, 1, 1), make([2] * 8, 4, 2)]
    for sequence in sequences:
        scheduler.add(sequence)
    device.step()
    assert scheduler.running == tuple(sequences[:1])
    device.drain()


@pytest.mark.parametrize(
    ("options", "request_options"), [({"prefix_cache": False}, {}), ({}, {"prompt_logprobs": True})]
)
def test_without_a_prefix_cache_prompts_are_read_whole(
    options: dict[str, Any], request_options: dict[str, Any]
) -> None:
    scheduler, device = make_device(size=4, **options)
    for _ in range(2):
        sequence = make([1] * 12, 4, **request_options)
        assert run_alone(scheduler, device, sequence) == [(0, 0, 12)]
    assert (device.pool.hits, device.pool.queries) == (0, 0)


def test_new_weights_and_other_adapters_find_nothing() -> None:
    scheduler, device = make_device(size=4)
    running = make([2] * 9, 30, 1)
    scheduler.add(running)
    device.step()
    assert run_alone(scheduler, device, make([1] * 9, 1))[-1] == (0, 0, 9)
    device.pool.clear()
    running = make([2] * 9, 30, 1)
    scheduler.add(running)
    device.step()
    device.pool.clear()
    # What a running sequence writes now follows from keys and values of the old weights.
    device.drain()
    for adapter, start in ((None, 0), (None, 8), ("a", 0), ("b", 0), ("a", 8)):
        for prompt in ([1] * 9, [2] * 9):
            assert run_alone(scheduler, device, make(prompt, 1, adapter=adapter)) == [(0, start, 9 - start)]


def test_pages_are_shared_under_one_salt_only() -> None:
    """Also those of a text that runs, and of texts that arrive together."""
    scheduler, device = make_device(size=4, seqs=8, batched=64)
    for salt, start in ((None, 0), ("a", 0), ("b", 0), (None, 8), ("a", 8), ("b", 8), ("c", 0)):
        assert run_alone(scheduler, device, make([1] * 9, 1, cache_salt=salt)) == [(0, start, 9 - start)]
    assert run_alone(scheduler, device, make([1] * 9, 1, cache_salt="a", adapter="x")) == [(0, 0, 9)]
    together = [make([2] * 9, 4, i, cache_salt=salt) for i, salt in enumerate((None, "a", "b", "a"))]
    for sequence in together:
        scheduler.add(sequence)
    device.step()
    assert sizes(device.steps[-1]) == [(0, 0, 9), (1, 0, 9), (2, 0, 9)]
    device.drain()
    scheduler.check()
    assert together[3].cached_tokens == 8


# --- preemption ---


def test_the_newest_is_preempted_and_returns_to_the_front() -> None:
    scheduler, device = make_device(pages=6, size=2, batched=4, prefix_cache=False, headroom=0)
    sequences = [make([2, 1, 2], 8, 0), make([1, 1, 2], 8, 1), make([1, 2, 2], 8, 2)]
    for sequence in sequences[:2]:
        scheduler.add(sequence)
    while not scheduler.preemptions:
        assert device.step()
    scheduler.add(sequences[2])
    assert sequences[1].preemptions == 1
    assert scheduler.running == (sequences[0],)
    assert scheduler.waiting == tuple(sequences[1:])
    assert not sequences[1].pages
    device.drain()
    assert [s.tokens for s in sequences] == [text_alone(s) for s in sequences]


def test_nobody_is_preempted_while_tokens_are_in_flight() -> None:
    """They may end a sequence, and a preempted one must know all its tokens."""
    scheduler = make_scheduler(pages=4, size=2, headroom=0)
    old, new = make([1, 1], 5, 0), make([2, 2], 5, 1)
    scheduler.add(old)
    scheduler.add(new)
    # Both have two pages, which hold 4 slots.
    assert [len(plan.rows) for plan in (scheduler.plan(), scheduler.plan(), scheduler.plan()) if plan] == [2, 2, 2]
    assert scheduler.plan() is None
    assert scheduler.wants_read
    assert scheduler.preemptions == 0
    for sequence in (old, new):
        scheduler.read(sequence, [1] * sequence.pending)
    assert scheduler.plan() == Decode((old,), 0)
    assert scheduler.waiting == (new,)
    scheduler.check()


def test_a_sequence_starts_when_those_that_run_can_grow() -> None:
    """Otherwise it would be read in vain: it is the first that is preempted."""
    for headroom, starts in ((0, True), (2, True), (3, False), (100, False)):
        scheduler, device = make_device(pages=6, size=4, headroom=headroom)
        scheduler.add(make([1] * 8, 10, 0))
        device.step()
        scheduler.add(make([2] * 8, 4, 1))
        device.step()
        device.step()
        assert (len(scheduler.running) == 2) == starts
        device.drain()


def test_a_preempted_sequence_is_no_hit() -> None:
    """Its own pages may be found again; hits are counted for prompts that are new."""
    scheduler, device = make_device(pages=8, size=2, batched=4, headroom=0)
    for i in range(3):
        scheduler.add(make([1 + i % 2] * 3 + [1 + i // 2], 10, i))
    device.drain()
    assert scheduler.preemptions
    assert device.pool.queries == 3 * 4


# --- cancellation and reading ---


def test_a_sequence_can_be_cancelled_at_any_time() -> None:
    scheduler = make_scheduler(seqs=1, batched=4, size=2)
    for steps in range(8):
        sequence, behind = make([1] * 9, 8, 0), make([2], 8, 1)
        scheduler.add(sequence)
        scheduler.add(behind)
        for _ in range(steps):
            scheduler.plan()
        scheduler.finish(sequence)
        scheduler.finish(sequence)
        scheduler.check()
        assert scheduler._pool.num_free == scheduler._pool.num_pages
        scheduler.read(sequence, [1])
        scheduler.accept(sequence, [1])
        assert sequence.tokens == [1] * 9
        # Its slot is free too.
        assert [id for id, _, _ in sizes(scheduler.plan())] == [1]
        scheduler.finish(behind)
    unknown = make([1])
    scheduler.finish(unknown)
    with pytest.raises(ValueError, match="finished"):
        scheduler.add(unknown)


def test_no_more_tokens_are_read_than_are_pending() -> None:
    scheduler = make_scheduler()
    sequence = make([1] * 3)
    scheduler.add(sequence)
    with pytest.raises(ValueError, match="0 pending tokens"):
        scheduler.read(sequence, [1])
    scheduler.plan()
    scheduler.read(sequence, [1])
    scheduler.plan(extra=2)
    with pytest.raises(ValueError, match="3 pending tokens, of which 2 are speculated"):
        scheduler.read(sequence, [1])
    for tokens in ([], [1] * 4):
        with pytest.raises(ValueError, match=f"Expected 1 to 3 tokens of a step with speculation, got {len(tokens)}"):
            scheduler.accept(sequence, tokens)
    scheduler.accept(sequence, [1, 1])
    assert sequence.tokens == [1] * 6


# --- speculation ---


def test_speculation_has_pages_for_all_proposals_and_goes_on_after_the_accepted_ones() -> None:
    scheduler = make_scheduler(size=2)
    sequence = make([1] * 3, 20)
    scheduler.add(sequence)
    scheduler.plan(extra=4)
    assert scheduler.plan(extra=4) is None, "proposals follow from known tokens"
    assert scheduler.wants_read
    scheduler.read(sequence, [1])
    plan = scheduler.plan(extra=4)
    assert plan == Decode((sequence,), 4)
    assert (sequence.written, sequence.pending, len(sequence.pages)) == (8, 5, 4)
    assert scheduler.plan() is None, "how many tokens it has is unknown"
    scheduler.accept(sequence, [1, 1, 2])
    assert (sequence.written, sequence.pending, len(sequence.tokens)) == (6, 0, 7)
    scheduler.check()


def test_speculation_gives_way_where_pages_are_missing() -> None:
    """A step without it is better than to preempt a sequence."""
    scheduler = make_scheduler(pages=4, size=2)
    sequences = [make([1] * 2, 2, 0), make([2] * 2, 2, 1)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.plan(extra=3)
    for sequence in sequences:
        scheduler.read(sequence, [1])
    assert scheduler.plan(extra=3) == Decode(tuple(sequences), 0)
    assert scheduler.preemptions == 0


# --- time ---


def test_planning_a_step_of_256_rows_takes_less_than_a_millisecond() -> None:
    scheduler = make_scheduler(pages=40_000, size=16, seqs=256, batched=2048, length=4096)
    for i in range(256):
        scheduler.add(make([i + 1] * (1000 + i), 1000, i))
    scheduler.add(make([1], 8, 256))
    while not all(s.decoding for s in scheduler.running) or len(scheduler.running) < 256:
        scheduler.plan()
        for sequence in scheduler.running:
            scheduler.read(sequence, [1] * sequence.pending)
    taken = []
    for _ in range(50):
        start = time.perf_counter()
        plan = scheduler.plan()
        taken.append(time.perf_counter() - start)
        assert isinstance(plan, Decode)
        assert len(plan.rows) == 256
        for sequence in plan.rows:
            scheduler.read(sequence, [1])
    # The least of many, since the machine may be busy with something else.
    assert min(taken) < 1e-3
