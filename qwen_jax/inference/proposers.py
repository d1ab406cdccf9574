"""Who proposes tokens for speculative decoding: the text itself, or a small model that runs ahead of the large one.

The target model samples its own token at every place, with the random numbers that it would have used anyway, and takes
proposals as long as they are these tokens. So the text does not depend on the proposals; only its speed does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.active import Active
from qwen_jax.inference.buckets import Buckets, RunnerConfig
from qwen_jax.inference.draft import NgramIndex
from qwen_jax.inference.runner import PrefillInput, RowInput, Runner, SampleRow
from qwen_jax.inference.runner_compilation import Report
from qwen_jax.options import Options
from qwen_jax.params import Params

# Tokens that a row lacks after a step, at most, for which there is a small program.
_CATCH_UP = 16


class Proposer(Protocol):
    """Proposes the next tokens of texts.

    Attributes:
      count: how many tokens for each text.
      rows: for how many texts at a time.
      runners: of models that propose.
    """

    @property
    def count(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def runners(self) -> Sequence[Runner]: ...

    def propose(self, active: Sequence[Active]) -> np.ndarray:
        """Returns int32 [rows, count] tokens that may follow what is known of each text; -1 for none."""
        ...

    def forget(self, active: Active) -> None:
        """The text has ended, or begins anew."""
        ...

    def compile(self, report: Report | None) -> None:
        """Compiles what it runs on the device."""
        ...


class Ngrams:
    """Proposes what followed the last time that the text's end occurred; see `draft.NgramIndex`."""

    def __init__(self, count: int, rows: int):
        """
        Args:
          count: tokens to propose for each text.
          rows: proposals are made only while at most so many texts run: then the device has time to spare.
        """
        self.count, self.rows, self.runners = count, rows, ()
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, active: Sequence[Active]) -> np.ndarray:
        """See `Proposer`."""
        proposals = np.full((len(active), self.count), -1, np.int32)
        for line, one in zip(proposals, active, strict=True):
            index = self._indices.setdefault(one.scheduled.id, NgramIndex())
            for token in one.scheduled.tokens[len(index) :]:
                index.push(token)
            found = index.propose(self.count)
            line[: len(found)] = found
        return proposals

    def forget(self, active: Active) -> None:
        """See `Proposer`."""
        self._indices.pop(active.scheduled.id, None)

    def compile(self, report: Report | None) -> None:
        """Nothing runs on the device."""


@dataclasses.dataclass
class _Draft:
    """The place of a text in the small model's cache, and the tokens that are in it."""

    slot: int
    tokens: list[int] = dataclasses.field(default_factory=list)


