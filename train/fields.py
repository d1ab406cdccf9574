"""Fields of configurations: change one by its path, check its range, write all as JSON, compare two configurations.

It works on any nested frozen dataclass. `--set optimizer.beta2=0.99` is `set_fields(config, "optimizer.beta2=0.99")`.
"""

import copy
import dataclasses
import difflib
import inspect
import json
import runpy
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.parallel.sharding import AXES
from train.python_file import failure

T = TypeVar("T")


def at_least(config: object, **bounds: int) -> None:
    """Checks that fields are not below their smallest allowed values. A field that is None is not checked.

    Args:
      config: an object with the fields.
      **bounds: the smallest allowed value of each field, by its name.

    Raises:
      InputError: a field is below it.
    """
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise InputError(f"{name} must be at least {least}, got {value}.")


def check_axes(axes: Mapping[str, int]) -> None:
    """Checks the sizes of mesh axes.

    Raises:
      InputError: no such axis, or a size below 1.
    """
    for axis, size in axes.items():
        if axis not in AXES:
            raise InputError(f"A mesh has no axis {axis!r}; {near(axis, AXES)}")
        if size < 1:
            raise InputError(f"The mesh axis {axis!r} must be at least 1, got {size}.")


def set_fields(config: T, *changes: str, moved: Mapping[str, str] | None = None) -> T:
    """A copy of a configuration with some fields changed. Fields are checked against each other after the last change.

    Args:
      config: a frozen dataclass.
      changes: each "path.to.field=value". Elements of a tuple are named by their index, entries of a mapping by their
        key, which may be new. A value is JSON, or plain text where a string is expected; null is None. The value of a
        dataclass is an object of its fields, as `as_json` writes it.
      moved: new paths of fields of `config` that had another name in the past, for the message.

    Raises:
      InputError: no such field, a value that is not of its type, or values that do not fit together.
    """
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise InputError(f"Expected path.to.field=value, got {change!r}.")
        name, _, rest = path.partition(".")
        if moved and name in moved:
            new = ".".join([moved[name], rest] if rest else [moved[name]])
            raise InputError(f"{change!r}: the field {path!r} is now {new!r}. Write {new}={text}.")
        config = _replaced(config, type(config), path.split("."), text, change)
    return _checked(config)


def _checked(value: T) -> T:
    """A copy in which all dataclasses are constructed again, inner ones first, so that each checks its fields."""
    if isinstance(value, tuple):
        return tuple(map(_checked, value))  # type: ignore[return-value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return dataclasses.replace(value, **{f.name: _checked(getattr(value, f.name)) for f in dataclasses.fields(value)})


def _replaced(value: Any, kind: Any, path: Sequence[str], text: str, change: str) -> Any:
    """`value`, which has the type `kind`, with the field at `path` read from `text`."""
    if not path:
        return _parsed(text, kind, change)
    name, rest = path[0], path[1:]
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        if name not in fields:
            raise InputError(f"{change!r}: {type(value).__name__} has no field {name!r}; {near(name, fields)}")
        hint = typing.get_type_hints(type(value))[name]
        new = copy.copy(value)
        object.__setattr__(new, name, _replaced(getattr(value, name), hint, rest, text, change))
        return new
    if isinstance(value, tuple):
        if not name.isdecimal() or int(name) >= len(value):
            raise InputError(f"{change!r}: expected an index from 0 to {len(value) - 1}, got {name!r}.")
        index, arguments = int(name), typing.get_args(kind)
        new = _replaced(value[index], arguments[0] if arguments else Any, rest, text, change)
        return (*value[:index], new, *value[index + 1 :])
    if isinstance(value, Mapping) or (value is None and _mapping(kind)):
        if rest and name not in (value or {}):
            raise InputError(f"{change!r}: no entry {name!r}; {near(name, value or {})}")
        entry = typing.get_args(_mapping(kind))[1] if _mapping(kind) else Any
        return {**(value or {}), name: _replaced((value or {}).get(name), entry, rest, text, change)}
    if value is None:
        part = ".".join(change.partition("=")[0].split(".")[: -len(path)])
        raise InputError(f"{change!r}: {part} is null. Set the whole part, as in {part}='{{\"{name}\": ...}}'.")
    raise InputError(f"{change!r}: a {type(value).__name__} has no field {name!r}.")


def _mapping(kind: Any) -> Any:
    """The mapping among the alternatives of a type, or None."""
    return next((k for k in _alternatives(kind) if typing.get_origin(k) in (Mapping, dict)), None)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _parsed(text: str, kind: Any, change: str) -> Any:
    """The value that a text stands for where a type is expected."""
    alternatives = _alternatives(kind)
    if text == "null" and type(None) in alternatives:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for alternative in alternatives:
        # A text that happens to be JSON, such as a folder named 7, is a string where one is expected.
        for candidate in (value, text):
            fits, result = _fit(candidate, alternative)
            if fits:
                return result
    raise InputError(f"{change!r}: expected {' or '.join(map(_described, alternatives))}, got {text!r}.")


