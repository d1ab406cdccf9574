"""LoRA adapters for each request: a text is that of the model with its adapter merged, whatever runs beside it."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from safetensors.torch import load_file, save_file

import convert
from convert.adapter import adapter_folders, load_adapters, load_factors
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.adapters import adapter_ranks
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.proposers import Ngrams
from qwen_jax.inference.request import Request
from qwen_jax.lora import AdapterFactors
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.params import Params
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed

VOCAB = 160
ENDING = Ending(frozenset(), (), 12)
# Rank, scale, and the targets of each adapter, the second in the last layer alone.
ADAPTERS: dict[str, tuple[int, float, str]] = {
    "all": (3, 2.0, r".*_proj"),
    "some": (5, 1.5, r"model\.layers\.1\..*(q_proj|v_proj|down_proj)"),
}
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, top_k=12, seed=7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its adapters, and an engine of the fixed batch for the model and each merged model."""

    folder: Path
    merged: dict[str | None, Engine]

    def load(self, axes: dict[str, int] | None = None, adapter: str | None = None) -> tuple[ModelConfig, Params, Mesh]:
        mesh = make_mesh(axes or {}, None if axes else jax.devices()[:1])
        path = None if adapter is None else self.folder / adapter
        return *convert.load(self.folder, mesh, "float32", Options(stacked=False), path), mesh

    def engine(self, axes: dict[str, int] | None = None, **options: Any) -> ContinuousEngine:
        config, params, mesh = self.load(axes)
        adapters = load_adapters(adapter_folders([f"{name}={self.folder / name}" for name in ADAPTERS]), config)
        sizes = {"max_seqs": 4, "max_length": 96, "page_size": 16, "num_pages": 32, "max_batched_tokens": 32}
        return ContinuousEngine(
            config, params, mesh, dtype="float32", **{**sizes, "eos_token_ids": (), "adapters": adapters, **options}
        )

    def expected(self, request: Request) -> tuple[list[int], list[float]]:
        (text,) = self.merged[request.adapter].generate(
            [list(request.prompt)],
            dataclasses.replace(request.sampling, logprobs=True),
            max_new_tokens=request.ending.max_new_tokens,
        )
        assert text.logprobs is not None
        return text.token_ids, text.logprobs


