"""Packs what a curation has kept into rows of tokens, a data set for each folder of its output."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.tokenizer import load_tokenizer
from train.curate.shards import MANIFEST, OUTPUT, ROWS
from train.data.build import BuildConfig, build
from train.files import write_file

_MADE_FROM = "made-from.json"
# The curation has decided how long a document may be: all that it has written are packed.
_MEGABYTES = 2048.0


def pack(
    folder: Path, tokenizer: Path, length: int, workers: int | None = None, console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """Builds `folder/rows/NAME` from `folder/output/NAME`, for each of them.

    Rows are kept while files, tokenizer and length stay the same, and are built anew otherwise. Those of a folder that
    the output has no more are removed.

    Args:
      folder: of a finished curation.
      tokenizer: its folder.
      length: tokens in a row.
      workers: processes; by default one a core.
      console: shows progress; by default standard error.

    Returns:
      Rows, tokens and the folder of each data set, by name.

    Raises:
      InputError: as `train.data.build.build`.
    """
    files: Mapping[str, Mapping[str, Any]] = read_json(folder / MANIFEST)["files"]
    fingerprint = load_tokenizer(tokenizer).fingerprint()
    names = sorted({file.partition("/")[0] for file in files})
    for note in (folder / ROWS).glob(f"*.{_MADE_FROM}"):
        if (name := note.name.removesuffix(f".{_MADE_FROM}")) not in names:
            shutil.rmtree(folder / ROWS / name, ignore_errors=True)
            note.unlink()
    made: dict[str, dict[str, Any]] = {}
    for name in names:
        of = {file: entry["sha256"] for file, entry in sorted(files.items()) if file.startswith(f"{name}/")}
        # A data set names its files by their paths.
        place = str((folder / OUTPUT).absolute())
        wanted = hashlib.sha256(json.dumps([of, place, fingerprint, length, _MEGABYTES]).encode()).hexdigest()
        rows, note = folder / ROWS / name, folder / ROWS / f"{name}.{_MADE_FROM}"
        if rows.exists() and (not note.is_file() or read_json(note).get("sha256") != wanted):
            if not note.is_file():
                raise InputError(f"{rows} was not made by this curation. Move it away.")
            shutil.rmtree(rows)
        rows.parent.mkdir(exist_ok=True)
        write_file(note, to_json({"sha256": wanted}).encode())
        config = BuildConfig(
            (str(folder / OUTPUT / name),),
            tokenizer,
            length,
            rows,
            domain=name,
            workers=workers,
            max_document_megabytes=_MEGABYTES,
            max_bad_lines=0,
            max_bad=0.0,
        )
        manifest = build(config, progress=console)
        made[name] = {"rows": manifest.rows, "tokens": manifest.tokens, "folder": str(rows)}
    return made
