"""The files around a vocabulary: tokenizer_config.json, the chat template, and safe reading and writing."""

import json
import os
import secrets
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.base import CONTROL_TOKENS, END_OF_TEXT

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
ADDED_TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
# Keys that describe one version's loader, not the tokenizer; transformers 4 stumbles over the first.
_TRANSFORMERS_5_KEYS = ("extra_special_tokens", "backend", "is_local", "local_files_only", "added_tokens_decoder")


def default_chat_template() -> str:
    """Return the chat template of the Qwen2.5 instruct checkpoints (published under Apache-2.0), byte for byte."""
    return resources.files("qwen_jax.tokenizer").joinpath("qwen2_5.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class AddedToken:
    """One entry of `added_tokens_decoder`: a token outside the learned vocabulary, with Hugging Face's flags."""

    content: str
    lstrip: bool = False
    normalized: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = False


@dataclass(frozen=True)
class Settings:
    """What tokenizer_config.json and chat_template.jinja say.

    Args:
        eos_token: name of the token that ends a generation.
        pad_token: name of the padding token.
        chat_template: Jinja source.
        added_tokens: id to token, or None where the file does not list them.
        other: the remaining keys of the file, kept for saving.
    """

    eos_token: str = END_OF_TEXT
    pad_token: str = END_OF_TEXT
    chat_template: str = field(default_factory=default_chat_template)
    added_tokens: dict[int, AddedToken] | None = None
    other: dict[str, Any] = field(default_factory=dict)


def control_tokens_from(first_id: int) -> dict[int, AddedToken]:
    """Return the 22 control tokens of Qwen2.5 by id, the first at `first_id`."""
    return {first_id + n: AddedToken(t.content, special=t.special) for n, t in enumerate(CONTROL_TOKENS)}


def read_settings(folder: Path) -> Settings:
    """Read tokenizer_config.json and chat_template.jinja of a folder; what is absent takes Qwen2.5's values.

    Raises InputError for a file that cannot be read or has entries of the wrong form.
    """
    path = folder / CONFIG_FILE
    config = read_json_object(path) if path.exists() else {}
    template_path = folder / TEMPLATE_FILE
    template = config.pop("chat_template", None)
    if template_path.exists():  # Hugging Face lets the separate file win, too.
        template = read_text(template_path)
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{path}: chat_template must be one string, got {type(template).__name__}. "
            f"Of several named templates, write the one to use into {TEMPLATE_FILE}."
        )
    added = config.pop("added_tokens_decoder", None)
    return Settings(
        eos_token=_token_name(config.pop("eos_token", None), END_OF_TEXT, path),
        pad_token=_token_name(config.pop("pad_token", None), END_OF_TEXT, path),
        chat_template=default_chat_template() if template is None else template,
        added_tokens=None if added is None else _added_tokens(added, path),
        other=config,
    )


def _token_name(value: Any, default: str, path: Path) -> str:
    if isinstance(value, dict):  # A serialised AddedToken.
        value = value.get("content")
    if value is None:
        return default
    if not isinstance(value, str):
        raise InputError(f"{path}: a token must be a string or an object with 'content', got {value!r}")
    return value


def _added_tokens(entries: Any, path: Path) -> dict[int, AddedToken]:
    if not isinstance(entries, dict):
        raise InputError(f"{path}: added_tokens_decoder must be an object of id to token, got {type(entries).__name__}")
    tokens: dict[int, AddedToken] = {}
    for key, entry in entries.items():
        if not (key.isascii() and key.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise InputError(f"{path}: added_tokens_decoder entry {key!r} must be an id with an object with 'content'")
        token = AddedToken(entry["content"], **{flag: bool(entry.get(flag, False)) for flag in ADDED_TOKEN_FLAGS})
        if any(token.content == other.content for other in tokens.values()):
            raise InputError(f"{path}: added_tokens_decoder gives two ids to {token.content!r}; keep one")
        tokens[int(key)] = token
    return dict(sorted(tokens.items()))


def save_settings(folder: Path, settings: Settings, added: dict[int, AddedToken], fixed: dict[str, Any]) -> None:
    """Write tokenizer_config.json in the form that transformers 4 and 5 both read.

    Args:
        folder: an existing folder.
        settings: eos, pad, chat template and the keys to keep.
        added: every added token by id.
        fixed: keys that the kind of tokenizer decides.
    """
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "unk_token": None,
        **{key: value for key, value in settings.other.items() if key not in _TRANSFORMERS_5_KEYS},
        **fixed,
        "eos_token": settings.eos_token,
        "pad_token": settings.pad_token,
        "additional_special_tokens": [t.content for t in added.values() if t.special and t.content != END_OF_TEXT],
        "added_tokens_decoder": {str(i): vars(token) for i, token in added.items()},
        "chat_template": settings.chat_template,
    }
    write_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    if (folder / TEMPLATE_FILE).exists():  # A stale one would win over tokenizer_config.json.
        write_atomic(folder / TEMPLATE_FILE, settings.chat_template)


def make_folder(folder: str | Path) -> Path:
    """Create a folder to save into, or raise InputError where that cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot save a tokenizer to {path}: {error.strerror}. Choose another folder.") from None
    return path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside its place, then rename it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, or raise InputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """Return a file's text, or raise InputError where it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte offset {error.start}); the file is damaged, fetch it again"
        ) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise InputError."""
    return parse_json_object(read_text(path), path)


def parse_json_object(text: str, path: Path) -> dict[str, Any]:
    """Return the JSON object that a file's text is, or raise InputError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits.
        raise InputError(f"{path} is not JSON ({error}); it is damaged or cut, fetch or write it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
