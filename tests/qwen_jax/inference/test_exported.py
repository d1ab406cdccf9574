"""Programs that were lowered before are the programs that are lowered now, and are found only where nothing changed."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.inference import exported
from qwen_jax.inference.buckets import Buckets, RunnerConfig
from qwen_jax.inference.engine import Engine
from qwen_jax.inference.runner import Runner, SampleRow
from qwen_jax.inference.runner_lowering import Program
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from tests.helpers.forward import random_unstacked
from tests.helpers.runs_of_runner import Text, generate

DENSE = dataclasses.replace(published("tiny"), vocab_size=96, eos_token_ids=())
MOE = dataclasses.replace(published("tiny-moe"), vocab_size=96, eos_token_ids=())
BUCKETS = Buckets(rows=(4,), slots=(64,), prefill=((3, 48),), prefill_slots=(64,), texts=(64,))
SETTINGS = RunnerConfig(
    max_seqs=4, max_length=64, page_size=4, num_pages=64, max_batched_tokens=48, max_top_logprobs=5, buckets=BUCKETS
)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("config", "axes", "settings"),
    [
        (DENSE, {}, {}),
        (DENSE, {"tensor": 2}, {"kv_dtype": "int8"}),
        (MOE, {"expert": 2, "tensor": 2}, {}),
        (DENSE, {}, {"speculate": 1, "kv_dtype": "fp8"}),
    ],
    ids=["one device", "tensor axis, int8 pages", "experts", "speculation, fp8 pages"],
)
def test_a_second_start_lowers_nothing_and_computes_the_same_bits(
    config: ModelConfig,
    axes: dict[str, int],
    settings: dict[str, Any],
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values()), dtype=int))])
    engine = Engine(config, random_unstacked(config, mesh, rng), mesh, dtype="float32")
    prompts = [rng.integers(0, 96, rng.integers(1, 30)).tolist() for _ in range(4)]
    samplings = SamplingParams(), SamplingParams(temperature=0.9, top_k=9, repetition_penalty=1.2, seed=5)
    rows = [SampleRow(0, samplings[i % 2], 0, rules=bool(i % 2)) for i in range(4)]
    seed, how = int(rng.integers(2**32)), dataclasses.replace(SETTINGS, **settings)

    def run() -> list[Text]:
        runner = Runner(config, engine.params, mesh, engine.options, engine.vocab_limit, how)
        runner.compile()
        texts = [Text(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        return generate(runner, texts, 6, np.random.default_rng(seed))

    direct = run()
    monkeypatch.setattr(exported, "folder", lambda mesh: tmp_path / "lowered")
    assert run() == direct
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "lowered").iterdir()}
    assert files

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was exported again")

    monkeypatch.setattr(exported.export, "export", fail)
    assert run() == direct
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "lowered").iterdir()} == files


def shape(*sizes: int, dtype: Any = "float32", spec: P | None = None, axis: str = "data") -> jax.ShapeDtypeStruct:
    mesh = make_mesh({axis: 2}, jax.devices()[:2])
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec or P(*(None,) * len(sizes))))


def test_a_program_is_found_only_where_all_that_it_depends_on_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (make_mesh({"data": n}, jax.devices()[:n]) for n in (1, 2))
    tensor = make_mesh({"tensor": 2}, jax.devices()[:2])
    program = Program("decode", 4, slots=64)

    def name(args: Any = (), settings: Any = (program, SETTINGS, DENSE), mesh: Any = two) -> str:
        return exported._name(*jax.tree.flatten(args), settings, mesh)

    x = shape(4, 2)
    names = [
        name(x),
        name((x,)),
        name(shape(2, 4)),
        name(shape(4, 2, dtype="bfloat16")),
        name(shape(4, 2, spec=P("data", None))),
        name(x, mesh=one),
        name(x, mesh=tensor),
        name(x, (dataclasses.replace(program, slots=128), SETTINGS, DENSE)),
        name(x, (program, dataclasses.replace(SETTINGS, kv_dtype="int8"), DENSE)),
        name(x, (program, SETTINGS, dataclasses.replace(DENSE, rms_norm_eps=1e-5))),
    ]
    with jax.default_matmul_precision("highest"):
        names.append(name(x))
    assert len(set(names)) == len(names)
    assert name(x) == names[0]
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert name(x) == names[0], "the place of the cache does not matter"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    monkeypatch.setattr(exported, "_source", lambda: "another source")
    assert name(x) != names[0]


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_nothing_that_a_name_depends_on_is_an_address(config: ModelConfig) -> None:
    """`repr` of an object without one of its own has its address, so that no later process would find the program."""
    mesh = make_mesh({}, jax.devices()[:1])
    engine = Engine(config, random_unstacked(config, mesh, np.random.default_rng(0)), mesh, dtype="float32")
    runner = Runner(config, engine.params, mesh, engine.options, engine.vocab_limit, SETTINGS)
    assert " at 0x" not in repr(runner.static)
    assert " at 0x" not in repr(sorted(jax.config.values.items()))


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_written_again(
    damage: str, rng: np.random.Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    args = (shape(4),)

    def run() -> Any:
        with jax.set_mesh(mesh):
            function = exported.load_or_export(tmp_path, lambda x: x * 3 + 1, args, ("example",), mesh)
            return jax.jit(function)(jnp.arange(4, dtype=jnp.float32)).tolist()

    assert run() == [1, 4, 7, 10]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    place = int(rng.integers(len(whole)))
    bad = {
        "cut": whole[:place],
        "empty": b"",
        "changed": whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :],
    }
    file.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        assert run() == [1, 4, 7, 10]
    assert "is damaged" in caplog.text
    caplog.clear()
    assert run() == [1, 4, 7, 10]
    assert not caplog.text
    assert [x.name for x in tmp_path.iterdir()] == [file.name]


def test_what_cannot_be_kept_is_said_and_still_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mesh, args = make_mesh({"data": 2}, jax.devices()[:2]), (shape(4),)

    def called_back(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((4,), jnp.float32), x)

    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("")
    for function, folder in ((called_back, tmp_path / "lowered"), (jnp.sin, not_a_folder)):
        caplog.clear()
        with jax.set_mesh(mesh), caplog.at_level(logging.WARNING):
            assert exported.load_or_export(folder, function, args, (), mesh) is function
        assert "not kept for the next start" in caplog.text


def test_programs_of_cpus_and_of_remote_caches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh({}, jax.devices()[:1])
    assert exported.folder(mesh) is None
    accelerator: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    for default, place, kept in (
        ("gpu", "/cache/compiled", Path("/cache/compiled/lowered")),
        ("gpu", "gs://bucket/compiled", None),
        ("gpu", None, None),
        ("cpu", "/cache/compiled", None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda default=default: default)
            patch.setattr(exported.jax, "config", SimpleNamespace(jax_compilation_cache_dir=place))
            assert exported.folder(accelerator) == kept


_LOAD_FOR_A_GPU = """
import sys
from pathlib import Path
from types import SimpleNamespace
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from qwen_jax.inference import exported
from qwen_jax.parallel.sharding import make_mesh

gpu = SimpleNamespace(platform="gpu", device_kind="a card", client=SimpleNamespace(platform_version="1"))
mesh = SimpleNamespace(devices=np.array([gpu]), axis_names=("data",), axis_types=())
x = jax.ShapeDtypeStruct((4,), "float32", sharding=NamedSharding(make_mesh({}), PartitionSpec(None)))
exported.load_or_export(Path(sys.argv[1]), lambda x: 2 * x, (x,), (), mesh)
print("jax.experimental.mosaic.gpu" in sys.modules)
"""


def test_a_program_from_a_file_finds_the_library_of_its_kernels(tmp_path: Path) -> None:
    """XLA links kernels of a GPU with a library whose place is told by this module of JAX, which nothing else imports
    where no kernel is traced."""
    for imported in ("False", "True"):
        command = [sys.executable, "-c", _LOAD_FOR_A_GPU, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [imported], done.stderr
    assert len(list(tmp_path.iterdir())) == 1
