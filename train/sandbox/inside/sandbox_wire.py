"""Calls between two processes that do not trust each other: plain values are copied, objects stay where they are.

Both sides speak the same protocol, one JSON array a line: a request and, after any requests in the other direction
(calls of functions that were passed), its reply. What arrives is built only from the types listed in `decode`; an
object of the other side becomes a `Remote`, whose operators ask the other side. Nothing is unpickled or evaluated.
"""

from __future__ import annotations

import builtins
import operator
import sys
import types

# What mypy takes for true. `typing` takes longer to import than all of this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

try:
    # The parts of `json` that are written in C. All of `json` takes longer to import than Python to start.
    from _json import encode_basestring_ascii, make_encoder, make_scanner
except ImportError:  # Not CPython.
    from json import dumps, loads
else:

    class _Settings:
        """Those of `json.JSONDecoder()`."""

        strict, parse_int, parse_float, parse_constant = True, int, float, float

        def __getattr__(self, name: str) -> None:
            """No hooks."""

    _chunks = make_encoder(None, None, encode_basestring_ascii, None, ": ", ", ", False, False, True)  # type: ignore
    _scan = make_scanner(_Settings())  # type: ignore

    def dumps(message: Any) -> str:  # type: ignore[misc]
        return "".join(_chunks(message, 0))

    def loads(line: bytes) -> Any:  # type: ignore[misc]
        text = line.decode()
        try:
            message, end = _scan(text, 0)
        # The second one where `json`, which defines the error, is not imported.
        except (StopIteration, SystemError):
            raise ValueError("no value") from None
        if text[end:] != "\n":
            raise ValueError("more than one value")
        return message


MAX_LINE = 16 << 20


# Not Exceptions: a test that expects any error of the program must not take these for one.
class Broken(BaseException):
    """The other side has ended, or what it sent cannot be read."""


class CannotSend(BaseException):
    """A value of this side has no form in which the other side could get it."""


_ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift neg pos invert abs".split()

