"""`ExampleStore`: examples that are tokenized once, into a folder, and read from there by later starts.

A store is a folder that is named by a fingerprint of all that decides its content. Its files are little-endian:

    tokens.bin     uint32 [all tokens]        token id, plus 2**31 where the token is trained
    lengths.npy    int64 [examples, answers]  tokens of each example; of a pair, of the chosen and the rejected one
    trained.npy    int64 [examples, answers]  trained tokens, without a first one, which nothing predicts
    margins.npy    float32 [examples]         margins of pairs
    origins.npy    int64 [examples, 2]        index of the file, and number of the record in it
    store.json     kind, files and counts

It is written under another name first, and renamed when it is complete.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.trained import encode_parts
from train.data.examples import DEFAULTS, Example, ExampleOptions, Kind, Pair, RawExample, read_examples
from train.data.progress import BuildProgress
from train.data.shards import digest
from train.data.tables import find_tables, where
from train.files import write_file

TooLong = Literal["drop", "truncate", "error"]
_VERSION = 1
_TRAINED = np.uint32(1 << 31)
# Examples that are encoded together.
_TOGETHER = 256
# Examples that a message lists.
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """What a store holds.

    Attributes:
      kind: "sft" or "pairs".
      files: paths of the data files, as they were given.
      examples: number of examples or pairs.
      tokens: number of tokens.
      trained: number of trained tokens.
      unread: columns that were not read.
      literal: number of examples in which trained text has control tokens that are read as plain text.
    """

    kind: Kind
    files: tuple[str, ...]
    examples: int
    tokens: int
    trained: int
    unread: tuple[str, ...]
    literal: int

    def describe(self) -> str:
        """Sentences on the store, for people."""
        what = "pairs" if self.kind == "pairs" else "examples"
        lines = [f"{self.examples:,} {what} of {self.tokens:,} tokens, {self.trained:,} of them trained"]
        if self.unread:
            lines.append(f"columns that are not read: {', '.join(self.unread)}")
        if self.literal:
            lines.append(
                f"{self.literal:,} {what} have control tokens typed into trained text, such as <tool_call>, which are "
                "read as plain text: give calls as 'tool_calls', or set parse_special"
            )
        return "; ".join(lines)


class ExampleStore:
    """Tokenized examples in a folder, memory-mapped. `open_store` makes one.

    Attributes:
      folder: its folder.
      info: what it holds.
      fingerprint: sha256 (hex) of the data files, the tokenizer, the chat template and the options.
      lengths: int64 [examples, answers], tokens of each answer with its prompt; one answer for "sft", two for "pairs".
      trained: int64 [examples, answers], trained tokens.
      margins: float32 [examples].
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        """Opens a finished store.

        Args:
          folder: its folder.
          files: where the data files are now, for messages; by default, where they were.

        Raises:
          InputError: its files are missing, damaged or cut.
        """
        self.folder = folder
        try:
            saved = json.loads((folder / "store.json").read_bytes())
            self.fingerprint = str(saved.pop("fingerprint"))
            names = saved["files"] if files is None else map(str, files)
            self.info = StoreInfo(**{**saved, "files": tuple(names), "unread": tuple(saved["unread"])})
            self.lengths, self.trained, self.margins, self._origins = (
                np.load(folder / f"{name}.npy", allow_pickle=False)
                for name in ("lengths", "trained", "margins", "origins")
            )
            self._tokens = np.memmap(folder / "tokens.bin", "<u4", "r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder} is a damaged store of examples ({error}). Remove it, and start again."
            ) from None
        self._ends = np.cumsum(self.lengths.ravel())
        if self._ends[-1:].tolist() != [len(self._tokens)]:
            raise InputError(
                f"{folder / 'tokens.bin'} has {len(self._tokens)} tokens, expected {self._ends[-1:].sum()}. Remove "
                f"{folder}, and start again."
            )

    @property
    def kind(self) -> Kind:
        """ "sft" or "pairs"."""
        return self.info.kind

    def __len__(self) -> int:
        """Number of examples or pairs."""
        return len(self.lengths)

    @property
    def sources(self) -> np.ndarray:
        """int64 [examples], index in `info.files` of the file of each example."""
        return self._origins[:, 0]

    def answers(self, index: int) -> tuple[Example, ...]:
        """One example; of a pair, the chosen and the rejected one.

        Args:
          index: of the example or the pair.
        """
        count = self.lengths.shape[1]
        return tuple(self._answer(index * count + i) for i in range(count))

    def _answer(self, index: int) -> Example:
        end = int(self._ends[index])
        packed = np.asarray(self._tokens[end - int(self.lengths.flat[index]) : end])
        return Example((packed & ~_TRAINED).astype(np.int32), packed >= _TRAINED)

    def __getitem__(self, index: int) -> Example | Pair:
        """The example or the pair of an index."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        answers = self.answers(index)
        if len(answers) == 1:
            return answers[0]
        chosen, rejected = answers
        return Pair(chosen, rejected, float(self.margins[index]))

    def ending_with(self, token: int) -> np.ndarray:
        """int64, indices of the examples of which an answer ends with a token."""
        last = np.asarray(self._tokens[self._ends - 1]) & ~_TRAINED
        return np.flatnonzero((last == token).reshape(self.lengths.shape).any(axis=1))

    def where(self, index: int) -> str:
        """The file and the record of an example, for messages."""
        file, number = self._origins[index].tolist()
        return where(self.info.files[file], number)


def open_store(
    data: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    kind: Kind | None = None,
    options: ExampleOptions = DEFAULTS,
    progress: Console | None = None,
) -> ExampleStore:
    """Opens the store of data files in a folder of stores; tokenizes them first unless that was done before.

    Several processes may do so at the same time: the first that is finished wins, and all have the same content.

    Args:
      data: files, patterns or folders, as for `train.data.tables.find_tables`.
      tokenizer: of the model.
      folder: where stores are kept, each in a folder of its own.
      kind: which columns to read where the files have those of both; None takes what they have.
      options: how examples are tokenized.
      progress: console for a progress bar; None shows none.

    Raises:
      InputError: a file cannot be read, an example is malformed, or the store cannot be written.
    """
    files = find_tables(data)
    kind = kind or next(read_examples(files)).kind
    fingerprint = _fingerprint(files, tokenizer, kind, options)
    final = folder / fingerprint[:32]
    if not (final / "store.json").exists():
        # Hosts that share the folder may have processes of the same number.
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.mkdir(parents=True)
            _write(temporary, fingerprint, files, tokenizer, kind, options, progress)
            try:
                os.rename(temporary, final)
            except OSError:
                if not (final / "store.json").exists():  # Otherwise another process was faster.
                    raise
        except OSError as error:
            advice = "Make room" if error.errno in NO_ROOM else "Give another folder"
            raise InputError(f"Cannot write examples to {folder}: {error.strerror}. {advice}.") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ExampleStore(final, files)


def _fingerprint(files: Sequence[Path], tokenizer: Tokenizer, kind: Kind, options: ExampleOptions) -> str:
    contents = []
    for path in files:
        try:
            with path.open("rb") as file:
                contents.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    try:
        template = tokenizer.chat_template
        chat: Any = [template.sources, dict(template.special_tokens)]
    except InputError:  # Plain text needs none; conversations raise the error again.
        chat = None
    return digest(
        [_VERSION, tokenizer.fingerprint(), tokenizer.eos_id, chat, kind, dataclasses.asdict(options), contents]
    )


def _write(
    folder: Path,
    fingerprint: str,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    kind: Kind,
    options: ExampleOptions,
    progress: Console | None,
) -> None:
    lengths, trained, margins, origins = [], [], [], []
    unread: set[str] = set()
    literal = 0
    numbers = {path: i for i, path in enumerate(files)}
    total = sum(path.stat().st_size for path in files)
    quiet = progress or Console(quiet=True)
    with (folder / "tokens.bin").open("wb") as out, BuildProgress(quiet, len(files), 0, total, 0) as display:
        raw = read_examples(files, kind, display.advance, display.unit)
        for group in _groups(raw):
            parts = [example.parts(tokenizer, options) for example in group]
            encoded = iter(encode_parts(tokenizer, [answer for answers in parts for answer in answers]))
            for example, answers in zip(group, parts, strict=True):
                ids, masks = zip(*itertools.islice(encoded, len(answers)), strict=True)
                if not all(ids):
                    raise InputError(f"{example.row.where}: the example has no tokens. Leave it out.")
                if len(ids) == 2 and ids[0] == ids[1]:
                    raise InputError(
                        f"{example.row.where}: chosen and rejected are the same tokens once they are rendered, so "
                        "there is nothing to prefer. Leave the pair out."
                    )
                for tokens, mask in zip(ids, masks, strict=True):
                    packed = np.array(tokens, "<u4")
                    packed[np.array(mask)] |= _TRAINED
                    out.write(packed.tobytes())
                lengths.append([len(tokens) for tokens in ids])
                trained.append([sum(mask[1:]) for mask in masks])
                margins.append(example.margin)
                origins.append([numbers[example.row.path], example.row.number])
                unread |= example.unread
                literal += any(part.trained and part.literal for answer in answers for part in answer)
        out.flush()
        os.fsync(out.fileno())
    for name, values, dtype in (
        ("lengths", lengths, "<i8"),
        ("trained", trained, "<i8"),
        ("margins", margins, "<f4"),
        ("origins", origins, "<i8"),
    ):
        np.save(folder / f"{name}.npy", np.array(values, dtype))
    counts = len(lengths), int(np.sum(lengths)), int(np.sum(trained))
    info = StoreInfo(kind, tuple(map(str, files)), *counts, tuple(sorted(unread)), literal)
    write_file(folder / "store.json", json.dumps({"fingerprint": fingerprint, **dataclasses.asdict(info)}).encode())


def _groups(examples: Iterator[RawExample]) -> Iterator[list[RawExample]]:
    while group := list(itertools.islice(examples, _TOGETHER)):
        yield group


@dataclasses.dataclass(frozen=True)
class Selection:
    """The examples of a store that fit into rows of a length.

    Attributes:
      units: int64 [units], index of each example or pair.
      lengths: int64 [units, answers], tokens of each that are used.
      untrained: indices of examples that were left out because they train nothing; of pairs, also those whose answers
        are the same where they are cut.
      dropped: indices of examples that were left out because they are too long.
      truncated: indices of examples whose end was cut.
    """

    units: np.ndarray
    lengths: np.ndarray
    untrained: tuple[int, ...]
    dropped: tuple[int, ...]
    truncated: tuple[int, ...]

    def fingerprint(self) -> str:
        """A sha256 (hex) of which tokens of the store are used."""
        return hashlib.sha256(self.units.astype("<i8").tobytes() + self.lengths.astype("<i8").tobytes()).hexdigest()

    def describe(self, store: ExampleStore) -> str:
        """A line on the examples that are left out or cut; "" where there are none."""
        nothing = (
            "nothing in them is trained"
            if store.kind == "sft"
            else "an answer has nothing that is trained, or what fits of both answers is the same"
        )
        parts = []
        for indices, what in (
            (self.untrained, f"left out because {nothing}"),
            (self.dropped, "left out because they are longer than the row"),
            (self.truncated, "cut at the end of the row"),
        ):
            if indices:
                listed = "; ".join(map(store.where, indices[:_LISTED])) + ("; ..." if len(indices) > _LISTED else "")
                parts.append(f"{len(indices):,} of {len(store):,} examples are {what} ({listed})")
        return "; ".join(parts)


def select(
    store: ExampleStore, length: int, *, too_long: TooLong = "drop", units: np.ndarray | None = None
) -> Selection:
    """Chooses the examples of a store that fit into rows.

    Args:
      store: examples or pairs. A pair has to fit as a whole.
      length: tokens in a row.
      too_long: leave longer examples out; or cut their ends, of a pair that of the longer answer first; or raise.
      units: indices of the examples to choose from; by default all.

    Raises:
      InputError: an example is too long and that is to be an error, or no example is left.
    """
    units = np.arange(len(store)) if units is None else np.asarray(units, np.int64)
    lengths = store.lengths[units]
    long = lengths.sum(axis=1) > length
    if long.any() and too_long == "error":
        i = int(np.flatnonzero(long)[0])
        raise InputError(
            f"{store.where(int(units[i]))}: the example has {lengths[i].sum():,} tokens, and a row has {length:,}. Use "
            "longer rows, leave it out, or set too_long to drop or truncate."
        )
    dropped: tuple[int, ...] = ()
    trains = (store.trained[units] > 0).all(axis=1)
    if too_long == "truncate":
        for i in np.flatnonzero(long).tolist():
            lengths[i] = _cut(lengths[i], length)
            answers = list(zip(store.answers(int(units[i])), lengths[i].tolist(), strict=True))
            trains[i] = all(n > 0 and answer.trained[1:n].any() for answer, n in answers)
            # What is left of a pair may be the same of both.
            first, *others = (answer.ids[:n] for answer, n in answers)
            trains[i] &= not any(np.array_equal(first, other) for other in others)
        keep = trains
    else:
        dropped = tuple(units[long].tolist())
        keep = trains & ~long
    truncated = tuple(units[long & keep].tolist()) if too_long == "truncate" else ()
    untrained = tuple(units[~trains & (too_long == "truncate" or ~long)].tolist())
    selection = Selection(units[keep], lengths[keep], untrained, dropped, truncated)
    if not keep.any():
        raise InputError(
            f"No example is left for rows of {length:,} tokens: {selection.describe(store)}. Use longer rows "
            "(stages.0.length) or other data."
        )
    return selection


def _cut(lengths: np.ndarray, length: int) -> np.ndarray:
    """Cuts the longer of two answers until both fit together; a single one to the length."""
    if len(lengths) == 1:
        return np.array([length])
    half = length // 2
    a, b = lengths.tolist()
    return np.array([min(a, max(half, length - b)), min(b, max(length - half, length - a))])


def split(store: ExampleStore, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits a store into examples to train on and examples to hold out.

    Args:
      store: examples or pairs.
      held_out: fraction to hold out, above 0 and below 1; at least one example.
      seed: seed of the choice.

    Returns:
      Indices of the training examples and of the others, int64, ascending.

    Raises:
      InputError: a fraction out of range, or fewer than two examples.
    """
    if not 0 < held_out < 1 or len(store) < 2:
        raise InputError(
            f"expected a fraction above 0 and below 1 of at least 2 examples to hold out, got {held_out} of "
            f"{len(store)}."
        )
    count = min(max(round(held_out * len(store)), 1), len(store) - 1)
    order = np.argsort(random_keys(seed, 2**64 - 1, len(store)), kind="stable")
    return np.sort(order[count:]), np.sort(order[:count])


def random_keys(seed: int, epoch: int, count: int) -> np.ndarray:
    """Random uint64 numbers that are the same in every version of NumPy, to sort by.

    They are the raw stream of the Philox generator, which NumPy keeps, unlike what it derives from it (NEP 19).

    Args:
      seed: from 0 to 2**64 - 1.
      epoch: from 0 to 2**64 - 1.
      count: how many.
    """
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
