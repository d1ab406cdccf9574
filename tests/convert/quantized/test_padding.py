"""The zero rows that the quantised 72B models have between their first rows are dropped, and nothing else."""

import dataclasses
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import convert, load, open_source
from convert.quantized import without_padding
from convert.quantized.export import export
from convert.quantized.gptq import Gptq
from convert.quantized.padding import published_width
from convert.source import TreeSource
from qwen_jax.cli import main
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import PUBLISHED, published
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers.forward import logits
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.quantized import random_quantized
from tests.helpers.runs import print_seed

WIDTH, PADDED = 128, 160


def padded(weight: np.ndarray, padding: int) -> np.ndarray:
    """The recipe of QwenLM/Qwen2.5: [w0, 0, w1, 0, ...] for the first rows, the rest unchanged."""
    rows = []
    for i, row in enumerate(weight):
        rows += [row, np.zeros_like(row)] if i < padding else [row]
    return np.stack(rows)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("width", "padding"), [(29568, 128), (40, 7), (5, 5), (6, 0)])
def test_dropping_undoes_the_published_padding(width: int, padding: int, dtype: type) -> None:
    """Rows of gate and up, and columns of down, bit for bit; also where the matrix has zero rows of its own."""
    weight = print_seed().standard_normal((width, 3)).astype(dtype)
    weight[[1, width - 1]] = 0
    full = padded(weight, padding)
    assert full.shape[0] == width + padding
    assert without_padding(full, 0, width).tobytes() == weight.tobytes()
    columns = without_padding(np.ascontiguousarray(full.T), 1, width)
    assert np.ascontiguousarray(columns).tobytes() == np.ascontiguousarray(weight.T).tobytes()


def test_rows_that_are_no_padding_are_kept() -> None:
    """Rows with values where padding should be, and sizes that no padding explains, are refused."""
    weight = print_seed().standard_normal((20, 3)).astype(np.float32)
    full = padded(weight, 4)
    full[3, 1] = 1e-6
    with pytest.raises(InputError, match=r"1 of the 4 rows of padding \(1, 3, ... 7\) are not zero"):
        without_padding(full, 0, 20)
    with pytest.raises(InputError, match="Expected 9 to 18 rows with padding, got 20"):
        without_padding(weight, 0, 9)
    with pytest.raises(InputError, match="Expected 21 to 42 rows with padding, got 20"):
        without_padding(weight, 0, 21)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model whose feed-forward layers are padded, and the same with a value in a row of padding."""
    folder, rng = tmp_path_factory.mktemp("padded"), print_seed()
    sizes = {"hidden_size": 64, "intermediate_size": PADDED, "num_attention_heads": 4, "num_key_value_heads": 2}
    make_hf_checkpoint(folder / "original", tie=False, eos_token_id=None, **sizes)
    scheme, info = Scheme("int4", 32), Gptq(codes="int4", group=32)
    config = dataclasses.replace(load_config(folder / "original"), quantization=Quantization(scheme))
    params = random_quantized(config, rng)
    for layer in params["layers"]:
        for name in ("gate", "up"):
            layer["mlp"][name]["weight"][1 : 2 * (PADDED - WIDTH) : 2] = 0
    source = TreeSource(params, config)
    export(source, info, folder / "model", extra_files_from=folder / "original")
    params["layers"][-1]["mlp"]["up"]["weight"][5, 3] = 1
    export(source, info, folder / "wrong", extra_files_from=folder / "original")
    return folder


def test_convert_drops_padding_and_keeps_the_model(folders: Path, tmp_path: Path) -> None:
    """The narrower model computes what the padded one does, in a folder and in a GGUF file."""
    model, mesh = folders / "model", make_mesh({}, jax.devices()[:1])
    width = ["--intermediate-size", str(WIDTH)]
    assert main(["convert", str(model), str(tmp_path / "hf"), "--to", "hf", "--dtype", "float32", *width]) == 0
    assert main(["convert", str(model), str(tmp_path / "model.gguf"), *width]) == 0
    found = []
    for path in (model, tmp_path / "hf", tmp_path / "model.gguf"):
        config, params = load(path, mesh, "float32")
        assert config.intermediate_size == (PADDED if path == model else WIDTH)
        text = np.arange(12)[None] % config.vocab_size
        found.append(logits(config, params, mesh, text, Options(stacked=False)))
    for narrow in found[1:]:
        np.testing.assert_allclose(narrow, found[0], rtol=0, atol=2e-5 * np.abs(found[0]).max())


def test_the_published_padding_is_dropped_with_a_dtype_and_kept_with_codes(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    large = published("qwen2.5-72b")
    assert published_width(dataclasses.replace(large, intermediate_size=29_696)) == large.intermediate_size == 29_568
    assert all(published_width(config) == config.intermediate_size for config in PUBLISHED.values())
    monkeypatch.setattr("convert.quantized.padding.published_width", lambda config: WIDTH)
    convert(folders / "model", tmp_path / "hf", "hf", "bfloat16")
    assert f"32 rows of padding are dropped: intermediate size {PADDED} -> {WIDTH}" in caplog.text
    convert(folders / "model", tmp_path / "kept", "hf", "bfloat16", intermediate_size=PADDED)
    convert(folders / "model", tmp_path / "codes", quantization="compressed-tensors")
    convert(folders / "model", tmp_path / "model.gguf")
    widths = {path.name: open_source(path).config.intermediate_size for path in tmp_path.iterdir()}
    assert widths == {"hf": WIDTH, "kept": PADDED, "codes": PADDED, "model.gguf": PADDED}


def test_what_is_no_padding_is_refused_and_nothing_is_left(folders: Path, tmp_path: Path) -> None:
    for name, options, message in (
        ("wrong", {"dtype": "float32", "intermediate_size": WIDTH}, r"1 of the \d+ rows of padding"),
        ("model", {"dtype": "float32", "intermediate_size": PADDED + 1}, "from 80 to 160"),
        ("model", {"quantization": "gptq", "intermediate_size": WIDTH}, "Codes keep the padding"),
    ):
        with pytest.raises(InputError, match=message):
            convert(folders / name, tmp_path / "out", "hf", **options)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())
