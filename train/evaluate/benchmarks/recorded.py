"""Answers of models that were recorded by others: the files that judges compare with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.tables import read_rows


def read_answers(path: Path) -> dict[str, list[str]]:
    """The texts of a model by question, a text for each turn.

    A line has `question_id` or `uid`, and either `choices`, the first of which has `turns` (FastChat, Arena-Hard 0.1),
    or `messages` (Arena-Hard 2), of which those of the assistant count. A text may stand in `content` or `answer`.

    Args:
      path: JSON lines.

    Raises:
      InputError: a line of another form, or a question that is answered twice.
    """
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        name, texts = id_of(row.values), _texts(row.values)
        if name is None or texts is None:
            raise InputError(f"{row.where}: expected question_id or uid, and texts in choices or messages.")
        if name in found:
            raise InputError(f"{row.where}: the question {name} is answered a second time. Keep one of the answers.")
        found[name] = texts
    return found


def id_of(values: Mapping[str, Any]) -> str | None:
    """The name of a question, or None."""
    names = (values.get(key) for key in ("question_id", "uid"))
    return next((str(name) for name in names if name is not None), None)


def _texts(values: Mapping[str, Any]) -> list[str] | None:
    """The texts of the assistant; None in another form."""
    try:
        if "choices" in values:
            turns = values["choices"][0]["turns"]
        else:
            turns = [one["content"] for one in values["messages"] if one["role"] == "assistant"]
        texts = [_text(turn) for turn in turns]
    except (KeyError, IndexError, TypeError):
        return None
    return texts if texts and all(isinstance(text, str) for text in texts) else None


def _text(turn: Any) -> Any:
    for name in ("content", "answer"):
        if isinstance(turn, dict):
            turn = turn.get(name, turn)
    return turn
