"""Reads the value of a number as people and models write it, in text or LaTeX. Nothing is executed."""

import ast
import math
import operator
import re
from collections.abc import Callable

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "exp": math.exp,
    "ln": math.log,
    "log": math.log,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "arctan": math.atan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
# Characters of a number, and braces in braces.
_LONGEST, _DEPTH = 200, 8
# LaTeX with braces, from the inside out, and then signs, as an expression of Python.
_BRACES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:text|mathrm|mathbf)\{\s*[^{}]*\}", ""),
        (r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
        (r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)"),
        (r"\^\{([^{}]*)\}", r"**(\1)"),
    )
)
_SIGNS = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|displaystyle|[,;:! ])", ""),
        (r"\\(?:times|cdot)|[\u00d7\u00b7]", "*"),
        (r"\\(?:approx|sim)|[\u2248=]", ""),
        (r"\\?\u03c0|\\pi", "pi"),
        (r"\\(sqrt|exp|ln|log|sin|cos|tan|arctan)", r"\1"),
        (r"\u221a\s*(\d+(?:\.\d+)?)", r"sqrt(\1)"),
        (r"\^", "**"),
        (r"[\u2212\u2013]", "-"),
        (r"[$\u00a3\u20ac\u00a5\u00b0{}]", ""),
        # Digits in groups of three, and a product without its sign.
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"(?<=\d)\s*(?=pi\b|sqrt\b|\()", "*"),
    )
)
# Up to three words, such as m/s, cubic meters.
_UNIT = re.compile(r"(?:\s*(?!(?:or|and|to)\b)[A-Za-z\u00b5\u03a9][A-Za-z\u00b5\u03a9/*.-]*\d?){1,3}")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def value_of(text: str) -> float | None:
    """The value of a number or of a small expression; None if it cannot be read.

    A unit after a number is dropped; a per cent sign divides by 100.

    Args:
      text: such as "3.5 cm", "1,200", "2/3", "\\frac{1}{2}", "3 \\times 10^{-4}", "25%", "2\\pi".
    """
    text = text.strip().rstrip(".").strip()
    if not text or len(text) > _LONGEST:
        return None
    text, percent = re.subn(r"\s*\\?%$", "", text)
    for _ in range(_DEPTH):
        before = text
        for pattern, new in _BRACES:
            text = pattern.sub(new, text)
        if text == before:
            break
    for pattern, new in _SIGNS:
        text = pattern.sub(new, text)
    text = text.strip()
    value = _expression(text)
    if value is None:
        # A number with a unit.
        match = _NUMBER.match(text)
        if match is None or not _UNIT.fullmatch(text[match.end() :]):
            return None
        value = float(match[0])
    return value / 100 if percent else value


def _expression(text: str) -> float | None:
    try:
        value = _value(ast.parse(text, mode="eval").body)
        return float(value) if math.isfinite(value) else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, TypeError, KeyError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        # Powers of floats only: they overflow and end, where those of integers go on.
        return math.pow(left, right) if isinstance(node.op, ast.Pow) else _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1 and not node.keywords:
        return _FUNCTIONS[node.func.id](_value(node.args[0]))
    raise ValueError("no number")
