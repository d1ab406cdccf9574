"""Removes documents by conditions on columns. To change a condition is cheap: no column is computed again."""

import ast
import dataclasses
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qwen_jax.errors import InputError
from train.curate.operator import DOCUMENT, REASON, Compute
from train.curate.stage import RowStage

_Value = Any  # A pyarrow array or scalar.
_Make = Callable[[pa.Table], _Value]

_COMPARISONS: dict[type[ast.cmpop], Callable[[_Value, _Value], _Value]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[_Value, _Value], _Value]] = {
    ast.Add: pc.add_checked,
    ast.Sub: pc.subtract_checked,
    ast.Mult: pc.multiply_checked,
    # Of integers too the quotient is a fraction; a division by zero is null, as 0/0 in a table of ratios.
    ast.Div: lambda a, b: pc.divide(_float(a), pc.if_else(pc.equal(_float(b), 0.0), None, _float(b))),
}
_FUNCTIONS: dict[str, tuple[int, Callable[..., _Value]]] = {
    "length": (1, lambda text: pc.utf8_length(text)),
    "abs": (1, lambda value: pc.abs(value)),
    "contains": (2, lambda text, part: pc.match_substring(text, _constant(part))),
    "starts_with": (2, lambda text, part: pc.starts_with(text, _constant(part))),
    "ends_with": (2, lambda text, part: pc.ends_with(text, _constant(part))),
    "default": (2, lambda value, other: pc.coalesce(value, other)),
}
_GRAMMAR = (
    "A condition has column names, numbers, strings, True, False and None; == != < <= > >=, in, not in, is None; "
    f"and, or, not; + - * /; and {', '.join(f'{name}()' for name in _FUNCTIONS)}."
)


