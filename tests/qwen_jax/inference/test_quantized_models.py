"""Texts of quantised models are those of their weights in full precision, in both engines and with adapters."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import convert
from convert.adapter import adapter_folders, load_adapters
from convert.placement import place
from convert.quantized.export import export
from convert.quantized.gptq import Gptq
from convert.source import TreeSource
from qwen_jax.cli import main
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.request import Request
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.quantized import random_quantized, with_quantization
from tests.helpers.runs import print_seed
from tests.qwen_jax.inference.test_adapters import write_adapter

VOCAB = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model with an adapter, the same in full precision, and that with the adapter merged."""
    folder, rng = tmp_path_factory.mktemp("quantised"), print_seed()
    torch.manual_seed(int(rng.integers(1 << 31)))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make_hf_checkpoint(folder / "original", tie=False, eos_token_id=None, **sizes)
    write_adapter(folder / "adapter", model, 3, 2.0, r".*_proj")
    scheme = Scheme("int4", 32, offset="zero", ordered=True)
    config = dataclasses.replace(load_config(folder / "original"), quantization=Quantization(scheme))
    info = Gptq(codes="int4", group=32, offset="zero", desc_act=True, version="gptq_v2")
    source = TreeSource(random_quantized(config, rng), config)
    export(source, info, folder / "model", extra_files_from=folder / "original")
    convert.convert(folder / "model", folder / "plain", "hf", "float32")
    convert.convert(folder / "model", folder / "merged", "hf", "float32", adapter=folder / "adapter")
    return folder


def texts(folder: Path, name: str, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    engine = Engine(*convert.load(folder / name, make_mesh({}, jax.devices()[:1]), "float32"),
                    make_mesh({}, jax.devices()[:1]), dtype="float32", eos_token_ids=())  # fmt: skip
    found = engine.generate(prompts, SamplingParams(logprobs=True), max_new_tokens=8)
    return [(text.token_ids, text.logprobs or []) for text in found]


@pytest.mark.parametrize("axes", [{}, {"tensor": 2}], ids=["one device", "tensor 2"])
def test_both_engines(folder: Path, axes: dict[str, int]) -> None:
    prompts = [print_seed().integers(0, VOCAB, n).tolist() for n in (3, 17, 9)]
    want, merged = texts(folder, "plain", prompts), texts(folder, "merged", prompts)
    if not axes:
        for (ids, log_probs), (plain_ids, plain_log_probs) in zip(texts(folder, "model", prompts), want, strict=True):
            assert ids == plain_ids
            np.testing.assert_allclose(log_probs, plain_log_probs, atol=2e-4)
    mesh = make_mesh(axes, jax.devices()[: 2 if axes else 1])
    config, params = convert.load(folder / "model", mesh, "float32")
    adapters = load_adapters(adapter_folders([f"tuned={folder / 'adapter'}"]), config)
    sizes: dict[str, Any] = {"max_seqs": 4, "max_length": 64, "page_size": 16, "num_pages": 32}
    sizes |= {"max_batched_tokens": 32, "eos_token_ids": (), "adapters": adapters}
    with ContinuousEngine(config, params, mesh, dtype="float32", **sizes) as engine:
        requests = [
            Request(tuple(ids), Ending(frozenset(), (), 8), SamplingParams(), adapter=adapter)
            for adapter in (None, "tuned")
            for ids in prompts
        ]
        found = [stream.result() for stream in [engine.submit(request) for request in requests]]
    for text, (ids, log_probs) in zip(found, [*want, *merged], strict=True):
        assert list(text.token_ids) == ids
        np.testing.assert_allclose([token.logprob for token in text.tokens], log_probs, atol=2e-4)


@pytest.mark.parametrize(
    "scheme",
    [Scheme("int4", 32, offset="zero"), Scheme("int8", 32), Scheme("float8_e4m3fn"), Scheme("int4", 32, offset="min")],
    ids=["int4", "int8", "fp8", "int4 with minima"],
)
@pytest.mark.draw(1)
def test_text_on_a_tensor_axis(scheme: Scheme) -> None:
    """The text of one device, also where a shard has a part of a group: 48 of 96 inputs, in groups of 32."""
    rng = print_seed()
    config = dataclasses.replace(published("tiny"), intermediate_size=96, vocab_size=VOCAB, eos_token_ids=())
    config = with_quantization(config, Quantization(scheme))
    params, prompts = random_quantized(config, rng), [rng.integers(0, VOCAB, n).tolist() for n in (3, 17)]
    found = []
    for shards in (1, 2):
        mesh = make_mesh({"tensor": shards}, jax.devices()[:shards])
        placed = place(TreeSource(params, config), mesh, "float32", Options(stacked=False))
        engine = Engine(config, placed, mesh, dtype="float32")
        found.append(engine.generate(prompts, SamplingParams(logprobs=True), max_new_tokens=8))
    for one, two in zip(*found, strict=True):
        assert one.token_ids == two.token_ids
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=2e-4)


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` says the same; an adapter is not merged into codes."""
    said = []
    for name in ("model", "plain"):
        options = ["--prompt-ids", "5,6,7", "--max-new-tokens", "6", "--dtype", "float32"]
        assert main(["generate", str(folder / name), *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    with pytest.raises(InputError, match=r"quantised, so that .* cannot be merged"):
        convert.load(folder / "model", make_mesh({}, jax.devices()[:1]), adapter=folder / "adapter")
