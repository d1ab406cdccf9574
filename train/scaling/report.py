"""Fitted loss laws and predictions as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.scaling.loss import PARAMETERS, LossLaw, law_of
from train.scaling.predict import FORM, FittedLoss


def loss_text(fitted: FittedLoss) -> str:
    """A table of the parameters with the other methods and the fits without some runs, and the warnings."""
    intervals = fitted.intervals()
    data = fitted.data
    lines = [
        f"{FORM}, N in {_counting(fitted.counting)}",
        f"{fitted.runs} runs of {data.get('path', 'a table')}, sha256 {str(data.get('sha256', ''))[:12]}",
        "",
        _row("", (*PARAMETERS, "N ~ C^")),
    ]
    lines.append(_row(fitted.method, _cells(fitted.law)))
    if intervals:
        names = (*PARAMETERS, "size_exponent")
        for which, label in ((0, f"  {fitted.level:.0%}, from"), (1, "  to")):
            lines.append(_row(label, [_number(intervals[name][which]) if name in intervals else "-" for name in names]))
    for name, check in fitted.checks.items():
        if "problem" in check:
            lines.append(f"{name:28s}{check['problem']}")
            continue
        if PARAMETERS[0] in check:
            lines.append(_row(name, _cells(law_of(check))))
        else:
            lines.append(_row(name, [*[""] * len(PARAMETERS), _number(check["size_exponent"])]))
    lines += ["", _row("without", (*PARAMETERS, "N ~ C^", "mean |error|", "max"))]
    for one in fitted.left_out:
        lines.append(_without(one))
    lines += ["", f"scatter of runs about the law: {fitted.scatter:.2%}"]
    return "\n".join([*lines, *_warnings(fitted.warnings)])


def _without(one: Mapping[str, Any]) -> str:
    if one["parameters"] is None:
        return f"{one['without']:28s}{one['problem']}"
    errors = [f"{one[name]:.2%}" for name in ("error_mean", "error_max")]
    return _row(one["without"], [*_cells(law_of(one["parameters"])), *errors])


def _cells(law: LossLaw) -> list[str]:
    """The parameters, and the exponent of the optimal size if there is an optimum."""
    size = law.size_exponent
    return [*map(_number, law.values()), "-" if size is None else _number(size)]


def prediction_text(found: Mapping[str, Any]) -> str:
    """The loss of a run with its intervals."""
    lines = [
        f"params {found['params']:.4g} ({_counting(found['counting'])}), tokens {found['tokens']:.4g}, "
        f"{found['flops']:.4g} FLOPs",
        f"loss {found['loss']:.4f}" + _between("of the law", found["interval"]),
    ]
    if found["run_interval"] is not None:
        lines[-1] += "," + _between("of a run", found["run_interval"])
    return "\n".join([*lines, *_warnings(found["warnings"])])


def optimum_text(found: Sequence[Mapping[str, Any]]) -> str:
    """The best run of each budget, with intervals below."""
    names = ("params", "tokens", "tokens_per_param", "loss")
    lines = [_row("FLOPs", names, 12, 18)]
    warnings: dict[str, None] = {}
    for one in found:
        lines.append(_row(f"{one['flops']:.4g}", [_number(one[name]) for name in names], 12, 18))
        for which, label in ((0, "  from"), (1, "  to")):
            if one["intervals"] is not None:
                ends = [_number(one["intervals"][name][which]) for name in names]
                lines.append(_row(label, ends, 12, 18))
        warnings |= dict.fromkeys(f"{one['flops']:.4g} FLOPs: {text}" for text in one["warnings"])
    lines.append(f"params: {_counting(found[0]['counting'])}")
    return "\n".join([*lines, *_warnings(list(warnings))])


def _counting(counting: str) -> str:
    return {
        "total": "all parameters",
        "with-head": "parameters with the output head, without the embedding",
        "non-embedding": "parameters without embedding and output head",
    }.get(counting, "parameters, it is not stated which")


def _row(name: str, cells: Sequence[str], first: int = 28, width: int = 13) -> str:
    return (f"{name:{first}s}" + "".join(f"{cell:>{width}s}" for cell in cells)).rstrip()


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 else f"{value:.5g}"


def _between(what: str, ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" {what} {ends[0]:.4f} to {ends[1]:.4f}"


def _warnings(warnings: Sequence[str]) -> list[str]:
    return ["", *(f"warning: {text}" for text in warnings)] if warnings else []
