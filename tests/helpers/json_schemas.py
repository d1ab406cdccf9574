"""Random JSON schemas, documents that they accept, and a checker that shares no code with llguidance."""

import json
import math
import random
import re
import string
from collections.abc import Mapping
from typing import Any

PATTERNS = {
    r"^[a-z]{2,5}$": lambda rng: "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 5))),
    r"^(red|green|dark blue)$": lambda rng: rng.choice(["red", "green", "dark blue"]),
    r"^[A-Z][a-z]*( [A-Z][a-z]*)?$": lambda rng: rng.choice(["Ada", "Ada L", "A", "Grace Hopper"]),
    r"^\+?[0-9]{3}-[0-9]{4}$": lambda rng: f"{rng.choice(['', '+'])}{rng.randint(100, 999)}-{rng.randint(1000, 9999)}",
}
FORMATS = {
    "date": (r"\d{4}-\d\d-\d\d", lambda rng: f"20{rng.randint(10, 30)}-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}"),
    "ipv4": (r"\d+\.\d+\.\d+\.\d+", lambda rng: ".".join(str(rng.randint(0, 255)) for _ in range(4))),
    "uuid": (r"[0-9a-fA-F-]{36}", lambda rng: "12345678-1234-4234-8234-123456789abc"),
}
NAMES = ["a", "name", "first name", "köln", "x_1", "id", 'quo"te', "日本", "tags", "<|im_end|>"]


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of keywords that llguidance enforces; `$ref` to a tree at times."""
    schema = _schema(rng, depth)
    if rng.random() < 0.1:
        tree = {
            "type": "object",
            "properties": {"value": _leaf(rng), "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["value"],
            "additionalProperties": False,
        }
        schema = {"$defs": {"tree": tree}, "type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
    return schema


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0 or rng.random() < 0.15:
        return _leaf(rng)
    kind = rng.choice(["object", "object", "array", "tuple", "anyOf", "map"])
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(1, 4))
        made: dict[str, Any] = {"type": "object", "properties": {name: _schema(rng, depth - 1) for name in names}}
        made["required"] = [name for name in names if rng.random() < 0.6]
        made["additionalProperties"] = rng.choice([False, False, {"type": "integer"}])
        return made
    if kind == "map":
        return {"type": "object", "additionalProperties": _schema(rng, depth - 1)}
    if kind == "anyOf":
        return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
    if kind == "tuple":
        return {
            "type": "array",
            "prefixItems": [_schema(rng, depth - 1) for _ in range(2)],
            "items": False,
            "minItems": 2,
        }
    least = rng.randint(0, 2)
    return {"type": "array", "items": _schema(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 3)}


def _leaf(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(
        ["string", "length", "pattern", "format", "integer", "number", "multiple", "word", "enum", "const"]
    )
    if kind == "length":
        least = rng.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(list(PATTERNS))}
    if kind == "format":
        return {"type": "string", "format": rng.choice(list(FORMATS))}
    if kind == "integer":
        low = rng.randint(-1000, 1000)
        return rng.choice(
            [
                {"type": "integer"},
                {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
                {"type": "integer", "exclusiveMinimum": low},
            ]
        )
    if kind == "number":
        low = rng.randint(-100, 100) / 4
        return rng.choice(
            [{"type": "number"}, {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 50) / 2}]
        )
    if kind == "multiple":
        return {"type": "integer", "multipleOf": rng.choice([2, 5, 7, 12])}
    if kind == "word":
        return {"type": rng.choice(["boolean", "null", ["boolean", "null"], ["string", "null"]])}
    if kind == "enum":
        return {"enum": rng.sample(["x", "xy", 'q"', "\n\\", 1, 12, True, None, 1.5, "ü", [1, "a"]], rng.randint(1, 4))}
    return {"const": rng.choice(["fixed", 7, None, {"k": [1, 2]}])} if kind == "const" else {"type": "string"}


def random_document(rng: random.Random, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> Any:
    """A value that a schema of `random_schema` accepts, with its properties in the schema's order.

    Args:
      rng: source of random numbers.
      schema: of the value.
      root: the whole schema, for references.
      depth: of the value in the document.
    """
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        return random_document(rng, rng.choice(schema["anyOf"]), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema["type"] if isinstance(schema["type"], str) else rng.choice(schema["type"])
    if kind == "object":
        made = {}
        for name, one in schema.get("properties", {}).items():
            if name in schema.get("required", []) or (depth < 4 and rng.random() < 0.6):
                made[name] = random_document(rng, one, root, depth + 1)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict) and rng.random() < 0.5:
            made["another key"] = random_document(rng, extra, root, depth + 1)
        return made
    if kind == "array":
        if "prefixItems" in schema:
            return [random_document(rng, one, root, depth + 1) for one in schema["prefixItems"]]
        least = schema.get("minItems", 0)
        count = rng.randint(least, max(least, min(schema.get("maxItems", 3), 3 if depth < 4 else 0)))
        return [random_document(rng, schema["items"], root, depth + 1) for _ in range(count)]
    if kind == "string":
        return _string(rng, schema)
    if kind in ("boolean", "null"):
        return rng.choice([True, False]) if kind == "boolean" else None
    low = schema.get("minimum", schema.get("exclusiveMinimum", -9) + ("exclusiveMinimum" in schema))
    high = schema.get("maximum", low + 2000)
    if kind == "integer":
        step = schema.get("multipleOf", 1)
        return rng.randint(math.ceil(low / step), math.floor(high / step)) * step
    value = rng.choice([low, high, (low + high) / 2])
    # llguidance takes 0 and not 0.0 at the bound 0.0 of a range, and no exponents in ranges.
    return int(value) if float(value).is_integer() else value


def _string(rng: random.Random, schema: Mapping[str, Any]) -> str:
    if "pattern" in schema:
        return PATTERNS[schema["pattern"]](rng)
    if "format" in schema:
        return FORMATS[schema["format"]][1](rng)
    least = schema.get("minLength", 0)
    count = rng.randint(least, schema.get("maxLength", least + 12))
    return "".join(rng.choices('abc xyz "\\/\n\té日😀{}[]:,', k=count))


def problem(value: Any, schema: Any, root: Mapping[str, Any]) -> str | None:
    """Why a schema of `random_schema` does not accept a value, or None. Draft 2020-12, for the keywords used here."""
    if isinstance(schema, bool):
        return None if schema else "nothing is accepted"
    if "$ref" in schema:
        return problem(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema and all(problem(value, one, root) for one in schema["anyOf"]):
        return f"{value!r} matches none of {schema['anyOf']}"
    if "const" in schema and not _equal(value, schema["const"]):
        return f"{value!r} is not {schema['const']!r}"
    if "enum" in schema and not any(_equal(value, one) for one in schema["enum"]):
        return f"{value!r} is none of {schema['enum']}"
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is(value, kind) for kind in kinds):
            return f"{value!r} is not of type {kinds}"
    if isinstance(value, str):
        return _problem_of_string(value, schema)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _problem_of_number(value, schema)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            return f"{len(value)} items"
        first = schema.get("prefixItems", [])
        parts = list(zip(value, first, strict=False)) + [
            (item, schema.get("items", True)) for item in value[len(first) :]
        ]
        return next((found for item, one in parts if (found := problem(item, one, root))), None)
    if isinstance(value, dict):
        if missing := [name for name in schema.get("required", []) if name not in value]:
            return f"{missing} are missing"
        known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        parts = [(item, known.get(name, other)) for name, item in value.items()]
        return next((found for item, one in parts if (found := problem(item, one, root))), None)
    return None


def _problem_of_string(value: str, schema: Mapping[str, Any]) -> str | None:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
        return f"{value!r} has {len(value)} characters"
    if "pattern" in schema and not re.search(schema["pattern"].replace("$", r"\Z"), value):
        return f"{value!r} does not match {schema['pattern']}"
    if "format" in schema and not re.fullmatch(FORMATS[schema["format"]][0], value):
        return f"{value!r} is no {schema['format']}"
    return None


def _problem_of_number(value: float, schema: Mapping[str, Any]) -> str | None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if not low <= value <= high or value <= schema.get("exclusiveMinimum", -math.inf):
        return f"{value} is out of range"
    return f"{value} is no multiple" if value % schema.get("multipleOf", 1) and "multipleOf" in schema else None


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": number,
        "integer": number and float(value).is_integer(),
    }[kind]


def _equal(left: Any, right: Any) -> bool:
    """Equality of JSON: true is not 1."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True) or (
        _is(left, "number") and _is(right, "number") and left == right
    )
