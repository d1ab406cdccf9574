"""The files beside a vocabulary (tokenizer_config.json, chat templates, added tokens), and safe reading and writing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import why_unusable, write_atomic
from qwen_jax.tokenizer.control import CONTROL_TOKENS, END_OF_TEXT, TURN_START

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
# Keys that describe one version's loader, not the tokenizer; transformers 4 cannot read the first.
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
    """The contents of tokenizer_config.json and of the files that extend it.

    Args:
        named_tokens: `eos_token`, `pad_token`, `bos_token` and every other `*_token` key to the token's text, or to
            None where the file says null.
        chat_template: as the files give it, unchecked: Jinja source, several of them by name, or None. It is checked
            when a chat is rendered, since encoding text needs no template.
        added_tokens: id to token, or None where no file lists them.
        declares_flags: whether `added_tokens` comes with flags, as in tokenizer_config.json but not added_tokens.json.
        other: the remaining keys of tokenizer_config.json, kept for saving.
        source: tokenizer_config.json, for error messages.
    """

    named_tokens: Mapping[str, str | None] = field(default_factory=dict)
    chat_template: object = None
    added_tokens: dict[int, AddedToken] | None = None
    declares_flags: bool = True
    other: dict[str, Any] = field(default_factory=dict)
    source: Path = Path(CONFIG_FILE)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Name to text of the tokens that a chat template can use, such as `bos_token`."""
        named = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, **self.named_tokens}
        return {name: token for name, token in named.items() if token is not None}

    def flag(self, name: str) -> bool:
        """Whether a switch such as `add_bos_token` is on. Raises InputError where it is not a boolean."""
        value = self.other.get(name)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{self.source}: {name} must be true or false, got {value!r}")
        return bool(value)

    def chat_templates(self) -> dict[str, str]:
        """Return Jinja sources by name; a single template is called "default". Empty where there is none.

        Raises:
            InputError: `chat_template` has another form than a string or a list of named strings.
        """
        value = self.chat_template
        if value is None:
            return {}
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            value = {entry.get("name"): entry.get("template") for entry in value}
        if not isinstance(value, dict) or not all(isinstance(x, str) for entry in value.items() for x in entry):
            raise InputError(
                f"{self.source}: chat_template must be a string, or a list of objects with the strings 'name' and "
                f"'template'; got {self.chat_template!r:.200}. Correct it, or write the template into {TEMPLATE_FILE}."
            )
        return value


def control_tokens_from(first_id: int) -> dict[int, AddedToken]:
    """Return the 22 control tokens of Qwen2.5 by id, the first at `first_id`."""
    return {first_id + n: AddedToken(t.content, special=t.special) for n, t in enumerate(CONTROL_TOKENS)}


def read_settings(folder: Path) -> Settings:
    """Read tokenizer_config.json and the files that extend it; the order of precedence is that of transformers.

    Template files win over `chat_template`. special_tokens_map.json and added_tokens.json, which older versions of
    transformers wrote, count only where tokenizer_config.json has no `added_tokens_decoder`.

    Raises InputError for a file that cannot be read or has entries of the wrong form.
    """
    path = folder / CONFIG_FILE
    config = read_json_object(path) if path.exists() else {}
    declared = config.pop("added_tokens_decoder", None)
    if declared is None:
        # Written by older versions, beside a tokenizer_config.json without these entries.
        if (folder / SPECIAL_TOKENS_FILE).is_file():
            older = read_json_object(folder / SPECIAL_TOKENS_FILE)
            config.update({key: value for key, value in older.items() if value is not None})
        added = _older_added_tokens(folder, config)
    else:
        added = _added_tokens(declared, path)
    template = config.pop("chat_template", None)
    named = {
        key: _token_text(config.pop(key), key, path)
        for key in list(config)
        if key.endswith("_token") and not isinstance(config[key], bool)
    }
    return Settings(named, _template_files(folder) or template, added, declared is not None, config, path)


def _template_files(folder: Path) -> str | dict[str, str] | None:
    """Return the templates that have files of their own."""
    templates: dict[str, str] = {}
    if (folder / TEMPLATE_FILE).exists():
        templates["default"] = read_text(folder / TEMPLATE_FILE)
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        templates[path.name.removesuffix(".jinja")] = read_text(path)
    return templates["default"] if list(templates) == ["default"] else templates or None


def _token_text(value: object, key: str, path: Path) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value  # A dictionary is a serialised AddedToken.
    if text is not None and not isinstance(text, str):
        raise InputError(f"{path}: {key} must be a string or an object with 'content', got {value!r}")
    return text


def _added_tokens(entries: object, path: Path) -> dict[int, AddedToken]:
    """Read `added_tokens_decoder`."""
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


def _older_added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken] | None:
    """Read added_tokens.json, which gives ids without flags. A token that another key names as special is special."""
    path = folder / ADDED_TOKENS_FILE
    if not path.is_file():
        return None
    entries = read_json_object(path)
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or []
        named += list(extra.values()) if isinstance(extra, dict) else list(extra)
    special = {token.get("content") if isinstance(token, dict) else token for token in named}
    ids = [i for i in entries.values() if type(i) is int and i >= 0]
    if len(set(ids)) < len(entries):
        raise InputError(f"{path}: each token must have an id of its own, 0 or more. Correct the file.")
    return {
        i: AddedToken(content, normalized=content not in special, special=content in special)
        for content, i in sorted(entries.items(), key=lambda entry: entry[1])
    }


def save_settings(folder: Path, settings: Settings, added: dict[int, AddedToken], fixed: dict[str, Any]) -> None:
    """Write tokenizer_config.json in the form that transformers 4 and 5 both read.

    Files of an older tokenizer in the folder that would win over it are removed.

    Args:
        folder: an existing folder.
        settings: named tokens, chat template and the keys to keep.
        added: every added token by id.
        fixed: keys that the kind of tokenizer decides.
    """
    named = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, **settings.named_tokens}
    templates = settings.chat_template
    if templates is None and any(token.content == TURN_START for token in added.values()):
        templates = default_chat_template()
    elif isinstance(templates, dict):
        templates = [{"name": name, "template": source} for name, source in templates.items()]
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
        **named,
        "additional_special_tokens": [t.content for t in added.values() if t.special and t.content != END_OF_TEXT],
        "added_tokens_decoder": {str(i): vars(token) for i, token in added.items()},
        "chat_template": templates,
    }
    write_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    for path in (folder / TEMPLATE_FILE, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
        path.unlink(missing_ok=True)


def make_folder(folder: str | Path) -> Path:
    """Create a folder to save into, or raise InputError where that cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot save a tokenizer to {path}: {error.strerror}. Choose another folder.") from None
    return path


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, or raise InputError, which names a dangling link or a Git LFS pointer."""
    problem = why_unusable(path)
    if problem is not None:
        raise InputError(problem)
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
