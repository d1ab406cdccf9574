"""`qwen-jax serve`: its options, what it gives to the engine, and a reward model from start to end."""

import dataclasses
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import httpx
import pytest

from convert.quantized.between import format_of
from convert.quantized.export import export
from convert.source import TreeSource
from qwen_jax.cli import main
from qwen_jax.config import load_config
from qwen_jax.inference.proposers import Ngrams
from qwen_jax.quantization import W8A8_TOKENS, Quantization, Scheme
from qwen_jax.tokenizer import train_bpe
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.quantized import random_quantized
from tests.helpers.reward import make_reward_checkpoint
from tests.helpers.runs import print_seed

ROOT = Path(__file__).parents[3]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["hello world, hello there"] * 4, 300)
    make_hf_checkpoint(folder, vocab_size=384, eos_token_id=tokenizer.eos_id, dialect="4", dtype="bfloat16")
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 20, "max_new_tokens": 5}))
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    make_reward_checkpoint(folder, "linear", vocab_size=384)
    train_bpe(["hello world, hello there"] * 4, 300).save(folder)
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine was made with, and what would have been served."""
    seen: dict[str, Any] = {}

    class ContinuousEngine(FakeEngine):
        leads = True

        def __init__(self, config: Any, params: Any, mesh: Any, **options: Any) -> None:
            seen.update(config=config, params=params, mesh=mesh, options=options)
            super().__init__(tokenizer=options["tokenizer"], config=config)
            self.adapters = tuple(options.get("adapters", ()))

        def start(self, report: Any) -> float:
            report("decode 1 rows", 1.0, 1, 1)
            seen["started"] = True
            return 1.0

    def run(app: Any, host: str, port: int, announce: Any) -> bool:
        seen.update(app=app, host=host, port=port)
        return False

    module = types.ModuleType("qwen_jax.inference.continuous")
    module.ContinuousEngine = ContinuousEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qwen_jax.inference.continuous", module)
    monkeypatch.setattr("qwen_jax.serving.server.run", run)
    return seen


def test_options_reach_the_engine_and_the_server(
    served: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_JAX_API_KEY", "b, c")
    monkeypatch.setattr("convert.adapter.load_adapters", lambda folders, config: folders)
    options = (
        f"--port 0 --max-model-len 64 --max-num-seqs 8 --max-num-batched-tokens 128 --gpu-memory-utilization 0.5 "
        f"--no-prefix-caching --dtype float32 --adapter poet={tmp_path} --speculative ngram --num-speculative-tokens 3 "
        "--api-key a --served-model-name qwen --served-model-name other --pooling last --max-queue 7 --max-choices 3 "
        "--max-logprobs 4 --max-body-bytes 1000 --request-timeout 9 --shutdown-timeout 2 "
        "--allowed-origin https://x.example --log-interval 7"
    )
    assert main(["serve", str(model), *options.split()]) == 0
    tokenizer = served["options"].pop("tokenizer")
    assert served["options"].pop("eos_token_ids") == (tokenizer.eos_id,)
    proposer = served["options"].pop("proposer")
    assert isinstance(proposer, Ngrams)
    assert proposer.count == 3
    assert served["started"]
    assert served["options"] == {
        "dtype": "float32", "max_seqs": 8, "max_length": 64, "max_batched_tokens": 128, "memory_fraction": 0.5,
        "prefix_cache": False, "adapters": {"poet": tmp_path}, "kv_dtype": "auto",
    }  # fmt: skip
    context = served["app"].state.context
    settings = context.settings
    assert settings.served_names == ("qwen", "other")
    assert settings.api_keys == ("a", "b", "c")
    assert settings.allowed_origins == ("https://x.example",)
    assert (settings.max_waiting, settings.max_choices, settings.max_logprobs) == (7, 3, 4)
    assert (settings.max_body_bytes, settings.request_timeout, settings.drain_timeout) == (1000, 9.0, 2.0)
    assert (settings.pooling, settings.log_interval) == ("last", 7.0)
    assert logging.getLogger("qwen_jax.serving.throughput").isEnabledFor(logging.INFO)
    assert context.service.defaults.max_new_tokens == 5
    assert context.service.defaults.sampling.top_k == 20


def test_rounded_activations_reach_the_model(
    served: dict[str, Any], model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """--w8a8 with int8 weights; for others it is an error before anything is served."""
    config = dataclasses.replace(load_config(model), quantization=Quantization(Scheme("int8", 0, "bfloat16")))
    source = TreeSource(random_quantized(config, print_seed()), config)
    export(source, format_of("compressed-tensors", config), tmp_path / "int8", extra_files_from=model)
    for options, rounded in ((["--w8a8"], W8A8_TOKENS), ([], None)):
        assert main(["serve", str(tmp_path / "int8"), "--port", "0", *options]) == 0
        found = served["config"].quantization
        assert (found.activations, found.rounded_from) == (("int8", rounded) if rounded else ("none", 1))
    served.clear()
    assert main(["serve", str(model), "--port", "0", "--w8a8"]) == 1
    assert "this model is not quantised" in capsys.readouterr().err
    assert not served


def test_the_model_is_called_by_its_folder(
    served: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", "--model", str(model), "--port", "0"]) == 0
    assert served["app"].state.context.settings.served_names == (model.name,)
    # A link has its own name, whatever it points to.
    (tmp_path / "current").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "./current/"]) == 0
    assert served["app"].state.context.settings.served_names == ("current",)
    assert served["host"] == "127.0.0.1"
    assert "adapters" not in served["options"]
    assert served["options"]["max_length"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--port 70000", "--port"),
        ("--max-num-seqs 0", "--max-num-seqs"),
        ("--max-model-len 0", "--max-model-len"),
        ("--max-model-len 10000000", "context"),
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
        ("--adapter /tmp", "NAME=DIR"),
        ("--adapter a=/no/such/folder", "does not exist"),
        ("--adapter a=/tmp --adapter a=/tmp", "Two adapters"),
        ("--max-logprobs 21", "--max-logprobs must be in [0, 20]"),
        ("--max-body-bytes 0", "--max-body-bytes must be positive"),
        ("--max-queue -1", "--max-queue must be"),
        ("--request-timeout nan", "--request-timeout must be"),
        ("--shutdown-timeout -1", "--shutdown-timeout must be"),
        ("--log-interval -1", "--log-interval must be"),
        ("--num-speculative-tokens 8", "needs --speculative"),
        ("--speculative ngrams", "must be ngram, or the folder or Hub id"),
        ("--speculative /no/such/draft", "/no/such/draft"),
        ("--rope-scaling yarn:4 --dual-chunk", "together"),
    ],
)
def test_wrong_options_are_found_before_the_weights_are_loaded(
    served: dict[str, Any], capsys: Capture, model: Path, options: str, words: str
) -> None:
    assert main(["serve", str(model), *options.split()]) == 1
    assert words in capsys.readouterr().err
    assert not served


def test_a_missing_package_names_the_extra(capsys: Capture, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    assert main(["serve", str(model)]) == 1
    assert "uvicorn: run pip install 'qwen-jax[serve]'" in capsys.readouterr().err


def test_a_reward_model_scores_over_http_as_on_the_command_line(reward: Path, tmp_path: Path, capsys: Capture) -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello there"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert main(["score", str(reward), "--input", str(tmp_path / "in.jsonl")]) == 0
    expected = json.loads(capsys.readouterr().out)
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_jax", "serve", str(reward), "--port", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    try:
        assert process.stderr is not None
        url = next(line.split()[2] for line in process.stderr if line.startswith("Serving at"))
        answer = httpx.post(f"{url}/v1/score", json={"messages": [talk, talk]}, timeout=60).json()
        for item in answer["data"]:
            assert item["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert answer["usage"]["prompt_tokens"] == 2 * expected["tokens"]
        assert httpx.post(f"{url}/v1/score", json={"input": "x" * 10**5}, timeout=60).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
