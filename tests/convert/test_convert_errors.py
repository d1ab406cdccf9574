"""Damaged checkpoints are refused with a reason before any work, and a failure leaves no files behind."""

import itertools
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

import convert
from convert import huggingface, orbax
from convert.source import Span, cast
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from tests.helpers.hf import make_hf_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One untied model as a single file, as shards, and as an Orbax folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_hf_checkpoint(folder / "single", tie=False)
    make_hf_checkpoint(folder / "shards", tie=False, max_shard_size="60KB")
    convert.convert(folder / "single", folder / "orbax")
    return folder


def refused(source: Path, destination: Path, words: str) -> None:
    """Converting fails with this message and leaves the destination's parent folder unchanged."""
    before = sorted(destination.parent.iterdir())
    with pytest.raises(InputError, match=words):
        convert.convert(source, destination)
    assert sorted(destination.parent.iterdir()) == before


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_entry(key: str, value: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        header, data = header_of(file)
        header["model.norm.weight"][key] = value
        with_header(file, header, data)

    return change


def overlap(file: Path) -> None:
    """The last norm claims the bytes of the first one."""
    header, data = header_of(file)
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
    with_header(file, header, data)


def twice(file: Path) -> None:
    header, data = header_of(file)
    entry = json.dumps(header["model.norm.weight"])
    with_header(file, json.dumps(header).encode()[:-1] + f', "model.norm.weight": {entry}}}'.encode(), data)


def drop(*names: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        held = load_file(file)
        for name in names:
            del held[name]
        save_file(held, file)

    return change


def add(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    return lambda file: save_file({**load_file(file), name: np.zeros(shape, np.float32)}, file)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "truncated or corrupt"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:100]), "truncated or corrupt"),
    "cut in the data": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "truncated or corrupt"),
    "trailing bytes": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "truncated or corrupt"),
    "huge header": (lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]), "truncated or corrupt"),
    "not JSON": (lambda f: with_header(f, b"{not json", b""), "not valid JSON"),
    "not UTF-8": (lambda f: with_header(f, b'{"\xff": 1}', b""), "not valid JSON"),
    "a list": (lambda f: with_header(f, [1], b""), "not a JSON object"),
    "an entry that is not an object": (lambda f: with_header(f, {"x": 3}, b""), "lacks dtype"),
    "duplicate name": (twice, "twice"),
    "offsets overlap": (overlap, "starts at byte"),
    "offsets beyond": (change_entry("data_offsets", [10**9, 10**9 + 256]), "starts at byte"),
    "offsets negative": (change_entry("data_offsets", [-256, 0]), "data_offsets"),
    "offsets do not fit the shape": (change_entry("shape", [63]), "needs 252 bytes, has 256"),
    "shape without numbers": (change_entry("shape", ["64"]), "has shape"),
    "unknown dtype": (change_entry("dtype", "F33"), "dtype 'F33', which the format does not have"),
    "wrong shape": (change_entry("shape", [8, 8]), r"has shape \[8, 8\], config.json asks for \[64\]"),
    "missing tensor": (drop("model.norm.weight"), r"lacks 1 of the tensors.*model\.norm\.weight"),
    "untied without head": (drop("lm_head.weight"), "no lm_head.weight.*tie_word_embeddings=false"),
    "unknown tensor": (add("model.visual.weight", (3,)), r"unknown.*model\.visual\.weight"),
    "a layer too many": (add("model.layers.2.input_layernorm.weight", (64,)), r"unknown.*layers\.2"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files(damage: Callable[[Path], Any], words: str, checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "single", tmp_path / "a")
    damage(tmp_path / "a/model.safetensors")
    refused(tmp_path / "a", tmp_path / "b", words)


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def claim_twice(folder: Path) -> None:
    name, value = next(iter(load_file(shard(folder, 0)).items()))
    save_file({**load_file(shard(folder, 1)), name: value}, shard(folder, 1))


FOLDERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing shard": ("shards", lambda f: shard(f, 1).unlink(), "lacks model-00002-of"),
    "truncated shard": ("shards", lambda f: os.truncate(shard(f, 1), 3000), "00002.*truncated or corrupt"),
    "two files claim one tensor": ("shards", claim_twice, "both model-00001-of.* and model-00002-of"),
    "tensor only in the index": (
        "shards",
        edit_index(lambda m: m.update({"model.extra": m["model.norm.weight"]})),
        "says that .* holds tensor model.extra; it does not",
    ),
    "tensor not in the index": ("shards", edit_index(lambda m: m.pop("model.norm.weight")), "does not list"),
    "index leaves the folder": (
        "shards",
        edit_index(lambda m: m.update({"model.norm.weight": "../x"})),
        "plain file name",
    ),
    "index is not JSON": ("shards", lambda f: (f / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "index without map": ("shards", lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "no index": ("shards", lambda f: (f / "model.safetensors.index.json").unlink(), "Fetch the index"),
    "both forms": ("shards", lambda f: shutil.copy(shard(f, 0), f / "model.safetensors"), "has both"),
    "no config": ("single", lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": ("single", lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no weights": ("single", lambda f: (f / "model.safetensors").unlink(), "holds no checkpoint"),
    "Orbax without metadata": ("orbax", lambda f: (f / "params/_METADATA").unlink(), "no _METADATA"),
    "Orbax with broken metadata": ("orbax", lambda f: (f / "params/_METADATA").write_text("{"), "not a readable"),
    "Orbax lacks a leaf": ("orbax", lambda f: shutil.rmtree(f / "params/norm.weight"), "not a readable"),
    "Orbax lacks a chunk": ("orbax", lambda f: (f / "params/embed.weight/0.0").unlink(), "damaged or incomplete"),
    "Orbax with a cut chunk": ("orbax", lambda f: os.truncate(f / "params/embed.weight/0.0", 99), "damaged"),
    "Orbax of another model": (
        "orbax",
        lambda f: (f / "config.json").write_text(json.dumps(published("tiny-untied").to_hf())),
        "config.json asks for",
    ),
}


@pytest.mark.parametrize(("kind", "damage", "words"), FOLDERS.values(), ids=FOLDERS.keys())
def test_damaged_folders(
    kind: str, damage: Callable[[Path], Any], words: str, checkpoints: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints / kind, tmp_path / "a")
    damage(tmp_path / "a")
    refused(tmp_path / "a", tmp_path / "b", words)


class _Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def test_pickles_are_refused_without_opening_them(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shutil.copy(checkpoints / "single/config.json", tmp_path / "a")
    (tmp_path / "a/pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    refused(tmp_path / "a", tmp_path / "b", "pytorch_model.bin, a pickle.*save_pretrained")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder/here", "does not exist"),
        ("nosuchfolder", "does not exist"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "downloading .* failed.*hf download Qwen/Qwen2.5-0.5B-Instruct"),
    ],
)
def test_missing_sources(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=words):
        convert.convert(name, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_file_instead_of_a_folder_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    refused(checkpoints / "single/model.safetensors", tmp_path / "b", "is a file")


@pytest.mark.parametrize("kind", ["single", "orbax"])
def test_existing_destinations_are_left_unchanged(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/precious").write_text("x")
    refused(checkpoints / kind, tmp_path / "b", "exists already")
    refused(checkpoints / kind, tmp_path / "b/precious", "exists already")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["precious"]
    (tmp_path / "b/precious").unlink()
    convert.convert(checkpoints / kind, tmp_path / "b")  # An empty folder may be used.
    assert load_config(tmp_path / "b")


class _Usage(NamedTuple):
    free: int


@pytest.mark.parametrize("kind", ["single", "orbax"])
def test_too_small_a_disk_is_refused_before_any_work(
    kind: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(1000))
    refused(checkpoints / kind, tmp_path / "b", r"needs \S+ KiB, .* has 1000 bytes free")


def fails_after(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes the third block fail, whether it is copied from file to file or through memory."""
    calls = itertools.count(1)

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) == 3:
                raise error
            return function(*args)

        return call

    monkeypatch.setattr("convert.source.cast", failing(cast))
    monkeypatch.setattr(Span, "copy_to", failing(Span.copy_to))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["single", "orbax"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(28, "No space left on device"), InputError), (OSError(5, "I/O"), OSError), (KeyboardInterrupt(), None)],
)
def test_a_failure_leaves_nothing_behind(
    kind: str,
    dtype: str | None,
    error: BaseException,
    seen: type[BaseException] | None,
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails_after(monkeypatch, error)
    with pytest.raises(seen or type(error)):
        convert.convert(checkpoints / kind, tmp_path / "b", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_other_invalid_arguments(checkpoints: Path, tmp_path: Path, mesh: Mesh) -> None:
    with pytest.raises(InputError, match="'hf', 'orbax' or 'gguf'"):
        convert.convert(checkpoints / "single", tmp_path / "b", to="pickle")  # type: ignore[arg-type]
    for dtype in ("int8", "float64", "nonsense"):
        with pytest.raises(InputError, match=f"bfloat16, float32, float16; got '{dtype}'"):
            convert.convert(checkpoints / "single", tmp_path / "b", dtype=dtype)
    with pytest.raises(InputError, match="not divisible by the fsdp axis"):
        convert.load(checkpoints / "single", make_mesh({"fsdp": 7}))
    with pytest.raises(ValueError, match="fuse"):
        convert.load(checkpoints / "single", mesh, options=Options(stacked=False, fused=True))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_before_loading(
    checkpoints: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.placement._available_host_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"parameters need \S+ KiB a device, this machine has 1000 bytes"):
        convert.load(checkpoints / "single", mesh)


def test_values_beyond_the_range_of_float16_are_an_error(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "single", tmp_path / "a")
    held = load_file(tmp_path / "a/model.safetensors")
    held["model.norm.weight"][5] = 70_000
    save_file(held, tmp_path / "a/model.safetensors")
    with pytest.raises(InputError, match=re.escape("norm.weight has values beyond the range of float16")):
        convert.convert(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()


def test_parameters_that_do_not_fit_the_config(checkpoints: Path, tmp_path: Path, mesh: Mesh) -> None:
    config, params = convert.load(checkpoints / "single", mesh, options=Options())
    other = published("tiny-untied")
    wrong = {**params, "norm": {"wait": params["norm"]["weight"]}}
    for bad, for_config, words in (
        (params, other, "must have shape"),
        ({"embed": params["embed"], "layers": params["layers"]}, config, "Expected 15 parameter arrays, got 13"),
        (wrong, config, "lack norm.weight"),
        ({**params, "layers": [params["layers"]]}, config, "Expected 2 layers"),
    ):
        for write in (huggingface.export, orbax.save):
            with pytest.raises(InputError, match=words):
                write(bad, for_config, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_cannot_be_created_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("file/x", "cannot be made"), ("file/x/y", "cannot be made"), ("link", "symbolic link")):
        with pytest.raises(InputError, match=message):
            convert.convert(tmp_path / "no-source-needed", tmp_path / name)
