"""Runs over whole checkpoints: what is written, what each layer was calibrated on, going on after a kill, bad input."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from convert import convert, load, open_source
from convert.quantize import REPORT, CalibrationText, Recipe, quantize
from convert.quantize.layer import Layer, matrices
from convert.quantized import Codes, read_format, unpack
from convert.safetensors import SINGLE, read_folder
from convert.source import Source
from qwen_jax.cli import main
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers import forward
from tests.helpers.hf import make_hf_checkpoint

WORDS = "the rows of a text are cut from its first tokens and every layer sees them once\n"
GPTQ = Recipe("gptq", group=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bfloat16 model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "model"
    make_hf_checkpoint(folder, vocab_size=320, dtype="bfloat16")
    train_bpe([WORDS * 3], 300).save(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(" ".join(rng.permutation(WORDS.split())) + "\n" for _ in range(200)))
    return CalibrationText(file, rows=12, length=32)


@pytest.fixture(scope="module")
def made(model: Path, text: CalibrationText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whole`, a GPTQ model; `.again.quantize`, as a kill after layer 0 leaves it; and last outputs."""
    folder = tmp_path_factory.mktemp("made")

    def keep(number: int) -> None:
        if number == 0:
            shutil.copytree(folder / ".whole.quantize", folder / ".again.quantize")
        else:
            shutil.copyfile(folder / ".whole.quantize/layer-00001/outputs.npy", folder / "outputs.npy")

    quantize(model, folder / "whole", GPTQ, text, batch=5, after_layer=keep)
    return folder


def read_matrices(folder: Path, source: Source) -> dict[str, Codes]:
    """All quantised matrices of a folder by module, read by the reader of its format."""
    entries = read_folder(folder)

    def read(name: str) -> np.ndarray:
        entry = entries[name]
        return np.fromfile(entry.file, entry.dtype, int(np.prod(entry.shape)), offset=entry.offset).reshape(entry.shape)

    info = read_format(folder, json.loads((folder / "config.json").read_text())["quantization_config"], entries)
    assert info is not None
    return {
        matrix.module: unpack(
            {name: read(name) for name in entries if name.startswith(f"{matrix.module}.") and "bias" not in name},
            info,
            matrix.module,
            matrix.shape,
        )
        for number in range(source.config.num_layers)
        for matrix in matrices(source.config, number)
    }


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(model: Path, text: CalibrationText, made: Path) -> None:
    """From what was on the disk after layer 0, with an unfinished layer beside it."""
    left = made / ".again.quantize" / ".layer-00001.7.tmp"
    left.mkdir()
    (left / SINGLE).write_bytes(b"half")
    done: list[int] = []
    quantize(model, made / "again", GPTQ, text, batch=5, after_layer=done.append)
    assert done == [1]
    assert not (made / ".again.quantize").exists()
    names = {path.name for path in (made / "whole").iterdir()}
    assert names == {path.name for path in (made / "again").iterdir()}
    for name in names:
        assert (made / "again" / name).read_bytes() == (made / "whole" / name).read_bytes(), name


