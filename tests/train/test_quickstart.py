"""The quickstart from text to picture with the smallest model; conversion and generation are replaced by stubs."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import load_tokenizer
from train.quickstart import QuickstartOptions, run

SENTENCES = ["def add(a, b):\n    return a + b\n", "class Point:\n    x = 1\n", "import math\n", "print('ok')\n"]


class StandIns:
    """Writes the weights as they are, compares them, and completes with a fixed text."""

    def export(self, params, config, tokenizer, folder):
        folder.mkdir()
        np.savez(folder / "weights.npz", *jax.tree.leaves(jax.device_get(params)))

    def verify_export(self, params, config, folder):
        saved = np.load(folder / "weights.npz")
        leaves = jax.tree.leaves(jax.device_get(params))
        for name, leaf in zip(saved.files, leaves, strict=True):
            np.testing.assert_array_equal(saved[name], leaf)
        return len(leaves)

    def complete(self, folder, prompts, max_new_tokens):
        assert (folder / "weights.npz").exists()
        for prompt in prompts:
            yield iter([f"<{len(prompt)}>", "[bold]é[/bold]"])


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.py").write_text("".join(rng.choice(SENTENCES, 60)))
    (folder / "image.png").write_bytes(b"\x89PNG\xff")
    return folder


def options(text, tmp_path, **kwargs):
    defaults = {"steps": 12, "batch": 2, "length": 32, "layers": 1, "hidden": 64, "vocab_size": 320}
    return QuickstartOptions(**{"text": (str(text),), "output": tmp_path / "run", **defaults, **kwargs})


def quickstart(chosen, stand_ins=None):
    stand_ins, out, err = stand_ins or StandIns(), io.StringIO(), io.StringIO()
    summary = run(
        chosen,
        export=stand_ins.export,
        verify_export=stand_ins.verify_export,
        complete=stand_ins.complete,
        console=Console(file=out, width=200),
        progress=Console(file=err, width=200),
    )
    return summary, out.getvalue(), err.getvalue()


def test_everything_is_made_and_a_second_run_takes_its_place(text, tmp_path):
    summary, out, err = quickstart(options(text, tmp_path))
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if p.is_dir()) == ["12", "6"]
    config = load_config(folder / "checkpoints" / "12")
    assert config.num_params()["total"] == summary["parameters"]
    assert load_tokenizer(folder / "checkpoints" / "12").fingerprint() == summary["tokenizer"]["fingerprint"]
    curve = list(summary["held_out_bits_per_byte"].values())
    assert curve[-1] < curve[0]
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["text"]["skipped_files"] == [str(text / "image.png")]
    assert summary["tensors_bit_for_bit"] == len(list(np.load(folder / "model" / "weights.npz")))
    # Markup in a completion is text.
    assert summary["completions"]["class"] == "<5>[bold]é[/bold]"
    assert "class<5>[bold]é[/bold]" in out
    assert "1 files skipped" in err
    assert "step 12/12" in err
    assert str(folder / "model") in out
    # Nothing else is left beside it, and a second run replaces it.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text"]
    (folder / "mark").write_text("old")
    again, _, _ = quickstart(options(text, tmp_path, prompts=("x",)))
    assert again["held_out_bits_per_byte"] == summary["held_out_bits_per_byte"]
    assert not (folder / "mark").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text"]


def test_a_failure_leaves_nothing_and_keeps_the_earlier_run(text, tmp_path):
    class Damaged(StandIns):
        def verify_export(self, params, config, folder):
            raise InputError("tensor differs")

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text('{"made_by": "qwen-jax quickstart"}')
    with pytest.raises(InputError, match="tensor differs"):
        quickstart(options(text, tmp_path, steps=2), Damaged())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text"]
    assert [p.name for p in folder.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"made_by": "someone"}'])
def test_a_folder_of_something_else_is_never_replaced(text, tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ("thesis.tex" if content is None else "summary.json")).write_text(content or "mine")
    with pytest.raises(InputError, match="was not made by a quickstart"):
        quickstart(options(text, tmp_path))
    assert len(list(folder.iterdir())) == 1


def test_missing_and_too_little_text_are_clear_errors(text, tmp_path):
    with pytest.raises(InputError, match="No such file or folder"):
        quickstart(options(tmp_path / "nowhere", tmp_path))
    with pytest.raises(InputError, match="Found no text"):
        quickstart(options(text / "image.png", tmp_path))
    (tmp_path / "short").write_text("a line\nanother line\n")
    with pytest.raises(InputError, match="Give more text"):
        quickstart(options(tmp_path / "short", tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 1}, "steps must be at least 2"),
        ({"hidden": 100}, "multiple of 64"),
        ({"prompts": ("",)}, "prompt is empty"),
        ({"max_megabytes": 0.0}, "must be positive"),
    ],
)
def test_bad_options_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        QuickstartOptions(**kwargs)


def test_training_imports_neither_conversion_nor_the_command_line():
    import ast

    import train

    for path in Path(train.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not [n for n in names if n.split(".")[0] in ("convert", "experiments") or n == "qwen_jax.cli"], path
