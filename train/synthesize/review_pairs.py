"""Pairs of answers that people label: reading them from files, their keys, and writing those that people decided."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.examples import Conversation, PlainText, RawExample, check_example, read_examples
from train.data.tables import Row, find_tables, read_rows

# Columns that are replaced when a pair is written.
_REPLACED = frozenset({"prompt", "chosen", "rejected", "responses"})


@dataclasses.dataclass(frozen=True)
class ReviewPair:
    """A prompt and two answers.

    Attributes:
      key: hash of the prompt, the tools and both answers. It does not depend on which answer is first.
      ids: hashes of the answers in the order of the file: the chosen and the rejected one, or two candidates.
      prompt: text or messages.
      answers: two texts or two lists of messages, as `ids`.
      tools: function descriptions, or None.
      ranked: whether the file says that the first answer is preferred.
      extra: other columns of the record.
    """

    key: str
    ids: tuple[str, str]
    prompt: Any
    answers: tuple[Any, Any]
    tools: Sequence[Mapping[str, Any]] | None
    ranked: bool
    extra: Mapping[str, Any]

    def prompt_blocks(self) -> list[dict[str, str | None]]:
        """The prompt as `{"role", "text"}` objects, to be shown; the tools come first."""
        tools: list[dict[str, str | None]] = []
        if self.tools:
            tools = [{"role": "tools", "text": json.dumps(self.tools, indent=2, ensure_ascii=False)}]
        return tools + _blocks(self.prompt)

    def answer_blocks(self, id: str) -> list[dict[str, str | None]]:
        """The answer with this id as `{"role", "text"}` objects, to be shown."""
        return _blocks(self.answers[self.ids.index(id)])

    def to_row(self, chosen: str) -> dict[str, Any]:
        """The pair as a record that `train.data.examples` reads, with the other columns.

        A `margin` is that of the file's own preference, and is left out where another answer is chosen.

        Args:
          chosen: id of the preferred answer.
        """
        at = self.ids.index(chosen)
        pair = [self.answers[at], self.answers[1 - at]]
        # A reader takes the prompt off answers that begin with it. Where one does so by itself, both get it once more.
        if self.prompt and any(answer[: len(self.prompt)] == self.prompt for answer in pair):
            pair = [self.prompt + answer for answer in pair]
        extra = {name: value for name, value in self.extra.items() if name != "margin" or at == 0}
        return {"prompt": self.prompt, "chosen": pair[0], "rejected": pair[1], **extra}


@dataclasses.dataclass(frozen=True)
class ReviewFile:
    """The pairs of a file.

    Attributes:
      pairs: in order; each pair comes once.
      files: that were read.
      repeated: number of pairs that had come before.
      equal: number of pairs of candidates with the same text, which are left out.
    """

    pairs: tuple[ReviewPair, ...]
    files: tuple[Path, ...]
    repeated: int
    equal: int

    def left_out(self) -> str:
        """What is not shown, in words; empty if nothing is."""
        parts = []
        if self.repeated:
            parts.append(f"{self.repeated:,} repeated (shown once)")
        if self.equal:
            parts.append(f"{self.equal:,} of equal responses (left out)")
        return ", ".join(parts)


def read_pairs(path: str | Path) -> ReviewFile:
    """Reads preference pairs, or candidates that are compared pairwise.

    The columns are those of preference pairs in `train.data.examples`; or `prompt` (text or messages) and `responses`,
    a list of at least two answers, each text or messages.

    Args:
      path: as for `train.data.tables.find_tables`.

    Raises:
      InputError: the file cannot be read, has no pair, or a record is malformed.
    """
    files = find_tables([path])
    first = next(itertools.chain.from_iterable(read_rows(file) for file in files), None)
    found: list[ReviewPair | None]
    if first is not None and "responses" in first.values and "chosen" not in first.values:
        found = [pair for file in files for row in read_rows(file) for pair in _of_candidates(row)]
    else:
        found = [_pair(raw, raw.row.values, ranked=True) for raw in read_examples(files, "pairs")]
    pairs: dict[str, ReviewPair] = {}
    for pair in found:
        if pair is not None:
            pairs.setdefault(pair.key, pair)
    if not pairs:
        raise InputError(f"{path} has no two different answers to a prompt. Give a file with pairs or candidates.")
    equal = sum(pair is None for pair in found)
    return ReviewFile(tuple(pairs.values()), tuple(files), len(found) - equal - len(pairs), equal)


def _of_candidates(row: Row) -> Iterator[ReviewPair | None]:
    """All pairs of the responses of a record; None stands for two equal ones."""
    prompt, responses = row.values.get("prompt"), row.values.get("responses")
    if prompt is None:
        raise InputError(f"{row.where}: expected the columns prompt and responses, got no prompt. Add it.")
    if not isinstance(responses, list) or len(responses) < 2:
        got = f"{len(responses)}" if isinstance(responses, list) else type(responses).__name__
        raise InputError(f"{row.where}: expected 'responses' as a list of at least two answers, got {got}.")
    if not isinstance(prompt, str):
        # A text that answers messages is the assistant's message.
        responses = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in responses]
    for first, second in itertools.combinations(responses, 2):
        if first == second:
            yield None
            continue
        pair = [first, second]
        texts = [one for one in pair if isinstance(one, str)]
        if isinstance(prompt, str) and prompt and any(one.startswith(prompt) for one in texts) and len(texts) == 2:
            # Responses are without their prompt. One that repeats it keeps it, see `ReviewPair.to_row`.
            pair = [prompt + one for one in texts]
        tools = {name: row.values[name] for name in ("tools",) if name in row.values}
        values = {"prompt": prompt, "chosen": pair[0], "rejected": pair[1], **tools}
        yield _pair(check_example(Row(row.path, row.number, values), "pairs"), row.values, ranked=False)


def _pair(raw: RawExample, values: Mapping[str, Any], *, ranked: bool) -> ReviewPair:
    answers: list[Any] = []
    prompt: Any = None
    tools = None
    for answer in raw.answers:
        if isinstance(answer, PlainText):
            prompt = answer.prompt
            answers.append(answer.completion)
        else:
            assert isinstance(answer, Conversation)
            prompt, tools = list(answer.messages[: answer.first]), answer.tools
            answers.append(list(answer.messages[answer.first :]))
    ids = (_hash(answers[0])[:16], _hash(answers[1])[:16])
    extra = {name: value for name, value in values.items() if name not in _REPLACED}
    key = _hash([prompt, tools, sorted(ids)])[:32]
    return ReviewPair(key, ids, prompt, (answers[0], answers[1]), tools, ranked, extra)


def _hash(value: Any) -> str:
    """A hash of a JSON value, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _blocks(value: Any) -> list[dict[str, str | None]]:
    if isinstance(value, str):
        return [{"role": None, "text": value}]
    blocks: list[dict[str, str | None]] = []
    for message in value:
        if message.get("content"):
            blocks.append({"role": message["role"], "text": message["content"]})
        for call in message.get("tool_calls") or ():
            text = json.dumps(call, indent=2, ensure_ascii=False, default=str)
            blocks.append({"role": f"{message['role']} calls a tool", "text": text})
    return blocks
