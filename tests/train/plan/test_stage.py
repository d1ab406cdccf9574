"""Plans of stages, by the command and by search."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import train.plan.stage as stage_module
from qwen_jax.cli import main
from qwen_jax.errors import InputError
from qwen_jax.published import published
from tests.helpers.tpu_compiler import needs_libtpu
from train.config import RunConfig, Stage, set_fields
from train.optimizer import Schedule
from train.plan.of_run import stages_of
from train.plan.stage import plan_stage, search
from train.plan.topology import CHIPS, Target
from train.step import check_divides

_CONFIG = """
from train.config import RunConfig, Stage
from train.optimizer import Schedule
from qwen_jax.published import published
import dataclasses


def main() -> RunConfig:
    model = dataclasses.replace(published("tiny"), num_layers=2, vocab_size=512)
    stages = tuple(Stage(Schedule(10), length=n, batch_size=8, mixture={"web": 1}) for n in (64, 64, 128))
    return RunConfig("out", model, "tokenizer", {"web": "data"}, stages)
"""


@needs_libtpu
def test_command_plans_each_kind_of_stage_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.py").write_text(_CONFIG)
    command = ["plan", "--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2"]
    assert main([*command, "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["options"]["stage"], second["options"]["stage"]) == (1, 3)
    assert first["mesh"] == {"fsdp": 4}
    assert first["fits"]
    needed = {"hbm_bytes", "hbm_limit_bytes", "flops_per_step", "collective_bytes", "estimated_step_seconds"}
    assert needed <= first.keys()
    assert second["flops_per_step"] > first["flops_per_step"]
    assert main([*command, "--mesh", "fsdp=2,tensor=2"]) == 0
    said = capsys.readouterr().out
    assert "compiled for v5e:2x2" in said
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("stage")] == ["stage 1", "stage 3"]
    assert main([*command, "--mesh", "fsdp=2"]) == 1
    assert "4 devices" in capsys.readouterr().err


@needs_libtpu
def test_a_batch_that_does_not_divide_is_one_sentence(tmp_path: Path) -> None:
    """The sentence of training, and nothing else: the TPU compiler does not complain of a machine without TPUs."""
    (tmp_path / "run.py").write_text(_CONFIG)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU")}
    arguments = ["--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2"]
    arguments += ["--set", "stages.0.batch_size=12", "stages.0.accumulation=3"]
    code = "import sys; from qwen_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "plan", *arguments, "--set", "stages.0.accumulation=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], env=environment)
    with pytest.raises(InputError) as error:
        check_divides(12, 2, 4, where="Stage 1: ")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"qwen-jax: error: {error.value}\n")


def test_each_micro_batch_must_divide_too() -> None:
    where = Target("eight", tuple(jax.devices()), CHIPS["v5e"], 1)
    for rows, accumulation, shards in ((7, 1, 8), (8, 2, 8), (12, 2, 4)):
        config = set_fields(_run(64, rows), f"stages.0.accumulation={accumulation}")
        axes = {"fsdp": shards, "tensor": 8 // shards}
        message = (
            f"Stage 1: a batch of {rows} rows does not divide into {accumulation} micro-batches over {shards} shards"
        )
        with pytest.raises(InputError, match=message):
            plan_stage(stages_of(config)[0], where, axes)


@needs_libtpu
def test_search_keeps_a_given_mesh_and_ranks_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.py").write_text(_CONFIG.replace("(64, 64, 128)", "(64,)"))
    command = ["plan", "--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2", "--search", "--json"]
    assert main([*command, "--mesh", "fsdp=2,tensor=2"]) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["mesh"] for p in plans] == [{"fsdp": 2, "tensor": 2}] * 3
    assert {p["options"]["remat"] for p in plans} == {"none", "dots", "full"}
    fitting = [p["estimated_step_seconds"] for p in plans if p["fits"]]
    assert len(fitting) == 3
    assert fitting == sorted(fitting)
    assert main([*command, "--mesh", "fsdp=2,tensor=4"]) == 1
    assert "v5e:2x2 has 4 devices in 1 slices" in capsys.readouterr().err


def _run(length: int, batch_size: int, **sizes: Any) -> RunConfig:
    model = dataclasses.replace(published("tiny"), **{"num_layers": 2, "vocab_size": 512, **sizes})
    stage = Stage(Schedule(10), length=length, batch_size=batch_size, mixture={"web": 1})
    return RunConfig("out", model, "tokenizer", {"web": "data"}, (stage,))


def test_search_tries_the_meshes_that_divide_and_splits_only_long_rows() -> None:
    where = Target("eight", tuple(jax.devices()), CHIPS["v5e"], 1)

    def tried(config: RunConfig) -> list[tuple[int, int, int]]:
        return [(m["fsdp"], m["context"], m["tensor"]) for m in stage_module._meshes(stages_of(config)[0], where)]

    # Four heads: a tensor axis of eight does not divide them.
    assert tried(_run(64, 8)) == [(8, 1, 1), (4, 1, 2), (2, 1, 4)]
    # Four rows: fsdp is at most four.
    assert tried(_run(32_768, 4)) == [
        (4, 1, 2),
        (2, 1, 4),
        (4, 2, 1),
        (2, 2, 2),
        (1, 2, 4),
        (2, 4, 1),
        (1, 4, 2),
        (1, 8, 1),
    ]


def test_what_a_candidate_is_wrong_about_besides_its_mesh_is_not_hidden() -> None:
    """A search passes over meshes that do not divide, and over nothing else."""
    where = Target("eight", tuple(jax.devices()), CHIPS["v5e"], 1)
    with pytest.raises(InputError, match="Rows of 66 tokens do not divide into 4 chunks"):
        search(stages_of(_run(66, 4))[0], where, {"fsdp": 4, "context": 2})
    with pytest.raises(InputError, match=r"num_heads \(4\) is not divisible"):
        search(stages_of(_run(64, 8))[0], where, {"tensor": 8})


def test_what_cannot_fit_by_its_arrays_alone_is_not_compiled_in_a_search() -> None:
    small = dataclasses.replace(CHIPS["v5e"], hbm_bytes=100_000)
    plans = search(stages_of(_run(64, 8))[0], Target("eight", tuple(jax.devices()), small, 1), {"fsdp": 8})
    # Each policy, with 1 part only: 8 rows on 8 devices.
    assert [(p.fits, p.options["accumulation"]) for p in plans] == [(False, 1)] * 3
    for p in plans:
        assert p.hbm_bytes == p.weights_bytes + p.moments_bytes + p.activations_bytes > 100_000
        assert "not compiled" in p.why_not


@needs_libtpu
def test_what_does_not_fit_says_how_much_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6.4 billion parameters, 12 bytes each on four chips of v5e: refused by the compiler itself."""
    wide = _CONFIG.replace("vocab_size=512", "vocab_size=512, hidden_size=8192, intermediate_size=2**18")
    (tmp_path / "run.py").write_text(wide.replace("num_layers=2", "num_layers=1").replace("(64, 64, 128)", "(64,)"))
    command = ["plan", "--config", f"{tmp_path}/run.py", "--topology", "v5e:2x2"]
    assert main([*command, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False
    # All that is there at once: weights, moments, and the gradient of each weight.
    assert 1.3 * (plan["weights_bytes"] + plan["moments_bytes"]) < plan["hbm_bytes"] < 2**36
    assert f"{plan['hbm_limit_bytes'] / 2**30:.2f}G" in plan["why_not"]
    assert main(command) == 1
    assert "DOES NOT FIT in 15.75 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.5G of 15.75G hbm. Exceeded by 4.75G.",
            20.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes.", 0),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_words_of_a_compiler(message: str, needed: float | None) -> None:
    assert stage_module._asked_for(message) == needed
