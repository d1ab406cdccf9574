"""Training examples: a conversation as token ids, and which of them an assistant wrote.

Trained is what a model has to write itself: the text of an assistant's turn with its tool calls, and the control token
that ends the turn. The mask comes from spans of the rendered text, never from token ids.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.base import Tokenizer
from qwen_jax.tokenizer.chat import ChatTemplate, parse_tool_arguments
from qwen_jax.tokenizer.text import unused_characters, valid_text

Turns = Literal["all", "last"]
Span = tuple[int, int]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TOOL_CALL = re.compile(r"</?tool_call>")


class TrainedIds(NamedTuple):
    """Token ids, and which of them are trained.

    Args:
        ids: token ids.
        trained: for each id, whether it is a target.
    """

    ids: list[int]
    trained: list[bool]


class Part(NamedTuple):
    """A stretch of an example that is trained or not as a whole, and is encoded by itself.

    Args:
        text: its text.
        trained: whether it is trained.
        literal: indices of characters that belong to no control token.
        before: ids before the text.
        after: ids after the text.
    """

    text: str
    trained: bool
    literal: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def render_example(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    trained: Turns = "all",
    newline: bool = False,
    first: int = 0,
    parse_special: bool = False,
    open_calls: bool = False,
) -> TrainedIds:
    """Turn a conversation into token ids and the mask of those that are trained.

    Trained is the content of an assistant's turn with its tool calls, and the control token that ends the turn, such as
    `<|im_end|>`.

    The trained stretches and those between them are encoded each by itself, so that the trained tokens spell exactly
    the trained text, and the prompt of a trained turn ends at a token boundary, as it does when the model answers. The
    ids before the first trained turn are those of `Tokenizer.encode_chat`, unless control tokens are typed there. Where
    a content begins with line ends, encoding the whole text at once would merge them with the line end of
    `<|im_start|>assistant`; elsewhere both give the same ids.

    Where the template marks assistant text by `{% generation %}`, that is trained; a control token that ends it must be
    marked too. With any other template, the turn begins where the prompt made of the messages before it ends, and ends
    with the last control token of its message.

    Args:
        tokenizer: with a chat template.
        messages, tools: as for `ChatTemplate.render`, but tool calls' arguments in JSON text are read as objects.
        trained: all turns of the assistant, or the last one.
        newline: also train a line end that follows the control token.
        first: turns before the message of this index are not trained.
        parse_special: read control tokens that are typed into messages or tools as such; by default they are text.
        open_calls: allow a `<tool_call>` in a content that is not closed, such as a policy may write.

    Raises:
        InputError: malformed messages or tools, no assistant's turn to train, a `<tool_call>` in an assistant's content
            that is not closed, or a template that does not tell what the assistant wrote or marks it without its end.
    """
    parts = chat_parts(
        tokenizer,
        messages,
        tools,
        trained=trained,
        newline=newline,
        first=first,
        parse_special=parse_special,
        open_calls=open_calls,
    )
    return encode_parts(tokenizer, [parts])[0]


def chat_parts(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    trained: Turns = "all",
    newline: bool = False,
    first: int = 0,
    parse_special: bool = False,
    open_calls: bool = False,
) -> list[Part]:
    """Return the text of `render_example` in parts, before they are encoded. Arguments and errors are the same."""
    if trained not in ("all", "last"):
        raise InputError(f"trained must be 'all' or 'last', got {trained!r}.")
    messages = parse_tool_arguments(messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    if not turns:
        raise InputError(
            f"expected an assistant's turn to train{f' from message {first} on' if first else ''}, got the roles "
            f"{', '.join(message['role'] for message in messages)}. Leave the example out, or add the answer."
        )
    for i in turns if not open_calls else ():
        _check_tool_calls_closed(messages[i].get("content") or "", i)
    # Hide control tokens that are typed into messages and tools: replace their first characters.
    template, source = tokenizer.chat_template, tokenizer.chat_template.source(tools)
    marked = _GENERATION_TAG.search(source) is not None
    hidden = _Hidden(
        tokenizer, [] if parse_special else [messages, tools], [messages, tools, source], count=2 if marked else 0
    )
    conversation = _Conversation(template, hidden.hide(messages), hidden.hide(tools))
    # Find what is trained.
    if marked:
        opening, closing = hidden.marks
        text, spans = conversation.generated((opening, closing))
        _check_ends_marked(text, spans, _turn_ends(tokenizer))
        if first or trained == "last":
            spans = _of_turns(spans, messages, turns, trained)
    else:
        if not _tells_roles(source, tuple(template.special_tokens.items())):
            raise InputError(
                "the chat template renders an assistant's message like a user's, so a model cannot tell who speaks. "
                "Use a template that marks assistant's turns, such as that of Qwen2.5 (<|im_start|>assistant)."
            )
        text = conversation.render(len(messages), False)
        ends = _turn_ends(tokenizer)
        spans = [conversation.span(i, text, ends) for i in (turns if trained == "all" else turns[-1:])]
    if newline:
        spans = [(a, b + (text[b : b + 1] == "\n" and text[b - 1 : b] != "\n")) for a, b in spans]
    # Cut the text there, and put the hidden characters back.
    if hidden.table and hidden.show(text) != template.render(messages, tools, add_generation_prompt=False):
        raise InputError(
            "the chat template reads or rewrites control tokens that are typed into a message, so they cannot be kept "
            "as plain text. Remove them from the messages, or read them as control tokens (parse_special)."
        )
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = [(text[a:b], n % 2 == 1) for n, (a, b) in enumerate(itertools.pairwise(edges))]
    return [Part(hidden.show(piece), is_trained, hidden.places(piece)) for piece, is_trained in pieces if piece]


def text_parts(tokenizer: Tokenizer, prompt: str, completion: str, *, parse_special: bool = False) -> list[Part]:
    """Return the parts of a plain prompt and its completion, without a chat template.

    The prompt is encoded by itself, and the completion is trained and ends with `eos_id`, which is trained too.

    Args:
        tokenizer: of the model.
        prompt: may be empty.
        completion: text to train.
        parse_special: read control tokens in both as such. A completion that ends with eos gets no other one.

    Raises:
        InputError: not valid Unicode.
    """
    prompt, completion = valid_text(prompt), valid_text(completion)
    places: tuple[tuple[int, ...], ...] = ((), ())
    if not parse_special:
        pattern = _control_pattern(tokenizer)
        places = tuple(tuple(m.start() for m in pattern.finditer(text)) for text in (prompt, completion))
    ended = parse_special and tokenizer.encode(completion, add_special_tokens=False)[-1:] == [tokenizer.eos_id]
    return [
        Part(prompt, False, places[0], before=tokenizer.prefix),
        Part(completion, True, places[1], after=() if ended else (tokenizer.eos_id,)),
    ]


def encode_parts(tokenizer: Tokenizer, examples: Sequence[Sequence[Part]]) -> list[TrainedIds]:
    """Encode the parts of many examples; parts without literal characters are encoded together, on all cores.

    Args:
        tokenizer: of the model.
        examples: parts of each.
    """
    plain = [part.text for parts in examples for part in parts if not part.literal]
    encoded = iter(tokenizer.encode_batch(plain, add_special_tokens=False))
    control = frozenset(tokenizer.control_ids.values())
    result = []
    for parts in examples:
        ids: list[int] = []
        mask: list[bool] = []
        last = ""
        for part in parts:
            inner = (
                tokenizer.encode(part.text, add_special_tokens=False, literal=part.literal)
                if part.literal
                else next(encoded)
            )
            if tokenizer.adds_space and last and ids[-1] not in control:
                inner = _continuation(tokenizer, last, part)
            ids += [*part.before, *inner, *part.after]
            mask += [part.trained] * (len(ids) - len(mask))
            last = part.text[-1:] or last
        result.append(TrainedIds(ids, mask))
    return result


def _continuation(tokenizer: Tokenizer, last: str, part: Part) -> list[int]:
    """Encode a part that follows a character, where the tokenizer would add a space to a text of its own."""
    before = tokenizer.encode(last, add_special_tokens=False)
    both = tokenizer.encode(last + part.text, add_special_tokens=False, literal=[i + 1 for i in part.literal])
    if both[: len(before)] != before:
        raise InputError(
            f"the tokenizer joins {last!r} and the trained text {part.text[:20]!r} after it to one token. End the "
            "prompt with a line end or a control token."
        )
    return both[len(before) :]


class _Hidden:
    """Replaces the first characters of control tokens in texts by characters that occur nowhere else.

    Args:
        tokenizer: its control tokens are replaced.
        values: JSON values in which they are looked for.
        others: JSON values in which the new characters must not occur.
        count: number of further characters that occur nowhere else, in `marks`.
    """

    def __init__(self, tokenizer: Tokenizer, values: Sequence[Any], others: Sequence[Any], count: int) -> None:
        self._pattern = _control_pattern(tokenizer)
        first = sorted({m.group() for text in _texts(values) for m in self._pattern.finditer(text)})
        needed = count + len(first)
        characters = unused_characters(needed, "".join(_texts(others))) if needed else []
        self.marks, fresh = characters[:count], characters[count:]
        self.table = dict(zip(first, fresh, strict=True))
        self._back = str.maketrans({new: old for old, new in self.table.items()})
        self._fresh = frozenset(fresh)

    def hide(self, value: Any, key: str = "") -> Any:
        """Return a JSON value with control tokens hidden in its texts; roles are no texts."""
        if not self.table or key == "role":
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self.table[match.group()], value)
        if isinstance(value, Mapping):
            return {self.hide(name): self.hide(item, name) for name, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    def show(self, text: str) -> str:
        """Return a text with the hidden characters put back."""
        return text.translate(self._back) if self.table else text

    def places(self, text: str) -> tuple[int, ...]:
        """Return the indices of the hidden characters."""
        return tuple(i for i, c in enumerate(text) if c in self._fresh) if self.table else ()


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


@functools.lru_cache(maxsize=16)
def _control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches the first character of each control token in a text, overlapping ones too.

    Tokens of white space are left out: some vocabularies have them as added tokens, and they control nothing.
    """
    rests: dict[str, list[str]] = {}
    for text in sorted(tokenizer.control_ids):
        if text.strip():
            rests.setdefault(text[0], []).append(re.escape(text[1:]))
    branches = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
    return re.compile("|".join(branches) or "(?!)")


