"""A JSON object that grows: what of it is certain so far, and where it ends or stops being JSON."""

import json
import re

_SPACES = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
# Halves of a surrogate pair stand together: alone, they are no character.
_ESCAPE = re.compile(
    r'\\(?:["\\/bfnrt]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u(?![dD][89a-fA-F])[0-9a-fA-F]{4})'
)
_PART_OF_ESCAPE = re.compile(r"\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?))?")
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_WHOLE_WORD = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_DEEPEST = 500
# What may follow.
_OBJECT, _VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END, _COLON, _COMMA_OR_END = range(7)


class GrowingObject:
    """Reads a JSON object in pieces, in time that is linear in its length.

    Line breaks and other control characters inside strings, which models write, are escaped.

    Args:
      inside: begin after a member of the object, at the comma before the next one or at its end.

    Attributes:
      state: "open", "complete", or "broken": no continuation makes it an object.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self.state = "open"
        self._stack = ["}"] if inside else []
        self._next = _COMMA_OR_END if inside else _OBJECT
        self._in_string = self._is_key = False
        self._word: list[str] = []  # Of a number or a literal, whose end is to come.
        self._held = ""  # The beginning of an escape.

    def push(self, text: str) -> tuple[str, str]:
        """Takes a piece. Returns what is JSON of it and of what was held, and what is left after the end or a break."""
        text, self._held = self._held + text, ""
        out: list[str] = []
        at = 0
        while at < len(text) and self.state == "open":
            at = self._string(text, at, out) if self._in_string else self._other(text, at, out)
        rest = text[at:]
        if self.state == "broken":
            rest, self._word = "".join(self._word) + rest, []
        return "".join(out), rest

    def finish(self) -> str:
        """What was held when the text ended."""
        return "".join(self._word) + self._held

    def _string(self, text: str, at: int, out: list[str]) -> int:
        """Reads on in a string; returns the next place."""
        if match := _PLAIN.match(text, at) or _ESCAPE.match(text, at):
            out.append(match[0])
            return match.end()
        if text[at] == '"':
            self._in_string, self._next = False, _COLON if self._is_key else _COMMA_OR_END
            out.append('"')
        elif text[at] != "\\":
            out.append(json.dumps(text[at])[1:-1])
        elif _PART_OF_ESCAPE.fullmatch(text, at):
            self._held = text[at:]
            return len(text)
        else:
            self.state = "broken"
            return at
        return at + 1

    def _other(self, text: str, at: int, out: list[str]) -> int:
        """Reads on outside of a string; returns the next place."""
        if match := _WORD.match(text, at):
            if self._next not in (_VALUE, _VALUE_OR_END):
                self.state = "broken"
                return at
            self._word.append(match[0])
            return match.end()
        if self._word:
            if not _WHOLE_WORD.fullmatch("".join(self._word)):
                self.state = "broken"
                return at
            out.append("".join(self._word))
            self._word, self._next = [], _COMMA_OR_END
        if match := _SPACES.match(text, at):
            out.append(match[0])
            return match.end()
        if not self._mark(text[at]):
            self.state = "broken"
            return at
        out.append(text[at])
        return at + 1

    def _mark(self, mark: str) -> bool:
        """Takes a mark; returns whether it may stand here."""
        following = self._next
        if mark == '"' and following in (_VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END):
            self._in_string, self._is_key = True, following in (_KEY, _KEY_OR_END)
        elif mark == ":" and following == _COLON:
            self._next = _VALUE
        elif mark == "," and following == _COMMA_OR_END:
            self._next = _KEY if self._stack[-1] == "}" else _VALUE
        elif mark == "{" and following in (_OBJECT, _VALUE, _VALUE_OR_END) and len(self._stack) < _DEEPEST:
            self._stack.append("}")
            self._next = _KEY_OR_END
        elif mark == "[" and following in (_VALUE, _VALUE_OR_END) and len(self._stack) < _DEEPEST:
            self._stack.append("]")
            self._next = _VALUE_OR_END
        elif self._stack and mark == self._stack[-1] and following in (_KEY_OR_END, _VALUE_OR_END, _COMMA_OR_END):
            self._stack.pop()
            self._next = _COMMA_OR_END
            if not self._stack:
                self.state = "complete"
        else:
            return False
        return True
