"""A mixture by regression: tiny runs on three domains of a Python installation choose shares, which longer runs try.

    python -m experiments.data.mixture --folder mixture-run

Domains are code (modules of the standard library), docs (docstrings of the same modules, which are cut out of the code)
and sums (additions and multiplications that are made here).

1. Trials: `train.curate.regmix_runs` trains a model of half a million parameters for `--steps` steps on each mixture.
2. A regression picks the mixture with the smallest mean of the three held-out losses.
3. Runs of twice as many steps compare it with the prior, which is the shares of the tokens, in `--seeds` seeds.

What is interrupted goes on with the same command. Results: experiments/data/README.md.
"""

import argparse
import ast
import functools
import json
import os
import sysconfig
import time
from pathlib import Path

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import CONTROL_TOKENS, train_bpe
from train.config import RunConfig, Stage
from train.curate.mixture_plan import make_plan
from train.curate.mixture_table import Cell, CellTable
from train.curate.regmix import draw_mixtures, regress
from train.curate.regmix_runs import run_trials, write_trials
from train.data.build import BuildConfig, build
from train.data.rows import PackedRows
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import Schedule
from train.run import pretrain
from train.step import StepConfig

DOMAINS = ("code", "docs", "sums")
_VOCAB, _LENGTH, _BATCH = 1024, 64, 8
_HELD_OUT_ROWS = 96


def config(folder: str = os.environ.get("MIXTURE_RUN", "mixture-run"), steps: int = 100) -> RunConfig:
    """A small run; the mixture of its stage is replaced.

    Args:
      folder: where `make` has put tokenizer and rows.
      steps: of 512 tokens.
    """
    model = ModelConfig(
        vocab_size=_VOCAB, hidden_size=128, intermediate_size=384, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=32, tie_word_embeddings=True, rope_theta=1e4, max_position_embeddings=_LENGTH, bos_token_id=None,
        eos_token_ids=(_VOCAB - len(CONTROL_TOKENS),), dtype="float32",
    )  # fmt: skip
    place = Path(folder).absolute()
    return RunConfig(
        output=str(place / "one"),
        model=model,
        tokenizer=str(place / "tokenizer"),
        data={name: str(place / name) for name in DOMAINS},
        held_out={name: str(place / f"{name}-held-out") for name in DOMAINS},
        stages=(Stage(Schedule(steps, 3e-3, warmup_steps=10), _LENGTH, _BATCH, {"code": 1}),),
        step=StepConfig(dtype="float32", remat="none"),
        loop=LoopConfig(evaluate_every=10**6),
        checkpoints=CheckpointConfig(every=0),
    )


