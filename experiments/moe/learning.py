"""Does a mixture of experts learn more than a dense model of equal active parameters, and is upcycling worth it?

    python -m experiments.learning.data --folder moe-run
    python -m experiments.moe.learning --folder moe-run --seeds 0 1
    python -m experiments.moe.learning --folder moe-run --picture     # draws and judges what has been run

and on two cores of a CPU, in about an hour (README.md has what came out):

    python -m experiments.learning.data --folder moe-cpu --megabytes 24 --vocab-size 1024 --length 256
    python -m experiments.moe.learning --folder moe-cpu --size cpu --steps 1200 --seeds 0 &
    python -m experiments.moe.learning --folder moe-cpu --size cpu --steps 1200 --seeds 1

Four runs a seed, on the same rows in the same order:

- `dense`.
- `moe`: the same body; experts and a shared one, in all 5.7 times as wide as the dense model's feed-forward layer, of
  which a token takes as much as that has.
- `scratch`: another mixture, for a third of the steps, whose shared expert is as wide as the dense model's.
- `upcycled`: the same, its weights from the end of `dense` by `qwen-jax upcycle`'s recipe.

What must come out, fixed before anything was measured: `moe` below `dense` in held-out loss after as many tokens, and
`upcycled` below `scratch`, by more than the standard deviation between seeds. Leaves the runs' folders, `learning.json`
and `learning.png` in the folder. `--size gpu`, the default, is for one GPU.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convert.upcycle import Recipe, upcycle
from experiments.learning import small
from experiments.learning.compare import HELD_OUT, series, smooth
from qwen_jax.config import MoE
from qwen_jax.tokenizer import CONTROL_TOKENS
from train.config import RunConfig, Stage, set_fields
from train.loop import CheckpointConfig, LoopConfig
from train.observe.metrics import read_log
from train.optimizer import Schedule
from train.pretrain import PretrainConfig
from train.run import pretrain
from train.step import StepConfig

RUNS = {"dense": "#8a8a8a", "moe": "#3b6fb6", "scratch": "#d1662b", "upcycled": "#3f8f5b"}


@dataclasses.dataclass(frozen=True)
class Size:
    """How large all is.

    Attributes:
      model: what differs from the model of `experiments.learning.small`; its `intermediate_size` is that of `dense`.
      moe, scratch: the mixtures.
      peak: learning rate.
      length, batch_size: of rows.
      run: other settings of all runs.
    """

    model: Mapping[str, Any]
    moe: MoE
    scratch: MoE
    peak: float
    length: int
    batch_size: int
    run: Mapping[str, Any]


# Two experts a token: in runs as short as these 8 of 32 learned less than 2 of 8 (README.md).
def _mixture(num_experts: int, num_experts_per_tok: int, width: int, shared: int) -> MoE:
    return MoE(num_experts, num_experts_per_tok, width, shared, norm_topk_prob=True, router_aux_loss_coef=0.01)


SIZES = {
    "gpu": Size(
        {"intermediate_size": 1536}, _mixture(16, 2, 512, 512), _mixture(16, 2, 768, 1536), 1e-3, small.LENGTH, 64, {}
    ),
    "cpu": Size(
        {
            "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192, "num_layers": 4, "num_heads": 4,
            "head_dim": 16, "max_position_embeddings": 256, "eos_token_ids": (1024 - len(CONTROL_TOKENS),),
        },
        _mixture(16, 2, 64, 64), _mixture(16, 2, 96, 192), 3e-3, 256, 16,
        {
            "objective": PretrainConfig(loss_chunk=4096),
            "step": StepConfig(dtype="float32", remat="none"),
            "loop": LoopConfig(evaluate_every=250),
        },
    ),
}  # fmt: skip


def config(kind: str, folder: str, seed: int = 0, steps: int = 1500, size: str = "gpu") -> RunConfig:
    """One of the runs.

    Args:
      kind: of `RUNS`.
      folder: with the data; takes the runs.
      seed: of weights and data order.
      steps: of `dense` and `moe`; the others have a third.
      size: of `SIZES`.
    """
    base, of = small.config(folder, seed), SIZES[size]
    model = dataclasses.replace(base.model, **of.model)
    short = kind in ("scratch", "upcycled")
    if kind != "dense":
        model = dataclasses.replace(model, moe=of.scratch if short else of.moe)
    count = steps // 3 if short else steps
    schedule = Schedule(count, of.peak, warmup_steps=min(100, count // 5))
    settings: dict[str, Any] = {
        "output": str(Path(folder) / f"{kind}-{seed}"),
        "model": model,
        "stages": (Stage(schedule, of.length, of.batch_size, base.stages[0].mixture),),
        "initial": str(Path(folder) / f"start-{seed}") if kind == "upcycled" else None,
        "checkpoints": CheckpointConfig(every=count if kind == "dense" else 0),
    }
    return dataclasses.replace(base, **settings, **of.run)


def run(folder: Path, seed: int, steps: int, size: str, changes: list[str]) -> None:
    """All runs of a seed that are not done yet."""
    for kind in RUNS:
        settings = set_fields(config(kind, str(folder), seed, steps, size), *changes)
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
    parser.add_argument("--size", choices=SIZES, default="gpu", help="of models and rows")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=C", help="change all runs")
    parser.add_argument("--picture", action="store_true", help="run nothing; judge and draw what there is")
    args = parser.parse_args()
    if not args.picture:
        for seed in args.seeds:
            run(args.folder, seed, args.steps, args.size, args.set)
    print(json.dumps(judge(args.folder), indent=2))


if __name__ == "__main__":
    main()
