"""The files of a run: items in parts, each with a manifest, so that what is done is not done again."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.files import to_json
from train.files import write_file
from train.synthesize.item import Item, Rejected

# Characters of an item that a manifest shows, those of a reason, and how many reasons of a stage are counted.
_SHOWN, _REASON, _MOST_REASONS = 600, 200, 100
OTHER_REASONS = "other reasons (a stage gives too many; what is particular to an item belongs in its detail)"


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
        reason = self._reject(lost.stage, printable(lost.why.reason, _REASON), 1)
        shown = self.shown.setdefault(lost.stage, {}).setdefault(reason, [])
        if not shown:
            text = to_json(dict(lost.item.data))[:_SHOWN]
            shown.append({"id": lost.item.id, "detail": printable(lost.why.detail, _SHOWN), "data": text})

    def add(self, other: "Counts", most_shown: int = 3) -> None:
        """Adds the counts of another part, and as many items as are shown."""
        self.entered += other.entered
        self.left += other.left
        for stage, reasons in other.rejected.items():
            for reason, count in reasons.items():
                self._reject(stage, reason, count)
        for name, kinds in other.audits.items():
            mine = self.audits.setdefault(name, {"right": [0, 0], "wrong": [0, 0]})
            for kind, (count, passed) in kinds.items():
                mine[kind] = [mine[kind][0] + count, mine[kind][1] + passed]
        for stage, reasons_shown in other.shown.items():
            known = self.shown.setdefault(stage, {})
            for reason, items in reasons_shown.items():
                name = reason if reason in self.rejected[stage] else OTHER_REASONS
                known[name] = (known.get(name, []) + items)[:most_shown]

    def _reject(self, stage: str, reason: str, count: int) -> str:
        """Counts rejected items, and returns the name that they are counted under: reasons are not without number."""
        reasons = self.rejected.setdefault(stage, Counter())
        name = reason if reason in reasons or len(reasons) < _MOST_REASONS else OTHER_REASONS
        reasons[name] += count
        return name

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
        """The counts of a part, if it was made by this signature: of the stages, and of what went in.

        A part whose files are missing or were changed by others is as one that was never made.
        """
        manifest = self._manifest(number)
        if manifest is None or manifest["signature"] != signature:
            return None
        for suffix in (".jsonl", ".rejected.jsonl"):
            try:
                with self._path(number, suffix).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != manifest["files"][suffix]:
                        return None
            except (FileNotFoundError, KeyError):
                return None
        return Counts.from_json(manifest["counts"])

    def signature(self, number: int) -> str | None:
        """The signature of a part that is there."""
        manifest = self._manifest(number)
        return str(manifest["signature"]) if manifest else None

    def write(self, number: int, signature: str, kept: Sequence[Item], lost: Sequence[Lost], counts: Counts) -> None:
        """Writes a part; its manifest says from then on that it is done."""
        rejected = (
            {"stage": one.stage, "reason": one.why.reason, "detail": one.why.detail, **one.item.to_json()}
            for one in lost
        )
        files = {".jsonl": _lines(item.to_json() for item in kept), ".rejected.jsonl": _lines(rejected)}
        self._path(number, ".json").unlink(missing_ok=True)
        for suffix, content in files.items():
            write_file(self._path(number, suffix), content)
        manifest = {
            "signature": signature,
            "kept": len(kept),
            "rejected": len(lost),
            "files": {suffix: hashlib.sha256(content).hexdigest() for suffix, content in files.items()},
            "counts": counts.to_json(),
        }
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
            manifest = json.loads(self._path(number, ".json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) and {"signature", "files", "counts"} <= manifest.keys() else None

    def _path(self, number: int, suffix: str) -> Path:
        return self._folder / f"{number:06d}{suffix}"


def printable(text: str, most: int) -> str:
    """The beginning of a text. Halves of surrogate pairs, which no page or terminal takes, become question marks."""
    return text[:most].encode("utf-8", "replace").decode()


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(to_json(record) + "\n" for record in records).encode("utf-8", "surrogatepass")