def documents(seed: int) -> dict[str, list[str]]:
    """The documents of each domain, in a seeded order."""
    rng = np.random.default_rng(seed)
    code, docs = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib"} & set(path.parts) or path.stat().st_size > 200_000:
            continue
        try:
            text = path.read_text("utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders)]
        docs += [one for one in found if one and len(one) > 80]
        bare = ast.unparse(_without_docstrings(tree))
        if len(bare) > 200:
            code.append(bare)
    sums = []
    for _ in range(4000):
        numbers = rng.integers(1, 1000, (12, 2)).tolist()
        lines = [f"{a} + {b} = {a + b}" if i % 2 else f"{a % 100} * {b % 10} = {a % 100 * (b % 10)}" for i, (a, b) in
                 enumerate(numbers)]  # fmt: skip
        sums.append("\n".join(lines))
    made = {"code": code, "docs": list(dict.fromkeys(docs)), "sums": sums}
    return {name: [texts[i] for i in rng.permutation(len(texts))] for name, texts in made.items()}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The same module with no docstring; a body of nothing else becomes `pass`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def make(folder: Path, seed: int = 0) -> dict[str, int]:
    """Writes tokenizer, training rows and held-out rows.

    Args:
      folder: of the experiment.
      seed: of the order of documents, and of sums.

    Returns:
      Tokens of each domain to train on.
    """
    texts = documents(seed)
    held = {name: _HELD_OUT_ROWS * _LENGTH * 3 for name in DOMAINS}
    if not (folder / "tokenizer").exists():
        sample = [text for name in DOMAINS for text in texts[name][-400:]]
        tokenizer = train_bpe(sample, _VOCAB)
        if tokenizer.vocab_size != _VOCAB:
            raise InputError(f"The text gives a tokenizer of {tokenizer.vocab_size} ids, the model has {_VOCAB}.")
        tokenizer.save(folder / "tokenizer")
    for name in DOMAINS:
        # So many characters at the beginning of the order are held out.
        ends = np.cumsum([len(text) for text in texts[name]])
        first = int(np.searchsorted(ends, held[name])) + 1
        for part, chosen in ((name, texts[name][first:]), (f"{name}-held-out", texts[name][:first])):
            source = folder / "text" / f"{part}.jsonl"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
            build(BuildConfig((str(source),), folder / "tokenizer", _LENGTH, folder / part, name, workers=1))
    return {name: PackedRows(folder / name).manifest.tokens for name in DOMAINS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("mixture-run"))
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100, help="of a trial")
    parser.add_argument("--seeds", type=int, default=2, help="of the runs that compare")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    # The configuration of trials is a function without arguments, here and in jobs of a scheduler.
    os.environ["MIXTURE_RUN"] = str(args.folder.absolute())
    tokens = make(args.folder)
    print(f"tokens: {tokens}", flush=True)
    # What the runs that compare will need, with at most 4 epochs, bounds the shares.
    budget = 2 * args.steps * _BATCH * _LENGTH
    table = CellTable(tuple(Cell(name, 0, 1, count, False) for name, count in tokens.items()), {})
    prior = {name: count / sum(tokens.values()) for name, count in tokens.items()}
    most = {one.name: min(1.0, one.cap / budget) for one in make_plan(table, budget).domains}
    # Trials.
    mixtures = draw_mixtures(prior, args.trials, 0, most=most)
    trials = args.folder / "trials"
    changes = [f"stages.0.schedule.steps={args.steps}"]
    write_trials(f"{Path(__file__).resolve()}:config", trials, mixtures, prior, changes)
    began = time.perf_counter()
    collected = run_trials(trials, pretrain, functools.partial(print, flush=True))
    print(f"{time.perf_counter() - began:.0f} s of trials", flush=True)
    # The pick, with the mean of all losses as its target.
    found = regress(collected.trials(str(trials)), prior, most=most)
    print(found.to_text(), flush=True)
    # Does it hold in longer runs with other seeds?
    results: dict[str, list[dict[str, float]]] = {}
    for which, shares in (("prior", prior), ("uniform", dict.fromkeys(DOMAINS, 1 / 3)), ("pick", found.shares)):
        for seed in range(1, args.seeds + 1):
            compared = args.folder / "compare" / f"{which}-{args.trials}" / str(seed)
            rounded = [{name: round(share, 3) for name, share in shares.items()}]
            base = [f"stages.0.schedule.steps={2 * args.steps}", f"seed={seed}"]
            write_trials(f"{Path(__file__).resolve()}:config", compared, rounded, prior, base)
            ((_, _, losses),) = run_trials(compared, pretrain).finished
            results.setdefault(which, []).append({**losses, "mean": float(np.mean(list(losses.values())))})
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in results[which][-1].items())
            print(f"{which} {seed}: {shown}", flush=True)
    for which, rows in results.items():
        means = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
        deviation = np.std([row["mean"] for row in rows], ddof=1) if len(rows) > 1 else float("nan")
        print(f"{which}: " + "  ".join(f"{name} {loss:.4f}" for name, loss in means.items()) + f" (sd {deviation:.4f})")


if __name__ == "__main__":
    main()
