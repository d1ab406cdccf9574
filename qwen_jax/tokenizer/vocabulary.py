"""The published forms of a byte-level vocabulary: vocab.json with merges.txt, and tiktoken ranks."""

import base64
import binascii
import json
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.files import read_bytes, read_json_object, read_text

Vocab = dict[str, int]
Merges = list[tuple[str, str]]


def _byte_characters() -> list[str]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
_CHARACTER_OF = dict(enumerate(BYTE_CHARACTERS))


def to_characters(token: bytes) -> str:
    """Write bytes in the byte-level alphabet that vocab.json uses."""
    return token.decode("latin-1").translate(_CHARACTER_OF)


def to_bytes(token: str) -> bytes:
    """Invert `to_characters`; a token with a character outside the alphabet stands for its own UTF-8 text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def check_vocab(vocab: Vocab, source: Path) -> None:
    """Raise InputError unless the ids are 0 to n - 1, each once, and every byte has a token."""
    if any(type(i) is not int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise InputError(f"{source}: the ids must be 0 to {len(vocab) - 1}, each once. The file is damaged or cut.")
    missing = [byte for byte, character in enumerate(BYTE_CHARACTERS) if character not in vocab]
    if missing:
        # The engine would drop such bytes from a text without a word.
        raise InputError(f"{source}: not a byte-level vocabulary, {len(missing)} bytes have no token: {missing[:8]}")


def read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> tuple[Vocab, Merges]:
    """Read vocab.json (token to id) and merges.txt (one pair on each line, best first, after an optional `#version`).

    Raises InputError where a file is damaged or the two do not belong together.
    """
    vocab = read_json_object(vocab_path)
    check_vocab(vocab, vocab_path)
    merges: Merges = []
    for number, line in enumerate(read_text(merges_path).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.removesuffix("\r").partition(" ")
        for part in (left, right, left + right):
            if part not in vocab or not part:
                raise InputError(
                    f"{merges_path}, line {number}: expected two tokens of {vocab_path.name} with a space between "
                    f"and their join in it, too, got {line!r}. The two files must come from one tokenizer."
                )
        merges.append((left, right))
    return vocab, merges


def read_tiktoken(path: Path) -> tuple[Vocab, Merges]:
    """Read a tiktoken ranks file (a base64 token and its rank on each line) and derive the merges from the ranks.

    Raises InputError where the file is damaged.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{path}, line {number}: expected a base64 token, a space and its rank, got {line[:80]!r}. "
                "The file is damaged; fetch it again."
            ) from None
    vocab = {to_characters(token): rank for token, rank in ranks.items()}
    check_vocab(vocab, path)
    return dict(sorted(vocab.items(), key=lambda entry: entry[1])), derive_merges(ranks, path)


def derive_merges(ranks: dict[bytes, int], source: Path) -> Merges:
    """Return the merges that a table of ranks implies.

    A token of rank r was made by joining the two parts that BPE reaches with the ranks below r. Raises InputError where
    they are not two.
    """
    merges: Merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        # The rank of each neighbouring pair. A rank that is not below `rank` means "no such token yet".
        pairs = [ranks.get(token[i : i + 2], rank) for i in range(len(token) - 1)]
        while len(parts) > 2 and (best := min(pairs)) < rank:
            i = pairs.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del pairs[i]
            for j in (i - 1, i):
                if 0 <= j < len(pairs):
                    pairs[j] = ranks.get(parts[j] + parts[j + 1], rank)
        if len(parts) != 2 or ranks.get(parts[0], rank) >= rank or ranks.get(parts[1], rank) >= rank:
            raise InputError(
                f"{source}: the token {token!r} of rank {rank} does not follow from the ranks below it. "
                "The file is damaged or its lines were reordered; fetch it again."
            )
        merges.append((to_characters(parts[0]), to_characters(parts[1])))
    return merges


def vocab_json(vocab: Vocab) -> str:
    """Return vocab.json as Qwen publishes it: compact, in the order of ids."""
    ordered = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def merges_txt(merges: Merges) -> str:
    """Return merges.txt as Qwen2.5 publishes it: one pair on each line, no version line."""
    return "".join([f"{left} {right}\n" for left, right in merges])