def test_layers_are_calibrated_on_the_outputs_of_quantised_layers(
    model: Path, text: CalibrationText, made: Path, mesh: Mesh
) -> None:
    """The stream after the last layer is that of the model with the written weights, float32 rounding apart."""
    source = open_source(model)
    config, params = load(model, mesh, "float32", Options(stacked=False))
    written = read_matrices(made / "whole", source)
    for number in range(config.num_layers):
        layer = Layer(source, number)
        for matrix in layer.matrices:
            layer.set_weight(matrix, written[matrix.module].dequantize())
        old = params["layers"][number]
        params["layers"][number] = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), layer.tree(), old)
    tokens = text.tokens(load_tokenizer(model), config)
    want = forward.logits(config, params, mesh, tokens, Options(stacked=False))
    x = np.load(made / "outputs.npy")
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * np.asarray(params["norm"]["weight"])
    got = x @ np.asarray(params["embed"]["weight"]).T
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_the_folder_has_every_tensor_and_says_how_well_it_was_rounded(model: Path, made: Path) -> None:
    source, report = open_source(model), json.loads((made / "whole" / REPORT).read_text())
    matrices_of = {outcome["module"]: outcome for outcome in report["matrices"]}
    assert matrices_of.keys() == read_matrices(made / "whole", source).keys()
    for outcome in matrices_of.values():
        assert 0 < outcome["error"] < outcome["nearest_error"] < 0.3
        assert outcome["rows"] == 12 * 32
    assert report["bytes_after"] < 0.7 * report["bytes_before"]
    # What is not quantised keeps its bytes.
    before, after = read_folder(model), read_folder(made / "whole")
    plain = [name for name in before if name.removesuffix(".weight") not in matrices_of]
    assert len(plain) == 2 + 2 * 5
    for name in plain:
        a, b = before[name], after[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        size = int(np.prod(a.shape)) * a.dtype.itemsize
        data = [entry.file.read_bytes()[entry.offset : entry.offset + size] for entry in (a, b)]
        assert data[0] == data[1], name


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("rtn", group=16, symmetric=False),
        Recipe("rtn", bits=8, group=0, format="compressed-tensors"),
        Recipe("rtn", group=32, format="compressed-tensors"),
        Recipe("rtn", group=32, format="awq", symmetric=False),
        Recipe("fp8"),
        Recipe("int8"),
        Recipe("int8", group=32),
    ],
    ids=lambda recipe: f"{recipe.method}-{recipe.format}-{recipe.group}",
)
def test_without_a_text_weights_are_rounded_to_nearest(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    """The file holds what the report says: the norm of the change of each matrix. vLLM rounds none of its scales."""
    report, source = quantize(model, tmp_path / "new", recipe), open_source(model)
    written = read_matrices(tmp_path / "new", source)
    errors = {outcome.module: outcome.error for outcome in report.outcomes}
    assert errors.keys() == written.keys()
    scales = {"gptq": "float16", "awq": "float16"}.get(recipe.format or "", "bfloat16")
    if recipe.info().activations != "none":
        scales = "float32"
    assert {codes.scales.dtype.name for codes in written.values()} == {scales}
    for number in range(source.config.num_layers):
        layer = Layer(source, number)
        for matrix in layer.matrices:
            weight = np.asarray(layer.weight(matrix))
            change = written[matrix.module].dequantize() - weight
            np.testing.assert_allclose(
                np.linalg.norm(change) / np.linalg.norm(weight), errors[matrix.module], rtol=1e-4
            )
            assert errors[matrix.module] < {4: 0.2, 8: 0.04}[recipe.bits or 0]


def test_experts_with_few_tokens_are_given_all_and_this_is_said(
    text: CalibrationText, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With fewer tokens than most experts need every expert is quantised, and the report marks the starved."""
    make_hf_checkpoint(tmp_path / "moe", moe=True, vocab_size=320, num_hidden_layers=1, hidden_size=32)
    train_bpe([WORDS * 3], 300).save(tmp_path / "moe")
    short = dataclasses.replace(text, rows=2)
    report = quantize(tmp_path / "moe", tmp_path / "new", Recipe("rtn", group=16), short)
    experts = [outcome for outcome in report.outcomes if ".experts." in outcome.module]
    assert len(experts) == 8 * 3
    few = [outcome for outcome in experts if outcome.all_rows]
    assert few, "two rows of 32 tokens for 8 experts, of which a token uses 3, leave some with fewer than 32"
    assert {outcome.rows for outcome in few} == {64}
    assert all(32 <= outcome.rows < 64 or outcome in few for outcome in experts)
    assert f"{len(few) // 3} of 8 experts" in caplog.text


def test_awq_quantises_scaled_weights(model: Path, text: CalibrationText, tmp_path: Path) -> None:
    """No matrix has more error than rounding to nearest gives; norms are folded; the file is AWQ's."""
    report = quantize(model, tmp_path / "new", Recipe("awq", group=32), text)
    assert all(outcome.error <= outcome.nearest_error * 1.01 for outcome in report.outcomes)
    assert max(outcome.alpha or 0 for outcome in report.outcomes) > 0
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert read_matrices(tmp_path / "new", open_source(model)).keys() == {o.module for o in report.outcomes}


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ({"method": "gguf"}, {}, "Unknown method 'gguf'; expected one of gptq, awq"),
        ({"method": "awq", "bits": 8}, {}, "AWQ has 4 bits. For 8 bits use"),
        ({"method": "rtn", "desc_act": True}, {}, "Use the method gptq"),
        ({"method": "fp8", "group": 128}, {}, "one scale for each output"),
        ({"method": "int8", "symmetric": False}, {}, "no zero points"),
        ({"method": "rtn", "group": 128}, {}, "64 inputs of .*--group 32, --group 16, --group 0"),
        ({"method": "gptq", "group": 32}, {}, "--calibration FILE"),
        (
            {"method": "gptq", "group": 32},
            {"rows": 10_000},
            r"tokens; 10000 rows of 32 need 320,000.*--calibration-rows",
        ),
        ({"method": "gptq", "group": 32}, {"length": 1024}, "context of 512"),
        ({"method": "gptq", "group": 32}, {"file": Path("missing.txt")}, "missing.txt does not exist"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(
    recipe: dict[str, Any], changes: dict[str, Any], message: str, model: Path, text: CalibrationText, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        quantize(model, tmp_path / "new", Recipe(**recipe), dataclasses.replace(text, **changes) if changes else None)
    assert not list(tmp_path.iterdir())


def test_a_quantised_model_and_another_run_are_refused(model: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised already, by gptq"):
        quantize(made / "whole", tmp_path / "new", Recipe("fp8"))
    with pytest.raises(InputError, match="exists already"):
        quantize(model, made / "whole", Recipe("fp8"))

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "new", Recipe("fp8"), after_layer=stop)
    with pytest.raises(InputError, match="another run: recipe changed"):
        quantize(model, tmp_path / "new", Recipe("int8"))


def test_json_lines_are_joined_by_the_end_of_text(model: Path, tmp_path: Path) -> None:
    config, tokenizer = open_source(model).config, load_tokenizer(model)
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "the rows"}\n\n{"text": "of a text <|endoftext|>"}\n')
    ids = [
        token for document in tokenizer.encode_documents(["the rows", "of a text <|endoftext|>"]) for token in document
    ]
    np.testing.assert_array_equal(CalibrationText(file, 1, len(ids)).tokens(tokenizer, config), [ids])
    for line, message in (("[1]", 'object with a string "text"'), ("{", "line 1 is not valid JSON")):
        file.write_text(line)
        with pytest.raises(InputError, match=message):
            CalibrationText(file, 1, 8).tokens(tokenizer, config)


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), str(tmp_path / "new"), "--method", "rtn", "--group", "32", "--asym"]) == 0
    out = capsys.readouterr().out
    assert "down_proj" in out
    config = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]
    assert (config["sym"], config["bits"], config["checkpoint_format"]) == (False, 4, "gptq_v2")
    assert main(["quantize", str(model), str(tmp_path / "b"), "--method", "rtn", "--sym", "--asym"]) == 1
    assert "not both" in capsys.readouterr().err


