"""Tool calls in Hermes format, read from a text as it is generated.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

A call ends where its JSON ends, not at the next closing tag: a tag in a JSON string belongs to the string. A call whose
name comes first, as the template asks, is given out as it is written: its name, then pieces of its arguments. If its
JSON breaks after that, the pieces go on as the model wrote them, up to the closing tag. A call in another order is
given out when it is whole, and what is no call stays text. `qwen_jax.tokenizer.parse_tool_calls` reads whole texts and
is stricter: there, a broken call is text, line breaks may not stand in strings, and the last closing tag is needed.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

from qwen_jax.serving.growing_json import GrowingObject

OPENING, CLOSING = "<tool_call>", "</tool_call>"
# The template writes a newline before each call. It belongs to the call.
_START = "\n" + OPENING
_SPACE = " \t\r\n"
# What matters to where a JSON object ends.
_MARKS = re.compile(r'["\\{}\[\]]')
# An incomplete text fails at its end, or as far before it as the longest literal ("-Infinity") or escape is long.
_LONGEST_LITERAL = 12
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("[^"\\\x00-\x1f]+")\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST_HEAD = 2048
# Line breaks and tabs may stand in strings.
_DECODER = json.JSONDecoder(strict=False)


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call.

    Attributes:
      name: of the function.
      arguments: JSON text; cut off or broken if `complete` is false.
      complete: whether the JSON is whole.
    """

    name: str
    arguments: str
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class CallStart:
    """The beginning of a call."""

    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """A piece of the arguments of the call that began last."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallEnd:
    """The end of that call; `complete` as in `Call`."""

    complete: bool


Part = str | CallStart | CallArguments | CallEnd
"""Text of the answer, or a part of a call in it."""


class ToolParser:
    """Splits a growing text into plain text and parts of tool calls.

    What the parts join to does not depend on how the text is cut into pieces.
    """

    def __init__(self) -> None:
        self._held = ""  # Text that is not given out yet.
        # Where the text is: "text", "call" (after an opening tag, which `_held` begins with), "arguments", "broken"
        # arguments, "members" after them, "end" of a call, or "whole" after the JSON of a call in another order.
        self._place = "text"
        self._scan = _Scan(0)  # In "call".
        self._value = GrowingObject()  # In "arguments" and "members".
        self._call: tuple[Call, str] | None = None  # In "whole": the call, and its text with the tag.

    def push(self, text: str) -> list[Part]:
        """Returns the parts that the text makes certain."""
        self._held += text
        return self._read(final=False)

    def finish(self) -> list[Part]:
        """Ends the text, and returns the parts that were held back until its end."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        steps = {
            "text": self._read_text,
            "call": self._read_call,
            "arguments": self._read_arguments,
            "broken": self._read_broken,
            "members": self._read_members,
            "end": self._read_end,
            "whole": self._read_whole,
        }
        while not steps[self._place](parts, final):
            pass
        return _joined(parts)

    # Each step reads on at its place, and returns whether there is nothing more to do for now.

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        at = self._held.find(OPENING)
        if at < 0:
            # An end that may become an opening tag is held back.
            ready = len(self._held) if final else len(self._held) - _overlap(self._held, _START, OPENING)
            parts.append(self._held[:ready])
            self._held = self._held[ready:]
            return True
        # The newline before the tag is kept until it is known that a call follows.
        before = at - 1 if at and self._held[at - 1] == "\n" else at
        parts.append(self._held[:before])
        self._held = self._held[before:]
        self._place, self._scan = "call", _Scan(at - before + len(OPENING))
        return False

    def _read_call(self, parts: list[Part], final: bool) -> bool:
        scan = self._scan
        if scan.may_have_head:
            end = scan.start + _LONGEST_HEAD
            if head := _HEAD.match(self._held, scan.start, end):
                parts.append(CallStart(json.loads(head[1])))
                self._held, self._place, self._value = self._held[head.end() :], "arguments", GrowingObject()
                return False
            scan.may_have_head = len(self._held) < end
        state = scan.read(self._held, final)
        if state == "incomplete" and not final:
            return True
        if state == "complete":
            call = _call_of(self._held[scan.start : scan.end])
            if call is not None:
                self._call, self._place = (call, self._held[: scan.end]), "whole"
                self._held = self._held[scan.end :]
                return False
        # Not a call: the tag is text, and what follows is read anew.
        self._leave_as_text(parts, self._held)
        return False

    def _leave_as_text(self, parts: list[Part], text: str) -> None:
        parts.append(text[: self._scan.start])
        self._held, self._place = text[self._scan.start :], "text"

    def _read_arguments(self, parts: list[Part], final: bool) -> bool:
        value = self._value
        found, self._held = value.push(self._held)
        parts.append(CallArguments(found))
        if value.state == "complete":
            parts.append(CallEnd(complete=True))
            self._place, self._value = "members", GrowingObject(inside=True)
            return False
        if value.state == "broken":
            self._place = "broken"
            return False
        if final:
            parts += [CallArguments(value.finish()), CallEnd(complete=False)]
            self._place = "text"
        return True

    def _read_broken(self, parts: list[Part], final: bool) -> bool:
        at = self._held.find(CLOSING)
        # The newline before the closing tag, as in a whole call, is none of the arguments.
        ready = at if at >= 0 else len(self._held) - (0 if final else _overlap(self._held, "\n" + CLOSING, CLOSING))
        parts.append(CallArguments(self._held[:ready].removesuffix("\n") if at >= 0 else self._held[:ready]))
        self._held = self._held[ready:]
        if at < 0 and not final:
            return True
        parts.append(CallEnd(complete=False))
        self._place = "end"
        return False

    def _read_members(self, parts: list[Part], final: bool) -> bool:
        """Reads over members after the arguments. Where the object breaks, its end is left out."""
        _, self._held = self._value.push(self._held)
        if self._value.state == "open" and not final:
            return True
        self._place = "end"
        return False

    def _read_end(self, parts: list[Part], final: bool) -> bool:
        rest = self._held.lstrip(_SPACE)
        if CLOSING.startswith(rest):
            if final or rest == CLOSING:
                # At the end, the end-of-text token or the limit of tokens came in place of the tag.
                self._held, self._place = "", "text"
            return True
        if rest.startswith(CLOSING):
            self._held = rest[len(CLOSING) :]
        self._place = "text"
        return False

    def _read_whole(self, parts: list[Part], final: bool) -> bool:
        assert self._call is not None
        call, text = self._call
        rest = self._held.lstrip(_SPACE)
        if not rest.startswith(CLOSING) and not (final and CLOSING.startswith(rest)):
            if CLOSING.startswith(rest):
                return True
            # Something else follows the JSON: it is no call.
            self._leave_as_text(parts, text + self._held)
            return False
        parts += [CallStart(call.name), CallArguments(call.arguments), CallEnd(complete=True)]
        self._place = "end"
        return False


