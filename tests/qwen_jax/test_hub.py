"""A name becomes a folder: local ones first, and of a Hub model only the files that are asked for."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from qwen_jax import hub
from qwen_jax.errors import InputError

NAME = "someone/Some-Model.1"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "modeling.py",
    "LICENSE",
    "checkpoint-5/model.safetensors",
)


class FakeHub:
    """Stands for `huggingface_hub.snapshot_download`: records what was asked for and makes the files."""

    def __init__(self, folder: Path):
        self.folder, self.fetched = folder, list[set[str]]()

    def __call__(self, name: str, *, allow_patterns: Sequence[str], ignore_patterns: Sequence[str], **_: Any) -> str:
        assert name == NAME
        chosen = {
            file
            for file in FILES
            if any(fnmatch.fnmatch(file, x) for x in allow_patterns)
            and not any(fnmatch.fnmatch(file, x) for x in ignore_patterns)
        }
        self.fetched.append(chosen)
        for file in chosen:
            (self.folder / file).write_text("{}")
        return str(self.folder)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (hub.CONFIG, {"config.json", "generation_config.json"}),
        (hub.TOKENIZER, {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}),
        (hub.CHECKPOINT, set(FILES) - {"pytorch_model.bin", "modeling.py", "checkpoint-5/model.safetensors"}),
    ],
)
def test_only_what_is_asked_for_is_downloaded(
    patterns: tuple[str, ...], expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert hub.resolve(NAME, patterns) == tmp_path
    assert fake.fetched == [expected]


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
