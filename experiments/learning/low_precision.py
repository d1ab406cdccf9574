"""Does training with products of 8 bits, or with moments in fewer bits, learn as training in bfloat16 does?

    python -m experiments.learning.data --folder low-run
    python -m experiments.learning.low_precision --folder low-run --seeds 0 1 2
    python -m experiments.learning.low_precision --folder low-run --kinds bfloat16 moments-8bit
    python -m experiments.learning.low_precision --folder low-run --picture     # judges and draws what has been run

The model and the text of `experiments.learning.small`, for 2,000 steps, with each kind and each seed: the same weights
and rows in the same order. `bfloat16` has products of bfloat16 and moments of float32; `fp8`, `fp8-blocks` and `int8`
have other products, `moments-bfloat16` and `moments-8bit` other moments. The rule, fixed before anything was measured:
a kind is within the noise if, of the final held-out losses, the mean over the seeds of (kind - bfloat16) is at most the
standard deviation of bfloat16's seeds (n - 1 in the denominator). Less loss is no fault. It needs at least two seeds.

A run's held-out losses are computed with its own products. Leaves the runs' folders, `low_precision.json` and
`low_precision.png` in the folder. `--size tiny` is for a CPU, where the products are emulated: it shows that the
experiment works, and little else.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.command import save_after
from experiments.learning import small
from experiments.learning.compare import HELD_OUT, series, smooth
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.low_precision import Products
from qwen_jax.published import published
from qwen_jax.tokenizer import CONTROL_TOKENS
from train.config import RunConfig, Stage, set_fields
from train.loop import LoopConfig
from train.moments import MOMENTS, Moments
from train.observe.metrics import read_log
from train.optimizer import Schedule
from train.pretrain import PretrainConfig
from train.run import pretrain

COLORS = {
    "bfloat16": "#8a8a8a",
    "fp8": "#3b6fb6",
    "fp8-blocks": "#d1662b",
    "int8": "#b8a12f",
    "moments-bfloat16": "#4f9d69",
    "moments-8bit": "#8e5aa8",
}
BASE: Products = "bfloat16"
KINDS: dict[str, tuple[Products, Moments]] = {
    **{products: (products, "float32") for products in get_args(Products)},
    **{f"moments-{moments}": (BASE, moments) for moments in MOMENTS if moments != "float32"},
}
"""Products and moments of each kind."""
SIZES = ("gpu", "tiny")
# Of `--size tiny`.
TINY_VOCABULARY, TINY_LENGTH = 512, 64


def config(kind: str, folder: str, seed: int = 0, steps: int = 2000, size: str = "gpu") -> RunConfig:
    """One of the runs.

    Args:
      kind: of `KINDS`.
      folder: with the data; takes the runs.
      seed: of weights and data order.
      steps: how many.
      size: of `SIZES`.
    """
    base = small.config(folder, seed)
    schedule = Schedule(steps, 1e-3, warmup_steps=min(100, steps // 5))
    if size == "tiny":
        model = dataclasses.replace(
            published("tiny"),
            vocab_size=TINY_VOCABULARY,
            max_position_embeddings=TINY_LENGTH,
            eos_token_ids=(TINY_VOCABULARY - len(CONTROL_TOKENS),),
        )
        base = dataclasses.replace(
            base,
            model=model,
            stages=(Stage(schedule, TINY_LENGTH, 8, {"text": 1}),),
            objective=PretrainConfig(loss_chunk=512),
            step=dataclasses.replace(base.step, dtype="float32", remat="none"),
            loop=LoopConfig(evaluate_every=steps // 2),
        )
    stages = (dataclasses.replace(base.stages[0], schedule=schedule),)
    products, moments = KINDS[kind]
    step = dataclasses.replace(base.step, products=products)
    optimizer = dataclasses.replace(base.optimizer, moments=moments)
    output = str(Path(folder) / f"{kind}-{seed}")
    return dataclasses.replace(base, output=output, stages=stages, step=step, optimizer=optimizer)


def judge(folder: Path) -> dict[str, Any]:
    """Writes `low_precision.json` and `low_precision.png`; returns the content of the first.

    Args:
      folder: of the experiment.

    Raises:
      InputError: no seeds that `bfloat16` and the other kinds in the folder have run, or runs that have not come
        equally far.
    """
    found = {
        kind: {int(p.parent.name.removeprefix(f"{kind}-")): p for p in folder.glob(f"{kind}-[0-9]*/metrics.jsonl")}
        for kind in KINDS
    }
    found = {kind: of for kind, of in found.items() if of or kind == BASE}
    seeds = sorted(set.intersection(*map(set, found.values())))
    if not seeds or len(found) == 1:
        raise InputError(
            f"No seed in {folder} has a run of bfloat16 and of each other kind there, of which there must be one "
            f"({', '.join(found)}). Run the others first."
        )
    logs = {kind: {seed: read_log(paths[seed]) for seed in seeds} for kind, paths in found.items()}
    curves = {kind: {seed: series(log, HELD_OUT) for seed, log in of.items()} for kind, of in logs.items()}
    ends = {f"{kind}-{seed}": int(steps[-1]) for kind, of in curves.items() for seed, (steps, _) in of.items()}
    if len(set(ends.values())) > 1:
        raise InputError(f"The runs in {folder} have not come equally far: {ends}. Finish them first.")
    final = {kind: {seed: float(losses[-1]) for seed, (_, losses) in of.items()} for kind, of in curves.items()}
    result: dict[str, Any] = {
        "steps": next(iter(ends.values())),
        **verdict(final),
        "skipped_steps": {
            kind: sum(int(series(log, "skipped")[1].sum()) for log in of.values()) for kind, of in logs.items()
        },
        "tokens_per_second": {
            kind: float(np.median([np.median(series(log, "tokens_per_second")[1]) for log in of.values()]))
            for kind, of in logs.items()
        },
    }
    if (folder / "data.json").exists():
        result["data"] = json.loads((folder / "data.json").read_text())
    (folder / "low_precision.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _plot(logs, folder / "low_precision.png")
    return result


def verdict(final: dict[str, dict[int, float]]) -> dict[str, Any]:
    """The rule of this module.

    Args:
      final: final held-out losses in nats, by kind and seed; the same seeds.

    Returns:
      JSON values. With one seed there is no noise and no verdict.
    """
    base = np.array([final[BASE][seed] for seed in sorted(final[BASE])])
    noise = float(base.std(ddof=1)) if len(base) > 1 else None
    result: dict[str, Any] = {"final_held_out_loss": final, "seed_deviation_of_bfloat16": noise}
    for kind in [kind for kind in final if kind != BASE]:
        gaps = np.array([final[kind][seed] for seed in sorted(final[kind])]) - base
        mean = float(gaps.mean())
        within = None if noise is None else mean <= noise
        result[f"{kind}_minus_bfloat16"] = {"mean": mean, "seeds": gaps.tolist(), "within_noise": within}
    return result


def _plot(logs: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    training, held_out = figure.subplots(1, 2)
    for kind, of in logs.items():
        for seed, log in of.items():
            label = kind if seed == min(of) else None
            style: dict[str, Any] = {"color": COLORS[kind], "linewidth": 1.3, "label": label}
            steps, losses = series(log, "loss")
            training.plot(steps, smooth(losses, max(len(losses) // 40, 1)), **style)
            # With the same seed, the kind is the only difference.
            steps, losses = series(log, HELD_OUT)
            held_out.plot(steps, losses - series(logs[BASE][seed], HELD_OUT)[1], marker="o", markersize=3, **style)
    titles = "training loss, a running mean (nats a token)", "held-out loss - bfloat16's of the same seed"
    for axes, title in zip((training, held_out), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def run(
    folder: Path,
    kinds: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    size: str,
    changes: Sequence[str],
    limit: float,
) -> None:
    """All runs that are not done yet.

    Args:
      folder: of the experiment.
      kinds: of `KINDS`.
      seeds: of the runs.
      steps, size: as for `config`.
      changes: as for `set_fields`, of all runs.
      limit: seconds that a run may take.

    Raises:
      InputError: a run was not finished in that time; the same call goes on with it.
    """
    for seed in seeds:
        for kind in kinds:
            timer = save_after(limit)
            try:
                stopped = pretrain(set_fields(config(kind, str(folder), seed, steps, size), *changes))
            finally:
                timer.cancel()
            if stopped:
                raise InputError(f"{kind}, seed {seed}, was not finished after {limit:g} s; the same command goes on.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("low-run"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[kind for kind in KINDS if kind != "int8"],
                        help="by default all but int8, which GPUs do not have")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--size", choices=SIZES, default="gpu", help="of model and rows")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=C", help="change all runs")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a run may take")
    parser.add_argument("--picture", action="store_true", help="run nothing; judge and draw what there is")
    args = parser.parse_args()
    if not args.picture:
        run(args.folder, args.kinds, args.seeds, args.steps, args.size, args.set, args.limit)
    print(json.dumps(judge(args.folder), indent=2))


if __name__ == "__main__":
    main()