def write_adapter(folder: Path, model: torch.nn.Module, rank: int, scale: float, targets: str) -> None:
    """Writes a random adapter as PEFT does. Its update is about as large as the weights."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".experts." not in name and re.fullmatch(targets, name):
            out, inputs = module.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs) * inputs**-0.5
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=["dense", "experts"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(int(print_seed().integers(1 << 31)))
    folder = tmp_path_factory.mktemp(request.param)
    moe = request.param == "experts"
    # With one key/value head, two tensor shards repeat it.
    model = make_hf_checkpoint(folder, moe=moe, num_key_value_heads=2 if moe else 1, eos_token_id=None)
    for name, settings in ADAPTERS.items():
        write_adapter(folder / name, model, *settings)
    case = Case(folder, {})
    for name in (None, *ADAPTERS):
        case.merged[name] = Engine(*case.load(adapter=name), dtype="float32", eos_token_ids=())
    return case


def random_request(rng: np.random.Generator, shared: list[int]) -> Request:
    """Of any adapter or none; half of them with a beginning that others have, too."""
    ids = (shared if rng.integers(2) else []) + rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
    adapter = (None, *ADAPTERS)[int(rng.integers(3))]
    return Request(tuple(ids), ENDING, (GREEDY, SAMPLED)[int(rng.integers(2))], adapter=adapter)


@pytest.mark.parametrize("axes", [None, {"tensor": 2}], ids=["one device", "tensor 2"])
def test_texts_are_those_of_merged_models(case: Case, axes: dict[str, int] | None) -> None:
    """Token for token and with the same log-probabilities, in steps of rows with different adapters."""
    rng = print_seed()
    shared = rng.integers(0, VOCAB, 32).tolist()
    with case.engine(axes) as engine:
        assert engine.adapters == tuple(ADAPTERS)
        mixed: set[int] = set()
        pack_rows = engine._runner.slots.pack_rows

        def watch(*args: Any) -> Any:
            adapters = pack_rows(*args)
            mixed.add(len(set(adapters.tolist())))
            return adapters

        engine._runner.slots.pack_rows = watch
        streams = []
        for _ in range(9):
            request = random_request(rng, shared)
            streams.append((request, engine.submit(request, incremental=False)))
            time.sleep(float(rng.exponential(0.01)))
        for request, stream in streams:
            got, (tokens, logprobs) = stream.result(), case.expected(request)
            assert got.token_ids == tokens
            np.testing.assert_allclose([token.logprob for token in got.tokens], logprobs, atol=1e-4)
        assert max(mixed) > 1


def test_whole_texts_prefixes_and_new_weights(case: Case) -> None:
    """Prompts are scored with their adapters, pages are found again by the same adapter alone, adapters stay."""
    rng = print_seed()
    prompt = tuple(rng.integers(0, VOCAB, 40).tolist())
    names = (None, *ADAPTERS)
    requests = [Request(prompt, ENDING, adapter=name, prompt_logprobs=True) for name in names]
    want = [case.expected(request) for request in requests]
    assert not any(np.allclose(want[i][1], want[j][1], atol=1e-2) for i, j in ((0, 1), (0, 2), (1, 2)))
    with case.engine(proposer=Ngrams(2, rows=8)) as engine:
        for found in (0, 32):
            for request, (tokens, _) in zip(requests, want, strict=True):
                # A prompt that is scored does not look for pages.
                got = engine.generate([dataclasses.replace(request, prompt_logprobs=False)])[0]
                assert (got.token_ids, got.cached_tokens) == (tokens, found)
        # The log-probabilities of whole texts are those of generation, and embeddings differ.
        for got, (tokens, logprobs), name in zip(engine.generate(requests), want, names, strict=True):
            assert got.prompt_logprobs is not None
            alone = engine.prompt_logprobs([*prompt, *tokens], adapter=name)
            np.testing.assert_allclose([x.logprob for x in alone[40:] if x], logprobs, atol=1e-4)
            for a, b in zip(got.prompt_logprobs[1:], alone[1:40], strict=True):
                assert a is not None
                assert b is not None
                assert abs(a.logprob - b.logprob) < 1e-4
            np.testing.assert_allclose(engine.score([prompt], [tokens], name)[0], logprobs, atol=1e-4)
        hidden = [engine.embed([prompt, prompt[:7]], adapter=name) for name in names]
        assert np.abs(hidden[0] - hidden[1]).max() > 1e-2 < np.abs(hidden[0] - hidden[2]).max()
        # Texts of different adapters share a row.
        numbers, texts = [0, 1, 2, 1], [prompt[:7]] * 4
        mixed = engine.call(lambda: engine._runner.embed(texts, "mean", numbers))
        np.testing.assert_allclose(mixed, [hidden[i][1] for i in numbers], atol=1e-4)
        engine.update_weights(case.load()[1])
        got = engine.generate([requests[1]])[0]
        assert (got.token_ids, got.cached_tokens) == (want[1][0], 0)


def test_an_engine_without_adapters_has_none(case: Case) -> None:
    with case.engine(adapters=None) as engine:
        assert engine.adapters == ()
        assert not any("lora" in str(path) for path, _ in jax.tree.leaves_with_path(engine._runner.params))
        with pytest.raises(InputError, match="no adapter 'all'; this engine has none"):
            engine.submit(Request((1,), ENDING, adapter="all"))


def test_what_does_not_fit_is_refused(case: Case, tmp_path: Path) -> None:
    config = convert.open_source(case.folder).config
    with case.engine() as engine:
        for ask in (
            lambda: engine.submit(Request((1,), ENDING, adapter="other")),
            lambda: engine.prompt_logprobs([1, 2], adapter="other"),
            lambda: engine.embed([[1, 2]], adapter="other"),
        ):
            with pytest.raises(InputError, match="no adapter 'other'; expected one of all, some"):
                ask()
    some = load_factors(case.folder / "some", config)
    assert some.layers.keys() == {1}
    assert dict(adapter_ranks([some])) == {"qkv": 10, "down": 5}
    a, b = some.layers[1]["q"]
    for layers, message in (
        ({1: {"q": (a[:, :-1], b)}}, r"A \[5, 63\] and B .* for q of layer 1"),
        ({1: {"experts": (a, b)}}, "no such projection"),
        ({2: {"q": (a, b)}}, "layer 2; this model of 2 layers"),
        ({1: {"q": (a, b * np.inf)}}, "not finite"),
        ({}, "no factors"),
    ):
        with pytest.raises(InputError, match=message):
            case.engine(adapters={"x": AdapterFactors(5, layers)})
    # Modules that are trained whole, and command lines.
    (tmp_path / "whole").mkdir()
    tensors = load_file(case.folder / "some" / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.model.norm.weight": torch.ones(64)},
        tmp_path / "whole" / "adapter_model.safetensors",
    )
    (tmp_path / "whole" / "adapter_config.json").write_text((case.folder / "some" / "adapter_config.json").read_text())
    with pytest.raises(InputError, match=r"modules_to_save.*Merge it instead"):
        load_factors(tmp_path / "whole", config)
    for pairs, message in (
        (["x"], "NAME=DIR"),
        (["=x"], "NAME=DIR"),
        (["a b=x"], "NAME=DIR"),
        (["a=/no/such/folder"], "does not exist"),
        ([f"x={case.folder / 'some'}"] * 2, "Two adapters"),
    ):
        with pytest.raises(InputError, match=message):
            adapter_folders(pairs)