# What can be asked of an object.
OPERATIONS = {
    "call": lambda value, *args, **kwargs: value(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "iter": iter,
    "next": next,
    "reversed": reversed,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "isinstance": lambda value, other: isinstance(other, value),
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "enter": lambda value: value.__enter__(),
    "exit": lambda value: value.__exit__(None, None, None),
    **{name: getattr(operator, name) for name in _ARITHMETIC},
}


class Remote:
    """An object of the other side."""

    def __init__(self, peer: Peer, number: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def _ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        peer = object.__getattribute__(self, "_peer")
        return peer.ask(operation, self, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Python's own questions about an object (copying, pickling) are about the Remote, not about what it stands for.
        if name.startswith("__") and name not in ("__name__", "__doc__", "__len__"):
            raise AttributeError(name)
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._ask("delattr", name)

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __reversed__(self) -> Any:
        return self._ask("reversed")

    def __hash__(self) -> int:
        return int(object.__getattribute__(self, "_number"))

    # Comparing is left to the other side only between two of its own objects, and arithmetic with a number of this side
    # gives an object of that one: a program could otherwise return an object that equals everything, or whose distance
    # to everything is zero.
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Remote) and self._ask("eq", other) is True)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _compare(self, operation: str, other: object) -> bool:
        return self._ask(operation, other) is True if isinstance(other, Remote) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._compare("lt", other)

    def __le__(self, other: object) -> bool:
        return self._compare("le", other)

    def __gt__(self, other: object) -> bool:
        return self._compare("gt", other)

    def __ge__(self, other: object) -> bool:
        return self._compare("ge", other)

    def _arithmetic(self, operation: str, *others: Any) -> Any:
        result = self._ask(operation, *others)
        if isinstance(result, Remote) or (others and all(isinstance(other, Remote) for other in others)):
            return result
        raise TypeError(f"{operation} of an object of the program must be such an object")

    def __contains__(self, item: object) -> bool:
        return any(item == other for other in self)

    def __exit__(self, *_: object) -> Any:
        return self._ask("exit")


def _delegate(name: str, method: str) -> None:
    setattr(Remote, method, lambda self, *args: self._ask(name, *args))


for _name in "getitem setitem delitem next len bool str repr int float enter".split():
    _delegate(_name, f"__{_name}__")
_delegate("isinstance", "__instancecheck__")
for _name in _ARITHMETIC:
    setattr(Remote, f"__{_name.rstrip('_')}__", lambda self, *others, name=_name: self._arithmetic(name, *others))


def _is(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class whose module is imported only if somebody uses it."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


_CONTAINERS = (list, dict, set, bytearray)
_PLAIN = (int, float, complex, bool, str, bytes, list, tuple, dict, set, frozenset, bytearray)
_HARMLESS = "abs all any ascii bin chr divmod hex len max min oct ord pow print repr round sorted sum".split()


def _harmless(value: Any) -> bool:
    """Whether the other side may call a function, with any arguments: of `eval`, `open` or `getattr` it may not."""
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return True
    if isinstance(value, type):
        return value in _PLAIN
    if not isinstance(value, types.BuiltinFunctionType):
        return False
    owner = value.__self__
    if owner is builtins:
        return value.__name__ in _HARMLESS
    return type(owner) in _PLAIN or getattr(owner, "__name__", "") in ("math", "cmath")


class Peer:
    """One side of a connection.

    Args:
      read, write: binary files.
      everything: whether the other side may use any object of this one. Otherwise it may only call functions that were
        passed to it.
    """

    def __init__(self, read: IO[bytes], write: IO[bytes], everything: bool):
        self._read, self._write, self._everything = read, write, everything
        self._objects: list[Any] = []
        self._exceptions: dict[Any, type[BaseException]] = {}
        # The error that ended the connection: a test may have caught it.
        self.broken: Broken | None = None

    # --- values

    def encode(self, value: Any) -> list[Any]:
        """The value as nested lists of JSON. Subclasses of plain types lose their class."""
        if value is None:
            return ["n"]
        if isinstance(value, bool):
            return ["b", value is True]
        if isinstance(value, int):
            return ["i", hex(int(value))]
        if isinstance(value, float):
            return ["f", float.hex(float(value))]
        if isinstance(value, complex):
            return ["c", float.hex(value.real), float.hex(value.imag)]
        if isinstance(value, str):
            return ["s", str.__str__(value)]
        if isinstance(value, (bytes, bytearray)):
            return ["y" if isinstance(value, bytes) else "Y", bytes(value).hex()]
        kinds: list[tuple[str, Any]] = [("l", list), ("t", tuple), ("S", set), ("F", frozenset)]
        for tag, kind in kinds:
            if isinstance(value, kind):
                return [tag, [self.encode(item) for item in kind.__iter__(value)]]
        if isinstance(value, dict):
            return ["d", [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]]
        if isinstance(value, range):
            return ["R", hex(value.start), hex(value.stop), hex(value.step)]
        if _is(value, "decimal", "Decimal"):
            return ["D", str(value)]
        if _is(value, "fractions", "Fraction"):
            return ["Q", hex(value.numerator), hex(value.denominator)]
        if isinstance(value, Remote):
            return ["o", object.__getattribute__(value, "_number")]
        if isinstance(value, types.ModuleType):
            return ["m", value.__name__]
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["x", value.__name__, [base.__name__ for base in value.__mro__]]
        if not self._everything and not _harmless(value):
            raise CannotSend(f"the test passes a {type(value).__name__}, which cannot be sent to the program")
        self._objects.append(value)
        return ["r", len(self._objects) - 1]

    def decode(self, item: Any) -> Any:
        """The value of an encoded one. Raises Broken if it is none."""
        try:
            return self._decode(item)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RecursionError, ArithmeticError) as error:
            raise Broken(f"cannot be read: {error}") from None

    def _decode(self, item: Any) -> Any:
        tag, *rest = item
        if tag == "n":
            return None
        if tag == "b":
            return rest[0] is True
        if tag == "i":
            return int(rest[0], 16)
        if tag == "f":
            return float.fromhex(rest[0])
        if tag == "c":
            return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
        if tag == "s":
            return rest[0] + ""
        if tag in "yY":
            return (bytes if tag == "y" else bytearray).fromhex(rest[0])
        if tag in "ltSF":
            return {"l": list, "t": tuple, "S": set, "F": frozenset}[tag](self._decode(part) for part in rest[0])
        if tag == "d":
            return {self._decode(key): self._decode(value) for key, value in rest[0]}
        if tag == "R":
            return range(*(int(part, 16) for part in rest))
        if tag == "D":
            import decimal  # These two are slow to import and rarely needed.

            return decimal.Decimal(rest[0])
        if tag == "Q":
            import fractions

            return fractions.Fraction(int(rest[0], 16), int(rest[1], 16))
        if tag == "o":
            return self._objects[rest[0]]
        if tag == "m":
            return types.ModuleType(rest[0])
        if tag == "x":
            return self.exception(rest[0], rest[1])
        if tag == "r":
            return Remote(self, int(rest[0]))
        raise ValueError(f"unknown tag {tag!r}")

    def exception(self, name: str, bases: list[str]) -> type[BaseException]:
        """The class of an exception of the other side: a built-in one, or a stand-in for one that is not known here."""
        found = (getattr(builtins, base, None) for base in bases)
        known = next((kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseException)), Exception)
        if known.__name__ == name:
            return known
        key = name, known
        if key not in self._exceptions:
            self._exceptions[key] = type(str(name), (known,), {})
        return self._exceptions[key]

    # --- requests

    def _send(self, message: list[Any]) -> None:
        data = dumps(message).encode() + b"\n"
        if len(data) > MAX_LINE:
            raise CannotSend(f"a value of {len(data)} bytes is too large")
        try:
            self._write.write(data)
            self._write.flush()
        except OSError:
            raise Broken("has ended") from None

    def _receive(self) -> list[Any]:
        line = self._read.readline(MAX_LINE + 1)
        if not line.endswith(b"\n"):
            raise Broken("has ended" if len(line) <= MAX_LINE else "sent a value that is too large")
        try:
            message = loads(line)
        except (ValueError, RecursionError):
            raise Broken("sent what is no message") from None
        if not isinstance(message, list) or not message:
            raise Broken("sent what is no message")
        return message

    def ask(self, operation: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Has the other side do something, and returns the result. Containers that it changes change here too."""
        try:
            return self._ask(operation, target, args, kwargs)
        except Broken as error:
            self.broken = error
            raise

    def _ask(self, operation: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = [*args, *kwargs.values()]
        names = {name: self.encode(value) for name, value in kwargs.items()}
        self._send(["ask", operation, self.encode(target), [self.encode(value) for value in args], names])
        while True:
            message = self._receive()
            if message[0] == "ask":
                self.answer(message)
                continue
            try:
                kind, result, after = message
            except ValueError:
                raise Broken("sent what is no message") from None
            if not isinstance(after, dict):
                raise Broken("sent what is no message")
            for position, changed in after.items():
                self._restore(arguments, position, self.decode(changed))
            if kind == "error":
                raise self._raised(result)
            return self.decode(result)

    def _restore(self, arguments: list[Any], position: str, changed: Any) -> None:
        if not position.isdigit() or int(position) >= len(arguments):
            raise Broken("sent what is no message")
        old = arguments[int(position)]
        if not any(isinstance(old, kind) and type(changed) is kind for kind in _CONTAINERS):
            raise Broken("sent what is no message")
        if isinstance(old, (list, bytearray)):
            old[:] = changed
        else:
            old.clear()
            old.update(changed)

    def _raised(self, result: Any) -> BaseException:
        try:
            name, bases, args = result
            kind = self.exception(name, bases)
            values = [self.decode(value) for value in args]
        except (TypeError, ValueError):
            raise Broken("sent what is no message") from None
        try:
            return kind(*values)
        except Exception:
            return RuntimeError(str(name))

    def answer(self, message: list[Any]) -> None:
        """Does what was asked, and replies."""
        try:
            _, operation, target, args, kwargs = message
            value, values = self.decode(target), [self.decode(item) for item in args]
            named = {name: self.decode(item) for name, item in kwargs.items()}
        except (TypeError, ValueError, AttributeError):
            raise Broken("sent what is no message") from None
        # Only functions that were passed: `target` is one of this side's objects, which on that side are all functions.
        if not self._everything and (operation != "call" or message[2][0] != "o"):
            raise Broken("asked for what it may not")
        arguments = [*values, *named.values()]
        before = {i: repr(self.encode(item)) for i, item in enumerate(arguments) if isinstance(item, _CONTAINERS)}
        try:
            reply = ["value", self.encode(OPERATIONS[operation](value, *values, **named))]
        except (Broken, CannotSend):
            raise
        except BaseException as error:
            reply = ["error", self._encode_error(error)]
        after = {}
        for i, old in before.items():
            try:
                new = self.encode(arguments[i])
            except RecursionError:
                continue
            if repr(new) != old:
                after[str(i)] = new
        self._send([*reply, after])

    def _encode_error(self, error: BaseException) -> list[Any]:
        args = []
        for value in error.args:
            try:
                args.append(self.encode(value))
            except Exception:
                args.append(["s", ""])
        return [type(error).__name__, [base.__name__ for base in type(error).__mro__], args]

    def serve(self) -> None:
        """Answers until the other side has ended."""
        while True:
            try:
                message = self._receive()
            except Broken:
                return
            self.answer(message)
