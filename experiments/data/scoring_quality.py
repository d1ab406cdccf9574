"""Are planted levels of quality ranked, and does a student keep the order of its teacher?

    JAX_PLATFORMS=cpu python -m experiments.data.scoring_quality --folder /tmp/scoring [--steps 300] [--documents 6000]

A small Qwen2.5 is trained to answer the rubric `education` with the level of documents that are made here, written as
a Hugging Face folder, and then used by the commands of users: `qwen-jax data score` on a run with documents that it was
not trained on, `qwen-jax data distil` on half of these, and `qwen-jax data score` with the student. One JSON object:
rank correlations of the teacher with the planted levels, and of the student with the teacher on documents that the
student has not seen. Expected: above 0.8 and at least 0.9. Takes some minutes on two cores.
"""

import argparse
import contextlib
import functools
import io
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq

import convert.huggingface
from qwen_jax.cli import main as qwen_jax
from qwen_jax.config import ModelConfig
from qwen_jax.kernels import causal_mask
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind, init_params
from qwen_jax.tokenizer import CONTROL_TOKENS, Tokenizer, train_bpe
from train.curate.curation import Curation, Input
from train.curate.run import run as curate
from train.curate.scoring import prompt as prompts
from train.curate.scoring.prompt import Prompt
from train.curate.scoring.questions import RUBRICS
from train.curate.scoring.ranks import spearman

_LENGTH, _MAX_TOKENS = 256, 160
_SUBJECTS = (
    "the cell|a prime number|the French revolution|gravity|a sorting algorithm|the heart|supply and demand|a verb"
)
_GOOD = (
    "{s} is defined as follows, because the definition decides what can be proved.",
    "For example, consider {s} in the simplest case; therefore the result follows.",
    "The reason why {s} matters is that each step depends on the one before.",
    "First we measure {s}, then we compare the result with what theory predicts.",
    "In summary, {s} shows how a cause leads to its effect.",
)
_PLAIN = (
    "People talk about {s} now and then.",
    "There is a page on {s} in most books.",
    "Last year someone mentioned {s} on a walk.",
    "I saw a picture of {s} and liked it.",
)
_JUNK = (
    "Click here to subscribe and win a prize today!!!",
    "Home | Login | Cart (0) | Cookies | Privacy | Share",
    "BUY NOW cheap deal free shipping best price",
    "Loading... error 404 page not found retry",
)


def make_document(rng: np.random.Generator) -> tuple[str, float]:
    """A document and its level, from 1 to 5: which share of its sentences explain, and are not junk or plain."""
    level, subjects = float(rng.uniform(1, 5)), _SUBJECTS.split("|")
    count = int(rng.integers(5, 11))
    good = round((level - 1) / 4 * count)
    kinds = [_GOOD] * good + [_PLAIN if rng.random() < 0.3 else _JUNK for _ in range(count - good)]
    sentences = []
    for kind in rng.permutation(len(kinds)):
        some = kinds[kind]
        sentence = some[rng.integers(len(some))].format(s=subjects[rng.integers(len(subjects))])
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences), level


