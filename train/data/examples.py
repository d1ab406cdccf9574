"""Examples for fine-tuning, and reading them from files: conversations, prompts with completions, preference pairs.

The columns are those of TRL (huggingface.co/docs/trl/dataset_formats). Everything is text, or everything is messages:

    messages                       a conversation; every assistant's turn is trained
    prompt, completion             the completion is trained
    prompt, chosen, rejected       two answers to one prompt, of which the first is preferred
    chosen, rejected               the same, each with its prompt, which is what both begin with

`tools` may stand beside messages, as a list or as its JSON text, and `margin`, a number, beside a pair.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, check_messages
from qwen_jax.tokenizer.trained import Part, Turns, chat_parts, text_parts
from train.data.tables import Row, read_rows

Kind = Literal["sft", "pairs"]
_FORMATS: dict[str, tuple[Kind, frozenset[str]]] = {
    "messages": ("sft", frozenset({"messages"})),
    "prompt, completion": ("sft", frozenset({"prompt", "completion"})),
    "prompt, chosen, rejected": ("pairs", frozenset({"prompt", "chosen", "rejected"})),
    "chosen, rejected": ("pairs", frozenset({"chosen", "rejected"})),
}
_EXTRA: dict[Kind, tuple[str, ...]] = {"sft": ("tools",), "pairs": ("tools", "margin")}


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized example.

    Attributes:
      ids: int32 [n], token ids; n is at least 1.
      trained: bool [n], whether a token is trained.
    """

    ids: np.ndarray
    trained: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """A tokenized preference pair.

    Attributes:
      chosen: the preferred answer after its prompt.
      rejected: the other answer after the same prompt.
      margin: by how much the first is better; 0 if that is not known.
    """

    chosen: Example
    rejected: Example
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """How examples are tokenized.

    Attributes:
      trained: which turns of the assistant are trained: all, or the last one.
      newline: also train the line end after <|im_end|>.
      parse_special: read control tokens that are typed into messages as such; by default they are plain text.
    """

    trained: Turns = "all"
    newline: bool = False
    parse_special: bool = False


