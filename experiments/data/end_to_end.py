"""From raw files to a model: is a corpus better after curation, at equal tokens?

    python -m experiments.data.end_to_end --folder curation-run --megabytes 40 --seeds 0 1 2
    python -m experiments.data.end_to_end --folder curation-run --table      # of what has been run

The corpus is `experiments.data.corpus`: real documents among planted junk, duplicates and leaks. Two commands take it
from there, both `qwen-jax data curate`: `recipe.py` curates and packs it, and `recipe.py:raw` packs all of its text.
The truth of the corpus says what has been kept of each kind. Then a small model is trained on each, with as many
tokens, and read on held-out documents. The tokenizer is trained on the raw text.

What has been done is not done again. One machine, a CPU will do; leaves `results.json`.
"""

import argparse
import dataclasses
import gzip
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import zstandard

from experiments.command import add_setup_arguments, chosen
from experiments.data import corpus
from qwen_jax.cli import main as main_command
from qwen_jax.config import ModelConfig
from qwen_jax.files import to_json
from qwen_jax.tokenizer import CONTROL_TOKENS, train_bpe
from train.config import RunConfig, Stage
from train.files import write_file
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import Schedule
from train.pretrain import PretrainConfig
from train.run import pretrain
from train.step import StepConfig

# What the outputs are called, and the functions of `recipe.py`.
WAYS = {"raw": "raw", "curated": "curation"}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes, of the corpus and of the model.

    Attributes:
      megabytes: of the corpus.
      vocab_size: of the tokenizer.
      width: of the model.
      layers: of the model.
      length: of a row, in tokens.
      batch: rows of a step.
      steps: of training.
    """

    megabytes: float = 40.0
    vocab_size: int = 4096
    width: int = 128
    layers: int = 4
    length: int = 256
    batch: int = 32
    steps: int = 400

    def run(self, folder: Path, way: str, seed: int) -> RunConfig:
        """The training run of a way and a seed."""
        rows = sorted(path.parent for path in (folder / way / "rows").glob("*/manifest.json"))
        shares = {path.name: json.loads((path / "manifest.json").read_text())["rows"] for path in rows}
        model = ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_layers=self.layers,
            num_heads=self.width // 32,
            num_kv_heads=max(self.width // 64, 1),
            head_dim=32,
            tie_word_embeddings=True,
            rope_theta=1e4,
            max_position_embeddings=self.length,
            bos_token_id=None,
            eos_token_ids=(self.vocab_size - len(CONTROL_TOKENS),),
            dtype="float32",
        )
        return RunConfig(
            output=str(folder / f"model-{way}-{seed}"),
            model=model,
            tokenizer=str(folder / "tokenizer"),
            data={path.name: str(path) for path in rows},
            held_out={"text": str(folder / "held-out")},
            # Each domain has the share that it has in the corpus.
            stages=(Stage(Schedule(self.steps, 2e-3, warmup_steps=self.steps // 20), self.length, self.batch, shares),),
            seed=seed,
            objective=PretrainConfig(loss_chunk=8192),
            step=StepConfig(dtype="float32", remat="none"),
            loop=LoopConfig(evaluate_every=max(self.steps // 2, 1)),
            checkpoints=CheckpointConfig(every=0),
        )


def command(*words: object) -> float:
    """Runs a command of ours in this process; the seconds that it took."""
    began = time.perf_counter()
    if status := main_command(list(map(str, words))):
        raise SystemExit(status)
    return time.perf_counter() - began


def curate(folder: Path, setup: Setup) -> dict[str, Any]:
    """Corpus, curation and rows; the seconds of each, and what was kept of each kind of document."""
    found: dict[str, Any] = {}
    raw, tokenizer = folder / "corpus", folder / "tokenizer"
    if not (raw / "held-out.jsonl").exists():
        found["corpus"] = corpus.make(raw, setup.megabytes)
    if not tokenizer.exists():
        with gzip.open(raw / "docs.jsonl.gz", "rt") as docs:
            texts = [json.loads(line)["text"] for line in docs]
        train_bpe([*texts, *pq.read_table(raw / "code.parquet")["text"].to_pylist()], setup.vocab_size).save(tokenizer)
    for way, name in WAYS.items():
        seconds = command(
            "data", "curate", "--config", f"{Path(__file__).with_name('recipe.py')}:{name}", "--corpus", raw,
            "--output", folder / way, "--tokenizer", tokenizer, "--length", setup.length,
        )  # fmt: skip
        found[f"seconds, {way}"] = round(seconds, 1)
        manifests = [json.loads(path.read_text()) for path in (folder / way / "rows").glob("*/manifest.json")]
        found[f"tokens, {way}"] = sum(manifest["tokens"] for manifest in manifests)
    if not (folder / "held-out" / "manifest.json").exists():
        command(
            "data", "build", "--input", raw / "held-out.jsonl", "--tokenizer", tokenizer, "--length", setup.length,
            "--output", folder / "held-out",
        )  # fmt: skip
    found["documents"] = kept_by_kind(folder)
    return found


def kept_by_kind(folder: Path) -> dict[str, str]:
    """Of each kind of document, how many there were and how many are in the output."""
    truth = [json.loads(line) for line in (folder / "corpus" / "truth.jsonl").read_text().splitlines()]
    kept = set(kept_ids(folder / "curated" / "output"))
    total = Counter(entry["kind"] for entry in truth)
    left = Counter(entry["kind"] for entry in truth if entry["id"] in kept)
    found = {kind: f"{left[kind]} of {total[kind]} kept" for kind in sorted(total)}
    # A copy may stay instead of its original: what counts is one of each.
    groups: dict[str, list[str]] = {}
    for entry in truth:
        if entry["kind"] in ("clean", "exact", "near"):
            groups.setdefault(entry["of"] or entry["id"], []).append(entry["id"])
    kept_of = Counter(min(sum(one in kept for one in group), 2) for group in groups.values())
    found["groups of copies"] = f"{kept_of[0]} with none kept, {kept_of[1]} with one, {kept_of[2]} with more"
    return found


def kept_ids(folder: Path) -> Iterator[str]:
    """The ids that an output has, as the truth names them: pages have theirs in the address."""
    for file in sorted(folder.rglob("*.jsonl.zst")):
        with zstandard.open(file, "rt") as lines:
            for line in lines:
                document = json.loads(line)
                yield document["url"].rpartition("/")[2] if document["domain"] == "web" else document["id"]


def train(folder: Path, setup: Setup, seed: int) -> dict[str, float]:
    """The held-out losses of both ways, in nats a token."""
    losses = {}
    for way in WAYS:
        run = setup.run(folder, way, seed)
        if pretrain(run):
            raise SystemExit(f"Seed {seed} of {way} was stopped; the same command goes on with it.")
        log = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
        losses[way] = [line["held_out_loss"] for line in log if "held_out_loss" in line][-1]
    return losses


def table(results: dict[str, Any]) -> str:
    """What has been run, as text."""
    runs = results.get("losses", {})
    lines = [f"{name}: {value}" for name, value in results.items() if name != "losses"]
    lines += [f"seed {s}: raw {r['raw']:.4f}, curated {r['curated']:.4f} nats a token" for s, r in runs.items()]
    if len(runs) > 1:
        gains = [r["raw"] - r["curated"] for r in runs.values()]
        lines.append(f"curated is better by {statistics.mean(gains):.4f} ± {statistics.stdev(gains):.4f}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_arguments(parser, "curation-run", Setup)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: curate only")
    args = parser.parse_args()
    file = args.folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not args.table:
        setup = chosen(args, Setup(megabytes=4, steps=20, width=64, layers=2) if args.toy else Setup())
        args.folder.mkdir(parents=True, exist_ok=True)
        results |= {key: value for key, value in curate(args.folder, setup).items()}
        for seed in args.seeds:
            if str(seed) not in results.setdefault("losses", {}):
                results["losses"][str(seed)] = train(args.folder, setup, seed)
            write_file(file, to_json(results, indent=2).encode())
        write_file(file, to_json(results, indent=2).encode())
    print(table(results))


if __name__ == "__main__":
    main()
