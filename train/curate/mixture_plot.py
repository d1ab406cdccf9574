"""Pictures of a sampling plan: tokens before and after, and the epochs of each cell."""

import base64
import html
import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.curate.mixture_plan import Plan, plan_text
from train.curate.mixture_table import UNSCORED

_INK, _GREY = "#222222", "#8a8a8a"
_UNSCORED = "#c9c9c9"
_WORST, _BEST = np.array([0.80, 0.86, 0.94]), np.array([0.10, 0.29, 0.55])


def plan_png(plan: Plan) -> bytes:
    """Draws shares of tokens by domain before and after, stacked by quality bucket, and the epochs of each cell.

    Returns:
      A PNG file.
    """
    names = list(plan.asked)
    figure = Figure(figsize=(11, 1.6 + 0.42 * max(len(names), len(plan.cells) / 2)), dpi=120, layout="constrained")
    before, after, epochs = figure.subplots(1, 3)
    have = sum(one.cell.tokens for one in plan.cells)
    _stacks(before, plan, names, [one.cell.tokens / max(have, 1) for one in plan.cells])
    _style(before, f"before: {have:,} tokens, share in %")
    _stacks(after, plan, names, [one.tokens / max(plan.tokens, 1) for one in plan.cells])
    after.scatter(
        [100 * plan.asked[name] for name in names], range(len(names)), marker="|", s=160, color=_INK, label="asked for"
    )
    after.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _style(after, f"after: {plan.tokens:,} tokens, share in %")
    most = max(before.get_xlim()[1], after.get_xlim()[1])
    before.set_xlim(0, most)
    after.set_xlim(0, most)
    after.set_yticklabels([])
    # Epochs, with the cap of each domain.
    for place, one in enumerate(plan.cells):
        epochs.barh(place, one.epochs, color=_colour(one.cell.bucket, plan), height=0.7)
        cap = plan.max_epochs[one.cell.domain]
        epochs.plot([cap, cap], [place - 0.42, place + 0.42], color="#d1662b", linewidth=1.4)
    epochs.set_yticks(range(len(plan.cells)), [one.cell.name for one in plan.cells], fontsize=8)
    epochs.invert_yaxis()
    _style(epochs, "epochs, and their cap")
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def plan_html(plan: Plan) -> str:
    """The picture and the table as a part of a page."""
    picture = base64.b64encode(plan_png(plan)).decode()
    return (
        f'<img alt="tokens before and after, and epochs of each cell" src="data:image/png;base64,{picture}" '
        f'style="max-width:100%"><pre>{html.escape(plan_text(plan))}</pre>'
    )


def _stacks(axes: Axes, plan: Plan, names: list[str], shares: list[float]) -> None:
    """A bar for each domain, the best bucket first."""
    for place, name in enumerate(names):
        left = 0.0
        mine = [(one, share) for one, share in zip(plan.cells, shares, strict=True) if one.cell.domain == name]
        for one, share in reversed(mine):
            axes.barh(place, 100 * share, left=left, color=_colour(one.cell.bucket, plan), height=0.7)
            left += 100 * share
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()


def _colour(bucket: int, plan: Plan) -> object:
    if bucket == UNSCORED:
        return _UNSCORED
    most = max((len(found) for found in plan.thresholds.values()), default=0)
    part = bucket / most if most else 0.6
    return tuple(_WORST + part * (_BEST - _WORST))


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cccccc")
    axes.tick_params(colors=_GREY, labelsize=8)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
