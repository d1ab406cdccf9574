"""Questions about nested objects and lists, with answers that are computed."""

import random
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from train.synthesize.tables import Value, exact, is_number

Path = tuple[str | int, ...]
KINDS = ("path", "children", "depth", "leaves", "total", "compare")


def tree_answer(tree: Any, query: list[Any]) -> Value | None:
    """The result of a query about a tree; None where it has no single one.

    Args:
      tree: a JSON value.
      query: ["path", path], the text or number there; ["children", path], how many fields or entries there are;
        ["depth", path], the levels of objects and lists; ["leaves", path], the values that are neither; ["total", path,
        name], the sum of all numbers in fields of that name below; or ["compare", path, path], the first name of the
        path with the larger number. A path is a list of names and of places in lists from 0.
    """
    kind, path, *rest = query
    here = _at(tree, path)
    if kind == "path":
        if isinstance(here, Mapping | list) or here is None or isinstance(here, bool):
            return None
        return exact(here) if is_number(here) else str(here)
    if kind == "children":
        return Decimal(len(here)) if isinstance(here, Mapping | list) and here else None
    if kind == "depth":
        return Decimal(_depth(here)) if isinstance(here, Mapping | list) else None
    if kind == "leaves":
        return Decimal(sum(1 for _ in _leaves(here))) if isinstance(here, Mapping | list) and here else None
    if kind == "total":
        numbers = [value for name, value in _fields(here) if name == rest[0]]
        if len(numbers) < 2 or not all(is_number(value) for value in numbers):
            return None
        return sum((exact(value) for value in numbers), Decimal(0))
    if kind == "compare":
        first, second = here, _at(tree, rest[0])
        if not is_number(first) or not is_number(second) or exact(first) == exact(second):
            return None
        (which,) = [i for i, (a, b) in enumerate(zip(path, rest[0], strict=True)) if a != b]
        return str(path[which] if exact(first) > exact(second) else rest[0][which])
    raise ValueError(f"there is no query {kind}")


def tree_question(query: list[Any]) -> str:
    """A query in words."""
    kind, path, *rest = query
    where = f"at {_words(path)}" if path else "in the whole document"
    if kind == "path":
        return f"What is the value {where}?"
    if kind == "children":
        return f"How many entries are directly {where}? (Fields of an object or items of a list, not those below them.)"
    if kind == "depth":
        return (
            f"How many levels of objects and lists are nested {where}, the outermost one counted as the first? "
            "(An object or list that contains only plain values has one level.)"
        )
    if kind == "leaves":
        return f"How many plain values (texts, numbers, yes or no, neither objects nor lists) are there {where}?"
    if kind == "total":
        return f"What is the sum of all fields named `{rest[0]}` {where}?"
    (which,) = [i for i, (a, b) in enumerate(zip(path, rest[0], strict=True)) if a != b]
    inside = f" in {_words(path[:which])}" if which else ""
    field = _words(path[which + 1 :])
    return f"Which one{inside} has the larger value at {field}: `{path[which]}` or `{rest[0][which]}`?"


def draw_tree_query(tree: Any, rng: random.Random, tries: int = 50) -> tuple[list[Any], Value] | None:
    """A random query that has an answer, with the answer; None if none was found."""
    if not isinstance(tree, Mapping | list):
        return None
    nodes = list(_nodes(tree, ()))
    inner = [path for path, node in nodes if isinstance(node, Mapping | list)]
    leaves = [path for path, node in nodes if not isinstance(node, Mapping | list)]
    for _ in range(tries):
        kind = rng.choice(KINDS)
        query: list[Any] = [kind, list(rng.choice(leaves if kind == "path" and leaves else inner))]
        if kind == "total":
            names = sorted({str(name) for name, value in _fields(_at(tree, query[1])) if is_number(value)})
            if not names:
                continue
            query.append(rng.choice(names))
        if kind == "compare":
            pair = _siblings(nodes, rng)
            if pair is None:
                continue
            query = [kind, *pair]
        answer = tree_answer(tree, query)
        if answer is not None and answer != "":
            return query, answer
    return None


def _siblings(nodes: list[tuple[Path, Any]], rng: random.Random) -> tuple[list[Any], list[Any]] | None:
    """Two paths to numbers that differ in one name."""
    numbers = [path for path, node in nodes if is_number(node) and len(path) > 1]
    rng.shuffle(numbers)
    for first in numbers[:10]:
        for second in numbers:
            differ = [i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
            if len(first) != len(second) or len(differ) != 1 or differ[0] == len(first) - 1:
                continue
            if isinstance(first[differ[0]], str) and isinstance(second[differ[0]], str):
                return list(first), list(second)
    return None


def _at(tree: Any, path: list[Any]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _nodes(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """All values with their paths, the outermost first."""
    yield path, tree
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in pairs:
        yield from _nodes(value, (*path, name))


def _leaves(tree: Any) -> Iterator[Any]:
    return (node for _, node in _nodes(tree, ()) if not isinstance(node, Mapping | list))


def _fields(tree: Any) -> Iterator[tuple[str | int, Any]]:
    """All fields of objects, at any depth."""
    return ((path[-1], node) for path, node in _nodes(tree, ()) if path and isinstance(path[-1], str))


def _depth(tree: Any) -> int:
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else None
    return 0 if values is None else 1 + max((_depth(value) for value in values), default=0)


def _words(path: Path | list[Any]) -> str:
    """A path in words: `teams` > `design` > item 2."""
    return " > ".join(f"item {name + 1}" if isinstance(name, int) else f"`{name}`" for name in path)
