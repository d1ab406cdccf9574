"""Does a mixture of experts learn more than a dense model of equal active parameters, and is upcycling worth it?

    python -m experiments.learning.data --folder moe-run
    python -m experiments.moe.learning --folder moe-run --seeds 0 1
    python -m experiments.moe.learning --folder moe-run --picture     # draws and judges what has been run

Four runs a seed, on the same rows in the same order:

- `dense`: 8 layers, 512 wide, feed-forward 1,536.
- `moe`: the same body; 64 experts of 128, 8 to a token, and a shared one of 512: as many active parameters.
- `scratch`: 32 experts of 384, 4 to a token, and a shared one of 1,536, for a third of the steps.
- `upcycled`: the same, its weights from the end of `dense` by `qwen-jax upcycle`'s recipe.

What must come out, fixed before anything was measured: `moe` below `dense` in held-out loss after as many tokens, and
`upcycled` below `scratch`, by more than the standard deviation between seeds. Leaves the runs' folders, `learning.json`
and `learning.png` in the folder. Hardware: meant for one GPU; `--set` makes everything smaller.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convert.upcycle import Recipe, upcycle
from experiments.learning import small
from experiments.learning.compare import HELD_OUT, series, smooth
from qwen_jax.config import MoE
from train.config import RunConfig, Stage, set_fields
from train.metrics import read_log
from train.optimizer import Schedule
from train.run import pretrain

RUNS = {"dense": "#8a8a8a", "moe": "#3b6fb6", "scratch": "#d1662b", "upcycled": "#3f8f5b"}
_WIDTH = 1536
_MIXTURES = {
    "moe": MoE(64, 8, 128, 512, norm_topk_prob=True, router_aux_loss_coef=0.01),
    "scratch": MoE(32, 4, 384, _WIDTH, norm_topk_prob=True, router_aux_loss_coef=0.01),
}


def config(kind: str, folder: str, seed: int = 0, steps: int = 1500) -> RunConfig:
    """One of the runs.

    Args:
      kind: of `RUNS`.
      folder: with the data; takes the runs.
      seed: of weights and data order.
      steps: of `dense` and `moe`; the others have a third.
    """
    base = small.config(folder, seed)
    model = dataclasses.replace(base.model, intermediate_size=_WIDTH)
    short = kind in ("scratch", "upcycled")
    if kind != "dense":
        model = dataclasses.replace(model, moe=_MIXTURES["scratch" if short else "moe"])
    count = steps // 3 if short else steps
    stage = base.stages[0]
    schedule = Schedule(count, 1e-3, warmup_steps=min(100, count // 5))
    return dataclasses.replace(
        base,
        output=str(Path(folder) / f"{kind}-{seed}"),
        model=model,
        stages=(Stage(schedule, stage.length, stage.batch_size, stage.mixture),),
        initial=str(Path(folder) / f"start-{seed}") if kind == "upcycled" else None,
        checkpoint_every=count if kind == "dense" else 0,
    )


def run(folder: Path, seed: int, steps: int, changes: list[str]) -> None:
    """All runs of a seed that are not done yet."""
    for kind in RUNS:
        settings = set_fields(config(kind, str(folder), seed, steps), *changes)
        if kind == "upcycled" and not (folder / f"start-{seed}").exists():
            moe = settings.model.moe
            assert moe is not None
            dense = folder / f"dense-{seed}" / "checkpoints"
            upcycle(dense, folder / f"start-{seed}", Recipe(moe, seed=seed), to="orbax")
        pretrain(settings)


def judge(folder: Path) -> dict[str, Any]:
    """Writes `learning.json` and `learning.png`; returns the content of the first.

    Two runs are compared where both have come to the same step.
    """
    logs: dict[str, dict[int, list[dict[str, float]]]] = {kind: {} for kind in RUNS}
    for kind in RUNS:
        for path in sorted(folder.glob(f"{kind}-*/metrics.jsonl")):
            log = read_log(path)
            # One that was stopped before it was first evaluated says nothing.
            if any(HELD_OUT in record for record in log):
                logs[kind][int(path.parent.name.rsplit("-", 1)[1])] = log
    curves = {kind: {seed: series(log, HELD_OUT) for seed, log in of.items()} for kind, of in logs.items()}
    final = {kind: {seed: losses[-1] for seed, (_, losses) in of.items()} for kind, of in curves.items()}
    last = {kind: {seed: int(steps[-1]) for seed, (steps, _) in of.items()} for kind, of in curves.items()}
    result: dict[str, Any] = {"steps": last, "final_held_out_loss": final}
    for better, worse in (("moe", "dense"), ("upcycled", "scratch")):
        seeds = sorted(seed for seed, step in last[better].items() if last[worse].get(seed) == step)
        if not seeds:
            result[f"{better}_minus_{worse}"] = None
            continue
        gaps = np.array([final[better][seed] - final[worse][seed] for seed in seeds])
        deviation = None
        if len(seeds) > 1:
            noise = [np.var([final[kind][seed] for seed in seeds], ddof=1) for kind in (better, worse)]
            deviation = float(np.sqrt(np.mean(noise)))
        result[f"{better}_minus_{worse}"] = {
            "mean": float(gaps.mean()),
            "seeds": gaps.tolist(),
            "seed_deviation": deviation,
            "as_expected": None if deviation is None else bool(gaps.mean() < -deviation),
        }
    loads = ("load_entropy", "load_max", "router_entropy")
    result["experts"] = {
        kind: {name: float(np.mean([series(log, name)[1][-50:].mean() for log in of.values()])) for name in loads}
        for kind, of in logs.items()
        if of and kind != "dense"
    }
    (folder / "learning.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _plot(logs, folder / "learning.png")
    return result


def _plot(logs: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    panels = (("dense", "moe"), "equal active parameters"), (("scratch", "upcycled"), "one mixture, two beginnings")
    for axes, (kinds, title) in zip(figure.subplots(1, 2), panels, strict=True):
        values: list[float] = []
        for kind in kinds:
            for seed, log in logs[kind].items():
                style: dict[str, Any] = {"color": RUNS[kind], "linewidth": 1.5}
                steps, losses = series(log, "loss")
                axes.plot(steps, smooth(losses, max(len(losses) // 40, 1)), alpha=0.3, **style)
                steps, losses = series(log, HELD_OUT)
                axes.plot(steps, losses, marker="o", markersize=3.5, label=f"{kind}, seed {seed}", **style)
                values.extend(losses[1:])
        axes.set_title(f"{title}: held-out loss, pale: training (nats a token)", loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        if values:
            low, high = min(values), float(np.quantile(values, 0.95))
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("moe-run"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1500, help="of dense and moe; the others have a third")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=C", help="change all runs")
    parser.add_argument("--picture", action="store_true", help="run nothing; judge and draw what there is")
    args = parser.parse_args()
    if not args.picture:
        for seed in args.seeds:
            run(args.folder, seed, args.steps, args.set)
    print(json.dumps(judge(args.folder), indent=2))


if __name__ == "__main__":
    main()
