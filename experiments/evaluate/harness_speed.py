"""Speed of our adapter beside lm-eval's `hf` backend, on the same weights, requests and GPU, one after the other.

    python -m experiments.evaluate.harness_speed --folder /tmp/harness [--scale 1.0] [--sets choices endings rolling]
    JAX_PLATFORMS=cpu python -m experiments.evaluate.harness_speed --model tiny --scale 0.01 --folder /tmp/harness

Weights are random; the tokenizer is a BPE trained on the documents. Texts are slices of real documents (the files of
Python's library and of installed packages), with the lengths and the sharing of the benchmarks that they stand for:

  choices   MMLU, 5-shot: 57 subjects, each with solved examples that all of its questions begin with, and four answers
            of one letter. The hf backend reads a question once for its four answers (its `logits_cache`).
  endings   HellaSwag, 10-shot: examples of each question's own, and four endings of some 25 tokens.
  rolling   WikiText-2 test: 62 documents of some 4,000 tokens, in windows of 4,096.

Both sides are bfloat16. The hf backend chooses its batch size itself (`batch_size="auto"`). Each set is run twice on
each side: `cold` is the first time and counts compilation; `warm` is the second, with nothing remembered of the texts.
Both count everything from the text of the requests to the numbers. Every line of output is a JSON object; the last one
of each set has the ratio, and how much the log-probabilities of the two sides differ.
Expected on one H200 with 0.5B: a warm ratio of at least 5 in each set of multiple choice.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 4096
SETS = "choices", "endings", "rolling"
SUBJECTS = 57


def words_of(documents: Sequence[str]) -> list[str]:
    """The words of documents, in order."""
    return " ".join(documents).split(" ")


def slices(words: Sequence[str], rng: np.random.Generator) -> Callable[[float], str]:
    """A function that gives a slice of text with about so many tokens."""

    def give(tokens: float) -> str:
        count = max(int(tokens / 2.2), 1)
        while True:
            at = int(rng.integers(len(words) - count))
            text = " ".join(words[at : at + count]).replace("\n\n", "\n")
            # Indented code has long runs of spaces, and a continuation needs a token.
            if text.strip():
                return text

    return give


def requests_of(name: str, scale: float, words: Sequence[str]) -> list[tuple[str, ...]]:
    """The arguments of lm-eval's requests of a set."""
    rng = np.random.default_rng(SETS.index(name))
    give = slices(words, rng)

    def question(mean: float) -> str:
        # Lengths of MMLU's questions are about log-normal, with a standard deviation of 0.6 within a subject.
        return give(min(mean * math.exp(rng.normal(-0.18, 0.6)), 1200))

    found: list[tuple[str, ...]] = []
    if name == "choices":
        for _ in range(max(int(SUBJECTS * min(scale, 1)), 1)):
            mean = 105 * math.exp(rng.normal(-0.1, 0.45))
            ask = "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:"
            shots = "".join(
                ask.format(question(mean * 0.6), *(give(mean * 0.1) for _ in "ABCD")) + " B\n\n" for _ in range(5)
            )
            for _ in range(max(int(60 * scale), 2)):
                prompt = shots + ask.format(question(mean * 0.6), *(give(mean * 0.1) for _ in "ABCD"))
                found += [(prompt, f" {letter}") for letter in "ABCD"]
    elif name == "endings":
        for _ in range(max(int(400 * scale), 2)):
            prompt = "\n\n".join(question(85) for _ in range(10)) + "\n\n" + question(60)
            found += [(prompt, " " + give(25)) for _ in range(4)]
    else:
        found = [(give(4000 * math.exp(rng.normal(-0.18, 0.6))),) for _ in range(max(int(62 * scale), 2))]
    return found


def kind_of(name: str) -> str:
    """The method of lm-eval's models that answers a set."""
    return "loglikelihood_rolling" if name == "rolling" else "loglikelihood"


def instances(name: str, arguments: Sequence[tuple[str, ...]]) -> list[Any]:
    """lm-eval's requests."""
    from lm_eval.api.instance import Instance

    return [Instance(kind_of(name), {}, tuple(x), 0) for x in arguments]


def make_checkpoint(folder: Path, model: str, documents: Sequence[str]) -> None:
    """Writes random weights and a tokenizer, as transformers reads them."""
    import torch
    import transformers

    from qwen_jax.published import published
    from qwen_jax.tokenizer import train_bpe

    config = published("qwen2.5-0.5b") if model == "tiny" else published(model)
    settings = config.to_hf()
    if model == "tiny":
        config = dataclasses.replace(config, vocab_size=2048)
        settings |= {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        for name in ("layer_types", "max_window_layers"):
            settings.pop(name, None)
    tokenizer = train_bpe(documents[:2000], 2000 if model == "tiny" else 32_000)
    settings |= {"eos_token_id": tokenizer.eos_id, "bos_token_id": None}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)).save_pretrained(folder)
    tokenizer.save(folder)