def train_teacher(
    config: ModelConfig, prompt: Prompt, rng: np.random.Generator, steps: int, batch: int
) -> tuple[Params, float]:
    """Trains a model to answer with the level of a document, rounded; returns its weights and the last loss."""
    mesh = make_mesh({}, jax.devices()[:1])
    sharding, answers = Sharding.for_training(config, mesh), np.array(prompt.answers[0])
    params = init_params(config, jax.random.key(0), mesh)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-3, min(20, steps // 2), steps), weight_decay=0.01)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, state: Any, tokens_BT: jax.Array, last_B: jax.Array, answer_B: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        def loss(params: Params) -> jax.Array:
            model = bind(config, params, sharding, Options())
            positions = jnp.broadcast_to(jnp.arange(_LENGTH), tokens_BT.shape)
            hidden = model(tokens_BT, positions, causal_mask(*tokens_BT.shape)).hidden
            at_BD = jnp.take_along_axis(jax.reshard(hidden, jax.P()), last_B[:, None, None], axis=1)
            logits_BV = jax.reshard(model.logits(at_BD)[:, 0], jax.P())
            return optax.softmax_cross_entropy_with_integer_labels(logits_BV, answer_B).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    value = jnp.zeros(())
    with jax.set_mesh(mesh):
        for _ in range(steps):
            made = [make_document(rng) for _ in range(batch)]
            whole = [prompt.whole(cut.ids, 0) for cut in prompt.documents([text for text, _ in made])]
            tokens = np.zeros((batch, _LENGTH), np.int32)
            for row, ids in zip(tokens, whole, strict=True):
                row[: len(ids)] = ids
            last = np.array([len(ids) - 1 for ids in whole], np.int32)
            levels = np.array([round(level) - 1 for _, level in made])
            params, state, value = step(params, state, tokens, last, answers[levels])
    return params, float(value)


def make_tokenizer(rng: np.random.Generator) -> Tokenizer:
    """A BPE of documents like those, and of the prompt."""
    texts = [make_document(rng)[0] for _ in range(300)]
    asked = [
        prompts._SYSTEM,
        prompts._OPENING,
        prompts._CLOSING,
        prompts._GAP,
        RUBRICS[0].text,
        "user assistant system",
    ]
    return train_bpe([*texts, *asked * 5], 1024)


def write_run(folder: Path, rng: np.random.Generator, count: int, shards: int) -> np.ndarray:
    """Curates documents in so many shards; returns their levels."""
    levels, inputs = [], []
    for shard in range(shards):
        made = [make_document(rng) for _ in range(count // shards)]
        levels += [level for _, level in made]
        file = folder.with_name(f"{folder.name}-{shard:03d}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps({"text": text}) for text, _ in made))
        inputs.append(Input(f"made{shard:03d}", str(file)))
    curate(Curation(inputs), folder)
    return np.array(levels)


def command(*argv: str) -> dict[str, Any]:
    """Runs `qwen-jax data ...` and returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = qwen_jax(["data", *argv, "--json"])
    if status:
        raise SystemExit(status)
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def scores(folder: Path) -> np.ndarray:
    """The column of all shards."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    result: np.ndarray = pa.concat_tables(tables)["education"].to_numpy()
    return result


def run(folder: Path, steps: int, documents: int, batch: int, layers: int = 2, width: int = 64) -> dict[str, Any]:
    """Trains, scores, distils and applies; returns the correlations."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty. Give a new folder.")
    rng = np.random.default_rng(1)
    tokenizer = make_tokenizer(rng)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + -tokenizer.vocab_size % 64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        tie_word_embeddings=True,
        rope_theta=1e4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_ids=(tokenizer.vocab_size - len(CONTROL_TOKENS),),
        dtype="float32",
    )
    begin = time.perf_counter()
    params, loss = train_teacher(config, Prompt(tokenizer, RUBRICS[:1], _MAX_TOKENS), rng, steps, batch)
    trained = time.perf_counter() - begin
    convert.huggingface.export(params, config, folder / "teacher")
    tokenizer.save(folder / "teacher")

    # The commands of users.
    common = [
        "--rubric",
        "education",
        "--max-tokens",
        str(_MAX_TOKENS),
        "--row-tokens",
        "512",
        "--model",
        str(folder / "teacher"),
    ]
    levels = write_run(folder / "sample", rng, documents, 4)
    new_levels = write_run(folder / "new", rng, documents // 4, 2)
    sample = command("score", "--input", str(folder / "sample"), "--output", str(folder / "labels"), *common)
    command("score", "--input", str(folder / "new"), "--output", str(folder / "by-teacher"), *common)
    given = ["--input", str(folder / "sample"), "--scores", str(folder / "labels")]
    distilled = command("distil", *given, "--output", str(folder / "student"))
    applied = ["--input", str(folder / "new"), "--output", str(folder / "by-student")]
    student = command("score", *applied, "--model", str(folder / "student"))
    by_teacher, by_student = scores(folder / "by-teacher"), scores(folder / "by-student")
    return {
        "steps": steps,
        "teacher_loss": loss,
        "training_seconds": trained,
        "teacher_with_levels": spearman(scores(folder / "labels"), levels),
        "teacher_with_levels_new": spearman(by_teacher, new_levels),
        "student_with_teacher_held_out": distilled["spearman"]["education"],
        "student_with_teacher_new": spearman(by_student, by_teacher),
        "student_with_levels_new": spearman(by_student, new_levels),
        "answer_mass": sample["answer_mass"],
        "teacher_documents_per_second": sample["documents_per_second"],
        "student_documents_per_second": student["documents_per_second"],
        "student_training_seconds": distilled["seconds"],
        "documents": {"labelled": documents, "new": documents // 4},
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    print(json.dumps(run(args.folder, args.steps, args.documents, args.batch), indent=2))


if __name__ == "__main__":
    main()
