"""The runner: what it is told to do becomes programs on the device with arrays of the host.

It does what it is told, step by step: which pages a sequence has, and when it runs, is the scheduler's business. Every
call returns before the device is done; only `Sampled.read` waits.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import jax
import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference.buckets import RunnerConfig, smallest
from qwen_jax.inference.row_sampling import (
    FIELDS,
    MASKED,
    RULES,
    WITH_MASKS,
    SampleRow,
    Variant,
    pack,
    variant_of,
    with_mask,
)
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.inference.runner_programs import CLEARED, MAX_SEGMENTS
from qwen_jax.inference.runner_state import RunnerState
from qwen_jax.inference.runner_types import Masks, PrefillInput, PromptLogprobs, RowInput, Sampled, SampledMany
from qwen_jax.inference.slots import Slots, no_room, set_table
from qwen_jax.inference.text_rows import TextRow, pack_texts

__all__ = [
    "Masks",
    "PrefillInput",
    "PromptLogprobs",
    "RowInput",
    "Runner",
    "RunnerConfig",
    "SampleRow",
    "Sampled",
    "SampledMany",
]

_WITHOUT_RULES = "This runner has no rules: make it with RunnerConfig(rules=True)."


class Runner(RunnerState):
    """A model on a mesh with a paged cache. Call it from one thread."""

    @functools.cached_property
    def slots(self) -> Slots:
        """What `decode_slots` and `sample_slots` need of each sequence."""
        page_size = self.settings.page_size
        return Slots(self.settings.max_seqs, -(-self.buckets.slots[-1] // page_size), page_size)

    def _with_adapters(self, packed: np.ndarray, adapters: Sequence[int] | np.ndarray, axis: int) -> np.ndarray:
        """What a program takes for each row or token along the first or second axis, with their adapters."""
        if self.static.options.adapter_ranks:
            numbers = np.zeros(packed.shape[axis], np.int32)
            numbers[: len(adapters)] = adapters
            packed = np.concatenate([packed, np.expand_dims(numbers, 1 - axis)], 1 - axis)
        elif np.any(adapters):
            raise ValueError("This runner has no adapters: make it with Options(adapter_ranks=...).")
        return packed

    # --- steps ---

    def prefill(self, rows: Sequence[PrefillInput]) -> jax.Array:
        """Reads the next chunk of each prompt.

        Args:
          rows: of different sequences.

        Returns:
          Float32 logits [E, V] after each chunk; E is at least the number of rows.

        Raises:
          ValueError: more than a program takes, or a sequence without room in its pages.
        """
        # The program: its table holds the pages that each chunk and what is before it fill.
        size, dual_chunk = self.settings.page_size, self.config.dual_chunk
        ends = [row.start + len(row.tokens) for row in rows]
        pages = [-(-end // size) for end in ends]
        lengths = [max(row.length, end) for row, end in zip(rows, ends, strict=True)]
        needed = sum(pages) * size
        if dual_chunk is not None and max(lengths) > dual_chunk.original_max_position_embeddings:
            # A program whose table covers the prompt knows that its queries have a factor.
            needed = max(needed, *lengths)
        E, T = self.buckets.prefill_size(len(rows), sum(len(row.tokens) for row in rows))
        slots = smallest(self.buckets.prefill_slots_of(T), needed, "slots")
        # What each token and each chunk needs. Padding has the slot -1.
        packed, adapters = np.zeros((4, T), np.int32), np.zeros(T, np.int32)
        packed[1] = -1
        last, table = np.zeros(E, np.int32), np.zeros(-(-slots // size), np.int32)
        at = page = 0
        for i, (row, end, used) in enumerate(zip(rows, ends, pages, strict=True)):
            first, tokens = page * size, slice(at, at + len(row.tokens))
            packed[0, tokens] = row.tokens
            packed[1, tokens] = np.arange(first + row.start, first + end)
            packed[2:, tokens] = [[first], [lengths[i]]]
            adapters[tokens] = row.adapter
            self._set_table(table[page : page + used], row.pages, end)
            at, page = tokens.stop, page + used
            last[i] = at - 1
        # What is behind the last slot is masked, not skipped: it must be finite.
        table[page:] = table[page - 1]
        packed = self._with_adapters(packed, adapters.tolist(), axis=1)
        logits: jax.Array = self.apply(Program("prefill", E, T, slots), packed, np.concatenate([last, table]))
        return logits

    def _set_table(self, table: np.ndarray, pages: Sequence[int], needed: int) -> None:
        """Writes a row's pages into its row of the table, and checks that they hold the tokens needed."""
        if len(pages) * self.settings.page_size < needed:
            raise no_room(len(pages), self.settings.page_size, needed)
        set_table(table, pages)

    def decode(self, rows: Sequence[RowInput]) -> jax.Array:
        """Reads the newest token of each sequence.

        Args:
          rows: different sequences.

        Returns:
          Float32 logits [B, V]; B is at least the number of rows.

        Raises:
          ValueError: more rows than a program takes, or a sequence without room in its pages.
        """
        return self._decode("decode", rows, np.zeros((len(rows), 0), np.int32))

    def verify(self, rows: Sequence[RowInput], proposals: np.ndarray) -> jax.Array:
        """Reads the newest token of each sequence and the tokens that are proposed to follow it.

        Args:
          rows: different sequences, whose pages have room for the proposals.
          proposals: int [B, k] ids, k of the settings; -1 for none, which is never accepted.

        Returns:
          Float32 logits [B, 1 + k, V] after each token; B is at least the number of rows.

        Raises:
          ValueError: more rows than a program takes, or a sequence without room in its pages.
        """
        if proposals.shape != (len(rows), self.settings.speculate):
            raise ValueError(f"Expected proposals {(len(rows), self.settings.speculate)}, got {proposals.shape}.")
        return self._decode("verify", rows, proposals)

    def decode_slots(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        pages: Sequence[Sequence[int]],
        packed: Callable[[], None] = lambda: None,
    ) -> jax.Array:
        """As `decode`, for sequences that are in `slots`: with many rows it takes a fraction of the time.

        Args:
          slots: of different sequences.
          lengths: tokens of each that are in the cache.
          pages: of each, with room for a new token: those that it was placed with, and perhaps more.
          packed: called when the arguments are not needed any more, before the program is started.
        """
        program, rows = self._rows("decode", len(slots), max(lengths), 1)
        adapters = self.slots.pack_rows(rows[: len(slots)], slots, lengths, pages)
        packed()
        return self._forward(program, rows, adapters)

    def _decode(self, kind: str, rows: Sequence[RowInput], proposals: np.ndarray) -> jax.Array:
        new = 1 + proposals.shape[1]
        program, packed = self._rows(kind, len(rows), max(row.length for row in rows), new)
        table = packed.shape[1] - 2 - new
        packed[: len(rows), table:-3] = proposals
        for line, row in zip(packed, rows, strict=False):
            line[-3:] = row.slot, row.length, new
            self._set_table(line[:table], row.pages, row.length + new)
        return self._forward(program, packed, [row.adapter for row in rows])

    def _rows(self, kind: str, count: int, longest: int, new: int) -> tuple[Program, np.ndarray]:
        """The program for rows of sequences of at most some length, and its packed array, of padding alone."""
        B, slots = smallest(self.buckets.rows, count, "rows"), smallest(self.buckets.slots, longest + new, "slots")
        packed = np.zeros((B, 2 + new + -(-slots // self.settings.page_size)), np.int32)
        packed[:, -3] = self.settings.max_seqs
        return Program(kind, B, slots=slots), packed

    def _forward(self, program: Program, packed: np.ndarray, adapters: Sequence[int] | np.ndarray) -> jax.Array:
        logits: jax.Array = self.apply(program, self._with_adapters(packed, adapters, axis=0))
        return logits

    # --- sampling ---

    def sample(self, logits: jax.Array, rows: Sequence[SampleRow | None], masks: Masks | None = None) -> Sampled:
        """Samples a token for each row, which becomes the newest of its sequence.

        Args:
          logits: of `prefill` or `decode`.
          rows: in the order of that call; None for a chunk that does not end its prompt.
          masks: of rows that may not have any token.

        Raises:
          ValueError: penalties without rules.
        """
        return Sampled(self._sample_rows("sample", logits, rows, np.zeros((len(rows), 0), np.int32), masks), len(rows))

    def sample_slots(
        self,
        logits: jax.Array,
        slots: Sequence[int | None],
        steps: Sequence[int],
        masks: Masks | None = None,
    ) -> Sampled:
        """As `sample`, for sequences that are in `slots`: with many rows it takes a fraction of the time.

        Args:
          logits: of `prefill`, `decode` or `decode_slots`.
          slots: in the order of that call; None for a row that is not sampled.
          steps: tokens of each text that were sampled before.
          masks: as for `sample`.
        """
        packed, variant = self.slots.pack_sampling(slots, steps, len(logits))
        return Sampled(self._sample("sample", logits, packed, variant, masks), len(slots))

    def sample_verified(
        self,
        logits: jax.Array,
        rows: Sequence[SampleRow],
        proposals: np.ndarray,
        masks: Masks | None = None,
    ) -> SampledMany:
        """Samples the model's own token at each position, accepts proposals while they are these tokens.

        The last token that was emitted becomes the newest of its sequence. The keys and values of the emitted tokens
        before it are in the cache.

        Args:
          logits: of `verify`.
          rows: in the order of that call.
          proposals: of that call.
          masks: for each position, as for `sample`.

        Raises:
          ValueError: penalties without rules.
        """
        return SampledMany(self._sample_rows("sample verified", logits, rows, proposals, masks), len(rows))

    def _sample_rows(
        self,
        kind: str,
        logits: jax.Array,
        rows: Sequence[SampleRow | None],
        proposals: np.ndarray,
        masks: Masks | None,
    ) -> jax.Array:
        packed = np.zeros((len(logits), FIELDS + proposals.shape[1]), np.int32)
        packed[:, :FIELDS] = pack(rows, len(logits), self.settings.max_seqs)
        packed[: len(rows), FIELDS:] = proposals
        return self._sample(kind, logits, packed, variant_of(rows), masks)

    def _sample(
        self, kind: str, logits: jax.Array, packed: np.ndarray, variant: Variant, masks: Masks | None
    ) -> jax.Array:
        """Starts sampling of rows whose parameters are packed and need at least this variant."""
        if not self.settings.rules and packed[:, RULES].any():
            raise ValueError(_WITHOUT_RULES)
        arrays, count = [packed], 0
        if masks is not None:
            variant = with_mask(variant)
        if variant in WITH_MASKS:
            needed = 0 if masks is None else len(masks.rows)
            count = smallest(self.buckets.masks_of(len(logits), variant), needed, "masks")
        if masks is not None:
            packed[masks.rows, MASKED] = np.arange(1, 1 + len(masks.rows))
            arrays.append(_padded(masks.allowed, count))
        found: jax.Array = self.apply(Program(kind, len(logits), variant=variant, masks=count), *arrays, read=logits)
        found.copy_to_host_async()
        return found

    def set_rules(
        self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int], bias: Mapping[int, float]
    ) -> None:
        """Sets what penalties and biases of a sequence depend on. Sampling counts further tokens itself.

        Args:
          slot: of the sequence.
          prompt_ids: its prompt.
          output_ids: its text so far.
          bias: added to the logits of single tokens.
        """
        if self._state.rules is None:
            raise ValueError(_WITHOUT_RULES)
        V, most = self.config.vocab_size, np.iinfo(np.uint16).max
        counts = np.minimum(np.bincount(np.asarray(output_ids, np.int64), minlength=V), most).astype(np.uint16)
        prompt, biases = np.zeros(V, bool), np.zeros(V, np.float32)
        prompt[np.asarray(prompt_ids, np.int64)] = True
        for token, value in bias.items():
            biases[token] = value
        self.apply(Program("set rules"), np.asarray([slot], np.int32), counts, prompt, biases)

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Fills pages with zeros: those of a sequence whose logits were not finite, before others get them.

        Attention multiplies what a row does not see by zero, which only makes zero of finite numbers.
        """
        for first in range(0, len(pages), CLEARED):
            ids = np.full(CLEARED, self.settings.num_pages, np.int32)
            part = pages[first : first + CLEARED]
            ids[: len(part)] = part
            self.apply(Program("clear"), ids)

    # --- whole texts ---

    def prompt_logprobs(self, tokens: Sequence[int], adapter: int = 0) -> PromptLogprobs:
        """Log-probabilities of a text's own tokens, without the cache. See `texts_logprobs`."""
        return self.texts_logprobs([tokens], [adapter])[0]

    def texts_logprobs(self, texts: Sequence[Sequence[int]], adapters: Sequence[int] = ()) -> list[PromptLogprobs]:
        """Log-probabilities of the tokens of texts. Short texts share a row. Waits for the device.

        Args:
          texts: ids, at least one in each.
          adapters: number of each text's adapter, 0 for none; by default no text has one.
        """
        results: dict[int, PromptLogprobs] = {}
        for row, packed, hidden, _ in self._read_texts(texts, adapters):
            program = Program("score texts", tokens=packed.shape[1])
            scored = np.asarray(self.apply(program, packed, read=hidden))
            own, ids, top = np.split(scored, [1, 1 + self.static.tops], axis=1)
            logprobs, top_logprobs = (np.ascontiguousarray(x).view(np.float32) for x in (own[:, 0], top))
            for i, last in zip(row.texts, row.last, strict=False):
                at = slice(last + 1 - len(texts[i]), last)
                results[i] = PromptLogprobs(logprobs[at], ids[at], top_logprobs[at])
        return [results[i] for i in range(len(texts))]

    def embed(
        self, texts: Sequence[Sequence[int]], pooling: Literal["mean", "last"], adapters: Sequence[int] = ()
    ) -> np.ndarray:
        """The mean, or the last, of the normalised hidden states of each text: float32 [texts, D].

        Waits for the device.

        Args:
          texts: ids, at least one in each.
          pooling: which.
          adapters: as for `texts_logprobs`.

        Raises:
          InputError: another kind of pooling.
        """
        if pooling not in ("mean", "last"):
            raise InputError(f"Expected pooling mean or last, got {pooling!r}.")
        result = np.zeros((len(texts), self.config.hidden_size), np.float32)
        for row, *_, pooled in self._read_texts(texts, adapters):
            result[row.texts] = np.asarray(pooled)[("mean", "last").index(pooling), : len(row.texts)]
        return result

    def _read_texts(
        self, texts: Sequence[Sequence[int]], adapters: Sequence[int]
    ) -> Iterator[tuple[TextRow, np.ndarray, jax.Array, jax.Array]]:
        """Rows of texts: their packed arrays, their hidden states, and those pooled by text."""
        if not self.buckets.texts:
            raise ValueError("This runner reads no whole texts: make it with RunnerConfig(texts=True).")
        # Dual-chunk attention scales the queries of a row by its longest text: there a row has one text.
        most = 1 if self.config.dual_chunk is not None else MAX_SEGMENTS
        for row in pack_texts(texts, self.buckets.texts, self.settings.max_batched_tokens, most):
            # Each token has the adapter of its text; padding, whose text is 0, has none.
            of_text = np.asarray([0, *(adapters[i] if adapters else 0 for i in row.texts)])
            packed = self._with_adapters(row.packed, of_text[row.packed[2]].tolist(), axis=1)
            program = Program("read texts", tokens=row.packed.shape[1])
            yield row, packed, *self.apply(program, packed, row.last)


def _padded(allowed: np.ndarray, count: int) -> np.ndarray:
    """So many masks, contiguous: a part of the array where it has as many. No row reads those that are added."""
    if len(allowed) < count:
        more = np.zeros((count - len(allowed), *allowed.shape[1:]), np.int32)
        return np.concatenate([allowed, more])
    return np.ascontiguousarray(allowed[:count])
