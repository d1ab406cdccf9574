"""lm-eval scores a model alike through the server and through its own `hf` backend.

Needs `pip install 'lm-eval[api,hf]'`, which is no part of the development environment.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import convert
from qwen_jax.inference import ContinuousEngine, load_generation_defaults
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.serving.settings import Service
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.serving import Running

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

LENGTH = 128
# How lm-eval may send requests.
WAYS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "batches": {"batch_size": 3},
    "side by side": {"num_concurrent": 3},
    "texts": {"tokenized_requests": False},
}
DOCUMENT = "The capital of France is Paris.\nThe capital of Italy is Rome.\nThe capital of Japan is Tokyo.\n\n"
PROMPTS = ["The capital of France is", "The capital of Italy", DOCUMENT, "🙂"]
UNTIL: list[list[str]] = [[".", "\n\n"], ["ital of"], []]
CONVERSATION = [
    {"role": "system", "content": "Short answers."},
    {"role": "user", "content": "The capital of Italy?"},
    {"role": "assistant", "content": "Rome, of course."},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch: for operations this small, more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows its texts, with more rows than tokens, two ends and a repetition penalty."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([DOCUMENT, *(message["content"] for message in CONVERSATION)] * 4, 360)
    tokenizer.save(folder)
    model = make_hf_checkpoint(folder, vocab_size=384)
    texts = [torch.tensor([ids]) for ids in (tokenizer.encode(DOCUMENT), tokenizer.encode_chat(CONVERSATION))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        for ids in texts:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.eos_id]
    model.generation_config.update(eos_token_id=ends, repetition_penalty=1.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(folder: Path) -> HFLM:
    # Where a text is too long, the windows of an API's model are two tokens shorter than its `max_length`.
    return HFLM(str(folder), device="cpu", dtype="float32", max_length=LENGTH - 2)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    mesh = make_mesh({}, jax.devices()[:1])
    sizes: dict[str, Any] = {"max_seqs": 4, "max_length": LENGTH, "page_size": 16, "max_batched_tokens": 64}
    model = convert.load(folder, mesh, "float32", Options(stacked=False))
    engine = ContinuousEngine(*model, mesh, tokenizer=load_tokenizer(folder), dtype="float32", num_pages=40, **sizes)
    service = Service(engine, load_generation_defaults(folder, engine.config))
    running = Running(service, served_names=("tiny",))
    yield running.url
    running.context.abort()
    running.stop()
    running.join()


def completions(url: str, folder: Path, **arguments: Any) -> LocalCompletionsAPI:
    arguments |= {"base_url": f"{url}/v1/completions", "model": "tiny", "tokenizer": str(folder), "max_retries": 1}
    return LocalCompletionsAPI(max_length=LENGTH, **arguments)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def greedy(prompts: list[Any], until: list[str], **arguments: Any) -> list[Instance]:
    arguments = {"max_gen_toks": 20, "do_sample": False, **arguments}
    return requests("generate_until", [(prompt, {"until": list(until), **arguments}) for prompt in prompts])


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities(url: str, folder: Path, hf: HFLM, way: str) -> None:
    """Also of choices, of an empty context, of characters that are several tokens, and of a context that is cut."""
    contexts = [
        "The capital of France is",
        DOCUMENT + "The capital of Japan is",
        "",
        "The capital of Österreich 🙂 is",
        DOCUMENT * 4 + "The capital of Italy is",
    ]
    choices = [" Paris", " Rome", " Tokyo.\n", " Wien 🙂"]
    asked = requests("loglikelihood", [(context, choice) for context in contexts for choice in choices])
    wanted = hf.loglikelihood(asked)
    found = completions(url, folder, **WAYS[way]).loglikelihood(asked)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=1e-3, rtol=0)
    assert [bool(flag) for _, flag in found] == [bool(flag) for _, flag in wanted]
    assert {bool(flag) for _, flag in wanted} == {False, True}


@pytest.mark.parametrize("way", ["one by one", "side by side"])
def test_rolling_log_probabilities(url: str, folder: Path, hf: HFLM, way: str) -> None:
    asked = requests("loglikelihood_rolling", [(DOCUMENT,), ("x",), ("Österreich 🙂 " + DOCUMENT * 5,)])
    wanted = hf.loglikelihood_rolling(asked)
    found = completions(url, folder, **WAYS[way]).loglikelihood_rolling(asked)
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def texts(hf: HFLM) -> list[list[str]]:
    """What the `hf` backend writes, for each of `UNTIL`."""
    return [hf.generate_until(greedy(PROMPTS, until)) for until in UNTIL]


@pytest.mark.parametrize("way", WAYS)
def test_greedy_texts(url: str, folder: Path, texts: list[list[str]], way: str) -> None:
    model = completions(url, folder, **WAYS[way])
    assert [model.generate_until(greedy(PROMPTS, until)) for until in UNTIL] == texts
    assert texts[0][0] == " Paris"


def test_the_checkpoints_penalty_counts(hf: HFLM, texts: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would not show that both obey generation_config.json."""
    monkeypatch.setattr(hf.model.generation_config, "repetition_penalty", 1.0)
    assert hf.generate_until(greedy(PROMPTS, UNTIL[-1])) != texts[-1]


@pytest.mark.parametrize("concurrent", [1, 3])
def test_greedy_answers(url: str, hf: HFLM, concurrent: int) -> None:
    chat = LocalChatCompletion(
        base_url=f"{url}/v1/chat/completions", model="tiny", max_retries=1, num_concurrent=concurrent
    )
    conversations = [CONVERSATION[:2], [{"role": "user", "content": "Rome?"}], CONVERSATION[1:2]]
    for until, first in ((["\n\n"], "Rome, of course."), ([" of"], "Rome,")):
        wanted = hf.generate_until(greedy([hf.apply_chat_template(one) for one in conversations], until))
        found = chat.generate_until(greedy([chat.apply_chat_template(one) for one in conversations], until))
        assert found == wanted
        assert found[0] == first
