"""The files of examples at the end of a pipeline."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.files import temporary_name
from train.synthesize.item import Item
from train.synthesize.pipeline import Output, Pipeline

EARLIER = "earlier"
_SAMPLES, _SHOWN = 5, 4000


@dataclasses.dataclass
class Written:
    """An output that was written.

    Attributes:
      name: of the output.
      rows: examples.
      lengths: by the power of two below it: examples with so many characters of text.
      samples: some examples as JSON text, shortened.
    """

    name: str
    rows: int = 0
    lengths: Counter[int] = dataclasses.field(default_factory=Counter)
    samples: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        lengths = {str(1 << power): count for power, count in sorted(self.lengths.items())}
        return {"name": self.name, "rows": self.rows, "lengths": lengths, "samples": self.samples}


def write_outputs(
    pipeline: Pipeline, items: Iterator[Item], folder: Path, versions: Mapping[str, Any]
) -> list[Written]:
    """Writes the examples of all items, in order, to NAME.jsonl; each file is there whole or not at all.

    Args:
      pipeline: whose outputs are written.
      items: that went through all stages.
      folder: of the run.
      versions: what each example's provenance says besides what was done to its item.

    Raises:
      InputError: an output makes something else than objects, or a file cannot be written.
    """
    written = [Written(output.name) for output in pipeline.outputs]
    paths = [folder / f"{output.name}.jsonl" for output in pipeline.outputs]
    temporary = [temporary_name(path) for path in paths]
    # What a killed run left.
    for path in paths:
        for left in folder.glob(f".{path.name}.*.tmp"):
            left.unlink(missing_ok=True)
    files: list[TextIO] = []
    try:
        files = [path.open("w", encoding="utf-8") for path in temporary]
        for item in items:
            provenance = {**versions, "id": item.id, "sources": item.sources, "steps": item.steps}
            for output, one, file in zip(pipeline.outputs, written, files, strict=True):
                for row, text, line in _rows(output, item, provenance):
                    file.write(line + "\n")
                    one.rows += 1
                    one.lengths[max(1, _characters(row)).bit_length() - 1] += 1
                    if len(one.samples) < _SAMPLES:
                        one.samples.append(text[:_SHOWN])
        for file, name, path in zip(files, temporary, paths, strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(name, path)
    except OSError as error:
        raise InputError(
            f"Cannot write the outputs in {folder}: {error.strerror}. Make room or allow it, and run the same "
            "command again."
        ) from None
    finally:
        for file in files:
            file.close()
        for name in temporary:
            name.unlink(missing_ok=True)
    return written


def set_aside(folder: Path, names: Iterable[str]) -> list[str]:
    """Moves outputs of an earlier run into the folder "earlier", where they replace older ones; returns their names.

    Args:
      folder: of the run.
      names: of outputs, which need not be there.
    """
    there = [name for name in dict.fromkeys(names) if (folder / f"{name}.jsonl").exists()]
    if there:
        (folder / EARLIER).mkdir(exist_ok=True)
    for name in there:
        os.replace(folder / f"{name}.jsonl", folder / EARLIER / f"{name}.jsonl")
    return there


def _rows(output: Output, item: Item, provenance: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    """The rows of an item, as JSON without and with their provenance."""
    try:
        for row in output.rows(item):
            if not isinstance(row, Mapping):
                raise InputError(f"The output {output.name} made a {type(row).__name__}, expected an object.")
            yield row, to_json(dict(row)), to_json({**row, "provenance": provenance})
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"The output {output.name} failed on the item {item.id}: {type(error).__name__}: {error}. Mend it, and run "
            "the same command again; answers are kept."
        ) from error


def _characters(value: object) -> int:
    """Characters of all texts in a JSON value, but for names of fields."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(part) for key, part in value.items() if key != "role")
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0