class _Scan:
    """Finds the end of a JSON object in a growing text, in time that is linear in its length.

    Args:
      start: after the opening tag.

    Attributes:
      start, end: of the object; `end` once it is complete.
      may_have_head: whether the text so far may become the head of a call.
    """

    def __init__(self, start: int) -> None:
        self.start = self.end = self._at = start
        self.may_have_head = True
        self._depth = 0
        self._in_string = False
        # The text is checked for errors at its end, and each time that it has doubled.
        self._next_check = 2 * start + 64

    def read(self, text: str, final: bool) -> str:
        """Reads what is new. Returns "complete" (up to `end`), "incomplete", or "broken"."""
        if self._depth == 0:
            while self._at < len(text) and text[self._at] in _SPACE:
                self._at += 1
            if self._at == len(text):
                return "incomplete"
            if text[self._at] != "{":
                return "broken"
        while match := _MARKS.search(text, self._at):
            mark, self._at = match[0], match.end()
            if self._in_string:
                if mark == "\\":
                    if self._at == len(text):
                        # The escaped character is to come.
                        self._at -= 1
                        break
                    self._at += 1
                elif mark == '"':
                    self._in_string = False
            elif mark == '"':
                self._in_string = True
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.end = self._at
                    return "complete"
        else:
            self._at = len(text)
        if final or len(text) >= self._next_check:
            self._next_check = 2 * len(text)
            return "broken" if _is_broken(text[self.start :]) else "incomplete"
        return "incomplete"


def _is_broken(text: str) -> bool:
    """Whether no continuation makes the beginning of a text a JSON value."""
    text = text.strip(_SPACE)
    try:
        _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_LITERAL
        return not unfinished
    except RecursionError:
        return True
    return False


def _call_of(text: str) -> Call | None:
    """The call that a JSON text describes, or None."""
    try:
        value: Any = _DECODER.raw_decode(text.strip(_SPACE))[0]
        if not isinstance(value.get("name"), str) or not value["name"] or not isinstance(value.get("arguments"), dict):
            return None
        # Neither NaN and infinity, which JSON lacks, nor lone surrogates, which UTF-8 lacks.
        arguments = json.dumps(value["arguments"], ensure_ascii=False, allow_nan=False)
        (value["name"] + arguments).encode()
    except (ValueError, RecursionError):
        return None
    return Call(value["name"], arguments)


def _overlap(text: str, *tags: str) -> int:
    """Length of the longest end of a text that is the beginning of one of the tags."""
    longest = max(map(len, tags))
    for size in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0


def _joined(parts: list[Part]) -> list[Part]:
    """The parts with neighbouring pieces joined, and without empty ones."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, str) and isinstance(last, str):
            result[-1] = last + part
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.text + part.text)
        elif part not in ("", CallArguments("")):
            result.append(part)
    return result


def collect(parts: Iterable[Part]) -> tuple[str, list[Call]]:
    """The plain text and the calls that parts join to. A call whose end is missing is incomplete."""
    content, calls = "", list[Call]()
    for part in parts:
        if isinstance(part, str):
            content += part
        elif isinstance(part, CallStart):
            calls.append(Call(part.name, "", complete=False))
        elif isinstance(part, CallArguments):
            calls[-1] = dataclasses.replace(calls[-1], arguments=calls[-1].arguments + part.text)
        else:
            calls[-1] = dataclasses.replace(calls[-1], complete=part.complete)
    return content, calls


def parse(text: str) -> tuple[str, list[Call]]:
    """The plain text and the calls of a whole text."""
    parser = ToolParser()
    return collect(parser.push(text) + parser.finish())