def test_codes_of_a_gguf_file_are_not_taken_for_weights(model: Path, tmp_path: Path) -> None:
    """A quantised file is refused; one of floats is quantised as the folder that it was made of."""
    for kind in ("q8_0", "bf16"):
        convert(model, tmp_path / f"{kind}.gguf", recipe=kind)
    with pytest.raises(InputError, match="quantised already, by the types of its GGUF file"):
        quantize(tmp_path / "q8_0.gguf", tmp_path / "new", Recipe("rtn", group=32))
    assert not list(tmp_path.glob("*new*"))
    want = quantize(model, tmp_path / "folder", Recipe("fp8"))
    assert quantize(tmp_path / "bf16.gguf", tmp_path / "file", Recipe("fp8")).outcomes == want.outcomes


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_stopped_run_belongs_to_the_files_that_it_reads(model: Path, tmp_path: Path, kind: str) -> None:
    """A new folder inside the model, or a log there, does not end a run; other weights do."""
    source = shutil.copytree(model, tmp_path / "model")
    new, weights = source / "new", source / SINGLE
    if kind == "gguf":
        source = weights = tmp_path / "model.gguf"
        convert(model, source)

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, new, Recipe("fp8"), after_layer=stop)
    (new.parent / "log.txt").write_text("stopped")
    before = weights.stat()
    os.utime(weights)
    with pytest.raises(InputError, match="another run: files changed"):
        quantize(source, new, Recipe("fp8"))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    done: list[int] = []
    quantize(source, new, Recipe("fp8"), after_layer=done.append)
    assert done == [1]


def test_too_small_a_disk_is_refused_before_the_first_layer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished layers and the new folder are on the disk together."""
    size = quantize(model, tmp_path / "new", Recipe("fp8")).bytes_after
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))
    with pytest.raises(InputError, match="Make room or choose another disk"):
        quantize(model, tmp_path / "new", Recipe("fp8"), after_layer=pytest.fail)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_of_the_new_folder_is_removed(model: Path, tmp_path: Path) -> None:
    left, of_others = tmp_path / ".new.123.tmp", [tmp_path / ".new.b.123.tmp", tmp_path / ".tmp", tmp_path / ".new.tmp"]
    for folder in (left, *of_others):
        folder.mkdir()
    quantize(model, tmp_path / "new", Recipe("fp8"))
    assert {path.name for path in tmp_path.iterdir()} == {"new", *(folder.name for folder in of_others)}
