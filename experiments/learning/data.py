"""The text of a Python installation as packed rows: sources and documentation of the standard library and all packages.

    python -m experiments.learning.data --folder learning-run

Files of 200 bytes to 1 MB that are UTF-8 text, each text once, in a seeded order up to `--megabytes`. Some 4 MB of
documents, at most a twentieth, are held out; neither the tokenizer (trained on a part of the others) nor the training
rows see them. What was used is in `data.json`: the text differs from one installation to the next, so compare only runs
on the same rows.
"""

import argparse
import hashlib
import json
import os
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np

from experiments.learning.small import LENGTH, VOCAB_SIZE
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import train_bpe
from train.data.build import BuildConfig, build
from train.data.text import find_files, read_documents, split_documents

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
_HELD_OUT_BYTES, _TOKENIZER_BYTES = 4_000_000, 20_000_000
# Files of JSON lines, which the builder's processes share out among them.
_PARTS = 16


def find_text(max_bytes: int, seed: int, folders: list[str] | None = None) -> list[str]:
    """Distinct texts, in a seeded order.

    Args:
      max_bytes: of all together, about.
      seed: of the order.
      folders: where to look, by default in the standard library and the installed packages.
    """
    folders = folders or sorted({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    files = [
        path for path in find_files(folders) if path.suffix in SUFFIXES and 200 <= path.stat().st_size <= 1_000_000
    ]
    order = np.random.default_rng(seed).permutation(len(files))
    texts = read_documents([files[i] for i in order], max_bytes).texts
    return list({hashlib.sha256(text.encode()).digest(): text for text in texts}.values())


def make(
    folder: Path,
    max_megabytes: float,
    folders: list[str] | None = None,
    workers: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    length: int = LENGTH,
    held_out_megabytes: float = _HELD_OUT_BYTES / 1e6,
) -> dict:
    """Tokenizer, training rows and held-out rows.

    Args:
      folder: of the experiment.
      max_megabytes: text to read at most.
      folders: where to look for it; see `find_text`.
      workers: processes that tokenize; by default one for each core.
      vocab_size: of the tokenizer.
      length: of a row, in tokens.
      held_out_megabytes: text that is held out, at most a twentieth.

    Returns:
      The content of `data.json`.

    Raises:
      InputError: the folder has data already, or the text is too little.
    """
    if (folder / "data.json").exists():
        raise InputError(f"{folder} has data already. Use it as it is, or give another folder.")
    begin = time.perf_counter()
    texts = find_text(int(max_megabytes * 1e6), 0, folders)
    num_bytes = sum(len(text.encode()) for text in texts)
    training, held_out = split_documents(texts, min(held_out_megabytes * 1e6 / num_bytes, 0.05), 0)
    seen = np.cumsum([len(text) for text in training])
    tokenizer = train_bpe(training[: int(np.searchsorted(seen, _TOKENIZER_BYTES)) + 1], vocab_size)
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"The text gives a tokenizer of {tokenizer.vocab_size} ids, the model has {vocab_size}. Give more text."
        )
    tokenizer.save(folder / "tokenizer")
    about = {
        "bytes": num_bytes,
        "documents": len(texts),
        "python": platform.python_version(),
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
    }
    for name, documents in (("train", training), ("held-out", held_out)):
        source = folder / "text" / name
        source.mkdir(parents=True, exist_ok=True)  # Of a run that was interrupted: the text is the same.
        for part in range(_PARTS):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents[part::_PARTS])
            if lines:
                (source / f"{part:02d}.jsonl").write_text(lines, encoding="utf-8")
        config = BuildConfig(
            (str(source),), folder / "tokenizer", length, folder / name, workers=workers, unit_megabytes=8
        )
        manifest = build(config)
        about[name] = {
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "rows": manifest.rows,
            "padding": manifest.padding,
            "fingerprint": manifest.fingerprint,
        }
    about["seconds"] = round(time.perf_counter() - begin, 1)
    temporary = folder / "data.json.tmp"
    temporary.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(temporary, folder / "data.json")
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("learning-run"))
    parser.add_argument("--megabytes", type=float, default=300, help="text to read at most")
    parser.add_argument("--text", nargs="+", help="folders to take the text from instead")
    parser.add_argument("--workers", type=int, help="processes that tokenize; by default one for each core")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="ids of the tokenizer")
    parser.add_argument("--length", type=int, default=LENGTH, help="of a row, in tokens")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(make(args.folder, args.megabytes, args.text, args.workers, args.vocab_size, args.length)))


if __name__ == "__main__":
    main()
