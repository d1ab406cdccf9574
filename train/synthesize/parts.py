"""The files of a run: items in parts, each with a manifest, so that what is done is not done again."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.files import to_json
from train.files import write_file
from train.synthesize.item import Item, Rejected

# Characters of an item that a manifest shows.
_SHOWN = 600


@dataclasses.dataclass(frozen=True)
class Lost:
    """An item that a stage rejected.

    Attributes:
      item: as it came into the stage, with what was done to it there.
      stage: its name.
      why: the stage's result.
    """

    item: Item
    stage: str
    why: Rejected


@dataclasses.dataclass
class Counts:
    """What happened to items, by stage. Counts of parts are added.

    Attributes:
      entered: items that came into a stage.
      left: items that came out of it.
      rejected: by stage and reason.
      audits: by check and whether the answer was right: verdicts, and those that let it pass.
      shown: by stage and reason: some of the items, shortened, for the report.
    """

    entered: Counter[str] = dataclasses.field(default_factory=Counter)
    left: Counter[str] = dataclasses.field(default_factory=Counter)
    rejected: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    audits: dict[str, dict[str, list[int]]] = dataclasses.field(default_factory=dict)
    shown: dict[str, dict[str, list[dict[str, str]]]] = dataclasses.field(default_factory=dict)

    def audit(self, name: str, expected: bool, passed: bool) -> None:
        """Counts the verdict of a check on an answer that is known to be right or wrong."""
        kinds = self.audits.setdefault(name, {"right": [0, 0], "wrong": [0, 0]})
        counts = kinds["right" if expected else "wrong"]
        counts[0] += 1
        counts[1] += passed

    def lose(self, lost: Lost) -> None:
        """Counts a rejected item, and shows the first one of each reason."""
        self.rejected.setdefault(lost.stage, Counter())[lost.why.reason] += 1
        shown = self.shown.setdefault(lost.stage, {}).setdefault(lost.why.reason, [])
        if not shown:
            text = to_json(dict(lost.item.data))[:_SHOWN]
            shown.append({"id": lost.item.id, "detail": lost.why.detail[:_SHOWN], "data": text})

    def add(self, other: "Counts", most_shown: int = 3) -> None:
        """Adds the counts of another part, and as many items as are shown."""
        self.entered += other.entered
        self.left += other.left
        for stage, reasons in other.rejected.items():
            self.rejected.setdefault(stage, Counter()).update(reasons)
        for name, kinds in other.audits.items():
            mine = self.audits.setdefault(name, {"right": [0, 0], "wrong": [0, 0]})
            for kind, (count, passed) in kinds.items():
                mine[kind] = [mine[kind][0] + count, mine[kind][1] + passed]
        for stage, reasons_shown in other.shown.items():
            known = self.shown.setdefault(stage, {})
            for reason, items in reasons_shown.items():
                known[reason] = (known.get(reason, []) + items)[:most_shown]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, for `from_json`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Counts":
        """Counts from the object of `to_json`."""
        rejected = {stage: Counter(reasons) for stage, reasons in value["rejected"].items()}
        return cls(
            Counter(value["entered"]), Counter(value["left"]), rejected, dict(value["audits"]), dict(value["shown"])
        )


class Parts:
    """The parts that one or more stages have made, in a folder.

    A part is a file of the items that went on, one of those that were rejected, and a manifest, which is written last.
    """

    def __init__(self, folder: Path):
        """
        Args:
          folder: is made if need be. What a killed run left half-written in it is removed.
        """
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.tmp"):
            path.unlink()

    def done(self, number: int, signature: str) -> Counts | None:
        """The counts of a part, if it was made by this signature: of the stages, and of what went in."""
        manifest = self._manifest(number)
        return Counts.from_json(manifest["counts"]) if manifest and manifest["signature"] == signature else None

    def signature(self, number: int) -> str | None:
        """The signature of a part that is there."""
        manifest = self._manifest(number)
        return str(manifest["signature"]) if manifest else None

    def write(self, number: int, signature: str, kept: Sequence[Item], lost: Sequence[Lost], counts: Counts) -> None:
        """Writes a part; its manifest says from then on that it is done."""
        self._path(number, ".json").unlink(missing_ok=True)
        write_file(self._path(number, ".jsonl"), _lines(item.to_json() for item in kept))
        rejected = (
            {"stage": one.stage, "reason": one.why.reason, "detail": one.why.detail, **one.item.to_json()}
            for one in lost
        )
        write_file(self._path(number, ".rejected.jsonl"), _lines(rejected))
        manifest = {"signature": signature, "kept": len(kept), "rejected": len(lost), "counts": counts.to_json()}
        write_file(self._path(number, ".json"), to_json(manifest, indent=1).encode())

    def items(self, count: int) -> Iterator[Item]:
        """The items of the first `count` parts that went on, in order."""
        for number in range(count):
            with self._path(number, ".jsonl").open(encoding="utf-8") as file:
                for line in file:
                    yield Item.from_json(json.loads(line))

    def drop_after(self, count: int) -> None:
        """Removes the parts of an earlier run beyond the first `count`."""
        for path in self._folder.glob("*.json*"):
            if path.name[:6].isdigit() and int(path.name[:6]) >= count:
                path.unlink()

    def _manifest(self, number: int) -> dict[str, Any] | None:
        try:
            manifest: dict[str, Any] = json.loads(self._path(number, ".json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return manifest

    def _path(self, number: int, suffix: str) -> Path:
        return self._folder / f"{number:06d}{suffix}"


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(to_json(record) + "\n" for record in records).encode("utf-8", "surrogatepass")
