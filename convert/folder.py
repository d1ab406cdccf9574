"""Checkpoint folders: detecting the format, copying the small files, and writing a folder atomically."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from qwen_jax.config import ModelConfig, adapter_problem, load_config
from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.files import read_json, to_json, why_unusable
from qwen_jax.gguf.header import is_gguf, read_header
from qwen_jax.hub import TOKENIZER, has_vocabulary
from qwen_jax.inference.settings import end_ids_of
from qwen_jax.units import binary_size

Format = Literal["hf", "orbax", "gguf"]
PICKLES = (".bin", ".pt", ".pth")

# Copied along with config.json. All of them are data; code in a checkpoint folder is never copied.
SIDE_FILES = ("generation_config.json", *TOKENIZER, "LICENSE")


def detect(path: str | os.PathLike[str]) -> Format:
    """Tells which format a checkpoint has.

    Returns:
      "hf" for a folder with safetensors in Hugging Face's layout, "orbax" for one with `config.json` beside an Orbax
      checkpoint `params/`, "gguf" for a GGUF file.

    Raises:
      InputError: none of these, an adapter, or no folder.
    """
    path = Path(path)
    if is_gguf(path) and path.is_file():
        return "gguf"
    if not path.is_dir():
        raise InputError(f"{path} is not a folder. Expected a checkpoint folder.")
    if (path / "params").is_dir():
        return "orbax"
    # A folder with pickles counts as "hf": reading it explains why they are refused.
    if any(any(path.glob(f"*{ending}")) for ending in (".safetensors", ".safetensors.index.json", *PICKLES)):
        return "hf"
    files = sorted(file.name for file in path.iterdir() if is_gguf(file))
    if files:
        raise InputError(f"{path} holds GGUF files, which are given by their own path, such as {path / files[0]}.")
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    from_hub = " From the Hub only safetensors are downloaded, not pickles." if "snapshots" in path.parts else ""
    raise InputError(
        adapter_problem(path)
        or f"{path} holds no checkpoint: expected model.safetensors, model.safetensors.index.json or an Orbax folder "
        f"params/ in it; it has {found}.{from_hub}"
    )


def check_destination(folder: Path) -> None:
    """Raises InputError unless `folder` can be created, or is an empty folder."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        linked = folder.is_symlink()
    except OSError as error:  # A name that is too long, links in a circle, a folder that cannot be listed.
        raise InputError(f"{folder} cannot be created: {error.strerror}. Give another folder.") from None
    if taken:
        raise InputError(f"{folder} exists already. Give a new folder, or remove it first; nothing is overwritten.")
    if linked:
        raise InputError(f"{folder} is a symbolic link; a new folder cannot take its place. Give the folder itself.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{folder} cannot be made: {parent} is not a folder that can be written to.")