class DraftModel:
    """A small model that proposes tokens. It has a cache of its own, with room for a few whole texts.

    It samples with the random numbers of the request, as the target does, so that both agree often when sampling, too.
    Its vocabulary may be padded to another size than the target's.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        *,
        dtype: str,
        vocab_limit: int,
        max_length: int,
        count: int,
        rows: int = 8,
        max_batched_tokens: int = 2048,
        page_size: int = 32,
    ):
        """Makes the cache.

        Args:
          config: of the small model.
          params: in the inference layout.
          mesh: of the parameters, that of the target.
          dtype: compute dtype.
          vocab_limit: of the target.
          max_length: tokens of a prompt and its text.
          count: tokens to propose for each text.
          rows: proposals are made only while at most so many texts run.
          max_batched_tokens: tokens of prompts that are read at a time.
          page_size: tokens in a page.

        Raises:
          InputError: a context or a vocabulary that is smaller than the target's.
        """
        if config.context_length < max_length or config.vocab_size < vocab_limit:
            raise InputError(
                f"The draft model has a context of {config.context_length} tokens and an embedding of "
                f"{config.vocab_size}; the texts may have {max_length} tokens, of {vocab_limit} ids. Use a draft model "
                "of the same family, or lower max_length (--max-model-len)."
            )
        self.count, self.rows = count, rows
        self._chunk = max_batched_tokens
        self._per_text = -(-(max_length + count) // page_size)
        settings = RunnerConfig(
            max_seqs=rows,
            max_length=max_length + count,
            page_size=page_size,
            num_pages=rows * self._per_text,
            max_batched_tokens=max_batched_tokens,
            rules=False,
            texts=False,
        )
        sizes = Buckets.of(settings)
        # The last few tokens of all texts are read together, whatever the texts have.
        few, slots = (rows, rows * _CATCH_UP), rows * self._per_text * page_size
        sizes = dataclasses.replace(
            sizes,
            prefill=(few, *(size for size in sizes.prefill if size[1] > few[1])),
            prefill_slots=(*(s for s in sizes.prefill_slots if s < slots), slots),
        )
        settings = dataclasses.replace(settings, buckets=sizes)
        options = Options(stacked=False, fused=True, dtype=dtype)
        self._runner = Runner(config, params, mesh, options, vocab_limit, settings)
        self.runners = (self._runner,)
        self._free = list(range(rows))
        self._drafts: dict[int, _Draft] = {}

    def compile(self, report: Report | None) -> None:
        """See `Proposer`."""
        self._runner.compile(report)

    def forget(self, active: Active) -> None:
        """See `Proposer`."""
        draft = self._drafts.pop(active.scheduled.id, None)
        if draft is not None:
            self._free.append(draft.slot)

    def propose(self, active: Sequence[Active]) -> np.ndarray:
        """See `Proposer`."""
        # Places of texts that are not in this step, such as those whose pages were taken away, are given to others.
        numbers = {one.scheduled.id for one in active}
        for number in [number for number in self._drafts if number not in numbers]:
            self._free.append(self._drafts.pop(number).slot)
        drafts = [self._draft(one) for one in active]
        wanted = [self._sample_row(one, draft) for one, draft in zip(active, drafts, strict=True)]
        # What is known of the texts and not read yet: after a step, the tokens since the first wrong proposal.
        inputs = [self._catch_up(one.scheduled.tokens, draft) for one, draft in zip(active, drafts, strict=True)]
        sampled = [self._runner.sample(self._runner.prefill(inputs), wanted)]
        # One token after the other.
        for step in range(1, self.count):
            rows = [
                RowInput(draft.slot, len(one.scheduled.tokens) + step - 1, self._pages(draft))
                for one, draft in zip(active, drafts, strict=True)
            ]
            wanted = [dataclasses.replace(row, step=row.step + 1) for row in wanted]
            sampled.append(self._runner.sample(self._runner.decode(rows), wanted))
        proposals = np.stack([tokens.read().token_ids for tokens in sampled], axis=1)
        # The last proposal was not read.
        for draft, one, line in zip(drafts, active, proposals, strict=True):
            draft.tokens = [*one.scheduled.tokens, *line[:-1].tolist()]
        return proposals

    def _draft(self, active: Active) -> _Draft:
        number = active.scheduled.id
        if number not in self._drafts:
            self._drafts[number] = _Draft(self._free.pop())
        return self._drafts[number]

    def _pages(self, draft: _Draft) -> range:
        return range(draft.slot * self._per_text, (draft.slot + 1) * self._per_text)

    def _sample_row(self, active: Active, draft: _Draft) -> SampleRow:
        # Penalties are left to the target.
        sampling = dataclasses.replace(active.request.sampling, repetition_penalty=1.0)
        return SampleRow(draft.slot, sampling, len(active.row.tokens))

    def _catch_up(self, tokens: Sequence[int], draft: _Draft) -> PrefillInput:
        """Reads a text up to its last few tokens, which are returned to be read with those of others."""
        same = next((i for i, (a, b) in enumerate(zip(tokens, draft.tokens, strict=False)) if a != b), None)
        start = min(len(tokens) - 1, len(draft.tokens) if same is None else same)
        while len(tokens) - start > _CATCH_UP:
            chunk = tokens[start : min(start + self._chunk, len(tokens) - 1)]
            self._runner.prefill([PrefillInput(draft.slot, chunk, start, self._pages(draft))])
            start += len(chunk)
        return PrefillInput(draft.slot, tokens[start:], start, self._pages(draft))