def _described(kind: Any) -> str:
    """A type in words, for a message."""
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    if typing.get_origin(kind) in (Mapping, dict):
        return "a JSON object"
    if typing.get_origin(kind) in (tuple, list, Sequence):
        return "a JSON list"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return f"an object with fields of {kind.__name__} ({', '.join(f.name for f in dataclasses.fields(kind))})"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(kind, str(kind))


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a JSON value is of a type, and the value in that type. Raises InputError as dataclasses do."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _fit_fields(value, kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True, value
    if origin is Literal:
        return value in arguments, value
    if origin in (Mapping, dict, tuple) or origin in (list, Sequence):
        if not isinstance(value, dict if origin in (Mapping, dict) else list):
            return False, None
        inner = arguments[1] if isinstance(value, dict) else arguments[0]
        items = [_fit(v, inner) for v in (value.values() if isinstance(value, dict) else value)]
        results = [result for _, result in items]
        made = dict(zip(value, results, strict=True)) if isinstance(value, dict) else tuple(results)
        return all(fits for fits, _ in items), made
    if origin in (Union, types.UnionType):
        return next((fit for k in arguments if (fit := _fit(value, k))[0]), (False, None))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool), (
            float(value) if isinstance(value, (int, float)) else None
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(kind, type) and isinstance(value, kind), value


def _fit_fields(value: Any, kind: type[Any]) -> tuple[bool, Any]:
    """`_fit` for a dataclass: an object of its fields. Fields that are left out have their defaults."""
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if not isinstance(value, dict) or not needed <= value.keys() <= {f.name for f in fields}:
        return False, None
    hints = typing.get_type_hints(kind)
    fits = {name: _fit(item, hints[name]) for name, item in value.items()}
    if not all(fit for fit, _ in fits.values()):
        return False, None
    return True, kind(**{name: made for name, (_, made) in fits.items()})


def near(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt name: the names that may have been meant, or all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there are {', '.join(map(repr, names)) or 'none'}."


def as_json(config: object) -> dict[str, Any]:
    """A configuration as JSON values; a `Fraction` becomes its text, and a number that is not finite None.

    Args:
      config: a dataclass.
    """
    value: dict[str, Any] = json.loads(to_json(dataclasses.asdict(config), default=str))  # type: ignore[call-overload]
    return value


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], later: Mapping[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ.

    Args:
      before, now: JSON values, as from `as_json`.
      later: fields that `before` may lack because they came later, by path, and what they stand for there.

    Returns:
      (value before, value now) by path; None stands for a value that is not there.
    """
    a, b = _flat(before), _flat(now)
    a = {**a, **{path: value for path, value in (later or {}).items() if path in b and path not in a}}
    paths = [*a, *(path for path in b if path not in a)]
    return {path: (a.get(path), b.get(path)) for path in paths if a.get(path) != b.get(path)}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of JSON values by their paths."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for name, inner in items for k, v in _flat(inner, f"{path}.{name}" if path else str(name)).items()}


def call(path: str) -> object:
    """Calls the function of a configuration file.

    Args:
      path: "FILE.py" or "FILE.py:function"; by default the function is `config`, or the only public one of the file.

    Raises:
      InputError: no such file or function, or it fails; the error names the line.
    """
    name, _, function_name = path.partition(":") if not Path(path).is_file() else (path, "", "")
    file = Path(name)
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"No Python file {name!r}. Give FILE.py or FILE.py:function.")
    try:
        names = runpy.run_path(str(file), run_name="config")
    except Exception as error:
        raise failure(file, error) from error
    functions = {
        key: value
        for key, value in names.items()
        if inspect.isfunction(value) and value.__module__ == "config" and not key.startswith("_")
    }
    if not function_name:
        function_name = next(iter(functions)) if len(functions) == 1 else "config"
    if function_name not in functions:
        hint = near(function_name, functions)
        if path == name and functions:
            hint += f" Name one of them: {file}:{next(iter(functions))}."
        raise InputError(f"{file} has no function {function_name!r}; {hint}")
    try:
        result: object = functions[function_name]()
    except Exception as error:
        raise failure(file, error) from error
    return result


def call_for(kind: type[T], path: str, changes: Sequence[str] = ()) -> T:
    """Calls the function of a configuration file, and applies changes.

    Args:
      kind: what the function must return.
      path: as for `call`.
      changes: as for `set_fields`.

    Raises:
      InputError: no such file, function or field, another return value, or a value that is not of the field's type.
    """
    config = call(path)
    if not isinstance(config, kind):
        raise InputError(f"{path} must return a {kind.__module__}.{kind.__qualname__}, got {type(config).__name__}.")
    return set_fields(config, *changes)