@contextlib.contextmanager
def new_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` if the block succeeds, and removed if it fails.

    Args:
      folder: must not exist, or be empty.
      needed_bytes: how much will be written; checked against the free space.

    Raises:
      InputError: the destination exists, or the disk is too small.
    """
    folder = Path(os.path.abspath(folder))
    check_destination(folder)
    check_room(folder, needed_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        yield temporary
        with ThreadPoolExecutor(4) as pool:  # Each flush waits for the disk, which works faster on several.
            list(pool.map(_sync, [temporary, *temporary.rglob("*")]))
        os.rename(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in NO_ROOM:
            raise InputError(f"The disk of {folder} is full. Nothing was left behind; make room and repeat.") from None
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder.parent)


@contextlib.contextmanager
def new_file(file: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary file that is renamed to `file` if the block succeeds, and removed if it fails.

    Args:
      file: must not exist.
      needed_bytes: how much will be written; checked against the free space.

    Raises:
      InputError: the destination exists or cannot be made, or the disk is too small.
    """
    check_new_file(file)
    file = Path(os.path.abspath(file))
    check_room(file, needed_bytes)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(file)
    try:
        yield temporary
        _sync(temporary)
        os.rename(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in NO_ROOM:
            raise InputError(f"The disk of {file} is full. Nothing was left behind; make room and repeat.") from None
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(file.parent)


def check_new_file(file: Path) -> None:
    """Raises InputError unless `file` can be made anew."""
    if file.exists() or file.is_symlink():
        raise InputError(f"{file} exists already. Give a new file, or remove it first; nothing is overwritten.")
    check_destination(file)


def check_room(destination: Path, needed_bytes: int) -> None:
    """Raises InputError if the disk of a file or folder has not so many bytes free."""
    existing = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise InputError(
            f"Writing {destination} needs {binary_size(needed_bytes)}, {existing} has {binary_size(free)} free. "
            "Make room or choose another disk."
        )


def remove_unfinished(destination: Path) -> None:
    """Removes what processes that were killed while they wrote a folder have left beside it."""
    for left in destination.parent.glob(".*.tmp"):
        if left == _temporary(destination, left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)


def _temporary(destination: Path, process: str | int | None = None) -> Path:
    """Where a process, by default this one, writes before the result gets its name."""
    # A name has at most 255 bytes: of a long one, the temporary name has only the beginning.
    start = os.fsdecode(os.fsencode(destination.name)[:200])
    return destination.parent / f".{start}.{os.getpid() if process is None else process}.tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_side_files(origin: Path | None) -> None:
    """Raises InputError if a file that will be copied along cannot be read, before the weights are written."""
    for name in SIDE_FILES if origin else ():
        assert origin is not None
        listed = (origin / name).exists() or (origin / name).is_symlink()
        problem = why_unusable(origin / name) if listed else None
        if problem is not None:
            raise InputError(problem)


def write_side_files(
    config: ModelConfig, dtype: str | None, origin: Path | None, folder: Path, both_dialects: bool
) -> None:
    """Writes config.json, and copies tokenizer, generation config and license.

    The original config.json is copied byte for byte if it is still correct, so that a round trip changes nothing. It
    is rewritten if the dtype or the architecture's name changes, and, with `both_dialects`, if only transformers 5
    would read it correctly: transformers 4 uses a RoPE base of 10,000 if there is none at the top level.

    Args:
      config: the architecture.
      dtype: of the written weights; None if it is that of the original config.json.
      origin: folder of the original files; a GGUF file, which has the tokenizer in it; or None.
      folder: the folder to write into.
      both_dialects: whether transformers 4 must understand the result.
    """
    if origin and is_gguf(origin):
        _write_tokenizer(origin, folder)
        origin = None
    original = origin / "config.json" if origin else None
    old: dict[str, Any] = read_json(original) if original and original.is_file() else {}
    keep = bool(old) and dtype in (None, old.get("dtype") or old.get("torch_dtype"))
    keep = keep and (old.get("architectures") or config.to_hf()["architectures"]) == config.to_hf()["architectures"]
    keep = keep and not old.keys() & {"quantization_config", "compression_config"}
    if both_dialects:
        keep = keep and "rope_theta" in old
    generation = origin / "generation_config.json" if origin else None
    expected, ends = config, config.eos_token_ids
    before = end_ids_of(old, original) if original and original.is_file() else ends
    if generation and generation.is_file() and set(before) <= set(ends):
        # Ends that an adapter has added go there, and config.json stays.
        expected = dataclasses.replace(config, eos_token_ids=tuple(before))
    if original and keep and dataclasses.replace(load_config(original.parent), dtype=config.dtype) == expected:
        shutil.copyfile(original, folder / "config.json")
    else:
        hf = {**expected.to_hf(), "torch_dtype": dtype or config.dtype}
        if "pad_token_id" in old:
            hf["pad_token_id"] = old["pad_token_id"]
        if config.score is not None and hf.get("pad_token_id") is None and origin:
            # transformers scores several rows at a time only if config.json names the padding.
            hf["pad_token_id"] = _padding(origin)
        (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in [file for pattern in SIDE_FILES for file in origin.glob(pattern)] if origin else []:
        assert origin is not None
        target = folder / path.relative_to(origin)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if generation and generation.is_file():
        _add_end_ids(folder / generation.name, [i for i in ends if i not in before], ends)


def _padding(origin: Path) -> int | None:
    """The id of padding by the generation config of a folder, or else by its tokenizer; None if neither is there."""
    from qwen_jax.tokenizer import load_tokenizer

    generation = origin / "generation_config.json"
    found = read_json(generation).get("pad_token_id") if generation.is_file() else None
    if found is not None or not has_vocabulary(origin):
        return found
    return load_tokenizer(origin).pad_id


def _add_end_ids(file: Path, added: list[int], ends: Sequence[int]) -> None:
    """Writes the end ids of a model into its generation_config.json if it lacks some of those that were added."""
    values = read_json(file)
    old = end_ids_of(values, file)
    if not set(added) <= set(old):
        values["eos_token_id"] = list(dict.fromkeys([*ends, *old]))
        file.write_text(to_json(values, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(file: Path, folder: Path) -> None:
    """Writes the files of the tokenizer of a GGUF file, if it has one."""
    from qwen_jax.tokenizer.gguf import from_gguf, has_tokenizer

    header = read_header(file)
    if has_tokenizer(header):
        from_gguf(header).save(folder)
