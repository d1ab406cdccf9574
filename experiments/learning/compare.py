"""The verdict on the learning comparison, and its picture.

    python -m experiments.learning.compare --folder learning-run

Reads the logs of all seeds that both loops have run, draws `learning.png`, and writes and prints `learning.json`. The
rule, fixed before anything was measured: the loops agree within noise if, of the final held-out losses, the mean over
the seeds of (ours - PyTorch) is in size at most the standard deviation between seeds (of each loop around its mean,
n - 1 in the denominator, pooled over the two loops). It needs at least two seeds. Runs with the same seed begin with
the same weights and see the same rows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qwen_jax.errors import InputError
from train.observe.metrics import read_log

LOOPS = {"ours": ("qwen_jax", "#3b6fb6", "-"), "torch": ("PyTorch, transformers", "#d1662b", "--")}
HELD_OUT = "held_out_text_loss"


def read_curves(folder: Path) -> dict[str, dict[int, list[dict[str, float]]]]:
    """The logs of the seeds that both loops have, by loop and seed.

    Raises:
      InputError: fewer than two such seeds, or runs that have not come equally far.
    """
    found = {
        loop: {int(p.parent.name.split("-")[1]): p for p in folder.glob(f"{loop}-*/metrics.jsonl")} for loop in LOOPS
    }
    seeds = sorted(found["ours"].keys() & found["torch"].keys())
    if len(seeds) < 2:
        raise InputError(f"Expected at least two seeds that both loops have run in {folder}, got {seeds}.")
    curves = {loop: {seed: read_log(found[loop][seed]) for seed in seeds} for loop in LOOPS}
    ends = {f"{loop}-{seed}": logs[seed][-1]["step"] for loop, logs in curves.items() for seed in logs}
    if len(set(ends.values())) > 1:
        raise InputError(f"The runs in {folder} have not come equally far: {ends}. Finish them first.")
    return curves


def verdict(final: dict[str, dict[int, float]]) -> dict[str, Any]:
    """The rule of this module.

    Args:
      final: final held-out losses in nats, by loop and seed; the same seeds, at least two.
    """
    ours, torch = (np.array([final[loop][seed] for seed in sorted(final[loop])]) for loop in LOOPS)
    difference = float((ours - torch).mean())
    noise = float(np.sqrt((ours.var(ddof=1) + torch.var(ddof=1)) / 2))
    return {
        "final_held_out_loss": final,
        "mean_difference": difference,
        "differences": (ours - torch).tolist(),
        "seed_deviation": noise,
        "within_noise": abs(difference) <= noise,
        "rule": "abs(mean over seeds of ours - torch) <= pooled standard deviation between seeds",
    }


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """A running mean over `width` values, of fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - width // 2, 0), np.minimum(i + width // 2 + 1, len(values))
    smoothed: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return smoothed


def series(log: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what a log has under a name."""
    pairs = np.array([(record["step"], record[name]) for record in log if name in record])
    return pairs[:, 0], pairs[:, 1]


def compare(folder: Path) -> dict[str, Any]:
    """Writes `learning.json` and `learning.png`; returns the content of the first.

    Args:
      folder: of the experiment.

    Raises:
      InputError: see `read_curves`.
    """
    curves = read_curves(folder)
    final = {loop: {seed: series(log, HELD_OUT)[1][-1] for seed, log in logs.items()} for loop, logs in curves.items()}
    result = verdict(final)
    seeds = sorted(curves["ours"])
    begins = [series(curves["ours"][s], HELD_OUT)[1][0] - series(curves["torch"][s], HELD_OUT)[1][0] for s in seeds]
    steps = series(curves["ours"][seeds[0]], "loss")[0]
    width = max(len(steps) // 40, 1)
    apart = [
        np.abs(
            smooth(series(curves["ours"][s], "loss")[1], width) - smooth(series(curves["torch"][s], "loss")[1], width)
        )
        for s in seeds
    ]
    result |= {
        "steps": int(steps[-1]),
        # Before the first step the loops have the same weights: this is what their arithmetic differs by.
        "difference_before_training": begins,
        "largest_difference_of_smoothed_training_loss": [float(a[len(a) // 10 :].max()) for a in apart],
        "tokens_per_second": {
            loop: float(np.median([np.median(series(log, "tokens_per_second")[1]) for log in logs.values()]))
            for loop, logs in curves.items()
        },
    }
    if (folder / "data.json").exists():
        data = json.loads((folder / "data.json").read_text())
        trained = series(curves["ours"][seeds[0]], "weight")[1].sum()
        result |= {"data": data, "passes_over_the_rows": float(trained) / data["train"]["tokens"]}
    (folder / "learning.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _plot(curves, width, folder / "learning.png")
    return result


def _plot(curves: dict[str, dict[int, list[dict[str, float]]]], width: int, path: Path) -> None:
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    training, held_out = figure.subplots(1, 2)
    for loop, logs in curves.items():
        name, color, dash = LOOPS[loop]
        for i, (seed, log) in enumerate(sorted(logs.items())):
            style: dict[str, Any] = {"color": color, "linestyle": dash, "linewidth": 1.5, "alpha": 1 / (1 + 0.7 * i)}
            style["label"] = f"{name}, seed {seed}"
            steps, losses = series(log, "loss")
            training.plot(steps, smooth(losses, width), **style)
            steps, losses = series(log, HELD_OUT)
            held_out.plot(steps, losses, marker="o" if loop == "ours" else "x", markersize=3.5, **style)
    for axes, title in ((training, f"training loss, mean of {width} steps"), (held_out, "held-out loss")):
        axes.set_title(f"{title} (nats per token)", loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        # The first steps would hide the rest.
        values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        low, high = values.min(), np.quantile(values, 0.97)
        axes.set_ylim(low - 0.05 * (high - low), high)
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("learning-run"))
    print(json.dumps(compare(parser.parse_args().folder), indent=2))


if __name__ == "__main__":
    main()
