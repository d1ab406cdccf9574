"""The page of an evaluation: scores with intervals, parts of benchmarks, problems, and examples to read."""

import html
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.evaluate.run import file_name
from train.files import write_file

# Of each kind of example.
_EXAMPLES, _LONGEST = 3, 1500

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } tr { border-bottom: 1px solid #ddd }
.bar { position: relative; width: 14em; height: 1em; background: #eee }
.bar i { position: absolute; top: 0; bottom: 0; background: #8ab4e8 } .bar b { position: absolute; top: -2px;
bottom: -2px; width: 2px; background: #1a4f91 } pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em }
.warn { color: #a33 } details { margin: .5em 0 } @media (prefers-color-scheme: dark) { body { background: #1b1b1b;
color: #ddd } pre, .bar { background: #2a2a2a } tr { border-color: #444 } }
"""


def write_report(summary: Mapping[str, Any], folder: Path, path: Path) -> None:
    """Writes the page, one file without scripts or links to others.

    Args:
      summary: of `train.evaluate.run.run`.
      folder: with the records of each task.
      path: of the page.
    """
    name = _text(summary["model"]["name"])
    parts = [f"<!doctype html><meta charset=utf-8><title>{name}: evaluation</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{name}</h1>{_scores(summary['tasks'])}")
    for task, found in summary["tasks"].items():
        parts.append(f"<h2>{_text(task)}</h2>{_about(found)}{_groups(found['groups'])}")
        parts += _examples(folder / f"{file_name(task)}.jsonl")
    settings = {key: value for key, value in summary.items() if key != "tasks"}
    parts.append(f"<h2>Settings</h2><pre>{_text(json.dumps(settings, indent=2))}</pre>")
    write_file(path, "\n".join(parts).encode("utf-8", "replace"))


def shown(metric: Mapping[str, Any]) -> tuple[str, str]:
    """The value and the interval of a metric, scaled, for people."""
    if metric["value"] is None:
        return "no score", ""
    value = f"{metric['value'] * metric['scale']:.2f}"
    if metric["low"] is None:
        return value, ""
    return value, f"{metric['low'] * metric['scale']:.2f} to {metric['high'] * metric['scale']:.2f}"


def problems_of(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a task's scores: items without one, answers that were cut, data that has changed."""
    lines = []
    unscored = max((metric["unscored"] for metric in found["metrics"].values()), default=0)
    if unscored:
        lines.append(f"{unscored} of {found['items']} items have no score, and do not count")
    if found["truncated"]:
        lines.append(f"{found['truncated']} of {found['items']} items have answers that were cut at the longest length")
    if found.get("prompts_cut"):
        lines.append(
            f"{found['prompts_cut']} of {found['items']} prompts were longer than the model's context, and lost their "
            "first tokens"
        )
    if found["of"] is not None and found["items"] < found["of"]:
        lines.append(f"the first {found['items']} of {found['of']} items alone")
    lines += [f"{file['path']} is no published version" for file in found["files"] if file.get("known") is False]
    lines += [f"{count} times: {problem}" for problem, count in found["problems"].items()]
    return lines


def _scores(tasks: Mapping[str, Any]) -> str:
    rows = []
    for task, found in tasks.items():
        for name, metric in found["metrics"].items():
            value, interval = shown(metric)
            bar = ""
            if metric["value"] is not None and metric["scale"] == 100 and 0 <= metric["value"] <= 1:
                low = 100 * max(metric["value"] if metric["low"] is None else metric["low"], 0)
                high = 100 * min(metric["value"] if metric["high"] is None else metric["high"], 1)
                bar = (
                    f'<div class=bar><i style="left:{low:.1f}%;width:{max(high - low, 0):.1f}%"></i>'
                    f'<b style="left:{100 * metric["value"]:.1f}%"></b></div>'
                )
            rows.append(
                f"<tr><td>{_text(task)}<td>{_text(name)}<td class=n>{value}<td>{interval}<td>{bar}"
                f"<td class=n>{metric['items']}<td class=n>{found['shots']}"
            )
    head = "<tr><th>task<th>metric<th>score<th>95% interval<th><th>items<th>shots"
    return f"<table>{head}{''.join(rows)}</table>"


def _about(found: Mapping[str, Any]) -> str:
    lines = [f"<p>{_text(found['citation'])}, version {found['version']}, template {found['template'][:12]}"]
    lines += [f"<p class=warn>{_text(line)}" for line in problems_of(found)]
    files = ", ".join(f"{_text(file['path'])} (sha256 {file['sha256'][:12]})" for file in found["files"])
    return "".join(lines) + (f"<p>Data: {files}" if files else "")


def _groups(groups: Mapping[str, Any]) -> str:
    parts = []
    for kind, of in groups.items():
        names = [name for name in next(iter(of.values())) if name != "items"]
        head = "".join(f"<th>{_text(name)}" for name in names)
        rows = "".join(
            f"<tr><td>{_text(part)}<td class=n>{numbers['items']}"
            + "".join(f"<td class=n>{'' if numbers[n] is None else f'{numbers[n]:.4g}'}" for n in names)
            for part, numbers in of.items()
        )
        parts.append(
            f"<details><summary>by {_text(kind)}</summary><table><tr><th><th>items{head}{rows}</table></details>"
        )
    return "".join(parts)


def _examples(path: Path) -> Iterator[str]:
    """The first items of each kind: right, wrong or in between, without a score."""
    if not path.is_file():
        return
    counts = dict.fromkeys(("full score", "no full score", "without a score"), 0)
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            first = next(iter(record["scores"].values()), None)
            kind = "without a score" if first is None else "full score" if first == 1 else "no full score"
            counts[kind] += 1
            if counts[kind] <= _EXAMPLES:
                answers = itertools.chain.from_iterable(record["responses"]) if record.get("responses") else ()
                texts = [str(one.get("text") or "") if isinstance(one, dict) else str(one) for one in answers]
                body = "\n---\n".join(text[:_LONGEST] for text in texts if text)
                detail = json.dumps(record["details"], ensure_ascii=False)[:_LONGEST]
                yield (
                    f"<details><summary>{kind}: {_text(record['id'])}</summary><pre>{_text(detail)}</pre>"
                    f"<pre>{_text(body)}</pre></details>"
                )


def _text(value: object) -> str:
    return html.escape(str(value))