DEFAULTS = ExampleOptions()


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that are rendered with the chat template.

    Attributes:
      messages: all messages.
      tools: function descriptions, or None.
      first: turns of the assistant before this message are not trained.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    first: int = 0

    def parts(self, tokenizer: Tokenizer, options: ExampleOptions) -> list[Part]:
        """The stretches of the text, each trained or not as a whole; see `qwen_jax.tokenizer.trained.chat_parts`."""
        return chat_parts(tokenizer, self.messages, self.tools, first=self.first, **dataclasses.asdict(options))


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A prompt and its completion in plain text, without a chat template.

    Attributes:
      prompt: what comes before.
      completion: what is trained.
    """

    prompt: str
    completion: str

    def parts(self, tokenizer: Tokenizer, options: ExampleOptions) -> list[Part]:
        """The stretches of the text, each trained or not as a whole; see `qwen_jax.tokenizer.trained.text_parts`."""
        return text_parts(tokenizer, self.prompt, self.completion, parse_special=options.parse_special)


@dataclasses.dataclass(frozen=True)
class RawExample:
    """A record that was read and checked, before it is tokenized.

    Attributes:
      row: where it comes from.
      answers: one sequence for "sft", the chosen and the rejected one for "pairs".
      margin: of a pair.
      unread: names of the columns that were not read.
    """

    row: Row
    answers: tuple[Conversation | PlainText, ...]
    margin: float
    unread: frozenset[str]

    @property
    def kind(self) -> Kind:
        """Whether it is one sequence or a pair."""
        return "sft" if len(self.answers) == 1 else "pairs"

    def parts(self, tokenizer: Tokenizer, options: ExampleOptions) -> list[list[Part]]:
        """The parts of each answer.

        Raises:
          InputError: an answer cannot be rendered; the message names the file and the record.
        """
        try:
            return [answer.parts(tokenizer, options) for answer in self.answers]
        except InputError as error:
            raise InputError(f"{self.row.where}: {error}") from None


def read_examples(
    files: Sequence[Path],
    kind: Kind | None = None,
    advance: Callable[[int], None] = lambda count: None,
    finished: Callable[[], None] = lambda: None,
) -> Iterator[RawExample]:
    """Reads and checks examples, in order.

    Args:
      files: as from `train.data.tables.find_tables`.
      kind: which columns to read where records have those of both; None takes what they have.
      advance: is called with the bytes that were read since its last call.
      finished: is called after each file.

    Raises:
      InputError: a file cannot be read or has no record; a record is malformed or has other columns than the first one.
        The message names the file and the record.
    """
    name, first = "", None
    for path in files:
        empty = True
        for row in read_rows(path, advance):
            empty = False
            try:
                this = _format(row.values, kind)
                if first is None:
                    name, first = this, row
                elif this != name:
                    raise InputError(
                        f"expected the columns {name} as in {first.where}, got {this}. Put examples of one form into a "
                        "file, and train on one form at a time."
                    )
                yield _example(row, this)
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from None
        if empty:
            raise InputError(f"{path} has no examples. Leave it out, or give a file with records.")
        finished()


def check_example(row: Row, kind: Kind | None = None) -> RawExample:
    """Checks one record.

    Args:
      row: the record.
      kind: which columns to read where it has those of both; None takes what it has.

    Raises:
      InputError: the record is malformed. The message names the file and the record.
    """
    try:
        return _example(row, _format(row.values, kind))
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None


def _format(values: Mapping[str, Any], kind: Kind | None) -> str:
    """The columns that make up a record: a key of `_FORMATS`."""
    seen = {name for name, value in values.items() if value is not None}
    found = [n for n, (of, columns) in _FORMATS.items() if kind in (None, of) and columns <= seen]
    if "prompt, chosen, rejected" in found:
        found.remove("chosen, rejected")
    shown = ", ".join(sorted(seen)) or "none"
    if not found:
        expected = "; ".join(n for n, (of, _) in _FORMATS.items() if kind in (None, of))
        raise InputError(
            f"found the columns {shown}, expected one of: {expected} (with tools or margin if need be). Rename the "
            "columns, and give each message a role and content; plain documents are for `qwen-jax data build`."
        )
    if len(found) > 1:
        raise InputError(
            f"the columns {shown} can be read as {' or as '.join(found)}. Leave out those that are not meant, or say "
            "which kind of training it is: sft or pairs."
        )
    return found[0]


def _example(row: Row, name: str) -> RawExample:
    kind, columns = _FORMATS[name]
    values = row.values
    tools = _tools(values.get("tools"))
    unread = frozenset(values) - columns - frozenset(_EXTRA[kind])
    if name == "messages":
        return RawExample(row, (_checked(Conversation(_messages(values, "messages"), tools)),), 0.0, unread)
    answers: tuple[Conversation | PlainText, ...]
    texts = {column: isinstance(values[column], str) for column in columns}
    if kind == "pairs" and texts.get("prompt") and not texts["chosen"] and not texts["rejected"]:
        # As in UltraFeedback: the prompt is given again as text, beside whole conversations.
        answers = _with_common_messages(values, tools, values["prompt"])
    elif len(set(texts.values())) > 1:
        forms = ", ".join(f"{column} is {'text' if texts[column] else 'messages'}" for column in sorted(columns))
        raise InputError(f"expected all columns as text or all as messages, got: {forms}. Convert one of them.")
    elif all(texts.values()):
        if tools is not None:
            raise InputError("'tools' stands beside plain text, which has no chat template. Give messages instead.")
        answers = _texts(values, name)
    else:
        answers = _conversations(values, name, tools)
    if kind == "pairs" and answers[0] == answers[1]:
        raise InputError("chosen and rejected are the same, so there is nothing to prefer. Leave the pair out.")
    return RawExample(row, answers, _margin(values.get("margin")) if kind == "pairs" else 0.0, unread)


def _texts(values: Mapping[str, Any], name: str) -> tuple[PlainText, ...]:
    if name == "prompt, completion":
        return (PlainText(values["prompt"], values["completion"]),)
    chosen, rejected = values["chosen"], values["rejected"]
    if name == "prompt, chosen, rejected":
        prompt = values["prompt"]
        begins = [bool(prompt) and text.startswith(prompt) for text in (chosen, rejected)]
        if any(begins):
            if not all(begins):
                raise InputError(
                    f"the prompt stands at the beginning of {'chosen' if begins[0] else 'rejected'} only. Leave it out "
                    "of both."
                )
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return PlainText(prompt, chosen), PlainText(prompt, rejected)
    if chosen == rejected:
        raise InputError("chosen and rejected are the same, so there is nothing to prefer. Leave the pair out.")
    # The prompt is what both begin with, up to the white space before the first word that differs.
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = min(len(chosen), len(rejected)) if same is None else same
    while end and not chosen[end - 1].isspace():
        end -= 1
    end -= end > 0 and chosen[end - 1] == " "  # A tokenizer joins a space to the word after it.
    if not end:
        raise InputError(
            "chosen and rejected have no common beginning that could be the prompt. Give the prompt in its column."
        )
    return PlainText(chosen[:end], chosen[end:]), PlainText(rejected[:end], rejected[end:])


def _conversations(
    values: Mapping[str, Any], name: str, tools: list[dict[str, Any]] | None
) -> tuple[Conversation, ...]:
    if "prompt" not in values or name == "chosen, rejected":
        return _with_common_messages(values, tools, None)
    prompt = _messages(values, "prompt")
    answers = [column for column in ("completion", "chosen", "rejected") if column in name]
    result = []
    for column in answers:
        messages = _messages(values, column)
        if messages[: len(prompt)] == prompt:  # Some data sets repeat the prompt.
            messages = messages[len(prompt) :]
        if not messages or messages[0]["role"] != "assistant":
            what = (
                f"begins with a message of role {messages[0]['role']}"
                if messages
                else "has no message after the prompt"
            )
            raise InputError(
                f"'{column}' {what}, and does not begin with the messages of 'prompt': the prompts differ, or the "
                "answer is missing. Give an assistant's answer to this prompt."
            )
        result.append(_checked(Conversation([*prompt, *messages], tools, len(prompt))))
    return tuple(result)


def _with_common_messages(
    values: Mapping[str, Any], tools: list[dict[str, Any]] | None, prompt: str | None
) -> tuple[Conversation, Conversation]:
    """The answers of a pair whose conversations begin with the same messages: the prompt.

    Args:
      values: of the record.
      tools: of the record.
      prompt: text that the last message of the user in the prompt must have; None for any.
    """
    chosen, rejected = _messages(values, "chosen"), _messages(values, "rejected")
    if chosen == rejected:
        raise InputError("chosen and rejected are the same, so there is nothing to prefer. Leave the pair out.")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        role = messages[first]["role"] if first < len(messages) else None
        if role != "assistant" or not first:
            raise InputError(
                "expected chosen and rejected to differ first in an assistant's answer after the same prompt; they "
                f"differ in message {first}, where '{column}' {f'has one of role {role}' if role else 'has ended'}. "
                "The prompts must be the same."
            )
    if prompt is not None:
        asked = next((m["content"] for m in reversed(chosen[:first]) if m["role"] == "user"), None)
        if asked != prompt:
            raise InputError(
                f"'prompt' is {prompt[:60]!r}, but chosen and rejected answer {(asked or '')[:60]!r}. Correct the "
                "prompt, or leave its column out."
            )
    return _checked(Conversation(chosen, tools, first)), _checked(Conversation(rejected, tools, first))


def _messages(values: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    try:
        check_messages(values[column])
    except InputError as error:
        raise InputError(f"'{column}': {error}") from None
    return [dict(message) for message in values[column]]


def _checked(conversation: Conversation) -> Conversation:
    if all(message["role"] != "assistant" for message in conversation.messages[conversation.first :]):
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise InputError(
            f"expected an assistant's turn, got the roles {roles}. Leave the example out, or add the answer."
        )
    return conversation


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise InputError(f"'tools' is not JSON: {error}. Give a list of function descriptions.") from None
    if value is not None and not isinstance(value, list):
        raise InputError(f"expected 'tools' as a list or its JSON text, got {type(value).__name__}.")
    return value or None


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"expected 'margin' as a finite number, got {value!r:.60}.")
    return float(value)
