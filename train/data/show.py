"""Shows examples as a model is trained on them: their text, with what is trained marked."""

import dataclasses
import html
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from qwen_jax.tokenizer import Tokenizer, TrainedIds
from qwen_jax.tokenizer.trained import encode_parts
from train.data.examples import ExampleOptions, Kind, read_examples


class Run(NamedTuple):
    """The text of consecutive tokens of one sort.

    Attributes:
      text: their text.
      trained: whether they are trained.
      control: whether they are control tokens; typed ones are not.
    """

    text: str
    trained: bool
    control: bool


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
    runs: tuple[Run, ...]


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
        answers = [{**vars(answer), "runs": [run._asdict() for run in answer.runs]} for answer in self.answers]
        return {**vars(self), "answers": answers}

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
    step, control = tokenizer.byte_decoder(), frozenset(tokenizer.control_ids.values())
    tokens = [(step(i), trained, i in control) for i, trained in zip(*encoded, strict=True)]
    runs = []
    for (trained, is_control), run in itertools.groupby(tokens, lambda token: token[1:]):
        text = b"".join(content for content, *_ in run).decode("utf-8", errors="replace")
        runs.append(Run(text, trained, is_control))
    return Answer(name, len(encoded.ids), sum(encoded.trained[1:]), tuple(runs))


def print_example(example: Shown, console: Console) -> None:
    """Prints an example; trained text is green and underlined, control tokens are bold.

    Args:
      example: from `show_examples`.
      console: where it is printed.
    """
    for title, answer in example.titles():
        console.print(Text(title, style="bold"), soft_wrap=True)
        text = Text()
        for run in answer.runs:
            text.append(run.text, style=f"{'green underline' if run.trained else ''}{' bold' * run.control}".strip())
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
b {{ color: #777; }}
</style>
</head>
<body>
<p>Marked text is trained. Control tokens are <b>bold</b>; those typed into a message are plain text.</p>
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
            blocks.append(f"<h3>{html.escape(title)}</h3>\n<pre>\n{''.join(map(_html, answer.runs))}</pre>")
    return _PAGE.format(body="\n".join(blocks))


def _html(run: Run) -> str:
    text = f"<b>{html.escape(run.text)}</b>" if run.control else html.escape(run.text)
    return f"<mark>{text}</mark>" if run.trained else text
