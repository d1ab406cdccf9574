"""Checkpoint folders by name: a local folder, a training run, or a Hugging Face Hub id.

Callers ask for the files that they need, so that a wrong option or an unsupported model is found before the weights of
a Hub model are downloaded:

    folder = resolve("Qwen/Qwen2.5-7B-Instruct", CONFIG)      # a few kB
    folder = resolve("Qwen/Qwen2.5-7B-Instruct", CHECKPOINT)  # weights too
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.gguf.header import is_gguf

# Sets of files for `resolve`. Everything in them is data: neither code nor pickles are ever downloaded.
CONFIG = ("config.json", "generation_config.json", "adapter_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.model",
    "qwen.tiktoken",
)
_VOCABULARIES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken")
SPARSITY = "sparse_attention_config.json"
SMALL = (*CONFIG, *TOKENIZER, SPARSITY)
INDEX = "model.safetensors.index.json"
CHECKPOINT = (*SMALL, "LICENSE", "model.safetensors", INDEX)  # And the files that the index names.

# An adapter that a chat was trained into says by which ids its texts end.
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "generation_config.json")

# Files that are not needed where there is a tokenizer.json.
_REDUNDANT = ("vocab.json", "merges.txt", "qwen.tiktoken", "LICENSE")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name has the form of a Hub id, `owner/model`, and is no local path."""
    return not os.path.exists(name) and not is_gguf(name) and _HUB_ID.fullmatch(str(name)) is not None


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer is made from."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def adapter_folder(name: str | os.PathLike[str]) -> Path:
    """The local folder of an adapter; downloads it if the name is a Hub id."""
    return resolve(name, ADAPTER) if is_hub_id(name) else Path(name)


def resolve(name: str | os.PathLike[str], patterns: Sequence[str] = CHECKPOINT) -> Path:
    """Finds the local folder of a checkpoint; downloads what is asked for if the name is a Hub id.

    Args:
      name: a folder; the folder of a training run, of which the newest complete checkpoint is taken; a GGUF file, which
        has everything in it; or a Hub id such as "Qwen/Qwen2.5-0.5B-Instruct", if there is no folder of that name.
      patterns: names or glob patterns of the files to download for a Hub id; with an index of weights, the files that
        it names too. Those already in the Hub's cache are not downloaded again, and without a network the cached files
        are used. A local folder is not searched for them.

    Returns:
      An existing folder, or the GGUF file. A folder lacks the files that the Hub's repository does not have.

    Raises:
      InputError: no such folder, or the download failed.
    """
    path = Path(name)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # Names that are too long, links in a circle.
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if is_folder:
        return _newest_step(path)
    if is_gguf(path) and path.exists():
        return path
    if path.exists():
        raise InputError(f"{path} is a file; expected a checkpoint folder.")
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link to {os.readlink(path)}, which does not exist.")
    if not is_hub_id(name):
        raise InputError(f"{path} does not exist. Expected a checkpoint folder or a Hub id such as Qwen/Qwen2.5-0.5B.")
    return _download(str(name), patterns)


def _download(name: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(files: Sequence[str]) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
        except LocalEntryNotFoundError:
            # Offline, and the cache lacks some of the files: it may have all that are needed.
            needed = [file for file in files if file not in _REDUNDANT]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=needed))
            if not (folder / "tokenizer.json").is_file():
                raise
            return folder

    try:
        folder = snapshot(patterns)
        if INDEX in patterns and (folder / INDEX).is_file():
            shards = read_json(folder / INDEX).get("weight_map")
            if isinstance(shards, dict):  # Otherwise reading the checkpoint says what is wrong with the index.
                folder = snapshot([*patterns, *sorted(set(map(str, shards.values())))])
        return folder
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # Being offline or not cached is an OSError, too.
        lines = str(error).strip().splitlines()
        raise InputError(
            f"There is no folder {name}, and downloading {name} from the Hugging Face Hub failed: "
            f"{lines[0] if lines else type(error).__name__} "
            "Check the name and the network (HF_HUB_OFFLINE, HF_ENDPOINT), or download it elsewhere with "
            f"`hf download {name}` and give the folder."
        ) from None


def _newest_step(folder: Path) -> Path:
    """The newest complete checkpoint of a training run, or the folder itself if it is not a training run."""
    if not (folder / "run.json").is_file():
        return folder
    steps = [path for path in folder.iterdir() if path.name.isdecimal() and (path / "config.json").is_file()]
    if not steps:
        raise InputError(f"{folder} is a training run without a complete checkpoint. Let it save one first.")
    return max(steps, key=lambda path: int(path.name))
