"""Drives a runner as a scheduler might, with random choices: rows, their order, and sizes of chunks."""

import dataclasses

import numpy as np

from qwen_jax.inference.runner import PrefillInput, RowInput, Runner, Sampled, SampleRow


@dataclasses.dataclass
class Text:
    """One text to generate.

    Attributes:
      prompt: its ids.
      row: how it is sampled; its slot and step are filled in.
      bias: added to the logits of single tokens.
      shares: another text whose pages hold the first tokens of the prompt; how many is `shared`.
    """

    prompt: list[int]
    row: SampleRow
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    shares: "Text | None" = None
    shared: int = 0
    written: int = 0
    sampled: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    @property
    def prefilled(self) -> bool:
        return self.written >= len(self.prompt)

    def next_row(self) -> SampleRow:
        """The row for the next token."""
        return dataclasses.replace(self.row, step=self.sampled)


def generate(runner: Runner, texts: list[Text], tokens: int, rng: np.random.Generator) -> list[Text]:
    """Generates `tokens` tokens for each text, reading nothing before the end."""
    settings = runner.settings
    free = rng.permutation(settings.num_pages).tolist()
    slots = rng.permutation(settings.max_seqs)[: len(texts)].tolist()
    pending: list[tuple[list[Text | None], Sampled]] = []
    for text, slot in zip(texts, slots, strict=True):
        text.row = dataclasses.replace(text.row, slot=slot)
        if text.row.rules:
            runner.set_rules(slot, text.prompt, [], text.bias)

    def with_room(text: Text, needed: int) -> list[int]:
        while len(text.pages) * settings.page_size < needed:
            text.pages.append(free.pop())
        return text.pages

    def some(ready: list[Text], most: int) -> list[Text]:
        count = int(rng.integers(1, min(len(ready), most) + 1))
        return [ready[i] for i in rng.permutation(len(ready))[:count]]

    while True:
        reading = [t for t in texts if not t.prefilled and (t.shares is None or t.shares.written >= t.shared)]
        writing = [t for t in texts if t.prefilled and t.sampled < tokens]
        if not reading and not writing:
            break
        if reading and (not writing or rng.random() < 0.5):
            chunks, left = runner.buckets.prefill[-1]
            rows, inputs = some(reading, chunks), []
            for text in rows:
                if text.shares is not None and not text.written:
                    text.pages = text.shares.pages[: text.shared // settings.page_size]
                    text.written = text.shared
                most = left - (len(rows) - len(inputs) - 1)
                chunk = text.prompt[text.written : text.written + int(rng.integers(1, most + 1))]
                left -= len(chunk)
                pages = with_room(text, text.written + len(chunk))
                inputs.append(PrefillInput(text.row.slot, chunk, text.written, list(pages), len(text.prompt)))
                text.written += len(chunk)
            logits = runner.prefill(inputs)
            if not any(text.prefilled for text in rows):
                continue
        else:
            rows = some(writing, max(runner.buckets.rows))
            logits = runner.decode([RowInput(t.row.slot, t.written, list(with_room(t, t.written + 1))) for t in rows])
            for text in rows:
                text.written += 1
        sampled = runner.sample(logits, [t.next_row() if t.prefilled else None for t in rows])
        pending.append(([t if t.prefilled else None for t in rows], sampled))
        for text in rows:
            text.sampled += text.prefilled
    for some_rows, sampled in pending:
        found = sampled.read()
        for i, text in enumerate(some_rows):
            if text is not None:
                text.tokens.append(int(found.token_ids[i]))
                text.logprobs.append(float(found.logprobs[i]))
    return texts
