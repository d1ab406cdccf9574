"""What goes through the stages of a pipeline: an item with its data, where it comes from, and what was done to it."""

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_jax.files import to_json


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that becomes one or more examples, such as a problem with its samples. Stages return changed copies.

    Attributes:
      id: its name, the same in every run: random numbers and the seeds of requests are drawn from it. It is unique: a
        run leaves out an item of the source whose id came before.
      data: by field, as JSON values.
      sources: ids of the documents or records that it was made from.
      steps: what was done to it, in the order of the stages: requests, verdicts and notes, each with its stage.
    """

    id: str
    data: Mapping[str, Any]
    sources: tuple[str, ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()

    def __getitem__(self, field: str) -> Any:
        return self.data[field]

    def get(self, field: str, default: Any = None) -> Any:
        """The value of a field, or `default` where there is no such field."""
        return self.data.get(field, default)

    def update(self, **fields: Any) -> "Item":
        """A copy with these fields set."""
        return dataclasses.replace(self, data={**self.data, **fields})

    def without(self, *fields: str) -> "Item":
        """A copy without these fields."""
        return dataclasses.replace(self, data={k: v for k, v in self.data.items() if k not in fields})

    def split(self, parts: Iterable[Mapping[str, Any]]) -> "list[Item]":
        """An item for each part, with its fields set; its id is this one's with the part's number, from 0."""
        return [
            dataclasses.replace(self, id=f"{self.id}/{i}", data={**self.data, **part}) for i, part in enumerate(parts)
        ]

    def rng(self, *salt: object) -> random.Random:
        """Random numbers that depend on the id and the salt alone."""
        return random.Random(content_key("random", self.id, *map(str, salt)))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, for `from_json`."""
        return {"id": self.id, "data": self.data, "sources": self.sources, "steps": self.steps}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Item":
        """An item from the object of `to_json`."""
        return cls(value["id"], value["data"], tuple(value["sources"]), tuple(value["steps"]))


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A stage's result for an item that does not become data.

    Attributes:
      reason: a few words, the same for all items that are rejected for this reason; it is counted.
      detail: what is particular to the item.
    """

    reason: str
    detail: str = ""


def content_key(*values: object) -> str:
    """A hash of JSON values, in hexadecimal: equal for equal content, in any process."""
    text = to_json(values)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def make_item(data: Mapping[str, Any], sources: Sequence[str] = ()) -> Item:
    """An item that is named by its data: the same record gives the same id, and the same requests, wherever it stands.

    Args:
      data: by field, as JSON values. Items that are to be told apart differ here, such as by a number.
      sources: ids of what it was made from. They do not decide the id: files may be moved, and records change places.
    """
    return Item(content_key(dict(data))[:16], data, tuple(sources))
