"""A name becomes a folder: local ones first, and of a Hub model only the files that are asked for."""

import fnmatch
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest

from qwen_jax import hub
from qwen_jax.cli import main
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from qwen_jax.units import binary_size, count

NAME = "someone/Some-Model.1"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "modeling.py",
    "LICENSE",
    "checkpoint-5/model.safetensors",
)
TEMPLATE = "additional_chat_templates/tool_use.jinja"


SHARDS = FILES[6:8]


class FakeHub:
    """Stands for `huggingface_hub.snapshot_download`: records what was asked for and makes the files."""

    def __init__(self, folder: Path):
        self.folder, self.fetched = folder, list[set[str]]()

    def __call__(self, name: str, *, allow_patterns: Sequence[str]) -> str:
        assert name == NAME
        chosen = {file for file in (*FILES, TEMPLATE) if any(fnmatch.fnmatch(file, x) for x in allow_patterns)}
        self.fetched.append(chosen)
        for file in chosen:
            weight_map = {"a": SHARDS[1], "b": SHARDS[0]} if file == hub.INDEX else {}
            (self.folder / file).parent.mkdir(exist_ok=True)
            (self.folder / file).write_text(json.dumps({"weight_map": weight_map}))
        return str(self.folder)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (hub.CONFIG, {"config.json", "generation_config.json"}),
        (hub.TOKENIZER, {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", TEMPLATE}),
        (hub.CHECKPOINT, {*FILES[:6], hub.INDEX, "LICENSE", TEMPLATE}),
    ],
)
def test_only_what_is_asked_for_is_downloaded(
    patterns: tuple[str, ...], expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert hub.resolve(NAME, patterns) == tmp_path
    assert fake.fetched[0] == expected
    # The index says which weights there are: neither other formats nor intermediate checkpoints are downloaded.
    assert fake.fetched[1:] == ([expected | set(SHARDS)] if patterns == hub.CHECKPOINT else [])


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert hub.resolve(NAME) == Path(NAME)
    assert not hub.is_hub_id(NAME)
    assert hub.is_hub_id("someone/else")
    assert not hub.is_hub_id("no/such/folder")


def cached(cache: Path, files: Sequence[str], tree: Sequence[str] | None = None) -> Path:
    """A Hub cache as `hf download` leaves it, with some files of one model.

    Args:
      cache: a new folder.
      files: that are there.
      tree: names that the cached listing of the repository has, as newer versions of huggingface_hub keep one.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / ("models--" + NAME.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(commit)
    for file in files:
        (snapshot / file).write_text("{}")
    if tree is not None:
        module = pytest.importorskip("huggingface_hub._tree_cache", reason="this version keeps no listing")
        entry = module.TreeCacheEntry(size=2, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
        module.write_tree_cache(str(root), commit, dict.fromkeys(tree, entry))
    return snapshot


@pytest.mark.parametrize("tree", [None, FILES])
def test_offline_the_cache_is_used(tree: Sequence[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if only transformers has been there, which fetches no vocab.json beside tokenizer.json."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = cached(tmp_path, ["tokenizer.json", "tokenizer_config.json"], tree)
    assert hub.resolve(NAME, hub.TOKENIZER).resolve() == snapshot.resolve()
    if tree is not None:
        with pytest.raises(InputError, match="incomplete"):
            hub.resolve(NAME, hub.CONFIG)
        (snapshot / "tokenizer_config.json").unlink()  # It may hold a chat template: it must not be passed over.
        with pytest.raises(InputError, match="incomplete"):
            hub.resolve(NAME, hub.TOKENIZER)


def test_what_is_not_there_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"downloading .* failed: \S.*hf download someone/Some-Model.1"):
        hub.resolve(NAME)
    for name in ("two words", "a/b/c", "nothing", "../up", "owner/"):
        with pytest.raises(InputError, match=r"does not exist\. Expected a checkpoint folder or a Hub id"):
            hub.resolve(name)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(InputError, match="is a file"):
        hub.resolve(tmp_path / "file")
    with pytest.raises(InputError, match="symbolic link to gone"):
        hub.resolve(tmp_path / "link")


def test_the_newest_complete_checkpoint_of_a_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="without a complete checkpoint"):
        hub.resolve(tmp_path)
    for step in ("9", "10", "11"):
        (tmp_path / step).mkdir()
    for step in ("9", "10"):  # The eleventh is still being written.
        (tmp_path / step / "config.json").write_text("{}")
    assert hub.resolve(tmp_path).name == "10"


WRONG: dict[str, tuple[list[str], str]] = {
    "an option of generate out of range": (
        ["generate", "--model", NAME, "--prompt", "a", "--temperature", "-1"],
        "temperature must be",
    ),
    "a mesh that does not exist": (["generate", "--model", NAME, "--prompt", "a", "--mesh", "tensors=2"], "axes"),
    "a destination that exists": (["convert", NAME, "TAKEN"], "exists already"),
    "a destination of upcycling that exists": (["upcycle", NAME, "TAKEN"], "exists already"),
    "upcycling with another fraction": (["upcycle", NAME, "new", "--reinit", "2"], "reinit must be a fraction"),
    "nothing to compare with": (["verify", NAME], "one of the two"),
}


@pytest.mark.parametrize(("argv", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_options_are_found_before_anything_is_downloaded(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious").write_text("")
    assert main([x.replace("TAKEN", "taken") for x in argv]) != 0
    assert words in capsys.readouterr().err
    assert fake.fetched == []


class ConfigHub(FakeHub):
    """A Hub model whose config.json is a given one."""

    def __init__(self, folder: Path, config: dict[str, object]):
        super().__init__(folder)
        self.config = config

    def __call__(self, name: str, *, allow_patterns: Sequence[str]) -> str:
        folder = super().__call__(name, allow_patterns=allow_patterns)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        return folder


def test_info_of_a_hub_model_needs_its_config_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = ConfigHub(tmp_path, published("tiny").to_hf())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert main(["info", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == published("tiny").num_params()
    assert fake.fetched == [{"config.json", "generation_config.json"}]
    # A published name needs nothing at all.
    assert main(["info", "Qwen/Qwen2.5-7B"]) == 0
    assert len(fake.fetched) == 1


@pytest.mark.parametrize("command", [["convert", NAME, "new"], ["upcycle", NAME, "new"], ["verify", NAME, NAME]])
def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = ConfigHub(tmp_path, {"model_type": "llama"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    assert main(command) != 0
    assert "llama" in capsys.readouterr().err
    assert fake.fetched == [{"config.json", "generation_config.json"}]


def test_tokenize_of_a_hub_model_needs_its_tokenizer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offline, from the cache: neither config nor weights need to be there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tokenizer = train_bpe(["hello world"] * 4, 290)
    tokenizer.save(cached(tmp_path, []))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    assert main(["tokenize", "--model", NAME]) == 0
    assert json.loads(capsys.readouterr().out) == tokenizer.encode("hello")


def test_small_models_print_small_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "209.12 KiB bfloat16, 418.25 KiB float32" in out
    assert "256 bytes a token, 128.00 KiB a full context" in out
    assert [binary_size(x) for x in (0, 1023, 2**20, 3.5 * 2**30)] == ["0 bytes", "1023 bytes", "1.00 MiB", "3.50 GiB"]
    assert [count(x) for x in (7, 107_072, 494_032_768, 7_615_616_512)] == ["7", "107.07K", "494.03M", "7.62B"]


def test_kernel_choices_are_shown_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Anywhere among the arguments; what is a warning is always shown."""
    log = logging.getLogger("qwen_jax.kernels")
    for argv, level in (
        (["info", "tiny"], logging.WARNING),
        (["--verbose", "info", "tiny"], logging.INFO),
        (["info", "tiny", "--verbose"], logging.INFO),
        (["info", "tiny"], logging.WARNING),
    ):
        assert main(argv) == 0
        assert log.getEffectiveLevel() == level
    assert "--verbose" not in capsys.readouterr().err


def test_printed_json_is_strict() -> None:
    """JSON has neither NaN nor Infinity, and readers other than Python's refuse them."""
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), "NaN")}}
    assert json.loads(to_json(value)) == {"a": None, "b": [1.5, None], "c": {"d": [None, "NaN"]}}