def run_hf(args: argparse.Namespace, work: dict[str, Any]) -> None:
    """lm-eval's own backend, in a process without JAX."""
    import torch
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    lm = HFLM(
        str(args.folder / "model"), dtype="bfloat16", device=device, batch_size=args.hf_batch, max_length=CONTEXT,
        max_batch_size=64,
    )  # fmt: skip
    say({"side": "hf", "load_seconds": time.perf_counter() - begin, "device": device})
    for name in args.sets:
        for turn in ("cold", "warm"):
            asked = instances(name, work[name])
            begin = time.perf_counter()
            found = getattr(lm, kind_of(name))(asked, disable_tqdm=True)
            seconds = time.perf_counter() - begin
            say({"side": "hf", "set": name, "turn": turn, "seconds": seconds, "requests": len(asked)})
            write(args.folder / f"hf-{name}.json", {"seconds": seconds, "found": found, "turn": turn})


def run_ours(args: argparse.Namespace, work: dict[str, Any]) -> None:
    """Our adapter."""
    import jax

    import convert
    from qwen_jax.inference.likelihood import LikelihoodScorer
    from qwen_jax.parallel.sharding import make_mesh
    from qwen_jax.tokenizer import load_tokenizer
    from train.evaluate.encoding import RequestEncoder
    from train.evaluate.harness_lm import HarnessLM
    from train.evaluate.token_model import TokenModel

    begin = time.perf_counter()
    mesh = make_mesh({}, jax.devices()[:1])
    config, params = convert.load(args.folder / "model", mesh, "bfloat16")
    tokenizer = load_tokenizer(args.folder / "model")
    scorer = LikelihoodScorer(config, params, mesh, tokens_per_batch=args.tokens)
    say({"side": "ours", "load_seconds": time.perf_counter() - begin, "device": jax.devices()[0].device_kind})
    for name in args.sets:
        for turn in ("cold", "warm"):
            # A new encoder: nothing is remembered of the texts.
            lm = HarnessLM(TokenModel("ours", RequestEncoder(tokenizer, CONTEXT), scorer, None))
            asked = instances(name, work[name])
            begin = time.perf_counter()
            found = getattr(lm, kind_of(name))(asked)
            seconds = time.perf_counter() - begin
            line = {"side": "ours", "set": name, "turn": turn, "seconds": seconds, "requests": len(asked)}
            if turn == "warm":
                encoder, texts = RequestEncoder(tokenizer, CONTEXT), work[name]
                begin = time.perf_counter()
                pairs = [encoder.windows(*x) if name == "rolling" else [encoder.pair(*x)] for x in texts]
                line["encode_seconds"] = time.perf_counter() - begin
                line["tokens"] = sum(len(a) + len(b) for some in pairs for a, b in some)
            say(line)
        write(args.folder / f"ours-{name}.json", {"seconds": seconds, "found": found, "turn": turn})


def compare(name: str, folder: Path) -> dict[str, Any]:
    """The ratio of the times, and how far the answers are apart."""
    both = [json.loads((folder / f"{side}-{name}.json").read_text()) for side in ("hf", "ours")]
    logprobs = [np.array([x if name == "rolling" else x[0] for x in side["found"]], float) for side in both]
    line = {
        "set": name,
        "hf_seconds": both[0]["seconds"],
        "ours_seconds": both[1]["seconds"],
        "ratio": both[0]["seconds"] / both[1]["seconds"],
        "turns": [side["turn"] for side in both],
        "mean_logprob": float(logprobs[0].mean()),
        "mean_difference": float(np.abs(logprobs[0] - logprobs[1]).mean()),
        "largest_relative_difference": float((np.abs(logprobs[0] - logprobs[1]) / np.abs(logprobs[0])).max()),
    }
    if name != "rolling":
        best = [x.reshape(-1, 4).argmax(1) for x in logprobs]
        line["same_answer"] = float((best[0] == best[1]).mean())
    return line


def say(line: dict[str, Any]) -> None:
    """Prints a line of output."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def write(path: Path, value: Any) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(value))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of a batch of ours")
    parser.add_argument("--hf-batch", default="auto", help="batch size of the hf backend")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which the hf backend is stopped")
    parser.add_argument("--side", choices=["hf", "ours"], help="only this side, on what is in the folder")
    args = parser.parse_args()
    if args.side is not None:
        work = json.loads((args.folder / "work.json").read_text())
        {"hf": run_hf, "ours": run_ours}[args.side](args, work)
        return
    from experiments.data.scoring import real_documents

    begin = time.perf_counter()
    (args.folder / "model").mkdir(parents=True, exist_ok=True)
    documents = real_documents(3000)
    make_checkpoint(args.folder / "model", args.model, documents)
    words = words_of(documents)
    write(args.folder / "work.json", {name: requests_of(name, args.scale, words) for name in args.sets})
    for side in ("ours", "hf"):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-m", "experiments.evaluate.harness_speed", *sys.argv[1:], "--side", side]
        left = args.limit - (time.perf_counter() - begin)
        try:
            code = subprocess.run(command, env=environment, check=False, timeout=min(left, 1e6)).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            say({"side": side, "code": code})
    for name in args.sets:
        if all((args.folder / f"{side}-{name}.json").exists() for side in ("hf", "ours")):
            say(compare(name, args.folder))


if __name__ == "__main__":
    main()
