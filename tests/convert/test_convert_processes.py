"""Two processes that hold the shards of a model write the same bytes as one process, and fail together."""

import hashlib
from pathlib import Path
from typing import Any

import jax

import convert
from convert import huggingface, orbax
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.processes import run


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def there_and_back(folder: str) -> list[str]:
    """Converts safetensors on one mesh to Orbax, and that on another mesh to safetensors, stacked and unstacked."""
    root = Path(folder)
    for stacked in (True, False):
        options = Options(stacked=stacked)
        config, params = convert.load(root / "hf", make_mesh({"fsdp": 2, "tensor": 2}), options=options)
        assert not params["embed"]["weight"].is_fully_addressable
        orbax.save(params, config, root / f"orbax-{stacked}", extra_files_from=root / "hf")
        _, params = convert.load(root / f"orbax-{stacked}", make_mesh({"fsdp": 4}), options=options)
        huggingface.export(params, config, root / f"hf-{stacked}", max_shard_bytes=60_000, extra_files_from=root / "hf")
        assert (root / f"hf-{stacked}/config.json").is_file(), "no process continues before everything is written"
    return sorted(path.name for path in root.iterdir())


def test_two_processes_write_the_same_files_as_one(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf", tie=False, dtype="bfloat16", dialect="4", max_shard_size="60KB")
    (tmp_path / "hf/merges.txt").write_text("copied")
    names = ["hf", "hf-False", "hf-True", "orbax-False", "orbax-True"]
    assert run(there_and_back, str(tmp_path), processes=2, devices=2) == [names, names]
    convert.convert(tmp_path / "hf", tmp_path / "one")
    config, params = convert.load(tmp_path / "hf", make_mesh({}, jax.devices()[:1]))
    huggingface.export(params, config, tmp_path / "alone", max_shard_bytes=60_000, extra_files_from=tmp_path / "hf")
    for stacked in (True, False):
        assert digests(tmp_path / f"hf-{stacked}") == digests(tmp_path / "alone")
        # Orbax records the time and the path of writing.
        written, expected = digests(tmp_path / f"orbax-{stacked}"), digests(tmp_path / "one")
        assert written.keys() == expected.keys()
        different = sorted(x for x in expected if written[x] != expected[x])
        assert set(different) <= {"params/_CHECKPOINT_METADATA", "params/commit_success.txt"}


def fail(folder: str) -> list[str]:
    """The errors of each process if process 0 cannot begin to write, and if it fails while writing."""
    root, told = Path(folder), []
    config, params = convert.load(root / "hf", make_mesh({"fsdp": 2}), options=Options())

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    huggingface._Sink.write = orbax._Sink.write = disk_full  # type: ignore[method-assign]
    for name in ("taken", "full"):
        for write in (huggingface.export, orbax.save):
            try:
                write(params, config, root / name)
            except InputError as error:
                told.append(str(error))
    return told


def test_two_processes_fail_together(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious").write_text("x")
    first, second = run(fail, str(tmp_path), processes=2)
    assert ["exists already" in x for x in first] == [True, True, False, False]
    assert ["is full" in x for x in first] == [False, False, True, True]
    assert len(second) == 4
    assert all("failed in process 0" in x for x in second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "taken"]