@functools.lru_cache(maxsize=16)
def _turn_ends(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts of the control tokens that may end a turn: special ones and eos."""
    ids = tokenizer.special_ids | {tokenizer.eos_id}
    return tuple(text for text, i in tokenizer.control_ids.items() if i in ids)


@functools.lru_cache(maxsize=16)
def _tells_roles(source: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template renders a message of the assistant differently from one of the user."""
    template = ChatTemplate(source, dict(special_tokens))
    user = {"role": "user", "content": "a"}
    try:
        texts = {
            template.render([user, {"role": role, "content": "b"}], add_generation_prompt=False)
            for role in ("user", "assistant")
        }
    except InputError:  # It refuses one of them.
        return True
    return len(texts) == 2


def _check_tool_calls_closed(content: str, index: int) -> None:
    """Raise InputError unless each `<tool_call>` in a content is followed by its `</tool_call>`."""
    tags = [match.group() for match in _TOOL_CALL.finditer(content)]
    expected = ["<tool_call>", "</tool_call>"] * (len(tags) // 2)
    if tags != expected:
        raise InputError(
            f"message {index} (assistant): the content has a <tool_call> without its </tool_call>, or the reverse. "
            "Correct it, or give the calls as 'tool_calls'."
        )


def _check_ends_marked(text: str, spans: Sequence[Span], ends: tuple[str, ...]) -> None:
    """Raise InputError where the template marks an assistant's text without the control token that ends it."""
    for start, end in spans:
        rest = text[end:].lstrip()
        left = max((token for token in ends if rest.startswith(token)), key=len, default=None)
        marked = any(a <= len(text) - len(rest) < b for a, b in spans) or text[start:end].rstrip().endswith(ends)
        if left is not None and not marked:
            raise InputError(
                f"the chat template marks {text[start:end][-20:]!r} by {{% generation %}} without the {left} after it, "
                f"so a model would not learn to stop. Put {{% endgeneration %}} after {left}."
            )


def _of_turns(
    spans: Sequence[Span], messages: Sequence[Mapping[str, Any]], turns: Sequence[int], trained: Turns
) -> list[Span]:
    """Return the marked spans of the turns that are to be trained."""
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(assistants):
        raise InputError(
            f"the chat template marks {len(spans)} texts by generation blocks in a conversation with "
            f"{len(assistants)} assistant's turns, so which one belongs to which turn is open. Correct the template."
        )
    chosen = turns if trained == "all" else turns[-1:]
    return [span for span, i in zip(spans, assistants, strict=True) if i in chosen]


class _Conversation(NamedTuple):
    """A conversation whose prefixes are rendered.

    Args:
        template: renders it.
        messages: all messages.
        tools: its tools.
    """

    template: ChatTemplate
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None

    def render(self, count: int, prompt: bool) -> str:
        """Render the first `count` messages, with or without the opening of an assistant's turn."""
        return self.template.render(self.messages[:count], self.tools, add_generation_prompt=prompt)

    def generated(self, marks: tuple[str, str]) -> tuple[str, list[Span]]:
        """Return the text and the spans that the template marks by `{% generation %}`.

        Raises:
            InputError: the blocks are nested.
        """
        marked = self.template.render_marked(self.messages, self.tools, marks, add_generation_prompt=False)
        kept: list[str] = []
        edges: list[int] = []
        length = 0
        for piece in re.split(f"([{marks[0]}{marks[1]}])", marked):
            if piece in marks and piece:
                if piece != marks[len(edges) % 2]:
                    raise InputError("the chat template has generation blocks inside each other. Correct it.")
                edges.append(length)
            else:
                kept.append(piece)
                length += len(piece)
        return "".join(kept), list(zip(edges[::2], edges[1::2], strict=True))

    def span(self, index: int, text: str, ends: tuple[str, ...]) -> Span:
        """Return the span of an assistant's turn in the whole text, from renderings of prefixes.

        Args:
            index: of the assistant's message.
            text: the whole conversation, rendered.
            ends: texts of control tokens that may end a turn.

        Raises:
            InputError: the span is ambiguous, or no control token ends the turn.
        """
        whole = text if index + 1 == len(self.messages) else self.render(index + 1, False)
        start = self._start(index, whole)
        if start is None or not text.startswith(whole):
            raise InputError(
                f"message {index} (assistant): what the model writes is ambiguous, because the chat template renders "
                "the messages before it differently once it, or a later message, follows. Mark the assistant's text in "
                "the template by {% generation %}, or train only the last turn."
            )
        # White space at the end is the template's own: that of the content is before the control token.
        end = len(whole.rstrip())
        closing = max((len(e) for e in ends if whole.endswith(e, start, end)), default=0)
        if not closing:
            raise InputError(
                f"message {index} (assistant): the chat template does not end the turn with a control token, so a "
                f"model would not learn to stop: it ends with {whole[max(start, end - 20) : end]!r}. Use a template "
                "whose turns end with one, such as <|im_end|>."
            )
        return start, end

    def _start(self, index: int, whole: str) -> int | None:
        """Return where a turn begins in the rendering of the conversation up to it; None if that is ambiguous."""
        if index:
            prompt = self.render(index, True)
            return len(prompt) if whole.startswith(prompt) else None
        # No message is before it: look for the opening of a turn.
        opened = self.render(1, True)
        opening = opened.removeprefix(whole)
        if opening in (opened, "") or whole.count(opening) != 1:
            return None
        return whole.index(opening) + len(opening)
