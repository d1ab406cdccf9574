"""The report of a run: beginning, summary, traces, MFU, and an end that nothing in it can fail."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.processes import run as run_processes
from tests.helpers.watched import MODEL, configuration
from train import launch as launching
from train import run
from train.config import set_fields
from train.loop import LoopConfig
from train.observe.goodput import Clock
from train.observe.metrics import flops_per_token
from train.observe.report import Report


def test_the_console_tells_what_began_and_what_came_of_it(watched):
    text = watched.text
    assert "resuming after step 3; so far" in text
    assert text.count("no MFU is shown: the peak of 'cpu' is not known") == 1
    assert "finished: 13 steps in" in text
    # Ten batches of 4 rows out of 12, and 3 of 2 out of 12.
    assert "epochs of each data set: long 0.5, short 3.3\n" in text
    assert "could not" not in text
    for word in ("wall time", "compile", "lost", "tokens/s in steps", "held-out     web", "generate --model"):
        assert word in text
    assert (watched.output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_has_the_steps_asked_for_by_the_names_of_the_model(watched):
    assert "steps 6 to 7 are traced: pip install xprof; xprof --logdir" in watched.text
    (trace,) = (watched.output / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (b"attention", b"mlp", b"cross_entropy", b"optimizer"):
        assert scope in content
    names = {
        (event.name, dict(event.stats).get("step_num"))
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert names == {("train", 6), ("train", 7)}


def test_steps_to_trace_must_be_steps_of_the_run(material, tmp_path, capsys):
    config = configuration(material, tmp_path)
    for wrong in ("[0, 2]", "[3, 2]", "[1, 14]", "[1]"):
        with pytest.raises(InputError, match="first and the last step to trace, from 1 to 13"):
            set_fields(config, f"profile={wrong}")
    assert set_fields(config, "profile=[2, 3]").profile == (2, 3)
    file = tmp_path / "c.py"
    file.write_text(
        f"import sys, pathlib\nsys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from tests.helpers import watched\n"
        f"def config():\n    return watched.configuration(pathlib.Path({str(material)!r}), pathlib.Path('out'))\n"
    )
    arguments = ["--config", str(file), "--print-config"]
    assert run.main([*arguments, "--profile", "3:5"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == [3, 5]
    for wrong in ("3", "a:b", "3:", "-1:2"):
        with pytest.raises(InputError, match=r"such as 10:13; got"):
            run.main([*arguments, f"--profile={wrong}"])


def test_mfu_is_of_the_devices_that_a_mesh_has(material, tmp_path, monkeypatch):
    """Those that the mesh leaves unused have no part in the peak, and each stage has its own mesh."""
    monkeypatch.setattr("train.observe.report.peak_flops", lambda devices: 1e9 * len(devices))
    config = set_fields(configuration(material, tmp_path, mesh={"data": 2}), "stages.1.mesh.data=1")
    out = io.StringIO()
    meshes = [make_mesh(config.mesh_axes(index)) for index in range(2)]
    with Report(config, run.reported_stages(config, meshes), 0, Console(file=out, width=200), Clock()) as report:
        for index, (size, length) in enumerate(((2, 16), (1, 32))):
            of_stage = report.mfu(index)
            assert of_stage is not None
            assert of_stage(1000.0) == pytest.approx(1000 * flops_per_token(MODEL, length) / (size * 1e9))
        assert report.display is not None
        report.display.step(10, 3.0, 64, 0.5)
        report.display.step(13, 3.0, 64, 0.5)
    shown = [line.split("MFU ")[1].split("%")[0] for line in out.getvalue().splitlines() if line.startswith("step")]
    expected = [128 * flops_per_token(MODEL, n) / (size * 1e9) for size, n in ((2, 16), (1, 32))]
    assert [float(x) for x in shown] == pytest.approx([100 * x for x in expected], abs=0.06)
    assert f"on 2 x cpu; the mesh leaves {jax.device_count() - 2} more unused" in out.getvalue()
    assert "no MFU" not in out.getvalue()


@pytest.mark.parametrize("fault", ["damaged launches", "no launches", "a plot that raises", "no log"])
def test_the_end_of_a_run_does_not_fail_for_its_plots(watched, material, tmp_path, monkeypatch, fault):
    output = tmp_path / "run"
    shutil.copytree(watched.output, output, ignore=shutil.ignore_patterns("loss.png", "checkpoints"))
    config = configuration(material, output)
    out = io.StringIO()
    meshes = [make_mesh(config.mesh_axes(index)) for index in range(2)]
    with Report(config, run.reported_stages(config, meshes), 13, Console(file=out, width=300), Clock()) as report:
        if fault == "damaged launches":
            (output / "launches.jsonl").write_bytes(bytes(1000))
        elif fault != "a plot that raises":
            (output / f"{'launches' if fault == 'no launches' else 'metrics'}.jsonl").unlink()
        else:
            monkeypatch.setattr("train.observe.report.plot_folder", lambda folder: 1 / 0)
        report.end(13)
    assert out.getvalue().count("could not draw the plots: ") == 1
    assert "finished: 13 steps" in out.getvalue()
    assert ("could not finish the summary: " if fault == "no log" else "wall time") in out.getvalue()


def broken(material: str, output: str) -> str:
    """In each of several processes: a run whose weights are not numbers."""
    init = launching.init_state
    launching.init_state = lambda *args: dataclasses.replace(
        init(*args), params=jax.tree.map(lambda x: x * jnp.nan, init(*args).params)
    )
    config = configuration(Path(material), Path(output), mesh={"data": 2}, loop=LoopConfig(max_skipped=3), held_out={})
    try:
        run.pretrain(config)
    except InputError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all_processes_with_the_step(material, tmp_path):
    messages = run_processes(broken, str(material), str(tmp_path / "run"), processes=2, devices=1)
    assert len(messages) == 2
    for message in messages:
        assert "3 steps up to step 3 were skipped" in message
        assert "loss of the last is nan" in message
