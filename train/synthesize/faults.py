"""What ends a run, in words, and whether the result of a stage is one that it may have."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.synthesize.item import Item, Rejected


def not_written(folder: Path, error: OSError) -> InputError:
    """The error of a folder that cannot be written."""
    return InputError(
        f"Cannot write in {folder}: {error.strerror or error}. Make room or allow it, and run the same command again: "
        "what was answered is kept."
    )


def not_read(error: OSError) -> InputError:
    """The error of a source that cannot be read."""
    return InputError(
        f"Cannot read {error.filename or 'the source'}: {error.strerror or error}. Mend it and run again."
    )


def failure(stage: str, item: Item, error: BaseException) -> InputError:
    """The error of a stage that has failed on an item."""
    return InputError(
        f"The stage {stage} failed on the item {item.id}: {type(error).__name__}: {error}. Mend it, and run the same "
        "command again; answers are kept."
    )


def made_of(stage: str, result: object, steps: Sequence[Mapping[str, Any]]) -> list[Item] | Rejected:
    """What a stage made, with what it did.

    Args:
      stage: its name.
      result: of its work.
      steps: what it did, which is added to the steps of its items.

    Raises:
      InputError: the result is not one that a stage may have.
    """
    if isinstance(result, Rejected):
        if not (isinstance(result.reason, str) and isinstance(result.detail, str)):
            raise InputError(f"The stage {stage} gave Rejected without texts: {str(result)[:200]}. Give two texts.")
        return result
    made = [result] if isinstance(result, Item) else list(result) if isinstance(result, Sequence) else None
    if made is None or not all(isinstance(one, Item) for one in made):
        raise InputError(f"The stage {stage} must give an Item, Items or Rejected, got a {type(result).__name__}.")
    if not made:
        return Rejected("nothing came out")
    made = [dataclasses.replace(one, steps=(*one.steps, *steps)) for one in made]
    for one in made:
        try:
            to_json(one.to_json())
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"The stage {stage} gave an item {one.id} that is no JSON: {error}.") from None
    return made
