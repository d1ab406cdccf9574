"""What people say of pairs of answers: labels in a file that survives a crash, who sees what, and what they decide."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import threading
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.files import append_record, read_records, write_file
from train.synthesize.review_pairs import ReviewFile, ReviewPair

# What preferences are judged by (Qwen2.5 Technical Report, section 4.3), and what each asks.
CRITERIA = {
    "truthfulness": "True, and faithful to what the prompt gives; nothing is made up.",
    "helpfulness": "Does what was asked, and is useful to who asked.",
    "conciseness": "Says it without padding or repetition.",
    "relevance": "All of it belongs to the prompt and the conversation.",
    "harmlessness": "Leaves out what is dangerous, illegal or hurtful.",
    "debiasing": "Treats people alike, whatever their gender, origin, belief or politics.",
}
OVERALL = "overall"
# All that is asked of a pair.
QUESTIONS = (*CRITERIA, OVERALL)
Choice = Literal["left", "tie", "right"]
_CHOICES = ("left", "tie", "right")
_NAME_CHARACTERS, COMMENT_CHARACTERS, _MOST_SECONDS = 64, 4000, 10**9


@dataclasses.dataclass(frozen=True)
class Label:
    """What a labeller says of a pair.

    Attributes:
      key: of the pair.
      labeller: their name.
      left: id of the answer that was shown on the left.
      right: id of the answer that was shown on the right.
      overall: which is better, or None where the pair was skipped.
      criteria: which is better by each criterion; empty where the pair was skipped.
      comment: free text.
      seconds: that the pair was looked at.
      date: ISO 8601, in UTC.
    """

    key: str
    labeller: str
    left: str
    right: str
    overall: Choice | None
    criteria: Mapping[str, Choice]
    comment: str
    seconds: float
    date: str

    def choice(self, question: str) -> Choice | None:
        """The answer to a question of `QUESTIONS`; None where the pair was skipped."""
        return self.overall if question == OVERALL else self.criteria.get(question)

    def preferred(self, question: str) -> str | None:
        """The id of the answer that is better; None for a tie and where the pair was skipped."""
        return {"left": self.left, "right": self.right}.get(self.choice(question) or "tie")

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Label":
        """Checks an object and makes a label of it.

        Raises:
          InputError: a field is missing, unknown or malformed.
        """
        names = [field.name for field in dataclasses.fields(Label)]
        for name in values:
            if name not in names:
                raise InputError(f"unknown field {name!r:.60}, expected {', '.join(names)}.")
        for name in ("key", "left", "right", "comment", "date"):
            if not isinstance(values.get(name), str):
                raise InputError(f"expected {name!r} as text, got {values.get(name)!r:.60}.")
        overall, criteria, seconds = values.get("overall"), values.get("criteria"), values.get("seconds")
        if overall is not None and overall not in _CHOICES:
            raise InputError(f"expected 'overall' as left, tie, right, or null to skip the pair, got {overall!r:.60}.")
        if not isinstance(criteria, Mapping) or set(criteria) - set(CRITERIA):
            raise InputError(f"expected 'criteria' as an object with {', '.join(CRITERIA)}, got {criteria!r:.200}.")
        if overall is None and criteria:
            raise InputError("expected no criteria where 'overall' is null: the pair is skipped.")
        for name in CRITERIA if overall is not None else ():
            if criteria.get(name) not in _CHOICES:
                raise InputError(f"expected {name!r} as left, tie or right, got {criteria.get(name)!r:.60}.")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= _MOST_SECONDS:
            raise InputError(f"expected 'seconds' as a number from 0 to {_MOST_SECONDS:,}, got {seconds!r:.60}.")
        if len(values["comment"]) > COMMENT_CHARACTERS:
            raise InputError(
                f"expected a comment of at most {COMMENT_CHARACTERS:,} characters, got {len(values['comment']):,}. "
                "Shorten it."
            )
        checked = {"labeller": labeller_name(values.get("labeller")), "seconds": float(seconds)}
        return Label(**{**values, **checked})


def labeller_name(value: object) -> str:
    """A labeller's name, without white space around it, so that equal names are equal texts.

    Raises:
      InputError: it is empty, too long, or has characters that cannot be printed.
    """
    if isinstance(value, str):
        name = unicodedata.normalize("NFC", value).strip()
        if name and len(name) <= _NAME_CHARACTERS and name.isprintable():
            return name
    raise InputError(
        f"expected the labeller's name as 1 to {_NAME_CHARACTERS} printable characters, got {value!r:.100}."
    )


class Labels:
    """The file of labels: a JSON object a line, in the order they were given. The newest of a labeller and pair counts.

    Several threads, and several processes on one machine, may add to it.
    """

    def __init__(self, path: Path):
        """
        Args:
          path: of the file, which need not exist.

        Raises:
          InputError: the file cannot be read, or holds something else.
        """
        self.path = path
        self._lock = threading.Lock()
        self._size, self._warn = -1, True
        self._newest: dict[tuple[str, str], Label] = {}
        self.newest()

    def newest(self) -> dict[tuple[str, str], Label]:
        """The labels that count, by labeller and key of the pair.

        Raises:
          InputError: as `Labels`.
        """
        with self._lock:
            try:
                size = self._file_size()
                if size != self._size:
                    self._newest = self._read() if size else {}
                    self._size = size
            except OSError as error:
                raise InputError(f"{self.path} cannot be read: {error.strerror}. Give another file.") from None
            return dict(self._newest)

    def _read(self) -> dict[tuple[str, str], Label]:
        newest: dict[tuple[str, str], Label] = {}
        records = read_records(self.path, "key", warn=self._warn)
        self._warn = False
        if not records and _is_json(self.path):
            raise InputError(f"{self.path} holds no labels. Give another file as --labels; this one is left as it is.")
        for record in records:
            try:
                label = Label.from_json(record)
            except InputError as error:
                raise InputError(
                    f"{self.path}, the label of {record.get('labeller')!r:.60} with the key {record['key']!r:.60}: "
                    f"{error} Correct it or remove its line."
                ) from None
            newest[label.labeller, label.key] = label
        return newest

    def add(self, label: Label) -> None:
        """Appends a label. It is in the file once this returns.

        Raises:
          InputError: the file cannot be written.
        """
        with self._lock:
            try:
                before = self._file_size()
                append_record(self.path, label.to_json())
                added = self._file_size() - before
            except OSError as error:
                raise InputError(
                    f"The label is not saved: {self.path} cannot be written: {error.strerror}. Mend that and save "
                    "again."
                ) from None
            # Nothing is read again unless another process has written, too. A line end may come before a cut line.
            if before == self._size and added - len(to_json(label.to_json())) in (1, 2):
                self._newest[label.labeller, label.key] = label
                self._size += added

    def _file_size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def check_writable(self) -> None:
        """Raises InputError unless labels can be added. The file is made if need be."""
        try:
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise InputError(
                f"Labels cannot be written to {self.path}: {error.strerror}. Give another file as --labels."
            ) from None


def _is_json(path: Path) -> bool:
    """Whether the first line is whole JSON: then the file is of another kind, and not the rest of a crash."""
    with path.open("rb") as file, contextlib.suppress(ValueError, RecursionError):
        json.loads(file.readline())
        return True
    return False


def left_and_right(pair: ReviewPair, labeller: str, seed: int) -> tuple[str, str]:
    """The ids of the answers in the order in which a labeller sees them: random, and always the same.

    The order depends on the content of the answers, not on which of them the file calls chosen.

    Args:
      pair: to be shown.
      labeller: who sees it.
      seed: of the review.
    """
    first, second = sorted(pair.ids)
    drawn = hashlib.sha256(json.dumps([seed, labeller, pair.key]).encode()).digest()[0] & 1
    return (second, first) if drawn else (first, second)


class Review:
    """A file of pairs and the labels of those who review it. Several threads may use it.

    Attributes:
      pairs: that are labelled.
      labels: what was said of them.
      seed: of the order in which answers are shown.
    """

    def __init__(self, pairs: Sequence[ReviewPair], labels: Labels, seed: int = 0):
        """
        Args:
          pairs: with different keys.
          labels: the file to which labels are added.
          seed: of the order in which answers are shown.
        """
        self.pairs, self.labels, self.seed = pairs, labels, seed
        self._by_key = {pair.key: pair for pair in pairs}

    def progress(self, labeller: str) -> dict[str, int]:
        """Numbers of pairs: all, labelled, skipped, and left."""
        newest = self.labels.newest()
        mine = [newest.get((labeller, pair.key)) for pair in self.pairs]
        skipped = sum(label is not None and label.overall is None for label in mine)
        left = mine.count(None)
        return {"pairs": len(mine), "labelled": len(mine) - left - skipped, "skipped": skipped, "left": left}

    def next_open(self, labeller: str, after: int = -1) -> int | None:
        """The first pair after this one, or else the first of all, that a labeller has neither labelled nor skipped."""
        newest = self.labels.newest()
        numbers = [*range(after + 1, len(self.pairs)), *range(after + 1)]
        return next((at for at in numbers if (labeller, self.pairs[at].key) not in newest), None)

    def show(self, labeller: str, at: int) -> dict[str, Any]:
        """A pair as a labeller sees it; nothing in it tells which answer the file prefers.

        Args:
          labeller: who sees it.
          at: number of the pair, from 0.

        Raises:
          InputError: there is no such pair.
        """
        if not 0 <= at < len(self.pairs):
            raise InputError(f"expected a pair from 0 to {len(self.pairs) - 1}, got {at}.")
        pair = self.pairs[at]
        label = self.labels.newest().get((labeller, pair.key))
        left, right = left_and_right(pair, labeller, self.seed)
        given = None
        if label is not None:
            # With another seed the sides are others than when the label was given.
            sides = {left: "left", right: "right", None: "tie"}
            choices = {name: sides[label.preferred(name)] for name in QUESTIONS if label.choice(name) is not None}
            given = {"choices": choices, "comment": label.comment}
        return {
            "at": at,
            "key": pair.key,
            "prompt": pair.prompt_blocks(),
            "left": {"id": left, "blocks": pair.answer_blocks(left)},
            "right": {"id": right, "blocks": pair.answer_blocks(right)},
            "label": given,
        }

    def add(self, values: Mapping[str, Any]) -> Label:
        """Checks what a labeller said of a pair, and keeps it with the date.

        Args:
          values: the fields of `Label` but for the date.

        Raises:
          InputError: a field is missing, unknown or malformed, there is no such pair, or the label cannot be written.
        """
        if "date" in values:
            raise InputError("unknown field 'date'; the server sets it.")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        label = Label.from_json({**values, "date": now})
        pair = self._by_key.get(label.key)
        if pair is None:
            raise InputError(f"there is no pair with the key {label.key!r:.60}. Reload the page.")
        if sorted((label.left, label.right)) != sorted(pair.ids):
            raise InputError(f"'left' and 'right' are not the ids of the answers of {label.key}. Reload the page.")
        self.labels.add(label)
        return label


@dataclasses.dataclass(frozen=True)
class Exported:
    """How many pairs were written, and why others were not.

    Attributes:
      written: pairs that are preferred by more than half of their labels.
      turned: of these, pairs of which the file preferred the other answer.
      tie: pairs that more than half call a tie.
      divided: pairs without such a majority.
      too_few: pairs with fewer labels than asked for.
    """

    written: int
    turned: int
    tie: int
    divided: int
    too_few: int

    def text(self) -> str:
        """The numbers in words."""
        return (
            f"{self.written:,} pairs, {self.turned:,} of them against the file's own preference (left out: "
            f"{self.tie:,} ties, {self.divided:,} without a majority, {self.too_few:,} with too few labels)"
        )


def export(review: Review, path: Path, min_labels: int = 1) -> Exported:
    """Writes the pairs that people decided, with the preferred answer as chosen and all labels as the column `labels`.

    An answer wins if more than half of the labels prefer it overall; skipped pairs have no label. Other columns are
    kept.

    Args:
      review: pairs and labels.
      path: of JSON lines as `train.data.examples` reads them; it is there whole or not at all.
      min_labels: pairs with fewer labels are left out.

    Raises:
      InputError: no pair is decided, the file cannot be written, or a column cannot.
    """
    if min_labels < 1:
        raise InputError(f"min-labels must be at least 1, got {min_labels}.")
    labels: dict[str, list[Label]] = {}
    for (_, key), label in review.labels.newest().items():
        if label.overall is not None:
            labels.setdefault(key, []).append(label)
    counts: Counter[str] = Counter()
    lines = []
    for pair in review.pairs:
        given = labels.get(pair.key, [])
        if len(given) < min_labels:
            counts["too_few"] += 1
            continue
        winner, votes = Counter(label.preferred(OVERALL) for label in given).most_common(1)[0]
        if 2 * votes <= len(given) or winner is None:
            counts["divided" if 2 * votes <= len(given) else "tie"] += 1
            continue
        counts["written"] += 1
        counts["turned"] += pair.ranked and winner != pair.ids[0]
        if "labels" in pair.extra:
            raise InputError("The file has a column 'labels', which the export writes. Rename it in the file.")
        row = {**pair.to_row(winner), "labels": [_provenance(label, winner) for label in given]}
        lines.append(to_json(row, default=_plain) + "\n")
    if not lines:
        raise InputError(
            f"No pair is decided by more than half of at least {min_labels} labels, so there is nothing to write to "
            f"{path}. Label more pairs first."
        )
    try:
        write_file(path, "".join(lines).encode())
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Give another file.") from None
    return Exported(*(counts[field.name] for field in dataclasses.fields(Exported)))


def _provenance(label: Label, winner: str) -> dict[str, Any]:
    """A label in a file of pairs, in words of the pair."""
    words = {winner: "chosen", None: "tie"}
    return {
        "labeller": label.labeller,
        OVERALL: words.get(label.preferred(OVERALL), "rejected"),
        "criteria": {name: words.get(label.preferred(name), "rejected") for name in CRITERIA},
        "comment": label.comment,
        "seconds": label.seconds,
        "date": label.date,
    }


def _plain(value: Any) -> str:
    """Dates of Parquet as text."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise InputError(f"A column holds a {type(value).__name__}, which JSON does not have. Leave the column out.")


def default_labels(path: str | Path) -> Path:
    """The file of labels beside a file or folder of pairs."""
    whole = Path(os.path.abspath(Path(path).expanduser()))
    return whole.with_name(f"{whole.name}.labels.jsonl")


def open_labels(path: Path, file: ReviewFile) -> Labels:
    """Opens the file of labels.

    Args:
      path: of the labels.
      file: what is labelled.

    Raises:
      InputError: it is the file of pairs itself, or not a file of labels.
    """
    if any(path.exists() and path.samefile(one) for one in file.files):
        raise InputError(f"{path} is the file that is labelled. Give another file as --labels.")
    return Labels(path)
