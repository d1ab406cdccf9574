"""The page at the end of a run: how many items each stage kept, why others were rejected, and what came out."""

import html
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_jax.files import to_json
from train.synthesize.pipeline import EVALUATION_SETS, NEAR_DUPLICATES
from train.synthesize.progress import retries_text

_STYLE = """
body { font-family: sans-serif; margin: 1.5em auto; max-width: 72em; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: .6em 0; } th, td { padding: .25em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
.bar { background: #3b6ea5; height: .8em; display: inline-block; } .note { color: #666; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .7em; }
.fault { color: #a32020; } summary { cursor: pointer; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } pre { background: #262626; }
 tr { border-color: #444; } .note { color: #999; } .fault { color: #ff8a8a; } }
"""


def to_html(summary: Mapping[str, Any]) -> str:
    """The page, without scripts and without anything from elsewhere.

    Args:
      summary: of `train.synthesize.run.run`.
    """
    state = (
        "Finished."
        if summary["finished"]
        else f"<span class=fault>Not finished. {html.escape(summary['fault'] or 'It was stopped.')}</span>"
    )
    body = [
        f"<h1>{html.escape(summary['pipeline'])}</h1><p>{state} Seed {summary['seed']}, qwen_jax "
        f"{html.escape(summary['qwen_jax'])}, {summary['seconds']:,.1f} s in this run.</p>",
        "<h2>Stages</h2>",
        f"<p class=note>{summary['repeated']:,} items of the source came before and were left out.</p>"
        if summary["repeated"]
        else "",
        table(
            ("stage", "in", "out", "yield"),
            ((s["name"], s["in"], s["out"], share(s["out"], s["in"])) for s in summary["stages"]),
        ),
        *(f"<p class=note>{html.escape(text)}</p>" for text in not_cleaned(s["name"] for s in summary["stages"])),
        "<h2>Rejected</h2>",
        *_rejected(summary["stages"]),
        "<h2>Checks on known answers</h2>",
        table(
            ("check", "known to be", "verdicts", "passed"),
            ((n, kind, *counts) for n, kinds in summary["audits"].items() for kind, counts in kinds.items()),
        ),
        "<h2>Models</h2>",
        table(
            ("model", "requests", "prompt tokens", "tokens", "cost"),
            (
                (model, s["requests"], s["prompt_tokens"], s["tokens"], f"{s['cost']:.4f}")
                for model, s in summary["spent"].items()
            ),
        ),
        *(f"<p class=note>{html.escape(text)}</p>" for text in retries_text(summary["retries"])),
        "<h2>Measures</h2>",
        table(("measure", "value"), ((name, to_json(value)) for name, value in summary["measures"].items())),
        "<h2>Examples</h2>",
        *_outputs(summary["outputs"]),
    ]
    return page(summary["pipeline"], "".join(body))


def page(title: str, body: str) -> str:
    """A page that needs nothing from elsewhere.

    Args:
      title: plain text.
      body: HTML.
    """
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        f"'unsafe-inline'\"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{body}</body></html>\n"
    )


def not_cleaned(stages: Iterable[str]) -> list[str]:
    """What a pipeline leaves in its examples, in words; empty if it has both stages of `overlap.cleaned`.

    Args:
      stages: names of its stages.
    """
    names = set(stages)
    said = {
        EVALUATION_SETS: "Examples were not compared with evaluation sets (--decontaminate NAME=FILE).",
        NEAR_DUPLICATES: "Near duplicates were not looked for (--near-duplicates 0.8).",
    }
    return [text for name, text in said.items() if name not in names]


def _rejected(stages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for stage in stages:
        if not stage["rejected"]:
            continue
        yield f"<h3>{html.escape(stage['name'])}</h3>"
        for reason, count in stage["rejected"].items():
            shown = "".join(
                f"<pre>{html.escape(one['id'])} {html.escape(one['detail'])}\n{html.escape(one['data'])}</pre>"
                for one in stage["shown"].get(reason, ())
            )
            yield (
                f"<details><summary>{html.escape(reason)}: {count:,} ({share(count, stage['in'])})</summary>{shown}"
                "</details>"
            )


def _outputs(outputs: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for output in outputs:
        yield f"<h3>{html.escape(output['name'])}: {output['rows']:,} examples</h3>"
        most = max(output["lengths"].values(), default=1)
        rows = "".join(
            f'<tr><td>{int(at):,}</td><td>{count:,}</td><td style="text-align:left">'
            f'<span class="bar" style="width:{20 * count / most:.2f}em"></span></td></tr>'
            for at, count in output["lengths"].items()
        )
        yield f"<table><tr><th>characters from</th><th>examples</th><th></th></tr>{rows}</table>"
        for sample in output["samples"]:
            yield f"<details><summary>an example</summary><pre>{html.escape(sample)}</pre></details>"


def table(names: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A table of plain text and numbers; "None." without rows."""
    lines = ["".join(f"<th>{name}</th>" for name in names)]
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else html.escape(str(cell)) for cell in row)
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    if len(lines) == 1:
        return '<p class="note">None.</p>'
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def share(part: int, whole: int) -> str:
    """A part in percent."""
    return f"{part / whole:.1%}" if whole else "none"
