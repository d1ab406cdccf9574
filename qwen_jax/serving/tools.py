"""Tool calls in Hermes format, read from a text as it is generated.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

A call ends where its JSON ends, not at the next closing tag: a tag in a JSON string belongs to the string. A call is
given out when its JSON is complete, so nobody sees the beginning of one that turns out to be broken. What cannot be
read stays text. `qwen_jax.tokenizer.parse_tool_calls` reads whole texts in the same way, but for two liberties that are
taken here because models do: line breaks inside strings, and an end of the text in place of the last closing tag.
"""

import dataclasses
import json
import re
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"
# The template writes a newline before each call. It belongs to the call.
_START = "\n" + OPENING
_SPACE = " \t\r\n"
# What matters to where a JSON object ends.
_MARKS = re.compile(r'["\\{}\[\]]')
# An incomplete text fails at its end, or as far before it as the longest literal ("-Infinity") or escape is long.
_LONGEST_LITERAL = 12
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("[^"\\\x00-\x1f]+")\s*,\s*"arguments"\s*:\s*(?=\{)')
# Line breaks and tabs may stand in strings.
_DECODER = json.JSONDecoder(strict=False)


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call.

    Attributes:
      name: of the function.
      arguments: JSON text, as the model wrote it; cut off if `complete` is false.
      complete: whether the JSON is whole.
    """

    name: str
    arguments: str
    complete: bool = True


Part = str | Call
"""Text of the answer, or a call in it."""


class ToolParser:
    """Splits a growing text into plain text and tool calls.

    The parts do not depend on how the text is cut into pieces, except that a text may come in several pieces.
    """

    def __init__(self) -> None:
        self._held = ""  # Text that is not given out yet. Inside a call it begins with the opening tag.
        self._scan: _Scan | None = None  # Inside a call.
        self._call: Call | None = None  # Its JSON is complete, and its closing tag is to come.
        self._tag_and_json = ""  # The text of that call.

    def push(self, text: str) -> list[Part]:
        """Returns the parts that the text makes certain."""
        self._held += text
        return self._read(final=False)

    def finish(self, *, truncated: bool = False) -> list[Part]:
        """Returns the parts that are left.

        Args:
          truncated: the text was cut off by its length, so an incomplete call is given out as far as it goes.
        """
        return self._read(final=True, truncated=truncated)

    def _read(self, *, final: bool, truncated: bool = False) -> list[Part]:
        parts: list[Part] = []
        while True:
            if self._call is not None:
                done = self._read_closing(parts, final)
            elif self._scan is not None:
                done = self._read_call(parts, final, truncated)
            else:
                done = self._read_text(parts, final)
            if done:
                return _joined(parts)

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        """Outside of a call. Returns whether there is nothing more to do for now."""
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
        self._scan = _Scan(at - before + len(OPENING))
        return False

    def _read_call(self, parts: list[Part], final: bool, truncated: bool) -> bool:
        """After an opening tag. Returns whether there is nothing more to do for now."""
        scan = self._scan
        assert scan is not None
        state = scan.read(self._held, final)
        if state == "incomplete" and not final:
            return True
        if state == "complete":
            call = _call_of(self._held[scan.start : scan.end])
            if call is not None:
                self._call = call
                self._held, self._tag_and_json = self._held[scan.end :], self._held[: scan.end]
                return False
        elif state == "incomplete" and truncated and (head := _HEAD.match(self._held, scan.start)):
            parts.append(Call(json.loads(head[1]), self._held[head.end() :], complete=False))
            self._held, self._scan = "", None
            return True
        # Not a call: the tag is text, and what follows is read anew.
        parts.append(self._held[: scan.start])
        self._held, self._scan = self._held[scan.start :], None
        return False

    def _read_closing(self, parts: list[Part], final: bool) -> bool:
        """After a call's JSON. Returns whether there is nothing more to do for now."""
        assert self._call is not None
        assert self._scan is not None
        rest = self._held.lstrip(_SPACE)
        if rest.startswith(CLOSING):
            parts.append(self._call)
            self._held, self._scan, self._call = rest[len(CLOSING) :], None, None
            return False
        if CLOSING.startswith(rest):
            if not final:
                return True
            # The end-of-text token, or the limit of tokens, came in place of the tag.
            parts.append(self._call)
            self._held, self._scan, self._call = "", None, None
            return True
        # Something else follows the JSON: as above.
        text, start = self._tag_and_json + self._held, self._scan.start
        parts.append(text[:start])
        self._held, self._scan, self._call = text[start:], None, None
        return False


class _Scan:
    """Finds the end of a JSON object in a growing text, in time that is linear in its length.

    Args:
      start: after the opening tag.
    """

    def __init__(self, start: int) -> None:
        self.start = self.end = self._at = start
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
    """The parts with neighbouring texts joined, and without empty ones."""
    result: list[Part] = []
    for part in parts:
        if isinstance(part, str) and result and isinstance(result[-1], str):
            result[-1] += part
        elif part:
            result.append(part)
    return result


def parse(text: str, *, truncated: bool = False) -> tuple[str, list[Call]]:
    """The plain text and the calls of a whole text.

    Args:
      truncated: as for `ToolParser.finish`.
    """
    parser = ToolParser()
    parts = parser.push(text) + parser.finish(truncated=truncated)
    return "".join(part for part in parts if isinstance(part, str)), [part for part in parts if isinstance(part, Call)]
