"""What decontamination found, by evaluation set: a few lines, or a page with both texts of examples side by side."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STYLE = """
body { font-family: sans-serif; margin: 1.5em auto; max-width: 84em; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: .6em 0; } th, td { padding: .25em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; } .note { color: #666; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .7em; margin: .3em 0; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } pre { background: #262626; }
 tr { border-color: #444; } .note { color: #999; } mark { background: #665200; color: #fff; } }
"""
_COUNTS = (
    "items",
    "items of fewer than 13 words",
    "of these, known only as whole texts",
    "records without words",
    "items found",
    "documents",
    "hits",
)


def to_text(summary: Mapping[str, Any], output: Path) -> str:
    """The counts, for a terminal.

    Args:
      summary: of `train.curate.decontaminate.decontaminate`.
      output: the folder.
    """
    lines = [f"{_counted(summary)}. The result is in {output}."]
    if summary["bad"]:
        lines.append(f"  What cannot be read is listed in {output / 'quarantine.jsonl'}.")
    for name, one in summary["sets"].items():
        short = one["items of fewer than 13 words"]
        lines.append(
            f"  {name}: {one['items found']:,} of {one['items']:,} items found, in {one['documents']:,} records"
            + (f"; {short:,} items have fewer than 13 words" if short else "")
            + (f"; {one['records without words']:,} have none" if one["records without words"] else "")
        )
    return "\n".join(lines)


def to_html(summary: Mapping[str, Any]) -> str:
    """The page, without scripts and without anything from elsewhere.

    Args:
      summary: of `train.curate.decontaminate.decontaminate`.
    """
    head = "".join(f"<th>{name}</th>" for name in ("evaluation set", *_COUNTS))
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{one[key]:,}</td>' for key in _COUNTS)}</tr>"
        for name, one in summary["sets"].items()
    )
    body = [
        f"<h1>Decontamination</h1><p>{_counted(summary)}. Mode {summary['settings']['mode']}, action "
        f"{summary['settings']['action']}.</p>",
        "<p class=note>A record counts for each set that it has an item of. Of items of fewer than 13 words the whole "
        "question must be there, together with the answer.</p>",
        f"<table><tr>{head}</tr>{rows}</table>",
    ]
    for name, one in summary["sets"].items():
        if one["examples"]:
            body += f"<h2>{html.escape(name)}</h2>", *map(_example, one["examples"])
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        f"'unsafe-inline'\"><title>Decontamination</title><style>{_STYLE}</style></head><body>{''.join(body)}</body>"
        "</html>\n"
    )


def _counted(summary: Mapping[str, Any]) -> str:
    bad = summary["bad"]
    return (
        f"{summary['records']:,} records: {summary['kept']:,} kept, {summary['dropped']:,} dropped, "
        f"{summary['masked']:,} masked" + (f", {bad:,} cannot be read" if bad else "")
    )


def _example(one: Mapping[str, Any]) -> str:
    before, match, after = (html.escape(one[key]) for key in ("before", "match", "after"))
    return (
        f"<p>{one['common']} of {one['words']} words in common</p><div class=pair><div><div class=note>"
        f"{html.escape(one['file'])}, record {one['record']}</div><pre>{before}<mark>{match}</mark>{after}</pre></div>"
        f"<div><div class=note>{html.escape(one['item'])}</div><pre>{html.escape(one['item_text'])}</pre></div></div>"
    )
