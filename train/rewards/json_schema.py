"""The reward of JSON that fits a schema."""

import functools
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.text import column_of, last_code_block


class JsonSchemaReward:
    """1 for a finished response that is JSON and fits the schema of its prompt, otherwise 0.

    All of the response must be JSON, perhaps in a markdown fence. Numbers such as NaN and repeated keys are not JSON
    here. Nothing is fetched: a schema that refers to another document is refused. A schema is read as the draft that
    its `$schema` names, 2020-12 by default. A pattern that backtracks without end gives no signal.
    """

    def __init__(self, column: str = "schema", schema: Mapping[str, Any] | str | None = None, fenced: bool = False):
        """
        Args:
          column: of the prompt file, with the schema, an object or a JSON text.
          schema: one schema for all prompts, instead of a column.
          fenced: the JSON is in the last code block of the response, and other text may stand around it.

        Raises:
          InputError: jsonschema-rs is not installed, or `schema` is no JSON schema.
        """
        if importlib.util.find_spec("jsonschema_rs") is None:
            raise InputError(
                "The reward json_schema needs the package jsonschema-rs. Install it: pip install 'qwen-jax[post]'."
            )
        self._column, self._fenced = column, fenced
        self._schema = None if schema is None else _schema_text(schema, "schema")
        if self._schema is not None:
            _validator(self._schema)

    def __call__(self, completions: Sequence[str], finished: Sequence[bool], **columns: Any) -> list[float | None]:
        """The rewards: 1, 0, or None for no signal."""
        if self._schema is None:
            given = column_of(columns, self._column, "JSON schemas")
            schemas = [
                None if x is None else _schema_text(x, f"completion {i}, {self._column}") for i, x in enumerate(given)
            ]
        else:
            schemas = [self._schema] * len(completions)
        return [
            None if schema is None else self._reward(text, ended, schema)
            for text, ended, schema in zip(completions, finished, schemas, strict=True)
        ]

    def _reward(self, text: str, ended: bool, schema: str) -> float | None:
        import jsonschema_rs

        validator = _validator(schema)
        if not ended:
            return 0.0
        found = self._json_of(text)
        try:
            value = json.loads(found, parse_constant=_refuse, object_pairs_hook=_object)
        except (ValueError, RecursionError):
            return 0.0
        try:
            validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            kind = type(error.kind).__name__
            return None if kind in ("BacktrackLimitExceeded", "RegexEngineFailure") else 0.0
        except (ValueError, OverflowError, RecursionError):
            # A nesting or a number that the checker cannot take.
            return None
        return 1.0

    def _json_of(self, text: str) -> str:
        block = last_code_block(text)
        if self._fenced:
            return block[1] if block else ""
        whole = re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*", text, re.DOTALL | re.IGNORECASE)
        return whole[1] if whole else text


@functools.lru_cache(maxsize=4096)
def _validator(schema: str) -> Any:
    """The validator of a schema, given as its JSON text."""
    import jsonschema_rs

    try:
        return jsonschema_rs.validator_for(json.loads(schema), retriever=_fetch)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{schema[:200]!r} is no JSON schema: {why}. Correct it.") from error


def _schema_text(schema: Any, where: str) -> str:
    if isinstance(schema, (Mapping, bool)):
        return json.dumps(schema, sort_keys=True)
    if isinstance(schema, str):
        return schema
    raise InputError(f"{where}: expected a JSON schema, an object or its text, got {schema!r:.200}.")


def _fetch(uri: str) -> Any:
    raise ValueError(f"it refers to {uri}, and nothing is fetched")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found