@dataclasses.dataclass(frozen=True)
class Select(RowStage):
    """Keeps documents for which a condition on columns is true.

    Every condition that `and` joins at the top is a rule. The first rule that a document fails is its reason: "not
    (words >= 50)". If a rule has one "x is None", where x is the column of a filter, the reason is what that column
    says: "gopher_quality: too few words". If a rule has no value, because a column is null, the reason is "words >= 50
    is unknown"; a rule such as `words is None or words >= 50` or `default(words, 0) >= 50` decides about nulls itself.
    As in SQL, `or` is true if one side is true, whatever the other is.

    Attributes:
      condition: such as "language == 'en' and language_probability > 0.65 and (words >= 50 or code)".
      name: of the stage.

    Raises:
      InputError: the condition is not a valid expression.
    """

    condition: str
    name: str = "select"

    def __post_init__(self) -> None:
        _rules(self.condition)

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that the condition names."""
        return tuple(dict.fromkeys(name for _, names, _, _ in _rules(self.condition) for name in names))

    @property
    def makes(self) -> pa.Schema:
        """The reason."""
        return pa.schema([pa.field(REASON, pa.string())])

    @property
    def light(self) -> bool:
        """True: a condition costs little."""
        return True

    def start(self) -> Compute:
        """Compiles the condition."""
        rules = _rules(self.condition)

        def compute(table: pa.Table) -> pa.Table:
            reason: pa.Array = pa.nulls(table.num_rows, pa.string())
            for text, _, decision, make in rules:
                try:
                    value = make(table)
                except (pa.ArrowException, TypeError, OverflowError) as error:
                    types = ", ".join(f"{f.name} is {f.type}" for f in table.schema if f.name in text)
                    raise InputError(
                        f"The condition {text} cannot be computed, where {types}: {str(error).splitlines()[0]}"
                    ) from None
                if not pa.types.is_boolean(value.type):
                    raise InputError(f"The condition {text} must be true or false, it is {value.type}.")
                failed = pc.if_else(value, None, _why(table, text, decision))
                reason = pc.coalesce(reason, pc.if_else(pc.is_null(value), f"{text} is unknown", failed))
                reason = _broadcast(reason, table.num_rows)
            return pa.table({REASON: reason}, schema=self.makes)

        return compute


def _why(table: pa.Table, text: str, decision: str | None) -> _Value:
    """The reason of a document that fails a rule: what its column of decisions says, or the rule."""
    if decision is None or not pa.types.is_string(table.schema.field(decision).type):
        return f"not ({text})"
    said = pc.binary_join_element_wise(decision, table[decision], ": ", null_handling="emit_null")
    return pc.coalesce(said, f"not ({text})")


def _rules(condition: str) -> list[tuple[str, tuple[str, ...], str | None, _Make]]:
    """Text, column names, column of decisions if there is one, and function of each rule."""
    try:
        tree = ast.parse(condition.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"The condition {condition!r} cannot be read: {error}. {_GRAMMAR}") from None
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    rules = []
    for part in parts:
        names = tuple(dict.fromkeys(n.id for n in ast.walk(part) if isinstance(n, ast.Name) and n.id not in _FUNCTIONS))
        make = _compile(part, condition)
        if not names:
            raise InputError(f"The condition {ast.unparse(part)!r} names no column. {_GRAMMAR}")
        rules.append((ast.unparse(part), names, _decision(part), make))
    return rules


def _decision(part: ast.expr) -> str | None:
    """The one column that a stage has made of which a rule asks whether it is null; None if there is no such one."""
    found = {
        node.left.id
        for node in ast.walk(part)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and isinstance(node.ops[0], ast.Is)
    }
    return found.pop() if len(found) == 1 and not found & set(DOCUMENT.names) else None


def _compile(node: ast.expr, condition: str) -> _Make:
    """The function of an expression. Only what is listed here can be said; nothing is executed."""

    def of(child: ast.expr) -> _Make:
        return _compile(child, condition)

    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return lambda table: pa.scalar(value)
        case ast.Name(id=name):
            return lambda table: table[name]
        case ast.BoolOp(op=op, values=values):
            join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
            sides = [of(value) for value in values]

            def joined(table: pa.Table) -> _Value:
                result = sides[0](table)
                for side in sides[1:]:
                    result = join(result, side(table))
                return result

            return joined
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = of(operand)
            return lambda table: pc.invert(inner(table))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = of(operand)
            return lambda table: pc.negate_checked(inner(table))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            function, a, b = _ARITHMETIC[type(op)], of(left), of(right)
            return lambda table: function(a(table), b(table))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            values = [left, *comparators]
            pairs = [_compare(a, op, b, condition) for a, op, b in zip(values, ops, comparators, strict=False)]

            def chained(table: pa.Table) -> _Value:
                result = pairs[0](table)
                for pair in pairs[1:]:
                    result = pc.and_kleene(result, pair(table))
                return result

            return chained
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            count, called = _FUNCTIONS[name]
            if len(arguments) != count:
                raise InputError(f"The condition {condition!r}: {name}() takes {count} values, got {len(arguments)}.")
            made = [of(argument) for argument in arguments]
            return lambda table: called(*(make(table) for make in made))
        case _:
            raise InputError(f"The condition {condition!r}: {ast.unparse(node)!r} cannot be said here. {_GRAMMAR}")


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, condition: str) -> _Make:
    a = _compile(left, condition)
    if isinstance(op, (ast.Is, ast.IsNot)):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise InputError(f"The condition {condition!r}: only None can stand behind `is`. {_GRAMMAR}")
        test = pc.is_null if isinstance(op, ast.Is) else pc.is_valid
        return lambda table: test(a(table))
    if isinstance(op, (ast.In, ast.NotIn)):
        listed = isinstance(right, (ast.List, ast.Tuple, ast.Set))
        elements = right.elts if isinstance(right, (ast.List, ast.Tuple, ast.Set)) else []
        values = [element.value for element in elements if isinstance(element, ast.Constant)]
        if not listed or len(values) != len(elements) or not values or any(v is None for v in values):
            raise InputError(f"The condition {condition!r}: a list of values must stand behind `in`. {_GRAMMAR}")

        def among(table: pa.Table) -> _Value:
            value = a(table)
            # A null is in no list, and not out of it either.
            found = pc.if_else(pc.is_valid(value), pc.is_in(value, value_set=pa.array(values, value.type)), None)
            return pc.invert(found) if isinstance(op, ast.NotIn) else found

        return among
    compare, b = _COMPARISONS[type(op)], _compile(right, condition)
    if any(isinstance(side, ast.Constant) and side.value is None for side in (left, right)):
        raise InputError(f"The condition {condition!r}: nothing equals None; write `is None`. {_GRAMMAR}")
    return lambda table: compare(a(table), b(table))


def _float(value: _Value) -> _Value:
    return value.cast(pa.float64())


def _constant(value: _Value) -> str:
    if not isinstance(value, pa.Scalar) or not isinstance(value.as_py(), str):
        raise TypeError("the second value must be a string in quotes")
    text: str = value.as_py()
    return text


def _broadcast(value: _Value, rows: int) -> pa.Array:
    if isinstance(value, pa.Scalar):
        return pa.repeat(value, rows)
    return value.combine_chunks() if isinstance(value, pa.ChunkedArray) else value
