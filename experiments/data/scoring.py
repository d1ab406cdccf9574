"""Speed of scoring documents, beside the rate at which the plain model reads the same documents.

    python -m experiments.data.scoring --model qwen2.5-0.5b --documents 20000 [--questions 1 6] [--json out.json]
    JAX_PLATFORMS=cpu python -m experiments.data.scoring --model tiny --documents 400 --max-tokens 512

Documents are real: the files of Python's library and of installed packages, in the tokens of a BPE that is trained on
them, so that the lengths are those of real text. Weights are random. Every line of output is a JSON object.

The plain rate is that of the model alone, in the layout of inference: rows of the same shape, full to the last token
with documents of the same lengths, that are on the device already; no questions, no padding, no host. The scorer's rate
counts the tokens of documents, prompts and questions, and the time of everything: tokenising, packing, padding, and
reading the answers. Expected on one GPU with 0.5B: at least 0.8 of the plain rate.

"alone" reads each document once for each question; its tokens are more, and `documents_per_second` compares.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode.benchmark import random_params
from qwen_jax.kernels import packed_mask
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind
from qwen_jax.published import published
from qwen_jax.tokenizer import Tokenizer, train_bpe
from train.curate.scoring.model import DocumentReader, ScoringOptions, _Static
from train.curate.scoring.questions import RUBRICS

_TEXTS = {".py", ".rst", ".md", ".txt"}


def real_documents(count: int) -> list[str]:
    """Files of Python's library and of installed packages, in a random order, perhaps several times."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in _TEXTS and path.is_file()}
    order = sorted(files, key=lambda path: hashlib.sha256(str(path).encode()).digest())
    texts = []
    for path in order:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            texts.append(text)
        if len(texts) == count:
            break
    return [texts[i % len(texts)] for i in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def _prefill(static: _Static, params: Params, packed_BXT: jax.Array) -> jax.Array:
    """The last hidden state of each row, from tokens, positions and segments."""
    tokens, positions, segments = (packed_BXT[:, i] for i in range(3))
    model = bind(static.config, params, static.sharding, static.options)
    return model(tokens, positions, packed_mask(segments)).hidden[:, -1]


def plain_rate(reader: DocumentReader, lengths: Sequence[int], batches: int) -> float:
    """Tokens per second of the model alone, on full rows of documents of these lengths."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.permutation(np.asarray(lengths)))
    total = reader.rows * reader.row_tokens
    place = np.arange(total) % max(int(ends[-1]), 1)
    document = np.searchsorted(ends, place, side="right")
    starts = np.concatenate([[0], ends])[document]
    columns = np.arange(total) % reader.row_tokens
    # A document that reaches the end of a row begins anew in the next one.
    positions = np.minimum(place - starts, columns)
    segments = document - document.min() + 1
    tokens = rng.integers(0, reader._static.config.vocab_size, total)
    packed = np.stack([x.reshape(reader.rows, -1) for x in (tokens, positions, segments)], 1).astype(np.int32)
    with jax.set_mesh(reader.mesh), jax.default_matmul_precision(reader._precision):
        placed = jax.device_put(packed, jax.NamedSharding(reader.mesh, jax.P(reader._sharding.rows[0], None, None)))
        jax.block_until_ready(_prefill(reader._static, reader._params, placed))
        begin = time.perf_counter()
        results = [_prefill(reader._static, reader._params, placed) for _ in range(batches)]
        jax.block_until_ready(results)
    return batches * total / (time.perf_counter() - begin)


def measure(args: argparse.Namespace, questions: int, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """The rates of one number of questions."""
    config = published(args.model)
    vocab = max(config.vocab_size, tokenizer.vocab_size + -tokenizer.vocab_size % 64)
    config = dataclasses.replace(config, vocab_size=vocab, max_position_embeddings=32_768)
    mesh = make_mesh({}, jax.devices()[:1])
    params = random_params(config, mesh, Sharding.for_inference(config, mesh))
    options = ScoringOptions(args.max_tokens, args.row_tokens, args.batch_tokens, args.dtype)
    if options.compute_dtype() == "float32":
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    reader = DocumentReader(config, params, mesh, tokenizer, RUBRICS[:questions], options)
    begin = time.perf_counter()
    programs = reader.warm_up()
    compiled = time.perf_counter() - begin

    # The host alone: tokenising and packing.
    begin = time.perf_counter()
    counts, cut = np.zeros(len(texts), np.int32), np.zeros(len(texts), bool)
    tokens = sum(batch.tokens for batch in reader._batches(texts, counts, cut))
    host = tokens / (time.perf_counter() - begin)

    # The plain model before and after, so that a clock that changes is seen.
    plain = [plain_rate(reader, counts.tolist(), args.batches)]
    work = reader.read(texts).work.to_json()
    plain.append(plain_rate(reader, counts.tolist(), args.batches))

    # Each question alone.
    alone = 0.0
    if questions > 1:
        seconds = 0.0
        single = RUBRICS[:1]
        one = DocumentReader(config, reader._params, mesh, tokenizer, single, options)
        one.warm_up()
        seconds = one.read(texts).work.seconds * questions
        alone = len(texts) / seconds
    return {
        "model": args.model,
        "device": jax.devices()[0].device_kind,
        "dtype": options.compute_dtype(),
        "questions": questions,
        "rows": reader.rows,
        "row_tokens": reader.row_tokens,
        "programs": programs,
        "compile_seconds": compiled,
        "mean_document_tokens": float(counts.mean()),
        "share_cut": float(cut.mean()),
        "plain_tokens_per_second": plain,
        "scorer_tokens_per_second": work["tokens_per_second"],
        "share_of_plain": work["tokens_per_second"] / (sum(plain) / 2),
        "documents_per_second": work["documents_per_second"],
        "documents_per_second_alone": alone,
        "padding_share": work["padding_share"],
        "host_tokens_per_second": host,
    }


def main() -> None:
    """Prints a line for each number of questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--row-tokens", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--batches", type=int, default=20, help="of the plain model")
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = real_documents(args.documents)
    sample = [text[:20_000] for text in texts[:300]]
    asked = [rubric.text for rubric in RUBRICS]
    tokenizer = train_bpe([*sample, *asked * 3], args.vocabulary)
    records = []
    for questions in args.questions:
        records.append(measure(args, questions, tokenizer, texts))
        print(json.dumps(records[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
