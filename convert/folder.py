"""Checkpoint folders: finding one, telling its format, what travels along, and writing one whole or not at all."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json

Format = Literal["hf", "orbax"]

# Beside config.json. Everything here is data; code of a repository is never copied.
TRAVELLING = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.model",
    "qwen.tiktoken",
    "LICENSE",
)


def detect(path: str | os.PathLike[str]) -> Format:
    """Tells which format a checkpoint folder has.

    Returns:
      "hf" for safetensors in Hugging Face's layout, "orbax" for ours: `config.json` beside `params/`.

    Raises:
      InputError: neither, or no folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder. Expected a checkpoint folder.")
    if (path / "params").is_dir():
        return "orbax"
    if list(path.glob("*.safetensors")) or list(path.glob("*.safetensors.index.json")):
        return "hf"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return "hf"  # Reading it tells what is wrong with pickles.
    raise InputError(
        f"{path} holds no checkpoint: expected model.safetensors, model.safetensors.index.json or an Orbax folder "
        f"params/ in it; it has {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}."
    )


def check_destination(folder: Path) -> None:
    """Raises InputError unless `folder` does not exist or is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already. Give a new folder, or remove it first; nothing is overwritten.")
    if folder.is_symlink():
        raise InputError(f"{folder} is a symbolic link; a new folder cannot take its place. Give the folder itself.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{folder} cannot be made: {parent} is not a folder that can be written to.")


@contextlib.contextmanager
def new_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and disappears when it does not.

    Args:
      folder: must not exist, or be empty.
      needed_bytes: what will be written; checked against the free space.

    Raises:
      InputError: the destination is taken, or the disk is too small.
    """
    folder = Path(os.path.abspath(folder))
    check_destination(folder)
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise InputError(
            f"Writing {folder} needs {needed_bytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free. "
            "Make room or choose another disk."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        with ThreadPoolExecutor(4) as pool:  # Many files to wait for; the disk likes to be asked for several.
            list(pool.map(_sync, [temporary, *temporary.rglob("*")]))
        os.rename(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"The disk of {folder} is full. Nothing was left behind; make room and repeat.") from None
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_side_files(
    config: ModelConfig, dtype: str | None, origin: Path | None, folder: Path, both_dialects: bool
) -> None:
    """Writes config.json and copies the files that travel along.

    The original config.json is copied byte for byte where it still tells the truth, so that a round trip changes
    nothing. It is rewritten when the dtype changes, and, if `both_dialects`, when only transformers 5 would read it
    rightly: transformers 4 takes a RoPE base of 10,000 where it finds none at the top level.

    Args:
      config: the architecture.
      dtype: of the written weights, if it is not what the original config.json says.
      origin: folder of the original files, or None.
      folder: where to.
      both_dialects: whether transformers 4 must understand the result.
    """
    original = origin / "config.json" if origin else None
    old: dict[str, Any] = read_json(original) if original and original.is_file() else {}
    keep = bool(old) and dtype in (None, old.get("dtype") or old.get("torch_dtype"))
    if both_dialects:
        keep = keep and "rope_theta" in old
    if original and keep and dataclasses.replace(ModelConfig.from_hf(old), dtype=config.dtype) == config:
        shutil.copyfile(original, folder / "config.json")
    else:
        hf = {**config.to_hf(), "torch_dtype": dtype or config.dtype}
        if "pad_token_id" in old:
            hf["pad_token_id"] = old["pad_token_id"]
        (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TRAVELLING:
        if origin and (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
