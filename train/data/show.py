"""Shows examples as a model is trained on them: their text, with what is trained marked."""

import dataclasses
import html
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qwen_jax.tokenizer import Tokenizer, TrainedIds
from qwen_jax.tokenizer.trained import encode_parts
from train.data.examples import ExampleOptions, Kind, read_examples


@dataclasses.dataclass(frozen=True)
class Answer:
    """A tokenized sequence, as text.

    Attributes:
      name: "example", "chosen" or "rejected".
      tokens: number of tokens.
      trained: number of trained tokens, without a first one, which nothing predicts.
      runs: texts of consecutive tokens that are all trained or all not.
    """

    name: str
    tokens: int
    trained: int
    runs: tuple[tuple[str, bool], ...]


@dataclasses.dataclass(frozen=True)
class Shown:
    """An example to show.

    Attributes:
      where: its file and record.
      kind: "sft" or "pairs".
      margin: of a pair.
      answers: one, or the chosen and the rejected one.
    """

    where: str
    kind: Kind
    margin: float
    answers: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        """The example as a JSON value."""
        answers = [
            {**dataclasses.asdict(answer), "runs": [{"text": text, "trained": on} for text, on in answer.runs]}
            for answer in self.answers
        ]
        return {**dataclasses.asdict(self), "answers": answers}

    def titles(self) -> Iterator[tuple[str, Answer]]:
        """A line above each answer, and the answer."""
        for answer in self.answers:
            name = "" if answer.name == "example" else f", {answer.name}"
            margin = f", margin {self.margin:g}" if self.margin and answer.name == "chosen" else ""
            yield f"{self.where}{name}: {answer.tokens:,} tokens, {answer.trained:,} trained{margin}", answer


def show_examples(
    files: Sequence[Path], tokenizer: Tokenizer, options: ExampleOptions, *, kind: Kind | None, limit: int
) -> Iterator[Shown]:
    """Reads and tokenizes the first examples of files.

    Args:
      files: as from `train.data.tables.find_tables`.
      tokenizer: of the model.
      options: how examples are tokenized.
      kind: which columns to read where the files have those of both; None takes what they have.
      limit: number of examples.

    Raises:
      InputError: as `read_examples` and `RawExample.parts` do.
    """
    for raw in itertools.islice(read_examples(files, kind), limit):
        names = ("example",) if raw.kind == "sft" else ("chosen", "rejected")
        encoded = encode_parts(tokenizer, raw.parts(tokenizer, options))
        answers = tuple(_answer(name, tokenizer, one) for name, one in zip(names, encoded, strict=True))
        yield Shown(raw.row.where, raw.kind, raw.margin, answers)


def _answer(name: str, tokenizer: Tokenizer, encoded: TrainedIds) -> Answer:
    step = tokenizer.byte_decoder()
    runs = []
    for trained, tokens in itertools.groupby(zip(encoded.trained, map(step, encoded.ids), strict=True), lambda x: x[0]):
        runs.append((b"".join(content for _, content in tokens).decode("utf-8", errors="replace"), trained))
    return Answer(name, len(encoded.ids), sum(encoded.trained[1:]), tuple(runs))


def print_example(example: Shown, console: Console) -> None:
    """Prints an example; trained text is green and underlined.

    Args:
      example: from `show_examples`.
      console: where it is printed.
    """
    for title, answer in example.titles():
        console.print(Text(title, style="bold"), soft_wrap=True)
        text = Text()
        for run, trained in answer.runs:
            text.append(run, style="green underline" if trained else "")
        console.print(text, soft_wrap=True)
        console.print()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Training examples</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 60em; color: #222; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1em; }}
mark {{ background: #bfe8c3; color: inherit; }}
</style>
</head>
<body>
<p>Marked text is trained.</p>
{body}
</body>
</html>
"""


def to_html(examples: Sequence[Shown]) -> str:
    """A page with examples; trained text is marked.

    Args:
      examples: from `show_examples`.
    """
    blocks = []
    for example in examples:
        for title, answer in example.titles():
            runs = (f"<mark>{html.escape(run)}</mark>" if on else html.escape(run) for run, on in answer.runs)
            blocks.append(f"<h3>{html.escape(title)}</h3>\n<pre>\n{''.join(runs)}</pre>")
    return _PAGE.format(body="\n".join(blocks))
